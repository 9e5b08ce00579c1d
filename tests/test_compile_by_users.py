"""Promise: a model or block that its user compiles himself gives what eager gives, or an error.

Before or after stochastic depth is applied, wrapped or in place. In training a gate is where one
graph ends, and each block's forward is one; in inference the gates are a part of the graph.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from comparing import rates
from networks import WIDTH, PreNormLayer, assert_equal, batch, make, settled, vectors
from test_compile import (
    WARMUP,
    assert_same_step,
    assert_trains_alike,
    compiled,
    gated,
    graphs,
    without_torchs_own_fast_path,
)

pytestmark = [
    pytest.mark.oldest,
    # torch's own, while it traces a graph in the middle of a network
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:torch.compile.model. meets the gates"),
]
__all__ = ["without_torchs_own_fast_path"]
# torch 2.6 knows it by its older name
LIMIT = "cache_size_limit" if torch.__version__ < "2.7" else "recompile_limit"


def lists_of_blocks(model: Any) -> list[Any]:
    return list(model.stages) if hasattr(model, "stages") else [model.layers]


Way = Callable[..., Any]


def the_model(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="aot_eager", **options)


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


# What is trained, how, and how many graphs that takes: the ResNet has three kinds of blocks, and
# something in front of them and behind.
WAYS: list[tuple[Way, str, dict[str, Any], int]] = [
    (the_model, "resnet", {"schedule": sd.linear_warmup(30)}, 5),
    (the_model_in_place, "resnet", {"scale": "train"}, 5),
    (its_blocks, "pre-norm", {"scale": "train", "schedule": sd.linear_warmup(30)}, 1),
    (its_blocks_in_place, "resnet", {}, 3),
]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("way", "name", "options", "number"), WAYS)
def test_it_is_eager_to_the_bit(
    way: Way, name: str, options: dict[str, Any], number: int, first: bool
) -> None:
    model, x = make(name)
    if first:
        eager = copy.deepcopy(model)
        result = way(model)
        _, depth = gated(result, x, **options)
        gated(eager, x, **options)
    else:
        eager, depth = gated(model, x, **options)
        result = way(model)
    for step in range(WARMUP):
        assert_same_step(result.train(), eager.train(), batch(x, step))
    assert graphs() == number
    for _ in range(3):
        depth.step()
        if first:  # else the eager one is a copy, which follows
            sd.get_stochastic_depth(eager).step()
        assert_same_step(result, eager, x)
    assert graphs() == number
    assert torch.equal(result.eval()(x), eager.eval()(x))
    closed = {depth.blocks[-1].name: False}
    with depth.fixed(closed), sd.get_stochastic_depth(eager).fixed(closed), torch.no_grad():
        assert torch.equal(result(x), eager(x))
    with torch.no_grad():
        assert torch.equal(result(x), eager(x))


@pytest.mark.parametrize("options", [{"mode": "sample", "scale": "train"}, {"unit": "branch"}])
def test_other_draws(options: dict[str, Any]) -> None:
    model, x = make("pre-norm")
    eager, depth = gated(model, x.repeat(2, 1, 1), **options)
    assert_trains_alike(the_model(model), eager, depth, x.repeat(2, 1, 1), rounding=1e-5)


def test_resnet50_has_more_kinds_than_torch_has_graphs_for_in_one_function() -> None:
    torchvision = pytest.importorskip("torchvision")
    model, x = torchvision.models.resnet50(num_classes=3), vectors(2, 3, 32, 32)
    eager, _ = gated(model, x)
    result = the_model(model)
    for step in range(8):
        assert_same_step(result.train(), eager.train(), batch(x, step))
    assert graphs() == 10  # two kinds in each stage; in front, and behind
    for step in range(8, 12):
        assert_same_step(result, eager, batch(x, step))
    assert graphs() == 10


@pytest.mark.parametrize(
    ("way", "first"),
    # What is wrapped afterwards has its gate inside, and no graph where a block is dropped.
    [(its_blocks, True), (its_blocks_in_place, True), (its_blocks_in_place, False)],
)
def test_blocks_that_are_compiled_as_one_graph_each(way: Way, first: bool) -> None:
    model, x = make("pre-norm")
    eager = copy.deepcopy(model)
    if first:
        way(model, fullgraph=True)
    for each in (model, eager):
        gated(each, x, scale="train")
    if not first:
        way(model, fullgraph=True)
    for step in range(5):
        assert_same_step(model.train(), eager.train(), batch(x, step))


@pytest.mark.parametrize("way", [the_model, the_model_in_place])
def test_one_graph_that_would_hold_draws_is_refused_with_the_way_out(way: Way) -> None:
    model, x = make("pre-norm")
    gated(model, x)
    says = "disable" if torch.__version__ < "2.7" else r"depth\.compile\(\), which compiles block"
    with pytest.raises(Exception, match=says):
        way(model, fullgraph=True).train()(x)


@pytest.mark.parametrize(
    "schedule", [None, sd.linear_warmup(4), sd.constant(0.5) * sd.linear_decay(9), lambda step: 0.5]
)
def test_one_graph_of_a_model_in_inference_has_its_scale(schedule: Any) -> None:
    model, x = make("resnet")
    _, depth = gated(model, x, schedule=schedule)
    depth.step()
    result = the_model(model.eval(), fullgraph=True)
    scaled = model(x)
    assert torch.equal(result(x), scaled)
    depth.remove()
    assert torch.equal(result(x), model(x))  # what was compiled before asks for the gates
    assert not torch.allclose(model(x), scaled)


@pytest.mark.parametrize("options", [{"scale": "none"}, {"scale": "train"}, {"mode": "sample"}])
def test_one_graph_of_a_model_in_inference_that_has_no_factors(options: dict[str, Any]) -> None:
    """Also where the ends of its branches sleep, since it was called before."""
    model, x = make("resnet")
    gated(model, x, **options)
    for called_before in (False, True):
        torch.compiler.reset()
        expected = model.eval()(x) if called_before else make("resnet")[0].eval()(x)
        assert torch.equal(the_model(model.eval(), fullgraph=True)(x), expected)


def test_one_graph_of_a_model_in_inference_some_rates_of_which_are_0() -> None:
    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(
        model, [0.0, 0.1, 0.2, 0.0, 0.3, 0.4], example_inputs=x, schedule=starts_at(3)
    )
    for step in range(1, 5):
        depth.step()
        torch.compiler.reset()
        expected = model.eval()(x)
        assert torch.equal(the_model(model, fullgraph=True)(x), expected), step


def starts_at(first: int) -> Any:
    return lambda step: 0.5 if step >= first else 0.0


def forwards_of_its_blocks(model: nn.Module) -> nn.Module:
    """Beneath the gates, with the branches inside."""
    for blocks in lists_of_blocks(model):
        for block in blocks:
            block.forward = torch.compile(block.forward, backend="aot_eager")
    return model


class Compiled(PreNormLayer):
    forward = torch.compile(PreNormLayer.forward, backend="aot_eager")


class InPart(nn.Module):
    """Compiled between the block and the module that ends its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.end = (nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH),
                                           nn.Linear(WIDTH, WIDTH))  # fmt: skip

    def branch(self, x: Tensor) -> Tensor:
        return self.end(self.inner(self.norm(x)).tanh())

    compiled_branch = torch.compile(branch, backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.compiled_branch(x)


class EagerPart(InPart):
    compiled_branch = InPart.branch


def stack_of(kind: type[nn.Module]) -> Any:
    return settled(lambda: nn.Sequential(*(kind() for _ in range(6))))


INSIDE: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "forwards": lambda: (forwards_of_its_blocks(make("pre-norm")[0]), make("pre-norm")[0]),
    "with norms behind": lambda: (
        forwards_of_its_blocks(make("post-norm")[0]),
        make("post-norm")[0],
    ),
    "of the class": lambda: (stack_of(Compiled), stack_of(PreNormLayer)),
    "a part": lambda: (stack_of(InPart), stack_of(EagerPart)),
}


@pytest.mark.parametrize("options", [{}, {"scale": "train"}, {"unit": "branch"}])
@pytest.mark.parametrize("name", INSIDE)
def test_what_is_compiled_inside_of_a_block_knows_what_was_drawn(
    name: str, options: dict[str, Any]
) -> None:
    x = make("pre-norm")[1] if "forwards" in name or "norms" in name else vectors(4, 5, WIDTH)
    model, eager = INSIDE[name]()
    depth, other = (
        sd.apply_stochastic_depth(each, 0.5, "uniform", example_inputs=x, **options)
        for each in (model, eager)
    )
    names = [block.name for block in depth.blocks]
    for closed in ({}, dict.fromkeys(names[::2], False), dict.fromkeys(names[1:], False)):
        for _ in range(2):  # a factor of inference must not stay
            with depth.fixed(closed), other.fixed(closed):
                assert_same_step(model.train(), eager.train(), x)
                assert torch.equal(model.eval()(x), eager.eval()(x))
    for _ in range(4):
        assert_same_step(model.train(), eager.train(), x)
        assert depth.last_gates == other.last_gates


@pytest.mark.parametrize("scale", ["train", "eval", "none"])
def test_a_branch_that_is_compiled(scale: Any) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = (
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, WIDTH),
                nn.GELU(),
                nn.Linear(WIDTH, WIDTH),
            )
            self.branch: Any = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    model, eager, x = stack_of(Block), stack_of(Block), vectors(4, WIDTH)
    for block in model:
        block.branch = torch.compile(block.branch, backend="aot_eager")
    for each in (model, eager):
        sd.apply_stochastic_depth(each, 0.5, "uniform", example_inputs=x, scale=scale)
    for _ in range(3):
        assert_same_step(model.train(), eager.train(), x)
        assert torch.equal(model.eval()(x), eager.eval()(x))


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
    model, x = settled(InLine), vectors(4, WIDTH)
    with pytest.raises(sd.OptionError, match=r"made of a InLine.*then call depth\.compile\(\)"):
        gated(the_model(model), x)
    eager, depth = gated(model, x, scale="train")
    assert_trains_alike(the_model(model), eager, depth, x)


def test_graphs_beyond_torchs_limit_are_exact() -> None:
    model, x = make("resnet")
    eager, depth = gated(model, x, scale="train")
    result = the_model(its_blocks(model))
    with torch._dynamo.config.patch({LIMIT: 1}):
        for step in range(8):
            x = vectors(4, 3, 6 + step % 3, 6)
            assert_same_step(result.train(), eager.train(), x)
            depth.step()
            with torch.no_grad():
                assert torch.equal(result.eval()(x), eager.eval()(x))


def test_a_training_warns_once_and_comes_to_no_limit() -> None:
    """Twelve blocks, train and eval, with and without gradients: two kinds of block at most."""
    model: Any = settled(lambda: nn.Sequential(*(PreNormLayer() for _ in range(12))))
    x = vectors(2, 5, WIDTH)
    sd.apply_stochastic_depth(model, 0.4, "uniform", example_inputs=x)
    made: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(len(made))
        return graph.forward

    ours: Any = torch.compile(model, backend=backend)
    settings: Any = torch._dynamo.config
    fails = "fail_on_recompile_limit_hit"
    limit = settings.patch({fails: True}) if hasattr(settings, fails) else nullcontext()
    with limit, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", sd.StochasticDepthWarning)
        for step in range(30):
            if step == 10:
                warm = len(made)
            ours.train()(x).sum().backward()
            ours.eval()(x)
            with torch.no_grad():
                ours(x)
    told = [str(each.message) for each in caught if "meets the gates" in str(each.message)]
    assert len(told) == 1
    assert "depth.compile()" in told[0]
    assert len(made) == warm <= 8


def test_a_compiled_depth_in_a_compiled_model() -> None:
    model, x = make("resnet")
    eager, depth = compiled(model, x)
    assert_trains_alike(the_model(model), eager, depth, x)


@pytest.mark.parametrize("training", [True, False])
def test_modules_of_branches_that_are_compiled_go_on_running_as_graphs(training: bool) -> None:
    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=x)
    calls: list[str] = []

    def noting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            return run(*args)

        return call

    for name, layer in model.layers.named_children():
        layer.mlp._compiled_call_impl = noting(f"layers.{name}", layer.mlp._call_impl)
    for _ in range(4):
        calls.clear()
        model.train(training)(x)
        gates = depth.last_gates if training else dict.fromkeys(rates(depth), True)
        assert calls == [name for name in gates if gates[name]]


@pytest.mark.parametrize("leave", ["fold", "remove"])
@pytest.mark.parametrize("name", ["resnet", "pre-norm"])
@pytest.mark.parametrize("way", [its_blocks, the_model, its_blocks_in_place])
def test_what_was_compiled_runs_when_the_gates_are_gone(way: Way, name: str, leave: str) -> None:
    """torch.compile has kept the gated calls of its modules."""
    model, x = make(name)
    eager, depth = gated(model, x, schedule=sd.linear_warmup(3))
    result = way(model)
    for step in range(WARMUP):
        assert_same_step(result.train(), eager.train(), batch(x, step))
    getattr(depth, leave)()
    getattr(sd.get_stochastic_depth(eager), leave)()
    assert_equal(result.eval()(x), eager.eval()(x))
    assert_same_step(result.train(), eager.train(), x)
