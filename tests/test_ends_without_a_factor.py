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
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import stochastic_depth as sd
from networks import assert_equal, gated, residuals, settled, sgd, train, vectors
from sleeping import by_hand, goes_the_fast_way, is_on, kept_on, trained
from stochastic_depth.gating.gate import Gate

pytestmark = goes_the_fast_way


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


def test_update_bn_does_not_end_it() -> None:
    model, x, depth = trained()
    with depth.disabled(), torch.no_grad():
        model(x)
    assert is_on(model.stages[0][0].bn2)
    train(model, sgd(model), x, 8)
    assert not is_on(model.stages[0][0].bn2)


def test_a_gate_has_as_many_attributes_as_python_keeps_side_by_side() -> None:
    assert len(fields(Gate)) < 30  # of more Python 3.11 makes a dictionary
