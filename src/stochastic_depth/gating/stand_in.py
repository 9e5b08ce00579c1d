"""What the modules of a dropped branch hand out: new tensors of the shapes that they would make.

The shapes for the watched inputs are known. For inputs of other shapes the module is run once
without values (under fake tensors), which takes some milliseconds, and the result is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.templates import Template, describe, signature
from stochastic_depth.errors import ChangedModelError
from stochastic_depth.gating.gate import Gate, Role, running
from stochastic_depth.torch_private.processes import is_part
from stochastic_depth.torch_private.tracing import fake_mode, without_modes
from stochastic_depth.torch_private.trees import tree_map

_KEPT = 1024  # shapes; beyond that the oldest are forgotten


def stand_in(gate: Gate, module: nn.Module, args: Any, kwargs: Any, role: Role) -> Any:
    """An output of the module's shapes: zeros where it is the branch's value or may be read."""
    key: tuple[object, ...] | None = None
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor:  # the short way, for most
        x = args[0]
        autocast = torch.is_autocast_enabled(x.device.type)
        key = (x.shape, x.stride(), x.dtype, x.device, autocast)
    template = gate.templates.get(key) if key is not None else None
    if template is None:
        template = _look_up(gate, module, args, kwargs)
        if key is not None:
            _keep(gate, key, template)
    if key is not None and role.unread and template.is_like(args[0]):
        return args[0]  # nobody looks at it, so that no memory need be taken
    return template.build(args, kwargs, zeros=frozenset(role.ends), unread=role.unread)


def _look_up(gate: Gate, module: nn.Module, args: Any, kwargs: Any) -> Template:
    key = signature(args, kwargs)
    if key not in gate.templates:
        running.open_all = True  # gated modules in it run as plain ones
        try:
            template = _without_values(gate.name, module, args, kwargs)
            for watched in [*gate.templates.values()][:1]:
                template = template.handing_on(watched)
            _keep(gate, key, template)
        finally:
            running.open_all = False
    return gate.templates[key]


def _keep(gate: Gate, key: tuple[object, ...], template: Template) -> None:
    if len(gate.templates) >= _KEPT:
        del gate.templates[next(iter(gate.templates))]
    gate.templates[key] = template


def _without_values(name: str, module: nn.Module, args: Any, kwargs: Any) -> Template:
    """The template of the output of one run under fake tensors."""
    # The counters of BatchNorm hold real numbers under fake tensors, too, and count.
    counters = [(buffer, buffer.clone()) for buffer in module.buffers() if buffer.numel() == 1]
    detached = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
    with without_modes(), fake_mode() as mode, _full_parameters(module), torch.no_grad():
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
def _full_parameters(module: nn.Module) -> Iterator[None]:
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
