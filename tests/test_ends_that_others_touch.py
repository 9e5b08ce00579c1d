"""Promise: a sleeping end that others compile, replace, patch or recompute is scaled or refused."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import stochastic_depth as sd
from networks import Residual, assert_equal, residuals, settled, sgd, train, vectors
from sleeping import (
    WHOLE,
    Mlp,
    WithMlp,
    by_hand,
    goes_the_fast_way,
    is_on,
    kept_on,
    pair,
    trained,
    with_mlps,
)

pytestmark = goes_the_fast_way


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


def test_an_end_replaced_in_its_sleep_trains_right_until_it_is_refused() -> None:
    """A training asks for it at every 16th step, an evaluation at once: no factor is due before."""
    model, x, depth = trained()
    twin, block = copy.deepcopy(model), model.get_submodule(WHOLE[1])
    before, block.bn2 = block.bn2, nn.BatchNorm2d(block.bn2.num_features)
    block.bn2.load_state_dict(before.state_dict())
    ran = []
    for _ in range(15):
        depth.step()  # the copy's, too
        assert_equal(model.train()(x), twin.train()(x))
        ran.append(depth.last_gates[WHOLE[1]])
    assert len(set(ran)) == 2
    with pytest.raises(sd.ChangedModelError, match='its "bn2" was replaced'):
        model.eval()(x)
    model.train()
    with depth.fixed({}), pytest.raises(sd.ChangedModelError, match='its "bn2" was replaced'):
        model(x)
    depth.step()
    for _ in range(10):
        twin(x)
        runs = sd.get_stochastic_depth(twin).last_gates[WHOLE[1]]
        with pytest.raises(sd.ChangedModelError) if runs else nullcontext():
            model(x)


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
