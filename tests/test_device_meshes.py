"""Promise: copies of shards (HSDP) and tensor parallel train as one process does.

Real processes over gloo, four of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh_cases import cases
from processes import launch

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def results(asked_for: list[str], tmp_path_factory: pytest.TempPathFactory) -> object:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return launch("mesh_cases.py", 4, folder, asked_for)


@pytest.mark.parametrize("case", cases())
def test_on_four_ranks(results: dict[str, str], case: str) -> None:
    assert not results[case], results[case]
