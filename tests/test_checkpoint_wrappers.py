"""Promise: a checkpoint by torch's wrapper or by transformers' switch recomputes what was drawn.

Every gradient is that of the same model without checkpoints, bit by bit, whichever came first, the
checkpoints or the gates.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import stochastic_depth as sd
from libraries import LIBRARIES
from networks import BasicBlock, PreNormLayer, make
from networks import batch as batch_of

oldest = pytest.mark.oldest
pytestmark = pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl")  # torch 2.6's
ORDERS = ("checkpoints first", "gates first")
MODES: dict[str, dict[str, Any]] = {
    "batch": {"draw": sd.Draw(seed=3)},
    "by branch": {"draw": sd.Draw(seed=3), "unit": "branch"},
    "one a step": {"draw": sd.Draw(seed=3, redraw="step")},
    "rows": {"draw": sd.Draw(seed=3), "mode": "sample"},
    "random rows": {"draw": sd.Draw(seed=3), "mode": "sample", "unit": "branch"},
}
Loss = Callable[[int], Tensor]


def wrap_blocks(model: nn.Module, reentrant: bool | None) -> None:
    """With None the wrapper wraps and does nothing: blocks are named after it, and draw by name."""
    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    idle = partial(checkpoint_wrapper, checkpoint_fn=lambda run, *args: run(*args))
    wrap = partial(checkpoint_wrapper, checkpoint_impl=impl)
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=idle if reentrant is None else wrap,
        check_fn=lambda module: isinstance(module, BasicBlock | PreNormLayer),
    )


def gradients(
    model: nn.Module, depth: sd.StochasticDepth, loss: Loss, *, forwards: int, steps: int = 3
) -> list[Tensor | None]:
    """All gradients of some steps, each with some forwards before their backwards."""
    found: list[Tensor | None] = []
    model.train()
    dropped = 0
    for step in range(steps):
        model.zero_grad()
        torch.manual_seed(step)  # dropout
        losses = []
        for number in range(forwards):
            losses.append(loss(10 * step + number))
            gates = depth.last_gates.values()  # of mode "sample" the rows that are kept, of four
            dropped += any(gate is False or (gate is not True and len(gate) < 4) for gate in gates)
        for each in losses:
            each.backward()
        found += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        depth.step()
    assert dropped, "nothing was dropped: the case shows nothing"
    return found


def assert_same(mine: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


@oldest
@pytest.mark.parametrize(
    ("mode", "order"),
    [(m, o) for m in MODES for o in ORDERS if o == "gates first" or m in ("batch", "rows")],
)
@pytest.mark.parametrize("name", ["resnet", "pre-norm", "post-norm", "explicit"])
def test_the_wrapper_of_torch(name: str, mode: str, order: str) -> None:
    """BatchNorm (whose running statistics a recomputation updates again, as ever) and attention."""

    def run(reentrant: bool | None, forwards: int) -> list[Tensor | None]:
        model, x = make(name)
        if order == "checkpoints first":
            wrap_blocks(model, reentrant)
        depth = sd.apply_stochastic_depth(model, 0.6, "uniform", example_inputs=x, **MODES[mode])
        if order == "gates first":
            wrap_blocks(model, reentrant)
        return gradients(model, depth, lambda n: model(batch_of(x, n)).sum(), forwards=forwards)

    for forwards in (1, 2):
        assert_same(run(False, forwards), run(None, forwards))
        assert_same(run(True, forwards), run(None, forwards))


@oldest
@pytest.mark.parametrize("name", ["resnet", "pre-norm", "explicit"])
def test_the_handle_of_a_wrapped_model(name: str) -> None:
    """It goes on, is found again in a copy, and folds."""
    model, x = make(name)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    wrap_blocks(model, reentrant=False)
    depth.follow(torch.optim.SGD(model.parameters(), lr=0.1))
    with depth.disabled():
        expected = model.eval()(x)
    assert str(depth).startswith("Stochastic depth on")
    twin = copy.deepcopy(model)
    own = sd.get_stochastic_depth(twin)
    assert [block.name for block in own.blocks] == [block.name for block in depth.blocks]
    assert torch.equal(twin(x), expected)
    # A factor in the weights rounds otherwise than one on the output.
    torch.testing.assert_close(own.fold()(x), expected)
    torch.testing.assert_close(depth.fold()(x), expected)


FAMILIES = [f"transformers:{family}" for family in ("Bert", "GPT2", "Llama", "ViT")]
SWITCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "non-reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


BOTH = ("batch", "random rows")


@pytest.mark.filterwarnings("ignore:dropout is active", "ignore:3 blocks with a drop rate")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # 5.24's
@pytest.mark.parametrize(
    ("family", "order"),
    [*((f, "gates first") for f in FAMILIES), ("transformers:Bert", "checkpoints first")],
)
@pytest.mark.parametrize(
    ("switch", "mode"), [("default", "batch"), *itertools.product(list(SWITCHES)[1:], BOTH)]
)
def test_the_switch_of_transformers(family: str, switch: str, mode: str, order: str) -> None:
    (specimen,) = (each for each in LIBRARIES if each.name == family)

    def given(number: int) -> dict[str, Tensor]:
        torch.manual_seed(number)
        example = {name: torch.cat([x, x.flip(-1)]) for name, x in specimen.example().items()}
        if "input_ids" in example:
            example["attention_mask"] = torch.ones_like(example["input_ids"])
            example["attention_mask"][1, 5:] = 0
        return example

    def run(checkpoints: bool, forwards: int) -> list[Tensor | None]:
        model = specimen.model(dropout=0.1)
        model.config.use_cache = False  # as checkpointing does
        if checkpoints and order == "checkpoints first":
            model.gradient_checkpointing_enable(**SWITCHES[switch])
        depth = sd.apply_stochastic_depth(model, [0.6] * 3, example_inputs=given(0), **MODES[mode])
        if checkpoints and order == "gates first":
            model.gradient_checkpointing_enable(**SWITCHES[switch])

        def loss(number: int) -> Tensor:
            output = model(**given(number))
            return output[0].square().mean()

        return gradients(model, depth, loss, forwards=forwards, steps=2)

    for forwards in (1, 2):
        assert_same(run(True, forwards), run(False, forwards))
