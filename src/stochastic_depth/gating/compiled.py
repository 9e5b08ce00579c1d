"""`depth.compile()`, and what a gated module does while torch.compile or torch.export looks at it.

Nothing can be drawn in a graph. A block's gate stays outside, in training, and the block's forward
beneath it is compiled: the graph only ever sees a block all of whose branches run. What they are
multiplied by are 0-dim tensors, so that no step of a schedule needs another graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import OptionError, warn
from stochastic_depth.gating.gate import Gate, Original, gate_of
from stochastic_depth.plan import Plan
from stochastic_depth.rows import change_leaves
from stochastic_depth.torch_private import (
    is_compiled,
    let_vary,
    once_in_a_trace,
    outside_of_graphs,
    tree_leaves,
)

_call_outside: Any = None  # `_call`, outside of all graphs; made in a trace: that takes an import


def compile_blocks(model: nn.Module, plan: Plan, options: Mapping[str, Any]) -> None:
    """Have the plan's blocks run as graphs, beneath their gates.

    Raises:
        OptionError: None of them can.
    """
    gated = [(module, gate) for module in model.modules() if (gate := gate_of(module)) is not None]
    blocks = [(module, gate) for module, gate in gated if gate.plan is plan and gate.units]
    obstacles = {gate.name: why for module, gate in blocks if (why := _obstacle(module))}
    if obstacles:
        name, why = next(iter(obstacles.items()))
        some = f'{len(obstacles)} of {len(blocks)} blocks ("{name}": {why})'
        if len(obstacles) == len(blocks):
            raise OptionError(
                f"depth.compile() cannot compile {some}",
                expected="blocks whose forwards are known, without blocks in them",
                instead="leave depth.compile() out, and compile other parts of the model",
            )
        warn(f"depth.compile() leaves {some} as they are")
    plan.compiling = True
    functions: dict[Any, Any] = {}
    for module, gate in blocks:
        if gate.name not in obstacles:
            kind = _kind(module)
            if kind not in functions:
                # torch keeps graphs by code object, few of each: each kind has one of its own.
                code = _run_impl.__code__.replace(co_name=f"run_{type(module).__name__}")
                function = FunctionType(code, _run_impl.__globals__, code.co_name)
                functions[kind] = torch.compile(function, **options)
            module._compiled_call_impl = partial(functions[kind], module)


def _run_impl(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


def _obstacle(module: nn.Module) -> str | None:
    gate = gate_of(module)
    assert gate is not None
    if gate.is_residual:
        return "what a Residual adds is known only when it is called"
    inner = [gate_of(part) for part in module.modules() if part is not module]
    return "there are blocks in it" if any(gate and gate.units for gate in inner) else None


def _kind(module: nn.Module) -> Any:
    """What blocks have in common that look alike; where they differ in more, torch finds out."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return tuple((name, type(part)) for name, part in module.named_modules()), tuple(
        (name, t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for name, t in tensors
    )


def let_rows_vary(module: nn.Module, arguments: Any, dims: Mapping[int, int]) -> None:
    """Have a graph that is made for some rows of the batch hold for any number of them."""
    if is_compiled(module):
        leaves = tree_leaves(arguments)
        for number, dim in dims.items():
            if leaves[number] is not None:
                let_vary(leaves[number], dim)


def scales(factors: tuple[float, ...] | None, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """Factors as a graph takes them: on the device of the block's input."""
    if factors is None:
        return None
    leaves = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    like = next((leaf for leaf in leaves if leaf.is_floating_point()), None)
    if like is None:
        return factors
    double = like.dtype is torch.float64
    return tuple(_scalar(factor, like.device, double=double) for factor in factors)


@lru_cache(maxsize=4096)
def _scalar(factor: float, device: torch.device, *, double: bool) -> Tensor:
    """A factor as a graph's input, so that another one needs no other graph."""
    dtype = torch.float64 if double else torch.float32  # as a number counts in eager
    with torch.inference_mode(False):  # noqa: FBT003
        return torch.tensor(factor, dtype=dtype, device=device)


def traced_call(module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """A gated module's call in a trace."""
    gate: Any = module._stochastic_depth
    if gate.units:
        if module.training or gate.plan.forcing or not gate.simple_ends:
            _make_way()
            return _call_outside(module, original, args, kwargs)
        gate.scales = gate.plan.inference_factors(gate.units)
    output = original(module, *args, **kwargs)
    role = gate.role
    if role is not None and role.ends and gate.owners[0].scales is not None:
        scale = gate.owners[0].scales[role.branch]
        output = change_leaves(output, role.ends, lambda leaf, number: _times(leaf, scale))
    return output


def _times(value: Tensor, scale: Any) -> Tensor:
    """The product, with a factor that is not rounded to half a precision before."""
    if isinstance(scale, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return (value.float() * scale).to(value.dtype)
    return value * scale


def _call(module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """A call whose gate no graph holds; what it calls may be compiled."""
    from stochastic_depth.gating.block import call_block

    gate = gate_of(module)
    assert gate is not None
    gate.plan.compiling = True
    return call_block(gate, module, original, args, kwargs)


@once_in_a_trace
def _make_way() -> None:
    global _call_outside
    _call_outside = _call_outside or outside_of_graphs(_call)
