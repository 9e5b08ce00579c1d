"""The way out with the scale kept: survival probabilities go into the weights of the branches.

The last operation of each branch that is affine in its own parameters takes the factor, so the
plain model computes in eval mode what the gated one does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import RefusedBlockError
from stochastic_depth.plan import Plan


def fold_factors(plan: Plan) -> dict[str, float]:
    """For each parameter (by name in the model that was watched), what it is multiplied by.

    Raises:
        RefusedBlockError: A branch has no parameter that could take its factor.
    """
    factors: dict[str, float] = {}
    for number, block in enumerate(plan.blocks):
        units = plan.units_of(number)
        rates = plan.rates_at(plan.clock.step)
        factors_of = [1.0 - rates[u] if plan.scale == "eval" else 1.0 for u in units]
        factors_of *= 1 if len(units) == len(block.branches) else len(block.branches)
        own: dict[str, float] = {}  # a layer that ends several branches takes their factor once
        for branch, factor in zip(block.branches, factors_of, strict=True):
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


def fold_into(model: nn.Module, factors: dict[str, float]) -> None:
    """Multiply the parameters in place; nothing is written unless all results are finite."""
    parameters = {name: model.get_parameter(name) for name in factors}
    with torch.no_grad():
        scaled = {name: _finite(name, parameters[name] * factors[name]) for name in factors}
        for name, value in scaled.items():
            parameters[name].copy_(value)


def folded(model: nn.Module, factors: dict[str, float]) -> dict[str, Any]:
    """The state dict of the folded model; the model itself is left alone."""
    by_identity = {id(model.get_parameter(name)): factor for name, factor in factors.items()}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for key, value in state.items():
        if id(value) in by_identity:
            state[key] = _finite(key, value.detach() * by_identity[id(value)])
        elif isinstance(value, Tensor):  # a module's extra state need be none
            state[key] = value.detach()
    return state


def _finite(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta or bool(torch.isfinite(tensor).all()):
        return tensor
    raise RefusedBlockError(
        f'"{name}" holds values that are not finite, before or after folding',
        expected="finite weights",
        instead="fold a checkpoint from before the training diverged",
    )
