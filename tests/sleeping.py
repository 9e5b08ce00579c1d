"""Networks whose ends sleep, and twins whose gates stay on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import stochastic_depth as sd
from networks import gated, residuals, settled, sgd, train
from stochastic_depth.gating.gate import Gate, gate_of

goes_the_fast_way = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="in torch 2.6 every call goes the slow way",
)


WHOLE = ("stages.0.0", "stages.0.1", "stages.0.2", "stages.1.1", "stages.1.2")


def is_on(module: nn.Module) -> bool:
    """Whether a module is called by way of its gate."""
    return hasattr(type(module), "gated_from")


def kept_on(model: nn.Module) -> None:
    """Have the gates of a model stay on."""
    for module in model.modules():
        gate = gate_of(module)
        if isinstance(gate, Gate):
            gate.asleep = None


def trained(**options: Any) -> tuple[Any, Tensor, sd.StochasticDepth]:
    """A network that has trained some steps, so that its ends are plain."""
    model, x, depth = gated("resnet", **options)
    train(model, sgd(model), x, 8)
    assert not any(is_on(model.get_submodule(f"{name}.bn2")) for name in WHOLE)
    return model, x, depth


def by_hand(model: nn.Module) -> nn.Module:
    """As some trainers restore modes: without `eval()`."""
    for module in model.modules():
        module.training = False
    return model


class WithMlp(nn.Module):
    """A block whose branch is one module of the user's."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def pair(build: Callable[[], nn.Module], x: Tensor, **options: Any) -> tuple[Any, Any]:
    """Two gated networks with the same weights and draws; the gates of the second stay on."""
    model, twin = settled(build), settled(build)
    for each in (model, twin):
        sd.apply_stochastic_depth(each, 0.2, "uniform", example_inputs=x, **options)
    kept_on(twin)
    return model, twin


def with_mlps() -> nn.Module:
    return residuals(5, WithMlp)
