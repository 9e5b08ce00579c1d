"""Promise: of branches inside of each other, written in one forward, the outer one is gated, and
the block says so; of branches that one module ends, each is multiplied once.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from layers import Interlaced
from networks import WIDTH, assert_equal, residuals, settled, vectors
from stochastic_depth.discovery import watch
from streams import Joint, JointBlock, OneLayer, Streams

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning"),
]


def test_the_inner_one_is_left_out_and_named() -> None:
    found = sd.find_residual_blocks(residuals(6, Interlaced), vectors(3, WIDTH))
    assert [block.left_out for block in found] == [(f"{n}.f",) for n in range(6)]


class RootWeighted(nn.Module):
    """A graph convolution with a weight for the node itself: a sum inside of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.root = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        share = (self.query(x)[target] * x[source]).sum(-1, keepdim=True).sigmoid()
        found = torch.zeros_like(x).index_add(0, target, share * self.value(x)[source])
        return found + self.root(x)


class GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.convs = nn.ModuleList(RootWeighted() for _ in range(5))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + norm(conv(x, edges)).relu()
        return x


class Twice(nn.Module):
    """Residual blocks that a residual sum is put around."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = residuals(5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("scale", ["eval", "train", "none"])
@pytest.mark.parametrize("name", ["graph", "twice"])
def test_a_layer_with_a_sum_of_its_own_in_a_branch_in_line(name: str, scale: Any) -> None:
    """Both sums would give their blocks the layer's name: the outer one is gated."""
    model = settled(GraphNetwork if name == "graph" else Twice)
    x, edges = vectors(9, 3), torch.randint(0, 9, (2, 20))
    example: Any = (x, edges) if name == "graph" else (vectors(9, WIDTH),)
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.2, "uniform", example_inputs=example, scale=scale)
    ends = plain.norms if name == "graph" else plain.layers
    assert [block.name.rpartition(".")[2] for block in depth.blocks] == list("01234")
    assert all(block.left_out for block in sd.find_residual_blocks(plain, example))
    kept = {"eval": 0.8}.get(scale, 1.0)
    for number, block in enumerate(depth.blocks):
        hooks = [
            end.register_forward_hook(partial(_times, 0.0 if n == number else kept))
            for n, end in enumerate(ends)
        ]
        with depth.fixed({block.name: False}):
            assert_equal(model.eval()(*example), plain.eval()(*example))
        for hook in hooks:
            hook.remove()


def _times(factor: float, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output if factor == 1.0 else output * factor


@pytest.mark.parametrize("joint", [Joint, OneLayer])
def test_one_module_that_ends_two_branches(joint: type[nn.Module]) -> None:
    model = Streams(lambda: JointBlock(joint))
    found, _ = watch(model, vectors(4, 3), None)
    for block in found.blocks:
        assert block.branches_leak  # so that both are drawn together
        assert block.refusal is None
        ends = [(b.modules[place], own) for b in block.branches for place, own in b.branch_outputs]
        attn = f"{block.name}.joint"
        assert ends == [(attn, 0), (attn, 1)]
        assert [branch.unscalable for branch in block.branches] == [None, None]
        parts = ("a", "b") if joint is Joint else ("mix", "mix")
        assert [branch.fold.parameters for branch in block.branches] == [
            (f"{attn}.{part}.bias", f"{attn}.{part}.weight") for part in parts
        ]


class Around(nn.Module):
    """Ends in the module that ends the block inside of its branch, too."""

    def __init__(self) -> None:
        super().__init__()
        self.end = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)
        )
        self.inner = Within(self.end)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(self.inner(x))


class Within(nn.Module):
    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(x)


@pytest.mark.parametrize(
    "options", [{}, {"scale": "train"}, {"unit": "branch"}, {"mode": "sample"}]
)
def test_a_module_that_ends_an_inner_and_an_outer_branch(options: dict[str, Any]) -> None:
    model, x = settled(lambda: residuals(4, Around)), vectors(6, WIDTH)
    says = r'block "0": "0\.end" ends a branch of it, and one of "0\.inner" in it'
    for each, example in ((copy.deepcopy(model).to("meta"), x.to("meta")), (model, x)):
        with pytest.raises(sd.RefusedBlockError, match=says):
            sd.apply_stochastic_depth(each, 0.5, "uniform", example_inputs=example, **options)
    blocks = ["*", *(f"!{number}" for number in range(4))]
    depth = sd.apply_stochastic_depth(
        model, 0.5, "uniform", example_inputs=x, blocks=blocks, scale="train"
    )
    assert [block.name for block in depth.blocks] == [f"{number}.inner" for number in range(4)]
    with depth.fixed({}):
        found = model.train()(x)
    depth.remove()
    for block in model:
        y = x + 2 * block.end(x)
        x = x + block.end(y)
    assert torch.equal(found, x)
