"""The same ResNet-50 under the same draws: plain, Composer's block mode, ours. Needs mosaicml.

    python benchmarks/beside_composer.py   # in an environment with mosaicml (torch < 2.7.1)

The networks share their parameters and the optimizer. Each case runs in several new processes, and
Composer's network takes part twice: how far its two ratios to each other are from 1 is the noise.
"""

from __future__ import annotations

import importlib.metadata
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from composer.algorithms.stochastic_depth.stochastic_depth import (
    apply_stochastic_depth as composer_apply,
)
from numpy.typing import NDArray

import stochastic_depth as sd
from interleaved import Draws, ratio, sharing, take_turns, write
from saving import CASES, training_step

PROCESSES, STEPS, WARMUP = 5, 40, 2


def seconds_of_steps(name: str, process: int) -> dict[str, NDArray[np.float64]]:
    """Seconds of each network at each step."""
    case = CASES[name]
    torch.manual_seed(process)
    number, size = case.images
    images, labels = torch.randn(number, 3, size, size), torch.randint(0, 10, (number,))
    plain = case.make()
    ours, theirs, again = sharing(plain), sharing(plain), sharing(plain)
    draw = sd.Draw(seed=process)  # other draws in each process
    depth = sd.apply_stochastic_depth(ours, case.drop_rate, example_inputs=images[:2], draw=draw)
    for model in (theirs, again):
        composer_apply(model, "ResNetBottleneck", "block", case.drop_rate, "linear")
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)

    draws = Draws(depth, WARMUP + STEPS)
    dropped = draws.dropped(ours.train(), images[:2])

    def prepare(step: int) -> None:
        draws.begin(step)
        for model in (theirs, again):
            for block in depth.blocks:
                # They keep a block where bernoulli(1 - drop_rate) is 1.
                module: Any = model.get_submodule(block.name)
                module.drop_rate = torch.tensor(float(block.name in dropped[step]))

    variants = {"plain": plain, "ours": ours, "theirs": theirs, "again": again}
    steps = {
        name: training_step(model, optimizer, images, labels) for name, model in variants.items()
    }
    return take_turns(steps, STEPS, warmup=WARMUP, seed=process, prepare=prepare)


def measure(name: str) -> dict[str, Any]:
    """Ratios of step times over all processes, with their intervals."""
    fresh = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with fresh as pool:
        parts = list(pool.map(seconds_of_steps, [name] * PROCESSES, range(PROCESSES)))
    seconds = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return {
        "processes": PROCESSES,
        "steps_in_each": STEPS,
        "ours_to_plain": ratio(seconds["ours"], seconds["plain"]),
        "composer_to_plain": ratio(seconds["theirs"], seconds["plain"]),
        "composer_again_to_composer": ratio(seconds["again"], seconds["theirs"]),
        "ours_to_composer": ratio(2 * seconds["ours"], seconds["theirs"] + seconds["again"]),
    }


def main() -> None:
    results: dict[str, Any] = {"mosaicml": importlib.metadata.version("mosaicml")}
    for name in ("resnet50-0.2", "resnet50-0.5"):
        results[name] = measure(name)
        print(name, {key: str(value) for key, value in results[name].items()}, flush=True)
    print(write("beside_composer", results))


if __name__ == "__main__":
    main()
