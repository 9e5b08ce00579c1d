"""What a gated module does when it is called: as a member of a branch, as a container, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from stochastic_depth.gating.container import call_container
from stochastic_depth.gating.member import call_member, role_in
from stochastic_depth.gating.passage import Gate, Original, running
from stochastic_depth.gating.traced import traced_call

KEY = "_stochastic_depth"  # where a gated module keeps its gate


def gate_of(module: nn.Module) -> Gate | None:
    """The module's gate, where it has one."""
    return cast("Gate | None", module.__dict__.get(KEY))


def gated_call(original: Original) -> Callable[..., Any]:
    """The `__call__` of a gated class; `original` is that of the module's own class.

    Most calls are those of members whose branch runs as it is: they come first, in one piece, for
    here a microsecond counts. One without gradients may be a reentrant checkpoint's, which has to
    find what was decided.
    """

    def call_gated(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():  # False outside of a trace; there, all that follows is left out
            return traced_call(self, original, args, kwargs, call_gated)
        gate, passages = self.__dict__[KEY], running.passages
        if passages and gate in passages[-1].unchanged and torch.is_grad_enabled():
            passage = passages[-1]
            if passage.inside_member:
                return original(self, *args, **kwargs)
            passage.visits += 1
            passage.inside_member = True
            try:
                return original(self, *args, **kwargs)
            finally:
                passage.inside_member = False
        if running.open_all:
            return original(self, *args, **kwargs)
        if gate.roles:
            found = role_in(gate)
            if found is not None:
                return call_member(gate, *found, self, original, args, kwargs)
        return call_container(gate, self, original, args, kwargs)

    return call_gated
