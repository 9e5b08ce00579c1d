"""Promise: a way of training that cannot be served exactly is refused by name, before the step.

FSDP1 and pipelines need real processes: `fsdp_cases.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import stochastic_depth as sd
from networks import make

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore:`torch.nn.DataParallel`"),
]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A world of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gated() -> tuple[Any, torch.Tensor]:
    model, x = make("pre-norm")
    sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    return model.train(), x


def test_data_parallel() -> None:
    model, x = make("pre-norm")
    with pytest.raises(sd.SetupError, match=r"torch\.nn\.DataParallel.*torchrun"):
        sd.apply_stochastic_depth(nn.DataParallel(model), 0.2, example_inputs=x)


def test_a_replica_of_data_parallel() -> None:
    """What each GPU's thread runs."""
    model, x = gated()
    replica = model._replicate_for_data_parallel()
    replica.layers = nn.ModuleList(layer._replicate_for_data_parallel() for layer in model.layers)
    with pytest.raises(sd.SetupError, match=r'"layers\.0".*torch\.nn\.DataParallel.*torchrun'):
        replica(x)


def test_zero_3(one_process: None) -> None:
    """DeepSpeed marks the parameters that it partitions."""
    model, x = gated()
    other, _ = make("pre-norm")
    for number, parameter in enumerate([*model.parameters(), *other.parameters()]):
        parameter.ds_id = number
    with pytest.raises(sd.SetupError, match=r"DeepSpeed's ZeRO-3.*fully_shard"):
        model(x)
    with pytest.raises(sd.SetupError, match=r"DeepSpeed's ZeRO-3.*fully_shard"):
        sd.apply_stochastic_depth(other, 0.2, example_inputs=x)
