"""Promise: while all gates are open, the model computes exactly what it did without the library."""

from __future__ import annotations

import copy
import random
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import stochastic_depth as sd
from comparing import assert_identical_gradients, every_model, every_model_and_a_unit, run
from networks import WIDTH, make, residuals, vectors
from specimen import Specimen

pytestmark = pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning")


@every_model_and_a_unit
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
    model, example = specimen.model(), specimen.example_inputs()
    blocks = [
        block
        for block in sd.find_residual_blocks(model, example)
        if not any(fnmatchcase(block.name, name) for name in specimen.leave_out if "*" in name)
    ]
    assert len(blocks) == specimen.blocks
    assert not isinstance(specimen.ends, dict) or {b.name for b in blocks} == {*specimen.ends}
    for block in blocks:
        expected = specimen.ends_of(model, block.name)
        assert len(block.branches) == len(expected), block.name
        for branch, ends in zip(block.branches, expected, strict=True):
            assert all(
                any(f"{end}.".startswith(f"{module}.") for module in branch.modules)
                or specimen.name == "explicit"  # which hands its branches to other modules
                for end in ends
            ), branch
    if specimen.whole is not None:
        depth = sd.apply_stochastic_depth(
            model, 0.2, example_inputs=example, blocks=specimen.gated_blocks
        )
        rows = {line.split()[0]: line for line in str(depth).splitlines()[2:-1]}
        for name in (block.name for block in depth.blocks):
            assert ("skipped whole" in rows[name]) == specimen.is_whole(name)


@every_model
def test_apply_and_remove_leave_no_trace(specimen: Specimen) -> None:
    model = specimen.model().train()
    model.get_submodule(next(iter(dict(model.named_children())))).eval()  # modes may differ
    modules, keys, shown = dict(model.named_modules()), list(model.state_dict()), repr(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    classes = {name: type(module) for name, module in modules.items()}
    modes = {name: module.training for name, module in modules.items()}
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    hooks = {name: _hooks(module) for name, module in modules.items()}
    example = specimen.example_inputs()
    generators = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))

    depth = sd.apply_stochastic_depth(
        model,
        0.5,
        example_inputs=example,
        blocks=specimen.gated_blocks,
        unit=specimen.units[-1],  # type: ignore[arg-type]
    )
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert str(np.random.get_state()) == generators[2]
    assert all(p.grad is None for p in model.parameters())
    assert (list(model.state_dict()), repr(model)) == (keys, shown)
    changed = 0
    for name, module in model.named_modules():
        kind, original = type(module), classes[name]
        changed += kind is not original
        assert module is modules[name]
        assert module.training == modes[name]
        assert isinstance(module, original)
        assert (kind.__name__, kind.__qualname__) == (original.__name__, original.__qualname__)
        assert (kind.__module__, kind.__doc__) == (original.__module__, original.__doc__)
        if not specimen.name.startswith("transformers"):  # which wraps it in every subclass
            assert kind.forward is original.forward
    assert changed or specimen.name == "explicit"

    assert depth.remove() is model
    for name, module in model.named_modules():
        assert type(module) is classes[name]
        assert set(vars(module)) == attributes[name]
        assert _hooks(module) == hooks[name]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor is tensors[name]
        assert torch.equal(tensor, values[name])


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


@pytest.mark.oldest
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


@pytest.mark.oldest
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
