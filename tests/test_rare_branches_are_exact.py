"""Promise: branches of rare operations are dropped, and where that is possible multiplied, exactly.

Each is compared with itself where its value is multiplied in line, by 0 or by 1 / (1 - p) = 2: a
power of two, and so without a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import settled
from stochastic_depth.discovery import kept

pytestmark = pytest.mark.oldest
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


Form = Callable[[Any, Tensor, float], Tensor]


class Written(nn.Module):
    """A block whose forward is a function, which multiplies the branch's value by a factor."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.f, self.g, self.norm, self.form, self.factor = mlp(), mlp(), nn.LayerNorm(8), form, 1.0
        self.matrix, self.gamma = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x, self.factor)


def network(form: Form) -> Any:
    return settled(lambda: nn.Sequential(nn.Linear(8, 8), *(Written(form) for _ in range(6))))


def with_a_bias_of_its_own(block: Any, x: Tensor, factor: float) -> Tensor:
    return block.norm(x + torch.addmm(block.f(x), block.g(x), block.matrix) * factor)


def batches_with_a_bias_of_their_own(block: Any, x: Tensor, factor: float) -> Tensor:
    made = torch.baddbmm(block.f(x)[None], block.g(x)[None], block.matrix[None])
    return block.norm(x + made[0] * factor)


def scaled_in_line(block: Any, x: Tensor, factor: float) -> Tensor:
    return block.norm(x + block.gamma * block.f(x) * factor)


def rounded_in_between(block: Any, x: Tensor, factor: float) -> Tensor:
    return (x.half() + (block.f(x) * factor).half()).float()


def of_the_third_degree(block: Any, x: Tensor, factor: float) -> Tensor:
    y = block.f(x)
    return block.norm(x + torch.addmm(y @ y.T @ y, y, y.T @ y) * factor)


def written_as_integers(block: Any, x: Tensor, factor: float) -> Tensor:
    y = block.f(x)
    y.view(torch.int32).bitwise_and_(2**31 - 1)  # the absolute value
    return x + y * factor


SCALED: list[Form] = [with_a_bias_of_its_own, batches_with_a_bias_of_their_own, scaled_in_line,
                      rounded_in_between]  # fmt: skip
DROPPED: list[Form] = [of_the_third_degree, written_as_integers]


def check(form: Form, scale: Any) -> sd.StochasticDepth:
    model, twin = network(form), network(form)
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=X, scale=scale)
    closed = [False, True, False, False, True, True]
    for block, is_closed in zip(twin[1:], closed, strict=True):
        block.factor = 0.0 if is_closed else 2.0 if scale == "train" else 1.0
    with depth.fixed({str(n): not out for n, out in enumerate(closed, start=1)}):
        assert torch.equal(model.train()(X), twin.train()(X))
    return depth


@pytest.mark.parametrize("form", [*SCALED, *DROPPED], ids=lambda form: form.__name__)
def test_dropped(form: Form) -> None:
    check(form, "none")


@pytest.mark.parametrize("form", SCALED, ids=lambda form: form.__name__)
def test_multiplied(form: Form) -> None:
    check(form, "train")


@pytest.mark.parametrize("form", DROPPED, ids=lambda form: form.__name__)
def test_what_no_factor_passes_is_refused(form: Form) -> None:
    with pytest.raises(sd.RefusedBlockError, match=r'1:0 cannot be scaled.*scale="none" works'):
        sd.apply_stochastic_depth(network(form), 0.5, example_inputs=X)


def test_the_table_says_which_weights_may_get_zero_gradients() -> None:
    assert "its skip path runs; 3.gamma may get zero gradients" in str(
        check(scaled_in_line, "none")
    )


def changing_its_weights(block: Any, x: Tensor, factor: float) -> Tensor:
    with torch.no_grad():
        block.f[1].weight.mul_(0.5)
    return x + block.f(x) * factor


@pytest.mark.parametrize("few_bytes", [0, kept._FEW_BYTES])
def test_weights_that_a_forward_writes_to_are_put_back(
    few_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a small model are copied, those of a large one looked for among the operations."""
    monkeypatch.setattr(kept, "_FEW_BYTES", few_bytes)
    model = network(changing_its_weights)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sd.apply_stochastic_depth(model, 0.2, example_inputs=X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
