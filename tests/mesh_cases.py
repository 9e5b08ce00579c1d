"""What each of four ranks does for `test_device_meshes.py`: copies of shards, tensor parallel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import stochastic_depth as sd
from ddp_cases import averaged
from networks import (
    WIDTH,
    ExplicitLayer,
    PostNormLayer,
    PreNormLayer,
    Transformer,
    settled,
)
from processes import report
from sharding import DRAWS, LOWER_RATES, RATES, STEPS, Setup, blocks_of, full, trained_as_alone

SHAPE = (4, 5, 3)
# `fully_shard` of torch 2.6 wants a GPU.
SHARDS_ON_THE_CPU = tuple(map(int, torch.__version__.split(".")[:2])) > (2, 6)


class Attention(nn.Module):
    """Four heads, of which each rank has some; called as `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, *same: Tensor, need_weights: bool) -> tuple[Tensor, None]:
        q, k, v = (
            part(x).unflatten(-1, (-1, WIDTH // 4)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(mixed), None


def network(layer: type[nn.Module]) -> nn.Module:
    """Of layers whose modules tensor parallel can split."""
    made: Any = settled(lambda: Transformer(layer))
    for each in made.layers:
        each.attention = settled(Attention)
    return made


@dataclass(frozen=True)
class Parallel:
    """How a network is split and drawn."""

    layer: type[nn.Module] = PreNormLayer
    unit: Literal["block", "branch"] = "block"
    mode: Literal["batch", "sample"] = "batch"
    sharded: bool = False  # over the pairs


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give each rank a part of every layer."""
    across, along = ColwiseParallel, RowwiseParallel
    for block in blocks_of(model):
        plan = {
            **{f"attention.{part}": across() for part in ("q", "k", "v")},
            "attention.out": along(),
            "mlp.0": across(),
            "mlp.2": along(),
        }
        parallelize_module(block, mesh, plan)


def trained_in_pairs(setup: Parallel) -> None:
    """Two ranks share each layer; the two pairs have data of their own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, alone = (network(setup.layer) for _ in range(2))
    draw = sd.Draw(seed=4, process_group=mesh["dp"].get_group())

    def apply(net: nn.Module) -> sd.StochasticDepth:
        return sd.apply_stochastic_depth(
            net,
            LOWER_RATES if setup.mode == "sample" else RATES,
            example_inputs=torch.randn(SHAPE),
            unit=setup.unit,
            mode=setup.mode,
            draw=draw,
        )

    depth = apply(model)
    split(model, mesh["tp"])
    twin = apply(alone)
    for unit in [*blocks_of(model), model] if setup.sharded else []:
        fully_shard(unit, mesh=mesh["dp"])
    skipped = 0
    for step in range(STEPS):
        torch.manual_seed(100 * step + mesh["dp"].get_local_rank())
        x = torch.randn(SHAPE)
        for net in (model, alone):
            net.zero_grad()
            net.train()(x).square().mean().backward()
        assert depth.last_gates == twin.last_gates
        everything = True if setup.mode == "batch" else tuple(range(SHAPE[0]))
        skipped += sum(gate != everything for gate in depth.last_gates.values())
        gradients_agree(model, alone, setup)
    assert skipped


def gradients_agree(model: nn.Module, alone: nn.Module, setup: Parallel) -> None:
    """Those of the pair, or where it is sharded, too, of all: as one process has them."""
    expected = averaged(alone)
    for name, parameter in model.named_parameters():
        own = alone.get_parameter(name).grad
        ours, theirs = full(parameter.grad), expected[name] if setup.sharded else own
        if ours is None or theirs is None:
            left = ours if ours is not None else theirs
            assert left is None or (setup.mode == "sample" and not left.any()), name
        else:  # the parts of a product are summed in another order
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), name


def draws_that_differ_within_a_pair_are_refused() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = network(PreNormLayer)
    sd.apply_stochastic_depth(model, 0.5, example_inputs=torch.randn(SHAPE), mode="sample")
    split(model, mesh)
    with pytest.raises(sd.SetupError, match=r"tensor parallel.*process_group"):
        model.train()(torch.randn(SHAPE))
    with pytest.raises(sd.SetupError, match=r"apply stochastic depth first.*parallelize_module"):
        sd.apply_stochastic_depth(model, 0.5, example_inputs=torch.randn(SHAPE))


def a_pair_that_disagrees_raises() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = network(PreNormLayer)
    draw = sd.Draw(seed=dist.get_rank())
    sd.apply_stochastic_depth(model, 0.5, example_inputs=torch.randn(SHAPE), draw=draw)
    split(model, mesh["tp"])
    with pytest.raises(sd.SetupError, match="ranks do not draw the same"):
        model.train()(torch.randn(SHAPE))


PARALLEL = {
    "block": Parallel(),
    "branch": Parallel(unit="branch"),
    "post-norm": Parallel(PostNormLayer),
    "explicit": Parallel(ExplicitLayer),
    "rows": Parallel(mode="sample"),
    "sharded": Parallel(sharded=True),
    "sharded, branch": Parallel(sharded=True, unit="branch"),
    "sharded, explicit": Parallel(ExplicitLayer, sharded=True),
    "sharded, rows": Parallel(sharded=True, mode="sample"),
}


def cases() -> dict[str, Callable[[], None]]:
    """By name."""
    found: dict[str, Callable[[], None]] = {
        f"tensor parallel, {name}": partial(trained_in_pairs, setup)
        for name, setup in PARALLEL.items()
    }
    if not SHARDS_ON_THE_CPU:
        found = {name: case for name, case in found.items() if "sharded" not in name}
    hybrid = ("resnet", "pre-norm") if SHARDS_ON_THE_CPU else ()
    for network, draws in itertools.product(hybrid, ("same", "rows")):
        found[f"hybrid, {network}, {draws}"] = partial(
            trained_as_alone, network, Setup(hybrid=True), DRAWS[draws]
        )
    found["draws that differ"] = draws_that_differ_within_a_pair_are_refused
    found["a pair that disagrees"] = a_pair_that_disagrees_raises
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(cases)
