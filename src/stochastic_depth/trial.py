"""What is tried at one call of a block: dropped, open, and on some rows of the batch alone."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.kept import put_back
from stochastic_depth.discovery.memory import memory_of
from stochastic_depth.discovery.operations import is_real_or_complex
from stochastic_depth.discovery.templates import placed_leaves
from stochastic_depth.discovery.undisturbed import noise_like, with_large_weights
from stochastic_depth.gating.batch import MORE, is_written
from stochastic_depth.gating.block import carry_out, decision_of, run_in_part
from stochastic_depth.gating.gate import ModuleCall
from stochastic_depth.gating.ranks import LOCAL
from stochastic_depth.rows import Rows
from stochastic_depth.torch_private.tracing import is_wrapper
from stochastic_depth.torch_private.trees import tree_leaves, tree_map


class Outcome(NamedTuple):
    """What a call returned, and the leaves of its arguments before and after it."""

    output: Any
    before: list[Any]
    after: list[Any]

    @property
    def tensors(self) -> list[Tensor | None]:
        """The tensors among its arguments; None in the places of other leaves."""
        return [leaf if isinstance(leaf, Tensor) else None for leaf in self.before]

    @property
    def written(self) -> list[Tensor | None]:
        """The tensors that the call has written to."""
        return [x if x is not None and is_written(x) else None for x in self.tensors]

    @property
    def put(self) -> list[Any]:
        """The leaves that the call has put into its arguments."""
        known = set(map(id, self.before))
        return [leaf for leaf in self.after if id(leaf) not in known]


class Trial:
    """One call of a block, which can be repeated.

    Args:
        call: The call.
        units: Which of the block's may be dropped, or run on some rows.
    """

    def __init__(self, call: ModuleCall, units: Sequence[int]) -> None:
        self.call, self.units, self.gate = call, units, call.gate

    def outcome(self, *, runs: Rows | bool) -> Outcome:
        """What it comes to where these units run, are dropped, or run on these rows."""
        args, kwargs = tree_map(_apart, (self.call.args, self.call.kwargs))
        before = tree_leaves((args, kwargs))
        output = under(self.call._replace(args=args, kwargs=kwargs), self.units, runs=runs)
        return Outcome(output, before, tree_leaves((args, kwargs)))

    def why_not(self) -> str | None:
        """Why they cannot be dropped, or run on some rows; None: they can."""
        doing = "with it dropped the forward fails"
        try:
            if around := acts_around(self.call):
                return around
            if self.gate.batch is None:
                self.outcome(runs=False)
                return None
            self.call = _with_unlike_rows(self.call)
            with with_large_weights(self.call.module):
                closed = self.outcome(runs=False)
                doing = 'mode="sample": it fails on some rows of the batch alone'
                why = self._of_rows(closed) or self._of_rows_in_training()
            return why and f'mode="sample": {why}'
        except Exception as error:
            return f"{doing}: {error}"

    def _of_rows(self, closed: Any) -> str | None:
        """In inference, on several windows."""
        plan, batch = self.gate.plan, self.gate.batch
        args, kwargs = self.call.args, self.call.kwargs
        opened, size = self.outcome(runs=True), batch.size(args, kwargs)
        for leaf, dim, each in batch.leaves(args, kwargs):
            if each > 1 and leaf.shape[dim] == each * size:  # the first example comes twice
                twice = [leaf.narrow(dim, n * each, each) for n in (0, size - MORE)]
                if not _close(*twice):
                    return "the rows of an example do not lie side by side"
        for rows in _windows(size, lone=plan.counts[plan.block_of[self.units[0]]].lone):
            if why := self._unlike(rows, opened, closed):
                return why
        return None

    def _of_rows_in_training(self) -> str | None:
        """As it trains, where it comes to the same each time: no chance, no change of weights."""
        size = self.gate.batch.size(self.call.args, self.call.kwargs)
        with _training(self.call.module):
            generators = self._generators()
            try:
                opened = self._as_before(runs=True)
            except Exception:  # it was watched as in inference, as it does not train by itself
                return None
            again = self._as_before(runs=True)
            if self._generators() != generators or not _all_close(opened.output, again.output):
                return None
            closed = self._as_before(runs=False)
            for rows in _windows(size, lone=False):
                if why := self._unlike(rows, opened, closed):
                    return f"in training {why}"
        return None

    def _as_before(self, *, runs: Rows | bool) -> Outcome:
        """The outcome; buffers and attributes, running statistics say, are put back behind it."""
        saved = [(buffer, buffer.clone()) for buffer in self.call.module.buffers()]
        try:
            with put_back(self.call.module):
                return self.outcome(runs=runs)
        finally:
            for buffer, value in saved:
                buffer.copy_(value)

    def _generators(self) -> list[object]:
        """The states of the generators that the call may draw from."""
        devices = {p.device for p in self.call.module.parameters() if p.is_cuda}
        tensors = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        states: list[object] = [random.getstate(), *(tensor.tolist() for tensor in tensors)]
        if numpy := sys.modules.get("numpy"):
            _, keys, place, *_ = numpy.random.get_state()
            states += [keys.tobytes(), place]
        return states

    def _unlike(self, rows: Rows, opened: Outcome, closed: Outcome) -> str | None:
        found, batch = self._as_before(runs=rows), self.gate.batch
        places = placed_leaves(self.call.args, self.call.kwargs, batch.positional)
        dims = {
            n: batch.inputs[place][0]
            for n, (place, _) in enumerate(places)
            if place in batch.inputs
        }
        if list(map(_form, found.put)) != list(map(_form, opened.put)):
            return "what it puts into its arguments is lost on some rows of the batch alone"
        return _unlike(batch.outputs, rows, opened.output, closed.output, found.output) or _unlike(
            dims, rows, opened.written, closed.tensors, found.tensors
        )


def under(call: ModuleCall, units: Sequence[int], *, runs: Rows | bool) -> Any:
    """What a block's call comes to where these units run, are dropped, or run on these rows."""
    gate = call.gate
    chosen = [runs if unit in units else True for unit in gate.units]
    # Where some of its units may be dropped, its branches are left out one by one.
    in_part = runs is not True and len(set(gate.units)) > 1
    return (run_in_part if in_part else carry_out)(call, decision_of(gate, chosen, None, LOCAL))


def acts_around(call: ModuleCall) -> str:
    """What a block that is skipped whole does before its forward, or behind it; "" is nothing."""
    gate, module = call.gate, call.module
    kind = getattr(type(module), "gated_from", type(module))
    is_plain = kind.__call__ is nn.Module.__call__ and not module._forward_pre_hooks
    if gate.whole is None or is_plain or is_wrapper(module):
        return ""
    closed = decision_of(gate, [False] * len(gate.units), None, LOCAL)
    args, kwargs = tree_map(_apart, (call.args, call.kwargs))
    skipped = carry_out(call._replace(args=args, kwargs=kwargs), closed)
    args, kwargs = tree_map(_apart, (call.args, call.kwargs))
    told, gate.plan.told_of = gate.plan.told_of, {gate.name}
    with _watched_forward(module) as (taken, made):
        found = run_in_part(call._replace(args=args, kwargs=kwargs), closed)
    gate.plan.told_of = told
    # A product with a weight that is one now makes another tensor of the same values.
    is_same = _all_close(skipped, found)
    is_same = is_same and _places(taken) <= _places([args, kwargs])
    is_same = is_same and _places([found]) <= _places(made)
    return "" if is_same else "what its hooks, or its `__call__`, do would be skipped with it"


@contextmanager
def _watched_forward(module: nn.Module) -> Iterator[tuple[list[Any], list[Any]]]:
    """Collects what a module's forward is called with, and what it returns."""
    taken: list[Any] = []
    made: list[Any] = []
    forward, before = module.forward, vars(module).get("forward")

    def watched(*args: Any, **kwargs: Any) -> Any:
        taken.append([args, kwargs])
        made.append(forward(*args, **kwargs))
        return made[-1]

    vars(module)["forward"] = watched
    try:
        yield taken, made
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


def _form(leaf: Any) -> object:
    """The type and the shape of a value."""
    return type(leaf), leaf.shape if isinstance(leaf, Tensor) else None


def _places(values: Any) -> set[int]:
    """The memories of the tensors in something nested."""
    return {memory_of(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def _all_close(one: Any, other: Any) -> bool:
    """Whether all tensors in two results are the same."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(_close(*pair) for pair in pairs if isinstance(pair[0], Tensor))


def _with_unlike_rows(call: ModuleCall) -> ModuleCall:
    """The same call, with noise on its largest values where all of its rows are alike."""
    args, kwargs = call.args, call.kwargs
    found = list(call.gate.batch.leaves(args, kwargs))
    floats = [each for each in found if each[0].is_floating_point() and not each[0].is_meta]
    main, dim, each = max(floats, key=lambda leaf: leaf[0].numel(), default=(None, 0, 1))
    if main is None or not bool((main == main.narrow(dim, 0, 1)).all()):
        return call
    noise = noise_like(main)
    if each > 1:  # the first example comes twice
        again = call.gate.batch.size(args, kwargs) - MORE
        noise.narrow(dim, again * each, each).copy_(noise.narrow(dim, 0, each))
    shown = main + noise
    args, kwargs = tree_map(lambda leaf: shown if leaf is main else leaf, (args, kwargs))
    return call._replace(args=args, kwargs=kwargs)


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    """A module trains for a while, but for its parts whose rows meet, or which draw."""
    quiet = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
    modes = {part: part.training for part in module.modules()}
    for part in modes:
        part.training = not isinstance(part, quiet)
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _windows(size: int, *, lone: bool) -> Iterator[Rows]:
    """Some rows: a window that wraps around the end, two inside, and a single row."""
    for start, count in [(size - 1, 2), (1, 2), (0, 3), (1, 1)]:
        if size > 3 and (count > 1 or lone):
            yield Rows(size, start, count)


def _apart(leaf: Any) -> Any:
    """A copy of what a call may change: caches, and tensors in place."""
    if isinstance(leaf, Tensor):
        return leaf.clone()
    return leaf if isinstance(leaf, nn.Module) else copy.deepcopy(leaf)


def _unlike(
    outputs: Mapping[int, int], rows: Rows, opened: Any, closed: Any, found: Any
) -> str | None:
    """How an output on some rows is not what the open and the closed ones say."""
    leaves = [tree_leaves(output) for output in (opened, closed, found)]
    if len(set(map(len, leaves))) > 1:
        return "it runs otherwise on some rows of the batch alone"
    for number, (runs, skipped, ours) in enumerate(zip(*leaves, strict=True)):
        if not isinstance(runs, Tensor):
            if isinstance(runs, int | float) and runs != ours:
                return f"it hands out another number on some rows of the batch alone ({ours})"
            continue
        expected = runs
        if number in outputs:
            dim = outputs[number]
            expected = rows.join(rows.cut(runs, dim)[0], dim, rows.cut(skipped, dim)[1])
        if not bool(expected.isfinite().all()):
            return "with these weights it computes inf or NaN, which tells nothing about its rows"
        if not _close(ours, expected):
            return (
                "it computes something else on some rows of the batch alone: its rows depend on "
                "each other, or something that holds the batch reaches it unseen"
            )
    return None


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results are the same but for the rounding of other batch sizes."""
    if ours.shape != theirs.shape or not is_real_or_complex(ours.dtype):
        return torch.equal(ours, theirs)
    # Other batch sizes take other kernels; a mix-up of rows is as large as the values themselves.
    bound = 1e-3 if ours.dtype.itemsize >= 4 else 5e-2
    return bool((ours - theirs).norm() <= bound * theirs.norm())
