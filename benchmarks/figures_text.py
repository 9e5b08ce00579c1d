"""How figures are written: numbers with their intervals, machines; and the files they come from."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def over(values: list[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def percent(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.1%} ({estimate['low']:.1%} to {estimate['high']:.1%})"


def ratio(estimate: dict[str, float]) -> str:
    if estimate["low"] == estimate["high"]:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def machine(content: dict[str, Any]) -> str:
    machine = content["machine"]
    where = machine["gpu"] or f"{cores(machine['threads'])} of an {machine['processor']}"
    return f"{where}, torch {machine['torch']}, {machine['date']}"


def cores(number: int) -> str:
    return "one core" if number == 1 else f"{number} cores"


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content
