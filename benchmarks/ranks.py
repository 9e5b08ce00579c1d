"""Ranks that drop other blocks wait for the slowest: how long, simulated and on two processes.

    PYTHONPATH=examples python benchmarks/ranks.py            # some twelve minutes on two cores
    PYTHONPATH=examples python benchmarks/ranks.py --quick    # a few steps; nothing is written

Simulated, for 2 to 1,024 ranks: the forward and backward of each block are timed alone (one thread,
from the input that it has in the network), and the rest of the network with all blocks closed; a
rank's step is the rest plus the blocks that the library's draws let run. Gradients travel for free.
Balanced draws balance the number of dropped blocks, not their seconds: "balanced, equal costs" is
what they would come to if all blocks took as long.

Measured, on two gloo processes under DistributedDataParallel, the variants taking turns step by
step: the wait is the time in a barrier that each rank enters when its last gradient, the stem's, is
there; slowest over mean is of the processor's seconds until then. `work_to_plain` shows how many
blocks were drawn; where it differs between variants, so do the images per second by chance.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd
from imagelib.cifar_resnet import CifarResNet
from interleaved import Ratio, ratio, sharing, take_turns, write
from stochastic_depth.distributions import resolve_rates
from stochastic_depth.draw import balancing_order, uniform

Kept = NDArray[np.bool_]
Seconds = NDArray[np.float64]

PICTURE = Path(__file__).parents[1] / "docs" / "ranks.png"
WORLDS = [2**power for power in range(1, 11)]
PROCESSES = 2
TARGET = 1.03  # of balanced draws, at 1,024 ranks

DRAWS = {
    "same": sd.Draw(across_ranks="same"),
    "different": sd.Draw(across_ranks="different"),
    "different, balanced": sd.Draw(across_ranks="different", sampling="balanced"),
}
RATES = {"0.5 linear": (0.5, "linear"), "0.2 uniform": (0.2, "uniform")}


@dataclass(frozen=True)
class Network:
    """A network, and how many images of 32 pixels make its batch."""

    make: Callable[[], nn.Module]
    batch: int

    def data(self, seed: int) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        torch.manual_seed(seed)
        return torch.randn(self.batch, 3, 32, 32), torch.randint(0, 10, (self.batch,))


def _transformer() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=128, depth=24, num_heads=4, num_classes=10
    )
    return model


NETWORKS = {
    "ResNet-110": Network(lambda: CifarResNet(110), 32),
    "24-layer transformer": Network(_transformer, 8),
}


@dataclass(frozen=True)
class Amounts:
    """How much is measured."""

    rounds: int = 40  # of timing every block
    simulated: int = 400  # steps
    measured: int = 100  # steps of each variant


QUICK = Amounts(rounds=3, simulated=30, measured=4)


# Simulated ---------------------------------------------------------------------------------------


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
    places = itertools.product(range(steps), range(ranks), range(blocks))
    numbers = (uniform(0, step, (0,), str(block), rank) for step, rank, block in places)
    count = steps * ranks * blocks
    return np.fromiter(numbers, float, count).reshape(steps, ranks, blocks)


def balanced_on_ranks(
    step: int, names: tuple[str, ...], rates: tuple[float, ...], ranks: int
) -> Kept:
    """`stochastic_depth.draw.balanced` for all ranks at once: which runs which block."""
    order = [names.index(name) for name in balancing_order(0, step, (0,), names)]
    offset = uniform(0, step, (0,), ("offset",))
    starts = (offset + np.arange(ranks) / ranks) % 1.0
    terms = np.tile(np.array(rates)[order], (ranks, 1))
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


def simulate(amounts: Amounts) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the blocks cost, and each network at each rate."""
    costs: dict[str, Any] = {}
    cases: dict[str, Any] = {}
    for name, network in NETWORKS.items():
        cost, costs[name] = timed(network, amounts.rounds)
        print(name, {k: v for k, v in costs[name].items() if k != "seconds_blocks"}, flush=True)
        numbers = uniforms(amounts.simulated, WORLDS[-1], len(cost.blocks))
        blocks = [str(block) for block in range(len(cost.blocks))]
        for label, rate in RATES.items():
            case = f"{name}, {label}"
            cases[case] = simulated(cost, resolve_rates(*rate, blocks), numbers)
            show_simulated(case, cases[case])
    return costs, cases


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


# Measured ----------------------------------------------------------------------------------------


class Contender:
    """A network under DistributedDataParallel that notes how long it works, and how long it waits.

    The work ends and the wait begins where its last gradient is there, the stem's.
    """

    def __init__(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
        self.worked: list[float] = []  # seconds of this thread, forward and backward
        self.waited: list[float] = []
        self.images, self.labels = data
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        stem.weight.register_post_accumulate_grad_hook(self._wait)
        self.wrapped = DistributedDataParallel(model.train())

    def step(self, number: int) -> None:
        self._start = thread_time()
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.wrapped(self.images), self.labels).backward()
        self.optimizer.step()

    def _wait(self, parameter: Tensor) -> None:
        self.worked.append(thread_time() - self._start)
        start = perf_counter()
        dist.barrier()
        self.waited.append(perf_counter() - start)


def contenders(network: Network, rate: float, distribution: str) -> dict[str, Contender]:
    """The plain network and one for each way to draw: their weights share the memory."""
    torch.manual_seed(0)
    plain = network.make()
    data = network.data(1 + dist.get_rank())
    found = {}
    for name, draw in DRAWS.items():
        model = copy.deepcopy(plain)
        for mine, its in zip(plain.parameters(), model.parameters(), strict=True):
            its.data = mine.data  # a parameter of its own, which another reducer can wait for
        sd.apply_stochastic_depth(model, rate, distribution, example_inputs=data[0][:2], draw=draw)
        found[name] = Contender(model, data)
    return {"plain": Contender(plain, data), **found}


def measured_case(network: Network, rate: float, distribution: str, steps: int) -> dict[str, Any]:
    """The ranks' steps, in turns; the same on each rank."""
    found = contenders(network, rate, distribution)
    seconds = take_turns({name: contender.step for name, contender in found.items()}, steps)
    mine = {
        name: np.array([seconds[name], contender.waited[-steps:], contender.worked[-steps:]])
        for name, contender in found.items()
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    step, waited, worked = (
        {name: np.stack([rank[name][part] for rank in gathered]) for name in found}
        for part in range(3)
    )
    results: dict[str, Any] = {"batch_per_rank": network.batch, "steps": steps}
    for name in found:
        mean = step[name].mean(axis=0)
        calm = mean[mean <= 2 * np.median(mean)]
        results[name] = {
            "images_per_second": float(len(gathered) * network.batch / calm.mean()),
            "to_plain": ratio(mean, step["plain"].mean(axis=0)),
            "waiting": ratio(waited[name].mean(axis=0), mean),
            "slowest_over_mean": ratio(worked[name].max(axis=0), worked[name].mean(axis=0)),
            "work_to_plain": ratio(worked[name].mean(axis=0), worked["plain"].mean(axis=0)),
        }
    return results


def as_rank(file: Path, steps: int) -> None:
    """What each process does; the first writes the file."""
    dist.init_process_group("gloo")
    results = {
        f"{name}, {label}": measured_case(network, *RATES[label], steps)
        for (name, network), label in itertools.product(NETWORKS.items(), RATES)
    }
    if dist.get_rank() == 0:
        file.write_text(json.dumps(results, default=asdict))
    dist.destroy_process_group()


def measured(*, quick: bool) -> dict[str, Any]:
    """Launches the processes, and reads what they found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(PROCESSES), __file__, *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "measured.json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--as-rank", str(file)], env=environment, check=True)
        results: dict[str, Any] = json.loads(file.read_text())
    return results


# Shown -------------------------------------------------------------------------------------------


def draw_picture(cases: dict[str, dict[str, Any]], file: Path) -> None:
    """A panel for each network and rate, a line for each way to draw."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(len(NETWORKS), len(RATES), sharex=True, sharey=True)
    styles = {"balanced, equal costs": {"linestyle": ":", "color": "black", "marker": ""}}
    for axes, (case, found) in zip(panels.flat, cases.items(), strict=True):
        for name, line in found["slowest_over_mean"].items():
            values = [point.value for point in line]
            axes.plot(found["ranks"], values, label=name, **{"marker": "."} | styles.get(name, {}))
        axes.axhline(TARGET, color="gray", linewidth=0.8, label="target")
        axes.set_title(case, fontsize="medium")
        axes.set_xscale("log", base=2)
        axes.set_xticks(WORLDS, [f"{ranks:,}" for ranks in WORLDS], rotation=45)
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("ranks")
    for axes in panels[:, 0]:
        axes.set_ylabel("slowest rank over mean")
    panels[0, 0].legend()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=120)


def show_simulated(case: str, found: dict[str, Any]) -> None:
    """The ends of the simulated lines."""
    print(f"{case}: {found['dropped_blocks']:.4g} blocks dropped on average", flush=True)
    for name, line in found["slowest_over_mean"].items():
        left = found["saving_left_at_most_ranks"][name]
        print(
            f"  {name}: 2 ranks {line[0]}, {WORLDS[-1]:,} ranks {line[-1]}, "
            f"where {left:.0%} of the saving is left",
            flush=True,
        )


def show_measured(case: str, found: dict[str, Any]) -> None:
    """What the two processes found."""
    print(f"{case}, {PROCESSES} processes, {found['steps']} steps")
    for name in ("plain", *DRAWS):
        speed = found[name]["images_per_second"]
        ratios = {key: Ratio(**value) for key, value in found[name].items() if value is not speed}
        shown = ", ".join(f"{key} {value}" for key, value in ratios.items())
        print(f"  {name}: {speed:.1f} images/s, {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Slowest rank over mean.")
    parser.add_argument("--quick", action="store_true", help="a few steps; nothing is written")
    parser.add_argument("--as-rank", type=Path, help="used by the script itself")
    options = parser.parse_args()
    amounts = QUICK if options.quick else Amounts()
    torch.set_num_threads(1)
    if options.as_rank:
        as_rank(options.as_rank, amounts.measured)
        return
    costs, cases = simulate(amounts)
    on_processes = measured(quick=options.quick)
    for case, found in on_processes.items():
        show_measured(case, found)
    if not options.quick:
        draw_picture(cases, PICTURE)
        print(write("ranks", {"costs": costs, "simulated": cases, "measured": on_processes}))


if __name__ == "__main__":
    main()
