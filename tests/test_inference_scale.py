"""Promise: inference multiplies each branch by the survival probability of that moment.

The references are hooks on what ends each branch, and the twins of `twins.py`. What they compute is
compared bit by bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import stochastic_depth as sd
from comparing import every_small_one, run, with_factors
from networks import (
    Bypass,
    DenseBypass,
    InLineBypass,
    TwoOutputs,
    assert_same,
    batch,
    make,
    residuals,
    settled,
    vectors,
)
from specimen import Specimen
from twins import TWINS, Factor, post_norm, pre_norm, resnet

pytestmark = pytest.mark.oldest


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """What stands in for a dropped module must not come from memory that nobody wrote to."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


RATE = 0.2
every_network = pytest.mark.parametrize("name", TWINS)
every_unit = pytest.mark.parametrize("unit", ["block", "branch"])


def survival(depth: sd.StochasticDepth) -> Factor:
    """`1 - p` of each branch as the handle shows it."""
    table = {
        branch.name: branch.survival_probability
        for block in depth.blocks
        for branch in block.branches
    }
    return table.__getitem__


def expected_survival(depth: sd.StochasticDepth, share: float = 1.0) -> Factor:
    """`1 - l / L * p * share` of each branch (Huang et al. 2016, equation 4), from names alone."""
    names = [block.name for block in depth.blocks]

    def factor(branch: str) -> float:
        position = names.index(branch.partition(":")[0]) + 1
        return 1.0 - position / len(names) * RATE * share

    return factor


def gated(name: str, **options: Any) -> tuple[Any, Any, Tensor, sd.StochasticDepth]:
    """A plain network, the same one with stochastic depth, and what to call them with."""
    plain, x = make(name)
    model = copy.deepcopy(plain)
    options = {"drop_rate": RATE, **options}
    return plain, model, x, sd.apply_stochastic_depth(model, example_inputs=x, **options)


# Every scale, at every kind of branch.


@pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning")
@pytest.mark.parametrize("scale", ["eval", "train"])
@every_small_one
def test_every_model_is_scaled(specimen: Specimen, scale: Any) -> None:
    """Outputs and gradients are those of hooks that multiply what ends each branch."""
    plain, example = specimen.model(), specimen.example_inputs()
    unit: Any
    for unit in specimen.units:
        model = copy.deepcopy(plain)
        depth = sd.apply_stochastic_depth(
            model, 0.5, example_inputs=example, unit=unit, scale=scale, blocks=specimen.gated_blocks
        )
        half = [block.name for block in depth.blocks[1::2]]
        for training, dropped in ((False, []), (False, half), (True, half)):
            by = {
                branch.name: 0.0
                if block.name in dropped
                else factor_of(branch.survival_probability, scale, training)
                for block in depth.blocks
                for branch in block.branches
            }
            reference = with_factors(plain, specimen, by).train(training)
            with depth.fixed(dict.fromkeys(dropped, False)):
                output = run(model.train(training), example)
            expected = run(reference, example)
            assert_close(output, expected, specimen.rounding)
        if output.requires_grad:
            model.zero_grad()
            output.square().mean().backward()
            expected.square().mean().backward()
        for (name, mine), other in zip(
            model.named_parameters(), reference.parameters(), strict=True
        ):
            zeros = torch.zeros_like(mine)
            ours, theirs = (p.grad if p.grad is not None else zeros for p in (mine, other))
            assert_close(ours, theirs, specimen.rounding, name)


def factor_of(survival: float, scale: str, training: bool) -> float:
    """Huang et al. 2016, equation 5; or as timm does."""
    if scale == "train" and training:
        return 1 / survival
    return survival if scale == "eval" and not training else 1.0


def assert_close(mine: Tensor, other: Tensor, rounding: float, name: str = "") -> None:
    mine, other = mine.detach(), other.detach()
    assert float((mine - other).abs().max()) <= rounding * float(other.abs().max()), name


@every_unit
@every_network
def test_eval_multiplies_each_branch_by_its_survival_probability(name: str, unit: str) -> None:
    plain, model, x, depth = gated(name, unit=unit)
    expected = TWINS[name](plain.eval(), x, expected_survival(depth))
    # The rates l / L * p may round differently than they do in `linear`: a last bit in a factor,
    # so some 1e-7 in the output. The next line, with the rates as they are, is exact.
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), TWINS[name](plain, x, survival(depth)))
    unscaled = TWINS[name](plain, x, lambda branch: 1.0)
    assert torch.equal(plain(x), unscaled)
    assert not torch.allclose(model(x), unscaled, rtol=1e-3, atol=1e-3)


@every_unit
@pytest.mark.parametrize("scale", ["eval", "train", "none"])
@every_network
def test_training_as_it_is_drawn(name: str, unit: str, scale: str) -> None:
    """Open branches are multiplied, or not, and dropped ones left out."""
    plain, model, x, depth = gated(
        name, drop_rate=0.19, drop_distribution="uniform", unit=unit, scale=scale
    )
    survives = survival(depth)
    patterns = set()
    for number in range(4):
        y = batch(x, number)
        if name == "shared":  # last_gates tells of one of its six calls: all of them are forced
            is_open = number % 2 == 0
            with depth.fixed({"layer": is_open}):
                output = model.train()(y)
            gates = {"layer": is_open, "layer:0": is_open}
        else:
            output = model.train()(y)
            gates = depth.last_gates
        patterns.add(tuple(gates.values()))

        def factor(branch: str, gates: dict[str, bool] = gates) -> float:
            # An inner gate has none where its outer block has been dropped so far.
            kept = gates.get(branch if unit == "branch" else branch.partition(":")[0], False)
            return factor_of(survives(branch), scale, training=True) if kept else 0.0

        assert torch.equal(output, TWINS[name](plain.train(), y, factor))
    assert_same(model, plain)  # the statistics of batch norms
    assert len(patterns) > 1


def test_auto_is_eval_in_batch_mode() -> None:
    _, auto, x, _ = gated("pre-norm")
    _, explicit, _, _ = gated("pre-norm", scale="eval")
    assert torch.equal(auto.eval()(x), explicit.eval()(x))


# Branches that no factor on their last modules multiplies.


@every_unit
@pytest.mark.parametrize("kind", [Bypass, DenseBypass, InLineBypass])
def test_a_branch_with_a_bypass_is_refused(kind: type[Bypass], unit: Any) -> None:
    model, x = settled(lambda: residuals(6, kind)).eval(), vectors(4, 8)
    with pytest.raises(sd.RefusedBlockError, match=r'"0".*scale="none" works|"0".*unit="block"'):
        sd.apply_stochastic_depth(model, RATE, "uniform", example_inputs=x, unit=unit)


def test_what_a_dropped_block_hands_out_beside_its_value_is_zeros() -> None:
    model, x = settled(lambda: residuals(6, TwoOutputs)), vectors(4, 8)
    depth = sd.apply_stochastic_depth(model, RATE, example_inputs=x)
    with depth.fixed({str(number): False for number in range(6)}):
        value, *inside = model.train()(x)
    assert torch.equal(value, x)
    assert all(torch.equal(tensor, torch.zeros(4, 8)) for tensor in inside)


# Under a schedule.


@pytest.mark.filterwarnings("ignore:.*at step 0 of a schedule")
@every_unit
@pytest.mark.parametrize("name", ["resnet", "pre-norm", "post-norm"])
def test_eval_under_warmup_scales_by_the_rates_of_the_moment(name: str, unit: str) -> None:
    plain, model, x, depth = gated(name, unit=unit, schedule=sd.linear_warmup(4))
    twin, steps = TWINS[name], 6
    plain.eval()
    model.eval()
    for step in range(steps):
        assert torch.equal(model(x), twin(plain, x, survival(depth)))
        for block, expected in zip(depth.blocks, range(1, 7), strict=True):
            assert block.drop_rate == pytest.approx(expected / 6 * RATE * min(step / 4, 1.0))
        if step == 0:
            assert torch.equal(model(x), plain(x))
        depth.step()


@pytest.mark.filterwarnings("ignore:.*at step 0 of a schedule")
def test_a_schedule_that_looks_at_more_than_the_step_is_asked_every_time() -> None:
    """Composer's time, say, which goes on within a step."""
    factor = [1.0]
    plain, model, x, depth = gated("pre-norm", schedule=lambda step: factor[0])
    plain.eval()
    model.eval()
    for value in (1.0, 0.5, 0.0):
        factor[0] = value
        assert torch.equal(model(x), pre_norm(plain, x, survival(depth)))
    assert torch.equal(model(x), plain(x))


@pytest.mark.filterwarnings("ignore:.*at step 0 of a schedule")
def test_each_branch_has_the_scale_of_its_own_schedule() -> None:
    plain, model, x, depth = gated(
        "pre-norm",
        unit="branch",
        schedule={"*:1": sd.linear_decay(2), "layers.0": sd.constant(0.5)},
    )
    plain.eval()
    model.eval()
    for step in range(3):
        full = expected_survival(depth)

        def factor(branch: str, step: int = step, full: Factor = full) -> float:
            share = 0.5 if branch.startswith("layers.0:") else 1.0
            if branch.endswith(":1"):  # a key with a colon comes before a block's
                share = 1 - step / 2
            return 1 - (1 - full(branch)) * share

        # 1 - (1 - (1 - p)) rounds where 1 - p does not.
        torch.testing.assert_close(model(x), pre_norm(plain, x, factor), rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x), pre_norm(plain, x, survival(depth)))
        depth.step()


# What sets the gates by hand.


@pytest.mark.parametrize(("scale", "by"), [("eval", "survival"), ("train", "one"), ("none", "one")])
def test_disabled_trains_at_the_inference_scale(scale: str, by: str) -> None:
    plain, model, x, depth = gated("resnet", scale=scale)
    survives = survival(depth)

    def factor(branch: str) -> float:
        return survives(branch) if by == "survival" else 1.0

    with depth.disabled():
        assert torch.equal(model.train()(x), resnet(plain.train(), x, factor))
    assert_same(model, plain)
    with depth.disabled(), depth.fixed(dict.fromkeys(["stages.0.0", "stages.1.0"], False)):
        assert torch.equal(model(x), resnet(plain, x, factor))  # disabled: every branch runs


class ResNetTwin(nn.Module):
    def __init__(self, model: Any, factor: Factor) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return resnet(self.model, x, self.factor)


def test_update_bn_of_an_averaged_model_under_disabled() -> None:
    plain, model, x, _ = gated("resnet")
    average = AveragedModel(model)
    own = sd.get_stochastic_depth(average)
    loader = [batch(x, number) for number in range(4)]
    with own.disabled():
        update_bn(loader, average)
    update_bn(loader, ResNetTwin(plain, survival(own)))
    assert_same(average.module, plain)
    assert torch.equal(average.eval()(x), resnet(plain.eval(), x, survival(own)))


def test_fixed_holds_for_single_branches_and_ends_with_its_context() -> None:
    plain, model, x, depth = gated("post-norm", unit="branch")
    survives = survival(depth)
    model.eval()
    before = model(x)
    with depth.fixed({"layers.2:1": False, "layers.4": False}):
        with depth.fixed({"layers.0:0": False}):
            inner = model(x)
        outer = model(x)
    assert torch.equal(model(x), before)

    def twin(*dropped: str) -> Tensor:
        return post_norm(plain.eval(), x, lambda b: 0.0 if b in dropped else survives(b))

    assert torch.equal(outer, twin("layers.2:1", "layers.4:0", "layers.4:1"))
    assert torch.equal(inner, twin("layers.0:0"))  # what is not listed stays open


def test_fixed_ends_where_its_body_fails() -> None:
    _, model, x, depth = gated("pre-norm")
    before = model.eval()(x)
    with pytest.raises(ZeroDivisionError), depth.fixed({"layers.0": False}), depth.disabled():
        raise ZeroDivisionError
    assert torch.equal(model(x), before)
    model.train()(x)
    assert depth.last_gates


class Twice(nn.Module):
    """Calls one module twice: the first time for another one, then for a product in line."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.act = nn.Linear(8, 16), nn.GELU()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.two(self.act(self.one(x))))
        skip: Tensor = self.skip(x)
        return skip + self.three(y) * y


def test_a_dropped_module_that_is_called_twice_hands_out_zeros_where_they_are_read() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(m for _ in range(6) for m in (Twice(), nn.Linear(16, 8)))).train()
    x = torch.randn(4, 8)
    sd.apply_stochastic_depth(model, 1 - 1e-9, "uniform", example_inputs=x, scale="none")
    expected = x
    for twice, last in zip(model[::2], model[1::2], strict=True):
        expected = last(twice.skip(expected))
    assert torch.equal(model(x), expected)


class FusedInInference(nn.Module):
    """In inference its last layer's weights are used in line."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.training:
            out: Tensor = self.out(h)
            return x + out
        return x + h @ self.out.weight.T + self.out.bias


@pytest.mark.oldest
def test_a_branch_that_ends_otherwise_in_inference_is_refused() -> None:
    x = torch.randn(2, 8)
    model = nn.Sequential(*(FusedInInference() for _ in range(6)))
    with pytest.raises(sd.RefusedBlockError, match=r'runs without "0\.out", which scale="eval"'):
        sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="train")
    expected = depth.remove().eval()(x)
    sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="train")
    assert torch.equal(model.eval()(x), expected)


def test_copies_are_disabled_with_their_original() -> None:
    plain, model, x, depth = gated("resnet")
    average = AveragedModel(model)
    loader = [batch(x, number) for number in range(4)]
    with depth.disabled():
        update_bn(loader, average)
    update_bn(loader, ResNetTwin(plain, survival(depth)))
    for mine, its in zip(average.module.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, its)
