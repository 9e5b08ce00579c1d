"""Promise: pruning keeps what a model hands out, whatever its lists and its layers look like."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.oldest


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Features(nn.Module):
    """Hands out what some layers, told by their numbers, come to; and has another list."""

    def __init__(self, neck: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(6))
        self.neck = nn.ModuleList(Block() for _ in range(neck))

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in (1, 3, 5):
                features.append(x)
        for block in self.neck:
            x = block(x)
        return {"out": x, "features": features}


@pytest.mark.parametrize("neck", [2, 3])
def test_features_of_numbered_layers_stay_as_many(neck: int) -> None:
    torch.manual_seed(0)
    model, x = Features(neck).eval(), torch.randn(4, 8)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    gone = ["layers.2", "layers.3", "neck.1"]
    with depth.fixed(dict.fromkeys(gone, False)):
        expected = model(x)
    pruned = depth.prune([block.name for block in depth.blocks if block.name not in gone])
    found = pruned(x)
    assert torch.equal(found["out"], expected["out"])
    assert len(found["features"]) == len(expected["features"])
    assert all(map(torch.equal, found["features"], expected["features"]))
    assert len(pruned.neck) == neck - 1  # type: ignore[arg-type]


class Tupled(nn.Module):
    """A layer with a norm behind its sum, which hands out a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.norm = mlp(), nn.LayerNorm(8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.norm(x + self.branch(x)),)


class OfTuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Tupled() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            (x,) = layer(x)
        return x


class OfTheFirst(OfTuples):
    """What stands in for a layer, and hands out no tuple, would be cut up without a word."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return x


@pytest.mark.parametrize("kind", [OfTuples, OfTheFirst])
@pytest.mark.parametrize("shape", [(4, 8), (1, 1, 8), (2, 5, 8)])
def test_layers_that_hand_out_tuples_are_taken_out_with_their_norms(
    kind: type[OfTuples], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(shape)
    expected = model.layers[3](model.layers[0](x)[0])[0]
    pruned = sd.prune(model, 2, exact=False, example_inputs=x)
    assert [name for name, _ in pruned.named_children()] == ["layers"]
    assert len(pruned.layers) == 2  # type: ignore[arg-type]
    assert torch.equal(pruned(x), expected)


class Pooled(nn.Module):
    """A residual connection that is written out in the model's own forward, behind its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (1, {"layers.0"}),
        (2, {"layers.0", "mlp"}),
        (0.5, {"layers.0", "mlp"}),
        (["layers.0", "layers.3"], {"layers.0", "layers.3"}),
    ],
)
def test_a_branch_that_is_no_list_adds_nothing(keep: Any, left: set[str]) -> None:
    torch.manual_seed(0)
    model, x = Pooled().eval(), torch.randn(4, 8)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    names = [block.name for block in depth.blocks]
    assert names == [f"layers.{number}" for number in range(4)] + ["mlp"]
    with depth.fixed({name: name in left for name in names}):
        expected = model(x)
    pruned = depth.prune(keep)
    assert torch.equal(pruned(x), expected)
    assert len(pruned.layers) == len(left - {"mlp"})  # type: ignore[arg-type]
    assert isinstance(pruned.mlp, nn.Sequential) is ("mlp" in left)


class Twice(nn.Module):
    """The last blocks have a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.last = self.blocks[3:]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_what_stays_under_another_name_is_said() -> None:
    x = torch.randn(4, 8)
    with pytest.warns(sd.StochasticDepthWarning, match=r"is still in the model as \"last\.0\""):
        sd.prune(Twice(), ["blocks.0", "blocks.1"], example_inputs=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.prune(Twice(), ["blocks.0", "blocks.3", "blocks.4", "blocks.5"], example_inputs=x)


class Picky(Tupled):
    """Cannot be called outside of its model, and so not be seen to be a norm alone."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        if float(x.abs().max()) > 50:
            raise TypeError("takes no such values")
        return super().forward(x, mask)


def test_a_layer_that_cannot_be_tried_is_refused() -> None:
    model = OfTuples()
    model.layers = nn.ModuleList(Picky() for _ in range(4))
    before = list(model.modules())
    with pytest.raises(sd.RefusedBlockError, match=r'block "layers\.1" cannot be taken out'):
        sd.prune(model, ["layers.0"], example_inputs=torch.randn(4, 8))
    assert list(model.modules()) == before


@dataclass
class Output:
    last: Tensor
    layers: int


class OfAClass(nn.Module):
    """Returns an object of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Block() for _ in range(6)))

    def forward(self, x: Tensor) -> Output:
        return Output(self.layers(x), len(self.layers))


def test_outputs_in_a_dataclass() -> None:
    model, x = OfAClass(), torch.randn(4, 8)
    left = [model.layers[number] for number in (0, 5)]
    pruned: Any = sd.prune(model, 2, example_inputs=x)
    assert [*pruned.layers] == left
    assert torch.equal(pruned(x).last, left[1](left[0](x)))
    assert pruned(x).layers == 2


def test_blocks_that_were_compiled() -> None:
    model, x = nn.Sequential(*(Block() for _ in range(6))), torch.randn(4, 8)
    left = [model[number] for number in (0, 5)]
    for block in model:
        block.compile(backend="eager")
    pruned: Any = sd.prune(model, 2, example_inputs=x)
    assert [*pruned] == left
    assert all(block._compiled_call_impl is not None for block in pruned)
    with torch.no_grad():
        assert torch.equal(pruned(x), left[1].forward(left[0].forward(x)))


class PostNorm(nn.Module):
    def __init__(self, act: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.enter, self.leave, self.act, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), act, norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.leave(self.act(self.enter(x))))
        return y


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(8)])
def test_norms_behind_blocks_that_share_modules(norm: nn.Module | None) -> None:
    act, x = nn.GELU(), torch.randn(4, 8)
    model = nn.Sequential(*(PostNorm(act, norm or nn.LayerNorm(8)) for _ in range(6)))
    depth = sd.apply_stochastic_depth(copy.deepcopy(model), 0.2, example_inputs=x, scale="none")
    with depth.fixed({"1": False, "3": False}):
        expected = depth.model.eval()(x)
    pruned = sd.prune(model, ["0", "2", "4", "5"], example_inputs=x)
    assert torch.equal(pruned.eval()(x), expected)


class Numbered(Block):
    """Gets something of its own by its number; its branch is nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 8)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, mine: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.last((x + mine).tanh())


class OfNumbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Numbered() for _ in range(6))
        self.of_each = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, self.of_each[number])
        return x


def test_what_a_block_gets_by_its_number_where_branches_are_nothing_yet() -> None:
    model, x = OfNumbered(), torch.randn(4, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned: Any = sd.prune(model, ["blocks.0", "blocks.5"], example_inputs=x)
    assert len(pruned.blocks) == 6  # of which four hand their input on
    assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())


class Again(nn.Module):
    """One block stands at three places of a list."""

    def __init__(self) -> None:
        super().__init__()
        shared = Block()
        self.blocks = nn.ModuleList([Block(), shared, Block(), shared, Block(), shared])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_block_at_several_places_is_named() -> None:
    with pytest.raises(sd.RefusedBlockError, match=r'\("blocks\.1" is also "blocks\.3"\)'):
        sd.prune(Again(), ["blocks.0", "blocks.2", "blocks.4"], example_inputs=torch.randn(4, 8))
