"""What each rank does for `test_sharded.py`: train under `fully_shard` and compare.

Ranks draw the same blocks, so a block that is skipped is skipped everywhere: its weights are not
even gathered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import stochastic_depth as sd
from ddp_cases import NETWORKS, averaged, containers, same
from networks import settled
from processes import report


def shard(model: nn.Module) -> None:
    for stage in containers(model):
        for block in stage:
            fully_shard(block)
    fully_shard(model)


def gradients_are_as_by_hand(network: str) -> None:
    maker, shape = NETWORKS[network]
    model = settled(maker)
    depth = sd.apply_stochastic_depth(
        model, [0.3, 0.5, 0.6, 0.7, 0.8, 0.9], example_inputs=torch.randn(shape)
    )
    alone = copy.deepcopy(model)
    shard(model)
    skipped = 0
    for step in range(4):
        torch.manual_seed(100 * step + dist.get_rank())
        batch = torch.randn(shape)
        for net in (model, alone):
            net.zero_grad()
            net.train()(batch).square().mean().backward()
        skipped += sum(not kept for kept in depth.last_gates.values())
        expected = averaged(alone)
        for name, parameter in model.named_parameters():
            gradient: Any = parameter.grad
            full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            assert same(full, expected[name]), f"step {step}, {name}"
    assert skipped


def what_is_not_supported_is_refused() -> None:
    maker, shape = NETWORKS["pre-norm"]
    x = torch.randn(shape)
    different = sd.Draw(across_ranks="different")
    for options in ({"draw": different}, {"mode": "sample"}):
        model = settled(maker)
        sd.apply_stochastic_depth(model, 0.2, example_inputs=x, **options)
        shard(model)
        with pytest.raises(sd.NotYetSupportedError, match="fully_shard"):
            model.train()(x)
    model = settled(maker)
    shard(model)
    with pytest.raises(sd.NotYetSupportedError, match="fully_shard"):
        sd.apply_stochastic_depth(model, 0.2, example_inputs=x)


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {
        network: partial(gradients_are_as_by_hand, network) for network in NETWORKS
    }
    return {**found, "refusals": what_is_not_supported_is_refused}


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(cases)
