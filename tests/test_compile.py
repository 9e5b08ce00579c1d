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
from networks import WIDTH, BasicBlock, batch, make, residuals, settled, vectors
from test_rows_in_groups import InLineAttention

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore:depth.compile.. leaves 3 of 9 blocks"),
    pytest.mark.filterwarnings("ignore:1 block with a drop rate"),
    # torch's own, while it traces a graph in the middle of a network
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def without_torchs_own_fast_path() -> Iterator[None]:
    """Attention in inference is one fused operation in eager, which no graph has."""
    torch.backends.mha.set_fastpath_enabled(False)
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
    ("pre-norm", {"mode": "sample", "draw": sd.Draw(rows="random")}, 5),
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


class InGroups(nn.Module):
    """Its blocks run once for each kind of row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(InLineAttention() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        mask = x.new_zeros(x.shape[:2])
        for layer in self.layers:
            x, length, mean = layer(x, mask)
            x = x + mean[:, None] / length
        return x


# In mode "sample" there is one graph for all rows, one for a single row where that is allowed (in
# BatchNorm it is not), and one for any number between.
SCHEDULED = [
    ("resnet", {"schedule": sd.linear_warmup(90)}, 6),
    ("pre-norm", {"schedule": sd.linear_decay(90)}, 3),
    ("pre-norm", {"schedule": sd.linear_decay(90), "draw": sd.Draw(rows="random")}, 3),
    ("shared", {"schedule": {"*": sd.linear_warmup(90)}, "scale": "train"}, 3),
    ("in groups", {"schedule": sd.linear_warmup(90)}, 3),
    ("in groups", {"schedule": sd.linear_warmup(90), "unit": "branch"}, 3),
]


@pytest.mark.parametrize(("name", "options", "expected"), SCHEDULED)
def test_whatever_number_of_rows_a_schedule_comes_to(
    name: str, options: dict[str, Any], expected: int
) -> None:
    model, x = make(name) if name != "in groups" else (settled(InGroups), vectors(4, 5, 3))
    x = torch.cat([batch(x, step) for step in range(4)])[:16].double()
    # In double precision: the factor goes elsewhere in a graph, and few rows in a BatchNorm make
    # much of rounding.
    eager, depth = compiled(model.double(), x, 0.95, mode="sample", **options)
    assert_same_step(model.train(), eager.train(), x, rounding=1e-9)
    assert graphs() == expected
    numbers = set()
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(100):
            depth.step()
            assert_same_step(model, eager, batch(x, step).double(), rounding=1e-9)
            numbers |= {len(rows) for rows in depth.last_gates.values()}
    assert len(numbers) > 8
    assert 1 in numbers or name == "resnet"


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


class Expanded(nn.Module):
    """Its layers are given five times the same memory, until one of them has run."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(3, WIDTH), residuals(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.embed(x).mean(1, keepdim=True).expand(-1, 5, -1))


class Channels(nn.Module):
    """A residual layer on the channels in the last dimension, in memory as well where it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.tanh()).contiguous() + x


class Alternating(nn.Module):
    """Convolutions, and layers on the channels: who ran last decides on the memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3)
        self.convolutions = nn.ModuleList(BasicBlock(WIDTH, WIDTH) for _ in range(4))
        self.layers = nn.ModuleList(Channels() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for convolution, layer in zip(self.convolutions, self.layers, strict=True):
            x = convolution(x)
            x = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x


@pytest.mark.parametrize("options", [{}, {"mode": "sample"}], ids=["batch", "sample"])
@pytest.mark.parametrize("network", [Expanded, Alternating])
def test_memory_formats_that_depend_on_the_draw(
    network: type[nn.Module], options: dict[str, Any]
) -> None:
    x = (vectors(8, 5, 3) if network is Expanded else vectors(8, 3, 6, 6)).double()
    model = settled(network).double()
    eager, _ = compiled(model, x, 0.5, **options)
    assert_same_step(model.train(), eager.train(), x, rounding=1e-9)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(60):
            assert_same_step(model, eager, batch(x, step).double(), rounding=1e-9)


class SequenceFirst(nn.Module):
    """Its blocks hold the batch in the second dimension: a window has the strides of all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(3, WIDTH), residuals(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.embed(x).transpose(0, 1).contiguous())


def test_windows_that_wrap_around_need_no_other_graph() -> None:
    model, x = settled(SequenceFirst), vectors(7, 5, 3)
    eager, depth = compiled(model, x, [0.5] * 6, mode="sample")

    def wraps() -> bool:
        eager.train()(x)
        gates = sd.get_stochastic_depth(eager).last_gates.values()
        return any(rows[-1] - rows[0] >= len(rows) for rows in gates)

    while wraps():
        depth.step()
    model.train()(x).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(40):
            model(x).sum().backward()
    assert {len(rows) for rows in depth.last_gates.values()} <= {3, 4}


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
