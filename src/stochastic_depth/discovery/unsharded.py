"""Models whose weights are in parts on several processes: a copy without weights is watched.

The copy has the model's modules and names, parameters of their full shapes on the meta device, and
nothing of what gathers the weights: no process waits for another, and nothing is left gathered.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stochastic_depth.torch_private import is_part, without_sharding

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_post_hooks")


def unsharded(model: nn.Module) -> nn.Module:
    """A copy without weights of a model in parts, as it was before it was taken apart."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in memo and (isinstance(tensor, nn.Parameter) or is_part(tensor)):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            is_weight = isinstance(tensor, nn.Parameter)
            trained = tensor.requires_grad
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=trained) if is_weight else empty
    with _without_traces(model):
        return copy.deepcopy(model, memo)


@contextmanager
def full_parameters(module: nn.Module) -> Iterator[None]:
    """For a while parameters in parts have their full shapes; under fake tensors, so no values."""
    before = [(part, dict(part._parameters)) for part in module.modules()]
    try:
        for part, own in before:
            for name, tensor in own.items():
                if tensor is not None and is_part(tensor):
                    full = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                    part._parameters[name] = nn.Parameter(full, requires_grad=False)
        yield
    finally:
        for part, own in before:
            part._parameters.update(own)


@contextmanager
def _without_traces(model: nn.Module) -> Iterator[None]:
    """Takes away for a while what torch has added to the modules that it took apart."""
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        for module, _, own in before:
            for name in _HOOKS:
                hooks = own[name]
                kept = [(n, hook) for n, hook in hooks.items() if not _is_of_torch(hook)]
                vars(module)[name] = type(hooks)(kept)
            for name in own:
                if name.startswith(("__composable_api_state_key", "_is_fsdp", "_fsdp_")):
                    del vars(module)[name]
            module.__class__ = without_sharding(type(module))
        yield
    finally:
        for module, kind, own in before:
            vars(module).clear()
            vars(module).update(own)
            module.__class__ = kind


def _is_of_torch(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.")
