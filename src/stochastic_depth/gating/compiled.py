"""`depth.compile()`, and what a gated module does while torch.compile or torch.export looks at it.

Nothing can be drawn in a graph. A block's gate stays outside, in training, and the block's forward
beneath it is compiled: the graph only ever sees a block all of whose branches run. What they are
multiplied by are 0-dim tensors, so that no step of a schedule needs another graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache, partial
from itertools import count
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from stochastic_depth.errors import OptionError, warn
from stochastic_depth.gating.gate import Gate, Original, gate_of, running
from stochastic_depth.plan import Plan
from stochastic_depth.rows import change_leaves
from stochastic_depth.torch_private import (
    is_compiled,
    let_vary,
    once_in_a_trace,
    outside_of_graphs,
    set_compiler,
    tree_leaves,
)

_WHY = (
    "what stochastic depth drops is drawn anew at every call, outside of all graphs: leave "
    "fullgraph=True out, or call depth.compile(), which compiles block by block"
)
_numbers = count()
_call_outside: Any = None  # `_call`, outside of all graphs; made in a trace: that takes an import


def compile_blocks(model: nn.Module, plan: Plan, options: Mapping[str, Any]) -> None:
    """Have the plan's blocks run as graphs, beneath their gates.

    Raises:
        OptionError: None of them can.
    """
    gated = [(module, gate) for module in model.modules() if (gate := gate_of(module)) is not None]
    blocks = [(module, gate) for module, gate in gated if gate.plan is plan and gate.units]
    obstacles = {gate.name: why for module, gate in blocks if (why := _obstacle(module, gate))}
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
                function = _apart(cast(FunctionType, _run_impl), type(module).__name__)
                functions[kind] = torch.compile(function, **options)
            module._compiled_call_impl = partial(functions[kind], module)


def _run_impl(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


def _run_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module.__class__.gated_from.__call__(module, *args, **kwargs)  # type: ignore[attr-defined]


def _apart(function: FunctionType, kind: str) -> FunctionType:
    """The same function with a code of its own: by that torch keeps graphs, few of each."""
    code = function.__code__.replace(co_name=f"run_{kind}_{next(_numbers)}")
    return FunctionType(code, function.__globals__, code.co_name)


@cache
def _run_of(kind: Any) -> FunctionType:
    return _apart(cast(FunctionType, _run_call), kind.__name__)


def _obstacle(module: nn.Module, gate: Gate) -> str | None:
    if gate.is_residual:
        return "what a Residual adds is known only when it is called"
    if is_compiled(module):
        return "it was compiled on its own"
    if not gate.simple_ends and gate.plan.scale != "none":
        return "what one of its modules is differs from call to call"
    inner = [gate_of(part) for part in module.modules() if part is not module]
    return "there are blocks in it" if any(gate and gate.units for gate in inner) else None


def _kind(module: nn.Module) -> Any:
    """What blocks have in common that look alike; where they differ in more, torch finds out."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return tuple((name, type(part)) for name, part in module.named_modules()), tuple(
        (name, t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for name, t in tensors
    )


def run_compiled(gate: Gate, module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """A block all of whose branches run, as a graph."""
    factors = gate.factors
    if factors is None and gate.plan.may_multiply(gate.units, training=module.training):
        factors = (1.0,) * len(gate.units)  # until the schedule begins
    gate.scales = None if factors is None else _scales(factors, args, kwargs)
    compiler = running.compiler
    if compiler is None:
        return original(module, *args, **kwargs)
    running.compiler = None
    before = set_compiler(compiler)
    try:
        return _run_of(cast(Any, type(module)))(module, *args, **kwargs)
    finally:
        set_compiler(before)
        running.compiler = compiler


def let_rows_vary(module: nn.Module, arguments: Any, dims: Mapping[int, int]) -> None:
    """Have a graph that is made for some rows of the batch hold for any number of them."""
    if is_compiled(module):
        leaves = tree_leaves(arguments)
        for number, dim in dims.items():
            if leaves[number] is not None:
                let_vary(leaves[number], dim)


def _scales(factors: tuple[float, ...], args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Factors as a graph takes them: on the device of the block's input."""
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
    stays_out = gate.units and (module.training or gate.plan.forcing or not gate.simple_ends)
    if stays_out or not is_dynamo_compiling():  # the latter where torch gave up on this function
        _make_way()
        return _call_outside(module, original, args, kwargs)
    if gate.units:
        gate.scales = gate.plan.inference_factors(gate.units)
    output = original(module, *args, **kwargs)
    role = gate.role
    if role is not None and role.ends and gate.owners[0].scales is not None:
        scales = gate.owners[0].scales
        output = change_leaves(
            output, role.ends, lambda leaf, n: _times(leaf, scales[role.ends[n]])
        )
    return output


def _times(value: Tensor, scale: Any) -> Tensor:
    """The product, with a factor that is not rounded to half a precision before."""
    if isinstance(scale, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return (value.float() * scale).to(value.dtype)
    return value * scale


def _call(module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """A call whose gate no graph holds; what it calls may be compiled."""
    from stochastic_depth.gating.block import call_block
    from stochastic_depth.gating.branch import call_branch_module

    gate = gate_of(module)
    assert gate is not None
    call = call_branch_module if gate.roles else call_block
    gate.plan.compiling = True
    before, running.compiler = running.compiler, set_compiler(None)
    try:
        return call(gate, module, original, args, kwargs)
    finally:
        set_compiler(running.compiler)
        running.compiler = before


@once_in_a_trace
def _make_way() -> None:
    global _call_outside
    _call_outside = _call_outside or outside_of_graphs(_call, _WHY)
