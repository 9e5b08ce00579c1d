"""Promise: the presets do what their sources say, number by number."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import stochastic_depth as sd
from comparing import rates
from networks import WIDTH, Residual, batch, make, residuals, settled, vectors
from stochastic_depth.schedules import Progressive
from twins import Factor, of_blocks, pre_norm

oldest = pytest.mark.oldest
Preset = Callable[..., sd.StochasticDepth]
X = vectors(4, WIDTH)
PIXELS = vectors(2, 3, 32, 32, seed=0)

both_presets = pytest.mark.parametrize("preset", [sd.apply_drop_path, sd.apply_layer_drop])


def survival(depth: sd.StochasticDepth) -> list[float]:
    return [block.survival_probability for block in depth.blocks]


def at_step(depth: sd.StochasticDepth, step: int) -> sd.StochasticDepth:
    depth.load_state_dict({**depth.state_dict(), "step": step})
    return depth


def of_layers(factors: Sequence[float]) -> Factor:
    """A factor for both sub-layers of each layer; 0 where it is dropped."""
    return of_blocks({f"layers.{number}": factor for number, factor in enumerate(factors)})


# Drop path, as in timm.


@pytest.mark.parametrize(
    ("name", "options", "in_a_block"),
    [("vit_tiny_patch16_224", {"img_size": 32}, 2), ("convnext_atto", {}, 1)],
)
def test_drop_path_has_timms_rates(name: str, options: dict[str, Any], in_a_block: int) -> None:
    timm = pytest.importorskip("timm")
    timms_own = timm.create_model(name, drop_path_rate=0.1, **options)
    depth = sd.apply_drop_path(timm.create_model(name, **options), 0.1, example_inputs=PIXELS)
    assert len(depth.blocks) == 12
    for number, block in enumerate(depth.blocks):
        assert block.drop_rate == pytest.approx(0.1 * number / 11, rel=1e-12)
        theirs = [
            module.drop_prob
            for module in timms_own.get_submodule(block.name).modules()
            if type(module).__name__ == "DropPath"
        ]
        # timm builds none where the rate is 0, and its numbers come out of a float32 linspace.
        assert theirs == pytest.approx([block.drop_rate] * (in_a_block if number else 0), rel=1e-6)


@oldest
def test_drop_path_draws_for_each_branch_and_leaves_inference_alone() -> None:
    plain, x = make("pre-norm")
    model = copy.deepcopy(plain)
    depth = sd.apply_drop_path(model, 0.3, example_inputs=x)
    assert 'unit="branch", scale="train"' in str(depth)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    model.train()(x)
    assert list(depth.last_gates) == [f"layers.{n}:{branch}" for n in range(6) for branch in (0, 1)]


@oldest
def test_drop_path_drops_rows_and_scales_the_others() -> None:
    """Each row is what one of the possible patterns gives, with `1 / (1 - p)` written by hand."""
    plain, x = settled(lambda: residuals(3)), vectors(64, WIDTH)
    model = copy.deepcopy(plain)
    sd.apply_drop_path(model, 0.2, example_inputs=x)
    patterns = []
    for factors in itertools.product([1.0], [0.0, 1 / 0.9], [0.0, 1 / 0.8]):
        y = x
        for block, factor in zip(plain, factors, strict=True):
            y = y + factor * block.linear(F.gelu(block.norm(y)))
        patterns.append(y)
    seen = torch.zeros(4)
    for _ in range(12):
        output = model.train()(x)
        matched = [torch.isclose(output, y, rtol=1e-4, atol=1e-5).all(1) for y in patterns]
        assert torch.equal(torch.stack(matched).sum(0), torch.ones(64, dtype=torch.long))
        seen += torch.tensor([float(rows.sum()) for rows in matched])
    assert seen.gt(0).all()


# LayerDrop (Fan et al. 2019).


@oldest
def test_layer_drop_has_one_rate_and_no_scale_and_a_gate_for_each_layer() -> None:
    plain, x = make("pre-norm")
    model = copy.deepcopy(plain)
    depth = sd.apply_layer_drop(model, 0.4, example_inputs=x)
    assert rates(depth) == {f"layers.{number}": 0.4 for number in range(6)}
    assert torch.equal(model.eval()(x), plain.eval()(x))
    patterns = set()
    for number in range(8):
        y = batch(x, number)
        output = model.train()(y)
        assert list(depth.last_gates) == [f"layers.{number}" for number in range(6)]
        assert torch.equal(output, pre_norm(plain, y, of_blocks(depth.last_gates)))
        patterns.add(tuple(depth.last_gates.values()))
    assert len(patterns) > 1


# Progressive Layer Dropping (Zhang & He 2020).

# theta(t) = (1 - theta) exp(-gamma t) + theta; p_i(t) = 1 - i / 12 * (1 - theta(t)).
# Each line: theta, gamma, t, and p_i(t) of some layers i.
PROGRESSIVE = [
    (0.5, 0.001, 0, {0: 1.0, 1: 1.0, 11: 1.0}),
    (0.5, 0.001, 1000, {0: 1.0, 1: 0.97366164338, 6: 0.84196986029, 11: 0.71027807720}),
    (0.5, 0.001, 5000, {0: 1.0, 6: 0.75168448675, 11: 0.54475489237}),
    (0.5, 0.001, 10**6, {0: 1.0, 6: 0.75, 11: 0.54166666667}),
    (0.2, 0.01, 50, {0: 1.0, 4: 0.89507484259, 9: 0.76391839583}),
    (0.5, 0.0, 10**6, {0: 1.0, 11: 1.0}),
    (1.0, 0.001, 1000, {0: 1.0, 11: 1.0}),
]


@oldest
@pytest.mark.parametrize(("theta", "gamma", "step", "expected"), PROGRESSIVE)
def test_progressive_layer_dropping_has_the_papers_survival_probabilities(
    theta: float, gamma: float, step: int, expected: dict[int, float]
) -> None:
    model = residuals(12)
    depth = sd.apply_progressive_layer_dropping(model, theta, gamma, example_inputs=X)
    found = survival(at_step(depth, step))
    assert {i: found[i] for i in expected} == pytest.approx(expected, rel=1e-9)


@oldest
def test_its_defaults_are_deepspeeds() -> None:
    given = sd.apply_progressive_layer_dropping(residuals(12), 0.5, 0.001, example_inputs=X)
    default = sd.apply_progressive_layer_dropping(residuals(12), example_inputs=X)
    assert survival(at_step(given, 1000)) == survival(at_step(default, 1000))


@oldest
def test_its_first_layer_always_runs() -> None:
    model = residuals(12)
    depth = at_step(
        sd.apply_progressive_layer_dropping(model, 0.1, example_inputs=X, draw=sd.Draw(seed=3)),
        10**5,
    )
    seen = []
    for _ in range(60):
        model.train()(X)
        seen.append(depth.last_gates)
    assert all(gates["0"] for gates in seen)
    # 0.175 survival: 60 draws, all the same, come once in 100,000 times
    assert {gates["11"] for gates in seen} == {True, False}


@oldest
def test_one_gate_decides_about_a_layer_and_both_sub_layers_are_divided_by_its_own_p() -> None:
    plain, x = make("pre-norm")
    model = copy.deepcopy(plain)
    depth = sd.apply_progressive_layer_dropping(model, 0.5, gamma=0.1, example_inputs=x)
    for _ in range(10):
        depth.step()
    theta = 0.5 * math.exp(-1.0) + 0.5
    p = [1 - i / 6 * (1 - theta) for i in range(7)]
    assert survival(depth) == pytest.approx(p[:6])
    assert torch.equal(model.eval()(x), plain.eval()(x))
    patterns = set()
    for number in range(8):
        y = batch(x, number)
        output = model.train()(y)
        gates = depth.last_gates
        assert list(gates) == [f"layers.{number}" for number in range(6)]
        patterns.add(tuple(gates.values()))
        own = [kept / p[i] for i, kept in enumerate(gates.values())]
        torch.testing.assert_close(output, pre_norm(plain, y, of_layers(own)), rtol=1e-5, atol=1e-5)
        # The public code passes the next layer's p on.
        next_ones = [kept / p[i + 1] for i, kept in enumerate(gates.values())]
        assert not torch.allclose(
            output, pre_norm(plain, y, of_layers(next_ones)), rtol=1e-3, atol=1e-3
        )
    assert len(patterns) > 1


@oldest
def test_a_schedule_of_the_users_multiplies() -> None:
    def full(step: int) -> float:
        return 0.5 * (1 - math.exp(-0.001 * step)) * 6 / 12  # of layer 6

    def rate(step: int, schedule: Any) -> float:
        depth = sd.apply_progressive_layer_dropping(
            residuals(12), schedule=schedule, example_inputs=X
        )
        return at_step(depth, step).blocks[6].drop_rate

    assert rate(1000, None) == pytest.approx(full(1000))
    assert rate(1000, sd.linear_warmup(4000)) == pytest.approx(full(1000) / 4)
    assert rate(1000, lambda step: 0.5) == pytest.approx(full(1000) / 2)
    assert rate(1000, {"6": sd.constant(0.5)}) == pytest.approx(full(1000) / 2)
    assert rate(1000, {"7": sd.constant(0.5)}) == pytest.approx(full(1000))
    assert rate(1000, {}) == pytest.approx(full(1000))
    late = {"6": sd.constant(0.1), "*": sd.constant(0.5)}  # later keys override earlier ones
    assert rate(1000, late) == pytest.approx(full(1000) / 2)


@oldest
def test_its_schedule_can_be_pickled_copied_and_read() -> None:
    model = residuals(12)
    depth = at_step(
        sd.apply_progressive_layer_dropping(
            model, schedule=sd.linear_warmup(4000), example_inputs=X
        ),
        1000,
    )
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert survival(sd.get_stochastic_depth(twin)) == survival(depth)
    schedule = Progressive(gamma=0.001)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert repr(schedule) == "Progressive(gamma=0.001)"
    assert repr(schedule * sd.constant(0.5)) == "Progressive(gamma=0.001) * constant(0.5)"


# What cannot be.

LAYER_DROP: Any = sd.apply_layer_drop
PROGRESSIVE_DROP: Any = sd.apply_progressive_layer_dropping


@oldest
@pytest.mark.parametrize(
    ("call", "says"),
    [
        *(
            (
                lambda m, v=value: PROGRESSIVE_DROP(m, v, example_inputs=X),
                (f"theta is {value!r}", "above 0 and at most 1", "pass 0.5"),
            )
            for value in (0, 0.0, 1.5, -0.5, float("nan"), True, "0.5", None)
        ),
        *(
            (
                lambda m, v=value: PROGRESSIVE_DROP(m, gamma=v, example_inputs=X),
                (f"gamma is {value!r}", "0 or more", "100 / T"),
            )
            for value in (-0.001, float("inf"), "fast", None)
        ),
        *(
            (
                lambda m, p=preset, v=value: p(m, v, example_inputs=X),
                (f"drop_rate is {value!r}", 'or "model"', "sd.apply_stochastic_depth"),
            )
            for preset in (sd.apply_drop_path, sd.apply_layer_drop)
            for value in ("modle", None, [0.1] * 8, {"0": 0.1}, True)
        ),
        (
            lambda m: LAYER_DROP(m, 1.0, example_inputs=X),
            ("drop_rate is 1.0", "from 0 up to, but not including, 1"),
        ),
        (
            lambda m: LAYER_DROP("resnet", "model"),
            ("model is a str", "a torch.nn.Module"),
        ),
        (
            lambda m: LAYER_DROP(m, "model", example_inputs=X),
            ('drop_rate is "model"', "no drop path or layerdrop of Sequential", "a number"),
        ),
        (
            lambda m: PROGRESSIVE_DROP(m, schedule=3, example_inputs=X),
            ("schedule is 3", "a function of the optimizer step"),
        ),
        (
            lambda m: PROGRESSIVE_DROP(m, schedule={"3": 3}, example_inputs=X),
            ("schedule['3'] is 3", "a function of the optimizer step"),
        ),
    ],
)
def test_refused_with_its_reason(call: Callable[[Any], Any], says: tuple[str, ...]) -> None:
    model = residuals(8)
    with pytest.raises(sd.OptionError) as caught:
        call(model)
    for part in says:
        assert part in str(caught.value)
    assert all(type(block) is Residual for block in model)
