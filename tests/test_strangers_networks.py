"""Promise: a network that nobody here has seen before just works, and is exact."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
import strangers
from comparing import assert_same_gradients

pytestmark = pytest.mark.oldest


@dataclass(frozen=True)
class Case:
    """A network, the blocks that a person sees in it, and the module that ends each branch."""

    network: type[nn.Module]
    shape: tuple[int, ...]
    ends: dict[str, list[str]]
    whole: tuple[str, ...]  # the blocks that can return their input


CASES = [
    Case(
        strangers.PreActNet,
        (2, 3, 16, 16),
        {f"body.{i}": ["conv_b"] for i in range(6)},
        ("body.0", "body.1", "body.3", "body.5"),
    ),
    Case(
        strangers.UNet,
        (2, 3, 16, 16),
        {name: ["f"] for name in ("enc1", "enc2", "mid.0", "mid.1", "dec2", "dec1")},
        (),
    ),
    Case(strangers.InlineLoop, (2, 5, 4), {f"layers.{i}": ["0", "1"] for i in range(6)}, ()),
    Case(strangers.InlineLists, (2, 5, 4), {f"layers.{i}": [""] for i in range(6)}, ()),
    Case(
        strangers.NestedGroups,
        (2, 3, 8, 8),
        {
            name: [end]
            for i in range(3)
            for name, end in [
                (f"groups.{i}.blocks.0", "f"),
                (f"groups.{i}.blocks.1", "f"),
                (f"groups.{i}", "tail"),
            ]
        },
        ("groups.0", "groups.1", "groups.2"),
    ),
    Case(
        strangers.Matryoshka,
        (2, 5, 4),
        {
            name: [end]
            for i in range(4)
            for name, end in [(f"layers.{i}.part", "b"), (f"layers.{i}", "part")]
        },
        tuple(f"layers.{i}" for i in range(4)),
    ),
    Case(
        strangers.BesideNet,
        (2, 3, 8, 8),
        {
            name: [end]
            for i in range(2)
            for name, end in [
                (f"layers.{i}.local.0", "f"),
                (f"layers.{i}.local.1", "f"),
                (f"layers.{i}", "g"),
            ]
        },
        tuple(f"layers.{i}.local.{n}" for i in range(2) for n in range(2)),
    ),
    Case(
        strangers.MaskedNet,
        (2, 5, 4),
        {f"layers.{i}": ["out"] for i in range(6)},
        tuple(f"layers.{i}" for i in range(6)),
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.network.__name__)


def network(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return case.network(), torch.randn(case.shape)


@every_case
def test_blocks_are_found_and_skipped_the_cheapest_way(case: Case) -> None:
    model, x = network(case)
    blocks = sd.find_residual_blocks(model, x)
    assert {block.name for block in blocks} == set(case.ends)
    for block in blocks:
        assert len(block.branches) == len(case.ends[block.name])
        for branch, end in zip(block.branches, case.ends[block.name], strict=True):
            assert branch.modules[-1] == f"{block.name}.{end}".rstrip(".")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    rows = {line.split()[0]: line for line in str(depth).splitlines()[2:-1]}
    assert tuple(name for name in case.ends if "skipped whole" in rows[name]) == case.whole


@every_case
@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("training", [True, False])
def test_patterns(case: Case, unit: str, training: bool) -> None:
    plain, x = network(case)
    names = [
        f"{block}:{number}" for block, ends in case.ends.items() for number in range(len(ends))
    ]
    patterns = [set(names), set(names[::2]), set(names[1::2]), *({name} for name in names)]
    for dropped in patterns:
        if unit == "block":  # all branches of a block together
            dropped = {n for n in names if any(n.split(":")[0] == d.split(":")[0] for d in dropped)}
        gated = copy.deepcopy(plain).train(training)
        options = {"unit": unit, "scale": "none"}
        depth = sd.apply_stochastic_depth(gated, 0.2, example_inputs=x, **options)  # type: ignore[arg-type]
        reference = copy.deepcopy(plain).train(training)
        inside = set()
        for name in dropped:
            block, _, number = name.partition(":")
            end = f"{block}.{case.ends[block][int(number)]}".rstrip(".")
            reference.get_submodule(end).register_forward_hook(
                lambda module, args, output: torch.zeros_like(output)
            )
            inside |= {f"{end}.{p}" for p, _ in plain.get_submodule(end).named_parameters()}
        gates = dict.fromkeys(
            (name.split(":")[0] if unit == "block" else name for name in dropped), False
        )
        with depth.fixed(gates):
            mine = gated(x)
        theirs = reference(x)
        assert torch.equal(mine, theirs), dropped
        mine.square().sum().backward()
        theirs.square().sum().backward()
        # Where a whole group is skipped, three gradients meet in one place instead of two and
        # one: their sum is the same but for its last bit.
        rounding = 1e-6 if case.network is strangers.NestedGroups else 0.0
        assert_same_gradients(gated, reference, inside=inside.__contains__, rounding=rounding)


def test_a_shared_layer_draws_at_every_call() -> None:
    torch.manual_seed(0)
    model, x = strangers.SharedLayer(), torch.randn(2, 5, 4)
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


def test_merging_additions_are_no_blocks() -> None:
    """A skip around everything and additions of two streams are left alone."""
    model, x = network(CASES[1])
    names = {
        module
        for b in sd.find_residual_blocks(model, x)
        for r in b.branches
        for module in r.modules
    }
    assert not names & {"outc", "up1", "up2", "merge", "inc"}
    assert all(not a.startswith(f"{b}.") for a, b in itertools.permutations(names, 2)), (
        "the branches of a U-shaped net are apart"
    )
