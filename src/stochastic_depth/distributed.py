"""What DistributedDataParallel and fully_shard need of a skipped block.

The reducer of DistributedDataParallel waits for every parameter. A skipped block hangs its
parameters on the graph, where they come out without a gradient, so that the reduction starts at
once. It hands out zeros for them; where no rank ran the block they are made None again, as on one
process, so that momentum and weight decay leave it alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.errors import NotYetSupportedError, SetupError
from stochastic_depth.torch_private import (
    after_backward,
    backward_task,
    inside_ddp,
    inside_fsdp,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)


def is_running() -> bool:
    """Whether this process is one of several that know each other."""
    return dist.is_available() and dist.is_initialized()


def place(process_group: Any) -> tuple[int, int]:
    """This process's rank, and how many there are in the group (None: all)."""
    if not is_running():
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def wrapper_of(module: nn.Module, block: str, *, alike: bool) -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward runs just now.

    Args:
        module: The container of a gated block.
        block: Its name.
        alike: Whether all ranks skip the same blocks, as a whole.

    Raises:
        SetupError: Its graph is static.
        NotYetSupportedError: The block is sharded in a way that is not yet supported.
    """
    if not is_running():
        return None
    refuse_sharded(module, block, alike=alike)
    wrapper = inside_ddp()
    if wrapper is not None and wrapper.static_graph:
        raise SetupError(
            f'block "{block}" is trained under DistributedDataParallel(static_graph=True)',
            expected="a wrapper that does not take the first step's graph for that of every step: "
            "stochastic depth changes it, and the gradients would silently be wrong",
            instead="leave static_graph=True out; find_unused_parameters is not needed either",
        )
    return wrapper


def sharding(module: nn.Module) -> str:
    """The name of the wrapper that shards the module's parameters, or ""."""
    return inside_fsdp(module) if is_running() else ""


def refuse_sharded(module: nn.Module, block: str = "", *, alike: bool = False) -> None:
    """Raises where the module's parameters are sharded, but for what is supported."""
    kind = sharding(module)
    if not kind or (kind == "fully_shard" and alike):
        return
    what = f'block "{block}"' if block else type(module).__name__
    raise NotYetSupportedError(
        f"{what} is trained under {kind}, which is not yet supported like this",
        expected="a model that was sharded with fully_shard after stochastic depth was applied, in "
        'mode="batch" with across_ranks="same"; or DistributedDataParallel',
        instead="apply stochastic depth first, then fully_shard each block and the model",
    )


class _Anchor(torch.autograd.Function):
    """Hands a value on, and hangs parameters on the graph that get no gradient from it."""

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
        if fresh:  # nobody else holds it: as a view, in-line code could not change it in place
            ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        ctx.reduction.without_gradient.update(dict.fromkeys(ctx.anchored))
        return gradient, None, None, *[None for _ in ctx.anchored]


@dataclass(eq=False)
class Reduction:
    """The skipped parameters of one backward, from its start to the end of the reduction."""

    without_gradient: dict[Tensor, None] = field(default_factory=dict)
    waiting: list[nn.Parameter] = field(default_factory=list)  # for the end of their branch
    task: int = -1  # the backward that is under way
    ranks_differ: bool = False  # in it: a block that this rank skipped may have run elsewhere

    def skip(self, output: Any, parameters: Iterable[nn.Parameter]) -> Any:
        """What a block that is skipped whole returns, with its parameters hung on."""
        leaves, spec = tree_flatten(output)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaves[number] = self._anchored(leaf, parameters, fresh=False)
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
        return cast(Tensor, _Anchor.apply(value, self, fresh, *trained))

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
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=_on_cpu(wrapper.process_group))
    return {p for p, flag in zip(parameters, flags.tolist(), strict=True) if flag}


_cpu_groups: dict[Any, Any] = {}


def _on_cpu(group: Any) -> Any:
    """A group of the same ranks whose collectives do not wait for a device."""
    if dist.get_backend(group) == "gloo":
        return group
    if group not in _cpu_groups:
        ranks = dist.get_process_group_ranks(group)
        _cpu_groups[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _cpu_groups[group]
