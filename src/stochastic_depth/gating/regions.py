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
from torch.autograd.graph import saved_tensors_hooks

from stochastic_depth.discovery.templates import signature
from stochastic_depth.discovery.undisturbed import restored
from stochastic_depth.errors import OptionError, warn
from stochastic_depth.gating.attach import gated_modules
from stochastic_depth.gating.compiled import Graph, NoGraphError
from stochastic_depth.gating.formats import Formats
from stochastic_depth.gating.passage import Gate, Original
from stochastic_depth.gating.swap import compile_in
from stochastic_depth.gating.traced import graphs, open_block
from stochastic_depth.plan import Plan
from stochastic_depth.rows import Dims
from stochastic_depth.torch_private import (
    is_compiled,
    let_vary,
    no_graph,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)

_FULL = 8  # graphs of one code object: torch has no more, by default
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
    if is_compiled(module):
        return "it was compiled on its own"
    if any(inner.blocks for _, part, inner in gated_modules(module) if part is not module):
        return "there are blocks in it"
    if not gate.one_graph:
        return "what one of its modules is differs from call to call"
    return 'its "forward" was replaced' if "forward" in vars(module) else None


class Region:
    """A code object for blocks that look alike, in one mode."""

    def __init__(self, kind: str, options: Mapping[str, Any]) -> None:
        # Under a name of its own: torch remembers by that which shapes change.
        code = open_block.__code__.replace(co_name=f"open_{kind}_{id(self):x}")
        body = FunctionType(code, open_block.__globals__, code.co_name)
        self._compiled: Original = torch.compile(body, fullgraph=True, **options)
        self.graphs = 0
        self.kinds = 0  # of blocks that look alike: those whose first call needed another graph

    @property
    def is_full(self) -> bool:
        """Whether there may be no room for one more kind of block."""
        return bool(self.kinds) and self.graphs + self.graphs // self.kinds > _FULL

    def run(self, graph: Graph, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The forward of a block."""
        factors: tuple[Tensor, ...] = ()
        if graph[1]:
            leaves = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            like = next(leaf for leaf in leaves if leaf.is_floating_point())
            double = like.dtype is torch.float64
            factors = tuple(_scalar(factor, like.device, double=double) for factor in graph[1])
        forward: Any = type(module).forward
        return self._compiled(module, forward.__wrapped__, factors, args, kwargs)

    def build(self, graph: Graph, module: nn.Module, args: Any, kwargs: Any, varies: Dims) -> Any:
        """Run a block without leaving a trace, so that there is a graph for it.

        Args:
            graph: Which.
            module: The block.
            args: Its arguments.
            kwargs: The same, by keyword.
            varies: Their leaves that hold rows, of which the graph may be given any number.

        Returns:
            The block's output.
        """
        before = graphs()
        with torch.enable_grad():
            leaves, spec = tree_flatten((args, kwargs))
            leaves = [_apart(leaf) for leaf in leaves]
        for number, dim in varies.items():
            if leaves[number] is not None:
                let_vary(leaves[number], dim)
        some, named = tree_unflatten(leaves, spec)
        with restored(module), saved_tensors_hooks(_same, _same):
            output = self.run(graph, module, some, named)
        self.graphs += graphs() > before
        return output


@dataclass(eq=False)
class Compiler:
    """What `depth.compile()` was told, and what it came to so far; copies of a model share it."""

    options: Mapping[str, Any]
    alike: dict[tuple[Any, ...], list[Region]] = field(default_factory=dict)
    regions: dict[tuple[Any, ...], Region | None] = field(default_factory=dict)  # of each block
    formats: Formats = field(default_factory=Formats)
    many_counts: dict[int, list[int]] = field(default_factory=dict)  # by the number of all rows
    ready: set[tuple[Any, ...]] = field(default_factory=set)  # calls for which all graphs are there

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiler:
        return self

    def knows(self, gate: Gate, graph: Graph, module: nn.Module) -> bool:
        """Whether there is a region for this graph of a block, or cannot be."""
        return _key(gate, graph, module) in self.regions

    def build(
        self,
        gate: Gate,
        graph: Graph,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        varies: Dims,
    ) -> Any:
        """Have this graph of a block built: the block's output, or None where there is no graph.

        Where a forward could leave a trace in its arguments, its first call builds it. Only the
        first of several ways to call a block tells that there is none; others may never come.

        Args:
            gate: The block's.
            graph: Which.
            module: The block.
            args: Its arguments.
            kwargs: The same, by keyword.
            varies: Their leaves that hold rows, of which the graph may be given any number.
        """
        with _building:
            key, leaves = _key(gate, graph, module), tree_leaves((args, kwargs))
            is_new = key not in self.regions
            if is_new:
                self.regions[key] = self._region(key, module, args, kwargs, leaves)
            region = self.regions[key]
            if region is None or not all(map(_is_plain, leaves)):
                return None
            before = region.graphs
            try:
                output = region.build(graph, module, args, kwargs, varies)
                region.kinds += is_new and region.graphs > before
                return output
            except no_graph() as error:
                if is_new:
                    self._give_up(key, error)
                return None

    def run(self, gate: Gate, graph: Graph, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The forward of a block as a graph.

        Raises:
            NoGraphError: There is none.
        """
        key = _key(gate, graph, module)
        if key not in self.regions:
            self.build(gate, graph, module, args, kwargs, {})
        region = self.regions[key]
        if region is not None:
            try:
                return region.run(graph, module, args, kwargs)
            except no_graph() as error:
                self._give_up(key, error)
        raise NoGraphError

    def _region(
        self, key: tuple[Any, ...], module: nn.Module, args: Any, kwargs: Any, leaves: list[Any]
    ) -> Region:
        trained = tuple(leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor))
        kind = (key[1:], _structure(module), signature(args, kwargs), trained)
        alike = self.alike.setdefault(kind, [])
        if not alike or alike[-1].is_full:
            alike.append(Region(type(module).__name__, self.options))
        return alike[-1]

    def _give_up(self, key: tuple[Any, ...], error: BaseException) -> None:
        self.regions[key] = None
        reason = str(error).partition("\n")[0]
        warn(f'depth.compile(): "{key[0]}" runs eagerly, torch has no graph for it ({reason})')


def _key(gate: Gate, graph: Graph, module: nn.Module) -> tuple[Any, ...]:
    rows, factors = graph
    return (gate.name, rows, bool(factors), module.training, torch.is_grad_enabled())


def _is_plain(leaf: Any) -> bool:
    """Whether a forward cannot leave a trace in it, as in a cache."""
    return isinstance(leaf, Tensor | int | float | str | None | torch.dtype | torch.device)


def _apart(leaf: Any) -> Any:
    """A copy of a tensor that looks the same from within a graph."""
    if not isinstance(leaf, Tensor):
        return leaf
    alone = leaf.detach().requires_grad_(leaf.requires_grad)
    copy = alone.clone()  # a forward may change it in place
    return copy if copy.stride() == leaf.stride() else alone


def _same(saved: Tensor) -> Tensor:
    """A hook that keeps what is saved out of the checkpoints around."""
    return saved


def _structure(module: nn.Module) -> tuple[object, ...]:
    """What blocks have in common that look alike; where they differ in more, torch finds out."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return tuple((name, type(part)) for name, part in module.named_modules()), tuple(
        (name, t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for name, t in tensors
    )


@lru_cache(maxsize=4096)
def _scalar(factor: float, device: torch.device, *, double: bool) -> Tensor:
    """A factor as a graph's input, so that another one needs no other graph."""
    dtype = torch.float64 if double else torch.float32  # as a number counts in eager
    with torch.inference_mode(False):  # noqa: FBT003
        return torch.tensor(factor, dtype=dtype, device=device)
