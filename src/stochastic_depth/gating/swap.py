"""The class swap: a gated module's class is a subclass that overrides `__call__`, and nothing else.

`__call__` lies above hooks, checkpoint wrappers and `module.compile()`, so a skipped block skips
those, too. Parameters, state-dict keys, `isinstance` and `__name__` stay. As in
`torch.nn.utils.parametrize`, undoing restores the very class.
"""

from __future__ import annotations

import copyreg
from typing import Any, cast

from torch import nn

from stochastic_depth.gating.gate import call
from stochastic_depth.gating.passage import Gate

_KEY = "_stochastic_depth"  # where a gated module keeps its gate

_gated_classes: dict[type[nn.Module], type[nn.Module]] = {}


def gate_of(module: nn.Module) -> Gate | None:
    """The module's gate, where it has one."""
    return cast("Gate | None", module.__dict__.get(_KEY))


def swap_in(module: nn.Module, gate: Gate) -> None:
    """Gate a module."""
    module.__dict__[_KEY] = gate
    module.__class__ = _gated(type(module))


def swap_out(module: nn.Module) -> None:
    """Give a gated module its own class back."""
    del module.__dict__[_KEY]
    module.__class__ = cast(Any, type(module)).gated_from


def _gated(original: type[nn.Module]) -> type[nn.Module]:
    """The gated subclass of a class, one for each."""
    if original in _gated_classes:
        return _gated_classes[original]
    plain_call = original.__call__

    def call_gated(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self.__dict__[_KEY], self, plain_call, args, kwargs)

    def reduce_gated(self: nn.Module, protocol: Any) -> Any:
        # No module holds the gated class under its name, so a copy is built from the original.
        reduced: Any = original.__reduce_ex__(self, protocol)
        make, given, *rest = reduced
        if make is copyreg.__newobj__ and given[0] is gated:  # type: ignore[attr-defined]
            make, given = _new, (original, *given[1:])
        return (make, given, *rest)

    metaclass: Any = type(original)
    gated: type[nn.Module] = metaclass(
        original.__name__,
        (original,),
        {
            "gated_from": original,
            "__call__": call_gated,
            "__reduce_ex__": reduce_gated,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        },
    )
    _gated_classes[original] = gated
    return gated


def _new(original: type[nn.Module], *args: Any) -> nn.Module:
    """What `copy` and `pickle` call to make an empty gated module."""
    gated = _gated(original)
    return gated.__new__(gated, *args)
