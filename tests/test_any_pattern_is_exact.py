"""Promise: whichever gates are closed, the model computes as with those branches at zero."""

from __future__ import annotations

import copy
import random
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stochastic_depth as sd
from comparing import (
    CountOperations,
    assert_identical_gradients,
    assert_same_gradients,
    run,
    with_zeroed_branches,
)
from networks import WIDTH, make, vectors
from twins import resnet, vit_layer
from zoo import SPECIMENS, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning")
Unit = Literal["block", "branch"]
every_model = pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda s: s.name)


@every_model
@pytest.mark.parametrize("unit", ["block", "branch"])
def test_three_random_patterns(specimen: Specimen, unit: Unit) -> None:
    plain = specimen.model()
    gated = copy.deepcopy(plain)
    example = specimen.example_inputs()
    depth = sd.apply_stochastic_depth(
        gated,
        0.5,
        example_inputs=example,
        unit=unit,
        scale="none",
        blocks=specimen.gated_blocks,
    )
    rng = random.Random(specimen.name + unit)
    for training in (True, False, True):
        gates = {
            name: rng.random() < 0.5
            for block in depth.blocks
            for name in ([block.name] if unit == "block" else [b.name for b in block.branches])
        }
        dropped = {
            branch.name
            for block in depth.blocks
            for branch in block.branches
            if not gates.get(block.name, gates.get(branch.name))
        }
        reference = with_zeroed_branches(plain, specimen, dropped).train(training)
        mine = copy.deepcopy(gated).train(training)
        with sd.get_stochastic_depth(mine).fixed(gates):
            output = run(mine, example)
        expected = run(reference, example)
        assert torch.equal(output, expected), dropped
        output.square().sum().backward()
        expected.square().sum().backward()
        modules = [
            module
            for block in sd.get_stochastic_depth(mine)._plan.blocks
            for branch in block.branches
            if branch.name in dropped
            for module in branch.modules
        ]
        own = {f"{m}.{p}" for m in modules for p, _ in mine.get_submodule(m).named_parameters()}
        assert dropped == set() or own
        assert_same_gradients(mine, reference, inside=own.__contains__)
        before = dict(plain.named_buffers())
        for name, buffer in mine.named_buffers():
            if any(name.startswith(f"{module}.") for module in modules):
                assert torch.equal(buffer, before[name]), f"{name} moved although it was dropped"


@every_model
def test_nothing_of_a_dropped_branch_runs(specimen: Specimen) -> None:
    """Every block closed at once: what is left is what the skip connections and the rest need."""
    model = specimen.model().train()
    example = specimen.example_inputs()
    depth = sd.apply_stochastic_depth(
        model,
        0.5,
        example_inputs=example,
        blocks=specimen.gated_blocks,
    )
    ran: list[str] = []
    for block in depth._plan.blocks:
        for branch in block.branches:
            for name in branch.modules:
                for part, module in model.get_submodule(name).named_modules():
                    module.register_forward_hook(
                        lambda *_, key=f"{branch.name} {name}.{part}": ran.append(key)
                    )
    with CountOperations() as open_counts, depth.fixed({}):
        run(model, example)
    assert ran
    ran.clear()
    with CountOperations() as closed_counts, depth.fixed({b.name: False for b in depth.blocks}):
        run(model, example)
    # Modules without parameters may serve on the skip path as well (a ReLU behind the sum).
    assert not {key for key in ran if "relu" not in key and "dropout" not in key}
    heavy = ("convolution", "addmm", "mm.", "bmm", "native_batch_norm", "native_layer_norm")
    in_branches = _heavy_operations_by_hand(model, depth, example, heavy)
    for name in open_counts.counts:
        if name.startswith(heavy):
            left = open_counts.counts[name] - in_branches.get(name, 0)
            assert closed_counts.counts.get(name, 0) == left, name


def _heavy_operations_by_hand(
    model: torch.nn.Module, depth: sd.StochasticDepth, example: Any, heavy: tuple[str, ...]
) -> dict[str, int]:
    """The operations that are dispatched while a module of a branch runs, counted by hooks."""
    total: dict[str, int] = {}
    level = [0]
    counter = CountOperations()
    marks: list[dict[str, int]] = []

    def before(*_: object) -> None:
        level[0] += 1
        if level[0] == 1:
            marks.append(dict(counter.counts))

    def after(*_: object) -> None:
        level[0] -= 1
        if level[0] == 0:
            start = marks.pop()
            for name, count in counter.counts.items():
                total[name] = total.get(name, 0) + count - start.get(name, 0)

    handles = []
    for block in depth._plan.blocks:
        for name in {m for branch in block.branches for m in branch.modules}:
            module = model.get_submodule(name)
            handles += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after),
            ]
    with counter, depth.fixed({}):
        run(model, example)
    for handle in handles:
        handle.remove()
    return {name: count for name, count in total.items() if name.startswith(heavy)}


def _resnet(kind: str) -> torch.nn.Module:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    block = models.resnet.BasicBlock if kind == "basic" else models.resnet.Bottleneck
    return models.ResNet(block, [2, 2, 2, 1], num_classes=5)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@settings(max_examples=15)
@given(gates=st.lists(st.booleans(), min_size=7, max_size=7), training=st.booleans())
def test_resnet_equals_its_reference_twin(kind: str, gates: list[bool], training: bool) -> None:
    model = _resnet(kind).train(training)
    images = vectors(2, 3, 32, 32)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=images, scale="none")
    kept = dict(zip([block.name for block in depth.blocks], gates, strict=True))
    twin = copy.deepcopy(model)
    with depth.fixed(kept):
        mine = model(images)
    theirs = resnet(sd.get_stochastic_depth(twin).remove(), images, kept, {})
    assert torch.equal(mine, theirs)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    assert_identical_gradients(model, twin)
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other), name


@settings(max_examples=25)
@given(gates=st.lists(st.booleans(), min_size=6, max_size=6), training=st.booleans())
def test_vit_layers_equal_their_reference_twin(gates: list[bool], training: bool) -> None:
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        *(vision.EncoderBlock(2, 16, 32, 0.0, 0.0) for _ in range(3))
    ).train(training)
    x = vectors(2, 5, 16)
    twin = copy.deepcopy(layers)
    depth = sd.apply_stochastic_depth(layers, 0.1, example_inputs=x, unit="branch", scale="none")
    names = [branch.name for block in depth.blocks for branch in block.branches]
    with depth.fixed(dict(zip(names, gates, strict=True))):
        mine = layers(x)
    theirs = x
    for number, layer in enumerate(twin):
        theirs = vit_layer(layer, theirs, gates[2 * number : 2 * number + 2])
    assert torch.equal(mine, theirs)
    if any(gates):
        mine.square().sum().backward()
        theirs.square().sum().backward()
    assert_identical_gradients(layers, twin)


def test_a_dropped_projection_block_runs_its_projection_alone() -> None:
    model, example = make("resnet")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=example)
    block = model.stages[1][0]
    x = torch.randn(2, WIDTH, 8, 8)
    with depth.fixed({"stages.1.0": False}), torch.no_grad():
        with CountOperations() as ours:
            found = block(x)
        expected = block.downsample(x).relu_()
    assert ours.counts["convolution.default"] == 1
    assert torch.equal(found, expected)
