"""Running models and comparing what came out, exactly."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stochastic_depth as sd
from specimen import Specimen
from zoo import NETWORKS, ODD_BLOCKS, SPECIMENS

oldest = pytest.mark.oldest
every_model = pytest.mark.parametrize(
    "specimen",
    [pytest.param(s, marks=oldest if s.is_small else (), id=s.name) for s in SPECIMENS],
)


def _with_units(*, both: bool) -> pytest.MarkDecorator:
    """Large models in every unit, small ones as well, or in the finest."""
    cells = [
        pytest.param(s, unit, marks=oldest if s.is_small else (), id=f"{s.name}-{unit}")
        for s in SPECIMENS
        for unit in (s.units if both or not s.is_small else s.units[-1:])
    ]
    return pytest.mark.parametrize(("specimen", "unit"), cells)


every_model_and_unit, every_model_and_a_unit = _with_units(both=True), _with_units(both=False)
every_network = pytest.mark.parametrize("specimen", NETWORKS, ids=lambda s: s.name)
every_small_one = pytest.mark.parametrize(
    "specimen", [*NETWORKS, *ODD_BLOCKS], ids=lambda s: s.name
)

Factor = float | Tensor  # of a branch: one number, or one for each row of the batch


def run(model: nn.Module, example: Any) -> Tensor:
    """All numbers that come out under a fixed seed (dropout), or of an object the first tensor."""
    torch.manual_seed(5)
    if isinstance(example, Mapping):
        output = model(**example)
    else:
        output = model(*example) if isinstance(example, tuple) else model(example)
    found = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    return torch.cat([x.flatten() for x in found]) if type(output) in (tuple, dict) else found[0]


def with_factors(plain: Any, specimen: Specimen, factors: Mapping[str, Factor]) -> Any:
    """A copy in which hooks multiply the branches ("block:number").

    The modules that end a branch are those that the zoo names, not those that the library found.
    One that ends several branches is called once for each.
    """
    model = copy.deepcopy(plain)
    at: dict[nn.Module, list[Factor]] = {}
    for branch, factor in factors.items():
        name, _, number = branch.partition(":")
        for end in specimen.ends_of(model, name)[int(number)]:
            at.setdefault(model.get_submodule(end), []).append(factor)
    for module, own in at.items():
        module.register_forward_hook(_by(itertools.cycle(own)))
    return model


def _by(factors: Iterator[Factor]) -> Any:
    def multiply(module: nn.Module, args: Any, output: Any) -> Any:
        factor = next(factors)
        value = output if isinstance(output, Tensor) else output[0]
        if isinstance(factor, Tensor):
            rows = factor.to(value.dtype).repeat_interleave(len(value) // len(factor))
            value = value * rows.view(-1, *[1] * (value.ndim - 1))
        else:
            value = value * factor if factor else torch.zeros_like(value)
        return value if isinstance(output, Tensor) else (value, *output[1:])

    return multiply


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
