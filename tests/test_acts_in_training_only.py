"""Promise: what acts in training only, outside of the branches, acts in a dropped block, too."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.oldest


class Plain(nn.Module):
    """A branch, and what subclasses do around it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.5)

    def branch(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class DropoutBehind(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x + self.branch(x))


class FunctionalBehind(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x + self.branch(x), 0.5, self.training)


class DropoutInFront(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        return x + self.branch(x)


class Doubling(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.branch(x)
        return y * 2 if self.training else y


class Noise(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return x + self.branch(x)


class Clipping(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.branch(x)
        return y.clamp(-0.5, 0.5) if self.training else y


class DropoutInside(Plain):
    def branch(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(self.norm(x)))


class DropoutOfRateZero(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x + self.branch(x))


ACTING = [DropoutBehind, FunctionalBehind, DropoutInFront, Doubling, Noise, Clipping]
IDLE = [Plain, DropoutInside, DropoutOfRateZero]


def gated(kind: Callable[[], nn.Module], x: Tensor) -> tuple[nn.Module, nn.Module, str]:
    torch.manual_seed(0)
    model = nn.Sequential(*(kind() for _ in range(6)))
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x, scale="none")
    return model, plain, str(depth)


@pytest.mark.filterwarnings("ignore:dropout is active")
@pytest.mark.parametrize("kind", [*ACTING, *IDLE])
def test_a_dropped_block_does_what_the_plain_one_does_without_its_branch(
    kind: Callable[[], nn.Module],
) -> None:
    x = torch.randn(4, 8)
    model, plain, _ = gated(kind, x)
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output: output * 0)
    for training in (True, False):
        with sd.get_stochastic_depth(model).fixed({str(n): False for n in range(6)}):
            torch.manual_seed(1)
            dropped = model.train(training)(x)
        torch.manual_seed(1)
        assert torch.equal(dropped, plain.train(training)(x))


@pytest.mark.filterwarnings("ignore:dropout is active")
@pytest.mark.parametrize("kind", IDLE)
def test_what_acts_within_the_branch_or_not_at_all_is_skipped(
    kind: Callable[[], nn.Module],
) -> None:
    _, _, table = gated(kind, torch.randn(4, 8))
    assert table.count("skipped whole") == 6


class Counting(Plain):
    """Counts its calls, and keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)  # type: ignore[assignment]
        self.calls, self.seen = 0, [torch.zeros(1)]
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(8))

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean.lerp_(x.mean(0), 0.1)
        return super().forward(x)


def test_watching_in_train_mode_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 8), *(Counting() for _ in range(3)))
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    versions = [buffer._version for buffer in model.buffers()]
    generator = torch.random.get_rng_state()
    sd.find_residual_blocks(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert [buffer._version for buffer in model.buffers()] == versions
    assert all(torch.equal(now, before[key]) for key, now in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert [module.training for module in model] == [True, True, False, True]
    assert [module.calls for module in model[1:]] == [0, 0, 0]


def test_batch_norm_on_one_value_is_watched_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(3, 8), *(Counting() for _ in range(3)))
    assert len(sd.find_residual_blocks(model, torch.randn(1, 3))) == 3
