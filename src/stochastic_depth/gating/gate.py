"""What is known about a gated module: a block's, or one of a branch; and what is under way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from stochastic_depth.discovery.templates import Template
from stochastic_depth.errors import ChangedModelError
from stochastic_depth.plan import Counted, Plan
from stochastic_depth.rows import Dims

KEY = "_stochastic_depth"  # where a gated module keeps its gate

Original = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Role:
    """What one call of a branch module is in its block: a part of which branch."""

    branch: int  # its number in the gate
    ends: Mapping[int, int]  # leaves of its output: of which branch each is the value
    unread: frozenset[int] = frozenset()  # those that only other modules of the branch read
    takes: Dims = field(default_factory=dict)  # the leaves of its arguments to take rows of
    gives: Dims = field(default_factory=dict)  # the leaves of its output to put back
    weights: tuple[str, ...] = ()  # its own parameters that take the branch's factor in


@dataclass(eq=False)
class Gate(Counted):
    """What is known about one gated module: a block's, a branch's, or both."""

    plan: Plan = field(kw_only=True)
    index: int = -1  # a block's: in `plan.gates`
    is_fast: bool = False  # a block's: whether a call with one tensor may go the fast way
    is_residual: bool = False  # a block's: it is an `sd.Residual`
    is_one_tensor: bool = False  # a block's: when dropped, returns the one tensor that it is given
    returns_copy: bool = False  # a block's: somebody outside of the model may hold its input
    whole: Template | None = None  # a block's: what it returns when dropped; None: it has to run
    places: frozenset[int | str] = frozenset()  # a block's: of its arguments that are no flags
    flags: tuple[dict[int | str, Any], ...] = ()  # a block's: its other arguments, as watched
    defaults: dict[int | str, Any] = field(default_factory=dict)  # of these
    positional: tuple[str, ...] = ()  # a block's: the names of its forward's parameters
    batch: Any = None  # a block's in mode "sample": which dimensions of its values hold the batch
    parts: tuple[tuple[str, ...], ...] = ()  # a block's: the paths of its gated branch modules
    stands_in: bool = False  # a block's: all its branch modules are gated, not just the ends
    simple_ends: bool = True  # a block's: each end is called once in it and nowhere else
    factors: tuple[float, ...] | None = None  # a block's: what its ends multiply by just now
    scales: tuple[Any, ...] | None = None  # a block's: the same for a graph, as 0-dim tensors
    depth: int = 0  # a block's: how many calls of it are under way, with all that it is given
    roles: dict[str, tuple[Role | None, ...]] = field(default_factory=dict)
    """A branch module's: for each block, what its first, second, ... call in it is."""
    owners: tuple[Gate, ...] = ()  # a branch module's: the gates of these blocks
    role: Role | None = None  # a branch module's: what it is at every call, where it has one owner
    fast_role: Role | None = None  # the same, where it is no block itself
    templates: dict[tuple[object, ...], Template] = field(default_factory=dict)
    used_elsewhere: bool = False  # a branch module's: is called outside of its blocks, too


class Running(threading.local):
    """What is under way in this thread."""

    def __init__(self) -> None:
        self.passages: list[Any] = []  # calls of blocks that run in part, outermost first
        self.open_all = False  # while the shapes of an output are looked up
        self.compiler: Any = None  # what torch.compile does with frames, while a gate decides
        self.trial: Any = None  # what is tried at each call of a block, before apply returns


running = Running()


def gate_of(module: nn.Module) -> Gate | None:
    """The module's gate, where it has one."""
    return cast("Gate | None", module.__dict__.get(KEY))


def changed(gate: Gate, what: str) -> ChangedModelError:
    """The error for a block that does not run as it was watched."""
    return ChangedModelError(
        f'"{gate.name}" does not run as it did when it was watched: {what}',
        expected="the modules that were watched, called as they were",
        instead="change the model first (convert_sync_batchnorm, quantisation, new heads) and "
        "apply stochastic depth afterwards; or depth.remove(), change, apply again. In inference: "
        "depth.fold(), or torch.backends.mha.set_fastpath_enabled(False)",
    )
