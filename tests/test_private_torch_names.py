"""Promise: a torch that changed one of the private names that are leaned on is noticed at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from networks import WIDTH, Residual
from processes import leave
from stochastic_depth.discovery import memory
from stochastic_depth.torch_private import backward, processes, tracing

pytestmark = pytest.mark.oldest
needs_shards_on_the_cpu = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="fully_shard of torch 2.6 wants a GPU"
)


def test_dispatch_mode_sees_operations_and_their_schemas() -> None:
    seen = []

    class Mode(tracing.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append((func.overloadpacket.__name__, func._schema.is_mutable))
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).add_(1).relu()
    assert seen == [("ones", False), ("add_", True), ("relu", False)]


def test_uses_of_a_memory() -> None:
    x = torch.ones(4)
    before = memory.uses_of(x)
    view, copy = x[:2], x.clone()
    assert memory.uses_of(x) == memory.uses_of(view) == before + 1
    assert memory.uses_of(copy) == before
    del view
    assert memory.uses_of(x) == before


def test_backward_is_running_in_a_backward_only() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(backward.backward_task() != -1))
    assert backward.backward_task() == -1
    x.sum().backward()
    assert seen == [True]
    assert backward.backward_task() == -1


def test_checkpoints() -> None:
    found: list[Any] = []

    def inner(x: torch.Tensor) -> torch.Tensor:
        found.append(backward.checkpoints())
        return x.exp().exp()

    def outer(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(inner, x.exp(), use_reentrant=False).exp()

    x = torch.ones(2, requires_grad=True)
    checkpoint(outer, x, use_reentrant=False).sum().backward()
    forward, again, recomputed = found
    # The forward lies in two frames, innermost first.
    assert len(forward[0]) == 2
    assert forward[1] is None
    # The outer recomputation lies in a new inner forward.
    assert len(again[0]) == 1
    assert again[1] is not None
    assert again[1][0] is forward[0][1]  # one log
    # The inner recomputation.
    assert recomputed[0] == ()
    assert recomputed[1] is not None
    assert recomputed[1][0] in (forward[0][0], again[0][0])
    assert backward.checkpoints() == ((), None)


def test_other_saved_tensor_hooks_are_put_back_and_ignored() -> None:
    packed = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        packed.append(x)
        return x

    x = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        assert backward.checkpoints() == ((), None)
        x.exp()
    assert len(packed) == 1


def test_fake_tensors_know_shapes() -> None:
    norm = nn.BatchNorm1d(3).train()
    with tracing.without_modes(), tracing.fake_mode() as mode, torch.no_grad():
        out = norm.forward(mode.from_tensor(torch.ones(4, 3)))
    assert out.shape == (4, 3)
    assert type(norm.running_mean) is torch.Tensor
    assert not norm.running_mean.any()


def test_autocast_is_seen_for_any_device() -> None:
    assert not tracing.autocasts()
    for kind in ("cpu", "cuda"):
        with torch.autocast(kind, enabled=kind == "cpu" or torch.cuda.is_available()):
            assert tracing.autocasts() is torch.is_autocast_enabled(kind)


def test_user_modes_do_not_see_what_is_hidden_from_them() -> None:
    seen = []

    class Mode(tracing.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2)
        with tracing.without_modes():
            torch.zeros(2)
    assert seen == ["ones"]


def test_collectives_are_operations_that_tell_their_group() -> None:
    found = []
    untyped: Any = dist

    class Mode(tracing.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            ranks = processes.ranks_that_talk(func, args)
            if ranks is not None:
                found.append((func.overloadpacket.__name__, ranks))
            return func(*args, **(kwargs or {}))

    dist.init_process_group("gloo", store=untyped.HashStore(), rank=0, world_size=1)
    try:
        group = untyped.new_group([0])
        with Mode():
            x = torch.ones(2)
            dist.all_reduce(x)
            dist.all_to_all_single(torch.empty(2), x, group=group)
            functional.all_reduce(x, "sum", group) + 1
    finally:
        leave()
    assert found == [("allreduce_", (0,)), ("alltoall_base_", (0,)), ("all_reduce", (0,))]


def test_units_of_fully_shard_are_known(one_process: None) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    parts = [*model.modules()]
    assert not any(map(processes.is_fully_sharded_unit, parts))
    assert not any(map(processes.is_managed_by_fsdp, parts))
    assert processes.mesh_of(model) == (None, 0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    fully_shard(model[0], mp_policy=policy)
    fully_shard(model)
    units = [part for part in parts if processes.is_fully_sharded_unit(part)]
    assert units == [model, model[0]]
    assert all(map(processes.is_managed_by_fsdp, parts))
    assert not any(map(processes.is_in_fsdp1, parts))
    assert not processes.is_in_fsdp1(model)
    assert processes.mesh_of(model) == ((0,), 1)
    assert processes.sharded_dtypes(model[0]) == (torch.bfloat16, torch.float32)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_known(one_process: None, use_orig_params: bool) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    seen = []
    model[0].register_forward_pre_hook(
        lambda module, args: seen.append(processes.is_in_fsdp1(module))
    )
    wrapped = FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    assert processes.is_in_fsdp1(wrapped)
    assert processes.is_in_fsdp1(wrapped.module)
    wrapped(torch.ones(1, 2))
    assert seen == [True]


def test_wrappers_and_compiled_modules_are_told() -> None:
    plain, compiled = nn.Linear(2, 2), nn.Linear(2, 2)
    compiled.compile(backend="eager")
    wrapper: Any = torch.compile(plain, backend="eager")
    checkpointed = checkpoint_wrapper(nn.Linear(2, 2))
    assert [tracing.is_compiled(m) for m in (plain, compiled, wrapper)] == [False, True, True]
    wrappers = [tracing.is_wrapper(m) for m in (plain, compiled, wrapper, checkpointed)]
    assert wrappers == [False, False, True, True]


@tracing.ends_a_graph("it says why")
def between(x: torch.Tensor) -> torch.Tensor:
    return x.sin().cos()


@tracing.begins_no_graph
def inside(x: torch.Tensor) -> torch.Tensor:
    return x.sin().cos()


def test_functions_that_no_graph_holds_or_begins_with() -> None:
    sizes: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        sizes.append(sum(node.op == "call_method" for node in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    for function in (between, inside):
        assert torch.compile(function, backend=backend)(torch.ones(2)) is not None
    assert not sizes
    torch.compile(lambda x: inside(x).exp(), backend=backend, fullgraph=True)(torch.ones(2))
    assert sizes == [3]
    torch.compile(lambda x: between(x.exp()).exp(), backend=backend)(torch.ones(2))
    assert sizes == [3, 1, 1]


def test_what_torch_compile_does_with_frames_is_set_and_told() -> None:
    assert tracing.set_compiler(False) is None
    assert tracing.set_compiler(None) is False
    assert tracing.set_compiler(None) is None


def test_a_dimension_that_may_vary_needs_one_graph() -> None:
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(1)
        return graph

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    torch.compiler.reset()
    compiled: Any = torch.compile(double, backend=backend, fullgraph=True)
    first = torch.ones(4, 3)
    tracing.let_vary(first, 0)
    for given in (first, torch.ones(5, 3), torch.ones(7, 3), torch.ones(2, 3)):
        assert torch.equal(compiled(given), given * 2)
    assert len(seen) == 1


def test_a_torch_that_lacks_a_name_raises(
    monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    """What would hang otherwise, or be silently wrong."""
    model, x = nn.Sequential(Residual(), Residual()), torch.ones(2, WIDTH)
    sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    wrapped = nn.parallel.DistributedDataParallel(model).train()
    with monkeypatch.context() as without:
        without.delattr(nn.parallel.DistributedDataParallel, "_post_forward")
        with pytest.raises(sd.SetupError, match="DistributedDataParallel has no _post_forward"):
            wrapped(x)
    monkeypatch.delattr(nn.parallel.DistributedDataParallel, "_active_ddp_module")
    with pytest.raises(sd.SetupError, match="DistributedDataParallel has no _active_ddp_module"):
        processes.inside_ddp()
    unit: Any = fully_shard(nn.Linear(2, 2))
    del unit._get_fsdp_state()._mp_policy
    with pytest.raises(sd.SetupError, match="FSDPState has no _mp_policy in torch"):
        processes.sharded_dtypes(unit)
    del unit._is_fsdp_managed_module
    with pytest.raises(sd.SetupError, match="FSDPLinear has no _is_fsdp_managed_module"):
        processes.is_managed_by_fsdp(unit)
