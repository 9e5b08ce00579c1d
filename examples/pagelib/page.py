"""A page: sentences, figures and tables, in one file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

import stochastic_depth as sd
from pagelib.figures import Figure

TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Page:
    """What is shown, in this order."""

    title: str
    summary: Sequence[str]
    results: Table
    figures: Sequence[Figure]
    tables: Sequence[Table] = field(default=())

    def as_html(self) -> str:
        """One file, which asks for no other."""
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        return environment.from_string(TEMPLATE.read_text()).render(page=self)


def blocks_of(title: str, depth: sd.StochasticDepth) -> Table:
    """How often each block was dropped, as numbers."""
    rows = [
        (block.name, f"{count.calls:,}", f"{count.dropped:,.4g}", f"{block.drop_rate:.1%}")
        for block, count in zip(depth.blocks, depth.statistics().values(), strict=True)
    ]
    return Table(title, ("block", "calls", "dropped", "drop rate"), rows)


def pairs(title: str, values: Mapping[str, object]) -> Table:
    """A table of names and values."""
    return Table(title, ("", ""), [(name, _plain(value)) for name, value in values.items()])


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
