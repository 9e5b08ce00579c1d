"""Promise: the presets do what their sources say, number by number; "model" takes a model's own
drop path or layerdrop over, block by block, and leaves it as it was where that is refused.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, Residual, batch, make, residuals, settled, vectors
from stochastic_depth.presets import Progressive

oldest = pytest.mark.oldest
Preset = Callable[..., sd.StochasticDepth]
X = vectors(4, WIDTH)
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

both_presets = pytest.mark.parametrize("preset", [sd.apply_drop_path, sd.apply_layer_drop])


def rates(depth: sd.StochasticDepth) -> dict[str, float]:
    return {block.name: block.drop_rate for block in depth.blocks}


def survival(depth: sd.StochasticDepth) -> list[float]:
    return [block.survival_probability for block in depth.blocks]


def at_step(depth: sd.StochasticDepth, step: int) -> sd.StochasticDepth:
    depth.load_state_dict({**depth.state_dict(), "step": step})
    return depth


def pre_norm(model: Any, x: Tensor, factors: Sequence[float]) -> Tensor:
    """The slow twin of `networks.Transformer(PreNormLayer)`: a factor for each layer, 0 if dropped.

    A dropped layer hands its input on; in one that runs, each sub-layer is multiplied.
    """
    x = model.embed(x)
    for layer, factor in zip(model.layers, factors, strict=True):
        if factor:
            y = layer.norm1(x)
            x = x + layer.attention(y, y, y, need_weights=False)[0] * factor
            x = x + layer.mlp(layer.norm2(x)) * factor
    return model.head(x.mean(1))


# Drop path, as in timm.


@pytest.mark.parametrize(
    ("name", "options", "in_a_block"),
    [("vit_tiny_patch16_224", {"img_size": 32}, 2), ("convnext_atto", {}, 1)],
)
def test_drop_path_has_timms_rates(name: str, options: dict[str, Any], in_a_block: int) -> None:
    timm = pytest.importorskip("timm")
    timms_own = timm.create_model(name, drop_path_rate=0.1, **options)
    depth = sd.apply_drop_path(timm.create_model(name, **options), 0.1, example_inputs=PIXELS)
    assert len(depth.blocks) == 12
    for number, block in enumerate(depth.blocks):
        assert block.drop_rate == pytest.approx(0.1 * number / 11, rel=1e-12)
        theirs = [
            module.drop_prob
            for module in timms_own.get_submodule(block.name).modules()
            if type(module).__name__ == "DropPath"
        ]
        # timm builds none where the rate is 0, and its numbers come out of a float32 linspace.
        assert theirs == pytest.approx([block.drop_rate] * (in_a_block if number else 0), rel=1e-6)


@oldest
def test_drop_path_draws_for_each_branch_and_leaves_inference_alone() -> None:
    plain, x = make("pre-norm")
    model = copy.deepcopy(plain)
    depth = sd.apply_drop_path(model, 0.3, example_inputs=x)
    assert 'unit="branch", scale="train"' in str(depth)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    model.train()(x)
    assert list(depth.last_gates) == [f"layers.{n}:{branch}" for n in range(6) for branch in (0, 1)]


@oldest
def test_drop_path_drops_rows_and_scales_the_others() -> None:
    """Each row is what one of the possible patterns gives, with `1 / (1 - p)` written by hand."""
    plain, x = settled(lambda: residuals(3)), vectors(64, WIDTH)
    model = copy.deepcopy(plain)
    sd.apply_drop_path(model, 0.2, example_inputs=x)
    output = model.train()(x)
    matched = []
    for factors in itertools.product([1.0], [0.0, 1 / 0.9], [0.0, 1 / 0.8]):
        y = x
        for block, factor in zip(plain, factors, strict=True):
            y = y + factor * block.linear(F.gelu(block.norm(y)))
        matched.append(torch.isclose(output, y, rtol=1e-4, atol=1e-5).all(1))
    assert torch.equal(torch.stack(matched).sum(0), torch.ones(64, dtype=torch.long))
    assert sum(bool(rows.any()) for rows in matched) > 1


# LayerDrop (Fan et al. 2019).


@oldest
def test_layer_drop_has_one_rate_and_no_scale_and_a_gate_for_each_layer() -> None:
    plain, x = make("pre-norm")
    model = copy.deepcopy(plain)
    depth = sd.apply_layer_drop(model, 0.4, example_inputs=x)
    assert rates(depth) == {f"layers.{number}": 0.4 for number in range(6)}
    assert torch.equal(model.eval()(x), plain.eval()(x))
    patterns = set()
    for number in range(8):
        y = batch(x, number)
        output = model.train()(y)
        assert list(depth.last_gates) == [f"layers.{number}" for number in range(6)]
        assert torch.equal(output, pre_norm(plain, y, [*map(float, depth.last_gates.values())]))
        patterns.add(tuple(depth.last_gates.values()))
    assert len(patterns) > 1


# Progressive Layer Dropping (Zhang & He 2020).

# theta(t) = (1 - theta) exp(-gamma t) + theta; p_i(t) = 1 - i / 12 * (1 - theta(t)).
# Each line: theta, gamma, t, and p_i(t) of some layers i.
PROGRESSIVE = [
    (0.5, 0.001, 0, {0: 1.0, 1: 1.0, 11: 1.0}),
    (0.5, 0.001, 1000, {0: 1.0, 1: 0.97366164338, 6: 0.84196986029, 11: 0.71027807720}),
    (0.5, 0.001, 5000, {0: 1.0, 6: 0.75168448675, 11: 0.54475489237}),
    (0.5, 0.001, 10**6, {0: 1.0, 6: 0.75, 11: 0.54166666667}),
    (0.2, 0.01, 50, {0: 1.0, 4: 0.89507484259, 9: 0.76391839583}),
    (0.5, 0.0, 10**6, {0: 1.0, 11: 1.0}),
    (1.0, 0.001, 1000, {0: 1.0, 11: 1.0}),
]


@oldest
@pytest.mark.parametrize(("theta", "gamma", "step", "expected"), PROGRESSIVE)
def test_progressive_layer_dropping_has_the_papers_survival_probabilities(
    theta: float, gamma: float, step: int, expected: dict[int, float]
) -> None:
    model = residuals(12)
    depth = sd.apply_progressive_layer_dropping(model, theta, gamma, example_inputs=X)
    found = survival(at_step(depth, step))
    assert {i: found[i] for i in expected} == pytest.approx(expected, rel=1e-9)


@oldest
def test_its_defaults_are_deepspeeds() -> None:
    given = sd.apply_progressive_layer_dropping(residuals(12), 0.5, 0.001, example_inputs=X)
    default = sd.apply_progressive_layer_dropping(residuals(12), example_inputs=X)
    assert survival(at_step(given, 1000)) == survival(at_step(default, 1000))


@oldest
def test_its_first_layer_always_runs() -> None:
    model = residuals(12)
    depth = at_step(
        sd.apply_progressive_layer_dropping(model, 0.1, example_inputs=X, draw=sd.Draw(seed=3)),
        10**5,
    )
    seen = []
    for _ in range(60):
        model.train()(X)
        seen.append(depth.last_gates)
    assert all(gates["0"] for gates in seen)
    # 0.175 survival: 60 draws, all the same, come once in 100,000 times
    assert {gates["11"] for gates in seen} == {True, False}


@oldest
def test_one_gate_decides_about_a_layer_and_both_sub_layers_are_divided_by_its_own_p() -> None:
    plain, x = make("pre-norm")
    model = copy.deepcopy(plain)
    depth = sd.apply_progressive_layer_dropping(model, 0.5, gamma=0.1, example_inputs=x)
    for _ in range(10):
        depth.step()
    theta = 0.5 * math.exp(-1.0) + 0.5
    p = [1 - i / 6 * (1 - theta) for i in range(7)]
    assert survival(depth) == pytest.approx(p[:6])
    assert torch.equal(model.eval()(x), plain.eval()(x))
    patterns = set()
    for number in range(8):
        y = batch(x, number)
        output = model.train()(y)
        gates = depth.last_gates
        assert list(gates) == [f"layers.{number}" for number in range(6)]
        patterns.add(tuple(gates.values()))
        own = [kept / p[i] for i, kept in enumerate(gates.values())]
        torch.testing.assert_close(output, pre_norm(plain, y, own), rtol=1e-5, atol=1e-5)
        # The public code passes the next layer's p on.
        next_ones = [kept / p[i + 1] for i, kept in enumerate(gates.values())]
        assert not torch.allclose(output, pre_norm(plain, y, next_ones), rtol=1e-3, atol=1e-3)
    assert len(patterns) > 1


@oldest
def test_a_schedule_of_the_users_multiplies() -> None:
    def full(step: int) -> float:
        return 0.5 * (1 - math.exp(-0.001 * step)) * 6 / 12  # of layer 6

    def rate(step: int, schedule: Any) -> float:
        depth = sd.apply_progressive_layer_dropping(
            residuals(12), schedule=schedule, example_inputs=X
        )
        return at_step(depth, step).blocks[6].drop_rate

    assert rate(1000, None) == pytest.approx(full(1000))
    assert rate(1000, sd.linear_warmup(4000)) == pytest.approx(full(1000) / 4)
    assert rate(1000, lambda step: 0.5) == pytest.approx(full(1000) / 2)
    assert rate(1000, {"6": sd.constant(0.5)}) == pytest.approx(full(1000) / 2)
    assert rate(1000, {"7": sd.constant(0.5)}) == pytest.approx(full(1000))
    assert rate(1000, {}) == pytest.approx(full(1000))
    late = {"6": sd.constant(0.1), "*": sd.constant(0.5)}  # later keys override earlier ones
    assert rate(1000, late) == pytest.approx(full(1000) / 2)


@oldest
def test_its_schedule_can_be_pickled_copied_and_read() -> None:
    model = residuals(12)
    depth = at_step(
        sd.apply_progressive_layer_dropping(
            model, schedule=sd.linear_warmup(4000), example_inputs=X
        ),
        1000,
    )
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert survival(sd.get_stochastic_depth(twin)) == survival(depth)
    schedule = Progressive(gamma=0.001)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert repr(schedule) == "Progressive(gamma=0.001)"
    assert repr(schedule * sd.constant(0.5)) == "Progressive(gamma=0.001) * constant(0.5)"


# What cannot be.

LAYER_DROP: Any = sd.apply_layer_drop
PROGRESSIVE_DROP: Any = sd.apply_progressive_layer_dropping


@oldest
@pytest.mark.parametrize(
    ("call", "says"),
    [
        *(
            (
                lambda m, v=value: PROGRESSIVE_DROP(m, v, example_inputs=X),
                (f"theta is {value!r}", "above 0 and at most 1", "pass 0.5"),
            )
            for value in (0, 0.0, 1.5, -0.5, float("nan"), True, "0.5", None)
        ),
        *(
            (
                lambda m, v=value: PROGRESSIVE_DROP(m, gamma=v, example_inputs=X),
                (f"gamma is {value!r}", "0 or more", "100 / T"),
            )
            for value in (-0.001, float("inf"), "fast", None)
        ),
        *(
            (
                lambda m, p=preset, v=value: p(m, v, example_inputs=X),
                (f"drop_rate is {value!r}", 'or "model"', "sd.apply_stochastic_depth"),
            )
            for preset in (sd.apply_drop_path, sd.apply_layer_drop)
            for value in ("modle", None, [0.1] * 8, {"0": 0.1}, True)
        ),
        (
            lambda m: LAYER_DROP(m, 1.0, example_inputs=X),
            ("drop_rate is 1.0", "from 0 up to, but not including, 1"),
        ),
        (
            lambda m: LAYER_DROP("resnet", "model"),
            ("model is a str", "a torch.nn.Module"),
        ),
        (
            lambda m: LAYER_DROP(m, "model", example_inputs=X),
            ('drop_rate is "model"', "no drop path or layerdrop of Sequential", "a number"),
        ),
        (
            lambda m: PROGRESSIVE_DROP(m, schedule=3, example_inputs=X),
            ("schedule is 3", "a function of the optimizer step"),
        ),
        (
            lambda m: PROGRESSIVE_DROP(m, schedule={"3": 3}, example_inputs=X),
            ("schedule['3'] is 3", "a function of the optimizer step"),
        ),
    ],
)
def test_refused_with_its_reason(call: Callable[[Any], Any], says: tuple[str, ...]) -> None:
    model = residuals(8)
    with pytest.raises(sd.OptionError) as caught:
        call(model)
    for part in says:
        assert part in str(caught.value)
    assert all(type(block) is Residual for block in model)


# "model": what is known of libraries.


def assert_inactive(model: nn.Module) -> None:
    """Nothing is dropped but by this library."""
    for module in model.modules():
        for attribute in ("drop_prob", "p", "layerdrop"):
            if type(module).__name__.endswith(("DropPath", "StochasticDepth", "Encoder")):
                assert getattr(module, attribute, 0.0) == 0.0


@both_presets
def test_model_takes_timms_rates_over(preset: Preset) -> None:
    timm = pytest.importorskip("timm")
    options: dict[str, Any] = {"img_size": 32, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.1, **options)
    plain = timm.create_model("vit_tiny_patch16_224", **options)
    plain.load_state_dict(model.state_dict())
    depth = preset(model, "model", example_inputs=PIXELS)
    expected = {f"blocks.{number}": 0.1 * number / 11 for number in range(12)}
    assert rates(depth) == pytest.approx(expected, rel=1e-6)
    assert_inactive(model)
    assert torch.equal(model.eval()(PIXELS), plain.eval()(PIXELS))
    if preset is sd.apply_layer_drop:
        with depth.fixed({}):  # every gate is open: nothing else drops
            assert torch.equal(model.train()(PIXELS), plain.train()(PIXELS))


@both_presets
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_model_takes_torchvisions_rates_over(preset: Preset, mode: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.swin_t(weights=None)
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.mode = mode
    depth = preset(model, "model", example_inputs=PIXELS)
    # 2, 2, 6 and 2 blocks; torchvision's rate of block i is 0.2 * i / (12 - 1).
    names = [(1, 0), (1, 1), (3, 0), (3, 1), *((5, n) for n in range(6)), (7, 0), (7, 1)]
    expected = {f"features.{s}.{n}": 0.2 * i / 11 for i, (s, n) in enumerate(names)}
    assert rates(depth) == pytest.approx(expected, rel=1e-12)
    assert_inactive(model)


@both_presets
def test_model_takes_the_rates_of_efficientnet_over(preset: Preset) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.efficientnet_b0(weights=None)
    depth = preset(model, "model", example_inputs=torch.randn(2, 3, 64, 64))
    # 16 blocks in stages of 1, 2, 2, 3, 3, 4 and 1, the rate of block i is 0.2 * i / 16; the first
    # of each stage changes its shape and has no skip connection, though a drop path it never calls.
    expected = {
        "features.2.1": 0.2 * 2 / 16,
        "features.3.1": 0.2 * 4 / 16,
        "features.4.1": 0.2 * 6 / 16,
        "features.4.2": 0.2 * 7 / 16,
        "features.5.1": 0.2 * 9 / 16,
        "features.5.2": 0.2 * 10 / 16,
        "features.6.1": 0.2 * 12 / 16,
        "features.6.2": 0.2 * 13 / 16,
        "features.6.3": 0.2 * 14 / 16,
    }
    assert rates(depth) == pytest.approx(expected, rel=1e-12)
    assert_inactive(model)


def wav2vec2(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        **options,
    )
    return transformers.Wav2Vec2Model(config)


SOUND = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))


@both_presets
@pytest.mark.filterwarnings("ignore:dropout is active")
@pytest.mark.parametrize("stable", [False, True])
def test_model_takes_layerdrop_over_for_the_layers_alone(preset: Preset, stable: bool) -> None:
    model = wav2vec2(layerdrop=0.15, do_stable_layer_norm=stable)
    depth = preset(model, "model", example_inputs=SOUND)
    assert rates(depth) == {
        "encoder.pos_conv_embed": 0.0,
        **{f"encoder.layers.{number}": 0.15 for number in range(6)},
    }
    assert model.config.layerdrop == 0.0


def test_model_takes_the_layerdrops_of_encoder_and_decoder_over() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=99,
        d_model=16,
        max_position_embeddings=32,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_layerdrop=0.1,
        decoder_layerdrop=0.2,
    )
    model = transformers.BartModel(config)
    depth = sd.apply_layer_drop(
        model, "model", example_inputs={"input_ids": torch.arange(14).view(2, 7)}
    )
    assert rates(depth) == {
        **{f"encoder.layers.{number}": 0.1 for number in range(3)},
        **{f"decoder.layers.{number}": 0.2 for number in range(3)},
    }
    assert model.encoder.layerdrop == model.decoder.layerdrop == 0.0
    assert model.config.encoder_layerdrop == model.config.decoder_layerdrop == 0.0


def test_model_takes_the_drop_path_of_transformers_over() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        drop_path_rate=0.1,
    )
    model = transformers.BeitModel(config)
    depth = sd.apply_layer_drop(model, "model", example_inputs={"pixel_values": PIXELS})
    assert [*rates(depth).values()] == pytest.approx([0.1 * number / 5 for number in range(6)])
    assert_inactive(model)


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


class DropPath(nn.Module):
    """As other libraries have it; here it may not be active in training."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        assert not (self.training and self.drop_prob)
        return x


class Dropped(nn.Module):
    """A residual block with a drop path."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = DropPath(drop_prob)

    def branch(self, x: Tensor) -> Tensor:
        return self.linear(F.gelu(self.norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.branch(x))


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
        ("1.drop.drop_prob is 0.05", "drops none of the gated blocks"),
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
    for part in ("1.drop.drop_prob is 0.05", "set 1.drop.drop_prob = 0", "takes its rates over"):
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
