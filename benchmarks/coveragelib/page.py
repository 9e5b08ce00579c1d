"""`docs/coverage.md`, written from the result file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_TITLES = {
    "timm": "timm, beside its own drop path calls",
    "torchvision": "torchvision, beside the additions in the source of its layers",
    "transformers": "transformers, beside the additions in the source of its layers",
}
_HEAD = """# Coverage

Written by `make coverage`; do not edit. The smallest model of each family (of timm: of each file,
by the letters that names begin with), with random weights. *Found* are our branches, *expected*
those that others have: for timm the calls of its own drop path that an addition follows, compared
one by one and in order; else the residual additions that ran, counted in the source of the layers.
A branch inside of another one is dropped with that, and set apart.
*Exact*: with gates open, each block closed alone (of models with more than 100 million parameters
three or four of them), and three random halves of the blocks closed,
outputs and gradients equal those of the plain model whose branches' ends hooks force to zero
("rounding": up to 1e-5, where gradients meet in another order). *Still*: with all blocks closed no
module with parameters of any branch runs. *Fold*: `fold()` computes the same. *Rows*: mode
"sample" equals masking. *Saved*: of a step's time with every second block closed, roughly.
"""

_DROPOUT = "*Exact* means in train mode, with every dropout at 0.1; the halves in eval mode, too.\n"


def page(content: dict[str, Any]) -> str:
    """The whole page."""
    versions = content["machine"]
    rows = [row for of_library in content["results"].values() for row in of_library.values()]
    dropout = _DROPOUT if all("dropout" in row for row in rows if "closed" in row) else ""
    parts = [
        _HEAD,
        dropout,
        f"\n({versions['processor']}, torch {versions['torch']}, {versions['date']})\n",
    ]
    for library, rows in content["results"].items():
        parts.append(f"\n## {_TITLES[library]}\n\n{_summary(rows)}\n\n{_table(rows)}")
    return "".join(parts)


@dataclass(frozen=True)
class Counts:
    """How many of a library's models there are, and how many of them came out well."""

    known: int
    agree: int
    checked: int  # have blocks that can be skipped
    exact: int
    refused: int


def counts(rows: dict[str, dict[str, Any]]) -> Counts:
    """Counted over the rows of a library."""
    known = [row for row in rows.values() if "found" in row]
    checked = [row for row in known if row.get("closed")]
    return Counts(
        known=len(known),
        agree=sum(row["agree"] for row in known),
        checked=len(checked),
        exact=sum(_exact(row) in ("yes", "rounding") for row in checked),
        refused=sum("refused" in row for row in known),
    )


def _summary(rows: dict[str, dict[str, Any]]) -> str:
    n = counts(rows)
    return (
        f"{n.agree} of {n.known} agree ({n.agree / n.known:.0%}). {n.exact} of {n.checked} "
        f"that have blocks to skip are exact; {n.refused} are refused."
    )


def _exact(row: dict[str, Any]) -> str:
    answers = (row["open_gates"], row["closed"])
    wrong = [answer for answer in answers if answer not in ("yes", "rounding")]
    return wrong[0] if wrong else "rounding" if "rounding" in answers else "yes"


def _table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| family | model | found | expected | exact | still | how | fold | rows | saved | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family, row in rows.items():
        cells = [family, row["model"], row.get("found", ""), row.get("expected", "")]
        if row.get("closed"):
            saved = f"{row['time_saved']:.0%}"
            cells += [_exact(row), row["nothing_ran"], row["how"], row["fold"], row["rows"], saved]
        else:
            cells += [""] * 6
        notes = ("apart", "note", "left_out", "refused", "error")
        cells.append("; ".join(str(row[key]) for key in notes if row.get(key)))
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
