"""Promise: a recomputed forward sees the draw of the forward that it recomputes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from draws import kept, rates_of
from networks import WIDTH, settled, vectors

pytestmark = [
    pytest.mark.oldest,
    # torch's own, for a reentrant checkpoint within another one
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
    pytest.mark.filterwarnings("ignore:dropout is active"),
]


Walk = Callable[["Network", Tensor], Tensor]


class Layer(nn.Module):
    """A pre-norm layer; the feed-forward branch can be checkpointed inside of the block."""

    def __init__(self, *, inner: bool | None = None) -> None:
        super().__init__()
        self.norm1, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.norm2, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(0.25)
        self.inner = inner  # use_reentrant of a checkpoint around the feed-forward branch

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(torch.tanh(self.up(self.norm2(x)))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x).tanh())
        if self.inner is None or not self.training:
            return x + self.feed_forward(x)
        return x + checkpoint(self.feed_forward, x, use_reentrant=self.inner)


class Network(nn.Module):
    """Eight layers, run by `walk`, which decides what is checkpointed."""

    def __init__(self, walk: Walk, *, inner: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.layers = nn.ModuleList(Layer(inner=inner) for _ in range(8))
        self.walk = walk

    def segment(self, start: int, end: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for layer in self.layers[start:end]:
                x = layer(x)
            return x

        return run

    def forward(self, x: Tensor) -> Tensor:
        return self.walk(self, self.stem(x))


def plainly(network: Network, x: Tensor) -> Tensor:
    return network.segment(0, 8)(x)


def each_block(reentrant: bool) -> Walk:
    def walk(network: Network, x: Tensor) -> Tensor:
        for layer in network.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x

    return walk


def segments(reentrant: bool) -> Walk:
    def walk(network: Network, x: Tensor) -> Tensor:
        for start in (0, 3, 6):
            x = checkpoint(network.segment(start, min(start + 3, 8)), x, use_reentrant=reentrant)
        return x

    return walk


def nested(reentrant: bool) -> Walk:
    def walk(network: Network, x: Tensor) -> Tensor:
        def outer(x: Tensor) -> Tensor:
            for start in (0, 2, 4, 6):
                x = checkpoint(network.segment(start, start + 2), x, use_reentrant=reentrant)
            return x

        return checkpoint(outer, x, use_reentrant=reentrant)

    return walk


SHAPES = {"each block": each_block, "segments": segments, "nested": nested}


def gradients(
    walk: Walk,
    *,
    forwards: int = 1,
    inner: bool | None = None,
    unit: Any = "block",
    redraw: Any = "forward",
    mode: Any = "batch",
    steps: int = 3,
) -> list[Tensor | None]:
    """All gradients of some steps, each with some forwards before their backwards."""
    torch.manual_seed(0)
    network = Network(walk, inner=inner).train()
    depth = sd.apply_stochastic_depth(
        network,
        0.5,
        "uniform",
        example_inputs=torch.randn(2, 4),
        unit=unit,
        mode=mode,
        scale="train",
        draw=sd.Draw(seed=3, redraw=redraw),
    )
    found: list[Tensor | None] = []
    for step in range(steps):
        network.zero_grad()
        batches = [vectors(5, 4, seed=10 * step + number) for number in range(forwards)]
        torch.manual_seed(step)
        losses = [network(batch.requires_grad_()).square().sum() for batch in batches]
        for loss in losses:
            loss.backward()
        found += [None if p.grad is None else p.grad.clone() for p in network.parameters()]
        depth.step()
    return found


def same(mine: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    pairs = list(zip(mine, theirs, strict=True))
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in pairs
    )


WAYS: dict[str, tuple[Walk, dict[str, Any]]] = {
    **{f"{name}, reentrant": (shape(True), {}) for name, shape in SHAPES.items()},
    **{name: (shape(False), {}) for name, shape in SHAPES.items()},
    "inside of a block, reentrant": (plainly, {"inner": True}),
    "inside of a block": (plainly, {"inner": False}),
    "inside of a block within a segment": (segments(False), {"inner": False}),
}
DRAWS: dict[str, dict[str, Any]] = {
    "block": {},
    "branch": {"unit": "branch"},
    "one a step": {"redraw": "step"},
    "rows": {"mode": "sample"},
    "rows, branch": {"mode": "sample", "unit": "branch"},
}


@functools.cache
def expected(draws: str, forwards: int) -> list[Tensor | None]:
    found = gradients(plainly, forwards=forwards, **DRAWS[draws])
    assert "rows" in draws or any(gradient is None for gradient in found)
    return found


@pytest.mark.parametrize(
    ("draws", "forwards"), [*((draws, 1) for draws in DRAWS), ("block", 2), ("rows, branch", 2)]
)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_without_checkpoints(way: str, draws: str, forwards: int) -> None:
    walk, more = WAYS[way]
    assert same(
        gradients(walk, forwards=forwards, **more, **DRAWS[draws]), expected(draws, forwards)
    )


def test_recomputations_do_not_count_as_calls() -> None:
    torch.manual_seed(0)
    network = Network(each_block(False)).train()
    depth = sd.apply_stochastic_depth(
        network, 0.5, "uniform", example_inputs=torch.randn(2, 4), draw=sd.Draw(seed=3)
    )
    for call in range(6):
        network(torch.randn(2, 4)).sum().backward()
        assert depth.last_gates == kept(rates_of(depth), 3, 0, call)


def test_gates_forced_in_the_forward_hold_in_the_recomputation() -> None:
    torch.manual_seed(0)
    network = Network(segments(False)).train()
    depth = sd.apply_stochastic_depth(network, 0.5, example_inputs=torch.randn(2, 4))
    twin = copy.deepcopy(network)
    twin.walk = plainly
    x = torch.randn(3, 4)
    gates = {f"layers.{i}": i % 2 == 0 for i in range(8)}
    with depth.fixed(gates):
        torch.manual_seed(7)
        loss = network(x).square().sum()
    loss.backward()
    with sd.get_stochastic_depth(twin).fixed(gates):
        torch.manual_seed(7)
        twin(x).square().sum().backward()
    assert same([p.grad for p in network.parameters()], [p.grad for p in twin.parameters()])


def test_a_branch_checkpointed_in_eval_mode() -> None:
    """Gradients in eval mode (saliency, a frozen trunk) recompute with the inference scale."""

    class Evaluated(Layer):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mix(self.norm1(x).tanh())
            return x + checkpoint(self.feed_forward, x, use_reentrant=False)

    found = []
    for kind in (Layer, Evaluated):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), *(kind() for _ in range(6)))
        sd.apply_stochastic_depth(network, 0.2, example_inputs=torch.randn(2, 4), unit="branch")
        x = vectors(3, 4).requires_grad_()
        network.eval()(x).square().sum().backward()
        found.append(x.grad)
    assert same(*([grad] for grad in found))


def test_forwards_of_earlier_steps_are_no_longer_outstanding() -> None:
    torch.manual_seed(0)
    network = Network(each_block(True)).train()
    depth = sd.apply_stochastic_depth(network, 0.5, "uniform", example_inputs=torch.randn(2, 4))
    with torch.no_grad():
        network(torch.randn(2, 4))
        network(torch.randn(2, 4))
    depth.step()
    network(torch.randn(2, 4).requires_grad_()).sum().backward()
    assert any(p.grad is not None for p in network.parameters())


def test_backward_twice_through_a_checkpoint() -> None:
    torch.manual_seed(0)
    network = Network(segments(False)).train()
    sd.apply_stochastic_depth(network, 0.5, "uniform", example_inputs=torch.randn(2, 4))
    loss = network(torch.randn(3, 4)).square().sum()
    loss.backward(retain_graph=True)
    once = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    loss.backward()
    assert same([p.grad for p in network.parameters()], once)


@pytest.mark.parametrize("shape", SHAPES)
def test_forwards_that_have_no_backward(shape: str) -> None:
    """Without gradients, or left out (a loss of NaN), beside a reentrant checkpoint."""

    def found(walk: Walk) -> list[Tensor | None]:
        torch.manual_seed(0)
        network = Network(walk).train()
        sd.apply_stochastic_depth(
            network, 0.5, "uniform", example_inputs=torch.randn(2, 4), draw=sd.Draw(seed=3)
        )
        with torch.no_grad():
            network(vectors(3, 4, seed=1))
        network(vectors(3, 4, seed=2).requires_grad_())
        torch.manual_seed(1)
        network(vectors(3, 4, seed=3).requires_grad_()).square().sum().backward()
        return [p.grad for p in network.parameters()]

    without = found(plainly)
    assert any(grad is None for grad in without)
    assert same(found(SHAPES[shape](True)), without)
    assert same(found(SHAPES[shape](False)), without)


class BlockAndLinear(nn.Module):
    """A residual block with something behind its sum: it is skipped at its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.down(self.up(x).relu()))


# The branch holds a block, is one itself, or is one that is skipped whole.
BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "holds one": lambda: nn.Sequential(Layer(), nn.Linear(8, 8)),
    "is one": BlockAndLinear,
    "is one, skipped whole": Layer,
}


class Inner(nn.Module):
    """A branch with a residual block in it."""

    def __init__(self, branch: str, *, reentrant: bool | None) -> None:
        super().__init__()
        self.norm, self.reentrant = nn.LayerNorm(8), reentrant
        self.branch = BRANCHES[branch]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.reentrant is None:
            return x + self.branch(y)
        return x + checkpoint(self.branch, y, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:fold.. will not be able")
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("scale", ["none", "eval", "train"])
def test_a_branch_with_a_block_in_it(scale: Any, unit: Any, reentrant: bool, branch: str) -> None:
    found = []
    for each in (reentrant, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), *(Inner(branch, reentrant=each) for _ in range(6)))
        depth = sd.apply_stochastic_depth(
            model, 0.4, "uniform", example_inputs=torch.randn(2, 4), unit=unit, scale=scale
        )
        for step in range(3):
            torch.manual_seed(step)
            model.train()(vectors(3, 4, seed=step)).square().sum().backward()
            depth.step()
        found.append([p.grad for p in model.parameters()])
    assert same(*found)


class Normed(nn.Module):
    """A projection, and a branch that ends in a BatchNorm and may be checkpointed."""

    def __init__(self, *, inner: bool) -> None:
        super().__init__()
        self.skip, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.inner = nn.BatchNorm1d(8), inner

    def branch(self, x: Tensor) -> Tensor:
        return self.norm(self.down(self.up(x).tanh()))

    def forward(self, x: Tensor) -> Tensor:
        branch = checkpoint(self.branch, x, use_reentrant=True) if self.inner else self.branch(x)
        return self.skip(x) + branch


@pytest.mark.parametrize("scale", ["none", "eval", "train"])
@pytest.mark.parametrize("frozen", ["norms", "all"])
def test_a_branch_checkpointed_with_frozen_modules(frozen: str, scale: Any) -> None:
    """In eval mode a module looks the same as in inference without gradients."""
    found = []
    for inner in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), *(Normed(inner=inner) for _ in range(6)))
        sd.apply_stochastic_depth(
            network, 0.5, "uniform", example_inputs=torch.randn(2, 4), scale=scale
        )
        for module in network.modules():
            module.train(frozen == "norms" and not isinstance(module, nn.BatchNorm1d))
        for _ in range(3):
            network(vectors(3, 4)).square().sum().backward()
        found.append([p.grad for p in network.parameters()])
    for one, other in zip(*found, strict=True):
        zeros = torch.zeros(()) if one is None or other is None else torch.zeros_like(one)
        torch.testing.assert_close(
            zeros if other is None else other, zeros if one is None else one, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_checkpointed_in_eval_mode(reentrant: bool, forced: bool) -> None:
    found = []
    for walk in (plainly, each_block(reentrant)):
        torch.manual_seed(0)
        network = Network(walk).eval()
        depth = sd.apply_stochastic_depth(network, 0.5, example_inputs=torch.randn(2, 4))
        with depth.fixed({"layers.3": False, "layers.6": False}) if forced else nullcontext():
            loss = network(vectors(3, 4).requires_grad_()).square().sum()
        loss.backward()
        found.append([p.grad for p in network.parameters()])
    assert same(*found)


@pytest.mark.parametrize("forced", ["forward", "backward"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_forced_on_one_side_only(forced: str, reentrant: bool) -> None:
    """What the forward did is done again, whatever is forced while it is recomputed."""

    def run(walk: Callable[[Network, Tensor], Tensor]) -> list[Tensor | None]:
        torch.manual_seed(0)
        network = Network(walk).train()
        for layer in network.layers:
            cast(Layer, layer).dropout.p = 0.0
        depth = sd.apply_stochastic_depth(network, 0.5, example_inputs=torch.randn(2, 4))
        gates = {block.name: number % 3 > 0 for number, block in enumerate(depth.blocks)}
        with depth.fixed(gates) if forced == "forward" else nullcontext():
            loss = network(vectors(5, 4).requires_grad_()).square().sum()
        with depth.fixed(gates) if forced == "backward" else nullcontext():
            loss.backward()
        return [None if p.grad is None else p.grad.clone() for p in network.parameters()]

    expected = run(plainly)
    assert any(g is None for g in expected)
    for walk in SHAPES.values():
        assert same(run(walk(reentrant)), expected)


BEHIND: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "layer scale": lambda block, y: block.gamma * y,
    "relu": lambda block, y: y.relu(),
    "dropout": lambda block, y: nn.functional.dropout(y, 0.1, block.training),
    "shared": lambda block, y: block.shared(y),
    "nothing": lambda block, y: y,
}


class OfItsOwn(nn.Module):
    """Two branches, and something behind the last module of each, in a checkpoint of its own."""

    def __init__(self, behind: str, *, normed: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gamma, self.shared = nn.Parameter(torch.rand(WIDTH)), nn.ReLU()
        self.norm = nn.LayerNorm(WIDTH) if normed else nn.Identity()
        self.behind, self.is_checkpointed = BEHIND[behind], True

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.behind(self, self.first(x.tanh()))
        return self.norm(x + self.behind(self, self.second(x.tanh())))

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_checkpointed:
            return self._forward(x)
        return checkpoint(self._forward, x, use_reentrant=False)


@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("behind", BEHIND)
def test_a_block_that_checkpoints_its_own_forward(behind: str, normed: bool, unit: Any) -> None:
    model = settled(
        lambda: nn.Sequential(*(OfItsOwn(behind, normed=normed) for _ in range(6)))
    ).train()
    x = vectors(4, WIDTH)
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=x, unit=unit)
    every = [block.name for block in depth.blocks]
    patterns = [[], every[1:2], every[:3], every]
    patterns += [["1:0"], ["1:1", "2:0"], ["0:0", "1", "5:1"]] if unit == "branch" else []
    for pattern in patterns:
        found = []
        for is_checkpointed in (True, False):
            for block in model.modules():
                if isinstance(block, OfItsOwn):
                    block.is_checkpointed = is_checkpointed
            model.zero_grad()
            torch.manual_seed(1)
            with depth.fixed(dict.fromkeys(pattern, False)):
                start = x.clone().requires_grad_()
                model(start).square().sum().backward()
            found.append([start.grad, *(p.grad for p in model.parameters())])
        for ours, theirs in zip(*found, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs), pattern
