"""Forward hooks by which a model's own library collects what its layers come to.

transformers takes hidden states so. A user's hook does not fire where nothing runs; these are a
part of the model: a layer that is skipped shows them what it hands on, and one that runs on some
rows what it comes to on all.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from stochastic_depth.gating.gate import Original
from stochastic_depth.torch_private.processes import without_sharding

_OTHERS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def of_library(module: nn.Module) -> dict[int, Any]:
    """The hooks that come out of the package which the module's class is from."""
    if not module._forward_hooks:
        return {}
    package, dot, _ = without_sharding(type(module)).__module__.partition(".")
    if not dot or package == "torch":  # a script's own; torch's hooks do not collect
        return {}
    return {
        number: hook
        for number, hook in module._forward_hooks.items()
        if getattr(hook, "__module__", "").startswith(f"{package}.")
    }


def show(hooks: dict[int, Any], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Let them see an output."""
    for number, hook in hooks.items():
        if number in module._forward_hooks_with_kwargs:
            hook(module, args, kwargs, output)
        else:
            hook(module, args, output)


def around(hooks: dict[int, Any], module: nn.Module, original: Original) -> Original:
    """The module's call without these hooks, where it has no others."""
    others = any(getattr(module, name) for name in _OTHERS)
    if not hooks or others or len(module._forward_hooks) > len(hooks):
        return original
    return type(module).forward
