"""Promise: with Accelerate, timm's savers and averages, two lines are all; nothing else is kept."""

from __future__ import annotations

import copy
import importlib.util
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from timm.utils.checkpoint_saver import CheckpointSaver
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.swa_utils import AveragedModel, update_bn

import stochastic_depth as sd
from networks import assert_equal, make
from processes import leave

WARMUP = sd.linear_warmup(10)


def example() -> Tensor:
    return make("resnet")[1]


def begun(**options: Any) -> tuple[nn.Module, sd.StochasticDepth, torch.optim.Optimizer]:
    model: nn.Module = make("resnet")[0].train()
    options = {"schedule": WARMUP, **options}
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=example(), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    depth.follow(optimizer)
    return model, depth, optimizer


def steps(count: int, *run: Any) -> list[Any]:
    """Train a model, with its handle and optimizer, and maybe a backward that is called instead."""
    model, depth, optimizer, *more = run
    backward = more[0] if more else Tensor.backward
    drawn = []
    for _ in range(count):
        backward(model(example()).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        drawn.append(depth.last_gates)
    return drawn


@pytest.mark.parametrize("way", ["riding", "registered", "both"])
def test_accelerates_save_state_goes_on_bit_for_bit(tmp_path: Path, way: str) -> None:
    def prepared() -> tuple[Any, Any]:
        accelerator = Accelerator(cpu=True)
        model, depth, optimizer = begun()
        if way == "registered":
            depth.follow(optimizer, save_state=False)
        if way != "riding":
            accelerator.register_for_checkpointing(depth)
        found: Any = accelerator.prepare(model), depth, accelerator.prepare(optimizer)
        return accelerator, found

    accelerator, whole = prepared()
    drawn = steps(3, *whole, accelerator.backward)
    accelerator.save_state(str(tmp_path))
    drawn += steps(4, *whole, accelerator.backward)
    accelerator, second = prepared()
    accelerator.load_state(str(tmp_path))
    assert steps(4, *second, accelerator.backward) == drawn[3:]
    assert_equal(second[0].state_dict(), whole[0].state_dict())


def test_timms_checkpoint_saver_and_average(tmp_path: Path) -> None:
    """The average is made behind apply, so that it has the rates of the model that it follows."""
    model, depth, optimizer = begun()
    average = ModelEmaV3(model, decay=0.5)
    make_saver: Any = CheckpointSaver
    saver = make_saver(model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path))
    drawn = steps(3, model, depth, optimizer)
    average.update(model)
    saver.save_checkpoint(0)
    drawn += steps(4, model, depth, optimizer)
    twin = sd.get_stochastic_depth(average)
    assert [b.drop_rate for b in twin.blocks] == [b.drop_rate for b in depth.blocks]

    second, again, other = begun()
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=False)
    second.load_state_dict(saved["state_dict"])
    other.load_state_dict(saved["optimizer"])
    assert steps(4, second, again, other) == drawn[3:]
    assert_equal(second.state_dict(), model.state_dict())


def test_mixed_precision_as_timm_has_it() -> None:
    model, depth, optimizer = begun(schedule=None)
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(example()).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.state_dict()["stochastic_depth"]["step"] == 1
    assert depth.state_dict()["step"] == 1


def test_an_average_that_is_made_before_apply_misses_the_scale() -> None:
    """What docs/trainers.md says: apply first."""
    plain: nn.Module = make("resnet")[0]
    early = AveragedModel(plain)
    depth = sd.apply_stochastic_depth(plain, 0.5, example_inputs=example())
    late = AveragedModel(plain)
    outputs = [each.eval()(example()) for each in (plain, late, early)]
    assert_equal(outputs[0], outputs[1])
    off = (outputs[0] - outputs[2]).abs().max() / outputs[0].abs().max()
    assert off > 0.05
    depth.remove()


def test_update_bn_runs_all_branches_at_their_scale() -> None:
    model, depth, optimizer = begun()
    average = AveragedModel(model)
    steps(2, model, depth, optimizer)
    average.update_parameters(model)
    with sd.get_stochastic_depth(average).disabled():
        update_bn([example()], average)
    assert sd.get_stochastic_depth(average).last_gates == {}


def test_zero_redundancy_optimizers_carry_the_state(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model, depth, _ = begun()
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        depth.follow(optimizer)
        drawn = steps(3, model, depth, optimizer)
        optimizer.consolidate_state_dict()
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        drawn += steps(3, model, depth, optimizer)
        second, again, _ = begun()
        other = ZeroRedundancyOptimizer(second.parameters(), torch.optim.AdamW, lr=1e-2)
        again.follow(other)
        second.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
        assert steps(3, second, again, other) == drawn[3:]
    finally:
        leave()


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeeds_zero_carries_the_state(tmp_path: Path, stage: int) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: it builds its operators with a compiler")
    script = Path(__file__).parent / "deepspeed_cases.py"
    command = [sys.executable, str(script), str(stage), str(tmp_path), str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])
