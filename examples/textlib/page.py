"""The page that a run of `text.py` ends in: what happened, for someone who was not there."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import stochastic_depth as sd
from imagelib.machine import machine
from pagelib.figures import Figure, curves, drop_rates, step_times, strip
from pagelib.page import Page, Table, blocks_of, pairs
from textlib.contender import Contender
from textlib.report import remarks, result_rows, title
from textlib.results import Results


def page_of(
    results: Results, configuration: Mapping[str, object], contenders: Sequence[Contender]
) -> str:
    """The whole page, as HTML."""
    rows = [(name.strip(), *cells) for name, cells in result_rows(results).items()]
    figures = _losses(contenders)
    for contender in contenders:
        if contender.depth and contender.steps:
            gates = [step.gates for step in contender.steps]
            figures.append(strip(f"Which block ran: {contender.name}", gates))
            dropped = f"How often each block was dropped: {contender.name}"
            figures.append(drop_rates(dropped, contender.depth))
    seconds = {c.name: [step.seconds for step in c.steps if step.timed] for c in contenders}
    if all(seconds.values()):
        figures.append(step_times("How long a step took", seconds))
    return Page(
        title=f"{configuration['model']}: {title(results).lower()}",
        summary=remarks(results),
        results=Table("Results", ["", *results.variants], rows),
        figures=figures,
        tables=[
            *(blocks_of(f"Blocks: {c.name}", c.depth) for c in contenders if c.depth),
            pairs("Settings", configuration),
            pairs("Machine and versions", {**machine(), "stochastic-depth": sd.__version__}),
        ],
    ).as_html()


def _losses(contenders: Sequence[Contender]) -> list[Figure]:
    """Of the held-out part, over the time that each trained for by itself, and over steps."""
    looks = {c.name: [look for look in c.held_out if look.step] for c in contenders}
    if not all(looks.values()):
        return []
    losses = {name: [look.loss for look in of] for name, of in looks.items()}
    steps = {name: [float(look.step) for look in of] for name, of in looks.items()}
    passed = {
        contender.name: [seconds[look.step - 1] for look in looks[contender.name]]
        for contender in contenders
        for seconds in [list(accumulate(step.seconds for step in contender.steps))]
    }
    last = ", ".join(f"{name} {of[-1]:.3f}" for name, of in losses.items())
    words = "How badly the held-out part was predicted, in nats per token, after so many"
    return [
        curves(
            f"Loss over {name}",
            f"{words} {across}. At the end: {last}.",
            {name: (where[name], losses[name]) for name in losses},
            across,
            "held-out loss",
        )
        for name, across, where in (
            ("wall-clock time", "seconds of training", passed),
            ("steps", "steps", steps),
        )
    ]
