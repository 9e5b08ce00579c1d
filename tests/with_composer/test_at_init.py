"""Promise: it is in place right after `Trainer(...)`, before any data, or refused aloud."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
import torchvision
from composer.models import ComposerClassifier, ComposerModel
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.integrations.composer import StochasticDepth, apply_stochastic_depth
from with_composer.training import CLASSES, images, loader, network, trainer


def test_all_gates_of_a_resnet50_are_there_without_any_data() -> None:
    model = ComposerClassifier(torchvision.models.resnet50(num_classes=10), num_classes=10)
    names, parameters = list(model.state_dict()), list(model.parameters())
    made = trainer(StochasticDepth("ResNetBottleneck"), model=model, train_dataloader=None)
    blocks = sd.get_stochastic_depth(made.state.model).blocks
    assert len(blocks) == 16
    assert [b.drop_rate for b in blocks] == pytest.approx([0.2 * (i + 1) / 16 for i in range(16)])
    assert made.state.model is model
    assert list(model.state_dict()) == names
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("warmup", [0.0, "0.5dur"])
def test_a_model_that_is_only_evaluated_is_scaled(warmup: float | str) -> None:
    plain = network()
    model = ComposerClassifier(copy.deepcopy(plain), num_classes=CLASSES)
    algorithm = StochasticDepth("ResNetBottleneck", drop_rate=0.5, drop_warmup=warmup)
    made = trainer(algorithm, model=model, train_dataloader=None, max_duration=None)
    made.eval(eval_dataloader=loader())
    gated, folded = copy.deepcopy(model), model
    algorithm.depth.fold()
    x, _ = images(4)
    with torch.no_grad():
        expected = folded.module.eval()(x)
        torch.testing.assert_close(gated.module.eval()(x), expected)
        assert not torch.allclose(plain.eval()(x), expected)


def test_nothing_is_said(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        StochasticDepth("ResNetBottleneck")
        StochasticDepth(None, "block", 0.0, "uniform", "10ba", use_same_gpu_seed=False)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_applying_again_is_harmless() -> None:
    model = ComposerClassifier(network(), num_classes=CLASSES)
    first = StochasticDepth("ResNetBottleneck", drop_rate=0.5)
    trainer(first, model=model).fit()
    step, twin = first.depth.state_dict()["step"], copy.deepcopy(model)
    x, _ = images(4)
    with torch.no_grad():
        expected = model.module.eval()(x)
    depth = apply_stochastic_depth(model, "ResNetBottleneck", drop_rate=0.5, draw=sd.Draw(7))
    of_twin = apply_stochastic_depth(twin, "ResNetBottleneck", drop_rate=0.5, draw=sd.Draw(7))
    with torch.no_grad():
        torch.testing.assert_close(model.module.eval()(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(twin.module.eval()(x), expected, rtol=0, atol=0)
    assert sd.get_stochastic_depth(model) is depth
    assert depth.state_dict() == of_twin.state_dict()
    assert depth.state_dict()["step"] == step
    assert len(depth.blocks) == 8


def test_a_second_trainer_begins_anew() -> None:
    model = ComposerClassifier(network(), num_classes=CLASSES)
    algorithm = StochasticDepth("ResNetBottleneck", drop_rate=0.5)
    trainer(algorithm, model=model).fit()
    second = trainer(algorithm, model=model, seed=8)
    second.fit()
    assert algorithm.depth is sd.get_stochastic_depth(model)
    assert algorithm.depth.state_dict()["step"] == 8
    assert algorithm.depth.state_dict()["seed"] == 8


def test_another_rate_takes_the_place_of_the_first() -> None:
    model = network()
    apply_stochastic_depth(model, "ResNetBottleneck", drop_rate=0.5)
    depth = apply_stochastic_depth(model, "ResNetBottleneck", drop_rate=0.1)
    assert depth.blocks[-1].drop_rate == pytest.approx(0.1)
    depth.remove()
    assert type(model.layer1[0]) is torchvision.models.resnet.Bottleneck


@pytest.mark.parametrize(
    ("target", "blocks"),
    [
        ("ResNetBottleneck", 8),
        ("Bottleneck", 8),
        (None, 8),
        ("layer3.*", 2),
        ("module.layer3.*", 2),
        ("layer4.1", 1),
    ],
)
@pytest.mark.filterwarnings("ignore:.*blocks with a drop rate")
def test_targets(target: str | None, blocks: int) -> None:
    algorithm = StochasticDepth(target, drop_distribution="uniform")
    trainer(algorithm)
    assert algorithm.num_stochastic_layers == len(algorithm.depth.blocks) == blocks


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("ResNetBotleneck", 'did you mean "ResNetBottleneck"'),
        ("layer33.*", 'did you mean "layer3.'),
        ("TransformerLayer", 'choose from "ResNetBottleneck", "Bottleneck", "layer1.0"'),
    ],
)
def test_no_layer_that_matches_is_an_error(target: str, hint: str) -> None:
    with pytest.raises(sd.SelectionError, match="which matches none of the 8 residual") as caught:
        trainer(StochasticDepth(target))
    assert hint in str(caught.value)


def test_a_basic_block_is_no_bottleneck() -> None:
    model = ComposerClassifier(torchvision.models.resnet18(num_classes=4), num_classes=4)
    with pytest.raises(sd.SelectionError, match=r'choose from "BasicBlock"'):
        trainer(StochasticDepth("ResNetBottleneck"), model=model)


def test_the_handle_comes_with_the_trainer() -> None:
    algorithm = StochasticDepth("ResNetBottleneck")
    assert algorithm.num_stochastic_layers == 0
    with pytest.raises(sd.OptionError, match="make the Trainer first"):
        _ = algorithm.depth
    made = trainer(algorithm)
    assert algorithm.depth is sd.get_stochastic_depth(made.state.model)


class OwnModel(ComposerModel):
    """Takes a dict, so that nobody can guess an example."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.network = nn.Identity(), network()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.network(self.stem(batch["pixels"]))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch["labels"])


def test_a_model_of_ones_own_takes_a_batch() -> None:
    pixels, labels = images(2)
    with pytest.raises(sd.ExampleInputsError, match="example_inputs"):
        apply_stochastic_depth(OwnModel(), "ResNetBottleneck")
    example = {"pixels": pixels, "labels": labels}
    algorithm = StochasticDepth("ResNetBottleneck", example_inputs=example)
    trainer(algorithm, model=OwnModel())
    assert [block.name for block in algorithm.depth.blocks][:2] == [
        "network.layer1.0",
        "network.layer1.1",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stochastic_method": "row"}, "stochastic_method= got 'row'"),
        ({"drop_rate": 1.5}, "drop_rate is 1.5"),
        ({"drop_rate": True}, "drop_rate is True"),
        ({"drop_distribution": "linaer"}, 'did you mean "linear"'),
        ({"drop_warmup": "5 epochs"}, "drop_warmup is '5 epochs'"),
        ({"drop_warmup": 1.5}, "drop_warmup is 1.5"),
        ({"drop_warmup": -0.1}, "drop_warmup is -0.1"),
        ({"drop_warmup": None}, "drop_warmup is None"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(sd.StochasticDepthError) as caught:
        StochasticDepth("ResNetBottleneck", **arguments)
    assert message in str(caught.value)


def test_a_rate_of_one_never_runs_the_last_block() -> None:
    model = network()
    depth = apply_stochastic_depth(model, "ResNetBottleneck", drop_rate=1.0)
    assert depth.blocks[-1].drop_rate == pytest.approx(1.0)
    x, _ = images(4)
    for _ in range(20):
        model.train()(x)
        assert not depth.last_gates["layer4.1"]
    with torch.no_grad():
        scaled = model.eval()(x)
        with depth.fixed({"layer4.1": False}):
            torch.testing.assert_close(model(x), scaled)
