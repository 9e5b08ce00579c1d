"""What a gated module does while torch.compile or torch.export looks at it.

Nothing can be drawn in a graph. In a compiled region of ours (`regions`) all branches run, and
their factors come in as tensors. Elsewhere a block is a part of the graph in inference; in training
it stays outside of it, and runs as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.deciding import inference_factor
from stochastic_depth.errors import warn
from stochastic_depth.gating.passage import Gate, Original, running
from stochastic_depth.plan import Plan
from stochastic_depth.torch_private import once_in_a_trace, tree_flatten, tree_unflatten

Factors = tuple[Any, ...]  # of a container, one for each of its branches; none: not multiplied

# Those of the container that is being traced. Traces alone write it, and leave None behind, so that
# at run time nobody disturbs anybody.
_factors: Factors | None = None
_graphs = 0


def traced_call(
    gate: Gate, module: nn.Module, original: Original, args: Any, kwargs: Any, eager: Original
) -> Any:
    """A gated module's call in a trace; `eager` is what it does outside."""
    global _factors
    around = _factors
    if not gate.blocks:
        if around is None and not _in_a_passage():
            return torch.compiler.disable(eager)(module, *args, **kwargs)
        output = original(module, *args, **kwargs)
    elif module.training or gate.plan.forced is not None or not gate.one_graph:
        return torch.compiler.disable(_outside)(gate.plan, eager, module, args, kwargs)
    else:
        _factors = tuple(
            inference_factor(gate.plan, block, branch)
            for block in gate.blocks
            for branch in range(len(gate.plan.blocks[block].branches))
        )
        output = original(module, *args, **kwargs)
        _factors = around
    if around and gate.end is not None:
        number, *leaves = gate.end
        output = _multiplied(output, leaves, around[number])
    return output


def open_block(
    module: nn.Module, forward: Original, factors: Factors, args: Any, kwargs: Any
) -> Any:
    """The forward of a container whose branches all run: what a region compiles."""
    global _factors
    _count()
    _factors = factors
    output = forward(module, *args, **kwargs)
    _factors = None
    return output


def graphs() -> int:
    """How often `open_block` was traced so far."""
    return _graphs


def _outside(plan: Plan, eager: Original, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A block that no graph holds."""
    if module.training and not plan.told_to_compile:
        plan.told_to_compile = True
        warn(
            "torch.compile met a model with stochastic depth: its blocks are left out of the "
            "graphs and run eagerly while it trains. Call depth.compile() instead, which compiles "
            "them one by one"
        )
    return eager(module, *args, **kwargs)


@once_in_a_trace
def _count() -> None:
    global _graphs
    _graphs += 1


@once_in_a_trace
def _in_a_passage() -> bool:
    """Whether a container is called just now whose forward is compiled on its own.

    It is called like this only where its branches run as they are (`container._run`).
    """
    return bool(running.passages)


def _multiplied(output: Any, leaves: list[int], factor: Any) -> Any:
    if isinstance(output, Tensor):
        return _times(output, factor)
    values, spec = tree_flatten(output)
    for number in leaves:
        values[number] = _times(values[number], factor)
    return tree_unflatten(values, spec)


def _times(value: Tensor, factor: Any) -> Tensor:
    """The product, with a factor that is not rounded to half a precision before."""
    if isinstance(factor, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return (value.float() * factor).to(value.dtype)
    return value * factor
