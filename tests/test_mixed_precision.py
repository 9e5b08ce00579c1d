"""Promise: in mixed precision every dtype is that of the plain model, and no GradScaler is upset.

Under autocast (on the CPU) to bfloat16 and float16, and in a model that is converted as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from comparing import with_factors
from networks import assert_same, batch, make, sgd
from zoo import SMALL

pytestmark = pytest.mark.oldest

NAMES = ("resnet", "pre-norm", "post-norm", "explicit")
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
each_name = pytest.mark.parametrize("name", NAMES)
each_half = pytest.mark.parametrize("half", HALVES)
SCALED = [("train", which) for which in ("open", "closed", "some")]
Gradients = dict[str, Tensor | None]


def by_blocks(name: str, factors: Mapping[str, float], plain: nn.Module) -> nn.Module:
    """A copy in which the branches of these blocks are multiplied."""
    specimen = SMALL[name]
    by = {
        f"{block}:{number}": factor
        for block, factor in factors.items()
        for number in range(len(specimen.ends_of(plain, block)))
    }
    return with_factors(plain, specimen, by)


def run(model: nn.Module, x: Tensor, half: torch.dtype | None) -> tuple[Tensor, Gradients]:
    """Output and gradients; under autocast where a dtype is given."""
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", half) if half is not None else nullcontext():
        output = model(x)
        loss = output.float().square().mean()
    loss.backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_same_run(
    ours: tuple[Tensor, Gradients],
    theirs: tuple[Tensor, Gradients],
    dropped: tuple[str, ...] = (),
) -> None:
    """To the last bit; what is dropped has None where hooks leave zeros."""
    assert ours[0].dtype == theirs[0].dtype
    assert torch.equal(ours[0], theirs[0])
    for name, mine in ours[1].items():
        other = theirs[1][name]
        assert mine is not None or name.startswith(dropped), name
        if mine is None:
            assert other is None or not other.any(), name
        else:
            assert other is not None, name
            assert mine.dtype == other.dtype, name
            assert torch.equal(mine, other), name


def gated(name: str, **options: Any) -> tuple[Any, Any, Tensor, sd.StochasticDepth]:
    plain, x = make(name)
    model = copy.deepcopy(plain)
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=x, **options)
    return plain.train(), model.train(), x, depth


def gates(depth: sd.StochasticDepth, which: str) -> dict[str, bool]:
    kept = {"open": (True, True), "closed": (False, False), "some": (True, False)}[which]
    return {block.name: kept[number % 2] for number, block in enumerate(depth.blocks)}


@pytest.mark.parametrize(("scale", "which"), [*SCALED, ("none", "some"), ("eval", "closed")])
@each_half
@each_name
def test_forced_gates_under_autocast(name: str, half: str, which: str, scale: Any) -> None:
    plain, model, x, depth = gated(name, scale=scale)
    forced = gates(depth, which)
    open_by = 2.0 if scale == "train" else 1.0
    factors = {block: open_by if kept else 0.0 for block, kept in forced.items()}
    reference = by_blocks(name, factors, plain)
    with depth.fixed(forced):
        ours = run(model, x, HALVES[half])
    dropped = tuple(f"{block}." for block, kept in forced.items() if not kept)
    assert_same_run(ours, run(reference, x, HALVES[half]), dropped)


@each_half
@each_name
def test_inference_under_autocast(name: str, half: str) -> None:
    plain, model, x, depth = gated(name, scale="eval")
    reference = by_blocks(name, dict.fromkeys(gates(depth, "open"), 0.5), plain)
    for net in (model.eval(), reference.eval()):
        net.requires_grad_(True)
    assert_same_run(run(model, x, HALVES[half]), run(reference, x, HALVES[half]))


@each_half
@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "explicit"])
def test_rows_under_autocast(name: str, unit: Any, half: str) -> None:
    """As masks, on the same rows. (BatchNorm sees the kept rows alone: no mask is like that.)"""
    plain, model, x, depth = gated(name, mode="sample", unit=unit, draw=sd.Draw(seed=1))
    ours = run(model, x, HALVES[half])
    by = {}
    for branch in (branch for block in depth.blocks for branch in block.branches):
        rows = depth.last_gates[branch.name.split(":")[0] if unit == "block" else branch.name]
        by[branch.name] = torch.zeros(len(x))
        by[branch.name][list(rows)] = 2.0
    reference = with_factors(plain, SMALL[name], by)
    theirs = run(reference, x, HALVES[half])
    assert ours[0].dtype == theirs[0].dtype
    # Fewer rows take other kernels, whose sums round otherwise: some units of a half's last place.
    torch.testing.assert_close(ours[0], theirs[0], rtol=0.1, atol=0.05)
    for parameter, mine in ours[1].items():
        other = theirs[1][parameter]
        assert other is not None
        if mine is not None:
            assert mine.dtype == other.dtype, parameter


@pytest.mark.parametrize(("unit", "half"), [("block", "bfloat16"), ("branch", "float16")])
@pytest.mark.parametrize("mode", ["batch", "sample"])
@each_name
def test_random_draws_have_the_dtypes_of_the_plain_model(
    name: str, mode: Any, unit: Any, half: str
) -> None:
    plain, model, x, depth = gated(name, mode=mode, unit=unit)
    expected = run(plain, x, HALVES[half])
    seen = set()
    for number in range(4):
        output, gradients = run(model, batch(x, number), HALVES[half])
        assert output.dtype == expected[0].dtype
        assert output.isfinite().all()
        for parameter, gradient in gradients.items():
            other = expected[1][parameter]
            assert gradient is None or (other is not None and gradient.dtype == other.dtype)
        drawn = depth.last_gates.values()
        seen.add(str([gate if isinstance(gate, bool) else list(gate) for gate in drawn]))
    assert len(seen) > 1


@pytest.mark.parametrize("order", ["converted first", "gates first"])
@pytest.mark.parametrize("which", ["open", "closed", "some"])
@each_half
@each_name
def test_a_model_converted_as_a_whole(name: str, half: str, which: str, order: str) -> None:
    plain, x = make(name)
    plain, half_x = plain.to(HALVES[half]).train(), x.to(HALVES[half])
    model = copy.deepcopy(plain) if order == "converted first" else make(name)[0]
    example = half_x if order == "converted first" else x
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=example)
    model = model.to(HALVES[half]).train()
    forced = gates(depth, which)
    reference = by_blocks(name, forced, plain)
    with depth.fixed(forced):
        ours = run(model, half_x, None)
    assert ours[0].dtype == HALVES[half]
    dropped = tuple(f"{block}." for block, kept in forced.items() if not kept)
    assert_same_run(ours, run(reference, half_x, None), dropped)


@pytest.mark.parametrize("mode", ["batch", "sample"])
@each_name
def test_a_converted_model_trains(name: str, mode: Any) -> None:
    model, x = make(name)
    model, x = model.to(torch.bfloat16).train(), x.to(torch.bfloat16)
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=x, mode=mode)
    optimizer = sgd(model)
    depth.follow(optimizer)
    for number in range(4):
        optimizer.zero_grad()
        model(batch(x.float(), number).to(x.dtype)).float().square().mean().backward()
        optimizer.step()
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())


# GradScaler.


def scaled_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, x: Tensor, by: float = 1.0
) -> None:
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = model(x).float().square().mean() * by
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


@each_name
def test_a_step_that_drops_all_leaves_the_scaler_alone(name: str) -> None:
    _, model, x, depth = gated(name)
    optimizer = sgd(model, weight_decay=0.1)
    depth.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    before = copy.deepcopy(model)
    with depth.fixed(gates(depth, "closed")):
        scaled_step(model, optimizer, scaler, x)
    assert scaler.get_scale() == 8.0
    assert depth.state_dict()["step"] == 1
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved
    for block in depth.blocks:
        for end in (".conv", ".mlp", ".attention"):
            assert not any(n.startswith(f"{block.name}{end}") for n in moved)


@pytest.mark.parametrize("fused", [False, True])
@each_name
def test_an_overflow_changes_nothing_but_the_scale(name: str, fused: bool) -> None:
    """The step that the scaler leaves out is none of the clock's, whatever was dropped in it."""
    _, model, x, depth = gated(name, schedule=sd.linear_warmup(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    depth.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    scaled_step(model, optimizer, scaler, x)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    scale = scaler.get_scale()
    assert depth.state_dict()["step"] == 1
    scaled_step(model, optimizer, scaler, x, by=float("inf"))
    assert scaler.get_scale() == scale / 2
    assert depth.state_dict()["step"] == 1
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    scaled_step(model, optimizer, scaler, x)
    assert depth.state_dict()["step"] == 2


@each_name
def test_scaled_training_is_unscaled_training(name: str) -> None:
    """A power of two as the scale changes no bit, with random draws as without a scaler."""
    found = []
    for enabled in (True, False):
        _, model, x, depth = gated(name, draw=sd.Draw(seed=2))
        optimizer = sgd(model)
        depth.follow(optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0, growth_interval=100)
        for number in range(5):
            optimizer.zero_grad()
            loss = model(batch(x, number)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(model)
    assert_same(*found)


def test_an_optimizer_for_gated_blocks_alone_may_have_nothing_to_step() -> None:
    """torch's scaler insists on one gradient for each optimizer; so ask before its step."""
    _, model, x, depth = gated("pre-norm")
    optimizer = sgd(model.layers)
    scaler = torch.amp.GradScaler("cpu")
    with depth.fixed(gates(depth, "closed")):
        scaler.scale(model(x).square().mean()).backward()
    assert all(p.grad is None for p in model.layers.parameters())
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)
