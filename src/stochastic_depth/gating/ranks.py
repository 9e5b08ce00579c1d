"""How several processes train a block, and what that asks of its gate.

Under `fully_shard` a block that is skipped is not gathered. Were it skipped on one rank alone, the
others would wait for it; were another block of the same shapes skipped there, gradients of one
would silently be added to those of the other. So all ranks have to skip the same. In mode "sample"
each rank has draws of its own and runs every block, on one row of its batch at least.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.distributed import Forward, on_cpu, place, ranks_differ
from stochastic_depth.errors import SetupError
from stochastic_depth.plan import Counted, Plan
from stochastic_depth.torch_private import processes
from stochastic_depth.torch_private.trees import tree_map

# For each DistributedDataParallel the parameters of a gate's block, or of a branch's module. They
# do not change: who replaces a parameter has to make the wrapper anew.
_parameters: WeakKeyDictionary[nn.Module, dict[object, dict[Tensor, None]]] = WeakKeyDictionary()


@dataclass(eq=False)
class Setup:
    """How a block is trained: settled at its first call, and when that has changed.

    Attributes:
        key: What it was settled for.
        sharded: Whether its parameters belong to a unit of `fully_shard`: the module itself, one in
            it or around it.
        in_parts: Whether ranks have to run the same blocks, as each needs the others' parts.
        ranks: Who holds a part of it; None: all.
        is_apart: Whether each rank has draws of its own.
    """

    key: object = None
    sharded: bool = False
    in_parts: bool = False
    ranks: tuple[int, ...] | None = None
    is_apart: bool = False

    def agree(self, plan: Plan, gate: Counted, *, training: bool) -> None:
        """Have all ranks compare what they draw from, at the first call of each forward.

        One collective of 16 bytes, on the CPU.

        Args:
            plan: What they draw from.
            gate: Whose call it is.
            training: Whether it trains.

        Raises:
            SetupError: On all ranks, where they differ.
        """
        if not self.in_parts or self.is_apart:
            return
        if plan.agreed and gate.name not in plan.agreed:
            plan.agreed.add(gate.name)
            return
        plan.agreed = {gate.name}
        ranks = self.ranks or tuple(range(dist.get_world_size()))
        if len(ranks) == 1:
            return
        drawn_from = {"training": training, **plan.drawn_from()}
        digest = hashlib.blake2b(repr(drawn_from).encode(), digest_size=7).digest()
        number = int.from_bytes(digest, "big")
        most = torch.tensor([number, -number], dtype=torch.int64, device="cpu")
        dist.all_reduce(most, dist.ReduceOp.MAX, group=on_cpu(ranks))
        if most.tolist() != [number, -number]:
            everybodys: list[Any] = [None] * len(ranks)
            dist.all_gather_object(everybodys, drawn_from, group=on_cpu(ranks))
            first, other = everybodys[0], next(o for o in everybodys if o != everybodys[0])
            key = next(key for key in first if first[key] != other[key])
            raise SetupError(
                f'ranks do not draw the same in the forward that begins with "{gate.name}": {key} '
                f"is {reprlib.repr(first[key])} on one, {reprlib.repr(other[key])} on another",
                expected="the same seed, rates, steps and calls on ranks that share parameters",
                instead="step, force (fixed, disabled) and load the same on all ranks",
            )

    def check_rows(self, plan: Plan, gate: Counted, batch: int) -> None:
        """Raises where a rank may keep no row of the batch, and others wait for its gradients."""
        for block in gate.blocks if self.sharded else ():
            rate = plan.rates[block]
            if rate and plan.counts[block].around(batch * (1.0 - rate), batch)[0] == 0:
                raise SetupError(
                    f'block "{gate.name}" has a drop rate of {rate:g} for a batch of {batch} under '
                    "fully_shard, where each rank draws its own rows",
                    expected="at least one row (with BatchNorm two) that every rank keeps",
                    instead='use a larger batch or a lower rate, or mode="batch"',
                )

    def skip(self, module: nn.Module, gate: Counted | None = None) -> None:
        """Have the DistributedDataParallel whose forward this is not wait for these parameters.

        Where they are all that a gate skips they are noted for it.
        """
        wrapper = processes.inside_ddp() if self is not LOCAL else None
        if wrapper is not None and isinstance(forward := _taken_by(wrapper), Forward):
            known, key = _parameters.setdefault(wrapper, {}), gate or module
            if key not in known:
                known[key] = dict.fromkeys(module.parameters())
            forward.skipped.update(known[key])

    def skipped(self, value: Any, gate: Counted, module: nn.Module) -> Any:
        """What a block hands on that is not called.

        A unit of `fully_shard` casts its inputs and outputs. Where the unit lies around the block,
        its hooks want no view of its own input for an output.
        """
        self.skip(module, gate)
        if not self.sharded:
            return value
        is_unit = processes.is_fully_sharded_unit(module)
        dtypes = [dtype for dtype in processes.sharded_dtypes(module) if dtype] if is_unit else []

        def as_unit_would(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            for dtype in dtypes if leaf.is_floating_point() else ():
                leaf = leaf.to(dtype)
            return leaf if is_unit or not leaf._is_view() else leaf.clone()

        return tree_map(as_unit_would, value)


LOCAL = Setup()


def setup_of(plan: Plan, gate: Counted, module: nn.Module) -> Setup:
    """How a block is trained, among several processes.

    Raises:
        SetupError: In a way that cannot be served exactly.
    """
    # A unit around the module leaves its class alone, but marks it.
    key = (type(module), module.__dict__.get("_is_fsdp_managed_module"))
    setup: Setup | None = plan.setups.get(gate.name)
    if setup is None or setup.key != key:
        setup = plan.setups[gate.name] = _settled(plan, gate, module, key)
    elif gate.name in plan.agreed:  # in another forward: the lists may be new
        _refuse_prefetch(gate, module)
    wrapper = processes.inside_ddp() if module.training else None
    if wrapper is not None:
        _forward_of(wrapper, gate)
        if setup.is_apart or plan.forcing:
            # For good, as gradients may be left that one rank has and another has not.
            plan.ranks_differed = True
        if plan.ranks_differed:
            ranks_differ.setdefault(wrapper, -1)
    return setup


def known_states(plan: Plan, gate: Counted, states: Sequence[bool | None]) -> list[bool | None]:
    """A forward's states, but None (look closer) for each gate whose module has to be looked at.

    Under DistributedDataParallel, where all ranks draw alike, a block that runs needs no look. Nor
    does one that was skipped before: its parameters are known, and are hung on the output here.
    Where it runs in another call of this forward its gradients come all the same.

    Args:
        plan: What the gates share.
        gate: The one that is called first.
        states: Of all gates.
    """
    wrapper = processes.inside_ddp()
    setups = [plan.setups.get(gate.name) for gate in plan.gates]
    differ = plan.ranks_differ or plan.ranks_differed or plan.talks
    if wrapper is None or differ or any(setup is None or setup.in_parts for setup in setups):
        return [None] * len(states)
    known, forward = _parameters.get(wrapper, {}), _forward_of(wrapper, gate)
    found = list(states)
    for number, (runs, one) in enumerate(zip(states, plan.gates, strict=True)):
        if runs is False and one in known:
            forward.skipped.update(known[one])
        elif not runs:
            found[number] = None
    return found


def _settled(plan: Plan, gate: Counted, module: nn.Module, key: object) -> Setup:
    refuse(module, f'block "{gate.name}"')
    sharded = processes.is_managed_by_fsdp(module)
    _refuse_prefetch(gate, module)
    ranks, dims = processes.mesh_of(module)
    is_tensor_parallel = dims > sharded
    if plan.ranks_differ and sharded and plan.mode == "batch":
        raise _apart(
            gate,
            "fully_shard",
            'leave across_ranks="different" out; or pass mode="sample", where each rank keeps rows '
            "of its own and runs every block",
        )
    if plan.ranks_differ and is_tensor_parallel and plan.draw.process_group is None:
        raise _apart(
            gate,
            "tensor parallel",
            "pass sd.Draw(process_group=...), the group of the data-parallel dimension: "
            'mesh["dp"].get_group(); or sd.Draw(across_ranks="same")',
        )
    return Setup(key, sharded, sharded or is_tensor_parallel, ranks, is_apart=plan.ranks_differ)


def _refuse_prefetch(gate: Counted, module: nn.Module) -> None:
    if processes.is_fully_sharded_unit(module) and processes.prefetches_explicitly(module):
        # A skipped block would be gathered all the same, and what was gathered would lie there
        # until its next call, with weights that may have changed meanwhile.
        raise SetupError(
            f'block "{gate.name}" is sharded with explicit lists of units to prefetch',
            expected="the implicit prefetching of fully_shard, which skipped blocks do not disturb",
            instead="leave set_modules_to_forward_prefetch and set_modules_to_backward_prefetch "
            "out; implicit prefetching works",
        )


def _apart(gate: Counted, kind: str, instead: str) -> SetupError:
    return SetupError(
        f'block "{gate.name}" is trained under {kind}, with draws that differ from rank to rank',
        expected="ranks that need each other for a block to draw the same",
        instead=instead,
    )


def refuse(module: nn.Module, what: str = "the model") -> None:
    """Raises where a module is trained in a way in which nothing can be skipped exactly."""
    is_replica = isinstance(module, nn.DataParallel) or "_is_replica" in module.__dict__
    ddp = "DistributedDataParallel"
    shard = f"torch.distributed.fsdp.fully_shard, or {ddp}"
    is_zero_3 = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
    for is_so, kind, instead in (
        (is_replica, "torch.nn.DataParallel", f"{ddp}, on one device, too: torchrun"),
        (is_zero_3, "DeepSpeed's ZeRO-3", shard),
        (processes.is_in_fsdp1(module), "FullyShardedDataParallel (FSDP1)", shard),
        (processes.is_in_a_pipeline(), "a pipeline of torch.distributed.pipelining", shard),
    ):
        if is_so:
            raise SetupError(
                f"{what} is trained under {kind}, where blocks cannot be skipped exactly",
                expected=f"one process, {ddp}, fully_shard or tensor parallel",
                instead=f"use {instead}",
            )


def refuse_parts(model: nn.Module) -> None:
    """Raises where this process holds a part of its weights alone."""
    if processes.is_in_parts(model):
        raise SetupError(
            f"the weights of {type(model).__name__} lie in parts on several processes "
            "(fully_shard, or tensor parallel)",
            expected="the model before it is taken apart; it may be on the meta device",
            instead="apply stochastic depth first, then fully_shard or parallelize_module",
        )


def refuse_talk(plan: Plan, gate: Counted) -> None:
    """Raises where ranks may drop a block differently in which they wait for each other."""
    if gate.name not in plan.talks or (plan.mode == "batch" and not plan.ranks_differ):
        return
    if not any(plan.rates[number] for number in gate.blocks):
        return
    if place(plan.draw.process_group)[1] > 1:
        raise SetupError(
            f'block "{gate.name}" holds {plan.talks[gate.name]}, and ranks may drop it '
            "differently: one that runs it would wait forever for one that does not",
            expected="the same draws on every rank, where they talk inside of a branch",
            instead='pass mode="batch" with Draw(across_ranks="same"); or, where only ranks '
            "that train on the same data talk there, Draw(process_group=...), the group of "
            "those that do not; or leave the block out with blocks=",
        )


def _forward_of(wrapper: DistributedDataParallel, gate: Counted) -> Forward:
    """The forward of a DistributedDataParallel that runs just now.

    Raises:
        SetupError: Its graph may not change.
    """
    forward = _taken_by(wrapper)
    if isinstance(forward, Forward):
        return forward
    if wrapper.static_graph:
        raise SetupError(
            f'block "{gate.name}" is trained under DistributedDataParallel('
            "static_graph=True), which takes the first step's graph for that of every step",
            expected="a graph that may change: the gradients would silently be wrong",
            instead="leave static_graph=True out; find_unused_parameters is not needed",
        )
    return Forward(wrapper)


def _taken_by(wrapper: nn.Module) -> object:
    """What takes the output of the wrapper: its own method, or the `Forward` that runs just now."""
    return wrapper.__dict__.get(processes.TAKES_THE_OUTPUT)
