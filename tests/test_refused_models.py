"""Promise: models and blocks that cannot be gated exactly are refused by name, with what works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from libraries import LIBRARIES, bart, wav2vec2
from networks import (
    WIDTH,
    residuals,
    settled,
    vectors,
)
from refusing import Model, check, gate, pasted, refused

oldest = pytest.mark.oldest


NO_SKIPS = ("has no residual block", "concatenation, as in DenseNet, is none")


# Models of other libraries.


VISION: list[tuple[str, int]] = [("vgg11", 32), ("alexnet", 64), ("densenet121", 32)]


@pytest.mark.parametrize(("name", "size"), VISION)
def test_torchvision_models_without_skips(name: str, size: int) -> None:
    models = pytest.importorskip("torchvision.models")
    x, build = torch.randn(2, 3, size, size), partial(models.get_model, name, weights=None)
    check(refused(*NO_SKIPS, kind=sd.NoResidualBlocksError, model=build, example_inputs=x))


def test_a_torchvision_model_needs_an_example_and_a_timm_model_does_not() -> None:
    models = pytest.importorskip("torchvision.models")
    timm = pytest.importorskip("timm")
    says = (
        "ResNet without example_inputs",
        "carries no example of its own",
        "example_inputs=batch",
    )
    with pytest.raises(sd.ExampleInputsError) as caught:
        sd.apply_stochastic_depth(models.resnet18(weights=None), 0.1)
    assert all(part in str(caught.value) for part in says)
    model = timm.create_model("test_resnet")
    assert sd.apply_stochastic_depth(model, 0.1).blocks


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.1, img_size=32, depth=6)


def torchvision_default(name: str) -> Model:
    return lambda: pytest.importorskip("torchvision.models").get_model(name, weights=None)


PIXELS = vectors(2, 3, 32, 32, seed=0)
TOKENS = {"input_ids": torch.arange(14).view(2, 7)}
SOUND = vectors(2, 400, seed=0)
ACTIVE: list[tuple[str, Model, Any, str, str]] = [
    ("timm", timm_vit, PIXELS, "blocks.1.drop_path1.drop_prob is 0.0", "apply_drop_path"),
    (
        "swin_t",
        torchvision_default("swin_t"),
        PIXELS,
        "features.1.1.stochastic_depth.p is 0.0",
        "apply_drop_path",
    ),
    (
        "convnext_tiny",
        torchvision_default("convnext_tiny"),
        PIXELS,
        "features.1.1.stochastic_depth.p is 0.0",
        "apply_drop_path",
    ),
    ("wav2vec2", wav2vec2, SOUND, "config.layerdrop is 0.1", "apply_layer_drop"),
    (
        "bart",
        partial(bart, encoder_layerdrop=0.1),
        TOKENS,
        "encoder.layerdrop is 0.1",
        "apply_layer_drop",
    ),
    (
        "bart",
        partial(bart, decoder_layerdrop=0.2),
        TOKENS,
        "decoder.layerdrop is 0.2",
        "apply_layer_drop",
    ),
]


@pytest.mark.filterwarnings("ignore:fold", "ignore:dropout is active")
@pytest.mark.parametrize(("name", "model", "example", "says", "preset"), ACTIVE)
def test_an_active_drop_path_is_refused_until_what_the_error_names_is_0(
    name: str, model: Model, example: Any, says: str, preset: str
) -> None:
    error = check(
        refused(
            says,
            "drops branches of its own accord",
            "drop_path_rate=0",
            preset,
            kind=sd.ActiveDropPathError,
            model=model,
            example_inputs=example,
        )
    )
    built = model()
    while True:  # each error names the next one
        found = re.search(r"set (\S+) = 0(?: \(and \d+ more\))?;", error.instead)
        assert found, error
        holder, _, attribute = found[1].rpartition(".")
        owner: Any = built.config if holder == "config" else built.get_submodule(holder)
        setattr(owner, attribute, 0.0)
        before = str(error)
        try:
            depth = gate(built, example_inputs=example)
        except sd.ActiveDropPathError as again:
            error = again
        else:
            break
        assert str(error) != before
    assert len(depth.blocks) >= 6


def t5() -> nn.Module:
    (specimen,) = (each for each in LIBRARIES if each.name == "transformers:T5")
    return specimen.make(0.1)


@pytest.mark.filterwarnings("ignore:dropout is active")
@pytest.mark.parametrize(
    ("blocks", "refused_ones", "left"),
    [
        (None, ["encoder.block.0", "decoder.block.0"], 4),
        (["encoder.*"], ["encoder.block.0"], 2),
        (["decoder.block.[01]"], ["decoder.block.0"], 1),
    ],
)
def test_the_first_layers_of_t5_are_refused_with_blocks_to_paste(
    blocks: Any, refused_ones: list[str], left: int
) -> None:
    example = {**TOKENS, "decoder_input_ids": TOKENS["input_ids"]}
    error = check(
        refused(
            *(f'block "{name}"' for name in refused_ones),
            "computes with a value made inside of it",
            kind=sd.RefusedBlockError,
            model=t5,
            blocks=blocks,
            example_inputs=example,
        )
    )
    depth = gate(t5(), blocks=pasted(error), example_inputs=example)
    names = [block.name for block in depth.blocks]
    assert len(names) == left
    assert not set(names) & set(refused_ones)
    depth.model.train()(**example)
    assert list(depth.last_gates) == names


# Blocks that cannot be gated exactly.


class EndsInLine(nn.Module):
    """What its last module hands out reaches the sum by way of a function that no factor passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x.relu()))


@oldest
def test_a_branch_that_cannot_be_scaled_is_refused_with_blocks_to_paste() -> None:
    def mixed() -> nn.Module:
        return settled(lambda: nn.Sequential(*residuals(6), EndsInLine(), *residuals(2)))

    says = ('block "6": 6:0 cannot be scaled', "tanh", 'scale="none" works', "leave it out")
    error = check(refused(*says, kind=sd.RefusedBlockError, model=mixed))
    assert pasted(error) == ["!6"]
    assert len(gate(mixed(), blocks=pasted(error)).blocks) == 8
    assert len(gate(mixed(), scale="none").blocks) == 9
    with pytest.raises(sd.RefusedBlockError, match="train the model as it is: no block is left"):
        gate(mixed(), blocks=["6"])


class Leaking(nn.Module):
    """The last block computes with a value from inside of the first one's branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(WIDTH, WIDTH), residuals(6)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.first(x.relu())
        x = self.rest(x + inside.relu())
        return x * inside


@dataclass
class Hidden:
    """What a dropped branch cannot hand out."""

    tensor: Tensor


class InAnObject(nn.Module):
    """A branch that hands its value out in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(WIDTH, WIDTH)
        self.branch.register_forward_hook(lambda module, args, output: Hidden(output))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x.relu()).tensor


class EndsInCosine(EndsInLine):
    """Where its modules give zeros, its branch does not."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cos(self.linear(x.relu()))


@oldest
def test_no_other_scale_is_promised_where_it_does_not_work() -> None:
    for scale in ("eval", "train", "none"):
        with pytest.raises(sd.RefusedBlockError) as caught:
            gate(nn.Sequential(*residuals(5), EndsInCosine()), scale=scale)
        assert "works" not in str(caught.value)


class EndsIn(EndsInLine):
    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.last, self.norm = last, nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.last(self.linear(x.relu())))


@oldest
@pytest.mark.parametrize(
    "last",
    [
        lambda y: nn.functional.glu(torch.cat([y, y], -1)),
        lambda y: y**2,
        lambda y: y.clamp(-1, 1),
        lambda y: torch.fft.fft(y).real,
        lambda y: y.sort(-1).values,
        lambda y: torch.where(y > 0, y, 0.1 * y),
        lambda y: nn.functional.normalize(y, dim=-1),
        lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda y: y * y.softmax(-1),
    ],
)
def test_whatever_is_zero_where_its_modules_are_works_without_a_scale(last: Any) -> None:
    model: Any = nn.Sequential(*residuals(5), EndsIn(last))
    x = vectors(2, WIDTH)
    depth, end = gate(model, scale="none"), model[5]
    with depth.fixed({"5": False}):
        out = model.train()(x)
    torch.testing.assert_close(out, end.norm(model[:5](x)))


@oldest
@pytest.mark.parametrize(
    "last",
    [
        lambda y: y / y.norm(dim=-1, keepdim=True),
        lambda y: y * y.norm().reciprocal(),
        lambda y: nn.functional.hardtanh(y, 0.1, 1.0),
        lambda y: torch.where(y > 0, y, 0.1),
    ],
)
def test_whatever_is_not_or_is_nan_is_refused(last: Any) -> None:
    with pytest.raises(sd.RefusedBlockError, match="5:0 is not zero when its modules are"):
        gate(nn.Sequential(*residuals(5), EndsIn(last)), scale="none")


@oldest
def test_a_value_in_an_object_is_scaled() -> None:
    model: Any = nn.Sequential(*residuals(5), InAnObject())
    depth = gate(model, 0.5, "uniform", scale="train")
    x = vectors(2, WIDTH)
    with depth.fixed({}):
        doubled = model.train()(x)
    depth.remove()
    model[5].branch.register_forward_hook(lambda module, args, output: Hidden(2 * output.tensor))
    for block in model[:5]:
        block.linear.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(doubled, model(x))


@oldest
def test_where_no_block_is_left_and_nothing_can_be_tried_the_error_says_so() -> None:
    with pytest.raises(sd.RefusedBlockError) as caught:
        gate(settled(Leaking), blocks=["first"])
    assert caught.value.instead.startswith("write the connections that can be skipped")
    assert caught.value.instead.endswith("train the model as it is: no block is left")


@oldest
def test_a_branch_whose_values_are_used_elsewhere_is_refused() -> None:
    says = ('block "first"', "computes with a value made inside of it")
    leaking = partial(settled, Leaking)
    error = check(refused(*says, kind=sd.RefusedBlockError, model=leaking))
    assert len(gate(settled(Leaking), blocks=pasted(error)).blocks) == 6


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_a_model_that_is_a_script(how: str) -> None:
    """Its modules run where Python does not reach."""
    x = torch.randn(4, WIDTH)
    jit: Any = torch.jit
    make = {"scripted": jit.script, "traced": partial(jit.trace, example_inputs=(x,))}[how]
    scripted = make(residuals(6))
    for call in (sd.apply_stochastic_depth, sd.estimate_saving):
        with pytest.raises(sd.OptionError, match=r"Module, no script\. Instead: pass the model"):
            call(scripted, 0.2, example_inputs=x)
