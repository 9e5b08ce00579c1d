"""Forward hooks by which a model's own library collects what its layers come to.

transformers takes hidden states so. A user's hook does not fire where nothing runs; these are a
part of the model: a layer that is skipped shows them what it hands on, and one that runs on some
rows what it comes to on all.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from stochastic_depth.gating.gate import Original

_OTHERS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def of_library(module: nn.Module) -> dict[int, Any]:
    """The hooks that come out of the package which the module's class is from."""
    hooks = module._forward_hooks
    if not hooks:
        return {}
    # Not a script's own, and no hook of torch's, which do not collect.
    packages = {kind.__module__.partition(".")[::2] for kind in type(module).__mro__}
    of = tuple(f"{package}." for package, rest in packages if rest and package != "torch")
    return {n: hook for n, hook in hooks.items() if getattr(hook, "__module__", "").startswith(of)}


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
