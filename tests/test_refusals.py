"""Promise: what cannot work is refused with an error that says what arrived, what was expected, and
what to do; and then the model is as it was.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import (
    WIDTH,
    make,
    sequences,
    vectors,
)
from refusing import EIGHT, Refusal, called, check, gate, refused, stack

oldest = pytest.mark.oldest


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
            ({"seed": "a"}, ("Draw(seed='a')", "an integer")),
            ({"seed": True}, ("Draw(seed=True)",)),
            ({"seed": 0.5}, ("Draw(seed=0.5)",)),
            ({"sampling": "balance"}, ("Draw(sampling=...) got 'balance'", 'mean "balanced"')),
            ({"redraw": "never"}, ("Draw(redraw=...) got 'never'", '"forward" or "step"')),
            (
                {"across_ranks": "all"},
                ("Draw(across_ranks=...) got 'all'", '"same" or "different"'),
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


@oldest
def test_the_cause_of_a_failing_example_is_kept() -> None:
    with pytest.raises(sd.ExampleInputsError) as caught:
        gate(stack(), example_inputs=torch.randn(2, 3))
    assert isinstance(caught.value.__cause__, RuntimeError)


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
