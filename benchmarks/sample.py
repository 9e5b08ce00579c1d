"""Mode "sample": what dropping examples saves, beside the ways that others have.

    export PYTHONPATH=examples                # from a checkout
    python benchmarks/sample.py               # all cases, some half an hour on two cores
    python benchmarks/sample.py vit-uniform   # some of them; nothing is written

*Possible* is the plain step less what the blocks take on all rows, plus what they take on the kept
number of rows: every block is timed alone, forward and backward, for each number of rows that was
drawn. *Share* is the part of that saving which a way really saves.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import stochastic_depth as sd
from interleaved import (
    Draws,
    Ratio,
    Step,
    peak_mebibytes,
    ratio,
    sharing,
    take_turns,
    wait_for_the_device,
    write,
)
from row_dropping import DINO, TIMM, TORCHVISION, drop_rows
from saving import training_step

Unit = Literal["block", "branch"]
WARMUP = 8  # kernels for other numbers of rows are made at first use


@dataclass(frozen=True)
class Case:
    """A network and how it is trained."""

    network: str  # "library:name"
    images: tuple[int, int]  # how many, how large
    on_a_gpu: tuple[int, int]  # the same there
    drop_rate: float
    distribution: str
    others: tuple[str, ...]  # whose ways it is set beside
    channels_last: bool = False
    units: tuple[Unit, ...] = ("block",)
    steps: int = 16


VIT = "timm:vit_tiny_patch16_224"
CONVNEXT = "timm:convnext_atto"
CASES = {
    "vit-linear": Case(
        VIT, (16, 224), (256, 224), 0.4, "linear", (TIMM, DINO), units=("block", "branch"), steps=48
    ),
    "vit-uniform": Case(
        VIT,
        (16, 224),
        (256, 224),
        0.4,
        "uniform",
        (TIMM, DINO),
        units=("block", "branch"),
        steps=48,
    ),
    "convnext-linear": Case(CONVNEXT, (16, 224), (256, 224), 0.4, "linear", (TIMM,), steps=80),
    "convnext-128px": Case(CONVNEXT, (16, 128), (256, 128), 0.4, "linear", (TIMM,), steps=80),
    "resnet50-linear": Case(
        "torchvision:resnet50",
        (32, 96),
        (128, 224),
        0.5,
        "linear",
        (TORCHVISION,),
        channels_last=True,
        steps=30,
    ),
}


def network(case: Case) -> nn.Module:
    library, name = case.network.split(":")
    if library == "timm":
        from timm import create_model

        return create_model(name, num_classes=10)
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=10)


def measure(case: Case) -> dict[str, Any]:
    """One case: ratios to the plain network, and shares of the possible saving."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number, size = case.on_a_gpu if device.type == "cuda" else case.images
    images = torch.randn(number, 3, size, size, device=device)
    labels = torch.randint(0, 10, (number,), device=device)
    plain = network(case).to(device)
    if case.channels_last:
        plain = plain.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)

    def run(model: nn.Module) -> Step:
        return training_step(model, optimizer, images, labels)

    variants: dict[str, Step] = {"plain": run(plain)}
    draws: list[Draws] = []
    kept: dict[str, list[dict[str, int]]] = {}  # of each step, the rows of each gate
    for unit in case.units:
        model = sharing(plain)
        depth = sd.apply_stochastic_depth(
            model,
            case.drop_rate,
            case.distribution,
            example_inputs=images[:2],
            mode="sample",
            unit=unit,
        )
        name = f"ours, unit {unit}"
        variants[name] = partial(_gated_step, depth, run(model), kept.setdefault(name, []))
        draws.append(Draws(depth, WARMUP + case.steps))
    for way in case.others:
        model = sharing(plain)
        drop_rows(model, depth, way)
        variants[way] = run(model)

    def prepare(step: int) -> None:
        for each in draws:
            each.begin(step)

    seconds = take_turns(variants, case.steps, warmup=WARMUP, prepare=prepare)
    saved = {name: possible_saving(plain, images, steps[WARMUP:]) for name, steps in kept.items()}
    found: dict[str, Any] = {}
    for name in list(variants)[1:]:
        # What others draw is not known step by step: on average it is as much.
        saving = saved.get(name, next(iter(saved.values())))
        found[name] = {
            "to_plain": ratio(seconds[name], seconds["plain"]),
            "possible_to_plain": ratio(seconds["plain"] - saving, seconds["plain"]),
            "share_of_possible": share(seconds["plain"], seconds[name], saving),
        }
    memory = {n: mean(peak_mebibytes(step, i) for i in range(3)) for n, step in variants.items()}
    return {"batch": number, "pixels": size, "ways": found, "peak_mebibytes": memory}


def _gated_step(
    depth: sd.StochasticDepth, run: Step, kept: list[dict[str, int]], number: int
) -> None:
    run(number)
    kept.append({name: len(rows) for name, rows in depth.last_gates.items()})


def possible_saving(
    plain: nn.Module, images: Tensor, kept: list[dict[str, int]]
) -> NDArray[np.float64]:
    """Of each step, the seconds between the blocks on all rows and on the kept ones."""
    batch = len(images)
    names = {gate.partition(":")[0]: gate for gate in kept[0]}
    branches = sum(gate.startswith(f"{next(iter(names))}:") for gate in kept[0]) or 1
    counts = {
        name: {step[gate] for step in kept for gate in step if gate.partition(":")[0] == name}
        for name in names
    }
    table = _seconds_of_rows(plain, images, counts)
    return np.array(
        [
            sum(
                (table[gate.partition(":")[0], batch] - table[gate.partition(":")[0], count])
                / branches
                for gate, count in step.items()
            )
            for step in kept
        ]
    )


def _seconds_of_rows(
    plain: nn.Module, images: Tensor, counts: dict[str, set[int]], *, rounds: int = 5
) -> dict[tuple[str, int], float]:
    """Seconds of each block, forward and backward, for each number of rows; 0 for none.

    A projection on the skip path runs on all rows anyway: its time does not count.
    """
    inputs: dict[str, Tensor] = {}
    hooks = [
        plain.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(name, args[0].detach())
        )
        for name in counts
    ]
    with torch.no_grad():
        plain(images)
    for hook in hooks:
        hook.remove()
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name, wanted in counts.items():
            block = plain.get_submodule(name)
            for count in random.sample(sorted({*wanted, len(images)}), len({*wanted, len(images)})):
                x = inputs[name][:count]
                taken = _seconds(block, x) - _seconds(getattr(block, "downsample", None), x)
                found.setdefault((name, count), []).append(taken)
    return {key: median(times) for key, times in found.items()}


def _seconds(module: nn.Module | None, x: Tensor) -> float:
    if module is None or not len(x):
        return 0.0
    x = x.clone().requires_grad_()
    wait_for_the_device()
    start = time.perf_counter()
    module(x).sum().backward()
    wait_for_the_device()
    taken = time.perf_counter() - start
    module.zero_grad()
    return taken


def share(
    plain: NDArray[np.float64], ours: NDArray[np.float64], saving: NDArray[np.float64]
) -> Ratio:
    """Of the steps that nothing else held up, as in `ratio`."""
    calm = plain + ours <= 1.5 * np.median(plain + ours)
    saved, saving = (plain - ours)[calm], saving[calm]
    drawn = np.random.default_rng(0).integers(len(saved), size=(4000, len(saved)))
    low, high = np.quantile(saved[drawn].sum(1) / saving[drawn].sum(1), (0.025, 0.975))
    return Ratio(float(saved.sum() / saving.sum()), float(low), float(high))


def main(names: Sequence[str]) -> None:
    results: dict[str, Any] = {}
    for name in names or CASES:
        results[name] = measure(CASES[name])
        print(name)
        for way, figures in results[name]["ways"].items():
            memory = results[name]["peak_mebibytes"]
            shown = {key: str(value) for key, value in figures.items()}
            print(f"  {way}: {shown}, memory {memory[way] / memory['plain']:.2f}", flush=True)
    if not names:
        print(write("sample-gpu" if torch.cuda.is_available() else "sample", results))


if __name__ == "__main__":
    main(sys.argv[1:])
