"""Forward hooks by which a model's own library collects what its layers come to.

transformers takes hidden states and attention weights so. A user's hook does not fire where nothing
runs; these are a part of the model: where they are, no layer may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from stochastic_depth.torch_private import without_sharding


def collects(module: nn.Module) -> bool:
    """Whether the module has such a hook."""
    return bool(module._forward_hooks) and any(True for _ in _of_its_library(module))


def show(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Let them see what stands in for the output of a dropped module."""
    if not module._forward_hooks:
        return
    for number, hook in _of_its_library(module):
        if number in module._forward_hooks_with_kwargs:
            hook(module, args, kwargs, output)
        else:
            hook(module, args, output)


def _of_its_library(module: nn.Module) -> Iterator[tuple[int, Any]]:
    """The hooks that come out of the package which the module's class is from."""
    package, dot, _ = without_sharding(type(module)).__module__.partition(".")
    if dot and package != "torch":  # else it is a script's own; torch's hooks do not collect
        for number, hook in module._forward_hooks.items():
            if getattr(hook, "__module__", "").startswith(f"{package}."):
                yield number, hook
