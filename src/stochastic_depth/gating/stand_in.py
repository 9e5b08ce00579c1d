"""What the modules of a dropped branch hand out: new tensors of the shapes that they would make.

The shapes for the watched inputs are known. For inputs of other shapes the module is run once
without values (under fake tensors), which takes some milliseconds, and the result is kept. Where
its operations need values it is run with them.

And what forward hooks see by which a model's own library collects what its layers come to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.kept import hooks_of, put_back
from stochastic_depth.discovery.templates import Made, Template, describe, signature
from stochastic_depth.discovery.undisturbed import fresh, same_generators, undisturbed
from stochastic_depth.errors import ChangedModelError
from stochastic_depth.gating.gate import Gate, Original, Role, running
from stochastic_depth.torch_private.processes import is_part
from stochastic_depth.torch_private.tracing import autocasts, fake_mode, without_modes

_OTHERS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_KEPT = 1024  # shapes; beyond that the oldest are forgotten


def stand_in_again(gate: Gate, module: nn.Module, args: Any, kwargs: Any, seen: list[Any]) -> Any:
    """The same as `stand_in`, and quicker, for a module that has one role.

    Args:
        gate: The module's.
        module: The module.
        args: Of its call.
        kwargs: Likewise.
        seen: The last argument in this call of the block, with its signature; it is replaced. Most
            modules are called with what the one before handed on.
    """
    x = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(x, Tensor):
        return stand_in(gate, module, args, kwargs, gate.role)
    if seen[0] is not x or autocasts():
        seen[:] = x, signature(args, kwargs)
    known, made = gate.last
    if known is seen[1] or known == seen[1]:
        if made is None:
            seen[1] = known  # so that the next module's is this very object
            return x
        return made(x) if made is torch.zeros_like else made.new(scratch=not gate.role.ends)
    role = gate.role
    output = stand_in(gate, module, args, kwargs, role)
    template = gate.templates[seen[1]]
    leaf = template.leaves[0] if template.is_leaf else None
    if output is x:
        gate.last = seen[1], None
    elif isinstance(leaf, Made) and (role.ends or role.scratch):
        is_like = role.ends and leaf == describe(torch.zeros_like(x), (), {}).leaves[0]
        gate.last = seen[1], torch.zeros_like if is_like else leaf  # which takes less time
    return output


def stand_in(gate: Gate, module: nn.Module, args: Any, kwargs: Any, role: Role) -> Any:
    """An output of the module's shapes: zeros where it is the branch's value or may be read."""
    key = signature(args, kwargs)
    template = gate.templates.get(key)
    if template is None:
        template = _template_of(gate, module, args, kwargs)
        if len(gate.templates) >= _KEPT:
            del gate.templates[next(iter(gate.templates))]
        gate.templates[key] = template
    if role.scratch and template.is_like(args, kwargs):
        return args[0]  # nobody looks at it, so that no memory need be taken
    return template.build(args, kwargs, zeros=frozenset(role.ends), scratch=role.scratch)


def _template_of(gate: Gate, module: nn.Module, args: Any, kwargs: Any) -> Template:
    """The template of the output of one run, under fake tensors where that is possible."""
    running.open_all = True  # gated modules in it run as plain ones
    try:
        try:
            template = _without_values(module, args, kwargs)
        except Exception:  # as many rows as a router sends to an expert, say
            if any(map(is_part, module.parameters())):  # for which others would have to be asked
                raise
            template = _with_values(module, args, kwargs)
    except Exception as error:
        raise ChangedModelError(
            f'the shapes that "{gate.name}" hands out for an input of a new shape cannot be '
            f"found: {error}",
            expected="a module that can be run by itself",
            instead="pass example_inputs of the shape that is trained with, or leave the block "
            "out with blocks=",
        ) from error
    finally:
        running.open_all = False
    watched = next(iter(gate.templates.values()), template)
    return template.handing_on(watched)


def _without_values(module: nn.Module, args: Any, kwargs: Any) -> Template:
    """By a run under fake tensors."""
    # Buffers are real there as well: an operation on buffers alone changes them.
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()]
    mode = fake_mode()
    with without_modes(), torch.no_grad():
        args, kwargs = fresh((args, kwargs), lambda tensor: mode.from_tensor(tensor.detach()))
    # A module may keep what it has computed: no fake must stay, which `put_back` sees to.
    try:
        with ExitStack() as stack:
            stack.enter_context(put_back(module))
            stack.enter_context(same_generators())
            stack.enter_context(_without_hooks(module))
            stack.enter_context(without_modes())
            stack.enter_context(mode)
            stack.enter_context(_full_parameters(module))
            stack.enter_context(torch.no_grad())
            return describe(module.forward(*args, **kwargs), args, kwargs)
    finally:
        with torch.no_grad():
            for buffer, version, before in buffers:
                if buffer._version != version:
                    buffer.copy_(before)


def _with_values(module: nn.Module, args: Any, kwargs: Any) -> Template:
    """By a run that leaves no trace."""
    args, kwargs = fresh((args, kwargs), torch.Tensor.detach)
    as_before = undisturbed(module)
    with torch.no_grad(), _without_hooks(module), as_before as originals, originals.noting():
        return describe(module.forward(*args, **kwargs), args, kwargs)


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Users' hooks do not see what is computed for a shape; torch's own may make weights."""
    before = [(table, dict(table)) for part in module.modules() for table in hooks_of(part)]
    for table, hooks in before:
        for number, hook in hooks.items():
            if not getattr(hook, "__module__", type(hook).__module__).startswith("torch."):
                del table[number]
    try:
        yield
    finally:
        for table, hooks in before:
            table.clear()  # they are called in the order in which they stand there
            table.update(hooks)


@contextmanager
def _full_parameters(module: nn.Module) -> Iterator[None]:
    """For a while parameters in parts have their full shapes; under fake tensors, so no values."""
    before = [(part, dict(part._parameters)) for part in module.modules()]
    try:
        for part, parameters in before:
            for name, tensor in parameters.items():
                if tensor is not None and is_part(tensor):
                    full = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                    part._parameters[name] = nn.Parameter(full, requires_grad=False)
        yield
    finally:
        for part, parameters in before:
            part._parameters.update(parameters)


def library_hooks(module: nn.Module) -> dict[int, Any]:
    """The hooks that come out of the package which the module's class is from.

    transformers collects hidden states so. A user's hook does not fire where nothing runs; these
    are a part of the model: a layer that is skipped shows them what it hands on, and one that runs
    on some rows what it comes to on all.
    """
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
        arguments = (args, kwargs) if number in module._forward_hooks_with_kwargs else (args,)
        hook(module, *arguments, output)


def around(hooks: dict[int, Any], module: nn.Module, original: Original) -> Original:
    """The module's call without these hooks, where it has no others."""
    others = any(getattr(module, name) for name in _OTHERS)
    if not hooks or others or len(module._forward_hooks) > len(hooks):
        return original
    return type(module).forward
