"""What is written down during training: each `Step`, and each look at the held-out part."""

import csv
import io
import math
from collections.abc import Iterable
from typing import NamedTuple

NOT_COUNTED = math.nan


class Step(NamedTuple):
    """One step of training of one variant."""

    step: int
    timed: bool  # False while warming up, and where FLOPs were counted, which takes long
    seconds: float
    loss: float
    learning_rate: float
    blocks_run: int
    flops: int
    counted_flops: float = NOT_COUNTED  # at some steps, as torch counted them while training


class HeldOut(NamedTuple):
    """How well the held-out part was predicted."""

    step: int  # after so many steps
    flops: int  # which took so many FLOPs
    loss: float  # nats per token


def as_csv(rows: Iterable[tuple[str, str, Step]]) -> str:
    """One line for each step of (comparison, variant); empty is what was not counted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("comparison", "variant", *Step._fields))
    for comparison, variant, step in rows:
        values = ("" if math.isnan(value) else _short(value) for value in step)
        writer.writerow((comparison, variant, *values))
    return text.getvalue()


def _short(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"
