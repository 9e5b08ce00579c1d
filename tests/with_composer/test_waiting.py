"""Promise: the training is told, once, where waiting for data eats what stochastic depth saves."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import stochastic_depth as sd
from stochastic_depth.integrations.composer import StochasticDepth
from stochastic_depth.integrations.composer.waiting import Waiting, remark
from with_composer.training import loader, trainer


class Slow:
    """A loader that takes its time."""

    batch_size = 4

    def __init__(self, seconds: float) -> None:
        self.batches, self.seconds = list(loader(25)), seconds

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            time.sleep(self.seconds)
            yield batch


def train(seconds: float) -> list[str]:
    algorithm = StochasticDepth("ResNetBottleneck", drop_rate=0.5)
    made = trainer(algorithm, train_dataloader=Slow(seconds), max_duration="50ba")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit()
    return [str(w.message) for w in caught if w.category is sd.StochasticDepthWarning]


def test_a_throttled_loader() -> None:
    (told,) = train(0.1)
    assert "of the training's time goes into waiting for data" in told
    assert "stochastic depth leaves out 28% of the blocks" in told


def test_a_fast_loader() -> None:
    assert train(0.0) == []


@pytest.mark.parametrize(
    ("waiting", "dropped", "told"),
    [(0.05, 0.01, False), (0.15, 0.1, True), (0.15, 0.28, False), (0.5, 0.28, True)],
)
def test_what_is_too_much(waiting: float, dropped: float, told: bool) -> None:
    assert (remark(waiting, dropped) is not None) is told


def test_one_stall_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    waiting, shares = Waiting(), []
    for batch in range(40):
        waiting.ask()
        now += 100.0 if batch in (0, 7, 33) else 0.25  # a start, and a stall in each window
        waiting.receive(first_of_epoch=batch == 0)
        now += 1.0
        waiting.finish()
        shares.append(waiting.share())
    assert [share for share in shares if share is not None] == pytest.approx(
        [18 * 0.25 / (18 * 0.25 + 20), 19 * 0.25 / (19 * 0.25 + 20)]
    )
