"""Finding the handle of a gated model again: after `torch.load`, `deepcopy`, in a callback."""

from __future__ import annotations

from typing import cast

from torch import nn

from stochastic_depth.discovery import plain_model
from stochastic_depth.errors import SelectionError
from stochastic_depth.gating.attach import gated_modules
from stochastic_depth.gating.gate import Gate
from stochastic_depth.handle import StochasticDepth

_WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod")  # what lies in a wrapper put around later


def get_stochastic_depth(model: nn.Module, *, blocks: str | None = None) -> StochasticDepth:
    """The handle of a gated model again: after `torch.load`, `deepcopy`, in a callback.

    Args:
        model: The gated model, or anything that holds it.
        blocks: Where stochastic depth was applied several times: the name of a block of the one
            that is meant, in the model that it was applied to.

    Raises:
        SelectionError: It has no stochastic depth, or several.
    """
    model = plain_model(model)
    applied = {g.plan: _root(name, g) for name, _, g in gated_modules(model)}
    found = [p for p in applied if blocks is None or any(b.name == blocks for b in p.blocks)]
    if len(found) != 1:
        names = [plan.blocks[0].name for plan in found or applied]
        instead = f"pass blocks= with one of {names}" if names else "call apply_stochastic_depth"
        if len(set(names)) < len(names):  # copies
            instead = f"pass a part of the model, one of {[applied[plan] for plan in found]}"
        raise SelectionError(
            f"{type(model).__name__} has {len(found) or 'no'} stochastic depth"
            + (f" with a block {blocks!r}" if blocks else ""),
            expected="a model on which it was applied once",
            instead=instead,
        )
    plan = found[0]
    root = applied[plan]
    handle = plan.handle() if plan.handle is not None else None
    if handle is not None and (root is None or handle.model is model.get_submodule(root)):
        return cast(StochasticDepth, handle)
    if root is None:
        raise SelectionError(
            f"{type(model).__name__} is a part of the model that stochastic depth was applied to",
            expected="that model, or anything around it",
            instead="pass the whole model",
        )
    return StochasticDepth(model.get_submodule(root), plan)


def _root(name: str, gate: Gate) -> str | None:
    """Where the model that was watched lies; None where only a part of it is at hand."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPED)
    if gate.name and not f".{name}".endswith(f".{gate.name}"):
        return None
    return name.removesuffix(gate.name).removesuffix(".")
