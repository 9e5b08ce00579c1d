"""Promise: what cannot work is refused with an error that says what arrived, what was expected, and
what to do; and then the model is as it was. What can be chosen with `blocks=` stands at the end.
"""

from __future__ import annotations

import ast
import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from libraries import wav2vec2
from networks import (
    WIDTH,
    BasicBlock,
    Residual,
    make,
    nested,
    residuals,
    sequences,
    settled,
    vectors,
)

oldest = pytest.mark.oldest
Model = Callable[[], nn.Module]


def stack() -> nn.Module:
    return settled(residuals)


X = vectors(2, WIDTH)
EIGHT = 'choose from "0", "1", "2", "3", "4", "5" and 2 more'


def gate(model: nn.Module, drop_rate: Any = 0.1, *more: Any, **options: Any) -> sd.StochasticDepth:
    return sd.apply_stochastic_depth(model, drop_rate, *more, **{"example_inputs": X, **options})


def pasted(error: sd.StochasticDepthError) -> Any:
    """The `blocks=[...]` that an error offers."""
    found = re.search(r"blocks=(\[.*?\])", error.instead)
    assert found, error
    return ast.literal_eval(found[1])


@dataclass
class Refusal:
    """What is called, the error that comes, and what it has to say; it is named by the first."""

    says: tuple[str, ...]
    call: Callable[[nn.Module], Any]
    kind: type[sd.StochasticDepthError]
    model: Model = stack


def refused(
    *says: str, kind: Any = sd.OptionError, model: Model = stack, **options: Any
) -> Refusal:
    """By `apply_stochastic_depth` with these options."""
    return Refusal(says, lambda model: gate(model, **options), kind, model)


def called(*says: str, by: Callable[[nn.Module], Any], kind: Any = sd.OptionError) -> Refusal:
    return Refusal(says, by, kind)


UNKNOWN: Any = partial(refused, kind=sd.SelectionError)
FLAT = ("drop_distribution is 'uniform' although drop_rate says",)
RATES = [
    *(
        refused(
            f"drop_rate is {value!r}",
            "from 0 up to, but not including, 1",
            "such as 0.2",
            drop_rate=value,
        )
        for value in [1.0, 1, 1.5, -0.1, float("nan"), float("inf"), True, None, "0.1", {0.1}, 1j]
    ),
    refused(
        "drop_rate holds 7 rates for 8 blocks",
        "one rate per block",
        "give 8 rates",
        drop_rate=[0.1] * 7,
    ),
    refused("drop_rate holds 9 rates for 8 blocks", drop_rate=(0.1,) * 9),
    refused("drop_rate[7] is 1.0", drop_rate=[0.1] * 7 + [1.0]),
    refused("drop_rate['3'] is 2", drop_rate={"0": 0.1, "3": 2}),
    UNKNOWN("drop_rate names 'layer*'", "none of the 8 names", EIGHT, drop_rate={"layer*": 0.1}),
    UNKNOWN("drop_rate is an empty mapping", EIGHT, drop_rate={}),
    UNKNOWN(
        "drop_rate names 'layers.12'",
        'did you mean "layers.2" or "layers.1"',
        drop_rate={"layers.12": 0.1},
        example_inputs=sequences(),
        model=lambda: make("pre-norm")[0],
    ),
    refused(
        "drop_distribution is 'linear' although drop_rate says",
        "leave drop_distribution out",
        drop_rate=[0.1] * 8,
        drop_distribution="linear",
    ),
    refused(*FLAT, drop_rate={"0": 0.1}, drop_distribution="uniform"),
    UNKNOWN(
        'drop_distribution is "liner"',
        "linear_from_zero",
        'did you mean "linear"',
        drop_distribution="liner",
    ),
    refused("holds 3 rates for 8 blocks", drop_distribution=lambda blocks, rate: [rate] * 3),
]

OPTIONS = [
    refused("unit= got 'blok'", '"block" or "branch"', 'did you mean "block"', unit="blok"),
    refused("mode= got 'batches'", '"batch" or "sample"', mode="batches"),
    refused("scale= got 'trian'", 'did you mean "train"', scale="trian"),
    refused(
        'mode="sample" with Draw(sampling="balanced")',
        'mode="batch"',
        mode="sample",
        draw=sd.Draw(sampling="balanced"),
    ),
    refused("draw is 3", "sd.Draw(seed=1)", draw=3),
    refused("schedule is 3", "linear_warmup", schedule=3),
    UNKNOWN("schedule names '9'", EIGHT, schedule={"9": sd.constant(1)}),
    UNKNOWN("schedule names '0:0'", schedule={"0:0": sd.constant(1)}),
    *(
        called(*says, by=lambda model, n=name: gate(model).fixed({n: True}).__enter__(), kind=kind)  # type: ignore[misc]
        for name, kind, says in [
            ("00", sd.SelectionError, ('fixed() got "00"', EIGHT)),
            ("0:0", sd.SelectionError, ('fixed() got "0:0"', 'with unit="branch" of a branch')),
        ]
    ),
    *(
        called(*says, by=lambda model, o=options: sd.Draw(**o))  # type: ignore[misc]
        for options, says in [
            (
                {"seed": "a"},
                (
                    "Draw(seed='a')",
                    "an integer",
                ),
            ),
            ({"seed": True}, ("Draw(seed=True)",)),
            ({"seed": 0.5}, ("Draw(seed=0.5)",)),
            (
                {"sampling": "balance"},
                "Draw(sampling=...) got 'balance'",
                'did you mean "balanced"',
            ),
            (
                {"redraw": "never"},
                (
                    "Draw(redraw=...) got 'never'",
                    '"forward" or "step"',
                ),
            ),
            (
                {"across_ranks": "all"},
                (
                    "Draw(across_ranks=...) got 'all'",
                    '"same" or "different"',
                ),
            ),
        ]
    ),
]

LEAVES = "leaves nothing of 8 residual blocks"
SELECTIONS = [
    UNKNOWN("blocks names '9'", EIGHT, blocks="9"),
    UNKNOWN("blocks names 'layer1'", EIGHT, blocks=["0", "layer1"]),
    UNKNOWN("blocks names 'a*'", blocks=["a*"]),
    UNKNOWN("blocks names '9'", EIGHT, blocks="!9"),
    UNKNOWN(f"blocks=['!*'] {LEAVES}", "find_residual_blocks", blocks=["!*"]),
    UNKNOWN("leaves nothing", blocks=["0", "!0"]),
    UNKNOWN(f"blocks=[] {LEAVES}", blocks=[]),
    UNKNOWN(
        "the class Conv2d",
        "matches none of 8",
        "the blocks are of class Residual",
        blocks=nn.Conv2d,
    ),
    UNKNOWN(
        "predicate",
        "matches none of 8",
        "called with each found block",
        blocks=lambda block: False,
    ),
    refused("blocks= holds 3", "names, globs, classes", blocks=[3]),
    refused("blocks= holds 3", "names, globs, classes", blocks=3),
]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


class Concatenating(nn.Module):
    """A layer as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.linear(x)], -1)


NO_EXAMPLE: Any = partial(called, kind=sd.ExampleInputsError)
FAILS: Any = partial(refused, kind=sd.ExampleInputsError)
NO_SKIPS = ("has no residual block", "concatenation, as in DenseNet, is none")
MODELS = [
    *(
        refused(kind, *NO_SKIPS, "y = x + branch(x)", kind=sd.NoResidualBlocksError, model=model)
        for kind, model in [
            ("LSTM", lambda: nn.LSTM(WIDTH, WIDTH, num_layers=2)),
            ("Sequential", mlp),
            ("Concatenating", Concatenating),
            ("Linear", lambda: nn.Linear(WIDTH, WIDTH)),
        ]
    ),
    NO_EXAMPLE(
        "Sequential without example_inputs",
        "pass example_inputs=batch",
        "a batch of two is enough",
        by=lambda model: sd.apply_stochastic_depth(model, 0.1),
    ),
    NO_EXAMPLE("Sequential without example_inputs", by=sd.find_residual_blocks),
    FAILS(
        "example_inputs is a str",
        "a tensor, a tuple of positional or a dict of keyword",
        example_inputs="cat",
    ),
    FAILS(
        "the forward of Sequential failed on its example inputs",
        "RuntimeError",
        "as for training",
        example_inputs=vectors(2, 3),
    ),
    FAILS("failed on its example inputs: TypeError", "mask", example_kwargs={"mask": None}),
]


@oldest
@pytest.mark.parametrize(
    "refusal", [*RATES, *OPTIONS, *SELECTIONS, *MODELS], ids=lambda refusal: refusal.says[0]
)
def test_refused_with_its_reason(refusal: Refusal) -> None:
    check(refusal)


def check(refusal: Refusal) -> sd.StochasticDepthError:
    model = refusal.model()
    classes = [type(module) for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    mode = model.training
    with pytest.raises(sd.StochasticDepthError) as caught:
        refusal.call(model)
    error = caught.value
    assert type(error) is refusal.kind
    for part in refusal.says:
        assert part in str(error)
    # Where it was gated first (fixed, compile), it is the gated model that stays as it was.
    if not any("_stochastic_depth" in vars(module) for module in model.modules()):
        assert [type(module) for module in model.modules()] == classes
    assert model.training == mode
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    return error


@oldest
def test_the_cause_of_a_failing_example_is_kept() -> None:
    with pytest.raises(sd.ExampleInputsError) as caught:
        gate(stack(), example_inputs=torch.randn(2, 3))
    assert isinstance(caught.value.__cause__, RuntimeError)


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


def bart(**layerdrop: float) -> Model:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        sizes = {
            "vocab_size": 99,
            "d_model": 16,
            "max_position_embeddings": 32,
            **dict.fromkeys(["encoder_layers", "decoder_layers"], 3),
            **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2),
            **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 16),
        }
        return transformers.BartModel(transformers.BartConfig(**sizes, **layerdrop))

    return build


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
    ("bart", bart(encoder_layerdrop=0.1), TOKENS, "encoder.layerdrop is 0.1", "apply_layer_drop"),
    ("bart", bart(decoder_layerdrop=0.2), TOKENS, "decoder.layerdrop is 0.2", "apply_layer_drop"),
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
    transformers = pytest.importorskip("transformers")
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    )


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
@pytest.mark.parametrize("blocks", [None, "*", ["!0"], [nn.Linear], [], lambda block: True])
def test_without_residual_blocks_any_selection_says_that_there_are_none(blocks: Any) -> None:
    with pytest.raises(sd.NoResidualBlocksError, match="no addition in its forward"):
        gate(mlp(), blocks=blocks)


@oldest
@pytest.mark.parametrize("model", ["resnet", None, nn.Linear])
def test_what_is_no_module_is_refused_by_every_function(model: Any) -> None:
    for call in (
        lambda: sd.find_residual_blocks(model),
        lambda: sd.apply_stochastic_depth(model, 0.1),
        lambda: sd.apply_drop_path(model, "model"),
        lambda: sd.apply_layer_drop(model, 0.1),
        lambda: sd.apply_progressive_layer_dropping(model),
        lambda: sd.get_stochastic_depth(model),
    ):
        with pytest.raises(sd.OptionError, match=f"model is a {type(model).__name__}"):
            call()


@oldest
def test_a_branch_whose_values_are_used_elsewhere_is_refused() -> None:
    says = ('block "first"', "computes with a value made inside of it")
    leaking = partial(settled, Leaking)
    error = check(refused(*says, kind=sd.RefusedBlockError, model=leaking))
    assert len(gate(settled(Leaking), blocks=pasted(error)).blocks) == 6


# Applying twice.


@oldest
@pytest.mark.parametrize("blocks", [None, ["1", "2"], ["1"], [Residual]])
def test_applying_twice_to_a_block_is_refused(blocks: Any) -> None:
    model = stack()
    depth = gate(model, blocks=["0", "1"])
    before = model.eval()(X)
    with pytest.raises(sd.OptionError) as caught:
        gate(model, blocks=blocks)
    name = "0" if blocks in (None, [Residual]) else "1"
    for part in (f'block "{name}" has stochastic depth already', ".remove() first", "blocks="):
        assert part in str(caught.value)
    assert torch.equal(model(X), before)
    assert sd.get_stochastic_depth(model) is depth
    depth.remove()
    assert gate(model, blocks=blocks).blocks


@oldest
def test_applying_twice_to_a_copy_or_to_a_whole_with_a_gated_part_is_refused() -> None:
    model = stack()
    gate(model)
    for again in (copy.deepcopy(model), nn.Sequential(nn.Linear(WIDTH, WIDTH), model)):
        with pytest.raises(sd.OptionError, match="has stochastic depth already"):
            gate(again)


# Warnings.


@oldest
@pytest.mark.parametrize(
    ("blocks", "rate", "warns"),
    [(5, 0.21, True), (1, 0.9, True), (5, 0.2, False), (6, 0.9, False), (8, 0.5, False)],
)
def test_few_blocks_with_a_high_rate_warn(blocks: int, rate: float, warns: bool) -> None:
    model = settled(lambda: residuals(blocks))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gate(model, rate)
    assert len(caught) == warns
    for warning in caught:
        assert warning.category is sd.StochasticDepthWarning
        number = "1 block" if blocks == 1 else f"{blocks} blocks"
        assert f"{number} with a drop rate of {rate}" in str(warning.message)
        assert warning.filename == __file__  # the user's own line
        assert "at most 0.2" in str(warning.message)


@oldest
def test_dropout_inside_of_the_gated_blocks_is_named_once() -> None:
    stages = [nn.Sequential(Residual(), nn.Dropout(0.5)) for _ in range(6)]
    model = nn.Sequential(*stages)
    gate(model)  # behind the blocks: no word
    for stage in stages:
        stage[0].norm = nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(0.1))
    with pytest.warns(sd.StochasticDepthWarning, match="several regularisers") as caught:
        gate(sd.get_stochastic_depth(model).remove())
    assert len(caught) == 1
    assert "0.0.norm.1 p=0.1, 1.0.norm.1 p=0.1 and 4 more" in str(caught[0].message)


@oldest
def test_few_blocks_are_those_that_are_gated_and_their_highest_rate_counts() -> None:
    with pytest.warns(sd.StochasticDepthWarning, match="2 blocks with a drop rate of 0.4"):
        gate(stack(), [0.0, 0.4], blocks=["0", "1"])


# What blocks= can choose.


def chosen(blocks: Any, model: Model = stack, **options: Any) -> list[str]:
    return [block.name for block in gate(model(), blocks=blocks, **options).blocks]


ALL = [str(block) for block in range(8)]


@oldest
@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        (None, ALL),
        ("3", ["3"]),
        (["5", "2"], ["2", "5"]),  # always in forward order
        ("[2-4]", ["2", "3", "4"]),
        (["[01]", "7"], ["0", "1", "7"]),
        ("!0", ALL[1:]),
        (["!0", "![67]"], ALL[1:6]),
        (["[0-4]", "!2"], ["0", "1", "3", "4"]),
        (["!2", "[0-4]"], ["0", "1", "3", "4"]),
        (Residual, ALL),
        ([Residual, "!7"], ALL[:7]),
        (nn.Module, ALL),
        (lambda block: int(block.name) % 2 == 0, ["0", "2", "4", "6"]),
        ([lambda block: block.name == "1", "3", Residual], ALL),
        (("1", "1"), ["1"]),
    ],
)
def test_blocks_by_name_glob_class_or_predicate(blocks: Any, names: list[str]) -> None:
    assert chosen(blocks) == names


@oldest
def test_blocks_that_were_found_can_be_passed_on() -> None:
    model = stack()
    found = sd.find_residual_blocks(model, X)
    assert [block.name for block in gate(model, blocks=found[2:4]).blocks] == ["2", "3"]
    assert chosen(found[5]) == ["5"]
    assert chosen([block for block in found if len(block.branches) == 1]) == ALL
    assert chosen([found[0], "!1", "7"]) == ["0", "7"]


@oldest
def test_a_distribution_runs_over_the_blocks_that_are_gated() -> None:
    depth = gate(stack(), 0.2, blocks=["1", "3", "5", "7"])
    assert [block.drop_rate for block in depth.blocks] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    depth.model.train()(X)
    assert list(depth.last_gates) == ["1", "3", "5", "7"]


@oldest
def test_nested_blocks_are_chosen_one_by_one() -> None:
    options: dict[str, Any] = {"model": lambda: settled(nested), "example_inputs": sequences()}
    assert chosen("*.inner.*", **options) == [f"{o}.inner.{i}" for o in (1, 2, 3) for i in (0, 1)]
    assert chosen(["!*.inner.*"], **options) == ["1", "2", "3"]
    assert chosen(["2", "2.inner.1"], **options) == ["2.inner.1", "2"]


class Position(nn.Module):
    """`x + dwconv(x)`, an affine branch, as transformers for images encode positions."""

    def __init__(self) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dwconv(x)


def with_positions() -> nn.Module:
    return nn.Sequential(Position(), BasicBlock(8, 8), Position(), BasicBlock(8, 8))


@oldest
def test_affine_branches_are_gated_only_where_a_name_says_so() -> None:
    example = torch.randn(2, 8, 6, 6)
    options: dict[str, Any] = {"model": with_positions, "example_inputs": example}
    assert [block.name for block in sd.find_residual_blocks(with_positions(), example)] == [
        "1",
        "3",
    ]
    assert chosen(None, **options) == ["1", "3"]
    assert chosen("*", **options) == ["1", "3"]
    assert chosen(["*", "0"], **options) == ["0", "1", "3"]

    def positions() -> nn.Module:
        return nn.Sequential(Position(), Position())

    with pytest.raises(sd.NoResidualBlocksError) as caught:
        gate(positions(), example_inputs=example)
    assert chosen(pasted(caught.value), positions, example_inputs=example) == ["0", "1"]
