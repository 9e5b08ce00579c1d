"""Promise: finding the blocks costs a few forwards, on a network of a thousand layers seconds."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from comparing import CountOperations
from networks import BasicBlock


def test_resnet50_is_watched_in_at_most_five_forwards() -> None:
    models = pytest.importorskip("torchvision.models")
    model, x = models.resnet50(num_classes=10), torch.randn(2, 3, 32, 32)
    with CountOperations() as one, torch.no_grad():
        model.eval()(x)
    with CountOperations() as all_of_them:
        sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    name = "convolution.default"
    assert one.counts[name] == 53
    # Three: one with every gate open, one with every gate closed, in which only skip paths run, and
    # one in inference.
    assert all_of_them.counts[name] < 3 * one.counts[name]


def test_a_thousand_layers_take_seconds() -> None:
    blocks = [BasicBlock(4, 4) for _ in range(500)]  # of two convolutions each
    model: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), *blocks)
    x = torch.randn(2, 3, 8, 8)
    start = time.process_time()
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    assert time.process_time() - start < 10
    assert len(depth.blocks) == 500


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_a_constant_example_is_as_good_as_any(constant: float) -> None:
    """Zeros prove nothing about values, so noise takes their place."""
    models = pytest.importorskip("torchvision.models")
    x: Any = torch.full((2, 3, 32, 32), constant)
    torch.manual_seed(0)
    model = models.resnet50(num_classes=10)
    table = str(sd.apply_stochastic_depth(model, 0.2, example_inputs=x))
    assert table.count("skipped whole") == 12
    assert (x == constant).all()


def test_a_model_of_timm_brings_its_own_example_also_for_images_of_another_size() -> None:
    timm = pytest.importorskip("timm")
    for options in ({}, {"img_size": 64}):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=6, **options)
        assert len(sd.find_residual_blocks(model)) == 6
