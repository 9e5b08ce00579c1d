"""Running models and comparing what came out, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stochastic_depth as sd
from zoo import Specimen


def run(model: nn.Module, example: Any) -> Tensor:
    """The first floating output, under a fixed seed (dropout)."""
    torch.manual_seed(5)
    output = model(**example) if isinstance(example, Mapping) else model(example)
    return next(x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point())


def with_zeroed_branches(
    plain: nn.Module, specimen: Specimen, dropped: Collection[str]
) -> nn.Module:
    """A copy in which hooks force the outputs of these branches ("block:number") to zero.

    The modules that end a branch are those that the zoo names, not those that the library found.
    """
    model = copy.deepcopy(plain)
    for name in dropped:
        for end in branch_ends(model, specimen, name):
            end.register_forward_hook(_zeroed)
    return model


def branch_ends(model: nn.Module, specimen: Specimen, branch: str) -> list[nn.Module]:
    """The modules that end a branch ("block:number"), by the zoo."""
    name, _, number = branch.partition(":")
    block = model.get_submodule(name)
    return [block.get_submodule(end) for end in _ends_in(block, specimen)[int(number)]]


def _ends_in(block: nn.Module, specimen: Specimen) -> list[list[str]]:
    """The zoo's ends that this block has, for each of its branches (T5's encoder has two)."""
    have = dict(block.named_modules())
    found = [[end for end in ends if end in have] for ends in specimen.ends]
    return [ends for ends in found if ends]


def _zeroed(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


def assert_same_gradients(
    mine: nn.Module, reference: nn.Module, *, inside: Callable[[str], bool], rounding: float = 0.0
) -> None:
    """Bit-identical gradients, or up to a part of the largest; None in the dropped modules.

    `inside` knows the parameters of the dropped modules.
    """
    for (name, own), (_, other) in zip(
        mine.named_parameters(), reference.named_parameters(), strict=True
    ):
        if inside(name):
            assert own.grad is None, name
            assert other.grad is None or not other.grad.any(), name
        elif own.grad is None or other.grad is None:
            # Behind the last module of a dropped branch: None here, zeros there or the reverse.
            either = own.grad if own.grad is not None else other.grad
            assert either is None or not either.any(), name
        else:
            difference = (own.grad - other.grad).abs().max()
            assert difference <= rounding * other.grad.abs().max(), name


def assert_identical_gradients(mine: nn.Module, reference: nn.Module) -> None:
    """Bit-identical gradients, and None in the same places."""
    pairs = zip(mine.named_parameters(), reference.parameters(), strict=True)
    for (name, own), other in pairs:
        assert (own.grad is None) == (other.grad is None), name
        if own.grad is not None and other.grad is not None:
            assert torch.equal(own.grad, other.grad), name


class CountOperations(TorchDispatchMode):
    """How many operations are dispatched, by name; allocations and views are not work."""

    FREE = (
        "empty",
        "detach",
        "view",
        "alias",
        "t.",
        "transpose",
        "permute",
        "as_strided",
        "expand",
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def rates(depth: sd.StochasticDepth) -> dict[str, float]:
    """The drop rate of each gated block, by name."""
    return {block.name: block.drop_rate for block in depth.blocks}
