"""Promise: a model or block that its user compiles himself gives what eager gives, or an error.

Before or after stochastic depth is applied, wrapped or in place; and what torch.export makes of the
model in inference keeps the scale.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, batch, make, vectors
from test_compile import assert_same_step, compiled, without_torchs_own_fast_path

pytestmark = [
    # torch's own, while it traces a graph in the middle of a network
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
__all__ = ["without_torchs_own_fast_path"]


def apply(model: nn.Module, example: Tensor, **options: Any) -> sd.StochasticDepth:
    return sd.apply_stochastic_depth(model, 0.5, example_inputs=example[:2], **options)


def lists_of_blocks(model: Any) -> list[Any]:
    return list(model.stages) if hasattr(model, "stages") else [model.layers]


Way = Callable[..., Any]


def the_model(model: nn.Module, **options: Any) -> nn.Module:
    compiled: Any = torch.compile(model, backend="aot_eager", **options)
    return compiled


def the_model_in_place(model: nn.Module, **options: Any) -> nn.Module:
    model.compile(backend="aot_eager", **options)
    return model


def its_blocks(model: nn.Module, **options: Any) -> nn.Module:
    for blocks in lists_of_blocks(model):
        for number, block in enumerate(blocks):
            blocks[number] = torch.compile(block, backend="aot_eager", **options)
    return model


def its_blocks_in_place(model: nn.Module, **options: Any) -> nn.Module:
    for blocks in lists_of_blocks(model):
        for block in blocks:
            block.compile(backend="aot_eager", **options)
    return model


WAYS = [the_model, the_model_in_place, its_blocks, its_blocks_in_place]


@pytest.mark.oldest
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("way", "name"), [*zip(WAYS, ["resnet", "resnet", "pre-norm", "resnet"], strict=True)]
)
def test_it_is_eager_to_the_bit(way: Way, first: bool, name: str) -> None:
    torch.compiler.reset()
    model, x = make(name)
    eager = copy.deepcopy(model)
    other = apply(eager, x)
    if first:
        compiled = way(model)
        depth = apply(compiled, x)
    else:
        depth = apply(model, x)
        compiled = way(model)
    compare(compiled, eager, x, depth, other)


@pytest.mark.parametrize("way", [its_blocks, its_blocks_in_place])
@pytest.mark.parametrize("scale", ["train", "none"])
def test_blocks_that_are_compiled_as_one_graph_each(way: Way, scale: str) -> None:
    torch.compiler.reset()
    model, x = make("pre-norm")
    eager = copy.deepcopy(model)
    compiled = way(model, fullgraph=True)
    depths = apply(compiled, x, scale=scale), apply(eager, x, scale=scale)
    compare(compiled, eager, x, *depths)


def compare(compiled: nn.Module, eager: nn.Module, x: Tensor, *depths: sd.StochasticDepth) -> None:
    """Training and inference, and inference with a block forced closed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.compile met blocks")
        for step in range(5):
            assert_same_step(compiled.train(), eager.train(), batch(x, step))
        compiled.eval(), eager.eval()
        assert torch.equal(compiled(x), eager(x))
        closed = {depths[0].blocks[-1].name: False}
        with depths[0].fixed(closed), depths[1].fixed(closed), torch.no_grad():
            assert torch.equal(compiled(x), eager(x))
        with torch.no_grad():
            assert torch.equal(compiled(x), eager(x))


def test_a_compiled_model_says_once_that_there_is_a_better_way() -> None:
    torch.compiler.reset()
    model, x = make("resnet")
    apply(model, x)
    compiled = the_model(model)
    with pytest.warns(sd.StochasticDepthWarning, match=r"depth\.compile\(\)") as said:
        [compiled.train()(batch(x, step)) for step in range(5)]
    assert len(said) == 1


def test_blocks_in_whose_graphs_there_is_no_place_for_a_factor_say_so() -> None:
    torch.compiler.reset()
    model, x = make("pre-norm")
    its_blocks_in_place(model)
    apply(model, x, scale="train")
    with pytest.warns(sd.StochasticDepthWarning, match=r"depth\.compile\(\)") as said:
        [model.train()(batch(x, step)) for step in range(5)]
    assert len(said) == 1


@pytest.mark.parametrize("way", [the_model, the_model_in_place, its_blocks])
def test_one_graph_that_would_hold_draws_is_refused_with_the_way_out(way: Way) -> None:
    torch.compiler.reset()
    model, x = make("pre-norm")
    apply(model, x)
    compiled = way(model, fullgraph=True)
    with pytest.raises(Exception, match=r"depth\.compile\(\), or compile the blocks first"):
        compiled.train()(x)


def test_one_graph_of_a_model_in_inference_has_its_scale() -> None:
    torch.compiler.reset()
    model, x = make("resnet")
    depth = apply(model, x)
    compiled = the_model(model.eval(), fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    scaled = model(x)
    depth.remove()
    assert torch.equal(compiled(x), model(x))  # what was compiled before asks for the gates
    assert not torch.allclose(model(x), scaled)


@pytest.mark.parametrize("name", ["resnet", "pre-norm", "nested", "shared"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # a None
def test_export_has_the_scale(name: str, strict: bool) -> None:
    torch.compiler.reset()
    model, x = make(name)
    plain = copy.deepcopy(model).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "1 block with a drop rate")
        apply(model, x)
    program = torch.export.export(model.eval(), (x,), strict=strict)
    assert torch.equal(program.module()(x), model(x))
    assert not torch.allclose(plain(x), model(x))


class InLine(nn.Module):
    """Whose residual connections are in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x.tanh())
        return x


def test_a_compiled_model_that_is_gated_itself() -> None:
    torch.compiler.reset()
    model, x = InLine(), vectors(4, WIDTH)
    eager = copy.deepcopy(model)
    with pytest.raises(sd.OptionError, match=r"made of a InLine.*then call depth\.compile\(\)"):
        apply(the_model(model), x)
    depths = apply(model, x), apply(eager, x)
    compare(the_model(model), eager, x, *depths)


def test_graphs_beyond_torchs_limit_are_exact() -> None:
    """torch then runs some functions as they are and goes on tracing what they call."""
    torch.compiler.reset()
    model, x = make("pre-norm")
    eager = copy.deepcopy(model)
    depths = apply(model, x), apply(eager, x)
    its_blocks(model)
    limit = torch._dynamo.config.recompile_limit
    try:
        torch._dynamo.config.recompile_limit = 2
        compare(the_model(model), eager, x, *depths)
    finally:
        torch._dynamo.config.recompile_limit = limit


def test_a_compiled_depth_in_a_compiled_model_has_nothing_to_say() -> None:
    model, x = make("resnet")
    eager, _ = compiled(model, x)
    outer = the_model(model)
    for step in range(4):
        assert_same_step(outer.train(), eager.train(), batch(x, step))
    assert torch.equal(outer.eval()(x), eager.eval()(x))
