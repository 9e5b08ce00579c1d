"""Promise: the draws follow the Trainer's seed and its batches, and no global generator."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import ComposerClassifier

import stochastic_depth as sd
from stochastic_depth.integrations.composer import StochasticDepth
from with_composer.training import CLASSES, Watch, drawn, loader, network, trainer

Gates = list[dict[str, Any]]


def gates(*beside: Any, method: str = "block", **options: Any) -> Gates:
    algorithm = StochasticDepth("ResNetBottleneck", method, 0.5)
    watch = Watch(algorithm)
    callbacks = [watch, *options.pop("callbacks", ())]
    trainer(algorithm, *beside, callbacks=callbacks, **options).fit()
    return watch.gates


def test_they_are_those_of_the_seed_and_the_batch() -> None:
    for seed in (7, 8):
        expected = drawn(network(), torch.randn(2, 3, 64, 64), 8, draw=sd.Draw(seed))
        assert gates(seed=seed) == expected


def test_samples_have_rows_of_their_own() -> None:
    kept = [rows for of_batch in gates(method="sample") for rows in of_batch.values()]
    # Of images half of a batch is dropped at once, or none.
    assert {tuple(rows) for rows in kept} == {(0, 1), (2, 3), (0, 1, 2, 3)}


@pytest.mark.parametrize("method", ["block", "sample"])
def test_another_seed_other_draws(method: str) -> None:
    first, again = gates(seed=7, method=method), gates(seed=7, method=method)
    assert first == again != gates(seed=8, method=method)


@pytest.mark.parametrize("method", ["block", "sample"])
def test_an_evaluation_in_between_changes_nothing(method: str) -> None:
    evaluated = gates(eval_dataloader=loader(), eval_interval="1ba", method=method)
    assert evaluated == gates(method=method)


def test_global_generators_change_nothing() -> None:
    class Disturb(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            torch.rand(3), np.random.rand(3), random.random()

    assert gates(callbacks=[Disturb()]) == gates()


@pytest.mark.parametrize("method", ["block", "sample"])
def test_global_generators_are_left_alone(method: str) -> None:
    def numbers(*algorithms: StochasticDepth) -> list[Any]:
        found: list[Any] = []

        class Draw(Callback):
            def batch_start(self, state: State, logger: Logger) -> None:
                found.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))

            def batch_end(self, state: State, logger: Logger) -> None:
                found.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))

        trainer(*algorithms, callbacks=Draw(), train_dataloader=loader(shuffle=True)).fit()
        return found

    assert numbers(StochasticDepth("ResNetBottleneck", method, 0.5)) == numbers()


def test_each_microbatch_has_its_own() -> None:
    algorithm = StochasticDepth("ResNetBottleneck", drop_rate=0.5)
    found: Gates = []

    class AfterForward(Callback):
        def after_forward(self, state: State, logger: Logger) -> None:
            found.append(algorithm.depth.last_gates)

    made = trainer(algorithm, callbacks=AfterForward(), device_train_microbatch_size=2)
    made.fit()
    assert found == drawn(network(), torch.randn(2, 3, 64, 64), 8, forwards=2)


def test_a_batch_that_is_begun_anew_has_the_same() -> None:
    """As Composer does where it finds a smaller microbatch size after an out-of-memory error."""
    algorithm = StochasticDepth("ResNetBottleneck", drop_rate=0.5)
    watch = Watch(algorithm)
    attempts: list[dict[str, bool]] = []
    made = trainer(algorithm, callbacks=watch)
    train: Any = Trainer._train_microbatches

    def twice(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        train(self, *args, **kwargs)
        attempts.append(algorithm.depth.last_gates)
        return train(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_microbatches", twice)
        made.fit()
    assert watch.gates[0::2] == watch.gates[1::2] == attempts == gates()


def test_a_forward_by_hand_in_between_changes_nothing() -> None:
    class Forward(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            with torch.no_grad():
                state.model(state.batch)

    assert gates(callbacks=[Forward()]) == gates()


def test_a_replaced_block_is_noticed() -> None:
    model = ComposerClassifier(network(), num_classes=CLASSES)

    class Replace(Callback):
        def fit_start(self, state: State, logger: Logger) -> None:
            model.module.layer4[1] = network().layer4[1]

    algorithm = StochasticDepth("ResNetBottleneck", drop_rate=0.5)
    with pytest.raises(sd.ChangedModelError, match=r"layer4\.1"):
        trainer(algorithm, model=model, callbacks=Replace()).fit()
