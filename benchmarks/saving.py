"""What skipping saves: against the plain network, and against the physically shortened one.

    export PYTHONPATH=examples                  # from a checkout
    python benchmarks/saving.py                 # all cases, some half an hour on two cores
    python benchmarks/saving.py resnet50-0.5    # some of them; nothing is written

The shortened network has the blocks that the draw closed taken out, step by step, with the same
draws. It is the most that can be saved, so the ratio to it (target: 1.01) is the price of gating.
With scale "train" its branches are multiplied by 1 / (1 - p), as the method demands.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from imagelib.cifar_resnet import CifarResNet
from imagelib.shortened import can_be_taken_out, taken_out
from interleaved import (
    Draws,
    Step,
    operations,
    peak_mebibytes,
    ratio,
    sharing,
    take_turns,
    write,
)

WARMUP = 2


@dataclass(frozen=True)
class Case:
    """A network and how it is trained."""

    make: Callable[[], nn.Module]
    images: tuple[int, int]  # how many, how large
    on_a_gpu: tuple[int, int]  # the same there
    drop_rate: float
    distribution: str
    steps: int
    scale: Literal["eval", "train"] = "eval"


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision.models import get_model

        return get_model(name, weights=None, num_classes=10)

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from timm import create_model

        return create_model(name, num_classes=10)

    return make


def networks_of(name: str) -> Callable[[], nn.Module]:
    """How the network of this name is made."""
    return next(case.make for key, case in CASES.items() if key.startswith(name))


CASES = {
    "resnet110-0.5": Case(lambda: CifarResNet(110), (32, 32), (128, 32), 0.5, "linear", 80),
    "resnet50-0.2": Case(_torchvision("resnet50"), (16, 96), (128, 224), 0.2, "linear", 60),
    "resnet50-0.5": Case(_torchvision("resnet50"), (16, 96), (128, 224), 0.5, "linear", 60),
    "vit_tiny-0.4": Case(_timm("vit_tiny_patch16_224"), (8, 224), (256, 224), 0.4, "uniform", 60),
}
CASES |= {f"{name}-train": replace(case, scale="train") for name, case in CASES.items()}


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Step:
    """Forward, backward and the optimizer's step; which one does not matter."""
    model.train()

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def measure(case: Case) -> dict[str, Any]:
    """One case: ratios with their intervals, operations and memory."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number, size = case.on_a_gpu if device.type == "cuda" else case.images
    images = torch.randn(number, 3, size, size, device=device)
    labels = torch.randint(0, 10, (number,), device=device)
    plain = case.make().to(device)
    gated, shortened = sharing(plain), sharing(plain)
    depth = sd.apply_stochastic_depth(
        gated, case.drop_rate, case.distribution, example_inputs=images[:2], scale=case.scale
    )
    assert can_be_taken_out(shortened, gated, depth, images[:2]), "not the same network"
    if case.scale == "train":
        scale_branches(shortened, depth, images[:2])
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)
    draws = Draws(depth, WARMUP + case.steps)
    dropped = draws.dropped(gated.train(), images[:2])
    out = ExitStack()

    def prepare(step: int) -> None:
        out.close()
        draws.begin(step)
        out.enter_context(taken_out(shortened, dropped[step]))

    with out:
        prepare(0)
        torch.testing.assert_close(gated(images), shortened.train()(images), rtol=1e-2, atol=1e-2)
        variants: dict[str, Step] = {
            name: training_step(model, optimizer, images, labels)
            for name, model in (("plain", plain), ("gated", gated), ("shortened", shortened))
        }
        seconds = take_turns(variants, case.steps, warmup=WARMUP, prepare=prepare)
        assert dropped[-1] == {n for n, kept in depth.last_gates.items() if not kept}
        work = _work(variants, range(5), prepare)
    return {
        "batch": number,
        "pixels": size,
        "drop_rate": case.drop_rate,
        "distribution": case.distribution,
        "scale": case.scale,
        "steps": case.steps,
        "seconds_plain": float(statistics.median(seconds["plain"])),
        "to_plain": ratio(seconds["gated"], seconds["plain"]),
        "shortened_to_plain": ratio(seconds["shortened"], seconds["plain"]),
        "to_shortened": ratio(seconds["gated"], seconds["shortened"]),
        **work,
    }


def scale_branches(model: nn.Module, depth: sd.StochasticDepth, example: Tensor) -> None:
    """Have a plain network multiply its branches by 1 / (1 - p), each at its last module."""
    rates = {block.name: block.drop_rate for block in depth.blocks}
    for block in sd.find_residual_blocks(model, example):
        for branch in block.branches:
            end: Any = model.get_submodule(branch.modules[-1])
            end.__class__ = _scaled(type(end), 1 / (1 - rates[block.name]))


def _scaled(kind: Any, factor: float) -> type:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return kind.forward(self, x) * factor

    return type(kind.__name__, (kind,), {"forward": forward})


def _work(variants: dict[str, Step], steps: Sequence[int], prepare: Step) -> dict[str, Any]:
    """Dispatched operations beyond the shortened network's, and peak memory, over some draws."""

    def counted(name: str, step: int) -> dict[str, int]:
        prepare(step)
        return operations(variants[name], step)

    def peak(name: str, step: int) -> float:
        prepare(step)
        return peak_mebibytes(variants[name], step)

    extra: dict[str, list[int]] = {}
    totals = []
    for step in steps:
        ours, least = counted("gated", step), counted("shortened", step)
        totals.append(sum(least.values()))
        for name in ours | least:
            if difference := ours.get(name, 0) - least.get(name, 0):
                extra.setdefault(name, []).append(difference)
    memory = {
        f"peak_mebibytes_{name}": statistics.mean(peak(name, step) for step in steps)
        for name in variants
    }
    return {
        "operations_shortened": statistics.mean(totals),
        "operations_more": {name: sum(counts) / len(steps) for name, counts in extra.items()},
        **memory,
    }


def main(names: Sequence[str]) -> None:
    results: dict[str, Any] = {}
    for name in names or CASES:
        results[name] = measure(CASES[name])
        print(name, {key: str(value) for key, value in results[name].items()}, flush=True)
    if not names:
        print(write("saving-gpu" if torch.cuda.is_available() else "saving", results))


if __name__ == "__main__":
    main(sys.argv[1:])
