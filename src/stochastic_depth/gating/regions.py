"""`depth.compile()`: the forwards of blocks as graphs, beneath their gates and their hooks.

What is drawn is decided outside, so a graph only ever sees a block whose branches all run. A graph
holds for all blocks that are alike. Every *region* is a code object of its own: torch keeps graphs
by code object, few of each, and goes eager without a word where there are more.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.templates import signature
from stochastic_depth.errors import OptionError, warn
from stochastic_depth.gating.attach import gated_modules
from stochastic_depth.gating.compiled import Graph
from stochastic_depth.gating.passage import Gate, Original
from stochastic_depth.gating.swap import compile_in
from stochastic_depth.gating.traced import graphs, open_block
from stochastic_depth.plan import Plan
from stochastic_depth.torch_private import tree_leaves

_FULL = 4  # graphs in a region, where blocks that look alike differ in what their forwards read
_building = threading.RLock()


def compile_blocks(model: nn.Module, plan: Plan, options: Mapping[str, Any]) -> None:
    """Have the plan's containers run as graphs.

    Raises:
        OptionError: None of them can.
    """
    containers = [(m, gate) for _, m, gate in gated_modules(model) if gate.plan is plan]
    containers = [(module, gate) for module, gate in containers if gate.blocks]
    obstacles = {gate.name: why for module, gate in containers if (why := _obstacle(module, gate))}
    if obstacles:
        name, why = next(iter(obstacles.items()))
        some = f'{len(obstacles)} of {len(containers)} blocks ("{name}": {why})'
        if len(obstacles) == len(containers):
            raise OptionError(
                f"depth.compile() cannot compile {some}",
                expected="blocks whose forwards are known, without blocks in them",
                instead="leave depth.compile() out, and compile other parts of the model",
            )
        warn(f"depth.compile() leaves {some} as they are")
    plan.compiler = Compiler(dict(options))
    for module, gate in containers:
        if gate.name not in obstacles:
            gate.beneath = Gate(plan, gate.name)
            compile_in(module)


def _obstacle(module: nn.Module, gate: Gate) -> str | None:
    if gate.branch is not None:
        return "what a Residual adds is known only when it is called"
    if any(inner.blocks for _, part, inner in gated_modules(module) if part is not module):
        return "there are blocks in it"
    if not gate.one_graph:
        return "one of its modules ends branches at some of its calls only"
    return 'its "forward" was replaced' if "forward" in vars(module) else None


class Region:
    """A code object for blocks that look alike, in one mode."""

    def __init__(self, kind: str, options: Mapping[str, Any]) -> None:
        # Under a name of its own: torch remembers by that which shapes change.
        code = open_block.__code__.replace(co_name=f"open_{kind}_{id(self):x}")
        body = FunctionType(code, open_block.__globals__, code.co_name)
        self.run: Original = torch.compile(body, **options)
        self.graphs = 0

    def first(self, *arguments: Any) -> Any:
        """The first call for a block, which may need a graph of its own."""
        before = graphs()
        try:
            return self.run(*arguments)
        finally:
            self.graphs += graphs() > before


@dataclass(eq=False)
class Compiler:
    """What `depth.compile()` was told, and what it came to so far; copies of a model share it."""

    options: Mapping[str, Any]
    regions: dict[tuple[Any, ...], list[Region]] = field(default_factory=dict)
    of_block: dict[tuple[Any, ...], Region] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiler:
        return self

    def knows(self, gate: Gate, graph: Graph, module: nn.Module) -> bool:
        """Whether a block ran as this graph before."""
        return _key(gate, graph, module) in self.of_block

    def call(self, gate: Gate, graph: Graph, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The forward of a block as a graph."""
        leaves = tree_leaves((args, kwargs))
        device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)
        factors = tuple(_scalar(factor, device) for factor in graph[1])
        forward: Any = type(module).forward
        given = (module, forward.__wrapped__, factors, args, kwargs)
        key = _key(gate, graph, module)
        region = self.of_block.get(key)
        if region is not None:
            return region.run(*given)
        with _building:
            trained = tuple(leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor))
            kind = (key[1:], _structure(module), signature(args, kwargs), trained)
            alike = self.regions.setdefault(kind, [])
            if not alike or alike[-1].graphs >= _FULL:
                alike.append(Region(type(module).__name__, self.options))
            self.of_block[key] = alike[-1]
            return alike[-1].first(*given)


def _key(gate: Gate, graph: Graph, module: nn.Module) -> tuple[Any, ...]:
    rows, factors = graph
    return (gate.name, rows, bool(factors), module.training, torch.is_grad_enabled())


def _structure(module: nn.Module) -> tuple[object, ...]:
    """What blocks have in common that look alike; where they differ in more, torch finds out."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return tuple((name, type(part)) for name, part in module.named_modules()), tuple(
        (name, t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for name, t in tensors
    )


@lru_cache(maxsize=4096)
def _scalar(factor: float, device: torch.device | None) -> Tensor:
    """A factor as a graph's input, so that another one needs no other graph."""
    with torch.inference_mode(False):  # noqa: FBT003
        return torch.tensor(factor, dtype=torch.float64, device=device)
