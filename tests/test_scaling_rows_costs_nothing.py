"""Promise: in mode "sample" no value of a branch is multiplied where weights can take the factor.

What is computed stays the same, up to the rounding of `c * (w * x)` against `(c * w) * x`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import stochastic_depth as sd
from networks import WIDTH, BasicBlock, make, residuals, settled, vectors
from stochastic_depth.gating import branch

pytestmark = pytest.mark.oldest
RATE = 0.5


class Products(TorchDispatchMode):
    """The shapes of what is multiplied by a number."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mul.Tensor and not (isinstance(args[1], Tensor) and args[1].ndim):
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def doubled(model: nn.Module, ends: str) -> nn.Module:
    """A plain copy whose branches are multiplied by two, as a rate of one half asks for."""
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        if name.endswith(ends):
            module.register_forward_hook(lambda module, args, output: 2 * output)
    return twin


def trained(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    output = model.train()(x)
    output.square().mean().backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(mine: Any, theirs: Any) -> None:
    # A few roundings in float32, through six blocks.
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "batch norm": (
        lambda: nn.Sequential(*(BasicBlock(3, 3) for _ in range(6))),
        (2, 3, 6, 6),
        "bn2",
    ),
    "linear": (lambda: residuals(6), (2, WIDTH), "linear"),
}


def gated(kind: str) -> tuple[nn.Module, nn.Module, Tensor, sd.StochasticDepth]:
    """A network, its reference, what to call them with, and the network's handle."""
    build, shape, ends = NETWORKS[kind]
    model, x = settled(build), vectors(*shape)
    reference = doubled(model, ends)
    depth = sd.apply_stochastic_depth(model, RATE, "uniform", example_inputs=x, mode="sample")
    return model, reference, x, depth


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what holds many values has its weights multiplied instead."""
    monkeypatch.setattr(branch, "MANY_VALUES", 1)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_few_values_are_multiplied_themselves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branch, "MANY_VALUES", 1000)
    model, reference, x, depth = gated(kind)
    with depth.fixed({}), Products() as products:
        mine = trained(model, x)
    assert x.shape in products.shapes
    assert_close(mine, trained(reference, x))


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_weights_take_the_factor(kind: str) -> None:
    model, reference, x, depth = gated(kind)
    with depth.fixed({}), Products() as products:
        mine = trained(model, x)
    assert products.shapes
    assert x.shape not in products.shapes
    assert_close(mine, trained(reference, x))


@pytest.mark.parametrize("kind", NETWORKS)
def test_who_looks_at_the_output_sees_what_it_was(kind: str) -> None:
    model, plain, x, depth = gated(kind)
    seen: list[tuple[nn.Module, Tensor]] = []
    ends = f"0.{NETWORKS[kind][2]}"
    last = model.get_submodule(ends)
    last.register_forward_hook(lambda module, args, output: seen.append((module, output)))
    with depth.fixed({}):
        output, _ = trained(model, x)
    ((module, value),) = seen
    assert module is last
    assert_close(output, trained(plain, x)[0])
    with torch.no_grad():
        assert_close(value, _output_of(plain.get_submodule(ends), plain, x) / 2)


def _output_of(module: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: found.append(output))
    model(x)
    handle.remove()
    return found[0]


def test_a_replaced_forward_is_called_and_its_output_multiplied() -> None:
    model, x = settled(lambda: residuals(6)), vectors(2, WIDTH)
    depth = sd.apply_stochastic_depth(model, RATE, "uniform", example_inputs=x, mode="sample")
    plain = copy.deepcopy(model)
    sd.get_stochastic_depth(plain).remove()
    for net in (model, plain):
        linear: Any = net.get_submodule("0.linear")
        linear.forward = lambda x, own=linear.forward: own(x) + 1.0
    with depth.fixed({}):
        assert_close(model.train()(x), doubled(plain, "linear")(x))


def test_parameters_and_statistics_stay_the_modules_own() -> None:
    model, x = make("resnet")
    before = dict(model.named_parameters())
    depth = sd.apply_stochastic_depth(model, RATE, "uniform", example_inputs=x, mode="sample")
    tracked = model.stages[0][0].bn2.num_batches_tracked.clone()
    with depth.fixed({}):
        trained(model, x)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(parameter.grad is not None for parameter in before.values())
    assert model.stages[0][0].bn2.num_batches_tracked == tracked + 1
