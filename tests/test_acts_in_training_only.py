"""Promise: what acts in training only, outside of the branches, acts in a dropped block, too."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from layers import BehindMoves, Stack
from networks import Residual

pytestmark = pytest.mark.oldest


def test_a_dropout_inside_of_the_branch_or_of_rate_0_does_not_act() -> None:
    for model in (
        Stack(lambda: BehindMoves(dropout=0.5)),
        Stack(lambda: nn.Sequential(Residual(), nn.Dropout(0.0))),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that dropout is active
            depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=torch.randn(4, 3))
        assert str(depth).count("skipped whole") == 6


class Counting(Residual):
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
