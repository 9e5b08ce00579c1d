"""Which dimension of each value holds the batch: a second watch, with more rows, tells.

In mode "sample" a branch runs on some rows of the batch. Its first modules take these rows of
whatever comes from outside of the branch, its last ones put them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.blocks import Discovery, ResidualBlock
from stochastic_depth.discovery.example import Example
from stochastic_depth.discovery.recording import Recording
from stochastic_depth.discovery.watch import watch_once
from stochastic_depth.draw import Counts
from stochastic_depth.errors import ExampleInputsError
from stochastic_depth.torch_private.trees import tree_flatten, tree_unflatten

MORE = 3  # rows: enough for a window of two that wraps around the end; the first comes again

# The least part of a batch to drop, where any: what is dropped has to pay for moving the others.
# That costs the more the less a branch computes for each value, and convolutions compute little.
_IMAGE_DIMS, _FEWEST_IMAGES, _FEWEST_ROWS = 4, 0.5, 0.25


@dataclass(frozen=True, eq=False)
class Batches:
    """Two recordings of one model, the second with more rows in the batch."""

    few: Recording
    many: Recording
    rows: int  # in the first

    def dims(self, values: Sequence[int | None]) -> dict[int, int]:
        """The batch dimension of each of these values, by position, where it has one."""
        dims = {n: self._dim(node) for n, node in enumerate(values) if node is not None}
        return {number: dim for number, dim in dims.items() if dim is not None}

    def _dim(self, node: int) -> int | None:
        few, many = self.few.nodes[node].shape, self.many.nodes[node].shape
        grown = [d for d, (one, other) in enumerate(zip(few, many, strict=False)) if one != other]
        if len(few) != len(many) or len(grown) != 1:
            return None
        each, rest = divmod(few[grown[0]], self.rows)
        return grown[0] if not rest and many[grown[0]] == each * (self.rows + MORE) else None


def watch_more_rows(model: nn.Module, recording: Recording, example: Example) -> Batches:
    """Watch the model once more, with more rows.

    Raises:
        ExampleInputsError: It does not run on them, or runs in another way.
    """
    more, rows = with_more_rows(example)
    try:
        many = watch_once(model, more)
    except Exception as error:
        why = f"fails on {rows + MORE} rows instead of {rows}: {error}"
        raise _cannot_tell(model, why) from error
    if [node.op for node in many.nodes] != [node.op for node in recording.nodes]:
        raise _cannot_tell(model, f"takes another way for {rows + MORE} rows than for {rows}")
    return Batches(recording, many, rows)


def with_more_rows(example: Example) -> tuple[Example, int]:
    """An example of more rows, and how many it had.

    A tensor whose first dimension is as long as that of the first one holds the batch.
    """
    leaves, spec = tree_flatten(example)
    sizes = [len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    few = sizes[0] if sizes else 0
    made: dict[int, Tensor] = {}  # what is given twice (as tokens and as labels) stays one value

    def longer(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != few:
            return leaf
        # Rows unlike the first, so that a mix-up of rows shows.
        new = [leaf[:1].roll(step, -1) if leaf.ndim > 1 else leaf[:1] for step in range(MORE)]
        return made.setdefault(id(leaf), torch.cat([leaf, *new]))

    args, kwargs = tree_unflatten([longer(leaf) for leaf in leaves], spec)
    return (args, kwargs), few


def allowed_counts(model: nn.Module, found: Discovery, block: ResidualBlock) -> Counts:
    """How many rows a block may run on, by its modules and the shape of what it adds to."""
    names = {module for branch in block.branches for module in branch.modules}
    if block.explicit:  # which modules make up the branch is not known: any beside it
        names = {block.scope}
    parts = [part for name in names for part in model.get_submodule(name).modules()]
    batch_norm = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts)
    if block.explicit:
        images = any(isinstance(part, nn.modules.conv._ConvNd) for part in parts)
    else:
        stream = found.recording.nodes[found.sites[block.name][0].additions[0].node]
        images = len(stream.shape) >= _IMAGE_DIMS
    fewest = _FEWEST_IMAGES if images else _FEWEST_ROWS
    return Counts(lone=not batch_norm, fewest_dropped=fewest)


def _cannot_tell(model: nn.Module, why: str) -> ExampleInputsError:
    return ExampleInputsError(
        f'mode="sample" looks for the batch dimension, but {type(model).__name__} {why}',
        expected="example inputs whose first dimension is the batch, of a size unlike the others",
        instead="pass example_inputs with another batch size",
    )
