"""What each rank does for `test_collectives_inside_of_branches.py`: modules that talk, and train.

The reference is the same network on one process, on the batches of all ranks together. In double
precision: a sum over ranks has another order than one over a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as talking
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd
from networks import WIDTH, ExplicitLayer, PostNormLayer, PreNormLayer, ResNet, Transformer, settled
from processes import report

# torch 2.6 cannot tell the shapes of a branch that talks, for an input of a new shape, and says so.
TELLS_SHAPES = not torch.__version__.startswith("2.6")
SILENT = False  # on one process nobody is talked to


class SyncedNorm(nn.BatchNorm2d):
    """Stands for `nn.SyncBatchNorm`, which refuses the CPU: statistics of the rows of all ranks."""

    group: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = x.new_tensor([x.numel() / x.shape[1]])
        sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count])
        if not SILENT:
            sums = talking.all_reduce(sums, group=self.group or dist.group.WORLD)
        mean, square = (sums[:-1] / sums[-1]).view(2, 1, -1, 1, 1)
        normed = (x - mean) / (square - mean.square() + self.eps).sqrt()
        return normed * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class Elsewhere(nn.Linear):
    """Stands for experts on other ranks: the next rank computes it, and sends it back."""

    group: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if SILENT:
            return super().forward(x)
        return self.of_neighbour(super().forward(self.of_neighbour(x, 1)), -1)

    def of_neighbour(self, x: Tensor, distance: int) -> Tensor:
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        mine = torch.stack([x * (place == rank) for place in range(ranks)])
        everyone = talking.all_reduce(mine, group=self.group or dist.group.WORLD)
        return everyone[(rank + distance) % ranks]


def with_synced_norms(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SyncedNorm(child.num_features))
        else:
            with_synced_norms(child)
    return module


def with_experts(layer: type[nn.Module]) -> nn.Module:
    network: Any = Transformer(layer)
    for each in network.layers:
        each.mlp[2] = Elsewhere(16, WIDTH)
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (lambda: with_synced_norms(ResNet()), (4, 3, 8, 8)),
    "pre-norm": (lambda: with_experts(PreNormLayer), (4, 5, 3)),
    "post-norm": (lambda: with_experts(PostNormLayer), (4, 5, 3)),
    "explicit": (lambda: with_experts(ExplicitLayer), (4, 5, 3)),
}


def gated(
    network: str, rate: Any = 0.4, *, talks_to: Any = None, **options: Any
) -> tuple[Any, Tensor, sd.StochasticDepth]:
    build, shape = NETWORKS[network]
    model: Any = settled(build).double()
    for layer in model.layers if talks_to is not None else ():
        layer.mlp[2].group = talks_to
    x = torch.randn(shape, dtype=torch.float64)
    depth = sd.apply_stochastic_depth(model, rate, "uniform", example_inputs=x, **options)
    return model, x, depth


def alone(model: nn.Module, x: Tensor) -> Tensor:
    global SILENT
    SILENT = True
    try:
        return model(x)
    finally:
        SILENT = False


def as_on_one_process(network: str, *, forced: bool = False, unit: Any = "block") -> None:
    torch.manual_seed(0)
    model, x, depth = gated(network, draw=sd.Draw(seed=3), unit=unit)
    twin = copy.deepcopy(model)
    ranks = dist.get_world_size()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.005)
    dropped = 0
    for step in range(5):
        torch.manual_seed(step)
        # The last batch is smaller: shapes that were not in the example.
        rows = 2 if step == 4 and TELLS_SHAPES else 4
        batches = torch.randn(ranks, rows, *x.shape[1:], dtype=torch.float64)
        names = [block.name for block in depth.blocks]
        gates = {name: (number + step) % 3 > 0 for number, name in enumerate(names)}
        for net, run in ((model, wrapped), (twin, partial(alone, twin))):
            net.zero_grad()
            data = batches[dist.get_rank()] if net is model else batches.flatten(0, 1)
            own = sd.get_stochastic_depth(net)
            with own.fixed(gates) if forced else nullcontext():
                run(data).square().mean().backward()
        assert depth.last_gates == sd.get_stochastic_depth(twin).last_gates
        for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            dropped += mine.grad is None
            assert (mine.grad is None) == (theirs.grad is None), f"step {step}, {name}"
            if mine.grad is not None:
                # The order of a sum; doubles have 16 digits.
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    assert dropped, "no block was dropped: the case shows nothing"


APART: dict[str, dict[str, Any]] = {
    "different": {"draw": sd.Draw(across_ranks="different")},
    "balanced": {"draw": sd.Draw(across_ranks="different", sampling="balanced")},
    "sample": {"mode": "sample"},
    "sample, same rows": {"mode": "sample", "draw": sd.Draw(across_ranks="same")},
}


def some_steps(model: nn.Module, x: Tensor) -> None:
    for _ in range(4):
        model.train()(x).sum().backward()


def is_refused(network: str, options: Mapping[str, Any]) -> None:
    """At the first training forward, before anything is sent; inference goes on."""
    model, x, depth = gated(network, 0.2, **options)
    for run in (model, DistributedDataParallel(model)):
        with pytest.raises(sd.SetupError, match=r"would wait forever.*across_ranks=\"same\""):
            some_steps(run, x)  # until this rank runs one
    model.eval()(x)
    with depth.disabled():  # every rank runs everything
        model.train()(x)


def synchronised_is_refused_on_every_rank(options: Mapping[str, Any]) -> None:
    """Also where this rank drops the block, and on a rank that drops them all."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(settled(ResNet))
    x = torch.randn(4, 3, 8, 8)
    sd.apply_stochastic_depth(model, 0.99, "uniform", example_inputs=x, **options)
    with pytest.raises(sd.SetupError, match=r'"stages.0.0" holds SyncBatchNorm "stages.0.0.bn2"'):
        model.stages.train()(torch.randn(4, 8, 8, 8))
    model.eval()(x)


def what_never_drops_may_talk() -> None:
    model, x, _ = gated("pre-norm", 0.0, draw=sd.Draw(across_ranks="different"))
    model.train()(x).sum().backward()


def who_draws_alike_may_talk() -> None:
    """Draws differ among all ranks, or (tensor parallelism) there is one part of the data alone."""
    singles = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    single = singles[dist.get_rank()]
    for drawing, talks_to, refused in (
        (None, single, False),
        (None, None, True),
        (single, None, False),
    ):
        draw = sd.Draw(seed=3, across_ranks="different", process_group=drawing)
        model, x, _ = gated("pre-norm", 0.4, talks_to=talks_to, draw=draw)
        with pytest.raises(sd.SetupError) if refused else nullcontext():
            some_steps(model, x)


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for network in NETWORKS:
        found[network] = partial(as_on_one_process, network)
        found[f"{network}, by branch"] = partial(as_on_one_process, network, unit="branch")
        found[f"{network}, forced"] = partial(as_on_one_process, network, forced=True)
        found[f"{network}, different"] = partial(is_refused, network, APART["different"])
    for name, options in APART.items():
        found[f"resnet, {name}"] = partial(is_refused, "resnet", options)
        found[f"SyncBatchNorm, {name}"] = partial(synchronised_is_refused_on_every_rank, options)
    singles = (
        what_never_drops_may_talk,
        who_draws_alike_may_talk,
    )
    return {**found, **{case.__name__.replace("_", " "): case for case in singles}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(cases)
