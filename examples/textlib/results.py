"""Everything that a run found out, gathered for the table, the picture and `metrics.json`."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imagelib.machine import machine
from imagelib.results import without_infinities
from imagelib.timing import Estimate, Spread
from textlib.contender import Contender
from textlib.records import HeldOut
from textlib.text_data import Text
from textlib.timing import seconds_per_step, time_to_plain


@dataclass(frozen=True)
class Outcome:
    """How well the held-out part was predicted, after how much training."""

    steps: float  # no whole number where it lies between two looks
    flops: int
    held_out_loss: float  # nats per token
    perplexity: float

    @classmethod
    def at(cls, steps: float, flops: int, loss: float) -> "Outcome":
        # A training may diverge.
        return cls(steps, flops, loss, math.exp(loss) if loss < 700 else loss)


@dataclass(frozen=True)
class Variant:
    """How one of the variants did. None is what is not known (yet)."""

    equal_steps: Outcome
    equal_flops: Outcome | None  # trained for that, anew
    equal_flops_on_the_way: Outcome | None  # interpolated in the training with equal steps
    flops_per_step: float
    flops_saved: float
    blocks_per_step: float
    seconds_per_step: Spread | None
    time_to_plain: Estimate | None
    beats_trigram: bool  # at equal steps and at equal FLOPs
    curve: list[HeldOut]


@dataclass(frozen=True)
class CountedStep:
    """FLOPs of one step of training."""

    comparison: str
    variant: str
    step: int
    executed: int  # as torch counted them while training
    expected: int  # as added up from the cost of each block


@dataclass(frozen=True)
class Results:
    """All variants, and the baseline that they must beat."""

    finished: bool
    steps: int
    text: dict[str, int]
    trigram: Outcome
    equal_flops: int | None
    cheapest: str | None
    variants: dict[str, Variant]
    counted_steps: list[CountedStep]

    def as_json(self, configuration: dict[str, object], remarks: list[str]) -> str:
        fields = {
            "configuration": configuration,
            "machine": machine(),
            **dataclasses.asdict(self),
            "remarks": remarks,
        }
        for variant in fields["variants"].values():
            variant["curve"] = [look._asdict() for look in variant["curve"]]
        return json.dumps(without_infinities(fields), indent=2, allow_nan=False) + "\n"


def gather(
    text: Text,
    trigram_loss: float,
    equal_steps: Sequence[Contender],
    equal_flops: Sequence[Contender],
    *,
    finished: bool,
) -> Results:
    """`equal_flops`: those that were trained anew; the others had spent no more in the first place.

    The first of `equal_steps` is the plain model.
    """
    complete = all(contender.finished for contender in equal_steps)
    budget, cheapest = min((c.flops, c.name) for c in equal_steps) if complete else (None, None)
    trained_anew = {contender.name: contender for contender in equal_flops}
    return Results(
        finished=finished,
        steps=min(len(contender.steps) for contender in equal_steps),
        text={
            "vocabulary": text.vocabulary,
            "training": len(text.training),
            "held_out": len(text.held_out),
        },
        trigram=Outcome.at(0, 0, trigram_loss),
        equal_flops=budget,
        cheapest=cheapest,
        variants={
            contender.name: _variant(
                contender,
                equal_steps[0],
                trained_anew.get(contender.name, contender) if finished else None,
                budget,
                trigram_loss,
            )
            for contender in equal_steps
        },
        counted_steps=[
            CountedStep(comparison, contender.name, s.step, int(s.counted_flops), s.flops)
            for comparison, contenders in (("steps", equal_steps), ("FLOPs", equal_flops))
            for contender in contenders
            for s in contender.steps
            if not math.isnan(s.counted_flops)
        ],
    )


def _variant(
    contender: Contender,
    plain: Contender,
    at_equal_flops: Contender | None,
    budget: int | None,
    trigram_loss: float,
) -> Variant:
    steps = contender.steps
    flops_per_step = contender.flops / max(1, len(steps))
    ends = [entrant.held_out[-1].loss for entrant in (contender, at_equal_flops) if entrant]
    return Variant(
        equal_steps=Outcome.at(*contender.held_out[-1]),
        equal_flops=Outcome.at(*at_equal_flops.held_out[-1]) if at_equal_flops else None,
        equal_flops_on_the_way=None if budget is None else on_the_way(contender.held_out, budget),
        flops_per_step=flops_per_step,
        flops_saved=1 - flops_per_step / plain.cost.everything,
        blocks_per_step=sum(step.blocks_run for step in steps) / max(1, len(steps)),
        seconds_per_step=seconds_per_step(steps),
        time_to_plain=None if contender is plain else time_to_plain(steps, plain.steps),
        beats_trigram=max(ends) < trigram_loss,
        curve=contender.held_out,
    )


def on_the_way(curve: Sequence[HeldOut], budget: int) -> Outcome:
    """Straight between the looks before and after the moment when `budget` FLOPs were spent."""
    steps, flops, losses = np.array(curve, dtype=np.float64).T
    return Outcome.at(
        float(np.interp(budget, flops, steps)), budget, float(np.interp(budget, flops, losses))
    )
