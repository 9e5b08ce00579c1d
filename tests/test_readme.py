"""Promise: what the README shows runs as it stands, and its figures are those of result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import figures
from figures_text import RESULTS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = "options trainers choosing-a-rate from-deepspeed-pld pruning".split()
IN_PAGES = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)
    )
]


@pytest.mark.filterwarnings("ignore:.*dropout is active")
@pytest.mark.parametrize("block", [*BLOCKS, *IN_PAGES])
def test_code_runs(block: str) -> None:
    for package in ("torchvision", "timm", "transformers"):
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
    assert len(BLOCKS) >= 2
    assert len(IN_PAGES) >= 5


def test_the_readme_stays_short() -> None:
    assert len(README) <= 12_000


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_the_tests_and_pages_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for name in set(re.findall(r"`(test_\w+)", text)):
        found = [*ROOT.glob(f"tests/{name}.py"), *ROOT.glob(f"tests/with_composer/{name}.py")]
        assert found, name
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
