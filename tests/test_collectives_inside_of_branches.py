"""Promise: a branch may talk to other ranks where all draw the same; else it is refused, no hang.

A synchronised BatchNorm, experts on other ranks. Real processes over gloo.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from collective_cases import cases
from processes import launch

pytestmark = pytest.mark.oldest


@functools.cache
def results(ranks: int, folder: Path) -> dict[str, str]:
    return launch("collective_cases.py", ranks, folder, seconds=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.parametrize("case", cases(2))
def test_on_two_ranks(case: str, folder: Path) -> None:
    assert not results(2, folder)[case], results(2, folder)[case]


@pytest.mark.parametrize("case", cases(4))
def test_on_four_ranks(case: str, folder: Path) -> None:
    assert not results(4, folder)[case], results(4, folder)[case]
