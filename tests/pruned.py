"""A model that is pruned, beside the same one with the same blocks dropped."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import stochastic_depth as sd


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        out = model.eval()(**x) if isinstance(x, dict) else model.eval()(x)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def pruned_as_dropped(model: Any, x: Any, keep: Any, scale: Any = "none", **options: Any) -> Any:
    """Prunes a model, and compares with the folded one in which the same blocks are dropped."""
    depth = sd.apply_stochastic_depth(model, 0.2, "uniform", example_inputs=x, scale=scale)
    names = [block.name for block in depth.blocks]
    before = size(model)
    twin = copy.deepcopy(model)
    pruned = depth.prune(keep, **options)
    assert pruned is model
    twin = sd.get_stochastic_depth(twin).fold()
    reference = sd.apply_stochastic_depth(twin, 0.0, example_inputs=x, scale="none")
    for left_out in _sets(names, len(names) - len(blocks_of(pruned, x)), keep):
        with reference.fixed(dict.fromkeys(left_out, False)):
            if same(outputs(twin, x), outputs(pruned, x)):
                assert size(pruned) < before or not left_out
                return pruned
    raise AssertionError("no choice of blocks computes the same")


def blocks_of(model: nn.Module, x: Any) -> list[str]:
    try:
        return [block.name for block in sd.find_residual_blocks(model, x)]
    except sd.NoResidualBlocksError:
        return []


def _sets(names: list[str], count: int, keep: Any) -> list[list[str]]:
    """Which blocks may have been left out: known where names were passed."""
    if not isinstance(keep, int | float):
        return [[name for name in names if name not in keep]]
    kept = len(names) - count
    places = {round(n * (len(names) - 1) / max(1, kept - 1)) for n in range(kept)}
    return [[name for number, name in enumerate(names) if number not in places]]
