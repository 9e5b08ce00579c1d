"""Promise: while all gates are open, the model computes exactly what it did without the library."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import stochastic_depth as sd
from comparing import assert_identical_gradients, run
from networks import WIDTH, make, residuals, vectors
from zoo import SPECIMENS, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning")
every_model = pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda s: s.name)


@every_model
@pytest.mark.parametrize("unit", ["block", "branch"])
def test_outputs_gradients_and_buffers(specimen: Specimen, unit: Any) -> None:
    plain = specimen.model(dropout=0.1)
    gated = copy.deepcopy(plain)
    example = specimen.example_inputs()
    depth = sd.apply_stochastic_depth(
        gated, 0.5, example_inputs=example, unit=unit, scale="none", blocks=specimen.gated_blocks
    )
    for training in (True, False):
        plain.train(training)
        gated.train(training)
        with depth.fixed({}):
            mine, theirs = run(gated, example), run(plain, example)
        assert torch.equal(mine, theirs)
        mine.square().sum().backward()
        theirs.square().sum().backward()
    assert_identical_gradients(gated, plain)
    for (name, buffer), other in zip(gated.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, other), name


@every_model
def test_the_blocks_are_those_in_the_source(specimen: Specimen) -> None:
    model = specimen.model()
    blocks = sd.find_residual_blocks(model, specimen.example_inputs())
    assert len(blocks) == specimen.blocks
    for block in blocks:
        have = dict(model.get_submodule(block.name).named_modules())
        expected = [ends for ends in specimen.ends if any(end in have for end in ends)]
        assert len(block.branches) == len(expected), block.name
        for branch, ends in zip(block.branches, expected, strict=True):
            inside = [f"{block.name}.{end}" for end in ends if end in have]
            assert all(
                any(end == module or end.startswith(f"{module}.") for module in branch.modules)
                for end in inside
            ), branch


@every_model
def test_apply_and_remove_leave_no_trace(specimen: Specimen) -> None:
    model = specimen.model().train()
    model.get_submodule(next(iter(dict(model.named_children())))).eval()  # modes may differ
    parameters = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    buffers = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    classes = {name: type(module) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {
        name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()
    }
    keys = list(model.state_dict())
    example = specimen.example_inputs()
    generators = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))

    depth = sd.apply_stochastic_depth(
        model, 0.5, example_inputs=example, blocks=specimen.gated_blocks
    )
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert str(np.random.get_state()) == generators[2]
    assert all(p.grad is None for p in model.parameters())
    assert list(model.state_dict()) == keys
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(isinstance(m, classes[name]) for name, m in model.named_modules())
    assert all(type(m).__name__ == classes[name].__name__ for name, m in model.named_modules())

    assert depth.remove() is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {
        name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()
    } == hooks
    for before, now in ((parameters, model.named_parameters()), (buffers, model.named_buffers())):
        for name, tensor in now:
            assert id(tensor) == before[name][0], name
            assert torch.equal(tensor, before[name][1]), name


def test_a_parametrization_put_on_since_stays_when_the_gates_go() -> None:
    model, x = make("pre-norm")
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x)
    for net in (model, plain):
        for name in ("layers.0.mlp.0", "layers.1.mlp"):  # inside of a gated module, and one itself
            module = net.get_submodule(name)
            for linear in [m for m in module.modules() if isinstance(m, nn.Linear)]:
                parametrizations.weight_norm(linear)
    parametrizations.orthogonal(model.get_submodule("embed"))
    parametrizations.orthogonal(plain.get_submodule("embed"))
    depth.remove()
    assert torch.equal(model(x), plain(x))
    assert not [m for m in model.modules() if "stochastic_depth" in repr(type(m).__mro__)]


def test_a_gated_module_that_is_parametrized_itself_runs_and_is_given_back() -> None:
    model = residuals(6)
    x = vectors(2, WIDTH)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x)
    linear = model.get_submodule("0.linear")
    parametrizations.weight_norm(linear)
    expected = copy.deepcopy(model).train()
    with depth.fixed({}):
        gated = model.train()(x)
    depth.remove()
    assert torch.equal(model(x), gated)
    assert isinstance(linear, nn.Linear)
    assert "_stochastic_depth" not in vars(linear)
    with sd.get_stochastic_depth(expected).fixed({}):
        assert torch.equal(expected(x), gated)
