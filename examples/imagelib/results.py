"""Everything that a run found out, gathered for the table, the picture and `metrics.json`."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from imagelib.batches import Batches
from imagelib.flops import StepCost
from imagelib.machine import machine
from imagelib.records import Records
from imagelib.timing import Saving, Speed, column, saving_of, speed_of


@dataclass(frozen=True)
class Network:
    """How one of the networks did. None is what is not known (yet)."""

    test_error: float | None
    speed: Speed | None
    flops_per_step: float
    blocks_per_step: float


@dataclass(frozen=True)
class CountedStep:
    """FLOPs of one step with stochastic depth."""

    step: int
    executed: int  # as torch counted them while training
    shortened: int | None  # as torch counted them in the physically shortened network
    expected: int  # as added up from the cost of each block

    def disagrees(self) -> bool:
        return len({self.executed, self.expected, self.shortened or self.executed}) > 1


@dataclass(frozen=True)
class Results:
    """Both networks, and what lies between them."""

    finished: bool
    epochs: int
    test_images: int
    plain: Network | None
    stochastic_depth: Network
    saving: Saving | None
    flops_saved: float
    counted_steps: list[CountedStep]
    remarks: list[str]

    def as_json(self, configuration: dict[str, object]) -> str:
        fields = {
            "configuration": configuration,
            "machine": machine(),
            **dataclasses.asdict(self),
        }
        return json.dumps(without_infinities(fields), indent=2, allow_nan=False) + "\n"


def gather(
    records: Records, cost: StepCost, batches: Batches, folded_wrong: int | None, *, finished: bool
) -> Results:
    """`folded_wrong`: test images that the folded plain network gets wrong, once there is one."""
    per_epoch, test_images = batches.steps_per_epoch, len(batches.data.test)
    everything = cost.everything * batches.ranks.number
    steps, last = records.steps, records.epochs[-1] if records.epochs else None
    wrong = folded_wrong if folded_wrong is not None else last and last.wrong
    ours = Network(
        test_error=None if wrong is None else wrong / test_images,
        speed=speed_of(steps, "seconds", batches.images_per_step, per_epoch),
        flops_per_step=float(np.mean(column(steps, "flops"))) if steps else math.nan,
        blocks_per_step=float(np.mean(column(steps, "blocks_run"))) if steps else math.nan,
    )
    plain = None
    if any(not math.isnan(step.plain_seconds) for step in steps):
        plain = Network(
            test_error=last and last.plain_wrong / test_images,
            speed=speed_of(steps, "plain_seconds", batches.images_per_step, per_epoch),
            flops_per_step=everything,
            blocks_per_step=len(cost.saved_by),
        )
    counted = _counted_steps(records)
    saving = saving_of(steps)
    return Results(
        finished=finished,
        epochs=len(records.epochs),
        test_images=test_images,
        plain=plain,
        stochastic_depth=ours,
        saving=saving,
        flops_saved=1 - ours.flops_per_step / everything,
        counted_steps=counted,
        remarks=_remarks(ours, plain, saving, counted) + _of_ranks(batches.ranks.number, saving),
    )


def _counted_steps(records: Records) -> list[CountedStep]:
    return [
        CountedStep(s.step, int(s.counted_flops), _whole(s.counted_shortened_flops), s.flops)
        for s in records.steps
        if not math.isnan(s.counted_flops)
    ]


def _whole(flops: float) -> int | None:
    return None if math.isnan(flops) else int(flops)


def _remarks(
    ours: Network, plain: Network | None, saving: Saving | None, counted: list[CountedStep]
) -> list[str]:
    """What a reader must know to read the figures rightly."""
    remarks = []
    if saving:
        remarks.append(saving.remark())
    elif plain:
        remarks.append(
            "What could have been saved is not known: the closed blocks could not be taken out of "
            "this network, or too few steps were compared."
        )
    if ours.speed and (waiting := ours.speed.remark()):
        remarks.append(waiting)
    if any(step.disagrees() for step in counted):
        remarks.append("FLOPs as counted and as expected differ: see counted_steps, metrics.json.")
    return remarks


def _of_ranks(number: int, saving: Saving | None) -> list[str]:
    if number == 1:
        return []
    remark = (
        f"Trained on {number} ranks: images per second and FLOPs of all together, blocks on "
        "average, times by the first one's clock."
    )
    exchange = (
        "The network without the closed blocks exchanged their gradients all the same, as zeros."
    )
    return [remark, exchange] if saving else [remark]


def without_infinities(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become null."""
    if isinstance(value, dict):
        return {name: without_infinities(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_infinities(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
