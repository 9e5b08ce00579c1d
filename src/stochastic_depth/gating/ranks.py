"""How several processes train a block, and what that asks of its gate.

Under `fully_shard` a skipped block is not gathered: all ranks have to skip the same. In mode
"sample" each rank has draws of its own and runs every block, on one row of its batch at least.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.distributed.agreement import check_agreement
from stochastic_depth.distributed.groups import place
from stochastic_depth.distributed.layout import (
    WHOLE,
    Layout,
    as_unit_would,
    layout_of,
    refuse_explicit_prefetch,
    wrapper_of,
)
from stochastic_depth.distributed.reduction import Reduction
from stochastic_depth.errors import SetupError
from stochastic_depth.plan import Counted, Plan
from stochastic_depth.torch_private.backward import backward_task
from stochastic_depth.torch_private.trees import tree_flatten, tree_unflatten

_layouts: weakref.WeakKeyDictionary[Any, dict[object, Layout]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Setup:
    """How a block is trained.

    Attributes:
        layout: How its parameters lie over the processes.
        reduction: What the DistributedDataParallel around it needs of a skipped block.
        differs: Whether other ranks may run what this one skips.
    """

    layout: Layout = WHOLE
    reduction: Reduction | None = None
    differs: bool = False

    def agree(self, plan: Plan, gate: Counted, *, training: bool) -> None:
        """Have all ranks compare what they draw from, at the first call of each forward.

        Args:
            plan: What they draw from.
            gate: Whose call it is.
            training: Whether it trains.

        Raises:
            SetupError: On all ranks, where they differ.
        """
        if self.layout.in_parts and not plan.ranks_differ:
            begins = not plan.agreed or gate.name in plan.agreed
            plan.agreed = {gate.name} if begins else plan.agreed | {gate.name}
            if begins:
                state = {"training": training, **plan.drawn_from()}
                check_agreement(gate.name, self.layout.ranks, state)

    def may_draw(self, plan: Plan, gate: Counted) -> None:
        """Raises where ranks may drop a block differently in which they wait for each other."""
        talk = plan.talks.get(gate.name)
        alike = plan.mode == "batch" and not plan.ranks_differ
        if talk is not None and not alike and place(plan.draw.process_group)[1] > 1:
            raise SetupError(
                f'block "{gate.name}" holds {talk}, and ranks may drop it differently: one that '
                "runs it would wait forever for one that does not",
                expected="the same draws on every rank where they talk to each other inside of a "
                "branch",
                instead='pass mode="batch" with Draw(across_ranks="same"); or, where only ranks '
                "that train on the same data talk there, Draw(process_group=...), the group of "
                "those that do not; or leave the block out with blocks=",
            )

    def check_rows(self, plan: Plan, gate: Counted, batch: int) -> None:
        """Raises where a rank may keep no row of the batch, and others wait for its gradients."""
        for block in gate.blocks if self.layout.sharded else ():
            rate = plan.rates[block]
            if rate and plan.counts[block].around(batch * (1.0 - rate), batch)[0] == 0:
                raise SetupError(
                    f'block "{gate.name}" has a drop rate of {rate:g} for a batch of {batch} under '
                    "fully_shard, where each rank draws its own rows",
                    expected="at least one row (with BatchNorm two) that every rank keeps, as it "
                    "gathers and reduces the block's weights with the others",
                    instead='use a larger batch or a lower rate, or mode="batch"',
                )

    def ran(self, value: Any, inputs: Any) -> Any:
        """The output of a block, which was called with these inputs."""
        if self.reduction is not None and backward_task() == -1:
            self.reduction.task = -1  # also where the last backward raised
            # Where a reentrant checkpoint runs the forward without gradients, only the inputs have.
            if self.differs or not torch.is_grad_enabled():
                self.reduction.expect((value, inputs))
        return value

    def skipped(self, value: Any, module: nn.Module) -> Any:
        """What a block returns that did not run."""
        if self.layout.sharded:
            value = as_unit_would(module, value)
        if self.reduction is None:
            return value
        leaves, spec = tree_flatten(value)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaves[number] = self.hang(leaf, module.parameters())
                break
        return tree_unflatten(leaves, spec)

    def hang(self, value: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The same for one tensor, in which these parameters have no part."""
        if self.reduction is not None:
            value = self.reduction.hang(value, parameters, fresh=False)
        return value

    def stand_in(self, output: Any, ends: Iterable[int], module: nn.Module) -> Any:
        """What stands in for the output of a dropped module; a branch's end carries all of them."""
        if self.reduction is None:
            return output
        self.reduction.waiting += module.parameters()
        if not ends:
            return output
        leaves, spec = tree_flatten(output)
        end, waiting = min(ends), self.reduction.waiting
        leaves[end] = self.reduction.hang(leaves[end], waiting, fresh=True)
        self.reduction.waiting = []
        return tree_unflatten(leaves, spec)


ALONE = Setup()


def setup_of(plan: Plan, gate: Counted, module: nn.Module) -> Setup:
    """How a block is trained, among several processes.

    Raises:
        SetupError: In a way that cannot be served exactly.
    """
    known = _layouts.setdefault(gate, {})
    # A unit around the module leaves its class alone, but marks it.
    key = (type(module), module.__dict__.get("_is_fsdp_managed_module"))
    layout = known.get(key)
    if layout is None:
        layout = known[key] = layout_of(module, gate.name)
        _refuse(plan, gate, layout)
    if layout.sharded and plan.refused_prefetch != plan.row.number:
        plan.refused_prefetch = plan.row.number  # once a forward
        refuse_explicit_prefetch(module, gate.name)
    wrapper = wrapper_of(gate.name) if module.training else None
    if wrapper is None and layout == ALONE.layout:
        return ALONE
    differs = plan.ranks_differ or bool(plan.forcing)
    return Setup(layout, _reduction_of(plan, wrapper, differs=differs), differs)


def _reduction_of(
    plan: Plan, wrapper: DistributedDataParallel | None, *, differs: bool
) -> Reduction | None:
    if wrapper is None:
        return None
    reduction: Reduction | None = plan.reduction
    if reduction is None or reduction.wrapper is not wrapper:
        reduction = plan.reduction = Reduction(wrapper)
    reduction.ranks_differ |= differs
    return reduction


def _refuse(plan: Plan, gate: Counted, layout: Layout) -> None:
    """Raises where ranks cannot skip blocks of their own."""
    if not plan.ranks_differ:
        return
    if layout.sharded and plan.mode == "batch":
        raise SetupError(
            f'block "{gate.name}" is trained under fully_shard, with draws that differ from rank '
            "to rank",
            expected="ranks that run the same blocks, as each holds a part of their weights",
            instead='leave across_ranks="different" out; or pass mode="sample", where each rank '
            "keeps rows of its own and runs every block",
        )
    if layout.tensor_parallel and plan.draw.process_group is None:
        raise SetupError(
            f'block "{gate.name}" is trained under tensor parallel, with draws that differ from '
            "rank to rank",
            expected="ranks that compute parts of the same examples to draw the same",
            instead="pass sd.Draw(process_group=...), the group of the data-parallel dimension: "
            'mesh["dp"].get_group(); or sd.Draw(across_ranks="same")',
        )
