"""Promise: `sampling="balanced"` keeps every rate exact and the number of drops nearly constant.

How draws hang together then: of L blocks of one rate, two are dropped together with a correlation
of -1 / (L - 1) where the number of drops is constant; and of W ranks that draw differently, two
drop the same block with a correlation of -1 / (W - 1) where `W * rate` and the sum of the rates are
integers.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, Residual, make, settled
from stochastic_depth.draw import balanced, rates_of_a_forward

pytestmark = pytest.mark.oldest
DRAWS = 4000
SIGMAS = 5.0


def dropped(rates: list[float], *, share: float = 0.0, seed: int = 0) -> Tensor:
    """A row for each draw, a column for each block: 1 where it is dropped."""
    names = {str(number): rate for number, rate in enumerate(rates)}
    draws = [balanced(seed, step, 0, names, share) for step in range(DRAWS)]
    return torch.tensor([[not draw[name] for name in names] for draw in draws]).double()


@pytest.mark.parametrize("rates", [[0.5] * 6, [0.1, 0.2, 0.3, 0.4, 0.5], [0.0, 0.9, 0.05, 0.33]])
def test_every_block_is_dropped_at_exactly_its_rate(rates: list[float]) -> None:
    frequencies = dropped(rates).mean(0)
    for rate, frequency in zip(rates, frequencies.tolist(), strict=True):
        assert abs(frequency - rate) <= SIGMAS * math.sqrt(rate * (1 - rate) / DRAWS)


@given(st.lists(st.floats(0, 0.99), min_size=1, max_size=12), st.integers(0, 1000))
def test_the_number_of_drops_is_one_of_two_neighbours(rates: list[float], step: int) -> None:
    names = {str(number): rate for number, rate in enumerate(rates)}
    kept = balanced(0, step, 0, names)
    drops = [not kept[name] for name in names]
    total = sum(rates)
    assert math.floor(total - 1e-9) <= sum(drops) <= math.ceil(total + 1e-9)
    assert not any(drop and not rate for drop, rate in zip(drops, rates, strict=True))


def test_the_correlation_of_two_blocks_is_as_stated() -> None:
    drops = dropped([0.3] * 10)
    assert set(drops.sum(1).tolist()) == {3.0}
    correlations = torch.corrcoef(drops.T)[~torch.eye(10, dtype=torch.bool)]
    assert float((correlations + 1 / 9).abs().max()) < SIGMAS / math.sqrt(DRAWS)


def test_draws_of_different_steps_are_independent() -> None:
    drops = dropped([0.3] * 10)
    both = torch.corrcoef(torch.cat([drops[1:], drops[:-1]], 1).T)[:10, 10:]
    assert float(both.abs().max()) < SIGMAS / math.sqrt(DRAWS)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_share_the_drops_of_a_block(ranks: int) -> None:
    rates = [0.5, 0.25, 0.5, 0.5, 0.3, 0.2]
    drops = torch.stack([dropped(rates, share=rank / ranks) for rank in range(ranks)])
    counts = drops.sum(2)  # of each rank, in each draw
    assert set(counts[0].tolist()) == {2.0, 3.0}  # around their sum, 2.25
    assert torch.equal(counts.min(0).values, counts.max(0).values)
    share = drops.sum(0)  # of each block, over the ranks
    for number, rate in enumerate(rates):
        for total, u in ((2.0, 0.9), (3.0, 0.1)):
            own = rates_of_a_forward({str(n): r for n, r in enumerate(rates)}, u)[str(number)]
            of_ranks = share[counts[0] == total, number]
            assert math.floor(own * ranks) <= of_ranks.min()
            assert of_ranks.max() <= math.ceil(own * ranks)
        frequency = drops[0, :, number].mean()
        assert abs(float(frequency) - rate) <= SIGMAS * math.sqrt(rate * (1 - rate) / DRAWS)


def test_the_correlation_of_two_ranks_is_as_stated() -> None:
    drops = torch.stack([dropped([0.25] * 8, share=rank / 4)[:, 0] for rank in range(4)])
    correlations = torch.corrcoef(drops)[~torch.eye(4, dtype=torch.bool)]
    assert float((correlations + 1 / 3).abs().max()) < SIGMAS / math.sqrt(DRAWS)


@given(st.lists(st.floats(0, 0.99), min_size=1, max_size=12))
def test_the_rates_of_a_forward_are_rates_and_right_on_average(rates: list[float]) -> None:
    by_name = {str(number): rate for number, rate in enumerate(rates)}
    part = math.fsum(rates) % 1.0
    low, high = rates_of_a_forward(by_name, 1.0 - 1e-12), rates_of_a_forward(by_name, 0.0)
    for name, rate in by_name.items():
        assert part * high[name] + (1 - part) * low[name] == pytest.approx(rate, abs=1e-9)
        assert -1e-9 <= low[name] <= high[name] + 1e-9 <= 1 + 2e-9
    for found in (low, high):
        total = math.fsum(found.values())
        assert total == pytest.approx(round(total), abs=1e-6)


def test_a_model_draws_its_blocks_together_and_resumes() -> None:
    def build() -> tuple[Any, sd.StochasticDepth]:
        model = settled(lambda: nn.Sequential(*(Residual() for _ in range(8))))
        draw = sd.Draw(seed=5, sampling="balanced")
        x = torch.randn(2, WIDTH)
        return model, sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=x, draw=draw)

    (model, depth), (other, resumed) = build(), build()
    x = torch.randn(3, WIDTH)
    patterns = set()
    for _ in range(20):
        model(x)
        assert sum(depth.last_gates.values()) == 4
        patterns.add(tuple(depth.last_gates.values()))
    assert len(patterns) > 10
    resumed.load_state_dict(depth.state_dict())
    assert torch.equal(model(x), other(x))
    assert depth.last_gates == resumed.last_gates


def test_branches_are_drawn_together_where_they_are_the_units() -> None:
    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(
        model, 0.25, "uniform", example_inputs=x, unit="branch", draw=sd.Draw(sampling="balanced")
    )
    for _ in range(10):
        model.train()(x)
        assert sum(depth.last_gates.values()) == 9  # of 12


def test_what_lies_inside_of_a_dropped_block_is_not_made_up_for() -> None:
    model, x = make("nested")
    depth = sd.apply_stochastic_depth(
        model, 0.5, "uniform", example_inputs=x, draw=sd.Draw(sampling="balanced")
    )
    counts = set()
    for _ in range(30):
        before = dict(depth.state_dict()["calls"])
        model.train()(x)
        calls = dict(depth.state_dict()["calls"])
        counts.add(sum(calls[name] - before.get(name, 0) for name in calls))
    assert max(counts) <= len(depth.blocks)
    assert len(counts) > 1  # some blocks were never asked
