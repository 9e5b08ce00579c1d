"""A branch's factor on the output of the module that ends it, or in its weights: cheaper.

`c * (w @ x + b)` is `(c * w) @ x + c * b`, up to rounding: a product with some thousand weights
takes the place of one with every value of the branch, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.torch_private import tree_flatten, tree_unflatten

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def own_weights(module: nn.Module, name: str, parameters: tuple[str, ...]) -> tuple[str, ...]:
    """Which of its own parameters a module takes a factor in, or none.

    Args:
        module: The module that ends a branch.
        name: Its name.
        parameters: All that take the branch's factor over, by name in the model. They have to be
            this module's, and it one of torch's, which are known to read them at every call.
    """
    own = tuple(parameter.removeprefix(f"{name}.") for parameter in parameters)
    inside = all(f"{name}.{mine}" in parameters and mine in module._parameters for mine in own)
    return own if inside and type(module).__module__.startswith("torch.nn.modules.") else ()


def with_scaled_weights(module: nn.Module, weights: tuple[str, ...], factor: float) -> Any:
    """Another module of the same class with the same parts, but for these weights times the factor.

    None where somebody else looks at the module's call, or has replaced it. The module itself is
    left alone: another thread may just call it.
    """
    content = vars(module)
    watched = any(content[hooks] for hooks in _HOOKS)
    if watched or "forward" in content or content.get("_compiled_call_impl") is not None:
        return None
    kept = content["_parameters"]
    if any(kept.get(name) is None for name in weights):
        return None
    twin = object.__new__(type(module))
    changed = {name: kept[name] * factor for name in weights}
    vars(twin).update({**content, "_parameters": {**kept, **changed}})
    return twin


def multiplied(output: Any, numbers: Iterable[int], factor: Any) -> Any:
    """An output with these leaves times the factor: a number, or in a graph a tensor."""
    if isinstance(output, Tensor):
        return _times(output, factor)
    leaves, spec = tree_flatten(output)
    for number in numbers:
        leaves[number] = _times(leaves[number], factor)
    return tree_unflatten(leaves, spec)


def _times(value: Tensor, factor: Any) -> Tensor:
    """The product, with a factor that is not rounded to half a precision before."""
    if isinstance(factor, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return (value.float() * factor).to(value.dtype)
    return value * factor
