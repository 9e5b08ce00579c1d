"""Promise: what a block does besides its output is not skipped silently with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.oldest
SEEN: list[Any] = []


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.calls, self.kept = 0, [torch.zeros(1)]
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(8))

    def branch(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Counts(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Collects(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x.mean())
        return super().forward(x)


class CollectsOutside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.mean())
        return super().forward(x)


class HandsOnOutside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x)
        return super().forward(x)


class Averages(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return super().forward(x)


class Rebinds(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return super().forward(x)


class RebindsItsOwn(Plain):
    """A buffer whose name begins with an underscore."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: Tensor
        self.register_buffer("_steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self._steps = self._steps + 1
        return super().forward(x)


class Reversing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Reverses(Plain):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Reversing.apply(super().forward(x))
        return result


class Caches(Plain):
    """A constant that is made once is no effect."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 8)
        return x + self.branch(x * self.table)


def network(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), *(kind() for _ in range(6)))


@pytest.mark.parametrize(
    "kind", [Counts, Collects, CollectsOutside, HandsOnOutside, Averages, Rebinds]
)
def test_it_is_done_in_a_dropped_block(kind: type[nn.Module]) -> None:
    model, x = network(kind), torch.randn(4, 3)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    SEEN.clear()
    before = [(b.calls, len(b.kept), b.mean.clone()) for b in model[1:]]
    with depth.fixed({block.name: False for block in depth.blocks}):
        model.train()(x)
    after = [(b.calls, len(b.kept), b.mean.clone()) for b in model[1:]]
    changed = [
        a[0] > b[0] or a[1] > b[1] or not torch.equal(a[2], b[2])
        for a, b in zip(after, before, strict=True)
    ]
    assert all(changed) or len(SEEN) == 6


def test_a_buffer_of_any_name_is_bound_anew_in_a_dropped_block() -> None:
    model, x = network(RebindsItsOwn), torch.randn(4, 3)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    before = [block._steps.item() for block in model[1:]]
    with depth.fixed({block.name: False for block in depth.blocks}):
        model.train()(x)
    assert [block._steps.item() for block in model[1:]] == [steps + 1 for steps in before]


def test_a_function_of_its_own_backward_is_called_in_a_dropped_block() -> None:
    model, x = network(Reverses), torch.randn(4, 3)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    given = torch.randn(4, 8, requires_grad=True)
    with depth.fixed({block.name: False for block in depth.blocks}):
        model.train()[1](given).sum().backward()
    assert given.grad is not None
    assert bool((given.grad == -1).all())


@pytest.mark.parametrize("kind", [Plain, Caches])
def test_others_are_skipped(kind: type[nn.Module]) -> None:
    depth = sd.apply_stochastic_depth(network(kind), 0.2, example_inputs=torch.randn(4, 3))
    assert str(depth).count("skipped whole") == 6


class AveragesItsBranch(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        self.mean.lerp_(y.detach().mean(0), 0.1)
        return x + y


def test_a_kept_value_of_the_branch_warns() -> None:
    with pytest.warns(sd.StochasticDepthWarning, match='block "1" keeps a value of its branch'):
        sd.apply_stochastic_depth(
            network(AveragesItsBranch), 0.2, example_inputs=torch.randn(4, 3), scale="none"
        )
