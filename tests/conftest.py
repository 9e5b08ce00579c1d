"""What every test runs under: one thread per worker, and examples that a rerun draws again.

`pytest --device cuda` runs what makes tensors without naming a device on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if "CI" in os.environ else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors are made: cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    if device.type != "cpu":
        torch.set_default_device(device)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.allow_tf32 = False
