"""The physically shortened network: what a step costs with the closed blocks really taken out.

It is the yardstick: skipping a block can save at most what the block's absence saves.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import stochastic_depth as sd


@contextmanager
def taken_out(model: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
    """Puts what remains of a block without its branch in the place of these blocks."""
    originals = {name: model.get_submodule(name) for name in blocks}
    for name, block in originals.items():
        model.set_submodule(name, _what_remains(block))
    try:
        yield
    finally:
        for name, block in originals.items():
            model.set_submodule(name, block)


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
