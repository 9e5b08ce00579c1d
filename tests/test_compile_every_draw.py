"""Promise: after `depth.compile()`'s first forward no draw needs another graph.

Nor does a step of a schedule, whatever number of rows it comes to; nor a memory format, though a
dropped block hands its input on in its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import stochastic_depth as sd
from networks import WIDTH, BasicBlock, batch, make, residuals, settled, vectors
from test_compile import assert_same_step, compiled, graphs, without_torchs_own_fast_path
from test_rows_in_groups import InLineAttention

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore:1 block with a drop rate"),
    # torch's own, while it traces a graph in the middle of a network
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
__all__ = ["without_torchs_own_fast_path"]
RANDOM = {"mode": "sample", "draw": sd.Draw(rows="random")}


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


# In mode "sample" with a schedule there is one graph for all rows, one for a single row where that
# is allowed (in BatchNorm it is not), and one for any number between.
SCHEDULED = [
    ("resnet", {"schedule": sd.linear_warmup(90)}, 6),
    ("pre-norm", {"schedule": sd.linear_decay(90)}, 3),
    ("pre-norm", {"schedule": sd.linear_decay(90), "draw": sd.Draw(rows="random")}, 3),
    ("shared", {"schedule": {"*": sd.linear_warmup(90)}, "scale": "train"}, 3),
    ("in groups", {"schedule": sd.linear_warmup(90)}, 3),
    ("in groups", {"schedule": sd.linear_warmup(90), "unit": "branch"}, 3),
    ("in groups", {"unit": "branch"}, 3),
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
    assert len(numbers) > 8 or "schedule" not in options
    assert 1 in numbers or name == "resnet"


def with_limits(graph: Any, inputs: list[Any]) -> Any:
    """As inductor's choices do on a GPU, it looks at the number of rows, and holds where they hold.

    A length that is known is a number here, any other one a symbol.
    """
    for rows in inputs:
        if isinstance(rows, torch.SymInt):
            assert rows < 5 or rows >= 5
            assert rows < 11 or rows >= 11
            assert rows % 7 == 0 or rows % 7 != 0
    return aot_eager(graph, inputs)


# Of 16 rows a single one, all, and between (no more than 12): up to 4, 7, others to 10, 11 and 12.
@pytest.mark.parametrize(
    ("rates", "schedule"),
    [(0.95, sd.linear_warmup(90)), ([0.95, 0.8, 0.6, 0.4, 0.2, 0.1], None)],
    ids=["a schedule", "several rates"],
)
def test_graphs_that_torch_has_hold_for_some_numbers_of_rows(rates: Any, schedule: Any) -> None:
    model, x = make("pre-norm")
    x = torch.cat([batch(x, step) for step in range(4)])[:16]
    options = {"example_inputs": x[:2], "mode": "sample", "schedule": schedule}
    depth = sd.apply_stochastic_depth(model, rates, **options)
    torch.compiler.reset()
    counters.clear()
    depth.compile(with_limits)
    model.train()(x).sum().backward()
    assert graphs() == 6
    numbers = set()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(100):
            depth.step()
            model(x).sum().backward()
            numbers |= {len(rows) for rows in depth.last_gates.values()}
    assert numbers >= {1, 4, 7, 9, 12, 16}


def test_of_very_many_numbers_of_rows_some_are_tried() -> None:
    calls = 0

    def counted(graph: Any, inputs: list[Any]) -> Any:
        run = aot_eager(graph, inputs)

        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return run(*args)

        return call

    model, x = nn.Sequential(nn.Linear(3, WIDTH), residuals(6)), vectors(2000, 3)
    options: dict[str, Any] = {"mode": "sample", "schedule": sd.linear_warmup(90)}
    depth = sd.apply_stochastic_depth(model, 0.95, example_inputs=x, **options)
    torch.compiler.reset()
    depth.compile(counted)
    model.train()(x)
    assert 2 * 200 < calls < 2 * 256 + 50  # windows that wrap around, and others


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


class Two(nn.Module):
    """A residual layer on two values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.first(x.tanh()), y + self.second(y.tanh())


class ExpandedTwice(Expanded):
    """Both its values are in one piece, or both expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Two() for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).mean(1, keepdim=True).expand(-1, 5, -1)
        y = x.cos().mean(1, keepdim=True).expand(-1, 5, -1)
        for layer in self.layers:
            x, y = layer(x, y)
        return x + y


class ChannelsLast(nn.Module):
    """Convolutions in that memory format, from the first on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3)
        self.layers = nn.Sequential(*(Convolution() for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.stem(x).contiguous(memory_format=torch.channels_last))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x.tanh())


FORMATS: list[tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = [
    (Expanded, (8, 5, 3), {}),
    (Expanded, (8, 5, 3), {"mode": "sample"}),
    (ExpandedTwice, (8, 5, 3), {}),
    (Alternating, (8, 3, 6, 6), {}),
    (Alternating, (8, 3, 6, 6), {"mode": "sample"}),
    (Alternating, (8, 3, 6, 6), RANDOM),
    (ChannelsLast, (8, 3, 6, 6), {"mode": "sample"}),
    (ChannelsLast, (8, 3, 6, 6), RANDOM),
    (SequenceFirst, (8, 5, 3), RANDOM),
]


@pytest.mark.parametrize(("network", "shape", "options"), FORMATS)
def test_memory_formats_that_depend_on_the_draw(
    network: type[nn.Module], shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    x = vectors(*shape).double()
    model = settled(network).double()
    eager, _ = compiled(model, x, [0.7] * len(sd.find_residual_blocks(model, x)), **options)
    assert_same_step(model.train(), eager.train(), x, rounding=1e-9)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(60):
            assert_same_step(model, eager, batch(x, step).double(), rounding=1e-9)


class Counting(nn.Module):
    """A residual layer whose code makes a number of the number of rows, so that no graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        number = len([None] * len(x))
        return x + self.layer(x.tanh() * (1.0 + 0.0 * number))


def test_a_layer_that_counts_its_rows_stays_exact_and_says_where_it_runs_eagerly() -> None:
    model = settled(lambda: nn.Sequential(nn.Linear(3, WIDTH), *(Counting() for _ in range(6))))
    x = vectors(32, 3).double()
    options: dict[str, Any] = {"mode": "sample", "schedule": sd.linear_warmup(40)}
    eager, depth = compiled(model.double(), x, 0.9, **options)

    def train() -> None:
        for step in range(40):
            assert_same_step(model.train(), eager.train(), batch(x, step).double(), rounding=1e-9)
            depth.step()

    with pytest.warns(sd.StochasticDepthWarning, match="runs eagerly, torch has no graph"):
        train()


class Solved(nn.Module):
    """A residual layer that can run on no other matrix than one with an inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        return x + self.layer(torch.linalg.solve(matrix, x))


class InPlace(nn.Module):
    """One that changes its input, and can do so in no expanded one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        x += self.layer((x + position).tanh())
        return x


class WithSolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(3, WIDTH), nn.ModuleList(Solved() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).mT
        matrix = 2.0 * torch.eye(WIDTH, dtype=x.dtype).repeat(len(x), 1, 1)
        for layer in self.layers:
            x = layer(x, matrix)
        return x


class WithInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(3, WIDTH), nn.ModuleList(InPlace() for _ in range(6))
        self.position = nn.Parameter(torch.ones(1, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x, position = self.embed(x), self.position.expand(len(x), -1, -1)
        for layer in self.layers:
            x = layer(x, position)
        return x


@pytest.mark.parametrize("network", [WithSolved, WithInPlace])
def test_formats_in_which_a_layer_cannot_run_do_no_harm(network: type[nn.Module]) -> None:
    x = vectors(4, WIDTH, 3).double()
    model = settled(network).double()
    eager, _ = compiled(model, x)
    assert_same_step(model.train(), eager.train(), x, rounding=1e-9)
    built = graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(20):
            assert_same_step(model, eager, batch(x, step).double(), rounding=1e-9)
    assert 1 <= built <= 6
