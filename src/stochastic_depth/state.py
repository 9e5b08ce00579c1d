"""Saving and resuming: the place in the sequence of draws, and what the sequence belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stochastic_depth.errors import StateMismatchError
from stochastic_depth.plan import Plan

VERSION = 2  # of the sequence of draws; 1 had a hash for each block


def save(plan: Plan) -> dict[str, Any]:
    """The state as plain numbers, strings and lists: `torch.load(weights_only=True)` takes it.

    Lists of pairs, no dicts: `torch.distributed.checkpoint` loads a dict by the keys that are there
    already, and a new run has called nothing yet.
    """
    step = plan.clock.step
    called = [gate for gate in plan.gates if gate.calls and gate.step == step]
    return {
        "version": VERSION,
        **_identity(plan),
        "step": step,
        "calls": [[gate.name, gate.calls] for gate in called],
    }


def load(plan: Plan, state: Mapping[str, Any]) -> None:
    """Set the plan to that place.

    Raises:
        StateMismatchError: The state was saved with other blocks, rates or draws.
    """
    version = state.get("version", 1)
    if version != VERSION:
        raise StateMismatchError(
            f"the state is of version {version}, saved by another release of stochastic-depth",
            expected=f"version {VERSION}: the numbers that are drawn differ between the two",
            instead="resume with that release; or leave load_state_dict() out, and set the step "
            "with depth.step(), to go on with a new sequence",
        )
    differences = list(_differences(state, _identity(plan)))
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise StateMismatchError(
            f"the state differs from this model's stochastic depth: {'; '.join(differences[:3])}"
            f"{more}",
            expected="a state saved with the same blocks, rates and draws",
            instead="apply stochastic depth with the options of the run that is resumed, or leave "
            "load_state_dict() out to start a new sequence",
        )
    plan.go_to(int(state["step"]), dict(state["calls"]))


def _identity(plan: Plan) -> dict[str, Any]:
    """What the sequence of draws, and what is done with them, depends on."""
    return {
        "seed": plan.draw.seed,
        "sampling": plan.draw.sampling,
        "across_ranks": "different" if plan.ranks_differ else "same",
        "redraw": plan.draw.redraw,
        "unit": plan.unit,
        "mode": plan.mode,
        "scale": plan.scale,
        "drop_rates": [
            [block.name, rate] for block, rate in zip(plan.blocks, plan.rates, strict=True)
        ],
    }


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    for key, value in own.items():
        if key not in saved:
            yield f"it has no {key}"
        elif key != "drop_rates" and saved[key] != value:
            yield f"{key} {saved[key]!r} there, {value!r} here"
    missing = [key for key in ("step", "calls") if key not in saved]
    if missing:
        yield f"it has no {missing[0]}"
    rates, own_rates = dict(saved.get("drop_rates", ())), dict(own["drop_rates"])
    for name in {**rates, **own_rates}:
        if name not in own_rates or name not in rates:
            yield f'block "{name}" is gated {"here" if name in own_rates else "there"} only'
    for name, rate in own_rates.items():
        if name in rates and rates[name] != rate:
            yield f'drop rate of "{name}" {rates[name]} there, {rate} here'
