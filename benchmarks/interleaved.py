"""Timing variants of a training step against each other on a machine that drifts.

All variants run in one process and take turns step by step, in an order drawn anew for each step
(in a fixed one, each finds the heap as the same other left it). Networks that are compared share
their parameters: two copies of one network differ by some percent for where their memory lies
alone. A ratio is that of the total times; its 95% interval comes from a bootstrap over the steps.
"""

from __future__ import annotations

import copy
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import stochastic_depth as sd
from imagelib.machine import machine

Step = Callable[[int], object]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its 95% confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:  # of one value
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def sharing(model: nn.Module) -> nn.Module:
    """Another network with the very parameters and buffers of this one."""
    twin = copy.deepcopy(model)
    for mine, its in zip(model.modules(), twin.modules(), strict=True):
        its._parameters, its._buffers = mine._parameters, mine._buffers
    return twin


class Draws:
    """The draws of so many steps, to go back to.

    Args:
        depth: The handle of a network that has not been trained yet.
        steps: How many.
    """

    def __init__(self, depth: sd.StochasticDepth, steps: int) -> None:
        self._depth = depth
        self._states = []
        for _ in range(steps):
            self._states.append(depth.state_dict())
            depth.step()

    def begin(self, step: int) -> None:
        """Have the network draw at its next forward what it draws at this step."""
        self._depth.load_state_dict(self._states[step])

    def dropped(self, model: nn.Module, example: Tensor) -> list[frozenset[str]]:
        """The gates that each step drops in mode "batch": after a forward the handle says it.

        Args:
            model: The network in training.
            example: What to call it with: few rows will do, draws don't depend on them.
        """
        found = []
        for step in range(len(self._states)):
            self.begin(step)
            with torch.no_grad():
                model(example)
            found.append(frozenset(n for n, kept in self._depth.last_gates.items() if not kept))
        return found


def take_turns(
    variants: Mapping[str, Step],
    steps: int,
    *,
    warmup: int = 2,
    seed: int = 0,
    prepare: Step | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, NDArray[np.float64]]:
    """Seconds of each variant at each step; the same step number means the same work.

    `prepare` is called before each turn and not timed. Garbage is collected between turns only.
    """
    prepare = prepare or (lambda number: None)
    names = list(variants)
    for name in names:
        for number in range(warmup):
            prepare(number)
            variants[name](number)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(seed)
    for number in range(warmup, warmup + steps):
        for name in order.sample(names, len(names)):
            prepare(number)
            wait_for_the_device()
            with _no_garbage_collection():
                start = clock()
                variants[name](number)
                wait_for_the_device()
                seconds[name].append(clock() - start)
    return {name: np.array(values) for name, values in seconds.items()}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def typical(values: NDArray[np.float64]) -> Ratio:
    """The median of paired differences or ratios, with a bootstrap interval over the steps."""
    drawn = np.random.default_rng(0).integers(len(values), size=(4000, len(values)))
    low, high = np.quantile(np.median(values[drawn], axis=1), (0.025, 0.975))
    return Ratio(float(np.median(values)), float(low), float(high))


def ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> Ratio:
    """Of total times over the steps that nothing else held up (within twice the median pair)."""
    pairs = above + below
    calm = pairs <= 2 * np.median(pairs)
    above, below = above[calm], below[calm]
    drawn = np.random.default_rng(0).integers(len(above), size=(4000, len(above)))
    low, high = np.quantile(above[drawn].sum(1) / below[drawn].sum(1), (0.025, 0.975))
    return Ratio(float(above.sum() / below.sum()), float(low), float(high))


class CountOperations(TorchDispatchMode):
    """How often each operation is dispatched, forward and backward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def operations(step: Step, number: int) -> dict[str, int]:
    """The operations of one step."""
    with CountOperations() as counter:
        step(number)
    return counter.counts


def peak_mebibytes(step: Step, number: int) -> float:
    """The most memory that torch held during one step beyond what it held before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(number)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step(number)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [
        e["args"]
        for e in sorted(events, key=lambda e: e.get("ts", 0))
        if e.get("name") == "[memory]"
    ]
    totals = [m["Total Allocated"] for m in memory]
    return (max(totals) - (totals[0] - memory[0]["Bytes"])) / 2**20


def write(name: str, results: Any) -> Path:
    """Write a result file with the machine and versions in it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"machine": machine(), "results": results}
    path.write_text(json.dumps(content, indent=2, default=asdict) + "\n")
    return path


def wait_for_the_device() -> None:
    """Until all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
