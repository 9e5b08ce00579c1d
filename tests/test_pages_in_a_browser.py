"""Promise: the page that an example ends in opens in a browser, complete, and asks for nothing.

In Debian's Chromium, on a screen as wide as a phone's and on a desk's, light and dark.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import images
import text

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
RUNS = {
    "images": "--model=resnet20 --image-size=8 --epochs=2 --batch-size=64 --device=cpu",
    "text": "--steps=20 --batch-size=4 --context=16 --device=cpu",
}
FIGURES = {
    "images": [
        "Error over wall-clock time",
        "Error over epochs",
        "Which block ran",
        "How often each block was dropped",
        "How long a step took",
    ],
    "text": [
        "Loss over wall-clock time",
        "Loss over steps",
        "Which block ran: progressive",
        "How often each block was dropped: progressive",
        "Which block ran: decreasing",
        "How often each block was dropped: decreasing",
        "How long a step took",
    ],
}
SCREENS = {"narrow": (360, "dark"), "wide": (1280, "light")}


@pytest.fixture(scope="module", params=list(RUNS))
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A short run of an example, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    program = {"images": images, "text": text}[request.param]
    assert program.main([*RUNS[request.param].split(), f"--out={folder}"]) == 0
    return request.param, folder


def test_it_is_the_last_line_and_needs_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text.main([*RUNS["text"].split(), f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|@import|url\((?!#)', page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r"#0102\d\d", page)  # every colour is one of the page's


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (Debian's package of that name)")
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("screen", SCREENS)
def test_in_a_browser(run: tuple[str, Path], browser: Any, screen: str) -> None:
    name, folder = run
    (width, scheme), address = SCREENS[screen], f"file://{folder / 'report.html'}"
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    assert (said, asked) == ([], [address])
    titles = page.locator("figure h2").all_inner_texts()
    assert titles == FIGURES[name]
    # As a screen reader has it: each figure is an image, with words.
    words = [image.get_attribute("aria-label") for image in page.get_by_role("img").all()]
    assert len([each for each in words if each]) == len(titles)
    for picture in page.locator("figure svg").all():
        box = picture.bounding_box()
        assert box["width"] > 0.8 * min(width, 600) * 0.5
        assert box["height"] > 100
    # Nothing sticks out to the side.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper, ink = (
        page.evaluate(f"getComputedStyle(document.body).{which}")
        for which in ("backgroundColor", "color")
    )
    assert (_brightness(paper) < _brightness(ink)) == (scheme == "dark")
    tables = page.get_by_role("table").all()
    assert len(tables) >= 4
    metrics = json.loads((folder / "metrics.json").read_text())
    everything = page.inner_text("body")
    assert metrics["machine"]["torch"] in everything
    assert f"{metrics['configuration']['batch_size']}" in everything
    context.close()


def _brightness(colour: str) -> int:
    return sum(int(number) for number in re.findall(r"\d+", colour)[:3])


def test_the_numbers_are_those_of_the_run(run: tuple[str, Path]) -> None:
    name, folder = run
    page = (folder / "report.html").read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    if name == "images":
        assert f"{metrics['stochastic_depth']['test_error']:.2%} ±" in page
        assert "layer3.2" in page
    else:
        for variant in metrics["variants"].values():
            assert f"{variant['equal_steps']['perplexity']:.3f}" in page
