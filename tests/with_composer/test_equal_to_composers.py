"""Promise: given the same gates, a ResNet-50 computes what it does with Composer's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from composer.algorithms.stochastic_depth import apply_stochastic_depth as composers_apply
from torch import Tensor, nn

from stochastic_depth.integrations.composer import apply_stochastic_depth


def resnet50() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet50(num_classes=10)
    for name, tensor in model.state_dict().items():  # statistics as of a trained network
        if name.endswith("running_mean"):
            tensor.uniform_(-0.2, 0.2)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return model


def images() -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    output.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("distribution", ["linear", "uniform"])
@pytest.mark.parametrize("step", range(3))
def test_block_mode_in_training(distribution: str, step: int) -> None:
    ours, theirs = resnet50(), resnet50()
    depth = apply_stochastic_depth(ours, "ResNetBottleneck", "block", 0.5, distribution)
    composers_apply(theirs, "ResNetBottleneck", "block", 0.5, distribution)
    module: Any
    for block in depth.blocks:
        module = theirs.get_submodule(block.name)
        assert float(module.drop_rate) == pytest.approx(block.drop_rate)
    for _ in range(step):
        depth.step()
    output = ours.train()(images())
    assert not all(depth.last_gates.values())
    for name, is_open in depth.last_gates.items():
        module = theirs.get_submodule(name)
        module.drop_rate = torch.tensor(0.0 if is_open else 1.0)
    expected = theirs.train()(images())
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    own, others = gradients(ours, output), gradients(theirs, expected)
    assert {name for name, gradient in own.items() if gradient is None} == {
        name for name, gradient in others.items() if gradient is None
    }
    torch.testing.assert_close(own, others, rtol=0, atol=0)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("distribution", ["linear", "uniform"])
def test_block_mode_in_inference(distribution: str) -> None:
    ours, theirs = resnet50(), resnet50()
    apply_stochastic_depth(ours, "ResNetBottleneck", "block", 0.5, distribution)
    composers_apply(theirs, "ResNetBottleneck", "block", 0.5, distribution)
    output, expected = ours.eval()(images()), theirs.eval()(images())
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(ours, output), gradients(theirs, expected))


def no_batch_norm(model: nn.Module) -> nn.Module:
    """In training, but for BatchNorm, whose statistics are of all rows there, of the kept here."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def group_norm() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet50(
        num_classes=10, norm_layer=lambda channels: nn.GroupNorm(8, channels)
    )
    return model


@pytest.mark.parametrize("make", [group_norm, resnet50])
@pytest.mark.parametrize("distribution", ["linear", "uniform"])
def test_sample_mode_in_training(
    make: Callable[[], nn.Module], distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = no_batch_norm(make()), no_batch_norm(make())
    depth = apply_stochastic_depth(ours, "ResNetBottleneck", "sample", 0.5, distribution)
    composers_apply(theirs, "ResNetBottleneck", "sample", 0.5, distribution)
    output = ours(images())
    rows = iter(depth.last_gates.values())
    assert any(0 < len(kept) < 4 for kept in depth.last_gates.values())

    def chosen(shape: list[int], **options: Any) -> Tensor:
        # They keep a row where the number that they draw is not below the drop rate.
        drawn = torch.zeros(shape, **options)
        drawn[list(next(rows))] = 0.999
        return drawn

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", chosen)
        expected = theirs(images())
    assert next(rows, None) is None
    torch.testing.assert_close(output, expected)
    own, others = gradients(ours, output), gradients(theirs, expected)
    for name, gradient in others.items():
        assert gradient is not None
        wanted, found = gradient.double(), own[name]
        found = torch.zeros_like(wanted) if found is None else found.double()
        assert (found - wanted).norm() <= 1e-4 * wanted.norm() + 1e-9, name


@pytest.mark.parametrize("make", [group_norm, resnet50])
def test_sample_mode_in_inference(make: Callable[[], nn.Module]) -> None:
    ours, theirs = make(), make()
    apply_stochastic_depth(ours, "ResNetBottleneck", "sample", 0.5)
    composers_apply(theirs, "ResNetBottleneck", "sample", 0.5)
    output, expected = ours.eval()(images()), theirs.eval()(images())
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(ours, output), gradients(theirs, expected))


def test_the_same_rates_on_a_copy() -> None:
    ours = resnet50()
    depth = apply_stochastic_depth(ours, "ResNetBottleneck", "block", 0.2)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(images()), ours.eval()(images()), rtol=0, atol=0)
    assert len(depth.blocks) == 16
