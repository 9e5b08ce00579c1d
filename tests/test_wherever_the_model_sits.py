"""Promise: it does not matter what is around a residual network, nor how its parts are called."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, PreNormLayer, Residual, Transformer, residuals, settled, vectors

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning"),
]


class Classifier(nn.Module):
    """A backbone, of which others call the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = residuals(6)
        self.head = nn.Linear(WIDTH, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


class Lightning(nn.Module):
    """As a LightningModule holds a network: as an attribute, with a step of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()


class TwoTowers(nn.Module):
    """As CLIP: an encoder for each kind of input, and the product of what they find."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = residuals(6), Transformer(PreNormLayer)
        self.project = nn.Linear(4, WIDTH)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.vision(image) @ self.project(self.text(text)).T


def test_a_part_may_be_called_alone() -> None:
    model, x = settled(Classifier), vectors(3, WIDTH)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x, scale="none")
    with depth.fixed({"backbone.1": False}):
        expected = model(x)
        assert torch.equal(model.head(model.backbone(x)), expected)
        assert torch.equal(model.head(model.forward_features(x)), expected)
    model.train()
    model.backbone(x)
    assert set(depth.last_gates) == {f"backbone.{n}" for n in range(6)}


class Sliced(nn.Module):
    """Computes with a slice of its branch, which is a module made on the spot."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.branch.append(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, kept: float = 1.0) -> Tensor:
        return x + kept * (self.branch(x) + self.branch[3:](self.branch[:3](2 * x)))


class Normed(Sliced):
    """The same with a norm behind the sum: it cannot be skipped whole."""

    def forward(self, x: Tensor, kept: float = 1.0) -> Tensor:
        return nn.functional.layer_norm(super().forward(x, kept), (WIDTH,))


@pytest.mark.parametrize("scale", ["eval", "train", "none"])
@pytest.mark.parametrize("kind", [Sliced, Normed])
def test_a_slice_of_a_gated_sequential_is_a_plain_one(kind: type[nn.Module], scale: Any) -> None:
    model, x = settled(lambda: nn.Sequential(*(kind() for _ in range(6)))), vectors(3, WIDTH)
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=x, scale=scale)
    pattern = {"1": False, "4": False}
    for training in (True, False):
        factor = 2.0 if (scale, training) == ("train", True) else 1.0
        factor = 0.5 if (scale, training) == ("eval", False) else factor
        expected = x
        for name, block in plain.train(training).named_children():
            expected = block(expected, factor * pattern.get(name, True))
        with depth.fixed(pattern):
            torch.testing.assert_close(model.train(training)(x), expected)
    part: Any = model[0].branch
    cuts = [part[:2], part[:], pickle.loads(pickle.dumps(part[:2])), copy.deepcopy(part[:2])]
    depth.remove()
    for cut in cuts[:2]:
        assert type(cut) is nn.Sequential
        assert torch.equal(cut(x), part[: len(cut)](x))
    assert [type(cut) for cut in cuts] == [nn.Sequential] * 4


def test_a_gated_module_that_is_made_anew_is_noticed() -> None:
    model, x = settled(lambda: nn.Sequential(*(Sliced() for _ in range(6)))), vectors(3, WIDTH)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x)
    type(model[0]).__init__(model[0])
    with pytest.raises(sd.ChangedModelError, match='block "0" was replaced'):
        depth.step()


def test_inside_of_a_lightning_module() -> None:
    inner, x = settled(Classifier), vectors(3, WIDTH)
    module = Lightning(inner)
    depth = sd.apply_stochastic_depth(module, 0.5, example_inputs=x)
    assert [block.name for block in depth.blocks] == [f"net.backbone.{n}" for n in range(6)]
    module.train().training_step(x).backward()
    assert sd.get_stochastic_depth(module) is depth
    depth.remove()
    depth = sd.apply_stochastic_depth(module.net, 0.5, example_inputs=x)
    module.training_step(x).backward()
    assert set(depth.last_gates) == {f"backbone.{n}" for n in range(6)}


def test_a_resnet_in_a_real_lightning_module() -> None:
    lightning = pytest.importorskip("lightning")
    models = pytest.importorskip("torchvision.models")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = models.resnet18(num_classes=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            return self(batch).square().mean()

    module, x = Module(), vectors(2, 3, 32, 32)
    depth = sd.apply_stochastic_depth(module, 0.5, example_inputs=x)
    names = [f"net.layer{stage}.{number}" for stage in range(1, 5) for number in range(2)]
    assert [block.name for block in depth.blocks] == names
    with depth.fixed({"net.layer1.1": False}):
        module.train().training_step(x, 0).backward()
    assert module.net.layer1[1].conv1.weight.grad is None
    assert module.net.layer1[0].conv1.weight.grad is not None


def test_two_towers_have_stochastic_depth_of_their_own() -> None:
    model = settled(TwoTowers)
    given = (vectors(3, WIDTH), vectors(3, 5, 3))
    vision = sd.apply_stochastic_depth(
        model, 0.5, example_inputs=given, blocks="vision.*", scale="none"
    )
    text = sd.apply_stochastic_depth(
        model,
        0.2,
        example_inputs=given,
        blocks=["!vision.*"],
        unit="branch",
        scale="none",
        schedule={"*:0": sd.constant(1.0), "*:1": sd.linear_warmup(10)},
    )
    assert [block.name for block in vision.blocks] == [f"vision.{n}" for n in range(6)]
    assert [block.name for block in text.blocks] == [f"text.layers.{n}" for n in range(6)]
    assert [b.drop_rate for b in text.blocks[5].branches] == [0.2, 0.0]
    model.train()(*given).sum().backward()
    assert len(vision.last_gates) == 6
    assert len(text.last_gates) == 12
    assert sd.get_stochastic_depth(model, blocks="vision.0") is vision
    with pytest.raises(sd.SelectionError):
        sd.get_stochastic_depth(model)
    with pytest.raises(sd.OptionError, match="has stochastic depth already"):
        sd.apply_stochastic_depth(model, 0.1, example_inputs=given, blocks="vision.3")
    vision.remove()
    text.remove()
    assert type(model.vision[0]) is Residual


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("scale", ["eval", "none"])
def test_torchs_own_encoder_keeps_its_scale_in_inference(norm_first: bool, scale: Any) -> None:
    """Under no_grad it has a fused path that computes a layer without calling its modules."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    model = settled(lambda: nn.TransformerEncoder(layer, 6, enable_nested_tensor=not norm_first))
    x, padding = vectors(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    plain = copy.deepcopy(model).eval()
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x, scale=scale)
    with_gradients = model.eval()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        fused = plain(x, src_key_padding_mask=padding)
        ours = model(x, src_key_padding_mask=padding)
    seen = ~padding
    # The same operations with and without gradients, up to the order of sums in attention.
    torch.testing.assert_close(ours[seen], with_gradients[seen], rtol=1e-5, atol=1e-5)
    assert torch.allclose(ours[seen], fused[seen], atol=1e-4) is (scale == "none")
    found = depth.fold().eval()
    with torch.no_grad():
        torch.testing.assert_close(
            found(x, src_key_padding_mask=padding)[seen], ours[seen], rtol=1e-4, atol=1e-4
        )
    assert type(model.layers[0]) is nn.TransformerEncoderLayer


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("scale", ["eval", "none"])
def test_an_ablation_of_torchs_own_encoder(scale: Any) -> None:
    """In inference it makes its input a nested tensor, without the padding."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = settled(lambda: nn.TransformerEncoder(layer, 6)).eval()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    example: Any = {"src": vectors(3, 5, 8), "src_key_padding_mask": padding}
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=example, scale=scale)
    with depth.fixed({"layers.2": False, "layers.5": False}):
        expected = model(**example)
        with torch.no_grad():
            found = model(**example)
    # The same operations with and without gradients, up to the order of sums in attention.
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-5, atol=1e-5)


def test_torchs_own_encoder_in_several_threads() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = settled(lambda: nn.TransformerEncoder(layer, 6))
    x = vectors(3, 5, 8)
    sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    with torch.no_grad():
        expected = model.eval()(x)
    wrong: list[float] = []

    def infer() -> None:
        with torch.no_grad():
            wrong.extend(
                float((model(x) - expected).abs().max())
                for _ in range(20)
                if not torch.equal(model(x), expected)
            )

    threads = [threading.Thread(target=infer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
