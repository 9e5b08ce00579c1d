"""Promise: a way of training that cannot be served exactly is refused by name, before the step.

FSDP1 and pipelines need real processes: `fsdp_cases.py`.
"""

from __future__ import annotations

import pytest
from torch import nn

import stochastic_depth as sd
from networks import gated, make

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore:`torch.nn.DataParallel`"),
]


def test_data_parallel() -> None:
    model, x = make("pre-norm")
    with pytest.raises(sd.SetupError, match=r"torch\.nn\.DataParallel.*torchrun"):
        sd.apply_stochastic_depth(nn.DataParallel(model), 0.2, example_inputs=x)


def test_a_replica_of_data_parallel() -> None:
    """What each GPU's thread runs."""
    model, x, _ = gated("pre-norm")
    replica = model._replicate_for_data_parallel()
    replica.layers = nn.ModuleList(layer._replicate_for_data_parallel() for layer in model.layers)
    with pytest.raises(sd.SetupError, match=r'"layers\.0".*torch\.nn\.DataParallel.*torchrun'):
        replica(x)


def test_zero_3(one_process: None) -> None:
    """DeepSpeed marks the parameters that it partitions."""
    model, x, _ = gated("pre-norm")
    other, _ = make("pre-norm")
    for number, parameter in enumerate([*model.parameters(), *other.parameters()]):
        parameter.ds_id = number
    with pytest.raises(sd.SetupError, match=r"DeepSpeed's ZeRO-3.*fully_shard"):
        model(x)
    with pytest.raises(sd.SetupError, match=r"DeepSpeed's ZeRO-3.*fully_shard"):
        sd.apply_stochastic_depth(other, 0.2, example_inputs=x)
