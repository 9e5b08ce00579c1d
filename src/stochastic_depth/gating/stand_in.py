"""What the modules of a dropped branch hand out: new tensors of the shapes that they would make.

The shapes for the watched inputs are known. For inputs of other shapes the module is run once
without values (under fake tensors), which takes some milliseconds, and the result is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.templates import Template, describe, signature
from stochastic_depth.errors import ChangedModelError
from stochastic_depth.torch_private import fake_mode, is_part, tree_map, without_modes

_KEPT = 1024  # shapes; beyond that the oldest are forgotten


class HasTemplates(Protocol):
    """A gate, as far as this file is concerned."""

    name: str
    templates: dict[tuple[object, ...], Template]


def stand_in(
    gate: HasTemplates,
    module: nn.Module,
    args: Any,
    kwargs: Any,
    *,
    zeros: frozenset[int],
    unread: frozenset[int],
) -> Any:
    """An output of the module's shapes, of zeros but for the leaves that nobody will read."""
    key = signature(args, kwargs)
    template = gate.templates.get(key)
    if template is None:
        template = _look_up(gate.name, module, args, kwargs)
        for known in gate.templates.values():
            template = template.handing_on(known)
            break
        if len(gate.templates) >= _KEPT:
            del gate.templates[next(iter(gate.templates))]
        gate.templates[key] = template
    return template.build(args, kwargs, zeros=zeros, unread=unread)


def _look_up(name: str, module: nn.Module, args: Any, kwargs: Any) -> Template:
    # The counters of BatchNorm hold real numbers under fake tensors, too, and count.
    counters = [(buffer, buffer.clone()) for buffer in module.buffers() if buffer.numel() == 1]
    detached = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
    with without_modes(), fake_mode() as mode, full_parameters(module), torch.no_grad():
        fake_args, fake_kwargs = tree_map(
            lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, detached
        )
        try:
            output = module.forward(*fake_args, **fake_kwargs)
        except Exception as error:
            raise ChangedModelError(
                f'the shapes that "{name}" hands out for an input of a new shape cannot be found: '
                f"{error}",
                expected="a module whose output shapes depend on input shapes alone",
                instead="pass example_inputs of the shape that is trained with, or leave the block "
                "out with blocks=",
            ) from error
        template = describe(output, fake_args, fake_kwargs)
    for buffer, before in counters:
        buffer.copy_(before)
    return template


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
