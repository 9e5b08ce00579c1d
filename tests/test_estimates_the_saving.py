"""Promise: before any training, `estimate_saving` says what each block costs and what is saved.

The reference twin calls the whole model with the block dropped, and counts.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import stochastic_depth as sd
from imagelib.cifar_resnet import CifarResNet
from interleaved import RESULTS
from networks import NETWORKS, images, make, nested, residuals, vectors
from stochastic_depth.measuring import count_flops

pytestmark = pytest.mark.filterwarnings("ignore:.*(shallow networks|dropout is active)")

Gates = Mapping[str, bool]


def flops(model: nn.Module, x: Any, depth: sd.StochasticDepth, gates: Gates) -> float:
    """Of a forward and backward of the whole model."""

    def step() -> None:
        out = model(**x) if isinstance(x, dict) else model(x)
        leaves = [n for n in tree_leaves(out) if isinstance(n, Tensor) and n.requires_grad]
        torch.autograd.backward(leaves, [torch.ones_like(leaf) for leaf in leaves])

    with depth.fixed(gates):
        return count_flops(step)


@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("name", [*NETWORKS])
def test_each_block_costs_what_the_step_takes_less_without_it(name: str, unit: Any) -> None:
    model, x = make(name)
    found = sd.estimate_saving(model, 0.3, "uniform", example_inputs=x, unit=unit)
    depth = sd.apply_stochastic_depth(model, 0.3, "uniform", example_inputs=x, unit=unit)
    model.train()
    whole = flops(model, x, depth, {})
    assert found.step_flops == whole
    for block in found.blocks:
        names = [block.name]
        if unit == "branch":  # each branch by itself: a norm of both is in neither
            gated = next(b for b in depth.blocks if b.name == block.name)
            names = [branch.name for branch in gated.branches]
        assert block.flops == sum(whole - flops(model, x, depth, {n: False}) for n in names)


def test_the_saving_is_what_the_rates_drop_on_average() -> None:
    model, x = make("resnet")
    rates = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5][: len(sd.find_residual_blocks(model, x))]
    found = sd.estimate_saving(model, rates, example_inputs=x)
    assert [block.drop_rate for block in found.blocks] == rates
    saved = [r * block.flops for r, block in zip(rates, found.blocks, strict=True)]
    assert [block.flops_saved for block in found.blocks] == pytest.approx(saved)
    assert found.flops == pytest.approx(sum(saved) / found.step_flops)


def test_a_block_inside_of_a_dropped_one_saves_nothing_more() -> None:
    """All draws of blocks, some in others, by hand."""
    model, x = nested(2), vectors(2, 3)
    found = sd.estimate_saving(model, 0.5, "uniform", example_inputs=x)
    depth = sd.apply_stochastic_depth(copy.deepcopy(model), 0.5, "uniform", example_inputs=x)
    names = [block.name for block in depth.blocks]
    mean = 0.0
    for draw in range(2 ** len(names)):
        gates = {name: bool(draw >> number & 1) for number, name in enumerate(names)}
        mean += flops(depth.model.train(), x, depth, gates) / 2 ** len(names)
    assert found.flops == pytest.approx(1 - mean / found.step_flops)


def bert() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    return transformers.BertModel(config), {"input_ids": torch.randint(0, 50, (2, 6))}


def llama() -> tuple[nn.Module, Any]:
    """With a cache, which each of its layers writes into."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (2, 6))}


@pytest.mark.parametrize("build", [bert, llama])
def test_models_of_transformers(build: Callable[[], tuple[nn.Module, Any]]) -> None:
    model, x = build()
    found = sd.estimate_saving(model, 0.2, example_inputs=x)
    depth = sd.apply_stochastic_depth(model.train(), 0.2, example_inputs=x)
    whole = flops(model, x, depth, {})
    for block in found.blocks:
        assert block.flops == whole - flops(model, x, depth, {block.name: False}) > 0


@pytest.mark.parametrize("build", [bert, llama])
def test_a_model_without_values_costs_the_same(
    build: Callable[[], tuple[nn.Module, Any]],
) -> None:
    with torch.random.fork_rng():
        real, x = build()
    with torch.device("meta"):
        model, _ = build()
    on_meta = {name: value.to("meta") for name, value in x.items()}
    there = sd.estimate_saving(model, 0.2, example_inputs=on_meta)
    here = sd.estimate_saving(real, 0.2, example_inputs=x)
    assert (there.step_flops, there.blocks) == (here.step_flops, here.blocks)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(sd.OptionError, match="on the meta device"):
        sd.estimate_saving(model, 0.2, example_inputs=on_meta, timed=True)


@pytest.mark.parametrize("timed", [False, True])
def test_nothing_is_changed(timed: bool) -> None:
    model, x = make("resnet")
    model.eval()
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = [parameter.grad for parameter in model.parameters()]
    classes = [type(module) for module in model.modules()]
    random = torch.get_rng_state()
    sd.estimate_saving(model, 0.2, example_inputs=x, timed=timed)
    sd.drop_rate_for(model, 0.1, example_inputs=x, timed=timed)
    assert torch.equal(random, torch.get_rng_state())
    assert [type(module) for module in model.modules()] == classes
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


def test_frozen_blocks_cost_what_their_forward_does() -> None:
    model, x = residuals(4), vectors(2, 8)
    for parameter in model[:2].parameters():
        parameter.requires_grad_(False)
    found = [block.flops for block in sd.estimate_saving(model, 0.2, example_inputs=x).blocks]
    forward = 2 * 2 * 8 * 8
    assert found == [forward, forward, 3 * forward, 3 * forward]


def test_it_prints_as_a_table_that_ends_in_a_sentence() -> None:
    model, x = make("resnet")
    found = sd.estimate_saving(model, 0.3, example_inputs=x, timed=True)
    head, titles, *rows, last = str(found).splitlines()
    assert "ResNet" in head
    assert "GFLOPs, forward and backward" in head
    assert titles.split()[:3] == ["block", "class", "drop"]
    assert [row.split()[0] for row in rows] == [block.name for block in found.blocks]
    assert found.time is not None
    assert last == (
        f"It saves {found.flops:.0%} of the FLOPs, {found.time:.0%} of a step's time here; nothing "
        "of the optimizer's and the loader's."
    )
    assert len({row.index("  ") for row in rows}) > 0


def test_time_is_that_of_the_blocks() -> None:
    """Of equal blocks each takes as long, and all of them most of the step."""
    model = nn.Sequential(*(Wide() for _ in range(6)))
    found = sd.estimate_saving(model, 0.5, "uniform", example_inputs=vectors(64, 256), timed=True)
    assert found.time is not None
    assert found.step_seconds is not None
    seconds = [block.seconds or 0.0 for block in found.blocks]
    # Half of what is nearly all; another program on this machine may take some of it.
    assert 0.3 < found.time < 0.7
    assert 0.6 * found.step_seconds < sum(seconds) < 1.4 * found.step_seconds


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@pytest.mark.parametrize("distribution", [None, "uniform", "linear_from_zero"])
@pytest.mark.parametrize("name", ["resnet", "post-norm", "nested"])
def test_the_rate_that_saves_so_much(name: str, distribution: Any) -> None:
    model, x = make(name)
    rate = sd.drop_rate_for(model, 0.2, distribution, example_inputs=x)
    found = sd.estimate_saving(model, rate, distribution, example_inputs=x)
    assert found.flops == pytest.approx(0.2, abs=1e-6)


def test_what_cannot_be_saved_is_said() -> None:
    model, x = make("resnet")
    most = sd.estimate_saving(model, 1 - 1e-6, example_inputs=x).flops
    with pytest.raises(sd.OptionError, match=f"{most:.1%} of a step"):
        sd.drop_rate_for(model, 0.95, example_inputs=x)
    for wrong in (-0.1, 1.0, "0.2", True):
        with pytest.raises(sd.OptionError, match="saving is"):
            sd.drop_rate_for(model, wrong, example_inputs=x)  # type: ignore[arg-type]


def test_without_an_example_it_is_the_error_of_apply() -> None:
    messages = []
    for call in (
        lambda: sd.apply_stochastic_depth(residuals(), 0.2),
        lambda: sd.estimate_saving(residuals(), 0.2),
        lambda: sd.drop_rate_for(residuals(), 0.2),
    ):
        with pytest.raises(sd.ExampleInputsError) as caught:
            call()
        messages.append(str(caught.value))
    assert len(set(messages)) == 1


def test_options_are_those_of_apply() -> None:
    model, x = make("resnet")
    names = [block.name for block in sd.find_residual_blocks(model, x)]
    some = sd.estimate_saving(model, {names[1]: 0.2}, example_inputs=x, blocks=names[:2])
    assert [block.name for block in some.blocks] == names[:2]
    assert [block.drop_rate for block in some.blocks] == [0, 0.2]
    with pytest.raises(sd.OptionError, match="mode="):
        sd.estimate_saving(model, 0.5, example_inputs=x, mode="row")  # type: ignore[arg-type]
    with pytest.raises(sd.OptionError, match="drop_rate"):
        sd.estimate_saving(model, 1.5, example_inputs=x)
    in_rows = sd.estimate_saving(model, 0.5, example_inputs=x, mode="sample")
    assert in_rows.flops == sd.estimate_saving(model, 0.5, example_inputs=x).flops


def test_a_deep_network_takes_a_moment() -> None:
    """Each block is called by itself: what it takes grows with the depth, not with its square."""
    found = sd.estimate_saving(CifarResNet(110), 0.5, example_inputs=images(2))
    assert 0.25 < found.flops < 0.3


def test_within_three_points_of_what_a_training_saves() -> None:
    """As measured, in a committed result file."""
    file = RESULTS / "estimate.json"
    if not file.exists():
        pytest.skip("benchmarks/results/estimate.json is not there yet")
    for model in json.loads(file.read_text())["results"]["models"].values():
        assert abs(model["estimated_time"] - model["saved_time"]["value"]) <= 0.03


class Shared(nn.Module):
    """Residuals whose branches are methods of the one module that holds all layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.residuals = nn.ModuleList(sd.Residual() for _ in range(layers))

    def branch(self, x: Tensor, number: int) -> Tensor:
        out: Tensor = self.layers[number](x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        for number, residual in enumerate(self.residuals):
            x = residual(x, self.branch, number)
        return x


def test_methods_are_not_copied_with_their_modules() -> None:
    """Which would copy the model for each call, and all calls noted before."""
    found = sd.estimate_saving(Shared(40), 0.5, "uniform", example_inputs=vectors(2, 8))
    assert {block.flops for block in found.blocks[1:]} == {3 * 2 * 2 * 8 * 8}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.residual, self.linear = sd.Residual(), nn.Linear(8, 8)

    def branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.residual(x, self.branch)
        return out


class Outer(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Inner(), Inner())

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(self.inner(x))


def test_residuals_inside_of_residuals() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), Outer(), Outer()), vectors(2, 8)
    found = sd.estimate_saving(model, 0.9, "uniform", example_inputs=x)
    depth = sd.apply_stochastic_depth(copy.deepcopy(model), 0.9, "uniform", example_inputs=x)
    names = [block.name for block in depth.blocks]
    mean = 0.0
    for draw in range(2 ** len(names)):
        gates = {name: bool(draw >> number & 1) for number, name in enumerate(names)}
        chance = 1.0
        for is_open in gates.values():
            chance *= 0.1 if is_open else 0.9
        mean += chance * flops(depth.model.train(), x, depth, gates)
    assert found.flops == pytest.approx(1 - mean / found.step_flops)


def test_the_graph_of_the_users_example_is_left_alone() -> None:
    encoder = nn.Linear(8, 8)
    example = encoder(vectors(2, 8))
    for timed in (False, True):
        found = sd.estimate_saving(residuals(6), 0.2, example_inputs=example, timed=timed)
    assert encoder.weight.grad is None
    alone = sd.estimate_saving(residuals(6), 0.2, example_inputs=example.detach())
    assert found.flops == pytest.approx(alone.flops, rel=0.1)  # with its input's gradient
    example.sum().backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_counts_the_backward_whatever_is_under_way(context: Any) -> None:
    model, x = residuals(6), vectors(2, 8)
    expected = sd.estimate_saving(model, 0.2, example_inputs=x)
    with context():
        found = sd.estimate_saving(model, 0.2, example_inputs=x)
    assert (found.step_flops, found.blocks) == (expected.step_flops, expected.blocks)


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = residuals(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).argmax(-1)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x)


class Remembers(Chooses):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.body(x)
        return self.last


def test_what_cannot_be_estimated_is_said() -> None:
    x = vectors(2, 8)
    with pytest.raises(sd.ExampleInputsError, match="Chooses returns nothing that has a gradient"):
        sd.estimate_saving(Chooses(), 0.2, example_inputs=x)
    norms = nn.Sequential(*(Norms() for _ in range(6)))
    with pytest.raises(sd.OptionError, match="torch counts no FLOPs in the blocks of Sequential"):
        sd.estimate_saving(norms, 0.2, example_inputs=x)
    found = sd.estimate_saving(norms, 0.2, example_inputs=x, timed=True)
    assert (found.flops, found.time is None) == (0.0, False)
    model = Remembers()
    model(x)
    with pytest.raises(sd.OptionError, match="Remembers cannot be copied"):
        sd.estimate_saving(model, 0.2, example_inputs=x)


def test_a_batch_of_one_image() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm = make("resnet")[0], nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(self.body(x))
            return out

    assert sd.estimate_saving(Scores(), 0.2, example_inputs=images(1)).flops > 0


def test_gates_that_are_there_already_do_not_count() -> None:
    model, x = residuals(8), vectors(2, 8)
    plain = sd.estimate_saving(model, 0.5, "uniform", example_inputs=x)
    half = [str(number) for number in range(4)]
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=x, blocks=half)
    found = sd.estimate_saving(model, 0.5, "uniform", example_inputs=x)
    assert (found.step_flops, found.blocks) == (plain.step_flops, plain.blocks)
    assert len(depth.blocks) == 4


def test_distributions_of_the_users() -> None:
    model, x = residuals(8), vectors(2, 8)

    def up_to_twice(count: int, rate: float) -> list[float]:
        return [2 * rate * number / count for number in range(count)]

    rate = sd.drop_rate_for(model, 0.1, up_to_twice, example_inputs=x)
    found = sd.estimate_saving(model, rate, up_to_twice, example_inputs=x)
    assert found.flops == pytest.approx(0.1, abs=1e-6)
    with pytest.raises(sd.OptionError, match="of a step"):  # its last rate would be above 1
        sd.drop_rate_for(model, 0.9, up_to_twice, example_inputs=x)
    assert sd.drop_rate_for(model, 0.1, lambda n, rate: [0.2] * n, example_inputs=x) == 0.0
    assert sd.drop_rate_for(model, 0.0, example_inputs=x) == 0.0


class KeepsAState(nn.Module):
    """Goes on from the state of its last call, which its model sets to None."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 8), nn.Linear(8, 8)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        before = torch.zeros_like(x) if self.state is None else self.state
        self.state = (self.enter(x) + 0.5 * before).tanh()
        y: Tensor = self.leave(self.state)
        return y


class OfStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(KeepsAState() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            branch.state = None  # type: ignore[assignment]
        for branch in self.branches:
            x = x + branch(x)
        return x


@pytest.mark.parametrize("timed", [False, True])
def test_a_state_that_a_block_keeps(timed: bool) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), OfStates()), vectors(4, 8)
    with pytest.warns(sd.StochasticDepthWarning, match="of the last call of its module"):
        found = sd.estimate_saving(model, 0.3, "uniform", example_inputs=x, timed=timed)
    assert all(block.flops == found.blocks[0].flops > 0 for block in found.blocks)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("no way back")


class OneWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = NoBackward.apply(self.branch(x))
        return x + y


def test_a_backward_that_fails_is_said() -> None:
    model, x = nn.Sequential(*(OneWay() for _ in range(6))), vectors(4, 8)
    with pytest.raises(sd.ExampleInputsError, match=r"cannot be measured: .*no way back"):
        sd.estimate_saving(model, 0.3, example_inputs=x)
