"""Promise: of a coupling of two streams (RevNet) both branches are dropped, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, settled, vectors

pytestmark = pytest.mark.oldest


class Coupling(nn.Module):
    """`y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = (
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), Ended())
            for _ in range(2)
        )

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)


class Ended(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)


class Crossed(Coupling):
    """The second stream first."""

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y2 = self.g(x1) + x2
        return self.f(y2) + x1, y2


class Halved(Coupling):
    """Both streams are halves of one tensor."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return torch.cat(Coupling.forward(self, *x.chunk(2, -1)), -1)


class Streams(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(3, 2 * WIDTH), nn.ModuleList(kind() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        streams = self.stem(x)
        if isinstance(self.blocks[0], Halved):
            for block in self.blocks:
                streams = block(streams)
            return streams
        x1, x2 = streams.chunk(2, -1)
        for block in self.blocks:
            x1, x2 = block(x1, x2)
        return torch.cat([x1, x2], -1)


@pytest.fixture(params=[Coupling, Crossed, Halved])
def model(request: pytest.FixtureRequest) -> Any:
    return settled(lambda: Streams(request.param))


@pytest.mark.parametrize("unit", ["block", "branch"])
def test_a_dropped_coupling_hands_both_streams_on(model: Any, unit: Any) -> None:
    x = vectors(5, 3)
    expected = model.stem(x)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, unit=unit)
    assert [len(block.branches) for block in depth.blocks] == [2] * 6
    with depth.fixed({block.name: False for block in depth.blocks}):
        out = model.train()(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(p.grad is None for p in model.blocks.parameters())


def test_whole_pairs_are_not_even_called(model: Any) -> None:
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=vectors(5, 3))
    is_whole = not isinstance(model.blocks[0], Halved)  # whose halves are put together anew
    assert ("skipped whole: returns its input" in str(depth)) is is_whole


def test_one_branch_is_dropped_by_itself() -> None:
    model: Any = settled(lambda: Streams(Coupling))
    x = vectors(5, 3)
    x1, x2 = model.stem(x).chunk(2, -1)
    for block in model.blocks:
        x2 = x2 + block.g(x1)
    expected = torch.cat([x1, x2], -1)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, unit="branch", scale="none")
    with depth.fixed({f"{block.name}:0": False for block in depth.blocks}):
        assert torch.equal(model.train()(x), expected)


def test_both_branches_have_the_inference_scale_and_fold(model: Any) -> None:
    x = vectors(5, 3)
    plain = model.eval()(x)
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=x)
    scaled = model.eval()(x)
    assert not torch.allclose(scaled, plain)
    folded: Any = depth.fold()
    # A factor of one half changes no digit but the exponent: the weights take it exactly.
    assert torch.equal(folded(x), scaled)
    for block in folded.blocks:
        for branch in (block.f, block.g):
            for parameter in branch[-1].parameters():
                parameter.data.mul_(2)
    assert torch.equal(folded(x), plain)


def test_rows_of_both_streams_are_dropped_together(model: Any) -> None:
    x = vectors(8, 3)
    stem = model.stem(x)
    depth = sd.apply_stochastic_depth(
        model, {"blocks.0": 0.5}, example_inputs=x, mode="sample", scale="none"
    )
    whole = model.eval()(x)
    rest = model.blocks[1:]
    model.blocks = nn.ModuleList([model.blocks[0]])
    one = model.eval()(x)
    out = model.train()(x)
    kept = depth.last_gates["blocks.0"]
    assert 0 < len(kept) < 8
    for row in range(8):
        expected = one[row] if row in kept else stem[row]
        torch.testing.assert_close(out[row], expected)
    model.blocks.extend(rest)
    assert torch.equal(model.eval()(x), whole)


def test_a_value_that_is_no_stream_is_no_coupling() -> None:
    """A position that is added once on the way into the branch belongs to the branch."""

    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            return x + self.g((position + self.f(x)).tanh())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks = nn.Linear(3, WIDTH), nn.ModuleList()
            self.blocks.extend(Positioned() for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            position = x.cumsum(0)
            for block in self.blocks:
                x = block(x, position)
            return x

    found = sd.find_residual_blocks(settled(Model), vectors(5, 3))
    assert [len(block.branches) for block in found] == [1] * 6
