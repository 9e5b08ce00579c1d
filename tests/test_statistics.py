"""Promise: `depth.statistics()` says how often each block was called in training, and dropped.

The reference twin writes down `depth.last_gates` after every forward.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from networks import gated, make, residuals, vectors
from riding import Run

pytestmark = pytest.mark.oldest


class Twin:
    """Counts by looking, after each forward in which every gate was called once."""

    def __init__(self, depth: sd.StochasticDepth) -> None:
        self.depth = depth
        self.calls: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def look(self) -> None:
        for name, is_open in self.depth.last_gates.items():
            self.calls[name] += 1
            self.dropped[name] += not is_open

    def check(self) -> None:
        found = self.depth.statistics()
        assert {name: count.calls for name, count in found.items()} == self.calls
        assert {n: c.dropped for n, c in found.items()} == {n: self.dropped[n] for n in found}


def train(model: nn.Module, x: Any, twin: Twin, forwards: int) -> None:
    for _ in range(forwards):
        model.train()(x)
        twin.look()


@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("sampling", ["independent", "balanced"])
@pytest.mark.parametrize("name", ["resnet", "post-norm", "explicit"])
def test_in_mode_batch(name: str, unit: Any, sampling: Any) -> None:
    draw = sd.Draw(3, sampling)
    model, x, depth = gated(name, 0.4, unit=unit, draw=draw, schedule=sd.linear_warmup(20))
    twin = Twin(depth)
    for step in range(90):  # more than are counted at once
        train(model, x, twin, forwards=1 + step % 3)  # microbatches
        depth.step()
        if step in (0, 40):
            twin.check()
    twin.check()
    assert all(count.dropped for count in depth.statistics().values())


def test_where_nobody_steps() -> None:
    model, x, depth = gated("resnet")
    twin = Twin(depth)
    for _ in range(3):
        train(model, x, twin, 50)
        twin.check()


def test_nothing_was_called() -> None:
    _, _, depth = gated("resnet")
    assert set(depth.statistics()) == {block.name for block in depth.blocks}
    assert {(count.calls, count.dropped) for count in depth.statistics().values()} == {(0, 0)}


def test_what_is_inside_of_a_dropped_block_is_not_called() -> None:
    model, x, depth = gated("nested", 0.5)
    for _ in range(40):
        model.train()(x)
        depth.step()
    found = depth.statistics()
    for outer in ("1", "2", "3"):
        ran = found[outer].calls - found[outer].dropped
        assert found[f"{outer}.inner.0"].calls == found[f"{outer}.inner.1"].calls == ran < 40


def test_a_layer_that_is_called_several_times_counts_each() -> None:
    model, x, depth = gated("shared", 0.2)
    for _ in range(10):
        model.train()(x)
        depth.step()
    assert depth.statistics()["layer"].calls == 60


def test_in_mode_sample_rows_count() -> None:
    model, x, depth = gated("pre-norm", 0.4, mode="sample")
    dropped = dict.fromkeys(depth.statistics(), 0.0)
    for step in range(60):
        rows = x if step % 2 else torch.cat([x, x, x])
        model.train()(rows)
        for name, kept in depth.last_gates.items():
            dropped[name] += 1.0 - len(kept) / len(rows)
        depth.step()
    found = depth.statistics()
    assert {count.calls for count in found.values()} == {60}
    assert {name: count.dropped for name, count in found.items()} == pytest.approx(dropped)


def test_what_is_forced_or_in_evaluation_does_not_count() -> None:
    model, x, depth = gated("resnet")
    with depth.fixed({depth.blocks[0].name: False}):
        model.train()(x)
    with depth.disabled():
        model(x)
    model.eval()(x)
    assert not any(count.calls for count in depth.statistics().values())


def test_other_rates_count_from_then_on() -> None:
    model, x, depth = gated("resnet", 0.0)
    twin = Twin(depth)
    train(model, x, twin, 3)
    depth.set_drop_rate(0.9, "uniform")
    train(model, x, twin, 3)
    twin.check()
    depth.step()
    train(model, x, twin, 2)
    twin.check()


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_a_resumed_run_goes_on_counting(mode: Any) -> None:
    whole, first, second = (Run(mode=mode) for _ in range(3))
    whole.steps(9)
    first.steps(4)
    first.model.train()(make("resnet")[1])  # in the middle of a step
    file = io.BytesIO()
    torch.save(first.depth.state_dict(), file)
    file.seek(0)
    second.steps(2)  # of another run, which the state takes the place of
    second.depth.load_state_dict(torch.load(file, weights_only=True))
    whole_again, there = Run(mode=mode), first.depth.statistics()
    assert second.depth.statistics() == there
    whole_again.steps(4)
    whole_again.model.train()(make("resnet")[1])
    for run in (second, whole_again):
        run.model.train()(make("resnet")[1])
    assert second.depth.statistics() == whole_again.depth.statistics()
    assert {count.calls for count in whole.depth.statistics().values()} == {9}


def test_copies_and_files_have_numbers_of_their_own() -> None:
    model, x, depth = gated("resnet")
    model.train()(x)
    copied, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    model(x)
    for other in (copied, read):
        found = sd.get_stochastic_depth(other).statistics()
        assert {count.calls for count in found.values()} == {1}
        other(x)
    assert {count.calls for count in depth.statistics().values()} == {2}
    again = sd.get_stochastic_depth(copied)
    assert {count.calls for count in again.statistics().values()} == {2}


def test_a_copy_that_follows_counts_its_own_calls_at_every_step() -> None:
    model, x, depth = gated("resnet")
    teacher = copy.deepcopy(model)
    for _ in range(5):
        model.train()(x)
        teacher.train()(x)
        teacher(x)
        depth.step()
    found = sd.get_stochastic_depth(teacher).statistics()
    assert {count.calls for count in found.values()} == {10}


def test_checkpoints_and_their_recomputation_count_once() -> None:
    model = residuals(8).train()
    x = vectors(2, 8).requires_grad_()
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=vectors(2, 8))
    out = torch.utils.checkpoint.checkpoint_sequential(model, 2, x, use_reentrant=False)
    out.sum().backward()
    assert {count.calls for count in depth.statistics().values()} == {1}


def test_a_layer_of_two_residuals_counts_its_rows_once() -> None:
    model, x, depth = gated("explicit", 0.5, mode="sample")
    dropped = dict.fromkeys(depth.statistics(), 0.0)
    for _ in range(10):
        model.train()(x)
        for name, kept in depth.last_gates.items():
            dropped[name] += 1.0 - len(kept) / len(x)
        depth.step()
    assert {n: c.dropped for n, c in depth.statistics().items()} == pytest.approx(dropped)


def test_an_empty_batch_drops_no_rows() -> None:
    model = residuals(8).train()
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=vectors(2, 8), mode="sample")
    assert model(torch.zeros(0, 8)).shape == (0, 8)
    assert {(count.calls, count.dropped) for count in depth.statistics().values()} == {(1, 0.0)}


def test_a_schedule_that_looks_at_more_than_the_step() -> None:
    """What was drawn counts, not what would be drawn now."""
    factor = {"now": 1.0}
    model, x = residuals(8), vectors(2, 8)
    depth = sd.apply_stochastic_depth(
        model, 0.9, "uniform", example_inputs=x, schedule=lambda step: factor["now"]
    )
    twin = Twin(depth)
    for step in range(40):
        factor["now"] = float(step < 20)
        train(model, x, twin, 4)
        depth.step()
    factor["now"] = 0.5
    twin.check()
    assert depth.statistics()["0"].dropped > 40


def test_a_copy_that_follows_counts_once_where_the_original_is_loaded() -> None:
    model, x = residuals(8).train(), vectors(2, 8)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    teacher = copy.deepcopy(model)
    for _ in range(3):
        model(x)
        teacher(x)
        depth.step()
    model(x)
    teacher(x)
    depth.load_state_dict(depth.state_dict())
    for one in (model, teacher):
        found = sd.get_stochastic_depth(one).statistics()
        assert {count.calls for count in found.values()} == {4}


def test_a_state_without_numbers_loads() -> None:
    model, x, depth = gated("resnet")
    model.train()(x)
    state = depth.state_dict()
    del state["statistics"]
    depth.load_state_dict(state)
    assert {count.calls for count in depth.statistics().values()} == {1}


def test_looking_between_two_steps_changes_nothing() -> None:
    model, x, depth = gated("resnet")
    twin = Twin(depth)
    for step in range(70):
        train(model, x, twin, 1 + step % 2)
        twin.check()
        depth.step()
        if step % 5 == 0:
            depth.step()  # without a forward
            twin.check()


def test_blocks_in_eval_mode_run() -> None:
    """As frozen ones do in fine-tuning."""
    model, x, depth = gated("pre-norm", 0.0)
    for layer in model.layers[:2]:
        layer.eval()
    model(x)
    shown = depth.metrics()
    assert shown["stochastic_depth/blocks_run"] == len(depth.blocks)
    assert shown["stochastic_depth/skipped"] == 0.0


def test_of_a_batch_before_a_resumption_nothing_is_said() -> None:
    """In mode "sample" a state tells how often the gates were called, not with how many rows."""
    model, x, depth = gated("pre-norm", mode="sample")
    model.train()(x)
    resumed, _, other = gated("pre-norm", mode="sample")
    other.load_state_dict(depth.state_dict())
    assert other.last_gates == {}
    assert "stochastic_depth/skipped" not in other.metrics()
    assert resumed.train()(x).equal(model(x))
    assert other.last_gates == depth.last_gates
