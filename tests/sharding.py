"""Networks sharded by `fully_shard`, trained beside themselves on one process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import stochastic_depth as sd
from ddp_cases import NETWORKS, averaged, containers, same
from networks import settled

RATES = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
LOWER_RATES = [0.2, 0.3, 0.4, 0.5, 0.5, 0.5]  # each rank keeps rows of each block
STEPS = 3


@dataclass(frozen=True)
class Setup:
    """How the network is sharded and trained."""

    reshard: bool = True
    microbatches: int = 1
    synced: bool = True  # whether each microbatch is reduced, or the last one alone
    root_alone: bool = False  # one unit for everything
    checkpoint: bool = False
    wrapped_last: bool = False  # in checkpoints, between stochastic depth and shards
    hybrid: bool = False  # copies of shards (HSDP), on four ranks
    on_meta: bool = False
    tried_before: bool = False  # called between stochastic depth and shards


SETUPS = {
    "plain": Setup(),
    "kept gathered": Setup(reshard=False),
    "accumulated": Setup(microbatches=3),
    "accumulated without reduction": Setup(microbatches=2, synced=False),
    "one unit": Setup(root_alone=True),
    "checkpoint": Setup(checkpoint=True),
    "checkpoint, accumulated": Setup(checkpoint=True, microbatches=2),
    "checkpoint last": Setup(wrapped_last=True),
    "from meta": Setup(on_meta=True),
}
DRAWS: dict[str, dict[str, Any]] = {
    "same": {},
    "balanced": {"draw": sd.Draw(sampling="balanced")},
    "branch": {"unit": "branch"},
    "rows": {"mode": "sample", "draw": sd.Draw(seed=2)},
    "rows, branch": {"mode": "sample", "unit": "branch", "draw": sd.Draw()},
}


def blocks_of(model: Any) -> list[nn.Module]:
    return [block for stage in containers(model) for block in stage]


def shard(model: nn.Module, setup: Setup = Setup(), **options: Any) -> None:
    mesh = None
    if setup.hybrid:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    options = {**options, "reshard_after_forward": setup.reshard, "mesh": mesh}
    units: list[Any] = [] if setup.root_alone else blocks_of(model)
    for unit in [*units, model]:
        fully_shard(unit, **options)


def checkpointed(model: nn.Module) -> None:
    for stage in containers(model):
        for number, block in enumerate(stage):
            stage[number] = checkpoint_wrapper(block)


def full(gradient: Any) -> Tensor | None:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def fill(model: nn.Module, source: nn.Module) -> None:
    """Give a model from the meta device, sharded by now, the weights of another."""
    model.to_empty(device=torch.get_default_device())
    with torch.no_grad():
        # In their order: names may have those of wrappers inside.
        for tensor, value in zip(
            model.state_dict().values(), source.state_dict().values(), strict=True
        ):
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            tensor.copy_(value)


def pair(
    network: str, setup: Setup, options: dict[str, Any]
) -> tuple[nn.Module, sd.StochasticDepth, nn.Module, sd.StochasticDepth, tuple[int, ...]]:
    """A sharded network and one that is whole, with the same stochastic depth."""
    maker, shape = NETWORKS[network]
    model, alone = settled(maker), settled(maker)
    if setup.on_meta:
        model = model.to("meta")
    if setup.checkpoint:
        checkpointed(model)
        checkpointed(alone)
    rates = LOWER_RATES if options.get("mode") == "sample" else RATES
    depth = sd.apply_stochastic_depth(model, rates, example_inputs=torch.randn(shape), **options)
    twin = sd.apply_stochastic_depth(alone, rates, example_inputs=torch.randn(shape), **options)
    if setup.wrapped_last:
        checkpointed(model)
        checkpointed(alone)
    if setup.tried_before:
        model.eval()(torch.randn(shape))
    shard(model, setup)
    if setup.on_meta:
        fill(model, alone)
    return model, depth, alone, twin, shape


def trained_as_alone(
    network: str,
    setup: Setup,
    options: dict[str, Any],
    patterns: Sequence[dict[str, bool]] = (),
) -> None:
    """After each step the gradients are those of the average, or none, and so are the weights."""
    model, depth, alone, twin, shape = pair(network, setup, options)
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (model, alone)
    ]
    following = [depth.follow(optimizers[0]), twin.follow(optimizers[1])]
    skipped = 0
    for step in range(STEPS):
        torch.manual_seed(100 * step + dist.get_rank())
        for optimizer in optimizers:
            optimizer.zero_grad()
        for number in range(setup.microbatches):
            batch = torch.randn(shape)
            if not setup.synced:
                assert isinstance(model, FSDPModule)
                model.set_requires_gradient_sync(number == setup.microbatches - 1)
            pattern = patterns[(step + number) % len(patterns)] if patterns else None
            for net, handle in ((model, depth), (alone, twin)):
                with handle.fixed(pattern) if pattern else nullcontext():
                    net.train()(batch).square().mean().div(setup.microbatches).backward()
            everything = True if options.get("mode") != "sample" else tuple(range(shape[0]))
            kept = depth.last_gates.values()
            skipped += pattern is not None or any(gate != everything for gate in kept)
            assert depth.last_gates == twin.last_gates
        gradients_agree(model, alone, setup, options)
        for name, parameter in alone.named_parameters():
            gradient = full(model.get_parameter(name).grad)
            parameter.grad = None if gradient is None else gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert skipped
    for each in following:
        each.remove()
    weights_agree(model, alone)


def gradients_agree(
    model: nn.Module, alone: nn.Module, setup: Setup, options: dict[str, Any]
) -> None:
    """The sharded network's are the average of what the ranks have alone, or none."""
    differ = options.get("mode") == "sample"
    rounded = setup.microbatches > 1 or setup.hybrid  # sums of more than two, in any order
    expected = averaged(alone)
    for name, parameter in model.named_parameters():
        ours, theirs = full(parameter.grad), expected[name]
        if differ and theirs is None and ours is not None:
            assert not ours.any()  # for all that this rank knows another may have run it
        elif rounded and ours is not None and theirs is not None:
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6), name
        else:
            assert same(ours, theirs), f"{name}: {ours} instead of {theirs}"


def weights_agree(model: nn.Module, alone: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(full(parameter.detach()), alone.get_parameter(name)), name  # type: ignore[arg-type]
