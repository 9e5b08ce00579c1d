"""Promise: hidden states stay complete where blocks are skipped; attention weights where they run.

transformers takes hidden states and attention weights by forward hooks of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from coveragelib.transformers_models import TYPES, example, small

pytestmark = pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning")

KINDS = ["bert", "llama", "gpt2", "gpt_neox", "vit", "swin", "clip_vision_model", "whisper", "bart"]


def collected(model: Any, given: Any) -> dict[str, tuple[Tensor, ...]]:
    output = model(**given, output_hidden_states=True)
    return {
        name: tuple(value)
        for name, value in output.items()
        if isinstance(value, tuple | list) and name.endswith("hidden_states")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_no_hidden_state_is_missing(kind: str) -> None:
    pytest.importorskip("transformers")
    model = small(kind, **TYPES[kind], attn_implementation="eager")
    given = example(model, batch=4)
    plain = collected(model.train(), given)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=given, scale="none")
    names = [block.name for block in depth.blocks]
    for dropped in (names[:1], names[1::2], names):
        with depth.fixed(dict.fromkeys(dropped, False)):
            ours = collected(model, given)
        shapes = {name: [x.shape for x in value] for name, value in plain.items()}
        assert {name: [x.shape for x in value] for name, value in ours.items()} == shapes
    states = [value for name, value in ours.items() if name.endswith("hidden_states")]
    pre_norm = kind in ("llama", "gpt2", "gpt_neox", "vit", "clip_vision_model")
    if pre_norm:  # all dropped: each layer hands on what it was given (behind the last is a norm)
        assert all(torch.equal(value[0], x) for value in states for x in value[:-1])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_skipped_layer_has_no_attention_weights(kind: str) -> None:
    pytest.importorskip("transformers")
    model = small(kind, **TYPES[kind], attn_implementation="eager")
    given = example(model, batch=4)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=given, scale="none")
    with depth.fixed({}):
        layers = len(model.train()(**given, output_attentions=True).attentions)
    with depth.fixed({depth.blocks[1].name: False}):
        assert len(model(**given, output_attentions=True).attentions) == layers - 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "swin"])
def test_no_row_of_them_is_missing_in_mode_sample(kind: str) -> None:
    pytest.importorskip("transformers")
    model = small(kind, **TYPES[kind], attn_implementation="eager")
    given = example(model, batch=4)
    depth = sd.apply_stochastic_depth(
        model, 0.5, "uniform", example_inputs=given, mode="sample", scale="none"
    )
    with depth.fixed({}):
        plain = collected(model.train(), given)
    shapes = {name: [x.shape for x in value] for name, value in plain.items()}
    partly = 0
    for _ in range(3):
        ours = collected(model, given)
        partly += sum(0 < len(kept) < 4 for kept in depth.last_gates.values())
        assert {name: [x.shape for x in value] for name, value in ours.items()} == shapes
    assert partly
    if kind in ("llama", "gpt2", "vit"):
        for number, kept in enumerate(depth.last_gates.values()):
            before, after = ours["hidden_states"][number : number + 2]
            if number < len(depth.last_gates) - 1:  # behind the last is a norm
                for row in range(4):
                    assert torch.equal(before[row], after[row]) is (row not in kept)


def test_a_hook_of_the_users_own_does_not_fire_where_nothing_runs() -> None:
    pytest.importorskip("transformers")
    model = small("llama")
    given = example(model)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=given)
    ran: list[nn.Module] = []
    for name in ("layers.1", "layers.1.mlp"):
        model.get_submodule(name).register_forward_hook(lambda module, *_: ran.append(module))
    with depth.fixed({"layers.1": False}):
        model.train()(**given)
    assert not ran


def test_a_skipped_layer_of_experts_routes_nothing() -> None:
    """Its router gets no gradient, and the auxiliary loss is that of the layers that ran."""
    transformers = pytest.importorskip("transformers")
    small_one: Any = small("mixtral")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(small_one.config)
    given = {"input_ids": torch.randint(3, 90, (2, 9)), "labels": torch.randint(3, 90, (2, 9))}
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=given, scale="none")
    model.config.output_router_logits = True  # the watch would see the loss read every router
    with depth.fixed({"model.layers.0": False, "model.layers.2": False}):
        output = model.train()(**given)
    assert len(output.router_logits) == 2
    assert output.aux_loss > 0
    output.loss.backward()
    routers = [layer.mlp.gate.weight.grad is None for layer in model.model.layers]
    assert routers == [True, False, True, False]
    model.config.output_router_logits = True
    with pytest.raises(sd.RefusedBlockError, match="computes with a value made inside of it"):
        sd.apply_stochastic_depth(depth.remove(), 0.5, example_inputs=given)


class Scores(nn.Module):
    """Hands its attention out, which is computed in line in the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.o = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.q(self.norm(x)).softmax(-1)
        return x + self.o(scores), scores


class Experts(nn.Module):
    """A layer that returns a loss for its router beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.route = nn.LayerNorm(4), Router()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        gates, loss = self.route(h)
        return x + sum(gates[:, n, None] * e(h) for n, e in enumerate(self.experts)), loss


class InLine(Experts):
    """The layer itself computes the loss."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        gates, _ = self.route(h)
        loss = gates.mean(0).square().sum()
        return x + sum(gates[:, n, None] * e(h) for n, e in enumerate(self.experts)), loss


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Linear(4, 2)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.weigh(h).softmax(-1)
        return gates, gates.mean(0).square().sum()


class OfExperts(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        losses = []
        for layer in self.layers:
            x, loss = layer(x)
            losses.append(loss)
        return x, torch.stack(losses).sum()


def test_the_loss_of_experts_that_a_module_returns_is_that_of_the_layers_that_ran() -> None:
    model: Any = OfExperts(Experts)
    x = torch.randn(5, 4)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, scale="none")
    _, of_two = OfExperts.forward(_only(model, 2), x)
    with depth.fixed({f"layers.{n}": False for n in range(2, 6)}):
        out, loss = model.train()(x)
    torch.testing.assert_close(loss, of_two)
    (out.sum() + loss).backward()
    routers = [layer.route.weigh.weight.grad is not None for layer in model.layers]
    assert routers == [True, True, False, False, False, False]


def _only(model: OfExperts, layers: int) -> Any:
    twin = copy.deepcopy(model)
    sd.get_stochastic_depth(twin).remove()
    twin.layers = twin.layers[:layers]
    return twin


def test_the_loss_of_experts_that_is_computed_in_line_is_refused_with_what_works() -> None:
    with pytest.raises(sd.RefusedBlockError, match="returns as one number works"):
        sd.apply_stochastic_depth(OfExperts(InLine), 0.1, example_inputs=torch.randn(5, 4))


class ReadsScores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Scores() for _ in range(6)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, scores = layer(x)
        return self.head(x + scores)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_what_others_compute_with_is_refused(mode: Any) -> None:
    with pytest.raises(sd.RefusedBlockError, match=r"layers.5.*computes with a value made inside"):
        sd.apply_stochastic_depth(
            ReadsScores(), 0.5, example_inputs=torch.randn(4, 4), scale="none", mode=mode
        )


@dataclass
class Output:
    value: Tensor
    scores: Tensor
    note: str = "as it was"


class Scoring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y, y.softmax(-1)


class Structured(nn.Module):
    """A block that hands out more than its value, in this structure."""

    def __init__(self, structure: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.scoring, self.structure = nn.LayerNorm(4), Scoring(), structure

    def forward(self, x: Tensor) -> Any:
        y, scores = self.scoring(self.norm(x))
        return self.structure(x + y, scores)


class Chain(nn.Module):
    def __init__(
        self, structure: Callable[[Tensor, Tensor], Any], parts: Callable[[Any], tuple[Any, Any]]
    ) -> None:
        super().__init__()
        self.blocks, self.parts = nn.ModuleList(Structured(structure) for _ in range(6)), parts

    def forward(self, x: Tensor) -> tuple[Tensor, list[Any], list[Any]]:
        scores, outputs = [], []
        for block in self.blocks:
            outputs.append(block(x))
            x, own = self.parts(outputs[-1])
            scores.append(own)
        return x, scores, outputs


STRUCTURES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "tuple": (lambda x, scores: (x, (scores, None)), lambda out: (out[0], out[1][0])),
    "dict": (
        lambda x, scores: {"value": x, "scores": scores},
        lambda out: (out["value"], out["scores"]),
    ),
    "dataclass": (Output, lambda out: (out.value, out.scores)),
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_outputs_keep_their_structure(name: str, mode: Any) -> None:
    torch.manual_seed(0)
    model, x = Chain(*STRUCTURES[name]), torch.randn(4, 4)
    plain = [type(output) for output in model(x)[2]]
    depth = sd.apply_stochastic_depth(
        model, 0.5, "uniform", example_inputs=x, mode=mode, scale="none"
    )
    with depth.fixed({"blocks.1": False}):
        value, scores, outputs = model.train()(x)
    assert [type(output) for output in outputs] == plain
    assert [own.shape for own in scores] == [(4, 4)] * 6
    assert [bool(own.any()) for own in scores] == [True, False, True, True, True, True]
    assert torch.equal(STRUCTURES[name][1](outputs[0])[0], STRUCTURES[name][1](outputs[1])[0])
    _, scores, outputs = model(x)
    assert [type(output) for output in outputs] == plain
    for own, kept in zip(scores, depth.last_gates.values(), strict=True):
        rows = set(kept) if mode == "sample" else set(range(4)) if kept else set()
        assert {row for row in range(4) if own[row].any()} == rows
    assert value.shape == x.shape


class Weighted(nn.Module):
    """Attention that returns its weights, too, with dropout on them, as BERT's did."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qk, self.v = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.qk(x).chunk(2, -1)
        weights = self.dropout((q @ k.mT).softmax(-1))
        return weights @ self.v(x), weights


class Weighing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.out = nn.LayerNorm(8), Weighted(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attended, weights = self.attention(self.norm(x))
        return x + self.out(attended), weights


class AllWeights(nn.Module):
    """Returns the weights of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Weighing() for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = []
        for layer in self.layers:
            x, weights = layer(x)
            found.append(weights)
        return (x, *found)


def test_weights_that_a_module_has_used_itself_are_put_back_in_mode_sample() -> None:
    torch.manual_seed(0)
    model, x = AllWeights(), torch.randn(6, 5, 8)
    plain = copy.deepcopy(model).eval()
    depth = sd.apply_stochastic_depth(
        model, 0.5, "uniform", example_inputs=x, mode="sample", scale="none"
    )
    for layer in model.layers:
        layer.get_submodule("attention.dropout").p = 0.0  # type: ignore[assignment]
    output, *weights = model.train()(x)
    expected = x
    for layer, found, kept in zip(plain.layers, weights, depth.last_gates.values(), strict=True):
        assert not isinstance(kept, bool)
        ran, its_weights = layer(expected)
        mask = torch.zeros(6, 1, 1)
        mask[list(kept)] = 1.0
        torch.testing.assert_close(found, mask * its_weights)
        expected = torch.where(mask > 0, ran, expected)
    torch.testing.assert_close(output, expected)


class Numbers(nn.Module):
    """Hands a number out beside its sum."""

    def __init__(self, number: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.number = number

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return x + self.branch(x), self.number(x)


class OfNumbers(nn.Module):
    def __init__(self, number: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Numbers(number) for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        numbers = []
        for block in self.blocks:
            x, number = block(x)
            numbers.append(number)
        return x, numbers


@pytest.mark.parametrize(
    "number",
    [
        lambda x: x.shape[1],
        lambda x: tuple(x.shape[1:]),
        lambda x: bool(x.abs().max() > 10),
        lambda x: {"largest": x.max().item()},
    ],
    ids=["length", "size", "flag", "value"],
)
def test_a_number_beside_the_sum_is_that_of_this_call(number: Callable[[Tensor], Any]) -> None:
    model = OfNumbers(number)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=torch.randn(2, 5, 4), scale="none")
    x = 100 * torch.randn(2, 7, 4)
    with depth.fixed({block.name: False for block in depth.blocks}):
        output, numbers = model(x)
    assert torch.equal(output, x)
    assert numbers == [number(x)] * 6


def test_a_number_of_rows_is_that_of_all_rows_in_mode_sample() -> None:
    model, x = OfNumbers(len), torch.randn(4, 4)
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=x, mode="sample")
    for _ in range(3):
        _, numbers = model.train()(x)
        assert numbers == [4] * 6
    assert any(len(rows) < 4 for rows in depth.last_gates.values())


class WithALoss(nn.Module):
    """Its branch hands a number out that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(4), Balancing()

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        y, loss = self.router(x)
        return self.norm(x + y), loss


class Balancing(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, float]:  # type: ignore[override]
        y = super().forward(x).tanh()
        return y, y.square().mean().item()


class OfLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(WithALoss() for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        total = 0.0
        for block in self.blocks:
            x, loss = block(x)
            total += loss
        return x, total


class Constant(Balancing):
    """Its number is always the same."""

    def forward(self, x: Tensor) -> tuple[Tensor, float]:  # type: ignore[override]
        return nn.Linear.forward(self, x).tanh(), 0.5


def test_a_constant_of_a_branch_is_handed_out() -> None:
    model: Any = OfLosses()
    for block in model.blocks:
        block.router = Constant()
    x = torch.randn(4, 4)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, scale="none")
    with depth.fixed({block.name: False for block in depth.blocks}):
        assert model(x)[1] == 3.0


def test_a_number_that_a_branch_computes_is_not_repeated() -> None:
    with pytest.raises(sd.RefusedBlockError, match="hands out a number that it computes"):
        sd.apply_stochastic_depth(OfLosses(), 0.1, example_inputs=torch.randn(4, 4), scale="none")
