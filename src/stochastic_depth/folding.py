"""Folding: the inference scale goes into the weights, and the plain model computes the same.

With scale "eval" the last operation of each branch that is affine in its own parameters takes the
survival probability.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import RefusedBlockError, StateMismatchError
from stochastic_depth.plan import Plan
from stochastic_depth.torch_private.tracing import WRAPPED

KEY = "stochastic_depth"
"""Under which the state rides in that of an optimizer; of several the others have a number."""


def is_riding(key: object) -> bool:
    """Whether a state of ours lies under this key of an optimizer's state."""
    return key == KEY or str(key).startswith(f"{KEY}.")


def _fold_factors(plan: Plan) -> dict[str, float]:
    """For each parameter (by name in the model that was watched), what it is multiplied by."""
    factors: dict[str, float] = {}
    rates = plan.at(plan.clock.step).rates
    for number, block in enumerate(plan.blocks):
        # A layer that ends several branches takes their factor once.
        of_block: dict[str, float] = {}
        for branch, unit in zip(block.branches, plan.units_of(number), strict=True):
            factor = 1.0 - rates[unit] if plan.scale == "eval" else 1.0
            obstacle = branch.fold.obstacle if factor != 1.0 else None
            for name in branch.fold.parameters:
                if of_block.setdefault(name, factor) != factor:
                    obstacle = f"{name} is shared with a branch of another rate"
            if obstacle is not None:
                raise _refused(
                    f'the inference scale of "{branch.name}" cannot be folded: {obstacle}'
                )
        for name, factor in of_block.items():
            factors[name] = factors.get(name, 1.0) * factor
    return factors


def _refused(why: str) -> RefusedBlockError:
    return RefusedBlockError(
        why,
        expected="a branch that ends in an operation affine in parameters of its own",
        instead='train with scale="train", which needs no scale in inference; or keep the gated '
        "model for inference",
    )


def saved_factors(plan: Plan) -> list[list[Any]] | str:
    """What `fold_state_dict` needs: a factor for each parameter; or why there is none."""
    try:
        return [[name, factor] for name, factor in _fold_factors(plan).items() if factor != 1.0]
    except RefusedBlockError as error:
        return error.arrived


def scaled_parameters(model: nn.Module, plan: Plan) -> dict[Tensor, Tensor]:
    """The parameters that take the inference scale in, each with what it comes to.

    Raises:
        RefusedBlockError: A branch has none that could, or the result is not finite.
    """
    factors = {name: by for name, by in _fold_factors(plan).items() if by != 1.0}
    parameters = {name: _parameter(model, name) for name in factors}
    return {p: _scaled(name, p, factors[name]) for name, p in parameters.items()}


def _parameter(model: nn.Module, name: str) -> Tensor:
    try:
        # By attributes: a checkpoint wrapper around the layer hands them on, under its own name.
        return model.get_parameter(name)
    except AttributeError as error:  # parametrized, or pruned
        why = f'the inference scale cannot be folded: "{name}" is no parameter any more'
        raise _refused(why) from error


def _scaled(name: str, value: Tensor, factor: float) -> Tensor:
    scaled = value.detach() * factor
    if not scaled.is_meta and not bool(torch.isfinite(scaled).all()):
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


def fold_state_dict(
    model_state: Mapping[str, Any], depth_state: Mapping[str, Any], *, prefix: str | None = None
) -> dict[str, Any]:
    """Make the plain model's weights of a checkpoint of a training, without the model.

    The same as `depth.folded_state_dict()` at the time when it was saved, bit for bit.

    Args:
        model_state: The `state_dict()` of the gated model, or of one that holds it: the names may
            have a prefix.
        depth_state: The `depth.state_dict()` of the same time; or that of an optimizer that was
            followed, in which it lies.
        prefix: What the names of the gated model's weights begin with ("backbone."), where
            model_state is of one that holds others with the same names. None: it is looked up.

    Returns:
        A new dictionary. Tensors that take no factor are the same objects.

    Raises:
        StateMismatchError: The two do not belong together.
        RefusedBlockError: A branch has no weight that could take its scale.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import stochastic_depth as sd
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        ...
        ...     def forward(self, x):
        ...         return x + self.linear(self.norm(x))
        >>> model = nn.Sequential(*(Residual() for _ in range(6)))
        >>> depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=torch.randn(2, 8))
        >>> saved = {"model": model.state_dict(), "depth": depth.state_dict()}
        >>> plain = fold_state_dict(saved["model"], saved["depth"])
        >>> bool((plain["5.linear.weight"] == model[5].linear.weight * 0.8).all())
        True
    """
    riding = [key for key in depth_state if is_riding(key)] if depth_state else []
    saved = depth_state[riding[0]] if len(riding) == 1 else depth_state
    factors = saved.get("fold") if isinstance(saved, Mapping) else None
    if isinstance(factors, str):
        raise _refused(factors)
    if factors is None:
        raise StateMismatchError(
            f"depth_state holds {riding or list(saved or ())[:6]}, and no factors to fold with",
            expected="what depth.state_dict() returned, or an optimizer's state that holds one",
            instead="pass one of several states, depth_state[name]; or load the checkpoint into "
            "the gated model, and call depth.folded_state_dict()",
        )
    weights = _weights(model_state, [name for name, _ in factors], prefix)
    # A weight that lies under two names is there twice.
    scaled = {_place(weights[name]): _scaled(name, weights[name], by) for name, by in factors}
    return {
        key: scaled.get(_place(value), value) if isinstance(value, Tensor) else value
        for key, value in model_state.items()
    }


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where the values of a tensor lie."""
    return tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()


def _weights(
    model_state: Mapping[str, Any], names: list[str], prefix: str | None
) -> dict[str, Any]:
    """The parameters of these names, which may lie behind a prefix, and inside of wrappers."""
    plain = {".".join(p for p in k.split(".") if p not in WRAPPED): k for k in model_state}
    first = names[0] if names else ""
    prefixes = [k.removesuffix(first) for k in plain if f".{k}".endswith(f".{first}")]
    complete = [
        p
        for p in (prefixes if prefix is None else [prefix])
        if all(p + name in plain for name in names)
    ]
    # One network may stand there under several names.
    found = list({_place(model_state[plain[p + first]]): p for p in complete}.values())
    if names and len(found) != 1:
        raise StateMismatchError(
            f'model_state holds "{first}" {len(found) or "no"} times beside its companions',
            expected="the state dict of the model that depth_state is of",
            instead="pass the two that were saved together; of several models pass prefix=; of "
            "names that were converted load with that library, and pass the model's state_dict()",
        )
    return {name: model_state[plain[found[0] + name]] for name in names}
