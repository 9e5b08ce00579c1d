"""What gates know, and the calls that are under way.

A *container* is the module whose call decides about a block; a *member* is a module of one of its
branches. The decision belongs to the call (a `Passage`), not to the module: threads do not disturb
each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stochastic_depth.deciding import Decision
from stochastic_depth.discovery.templates import Form, Template
from stochastic_depth.distributed.layout import WHOLE, Layout
from stochastic_depth.distributed.reduction import Reduction
from stochastic_depth.errors import ChangedModelError
from stochastic_depth.plan import Plan
from stochastic_depth.rows import Dims, Held, Rows

Original = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Role:
    """What one call of a member is in its container: a part of which branch."""

    block: int
    branch: int
    scaled: frozenset[int]  # the leaves of its output to multiply, the branch's value
    unread: frozenset[int]  # the leaves that only other modules of the branch read
    takes: Dims = field(default_factory=dict)  # the leaves of its arguments to take rows of
    gives: Dims = field(default_factory=dict)  # the leaves of its output to put back
    weights: tuple[str, ...] = ()  # its own parameters that take the branch's factor in
    within: tuple[tuple[int, int], ...] = ()  # the branches (block, branch) around this one

    @property
    def ends(self) -> Dims:
        """The leaves of the branch's value that hold the batch."""
        return {leaf: dim for leaf, dim in self.gives.items() if leaf in self.scaled}


@dataclass(eq=False)
class Gate:
    """What is known about one gated module. It may be a container, a member, or both."""

    plan: Plan
    name: str
    blocks: tuple[int, ...] = ()  # a container's: the blocks that its call decides about
    whole: Template | None = None  # a container's: what it comes to when dropped
    forms: frozenset[Form] = frozenset()  # a container's: the calls that `whole` holds for
    batch: dict[Form, Held] = field(default_factory=dict)
    """A container's in mode "sample": where its arguments and output hold the batch, by form."""
    positional: tuple[str, ...] = ()  # a container's: names of its forward's parameters
    expected: int = 0  # a container's: how many calls of its members one call of it makes
    roles: dict[str, tuple[Role | None, ...]] = field(default_factory=dict)
    """A member's: for each container, what its first, second, ... call in it is."""
    templates: dict[tuple[object, ...], Template] = field(default_factory=dict)
    branch: int | None = None  # a `Residual`'s: which branch of its block it computes
    used_elsewhere: bool = False  # a member's: is called outside of its containers, too
    alone: frozenset[Gate] = frozenset()
    """A container's: its members that are nothing else, nor called anywhere else."""
    within: frozenset[Gate] = frozenset()  # a container's: those of them that end no branch
    ends: tuple[tuple[int, ...] | None, ...] = ()
    """A member's, for its first, second, ... call, or for all of them: the branch that it ends, by
    its number in the container, and the leaves to multiply; None: it ends none."""
    number: int = 0  # a member's that ends several: its own in each of its containers
    one_graph: bool = True  # a container's: its members are, at each call, what `ends` says
    beneath: Gate | None = None  # a compiled container's: under whose name its forward is noted


@dataclass(slots=True, eq=False)
class Passage:
    """One call of a container."""

    gate: Gate
    decisions: dict[int, Decision]
    training: bool
    path: tuple[int, ...] = ()  # its call number, behind those of the calls around it
    counts: dict[str, int] = field(default_factory=dict)  # calls of each member so far
    calls: dict[str, int] = field(default_factory=dict)  # calls of the containers inside
    wrapper: Any = None  # the DistributedDataParallel around it
    hung: Reduction | None = None  # hangs what is skipped on the graph, where ranks reduce it
    layout: Layout = WHOLE  # where its parameters are
    given: Rows | None = None  # the rows that its forward is given, where not the whole batch
    plain: bool = False  # all branches run, on all rows, and are not multiplied
    unchanged: frozenset[Gate] = frozenset()  # its members that nothing need be looked up for
    may_part: bool = False  # other ranks may decide otherwise: nothing inside may wait for them
    compiled: bool = False  # its user compiled it, and it runs so: its members are in the graph
    visits: int = 0
    inside_member: bool = False


class Stack(threading.local):
    """The passages that are under way in this thread, outermost first."""

    def __init__(self) -> None:
        self.passages: list[Passage] = []
        self.open_all = False  # while the shapes of an output are looked up


running = Stack()


def changed(gate: Gate, what: str) -> ChangedModelError:
    """The error for a container that does not run as it was watched."""
    return ChangedModelError(
        f'"{gate.name}" does not run as it did when it was watched: {what}',
        expected=f"{gate.expected} calls, as in the watched forward",
        instead="change the model first (convert_sync_batchnorm, quantisation, new heads) and "
        "apply stochastic depth afterwards; or depth.remove(), change, apply again. In inference: "
        "depth.fold(), or torch.backends.mha.set_fastpath_enabled(False)",
    )
