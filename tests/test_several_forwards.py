"""Promise: each training forward of a step has a draw of its own, and evaluation has none.

A GAN's step, two views, crops of several sizes, an evaluation in between; and the sequence goes on
where it was cut, between any two of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import stochastic_depth as sd
from comparing import assert_identical_gradients
from draws import kept, rates_of
from networks import assert_same, batch, gated, make, sgd, vectors

pytestmark = pytest.mark.oldest

NAMES = ("resnet", "pre-norm", "post-norm", "explicit")
MODES: dict[str, dict[str, Any]] = {
    "batch": {},
    "by branch": {"unit": "branch"},
    "rows": {"mode": "sample"},
}
PAIRS = (("resnet", "crops"), ("pre-norm", "views"), ("post-norm", "crops"), ("explicit", "views"))
SEED, RATE = 4, 0.5


def drawing(name: str, **options: Any) -> tuple[Any, Tensor, sd.StochasticDepth]:
    return gated(name, RATE, draw=sd.Draw(seed=SEED), **options)


def drawn(depth: sd.StochasticDepth, step: int, call: int) -> dict[str, bool]:
    """What stands in the sequence at that place."""
    return kept(rates_of(depth), SEED, step, call)


def listed(gates: dict[str, Any]) -> dict[str, Any]:
    return {name: gate if isinstance(gate, bool) else list(gate) for name, gate in gates.items()}


def crops(x: Tensor, number: int) -> list[Tensor]:
    """Two large ones and two small ones, the small ones in a larger batch."""
    large = [batch(x, 10 * number + view) for view in range(2)]
    smaller = (6, 3, 4, 4) if x.ndim == 4 else (6, 3, 3)
    return [*large, *(vectors(*smaller, seed=10 * number + view) for view in (2, 3))]


def views(x: Tensor, number: int) -> list[Tensor]:
    return [batch(x, 10 * number + view) for view in range(2)]


DATA: dict[str, Callable[[Tensor, int], list[Tensor]]] = {"views": views, "crops": crops}


def contrast(outputs: Sequence[Tensor]) -> Tensor:
    means = torch.stack([output.mean(0) for output in outputs])
    return (means[0] - means[1:]).square().sum() + sum(o.square().mean() for o in outputs)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", NAMES)
def test_views_and_crops_of_one_step(name: str, data: str) -> None:
    model, x, depth = drawing(name)
    twin = copy.deepcopy(model)
    own = sd.get_stochastic_depth(twin)
    for step in range(2):
        outputs, forced = [], []
        for call, each in enumerate(DATA[data](x, step)):
            outputs.append(model(each))
            assert depth.last_gates == drawn(depth, step, call)
            with own.fixed(depth.last_gates):
                forced.append(twin(each))
        contrast(outputs).backward()
        contrast(forced).backward()
        assert_identical_gradients(model, twin)
        depth.step()  # without an optimizer's: the weights stay alike


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "data"), PAIRS)
def test_an_evaluation_in_between_changes_nothing(name: str, data: str, mode: str) -> None:
    found = []
    for evaluates in (False, True):
        model, x, depth = drawing(name, **MODES[mode])
        optimizer = sgd(model)
        depth.follow(optimizer)
        gates = []
        for step in range(2):
            optimizer.zero_grad()
            outputs = []
            for each in DATA[data](x, step):
                outputs.append(model(each))
                gates.append(listed(depth.last_gates))
                if evaluates:
                    evaluate(model, depth, x)
            contrast(outputs).backward()
            optimizer.step()
        found.append((model, gates, depth.state_dict()))
    (plain, gates, state), (evaluated, other_gates, other_state) = found
    assert gates == other_gates
    assert state == other_state
    assert_same(plain, evaluated)
    assert len({str(each) for each in gates}) > 2


def evaluate(model: Any, depth: sd.StochasticDepth, x: Tensor) -> None:
    """Every block runs, at its scale: as the folded copy."""
    gates = listed(depth.last_gates)
    folded = copy.deepcopy(model.eval())
    sd.get_stochastic_depth(folded).fold()
    with torch.no_grad():
        # A factor in the weights rounds otherwise than one on the output.
        torch.testing.assert_close(model(x), folded(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(model(x), model(x))
    assert listed(depth.last_gates) == gates
    model.train()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "data"), PAIRS)
def test_resumed_between_two_forwards_of_a_step(name: str, data: str, mode: str) -> None:
    model, x, depth = drawing(name, **MODES[mode])
    depth.step()
    places, gates = [], []
    for each in DATA[data](x, 0):
        places.append(depth.state_dict())
        model(each)
        gates.append(listed(depth.last_gates))
    for number, place in enumerate(places):
        other, _, resumed = drawing(name, **MODES[mode])
        resumed.load_state_dict(place)
        for later, each in enumerate(DATA[data](x, 0)[number:], number):
            other(each)
            assert listed(resumed.last_gates) == gates[later]
    assert len({str(each) for each in gates}) > 1


class Generator(nn.Module):
    """A gated network whose output another one judges."""

    def __init__(self) -> None:
        super().__init__()
        self.body, _ = make("pre-norm")
        self.out = nn.Linear(4, 15)

    def forward(self, noise: Tensor) -> Tensor:
        return self.out(self.body(noise)).view(-1, 5, 3)


def test_the_steps_of_a_gan() -> None:
    """The discriminator sees real and made examples, then judges for the generator's step."""
    torch.manual_seed(0)
    judge, x, of_judge = drawing("post-norm")
    maker = Generator().train()
    of_maker = sd.apply_stochastic_depth(
        maker, RATE, "uniform", example_inputs=x, draw=sd.Draw(seed=SEED)
    )
    twins = copy.deepcopy(judge), copy.deepcopy(maker)
    own = sd.get_stochastic_depth(twins[0]), sd.get_stochastic_depth(twins[1])
    optimizers = sgd(judge), sgd(maker)
    twin_optimizers = sgd(twins[0]), sgd(twins[1])
    of_judge.follow(optimizers[0])
    of_maker.follow(optimizers[1])
    first = 0  # the judge's first call of a step, behind that of the generator's step before
    for step in range(3):
        real, noise = batch(x, 2 * step), batch(x, 2 * step + 1)

        # The discriminator's step.
        made = maker(noise).detach()
        assert of_maker.last_gates == drawn(of_maker, step, 0)
        scores = []
        for call, seen in enumerate((real, made), first):
            scores.append(judge(seen))
            assert of_judge.last_gates == drawn(of_judge, step, call)
        (scores[0].mean() - scores[1].mean()).backward()
        forced = []
        for call, seen in enumerate((real, made), first):
            with own[0].fixed(drawn(of_judge, step, call)):
                forced.append(twins[0](seen))
        (forced[0].mean() - forced[1].mean()).backward()
        assert_identical_gradients(judge, twins[0])
        optimizers[0].step()
        twin_optimizers[0].step()
        optimizers[0].zero_grad()
        twin_optimizers[0].zero_grad()

        # The generator's, through the discriminator.
        judge.requires_grad_(False)
        twins[0].requires_grad_(False)
        judge(maker(noise)).mean().backward()
        assert of_maker.last_gates == drawn(of_maker, step, 1)
        assert of_judge.last_gates == drawn(of_judge, step + 1, 0)
        gates = own[0].fixed(of_judge.last_gates), own[1].fixed(of_maker.last_gates)
        with gates[0], gates[1]:
            twins[0](twins[1](noise)).mean().backward()
        assert_identical_gradients(maker, twins[1])
        assert all(parameter.grad is None for parameter in judge.parameters())
        judge.requires_grad_(True)
        twins[0].requires_grad_(True)
        optimizers[1].step()
        twin_optimizers[1].step()
        optimizers[1].zero_grad()
        twin_optimizers[1].zero_grad()
        first = 1
    assert_same(judge, twins[0])
    assert_same(maker, twins[1])


@pytest.mark.parametrize("mode", MODES)
def test_statistics_of_inference_in_the_middle_of_a_training(mode: str) -> None:
    """`update_bn` under `disabled`, as for the folded network; the sequence goes on."""
    model, x, depth = drawing("resnet", **MODES[mode])
    for number in range(2):
        model(batch(x, number))
    state, gates = depth.state_dict(), listed(depth.last_gates)
    plain = copy.deepcopy(model)
    sd.get_stochastic_depth(plain).fold()
    loader = [batch(x, number) for number in range(3)]
    with depth.disabled():
        update_bn(loader, model)
    assert (depth.state_dict(), listed(depth.last_gates)) == (state, gates)
    update_bn(loader, plain)
    # The statistics of a branch's last norm, whose weights take the factor in, are not scaled.
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
