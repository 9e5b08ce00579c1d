"""The call of a `Residual`: it is told its branch, so it needs no watch and no stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.deciding import Batch, inference_factor
from stochastic_depth.errors import OptionError, SetupError
from stochastic_depth.gating.container import without_collectives
from stochastic_depth.gating.entry import enter
from stochastic_depth.gating.passage import Gate, Passage, running
from stochastic_depth.rows import Rows, put_back, take
from stochastic_depth.torch_private import backward_is_running


def survival(gate: Gate) -> float:
    """What its branch is multiplied by in inference."""
    (block,), branch = gate.blocks, gate.branch
    assert branch is not None
    return inference_factor(gate.plan, block, branch)


def call_explicit(
    gate: Gate,
    module: nn.Module,
    branch: Callable[..., Tensor],
    skip: Tensor,
    args: tuple[Any, ...],
) -> Tensor:
    """`skip + branch(*args)`, as it is decided about this call.

    Args:
        gate: The gate of the `Residual`.
        module: The `Residual`.
        branch: Its branch.
        skip: What it is added to.
        args: What the branch takes.
    """
    if running.open_all:
        return skip + branch(*args)
    plan = gate.plan
    owners = list(_modules_of(branch))
    holder = owners[0] if owners else None
    if module.training and holder is not None:
        plan.expect_steps(gate.name, holder)
    passage = enter(gate, module, lambda: Batch(len(skip), skip.device), holder=holder)
    decision, number = passage.decisions[gate.blocks[0]], gate.branch
    assert number is not None
    if decision.kept[number]:
        run = partial(_run, passage, branch, decision.factors[number])
        out = _on_rows(decision.rows[number], run, skip, args)
    else:
        out = skip.clone()  # what follows may change it in place
        if passage.hung is not None:
            out = passage.hung.skip(out, _parameters_of(gate, branch, owners))
    if passage.wrapper is not None and not backward_is_running():
        differ = plan.ranks_differ or plan.forced is not None
        plan.reduction.expect(passage.wrapper, (out, skip, args), differ=differ)
    return out


def _run(
    passage: Passage, branch: Callable[..., Tensor], factor: float, skip: Tensor, *args: Any
) -> Tensor:
    """The sum; gates inside of the branch find what was decided about it."""
    running.passages.append(passage)
    try:
        with without_collectives(passage) if passage.may_part else nullcontext():
            value = branch(*args)
    finally:
        running.passages.pop()
    _check(passage.gate.name, value, skip)
    return skip + value if factor == 1.0 else torch.add(skip, value, alpha=factor)


def _check(name: str, value: Any, skip: Tensor) -> None:
    """Raises where a branch's value cannot be added to the skip as it is."""
    tracing: bool = torch._C._get_tracing_state() is not None  # there sizes are tensors
    if tracing or (isinstance(value, Tensor) and value.shape == skip.shape):
        return
    what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "that is no tensor"
    raise OptionError(
        f'the branch of "{name}" returned a value {what}',
        expected=f"a tensor of shape {tuple(skip.shape)}, as what it is added to",
        instead="pass skip= with a projection where the branch changes the shape; and in mode "
        '"sample" what else holds the batch as arguments, residual(x, branch, mask)',
    )


def _on_rows(
    rows: Rows | None, run: Callable[..., Tensor], skip: Tensor, args: tuple[Any, ...]
) -> Tensor:
    """The sum on these rows of the batch; the others come to the skip."""
    if rows is None:
        return run(skip, *args)
    given = (skip, *args)
    held = {
        number: 0
        for number, value in enumerate(given)
        if isinstance(value, Tensor) and value.ndim and len(value) == len(skip)
    }
    some, rests = take(given, held, rows)
    out: Tensor = put_back(run(*some), {0: (0, 0)}, rests, rows)
    return out


def _parameters_of(gate: Gate, branch: Any, owners: list[nn.Module]) -> list[nn.Parameter]:
    """The parameters that a dropped branch may have; more do no harm."""
    found = [part for part in _parts(branch) if isinstance(part, nn.Parameter)]
    found += [parameter for owner in owners for parameter in owner.parameters()]
    if not found:
        raise SetupError(
            f'"{gate.name}" is dropped under DistributedDataParallel, and no module is found in '
            "its branch",
            expected="a branch whose parameters can be told",
            instead="pass a module, or a method of one, as the branch",
        )
    return list(dict.fromkeys(found))


def _modules_of(branch: Any) -> Iterator[nn.Module]:
    """The modules that a branch is, belongs to, or holds."""
    return (part for part in _parts(branch) if isinstance(part, nn.Module))


def _parts(value: Any, depth: int = 4) -> Iterator[Any]:
    """Modules and parameters in a function: in its closure, defaults, and functions it calls."""
    if isinstance(value, nn.Module | nn.Parameter):
        yield value
        return
    inside: list[Any] = []
    if isinstance(value, partial):
        inside += [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, list | tuple):
        inside += value
    elif isinstance(value, dict):
        inside += value.values()
    elif callable(value):
        inside.append(getattr(value, "__self__", None))
        inside += getattr(value, "__defaults__", None) or ()
        inside += (getattr(value, "__kwdefaults__", None) or {}).values()
        inside += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    for part in inside if depth else ():
        yield from _parts(part, depth - 1)
