"""The parameters of what is skipped: how DistributedDataParallel gets along without them.

Its reducer waits for every parameter. A skipped block hangs its parameters on the graph, where they
come out without a gradient, so that the reduction starts at once. It hands out zeros for them;
where no rank ran the block they are made None again, as on one process, so that momentum and weight
decay leave it alone.
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
from stochastic_depth.torch_private.backward import after_backward, backward_task
from stochastic_depth.torch_private.trees import tree_leaves


class _Anchor(torch.autograd.Function):
    """Hands a value on, and hangs parameters on the graph that get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        reduction: Reduction,
        fresh: bool,  # noqa: FBT001  (`apply` takes no keywords)
        *parameters: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.reduction, ctx.anchored = reduction, parameters
        ctx.reduces = reduction.wrapper.require_backward_grad_sync
        ctx.is_first = backward_task() == -1  # not in a reentrant checkpoint's recomputation
        if fresh:  # nobody else holds it: as a view, in-line code could not change it in place
            ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        ctx.reduction.skipped.update(dict.fromkeys(ctx.anchored))
        if ctx.is_first:
            ctx.reduction.await_end(reduces=ctx.reduces)
        return gradient, None, None, *[None for _ in ctx.anchored]


@dataclass(eq=False)
class Reduction:
    """The skipped parameters of one backward, from its start to the end of the reduction."""

    wrapper: DistributedDataParallel
    ranks_differ: bool = False  # a block that this rank skipped may have run elsewhere
    skipped: dict[Tensor, None] = field(default_factory=dict)
    waiting: list[nn.Parameter] = field(default_factory=list)  # for the end of their branch
    task: int = -1  # the backward that is under way
    reduces: bool = False  # whether it synchronises the ranks

    def hang(self, value: Tensor, parameters: Iterable[Tensor], *, fresh: bool) -> Tensor:
        """The value, with these parameters hung on its graph."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if not trained or not torch.is_grad_enabled():
            return value
        return cast(Tensor, _Anchor.apply(value, self, fresh, *trained))

    def expect(self, values: Any) -> None:
        """Be told when the backward of this forward has come to one of these values."""
        reduces = self.wrapper.require_backward_grad_sync
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: self.await_end(reduces=reduces))
                return

    def await_end(self, *, reduces: bool) -> None:
        """Look at the gradients at the end of the backward that is under way, once."""
        self.reduces |= reduces
        if self.task == -1:
            self.task = backward_task()
            after_backward(self._accumulated)

    def _accumulated(self) -> None:
        """All gradients of this rank are there. The reducer's own end comes next, then ours."""
        present = {p for p in self.wrapper.module.parameters() if p.grad is not None}
        after_backward(lambda: self._reduced(present))

    def _reduced(self, present: set[Tensor]) -> None:
        if self.ranks_differ and self.reduces:
            present = self._present_anywhere(present)
        for parameter in self.skipped:
            if parameter not in present:
                parameter.grad = None
        self.skipped, self.task, self.reduces = {}, -1, False

    def _present_anywhere(self, present: set[Tensor]) -> set[Tensor]:
        """The parameters that have a gradient on one rank at least."""
        parameters = list(self.wrapper.module.parameters())
        flags = torch.tensor([p in present for p in parameters], dtype=torch.uint8, device="cpu")
        ranks = tuple(dist.get_process_group_ranks(self.wrapper.process_group))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=on_cpu(ranks))
        return {p for p, flag in zip(parameters, flags.tolist(), strict=True) if flag}
