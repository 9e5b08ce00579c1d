"""What each process of `distributed.py` does; the first writes what they found."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd
from interleaved import Step, ratio, take_turns

BATCH, WIDTH, DEPTH = 8, 256, 12
CHECKS = 400


def transformer() -> nn.Module:
    """Nine million parameters in blocks of 0.8 million."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model: nn.Module = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=4, num_classes=10
    )
    return model


def trained(model: nn.Module) -> Step:
    """A training step without its optimizer's, which is the same for all."""
    torch.manual_seed(1 + dist.get_rank())
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))

    def step(number: int) -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()

    return step


def data_parallel(steps: int) -> dict[str, Any]:
    """Step times under DistributedDataParallel, in turns; the networks share their weights."""
    plain = transformer().train()

    def wrapped(drop_rate: float | None, *, find_unused: bool) -> Step:
        model = copy.deepcopy(plain)
        for mine, its in zip(plain.parameters(), model.parameters(), strict=True):
            its.data = mine.data
        if drop_rate is not None:
            sd.apply_stochastic_depth(
                model, drop_rate, "uniform", example_inputs=torch.randn(2, 3, 32, 32)
            )
        ddp = DistributedDataParallel(model, find_unused_parameters=find_unused)
        return trained(ddp)

    variants = {
        "plain": wrapped(None, find_unused=False),
        "plain, find unused": wrapped(None, find_unused=True),
        "gated, rate 0": wrapped(0.0, find_unused=False),
        "gated, rate 0.5": wrapped(0.5, find_unused=False),
        "gated, rate 0.5, find unused": wrapped(0.5, find_unused=True),
    }
    seconds = gathered(take_turns(variants, steps))
    return {
        "find_unused_to_plain": ratio(seconds["plain, find unused"], seconds["plain"]),
        "rate_0_to_plain": ratio(seconds["gated, rate 0"], seconds["plain"]),
        "rate_half_to_plain": ratio(seconds["gated, rate 0.5"], seconds["plain"]),
        "rate_half_to_find_unused": ratio(
            seconds["gated, rate 0.5"], seconds["gated, rate 0.5, find unused"]
        ),
    }


def sharded(steps: int) -> dict[str, Any]:
    """Bytes and step times under `fully_shard`, with every second block skipped and without."""
    model = transformer().train()
    depth = sd.apply_stochastic_depth(
        model, 0.5, "uniform", example_inputs=torch.randn(2, 3, 32, 32)
    )
    plain = copy.deepcopy(model)
    sd.get_stochastic_depth(plain).remove()
    blocks: Any
    for net in (model, plain):
        blocks = net.get_submodule("blocks")
        for block in blocks:
            fully_shard(block)
        fully_shard(net)
    step = trained(model)
    half = dict.fromkeys([block.name for block in depth.blocks][::2], False)

    def fixed(gates: dict[str, bool]) -> Step:
        def run(number: int) -> None:
            with depth.fixed(gates):
                step(number)

        return run

    variants = {"plain": trained(plain), "all": fixed({}), "half": fixed(half)}
    sent = {}
    for name, variant in variants.items():
        variant(0)
        with traffic() as counts:
            variant(0)
        sent[name] = dict(counts)
    seconds = gathered(take_turns(variants, steps))
    return {
        "mebibytes": sent,
        "all_to_plain": ratio(seconds["all"], seconds["plain"]),
        "half_to_plain": ratio(seconds["half"], seconds["plain"]),
    }


def check() -> dict[str, float]:
    """Milliseconds for ranks to compare what they draw from: 16 bytes on the CPU, in a forward."""
    numbers = torch.zeros(2, dtype=torch.int64)
    found = []
    for _ in range(CHECKS):
        start = time.perf_counter()
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        found.append(1000 * (time.perf_counter() - start))
    half, most = np.quantile(found, (0.5, 0.95))
    return {"median_milliseconds": float(half), "95%_milliseconds": float(most)}


@contextmanager
def traffic() -> Iterator[dict[str, float]]:
    """Counts the mebibytes of weights that are gathered, and of gradients that are reduced."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    group: Any = _fsdp_param_group
    counts = {"gathered": 0.0, "reduced": 0.0}

    def counted(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            counts[kind] += sum(p._orig_size.numel() for p in parameters) * 4 / 2**20
            return original(parameters, *args, **kwargs)

        return run

    with (
        patch.object(group, "foreach_all_gather", counted("gathered", group.foreach_all_gather)),
        patch.object(group, "foreach_reduce", counted("reduced", group.foreach_reduce)),
    ):
        yield counts


def gathered(seconds: dict[str, Any]) -> dict[str, Any]:
    """The mean over the ranks of each step."""
    everybodys: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, seconds)
    return {name: np.mean([own[name] for own in everybodys], axis=0) for name in seconds}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps = int(sys.argv[2])
    results = {"data parallel": data_parallel(steps), "sharded": sharded(steps), "check": check()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results, default=asdict))
    dist.barrier()
    dist.destroy_process_group()
