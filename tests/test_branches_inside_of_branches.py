"""Promise: a branch that holds another one, written in the same forward, is exact as well."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, settled, vectors

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning"),
]
BATCH = 8


class Interlaced(nn.Module):
    """As EdgeNeXt's: `x + g(y + f(y))` with `y = h(x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.f, self.g = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.h(x).relu()
        y = y + self.drop(self.f(y.tanh()))
        return x + self.drop(self.g(y.sigmoid()))


def by_hand(model: Any, x: Tensor, factors: list[tuple[Any, Any]]) -> Tensor:
    """Each layer with a factor on the inner and on the outer branch."""
    for layer, (inner, outer) in zip(model, factors, strict=True):
        y = layer.h(x).relu()
        y = y + inner * layer.f(y.tanh())
        x = x + outer * layer.g(y.sigmoid())
    return x


def network() -> nn.Sequential:
    model: nn.Sequential = settled(lambda: nn.Sequential(*(Interlaced() for _ in range(6))))
    return model


@pytest.mark.parametrize("unit", ["block", "branch"])
def test_any_pattern_equals_the_sum_by_hand(unit: Any) -> None:
    model, x = network(), vectors(3, WIDTH)
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x, unit=unit, scale="none")
    assert [len(block.branches) for block in depth.blocks] == [2] * 6
    for inner, outer in itertools.product([True, False], repeat=2):
        if unit == "block" and inner != outer:
            continue
        names = {"1": outer} if unit == "block" else {"1:0": inner, "1:1": outer}
        ran: list[str] = []
        handles = [
            getattr(model[1], part).register_forward_hook(
                lambda *_, part=part, ran=ran: ran.append(part)
            )
            for part in "hfg"
        ]
        model.zero_grad()
        plain.zero_grad()
        with depth.fixed(names):
            ours = model.train()(x)
        for handle in handles:
            handle.remove()
        theirs = by_hand(plain, x, [(1, 1), (int(inner), int(outer)), *[(1, 1)] * 4])
        assert torch.equal(ours, theirs), names
        assert ran == ["h"] * outer + ["f"] * (outer and inner) + ["g"] * outer
        ours.square().sum().backward()
        theirs.square().sum().backward()
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            either = torch.zeros(()) if mine.grad is None else mine.grad
            assert torch.equal(
                either.expand_as(other), other.grad if other.grad is not None else 0 * other
            )


@pytest.mark.parametrize("unit", ["block", "branch"])
def test_both_have_their_inference_scale_and_fold(unit: Any) -> None:
    model, x = network(), vectors(3, WIDTH)
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x, unit=unit)
    factors = [(block.survival_probability,) * 2 for block in depth.blocks]
    ours = model.eval()(x)
    torch.testing.assert_close(ours, by_hand(plain, x, factors), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(depth.fold().eval()(x), ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unit", ["block", "branch"])
def test_rows_equal_masks(unit: Any) -> None:
    model, x = network(), vectors(BATCH, WIDTH)
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(
        model,
        0.5,
        "uniform",
        example_inputs=x,
        mode="sample",
        unit=unit,
    )
    for _ in range(3):
        ours = model.train()(x)
        factors = []
        for block in depth.blocks:
            names = [block.name if unit == "block" else b.name for b in block.branches]
            masks = []
            for name in names:
                mask = torch.zeros(BATCH, 1)
                mask[list(depth.last_gates[name])] = 2.0
                masks.append(mask)
            factors.append((masks[0], masks[1]))
        # Kernels sum in another order for another number of rows.
        torch.testing.assert_close(ours, by_hand(plain, x, factors), rtol=1e-4, atol=1e-5)
