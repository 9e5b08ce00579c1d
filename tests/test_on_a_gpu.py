"""Promise: on a GPU everything holds, and no gate makes the CPU wait for it.

Skipped where there is none. `pytest --device cuda` runs the tests of other promises there, too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import stochastic_depth as sd
from ddp_cases import cases as ddp_cases
from fsdp_cases import cases as fsdp_cases
from networks import batch, make, sgd
from processes import launch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
Mode = Literal["batch", "sample"]
networks = pytest.mark.parametrize("network", ["resnet", "pre-norm", "post-norm"])
ways = pytest.mark.parametrize("mode", ["batch", "sample"])


def gated(network: str, mode: Mode) -> tuple[Any, Tensor, sd.StochasticDepth]:
    model, example = make(network)
    model, example = model.cuda(), torch.cat([example] * 2).cuda()
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=example, mode=mode)
    return model, example, depth


@contextmanager
def never_waiting() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@networks
@ways
def test_no_gate_waits_for_the_gpu(network: str, mode: Mode) -> None:
    model, example, depth = gated(network, mode)
    optimizer = sgd(model)
    depth.follow(optimizer)
    batches = [batch(example, step) for step in range(20)]
    skipped = 0
    for step, images in enumerate(batches):
        optimizer.zero_grad()
        with never_waiting():
            model.train()(images).square().mean().backward()
            optimizer.step()
        gates = depth.last_gates.values()
        skipped += sum(not kept if mode == "batch" else len(kept) < len(example) for kept in gates)
        assert depth.state_dict()["step"] == step + 1
    assert skipped


@networks
@ways
def test_draws_are_those_of_the_cpu(network: str, mode: Mode) -> None:
    model, example, depth = gated(network, mode)
    other = copy.deepcopy(model).cpu()
    for _ in range(4):
        model.train()(example)
        other.train()(example.cpu())
        assert depth.last_gates == sd.get_stochastic_depth(other).last_gates


class Copies(TorchDispatchMode):
    """Counts what goes from the CPU to the GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = [x for x in args if isinstance(x, Tensor)]
        if isinstance(result, Tensor) and result.is_cuda:
            self.number += any(not x.is_cuda for x in sources)
        return result


def test_a_window_of_rows_needs_no_copy() -> None:
    model, example, _ = gated("pre-norm", "sample")
    with Copies() as copies:
        model.train()(example).square().mean().backward()
    assert copies.number == 0


@networks
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_autocast_and_a_gradient_scaler(network: str, kind: torch.dtype) -> None:
    model, example, depth = gated(network, "batch")
    twin = copy.deepcopy(model)
    closed = {block.name: False for block in depth.blocks[::2]}
    outputs = []
    for net in (model, twin):
        optimizer, scaler = sgd(net), torch.amp.GradScaler("cuda", init_scale=2.0**8)
        handle = sd.get_stochastic_depth(net)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", kind), handle.fixed({} if net is twin else closed):
                output = net.train()(example)
            scaler.scale(output.float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**8  # no step was taken for an overflow
        outputs.append(output.dtype)
    assert outputs[0] == outputs[1]
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype
        assert (parameter.grad is not None) or name.startswith(tuple(closed))


def test_memory_of_skipped_blocks_is_never_taken() -> None:
    model, example, depth = gated("pre-norm", "batch")
    example = example.repeat(200, 1, 1)
    peaks = []
    for kept in (True, False):
        with depth.fixed({block.name: kept for block in depth.blocks}):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model.train()(example).square().mean().backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.5 * peaks[0]


@pytest.fixture(scope="module")
def of_ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return launch("ddp_cases.py", 1, tmp_path_factory.mktemp("nccl"), device="cuda")


@pytest.fixture(scope="module")
def of_fsdp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return launch("fsdp_cases.py", 1, tmp_path_factory.mktemp("nccl"), device="cuda")


@pytest.mark.parametrize("case", [*ddp_cases(1)])
def test_data_parallel_on_one_rank_over_nccl(of_ddp: dict[str, str], case: str) -> None:
    assert not of_ddp[case], of_ddp[case]


@pytest.mark.parametrize("case", [*fsdp_cases(1)])
def test_fully_shard_on_one_rank_over_nccl(of_fsdp: dict[str, str], case: str) -> None:
    assert not of_fsdp[case], of_fsdp[case]
