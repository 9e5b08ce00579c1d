"""The table at the end, what must be said below it, and the picture of loss over FLOPs."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from imagelib.checkpoints import replacing
from imagelib.report import plural
from textlib.contender import Contender
from textlib.records import steps_as_csv
from textlib.results import Outcome, Results, Variant

# What a run writes; where one of these is, there was a run.
WRITTEN = ("checkpoint.pt", "checkpoint.before.pt", "metrics.json", "steps.csv", "loss.png",
           "report.html")  # fmt: skip


def print_looks(contenders: Sequence[Contender], console: Console) -> None:
    """What the newest look at the held-out part showed."""
    found = (f"{c.name} {Outcome.at(*c.held_out[-1]).perplexity:.3f}" for c in contenders)
    step = contenders[0].held_out[-1].step
    console.print(f"Step {step}: perplexity {', '.join(found)}", highlight=False)


def write_report(
    folder: Path,
    results: Results,
    configuration: dict[str, object],
    equal_steps: Sequence[Contender],
    equal_flops: Sequence[Contender],
    page: str,
) -> None:
    """`metrics.json`, `steps.csv`, `loss.png` and `report.html`."""
    rows = [("steps", c.name, step) for c in equal_steps for step in c.steps]
    rows += [("FLOPs", c.name, step) for c in equal_flops for step in c.steps]
    for name, content in (
        ("metrics.json", results.as_json(configuration, remarks(results)).encode()),
        ("steps.csv", steps_as_csv(rows).encode()),
        ("loss.png", draw_picture(results)),
        ("report.html", page.encode()),
    ):
        with replacing(folder / name) as file:
            file.write(content)


def print_report(results: Results, console: Console) -> None:
    table = Table(title=title(results), title_justify="left")
    table.add_column()
    for name in results.variants:
        table.add_column(name, justify="right")
    for name, cells in result_rows(results).items():
        table.add_row(name, *cells)
    console.print(table)
    for line in remarks(results):
        console.print(line, highlight=False, soft_wrap=True)


def title(results: Results) -> str:
    state = "" if results.finished else ", interrupted"
    return f"After {plural(results.steps, 'step')}{state}"


def result_rows(results: Results) -> dict[str, list[str]]:
    """The table: of each row, a cell for each variant."""
    rows: dict[str, Callable[[Variant], str]] = {
        "held-out perplexity": lambda v: f"{v.equal_steps.perplexity:.3f}",
        "held-out loss, nats": lambda v: f"{v.equal_steps.held_out_loss:.4f}",
        "blocks run per step": lambda v: f"{v.blocks_per_step:.1f}",
        "GFLOPs per step": lambda v: f"{v.flops_per_step / 1e9:.2f}",
        "seconds per step": _seconds,
        "time, of plain's": _time,
        "equal FLOPs: steps": lambda v: f"{v.equal_flops.steps:,}" if v.equal_flops else "-",
        "  perplexity": lambda v: _perplexity(v.equal_flops),
        "  on the way": lambda v: _perplexity(v.equal_flops_on_the_way),
    }
    return {name: list(map(cell, results.variants.values())) for name, cell in rows.items()}


def _seconds(variant: Variant) -> str:
    return f"{variant.seconds_per_step.median:.3g}" if variant.seconds_per_step else "-"


def _time(variant: Variant) -> str:
    time = variant.time_to_plain
    return f"{time.value:.1%} ({time.low:.0%} to {time.high:.0%})" if time else "-"


def _perplexity(outcome: Outcome | None) -> str:
    return f"{outcome.perplexity:.3f}" if outcome else "-"


def remarks(results: Results) -> list[str]:
    """What a reader must know to read the figures rightly; where dropping did not help."""
    trigram, variants = results.trigram, results.variants
    beaten_by = [name for name, variant in variants.items() if not variant.beats_trigram]
    found = "Not better than it: " + ", ".join(beaten_by) if beaten_by else "Every model beats it"
    lines = [f"Trigram baseline: held-out perplexity {trigram.perplexity:.3f}. {found}."]
    looked_after = min(variant.equal_steps.steps for variant in variants.values())
    if looked_after != results.steps:
        lines.append(f"The perplexities are those after step {looked_after:,}.")
    if results.equal_flops is not None:
        lines.append(
            f"Equal FLOPs: the {results.equal_flops / 1e12:.3g} TFLOPs that {results.cheapest} "
            "spent. Trained for them: anew, from the same weights, for as many steps as they buy, "
            "with the learning rate down to 0 at the end. On the way: interpolated in the training "
            "above, whose learning rate comes down later."
        )
    wrong = sum(step.executed != step.expected for step in results.counted_steps)
    checked = plural(len(results.counted_steps), "step")
    saved = (f"{name} {variant.flops_saved:.1%}" for name, variant in variants.items())
    lines.append(
        f"FLOPs saved: {', '.join(list(saved)[1:])} (checked at {checked}"
        f"{f'; {wrong} DISAGREE: see counted_steps, metrics.json' if wrong else ''})."
    )
    return lines + _verdicts(variants)


def _verdicts(variants: dict[str, Variant]) -> list[str]:
    """Whether dropping helped, in plain words."""
    plain, *_ = variants.values()
    verdicts: dict[bool, list[str]] = {False: [], True: []}
    for name, variant in list(variants.items())[1:]:
        for where, mine, its in (
            ("equal steps", variant.equal_steps, plain.equal_steps),
            ("equal FLOPs", variant.equal_flops, plain.equal_flops),
        ):
            if mine and its:
                better = mine.held_out_loss < its.held_out_loss
                change = f"{mine.perplexity:.3f} against plain's {its.perplexity:.3f}"
                verdicts[better].append(f"{name} at {where} ({change})")
    starts = {True: "Dropping lowered the perplexity", False: "Dropping did not help"}
    lines = [
        f"{starts[better]}: {'; '.join(these)}." for better, these in verdicts.items() if these
    ]
    return [*lines, "This is one run of each: small differences may be chance."]


def draw_picture(results: Results) -> bytes:
    """Held-out loss over the FLOPs spent on training: a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, variant in results.variants.items():
        curve = [look for look in variant.curve if look.step]
        spent, losses = [look.flops / 1e12 for look in curve], [look.loss for look in curve]
        (line,) = axes.plot(spent, losses, label=name, marker=".")
        if variant.equal_flops and variant.equal_flops.flops != variant.curve[-1].flops:
            end = variant.equal_flops
            label, colour = f"{name}, trained for equal FLOPs", line.get_color()
            axes.plot(end.flops / 1e12, end.held_out_loss, "*", color=colour, label=label)
    label = "trigram baseline"
    axes.axhline(results.trigram.held_out_loss, color="grey", linestyle=":", label=label)
    axes.set(xlabel="TFLOPs of training", ylabel="held-out loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
