"""What a gated module does while torch.compile or torch.export looks at it.

Nothing can be drawn in a graph. In a compiled region of ours (`regions`) all branches run, and
their factors come in as tensors. Elsewhere a block is a part of the graph in inference; in training
it stays outside of it, and runs as ever.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling

from stochastic_depth.deciding import inference_factor
from stochastic_depth.discovery.undisturbed import eagerly
from stochastic_depth.errors import warn
from stochastic_depth.gating.passage import Gate, Original, Passage, running
from stochastic_depth.gating.scaled import multiplied
from stochastic_depth.plan import Plan
from stochastic_depth.torch_private import (
    left_out_of_graphs,
    once_in_a_trace,
)

Factors = tuple[Any, ...]  # of a container, one for each of its branches; none: not multiplied


class _Container:
    """The container that is being traced, if one is.

    Only traces write it, and leave it as it was, so that at run time nobody disturbs anybody.
    """

    def __init__(self) -> None:
        self.factors: Factors | None = None
        self.calls: dict[int, int] = {}  # of its members so far, by their numbers


_container = _Container()  # an attribute of it: torch 2.6 loses sight of globals between files
_left_out: Any = None  # `_run`, out of all graphs; made in a trace, for that takes a long import
_graphs = 0
_WHY = (
    "what stochastic depth drops is drawn anew at every call: compile block by block, with "
    "depth.compile(), or compile the blocks first and apply stochastic depth then"
)


def traced_call(
    module: nn.Module, original: Original, args: Any, kwargs: Any, eager: Original
) -> Any:
    """A gated module's call in a trace; `eager` is what it does outside."""
    around = _container.factors
    if around == ():  # a region in which nothing is multiplied: nothing need be guarded, either
        return original(module, *args, **kwargs)
    gate: Any = module._stochastic_depth
    if gate.blocks:
        stays_out = module.training or gate.plan.forced is not None or not gate.one_graph
    else:
        stays_out = around is None and not _in_a_compiled_block()
    if stays_out or not is_dynamo_compiling():  # the latter where torch gave up on this function
        _open_the_way()
        return _left_out(gate.plan, eager, module, args, kwargs)
    if gate.blocks:
        factors = tuple(
            inference_factor(gate.plan, block, branch)
            for block in gate.blocks
            for branch in range(len(gate.plan.blocks[block].branches))
        )
        output = open_block(module, original, factors, args, kwargs)
    else:
        output = original(module, *args, **kwargs)
    if around and (end := _end(gate)) is not None:
        number, *leaves = end
        output = multiplied(output, leaves, around[number])
    return output


def _end(gate: Gate) -> tuple[int, ...] | None:
    """What this call of a member ends in the container that is being traced."""
    if len(gate.ends) < 2:
        return gate.ends[0] if gate.ends else None
    call = _container.calls.get(gate.number, 0)
    _container.calls[gate.number] = call + 1
    return gate.ends[call]


def open_block(module: nn.Module, call: Original, factors: Factors, args: Any, kwargs: Any) -> Any:
    """A container whose branches all run: its call, or for a region its forward alone."""
    _count()
    around = _container.factors, _container.calls
    _container.factors, _container.calls = factors, {}
    try:  # in which a graph cannot end: a block is in it as a whole, or not at all
        return call(module, *args, **kwargs)
    finally:
        _container.factors, _container.calls = around


def run_uncompiled(
    passage: Passage, call: Original, module: nn.Module, args: Any, kwargs: Any
) -> Any:
    """A container's call without its user's graph, which knows no factor, and nothing closed."""
    if all(all(decision.kept) for decision in passage.decisions.values()):
        tell_to_compile(passage.gate.plan)
    with eagerly():
        return call(module, *args, **kwargs)


def graphs() -> int:
    """How often `open_block` was traced so far."""
    return _graphs


def _run(plan: Plan, eager: Original, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A call that no graph holds."""
    if module.training:
        tell_to_compile(plan)
    return eager(module, *args, **kwargs)


def tell_to_compile(plan: Plan) -> None:
    """Warn, once, where somebody else compiles and the blocks run eagerly all the same."""
    if not plan.told_to_compile and plan.compiler is None:
        plan.told_to_compile = True
        warn(
            "torch.compile met blocks with stochastic depth, which stay out of its graphs and run "
            "eagerly. Call depth.compile() instead, which compiles them one by one"
        )


@once_in_a_trace
def _open_the_way() -> None:
    global _left_out
    _left_out = _left_out or left_out_of_graphs(_run, _WHY)


@once_in_a_trace
def _count() -> None:
    global _graphs
    _graphs += 1


@once_in_a_trace
def _in_a_compiled_block() -> bool:
    """Whether this trace is of a container that its user compiled: its branches run as they are."""
    return bool(running.passages) and running.passages[-1].compiled
