"""The table at the end, and what a run leaves in its folder."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from imagelib.batches import Batches
from imagelib.checkpoints import replacing
from imagelib.records import Records
from imagelib.results import Network, Results
from imagelib.timing import Spread, epoch_seconds
from pagelib.figures import PERCENT

# What a run writes besides its checkpoints; where one of these is, there was a run.
WRITTEN = ("checkpoint.pt", "checkpoint.before.pt", "plain.pt", "metrics.json", "steps.csv",
           "error.png", "report.html")  # fmt: skip


def print_epoch(records: Records, batches: Batches, console: Console) -> None:
    """Test errors after the newest epoch."""
    last, images = records.epochs[-1], len(batches.data.test)
    plain = "" if math.isnan(last.plain_wrong) else f"plain {last.plain_wrong / images:.2%}, "
    ours = f"stochastic depth {last.wrong / images:.2%}"
    console.print(f"Epoch {last.epoch + 1}: test error {plain}{ours}", highlight=False)


def write_report(
    folder: Path,
    results: Results,
    configuration: dict[str, object],
    records: Records,
    batches: Batches,
    page: str,
) -> None:
    """`metrics.json`, `steps.csv`, `error.png` and `report.html`."""
    picture = draw_picture(results, records, batches.steps_per_epoch)
    for name, content in (
        ("metrics.json", results.as_json(configuration).encode()),
        ("steps.csv", records.as_csv().encode()),
        ("error.png", picture),
        ("report.html", page.encode()),
    ):
        with replacing(folder / name) as file:
            file.write(content)


def print_report(results: Results, console: Console) -> None:
    table = Table(title=title(results), title_justify="left")
    table.add_column()
    for name in ["plain", "stochastic depth"][0 if results.plain else 1 :]:
        table.add_column(name, justify="right")
    for name, cells in result_rows(results).items():
        table.add_row(name, *cells)
    console.print(table)
    for line in lines(results):
        console.print(line, highlight=False, soft_wrap=True)


def result_rows(results: Results) -> dict[str, list[str]]:
    """The table: of each row, a cell for each network."""
    networks = [n for n in (results.plain, results.stochastic_depth) if n]
    rows: dict[str, Callable[[Network], str]] = {
        "test error": lambda network: _error(network, results.test_images),
        "images per second": lambda network: _speed(network, "images_per_second"),
        "seconds per epoch": lambda network: _speed(network, "seconds_per_epoch"),
        "waiting for data": lambda n: f"{n.speed.waiting_for_data:.1%}" if n.speed else "-",
        "GFLOPs per step": lambda network: f"{network.flops_per_step / 1e9:.2f}",
        "blocks run per step": lambda network: f"{network.blocks_per_step:.1f}",
    }
    return {name: list(map(cell, networks)) for name, cell in rows.items()}


def title(results: Results) -> str:
    state = "" if results.finished else ", interrupted"
    return f"After {plural(results.epochs, 'epoch')}{state}"


def plural(number: int, name: str) -> str:
    """Some of them, in words.

    >>> plural(1, "epoch"), plural(2000, "step")
    ('1 epoch', '2,000 steps')
    """
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def _error(network: Network, images: int) -> str:
    if network.test_error is None:
        return "-"
    deviation = math.sqrt(network.test_error * (1 - network.test_error) / images)
    return f"{network.test_error:.2%} ± {deviation:.2%}"


def _speed(network: Network, name: str) -> str:
    if network.speed is None:
        return "-"
    spread: Spread = getattr(network.speed, name)
    return f"{spread.median:.4g} ({spread.low:.4g} to {spread.high:.4g})"


def lines(results: Results) -> list[str]:
    found = [
        f"± is one standard error of {results.test_images:,} test images; in brackets the 10th to "
        "90th percentile."
    ]
    saving = results.saving
    if saving:
        found += [
            f"Time saved: {saving.time_saved}. Could be saved: {saving.possible}, by a network "
            f"without the closed blocks (timed at {plural(saving.compared_steps, 'step')}).",
            f"Saved of the possible: {saving.share_of_possible}. Brackets: 95% confidence.",
        ]
    if saving and saving.interrupted_steps:
        steps = plural(saving.interrupted_steps, "step")
        found.append(f"Left out, as something else held it up: {steps}.")
    counted = plural(len(results.counted_steps), "step")
    found.append(f"FLOPs saved: {results.flops_saved:.1%} (checked at {counted}).")
    return found + results.remarks


def draw_picture(results: Results, records: Records, steps_per_epoch: int) -> bytes:
    """Test error over the time that each network trained for, without the other's: a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    curves = [("stochastic depth", "seconds", "wrong")]
    if results.plain:
        curves.insert(0, ("plain", "plain_seconds", "plain_wrong"))
    for name, seconds, wrong in curves:
        errors = np.array([getattr(epoch, wrong) for epoch in records.epochs]) / results.test_images
        passed = np.cumsum(epoch_seconds(records.steps, seconds, steps_per_epoch))[: len(errors)]
        axes.plot(passed, errors, label=name, marker=".")
    axes.set(xlabel="seconds of training", ylabel="test error")
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
