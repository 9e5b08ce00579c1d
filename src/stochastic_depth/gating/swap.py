"""The class swap: a gated module's class is a subclass that overrides `__call__`, and nothing else.

`__call__` lies above hooks, checkpoint wrappers and `module.compile()`, so a skipped block skips
those, too. Parameters, state-dict keys, `isinstance` and `__name__` stay. As in
`torch.nn.utils.parametrize`, undoing restores the very class.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from stochastic_depth.gating.compiled import compiled_forward
from stochastic_depth.gating.gate import KEY, gated_call
from stochastic_depth.gating.passage import Gate
from stochastic_depth.torch_private import without_fused_path

_gated_classes: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def swap_in(module: nn.Module, gate: Gate) -> None:
    """Gate a module."""
    module.__dict__[KEY] = gate
    module.__class__ = _gated(type(module))


def swap_out(module: nn.Module) -> None:
    """Give a gated module its own class back."""
    gate: Gate = module.__dict__.pop(KEY)
    if gate.branch is not None:  # a `Residual`, whose class looks for its gate itself
        module.__dict__[KEY] = None
        return
    own: Any = type(module)
    module.__class__ = _ungated(own)


def compile_in(module: nn.Module) -> None:
    """Have a gated module's forward look for its graph, beneath gate and hooks."""
    own: Any = type(module)
    module.__class__ = _with_graphs(own)


@cache  # blocks of one class go on sharing one
def _ungated(own: Any) -> type[nn.Module]:
    return _remade(own, lambda original: original)


@cache
def _with_graphs(own: Any) -> type[nn.Module]:
    return _remade(own, lambda original: _gated(original, with_graphs=True))


def _remade(own: Any, kind: Callable[[type[nn.Module]], type[nn.Module]]) -> type[nn.Module]:
    """A gated class, made anew from its own one."""
    if "gated_from" in vars(own):
        return kind(own.gated_from)
    # A class that fully_shard or a parametrization made from the gated one since.
    bases = tuple(
        kind(vars(base)["gated_from"]) if "gated_from" in vars(base) else base
        for base in own.__bases__
    )
    content = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__")}
    remade: type[nn.Module] = type(own)(own.__name__, bases, content)
    return remade


def _gated(original: type[nn.Module], *, with_graphs: bool = False) -> type[nn.Module]:
    """The gated subclass of a class, one for each."""
    if (original, with_graphs) in _gated_classes:
        return _gated_classes[original, with_graphs]

    def reduce_gated(self: nn.Module, protocol: Any) -> Any:
        # No module holds the gated class under its name, so a copy is built from the original.
        reduced: Any = original.__reduce_ex__(self, protocol)
        make, given, *rest = reduced
        if make is copyreg.__newobj__ and given[0] is gated:  # type: ignore[attr-defined]
            make, given = _new, (original, with_graphs, *given[1:])
        elif make is gated:  # as what torch.compile makes around a module
            make, given = _made, (original, self.__dict__[KEY], *given)
        return (make, given, *rest)

    metaclass: Any = type(original)
    gated: type[nn.Module] = metaclass(
        original.__name__,
        (original,),
        {
            "gated_from": original,
            **without_fused_path(original),
            **({"forward": compiled_forward(original.forward)} if with_graphs else {}),
            "__call__": gated_call(original.__call__),
            "__reduce_ex__": reduce_gated,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        },
    )
    _gated_classes[original, with_graphs] = gated
    return gated


def _made(original: type[nn.Module], gate: Gate, *args: Any) -> nn.Module:
    """The same for a class whose modules are copied by making them anew."""
    module = original(*args)
    swap_in(module, gate)
    return module


def _new(original: type[nn.Module], with_graphs: bool, *args: Any) -> nn.Module:  # noqa: FBT001
    """What `copy` and `pickle` call to make an empty gated module."""
    gated = _gated(original, with_graphs=with_graphs)
    return gated.__new__(gated, *args)
