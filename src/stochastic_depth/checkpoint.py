"""What is saved: the place in the sequence of draws, and the weights with the inference scale.

Folding: the last operation of each branch that is affine in its own parameters takes the survival
probability, so that the plain model computes in eval mode what the gated one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import RefusedBlockError, StateMismatchError
from stochastic_depth.plan import Plan
from stochastic_depth.report import gated_blocks

VERSION = 2  # of the sequence of draws; 1 had a hash for each block


def save(plan: Plan) -> dict[str, Any]:
    """The state as plain numbers, strings and lists: `torch.load(weights_only=True)` takes it.

    Lists of pairs, no dicts: `torch.distributed.checkpoint` loads a dict by the keys that are there
    already, and a new run has called nothing yet.
    """
    step = plan.clock.step
    calls = [[gate.name, gate.calls] for gate in plan.gates if gate.calls and gate.step == step]
    return {"version": VERSION, **_identity(plan), "step": step, "calls": calls}


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
    if differences := _differences(state, _identity(plan)):
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
    blocks = zip(plan.blocks, plan.rates, strict=True)
    return {
        **{name: getattr(plan.draw, name) for name in ("seed", "sampling", "redraw")},
        **{name: getattr(plan, name) for name in ("unit", "mode", "scale")},
        "across_ranks": "different" if plan.ranks_differ else "same",
        "drop_rates": [[block.name, rate] for block, rate in blocks],
    }


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    if missing := [key for key in (*own, "step", "calls") if key not in saved]:
        return [f"it has no {key}" for key in missing]
    there, here = dict(saved["drop_rates"]), dict(own["drop_rates"])
    options = [key for key in own if key != "drop_rates" and saved[key] != own[key]]
    differences = [f"{key} {saved[key]!r} there, {own[key]!r} here" for key in options]
    only = sorted(there.keys() ^ here.keys())
    differences += [f'block "{n}" is gated {"here" if n in here else "there"} only' for n in only]
    rates = [n for n in here if there.get(n, here[n]) != here[n]]
    differences += [f'drop rate of "{n}" {there[n]} there, {here[n]} here' for n in rates]
    return differences


def _fold_factors(plan: Plan) -> dict[str, float]:
    """For each parameter (by name in the model that was watched), what it is multiplied by."""
    factors: dict[str, float] = {}
    for block, now in zip(plan.blocks, gated_blocks(plan), strict=True):
        own: dict[str, float] = {}  # a layer that ends several branches takes their factor once
        for branch, rates in zip(block.branches, now.branches, strict=True):
            factor = rates.survival_probability if plan.scale == "eval" else 1.0
            obstacle = branch.fold.obstacle if factor != 1.0 else None
            for name in branch.fold.parameters:
                if own.setdefault(name, factor) != factor:
                    obstacle = f"{name} is shared with a branch of another rate"
            if obstacle is not None:
                raise RefusedBlockError(
                    f'the inference scale of "{branch.name}" cannot be folded: {obstacle}',
                    expected="a branch that ends in an operation affine in parameters of its own",
                    instead='train with scale="train", which needs no scale in inference; or keep '
                    "the gated model for inference",
                )
        for name, factor in own.items():
            factors[name] = factors.get(name, 1.0) * factor
    return factors


def scaled_parameters(model: nn.Module, plan: Plan) -> dict[Tensor, Tensor]:
    """The parameters that take the inference scale in, each with what it comes to.

    Raises:
        RefusedBlockError: A branch has none that could, or the result is not finite.
    """
    scaled: dict[Tensor, Tensor] = {}
    for name, factor in _fold_factors(plan).items():
        parameter = model.get_parameter(name)
        scaled[parameter] = value = parameter.detach() * factor
        if not value.is_meta and not bool(torch.isfinite(value).all()):
            raise RefusedBlockError(
                f'"{name}" holds values that are not finite, before or after folding',
                expected="finite weights",
                instead="fold a checkpoint from before the training diverged",
            )
    return scaled


def folded(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """The state dict of the folded model; the model itself is left alone."""
    scaled = scaled_parameters(model, plan)
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for key, value in state.items():
        if isinstance(value, Tensor):  # a module's extra state need be none
            state[key] = scaled[value] if value in scaled else value.detach()
    return state
