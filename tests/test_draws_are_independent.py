"""Promise: which gates open is a pure function of (seed, step, call, gate), independent over all.

The draws are fixed once and for all, so the statistics below either always hold or never do. Their
bounds are wide enough that honest draws stay inside but for one choice of seeds in ten thousand,
and the fakes show that draws which share a uniform do not.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stochastic_depth as sd
from networks import (
    NETWORKS,
    WIDTH,
    Residual,
    Shared,
    TwoBranches,
    Wrapped,
    assert_same,
    make,
    nested,
    residuals,
    sequences,
    settled,
    sgd,
    train,
    vectors,
)

pytestmark = pytest.mark.oldest

SEEDS, STEPS, CALLS = 4, 250, 2  # 2,000 draws of each gate
RATES = [0.5, 0.1, 0.3, 0.3, 0.2, 0.4, 0.5, 0.25]
SIGMAS = 5.0  # about 700 comparisons: honest draws exceed it once in 3,000 choices of seeds
KINDS = {"block": Residual, "branch": TwoBranches}

Gates = dict[str, bool]


def gated(
    drop_rate: Any = 0.5,
    distribution: str | None = "uniform",
    *,
    blocks: int = 8,
    draw: sd.Draw = sd.Draw(),  # noqa: B008
) -> tuple[Any, sd.StochasticDepth]:
    model = settled(lambda: residuals(blocks))
    depth = sd.apply_stochastic_depth(
        model, drop_rate, distribution, example_inputs=vectors(1, 8), draw=draw
    )
    return model, depth


def forwards(model: nn.Module, depth: sd.StochasticDepth, count: int) -> list[Gates]:
    """The gates of some training forwards of a network that takes vectors."""
    model.train()
    seen = []
    for _ in range(count):
        model(vectors(1, 8))
        seen.append(depth.last_gates)
    return seen


# Frequency and independence.


@pytest.fixture(scope="module", params=KINDS)
def drawn(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """Gates of real training forwards [seed, step, call, gate], and the gates' rates."""
    unit = request.param
    x = vectors(1, 8)
    gates = torch.empty(SEEDS, STEPS, CALLS, len(RATES) * (2 if unit == "branch" else 1))
    for seed in range(SEEDS):
        model = residuals(len(RATES), KINDS[unit]).train()
        depth = sd.apply_stochastic_depth(
            model, RATES, example_inputs=x, unit=unit, draw=sd.Draw(seed)
        )
        with torch.no_grad():
            for step, call in itertools.product(range(STEPS), range(CALLS)):
                model(x)
                gates[seed, step, call] = torch.tensor(list(depth.last_gates.values())).float()
                if call == CALLS - 1:
                    depth.step()
    branches = [branch.drop_rate for block in depth.blocks for branch in block.branches]
    return gates, torch.tensor(branches)


def dependences(gates: Tensor, rates: Tensor) -> dict[tuple[int, ...], float]:
    """How much the gates resemble themselves, moved by an offset in each direction, in sigmas.

    Each gate is centred by its known rate and brought to variance 1, so the product of two
    independent ones has mean 0 and variance 1.
    """
    centred = (gates - (1 - rates)) / (rates * (1 - rates)).sqrt()
    reach = [1, 2, 1, gates.shape[-1] - 1]
    found = {}
    for offset in itertools.product(*(range(-r, r + 1) for r in reach)):
        if offset <= (0,) * len(offset):
            continue  # the same pairs as for the opposite offset
        here, there = centred, centred
        for axis, moved in enumerate(offset):
            left = gates.shape[axis] - abs(moved)
            here = here.narrow(axis, max(0, -moved), left)
            there = there.narrow(axis, max(0, moved), left)
        products = here * there
        found[offset] = float(products.sum()) / math.sqrt(products.numel())
    return found


def pairs(gates: Tensor, rates: Tensor) -> dict[tuple[int, ...], float]:
    """How much any two gates resemble each other in the same calls, in sigmas."""
    centred = ((gates - (1 - rates)) / (rates * (1 - rates)).sqrt()).flatten(0, -2)
    products = centred.T @ centred / math.sqrt(len(centred))
    count = len(rates)
    return {(i, j): float(products[i, j]) for i, j in itertools.combinations(range(count), 2)}


def largest(found: dict[tuple[int, ...], float]) -> float:
    return max(map(abs, found.values()))


def test_each_gate_opens_as_often_as_its_rate_says(drawn: tuple[Tensor, Tensor]) -> None:
    gates, rates = drawn
    draws = gates.flatten(0, -2)
    assert len(draws) == 2000
    sigmas = (draws.mean(0) - (1 - rates)).abs() / (rates * (1 - rates) / len(draws)).sqrt()
    assert float(sigmas.max()) < 4  # 16 gates: once in a thousand choices of seeds


def test_gates_are_independent_pairwise(drawn: tuple[Tensor, Tensor]) -> None:
    assert largest(pairs(*drawn)) < SIGMAS


def test_gates_are_independent_over_blocks_calls_steps_and_seeds(
    drawn: tuple[Tensor, Tensor],
) -> None:
    assert largest(dependences(*drawn)) < SIGMAS


Key = Callable[[int, int, int, int], object]
FAKES: dict[str, Key] = {
    "one uniform for all blocks": lambda seed, step, call, block: (seed, step, call),
    "neighbours share a uniform": lambda seed, step, call, block: (seed, step, call, block // 2),
    "all calls alike": lambda seed, step, call, block: (seed, step, block),
    "all steps alike": lambda seed, step, call, block: (seed, call, block),
    "all seeds alike": lambda seed, step, call, block: (step, call, block),
    "seed + step": lambda seed, step, call, block: (seed + step, call, block),
    "step + call": lambda seed, step, call, block: (seed, step + call, block),
    "call + block": lambda seed, step, call, block: (seed, step, call + block),
    "seed + block": lambda seed, step, call, block: (seed + block, step, call),
}


def faked(key: Key) -> tuple[Tensor, Tensor]:
    """Draws that look at a part of what they should look at."""
    gates = torch.empty(SEEDS, STEPS, CALLS, len(RATES))
    for place in itertools.product(*map(range, gates.shape)):
        gates[place] = float(random.Random(repr(key(*place))).random() >= RATES[place[-1]])
    return gates, torch.tensor(RATES)


@pytest.mark.parametrize("fake", FAKES)
def test_the_test_notices_a_shared_uniform(fake: str) -> None:
    assert largest(dependences(*faked(FAKES[fake]))) > 2 * SIGMAS


def test_the_test_notices_one_uniform_for_all_blocks_pairwise() -> None:
    assert largest(pairs(*faked(FAKES["one uniform for all blocks"]))) > 2 * SIGMAS


def test_the_test_accepts_honest_draws() -> None:
    honest = faked(lambda *place: place)
    assert largest(dependences(*honest)) < SIGMAS
    assert largest(pairs(*honest)) < SIGMAS


def test_a_rate_of_zero_never_drops_and_a_high_one_rarely_keeps() -> None:
    model, depth = gated({"0": 0.999}, None)
    seen = forwards(model, depth, 100)
    assert all(all(gates[str(block)] for block in range(1, 8)) for gates in seen)
    assert sum(gates["0"] for gates in seen) < 5


# A pure function: of nothing else.


def of_nested_blocks() -> list[Gates]:
    model = settled(nested).train()
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=sequences(), draw=sd.Draw(seed=3))
    seen = []
    for _ in range(4):
        for _ in range(3):
            model(sequences())
            seen.append(depth.last_gates)
        depth.step()
    return seen


PROGRAM = """
import json, torch
from test_draws_are_independent import of_nested_blocks
torch.manual_seed(7)
print(json.dumps(of_nested_blocks()))
"""


def test_a_new_process_draws_the_same() -> None:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "1"},
    ).stdout
    seen = of_nested_blocks()
    assert json.loads(told) == seen
    assert len({tuple(gates.values()) for gates in seen}) > 6


def test_one_seed_one_sequence() -> None:
    sequences_of = {
        seed: forwards(*gated(draw=sd.Draw(seed)), 20) for seed in (0, 1, -1, 2**80, 2**80 + 1)
    }
    for seed, seen in sequences_of.items():
        assert seen == forwards(*gated(draw=sd.Draw(seed)), 20)
    assert len({repr(seen) for seen in sequences_of.values()}) == len(sequences_of)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 3))
def test_loading_a_state_goes_to_that_place_in_the_sequence(
    steps: int, calls: int, more: int
) -> None:
    model, depth = gated(blocks=6)
    for _ in range(steps):
        forwards(model, depth, 2)
        depth.step()
    forwards(model, depth, calls)
    state = depth.state_dict()
    expected = forwards(model, depth, more)
    depth.step()
    expected += forwards(model, depth, more)

    again, resumed = gated(blocks=6)
    forwards(again, resumed, 5)
    resumed.load_state_dict(state)
    seen = forwards(again, resumed, more)
    resumed.step()
    assert seen + forwards(again, resumed, more) == expected


def test_the_global_generators_are_neither_read_nor_advanced() -> None:
    expected = forwards(*gated(), 10)
    torch.manual_seed(123)
    np.random.seed(123)
    random.seed(123)
    states = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()
    model, depth = gated()
    seen = forwards(model, depth, 10)
    depth.step()
    model.eval()(vectors(1, 8))
    assert seen == expected
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(
        np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True)
    )


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scale", ["eval", "train"])
def test_rate_zero_trains_as_without_the_library(name: str, scale: Any) -> None:
    models = []
    for with_library in (False, True):
        network, x = make(name)
        model = nn.Sequential(network, nn.Dropout(0.5))
        if with_library:
            sd.apply_stochastic_depth(model, 0.0, example_inputs=x, scale=scale)
        torch.manual_seed(2)
        train(model, sgd(model), x, 3)
        models.append(model)
    assert_same(*models)
    assert torch.equal(models[0].eval()(x), models[1].eval()(x))


# Steps, calls and what counts as one.


def test_each_forward_draws_anew_and_a_step_begins_a_new_sequence() -> None:
    model, depth = gated()
    seen = []
    for _ in range(10):
        seen += forwards(model, depth, 3)
        depth.step()
    # 256 patterns for 30 draws: the 28 below are what this seed gives; 1 would be a frozen draw.
    assert len({tuple(gates.values()) for gates in seen}) > 20


def test_redraw_step_has_one_draw_for_all_forwards_of_a_step() -> None:
    model, depth = gated(draw=sd.Draw(redraw="step"))
    steps = []
    for _ in range(20):
        seen = forwards(model, depth, 3)
        assert seen[0] == seen[1] == seen[2]
        steps.append(tuple(seen[0].values()))
        depth.step()
    assert len(set(steps)) > 10


def test_redraw_step_holds_for_every_call_of_a_shared_layer() -> None:
    model = settled(Shared).train()
    depth = sd.apply_stochastic_depth(
        model, 0.2, example_inputs=sequences(), draw=sd.Draw(redraw="step")
    )
    runs = count_calls(model.layer.norm)
    totals = []
    for _ in range(30):
        before = runs[0]
        model(sequences())
        totals.append(runs[0] - before)
        depth.step()
    assert set(totals) == {0, 6}


def count_calls(module: nn.Module) -> list[int]:
    count = [0]

    def add(module: nn.Module, args: object) -> None:
        count[0] += 1

    module.register_forward_pre_hook(add)
    return count


def test_a_shared_layer_draws_at_each_of_its_calls() -> None:
    model, twin = settled(Shared).train(), settled(Shared).train()
    depth, twin_depth = (
        sd.apply_stochastic_depth(m, 0.2, example_inputs=sequences()) for m in (model, twin)
    )
    runs = count_calls(model.layer.norm)
    totals = []
    for _ in range(20):
        before = runs[0]
        model(sequences())
        totals.append(runs[0] - before)
    # The six calls of a forward are the next six of the sequence, whoever makes them.
    singly = []
    for _ in range(20 * 6):
        twin.layer(vectors(1, 8))
        singly.append(twin_depth.last_gates["layer"])
    assert totals == [sum(singly[n : n + 6]) for n in range(0, 120, 6)]
    assert depth.last_gates == twin_depth.last_gates
    assert len(set(totals)) > 2


def test_a_shared_layer_of_torchs_own_draws_at_every_call() -> None:
    model, x = settled(Shared), sequences()
    model.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    depth = sd.apply_stochastic_depth(
        model, 0.2, "uniform", example_inputs=x, draw=sd.Draw(seed=1), scale="train"
    )
    calls: list[bool] = []
    model.layer.self_attn.register_forward_hook(lambda *_: calls.append(True))
    for _ in range(50):
        model(x)
    # 300 calls at 0.8: 240 are expected, and five standard deviations (7 each) are never seen.
    assert 205 < len(calls) < 275
    assert depth.last_gates.keys() == {"layer"}


def test_the_root_need_not_be_called() -> None:
    def prepared() -> tuple[Any, sd.StochasticDepth]:
        model = Wrapped().train()
        depth = sd.apply_stochastic_depth(model, 0.2, "uniform", example_inputs=vectors(1, 8))
        return model, depth

    (model, depth), (twin, twin_depth) = prepared(), prepared()
    seen, expected = [], []
    for _ in range(20):
        model.head(model.backbone(vectors(1, 8)))
        twin(vectors(1, 8))
        seen.append(depth.last_gates)
        expected.append(twin_depth.last_gates)
    assert seen == expected
    assert len({tuple(gates.values()) for gates in seen}) > 5

    # A block alone draws, too: the next of its sequence.
    for _ in range(20):
        model.backbone[5](vectors(1, 8))
        twin(vectors(1, 8))
        assert depth.last_gates["backbone.5"] == twin_depth.last_gates["backbone.5"]


OUTER = ["1", "2", "3"]
INNER = [f"{outer}.inner.{number}" for outer in OUTER for number in (0, 1)]


def nested_draws(outer_rate: float, redraw: Any = "forward") -> list[tuple[dict[str, bool], Gates]]:
    """For each training call: which outer blocks ran, and the inner gates that were drawn in it."""
    model = settled(nested).train()
    rates = {**dict.fromkeys(OUTER, outer_rate), "*.inner.*": 0.5}
    draw = sd.Draw(redraw=redraw)
    depth = sd.apply_stochastic_depth(model, rates, example_inputs=sequences(), draw=draw)
    seen = []
    for number in range(60):
        model(sequences())
        gates = depth.last_gates
        outer = {name: gates[name] for name in OUTER}
        seen.append((outer, {n: gates[n] for n in INNER if outer[n.partition(".")[0]]}))
        if number % 3 == 2:
            depth.step()
    return seen


@pytest.mark.parametrize("redraw", ["forward", "step"])
def test_dropping_an_outer_block_does_not_desynchronise_the_inner_ones(redraw: str) -> None:
    always_open, sometimes = nested_draws(0.0, redraw), nested_draws(0.5, redraw)
    # A gate that is not called, in a dropped block, does not count: its next draw is the next one.
    for name, first in itertools.product(INNER, range(0, 60, 3)):  # of each step the calls
        expected = [inner[name] for _, inner in always_open[first : first + 3]]
        seen = [inner[name] for _, inner in sometimes[first : first + 3] if name in inner]
        assert seen == expected[: len(seen)]
    for name in OUTER:
        ran = [outer[name] for outer, _ in sometimes]
        assert any(ran)
        assert not all(ran)
    if redraw == "forward":
        for name in INNER:
            assert len({inner[name] for _, inner in always_open}) == 2


def test_inner_gates_are_independent_of_the_outer_one_and_over_its_calls() -> None:
    seen = [
        [float(outer["1"]), float(inner["1.inner.0"])]
        for outer, inner in nested_draws(0.5)
        if "1.inner.0" in inner
    ]
    inner = torch.tensor(seen)[:, 1]
    # Half of some 30 draws: open in all or none of them would be a draw shared with the outer one.
    assert 5 < inner.sum() < len(inner) - 5


# What neither draws nor counts, and what does.


@pytest.mark.parametrize("unit", KINDS)
def test_fixed_disabled_and_eval_leave_the_sequence_and_last_gates_alone(unit: Any) -> None:
    def prepared() -> tuple[Any, sd.StochasticDepth]:
        model = settled(lambda: residuals(8, KINDS[unit])).train()
        depth = sd.apply_stochastic_depth(
            model, 0.5, "uniform", example_inputs=vectors(1, 8), unit=unit
        )
        return model, depth

    model, depth = prepared()
    assert depth.last_gates == {}
    with depth.fixed({"0": False}), depth.disabled():
        model(vectors(1, 8))
    assert depth.last_gates == {}
    seen = []
    for _ in range(10):
        seen += forwards(model, depth, 1)
        with depth.fixed(dict.fromkeys(map(str, range(8)), False)):
            model(vectors(1, 8))
        with depth.disabled():
            model(vectors(1, 8))
        model.eval()(vectors(1, 8))
        assert depth.last_gates == seen[-1]
    assert seen == forwards(*prepared(), 10)


def test_last_gates_are_named_after_what_is_drawn() -> None:
    def names(unit: Any, kind: type[nn.Module]) -> list[str]:
        model = residuals(6, kind)
        depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=vectors(1, 8), unit=unit)
        return list(forwards(model, depth, 1)[0])

    blocks = [str(block) for block in range(6)]
    assert names("block", Residual) == blocks
    assert names("block", TwoBranches) == blocks
    assert names("branch", Residual) == [f"{block}:0" for block in blocks]
    assert names("branch", TwoBranches) == [f"{block}:{n}" for block in blocks for n in (0, 1)]


def test_last_gates_tell_what_ran() -> None:
    model, depth = gated()
    runs = [count_calls(block.norm) for block in model]
    for _ in range(20):
        before = [count[0] for count in runs]
        (gates,) = forwards(model, depth, 1)
        ran = [count[0] - was for count, was in zip(runs, before, strict=True)]
        assert ran == [int(gates[str(block)]) for block in range(8)]


def test_last_gates_is_a_copy() -> None:
    model, depth = gated()
    forwards(model, depth, 1)
    before = depth.last_gates
    before.clear()
    assert len(depth.last_gates) == 8


def test_a_training_forward_under_no_grad_counts() -> None:
    expected = forwards(*gated(), 6)
    model, depth = gated()
    seen = []
    for context in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()) * 2:
        with context:
            seen += forwards(model, depth, 1)
    assert seen == expected


def test_a_forward_that_fails_disturbs_no_later_one() -> None:
    model, depth = gated()
    broken = torch.full((1, 8), 1.0, dtype=torch.float64)
    with depth.fixed({}), pytest.raises(RuntimeError):
        model.train()(broken)
    assert forwards(model, depth, 5) == forwards(*gated(), 5)


def test_a_block_in_eval_mode_is_open_and_draws_nothing() -> None:
    model, depth = gated()
    model.train()
    model[3].eval()
    seen = [(model(vectors(1, 8)), depth.last_gates)[1] for _ in range(10)]
    twin, twin_depth = gated()
    assert all("3" not in gates for gates in seen)
    assert seen == [
        {name: is_open for name, is_open in gates.items() if name != "3"}
        for gates in forwards(twin, twin_depth, 10)
    ]
