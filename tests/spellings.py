"""Residual blocks that spell their sum in many ways, or do something around it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Residual

# What a block does around its sum.

Form = Callable[["Formed", Tensor], Tensor]


class Formed(Residual):
    """A residual block whose forward is a function."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form, self.drop = form, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def added(block: Formed, x: Tensor) -> Tensor:
    return x + block.branch(x)


def in_place(block: Formed, x: Tensor) -> Tensor:
    x += block.branch(1 * x)
    return x


def there_and_back(block: Formed, x: Tensor) -> Tensor:
    return added(block, x.transpose(0, 1).roll(1, 0)).roll(-1, 0).transpose(0, 1)


def widened(block: Formed, x: Tensor) -> Tensor:
    return (x.double() + block.branch(x)).to(x.dtype)


def noise(block: Formed, x: Tensor) -> Tensor:
    return added(block, x + 0.1 * torch.randn_like(x) if block.training else x)


def in_training(act: Callable[[Tensor], Tensor]) -> Form:
    """Something is done with the sum in training only."""
    return lambda block, x: act(added(block, x)) if block.training else added(block, x)


RETURNS_ITS_INPUT: dict[str, Form] = {
    "added in place": in_place,
    "there and back": there_and_back,
    "widened": widened,
}
"""Without its branch such a block is the identity."""
DOES_MORE: dict[str, Form] = {
    "turned": lambda block, x: added(block, x).transpose(0, 1),
    "rolled": lambda block, x: added(block, x).roll(1, 0),
    "rounded": lambda block, x: added(block, x).half().to(x.dtype),
    "doubled": lambda block, x: 2 * x + block.branch(x),
    "dropout behind": lambda block, x: block.drop(added(block, x)),
    "functional dropout": lambda block, x: F.dropout(added(block, x), 0.5, block.training),
    "dropout in front": lambda block, x: added(block, block.drop(x)),
    "doubled in training": in_training(lambda y: y * 2),
    "noise in training": noise,
    "clipped in training": in_training(lambda y: y.clamp(-0.5, 0.5)),
}
"""Without its branch it still does something, in training at least."""


# How the sum is spelled.


class Add(nn.Module):
    """A sum that is a module of its own, with a factor on the skip connection."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * x + y


Sum = Callable[["Summed", Tensor, Tensor], Tensor]


class Summed(nn.Module):
    """Two branches: one is added as usual, one by this function."""

    def __init__(self, add: Sum) -> None:
        super().__init__()
        self.attn, self.ffn = (
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
            for _ in "ab"
        )
        self.gate, self.own, self.add = nn.Parameter(torch.rand(8)), Add(), add

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return self.add(self, x, self.ffn(x))


SUMS: dict[str, Sum] = {
    "add": lambda block, x, y: torch.add(x, y),
    "add with alpha": lambda block, x, y: torch.add(x, y, alpha=0.5),
    "sub": lambda block, x, y: x - y,
    "rsub": lambda block, x, y: torch.rsub(y, x),
    "addcmul": lambda block, x, y: torch.addcmul(x, block.gate, y),
    "addcmul with value": lambda block, x, y: torch.addcmul(x, y, block.gate, value=0.5),
    "addcmul that broadcasts": lambda block, x, y: torch.addcmul(
        x, y.mean(-1, keepdim=True), block.gate
    ),
    "addcdiv": lambda block, x, y: torch.addcdiv(x, y, block.gate + 1),
    "stack": lambda block, x, y: torch.stack([x, y]).sum(0),
    "stack at the end": lambda block, x, y: torch.stack([y, x], -1).sum(-1),
    "python's sum": lambda block, x, y: sum([x, y]),  # type: ignore[dict-item, return-value]
    "addmm": lambda block, x, y: torch.addmm(x, y, torch.eye(8, dtype=x.dtype)),
    "addbmm": lambda block, x, y: torch.addbmm(x, y[None], torch.eye(8, dtype=x.dtype)[None]),
}
SUMS_WITH_A_FACTOR: dict[str, Sum] = {  # on the skip connection, which is not skipped then
    "add to the branch": lambda block, x, y: torch.add(y, x, alpha=0.5),
    "sub from the branch": lambda block, x, y: y - x,
    "lerp": lambda block, x, y: torch.lerp(x, y, 0.3),
    "lerp by a weight": lambda block, x, y: torch.lerp(x, y, block.gate),
    "mean": lambda block, x, y: torch.stack([x, y]).mean(0),
    "in place": lambda block, x, y: y.add_(x, alpha=0.5),
    "own module": lambda block, x, y: block.own(x, y),
}
UNFOLDABLE_SUMS = {
    "addcdiv": "a weight of blocks.0 is itself computed",
    "lerp by a weight": "blocks.0.gate is shared with blocks.0",
    **dict.fromkeys(["stack", "stack at the end", "mean"], "feed more than the sum"),
}
