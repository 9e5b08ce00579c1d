"""Promise: a checkpoint of a training alone makes the weights of the plain model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

import stochastic_depth as sd
from networks import assert_equal
from riding import Run, images, network, through_a_file

oldest = pytest.mark.oldest


class Holder(nn.Module):
    """A network inside of another."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.other = net, nn.Linear(2, 2)


@oldest
def test_a_checkpoint_is_folded_without_a_model() -> None:
    run = Run()
    run.steps(6)
    saved, expected = run.saved(), run.depth.folded_state_dict()
    assert_equal(sd.fold_state_dict(saved["model"], run.depth.state_dict()), expected)
    assert_equal(sd.fold_state_dict(saved["model"], saved["optimizer"]), expected)
    inside = through_a_file(Holder(run.model).state_dict())
    found = sd.fold_state_dict(inside, saved["optimizer"])
    assert_equal({k: found[f"net.{k}"] for k in expected}, expected)
    plain = network().eval()
    plain.load_state_dict(sd.fold_state_dict(saved["model"], saved["optimizer"]))
    assert_equal(plain(images()), run.depth.fold().eval()(images()))


@oldest
@pytest.mark.parametrize("scale", ["train", "none"])
def test_without_an_inference_scale_there_is_nothing_to_fold(scale: str) -> None:
    run = Run(scale=scale)
    run.steps(1)
    saved = run.saved()
    assert_equal(sd.fold_state_dict(saved["model"], saved["optimizer"]), saved["model"])


@oldest
def test_what_does_not_belong_together_is_not_folded() -> None:
    run = Run()
    run.steps(6)
    saved = run.saved()
    with pytest.raises(sd.StateMismatchError, match="no factors to fold with"):
        sd.fold_state_dict(saved["model"], {"state": {}, "param_groups": []})
    with pytest.raises(sd.StateMismatchError, match="no times beside its companions"):
        sd.fold_state_dict(nn.Linear(2, 2).state_dict(), saved["optimizer"])
    twice = {f"{name}.{key}": v.clone() for name in ("a", "b") for key, v in saved["model"].items()}
    with pytest.raises(sd.StateMismatchError, match="2 times beside its companions"):
        sd.fold_state_dict(twice, saved["optimizer"])


@oldest
def test_a_network_that_stands_there_twice_is_folded_by_its_prefix() -> None:
    run = Run()
    run.steps(6)
    model = Holder(run.model)
    model.teacher = copy.deepcopy(run.model)
    with pytest.raises(sd.StateMismatchError, match=r"2 times.*prefix="):
        sd.fold_state_dict(model.state_dict(), run.depth.state_dict())
    found = sd.fold_state_dict(model.state_dict(), run.depth.state_dict(), prefix="net.")
    for key, value in run.depth.folded_state_dict().items():
        assert_equal(found[f"net.{key}"], value)
        assert_equal(found[f"teacher.{key}"], model.state_dict()[f"teacher.{key}"])
    model.teacher = run.model  # the same under another name
    found = sd.fold_state_dict(model.state_dict(), run.depth.state_dict())
    for key, value in run.depth.folded_state_dict().items():
        assert_equal(found[f"net.{key}"], value)
        assert_equal(found[f"teacher.{key}"], value)


@oldest
@pytest.mark.parametrize("state", [None, {}, {"fold": None}])
def test_no_state_to_fold_by_is_an_error_of_ours(state: Any) -> None:
    with pytest.raises(sd.StateMismatchError, match="no factors to fold with"):
        sd.fold_state_dict(network().state_dict(), state)
