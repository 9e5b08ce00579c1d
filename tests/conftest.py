"""What every test runs under: one thread per worker, and examples that a rerun draws again.

`pytest --device cuda` runs what makes tensors without naming a device on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# What takes long and differs from others in size alone: `make check` runs it, `make test` does not.
THOROUGH = (
    "resnet101",
    "resnet152",
    "torchvision:vit_b_16",
    "wide_resnet50",
    "timm:cait",
    "timm:coat",
    "timm:convnextv2",
    "timm:efficientnet_lite0",
    "timm:maxvit",
    "timm:xcit",
    "test_a_billion_parameters",
    "test_compile_on_ranks",
    "test_data_parallel.py::test_on_four_ranks",
    "hold_for_some_numbers_of_rows[several",
    "[Alternating",
    "[ExpandedTwice",
    "[SequenceFirst",
    "comes_to[shared",
    "comes_to[in groups",
)

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if "CI" in os.environ else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors are made: cpu or cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(name in item.nodeid for name in THOROUGH):
            item.add_marker("thorough")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    if device.type != "cpu":
        torch.set_default_device(device)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.allow_tf32 = False
