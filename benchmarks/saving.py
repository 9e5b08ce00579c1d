"""What skipping saves: against the plain network, and against the physically shortened one.

    export PYTHONPATH=examples                  # from a checkout
    python benchmarks/saving.py                 # all cases, some fifteen minutes on two cores
    python benchmarks/saving.py resnet50-0.5    # some of them; nothing is written

The shortened network has the blocks that the draw closed taken out, step by step, with the same
draws. It is the most that can be saved, so the ratio to it (target: 1.02) is the price of gating.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from imagelib.cifar_resnet import CifarResNet
from imagelib.shortened import can_be_taken_out, taken_out
from interleaved import Step, operations, peak_mebibytes, ratio, sharing, take_turns, write
from stochastic_depth.draw import uniform


@dataclass(frozen=True)
class Case:
    """A network and how it is trained."""

    make: Callable[[], nn.Module]
    images: tuple[int, int]  # how many, how large
    on_a_gpu: tuple[int, int]  # the same there
    drop_rate: float
    distribution: str
    steps: int


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


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Callable[[], None]:
    """Forward, backward and the optimizer's step."""
    model.train()

    def step() -> None:
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
        gated, case.drop_rate, case.distribution, example_inputs=images[:2]
    )
    assert can_be_taken_out(shortened, gated, depth, images[:2]), "not the same network"
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)
    run_plain, run_gated, run_shortened = (
        training_step(model, optimizer, images, labels) for model in (plain, gated, shortened)
    )

    def closed(step: int) -> list[str]:
        return [
            block.name
            for block in depth.blocks
            if uniform(0, step, (0,), block.name) < block.drop_rate
        ]

    def gated_step(step: int) -> None:
        depth.load_state_dict({**depth.state_dict(), "step": step, "calls": {}})
        run_gated()

    def shortened_step(step: int) -> None:
        with taken_out(shortened, closed(step)):
            run_shortened()

    variants: dict[str, Step] = {
        "plain": lambda step: run_plain(),
        "gated": gated_step,
        "shortened": shortened_step,
    }
    seconds = take_turns(variants, case.steps)
    assert set(closed(case.steps + 1)) == {n for n, kept in depth.last_gates.items() if not kept}
    return {
        "batch": number,
        "pixels": size,
        "drop_rate": case.drop_rate,
        "distribution": case.distribution,
        "steps": case.steps,
        "seconds_plain": float(statistics.median(seconds["plain"])),
        "to_plain": ratio(seconds["gated"], seconds["plain"]),
        "shortened_to_plain": ratio(seconds["shortened"], seconds["plain"]),
        "to_shortened": ratio(seconds["gated"], seconds["shortened"]),
        **_work(variants, range(5)),
    }


def _work(variants: dict[str, Step], steps: Sequence[int]) -> dict[str, Any]:
    """Dispatched operations beyond the shortened network's, and peak memory, over some draws."""
    extra: dict[str, list[int]] = {}
    for step in steps:
        ours, least = (operations(variants[name], step) for name in ("gated", "shortened"))
        for name in ours | least:
            if difference := ours.get(name, 0) - least.get(name, 0):
                extra.setdefault(name, []).append(difference)
    totals = [sum(operations(variants["shortened"], step).values()) for step in steps]
    memory = {
        f"peak_mebibytes_{name}": statistics.mean(peak_mebibytes(step, n) for n in steps)
        for name, step in variants.items()
    }
    return {
        "operations_shortened": statistics.mean(totals),
        "operations_more": {name: sum(counts) / len(steps) for name, counts in extra.items()},
        **memory,
    }


class Small(nn.Module):
    """A residual block that computes next to nothing, so that its gate's time shows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x.tanh())


def microseconds_per_gate() -> dict[str, float]:
    """What a gate adds to a call that is open, and what is left of a call that is closed."""
    plain = nn.Sequential(*(Small() for _ in range(100))).train()
    x = torch.randn(2, 4)
    gated = copy.deepcopy(plain)
    depth = sd.apply_stochastic_depth(gated, 0.0, "uniform", example_inputs=x)

    def best(model: nn.Module) -> float:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
        return min(times) / 100 * 1e6

    open_, alone = best(gated), best(plain)
    with depth.fixed({block.name: False for block in depth.blocks}):
        closed = best(gated)
    return {"open_more": open_ - alone, "closed_total": closed}


def main(names: Sequence[str]) -> None:
    results: dict[str, Any] = {}
    for name in names or CASES:
        results[name] = measure(CASES[name])
        print(name, {key: str(value) for key, value in results[name].items()}, flush=True)
    results["microseconds_per_gate"] = microseconds_per_gate()
    print(results["microseconds_per_gate"])
    if not names:
        print(write("saving-gpu" if torch.cuda.is_available() else "saving", results))


if __name__ == "__main__":
    main(sys.argv[1:])
