"""Promise: where all blocks are dropped, what comes out is no tensor that the caller holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import stochastic_depth as sd
from networks import WIDTH, Residual, residuals, settled, vectors

pytestmark = pytest.mark.oldest


class ReturnsBoth(nn.Module):
    """Hands out what goes into its blocks, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(WIDTH, WIDTH), residuals(6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        return x, self.blocks(x)


class Reshaped(nn.Module):
    """Its first block is given a view of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = residuals(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.view(-1, 2, WIDTH)).flatten(0, 1)


def closed(depth: sd.StochasticDepth) -> Any:
    return depth.fixed({block.name: False for block in depth.blocks})


@pytest.mark.parametrize("build", [lambda: residuals(6), Reshaped])
@pytest.mark.parametrize("scale", ["eval", "train", "none"])
def test_changed_in_place_behind_the_model(build: Any, scale: Any) -> None:
    model, x = settled(build), vectors(4, WIDTH)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale=scale)
    before = x.clone()
    with closed(depth):
        model.train()(x).add_(1.0)
    assert torch.equal(x, before)


def test_a_drawn_stack_changes_no_input() -> None:
    model, x = settled(lambda: residuals(6)), vectors(4, WIDTH)
    depth = sd.apply_stochastic_depth(model, 0.9, "uniform", example_inputs=x)
    before, all_closed = x.clone(), 0
    for _ in range(60):
        with torch.no_grad():
            model.train()(x).mul_(2.0)
        all_closed += not any(depth.last_gates.values())
        assert torch.equal(x, before)
    assert all_closed


def test_what_the_model_hands_out_twice_stays_two() -> None:
    model, x = settled(ReturnsBoth), vectors(4, WIDTH)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    with closed(depth):
        first, second = model.train()(x)
    assert torch.equal(first, second)
    second.detach().zero_()
    assert first.any()


def test_behind_a_stem_nothing_is_copied() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Residual() for _ in range(6)))
    x, seen = vectors(4, WIDTH), []
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with closed(depth):
        assert model.train()(x) is seen[0]


class TwoLayers(nn.Module):
    """A norm behind the sum, so that the block's own forward runs where it is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.b, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.b(self.between(self.a(x))))

    def between(self, h: Tensor) -> Tensor:
        return h.t().t()


class MovedInPlace(TwoLayers):
    """Between its layers the value itself is moved, and moved back."""

    def between(self, h: Tensor) -> Tensor:
        return h.t_().contiguous().t_()


class ActsInPlace(TwoLayers):
    def between(self, h: Tensor) -> Tensor:
        return h.relu_().add_(1)


class Counting(TorchDispatchMode):
    """How much memory is taken."""

    taken = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.taken += func.overloadpacket is torch.ops.aten.empty_strided
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [TwoLayers, MovedInPlace, ActsInPlace])
@pytest.mark.parametrize("forced", [True, False])
def test_a_dropped_layer_that_hands_its_input_on_leaves_it_alone(kind: Any, forced: bool) -> None:
    model = settled(lambda: nn.Sequential(nn.Linear(3, WIDTH), *(kind() for _ in range(6))))
    x = vectors(4, 3)
    depth = sd.apply_stochastic_depth(
        model, 0.999, "uniform", example_inputs=x, draw=sd.Draw(seed=1)
    )
    expected = model[0](x)
    for block in model[1:]:
        expected = block.norm(expected)
    model.train()
    with Counting() as counting:  # type: ignore[no-untyped-call]
        if forced:
            with closed(depth):
                out = model(x)
        else:
            out = model(x)
            assert not any(depth.last_gates.values())
    assert torch.equal(out, expected)
    # The branch's end is new memory, which may be added to in place; what leads to it need not be.
    assert counting.taken == (6 if kind is TwoLayers else 12)
