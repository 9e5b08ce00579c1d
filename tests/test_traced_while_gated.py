"""Promise: what traces a gated model gets the right output, or an error that names the way out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, residuals, settled, vectors

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Trace had nondeterministic nodes"),
]
SCALES = pytest.mark.parametrize("scale", ["eval", "train", "none"])


class Typed(nn.Module):
    """A block that can be scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x).relu())


def gated(scale: Any) -> tuple[Any, Tensor, sd.StochasticDepth]:
    model, x = settled(lambda: residuals(6, Typed)), vectors(3, WIDTH)
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=x, scale=scale)
    return model, x, depth


@SCALES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trace", [torch.jit.script, torch.fx.symbolic_trace])
def test_scripts_and_fx_are_refused(trace: Any, training: bool, scale: Any) -> None:
    model, x, depth = gated(scale)
    expected = model.eval()(x)
    with pytest.raises(sd.SetupError, match=r"with its gate.*depth\.fold\(\)"):
        trace(model.train(training))
    torch.testing.assert_close(trace(depth.fold().eval())(x), expected)


@SCALES
def test_a_part_of_the_model_is_refused_as_well(scale: Any) -> None:
    model, _, _ = gated(scale)
    with pytest.raises(sd.SetupError, match=r'"2" with its gate.*depth\.fold\(\)'):
        torch.jit.script(model[2])


@SCALES
@pytest.mark.parametrize("checks", [True, False])
def test_a_trace_in_training_is_refused(checks: bool, scale: Any) -> None:
    """It would hold one draw, and one scale."""
    model, x, _ = gated(scale)
    with pytest.raises(sd.SetupError, match=r"a trace .*model\.eval\(\) is enough"):
        torch.jit.trace(model.train(), x, check_trace=checks)


@SCALES
def test_a_trace_in_inference_is_right(scale: Any) -> None:
    model, x, _ = gated(scale)
    traced: Callable[[Tensor], Tensor] = torch.jit.trace(model.eval(), x)
    other = vectors(5, WIDTH, seed=2)
    torch.testing.assert_close(traced(other), model(other))


def test_a_gated_model_can_be_folded_and_traced_beside_itself() -> None:
    model, x, _ = gated("eval")
    twin = copy.deepcopy(model)
    plain: Any = torch.fx.symbolic_trace(sd.get_stochastic_depth(twin).fold().eval())
    torch.testing.assert_close(plain(x), model.eval()(x))
