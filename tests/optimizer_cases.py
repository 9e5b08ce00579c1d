"""What each rank does for `test_optimizers.py`: train with ZeroRedundancyOptimizer and compare.

The reference is the gated network itself, copied, with gradients averaged by hand and a plain
optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd
from ddp_cases import averaged
from networks import batch, make
from processes import report

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "same": {"draw": sd.Draw(seed=3)},
    "different": {"draw": sd.Draw(seed=3, across_ranks="different")},
    "rows": {"draw": sd.Draw(seed=3), "mode": "sample"},
}


def steps_as_a_plain_one(network: str, optimizer: str, options: str) -> None:
    kind, settings = OPTIMIZERS[optimizer]
    model, x = make(network)
    depth = sd.apply_stochastic_depth(
        model, [0.3, 0.5, 0.6, 0.7, 0.8, 0.9], example_inputs=x, **OPTIONS[options]
    )
    alone = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.005)
    sharing = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, **settings)
    plain = kind(alone.parameters(), **settings)
    depth.follow(sharing)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    untouched = 0
    for step in range(4):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for net, optimiser in ((wrapped, sharing), (alone, plain)):
            optimiser.zero_grad()
            net.train()(batch(x, ranks * step + rank)).square().mean().backward()
        expected = averaged(alone)
        for name, parameter in alone.named_parameters():
            parameter.grad = expected[name]
        idle = [name for name, gradient in expected.items() if gradient is None]
        sharing.step()
        plain.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, alone.get_parameter(name)), f"step {step}, {name}"
            assert name not in idle or torch.equal(parameter, before[name]), f"step {step}, {name}"
        untouched += len(idle)
    assert depth.state_dict()["step"] == 4
    assert untouched or options != "same", "nothing was dropped by all: the case shows nothing"


def cases() -> dict[str, Callable[[], None]]:
    return {
        f"{network}, {optimizer}, {options}": partial(
            steps_as_a_plain_one, network, optimizer, options
        )
        for network, optimizer in (("resnet", "SGD"), ("pre-norm", "AdamW"))
        for options in OPTIONS
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(cases)
