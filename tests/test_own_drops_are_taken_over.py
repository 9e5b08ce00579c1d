"""Promise: "model" takes a model's own drop path or layerdrop over, block by block.

Where that is refused, the model keeps its rates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from comparing import rates
from layers import DropPath, Dropped
from libraries import bart, wav2vec2
from networks import WIDTH, Residual, vectors

oldest = pytest.mark.oldest
Preset = Callable[..., sd.StochasticDepth]
X = vectors(4, WIDTH)
PIXELS = vectors(2, 3, 32, 32, seed=0)

both_presets = pytest.mark.parametrize("preset", [sd.apply_drop_path, sd.apply_layer_drop])


# "model": what is known of libraries.


def numbered(names: str, found: Sequence[float]) -> dict[str, float]:
    return {names.format(number): rate for number, rate in enumerate(found)}


def of_timm(**options: Any) -> Any:
    create = pytest.importorskip("timm").create_model
    return create("vit_tiny_patch16_224", img_size=32, num_classes=10, **options)


def of_torchvision(name: str, mode: str = "row") -> nn.Module:
    model: nn.Module = pytest.importorskip("torchvision.models").get_model(name, weights=None)
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.mode = mode  # type: ignore[assignment]
    return model


SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}


def beit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        image_size=32, num_hidden_layers=6, drop_path_rate=0.1, **SMALL
    )
    return transformers.BeitModel(config)


# torchvision's rate of block i is 0.2 * i / (12 - 1), in stages of 2, 2, 6 and 2 blocks.
SWIN = [(1, 0), (1, 1), (3, 0), (3, 1), *((5, n) for n in range(6)), (7, 0), (7, 1)]
# 16 blocks in stages of 1, 2, 2, 3, 3, 4 and 1, the rate of block i is 0.2 * i / 16; the first of
# each stage changes its shape and has no skip connection, though a drop path it never calls.
EFFICIENTNET = {"2.1": 2, "3.1": 4, "4.1": 6, "4.2": 7, "5.1": 9, "5.2": 10}
EFFICIENTNET |= {"6.1": 12, "6.2": 13, "6.3": 14}
SOUND = vectors(2, 400, seed=0)
OF_SOUND = {"encoder.pos_conv_embed": 0.0, **numbered("encoder.layers.{}", [0.15] * 6)}
LIBRARIES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, float]]] = {
    "timm": (
        lambda: of_timm(drop_path_rate=0.1),
        PIXELS,
        numbered("blocks.{}", [0.1 * n / 11 for n in range(12)]),
    ),
    **{
        f"swin, {mode}": (
            lambda mode=mode: of_torchvision("swin_t", mode),  # type: ignore[misc]
            PIXELS,
            {f"features.{stage}.{n}": 0.2 * i / 11 for i, (stage, n) in enumerate(SWIN)},
        )
        for mode in ("row", "batch")
    },
    "efficientnet": (
        lambda: of_torchvision("efficientnet_b0"),
        vectors(2, 3, 64, 64),
        {f"features.{name}": 0.2 * i / 16 for name, i in EFFICIENTNET.items()},
    ),
    **{
        f"wav2vec2, {stable}": (
            lambda stable=stable: wav2vec2(layerdrop=0.15, do_stable_layer_norm=stable),  # type: ignore[misc]
            SOUND,
            OF_SOUND,
        )
        for stable in (False, True)
    },
    "bart": (
        lambda: bart(encoder_layerdrop=0.1, decoder_layerdrop=0.2),
        {"input_ids": torch.arange(14).view(2, 7)},
        {**numbered("encoder.layers.{}", [0.1] * 3), **numbered("decoder.layers.{}", [0.2] * 3)},
    ),
    "beit": (
        beit,
        {"pixel_values": PIXELS},
        numbered("layers.{}", [0.1 * n / 5 for n in range(6)]),
    ),
}


@pytest.mark.filterwarnings("ignore:dropout is active")
@both_presets
@pytest.mark.parametrize("name", LIBRARIES)
def test_model_takes_the_rates_of_a_library_over(name: str, preset: Preset) -> None:
    build, example, expected = LIBRARIES[name]
    model: Any = build()
    if name in ("bart", "beit") and preset is sd.apply_drop_path:
        return
    depth = preset(model, "model", example_inputs=example)
    assert rates(depth) == pytest.approx(expected, rel=1e-6)
    for module in model.modules():  # nothing is dropped but by this library
        if type(module).__name__.endswith(("DropPath", "StochasticDepth", "Encoder", "Decoder")):
            for attribute in ("drop_prob", "p", "layerdrop"):
                assert getattr(module, attribute, 0.0) == 0.0
    config = vars(getattr(model, "config", object)).items()
    assert not any(rate for attribute, rate in config if "layerdrop" in str(attribute))


@both_presets
def test_a_model_whose_rates_were_taken_over_computes_as_one_without(preset: Preset) -> None:
    model, plain = of_timm(drop_path_rate=0.1), of_timm()
    plain.load_state_dict(model.state_dict())
    depth = preset(model, "model", example_inputs=PIXELS)
    assert torch.equal(model.eval()(PIXELS), plain.eval()(PIXELS))
    if preset is sd.apply_layer_drop:
        with depth.fixed({}):  # every gate is open: nothing else drops
            assert torch.equal(model.train()(PIXELS), plain.train()(PIXELS))


def test_transformers_swin_drops_only_one_of_two_branches_and_a_warning_says_so() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[3, 3],
        num_heads=[2, 2],
        window_size=4,
        drop_path_rate=0.1,
    )
    model = transformers.SwinModel(config)
    with pytest.warns(sd.StochasticDepthWarning, match="only some of the branches of 5 blocks"):
        depth = sd.apply_layer_drop(model, "model", example_inputs={"pixel_values": PIXELS})
    assert [*rates(depth).values()] == pytest.approx([0.1 * number / 5 for number in range(6)])
    again = transformers.SwinModel(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(sd.StochasticDepthWarning):
            sd.apply_layer_drop(again, "model", example_inputs={"pixel_values": PIXELS})
    own = [m.drop_prob for m in again.modules() if type(m).__name__ == "SwinDropPath"]
    assert own == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])


# "model": how it finds the block, on networks of torch alone.


class OnlyInTraining(Dropped):
    """DINOv2's block: in inference it does not call its drop path, in training it may not either.

    From some rate on it runs its branch on a part of the batch and ignores the drop path's rate.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__(drop_prob)
        self.sample_drop_ratio = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        assert not (self.training and self.sample_drop_ratio)
        return super().forward(x) if self.training else x + self.branch(x)


class Around(nn.Module):
    """A block whose branch holds blocks, each with a drop path of its own."""

    def __init__(self, inner: float, outer: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(Dropped(inner), Dropped(inner))
        self.last, self.drop = nn.Linear(WIDTH, WIDTH), DropPath(outer)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.last(self.inner(x)))


class InLine(nn.Module):
    """Blocks without a module of their own."""

    def __init__(self, drop_probs: Sequence[float]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in drop_probs)
        self.drops = nn.ModuleList(map(DropPath, drop_probs))

    def forward(self, x: Tensor) -> Tensor:
        for linear, drop in zip(self.linears, self.drops, strict=True):
            x = x + drop(linear(x.relu()))
        return x


class TwoRates(Dropped):
    """A block of two branches, dropped at different rates."""

    def __init__(self, drop_prob: float, other: float) -> None:
        super().__init__(drop_prob)
        self.second, self.drop2 = nn.Linear(WIDTH, WIDTH), DropPath(other)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.drop2(self.second(x.relu()))


class Affine(Dropped):
    """A branch that is affine as a whole is gated only where it is named."""

    def branch(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Stem(nn.Module):
    """Something is dropped that is no residual branch."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), DropPath(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x))


class EndsInLine(Dropped):
    """No factor passes what stands behind its last module."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.drop(self.branch(x)))


RISING = [0.0, 0.05, 0.1, 0.15, 0.2, 0.25]


def own_rates(model: nn.Module) -> list[float]:
    return [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]


@oldest
@both_presets
@pytest.mark.parametrize("kind", [Dropped, OnlyInTraining])
def test_model_reads_each_blocks_own_rate(preset: Preset, kind: type[Dropped]) -> None:
    model = nn.Sequential(*map(kind, RISING))
    depth = preset(model, "model", example_inputs=X)
    assert [*rates(depth).values()] == RISING
    assert own_rates(model) == [0.0] * 6
    model.train()(X)
    assert depth.last_gates


@oldest
def test_of_nested_blocks_the_innermost_has_the_rate() -> None:
    model = nn.Sequential(*(Around(0.1, 0.2) for _ in range(2)))
    depth = sd.apply_layer_drop(model, "model", example_inputs=X)
    assert rates(depth) == {
        **{str(outer): 0.2 for outer in range(2)},
        **{f"{outer}.inner.{inner}": 0.1 for outer in range(2) for inner in range(2)},
    }
    only_inner = nn.Sequential(*(Around(0.1, 0.0) for _ in range(2)))
    assert rates(sd.apply_layer_drop(only_inner, "model", example_inputs=X))["0"] == 0.0


@oldest
def test_blocks_without_a_module_of_their_own_have_their_rates() -> None:
    model = InLine(RISING)
    depth = sd.apply_layer_drop(model, "model", example_inputs=X)
    assert [*rates(depth).values()] == RISING


class Config:
    """As transformers' models have it."""

    def __init__(self, **rates: float) -> None:
        vars(self).update(rates)


class Encoder(nn.Module):
    """Runs layers; their rate is its own, or that of the configuration."""

    def __init__(self, config: Config, copied: float | None = None) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Residual() for _ in range(3))
        if copied is not None:
            self.layerdrop = copied

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Heads(nn.Module):
    """Shares the configuration, and has a list of modules that are not dropped."""

    def __init__(self, config: Config, **parts: nn.Module) -> None:
        super().__init__()
        self.config, self.parts = config, nn.ModuleDict(parts)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        for part in self.parts.values():
            x = part(x)
        return [head(x) for head in self.heads]


def speech_and_text() -> tuple[nn.Module, Config]:
    """One encoder reads the configuration's rate, the other has copied its own (SeamlessM4T)."""
    config = Config(speech_encoder_layerdrop=0.1, encoder_layerdrop=0.2)
    parts = {"speech": Encoder(config), "text": Encoder(config, copied=0.2)}
    return Heads(config, **parts), config


def copied_from_the_configuration() -> tuple[nn.Module, Config]:
    config = Config(layerdrop=0.2)
    return Heads(config, text=Encoder(config, copied=0.2)), config


def read_from_the_configuration() -> tuple[nn.Module, Config]:
    config = Config(layerdrop=0.1)
    return Heads(config, speech=Encoder(config)), config


@oldest
@pytest.mark.parametrize(
    "make", [speech_and_text, copied_from_the_configuration, read_from_the_configuration]
)
def test_each_list_of_layers_has_the_rate_that_its_module_reads(
    make: Callable[[], tuple[nn.Module, Config]],
) -> None:
    model, config = make()
    depth = sd.apply_layer_drop(model, "model", example_inputs=X)
    expected = {"speech": 0.1, "text": 0.2}
    assert rates(depth) == {
        block.name: expected[block.name.split(".")[1]] for block in depth.blocks
    }
    assert not any(vars(config).values())


@oldest
def test_a_stage_that_is_a_block_takes_no_rate_from_the_blocks_in_it() -> None:
    class Stage(nn.Module):
        def __init__(self, drop_prob: float) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Dropped(drop_prob), Dropped(drop_prob))
            self.end = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks(x)
            return x + self.end(x.relu())

    model = nn.Sequential(*map(Stage, RISING))
    depth = sd.apply_layer_drop(model, "model", example_inputs=X)
    assert [block.drop_rate for block in depth.blocks if "." not in block.name] == [0.0] * 6


@oldest
@both_presets
def test_the_model_is_watched_as_often_as_at_a_number(preset: Preset) -> None:
    def calls(drop_rate: Any, probabilities: Sequence[float]) -> int:
        model = nn.Sequential(*map(Dropped, probabilities))
        count = []
        model[0].register_forward_pre_hook(lambda *_: count.append(1))
        preset(model, drop_rate, example_inputs=X)
        return len(count)

    assert calls("model", RISING) == calls(0.25, [0.0] * 6)


@oldest
def test_what_blocks_leaves_out_is_not_dropped_any_more() -> None:
    model = nn.Sequential(*map(Dropped, RISING))
    depth = sd.apply_layer_drop(model, "model", example_inputs=X, blocks=["2", "3"])
    assert rates(depth) == {"2": 0.1, "3": 0.15}
    assert own_rates(model) == [0.0] * 6


@oldest
def test_model_in_a_wrapped_model() -> None:
    model = nn.Sequential(*map(Dropped, RISING))
    compiled: Any = torch.compile(model)
    depth = sd.apply_layer_drop(compiled, "model", example_inputs=X)
    assert [*rates(depth).values()] == RISING
    assert depth.model is model


def with_(block: nn.Module) -> nn.Sequential:
    return nn.Sequential(*map(Dropped, RISING), block)


REFUSED: list[tuple[nn.Module, dict[str, Any], type[sd.StochasticDepthError], tuple[str, ...]]] = [
    (
        with_(TwoRates(0.1, 0.2)),
        {},
        sd.ActiveDropPathError,
        ('block "6" has two rates', "6.drop.drop_prob is 0.1", "6.drop2.drop_prob is 0.2", '"!6"'),
    ),
    (
        with_(Affine(0.1)),
        {},
        sd.ActiveDropPathError,
        ("6.drop.drop_prob is 0.1", 'block "6" is affine', 'blocks="*" to do without'),
    ),
    (
        with_(Stem(0.1)),
        {},
        sd.ActiveDropPathError,
        ("6.drop.drop_prob is 0.1", "not found as a residual block", 'blocks="*" to do without'),
    ),
    (
        with_(Residual()),
        {"blocks": ["6"]},
        sd.ActiveDropPathError,
        ("1.drop.drop_prob is 0.05", "drops none of the gated blocks", "pass a number"),
    ),
    # Refused by `apply_stochastic_depth` itself, when the rates are 0 already:
    (with_(EndsInLine(0.1)), {}, sd.RefusedBlockError, ('block "6": 6:0 cannot be scaled', "tanh")),
    (with_(Dropped(1.0)), {}, sd.OptionError, ("drop_rate['6'] is 1.0",)),
    (with_(Residual()), {"draw": 3}, sd.OptionError, ("draw is 3",)),
    (with_(Residual()), {"schedule": 3}, sd.OptionError, ("schedule is 3",)),
]


@oldest
@pytest.mark.parametrize(("model", "options", "kind", "says"), REFUSED)
def test_a_refusal_leaves_the_models_own_rates(
    model: nn.Module,
    options: dict[str, Any],
    kind: type[sd.StochasticDepthError],
    says: tuple[str, ...],
) -> None:
    before, classes = own_rates(model), [type(module) for module in model.modules()]
    with pytest.raises(sd.StochasticDepthError) as caught:
        sd.apply_drop_path(model, "model", example_inputs=X, **options)
    assert type(caught.value) is kind
    for part in says:
        assert part in str(caught.value)
    assert own_rates(model) == before
    assert [type(module) for module in model.modules()] == classes


@oldest
def test_where_nothing_that_is_dropped_is_a_block_the_advice_is_a_number() -> None:
    stem = Stem(0.1)
    model = nn.Sequential(stem, *(Residual() for _ in range(6)))
    with pytest.raises(sd.ActiveDropPathError, match="drops none of the gated blocks") as caught:
        sd.apply_drop_path(model, "model", example_inputs=X)
    assert "set 0.drop.drop_prob = 0 and pass a number" in caught.value.instead
    stem.drop.drop_prob = 0.0
    sd.apply_drop_path(model, 0.1, example_inputs=X)


@oldest
def test_an_affine_block_that_is_named_has_its_rate() -> None:
    depth = sd.apply_layer_drop(with_(Affine(0.1)), "model", example_inputs=X, blocks=["*", "6"])
    assert [*rates(depth).values()] == [*RISING, 0.1]


@oldest
@pytest.mark.parametrize(
    "call",
    [
        lambda model: sd.apply_drop_path(model, 0.1, example_inputs=X),
        lambda model: sd.apply_layer_drop(model, 0.1, example_inputs=X),
        lambda model: sd.apply_progressive_layer_dropping(model, example_inputs=X),
    ],
)
def test_without_model_an_active_drop_path_is_refused_by_name(call: Callable[[Any], Any]) -> None:
    model = nn.Sequential(*map(Dropped, RISING))
    with pytest.raises(sd.ActiveDropPathError) as caught:
        call(model)
    for part in (
        "1.drop.drop_prob is 0.05",
        "set 1.drop.drop_prob = 0 (and 4 more)",
        "takes its rates over",
    ):
        assert part in str(caught.value)
    assert 'sd.apply_drop_path(model, "model")' in caught.value.instead
    assert own_rates(model) == RISING


def test_without_model_an_active_layerdrop_is_refused_by_name() -> None:
    model = wav2vec2(layerdrop=0.1)
    with pytest.raises(sd.ActiveDropPathError) as caught:
        sd.apply_layer_drop(model, 0.1, example_inputs=SOUND)
    assert "config.layerdrop is 0.1" in str(caught.value)
    assert 'sd.apply_layer_drop(model, "model")' in caught.value.instead
    assert model.config.layerdrop == 0.1
