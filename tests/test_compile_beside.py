"""Promise: a compiled depth works with all that an eager one does.

Checkpoints, copies, hooks, threads, half precision, and the ways out.
"""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from networks import WIDTH, Residual, batch, make, settled, vectors
from test_compile import (
    WARMUP,
    assert_same_step,
    assert_trains_alike,
    compiled,
    graphs,
    without_torchs_own_fast_path,
)

pytestmark = [
    pytest.mark.oldest,
    # torch's own, while it traces a graph in the middle of a network
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # and for a reentrant checkpoint
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]
__all__ = ["without_torchs_own_fast_path"]


class InTwos(nn.Sequential):
    """Six blocks, two in a checkpoint."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        for start in (1, 3, 5):
            x = checkpoint(nn.Sequential(*self[start : start + 2]), x, use_reentrant=self.reentrant)
        return x


class InTwosReentrant(InTwos):
    reentrant = True


class Beneath(Residual):
    """As transformers' layers: the checkpoint lies between the gate and the forward."""

    def __call__(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().__call__(x)
        return checkpoint(super().__call__, x, use_reentrant=False)


class BeneathPostNorm(Beneath):
    """The same, gated at its branch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


CHECKPOINTS: dict[str, tuple[type[nn.Sequential], Callable[[], nn.Module]]] = {
    "two blocks": (InTwos, Residual),
    "reentrant": (InTwosReentrant, Residual),
    "wrapper": (nn.Sequential, lambda: checkpoint_wrapper(Residual())),
    "beneath": (nn.Sequential, Beneath),
    "beneath, in another": (InTwos, Beneath),
    "beneath, post-norm": (nn.Sequential, BeneathPostNorm),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(case: str) -> None:
    stack, block = CHECKPOINTS[case]
    model = settled(lambda: stack(nn.Linear(3, WIDTH), *(block() for _ in range(6))))
    x = vectors(4, 3)
    eager, depth = compiled(model, x, scale="train")
    assert_trains_alike(model, eager, depth, x)


def test_copies_stay_compiled_and_share_the_graphs() -> None:
    model, x = make("resnet")
    eager, _ = compiled(model, x)
    early, other_early = copy.deepcopy(model), copy.deepcopy(eager)  # before there is a graph
    for step in range(WARMUP):
        assert_same_step(model.train(), eager.train(), batch(x, step))
        assert_same_step(model.eval(), eager.eval(), batch(x, step))
    built = graphs()
    assert built == 6
    late, other_late = copy.deepcopy(model), copy.deepcopy(eager)
    for twin, other in ((late, other_late), (early, other_early)):
        assert_same_step(twin.eval(), other.eval(), x)
        assert_same_step(twin.train(), other.train(), x)
        sd.get_stochastic_depth(twin).remove()
    assert_same_step(model.train(), eager.train(), x)  # whose graphs are still there
    assert graphs() == built


def test_what_was_pickled_runs_eagerly_and_can_be_compiled_again() -> None:
    model, x = make("resnet")
    eager, _ = compiled(model, x)
    assert_same_step(model.train(), eager.train(), x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    built = graphs()
    assert_same_step(loaded, eager, x)
    assert graphs() == built
    sd.get_stochastic_depth(loaded).compile("aot_eager")
    sd.get_stochastic_depth(loaded).compile("aot_eager")  # or anew
    for step in range(WARMUP):
        assert_same_step(loaded, eager, batch(x, step))
    assert graphs() == built + 3


@pytest.mark.parametrize("way", ["remove", "fold"])
def test_the_ways_out(way: str) -> None:
    model, x = make("resnet")
    classes = [type(module) for module in model.modules()]
    eager, depth = compiled(model, x)
    assert_same_step(model.train(), eager.train(), x)
    plain, other = getattr(depth, way)(), getattr(sd.get_stochastic_depth(eager), way)()
    assert [type(module) for module in plain.modules()] == classes
    before = graphs()
    assert_same_step(plain.eval(), other.eval(), x)
    assert graphs() == before


def test_hooks_fire_eagerly_and_not_where_a_block_is_dropped() -> None:
    model, x = make("resnet")
    eager, depth = compiled(model, x)
    fired: list[Any] = []
    for each in (model, eager):
        for module in cast(Any, each).stages.modules():
            if not list(module.children()) or "conv1" not in dict(module.named_children()):
                continue
            module.register_forward_hook(
                lambda m, args, out: fired.append(float(out.detach().sum()))
            )
    for step in range(5):
        assert_same_step(model.train(), eager.train(), batch(x, step))
        kept = sum(depth.last_gates.values())
        kept += not depth.last_gates["stages.1.0"]  # not skipped whole
        assert len(fired) == 2 * kept
        assert fired[:kept] == fired[kept:]
        fired.clear()


@pytest.mark.skipif(torch.__version__ < "2.8", reason="this torch.fx knows of no threads")
def test_inference_in_other_threads_while_training() -> None:
    model, x = make("resnet")
    eager, _ = compiled(model, x)
    teacher, expected = copy.deepcopy(model).eval(), copy.deepcopy(eager).eval()(x)
    wrong: list[float] = []

    def infer() -> None:
        for _ in range(30):
            with torch.no_grad():
                wrong.append(float((teacher(x) - expected).abs().max()))

    threads = [threading.Thread(target=infer) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(15):
        assert_same_step(model.train(), eager.train(), batch(x, step))
    for thread in threads:
        thread.join()
    assert len(wrong) == 90
    assert not any(wrong)


def test_training_while_another_thread_compiles() -> None:
    model, x = make("pre-norm")
    sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    begun, trained = threading.Event(), threading.Event()

    def slow(graph: Any, example: Any) -> Any:
        begun.set()
        trained.wait(30)
        return graph

    unrelated = torch.compile(nn.Linear(3, 3), backend=slow)
    thread = threading.Thread(target=unrelated, args=(torch.ones(3),))
    thread.start()
    assert begun.wait(30)
    try:
        model.train()(x).sum().backward()
    finally:
        trained.set()
        thread.join()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_factor_is_not_rounded_to_the_precision_of_the_values(dtype: torch.dtype) -> None:
    model, x = make("pre-norm")
    eager, _ = compiled(model.to(dtype), x.to(dtype), scale="train")
    for step in range(5):
        assert_same_step(model.train(), eager.train(), batch(x, step).to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_step(model, eager, batch(x, step).to(dtype))
    assert torch.equal(model.eval()(x.to(dtype)), eager.eval()(x.to(dtype)))
