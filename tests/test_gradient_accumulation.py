"""Promise: accumulated gradients are the sum over the microbatches, each as it was drawn.

A gradient is None where no microbatch ran the block, and only there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import batch, gated

pytestmark = pytest.mark.oldest

NAMES = ("resnet", "pre-norm", "post-norm", "explicit")
MODES: dict[str, dict[str, Any]] = {
    "batch": {},
    "by branch": {"unit": "branch"},
    "rows": {"mode": "sample"},
    "rows by branch": {"mode": "sample", "unit": "branch"},
}
Gradients = dict[str, Tensor | None]
MICROBATCHES, STEPS = 3, 4


def gradients(model: nn.Module) -> Gradients:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def together(parts: Iterable[Gradients]) -> Gradients:
    """Summed in their order, as autograd does; None where all are."""
    total: Gradients = {}
    for part in parts:
        for name, gradient in part.items():
            before = total.get(name)
            total[name] = (
                before if gradient is None else gradient if before is None else before + gradient
            )
    return total


def same(mine: Tensor | None, other: Tensor | None) -> bool:
    return mine is other if mine is None or other is None else torch.equal(mine, other)


def comparable(gates: dict[str, Any]) -> str:
    return str(
        {name: gate if isinstance(gate, bool) else list(gate) for name, gate in gates.items()}
    )


@pytest.mark.parametrize("redraw", ["forward", "step"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_the_sum_is_that_of_the_microbatches(name: str, mode: str, redraw: Any) -> None:
    model, x, depth = gated(name, 0.7, draw=sd.Draw(seed=2, redraw=redraw), **MODES[mode])
    single = copy.deepcopy(model)  # opens the same gates at the same calls
    own = sd.get_stochastic_depth(single)
    untouched = touched_by_some = 0
    drawn = []
    for step in range(STEPS):
        model.zero_grad()
        parts, gates = [], []
        for number in range(MICROBATCHES):
            data = batch(x, MICROBATCHES * step + number)
            (model(data).square().mean() / MICROBATCHES).backward()
            gates.append(comparable(depth.last_gates))
            single.zero_grad()
            (single(data).square().mean() / MICROBATCHES).backward()
            parts.append(gradients(single))
            assert comparable(own.last_gates) == gates[-1]
        ours, theirs = gradients(model), together(parts)
        assert ours.keys() == theirs.keys()
        assert all(same(ours[parameter], theirs[parameter]) for parameter in ours)
        assert (len(set(gates)) == 1) == (redraw == "step")
        drawn.append(gates[0])
        ran = [[part[n] is not None for part in parts] for n in parts[0]]
        untouched += sum(not any(each) for each in ran)
        touched_by_some += sum(any(each) and not all(each) for each in ran)
        depth.step()  # the copy follows
    assert len(set(drawn)) > 1  # another step, another draw
    if not mode.startswith("rows"):
        assert untouched, "every block ran: the case shows nothing"
        assert bool(touched_by_some) == (redraw == "forward")


@pytest.mark.parametrize("mode", ["batch", "rows"])
@pytest.mark.parametrize("name", NAMES)
def test_none_only_where_no_microbatch_ran_the_block(name: str, mode: str) -> None:
    model, x, depth = gated(name, 0.7, scale="none", **MODES[mode])
    first, second, *others = [block.name for block in depth.blocks]
    patterns = [{first: True, second: False}, {first: False, second: False}]
    for number, pattern in enumerate(patterns):
        with depth.fixed({**dict.fromkeys(others, False), **pattern}):
            model(batch(x, number)).square().mean().backward()
    for parameter, gradient in gradients(model).items():
        inside = [block for block in (first, second, *others) if parameter.startswith(f"{block}.")]
        if inside and "downsample" not in parameter and name != "post-norm":
            # A norm behind the sum and a projection are used by what is handed on.
            assert (gradient is None) == (inside != [first]), parameter
        elif "mlp" in parameter or "attention" in parameter:
            assert (gradient is None) == (inside != [first]), parameter
        elif "embed" in parameter or "stem" in parameter or "head" in parameter:
            assert gradient is not None, parameter


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_one_backward_for_all_microbatches(name: str, mode: str) -> None:
    model, x, depth = gated(name, 0.7, draw=sd.Draw(seed=2), **MODES[mode])
    twin = copy.deepcopy(model)
    data = [batch(x, number) for number in range(MICROBATCHES)]
    for each in data:
        model(each).square().sum().backward()
    torch.stack([twin(each).square().sum() for each in data]).sum().backward()
    for (parameter, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), parameter
        if ours.grad is not None:
            # The last microbatch comes first then: the sum has another order.
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert comparable(depth.last_gates) == comparable(sd.get_stochastic_depth(twin).last_gates)
