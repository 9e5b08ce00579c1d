"""How long the slowest of many ranks takes, from the seconds of single blocks on one.

The forward and backward of each block are timed alone (one thread, from the input that it has in
the network), and the rest of the network with all blocks closed; a rank's step is the rest plus
the blocks that the library's draws let run. Gradients travel for free.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import thread_time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import stochastic_depth as sd
from interleaved import Ratio, ratio, sharing
from ranks_cases import Network
from stochastic_depth.draw import (
    balancing_numbers,
    balancing_order,
    rates_of_a_forward,
)
from stochastic_depth.draw import uniforms as drawn

Kept = NDArray[np.bool_]
Seconds = NDArray[np.float64]
WORLDS = [2**power for power in range(1, 11)]


@dataclass(frozen=True)
class Costs:
    """Seconds of forward and backward: of each block, and of the rest of the network."""

    names: tuple[str, ...]
    blocks: tuple[float, ...]
    rest: float

    def of(self, kept: Kept) -> Seconds:
        """The seconds of a step in which these blocks run (the last dimension)."""
        return self.rest + kept @ np.array(self.blocks)

    @property
    def plain(self) -> float:
        """The seconds of a step in which all run."""
        return self.rest + sum(self.blocks)

    @property
    def equal(self) -> Costs:
        """The same total, were all blocks alike."""
        number = len(self.blocks)
        return Costs(self.names, (sum(self.blocks) / number,) * number, self.rest)


def uniforms(steps: int, ranks: int, blocks: int) -> Seconds:
    """The library's numbers for independent draws: of each step, rank and block."""
    names = tuple(map(str, range(blocks)))
    places = itertools.product(range(steps), range(ranks))
    numbers = [drawn(0, step, 0, names, rank) for step, rank in places]
    return np.array(numbers).reshape(steps, ranks, blocks)


def balanced_on_ranks(
    step: int, names: tuple[str, ...], rates: tuple[float, ...], ranks: int
) -> Kept:
    """`stochastic_depth.draw.balanced` for all ranks at once: which runs which block."""
    order = [names.index(name) for name in balancing_order(0, step, 0, names)]
    number, offset = balancing_numbers(0, step, 0)
    starts = (offset + np.arange(ranks) / ranks) % 1.0
    whole = rates_of_a_forward(dict(zip(names, rates, strict=True)), number)
    terms = np.tile(np.array([whole[names[block]] for block in order]), (ranks, 1))
    sums = np.floor(np.cumsum(np.column_stack([starts, terms]), axis=1))
    kept = np.empty((ranks, len(rates)), dtype=bool)
    kept[:, order] = sums[:, 1:] == sums[:, :-1]
    return kept


def slowest_over_mean(seconds: Seconds, ranks: int) -> Ratio:
    """Of the steps' times; (steps, many ranks) are as many groups of some ranks as there fit."""
    groups = seconds.reshape(len(seconds), -1, ranks)
    return ratio(groups.max(axis=2).mean(axis=1), seconds.mean(axis=1))


def simulated(costs: Costs, rates: tuple[float, ...], numbers: Seconds) -> dict[str, Any]:
    """The slowest rank's time over the mean, for each number of ranks and each way to draw."""
    independent = costs.of(numbers >= np.array(rates))
    found: dict[str, Any] = {
        "same": [slowest_over_mean(independent[:, :1], 1) for _ in WORLDS],
        "different": [slowest_over_mean(independent, ranks) for ranks in WORLDS],
        "different, balanced": [],
        "balanced, equal costs": [],
    }
    for ranks in WORLDS:
        draws = (balanced_on_ranks(n, costs.names, rates, ranks) for n in range(len(numbers)))
        kept = np.stack(list(draws))
        for name, cost in (("different, balanced", costs), ("balanced, equal costs", costs.equal)):
            found[name].append(slowest_over_mean(cost.of(kept), ranks))
    mean = costs.plain - float(np.dot(rates, costs.blocks))
    left = {name: costs.plain - line[-1].value * mean for name, line in found.items()}
    return {
        "dropped_blocks": sum(rates),
        "ranks": WORLDS,
        "slowest_over_mean": found,
        "mean_to_plain": mean / costs.plain,
        "saving_left_at_most_ranks": {
            name: saved / (costs.plain - mean) for name, saved in left.items()
        },
    }


def timed(network: Network, rounds: int) -> tuple[Costs, dict[str, Any]]:
    """The medians of each block's seconds, and whether they add up to the whole network's."""
    images, labels = network.data(0)
    plain = network.make().train()
    gated = sharing(plain)
    depth = sd.apply_stochastic_depth(gated, 0.0, "uniform", example_inputs=images[:2])
    blocks = {block.name: plain.get_submodule(block.name) for block in depth.blocks}

    def rest() -> None:
        with depth.fixed(dict.fromkeys(blocks, False)):
            F.cross_entropy(gated(images), labels).backward()

    def whole() -> None:
        F.cross_entropy(plain(images), labels).backward()

    steps = {**_alone(plain, blocks, images), "rest": rest, "whole": whole}
    medians = _in_turns(steps, rounds)
    costs = Costs(tuple(blocks), tuple(medians[name] for name in blocks), medians["rest"])
    return costs, {
        "batch": network.batch,
        "seconds_blocks": costs.blocks,
        "seconds_rest": costs.rest,
        "seconds_whole": medians["whole"],
        "parts_to_whole": costs.plain / medians["whole"],
        "spread_of_blocks": float(np.std(costs.blocks) / np.mean(costs.blocks)),
    }


def _alone(
    model: nn.Module, blocks: dict[str, nn.Module], images: Tensor
) -> dict[str, Callable[[], None]]:
    """Forward and backward of each block by itself, from the input that it has in the model."""
    inputs: dict[nn.Module, Tensor] = {}

    def keep(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[block] = args[0].detach().clone().requires_grad_()

    hooks = [block.register_forward_pre_hook(keep) for block in blocks.values()]
    model(images)
    for hook in hooks:
        hook.remove()

    def step(block: nn.Module) -> Callable[[], None]:
        gradient = torch.randn_like(block(inputs[block]))
        return lambda: block(inputs[block]).backward(gradient)

    return {name: step(block) for name, block in blocks.items()}


def _in_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Medians of the seconds of this thread, whose clock stands still while others have the core.

    On one thread that is all the work there is, backward too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(2 + rounds):
        for name in order.sample(list(steps), len(steps)):
            start = thread_time()
            steps[name]()
            seconds[name].append(thread_time() - start)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}
