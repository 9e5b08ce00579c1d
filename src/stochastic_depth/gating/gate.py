"""What is known about a gated module: a block's, or one of a branch; and what is under way."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from stochastic_depth.discovery.recording import Call
from stochastic_depth.discovery.templates import Argument, Template, named
from stochastic_depth.errors import ChangedModelError
from stochastic_depth.gating.batch import BatchDims
from stochastic_depth.plan import Counted, Plan
from stochastic_depth.torch_private.trees import MAY_BE_FLAGS, NO_FLAG, PLAIN_VALUES, as_flag

KEY = "_stochastic_depth"  # where a gated module keeps its gate
_BY_POSITION = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
_COLLECTING = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_MANY_FORMS = 256  # of calls of one block that are remembered

Original = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Role:
    """What one call of a branch module is in its block: a part of which branch."""

    branch: int  # its number in the gate
    ends: Mapping[int, int]  # leaves of its output: of which branch each is the value
    scratch: frozenset[int] = frozenset()  # those that only other modules of the branch read
    batch: BatchDims = field(default_factory=BatchDims)  # of what to take rows, and put back
    weights: tuple[str, ...] = ()  # its own parameters that take the branch's factor in


@dataclass(eq=False)
class Gate(Counted):
    """What is known about one gated module: a block's, a branch's, or both.

    Python keeps less than 30 attributes of an object side by side, where they are read quickest.
    (In slots they would be as well; torch.compile of torch 2.6 and 2.7 cannot follow these.)
    """

    plan: Plan = field(kw_only=True)
    index: int = -1  # a block's: in `plan.gates`
    is_fast: bool = False  # a block's: whether its calls may go the fast way
    returns_first: bool = False  # a block's: when dropped, returns the first tensor it is given
    returns_copy: bool = False  # a block's: somebody outside of the model may hold its input
    whole: Template | None = None  # a block's: what it returns when dropped; None: it has to run
    takes_one: bool = False  # a block's: one tensor alone is a call that it was watched with
    known: Any = None  # a block's: the `KnownCalls` that it was watched with
    batch: Any = None  # a block's in mode "sample": which dimensions of its values hold the batch
    parts: tuple[tuple[str, ...], ...] = ()  # a block's: the paths of its gated branch modules
    stands_in: bool = False  # a block's: all its branch modules are gated, not just the ends
    simple_ends: bool = True  # a block's: each end is called once in it and nowhere else
    closed: Any = None  # a block's: the passage of a call that drops all of its branches
    scales: Any = False  # a block's, in a graph: its factors, or None; False: its call is in none
    roles: dict[str, tuple[Role | None, ...]] = field(default_factory=dict)
    """A branch module's: for each block, what its first, second, ... call in it is."""
    owners: tuple[Gate, ...] = ()  # a branch module's: the gates of these blocks
    role: Any = None  # a branch module's: its `Role` at every call, where it has one owner
    owner: Gate | None = None  # a branch module's: this one, where it is no block itself
    templates: dict[tuple[object, ...], Template] = field(default_factory=dict)
    last: Any = (None, None)  # the last signature, and what stands in: None is the input itself
    asleep: bool | None = None  # a block's: whether its ends sleep (see `swap`); None: never
    used_elsewhere: bool = False  # a branch module's: is called outside of its blocks, too


class ModuleCall(NamedTuple):
    """One call of a gated module; `run` is the `__call__` of the module's own class."""

    gate: Gate
    module: nn.Module
    run: Original
    args: Any
    kwargs: Any

    def __call__(self) -> Any:
        return self.run(self.module, *self.args, **self.kwargs)


class KnownCalls:
    """The arguments that a block was watched with.

    Args:
        gate: The block's, which knows what it returns when it is skipped whole.
        module: The block.
        calls: Its calls in the watch.
    """

    def __init__(self, gate: Gate, module: nn.Module, calls: Sequence[Call]) -> None:
        parameters = inspect.signature(module.forward).parameters
        kinds = {name: parameter.kind for name, parameter in parameters.items()}
        self.positional = tuple([name for name in kinds if kinds[name] in _BY_POSITION])
        self._declared = {name for name in kinds if kinds[name] not in _COLLECTING}
        self.name = gate.name
        forms: list[Any] = [{named(p, self.positional): v for p, v in call.form} for call in calls]
        leaves = gate.whole.leaves if gate.whole else ()
        handed_on = [leaf.place for leaf in leaves if isinstance(leaf, Argument)]
        self._handed_on = {named(place, self.positional) for place in handed_on}
        # A tuple stands for a plain value, whose second part it is.
        self.tensors = {p for form in forms for p, v in form.items() if not isinstance(v, tuple)}
        self._defaults = {
            p: parameter.default
            for p, parameter in parameters.items()
            if isinstance(parameter.default, PLAIN_VALUES) and p not in self.tensors
        }
        self._flags = [
            self._defaults | {p: v[1] for p, v in form.items() if self._is_flag(p)}
            for form in forms
        ]
        # Whether one tensor alone is such a call.
        gate.takes_one = self._defaults in self._flags and self._handed_on <= {*self.positional[:1]}
        self._known: dict[object, bool] = {}

    def include(self, args: Any, kwargs: Any) -> bool:
        """Whether a call has the plain values of a watched one, and all that the block hands on.

        With other values the forward may do more than hand its input on.

        Raises:
            ChangedModelError: There is a tensor, or an object, where the example had none: the
                forward may then run a branch that nobody has seen. Fewer are fine: a branch that
                does not run needs nothing.
        """
        kinds: tuple[object, ...] = *map(type, args), *kwargs, *map(type, kwargs.values())
        known = self._known.get(kinds)
        if known is not None:  # most calls: none of these is a plain value
            return known
        values = (value for value in (*args, *kwargs.values()) if value is not None)
        flags = [as_flag(value) for value in values if isinstance(value, MAY_BE_FLAGS)]
        plain = [flag for flag in flags if flag is not NO_FLAG]
        key = (kinds, *plain) if plain else kinds
        known = self._known.get(key)
        if known is None:
            self._refuse_unseen(args, kwargs)
            known = self._defaults | self.flags(args, kwargs) in self._flags
            places = [*enumerate(args), *kwargs.items()]
            there = {named(place, self.positional) for place, v in places if v is not None}
            known = known and self._handed_on <= there
            if len(self._known) < _MANY_FORMS:
                self._known[key] = known
        return known

    def flags(self, args: Any, kwargs: Any) -> dict[int | str, Any]:
        """The plain values among the arguments."""
        values = {named(n, self.positional): value for n, value in enumerate(args)} | kwargs
        flags = {place: as_flag(value) for place, value in values.items() if self._is_flag(place)}
        return {place: flag for place, flag in flags.items() if flag is not NO_FLAG}

    def _is_flag(self, place: int | str) -> bool:
        # What the forward takes as **kwargs it hands on, unless that is all it takes.
        return place not in self.tensors and (place in self._declared or not self._declared)

    def _refuse_unseen(self, args: Any, kwargs: Any) -> None:
        for place, value in [*enumerate(args), *kwargs.items()]:
            name = named(place, self.positional)
            # A number that goes through as one of **kwargs (a Trainer's count of tokens, say).
            is_number = isinstance(value, Tensor) and value.ndim == 0
            if name in self.tensors or as_flag(value) is not NO_FLAG:
                continue
            if name in self._declared or not is_number:
                raise ChangedModelError(
                    f'block "{self.name}" is called with a {type(value).__name__} as "{name}", '
                    "where the example had none",
                    expected="the arguments that it was watched with",
                    instead="pass the example that you train with, as example_inputs and "
                    "example_kwargs (with the mask, say)",
                )


class Running(threading.local):
    """What is under way in this thread."""

    def __init__(self) -> None:
        # Calls of blocks, outermost first: its gate, what its branches are multiplied by where all
        # run, the passage where not all do, or on some rows, whether it records a graph, and the
        # last argument that its modules were called with while none of its branches runs.
        self.blocks: list[tuple[Gate, Any, Any, bool, Any]] = []
        self.open_all = False  # while the shapes of an output are looked up
        self.compiler: Any = None  # what torch.compile does with frames, while a gate decides
        self.trial: Any = None  # what is tried at each call of a block, before apply returns


running = Running()


def gate_of(module: nn.Module) -> Gate | None:
    """The module's gate, where it has one."""
    return cast("Gate | None", module.__dict__.get(KEY))


def changed(gate: Gate, what: str) -> ChangedModelError:
    """The error for a block that does not run as it was watched."""
    name = f'"{gate.name}"' if gate.name else "the model"
    return ChangedModelError(
        f"{name} does not run as it did when it was watched: {what}",
        expected="the modules that were watched, called as they were",
        instead="change the model first (convert_sync_batchnorm, quantisation, new heads) and "
        "apply stochastic depth afterwards; or depth.remove(), change, apply again. In inference: "
        "depth.fold(), or torch.backends.mha.set_fastpath_enabled(False)",
    )
