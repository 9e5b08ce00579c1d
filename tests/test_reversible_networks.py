"""Promise: a backward that computes branches anew, without their blocks, is never silently wrong.

So reversible networks do (Gomez et al. 2017), whose `autograd.Function` keeps no activations.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import vectors
from stochastic_depth.torch_private.backward import HOOKS_CAN_BE_READ

pytestmark = pytest.mark.oldest


class Coupling(nn.Module):
    """A block of a reversible network, which can be run backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.g = copy.deepcopy(self.f)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)

    def backwards(self, values: list[Tensor], gradients: list[Tensor]) -> None:
        """Recomputes its branches, not by way of the block."""
        (y1, y2), (d1, d2) = values, gradients
        with torch.enable_grad():
            g = self.g(y1.requires_grad_())
            g.backward(d2)
            x2, d1 = (y2 - g).detach(), d1 + cast(Tensor, y1.grad)
            f = self.f(x2.requires_grad_())
            f.backward(d1)
        values[:] = (y1 - f).detach(), x2.detach()
        gradients[:] = d1, d2 + cast(Tensor, x2.grad)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: list[Coupling]) -> Tensor:
        values = x.chunk(2, -1)
        for layer in layers:
            values = layer(*values)
        ctx.layers, ctx.values = layers, [value.detach() for value in values]
        return torch.cat(values, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradients = [*gradient.chunk(2, -1)]
        for layer in reversed(ctx.layers):
            layer.backwards(ctx.values, gradients)
        return torch.cat(gradients, -1), None


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(3, 16), nn.ModuleList(Coupling() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, Reversed.apply(self.stem(x), [*self.layers]))


@pytest.mark.parametrize(
    ("scale", "closed"), [("eval", True), ("none", True), ("train", False), ("eval", False)]
)
def test_a_backward_that_calls_branches_without_their_blocks(scale: Any, closed: bool) -> None:
    """It is refused where its gradients would be wrong; elsewhere they are those of autograd."""
    model, x = Reversible().double(), vectors(4, 3).double()
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.2, "uniform", example_inputs=x, scale=scale)
    twin = copy.deepcopy(model)
    with depth.fixed({"layers.2": not closed}):
        loss = model(x).square().mean()
        # In torch 2.6, where no call goes the fast way, each part of a block notes its factor.
        if closed or (scale == "train" and HOOKS_CAN_BE_READ):
            with pytest.raises(sd.RecomputationError, match="without its block"):
                loss.backward()
            return
        loss.backward()
    values = twin.stem(x).chunk(2, -1)
    with sd.get_stochastic_depth(twin).fixed({"layers.2": True}):
        for layer in twin.layers:
            values = layer(*values)
    torch.cat(values, -1).square().mean().backward()
    # The network's backward subtracts to have its inputs again, which rounds once more.
    assert_gradients(model, twin, relative=1e-12)
    if scale == "eval":
        plain(x).square().mean().backward()
        assert_gradients(model, plain, relative=0.0)


def assert_gradients(model: nn.Module, twin: nn.Module, *, relative: float) -> None:
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, its.grad, rtol=relative, atol=relative / 1000)
