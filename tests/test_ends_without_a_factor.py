"""Promise: a gate that has nothing to do costs nothing, and is back when it has.

In training with scale "eval" the module that ends a branch is a plain one: its gate is taken off at
the first call of its block, and put on again before the next inference. Whatever is done to a model
in between, it computes what a twin computes whose gates stay on.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import stochastic_depth as sd
from networks import Residual, assert_equal, gated, residuals, settled, sgd, train, vectors
from stochastic_depth.gating.gate import Gate, gate_of

HOOKS_CAN_BE_READ = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
pytestmark = pytest.mark.skipif(
    not HOOKS_CAN_BE_READ, reason="in torch 2.6 every call goes the slow way"
)


WHOLE = ("stages.0.0", "stages.0.1", "stages.0.2", "stages.1.1", "stages.1.2")


def is_on(module: nn.Module) -> bool:
    """Whether a module is called by way of its gate."""
    return hasattr(type(module), "gated_from")


def kept_on(model: nn.Module) -> None:
    """Have the gates of a model stay on."""
    for module in model.modules():
        gate = gate_of(module)
        if isinstance(gate, Gate):
            gate.asleep = None


def trained(**options: Any) -> tuple[Any, Tensor, sd.StochasticDepth]:
    """A network that has trained some steps, so that its ends are plain."""
    model, x, depth = gated("resnet", **options)
    train(model, sgd(model), x, 8)
    assert not any(is_on(model.get_submodule(f"{name}.bn2")) for name in WHOLE)
    return model, x, depth


@pytest.mark.parametrize("scale", ["eval", "none"])
def test_ends_are_plain_in_training_and_gated_again_for_inference(scale: str) -> None:
    model, x, depth = trained(scale=scale)
    twin, _, _ = gated("resnet", scale=scale)
    kept_on(twin)
    train(twin, sgd(twin), x, 8)
    for _ in range(3):
        assert_equal(model.eval()(x), twin.eval()(x))
        assert is_on(model.stages[0][0].bn2) == (scale == "eval")
        train(model, sgd(model), x, 3)
        train(twin, sgd(twin), x, 3)
    assert depth.statistics()["stages.0.0"].calls == 17


Way = Callable[[Any], Any]


def by_hand(model: nn.Module) -> nn.Module:
    """As some trainers restore modes: without `eval()`."""
    for module in model.modules():
        module.training = False
    return model


def pickled(model: Any) -> Any:
    content = io.BytesIO()
    torch.save(model, content)
    content.seek(0)
    return torch.load(content, weights_only=False).eval()


WAYS: dict[str, Way] = {
    "eval": lambda model: model.eval(),
    "eval of the blocks": lambda model: [block.eval() for block in model.stages] and model.eval(),
    "by hand": by_hand,
    "train(False)": lambda model: model.train(False),
    "copied": lambda model: copy.deepcopy(model).eval(),
    "copied, by hand": lambda model: by_hand(copy.deepcopy(model)),
    "pickled": lambda model: pickle.loads(pickle.dumps(model)).eval(),
    "saved": pickled,
    "disabled": lambda model: model,
}


@pytest.mark.parametrize("name", WAYS)
def test_inference_is_scaled_however_a_model_gets_there(name: str) -> None:
    model, x, _ = trained()
    twin, _, _ = gated("resnet")
    kept_on(twin)
    twin.load_state_dict(model.state_dict())
    changed = WAYS[name](model)
    model = model if not isinstance(changed, nn.Module) else changed
    if name == "disabled":
        depth, its = sd.get_stochastic_depth(model), sd.get_stochastic_depth(twin)
        with depth.disabled(), its.disabled():
            assert_equal(model(x), twin(x))
            return
    assert_equal(model(x), twin.eval()(x))
    assert_equal(model(x), twin(x))


def test_the_way_out_gives_the_plain_classes_back() -> None:
    for leave in (sd.StochasticDepth.remove, sd.StochasticDepth.fold):
        model, x, depth = trained()
        scaled = copy.deepcopy(model).eval()(x)
        plain: Any = leave(depth)
        assert not any(hasattr(module, "_stochastic_depth") for module in plain.modules())
        assert not any(map(is_on, plain.modules()))
        if leave is sd.StochasticDepth.fold:
            torch.testing.assert_close(plain.eval()(x), scaled, rtol=1e-4, atol=1e-5)
        sd.apply_stochastic_depth(plain, 0.2, "uniform", example_inputs=x)
        assert is_on(plain.stages[0][0].bn2)


def test_a_pruning_that_is_refused_leaves_every_end_as_it_was() -> None:
    model, x, depth = trained()
    before = copy.deepcopy(model).eval()(x)
    with pytest.raises(sd.StochasticDepthError):
        depth.prune(["stages.0.0"], example_inputs=x)  # a projection goes with it
    assert_equal(model.eval()(x), before)
    train(model, sgd(model), x, 3)


def test_a_forward_that_bypasses_the_call_raises_in_inference_as_ever() -> None:
    model, *_ = trained()
    model.eval()
    with pytest.raises(sd.ChangedModelError, match="called outside of a call"):
        model.stages[0][1].forward(vectors(2, 8, 6, 6))


def test_a_block_that_is_never_called_by_its_gate_is_told_so_in_training() -> None:
    class Bypassing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = residuals(3)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 3:
                return self.blocks[0].forward(x)
            return self.blocks(x)

    model = settled(Bypassing)
    sd.apply_stochastic_depth(model, 0.2, example_inputs=vectors(2, 8))
    with pytest.raises(sd.ChangedModelError, match="called outside of a call"):
        model.train()(vectors(3, 8))


def test_ends_that_act_in_training_stay_on() -> None:
    """Scale "train", whose factor comes with the first step of its schedule."""
    model, x, depth = gated("resnet", scale="train", schedule=sd.linear_warmup(2))
    twin, _, other = gated("resnet", scale="train", schedule=sd.linear_warmup(2))
    kept_on(twin)
    for each in (model, twin):
        optimizer = sgd(each)
        sd.get_stochastic_depth(each).follow(optimizer)
        train(each, optimizer, x, 6)
    assert_equal(dict(model.state_dict()), dict(twin.state_dict()))
    assert is_on(model.stages[1][2].bn2)
    assert depth.last_gates == other.last_gates


def test_fixed_and_forwards_without_gradients_change_nothing() -> None:
    model, x, depth = trained()
    twin, _, its = gated("resnet")
    kept_on(twin)
    train(twin, sgd(twin), x, 8)
    for each, handle in ((model, depth), (twin, its)):
        with handle.fixed({"stages.0.1": False}):
            each.train()(x)
        with torch.no_grad():
            each.train()(x)
        with handle.disabled():
            each.train()(x)
        train(each, sgd(each), x, 3)
    assert_equal(dict(model.state_dict()), dict(twin.state_dict()))
    assert depth.last_gates == its.last_gates


def test_two_threads_may_train_a_block_for_the_first_time() -> None:
    model, _, _ = gated("resnet", 0.0)
    failed = []

    def run(x: Tensor) -> None:
        try:
            for _ in range(20):
                model(x)
        except Exception as error:  # whatever it is
            failed.append(error)

    model.train()
    threads = [threading.Thread(target=run, args=(vectors(4, 3, 6, 6, seed=n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not is_on(model.stages[0][0].bn2)
    model.eval()(vectors(4, 3, 6, 6))
    assert not is_on(model.stages[0][0].bn2)  # at a rate of 0 nothing is due in inference, either


def test_an_end_of_another_class_keeps_its_gate() -> None:
    model = settled(lambda: residuals(4))
    x = vectors(2, 8)
    sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        torch.nn.utils.parametrizations.weight_norm(each[1].linear)
    kept_on(twin)
    for _ in range(2):
        for _ in range(8):
            assert_equal(model.train()(x), twin.train()(x))
        assert is_on(model[1].linear)
        assert not is_on(model[2].linear)
        assert_equal(model.eval()(x), twin.eval()(x))


def test_a_train_of_the_blocks_own_is_called_as_it_is() -> None:
    class Frozen(Residual):
        def train(self, mode: bool = True, *, deep: bool = True) -> Any:
            super().train(mode)
            if deep:
                self.norm.eval()
            return self, deep

    model = settled(lambda: residuals(4, Frozen))
    x = vectors(2, 8)
    sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    for _ in range(8):
        model.train()(x)
    assert not is_on(model[3].linear)
    block: Any = model[3]
    assert block.train(mode=False, deep=False) == (block, False)
    assert is_on(block.linear)
    assert not block.norm.training


@pytest.mark.filterwarnings("ignore:torch.compile.model. meets the gates")
def test_a_graph_for_inference_is_scaled_after_training() -> None:
    model, x, _ = trained()
    expected = copy.deepcopy(model).eval()(x)
    for prepare in (by_hand, nn.Module.eval):
        twin = copy.deepcopy(model)
        prepare(twin)
        compiled: Any = torch.compile(twin, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected)


def test_a_replica_for_another_device_leaves_its_original_as_it_is() -> None:
    model, *_ = trained()
    block, x = by_hand(model.stages[0][0]), vectors(2, 8, 6, 6)
    replica: Any = block._replicate_for_data_parallel()
    for name, part in block.named_children():
        twin = replica._modules[name] = part._replicate_for_data_parallel()
        twin._parameters = dict(part._parameters)
    expected = copy.deepcopy(block).eval()(x)
    assert_equal(replica(x), expected)
    assert_equal(block(x), expected)


class WithMlp(nn.Module):
    """A block whose branch is one module of the user's."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def pair(build: Callable[[], nn.Module], x: Tensor, **options: Any) -> tuple[Any, Any]:
    """Two gated networks with the same weights and draws; the gates of the second stay on."""
    model, twin = settled(build), settled(build)
    for each in (model, twin):
        sd.apply_stochastic_depth(each, 0.2, "uniform", example_inputs=x, **options)
    kept_on(twin)
    return model, twin


def with_mlps() -> nn.Module:
    return residuals(5, WithMlp)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:torch.compile.model. meets the gates")
def test_an_end_that_was_compiled_before_it_trained_keeps_its_gate() -> None:
    x = vectors(4, 8)
    model, twin = pair(with_mlps, x)
    for each in (model, twin):
        for block in each:
            block.mlp = torch.compile(block.mlp, backend="eager")
        train(each, sgd(each), x, 6)
    assert_equal(dict(model.state_dict()), dict(twin.state_dict()))
    assert_equal(model.eval()(x), twin.eval()(x))


def test_an_end_that_is_compiled_while_it_has_no_gate_is_refused_in_inference() -> None:
    """torch.compile has kept its plain call: the scale would be lost in silence."""
    x = vectors(4, 8)
    model, _ = pair(with_mlps, x)
    train(model, sgd(model), x, 8)
    assert not is_on(model[2].mlp)
    model[2].mlp = torch.compile(model[2].mlp, backend="eager")
    model.eval()
    with pytest.raises(sd.ChangedModelError, match="compiled by itself"):
        model(x)


@pytest.mark.parametrize("other", ["a copy", "that of another block"])
def test_another_gated_end_in_its_place_is_noticed(other: str) -> None:
    x = vectors(4, 8)
    model, _ = pair(with_mlps, x)
    train(model, sgd(model), x, 8)
    model[1].mlp = copy.deepcopy(model[1].mlp) if other == "a copy" else model[3].mlp
    model.eval()
    with pytest.raises(sd.ChangedModelError):
        model(x)


class Checkpointing(WithMlp):
    """It checkpoints its own branch, beneath its gate."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        run: Any = torch.utils.checkpoint.checkpoint
        return x + run(self.branch, x, use_reentrant=self.reentrant)

    def branch(self, x: Tensor) -> Tensor:
        return self.gain * self.mlp(self.norm(x))


class Reentrant(Checkpointing):
    reentrant = True


@pytest.mark.parametrize("kind", [Checkpointing, Reentrant])
@pytest.mark.parametrize("way", ["disabled", "eval"])
def test_what_is_recomputed_is_multiplied_as_it_was(kind: type[nn.Module], way: str) -> None:
    """A forward with factors, then one without, and one backward through both."""
    x = vectors(4, 8).requires_grad_()
    model, twin = pair(lambda: residuals(5, kind), x)
    for each in (model, twin):
        depth = sd.get_stochastic_depth(each)
        for _ in range(3):
            if way == "disabled":
                with depth.disabled():
                    full = each.train()(x)
            else:
                full = each.eval()(x)
            loss = (each.train()(x) - full.detach()).square().mean() + full.square().mean()
            loss.backward()
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert_equal(mine.grad, its.grad)


def test_a_patch_of_the_class_of_an_end_holds() -> None:
    x = vectors(4, 8)
    model, _ = pair(with_mlps, x)
    for block in model:
        type(block.mlp).forward = lambda self, x: 2 * Mlp.forward(self, x)
        break
    with sd.get_stochastic_depth(model).fixed({}):
        before = model.train()(x)
    for _ in range(8):
        model(x)
    with sd.get_stochastic_depth(model).fixed({}):
        assert_equal(model(x), before)
    del type(model[0].mlp).forward


class Freezing(WithMlp):
    def forward(self, x: Tensor) -> Tensor:
        self.eval()
        y = super().forward(x)
        self.train()
        return y


def test_ends_that_are_woken_during_a_call_run() -> None:
    x = vectors(4, 8)
    model, twin = pair(lambda: residuals(5, Freezing), x)
    for each in (model, twin):
        train(each, sgd(each), x, 8)
    assert_equal(dict(model.state_dict()), dict(twin.state_dict()))


def test_update_bn_does_not_end_it() -> None:
    model, x, depth = trained()
    with depth.disabled(), torch.no_grad():
        model(x)
    assert is_on(model.stages[0][0].bn2)
    train(model, sgd(model), x, 8)
    assert not is_on(model.stages[0][0].bn2)
