"""Promise: a recurrence written in Python, thousands of operations long, is watched in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.oldest


class Recurrent(nn.Module):
    """A cell that is called once for each step."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.cell, self.out = (
            nn.LayerNorm(width),
            nn.GRUCell(width, width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        state, steps = torch.zeros_like(x[:, 0]), []
        for step in self.norm(x).unbind(1):
            state = self.cell(step, state)
            steps.append(state)
        return x + self.out(torch.stack(steps, 1))


class Scanning(nn.Module):
    """A selective scan, as Mamba without its kernel: the state decays by what the input says."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.inner, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.direct = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        u, decay, gate = self.inner(self.norm(x)).chunk(3, -1)
        keep, steps = decay.sigmoid(), []
        state = torch.zeros_like(u[:, 0])
        for t in range(x.shape[1]):
            state = keep[:, t] * state + u[:, t]
            steps.append(state)
        y = torch.stack(steps, 1) + u * self.direct
        return x + self.out(y * gate.relu())


class Filtering(nn.Module):
    """A linear recurrence with weights of its own: every step is affine in all steps before."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.decay, self.take = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        state, steps = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = self.decay * state + self.take * x[:, t]
            steps.append(state)
        return x + self.out(torch.stack(steps, 1).tanh())


class InLine(nn.Module):
    """A recurrence in line, whose every step looks like a sum of two projections."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.take, self.keep = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        given, steps = self.norm(x), []
        state = given[:, 0]
        for t in range(x.shape[1]):
            state = torch.tanh(self.take(given[:, t]) + self.keep(state))
            steps.append(state)
        return x + torch.stack(steps, 1)


@pytest.mark.parametrize(
    ("kind", "layers", "steps"),
    [(Recurrent, 6, 800), (Scanning, 24, 300), (Filtering, 6, 800), (InLine, 6, 200)],
)
def test_it_takes_three_seconds_or_ten_forwards(
    kind: Callable[[], nn.Module], layers: int, steps: int
) -> None:
    model = nn.Sequential(nn.Linear(3, 8), *(kind() for _ in range(layers)))
    x = torch.randn(2, steps, 3)
    model(x[:, :4])
    start = time.process_time()
    model(x)
    forward = time.process_time() - start
    start = time.process_time()
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, scale="none")
    taken = time.process_time() - start
    assert [block.name for block in depth.blocks] == [str(n + 1) for n in range(layers)]
    assert taken < max(3.0, 10 * forward)
