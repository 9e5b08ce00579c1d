"""Promise: an optimizer leaves what was dropped alone: its weights, and what it keeps for them.

The reference computes each step by hand: the branches that are dropped are not in its forward, and
every parameter has an optimizer of its own, which steps where there is a gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import (
    SWALR,
    AveragedModel,
    get_ema_multi_avg_fn,
    update_bn,
)

import stochastic_depth as sd
from networks import assert_same, batch, make
from optimizer_cases import cases
from processes import results_of
from twins import TWINS, of_blocks

oldest = pytest.mark.oldest
Make = Callable[[Any], torch.optim.Optimizer]
DECAY: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, momentum=0.9, foreach=False, **DECAY),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True, **DECAY),
    "SGD, foreach": lambda p: torch.optim.SGD(p, momentum=0.9, foreach=True, **DECAY),
    "SGD, fused": lambda p: fused_sgd(p),
    "AdamW": lambda p: torch.optim.AdamW(p, foreach=False, **DECAY),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True, **DECAY),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True, **DECAY),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True, **DECAY),
    "Adafactor": lambda p: torch.optim.Adafactor(p, **DECAY),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, **DECAY),
    "Muon": lambda p: muon(p),
}


def fused_sgd(parameters: Any) -> torch.optim.Optimizer:
    """It fails where a parameter has its first gradient later than another (torch 2.14).

    As in any network with a part that is not used in the first step. Momentum of zeros is the same.
    """
    given = list(parameters)
    optimizer = torch.optim.SGD(given, momentum=0.9, fused=True, **DECAY)
    for parameter in given:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def muon(parameters: Any) -> torch.optim.Optimizer:
    """It takes matrices alone; the others stay as they are."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    return torch.optim.Muon([p for p in parameters if p.ndim == 2], **DECAY)


FORWARDS = {name: TWINS[name] for name in ("resnet", "pre-norm")}


class ByHand:
    """The slow reference."""

    def __init__(self, name: str, make_optimizer: Make) -> None:
        self.model, self.example = make(name)
        self.model.train()
        self.forward = FORWARDS[name]
        self.optimizers = {}
        for parameter_name, parameter in self.model.named_parameters():
            if make_optimizer is not OPTIMIZERS["Muon"] or parameter.ndim == 2:
                self.optimizers[parameter_name] = make_optimizer([parameter])

    def step(self, number: int, kept: dict[str, bool]) -> None:
        self.model.zero_grad()
        output = self.forward(self.model, batch(self.example, number), of_blocks(kept))
        output.square().mean().backward()
        for name, optimizer in self.optimizers.items():
            if self.model.get_parameter(name).grad is not None:
                optimizer.step()


@oldest
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", FORWARDS)
def test_training_is_that_by_hand(name: str, optimizer: str) -> None:
    model, x = make(name)
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=x)
    reference = ByHand(name, OPTIMIZERS[optimizer])
    ours = OPTIMIZERS[optimizer](model.parameters())
    depth.follow(ours)
    dropped = 0
    for step in range(8):
        state = {p: copy.deepcopy(ours.state.get(p)) for p in model.parameters()}
        before = {p: p.detach().clone() for p in model.parameters()}
        ours.zero_grad()
        model.train()(batch(x, step)).square().mean().backward()
        idle = [p for p in model.parameters() if p.grad is None]
        ours.step()
        for parameter in idle:
            assert torch.equal(parameter, before[parameter])
            assert_equal_states(ours.state.get(parameter), state[parameter])
        reference.step(step, depth.last_gates)
        dropped += len(idle)
        assert_same(model, reference.model)
    assert dropped


def assert_equal_states(ours: Any, theirs: Any) -> None:
    assert (ours or {}).keys() == (theirs or {}).keys()
    for key, value in (ours or {}).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key


@oldest
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("kept", [1, 0])
def test_clipping_looks_at_what_ran(kept: int, foreach: bool) -> None:
    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    gates = {block.name: number < kept for number, block in enumerate(depth.blocks)}
    with depth.fixed(gates):
        model.train()(x).square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    outside = [name for name in dict(model.named_parameters()) if not name.startswith("layers.")]
    assert len(gradients) == len(outside) + kept * len(list(model.layers[0].parameters()))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=foreach)
    by_hand = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
    # Floats against doubles.
    torch.testing.assert_close(norm.double(), by_hand, rtol=1e-6, atol=0.0)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients)
        if parameter.grad is not None:
            expected = gradients[name] * (0.1 / (norm + 1e-6)).clamp(max=1.0)
            torch.testing.assert_close(parameter.grad, expected)


@oldest
@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_an_average_is_that_by_hand(kind: str) -> None:
    """Its weights, the scale of its inference, and its BatchNorm statistics."""
    name = "resnet"
    model, x = make(name)
    depth = sd.apply_stochastic_depth(
        model, 0.5, "uniform", example_inputs=x, schedule=sd.linear_warmup(6)
    )
    reference = ByHand(name, OPTIMIZERS["SGD"])
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    average_by = get_ema_multi_avg_fn(0.75) if kind == "EMA" else None
    average: Any = AveragedModel(model, multi_avg_fn=average_by)
    by_hand = {n: p.detach().clone() for n, p in reference.model.named_parameters()}
    # SWA begins where the learning rate does.
    rate = SWALR(optimizer, swa_lr=0.05, anneal_epochs=1) if kind == "SWA" else None
    depth.follow(optimizer)
    for step in range(8):
        optimizer.zero_grad()
        model.train()(batch(x, step)).square().mean().backward()
        optimizer.step()
        if rate is not None:
            rate.step()
        average.update_parameters(model)
        reference.step(step, depth.last_gates)
        for n, p in reference.model.named_parameters():
            if step == 0:
                by_hand[n] = p.detach().clone()
            elif kind == "EMA":
                by_hand[n] = 0.75 * by_hand[n] + 0.25 * p.detach()
            else:
                by_hand[n] = by_hand[n] + (p.detach() - by_hand[n]) / (step + 1)
    assert_same(model, reference.model)
    for n, p in average.module.named_parameters():
        # lerp and a sum of products round differently.
        torch.testing.assert_close(p, by_hand[n], rtol=1e-5, atol=1e-6)
    own = sd.get_stochastic_depth(average)
    assert [b.drop_rate for b in own.blocks] == [0.5] * 6  # the warmup is over, there as well
    loader = [batch(x, number) for number in range(3)]
    with own.disabled():
        update_bn(loader, average)
    plain = copy.deepcopy(average.module)
    sd.get_stochastic_depth(plain).fold()
    update_bn(loader, plain)
    torch.testing.assert_close(average.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


results = results_of("optimizer_cases.py", 2)


@pytest.mark.parametrize("case", cases())
def test_an_optimizer_that_shares_its_state_among_ranks(results: dict[str, str], case: str) -> None:
    assert not results[case], results[case]


@oldest
def test_zeros_instead_of_none_would_move_them() -> None:
    """What the test above would see if a dropped block had gradients."""
    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    model.train()(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    before = model.layers[0].mlp[0].weight.detach().clone()
    with depth.fixed({"layers.0": False}):
        model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model.layers[0].mlp[0].weight, before)
