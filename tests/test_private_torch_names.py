"""Promise: a torch that changed one of the private names that are leaned on is noticed at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from stochastic_depth import torch_private

pytestmark = pytest.mark.oldest


def test_dispatch_mode_sees_operations_and_their_schemas() -> None:
    seen = []

    class Mode(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append((func.overloadpacket.__name__, func._schema.is_mutable))
            return func(*args, **(kwargs or {}))

    with Mode():  # type: ignore[no-untyped-call]
        torch.ones(2).add_(1).relu()
    assert seen == [("ones", False), ("add_", True), ("relu", False)]


def test_backward_is_running_in_a_backward_only() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(torch_private.backward_is_running()))
    assert not torch_private.backward_is_running()
    x.sum().backward()
    assert seen == [True]
    assert not torch_private.backward_is_running()


def test_checkpoint_frames() -> None:
    found = []

    def inner(x: torch.Tensor) -> torch.Tensor:
        found.append(torch_private.checkpoint_frames())
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
    assert again[1][0] is forward[0][1]
    # The inner recomputation.
    assert recomputed[0] == []
    assert recomputed[1] is not None
    assert recomputed[1][0] in (forward[0][0], again[0][0])
    assert torch_private.checkpoint_frames() == ([], None)


def test_other_saved_tensor_hooks_are_put_back_and_ignored() -> None:
    packed = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        packed.append(x)
        return x

    x = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        assert torch_private.checkpoint_frames() == ([], None)
        x.exp()
    assert len(packed) == 1


def test_fake_tensors_know_shapes() -> None:
    norm = nn.BatchNorm1d(3).train()
    with torch_private.without_modes(), torch_private.fake_mode() as mode, torch.no_grad():
        out = norm.forward(mode.from_tensor(torch.ones(4, 3)))
    assert out.shape == (4, 3)
    assert type(norm.running_mean) is torch.Tensor
    assert not norm.running_mean.any()


def test_user_modes_do_not_see_what_is_hidden_from_them() -> None:
    class Mode(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            raise AssertionError(f"saw {func}")

    with Mode(), torch_private.without_modes():  # type: ignore[no-untyped-call]
        torch.ones(2)


def test_wrappers_and_compiled_modules_are_told() -> None:
    plain, compiled = nn.Linear(2, 2), nn.Linear(2, 2)
    compiled.compile(backend="eager")
    wrapper: Any = torch.compile(plain, backend="eager")
    checkpointed = checkpoint_wrapper(nn.Linear(2, 2))
    assert [torch_private.is_compiled(m) for m in (plain, compiled, wrapper)] == [False, True, True]
    wrappers = [torch_private.is_wrapper(m) for m in (plain, compiled, wrapper, checkpointed)]
    assert wrappers == [False, False, True, True]


_traced = 0


@torch_private.once_in_a_trace
def _trace() -> bool:
    global _traced
    _traced += 1
    return True


def test_a_function_runs_while_it_is_traced_and_not_again() -> None:
    torch.compiler.reset()

    def add(x: torch.Tensor) -> torch.Tensor:
        return x + _trace()

    compiled: Any = torch.compile(add, backend="eager", fullgraph=True)
    assert [float(compiled(torch.ones(()))) for _ in range(3)] == [2.0] * 3
    assert _traced == 1


def test_what_is_no_graph_is_told() -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if float(x) > 0 else x

    torch.compiler.reset()
    compiled: Any = torch.compile(breaks, backend="eager", fullgraph=True)
    with pytest.raises(torch_private.no_graph()):
        compiled(torch.ones(()))


def test_what_is_left_out_of_graphs_says_why() -> None:
    def negative(x: torch.Tensor) -> torch.Tensor:
        return -x

    left_out = torch_private.left_out_of_graphs(negative, "because")
    torch.compiler.reset()

    def call(x: torch.Tensor) -> torch.Tensor:
        return left_out(x) * 2

    compiled: Any = torch.compile(call, backend="eager")
    assert float(compiled(torch.ones(()))) == -2.0
    torch.compiler.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.raises(torch_private.no_graph()) as caught:
        compiled(torch.ones(()))
    assert "because" in str(caught.value) or torch.__version__ < "2.7"
