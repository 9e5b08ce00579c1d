"""Promise: a run that is saved at any moment and resumed continues bit by bit as it would have.

A run here is a list of things that happen (forward, backward, optimizer step, ...). It is run once
in one go, and once more in two halves, between which everything goes through a file and the second
half starts from new objects.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

import stochastic_depth as sd
from networks import (
    NETWORKS,
    assert_same,
    batch,
    gated,
    make,
    residuals,
    settled,
    sgd,
    train,
    vectors,
)
from riding import through_a_file

oldest = pytest.mark.oldest
Rate = Any


def drawn_just_now(depth: sd.StochasticDepth) -> dict[str, bool]:
    """The gates of the last call: inside of a dropped block `last_gates` tells of earlier ones."""
    gates = depth.last_gates
    return {
        name: kept for name, kept in gates.items() if gates.get(name.partition(".inner")[0], True)
    }


@dataclass
class Run:
    """A training run that can be cut at any microbatch."""

    name: str = "resnet"
    accumulation: int = 1
    clock: str = "follow"  # who steps the clock: "follow", "step", or "none"
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    options: dict[str, Any] = field(default_factory=dict)
    with_average: bool = False
    spoiled: int = -1  # the microbatch whose loss overflows, under a GradScaler

    def start(self) -> None:
        self.model, self.example = make(self.name)
        self.depth = sd.apply_stochastic_depth(
            self.model, 0.2, "uniform", example_inputs=self.example, **self.options
        )
        self.optimizer = self.optimizer_class(self.model.parameters(), lr=0.01)
        self.average = AveragedModel(self.model)
        self.scaler = torch.amp.GradScaler("cpu", enabled=self.spoiled >= 0, init_scale=2.0)
        if self.clock == "follow":
            self.depth.follow(self.optimizer)
        self.gates: list[dict[str, bool]] = []
        self.skipped = 0

    def microbatches(self, numbers: range) -> None:
        self.model.train()
        for number in numbers:
            loss = self.model(batch(self.example, number)).square().mean()
            self.gates.append(drawn_just_now(self.depth))
            if number == self.spoiled:
                loss = loss * float("inf")
            self.scaler.scale(loss).backward()
            if (number + 1) % self.accumulation == 0:
                self._step()

    def _step(self) -> None:
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < before
        self.skipped += skipped
        self.optimizer.zero_grad()
        if self.clock == "step" and not skipped:
            self.depth.step()
        if self.with_average:
            self.average.update_parameters(self.model)

    def saved(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            # Inside of an accumulation the gradients so far are a part of the state.
            "gradients": {n: p.grad for n, p in self.model.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "depth": self.depth.state_dict(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        self.start()
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for name, parameter in self.model.named_parameters():
            parameter.grad = state["gradients"][name]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.depth.load_state_dict(state["depth"])

    def check(self, cut: int, total: int) -> None:
        """The run in one go and the run in two pieces end alike, and drew alike on the way."""
        self.start()
        self.microbatches(range(total))
        whole, gates, depth, skipped = self.model, self.gates, self.depth, self.skipped
        average = self.average

        self.start()
        self.microbatches(range(cut))
        first, state = self.gates, through_a_file(self.saved())
        first_skipped = self.skipped
        self.resume(state)
        self.microbatches(range(cut, total))

        assert first + self.gates == gates
        assert_same(self.model, whole)
        assert_same(self.average, average)
        assert self.depth.state_dict() == depth.state_dict()
        assert [block.drop_rate for block in self.depth.blocks] == [
            block.drop_rate for block in depth.blocks
        ]
        assert torch.equal(self.model.eval()(self.example), whole.eval()(self.example))
        assert torch.equal(self.average.eval()(self.example), average.eval()(self.example))
        assert first_skipped + self.skipped == skipped == (0 <= self.spoiled < total)
        assert len({tuple(drawn.values()) for drawn in gates}) > 1


TOTAL = 12
warmup: dict[str, Any] = {"schedule": sd.linear_warmup(5)}
CLOCKS = ("follow", "step", "none")
SCALED: dict[str, Any] = {"options": warmup, "optimizer_class": torch.optim.SGD}
RUNS: list[dict[str, Any]] = [
    *(
        {"name": name, "clock": clock}
        for name, clock in zip(
            [name for name in NETWORKS if name != "shared"], CLOCKS * 2, strict=False
        )
    ),
    *({"clock": clock, "with_average": True, "options": warmup} for clock in CLOCKS[:2]),
    *(
        {
            "name": "post-norm",
            "accumulation": accumulation,
            "options": {"draw": sd.Draw(seed=5, redraw=redraw), "unit": unit, **warmup},
        }
        for accumulation in (2, 3)
        for redraw in ("forward", "step")
        for unit in ("block", "branch")
    ),
    # Without a step of the clock the number of the call is saved.
    {"clock": "none", "accumulation": 2},
    *(
        {"name": "pre-norm", "accumulation": accumulation, "spoiled": spoiled, **SCALED}
        for accumulation, spoiled in ((1, 0), (1, 7), (2, 4), (2, 11))
    ),
]


@oldest
@settings(max_examples=4)
@given(cut=st.integers(0, TOTAL))
@pytest.mark.parametrize("values", RUNS, ids=lambda values: ", ".join(map(str, values.values())))
def test_a_run_resumes_at_any_microbatch(values: dict[str, Any], cut: int) -> None:
    """By any clock, with an average, in the middle of an accumulation, under a GradScaler."""
    run = Run(**values)
    run.check(cut, TOTAL)
    left_out = run.spoiled >= 0
    if run.clock != "none":
        assert run.depth.state_dict()["step"] == TOTAL // run.accumulation - left_out


def test_a_step_that_a_fused_optimizer_leaves_out_for_its_grad_scaler_does_not_count() -> None:
    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    optimizer = sgd(model, fused=True)
    depth.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before, _ = make("pre-norm")
    scaler.scale(model(x).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same(model, before)
    assert depth.state_dict()["step"] == 0
    optimizer.zero_grad()
    scaler.scale(model(x).sum()).backward()
    scaler.step(optimizer)
    assert depth.state_dict()["step"] == 1


@contextmanager
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    try:
        yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("first", ["follow", "prepare"])
def test_an_accelerate_wrapped_optimizer_is_unwrapped(first: str) -> None:
    def run(numbers: range, state: dict[str, Any] | None = None) -> tuple[Any, ...]:
        with accelerator() as accelerate:
            model, x = make("resnet")
            depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, **warmup)
            optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            if first == "follow":
                depth.follow(optimizer)
            wrapped, optimizer = accelerate.prepare(model, optimizer)
            assert type(optimizer) is not torch.optim.SGD
            if first == "prepare":
                depth.follow(optimizer)
            if state is not None:
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                depth.load_state_dict(state["depth"])
            model.train()
            for number in numbers:
                with accelerate.accumulate(wrapped):
                    accelerate.backward(wrapped(batch(x, number)).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
            saved = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "depth": depth.state_dict(),
            }
            return model, depth, through_a_file(saved)

    whole, depth, _ = run(range(8))
    assert depth.state_dict()["step"] == 4  # steps of the optimizer, not calls of its wrapper
    *_, state = run(range(4))
    resumed, resumed_depth, _ = run(range(4, 8), state)
    assert_same(resumed, whole)
    assert resumed_depth.state_dict() == depth.state_dict()


@oldest
def test_other_wrappers_that_hold_an_optimizer_are_unwrapped() -> None:
    class Wrapper:
        def __init__(self, optimizer: object) -> None:
            self.optimizer = optimizer

    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    optimizer = sgd(model)
    depth.follow(Wrapper(optimizer))  # type: ignore[arg-type]
    optimizer.step()
    assert depth.state_dict()["step"] == 1


# What is in the state, and what it refuses.


@oldest
def test_the_state_is_plain_data_of_its_own() -> None:
    model, x = make("resnet")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    model.train()(x)
    state = depth.state_dict()
    kept = through_a_file(state)
    model(x)
    assert state == kept != depth.state_dict()
    depth.load_state_dict(state)
    model(x)
    assert state == kept
    assert not set(model.state_dict()) & set(state)


def handle(**options: Any) -> sd.StochasticDepth:
    network = settled(lambda: residuals(options.pop("count", 8)))
    options = {"drop_rate": 0.2, "draw": sd.Draw(), **options}
    return sd.apply_stochastic_depth(network, example_inputs=vectors(1, 8), **options)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "more blocks": ({"count": 9}, 'block "8" is gated there only'),
    "fewer blocks": ({"count": 7}, 'block "7" is gated here only'),
    "other blocks": ({"blocks": ["!3"]}, 'block "3" is gated here only'),
    "another seed": ({"draw": sd.Draw(seed=7)}, "seed 7 there, 0 here"),
    "another redraw": ({"draw": sd.Draw(redraw="step")}, "redraw 'step' there, 'forward' here"),
    "another unit": ({"unit": "branch"}, "unit 'branch' there, 'block' here"),
    "another scale": ({"scale": "train"}, "scale 'train' there, 'eval' here"),
}


@oldest
@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_something_else_is_refused_by_its_difference(other: str) -> None:
    options, says = OTHERS[other]
    theirs = handle(**options)
    theirs.step()
    mine = handle()
    before = mine.state_dict()
    with pytest.raises(sd.StateMismatchError) as caught:
        mine.load_state_dict(theirs.state_dict())
    assert says in str(caught.value)
    assert "apply stochastic depth with the options of the run that is resumed" in str(caught.value)
    assert mine.state_dict() == before


@oldest
@pytest.mark.parametrize("key", ["seed", "redraw", "unit", "scale", "drop_rates", "step", "calls"])
def test_a_state_that_lacks_something_is_refused(key: str) -> None:
    mine = handle()
    state = mine.state_dict()
    del state[key]
    with pytest.raises(sd.StateMismatchError, match=f"no {key}"):
        mine.load_state_dict(state)


@oldest
@pytest.mark.parametrize("state", [None, "state.pt", [1]])
def test_what_is_no_state_is_refused(state: Any) -> None:
    _, _, depth = gated("resnet")
    with pytest.raises(sd.StateMismatchError, match=f"the state is a {type(state).__name__}"):
        depth.load_state_dict(state)


def test_a_state_dict_of_the_model_is_refused() -> None:
    mine = handle()
    with pytest.raises(sd.StateMismatchError):
        mine.load_state_dict(mine.model.state_dict())


@oldest
def test_a_schedule_may_change_where_a_run_is_resumed() -> None:
    mine = handle(schedule=sd.linear_warmup(10))
    mine.step()
    other = handle(schedule=sd.linear_warmup(2))
    other.load_state_dict(mine.state_dict())
    assert other.blocks[-1].drop_rate == pytest.approx(0.1)


# Following.


@oldest
def test_step_while_following_raises_and_counts_nothing() -> None:
    depth = handle()
    optimizer = sgd(depth.model)
    following = depth.follow(optimizer)
    with pytest.raises(sd.OptionError, match=r"step\(\) while an optimizer is followed"):
        depth.step()
    assert depth.state_dict()["step"] == 0
    following.remove()
    depth.step()
    assert depth.state_dict()["step"] == 1


@oldest
def test_following_another_optimizer_replaces_the_first() -> None:
    """Trainers make an optimizer anew for every fit."""
    depth = handle()
    optimizer, other = sgd(depth.model), sgd(depth.model)
    first = depth.follow(optimizer)
    depth.follow(optimizer)  # twice counts once
    optimizer.step()
    assert depth.state_dict()["step"] == 1
    second = depth.follow(other)
    optimizer.step()
    assert depth.state_dict()["step"] == 1
    first.remove()  # which is no longer in force
    other.step()
    assert depth.state_dict()["step"] == 2
    second.remove()
    other.step()
    assert depth.state_dict()["step"] == 2
    depth.follow(optimizer)
    optimizer.step()
    assert depth.state_dict()["step"] == 3


@oldest
def test_an_optimizer_that_is_gone_is_followed_no_longer() -> None:
    depth = handle()
    depth.follow(sgd(depth.model))
    gc.collect()
    depth.step()
    assert depth.state_dict()["step"] == 1


@oldest
@pytest.mark.parametrize("optimizer", [None, 3, "sgd"])
def test_following_what_is_no_optimizer_raises(optimizer: Any) -> None:
    with pytest.raises(
        sd.OptionError, match=r"follow\(\) got a .* Expected a torch.optim.Optimizer"
    ):
        handle().follow(optimizer)


@oldest
@pytest.mark.parametrize("way_out", ["remove", "fold"])
def test_the_ways_out_end_the_following(way_out: str) -> None:
    depth = handle()
    optimizer = sgd(depth.model)
    depth.follow(optimizer)
    getattr(depth, way_out)()
    optimizer.step()
    assert depth.state_dict()["step"] == 0
    assert not optimizer._optimizer_step_post_hooks


@oldest
def test_an_optimizer_that_is_followed_can_be_copied_and_saved() -> None:
    depth = handle()
    optimizer = sgd(depth.model)
    depth.follow(optimizer)
    loaded = through_a_file(optimizer.state_dict())
    optimizer.load_state_dict(loaded)
    optimizer.step()
    assert depth.state_dict()["step"] == 1


# Who forgets to step the clock is told.


def train_without_a_clock(steps: int, optimizer_steps: bool = True, **options: Any) -> list[str]:
    """The library's warnings in a training that neither follows nor steps."""
    depth = handle(**options)
    optimizer = sgd(depth.model)
    depth.model.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            depth.model(vectors(4, 8)).square().mean().backward()
            if optimizer_steps:
                optimizer.step()
                optimizer.zero_grad()
            if step % 4 == 3:
                depth.model.eval()(vectors(4, 8))
                depth.model.train()
    return [str(w.message) for w in caught if issubclass(w.category, sd.StochasticDepthWarning)]


NEEDS_A_CLOCK: dict[str, dict[str, Any]] = {
    "a schedule": {"schedule": sd.linear_warmup(100)},
    "a schedule for some": {"schedule": {"7": sd.constant(0.5)}},
    "redraw": {"draw": sd.Draw(redraw="step")},
}


@oldest
@pytest.mark.parametrize("needing", NEEDS_A_CLOCK)
def test_a_clock_that_is_needed_and_stands_still_warns_once(needing: str) -> None:
    (message,) = train_without_a_clock(30, **NEEDS_A_CLOCK[needing])
    assert "depth.follow(optimizer)" in message
    assert "depth.step()" in message


@oldest
@pytest.mark.parametrize("frozen", ["first parameter", "first block"])
def test_it_is_also_told_where_the_first_parameters_are_frozen(frozen: str) -> None:
    depth = handle(schedule=sd.linear_warmup(100))
    if frozen == "first parameter":
        next(depth.model.parameters()).requires_grad_(False)
    else:
        depth.model.get_submodule("0").requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in depth.model.parameters() if p.requires_grad], lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(depth.model, optimizer, vectors(4, 8), 10)
    assert ["depth.follow(optimizer)" in str(warning.message) for warning in caught] == [True]


@oldest
def test_two_steps_are_not_enough_to_warn() -> None:
    assert train_without_a_clock(3, **NEEDS_A_CLOCK["a schedule"]) == []
    assert len(train_without_a_clock(6, **NEEDS_A_CLOCK["a schedule"])) == 1


@oldest
@pytest.mark.parametrize("needing", NEEDS_A_CLOCK)
def test_no_warning_without_steps_of_an_optimizer(needing: str) -> None:
    assert train_without_a_clock(20, optimizer_steps=False, **NEEDS_A_CLOCK[needing]) == []


@oldest
def test_no_warning_where_nothing_depends_on_the_step() -> None:
    assert train_without_a_clock(20) == []


@oldest
@pytest.mark.parametrize("needing", NEEDS_A_CLOCK)
@pytest.mark.parametrize("clock", ["follow", "step"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_no_warning_where_the_clock_is_stepped(needing: str, clock: str, accumulation: int) -> None:
    depth = handle(**NEEDS_A_CLOCK[needing])
    optimizer = sgd(depth.model)
    if clock == "follow":
        depth.follow(optimizer)
    depth.model.train()
    for number in range(20):  # a warning is an error here
        depth.model(vectors(4, 8)).square().mean().backward()
        if number % accumulation == accumulation - 1:
            optimizer.step()
            optimizer.zero_grad()
            if clock == "step":
                depth.step()


@oldest
def test_no_warning_for_an_average_of_a_model_whose_clock_is_stepped() -> None:
    depth = handle(schedule=sd.linear_warmup(100))
    optimizer = sgd(depth.model)
    depth.follow(optimizer)
    average: nn.Module = AveragedModel(depth.model)
    depth.model.train()
    for _ in range(10):
        depth.model(vectors(4, 8)).square().mean().backward()
        optimizer.step()
        average.update_parameters(depth.model)  # type: ignore[operator]
        average.train()(vectors(4, 8))
