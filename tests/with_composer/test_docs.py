"""Promise: what `docs/from-composer.md` shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "from-composer.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block: str) -> None:
    exec(compile(block, PAGE.name, "exec"), {"__name__": "__main__"})


def test_the_tests_that_it_names_exist() -> None:
    named = set(re.findall(r"test_\w+\.py", PAGE.read_text()))
    assert len(named) >= 7
    assert all((PAGE.parents[1] / "tests" / "with_composer" / name).exists() for name in named)
