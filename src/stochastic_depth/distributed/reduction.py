"""The parameters of what is skipped: how a reduction over the ranks gets along without them.

The reducer of DistributedDataParallel waits for every parameter. A skipped block hangs its
parameters on the graph, where they come out without a gradient, so that the reduction starts at
once. It hands out zeros for them; where no rank ran the block they are made None again, as on one
process, so that momentum and weight decay leave it alone.

`fully_shard` reduces what has a gradient on this rank. Where others may have run what this one
skipped, the parameters get zeros for a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.distributed.groups import on_cpu
from stochastic_depth.torch_private import (
    after_backward,
    backward_task,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)


class _Anchor(torch.autograd.Function):
    """Hands a value on, and hangs parameters on the graph that get no gradient, or zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        reduction: Reduction | None,
        fresh: bool,  # noqa: FBT001  (`apply` takes no keywords)
        *parameters: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.reduction, ctx.anchored = reduction, parameters
        if fresh:  # nobody else holds it: as a view, in-line code could not change it in place
            ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if ctx.reduction is None:
            return gradient, None, None, *map(torch.zeros_like, ctx.anchored)
        ctx.reduction.without_gradient.update(dict.fromkeys(ctx.anchored))
        return gradient, None, None, *[None for _ in ctx.anchored]


@dataclass(eq=False)
class Reduction:
    """The skipped parameters of one backward, from its start to the end of the reduction."""

    without_gradient: dict[Tensor, None] = field(default_factory=dict)
    waiting: list[nn.Parameter] = field(default_factory=list)  # for the end of their branch
    task: int = -1  # the backward that is under way
    ranks_differ: bool = False  # in it: a block that this rank skipped may have run elsewhere
    zeros: bool = False  # for a gradient, instead of none

    def skip(self, output: Any, parameters: Iterable[nn.Parameter]) -> Any:
        """What a block that is skipped whole returns, with its parameters hung on."""
        leaves, spec = tree_flatten(output)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                # The hooks of a unit around the block want no view of its own input.
                own = leaf.clone() if self.zeros else leaf
                leaves[number] = self._anchored(own, parameters, fresh=self.zeros)
                break
        return tree_unflatten(leaves, spec)

    def stand_in(self, output: Any, ends: frozenset[int], module: nn.Module) -> Any:
        """A dropped module's stand-in; the last of a branch (it has `ends`) carries them all."""
        self.waiting += module.parameters()
        if not ends:
            return output
        leaves, spec = tree_flatten(output)
        end = min(ends)
        leaves[end] = self._anchored(leaves[end], self.waiting, fresh=True)
        self.waiting = []
        return tree_unflatten(leaves, spec)

    def _anchored(self, value: Tensor, parameters: Iterable[Tensor], *, fresh: bool) -> Tensor:
        trained = [p for p in parameters if p.requires_grad]
        if not trained or not torch.is_grad_enabled():
            return value
        return cast(Tensor, _Anchor.apply(value, None if self.zeros else self, fresh, *trained))

    def expect(self, wrapper: DistributedDataParallel, values: Any, *, differ: bool) -> None:
        """Be told when the backward of this forward has come to one of these values."""
        reduces = wrapper.require_backward_grad_sync

        def begun(gradient: Tensor) -> None:
            self.ranks_differ |= differ and reduces
            if self.task != backward_task():
                self.task = backward_task()
                after_backward(lambda: self._accumulated(wrapper))

        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(begun)
                return

    def _accumulated(self, wrapper: DistributedDataParallel) -> None:
        """All gradients of this rank are there. The reducer's own end comes next, then ours."""
        held = {p for p in wrapper.module.parameters() if p.grad is not None}
        after_backward(lambda: self._reduced(wrapper, held))

    def _reduced(self, wrapper: DistributedDataParallel, held: set[Tensor]) -> None:
        if self.ranks_differ:
            held = _held_anywhere(wrapper, held)
        for parameter in self.without_gradient:
            if parameter not in held:
                parameter.grad = None
        self.without_gradient, self.task, self.ranks_differ = {}, -1, False


def _held_anywhere(wrapper: DistributedDataParallel, held: set[Tensor]) -> set[Tensor]:
    """The parameters that have a gradient on one rank at least."""
    parameters = list(wrapper.module.parameters())
    flags = torch.tensor([p in held for p in parameters], dtype=torch.uint8, device="cpu")
    ranks = tuple(dist.get_process_group_ranks(wrapper.process_group))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=on_cpu(ranks))
    return {p for p, flag in zip(parameters, flags.tolist(), strict=True) if flag}
