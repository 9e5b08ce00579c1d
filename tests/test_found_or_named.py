"""Promise: branches in forms that people write are found and exact, or left out with a word."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.oldest


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


class Block(nn.Module):
    """An ordinary block; others override how its sum is written.

    `closed` is what it computes without its branch, by hand.
    """

    def __init__(self) -> None:
        super().__init__()
        self.branch = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def closed(self, x: Tensor) -> Tensor:
        return x


class Gain(nn.Module):
    """A connection with a weight for the skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((8,), 0.9))

    def forward(self, branch: Tensor, skip: Tensor) -> Tensor:
        return skip * self.gain + branch


class ByAConnection(Block):
    def __init__(self) -> None:
        super().__init__()
        self.connect = Gain()

    def forward(self, x: Tensor) -> Tensor:
        return self.connect(self.branch(x), x)

    def closed(self, x: Tensor) -> Tensor:
        return x * self.connect.gain


class Shortcut(Block):
    """An operation that is linear stands before a shortcut's own layer."""

    operation: Callable[[Tensor], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.closed(x) + self.branch(x)

    def closed(self, x: Tensor) -> Tensor:
        return self.shortcut(type(self).operation(x))


def shortcut_by(operation: Callable[[Tensor], Tensor]) -> type[Block]:
    return type("Shortcut", (Shortcut,), {"operation": staticmethod(operation)})


def reflected(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1), "reflect")[..., 1:-1]


def replicated(x: Tensor) -> Tensor:
    return F.pad(x, (0, 2), "replicate")[..., :8]


def interpolated(mode: str) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x[:, None], scale_factor=2.0, mode=mode).squeeze(1)[:, ::2]


def there_and_back(x: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x), n=8)


def by_a_constant(x: Tensor) -> Tensor:
    return x * torch.tensor(0.3)


def bilinear(x: Tensor) -> Tensor:
    image = x[:, None, None]
    places = torch.linspace(-1, 1, 8).expand(len(x), 1, 8)
    grid = torch.stack([places, torch.zeros_like(places)], -1)
    return F.grid_sample(image, grid, align_corners=True).reshape(len(x), 8)


class Scattered(Block):
    """A graph network adds what its nodes are sent."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(len(x)).roll(1)
        return x + torch.zeros_like(x).index_add(0, places, self.branch(x))


class ScatteredInPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(len(x))[:, None].expand_as(x)
        return x + x.new_zeros(x.shape).scatter_add_(0, places, self.branch(x))


class Frequencies(Block):
    """The sum is one of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 5, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(x)
        return torch.fft.irfft(z + torch.tanh(self.mix(z)), n=8)

    def closed(self, x: Tensor) -> Tensor:
        return there_and_back(x)


class Kernel(torch.autograd.Function):
    """A kernel that torch sees nothing of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out.numpy()[:] = x.detach().numpy().clip(min=0)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] > 0)


class Negated(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) - x

    def closed(self, x: Tensor) -> Tensor:
        return -x


class ByAKernel(Block):
    def forward(self, x: Tensor) -> Tensor:
        kernel: Callable[[Tensor], Tensor] = Kernel.apply
        return x + self.branch[2](kernel(self.branch[0](x)))


FOUND: dict[str, type[Block]] = {
    "a weight of the connection": ByAConnection,
    "reflected": shortcut_by(reflected),
    "replicated": shortcut_by(replicated),
    "nearest": shortcut_by(interpolated("nearest")),
    "linear": shortcut_by(interpolated("linear")),
    "fft": shortcut_by(there_and_back),
    "a constant": shortcut_by(by_a_constant),
    "grid_sample": shortcut_by(bilinear),
    "index_add": Scattered,
    "scatter_add_": ScatteredInPlace,
    "complex": Frequencies,
    "kernel": ByAKernel,
    "negated": Negated,
}


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("kind", FOUND)
def test_it_is_found_and_exact(kind: str, mode: Any) -> None:
    if mode == "sample" and FOUND[kind] in (Scattered, ScatteredInPlace):
        pytest.skip("its rows are nodes of one graph")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *(FOUND[kind]() for _ in range(3)))
    x = torch.randn(5, 8)
    options: Any = {"example_inputs": x, "mode": mode, "scale": "none"}
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.1, **options)
    assert [block.name for block in depth.blocks] == ["1", "2", "3"]
    with depth.fixed({"2": False}):
        closed: Any = plain[2]
        expected = plain[3](closed.closed(plain[1](plain[0](x))))
        # Other kernels for another number of rows; a transform and back rounds, too.
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    with depth.disabled():
        assert torch.equal(model(x), plain(x))


class Highway(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid()
        return gate * self.branch(x) + (1 - gate) * x


class HighwayByLerp(Highway):
    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.branch(x), self.gate(x).sigmoid())


class Drops(Block):
    """A drop path that is a function."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x)
        return x + (y * x.new_empty(len(x), 1).bernoulli_(0.8) / 0.8 if self.training else y)


class DropsByFloor(Block):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.floor(0.8 + torch.rand(len(x), 1))
        return x + self.branch(x) / 0.8 * mask


WITH_A_WORD = {
    "highway": (Highway, '"2" is left out: its skip connection is multiplied', ["1", "3"]),
    "lerp": (HighwayByLerp, '"2" is left out: its skip connection is multiplied', ["1", "3"]),
    "bernoulli": (Drops, '"2" multiplies a branch by a number that it draws', ["1", "2", "3"]),
    "floor": (DropsByFloor, '"2" multiplies a branch by a number that it', ["1", "2", "3"]),
}


@pytest.mark.parametrize("kind", WITH_A_WORD)
def test_a_word_is_said(kind: str) -> None:
    block, text, names = WITH_A_WORD[kind]
    model = nn.Sequential(nn.Linear(8, 8), Block(), block(), Block())
    with pytest.warns(sd.StochasticDepthWarning, match=text):
        depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=torch.randn(5, 8))
    assert [each.name for each in depth.blocks] == names


class FlowMatching(Block):
    """Multiplies by a time that it draws for each example, and drops nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) * (1 - torch.rand(len(x), 1))


def test_a_number_for_each_example_that_is_no_coin_is_no_drop_path() -> None:
    model = nn.Sequential(*(FlowMatching() for _ in range(6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=torch.randn(5, 8))
    assert len(depth.blocks) == 6


class Towards(Block):
    """Twice the stream is in the sum: once within the branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * (self.branch(x) - x)


@pytest.mark.parametrize("around", [[Block, Towards, Block], [Towards, Towards]])
def test_a_branch_that_takes_from_the_stream_is_refused(around: list[type[Block]]) -> None:
    model = nn.Sequential(*(block() for block in around))
    with pytest.raises(sd.RefusedBlockError, match="is not zero when its modules are dropped"):
        sd.apply_stochastic_depth(model, 0.1, example_inputs=torch.randn(5, 8), scale="none")


class OneQuery(nn.Module):
    """The last of its layers computes for the first token alone, which is added to all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers, start=1):
            x = x + layer(x[:, :1] if number == len(self.layers) else x)
        return x[:, 0]


def test_what_cannot_be_followed_in_a_loop_leaves_the_others() -> None:
    with pytest.warns(sd.StochasticDepthWarning, match="a branch may be left out: add in the mod"):
        blocks = sd.find_residual_blocks(OneQuery(), torch.randn(2, 5, 8))
    assert [block.name for block in blocks] == ["layers.0", "layers.1", "layers.2"]


class Several(nn.Module):
    """A block of a vocoder: residual connections one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.second = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


class SideBySide(nn.Module):
    """Their results are added up, and none of them is a branch beside the others."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 8)
        self.parts = nn.ModuleList(Several() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return sum(part(x) for part in self.parts) / 3


def test_streams_side_by_side_are_no_branches_of_each_other() -> None:
    model = SideBySide()
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=torch.randn(5, 8), scale="none")
    assert [block.name for block in depth.blocks] == ["parts.0", "parts.1", "parts.2"]
    assert [len(block.branches) for block in depth.blocks] == [2, 2, 2]
    x = torch.randn(5, 8)
    with depth.fixed({"parts.1": False}):
        inner = model.enter(x)
        expected = (model.parts[0](inner) + inner + model.parts[2](inner)) / 3
        assert torch.equal(model(x), expected)


class CodeBook(nn.Module):
    """Rounds its input to an entry, and hands the gradient through."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = nn.Embedding(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        entry = self.entries(torch.cdist(x, self.entries.weight).argmin(-1))
        return x + (entry - x).detach()


def test_an_entry_of_a_code_book_is_no_branch() -> None:
    model = nn.Sequential(Block(), CodeBook(), Block())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = sd.find_residual_blocks(model, torch.randn(5, 8))
    assert [block.name for block in blocks] == ["0", "2"]


class Capped(Block):
    """Zero, and below zero, where the cap is: which a single cap above zero would not show."""

    def __init__(self) -> None:
        super().__init__()
        self.cap = nn.Parameter(torch.tensor(-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.minimum(self.branch(x), self.cap)


def test_what_is_zero_for_some_weights_only_is_refused() -> None:
    model = nn.Sequential(Capped(), Capped())
    with pytest.raises(sd.RefusedBlockError, match="is not zero when its modules are dropped"):
        sd.apply_stochastic_depth(model, 0.1, example_inputs=torch.randn(5, 8), scale="none")


class Stacked(Block):
    def __init__(self) -> None:
        super().__init__()
        self.second = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, self.branch(x), self.second(x)], dim=-1).sum(-1)


def test_a_stack_that_is_summed_is_followed_without_a_word() -> None:
    model, x = nn.Sequential(*(Stacked() for _ in range(4))), torch.randn(5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, scale="none")
    assert [len(block.branches) for block in depth.blocks] == [2, 2, 2, 2]
    with depth.fixed({block.name: False for block in depth.blocks}):
        assert torch.equal(model(x), x)


class Frozen(nn.Module):
    """A matrix that is no parameter, as in a network of rounded weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class HalfFrozen(Block):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Frozen(), Frozen()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch(x)
        return x + self.second(self.first(x).tanh())


def test_a_branch_of_weights_that_are_no_parameters_is_named() -> None:
    model = nn.Sequential(Block(), HalfFrozen(), Block())
    with pytest.warns(sd.StochasticDepthWarning, match='block "1" is left out: add in 1'):
        blocks = sd.find_residual_blocks(model, torch.randn(5, 8))
    assert [block.name for block in blocks] == ["0", "2"]


class Scan(nn.Module):
    """A part of a Mamba layer, in which a weight hands the input of the scan on."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.step, self.leave = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.through = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        u = F.silu(self.enter(x))
        step, state, states = self.step(u).sigmoid(), torch.zeros_like(u[:, 0]), []
        for place in range(u.shape[1]):
            state = step[:, place] * state + u[:, place]
            states.append(state.tanh())
        return self.leave(torch.stack(states, 1) + u * self.through)


class Scanned(Block):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(8), Scan())


def test_a_part_of_a_branch_that_cannot_be_gated_leaves_the_block() -> None:
    model, x = nn.Sequential(*(Scanned() for _ in range(4))), torch.randn(2, 5, 8)
    text = r'block "0\.branch\.1" \(and 3 others\) is left out, a part of the branch of another'
    with pytest.warns(sd.StochasticDepthWarning, match=text):
        depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x)
    assert [block.name for block in depth.blocks] == ["0", "1", "2", "3"]
    with depth.fixed({block.name: False for block in depth.blocks}):
        assert torch.equal(model.train()(x), x)
    depth.remove()
    with pytest.raises(sd.RefusedBlockError, match="is not zero when its modules are dropped"):
        sd.apply_stochastic_depth(model, 0.1, example_inputs=x, blocks=["*.branch.*"])


def new(like: Tensor, values: Any) -> Tensor:
    return torch.tensor(values, device=like.device)


CONSTANTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a loss from zero on": lambda m, h: new(h, 0.0) + h.square().mean(),
    "one and a gain": lambda m, h: h * (new(h, 1.0) + m.gain),
    "a small number": lambda m, h: h.std() + new(h, 1e-5),
    "of the output's shape": lambda m, h: m.head(h) + new(h, [[1.0] * 8] * 4),
    "in another form": lambda m, h: m.head(h) + new(h, [1.0] * 8).view(1, 8),
    "two of them": lambda m, h: h + (new(h, 1.0) + new(h, 2.0)),
}


class WithConstant(nn.Module):
    """Adds a constant that it makes anew."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*(Block() for _ in range(6))), nn.Linear(8, 8)
        self.gain, self.how = nn.Parameter(torch.zeros(8)), CONSTANTS[how]

    def forward(self, x: Tensor) -> Any:
        return self.how(self, self.blocks(x))


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("how", CONSTANTS)
def test_a_new_constant_is_no_skip_connection(how: str, *, on_meta: bool) -> None:
    device = "meta" if on_meta else "cpu"
    model, x = WithConstant(how).to(device), torch.randn(4, 8, device=device)
    found = sd.find_residual_blocks(model, x)
    assert [block.name for block in found] == [f"blocks.{number}" for number in range(6)]
