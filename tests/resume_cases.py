"""What each rank does for `test_resume_on_ranks.py`: train, save in the middle, resume, compare.

A run in one go, and one in two pieces between which everything goes through files.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd
from networks import assert_same, batch, make
from processes import report

dcp: Any = torch.distributed.checkpoint
TOTAL, ACCUMULATION = 10, 2
CUTS = {"between steps": 4, "in a step": 5, "before the first step": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "same": {"draw": sd.Draw(seed=3)},
    "different": {"draw": sd.Draw(seed=3, across_ranks="different"), "unit": "branch"},
    "balanced": {"draw": sd.Draw(seed=3, across_ranks="different", sampling="balanced")},
    "rows": {"draw": sd.Draw(seed=3), "mode": "sample"},
    "same rows": {"draw": sd.Draw(seed=3, across_ranks="same"), "mode": "sample"},
}
SAME = ("same", "same rows")


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Run:
    """A training run that can be cut at any microbatch."""

    def __init__(self, network: str, options: str, *, clock: bool = True) -> None:
        self.model, self.example = make(network)
        schedule = sd.linear_warmup(3) if clock else None
        self.depth = sd.apply_stochastic_depth(
            self.model,
            [0.3, 0.5, 0.6, 0.7, 0.9, 0.9],
            example_inputs=self.example,
            schedule=schedule,
            **OPTIONS[options],
        )
        several = dist.is_initialized()
        self.net = DistributedDataParallel(self.model) if several else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        if clock:
            self.depth.follow(self.optimizer)
        self.gates: list[Any] = []

    def microbatches(self, numbers: range) -> None:
        rank, ranks = place()
        self.net.train()
        for number in numbers:
            last = (number + 1) % ACCUMULATION == 0
            quiet = nullcontext() if last or ranks == 1 else self.net.no_sync()
            with quiet:
                self.net(batch(self.example, ranks * number + rank)).square().mean().backward()
            self.gates.append(self.depth.last_gates)
            if last:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def own(self) -> dict[str, Tensor]:
        """What each rank has of its own: gradients not yet reduced, statistics of its batches."""
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        have = {**gradients, **dict(self.model.named_buffers())}
        return {f"{place()[0]}: {name}": tensor for name, tensor in have.items()}

    def take(self, own: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.grad = own.get(f"{place()[0]}: {name}")
        for name, buffer in self.model.named_buffers():
            buffer.copy_(own.get(f"{place()[0]}: {name}", buffer))


def save_by_torch(run: Run, folder: Path) -> None:
    parts = {"model": run.model, "optimizer": run.optimizer, "depth": run.depth}
    if place()[0] == 0:
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "state.pt")
    torch.save(run.own(), folder / f"own {place()[0]}.pt")


def load_by_torch(run: Run, folder: Path) -> None:
    state = torch.load(folder / "state.pt", weights_only=True)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.depth.load_state_dict(state["depth"])
    run.take(torch.load(folder / f"own {place()[0]}.pt", weights_only=True))


def save_distributed(run: Run, folder: Path) -> None:
    model, optimizer = get_state_dict(run.net, run.optimizer)
    parts = {"model": model, "optimizer": optimizer, "depth": run.depth}
    dcp.save({**parts, "own": run.own()}, checkpoint_id=folder)


def load_distributed(run: Run, folder: Path) -> None:
    """A block that has not run yet has no optimizer state, there as here."""
    model, state = get_state_dict(run.net, run.optimizer)
    optimizer: Any = state
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name in list(optimizer["state"]):
        if f"optimizer.state.{name}.step" not in saved:
            del optimizer["state"][name]
    own = {
        key: torch.empty_like(tensor)
        for name, tensor in [*run.model.named_parameters(), *run.model.named_buffers()]
        if f"own.{(key := f'{place()[0]}: {name}')}" in saved
    }
    depth = run.depth.state_dict()
    parts: Any = {"model": model, "optimizer": optimizer, "depth": depth, "own": own}
    dcp.load(parts, checkpoint_id=folder)
    options = StateDictOptions(strict=False)
    set_state_dict(
        run.net, run.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options
    )
    run.take(own)
    run.depth.load_state_dict(parts["depth"])  # last: the others step a new optimizer once


WAYS = {
    "torch.save": (save_by_torch, load_by_torch),
    "torch.distributed.checkpoint": (save_distributed, load_distributed),
}


@functools.cache
def in_one_go(network: str, options: str, clock: bool) -> Run:
    run = Run(network, options, clock=clock)
    run.microbatches(range(TOTAL))
    return run


def ends_alike(network: str, options: str, cut: int, way: str, *, clock: bool = True) -> None:
    save, load = WAYS[way]
    whole = in_one_go(network, options, clock)
    first = Run(network, options, clock=clock)
    first.microbatches(range(cut))
    folder = Path(sys.argv[1], f"{network}, {options}, {cut}, {way}, {clock}")
    folder.mkdir(exist_ok=True)
    save(first, folder)
    if dist.is_initialized():
        dist.barrier()
    second = Run(network, options, clock=clock)
    load(second, folder)
    second.microbatches(range(cut, TOTAL))
    assert first.gates + second.gates == whole.gates
    assert len({str(gates) for gates in whole.gates}) > TOTAL // 2
    assert second.depth.state_dict() == whole.depth.state_dict()
    assert_same(second.model, whole.model)


def leaves_something_to_others(network: str, options: str) -> None:
    """A checkpoint in the middle, and the gates of the run that went on."""
    run = Run(network, options)
    run.microbatches(range(CUTS["in a step"]))
    folder = Path(sys.argv[1], f"{network}, {options}, for others")
    save_distributed(run, folder)
    run.microbatches(range(CUTS["in a step"], TOTAL))
    if place()[0] == 0:
        torch.save(run.gates[CUTS["in a step"] :], folder / "gates")


def draws_as_the_others(network: str, options: str, among: Path | None = None) -> None:
    """What another number of ranks left, resumed on this one."""
    folder = Path(among or sys.argv[1], f"{network}, {options}, for others")
    run = Run(network, options)
    load_distributed(run, folder)
    run.microbatches(range(CUTS["in a step"], TOTAL))
    assert run.gates == torch.load(folder / "gates", weights_only=True)


def cases(ranks: int) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for network, options in itertools.product(("resnet", "explicit"), SAME):
        other = leaves_something_to_others if ranks == 2 else draws_as_the_others
        found[f"{network}, {options}, elsewhere"] = partial(other, network, options)
    if ranks != 2:
        return found
    for way in WAYS:
        for options in OPTIONS:
            case = partial(ends_alike, "resnet", options, CUTS["in a step"], way)
            found[f"resnet, {options}, in a step, {way}"] = case
        for network, when in zip(("pre-norm", "post-norm", "explicit"), CUTS, strict=True):
            case = partial(ends_alike, network, "different", CUTS[when], way)
            found[f"{network}, different, {when}, {way}"] = case
        alone = partial(ends_alike, "resnet", "same", CUTS["in a step"], way, clock=False)
        found[f"resnet, nobody steps the clock, {way}"] = alone
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(lambda: cases(dist.get_world_size()))
