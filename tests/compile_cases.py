"""What each rank does for `test_compile_on_ranks.py`: train compiled, and compare with eager.

The reference is the eager network on one process, averaged over the ranks by hand; its draws are
the same.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd
from ddp_cases import NETWORKS, averaged, containers, same
from networks import settled
from processes import report
from sharding import checkpointed, fill, full, shard

RATES = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
STEPS = 24


def each_compiled(model: nn.Module) -> None:
    for stage in containers(model):
        for number, block in enumerate(stage):
            stage[number] = torch.compile(block, backend="aot_eager", fullgraph=True)


def gated(model: nn.Module, x: Tensor, **options: Any) -> sd.StochasticDepth:
    return sd.apply_stochastic_depth(model, RATES, example_inputs=x, **options)


def compare(
    model: nn.Module, depth: sd.StochasticDepth, alone: nn.Module, shape: tuple[int, ...]
) -> None:
    """Gradients of each step, and no graph after the first few."""
    dropped, built = 0, 0
    for step in range(STEPS):
        torch.manual_seed(100 * step + dist.get_rank())
        batch = torch.randn(shape)
        for net in (model, alone):
            net.zero_grad()
            net.train()(batch).square().mean().backward()
        expected = averaged(alone)
        for name, parameter in model.named_parameters():
            for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
                name = name.replace(wrapper, "")
            name = name.removeprefix("module.")
            assert same(full(parameter.grad), expected[name]), f"step {step}, {name}"
        dropped += sum(not kept for kept in depth.last_gates.values())
        if step == 18:
            built = counters["stats"]["unique_graphs"]
    assert dropped
    assert counters["stats"]["unique_graphs"] == built, counters["stats"]


def data_parallel(
    network: str, draw: sd.Draw, *, checkpoints: bool = False, **options: Any
) -> None:
    maker, shape = NETWORKS[network]
    alone = settled(maker)
    model = copy.deepcopy(alone)
    x = torch.randn(shape)
    gated(alone, x, draw=draw, **options)
    depth = gated(model, x, draw=draw, **options)
    if checkpoints:
        checkpointed(model)
    depth.compile("aot_eager")
    compare(DistributedDataParallel(model), depth, alone, shape)


def wrapper_compiled() -> None:
    """DistributedDataParallel itself, by its user."""
    maker, shape = NETWORKS["resnet"]
    alone = settled(maker)
    model, x = copy.deepcopy(alone), torch.randn(shape)
    gated(alone, x)
    depth = gated(model, x)
    wrapped: Any = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    compare(wrapped, depth, alone, shape)


def sharded(network: str, *, before: bool) -> None:
    maker, shape = NETWORKS[network]
    alone = settled(maker)
    model, x = copy.deepcopy(alone), torch.randn(shape)
    gated(alone, x)
    depth = gated(model, x)
    if before:
        depth.compile("aot_eager")
    shard(model)
    if not before:
        depth.compile("aot_eager")
    compare(model, depth, alone, shape)


def as_in_torchtitan(order: str) -> None:
    """Built on the meta device; checkpoint wrappers, graphs, shards; then the weights."""
    maker, shape = NETWORKS["pre-norm"]
    alone, x = settled(maker), torch.randn(shape)
    with torch.device("meta"):
        model = maker()
    checkpointed(model)
    if order == "torch.compile, apply":
        each_compiled(model)
        depth = gated(model, x)
    else:
        depth = gated(model, x)
        depth.compile("aot_eager")
    shard(model)
    fill(model, alone)
    gated(alone, x)
    compare(model, depth, alone, shape)


def quietly(case: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        torch.compiler.reset()
        counters.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case()

    return run


def cases() -> dict[str, Callable[[], None]]:
    alike, different = sd.Draw(), sd.Draw(across_ranks="different")
    found: dict[str, Callable[[], None]] = {
        "data parallel, resnet": partial(data_parallel, "resnet", alike),
        "data parallel, different draws": partial(data_parallel, "pre-norm", different),
        "data parallel, different draws, in checkpoints": partial(
            data_parallel, "pre-norm", different, checkpoints=True
        ),
        "data parallel, rows": partial(data_parallel, "pre-norm", alike, mode="sample"),
        "data parallel, the wrapper compiled": wrapper_compiled,
        "compiled, sharded": partial(sharded, "resnet", before=True),
        "sharded, compiled": partial(sharded, "pre-norm", before=False),
    }
    for order in ("torch.compile, apply", "apply, depth.compile"):
        found[f"torchtitan: {order}"] = partial(as_in_torchtitan, order)
    return {name: quietly(case) for name, case in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(cases)
