"""How long the slowest of many ranks takes, from the seconds of single blocks on one.

The forward and backward of each block are timed alone (one thread, from the input that it has in
the network), and the rest of the network with all blocks closed; a rank's step is the rest plus
the blocks that draws like the library's let run. Gradients travel for free.
"""

from __future__ import annotations

import math
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


def independent(steps: int, ranks: int, names: tuple[str, ...], rates: tuple[float, ...]) -> Kept:
    """Which rank runs which block at each step, where each draws for itself."""
    numbers = np.random.default_rng(0).random((steps, ranks, len(names)))
    return numbers >= np.array(rates)


def balanced(step: int, ranks: int, names: tuple[str, ...], rates: tuple[float, ...]) -> Kept:
    """Which rank runs which block at one step, where all run as many.

    As `sd.Draw(sampling="balanced", across_ranks="different")` has it, with other numbers:
    systematic sampling over the blocks in a random order, those of a stage together, in which each
    rank begins at its own place.
    """
    generator = np.random.default_rng(step)
    order = _random_order(names, generator)
    starts = (generator.random() + np.arange(ranks) / ranks) % 1.0
    whole = np.array(with_whole_sum(rates, generator.random()))
    terms = np.tile(whole[order], (ranks, 1))
    sums = np.floor(np.cumsum(np.column_stack([starts, terms]), axis=1))
    kept = np.empty((ranks, len(rates)), dtype=bool)
    kept[:, order] = sums[:, 1:] == sums[:, :-1]
    return kept


def _random_order(names: tuple[str, ...], generator: np.random.Generator) -> list[int]:
    stages = [name.rpartition(".")[0] for name in names]
    place = {stage: generator.random() for stage in dict.fromkeys(stages)}
    keys = [(place[stage], generator.random()) for stage in stages]
    return sorted(range(len(names)), key=keys.__getitem__)


def with_whole_sum(rates: tuple[float, ...], u: float) -> list[float]:
    """Rates that add up to one of the two integers around their sum, on average over u the same."""
    part = math.fsum(rates) % 1.0
    if not 1e-9 < part < 1 - 1e-9:
        return list(rates)
    bears = [min(p / part, (1 - p) / (1 - part)) for p in rates]
    more = (1 - part if u < part else -part) / math.fsum(bears)
    return [p + more * each for p, each in zip(rates, bears, strict=True)]


def slowest_over_mean(seconds: Seconds, ranks: int) -> Ratio:
    """Of the steps' times; (steps, many ranks) are as many groups of some ranks as there fit."""
    groups = seconds.reshape(len(seconds), -1, ranks)
    return ratio(groups.max(axis=2).mean(axis=1), seconds.mean(axis=1))


def simulated(costs: Costs, rates: tuple[float, ...], steps: int) -> dict[str, Any]:
    """The slowest rank's time over the mean, for each number of ranks and each way to draw."""
    seconds = costs.of(independent(steps, WORLDS[-1], costs.names, rates))
    found: dict[str, Any] = {
        "same": [slowest_over_mean(seconds[:, :1], 1) for _ in WORLDS],
        "different": [slowest_over_mean(seconds, ranks) for ranks in WORLDS],
        "different, balanced": [],
        "balanced, equal costs": [],
    }
    for ranks in WORLDS:
        kept = np.stack([balanced(step, ranks, costs.names, rates) for step in range(steps)])
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
