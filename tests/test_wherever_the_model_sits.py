"""Promise: it does not matter what is around a residual network, nor how its parts are called."""

from __future__ import annotations

import copy
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


class GraphLayer(nn.Module):
    """Messages along edges, added to each node's own value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.message = nn.LayerNorm(WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.update = nn.Linear(WIDTH, WIDTH)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        x = self.norm(nodes)
        source, target = edges
        messages = self.message(torch.cat([x[source], x[target]], 1)).relu()
        gathered = torch.zeros_like(x).index_add(0, target, messages)
        return nodes + self.update(gathered)


class GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GraphLayer() for _ in range(6))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            nodes = layer(nodes, edges)
        return nodes


class TimedBlock(nn.Module):
    """As in a diffusion model's U-net: the time is added in the middle of the branch."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, given), nn.Conv2d(given, made, 3, padding=1)
        self.time = nn.Linear(WIDTH, made)
        self.norm2, self.conv2 = nn.GroupNorm(2, made), nn.Conv2d(made, made, 3, padding=1)
        self.skip = nn.Conv2d(given, made, 1) if given != made else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(torch.nn.functional.silu(self.norm1(x)))
        h = h + self.time(time)[:, :, None, None]
        h = self.conv2(torch.nn.functional.silu(self.norm2(h)))
        return self.skip(x) + h


class Diffusion(nn.Module):
    """Down, and up again with what was on the way down beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([TimedBlock(8, 8), TimedBlock(8, 16)])
        self.middle = nn.ModuleList([TimedBlock(16, 16), TimedBlock(16, 16)])
        self.up = nn.ModuleList([TimedBlock(32, 8), TimedBlock(16, 8)])
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x, kept = self.stem(x), []
        for block in self.down:
            x = block(x, time)
            kept.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        for block in self.middle:
            x = block(x, time)
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, kept.pop()], 1), time)
        return self.out(x)


def graph() -> tuple[Tensor, Tensor]:
    return vectors(7, WIDTH), torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]])


@pytest.mark.parametrize(
    ("network", "example", "names", "whole"),
    [
        (GraphNetwork, graph, [f"layers.{n}" for n in range(6)], 6),
        (
            Diffusion,
            lambda: (vectors(2, 3, 8, 8), vectors(2, WIDTH)),
            ["down.0", "down.1", "middle.0", "middle.1", "up.0", "up.1"],
            3,
        ),
    ],
)
def test_other_kinds_of_networks(network: Any, example: Any, names: list[str], whole: int) -> None:
    model, given = settled(network), example()
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=given, scale="none")
    assert [block.name for block in depth.blocks] == names
    assert str(depth).count("skipped whole") == whole
    with depth.fixed({}):
        assert torch.equal(model.train()(*given), plain.train()(*given))
    for dropped in (names[:1], names[1::2], names):
        twin = copy.deepcopy(plain)
        for name in dropped:
            block: Any = twin.get_submodule(name)
            last = block.update if network is GraphNetwork else block.conv2
            last.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        with depth.fixed(dict.fromkeys(dropped, False)):
            assert torch.equal(model(*given), twin(*given)), dropped


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


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_decoder(norm_first: bool) -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    model = settled(lambda: nn.TransformerDecoder(layer, 6))
    given = (vectors(3, 5, 8), vectors(3, 4, 8, seed=2))
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=given, scale="none")
    assert [len(block.branches) for block in depth.blocks] == [3] * 6
    for layer in plain.layers[1::2]:
        for end in (layer.dropout1, layer.dropout2, layer.dropout3):
            end.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    with depth.fixed({f"layers.{n}": False for n in (1, 3, 5)}):
        for training in (True, False):
            ours, theirs = (net.train(training)(*given) for net in (model, plain))
            assert torch.equal(ours, theirs)
