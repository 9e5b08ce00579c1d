"""Promise: a copy keeps to the clock of its original until it steps by itself, whatever happens."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import stochastic_depth as sd
from networks import gated, make, residuals, settled, sgd, train, vectors
from test_copies import COPIES
from twins import of_blocks, resnet

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize("way", ["deepcopy", "AveragedModel"])
@pytest.mark.parametrize(
    ("events", "original", "copied"),
    [
        ("step step step", 3, 3),
        ("step step step own", 3, 4),  # from where the original stands
        ("step step step own step step", 5, 4),
        ("step own own", 1, 3),
        ("step follow", 1, 1),  # not before its optimizer's first step
        ("step follow train train", 1, 3),
        ("step follow train train step", 2, 3),
        ("resume", 5, 5),
        ("step own resume", 5, 2),
        ("step save step load", 2, 1),
        ("step save step load step", 3, 1),
    ],
)
def test_two_clocks(events: str, original: int, copied: int, way: str) -> None:
    """Of the original: step, save, resume a run of five steps. Of the copy: the others."""
    model, x, depth = gated("pre-norm", schedule=sd.linear_warmup(10))
    _, _, other = gated("pre-norm", schedule=sd.linear_warmup(10))
    for _ in range(5):
        other.step()
    twin = COPIES[way](model)
    own, optimizer = sd.get_stochastic_depth(twin), sgd(twin)
    saved: dict[str, Any] = {}
    happen: dict[str, Callable[[], Any]] = {
        "step": depth.step,
        "own": own.step,
        "follow": lambda: own.follow(optimizer),
        "train": lambda: train(twin, optimizer, x, 1),
        "save": lambda: saved.update(depth.state_dict()),
        "load": lambda: own.load_state_dict(saved),
        "resume": lambda: depth.load_state_dict(other.state_dict()),
    }
    for event in events.split():
        happen[event]()
    for handle, steps in ((depth, original), (own, copied)):
        assert handle.state_dict()["step"] == steps
        assert handle.blocks[-1].drop_rate == pytest.approx(steps / 10 * 0.2)
    if original == copied:
        assert torch.equal(twin.eval()(x), model.eval()(x)) or "train" in events


def test_an_averaged_model_made_at_step_0_follows_the_clock_until_its_own_step() -> None:
    plain, _ = make("resnet")
    model, x, depth = gated("resnet", schedule=sd.linear_warmup(4))
    optimizer = sgd(model)
    depth.follow(optimizer)
    average = AveragedModel(model)
    own = sd.get_stochastic_depth(average)
    assert own is not depth
    for step in range(6):
        train(model, optimizer, x, range(step, step + 1))
        average.update_parameters(model)
        plain.load_state_dict(average.module.state_dict())
        survival = of_blocks({b.name: b.survival_probability for b in depth.blocks})
        share = min((step + 1) / 4, 1.0)
        assert own.blocks[-1].drop_rate == depth.blocks[-1].drop_rate == pytest.approx(0.2 * share)
        assert torch.equal(average.eval()(x), resnet(plain.eval(), x, survival))
    assert not torch.allclose(average(x), plain(x), rtol=1e-3, atol=1e-3)


def test_a_copy_that_is_trained_beside_its_original_waits_for_no_step_of_its_own() -> None:
    """As in the inner loop of meta-learning; warnings are errors here."""
    model, x, _ = gated("pre-norm", schedule=sd.linear_warmup(10))
    twin = copy.deepcopy(model)
    train(twin, sgd(twin), x, range(6))
    steps = [sd.get_stochastic_depth(each).state_dict()["step"] for each in (model, twin)]
    assert steps == [0, 0]


def test_a_copy_that_is_saved_beside_its_original_keeps_to_its_clock() -> None:
    model, _, _ = gated("pre-norm", schedule=sd.linear_warmup(10))
    both = nn.ModuleList([model, copy.deepcopy(model)])
    model, average = COPIES["torch.save"](both).children()
    depth, own = sd.get_stochastic_depth(model), sd.get_stochastic_depth(average)
    depth.step()
    assert own.blocks[0].drop_rate == depth.blocks[0].drop_rate > 0
    own.step()
    assert (depth.state_dict()["step"], own.state_dict()["step"]) == (1, 2)


def test_a_long_chain_of_copies_goes_on() -> None:
    """A population, a federated loop: each a copy of the last, with the clock of the first."""
    model, x = settled(lambda: residuals(6)), vectors(1, 8)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    first, generations = model, []
    for _ in range(1100):
        model = copy.deepcopy(model)
        generations.append(model)
    depth.step()
    assert sd.get_stochastic_depth(model).state_dict()["step"] == 1
    # One in the middle goes its own way, and takes those that were made of it along.
    middle = sd.get_stochastic_depth(generations[500])
    middle.step()
    depth.step()
    steps = [sd.get_stochastic_depth(generations[n]).state_dict()["step"] for n in (499, 500, 1099)]
    assert steps == [2, 2, 2]
    middle.step()
    depth.step()
    assert middle.state_dict()["step"] == 3
    assert sd.get_stochastic_depth(model).state_dict()["step"] == 3
    model.train()(x)
    again = pickle.loads(pickle.dumps(model))
    assert sd.get_stochastic_depth(again).state_dict()["step"] == 3
    assert first is not model


def test_a_copy_whose_original_is_gone_waits_for_steps() -> None:
    model, x, _ = gated("pre-norm", schedule=sd.linear_warmup(10))
    twin = copy.deepcopy(copy.deepcopy(model))
    del model, _
    gc.collect()
    with pytest.warns(sd.StochasticDepthWarning, match="stands at step 0"):
        train(twin, sgd(twin), x, range(6))
