"""Ground truth for timm: the drop path calls whose output meets an addition, in order.

A model of timm's calls a DropPath, or an Identity in its place, where a branch may be dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOVES = (
    "alias",
    "clone",
    "contiguous",
    "detach",
    "expand",
    "mul",
    "mul_",
    "permute",
    "reshape",
    "roll",
    "select",
    "slice",
    "squeeze",
    "_to_copy",
    "transpose",
    "unsqueeze",
    "view",
    "_unsafe_view",
)


def drop_path_calls(model: nn.Module, example: Tensor) -> list[tuple[str, bool]]:
    """Each drop path call of one forward: the module's name, and whether an addition follows."""
    follower = _Follower()
    with ExitStack() as stack, torch.no_grad():
        for name, module in _drop_paths(model):
            stack.callback(module.register_forward_hook(follower.hook(name)).remove)
            around = _block_around(model, name)
            stack.callback(around.register_forward_hook(follower.forget).remove)
        stack.enter_context(follower)
        model.eval()(example)
    return [(name, number in follower.added) for number, name in enumerate(follower.calls)]


def with_all_drop_paths(model: nn.Module) -> nn.Module:
    """The same model: some have None where the rate is 0, which nobody can see being called."""
    for module in model.modules():
        for attribute, value in list(vars(module).items()):
            if attribute.startswith("drop_path") and value is None:
                delattr(module, attribute)
                module.add_module(attribute, nn.Identity())
    return model


def _drop_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        attribute = name.rpartition(".")[2]
        if type(module).__name__ == "DropPath" or attribute.startswith("drop_path"):
            yield name, module


def _block_around(model: nn.Module, name: str) -> nn.Module:
    """The module whose forward adds what the drop path returns."""
    while name:
        name = name.rpartition(".")[0]
        if not isinstance(model.get_submodule(name), nn.Sequential):
            break
    return model.get_submodule(name)


class _Follower(TorchDispatchMode):
    """Follows what drop paths return, through moves, to the additions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[str] = []
        self.added: set[int] = set()
        self._marked: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def hook(self, name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            marked = torch.ops.aten.alias.default(output)
            self._marked[id(marked)] = (weakref.ref(marked), len(self.calls))
            self.calls.append(name)
            return marked

        return after

    def forget(self, module: nn.Module, args: Any, output: Any) -> None:
        """What leaves the block is a value like any other."""
        self._marked.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        numbers = {number for tensor in given if (number := self._number(tensor)) is not None}
        if name in ("add", "add_") and len(given) == 2:
            self.added |= numbers
        elif name in MOVES and numbers and isinstance(out, Tensor):
            self._marked[id(out)] = (weakref.ref(out), min(numbers))
        return out

    def _number(self, tensor: Tensor) -> int | None:
        known = self._marked.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None
