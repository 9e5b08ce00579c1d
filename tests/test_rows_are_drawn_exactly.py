"""Promise: in mode "sample" every row of the batch really is dropped, at exactly its rate."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd
from layers import Layers
from networks import WIDTH, Residual, make, settled, vectors
from stochastic_depth.rows import Counts, kept_count

pytestmark = pytest.mark.oldest
DRAWS = 3000


def stack(blocks: int = 6) -> Any:
    return settled(lambda: nn.Sequential(*(Residual() for _ in range(blocks))))


def gate(model: nn.Module, rate: float = 0.4, **options: Any) -> sd.StochasticDepth:
    """The same rate in every block."""
    options = {"example_inputs": torch.randn(2, WIDTH), "mode": "sample", **options}
    return sd.apply_stochastic_depth(model, rate, "uniform", **options)


@given(st.integers(1, 64), st.floats(0, 0.999), st.booleans(), st.sampled_from([0.0, 0.25, 0.5]))
def test_the_number_of_kept_rows_is_right_on_average(
    batch: int, rate: float, lone: bool, fewest: float
) -> None:
    steps = 2000
    counts = Counts(lone, fewest)
    found = [kept_count((i + 0.5) / steps, batch, rate, counts) for i in range(steps)]
    wanted = batch * (1 - rate)
    allowed = [
        n
        for n in range(batch + 1)
        if n in (0, batch) or ((lone or n > 1) and batch - n >= fewest * batch)
    ]
    low, high = max(n for n in allowed if n <= wanted), min(n for n in allowed if n >= wanted)
    assert set(found) <= {low, high}
    # The grid of u misses the place where the two numbers meet by a step at most.
    assert abs(sum(found) / steps - wanted) <= (high - low) / steps


def test_a_fixed_number_of_rows_would_be_biased() -> None:
    """What DINOv2's code asks for at 0.4 of 16 rows, and what it drops."""
    assert 1 - int(16 * (1 - 0.4)) / 16 == 0.4375
    counts = [kept_count((i + 0.5) / 1000, 16, 0.4, Counts(True, 0.0)) for i in range(1000)]
    assert 1 - sum(counts) / 16_000 == pytest.approx(0.4)


@pytest.mark.parametrize("batch", [1, 5])
def test_every_row_is_dropped_at_its_rate(batch: int) -> None:
    model = stack()
    depth = gate(model, 0.4, draw=sd.Draw(seed=4))
    x = torch.randn(batch, WIDTH)
    kept = torch.zeros(len(depth.blocks), batch)
    with torch.no_grad():
        for _ in range(DRAWS):
            model(x)
            for number, gates in enumerate(depth.last_gates.values()):
                kept[number, list(gates)] += 1
    # Five standard deviations; there are 36 frequencies.
    bound = 5 * math.sqrt(0.4 * 0.6 / DRAWS)
    assert float((kept / DRAWS - 0.6).abs().max()) < bound


def test_rows_of_different_blocks_steps_and_seeds_are_independent() -> None:
    model = stack(8)
    depth = gate(model, 0.5, draw=sd.Draw(seed=1))
    other = copy.deepcopy(stack(8))
    other_depth = gate(other, 0.5, draw=sd.Draw(seed=2))
    x = torch.randn(4, WIDTH)
    found = []
    with torch.no_grad():
        for _ in range(DRAWS):
            model(x)
            other(x)
            both = [*depth.last_gates.values(), *other_depth.last_gates.values()]
            found.append([float(0 in gates) for gates in both])
    kept = torch.tensor(found)
    together = torch.cat([kept[1:], kept[:-1]], 1)  # beside those of the step before
    correlation = torch.corrcoef(together.T) - torch.eye(together.shape[1])
    assert float(correlation.abs().max()) < 5 / math.sqrt(DRAWS)


def test_a_block_shares_its_rows_and_branches_draw_their_own() -> None:
    model, x = make("pre-norm")
    x = torch.randn(8, *x.shape[1:])
    depth = gate(model, 0.5, example_inputs=x)
    model.train()(x)
    assert list(depth.last_gates) == [block.name for block in depth.blocks]
    depth.remove()
    depth = gate(model, 0.5, example_inputs=x, unit="branch")
    model(x)
    gates = depth.last_gates
    assert list(gates) == [branch.name for block in depth.blocks for branch in block.branches]
    assert any(gates[f"layers.{n}:0"] != gates[f"layers.{n}:1"] for n in range(6))


def test_only_the_kept_rows_are_computed() -> None:
    model = stack(1)
    with pytest.warns(sd.StochasticDepthWarning, match="1 block"):
        depth = gate(model, 0.5)
    x = torch.randn(8, WIDTH, requires_grad=True)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    with depth.disabled():
        everything = flops()
    assert flops() * 2 == everything
    assert len(depth.last_gates["0"]) == 4


def test_without_a_kept_row_the_branch_is_skipped() -> None:
    model = stack()
    depth = gate(model, 0.5)
    x = torch.randn(1, WIDTH, requires_grad=True)
    seen = set()
    for _ in range(20):
        model.zero_grad()
        model(x).sum().backward()
        for name, rows in depth.last_gates.items():
            seen.add(rows)
            gradients = [p.grad for p in model.get_submodule(name).parameters()]
            assert all((gradient is None) == (rows == ()) for gradient in gradients)
    assert seen == {(), (0,)}


def test_batch_norm_sees_the_kept_rows_alone_and_never_one() -> None:
    model, x = make("resnet")
    x = torch.randn(4, *x.shape[1:])
    depth = gate(model, 0.6, example_inputs=x)
    block = model.stages[0][0]
    counts = set()
    inputs: list[Tensor] = []
    block.conv1.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for _ in range(30):
        before: Any = nn.BatchNorm2d(WIDTH)
        before.load_state_dict(block.bn1.state_dict())
        inputs.clear()
        model.train()(x)
        counts.add(len(depth.last_gates["stages.0.0"]))
        if inputs:
            before(F.conv2d(inputs[0], block.conv1.weight, padding=1))
        assert torch.equal(block.bn1.running_mean, before.running_mean)
        assert block.bn1.num_batches_tracked == before.num_batches_tracked
    assert counts == {0, 2}


def test_resumed_and_copied_networks_draw_the_same_rows() -> None:
    model = stack()
    x = torch.randn(5, WIDTH)
    depth = gate(model, 0.5, draw=sd.Draw(seed=9))
    model(x)
    file = io.BytesIO()
    torch.save(depth.state_dict(), file)
    twin = copy.deepcopy(model)
    file.seek(0)
    other = stack()
    resumed = gate(other, 0.5, draw=sd.Draw(seed=9))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    outputs = [net(x) for net in (model, twin, other)]
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])
    assert depth.last_gates == resumed.last_gates


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_sees_the_rows_of_its_forward(reentrant: bool) -> None:
    plain = stack()
    models = [plain, copy.deepcopy(plain)]
    x = torch.randn(6, WIDTH, requires_grad=True)
    for model in models:
        gate(model, 0.5)
    models[0](x).square().sum().backward()
    y = x
    for block in models[1]:
        y = checkpoint(block, y, use_reentrant=reentrant)
    y.square().sum().backward()
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


class Mixing(nn.Module):
    """A residual block whose rows depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(F.gelu(x - x.mean(0)))


class Masked(nn.Module):
    """A residual block that may be given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.linear(F.gelu(x))
        return x + (y if mask is None else y * mask)


def test_rows_that_depend_on_each_other_are_refused_by_name() -> None:
    model = Layers(Mixing)
    with pytest.raises(sd.RefusedBlockError, match=r'"layers\.0".*rows depend on each other'):
        gate(model)
    assert type(model.layers[0]) is Mixing


def test_weights_that_overflow_are_refused_for_what_they_are() -> None:
    model = Layers(Residual)
    with torch.no_grad():
        model.get_submodule("layers.0.linear").get_parameter("weight").fill_(torch.inf)
    with pytest.raises(sd.RefusedBlockError, match="with these weights it computes inf or NaN"):
        gate(model)


def test_arguments_that_the_example_lacked_are_refused() -> None:
    model = Layers(Masked)
    depth = gate(model)
    x, mask = torch.randn(4, WIDTH), torch.ones(4, 1)
    model(x)
    with pytest.raises(sd.ChangedModelError, match="pass the example that you train with"):
        model(x, mask)
    depth.remove()
    gate(model, example_inputs=(x, mask))
    model(x, mask)


def test_a_mask_may_be_left_out_that_the_example_had() -> None:
    x, mask = vectors(4, WIDTH), torch.ones(4, 1)
    outputs = []
    for example, called in (((x, mask), (x, None)), ((x,), (x,))):
        model = settled(lambda: Layers(Masked))
        gate(model, example_inputs=example)
        outputs.append(model(*called))
    assert torch.equal(*outputs)


def test_a_mask_of_one_row_holds_for_all() -> None:
    model = Layers(Masked)
    depth = gate(model, 0.5, example_inputs=(torch.randn(2, WIDTH), torch.ones(2, 1)))
    twin = copy.deepcopy(model)
    x, mask = torch.randn(8, WIDTH), torch.rand(1, WIDTH)
    assert torch.equal(model(x, mask), twin(x, mask.expand(8, WIDTH)))
    assert any(0 < len(rows) < 8 for rows in depth.last_gates.values())


def test_an_example_that_cannot_be_enlarged_is_refused() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Residual() for _ in range(6))

        def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(mixing @ x)
            return x

    x, mixing = torch.randn(2, 4, WIDTH), torch.randn(4, 4)
    gate(Square(), example_inputs=(x, mixing))
    with pytest.raises(sd.ExampleInputsError, match="another batch size"):
        gate(Square(), example_inputs=(torch.randn(4, 4, WIDTH), mixing))


def test_few_rows_are_dropped_together_and_the_table_says_so() -> None:
    """What is dropped has to pay for moving the rest: half of a batch of images, a quarter else."""
    for name, least in (("resnet", 0.5), ("pre-norm", 0.25)):
        model, x = make(name)
        depth = gate(model, 0.1, example_inputs=x)
        assert f"{least:.0%} of the rows at once, less often" in str(depth)
        model.train()
        numbers = set()
        for _ in range(40):
            model(torch.randn(16, *x.shape[1:]))
            numbers |= {len(rows) for rows in depth.last_gates.values()}
        assert numbers == {16, round(16 * (1 - least))}
        depth.remove()
        assert "at once" not in str(gate(model, 0.6, example_inputs=x))


def test_half_of_a_batch_is_one_of_its_halves() -> None:
    model, x = make("resnet")
    depth = gate(model, 0.5, example_inputs=x)
    model.train()
    found = set()
    for _ in range(20):
        model(torch.randn(8, *x.shape[1:]))
        found |= set(depth.last_gates.values())
    assert found == {tuple(range(4)), tuple(range(4, 8))}
