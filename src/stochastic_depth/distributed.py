"""Other processes: which there are, and how DistributedDataParallel gets along without a block.

Its reducer waits for every parameter. At the end of a forward the parameters of all that it skipped
are hung on its output, so that the backward comes to them first, without a gradient, and nobody
waits for them. The reducer hands out zeros for them; where no rank ran the block they are made None
again, as on one process, so that momentum and weight decay leave it alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.torch_private.backward import after_backward
from stochastic_depth.torch_private.processes import TAKES_THE_OUTPUT, known
from stochastic_depth.torch_private.tracing import begins_no_graph, ends_a_graph
from stochastic_depth.torch_private.trees import tree_flatten, tree_unflatten

_on_cpu: dict[tuple[Any, tuple[int, ...]], Any] = {}


def is_running() -> bool:
    """Whether this process is one of several that know each other."""
    return dist.is_available() and dist.is_initialized()


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
        ranks_differ: Whether other ranks may have run it.
    """

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        self.wrapper = wrapper
        self.skipped: dict[Tensor, None] = {}
        self.ranks_differ = False
        known(wrapper, TAKES_THE_OUTPUT)
        vars(wrapper)[TAKES_THE_OUTPUT] = self

    @ends_a_graph("parameters are hung on the output of DistributedDataParallel outside of graphs")
    def __call__(self, output: Any) -> Any:
        """The output, with the skipped parameters hung on its graph."""
        del vars(self.wrapper)[TAKES_THE_OUTPUT]
        self.reduces = self.wrapper.require_backward_grad_sync
        if self.skipped or self.ranks_differ:
            leaves, spec = tree_flatten(output)
            places = [n for n, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
            if places:
                trained = [parameter for parameter in self.skipped if parameter.requires_grad]
                values = [leaves[place] for place in places]
                hung: Any = _Anchor.apply(self, len(values), *values, *trained)
                for place, value in zip(places, hung, strict=True):
                    leaves[place] = value
                output = tree_unflatten(leaves, spec)
        return known(self.wrapper, TAKES_THE_OUTPUT)(output)

    def note_gradients(self) -> None:
        """All gradients of this rank are there. The reducer's own end comes next, then ours."""
        every = self.wrapper.module.parameters() if self.ranks_differ else self.skipped
        parameters = list(every)
        present = [parameter.grad is not None for parameter in parameters]
        after_backward(lambda: self._clear(parameters, present))

    def _clear(self, parameters: list[Any], present: list[bool]) -> None:
        """Take the zeros away from those that have a gradient on no rank."""
        if self.ranks_differ:
            flags = torch.tensor(present, dtype=torch.uint8, device="cpu")
            group = on_cpu(ranks_in(self.wrapper.process_group))
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
            present = flags.tolist()
        for parameter, is_present in zip(parameters, present, strict=True):
            if not is_present:
                parameter.grad = None


class _Anchor(torch.autograd.Function):
    """Hands values on, and hangs parameters on their graph that get no gradient."""

    @staticmethod
    @begins_no_graph
    def forward(ctx: Any, taken_by: Forward, values: int, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.forward, ctx.parameters = taken_by, len(tensors) - values
        # A tensor of its own, no view: what comes next may change it in place.
        return tuple(map(Tensor.detach, tensors[:values]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if ctx.forward.reduces:
            after_backward(ctx.forward.note_gradients)
        return None, None, *gradients, *([None] * ctx.parameters)
