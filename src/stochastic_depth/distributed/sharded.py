"""What `fully_shard` does around a block, where the block is skipped: casts, and prefetching.

A skipped block is not gathered. Explicit lists of units to prefetch
(`set_modules_to_forward_prefetch`) would gather it all the same, and what was gathered would lie
there until the block's next call, with weights that may have changed meanwhile: so the lists show
units that run, each skipped one replaced by those that it prefetches itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from stochastic_depth.torch_private import (
    awaits_backward,
    is_fully_sharded_unit,
    modules_of_unit,
    prefetched_by,
    set_prefetched,
    sharded_dtypes,
    tree_map,
)

Runs = Callable[[nn.Module], bool]


def as_unit_would(module: nn.Module, value: Any) -> Any:
    """What a skipped block hands on, as if it had been called.

    A unit casts its inputs and outputs. Where the unit lies around the block, its hooks want no
    view of its own input for an output.
    """
    if not is_fully_sharded_unit(module):
        return tree_map(_no_view, value)
    for dtype in sharded_dtypes(module):
        if dtype is not None:
            value = tree_map(lambda x, to=dtype: _cast(x, to), value)
    return value


def _no_view(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value._is_view() else value


def _cast(value: Any, dtype: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


class Prefetched(list[Any]):
    """A list of units to prefetch that shows those which run.

    Args:
        states: All that the user listed.
        runs: Whether a unit's module is called in this forward, or was, for a backward.
        forward: Whether the list is of the forward.
    """

    def __init__(self, states: list[Any], runs: Callable[[Any], bool], *, forward: bool) -> None:
        super().__init__(states)
        self._runs, self._forward = runs, forward

    def __iter__(self) -> Iterator[Any]:
        return iter(dict.fromkeys(self._running(seen=set())))

    def _running(self, seen: set[int]) -> Iterator[Any]:
        for state in super().__iter__():
            if self._runs(state):
                yield state
            elif id(state) not in seen:
                seen.add(id(state))
                others = prefetched_by(state, forward=self._forward)
                yield from others._running(seen) if isinstance(others, Prefetched) else others


def prefetch_what_runs(unit: nn.Module, will_run: Runs) -> None:
    """Have explicit prefetching leave out what is skipped, in the whole model around this unit."""

    def runs(state: Any) -> bool:
        return all(map(will_run, modules_of_unit(state)))

    def forward(states: list[Any]) -> list[Any]:
        known = isinstance(states, Prefetched) or not states
        return states if known else Prefetched(states, runs, forward=True)

    def backward(states: list[Any]) -> list[Any]:
        known = isinstance(states, Prefetched) or not states
        return states if known else Prefetched(states, awaits_backward, forward=False)

    set_prefetched(unit, forward, backward)
