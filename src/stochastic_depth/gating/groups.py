"""A block that runs once for each kind of row, where its own code asks for the number of rows.

Its modules cannot be given fewer rows than the code between them expects: so the whole block is,
first the rows on which all branches run, then those on which only some of them do, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.rows import Held, Rows, spread, take, together
from stochastic_depth.torch_private import tree_leaves

Run = Callable[[tuple[bool, ...], Rows, Any, Any], Any]


def run_in_groups(
    held: Held,
    rows: Sequence[Rows | None],
    kept: Sequence[bool],
    run: Run,
    arguments: tuple[Any, Any],
) -> Any:
    """The block's output, put together from those of the groups.

    Args:
        held: Where its arguments and output hold the batch.
        rows: Of each branch, the rows that it runs on; None: all, or none.
        kept: Whether each branch runs at all.
        run: Runs the block on some rows: which branches run, which rows, and their arguments.
        arguments: The positional and keyword arguments, on all rows.
    """
    size = next(some.batch for some in rows if some is not None)
    everything = frozenset(range(size))
    of_branch = [
        everything if some is None and runs else frozenset(some.numbers if some and runs else ())
        for some, runs in zip(rows, kept, strict=True)
    ]
    groups: dict[tuple[bool, ...], list[int]] = {}
    for row in range(size):
        groups.setdefault(tuple(row in numbers for numbers in of_branch), []).append(row)
    device = next(leaf.device for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    result: Any = None
    for branches, numbers in groups.items():
        group = Rows(size, 0, len(numbers), torch.tensor(numbers, device=device))
        (args, kwargs), _ = take(arguments, held.takes, group)
        output = spread(run(branches, group, args, kwargs), held.outputs, group)
        result = output if result is None else together(result, output, held.outputs)
    return result
