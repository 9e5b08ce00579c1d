"""Mode "sample": which dimensions of a module's arguments and outputs hold the batch.

A second watch, with more rows, tells. A branch runs on some rows of the batch: its first modules
take these rows of whatever comes from outside of the branch, its last ones put them back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery import watch_once
from stochastic_depth.discovery.additions import Addition
from stochastic_depth.discovery.recording import Call, Recording
from stochastic_depth.discovery.templates import Argument, Template, named, placed_leaves
from stochastic_depth.discovery.undisturbed import Arguments
from stochastic_depth.errors import ChangedModelError, ExampleInputsError
from stochastic_depth.rows import Rows, change_leaves
from stochastic_depth.torch_private.trees import tree_flatten, tree_unflatten

MORE = 3  # rows: enough for a window of two that wraps around the end; the first comes again


@dataclass(frozen=True, eq=False)
class Batches:
    """Two recordings of one model, the second with more rows in the batch."""

    few: Recording
    many: Recording
    rows: int  # in the first

    def dims(self, values: Sequence[int | None]) -> dict[int, int]:
        """The batch dimension of each of these values, by position, where it has one."""
        few, many = self.few.nodes, self.many.nodes
        dims = {
            n: self._dim(few[i].shape, many[i].shape) for n, i in enumerate(values) if i is not None
        }
        return {number: dim for number, dim in dims.items() if dim is not None}

    def inputs(
        self, call: Call, positional: Sequence[str], without: Collection[int] = ()
    ) -> dict[Argument, tuple[int, int]]:
        """The leaves of a call's arguments that hold it: the dimension, the rows of each example.

        Args:
            call: The call.
            positional: The names of the parameters of its module's forward.
            without: Values that are left out.
        """
        found: dict[Argument, tuple[int, int]] = {}
        shapes = zip(call.shapes, self.many.calls[call.index].shapes, strict=True)
        for (place, leaf), node, (few, many) in zip(call.places, call.inputs, shapes, strict=True):
            dim = None if few is None or many is None else self._dim(few, many)
            if few is not None and dim is not None and node not in without:
                found[Argument(named(place, positional), leaf)] = dim, few[dim] // self.rows
        return found

    def _dim(self, few: torch.Size, many: torch.Size) -> int | None:
        grown = [d for d, (one, other) in enumerate(zip(few, many, strict=False)) if one != other]
        if len(few) != len(many) or len(grown) != 1:
            return None
        each, rest = divmod(few[grown[0]], self.rows)
        return grown[0] if not rest and many[grown[0]] == each * (self.rows + MORE) else None


def watch_more_rows(model: nn.Module, recording: Recording, example: Arguments) -> Batches:
    """Watch the model once more, with more rows.

    Raises:
        ExampleInputsError: It does not run on them, or runs in another way.
    """
    if any(type(size) is not int for node in recording.nodes for size in node.shape):
        raise cannot_tell(model, "computes with nested tensors, of rows of unequal lengths")
    more, rows = with_more_rows(example)
    try:
        many = watch_once(model, more)
    except Exception as error:
        why = f"fails on {rows + MORE} rows instead of {rows}: {error}"
        raise cannot_tell(model, why) from error
    if [node.op for node in many.nodes] != [node.op for node in recording.nodes]:
        raise cannot_tell(model, f"takes another way for {rows + MORE} rows than for {rows}")
    return Batches(recording, many, rows)


def with_more_rows(example: Arguments) -> tuple[Arguments, int]:
    """An example of more rows, and how many it had.

    A tensor whose first dimension is as long as that of the first one holds the batch.
    """
    leaves, spec = tree_flatten(example)
    few = next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)

    def longer(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != few:
            return leaf
        # Rows unlike the first, so that a mix-up of rows shows.
        new = [leaf[:1].roll(step, -1) if leaf.ndim > 1 else leaf[:1] for step in range(MORE)]
        return torch.cat([leaf, *new])

    return tree_unflatten([longer(leaf) for leaf in leaves], spec), few


def cannot_tell(model: nn.Module, why: str) -> ExampleInputsError:
    """The error for an example that does not show which dimension is the batch."""
    return ExampleInputsError(
        f'mode="sample" looks for the batch dimension, but {type(model).__name__} {why}',
        expected="example inputs whose first dimension is the batch, of a size unlike the others",
        instead="pass example_inputs with another batch size",
    )


@dataclass(frozen=True)
class BatchDims:
    """Where the calls of a module hold the batch.

    Attributes:
        inputs: For leaves of arguments: the batch dimension, and the rows of each example.
        outputs: For leaves of the output: the dimension.
        handed_on: For leaves of a block's output: the argument that a dropped row comes to.
        name: The block's.
        positional: The names of its forward's parameters.
        writes: Whether it changes an argument in place, which a part of a split must not be.
        forms: A block's: the shapes of the leaves of its arguments, in its watched calls.
    """

    inputs: Mapping[Argument, tuple[int, int]] = field(default_factory=dict)
    outputs: Mapping[int, int] = field(default_factory=dict)
    handed_on: Mapping[int, Argument] = field(default_factory=dict)
    name: str = ""
    positional: tuple[str, ...] = ()
    writes: bool = False
    forms: Mapping[Argument, set[torch.Size]] = field(default_factory=dict)

    def __or__(self, other: BatchDims) -> BatchDims:
        """Of a call that is a part of two branches."""
        inputs, outputs = {**self.inputs, **other.inputs}, {**self.outputs, **other.outputs}
        return BatchDims(inputs, outputs, writes=self.writes or other.writes)

    def leaves(self, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, int, int]]:
        """The leaves of a call that hold the batch: the dimension, the rows of each example."""
        for place, leaf in placed_leaves(args, kwargs, self.positional):
            if place in self.inputs and isinstance(leaf, Tensor):
                yield leaf, *self.inputs[place]

    def size(self, args: Any, kwargs: Any) -> int:
        """The number of examples in the batch of a call."""
        sizes = {leaf.shape[dim] / each for leaf, dim, each in self.leaves(args, kwargs)}
        if len(sizes) == 2:
            sizes.discard(1)  # a leaf that has a single row holds for all rows
        if len(sizes) > 1 or any(size % 1 for size in sizes):
            counts = " and ".join(f"{size:g}" for size in sorted(sizes))
            raise ChangedModelError(
                f'"{self.name}" is called with the rows of {counts} examples, each of which had as '
                "many when it was watched",
                expected="as many rows for every example (no packed or ragged sequences)",
                instead='pass mode="batch", which takes no rows apart; or pad the sequences',
            )
        if not sizes:
            raise ChangedModelError(
                f'"{self.name}" is called without any argument that is known to hold the batch',
                expected="the arguments that it was watched with: "
                + ", ".join(dict.fromkeys(str(place) for place, _ in self.inputs)),
                instead='pass example_inputs as in training (with the mask, say), or mode="batch"',
            )
        size = int(sizes.pop())
        for place, leaf in placed_leaves(args, kwargs, self.positional) if size > 1 else ():
            if isinstance(leaf, Tensor) and not self._is_known(place, leaf, size):
                before = tuple(next(iter(self.forms[place])))
                raise ChangedModelError(
                    f'"{self.name}" is called with {tuple(leaf.shape)} as "{place.place}", where '
                    f"it was watched with {before}: nothing says whether that holds the batch",
                    expected="the arguments that it was watched with",
                    instead="pass example_inputs as in the training (with the mask for each "
                    'example, say), or mode="batch"',
                )
        return size

    def _is_known(self, place: Argument, leaf: Tensor, size: int) -> bool:
        """Whether as many dimensions as when it was watched, and none has become the batch."""
        forms = self.forms.get(place)
        return not forms or any(
            len(form) == leaf.ndim
            and (place in self.inputs or (1, size) not in zip(form, leaf.shape, strict=True))
            for form in forms
        )

    def take(self, rows: Rows, args: Any, kwargs: Any) -> tuple[Any, Any, dict[Argument, Any]]:
        """The arguments for the kept rows, and for each leaf what puts the others back.

        A leaf of a single row holds for all rows.
        """
        rests: dict[Argument, Any] = {}
        leaves, spec = tree_flatten((args, kwargs))
        for number, (place, leaf) in enumerate(placed_leaves(args, kwargs, self.positional)):
            dim, _ = self.inputs.get(place, (-1, 1))
            if dim >= 0 and isinstance(leaf, Tensor) and leaf.shape[dim] != 1:
                kept, rests[place] = rows.cut(leaf, dim)
                leaves[number] = kept.clone() if self.writes else kept
        return *tree_unflatten(leaves, spec), rests

    def put_back(self, rows: Rows, output: Any, rests: Mapping[Argument, Any]) -> Any:
        """The output for the kept rows, with the arguments that dropped ones come to between."""
        places = {number: rests[leaf] for number, leaf in self.handed_on.items() if leaf in rests}
        return change_leaves(
            output, places, lambda leaf, n: rows.join(leaf, self.outputs[n], places[n])
        )

    def write_back(
        self, rows: Rows, call: Arguments, taken: Arguments, rests: Mapping[Argument, Any]
    ) -> dict[int, Tensor]:
        """Copy what a call has written into the kept rows back into its arguments.

        Returns:
            Each argument that was written to, by the `id` of its kept rows.
        """
        before, after = (placed_leaves(*each, self.positional) for each in (call, taken))
        found: dict[int, Tensor] = {}
        for (place, leaf), (_, kept) in zip(before, after, strict=True):
            if place in rests and is_written(kept):
                leaf.copy_(rows.join(kept, self.inputs[place][0], rests[place]))
                found[id(kept)] = leaf
        return found

    def spread(self, rows: Rows, output: Any) -> Any:
        """The output for the kept rows, with zeros between."""
        return change_leaves(
            output, self.outputs, lambda leaf, n: rows.spread(leaf, self.outputs[n])
        )


def is_written(copy: Tensor) -> bool:
    """Whether a new copy of a tensor was written to since."""
    return copy.is_inference() or copy._version > 0


def of_block(
    batches: Batches,
    name: str,
    positional: tuple[str, ...],
    calls: Sequence[Call],
    whole: Template | None,
) -> BatchDims:
    """Of a block, from its watched calls and what it returns when dropped."""
    inputs: dict[Argument, tuple[int, int]] = {}
    outputs: dict[int, int] = {}
    forms: dict[Argument, set[torch.Size]] = defaultdict(set)
    for call in calls:
        inputs |= batches.inputs(call, positional)
        outputs |= batches.dims(call.outputs)
        for (place, leaf), shape in zip(call.places, call.shapes, strict=True):
            if shape is not None:
                forms[Argument(named(place, positional), leaf)].add(shape)
    handed_on = {
        number: Argument(named(leaf.place, positional), leaf.leaf)
        for number, leaf in enumerate(whole.leaves if whole is not None else ())
        if isinstance(leaf, Argument) and number in outputs
    }
    writes = any(_writes(batches.few, call) for call in calls)
    return BatchDims(inputs, outputs, handed_on, name, positional, writes, forms)


def of_branch_calls(
    batches: Batches, addition: Addition, ends: Collection[tuple[int, int]]
) -> list[BatchDims]:
    """Of each module of a branch: where it takes the kept rows and where it puts them back.

    Args:
        batches: The two watches.
        addition: The branch's sum.
        ends: What makes up the branch's value: positions of its calls, leaves of their outputs.
    """
    recording, found = batches.few, []
    kept_rows: set[int] = set()  # values that hold the kept rows alone
    position = addition.root
    for place, call in enumerate(addition.branch_calls):
        for index in range(position, call.start):  # computed in line from them
            if not kept_rows.isdisjoint(recording.nodes[index].inputs):
                kept_rows.add(index)
        position = call.end
        handed_out = {node for outer in recording.enclosing(call.parent) for node in outer.outputs}
        users = [recording.consumers[n] if n is not None else [] for n in call.outputs]
        outputs = {
            number: dim
            for number, dim in batches.dims(call.outputs).items()
            if (place, number) in ends
            # It leaves the block as an output, and nobody computes with it behind this call.
            or (call.outputs[number] in handed_out and all(u < call.end for u in users[number]))
        }
        writes = _writes(recording, call)
        found.append(BatchDims(batches.inputs(call, (), kept_rows), outputs, writes=writes))
        kept_rows |= {
            node for n, node in enumerate(call.outputs) if node is not None and n not in outputs
        }
    return found


def _writes(recording: Recording, call: Call) -> bool:
    """Whether a call changes one of its arguments in place, or a view of it."""
    nodes = recording.nodes
    for value in (value for node in nodes[call.start : call.end] for value in node.overwrites):
        while nodes[value].is_view and value not in call.inputs:
            value = nodes[value].inputs[0]
        if value in call.inputs:
            return True
    return False
