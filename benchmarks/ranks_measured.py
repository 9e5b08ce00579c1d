"""Two processes under DistributedDataParallel: what each does, and how they are launched.

The wait is the time in a barrier that each rank enters when its last gradient, the stem's, is
there; slowest over mean is of the processor's seconds until then.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd
from interleaved import ratio, take_turns
from launching import launched
from ranks_cases import DRAWS, NETWORKS, RATES, Network

PROCESSES = 2


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


def measured(steps: int) -> dict[str, Any]:
    """Launches the processes, and reads what they found."""
    return launched(Path(__file__).name, PROCESSES, steps)


if __name__ == "__main__":
    torch.set_num_threads(1)
    as_rank(Path(sys.argv[1]), int(sys.argv[2]))
