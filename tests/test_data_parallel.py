"""Promise: under DistributedDataParallel gradients are those of the ranks' average, or None.

Plain DistributedDataParallel, without `find_unused_parameters`; real processes over gloo.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from ddp_cases import cases
from processes import launch


@functools.cache
def results(ranks: int, folder: Path) -> dict[str, str]:
    """All cases in one launch."""
    return launch("ddp_cases.py", ranks, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.oldest
@pytest.mark.parametrize("case", cases(2))
def test_on_two_ranks(case: str, folder: Path) -> None:
    assert not results(2, folder)[case], results(2, folder)[case]


@pytest.mark.parametrize("case", cases(4))
def test_on_four_ranks(case: str, folder: Path) -> None:
    assert not results(4, folder)[case], results(4, folder)[case]
