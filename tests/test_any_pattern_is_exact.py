"""Promise: whichever gates are closed, the model computes as with those branches at zero."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stochastic_depth as sd
from comparing import (
    CountOperations,
    assert_identical_gradients,
    assert_same_gradients,
    every_model,
    every_model_and_unit,
    run,
    with_factors,
)
from networks import assert_same, make
from specimen import Specimen
from twins import TWINS

pytestmark = pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning")
Unit = Literal["block", "branch"]


@every_model_and_unit
def test_some_patterns(specimen: Specimen, unit: Unit) -> None:
    plain, example = specimen.model(), specimen.example_inputs()
    gated = copy.deepcopy(plain)
    depth = sd.apply_stochastic_depth(
        gated,
        0.5,
        example_inputs=example,
        unit=unit,
        scale="none",
        blocks=specimen.gated_blocks,
    )
    branches = {branch.name: block.name for block in depth.blocks for branch in block.branches}
    modules = {
        branch.name: {*branch.modules, *specimen.ends_of(plain, block.name)[number]}
        for block in depth._plan.blocks
        for number, branch in enumerate(block.branches)
    }
    for gates, training in patterns(specimen, depth, unit):
        kept = {name: gates[block if unit == "block" else name] for name, block in branches.items()}
        reference = with_factors(plain, specimen, {name: float(on) for name, on in kept.items()})
        mine = copy.deepcopy(gated).train(training)
        with sd.get_stochastic_depth(mine).fixed(gates):
            output = run(mine, example)
        expected = run(reference.train(training), example)
        assert torch.equal(output, expected), gates
        if output.requires_grad:
            output.square().sum().backward()
            expected.square().sum().backward()
        used, closed = (
            set().union(*(modules[name] for name, on in kept.items() if on is each))
            for each in (True, False)
        )
        dropped = closed - used  # one module may end several branches
        own = {f"{m}.{p}" for m in dropped for p, _ in mine.get_submodule(m).named_parameters()}
        assert own or not dropped
        assert_same_gradients(mine, reference, inside=own.__contains__, rounding=specimen.rounding)
        before = dict(plain.named_buffers())
        for name, buffer in mine.named_buffers():
            if any(name.startswith(f"{module}.") for module in dropped):
                assert torch.equal(buffer, before[name]), f"{name} moved although it was dropped"


def patterns(
    specimen: Specimen, depth: sd.StochasticDepth, unit: Unit
) -> Iterator[tuple[dict[str, bool], bool]]:
    """Of a large model three at random; of a small one all, halves, and single ones closed.

    Each of them by itself where the blocks differ. With each: whether the model trains.
    """
    names = [block.name for block in depth.blocks]
    if unit == "branch":
        names = [branch.name for block in depth.blocks for branch in block.branches]
    rng = random.Random(specimen.name + unit)
    if not specimen.is_small:
        for training in (True, False, True):
            yield {name: rng.random() < 0.5 for name in names}, training
        return
    singles = names if isinstance(specimen.ends, dict) else names[-1:]
    each = (names, names, names[::2], names[1::2], *([name] for name in singles))
    for number, closed in enumerate(each):
        yield {name: name not in closed for name in names}, number % 2 == 0


@every_model
def test_nothing_of_a_dropped_branch_runs(specimen: Specimen) -> None:
    """Every block closed at once: what is left is what the skip connections and the rest need."""
    model = specimen.model().train()
    example = specimen.example_inputs()
    depth = sd.apply_stochastic_depth(
        model,
        0.5,
        example_inputs=example,
        blocks=specimen.gated_blocks,
    )
    ran: list[str] = []
    for block in depth._plan.blocks:
        for name in gone(model, specimen, block):
            for part, module in model.get_submodule(name).named_modules():
                module.register_forward_hook(lambda *_, key=f"{name}.{part}": ran.append(key))
    with CountOperations() as open_counts, depth.fixed({}):
        run(model, example)
    assert ran
    ran.clear()
    with CountOperations() as closed_counts, depth.fixed({b.name: False for b in depth.blocks}):
        run(model, example)
    # Modules without parameters may serve on the skip path as well (a ReLU behind the sum).
    assert not {key for key in ran if "relu" not in key and "dropout" not in key}
    heavy = ("convolution", "addmm", "mm.", "bmm", "native_batch_norm", "native_layer_norm")
    names = {name for block in depth._plan.blocks for name in gone(model, specimen, block)}
    in_branches = _heavy_operations_by_hand(model, names, depth, example, heavy)
    for name in open_counts.counts:
        if name.startswith(heavy):
            left = open_counts.counts[name] - in_branches.get(name, 0)
            assert closed_counts.counts.get(name, 0) == left, name


def gone(model: torch.nn.Module, specimen: Specimen, block: Any) -> set[str]:
    """The modules that do not run where this block is dropped."""
    modules = {name for branch in block.branches for name in branch.modules}
    if any(isinstance(model.get_submodule(name), sd.Residual) for name in modules):
        children = model.get_submodule(block.name).named_children()
        return {f"{block.name}.{n}" for n, m in children if not isinstance(m, sd.Residual)}
    if specimen.is_whole(block.name):
        return {block.name}
    return modules | set(itertools.chain(*specimen.ends_of(model, block.name)))


def _heavy_operations_by_hand(
    model: torch.nn.Module,
    names: set[str],
    depth: sd.StochasticDepth,
    example: Any,
    heavy: tuple[str, ...],
) -> dict[str, int]:
    """The operations that are dispatched while one of these modules runs, counted by hooks."""
    total: dict[str, int] = {}
    level = [0]
    counter = CountOperations()
    marks: list[dict[str, int]] = []

    def before(*_: object) -> None:
        level[0] += 1
        if level[0] == 1:
            marks.append(dict(counter.counts))

    def after(*_: object) -> None:
        level[0] -= 1
        if level[0] == 0:
            start = marks.pop()
            for name, count in counter.counts.items():
                total[name] = total.get(name, 0) + count - start.get(name, 0)

    handles = []
    for module in map(model.get_submodule, names):
        handles += [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        ]
    with counter, depth.fixed({}):
        run(model, example)
    for handle in handles:
        handle.remove()
    return {name: count for name, count in total.items() if name.startswith(heavy)}


@pytest.mark.oldest
@pytest.mark.parametrize("name", [name for name in TWINS if name != "shared"])
@settings(max_examples=10)
@given(gates=st.lists(st.booleans(), min_size=12, max_size=12), training=st.booleans())
def test_any_gates_equal_the_reference_twin(name: str, gates: list[bool], training: bool) -> None:
    """Gradients are None in the same places, and every statistic is the same."""
    model, x = make(name)
    twin = copy.deepcopy(model).train(training)
    depth = sd.apply_stochastic_depth(
        model.train(training), 0.5, example_inputs=x, unit="branch", scale="none"
    )
    names = [branch.name for block in depth.blocks for branch in block.branches]
    kept = dict(zip(names, gates, strict=False))
    with depth.fixed(kept):
        mine = model(x)
    theirs = TWINS[name](twin, x, lambda branch: float(kept[branch]))
    assert torch.equal(mine, theirs)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    if name == "nested":  # where three gradients meet in one place
        assert_same_gradients(model, twin, inside=lambda name: False, rounding=1e-6)
    else:
        assert_identical_gradients(model, twin)
    assert_same(depth.remove(), twin)
