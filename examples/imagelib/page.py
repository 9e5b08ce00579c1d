"""The page that a run of `images.py` ends in: what happened, for someone who was not there."""

import math
from collections.abc import Mapping
from itertools import accumulate

import stochastic_depth as sd
from imagelib.machine import machine
from imagelib.records import Records
from imagelib.report import lines, result_rows, title
from imagelib.results import Results
from imagelib.timing import epoch_seconds
from pagelib.figures import Figure, curves, drop_rates, step_times, strip
from pagelib.page import Page, Table, blocks_of, pairs

PLAIN, OURS = "plain", "stochastic depth"


def page_of(
    results: Results,
    records: Records,
    configuration: Mapping[str, object],
    depth: sd.StochasticDepth,
    steps_per_epoch: int,
) -> str:
    """The whole page, as HTML."""
    columns = ["", *([PLAIN] if results.plain else []), OURS]
    rows = [(name, *cells) for name, cells in result_rows(results).items()]
    explained, *found = lines(results)
    return Page(
        title=f"{configuration['model']}: {title(results).lower()}",
        summary=[*found, explained],
        results=Table("Results", columns, rows),
        figures=_figures(results, records, depth, steps_per_epoch),
        tables=[
            blocks_of("Blocks", depth),
            pairs("Settings", configuration),
            pairs("Machine and versions", {**machine(), "stochastic-depth": sd.__version__}),
        ],
    ).as_html()


def _figures(
    results: Results, records: Records, depth: sd.StochasticDepth, steps_per_epoch: int
) -> list[Figure]:
    figures = _errors(results, records, steps_per_epoch) if records.epochs else []
    if records.steps:
        figures.append(strip("Which block ran", [step.gates for step in records.steps]))
        figures.append(drop_rates("How often each block was dropped", depth))
    timed = [step for step in records.steps if step.timed]
    if timed:
        seconds = {PLAIN: [s.plain_seconds for s in timed if not math.isnan(s.plain_seconds)]}
        seconds = {name: of for name, of in seconds.items() if of}
        seconds[OURS] = [step.seconds for step in timed]
        figures.append(step_times("How long a step took", seconds))
    return figures


def _errors(results: Results, records: Records, steps_per_epoch: int) -> list[Figure]:
    """Of both networks, over the epochs and over the time that each trained for by itself."""
    found = {OURS: ("seconds", [e.wrong / results.test_images for e in records.epochs])}
    if results.plain:
        plain = [epoch.plain_wrong / results.test_images for epoch in records.epochs]
        found = {PLAIN: ("plain_seconds", plain), **found}
    numbers = [epoch.epoch + 1.0 for epoch in records.epochs]
    passed = {
        name: list(accumulate(epoch_seconds(records.steps, column, steps_per_epoch)))
        for name, (column, _) in found.items()
    }
    last = ", ".join(f"{name} {errors[-1]:.1%}" for name, (_, errors) in found.items())
    words = f"The fraction of {results.test_images:,} test images that is wrongly classified"
    return [
        curves(
            "Error over wall-clock time",
            f"{words}, after so many seconds of training alone. At the end: {last}.",
            {n: (passed[n][: len(errors)], errors) for n, (_, errors) in found.items()},
            "seconds of training",
            "test error",
            percent=True,
        ),
        curves(
            "Error over epochs",
            f"{words}, after each epoch. At the end: {last}.",
            {name: (numbers, errors) for name, (_, errors) in found.items()},
            "epochs",
            "test error",
            percent=True,
        ),
    ]
