"""Promise: `depth.compile()` trains as eager does, and no draw needs another graph.

With the backend "aot_eager", which traces and partitions like inductor, and then runs the very
operations that eager runs: so outputs and gradients are equal bit by bit. Graphs are built where
they are needed first, in a short warm-up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import stochastic_depth as sd
from networks import WIDTH, Residual, batch, make, settled, vectors
from stochastic_depth.torch_private.backward import HOOKS_CAN_BE_READ

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore:depth.compile.. leaves 3 of 9 blocks"),
    pytest.mark.filterwarnings("ignore:1 block with a drop rate"),
    # torch's own, while it traces a graph in the middle of a network
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
WARMUP = 20  # draws in which every gate is open once, and closed


@pytest.fixture(autouse=True)
def without_torchs_own_fast_path() -> Iterator[None]:
    """In eager attention in inference is one operation, BatchNorm cuDNN's: so in no graph."""
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.backends.cudnn.flags(enabled=False, deterministic=True):
        yield
    torch.backends.mha.set_fastpath_enabled(True)


def graphs() -> int:
    """How many graphs torch has made since the last `gated`."""
    return int(counters["stats"]["unique_graphs"])


def gated(
    model: nn.Module, example: Any, rate: Any = 0.5, **options: Any
) -> tuple[Any, sd.StochasticDepth]:
    """The handle of the model, and a copy of it that stays eager and has the same draws."""
    torch.compiler.reset()
    counters.clear()
    depth = sd.apply_stochastic_depth(model, rate, example_inputs=example, **options)
    return copy.deepcopy(model), depth


def compiled(
    model: nn.Module, example: Any, rate: Any = 0.5, **options: Any
) -> tuple[Any, sd.StochasticDepth]:
    """The same, and the model is compiled."""
    eager, depth = gated(model, example, rate, **options)
    depth.compile("aot_eager")
    return eager, depth


def assert_same_step(model: nn.Module, eager: nn.Module, x: Tensor, rounding: float = 0.0) -> None:
    """Forward and backward of both, and their buffers, to a part of the largest value."""
    outputs = []
    for each in (model, eager):
        each.zero_grad()
        outputs.append(each(x))
        outputs[-1].square().mean().backward()
    assert_close(outputs[0], outputs[1], rounding)
    assert_same_gradients(model, eager, rounding)
    for mine, its in zip(model.buffers(), eager.buffers(), strict=True):
        assert_close(mine, its, rounding)


def assert_same_gradients(model: nn.Module, eager: nn.Module, rounding: float = 0.0) -> None:
    pairs = zip(model.named_parameters(), eager.parameters(), strict=True)
    for (name, own), other in pairs:
        assert (own.grad is None) == (other.grad is None), name
        if own.grad is not None and other.grad is not None:
            assert_close(own.grad, other.grad, rounding)


def assert_close(own: Tensor, other: Tensor, rounding: float) -> None:
    if not rounding:
        assert torch.equal(own, other)
    elif own.numel():
        own, other = own.detach(), other.detach()
        assert (own - other).abs().max() <= rounding * max(1.0, float(other.abs().max()))


def assert_trains_alike(
    model: nn.Module, eager: nn.Module, depth: sd.StochasticDepth, x: Tensor, rounding: float = 0.0
) -> None:
    """Step by step, with an inference now and then; no graph after the warm-up."""
    built = 0
    for step in range(WARMUP + 20):
        assert_same_step(model.train(), eager.train(), batch(x, step), rounding)
        depth.step()
        if step % 10 == 0:
            with torch.no_grad():
                assert_close(model.eval()(x), eager.eval()(x), rounding)
        if step == WARMUP:
            built = graphs()
    assert graphs() == built


# One graph for each kind of block; the ResNet has three, and no mode needs more.
BATCH = [
    ("resnet", 3, {}),
    ("resnet", 3, {"scale": "train"}),
    ("pre-norm", 1, {}),
    ("pre-norm", 1, {"unit": "branch", "scale": "train"}),
    ("post-norm", 1, {"unit": "branch", "scale": "none"}),
    ("shared", 1, {"schedule": sd.linear_decay(30), "scale": "train"}),
]


@pytest.mark.parametrize(("name", "kinds", "options"), BATCH)
def test_batch_mode_is_eager_to_the_bit(name: str, kinds: int, options: dict[str, Any]) -> None:
    model, x = make(name)
    eager, depth = compiled(model, x, **options)
    for step in range(WARMUP):
        assert_same_step(model.train(), eager.train(), batch(x, step))
    assert graphs() == kinds
    assert_trains_alike(model, eager, depth, x)
    assert graphs() == 2 * kinds


@pytest.mark.parametrize(("name", "kinds", "options"), BATCH)
def test_what_trained_eagerly_before_needs_no_more_graphs(
    name: str, kinds: int, options: dict[str, Any]
) -> None:
    """The ends of some blocks sleep then, and those of blocks that never ran do not."""
    model, x = make(name)
    eager, depth = gated(model, x, drop_distribution="uniform", **options)
    assert_same_step(model.train(), eager.train(), x)
    if name == "resnet" and options.get("scale") != "train":
        ends = [hasattr(type(block.bn2), "gated_from") for block in model.stages[0]]
        assert len(set(ends)) == (2 if HOOKS_CAN_BE_READ else 1)  # in torch 2.6 none sleeps
    depth.compile("aot_eager")
    for step in range(WARMUP):
        assert_same_step(model, eager, batch(x, step))
    assert graphs() == kinds
    assert_trains_alike(model, eager, depth, x)


# The factor goes into the last module's weights in eager, onto its output in a graph; and a value
# with three gradients has them added in another order. That is rounding, of single precision.
ROUNDED = [
    ("resnet", {"mode": "sample"}, 8),
    ("pre-norm", {"mode": "sample", "scale": "train"}, 8),
    ("pre-norm", {"mode": "sample"}, 5),
    ("pre-norm", {"mode": "sample", "unit": "branch"}, 4),
    ("shared", {"mode": "sample", "schedule": sd.linear_warmup(30)}, 8),
    ("nested", {"schedule": sd.linear_warmup(30), "scale": "train"}, 4),
]


@pytest.mark.parametrize(("name", "options", "rows"), ROUNDED)
def test_windows_of_rows_and_nested_blocks_are_eager_to_rounding(
    name: str, options: Any, rows: int
) -> None:
    model, x = make(name)
    x = x.repeat(2, *[1] * (x.ndim - 1))[:rows]
    eager, depth = compiled(model, x, **options)
    assert_trains_alike(model, eager, depth, x, rounding=1e-5)
    assert graphs()


class EndInside(nn.Module):
    """What ends its branch is also a part of the module before; there it is not multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Identity()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 4), self.drop, nn.Linear(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.inner(x.tanh()))


def test_a_factor_that_depends_on_the_call_has_no_graph() -> None:
    layers = [nn.Linear(3, WIDTH), *(EndInside() for _ in range(3))]
    x = vectors(4, 3)
    _, depth = gated(nn.Sequential(*layers), x, 0.2)
    with pytest.raises(sd.OptionError, match=r"3 of 3 blocks.*differs from call to call"):
        depth.compile()
    model = settled(lambda: nn.Sequential(*layers, *(Residual() for _ in range(3))))
    depth.remove()
    eager, depth = gated(model, x)
    with pytest.warns(sd.StochasticDepthWarning, match="leaves 3 of 6 blocks .*as they are"):
        depth.compile("aot_eager")
    assert_trains_alike(model, eager, depth, x)


def test_a_block_that_the_user_compiled_stays_as_it_is() -> None:
    model = settled(lambda: nn.Sequential(*(Residual() for _ in range(6))))
    model[2].compile(backend="aot_eager")
    x = vectors(4, WIDTH)
    eager, depth = gated(model, x)
    with pytest.warns(sd.StochasticDepthWarning, match=r'1 of 6 blocks \("2": it was compiled on'):
        depth.compile("aot_eager")
    assert_trains_alike(model, eager, depth, x)


def test_no_block_that_can_be_compiled_is_an_error() -> None:
    model, x = make("explicit")
    _, depth = gated(model, x, scale="none")
    with pytest.raises(sd.OptionError, match=r"cannot compile 12 of 12 blocks.*Residual adds"):
        depth.compile()


class Breaking(Residual):
    """Whose forward is not one graph: torch looks for more of them in it."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e6:
            return x
        return x + self.linear(self.norm(x).tanh())


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 fails at such graphs")
def test_what_is_not_one_graph_has_its_factors() -> None:
    model = settled(lambda: nn.Sequential(nn.Linear(3, WIDTH), *(Breaking() for _ in range(6))))
    eager, depth = compiled(model, vectors(4, 3), scale="train")
    for step in range(WARMUP):
        assert_same_step(model.train(), eager.train(), vectors(4, 3, seed=step))
        depth.step()


def test_other_shapes_are_torchs_business() -> None:
    model, x = make("pre-norm")
    eager, _ = compiled(model, x)
    for step in range(12):
        assert_same_step(model.train(), eager.train(), vectors(4, 4 + step % 6, 3, seed=step))
    assert graphs() <= 3  # one of its own, then one for all shapes
