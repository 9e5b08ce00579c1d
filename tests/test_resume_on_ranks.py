"""Promise: a run on several ranks that is saved at any moment and resumed ends bit by bit alike.

Through `torch.save` and through `torch.distributed.checkpoint`. Resumed on another number of ranks,
it drops what it would have dropped where all ranks draw the same. Real processes over gloo.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from processes import launch
from resume_cases import SAME, cases, draws_as_the_others


@functools.cache
def results(ranks: int, folder: Path) -> dict[str, str]:
    """Those of two ranks leave in the folder what others go on with."""
    if ranks != 2:
        results(2, folder)
    return launch("resume_cases.py", ranks, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.parametrize("case", cases(2))
def test_on_two_ranks(case: str, folder: Path) -> None:
    assert not results(2, folder)[case], results(2, folder)[case]


@pytest.mark.parametrize("case", cases(4))
def test_on_four_ranks_instead(case: str, folder: Path) -> None:
    assert not results(4, folder)[case], results(4, folder)[case]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("options", SAME)
@pytest.mark.parametrize("network", ["resnet", "explicit"])
def test_on_one_process_instead(network: str, options: str, folder: Path) -> None:
    results(2, folder)
    draws_as_the_others(network, options, among=folder)
