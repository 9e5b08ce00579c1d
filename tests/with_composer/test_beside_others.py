"""Promise: other algorithms of Composer's work beside it, in any order."""

from __future__ import annotations

import copy
from itertools import permutations
from typing import Any

import pytest
import torch
from composer.algorithms import (
    EMA,
    SAM,
    BlurPool,
    ChannelsLast,
    GradientClipping,
    LabelSmoothing,
    ProgressiveResizing,
    SelectiveBackprop,
    WeightStandardization,
)
from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import ComposerClassifier
from torch import nn

import stochastic_depth as sd
from stochastic_depth.integrations.composer import StochasticDepth
from with_composer.training import CLASSES, Watch, images, loader, network, trainer

Gates = list[dict[str, bool]]


def train(*algorithms: Any, **options: Any) -> tuple[Gates, Any, StochasticDepth]:
    model = ComposerClassifier(network(), num_classes=CLASSES)
    (own,) = (a for a in algorithms if isinstance(a, StochasticDepth))
    watch = Watch(own)
    trainer(*algorithms, model=model, callbacks=watch, **options).fit()
    return watch.gates, model, own


def own() -> StochasticDepth:
    return StochasticDepth("ResNetBottleneck", drop_rate=0.5, drop_warmup="0.5dur")


@pytest.fixture(scope="module")
def alone() -> Gates:
    return train(own())[0]


OTHERS: dict[str, Any] = {
    "EMA": lambda: EMA(half_life="2ba"),
    "ChannelsLast": ChannelsLast,
    "LabelSmoothing": lambda: LabelSmoothing(0.1),
    "ProgressiveResizing": lambda: ProgressiveResizing(delay_fraction=0.0, size_increment=8),
}


ORDERS = list(permutations([*OTHERS, "own"]))[::7]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_in_any_order(order: tuple[str, ...], alone: Gates) -> None:
    makers = OTHERS | {"own": own}
    gates, model, algorithm = train(
        *(makers[name]() for name in order), eval_dataloader=loader(1), eval_interval="2ba"
    )
    assert gates == alone
    assert model.module.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert algorithm.depth.blocks[-1].drop_rate == 0.5


def test_an_average_evaluates_its_weights_at_the_rate_in_force() -> None:
    algorithm, average = own(), EMA(half_life="2ba")
    evaluated: list[tuple[float, bool]] = []

    class AtEvaluation(Callback):
        def eval_start(self, state: State, logger: Logger) -> None:
            rate = algorithm.depth.blocks[-1].drop_rate
            evaluated.append((rate, average.ema_weights_active))
            scaled = copy.deepcopy(state.model).eval()
            with torch.no_grad():
                expected = scaled(state.batch)
            # A factor in the weights rounds otherwise than one on the output.
            torch.testing.assert_close(folded(scaled)(state.batch), expected, rtol=1e-5, atol=1e-5)

    model = ComposerClassifier(network(), num_classes=CLASSES)
    options: dict[str, Any] = {"eval_dataloader": loader(1), "eval_interval": "2ba"}
    trainer(algorithm, average, model=model, callbacks=AtEvaluation(), **options).fit()
    assert evaluated == [(0.25, True), (0.5, True), (0.5, True), (0.5, True)]


def folded(model: nn.Module) -> nn.Module:
    sd.get_stochastic_depth(model).fold()
    return model


@pytest.mark.parametrize(
    ("other", "place"),
    [
        (lambda: BlurPool(replace_convs=True, replace_maxpools=True), "before"),
        (lambda: BlurPool(replace_convs=True, replace_maxpools=True), "behind"),
        (WeightStandardization, "before"),
    ],
)
def test_what_replaces_modules(other: Any, place: str, alone: Gates) -> None:
    both = (other(), own()) if place == "before" else (own(), other())
    gates, model, algorithm = train(*both)
    assert len(algorithm.depth.blocks) == 8
    assert gates == alone
    x = images(2)[0].double()  # a factor in the weights rounds otherwise than one on the output
    with torch.no_grad():
        expected = model.module.double().eval()(x)
        plain = algorithm.depth.fold()
        torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(hasattr(type(module), "gated_from") for module in plain.modules())


@pytest.mark.filterwarnings("ignore:SAM has known issues")
def test_two_forwards_of_one_step(alone: Gates) -> None:
    """SAM runs each batch twice: with the same gates, as it is the same step."""
    gates, _, _ = train(own(), SAM(rho=0.05))
    assert gates[0::2] == gates[1::2] == alone


def test_a_forward_that_chooses_examples(alone: Gates) -> None:
    other = SelectiveBackprop(start=0.0, end=1.0, keep=0.5, interrupt=0, scale_factor=1.0)
    assert train(own(), other, device_train_microbatch_size=2)[0] == alone


def test_gradient_clipping(alone: Gates) -> None:
    assert train(own(), GradientClipping("norm", 0.1))[0] == alone
