"""What the tests know of a model: how to build it, and what a person reads in its source.

`ends` is the ground truth of the tests, written by hand: for each branch of a block, the modules
(by their name inside of the block) whose output is added to the skip connection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

Ends = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Specimen:
    """A model of the table."""

    name: str
    make: Callable[[float], nn.Module]  # takes the dropout rate
    example: Callable[[], Any]  # example_inputs: a tensor, a tuple, or a dict of keywords
    blocks: int  # how many residual blocks it has
    ends: Ends | dict[str, Ends]  # of every block, or by the block's name
    whole: tuple[str, ...] | None = None  # patterns of the blocks that are skipped whole, if told
    leave_out: tuple[str, ...] = ()  # blocks that are refused, as design and issue allow
    unfoldable: str = ""  # what `fold()` says where it refuses
    rowless: str = ""  # what mode "sample" says where it refuses
    masks: bool = True  # whether rows that are dropped equal rows of masks, on the first dimension
    units: tuple[str, ...] = ("block", "branch")  # what may draw on its own
    rounding: float = 0.0  # part of the largest value, where a sum is taken in another order
    # Small networks are of torch alone; odd ones are stacks of one block.
    size: Literal["large", "small", "odd"] = "large"

    @property
    def is_small(self) -> bool:
        return self.size != "large"

    @property
    def gated_blocks(self) -> list[str] | None:
        """What to pass as `blocks=`."""
        return [f"!{name}" for name in self.leave_out] or None

    def ends_of(self, model: nn.Module, block: str) -> list[list[str]]:
        """The names of the modules that end each branch that this block has."""
        ends = self.ends[block] if isinstance(self.ends, dict) else self.ends
        have = dict(model.named_modules())
        names = [[f"{block}.{end}".rstrip(".") for end in branch] for branch in ends]
        found = [[name for name in branch if name in have] for branch in names]
        return [branch for branch in found if branch]

    def is_whole(self, block: str) -> bool:
        """Whether a dropped block returns its input."""
        return any(fnmatchcase(block, pattern) for pattern in self.whole or ())

    def example_inputs(self) -> Any:
        torch.manual_seed(1)
        return self.example()

    def model(self, dropout: float = 0.0) -> Any:
        torch.manual_seed(0)
        model = self.make(dropout)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                # A fresh network hides mistakes: zero heads, tiny layer scales, idle norms.
                if name.endswith(("running_var", "gamma", "layer_scale")) or bool(
                    (tensor == 1).all()
                ):
                    tensor.uniform_(0.5, 1.5)
                elif tensor.is_floating_point() and not bool(tensor.any()):
                    tensor.uniform_(-0.2, 0.2)
            for module in model.modules():
                if type(module).__name__ == "StochasticDepth":
                    setattr(module, "p", 0.0)  # noqa: B010  (torchvision has no types)
        return model
