"""The physically shortened network: what a step costs with the closed blocks really taken out.

It is the yardstick: skipping a block can save at most what the block's absence saves. Between
several ranks it exchanges as many gradients as the others: those of what was taken out are zeros.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

import stochastic_depth as sd


@contextmanager
def taken_out(
    model: nn.Module, blocks: Iterable[str], *, exchanged: bool = False
) -> Iterator[list[nn.Parameter]]:
    """Puts what remains of a block without its branch in the place of these blocks.

    Yields the parameters that are out; with `exchanged` they come out of the backward, as
    DistributedDataParallel demands of all, but without a gradient.
    """
    originals = {name: model.get_submodule(name) for name in blocks}
    absent = []
    for name, block in originals.items():
        remains = _what_remains(block)
        kept = set(remains.parameters())
        missing = [parameter for parameter in block.parameters() if parameter not in kept]
        absent += missing
        model.set_submodule(name, _Exchanged(block, remains, missing) if exchanged else remains)
    try:
        yield absent
    finally:
        for name, block in originals.items():
            model.set_submodule(name, block)


class _Exchanged(nn.Module):
    """What remains of a block, with all that DistributedDataParallel exchanges for the block."""

    def __init__(self, block: nn.Module, remains: nn.Module, missing: list[nn.Parameter]) -> None:
        super().__init__()
        self.block = block  # not called: here, as on every rank, for its buffers
        self.remains = remains
        self._hung_on = tuple(missing)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _HungOn.apply(self.remains(x), *self._hung_on))


class _HungOn(torch.autograd.Function):
    """Hands a value on. The parameters are part of the graph, but get no gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.number = len(parameters)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *[None] * ctx.number


def _what_remains(block: nn.Module) -> nn.Module:
    """A good guess for residual networks and transformers; `can_be_taken_out` tests it."""
    for name in ("shortcut", "downsample"):
        path = getattr(block, name, None)
        if isinstance(path, nn.Module) and not isinstance(path, nn.Identity):
            return nn.Sequential(path, nn.ReLU())
    return nn.Identity()


def can_be_taken_out(
    plain: nn.Module, model: nn.Module, depth: sd.StochasticDepth, example: Tensor
) -> bool:
    """Whether `plain` without any blocks computes what `model` does with all its gates closed.

    Both must have the same weights.
    """
    names = [block.name for block in depth.blocks]
    modules = dict(plain.named_modules())
    if not all(name in modules for name in names):
        return False
    plain.eval()
    model.eval()
    with torch.no_grad(), depth.fixed(dict.fromkeys(names, False)), taken_out(plain, names):
        try:
            equal = torch.allclose(plain(example), model(example), rtol=1e-4, atol=1e-5)
        except (RuntimeError, AttributeError, TypeError):  # the guess does not even run
            equal = False
    plain.train()
    model.train()
    return equal
