"""Promise: a branch may talk to other ranks where all draw the same; else it is refused, no hang.

A synchronised BatchNorm, experts on other ranks. Real processes over gloo.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from collective_cases import cases
from processes import launch

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def results(asked_for: list[str], tmp_path_factory: pytest.TempPathFactory) -> object:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return launch("collective_cases.py", 2, folder, asked_for, seconds=200)


@pytest.mark.parametrize("case", cases())
def test_on_two_ranks(results: dict[str, str], case: str) -> None:
    assert not results[case], results[case]
