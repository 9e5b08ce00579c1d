"""What is written down during training: a `Step` for each step, an `Epoch` for each epoch."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from imagelib.ranks import Ranks

NOT_MEASURED = math.nan


class Step(NamedTuple):
    """One step of training of both networks. NaN is what was not measured."""

    step: int
    epoch: int
    timed: bool  # False while warming up, and where FLOPs were counted, which takes long
    data_seconds: float  # waiting for the batch, which both networks use
    plain_seconds: float
    plain_loss: float
    seconds: float  # of the network with stochastic depth, like all that follows
    loss: float
    blocks_run: float  # where several ranks train together: on average, as is the loss
    flops: int  # where several ranks train together: their sum
    gates: str  # of each block a digit: 9 where it ran, 0 where not, or a share of the batch
    shortened_seconds: float = NOT_MEASURED  # the same draw with its closed blocks taken out
    counted_flops: float = NOT_MEASURED
    counted_shortened_flops: float = NOT_MEASURED


def over_ranks(step: Step, ranks: Ranks) -> Step:
    """FLOPs of all ranks, their mean loss and number of blocks; the times stay this rank's."""
    if ranks.number == 1:
        return step
    averaged = ranks.sum([step.plain_loss, step.loss, step.blocks_run])
    plain_loss, loss, blocks_run = (total / ranks.number for total in averaged)
    flops = ranks.sum([step.flops, step.counted_flops, step.counted_shortened_flops])
    return step._replace(
        plain_loss=plain_loss,
        loss=loss,
        blocks_run=blocks_run,
        flops=int(flops[0]),
        counted_flops=flops[1],
        counted_shortened_flops=flops[2],
    )


class Epoch(NamedTuple):
    """Wrongly classified test images after an epoch."""

    epoch: int
    plain_wrong: float
    wrong: int


class Records:
    """Everything written down so far. It is part of the checkpoint."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.epochs: list[Epoch] = []

    def state_dict(self) -> dict[str, Any]:
        return {"steps": [tuple(s) for s in self.steps], "epochs": [tuple(e) for e in self.epochs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = [Step(*values) for values in state["steps"]]
        self.epochs = [Epoch(*values) for values in state["epochs"]]

    def as_csv(self) -> str:
        """One line for each step."""
        return as_csv(Step._fields, self.steps)


def as_csv(header: Sequence[str], rows: Iterable[Sequence[str | float]]) -> str:
    """A header and lines; empty is what was not measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(x if isinstance(x, str) else _short(x) for x in row)
    return text.getvalue()


def _short(value: float) -> str:
    if math.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"
