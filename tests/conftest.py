"""What every test runs under, and which of them `make test` leaves to `make check`.

One thread per worker, and examples that a rerun draws again.

`pytest --device cuda` runs what makes tensors without naming a device on a GPU.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from processes import leave

torch.set_num_threads(1)

# Of the tables of these files `make test` runs every fifth case, and of the zoo every small network
# and every fifth odd block; `make check` runs all.
LONG_TABLES = """
    activation_checkpointing
    any_pattern_is_exact
    checkpoint_wrappers
    collectives_inside_of_branches
    compile
    compile_beside
    compile_by_users
    coverage
    data_parallel
    example_text
    explicit_residuals
    export
    fold
    gradient_accumulation
    open_gates_are_identical
    optimizers
    resume_is_exact
    resume_on_ranks
    rows_are_drawn_exactly
    rows_equal_masks
    several_forwards
    sharded
""".split()
STEP = 5  # prime, so that a table of two, three or four values of each thing shows every value

# What takes long by itself; `make check` alone runs it.
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
    "convnext_tiny",
    "test_a_billion_parameters",
    "test_compile_on_ranks",
    "test_example_on_two_ranks",
    "on_four_ranks",
    "other_ranks_and_compiled_blocks",
    "rows_of_different_blocks_steps_and_seeds",
    "resnet50_has_more_kinds",
    "hold_for_some_numbers_of_rows",
    "any_rates_fold",
    "other_shapes_are_torchs_business",
    "a_layer_that_counts_its_rows_stays_exact",
)

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if "CI" in os.environ else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors are made: cpu or cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    met: Counter[tuple[str, str, str]] = Counter()
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        size = getattr(values.get("specimen"), "size", "large")
        is_long = item.path.stem.removeprefix("test_") in LONG_TABLES and size != "small"
        if any(name in item.nodeid for name in THOROUGH):
            item.add_marker("thorough")
        elif (is_long or size == "odd") and isinstance(item, pytest.Function):
            table = item.path.stem, item.originalname, size
            if met[table] % STEP:
                item.add_marker("thorough")
            met[table] += 1


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    if device.type != "cpu":
        torch.set_default_device(device)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="module")
def asked_for(request: pytest.FixtureRequest) -> list[str]:
    """The names of the cases of this module that pytest runs: for those in other processes."""
    chosen = [item for item in request.session.items if item.path == request.path]
    parameters = [item.callspec.params for item in chosen if hasattr(item, "callspec")]
    return [values["case"] for values in parameters if "case" in values]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A world of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    leave()
