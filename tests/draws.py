"""What stands in the sequence of draws at a place, for tests that compare a training with it."""

from __future__ import annotations

from collections.abc import Mapping

import stochastic_depth as sd
from stochastic_depth.draw import uniforms


def kept(
    rates: Mapping[str, float], seed: int, step: int, call: int, rank: int | None = None
) -> dict[str, bool]:
    """Which of the gates with these rates run in a forward of mode "batch"."""
    numbers = uniforms(seed, step, call, tuple(rates), rank)
    return {n: u >= rate for (n, rate), u in zip(rates.items(), numbers, strict=True)}


def rates_of(depth: sd.StochasticDepth) -> dict[str, float]:
    """The rate of each block now."""
    return {block.name: block.drop_rate for block in depth.blocks}
