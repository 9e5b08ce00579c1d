"""Promise: under `fully_shard`, with the same draws everywhere, gradients are those of one process.

Real processes over gloo. What is not shown here is refused by name.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdp_cases import cases
from processes import launch


@pytest.fixture(scope="module")
def results(asked_for: list[str], tmp_path_factory: pytest.TempPathFactory) -> object:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return launch("fsdp_cases.py", 2, folder, asked_for)


@pytest.mark.parametrize("case", cases(2))
def test_on_two_ranks(results: dict[str, str], case: str) -> None:
    assert not results[case], results[case]
