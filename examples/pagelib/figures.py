"""The figures of a page: drawn by matplotlib, as SVG whose colours are those of the page."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, MaxNLocator

import stochastic_depth as sd

# Stand for the page's own colours, light or dark; no figure has them otherwise.
INK, GRID = "#010203", "#010204"
LINES = ("#010205", "#010206", "#010207")
_COLOURS = {
    INK: "--ink",
    GRID: "--grid",
    LINES[0]: "--plain",
    LINES[1]: "--ours",
    LINES[2]: "--third",
}
_DROPPED = "#d9822b"  # in a strip, which is an image: seen on white and on black
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, for those who have it read out
    "font.size": 11, "axes.axisbelow": True,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID,
    "xtick.color": INK, "ytick.color": INK, "grid.color": GRID, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g}%")
MOST_COLUMNS = 240  # of a strip; of a longer training every second step is shown, or fewer


@dataclass(frozen=True)
class Figure:
    """A figure, what it is called, and what it shows in words."""

    title: str
    words: str
    svg: str


def curves(
    title: str,
    words: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    across: str,
    up: str,
    *,
    percent: bool = False,
) -> Figure:
    """Lines by name; each has as many values across as up."""

    def draw(axes: Axes) -> None:
        for colour, (name, (x, y)) in zip(LINES, lines.items(), strict=False):
            axes.plot(x, y, label=name, color=colour, marker="." if len(x) < 30 else None)
        axes.set(xlabel=across, ylabel=up)
        if percent:
            axes.yaxis.set_major_formatter(PERCENT)
        axes.legend()

    return _drawn(title, words, draw)


def strip(title: str, steps: Sequence[str]) -> Figure:
    """Which block ran at which step: a row for each block, a column for each step.

    `steps`: of each, a digit for each block: 9 where it ran, 0 where not, or a share of the batch.
    """
    every = -(-len(steps) // MOST_COLUMNS)
    ran = np.array([[int(digit) / 9 for digit in step] for step in steps[::every]]).T
    pixels = np.zeros((*ran.shape, 4))
    pixels[...] = to_rgba(_DROPPED)
    pixels[..., 3] = 1.0 - ran

    def draw(axes: Axes) -> None:
        sides = (0, len(steps), len(ran) + 0.5, 0.5)
        axes.imshow(pixels, aspect="auto", interpolation="nearest", extent=sides)
        axes.set(xlabel="step", ylabel="block (the first on top)")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False)

    shown = "all of them" if every == 1 else f"one in {every} is shown"
    words = f"Each row is a block, each column one of {len(steps):,} steps of training ({shown}); "
    return _drawn(title, f"{words}coloured is where the block was dropped.", draw)


def drop_rates(title: str, depth: sd.StochasticDepth) -> Figure:
    """How often each block was dropped (bars), beside its drop rate of now (marks)."""
    counts = list(depth.statistics().values())
    dropped = [count.dropped / max(1, count.calls) for count in counts]
    places = np.arange(1, len(dropped) + 1)

    def draw(axes: Axes) -> None:
        rates = [block.drop_rate for block in depth.blocks]
        axes.bar(places, dropped, color=LINES[1], label="dropped")
        axes.plot(places, rates, "_", color=LINES[0], markersize=9, label="drop rate at the end")
        axes.yaxis.set_major_formatter(PERCENT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="block", ylabel="of its calls")
        axes.legend()

    words = (
        "Of all calls in training, the fraction in which a block was dropped (bars), and its drop "
        "rate at the end (marks). A schedule has other rates on the way there."
    )
    return _drawn(title, words, draw)


def step_times(title: str, seconds: Mapping[str, Sequence[float]]) -> Figure:
    """A histogram of each network. What is beyond the last hundredth is left out."""
    everything = np.concatenate([np.asarray(of) for of in seconds.values()]) * 1e3
    edges = np.linspace(everything.min(), np.quantile(everything, 0.99), 40).tolist()

    def draw(axes: Axes) -> None:
        for colour, (name, of) in zip(LINES, seconds.items(), strict=False):
            milliseconds = np.asarray(of) * 1e3
            axes.hist(milliseconds, edges, color=colour, label=name, histtype="step", lw=1.5)
        axes.set(xlabel="milliseconds per step", ylabel="steps")
        axes.legend()

    words = (
        "How many steps took how long, on this machine. A network that drops blocks has as many "
        "different times as there are numbers of blocks to drop."
    )
    return _drawn(title, words, draw)


def _drawn(title: str, words: str, draw: Callable[[Axes], None]) -> Figure:
    with rc_context({**_STYLE, "svg.hashsalt": title}):  # so that ids differ, and stay the same
        drawing = Drawing(figsize=(5, 3), layout="constrained")
        drawing.patch.set_alpha(0)
        axes = drawing.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        file = io.StringIO()
        drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return Figure(title, words, _inlined(file.getvalue(), re.sub(r"\W+", "-", title.lower())))


def _inlined(svg: str, prefix: str) -> str:
    """The figure as a part of a page: with ids of its own, in the page's colours and width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    for colour, name in _COLOURS.items():
        svg = svg.replace(colour, f"var({name})")
    return svg
