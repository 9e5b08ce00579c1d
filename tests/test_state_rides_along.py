"""Promise: who saves the optimizer saves stochastic depth; nothing else is to be remembered."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import stochastic_depth as sd
from networks import assert_equal, make
from riding import KEY, Optimizer, Run, images, momentum, network, through_a_file, train

oldest = pytest.mark.oldest

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": momentum,
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
}


@oldest
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_bit_for_bit_by_its_optimizers_state(name: str) -> None:
    whole, first = Run(OPTIMIZERS[name]), Run(OPTIMIZERS[name])
    drawn = whole.steps(12)
    first.steps(5)
    second = Run(OPTIMIZERS[name])
    second.load(first.saved())
    assert [b.drop_rate for b in second.depth.blocks] == [b.drop_rate for b in first.depth.blocks]
    assert second.steps(7) == drawn[5:]
    assert_equal(second.model.state_dict(), whole.model.state_dict())


@oldest
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_optimizer_does_not_mind_the_key(name: str) -> None:
    run = Run(OPTIMIZERS[name])
    run.steps(2)
    saved = run.saved()
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    model.load_state_dict(saved["model"])
    train(model)
    optimizer.step()


@oldest
def test_the_state_can_be_left_out() -> None:
    run = Run()
    run.depth.follow(run.optimizer, save_state=False)
    run.steps(2)
    assert KEY not in run.optimizer.state_dict()


@oldest
def test_remove_takes_all_hooks_off() -> None:
    run = Run()
    run.depth.follow(run.optimizer).remove()
    run.steps(1)
    assert run.depth.state_dict()["step"] == 0
    assert KEY not in run.optimizer.state_dict()
    run.depth.follow(run.optimizer)
    run.depth.remove()
    assert KEY not in run.optimizer.state_dict()


@oldest
def test_the_optimizer_of_a_scheduler_and_a_scaler_is_found() -> None:
    run = Run()
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1)
    run.depth.follow(scheduler)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(run.model(images()).sum()).backward()
    scaler.step(run.optimizer)
    scaler.update()
    scheduler.step()
    assert run.optimizer.state_dict()[KEY]["step"] == 1


@oldest
def test_following_another_optimizer_replaces_the_first() -> None:
    run = Run()
    run.steps(3)
    other = momentum(run.model.parameters())
    run.depth.follow(other)
    run.optimizer.step()
    assert run.depth.state_dict()["step"] == 3
    assert KEY not in run.optimizer.state_dict()
    other.step()
    assert other.state_dict()[KEY]["step"] == 4


@oldest
def test_a_checkpoint_of_a_run_without_stochastic_depth_loads_with_a_warning() -> None:
    model = network()
    optimizer = momentum(model.parameters())
    train(model)
    optimizer.step()
    run = Run()
    run.load(through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
    with pytest.warns(sd.StochasticDepthWarning, match="steps behind it"):
        run.steps(1)
    run.steps(1)  # once
    assert run.depth.state_dict()["step"] == 2


@oldest
def test_a_state_that_comes_otherwise_needs_no_warning() -> None:
    first = Run()
    first.steps(3)
    saved, state = first.saved(), first.depth.state_dict()
    del saved["optimizer"][KEY]
    for in_order in (True, False):
        run = Run()
        if in_order:
            run.depth.load_state_dict(state)
        run.load(saved)
        run.depth.load_state_dict(state)
        run.steps(1)
        assert run.depth.state_dict()["step"] == 4


@oldest
def test_a_fresh_optimizer_that_is_loaded_needs_no_warning() -> None:
    run, fresh = Run(), Run()
    del (saved := fresh.saved())["optimizer"][KEY]
    run.load(saved)
    run.steps(1)  # a warning is an error here
    assert run.depth.state_dict()["step"] == 1


def test_torchs_distributed_checkpoint_loses_the_key_and_steps_nothing() -> None:
    first = Run(OPTIMIZERS["adamw"])
    first.steps(3)
    options = first.model, first.optimizer
    saved = copy.deepcopy(
        {"optimizer": get_optimizer_state_dict(*options), "depth": first.depth.state_dict()}
    )
    assert KEY not in saved["optimizer"]
    second = Run(OPTIMIZERS["adamw"])
    second.model.load_state_dict(first.model.state_dict())
    second.depth.load_state_dict(saved["depth"])
    set_optimizer_state_dict(second.model, second.optimizer, saved["optimizer"])
    assert second.depth.state_dict()["step"] == 3  # set_optimizer_state_dict steps with zeros
    assert second.steps(4) == first.steps(4)
    assert_equal(second.model.state_dict(), first.model.state_dict())
    third = Run(OPTIMIZERS["adamw"])
    set_optimizer_state_dict(third.model, third.optimizer, saved["optimizer"])
    with pytest.warns(sd.StochasticDepthWarning, match="steps behind it"):
        third.steps(1)


@oldest
def test_other_rates_are_this_runs() -> None:
    first, second = Run(), Run(rate=0.25)
    first.steps(10)
    with pytest.warns(sd.StochasticDepthWarning, match="Those of this run stand"):
        second.load(first.saved())
    assert second.depth.blocks[-1].drop_rate == 0.25
    assert second.depth.state_dict()["step"] == 10


@oldest
@pytest.mark.parametrize("options", [{"blocks": ["!stages.0.0"]}, {"draw": sd.Draw(seed=1)}])
def test_other_blocks_or_another_seed_raise(options: dict[str, Any]) -> None:
    first = Run()
    first.steps(1)
    saved = first.saved()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sd.StochasticDepthWarning)  # few blocks
        second = Run(**options)
    before = copy.deepcopy(second.optimizer.state_dict())
    with pytest.raises(sd.StateMismatchError, match=r"gated there only|seed 0 there, 1 here"):
        second.optimizer.load_state_dict(saved["optimizer"])
    assert second.optimizer.state_dict() == before


class TwoParts:
    """Two networks of one kind, which one optimizer trains; each is gated by itself."""

    def __init__(self) -> None:
        self.models = [network().train() for _ in range(2)]
        parameters = [p for model in self.models for p in model.parameters()]
        self.optimizer = momentum(parameters)
        self.depths = [
            sd.apply_stochastic_depth(
                model, rate, example_inputs=images(), schedule=sd.linear_warmup(10)
            )
            for model, rate in zip(self.models, (0.5, 0.25), strict=True)
        ]
        for depth in self.depths:
            depth.follow(self.optimizer)

    def steps(self, count: int) -> None:
        for _ in range(count):
            sum(model(images()).square().mean() for model in self.models).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


@oldest
def test_several_parts_ride_in_one_optimizer() -> None:
    first, second = TwoParts(), TwoParts()
    first.steps(4)
    state = through_a_file(first.optimizer.state_dict())
    assert [state[key]["drop_rates"][-1][1] for key in (KEY, f"{KEY}.1")] == [0.5, 0.25]
    for model, trained in zip(second.models, first.models, strict=True):
        model.load_state_dict(trained.state_dict())
    second.optimizer.load_state_dict(state)  # no warning: each finds its own
    first.steps(3)
    second.steps(3)
    for ours, theirs in zip(second.depths, first.depths, strict=True):
        assert ours.last_gates == theirs.last_gates
        assert ours.state_dict() == theirs.state_dict()
    weights = first.models[0].state_dict()
    with pytest.raises(sd.StateMismatchError, match=r"pass one of several states"):
        sd.fold_state_dict(weights, first.optimizer.state_dict())
    found = sd.fold_state_dict(weights, first.optimizer.state_dict()[KEY])
    assert_equal(found, first.depths[0].folded_state_dict())


@oldest
def test_parts_of_several_kinds_find_their_own_in_any_order() -> None:
    def begin(order: int) -> dict[str, sd.StochasticDepth]:
        models = {name: make(name)[0].train() for name in ("resnet", "pre-norm")}
        optimizer = momentum([p for model in models.values() for p in model.parameters()])
        depths = {
            name: sd.apply_stochastic_depth(models[name], 0.5, example_inputs=make(name)[1])
            for name in list(models)[::order]
        }
        for depth in depths.values():
            depth.follow(optimizer)
        begun[order] = optimizer
        return depths

    begun: dict[int, torch.optim.Optimizer] = {}
    first = begin(1)
    for _ in range(3):
        begun[1].step()
    second = begin(-1)
    second["resnet"].set_drop_rate(0.25)
    with pytest.warns(sd.StochasticDepthWarning, match="other rates"):
        begun[-1].load_state_dict(begun[1].state_dict())
    assert second["pre-norm"].state_dict() == first["pre-norm"].state_dict()
    assert second["resnet"].state_dict()["step"] == 3


class BaseFirst(torch.optim.Optimizer):
    """As timm's Lookahead: an optimizer by its class, without what `Optimizer.__init__` makes."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._base_optimizer = base
        self.param_groups = base.param_groups

    def step(self, closure: Any = None) -> Any:
        return self._base_optimizer.step(closure)


@oldest
def test_the_optimizer_inside_of_a_lookahead_is_followed() -> None:
    run = Run()
    run.depth.follow(BaseFirst(run.optimizer))
    run.steps(2)
    assert run.optimizer.state_dict()[KEY]["step"] == 2


@oldest
@pytest.mark.parametrize("nesterov", [False, True])
def test_fused_sgd_begins_a_momentum_late(nesterov: bool) -> None:
    """torch's fails where some parameters have a momentum and others not yet; foreach does not."""
    found = []
    for way in ("fused", "foreach"):
        run = Run(
            lambda parameters, way=way: torch.optim.SGD(
                parameters,
                lr=0.05,
                momentum=0.9,
                nesterov=nesterov,
                weight_decay=0.1,
                **{way: True},
            ),
            schedule=None,
        )
        run.depth.set_drop_rate(0.6, "uniform")
        run.steps(6)
        found.append(run.model.state_dict())
    # Fused kernels take other roundings than sums over lists.
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


class Renamed(torch.optim.SGD):
    """Whose step calls that of its base: torch runs the hooks of both."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Twice(Renamed):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@oldest
@pytest.mark.parametrize("kind", [Renamed, Twice])
def test_a_step_that_calls_its_bases_counts_once(kind: Any) -> None:
    torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)  # from here on its steps run hooks
    Renamed(nn.Linear(1, 1).parameters(), 0.1)
    run = Run(lambda parameters: kind(parameters, 0.1))
    run.steps(3)
    assert run.depth.state_dict()["step"] == 3
    with pytest.raises(ValueError, match="broken off"):
        run.optimizer.step(broken_off)
    run.steps(2)
    assert run.depth.state_dict()["step"] == 5


def broken_off() -> Any:
    raise ValueError("broken off")


@oldest
def test_what_takes_no_hooks_is_refused() -> None:
    class Wrapped(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optim = optimizer  # as torch's PostLocalSGDOptimizer

    run = Run()
    with pytest.raises(sd.OptionError, match=r"follow\(\) got a Wrapped.*pass the optimizer, or"):
        run.depth.follow(Wrapped(run.optimizer))
