"""What a gated module does when it is called: as a member of a branch, as a container, or both."""

from __future__ import annotations

from typing import Any

from torch import nn

from stochastic_depth.gating.container import call_container
from stochastic_depth.gating.member import call_member, call_plain, role_in, runs_plain
from stochastic_depth.gating.passage import Gate, Original, running


def call(gate: Gate, module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """Call a gated module; `original` is the `__call__` of its own class."""
    if running.open_all:
        return original(module, *args, **kwargs)
    if gate.roles:
        plain = runs_plain(gate)
        if plain is not None:
            return call_plain(plain, module, original, args, kwargs)
        found = role_in(gate)
        if found is not None:
            return call_member(gate, *found, module, original, args, kwargs)
    return call_container(gate, module, original, args, kwargs)
