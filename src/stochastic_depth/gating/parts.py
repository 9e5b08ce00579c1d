"""Gates of modules whose parameters lie in parts on several processes, which wait for each other.

Where all ranks skip the same blocks, these make sure of it. Where each skips its own, a block is
run all the same, without its branches, so that its weights are gathered and reduced everywhere.
"""

from __future__ import annotations

import weakref

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.deciding import keeps_any
from stochastic_depth.discovery.templates import Template
from stochastic_depth.distributed.groups import is_running
from stochastic_depth.distributed.layout import Layout, layout_of
from stochastic_depth.distributed.reduction import Reduction
from stochastic_depth.distributed.sharded import prefetch_what_runs
from stochastic_depth.errors import SetupError
from stochastic_depth.gating.passage import Gate, running
from stochastic_depth.plan import Plan
from stochastic_depth.torch_private import is_fully_sharded_unit, is_marked_by_fsdp

_layouts: weakref.WeakKeyDictionary[Gate, dict[object, Layout]] = weakref.WeakKeyDictionary()


def layout_for(gate: Gate, module: nn.Module) -> Layout:
    """How a container's parameters lie over the processes; looked up once for each way of it.

    Raises:
        SetupError: They lie in a way that cannot be served.
    """
    if not is_running():
        return layout_of(module, gate.name)  # which is whole, or a replica's
    known = _layouts.setdefault(gate, {})
    # A unit around the module leaves its class alone, and its parameters while it is called.
    marks = (module.__dict__.get("_is_replica"), is_marked_by_fsdp(module))
    key = (type(module), type(next(module.parameters(), None)), *marks)
    if key not in known:
        layout = layout_of(module, gate.name)
        _refuse_to_differ(gate, layout)
        known[key] = layout
    return known[key]


def make_sure_ranks_agree(gate: Gate, module: nn.Module, layout: Layout) -> None:
    """Before a container is called: that ranks draw the same, where they wait for each other."""
    plan = gate.plan
    if plan.ranks_differ:
        return
    plan.agree(gate.name, layout.ranks, training=module.training)
    if plan.listed_in != plan.forwards and is_fully_sharded_unit(module):
        plan.listed_in = plan.forwards  # once in a forward, for all units
        prefetch_what_runs(module, _will_run)


def hung_on(
    plan: Plan, layout: Layout, wrapper: DistributedDataParallel | None
) -> Reduction | None:
    """What hangs skipped parameters on the graph, where a reduction over the ranks needs them."""
    if wrapper is not None:
        return plan.reduction
    return Reduction(zeros=True) if layout.sharded and plan.ranks_differ else None


def _will_run(module: nn.Module) -> bool:
    """Whether a unit's module will be called in this forward; True where that is not known."""
    gate: Gate | None = module.__dict__.get("_stochastic_depth")
    if gate is None or not gate.blocks or not isinstance(gate.whole, Template):
        return True
    if gate.roles or any(passage.gate.plan is gate.plan for passage in running.passages[:-1]):
        return True
    (block,) = gate.blocks
    return keeps_any(gate.plan, block, training=module.training)


def _refuse_to_differ(gate: Gate, layout: Layout) -> None:
    """Raises where ranks cannot skip blocks of their own."""
    plan = gate.plan
    if not plan.ranks_differ:
        return
    if layout.tensor_parallel and plan.draw.process_group is None:
        raise SetupError(
            f'block "{gate.name}" is trained under tensor parallel, with draws that differ from '
            "rank to rank",
            expected="ranks that compute parts of the same examples to draw the same",
            instead="pass sd.Draw(process_group=...), the group of the data-parallel dimension: "
            'mesh["dp"].get_group(); or sd.Draw(across_ranks="same")',
        )
    members = {
        member
        for block in gate.blocks
        for branch in plan.blocks[block].branches
        for member in branch.modules
    }
    for inner in layout.inner_units:
        name = f"{gate.name}.{inner}"
        if any(name == member or name.startswith(f"{member}.") for member in members):
            raise SetupError(
                f'"{name}", a part of a branch of "{gate.name}", is sharded on its own, with draws '
                "that differ from rank to rank",
                expected="the ranks to gather the same weights, also where some skip the branch",
                instead=f'shard the block as one, fully_shard({gate.name}), or use mode="batch" '
                'with sd.Draw(across_ranks="same")',
            )
