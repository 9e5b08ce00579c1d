"""What `depth.compile()` costs and saves: inductor, beside eager.

    export PYTHONPATH=examples                  # from a checkout
    python benchmarks/compile.py                # all cases, some quarter of an hour
    python benchmarks/compile.py vit_tiny-0.4   # some of them; nothing is written
    python benchmarks/compile.py 2              # with few steps, to try it

Twice the same comparison, in eager and compiled: the plain network, the gated one, and what could
be saved. In mode "batch" that is the shortened network of `saving.py`, in mode "sample" the blocks
on the kept rows of `sample.py`. Compiled means block by block everywhere. A *share* is the part of
the possible saving that is really saved. Before the contest come a hundred other draws, in one case
with a drop rate that rises from 0, and whatever graph is built after the first is counted.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

# Every run compiles anew: how long that takes is one of the figures.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._dynamo.utils import counters

import stochastic_depth as sd
from imagelib.shortened import can_be_taken_out, taken_out
from interleaved import Draws, Step, ratio, sharing, take_turns, wait_for_the_device, write
from sample import possible_saving, share
from saving import networks_of, training_step

WARMUP = 4  # turns that do not count
DRAWS = 100  # steps before the contest


@dataclass(frozen=True)
class Case:
    """A network and how it is trained."""

    network: str
    images: tuple[int, int]  # how many, how large
    on_a_gpu: tuple[int, int]  # the same there
    drop_rate: float
    distribution: str
    mode: Literal["batch", "sample"] = "batch"
    rising: bool = False  # before the contest the drop rate rises from 0, step by step


CASES = {
    "vit_tiny-0.4-sample": Case("vit_tiny", (16, 224), (256, 224), 0.4, "uniform", "sample"),
    "vit_tiny-0.4-sample-rising": Case(
        "vit_tiny", (16, 224), (256, 224), 0.4, "uniform", "sample", rising=True
    ),
    "vit_tiny-0.4": Case("vit_tiny", (8, 224), (256, 224), 0.4, "uniform"),
    "resnet50-0.5": Case("resnet50", (16, 96), (256, 224), 0.5, "linear"),
}


class Contest:
    """The plain, the gated and the shortened network, in eager or compiled."""

    def __init__(
        self, case: Case, plain: nn.Module, batch: Any, steps: int, *, compiled: bool
    ) -> None:
        images, _ = batch
        self.case, self.images = case, images
        self.plain, self.gated = sharing(plain), sharing(plain)
        self.depth = sd.apply_stochastic_depth(
            self.gated,
            case.drop_rate,
            case.distribution,
            example_inputs=images[:2],
            mode=case.mode,
            schedule=sd.linear_warmup(DRAWS) if case.rising else None,
        )
        self.names = [block.name for block in self.depth.blocks]
        self.draws = Draws(self.depth, DRAWS + WARMUP + steps)
        self.dropped: list[frozenset[str]] = []
        if case.mode == "batch":
            assert can_be_taken_out(self.plain, self.gated, self.depth, images[:2])
            self.dropped = self.draws.dropped(self.gated.train(), images[:2])
        self.kept: list[dict[str, int]] = []
        optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)
        self._run_plain, self._run_gated = (
            training_step(model, optimizer, *batch) for model in (self.plain, self.gated)
        )
        if compiled:
            self.depth.compile()
            for name in self.names:
                block: Any = torch.compile(self.plain.get_submodule(name), dynamic=False)
                self.plain.set_submodule(name, block)

    def gated_step(self, step: int) -> None:
        self.early_step(DRAWS + step)

    def early_step(self, step: int) -> None:
        self.draws.begin(step)
        self._run_gated(step)
        if self.case.mode == "sample":
            self.kept.append({name: len(rows) for name, rows in self.depth.last_gates.items()})

    def plain_step(self, step: int) -> None:
        self._run_plain(step)

    def shortened_step(self, step: int) -> None:
        with taken_out(self.plain, self.dropped[DRAWS + step]):
            self._run_plain(step)

    def forced_step(self, step: int, *, is_open: bool) -> None:
        with self.depth.fixed(dict.fromkeys(self.names, is_open)):
            self._run_gated(step)

    def steps(self) -> dict[str, Step]:
        found: dict[str, Step] = {
            "plain": self.plain_step,
            "gated": self.gated_step,
            "all kept": partial(self.forced_step, is_open=True),
            "all dropped": partial(self.forced_step, is_open=False),
        }
        return found | ({"shortened": self.shortened_step} if self.case.mode == "batch" else {})

    def figures(self, seconds: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
        if self.case.mode == "batch":
            saving = seconds["plain"] - seconds["shortened"]
        else:
            saving = possible_saving(self.plain, self.images, self.kept[-len(seconds["gated"]) :])
        return {
            "seconds": {name: float(statistics.median(each)) for name, each in seconds.items()},
            "to_plain": ratio(seconds["gated"], seconds["plain"]),
            "all_kept_to_plain": ratio(seconds["all kept"], seconds["plain"]),
            "share_of_possible": share(seconds["plain"], seconds["gated"], saving),
        }


def measure(case: Case, steps: int) -> dict[str, Any]:
    """One case: what there is to say of the graphs, and both contests."""
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number, size = case.on_a_gpu if device.type == "cuda" else case.images
    images = torch.randn(number, 3, size, size, device=device)
    batch = images, torch.randint(0, 10, (number,), device=device)
    plain = networks_of(case.network)().to(device)
    eager, compiled = (Contest(case, plain, batch, steps, compiled=each) for each in (False, True))
    start = time.perf_counter()
    compiled.early_step(0)
    seconds, graphs = time.perf_counter() - start, counters["stats"]["unique_graphs"]
    draws = range(1, 1 + DRAWS, 1 if steps >= 10 else 10)
    typical = _timed(compiled.early_step, draws)
    recompiled = counters["stats"]["unique_graphs"] - graphs
    variants = {f"eager {name}": step for name, step in eager.steps().items()}
    variants |= {f"compiled {name}": step for name, step in compiled.steps().items()}
    times = take_turns(variants, steps, warmup=WARMUP)
    both = {
        way: contest.figures({n: times[f"{way} {n}"] for n in contest.steps()})
        for way, contest in (("eager", eager), ("compiled", compiled))
    }
    return {
        "batch": number,
        "pixels": size,
        "steps": steps,
        "seconds_to_compile": seconds - typical,
        "graphs": graphs,
        "draws": len(draws),
        "graphs_of_later_draws": recompiled,
        **both,
        **(seconds_of_python(variants) if device.type == "cuda" else {}),
        "compiled_to_eager": ratio(times["compiled gated"], times["eager gated"]),
    }


def seconds_of_python(variants: dict[str, Step]) -> dict[str, Any]:
    """Where a GPU needs longer, a step takes as long as the GPU does; else as long as Python."""
    names = [name for name in variants if name.endswith(("plain", "all kept"))]
    return {"seconds_of_python": {name: _timed(variants[name], range(10)) for name in names}}


def _timed(step: Step, numbers: Sequence[int]) -> float:
    """The median seconds of these steps, without what a GPU is still doing then."""
    taken = []
    for number in numbers:
        wait_for_the_device()
        start = time.perf_counter()
        step(number)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main(arguments: Sequence[str]) -> None:
    steps = 16
    if arguments and arguments[0].isdigit():
        steps, arguments = int(arguments[0]), arguments[1:]
    # The plain network's blocks share one function, which torch compiles so often and no more.
    torch._dynamo.config.recompile_limit = 64
    results: dict[str, Any] = {}
    for name in arguments or CASES:
        results[name] = measure(CASES[name], steps)
        print(name, {key: str(value) for key, value in results[name].items()}, flush=True)
        if not arguments:  # after each, so that what was measured is there if the rest is cut off
            print(write("compile-gpu" if torch.cuda.is_available() else "compile", results))


if __name__ == "__main__":
    main(sys.argv[1:])
