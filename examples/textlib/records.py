"""What is written down during training: each `Step`, and each look at the held-out part."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from imagelib.records import as_csv

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
    gates: str  # of each block a digit: 9 where it ran, 0 where not
    counted_flops: float = NOT_COUNTED  # at some steps, as torch counted them while training


class HeldOut(NamedTuple):
    """How well the held-out part was predicted."""

    step: int  # after so many steps
    flops: int  # which took so many FLOPs
    loss: float  # nats per token


def steps_as_csv(steps: Iterable[tuple[str, str, Step]]) -> str:
    """One line for each step of (comparison, variant)."""
    rows = ((comparison, variant, *step) for comparison, variant, step in steps)
    return as_csv(("comparison", "variant", *Step._fields), rows)
