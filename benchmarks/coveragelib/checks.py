"""What is checked on every model of the coverage table, against hooks that zero or mask branches.

The hooks sit on the modules that end a branch, in a copy without gates. Both run in train mode,
with a dropout that is the same in both, so that what acts in training only is seen; BatchNorm is in
eval mode after the first run, as it makes much of rounding.
"""

from __future__ import annotations

import ast
import copy
import gc
import random
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import stochastic_depth as sd
from coveragelib.ends import End, changed_at, ends_of
from coveragelib.predictable import predictable_dropout
from stochastic_depth.discovery.blocks import Discovery

Mode = Callable[[nn.Module], nn.Module]
LARGE = 100e6
"""Parameters; of larger models only some blocks are closed alone: each takes whole copies."""
ROUNDING = 1e-5
"""Of the largest gradient: where a branch is skipped whole, gradients meet in another order."""
ROWS_ROUNDING = 1e-3
"""The same in mode "sample": kernels sum in another order for another number of rows."""


@dataclass
class Checked:
    """What was found out about one model: "yes", "rounding", or what is wrong or why not."""

    open_gates: str = ""
    closed: str = ""
    nothing_ran: str = ""
    fold: str = ""
    rows: str = ""
    how: str = ""
    time_saved: float | None = None


def pasted(model: nn.Module, example: Any) -> list[str] | None:
    """What to pass as `blocks=`, as errors say what to paste; None for all.

    Raises:
        RefusedBlockError: No block is left.
    """
    copied = copy.deepcopy(model)
    try:
        sd.apply_stochastic_depth(copied, 0.5, example_inputs=example, scale="none")
    except sd.RefusedBlockError as error:
        paste = re.search(r"blocks=(\[.*?\])", str(error))
        if paste is None:
            raise
        keep: list[str] = ast.literal_eval(paste[1])
        sd.apply_stochastic_depth(copied, 0.5, example_inputs=example, scale="none", blocks=keep)
        return keep
    return None


def check(
    model: nn.Module, example: Any, more_rows: Any, found: Discovery, keep: list[str] | None
) -> Checked:
    """All checks of a model.

    Args:
        model: In its plain state.
        example: What it is called with.
        more_rows: The same with more examples in the batch.
        found: What was found in it.
        keep: The blocks to gate.
    """
    result = Checked()
    gated = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(gated, 0.5, example_inputs=example, scale="none", blocks=keep)
    names = {block.name for block in depth.blocks}
    blocks = [block for block in found.blocks if block.name in names]
    ends = {block.name: list(ends_of(found, block)) for block in blocks}
    rows = str(depth).splitlines()
    result.how = f"{sum('whole' in row for row in rows)} whole of {len(blocks)}"
    result.open_gates = _compared(model, gated, {}, example, (), lambda m: m.train())
    large = sum(p.numel() for p in model.parameters()) > LARGE
    patterns = [{name: False} for name in (list(ends)[:: len(ends) // 3] if large else ends)]
    rng = random.Random(0)
    halves = [dict.fromkeys(rng.sample(list(ends), max(1, len(ends) // 2)), False) for _ in "abc"]
    runs: list[tuple[dict[str, bool], Mode]]
    runs = [(pattern, _without_batch_norm) for pattern in patterns + halves]
    runs += [(pattern, lambda m: m.eval()) for pattern in halves]
    answers = {
        _compared(model, gated, pattern, example, [e for n in pattern for e in ends[n]], mode)
        for pattern, mode in runs
    }
    result.closed = max(answers, key=lambda text: (text not in ("yes", "rounding"), text != "yes"))
    result.nothing_ran = _nothing_runs(gated, depth, example, blocks)
    result.time_saved = _time_saved(gated, depth, example, list(ends))
    result.fold = _folds(model, example, keep)
    # The rows of a block inside of another one are those of the other one's kept rows.
    outer = {block.name: ends[block.name] for block in blocks if not block.nesting}
    result.rows = _rows_equal_masks(model, more_rows, outer)
    return result


def run(
    model: nn.Module, example: Any, *, dropout: bool = True
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The floating outputs of one forward and the gradients, under a fixed seed."""
    model.zero_grad()
    with predictable_dropout(acts=dropout):
        output = run_forward(model, example)
    tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    tensors = [x for x in tensors if x.requires_grad]
    sum(x.square().mean() for x in tensors).backward()  # type: ignore[union-attr]
    return tensors, [None if p.grad is None else p.grad for p in model.parameters()]


def _compared(
    plain: nn.Module,
    gated: nn.Module,
    pattern: dict[str, bool],
    example: Any,
    ends: Collection[End],
    mode: Mode,
) -> str:
    """With these gates: the same as with these ends at zero, in this mode?"""
    mine, reference = copy.deepcopy(gated), copy.deepcopy(plain)
    with sd.get_stochastic_depth(mine).fixed(pattern):
        own = run(mode(mine), example)
    with changed_at(reference, ends, lambda end, value: torch.zeros_like(value)):
        other = run(mode(reference), example)
    where = ", ".join(pattern) if len(pattern) < 3 else f"{len(pattern)} blocks"
    answer = same(own, other, ROUNDING, where or "open")
    del mine, reference, own, other
    gc.collect()  # else copies of large models pile up until they fill the memory
    return answer


def same(own: Any, other: Any, rounding: float, where: str) -> str:
    """Whether they are: "yes", up to "rounding", or where outputs or gradients differ."""
    exact = True
    for a, b in zip(own[0], other[0], strict=True):
        if not torch.equal(a, b):
            exact = False
            if not bool((a - b).abs().max() <= rounding * b.abs().max()):
                return f"outputs differ ({where})"
    for a, b in zip(own[1], other[1], strict=True):
        if a is None and b is None:
            continue
        mine, theirs = (torch.zeros(()) if g is None else g for g in (a, b))
        if not bool((mine == theirs).all()):
            exact = False
            if not bool((mine - theirs).norm() <= rounding * theirs.norm() + 1e-7):
                return f"gradients differ ({where})"
    return "yes" if exact else "rounding"


def _nothing_runs(
    gated: nn.Module, depth: sd.StochasticDepth, example: Any, blocks: list[sd.ResidualBlock]
) -> str:
    """Whether all modules with parameters in all branches stay still when all are closed."""
    ran: list[str] = []
    handles = []
    for block in blocks:
        for name in {m for branch in block.branches for m in branch.modules}:
            for part, module in gated.get_submodule(name).named_modules():
                if next(module.parameters(recurse=False), None) is not None:
                    hook = lambda *_, key=f"{name}.{part}": ran.append(key)  # noqa: E731
                    handles.append(module.register_forward_hook(hook))
    closed = {block.name: False for block in blocks}
    with depth.fixed(closed), torch.no_grad():
        run_forward(gated.eval(), example)
    for handle in handles:
        handle.remove()
    return f"{ran[0]} ran" if ran else "yes"


def run_forward(model: nn.Module, example: Any) -> Any:
    """One forward, under a fixed seed."""
    torch.manual_seed(5)
    return model(**example) if isinstance(example, Mapping) else model(example)


def _time_saved(
    gated: nn.Module, depth: sd.StochasticDepth, example: Any, names: list[str]
) -> float:
    """The part of a step's time that every second block closed saves; a few steps, so roughly."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    half = dict.fromkeys(names[::2], False)
    for _ in range(3):
        for is_open in seconds:
            with depth.fixed({} if is_open else half):
                start = time.perf_counter()
                run(gated.eval(), example)
                seconds[is_open].append(time.perf_counter() - start)
    return 1 - median(seconds[False]) / median(seconds[True])


def _folds(model: nn.Module, example: Any, keep: list[str] | None) -> str:
    folded, given = _in_double(model, example)
    try:
        depth = sd.apply_stochastic_depth(folded, 0.3, example_inputs=given, blocks=keep)
    except sd.RefusedBlockError as error:
        return "no: " + str(error).partition(" Expected")[0]
    with torch.no_grad():
        expected = tree_leaves(run_forward(folded.eval(), given))
        try:
            depth.fold()
        except sd.StochasticDepthError as error:
            return "no: " + str(error).partition(" Expected")[0]
        found = tree_leaves(run_forward(folded.eval(), given))
    for a, b in zip(found, expected, strict=True):
        bound = 1e-6 if _is_floating(a) and a.dtype == torch.float64 else 1e-4
        if _is_floating(a) and not bool((a - b).abs().max() <= bound * b.abs().max() + 1e-6):
            return "outputs differ"
    return "yes"


def _in_double(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """A copy in double precision where it can: random networks make much of rounding.

    Longformer's own gradients are NaN then.
    """
    given = tree_map(lambda x: x.double() if _is_floating(x) else x, example)
    try:
        # Another copy: one that ran may keep a tensor of its graph, and cannot be copied.
        tried = _without_batch_norm(copy.deepcopy(model).double())
        _, gradients = run(tried, given, dropout=False)
    except RuntimeError:
        return copy.deepcopy(model), example
    if not all(bool(each.isfinite().all()) for each in gradients if each is not None):
        return copy.deepcopy(model), example
    return copy.deepcopy(model).double(), given


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _rows_equal_masks(model: nn.Module, example: Any, ends: Mapping[str, list[End]]) -> str:
    gated, example = _in_double(model, example)
    reference = copy.deepcopy(gated)
    try:
        depth = sd.apply_stochastic_depth(
            gated, 0.5, "uniform", example_inputs=example, mode="sample", blocks=list(ends)
        )
    except sd.StochasticDepthError as error:
        return "refused: " + str(error).partition(" Expected")[0]
    own = run(_without_batch_norm(gated), example, dropout=False)
    first = example if isinstance(example, Tensor) else next(iter(example.values()))
    masks = {}
    for name, kept in depth.last_gates.items():
        assert not isinstance(kept, bool)
        mask = torch.zeros(len(first))
        mask[list(kept)] = 2.0
        masks.update(dict.fromkeys(ends[name], mask))

    def masked(end: End, value: Tensor) -> Tensor:
        sizes = list(value.shape)
        # The batch comes first, but where it is found as it is, further back (sequence first).
        dim = 0 if sizes[0] == len(first) or len(first) not in sizes else sizes.index(len(first))
        each = masks[end].repeat_interleave(sizes[dim] // len(first))
        return value * each.view([-1 if d == dim else 1 for d in range(value.ndim)])

    with changed_at(reference, list(masks), masked):
        other = run(_without_batch_norm(reference), example, dropout=False)
    return same(own, other, ROWS_ROUNDING, "rows")


def _without_batch_norm(model: nn.Module) -> nn.Module:
    """In train mode, but for what looks at the whole batch."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model
