"""Promise: a run on several ranks that is saved at any moment and resumed ends bit by bit alike.

Through `torch.save` and through `torch.distributed.checkpoint`. Resumed on another number of ranks,
it drops what it would have dropped where all ranks draw the same. Real processes over gloo.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from processes import launch
from resume_cases import SAME, cases, draws_as_the_others


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def on_two(asked_for: list[str], folder: Path) -> object:
    """Among them what leaves in the folder what others go on with."""
    return launch("resume_cases.py", 2, folder, [*asked_for, *cases(4)])


@pytest.fixture(scope="module")
def on_four(asked_for: list[str], on_two: object, folder: Path) -> object:
    return launch("resume_cases.py", 4, folder, asked_for)


@pytest.mark.parametrize("case", cases(2))
def test_on_two_ranks(on_two: dict[str, str], case: str) -> None:
    assert not on_two[case], on_two[case]


@pytest.mark.parametrize("case", cases(4))
def test_on_four_ranks_instead(on_four: dict[str, str], case: str) -> None:
    assert not on_four[case], on_four[case]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("options", SAME)
@pytest.mark.parametrize("network", ["resnet", "explicit"])
def test_on_one_process_instead(
    on_two: dict[str, str], network: str, options: str, folder: Path
) -> None:
    draws_as_the_others(network, options, among=folder)
