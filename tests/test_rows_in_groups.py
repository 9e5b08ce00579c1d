"""Promise: a layer whose own code asks for the number of rows runs once for each kind of row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, vectors

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning"),
]
BATCH = 8


class InLineAttention(nn.Module):
    """Post-norm, with the attention written out between its modules, for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, int, Tensor]:
        rows, length, _ = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, WIDTH).unbind(2)
        weights = (q @ k.mT + mask.view(rows, 1, length)).softmax(-1)
        x = self.norm1(x + self.out(weights @ v))
        hidden = self.up(x).view(rows * length, 16).relu()
        x = self.norm2(x + self.down(hidden).view(rows, length, WIDTH))
        return x, length, x.mean(1)


class PreNormAttention(InLineAttention):
    """Pre-norm, so that it can be skipped whole, on all rows or on some."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, int, Tensor]:
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, WIDTH).unbind(2)
        x = x + self.out((q @ k.mT + mask.view(rows, 1, length)).softmax(-1) @ v)
        hidden = self.up(self.norm2(x)).view(rows * length, 16).relu()
        return x + self.down(hidden).view(rows, length, WIDTH), length, x.mean(1)


class Model(nn.Module):
    def __init__(self, layer: type[InLineAttention] = InLineAttention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(6))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x, length, mean = layer(x, mask)
            x = x + mean[:, None] / length
        return x


def masked(model: Any, x: Tensor, mask: Tensor, factors: list[list[Tensor]]) -> Tensor:
    """The same on all rows, with each branch times a factor for each row."""
    for layer, (attention, feed_forward) in zip(model.layers, factors, strict=True):
        flat = feed_forward.repeat_interleave(x.shape[1]).view(-1, 1)
        handles = [
            layer.out.register_forward_hook(_times(attention.view(-1, 1, 1))),
            layer.down.register_forward_hook(_times(flat)),
        ]
        x, length, mean = layer(x, mask)
        x = x + mean[:, None] / length
        for handle in handles:
            handle.remove()
    return x


def _times(factor: Tensor) -> Any:
    return lambda module, args, output: output * factor


@pytest.mark.parametrize("unit", ["block", "branch"])
def test_it_is_the_same_where_the_weights_come_later(unit: Any) -> None:
    torch.manual_seed(0)
    x, mask = vectors(BATCH, 5, WIDTH), torch.zeros(BATCH, 5)
    whole = Model()
    with torch.device("meta"):
        empty = Model()
    for model in (whole, empty):
        sd.apply_stochastic_depth(
            model, 0.5, "uniform", example_inputs=(x, mask), mode="sample", unit=unit
        )
    empty.to_empty(device="cpu").load_state_dict(whole.state_dict())
    assert torch.equal(empty.train()(x, mask), whole.train()(x, mask))


@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("rows", ["contiguous", "random"])
@pytest.mark.parametrize("layer", [InLineAttention, PreNormAttention])
def test_outputs_and_gradients_equal_masks(
    layer: type[InLineAttention], unit: Any, rows: Any
) -> None:
    torch.manual_seed(0)
    model = Model(layer)
    plain = copy.deepcopy(model)
    given = (vectors(BATCH, 5, WIDTH), vectors(BATCH, 5, seed=2))
    depth = sd.apply_stochastic_depth(
        model,
        0.5,
        "uniform",
        example_inputs=given,
        mode="sample",
        unit=unit,
        draw=sd.Draw(rows=rows),
    )
    assert str(depth).count("runs once for each kind of row") == 6
    partly = 0
    for _ in range(3):
        model.train().zero_grad()
        plain.zero_grad()
        ours = model(*given)
        factors = []
        for block in depth.blocks:
            names = [block.name if unit == "block" else b.name for b in block.branches]
            kept: list[Any] = [depth.last_gates[name] for name in names]
            factors.append([_mask(rows_of_one) for rows_of_one in kept])
            partly += sum(0 < len(rows_of_one) < BATCH for rows_of_one in kept)
        theirs = masked(plain, *given, factors)
        # Kernels sum in another order for another number of rows.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        ours.square().sum().backward()
        theirs.square().sum().backward()
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            if mine.grad is None or other.grad is None:
                assert other.grad is None or not other.grad.any()
            else:
                assert (mine.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-6
    assert partly


def _mask(kept: Any) -> Tensor:
    mask = torch.zeros(BATCH)
    mask[list(kept)] = 2.0
    return mask


def test_a_layer_with_batch_norm_is_refused() -> None:
    class Normed(InLineAttention):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(WIDTH, WIDTH)
            self.norms = nn.ModuleList([nn.BatchNorm1d(WIDTH)])

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, int, Tensor]:
            rows, length, _ = x.shape
            hidden = self.up(x).view(rows * length, 16).relu()
            normed = self.norms[0](self.down(hidden)).view(rows, length, WIDTH)
            return self.norm2(x + normed), length, x.mean(1)

    torch.manual_seed(0)
    model = Model()
    model.layers = nn.ModuleList(Normed() for _ in range(6))
    given = (vectors(BATCH, 5, WIDTH), vectors(BATCH, 5, seed=2))
    with pytest.raises(sd.RefusedBlockError, match="on some rows of the batch alone"):
        sd.apply_stochastic_depth(model, 0.5, example_inputs=given, mode="sample")
