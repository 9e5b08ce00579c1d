"""Promise: what the README shows runs as it stands, and its figures are those of result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import figures
from figures_text import RESULTS

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block: str) -> None:
    for package in ("torchvision", "timm"):
        if f"import {package}" in block:
            pytest.importorskip(package)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_the_printed_table_is_the_one_shown() -> None:
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    before_folding = BLOCKS[0].replace("depth.fold().eval()", "str(depth)")
    names: dict[str, str] = {}
    exec(compile(before_folding, "README.md", "exec"), names)
    assert shown is not None
    assert names["plain"] == shown[1].rstrip()


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_figures_are_those_of_the_result_files(page: Path) -> None:
    assert figures.rendered(page.read_text()) == page.read_text()


def test_every_language_model_beat_the_trigram() -> None:
    results = json.loads((RESULTS / "text.json").read_text())["results"]
    assert results["every_model_beats_the_trigram"]


def test_there_is_code_to_run() -> None:
    assert len(BLOCKS) >= 3
