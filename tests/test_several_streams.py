"""Promise: one module that ends the branches of several streams scales and folds each of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, settled, vectors

pytestmark = pytest.mark.oldest


class Joint(nn.Module):
    """Attention over two streams, as multimodal diffusion transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * WIDTH, WIDTH)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.mix(torch.cat([a, b], -1)).tanh()
        return self.a(mixed), self.b(mixed)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_b, self.joint = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Joint()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        da, db = self.joint(self.norm_a(a), self.norm_b(b))
        return a + da, b + db


class Swapped(Block):
    """Adds the outputs in the other order."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        da, db = self.joint(self.norm_a(a), self.norm_b(b))
        b = b + db
        return a + da, b


class Streams(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem_a, self.stem_b = nn.Linear(3, WIDTH), nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(6))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.stem_a(a), self.stem_b(b)
        for block in self.blocks:
            a, b = block(a, b)
        return a, b


@pytest.fixture(params=[Block, Swapped])
def model(request: pytest.FixtureRequest) -> Any:
    return settled(lambda: Streams(request.param))


def example() -> tuple[Tensor, Tensor]:
    return vectors(5, 3), vectors(5, 4, seed=2)


def by_hand(model: Any, factors: list[float]) -> tuple[Tensor, Tensor]:
    """The plain model with both outputs of each joint module multiplied."""
    hooks = [
        block.joint.register_forward_hook(lambda m, i, out, f=f: (f * out[0], f * out[1]))
        for block, f in zip(model.blocks, factors, strict=True)
    ]
    found = model(*example())
    for hook in hooks:
        hook.remove()
    return found


def test_both_have_the_inference_scale_and_fold(model: Any) -> None:
    plain = copy.deepcopy(model).eval()
    depth = sd.apply_stochastic_depth(model, 0.3, "uniform", example_inputs=example())
    found = model.eval()(*example())
    torch.testing.assert_close(found, by_hand(plain, [0.7] * 6))
    torch.testing.assert_close(depth.fold().eval()(*example()), found, rtol=1e-5, atol=1e-6)


def test_both_are_multiplied_in_training(model: Any) -> None:
    plain = copy.deepcopy(model).train()
    depth = sd.apply_stochastic_depth(
        model, 0.5, "uniform", example_inputs=example(), scale="train"
    )
    kept = [True, False, True, True, False, True]
    gates = dict(zip([block.name for block in depth.blocks], kept, strict=True))
    with depth.fixed(gates):
        found = model.train()(*example())
    torch.testing.assert_close(found, by_hand(plain, [2.0 * k for k in kept]))


def test_rows_of_both_are_dropped_together(model: Any) -> None:
    plain = copy.deepcopy(model).train()
    depth = sd.apply_stochastic_depth(
        model, 0.5, "uniform", example_inputs=example(), mode="sample", scale="none"
    )
    with torch.no_grad():
        found = model.train()(*example())
    masks = torch.zeros(6, 5, 1)
    for number, rows in enumerate(depth.last_gates.values()):
        masks[number, list(rows)] = 1.0
    torch.testing.assert_close(found, by_hand(plain, list(masks)))
