"""Promise: what would silently be off says so: schedules that nobody steps or calls, gone gates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import stochastic_depth as sd
from networks import WIDTH, residuals, vectors
from riding import Run, images, network

oldest = pytest.mark.oldest


@oldest
def test_a_model_with_a_schedule_that_is_only_evaluated_warns() -> None:
    model = network().eval()
    options: dict[str, Any] = {"example_inputs": images(), "schedule": sd.linear_warmup(10)}
    depth = sd.apply_stochastic_depth(model, 0.5, **options)
    with pytest.warns(sd.StochasticDepthWarning, match="evaluation at step 0 of a schedule"):
        model(images())
    model(images())  # once
    other = sd.apply_stochastic_depth(network(), 0.5, **options)
    with pytest.warns(sd.StochasticDepthWarning, match="fold.. at step 0 of a schedule"):
        other.fold()
    other = sd.apply_stochastic_depth(network(), 0.5, **options)
    with pytest.warns(sd.StochasticDepthWarning, match="folded_state_dict.. at step 0 of a"):
        other.folded_state_dict()
    other = sd.apply_stochastic_depth(network(), 0.5, **options)
    with pytest.warns(sd.StochasticDepthWarning, match="prune.. at step 0 of a schedule"):
        other.prune(0.5)
    for is_followed in (True, False):
        run = Run()
        if not is_followed:
            run.depth.follow(run.optimizer).remove()
            run.depth.step()
        copied = copy.deepcopy(run.model)
        run.model.eval()(images())
        copied.eval()(images())
    loaded = sd.apply_stochastic_depth(network().eval(), 0.5, **options)
    loaded.load_state_dict(depth.state_dict())
    loaded.model(images())


@oldest
@pytest.mark.parametrize(
    "schedule", [sd.linear_decay, sd.linear_warmup, sd.constant, sd.piecewise_linear]
)
def test_a_schedule_that_was_not_called_raises(schedule: Any) -> None:
    with pytest.raises(sd.OptionError, match=rf"did you mean sd\.{schedule.__name__}\(steps\)"):
        Run(schedule=schedule)
    with pytest.raises(sd.OptionError, match="did you mean"):
        Run(schedule={"stages.*": schedule})


@oldest
def test_a_schedule_with_a_wrong_factor_is_no_refused_block() -> None:
    with pytest.raises(sd.OptionError, match="at step 0"):
        Run(schedule=lambda step: 2.0)


@oldest
def test_a_handle_whose_gates_are_gone_says_so() -> None:
    for end in ("fold", "remove"):
        run = Run(schedule=None)
        getattr(run.depth, end)()
        assert "the gates are taken out" in str(run.depth)


def test_dir_shows_the_public_names_alone() -> None:
    assert dir(sd) == sorted([*sd.__all__, "__version__"])


class Named(torch.Tensor):
    """As a library's own tensors are (torchvision's images, say)."""


def test_an_example_of_a_class_of_its_own() -> None:
    x = vectors(4, WIDTH)
    depth = sd.apply_stochastic_depth(residuals(6), 0.2, example_inputs=x.as_subclass(Named))
    assert len(depth.blocks) == 6
    with depth.fixed({block.name: False for block in depth.blocks}):
        assert torch.equal(depth.model.train()(x.as_subclass(Named)), x)
