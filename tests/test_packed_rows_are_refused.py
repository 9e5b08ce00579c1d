"""Promise: in mode "sample" rows that are no examples (packed, ragged) are refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, settled

pytestmark = pytest.mark.oldest


class Packed(nn.Module):
    """Attention within segments of packed tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        segment = torch.bucketize(torch.arange(len(x)), ends, right=True)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        within = (segment[:, None] == segment)[None]
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=within)
        return x + self.out(mixed[0])


class Pointwise(nn.Module):
    """Tokens that do not see each other: still not the rows of one example each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return x + self.out(self.norm(x).tanh())


class Unpadded(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(6))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)[mask]
        for block in self.blocks:
            x = block(x, mask.sum(1).cumsum(0))
        return x


def example(lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.arange(len(lengths) * 5).reshape(-1, 5) % 20
    return ids, torch.arange(5) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [2, 5, 4, 5], [5, 5], [3, 3, 3, 3, 3, 3]])
def test_packed_attention_is_refused(lengths: list[int]) -> None:
    model = settled(lambda: Unpadded(Packed))
    with pytest.raises(sd.StochasticDepthError, match=r'mode="sample"|hold the batch'):
        sd.apply_stochastic_depth(model, 0.5, mode="sample", example_inputs=example(lengths))


@pytest.mark.parametrize("lengths", [[2, 5, 4, 5], [1, 1, 1, 1], [5, 5, 5, 4]])
def test_other_lengths_than_in_the_example_are_refused(lengths: list[int]) -> None:
    """Or, where they cannot be told from whole examples, exact for what is called a row."""
    model: Any = settled(lambda: Unpadded(Pointwise))
    try:
        sd.apply_stochastic_depth(
            model, 0.5, "uniform", mode="sample", example_inputs=example([5, 5, 5, 5])
        )
    except sd.StochasticDepthError as error:
        assert 'mode="batch"' in str(error) or "blocks=" in str(error)  # noqa: PT017
        return
    with pytest.raises(sd.ChangedModelError, match="no packed or ragged sequences"):
        model.train()(*example(lengths))


def test_mode_batch_takes_them() -> None:
    model: Any = settled(lambda: Unpadded(Packed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=example([5, 5, 5, 5]))
    ids, mask = example([2, 5, 4, 5])
    with depth.fixed({block.name: False for block in depth.blocks}):
        assert torch.equal(model.train()(ids, mask), model.embed(ids)[mask])


class InWindows(nn.Module):
    """A block that is given several rows for each example."""

    def __init__(self, *, together: bool) -> None:
        super().__init__()
        self.block, self.together = Pointwise(), together

    def forward(self, x: Tensor) -> Tensor:
        windows = x.flatten(0, 1) if self.together else x.transpose(0, 1).flatten(0, 1)
        out: Tensor = self.block(windows, x)
        return out


@pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning")
@pytest.mark.parametrize("together", [True, False])
def test_the_rows_of_an_example_have_to_lie_side_by_side(together: bool) -> None:
    model: Any = settled(lambda: InWindows(together=together)).train()
    options: dict[str, Any] = {"mode": "sample", "example_inputs": torch.randn(2, 3, WIDTH)}
    if not together:
        with pytest.raises(sd.RefusedBlockError, match="do not lie side by side"):
            sd.apply_stochastic_depth(model, 0.5, **options)
        return
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", scale="none", **options)
    x = torch.randn(8, 3, WIDTH)
    out = model(x).unflatten(0, (8, 3))
    (kept,) = depth.last_gates.values()
    assert isinstance(kept, tuple)
    assert 0 < len(kept) < 8
    assert [bool((out[row] != x[row]).any()) for row in range(8)] == [n in kept for n in range(8)]


class Mixing(Pointwise):
    """Its rows see each other, in training only."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        h = self.norm(x)
        h = h + h.flip(0) if self.training else h
        return x + self.out(h.tanh())


class Normed(Pointwise):
    """A BatchNorm of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = OwnBatchNorm()

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return x + self.out(self.inner(x).tanh())


class OwnBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.batch_norm(x, None, None, training=True)
        return x - self.mean


class RunningMean(nn.Module):
    """Centres by a mean of its own, which each call in training moves."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = x.detach().mean(0)
            if self.how == "in place":
                self.mean.lerp_(mean, 0.2)
            elif self.how == "anew":
                self.mean = 0.8 * self.mean + 0.2 * mean
            else:  # batch renormalisation
                shift, was = mean - self.mean, mean
                self.mean += 0.01 * shift
                return x - was + shift.clamp(-0.01, 0.01)
        return x - self.mean


class Averaging(Pointwise):
    """Its rows see each other always."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return x + self.out((self.norm(x) + x.mean(0)).tanh())


class Stacked(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(20, WIDTH), nn.ModuleList(kind() for _ in range(6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, ids)
        return x


@pytest.mark.parametrize("kind", [Mixing, Normed])
def test_rows_that_meet_in_training_only(kind: type[nn.Module]) -> None:
    model = settled(lambda: Stacked(kind))
    with pytest.raises(
        sd.RefusedBlockError, match="in training it computes something else on some"
    ) as caught:
        sd.apply_stochastic_depth(model, 0.2, mode="sample", example_inputs=torch.arange(6))
    assert caught.value.instead.startswith('pass mode="batch", or ')


@pytest.mark.parametrize("how", ["in place", "anew", "renormalised"])
def test_rows_that_meet_in_a_mean_that_moves(how: str) -> None:
    def maker() -> nn.Module:
        block = Normed()
        block.inner = RunningMean(how)  # type: ignore[assignment]
        return block

    model = settled(lambda: nn.Sequential(*(maker() for _ in range(3))))
    stacked = Stacked(Pointwise)
    stacked.blocks = nn.ModuleList(model)
    before = copy.deepcopy(stacked.state_dict())
    with pytest.raises(sd.RefusedBlockError, match="in training it computes something else"):
        sd.apply_stochastic_depth(stacked, 0.2, mode="sample", example_inputs=torch.arange(6))
    assert all(torch.equal(value, before[name]) for name, value in stacked.state_dict().items())


class Ragged(nn.Module):
    """Examples of unequal lengths, as a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("inside", [False, True])
def test_nested_tensors(inside: bool) -> None:
    class Nesting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Ragged() for _ in range(3)))

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.blocks(torch.nested.nested_tensor_from_jagged(x, lengths=lengths)).values()

    rows = [torch.randn(length, WIDTH) for length in (1, 2, 3)]
    model: Any = Nesting() if inside else nn.Sequential(*(Ragged() for _ in range(3)))
    example: Any = torch.nested.nested_tensor(rows, layout=torch.jagged)
    if inside:
        example = torch.cat(rows), torch.tensor([1, 2, 3])
    with pytest.raises(sd.ExampleInputsError, match="nested tensors, of rows of unequal lengths"):
        sd.apply_stochastic_depth(model, 0.2, mode="sample", example_inputs=example)
    assert len(sd.apply_stochastic_depth(model, 0.2, example_inputs=example).blocks) == 3


@pytest.mark.parametrize("ids", [[0, 0, 0, 0], [3, 3], [1, 2, 3, 4]])
def test_rows_that_are_alike_hide_nothing(ids: list[int]) -> None:
    model = settled(lambda: Stacked(Averaging))
    with pytest.raises(sd.RefusedBlockError, match="its rows depend on each other"):
        sd.apply_stochastic_depth(model, 0.2, mode="sample", example_inputs=torch.tensor(ids))
    fine = settled(lambda: Stacked(Pointwise))
    sd.apply_stochastic_depth(fine, 0.2, mode="sample", example_inputs=torch.tensor(ids))


class Tossing(Pointwise):
    """Leaves its branch out by a coin of its own, now and then."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        y = self.out(self.norm(x).tanh())
        return x + (0.0 * y if self.training and torch.rand(()) < 0.3 else y)


@pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning")
def test_a_coin_of_a_blocks_own_is_not_taken_for_rows_that_meet() -> None:
    for seed in range(10):
        model = settled(lambda: Stacked(Tossing))
        torch.manual_seed(seed)
        options: Any = {"mode": "sample", "example_inputs": torch.arange(6)}
        depth = sd.apply_stochastic_depth(model, 0.2, **options)
        assert str(depth).count("runs on the kept rows") == len(depth.blocks) > 0


class Masked(nn.Module):
    """Attention under a mask that may be of all examples together, or of each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out((q @ k.mT + mask).softmax(-1) @ v)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Masked() for _ in range(6))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


CAUSAL = torch.full((5, 5), -1e9).triu(1)


@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize("watched", [CAUSAL, CAUSAL[None]])
def test_a_mask_for_each_example_where_all_had_one(watched: Tensor, batch: int) -> None:
    model: Any = settled(Attending).train()
    x = torch.randn(8, 5, WIDTH)
    sd.apply_stochastic_depth(model, 0.5, "uniform", mode="sample", example_inputs=(x, watched))
    model(torch.randn(batch, 5, WIDTH), watched)
    says = (
        rf'"blocks\.0" is called with \({batch}, 5, 5\) as "mask".*with the mask for each example'
    )
    with pytest.raises(sd.ChangedModelError, match=says):
        model(torch.randn(batch, 5, WIDTH), CAUSAL.repeat(batch, 1, 1))


def test_a_mask_of_all_examples_where_each_had_one() -> None:
    model: Any = settled(Attending).train()
    x, mask = torch.randn(8, 5, WIDTH), CAUSAL.repeat(8, 1, 1)
    sd.apply_stochastic_depth(model, 0.5, "uniform", mode="sample", example_inputs=(x, mask))
    twin = copy.deepcopy(model)
    torch.testing.assert_close(model(x, CAUSAL[None]), twin(x, mask))
    with pytest.raises(sd.ChangedModelError, match="with the rows of 5 and 8 examples"):
        model(x, CAUSAL)


class HiddenAtFirst(nn.Module):
    """Attention across the examples, which hardly shows as a training begins."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        gains = {"rezero": 0.0, "layer scale": 1e-6}
        self.gain = nn.Parameter(torch.full((WIDTH,), gains.get(how, 1.0)))
        if how == "zero init":
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        q = self.qkv(self.norm(x))
        return x + self.gain * self.out((q @ q.mT).softmax(-1) @ q)


@pytest.mark.parametrize("how", ["shown", "rezero", "layer scale", "zero init"])
def test_rows_that_meet_where_the_branch_is_nothing_yet(how: str) -> None:
    model, x = nn.Sequential(*(HiddenAtFirst(how) for _ in range(6))), torch.randn(8, WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(sd.RefusedBlockError, match="its rows depend on each other"):
        sd.apply_stochastic_depth(model, 0.3, example_inputs=x, mode="sample", scale="none")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Within the examples they may meet.
    depth = sd.apply_stochastic_depth(
        model, 0.3, example_inputs=torch.randn(8, 5, WIDTH), mode="sample", scale="none"
    )
    assert len(depth.blocks) == 6


class PutsRows(nn.Module):
    """Has a module of its branch put values into a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(WIDTH), PutsIntoADict()

    def forward(self, x: Tensor, into: dict[str, Tensor]) -> Tensor:
        return x + self.branch(self.norm(x), into)


class PutsIntoADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, into: dict[str, Tensor]) -> Tensor:
        into[f"value {len(into)}"] = x.tanh()
        return self.out(x.tanh())


class OfPutsRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PutsRows() for _ in range(6))

    def forward(self, x: Tensor) -> Any:
        into: dict[str, Tensor] = {}
        for block in self.blocks:
            x = block(x, into)
        return x, into


def test_a_dict_that_would_hold_some_rows_is_refused() -> None:
    with pytest.raises(sd.RefusedBlockError, match="what it puts into its arguments is lost"):
        sd.apply_stochastic_depth(
            OfPutsRows(), 0.3, example_inputs=torch.randn(8, WIDTH), mode="sample", scale="none"
        )
