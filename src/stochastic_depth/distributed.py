"""Other processes: which there are, and how DistributedDataParallel gets along without a block.

Its reducer waits for every parameter. At the end of a forward the parameters of all that it skipped
are hung on its output, so that the backward comes to them first, without a gradient, and nobody
waits for them. The reducer hands out zeros for them; where no rank ran the block they are made None
again, as on one process, so that momentum and weight decay leave it alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.torch_private.backward import after_backward, backward_task
from stochastic_depth.torch_private.processes import TAKES_THE_OUTPUT, known
from stochastic_depth.torch_private.tracing import begins_no_graph, ends_a_graph

_on_cpu: dict[tuple[Any, tuple[int, ...]], Any] = {}
ranks_differ: WeakKeyDictionary[DistributedDataParallel, int] = WeakKeyDictionary()
"""Where ranks may have skipped other blocks than each other: the last backward of it, or -1."""


is_running: Callable[[], bool] = dist.is_initialized if dist.is_available() else lambda: False
"""Whether this process is one of several that know each other."""


def place(process_group: Any) -> tuple[int, int]:
    """This process's rank, and how many there are in the group (None: all)."""
    if not is_running():
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def ranks_in(process_group: Any) -> tuple[int, ...]:
    """The ranks of a group (None: all)."""
    if not is_running():
        return ()
    return tuple(dist.get_process_group_ranks(process_group or dist.group.WORLD))


def on_cpu(ranks: tuple[int, ...]) -> Any:
    """A group of these ranks whose collectives do not wait for a device; made by all of them."""
    world = dist.group.WORLD
    if dist.get_backend(world) == "gloo" and len(ranks) == dist.get_world_size():
        return world
    key = (world, ranks)  # a world that was destroyed took its groups along
    if key not in _on_cpu:
        group = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
        _on_cpu[key] = group
    return _on_cpu[key]


class Forward:
    """One forward of a DistributedDataParallel, and what it skips.

    Until it ends it stands in the place of the method that takes the output.

    Attributes:
        skipped: The parameters of what did not run.
    """

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        self.wrapper = wrapper
        self.skipped: dict[Tensor, None] = {}
        known(wrapper, TAKES_THE_OUTPUT)
        vars(wrapper)[TAKES_THE_OUTPUT] = self

    @ends_a_graph("parameters are hung on the output of DistributedDataParallel outside of graphs")
    def __call__(self, output: Any) -> Any:
        """The output, with the skipped parameters hung on its graph."""
        del vars(self.wrapper)[TAKES_THE_OUTPUT]
        self.reduces = self.wrapper.require_backward_grad_sync
        if self.skipped or self.wrapper in ranks_differ:
            found: dict[Tensor, Tensor] = {}
            _change(output, lambda tensor: found.setdefault(tensor, tensor), set())
            values = [tensor for tensor in found if tensor.requires_grad]
            values = [tensor for tensor in values if tensor.grad_fn is not None] or values
            trained = [parameter for parameter in self.skipped if parameter.requires_grad]
            bases = {id(value) for value in values} & {id(part._base) for part in values}
            for tensor in values:  # each on its own: what the loss leaves out stays as it is
                overlaps = not bases.isdisjoint((id(tensor), id(tensor._base)))
                found[tensor] = _Anchor.apply(self, tensor, overlaps, *trained)
            output = _change(output, found.__getitem__, set())
        return known(self.wrapper, TAKES_THE_OUTPUT)(output)

    def note_gradients(self) -> None:
        """All gradients of this rank are there. The reducer's own end comes next, then ours."""
        differ, task = self.wrapper in ranks_differ, backward_task()
        if differ and ranks_differ[self.wrapper] == task:  # of another forward, for all parameters
            return
        if differ:
            ranks_differ[self.wrapper] = task
        parameters = list(self.wrapper.module.parameters() if differ else self.skipped)
        present = [parameter.grad is not None for parameter in parameters]
        after_backward(lambda: self._clear(parameters, present, differ=differ))

    def _clear(self, parameters: list[Any], present: list[bool], *, differ: bool) -> None:
        """Take the zeros away from those that have a gradient on no rank."""
        if differ:
            flags = torch.tensor(present, dtype=torch.uint8, device="cpu")
            group = on_cpu(ranks_in(self.wrapper.process_group))
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
            present = flags.tolist()
        for parameter, is_present in zip(parameters, present, strict=True):
            if not is_present:
                parameter.grad = None


def _change(value: Any, change: Callable[[Tensor], Tensor], seen: set[int]) -> Any:
    """A value with its tensors changed: in place, in any object, but for tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [_change(part, change, seen) for part in value]
        if all(map(operator.is_, parts, value)):
            return value
        return getattr(type(value), "_make", type(value))(parts)
    keys: Any = ()
    get: Any = getattr
    put: Any = object.__setattr__  # it may be frozen
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        get, put = operator.getitem, operator.setitem
    elif not isinstance(value, nn.Module | ModuleType | type):
        # With slots a dataclass has no dictionary.
        keys = getattr(value, "__dict__", getattr(value, "__dataclass_fields__", ()))
        keys = [key for key in keys if hasattr(value, key)]
    if keys and id(value) not in seen:
        seen.add(id(value))
        for key in keys:
            before = get(value, key)
            after = _change(before, change, seen)
            if after is not before:
                put(value, key, after)
    return value


class _Anchor(torch.autograd.Function):
    """Hands a value on, and hangs parameters on its graph that get no gradient."""

    @staticmethod
    @begins_no_graph
    def forward(ctx: Any, taken_by: Forward, value: Tensor, overlaps: bool, *rest: Tensor) -> Any:  # noqa: FBT001
        ctx.set_materialize_grads(False)
        ctx.forward, ctx.parameters = taken_by, len(rest)
        # A tensor of its own, no view: what comes next may change it in place. Where that changed
        # another value, too, torch has to refuse it.
        return value.view_as(value) if overlaps else value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if ctx.forward.reduces:
            after_backward(ctx.forward.note_gradients)
        return None, gradient, None, *([None] * ctx.parameters)
