"""Promise: at every batch the rate in force is `min(1, elapsed / warmup) * rate`, and logged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from composer.algorithms import StochasticDepth as ComposersOwn
from composer.core import Callback, State, Time
from composer.loggers import Logger

from stochastic_depth.integrations.composer import StochasticDepth
from with_composer.training import Watch, loader, logged, trainer

RATE = 0.5


def elapsed(batch: int, *, warmup: float) -> float:
    return min(1.0, batch / warmup) if warmup else 1.0


@pytest.mark.parametrize(
    ("drop_warmup", "batches"),  # of four in an epoch, eight in all
    [
        (0.0, 0),
        (0.5, 4),
        (1, 8),
        ("0.2dur", 1.6),
        ("1ep", 4),
        ("2ep", 8),
        ("3ba", 3),
        ("1000ba", 1000),
        ("20sp", 5),
        (Time(0.5, "dur"), 4),
        (Time(6, "ba"), 6),
    ],
)
@pytest.mark.parametrize(
    ("method", "max_duration"),
    [("block", "2ep"), ("block", "32sp"), ("sample", "8ba")],
)
def test_rate_in_force(method: str, drop_warmup: Any, batches: float, max_duration: str) -> None:
    algorithm = StochasticDepth("ResNetBottleneck", method, RATE, drop_warmup=drop_warmup)
    watch = Watch(algorithm)
    made = trainer(algorithm, callbacks=watch, max_duration=max_duration)
    made.fit()
    expected = [RATE * elapsed(batch, warmup=batches) for batch in range(8)]
    assert watch.rates == pytest.approx(expected)
    assert logged(made, "drop_rate") == pytest.approx(expected)
    assert logged(made, "num_stochastic_layers") == [8]  # once
    after = RATE * elapsed(8, warmup=batches)
    assert algorithm.depth.blocks[-1].drop_rate == pytest.approx(after)


def test_a_loader_without_a_length_moves_at_epochs() -> None:
    batches = list(loader())

    class Stream:
        batch_size = 4

        def __iter__(self) -> Any:
            return iter(batches)

    algorithm = StochasticDepth("ResNetBottleneck", drop_rate=RATE, drop_warmup="2ep")
    watch = Watch(algorithm)
    trainer(algorithm, callbacks=watch, train_dataloader=Stream(), max_duration="12ba").fit()
    assert watch.rates == [0.0] * 4 + [RATE / 2] * 4 + [RATE] * 4


def test_evaluation_is_scaled_by_the_rate_in_force() -> None:
    algorithm = StochasticDepth("ResNetBottleneck", drop_rate=RATE, drop_warmup="1.0dur")
    rates: list[float] = []

    class AtEvaluation(Callback):
        def eval_start(self, state: State, logger: Logger) -> None:
            rates.append(algorithm.depth.blocks[-1].drop_rate)

    options: dict[str, Any] = {"eval_dataloader": loader(1), "eval_interval": "2ba"}
    trainer(algorithm, callbacks=AtEvaluation(), **options).fit()
    assert rates == pytest.approx([RATE * share for share in (0.25, 0.5, 0.75, 1.0)])


def test_time_that_is_reset_begins_the_warmup_anew() -> None:
    algorithm = StochasticDepth("ResNetBottleneck", drop_rate=RATE, drop_warmup="4ba")
    watch = Watch(algorithm)
    made = trainer(algorithm, callbacks=watch, max_duration="4ba")
    made.fit()
    made.fit(reset_time=True)
    assert watch.rates == pytest.approx([0.0, 0.125, 0.25, 0.375] * 2)
    assert watch.gates[:4] == watch.gates[4:]


@pytest.mark.parametrize(
    ("drop_warmup", "max_duration", "frozen_at"),
    [("0.2dur", "10ep", 0.25), ("0.2dur", "20ba", 0.375), ("0.5dur", "2ep", 0.0)],
)
def test_theirs_freezes_short_of_its_target(
    drop_warmup: str, max_duration: str, frozen_at: float
) -> None:
    """Why this differs: Composer's modules keep the rate of the last batch before the warmup's end,
    and its log says otherwise."""
    rates: list[float] = []

    class AtBatch(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            rates.append(float(state.model.module.layer4[1].drop_rate))

    theirs = ComposersOwn("ResNetBottleneck", drop_rate=RATE, drop_warmup=drop_warmup)
    made = trainer(theirs, callbacks=AtBatch(), max_duration=max_duration)
    made.fit()
    assert rates[-1] == pytest.approx(frozen_at)
    assert max(rates) == rates[-1]
    assert logged(made, "drop_rate")[-1] == RATE


def test_theirs_refuses_a_warmup_of_samples() -> None:
    with pytest.raises(ValueError, match='drop_warmup can not be used with "sample"'):
        ComposersOwn("ResNetBottleneck", "sample", drop_warmup="0.1dur")


@pytest.mark.parametrize("warmup", ["5ep", "1000ba"])
def test_theirs_takes_no_other_units(warmup: str) -> None:
    with pytest.raises(TypeError):
        trainer(ComposersOwn("ResNetBottleneck", drop_warmup=warmup)).fit()


def test_the_optimizer_is_not_disturbed() -> None:
    """A rate of 0 trains as if there were no algorithm."""
    weights = []
    for algorithms in ((), (StochasticDepth(drop_rate=0.0, drop_warmup="1ep"),)):
        made = trainer(*algorithms)
        made.fit()
        weights.append(made.state.model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)
