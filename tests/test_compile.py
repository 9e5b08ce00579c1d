"""Promise: `depth.compile()` trains as eager does, and no draw needs another graph.

With the backend "aot_eager", which traces and partitions like inductor, and then runs the very
operations that eager runs: so outputs and gradients are equal bit by bit.
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
from networks import WIDTH, batch, make, residuals, settled, vectors

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore:depth.compile.. leaves 3 of 9 blocks"),
    pytest.mark.filterwarnings("ignore:1 block with a drop rate"),
    # torch's own, while it traces a graph in the middle of a network
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def without_torchs_own_fast_path() -> Iterator[None]:
    """In eager attention in inference is one operation, BatchNorm cuDNN's: so in no graph."""
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.backends.cudnn.flags(enabled=False, deterministic=True):
        yield
    torch.backends.mha.set_fastpath_enabled(True)


def graphs() -> int:
    """How many graphs torch has made since the last `compiled`."""
    return int(counters["stats"]["unique_graphs"])


def compiled(
    model: nn.Module, example: Tensor, rate: Any = 0.5, **options: Any
) -> tuple[nn.Module, sd.StochasticDepth]:
    """An eager copy of the model with the same draws, and the handle of the compiled one."""
    torch.compiler.reset()
    counters.clear()
    depth = sd.apply_stochastic_depth(model, rate, example_inputs=example[:2], **options)
    eager = copy.deepcopy(model)
    depth.compile("aot_eager")
    return eager, depth


def assert_same_step(model: nn.Module, eager: nn.Module, x: Tensor, rounding: float = 0.0) -> None:
    """Forward and backward of both, and their buffers, to a part of the largest value."""
    outputs = []
    for each in (model, eager):
        each.zero_grad()
        outputs.append(each(x))
        outputs[-1].square().mean().backward()
    close(outputs[0], outputs[1], rounding)
    pairs = zip(model.named_parameters(), eager.parameters(), strict=True)
    for (name, own), other in pairs:
        assert (own.grad is None) == (other.grad is None), name
        if own.grad is not None and other.grad is not None:
            close(own.grad, other.grad, rounding)
    for mine, its in zip(model.buffers(), eager.buffers(), strict=True):
        close(mine, its, rounding)


def close(own: Tensor, other: Tensor, rounding: float) -> None:
    if not rounding:
        assert torch.equal(own, other)
    elif own.numel():
        own, other = own.detach(), other.detach()
        assert (own - other).abs().max() <= rounding * max(1.0, float(other.abs().max()))


# One graph for each kind of block; the ResNet has three, and no mode needs more.
BATCH = [
    ("resnet", 3, {}),
    ("resnet", 3, {"scale": "train"}),
    ("pre-norm", 1, {}),
    ("pre-norm", 1, {"unit": "branch", "scale": "train"}),
    ("post-norm", 1, {"unit": "branch", "scale": "none"}),
    ("shared", 1, {"schedule": sd.linear_decay(50), "scale": "train"}),
]


@pytest.mark.parametrize(("name", "kinds", "options"), BATCH)
def test_batch_mode_is_eager_to_the_bit(name: str, kinds: int, options: dict[str, Any]) -> None:
    model, x = make(name)
    eager, depth = compiled(model, x, **options)
    assert_same_step(model.train(), eager.train(), x)
    assert graphs() == kinds
    with torch.no_grad():
        assert torch.equal(model.eval()(x), eager.eval()(x))
    assert graphs() == 2 * kinds
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(100):
            depth.step()
            assert torch.equal(model.train()(batch(x, step)), eager.train()(batch(x, step)))
            if step % 20 == 0:
                assert_same_step(model, eager, batch(x, step))
                with torch.no_grad():
                    assert torch.equal(model.eval()(x), eager.eval()(x))


# The factor goes into the last module's weights in eager, onto its output in a graph; and a value
# with three gradients has them added in another order. That is rounding, of single precision.
ROUNDED = [
    ("resnet", {"mode": "sample"}, 8),
    ("pre-norm", {"mode": "sample"}, 8),
    ("pre-norm", {"mode": "sample", "draw": sd.Draw()}, 5),
    ("pre-norm", {"mode": "sample", "unit": "branch"}, 4),
    ("shared", {"mode": "sample", "schedule": sd.linear_warmup(50)}, 8),
    ("nested", {"mode": "batch"}, 4),
]


@pytest.mark.parametrize(("name", "options", "rows"), ROUNDED)
def test_other_draws_are_eager_to_rounding(name: str, options: Any, rows: int) -> None:
    model, x = make(name)
    x = x.repeat(2, *[1] * (x.ndim - 1))[:rows]
    eager, depth = compiled(model, x, **options)
    assert_same_step(model.train(), eager.train(), x, rounding=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(100):
            depth.step()
            outputs = [each.train()(batch(x, step)) for each in (model, eager)]
            close(outputs[0], outputs[1], rounding=1e-5)
            if step % 20 == 0:
                assert_same_step(model, eager, batch(x, step), rounding=1e-5)


class OneEnd(nn.Module):
    """One module ends both branches, and stands in the middle of the second as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.first(x.tanh()))
        return x + self.drop_path(self.second(self.drop_path(x.sin())))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "train"},
        {"scale": "eval", "unit": "branch", "schedule": {"*:1": sd.constant(0.5)}},
    ],
)
def test_a_module_that_ends_one_branch_after_the_other(options: dict[str, Any]) -> None:
    model, x = (
        settled(
            lambda: nn.Sequential(nn.Linear(3, WIDTH), nn.Sequential(*(OneEnd() for _ in range(6))))
        ),
        vectors(4, 3),
    )
    rates = {f"1.{i}": i / 10 + 0.1 for i in range(6)}
    eager, _ = compiled(model, x, rates, **options)
    assert_same_step(model.train(), eager.train(), x)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), eager.eval()(x))
    assert graphs() == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(20):
            assert_same_step(model.train(), eager.train(), batch(x, step))
            with torch.no_grad():
                assert torch.equal(model.eval()(x), eager.eval()(x))


class WithOneEnd(nn.Module):
    """All its layers share the module that ends their branches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(3, WIDTH), nn.Sequential(*(OneEnd() for _ in range(6)))
        for layer in self.layers:
            layer.drop_path = self.layers[0].drop_path

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.embed(x))


def test_a_module_that_ends_the_branches_of_all_blocks() -> None:
    model, x = settled(WithOneEnd), vectors(4, 3)
    eager, _ = compiled(model, x, scale="train")
    assert_same_step(model.train(), eager.train(), x)
    assert graphs() == 1
    for step in range(10):
        assert_same_step(model, eager, batch(x, step))


class EndInside(nn.Module):
    """What ends its branch is also a part of the module before; there it is not multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Identity()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 4), self.drop, nn.Linear(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.inner(x.tanh()))


def test_a_module_that_ends_a_branch_and_is_inside_of_another() -> None:
    model = settled(lambda: nn.Sequential(nn.Linear(3, WIDTH), *(EndInside() for _ in range(6))))
    x = vectors(4, 3)
    torch.compiler.reset()
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    eager = copy.deepcopy(model)
    with pytest.raises(sd.OptionError, match="differs from call to call"):
        depth.compile("aot_eager")
    whole: Any = torch.compile(model.eval(), backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(whole(x), eager.eval()(x))


def test_the_first_forward_builds_what_it_drops_and_leaves_no_trace() -> None:
    model, x = make("resnet")
    eager, depth = compiled(model, x)
    closed = {block.name: False for block in depth.blocks}
    state = torch.get_rng_state()
    with depth.fixed(closed), sd.get_stochastic_depth(eager).fixed(closed):
        assert_same_step(model.train(), eager.train(), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert graphs() == 3
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(10):
            assert_same_step(model, eager, batch(x, step))


def test_a_network_without_a_stem_needs_no_graph_for_inputs_without_gradients() -> None:
    model, x = settled(lambda: residuals(6)), vectors(4, WIDTH)
    eager, _ = compiled(model, x, [0.5] * 6)
    assert_same_step(model.train(), eager.train(), x)
    assert graphs() == 2  # the first block's input needs no gradient
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(40):
            out = model(batch(x, step))
            assert torch.equal(out, eager(batch(x, step)))
            out.sum().backward()
