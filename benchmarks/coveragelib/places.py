"""Where a model can drop a branch: what we find, beside what others say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from coveragelib.drop_path_calls import drop_path_calls
from coveragelib.source_additions import source_additions
from coveragelib.subjects import Subject
from stochastic_depth.discovery.additions import Addition, Search
from stochastic_depth.discovery.blocks import Discovery
from stochastic_depth.discovery.recording import Call


@dataclass(frozen=True)
class Places:
    """Where a model can drop a branch: what we find, and what the others say."""

    found: int
    expected: int
    agree: bool
    apart: str  # what is left out of the comparison


def places(subject: Subject, model: nn.Module, example: Any, found: Discovery) -> Places:
    """Our branches beside the ground truth."""
    if subject.library == "timm":
        return _beside_drop_paths(model, example, found)
    run = (lambda: model(**example)) if isinstance(example, dict) else (lambda: model(example))
    expected = sum(source_additions(model, run).values())
    count = {
        affine: sum(
            len(block.branches) * len(found.sites[block.name])
            for block in found.blocks
            if block.affine is affine
        )
        for affine in (False, True)
    }
    apart = f"{count[True]} affine" if count[True] else ""
    agree = expected in (count[False], count[False] + count[True])
    return Places(count[False], expected, agree, apart)


def _beside_drop_paths(model: nn.Module, example: Tensor, found: Discovery) -> Places:
    """Our branches in order, against the drop path calls that an addition follows.

    A call is known by its number; those of an affine branch are left out, as are such branches.
    """
    calls = drop_path_calls(model, example)
    recording = found.recording
    names = {name for name, _ in calls}
    recorded = [call for call in recording.calls if call.module in names]

    def drop_path_in(addition: Any) -> int | None:
        inside = [
            number
            for number, call in enumerate(recorded)
            if any(m.start <= call.start and call.end <= m.end for m in addition.branch_calls)
        ]
        return inside[-1] if inside else None

    affine = {drop_path_in(a) for a in Search(recording).additions if a.affine}
    affine |= {n for n, call in enumerate(recorded) if _is_affine_up_to(found, call)}
    additions = [a for b in found.blocks if not b.affine for a in found.sites[b.name][0].additions]
    ours = [drop_path_in(a) for a in sorted(additions, key=lambda a: a.node)]
    inside = _inside_of_branches(recorded, additions) - {*ours}  # one module may do both
    theirs = [n for n, (_, added) in enumerate(calls) if added and n not in affine | inside]
    no_addition = sum(not added for _, added in calls)
    parts = (
        (no_addition, "without an addition"),
        (len(affine - {None}), "affine"),
        (len(inside), "inside of another branch"),
    )
    apart = ", ".join(f"{number} {what}" for number, what in parts if number)
    return Places(len(ours), len(theirs), ours == theirs, apart)


def _inside_of_branches(recorded: list[Call], additions: list[Addition]) -> set[int]:
    """The numbers of the calls that end a branch inside of another one, which goes with it."""
    names = {name for addition in additions for name in addition.left_out}
    return {number for number, call in enumerate(recorded) if call.module in names}


def _is_affine_up_to(found: Discovery, call: Call) -> bool:
    """Whether the block around a call is affine up to there (parallel convolutions)."""
    recording = found.recording
    around = recording.calls[call.parent or 0]
    firsts = [next((n for n in c.inputs if n is not None), None) for c in (around, call)]
    if firsts[0] is None or firsts[1] is None:
        return False
    given, value = firsts[0], firsts[1]
    if not recording.reaches(given, value):
        return False
    return Search(recording).is_affine(given, recording.between(given, value))
