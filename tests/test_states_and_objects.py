"""Promise: what a block hands out beside its sum is right where it is dropped, or refused by name:
states stay what they were, objects come back in their form, values in arguments are handed through.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from layers import OBJECTS, InDict, WithObjects

pytestmark = pytest.mark.oldest


def closed(model: nn.Module, *args: Any, **options: Any) -> Any:
    """The output of a model whose blocks are all dropped."""
    depth = sd.apply_stochastic_depth(
        model, 0.1, example_inputs=args, **{"scale": "none", **options}
    )
    with depth.fixed({block.name: False for block in depth.blocks}):
        return model.train()(*args)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.rnn = nn.LayerNorm(8), kind(8, 8, batch_first=True)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.norm(x), state)
        return x + y, state


class Cell(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.cell = nn.LayerNorm(8), kind(8, 8)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = self.cell(self.norm(x[:, 0]), state)
        return x + state[:, None].tanh(), state


class Stack(nn.Module):
    def __init__(self, layer: type[nn.Module], kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(kind) for _ in range(6))

    def forward(self, x: Tensor, states: Any) -> tuple[Tensor, list[Any]]:
        out = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state)
            out.append(state)
        return x, out


def state(kind: type[nn.Module]) -> Any:
    h = torch.randn(1, 4, 8)
    return (h, torch.randn(1, 4, 8)) if kind is nn.LSTM else h


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_state_stays_what_it_was(kind: type[nn.Module]) -> None:
    x, states = torch.randn(4, 5, 8), [state(kind) for _ in range(6)]
    out, after = closed(Stack(Recurrent, kind), x, states)
    assert torch.equal(out, x)
    for own, before in zip(after, states, strict=True):
        for a, b in zip(
            torch.utils._pytree.tree_leaves(own),
            torch.utils._pytree.tree_leaves(before),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_so_does_one_of_a_larger_batch() -> None:
    model = Stack(Recurrent, nn.GRU)
    closed(model, torch.randn(4, 5, 8), [state(nn.GRU) for _ in range(6)])
    depth = sd.get_stochastic_depth(model)
    states = [torch.randn(1, 7, 8) for _ in range(6)]
    with depth.fixed({block.name: False for block in depth.blocks}):
        _, after = model(torch.randn(7, 5, 8), states)
    assert all(torch.equal(a, b) for a, b in zip(after, states, strict=True))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_state_that_none_was_given_for_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(sd.RefusedBlockError, match=r'hands out a state of "layers.0.rnn"'):
        closed(Stack(Recurrent, kind), torch.randn(4, 5, 8), [None] * 6)


class Stateless(nn.Module):
    """Its layers return states, which nobody looks at."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Recurrent(kind) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x, None)
        return x


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_state_that_nobody_reads_is_no_reason(kind: type[nn.Module]) -> None:
    model, x = Stateless(kind), torch.randn(4, 5, 8)
    assert torch.equal(closed(model, x), x)
    depth = sd.get_stochastic_depth(model)
    assert [block.name for block in depth.blocks] == [f"layers.{n}" for n in range(6)]
    with depth.fixed({f"layers.{n}": False for n in (1, 2, 3, 4)}):
        first, last = model.layers[0], model.layers[5]
        assert torch.equal(model(x), last(first(x, None)[0], None)[0])


class Handle:
    """An object that nobody can look into."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def opaque(y: Tensor, hidden: Tensor) -> Any:
    return y, Handle(hidden)


def test_an_object_that_nothing_stands_in_for_is_not_missed_where_no_module_runs() -> None:
    x = torch.randn(4, 8)
    assert torch.equal(closed(nn.Sequential(*(WithObjects(opaque) for _ in range(6))), x), x)


class Normed(WithObjects):
    """Its forward runs where it is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(super().forward(x), (8,))


def test_the_block_that_fails_is_the_one_that_is_named() -> None:
    tensor = OBJECTS["a dataclass beside"]
    forms = [tensor] * 5 + [opaque, tensor]
    model = nn.Sequential(*map(Normed, forms))
    with pytest.raises(sd.RefusedBlockError, match='block "5"') as caught:
        closed(model, torch.randn(4, 8))
    assert "['!5']" in str(caught.value)
    assert 'block "0"' not in str(caught.value)


class Pair(nn.Module):
    """A layer that is given the hidden value and the stream as one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, residual = pair
        residual = hidden + residual
        return self.mixer(self.norm(residual).relu()), residual


def test_a_stream_inside_of_an_argument_is_not_lost() -> None:
    x, other = torch.randn(4, 8), torch.randn(4, 8)
    model = nn.Sequential(*(Pair() for _ in range(6)))
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=((x, other),), scale="none")
    with depth.fixed({block.name: False for block in depth.blocks}):
        _, residual = model.train()((x, other))
    torch.testing.assert_close(residual, x + other)
    model = nn.Sequential(*(InDict() for _ in range(6)))
    out = closed(model, {"x": x, "mask": other})
    assert torch.equal(out["x"], x)
    assert torch.equal(out["mask"], other)
    assert str(sd.get_stochastic_depth(model)).count("skipped whole") == 6


class Expert(nn.Module):
    """Returns its output and a term of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.route, self.linear = nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n = self.norm(x)
        weights = self.route(n).softmax(-1)
        return self.linear(n.relu()) * weights[..., :1], weights.square().mean()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Expert() for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        losses = []
        for layer in self.layers:
            y, loss = layer(x)
            x = x + y
            losses.append(loss)
        return x, 0.01 * torch.stack(losses).mean()


def test_a_dropped_expert_adds_nothing_to_the_loss() -> None:
    x = torch.randn(4, 8)
    out, loss = closed(Experts(), x)
    assert torch.equal(out, x)
    assert float(loss) == 0.0


class OfAPair(nn.Module):
    """Takes the stream, and something else, in one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        x, other = pair
        return x + self.branch(x + other)


class OfPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(3, 8), nn.ModuleList(OfAPair() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        other, x = x.mean(-1, keepdim=True), self.stem(x)
        for block in self.blocks:
            x = block((x, other))
        return x


def test_of_a_pair_the_stream_alone_is_handed_on() -> None:
    model, x = OfPairs(), torch.randn(4, 3)
    sd.apply_stochastic_depth(model, 0.9, "uniform", example_inputs=x, scale="none")
    for _ in range(3):
        assert isinstance(model.train()(x), Tensor)


class Wrapped(nn.Module):
    """A cell and a layer behind it, which computes the branch from the state."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.out = kind(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = self.cell(x, state)
        return self.out(state[0] if isinstance(state, tuple) else state), state


class OfWrapped(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.rec = nn.LayerNorm(8), Wrapped(kind)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.rec(self.norm(x), state)
        return x + y, state


class InLine(Wrapped):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        return x + y, state


def state_of_a_cell(kind: type[nn.Module]) -> Any:
    h = torch.randn(4, 8)
    return (h, torch.randn(4, 8)) if kind is nn.LSTMCell else h


@pytest.mark.parametrize("layer", [OfWrapped, InLine])
@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_a_state_that_the_branch_is_computed_from(
    layer: type[nn.Module], kind: type[nn.Module]
) -> None:
    x, states = torch.randn(4, 8), [state_of_a_cell(kind) for _ in range(6)]
    out, after = closed(Stack(layer, kind), x, states)
    assert torch.equal(out, x)
    mine, its = map(torch.utils._pytree.tree_leaves, (after, states))
    assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))
    with pytest.raises(sd.RefusedBlockError, match='mode="sample"'):
        closed(Stack(layer, kind), x, states, mode="sample")


def test_a_state_that_is_the_branch_itself_is_refused() -> None:
    with pytest.raises(sd.RefusedBlockError, match=r'hands out a state of "layers.0.cell"'):
        closed(Stack(IsItsState, nn.GRUCell), torch.randn(4, 8), [torch.randn(4, 8)] * 6)


class IsItsState(Cell):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = self.cell(self.norm(x), state)
        return x + state, state


class Conditioned(nn.Module):
    """Takes a condition in the form of the state before it."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.rnn = nn.LayerNorm(8), kind(8, 8, batch_first=True)

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.norm(x + pair[0].transpose(0, 1)), pair[1])
        return x + y, state


class IntoTheState(Conditioned):
    """Nobody can tell which of the two the state was."""

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.norm(x), pair[0] + pair[1])
        return x + y, state


class Swapped(nn.Module):
    """Hands out the states of an LSTM in the other order, and back."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.rec = nn.LayerNorm(8), Turned(kind)

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        y, (c, h) = self.rec(self.norm(x), *states)
        return x + y, (h, c)


class Turned(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(8, 8, batch_first=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Any]:
        y, (h, c) = self.rnn(x, (h, c))
        return y, (c, h)


def test_which_of_several_states_of_one_form_it_was() -> None:
    x, states = torch.randn(4, 5, 8), [state(nn.LSTM) for _ in range(6)]
    _, after = closed(Stack(Conditioned, nn.GRU), x, states)
    assert all(torch.equal(mine, its[1]) for mine, its in zip(after, states, strict=True))
    _, after = closed(Stack(Swapped, nn.LSTM), x, states)
    for mine, its in zip(after, states, strict=True):
        assert torch.equal(mine[0], its[0])
        assert torch.equal(mine[1], its[1])
    with pytest.raises(sd.RefusedBlockError, match=r'hands out a state of "layers.0.rnn"'):
        closed(Stack(IntoTheState, nn.GRU), x, states)
