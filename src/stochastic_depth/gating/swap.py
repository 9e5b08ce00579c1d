"""The class swap: a gated module's class is a subclass of its own that overrides `__call__`.

`__call__` lies above hooks, checkpoint wrappers and `module.compile()`, so a skipped block skips
those, too. Parameters, state-dict keys, `isinstance` and `__name__` stay. As in
`torch.nn.utils.parametrize`, undoing restores the very class.

The module that ends a branch is gated for the sake of a factor. While none is due, as in training
with scale "eval", it *sleeps*: it has its own class back, and a call costs what it did before.
"""

from __future__ import annotations

import copyreg
import threading
from functools import cache
from typing import Any

from torch import nn

from stochastic_depth.errors import SetupError
from stochastic_depth.gating.call import block_call, part_call
from stochastic_depth.gating.compiled import release
from stochastic_depth.gating.gate import KEY, Gate, gate_of
from stochastic_depth.torch_private.tracing import without_fused_path

_lock = threading.Lock()


def swap_in(module: nn.Module, gate: Gate) -> None:
    """Gate a module."""
    if not _asks_itself(module):
        kind: Any = type(module)
        module.__class__ = _gated(kind, is_part=not gate.units)
    module.__dict__[KEY] = gate


def swap_out(module: nn.Module) -> None:
    """Give a gated module its own class back."""
    gate: Gate = module.__dict__.pop(KEY)
    if gate.asleep:
        gate.asleep = False  # its ends are plain from now on, or gated anew with it
    if _asks_itself(module):
        module.__dict__[KEY] = None
        return
    release(module)
    kind: Any = type(module)
    if hasattr(kind, "gated_from"):  # not asleep
        module.__class__ = _ungated(kind)


def let_sleep(gate: Gate, module: nn.Module) -> None:
    """Give the ends of a block's branches their own classes back, until they are needed.

    Not where somebody has put something around them (torch.compile keeps a module's call), or has
    changed these classes (a parametrization, fully_shard).
    """
    with _lock:
        if gate.asleep is not False:  # another thread was first
            return
        ends = _ends(gate, module)
        made = [vars(type(end)).get("size_as_made") == len(vars(type(end))) for end in ends]
        made += ["_orig_mod" not in end._modules for end in ends]
        gate.asleep = True if set(ends) == set(_at_paths(gate, module)) and all(made) else None
        for end in ends if gate.asleep else ():
            kind: Any = type(end)
            end.__class__ = _ungated(kind)


def wake(gate: Gate, module: nn.Module) -> bool:
    """Gate the ends again: for the next inference, or where they act in training, for good.

    Returns:
        Whether that was possible; else they are as they were.
    """
    with _lock:
        ends = _ends(gate, module)
        compiled = any("_orig_mod" in part._modules for part in _at_paths(gate, module))
        if len(ends) < len(gate.parts) or compiled:
            return False
        for end in ends:
            kind: Any = type(end)
            if not hasattr(kind, "gated_from"):
                end.__class__ = _gated(kind, is_part=True)
        if "_is_replica" not in vars(module):  # of DataParallel, with ends of its own
            gate.asleep = None if module.training and not gate.plan.forcing else False
    return True


def _ends(gate: Gate, module: nn.Module) -> list[nn.Module]:
    return [end for end in module.modules() if (part := gate_of(end)) and part.owner is gate]


def _at_paths(gate: Gate, module: nn.Module) -> list[nn.Module]:
    """What lies where the ends were: they, or what was put around them or in their place."""
    parts = dict(module.named_modules(remove_duplicate=False))
    return [parts[name] for path in gate.parts if (name := ".".join(path)) in parts]


def _asks_itself(module: nn.Module) -> bool:
    """Whether it is an `sd.Residual`, whose own class looks for its gate."""
    return hasattr(module, "_is_stochastic_depth_residual")


@cache  # blocks of one class go on sharing one
def _ungated(gated: Any) -> type[nn.Module]:
    """The class that a gated one was made from."""
    if "gated_from" in vars(gated):
        original: type[nn.Module] = gated.gated_from
        return original
    # A class that fully_shard or a parametrization made from the gated one since.
    bases = tuple(vars(base).get("gated_from", base) for base in gated.__bases__)
    content = {k: v for k, v in vars(gated).items() if k not in ("__dict__", "__weakref__")}
    remade: type[nn.Module] = type(gated)(gated.__name__, bases, content)
    return remade


@cache
def _gated(original: Any, *, is_part: bool) -> type[nn.Module]:
    """The gated subclass of a class, one for blocks and one for modules that are but parts."""
    gated_call = part_call if is_part else block_call

    def reduce_gated(self: nn.Module, protocol: Any) -> Any:
        # No module holds the gated class under its name, so a copy is built from the original.
        reduced: Any = original.__reduce_ex__(self, protocol)
        make, arguments, *rest = reduced
        if make is copyreg.__newobj__ and arguments[0] is gated:  # type: ignore[attr-defined]
            make, arguments = _new, (original, is_part, *arguments[1:])
        elif make is gated:  # as what torch.compile makes around a module
            make, arguments = _made, (original, self.__dict__[KEY], *arguments)
        return (make, arguments, *rest)

    def train_gated(self: Any, *args: Any, **kwargs: Any) -> Any:
        trained = original.train(self, *args, **kwargs)
        gate = gate_of(self)
        if gate is not None and gate.asleep and not self.training:
            wake(gate, self)
        return trained

    def begin_plain(self: Any, *args: Any, **kwargs: Any) -> None:
        # Not the gated module, but another of its class: a slice of a Sequential, say.
        self.__dict__.pop(KEY, None)
        self.__class__ = original
        self.__init__(*args, **kwargs)

    content = {
        "gated_from": original,
        "torchdynamo_force_dynamic": True,  # else torch 2.6 exports what is beneath `__call__`
        **without_fused_path(original),
        "__init__": begin_plain,
        "__call__": gated_call(original.__call__),
        "__reduce_ex__": reduce_gated,
        **({} if is_part else {"train": train_gated}),
        "__prepare_scriptable__": _refuse_to_script,
        **{name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")},
    }
    metaclass: Any = type(original)
    gated: type[nn.Module] = metaclass(original.__name__, (original,), content)
    gated.size_as_made = len(vars(gated)) + 1  # type: ignore[attr-defined]
    return gated


def _refuse_to_script(module: nn.Module) -> nn.Module:
    gate: Gate = module.__dict__[KEY]
    raise SetupError(
        f'torch.jit.script met "{gate.name}" with its gate, which a script cannot hold',
        expected="a plain model",
        instead="call depth.fold() (or depth.remove()) first, or use torch.export",
    )


def _made(original: type[nn.Module], gate: Gate, *args: Any) -> nn.Module:
    """What `copy` and `pickle` call for a class whose modules are made anew to be copied."""
    module = original(*args)
    swap_in(module, gate)
    return module


def _new(original: Any, is_part: bool, *args: Any) -> nn.Module:  # noqa: FBT001  (pickled)
    """What `copy` and `pickle` call to make an empty gated module."""
    gated = _gated(original, is_part=is_part)
    return gated.__new__(gated, *args)
