"""Blocks that run as graphs beneath their gates: `depth.compile()`'s, and those of users.

Nothing can be drawn in a graph. A block's gate stays outside, in training, and the block's forward
beneath it is compiled: the graph only ever sees a block all of whose branches run. What they are
multiplied by are 0-dim tensors, so that no step of a schedule needs another graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count
from types import FunctionType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from stochastic_depth.errors import OptionError, warn
from stochastic_depth.gating.gate import Gate, ModuleCall, Original, gate_of, running
from stochastic_depth.gating.recomputation import remembered
from stochastic_depth.plan import Plan
from stochastic_depth.torch_private import tracing
from stochastic_depth.torch_private.trees import tree_leaves

_numbers = count()
_functions: WeakKeyDictionary[nn.Module, FunctionType] = WeakKeyDictionary()


@dataclass(eq=False, slots=True)
class Compiled:
    """The `_compiled_call_impl` of a block: a checkpoint may call it without the block's gate."""

    name: str
    gate: Gate
    module: nn.Module
    graph: Original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        eagerly = not is_dynamo_compiling() and remembered(self, self._runs_in_part)
        call = _call if eagerly else self.graph
        return call(nn.Module._call_impl, self.module, *args, **kwargs)

    def _runs_in_part(self) -> bool:
        return any(gate is self.gate and passage for gate, _, passage, _, _ in running.blocks)


def compile_blocks(model: nn.Module, plan: Plan, options: Mapping[str, Any]) -> None:
    """Have the plan's blocks run as graphs, beneath their gates.

    Raises:
        OptionError: None of them can.
    """
    gated = [(module, gate) for module in model.modules() if (gate := gate_of(module))]
    blocks = [(module, gate) for module, gate in gated if gate.plan is plan and gate.units]
    for module, _ in blocks:
        release(module)
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
    chosen = [(_kind(module), gate.name) for module, gate in blocks if gate.name not in obstacles]
    graphs = {kind: torch.compile(_function(kind), **options) for kind in dict(chosen)}
    plan.graphs = {name: graphs[kind] for kind, name in chosen}


def release(module: nn.Module) -> None:
    """Have a block that `depth.compile()` compiled run eagerly."""
    if isinstance(module._compiled_call_impl, Compiled):
        del module._compiled_call_impl


def _obstacle(module: nn.Module, gate: Gate) -> str | None:
    if gate.known is None:  # it was not watched
        return "what a Residual adds is known only when it is called"
    if tracing.is_compiled(module):
        return "it was compiled on its own"
    if not gate.simple_ends and gate.plan.scale != "none":
        return "what one of its modules is differs from call to call"
    inner = [gate_of(part) for part in module.modules() if part is not module]
    return "there are blocks in it" if any(gate and gate.units for gate in inner) else None


def _kind(module: nn.Module) -> Any:
    """What blocks have in common that look alike; where they differ in more, torch finds out."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    parts = module.named_modules()  # by their own classes: ends may be asleep
    return tuple((n, getattr(type(m), "gated_from", type(m))) for n, m in parts), tuple(
        (name, t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for name, t in tensors
    )


def _function(kind: Any) -> FunctionType:
    """A function that calls a block of this kind, with a code object of its own.

    By the code torch keeps its graphs, and few of each.
    """
    (_, block), *_ = kind[0]
    code = cast(FunctionType, _call).__code__.replace(co_name=f"{block.__name__}_{next(_numbers)}")
    return FunctionType(code, globals(), code.co_name)


def _call(run: Original, *args: Any, **kwargs: Any) -> Any:
    return run(*args, **kwargs)


_shared_function = cache(_function)  # for graphs that users make


def run_compiled(call: ModuleCall, factors: tuple[float, ...] | None) -> Any:
    """A block all of whose branches run, as a graph."""
    gate, module, original, args, kwargs = call
    graph, compiler = gate.plan.graphs.get(gate.name), running.compiler
    if factors is None and gate.plan.scale == ("train" if module.training else "eval"):
        factors = (1.0,) * len(gate.units)  # one graph for a rate of 0, now or always, and others
    gate.scales = None if factors is None else _scales(factors, args, kwargs)
    if graph is not None and module._compiled_call_impl is None:  # also of a copy
        module._compiled_call_impl = Compiled(gate.name, gate, module, graph)
    if compiler is None or tracing.is_compiled(module):
        return original(module, *args, **kwargs)
    function = _functions.get(module)
    if function is None:
        function = _functions[module] = _shared_function(_kind(module))
    before, running.compiler = tracing.set_compiler(compiler), None
    try:
        return function(original, module, *args, **kwargs)
    finally:
        tracing.set_compiler(before)
        running.compiler = compiler


def let_rows_vary(gate: Gate, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Have a graph that is made for some rows of the batch hold for any number of them."""
    if gate.plan.graphs or running.compiler is not None or tracing.is_compiled(module):
        for leaf, dim, _ in gate.batch.leaves(args, kwargs):
            tracing.let_vary(leaf, dim)


def _scales(factors: tuple[float, ...], args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Factors as a graph takes them: on the device of the block's input."""
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            dtype = torch.promote_types(leaf.dtype, torch.float32)  # as a number counts in eager
            return tuple([_scalar(factor, leaf.device, dtype) for factor in factors])
    return factors


@lru_cache(maxsize=4096)
def _scalar(factor: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A factor as a graph's input, so that another one needs no other graph."""
    with tracing.without_modes(), torch.inference_mode(False):  # noqa: FBT003
        return torch.tensor(factor, dtype=dtype, device=device)
