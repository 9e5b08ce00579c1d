"""Promise: of branches inside of each other, written in one forward, the outer one is gated, and
the block says so; of branches that one module ends, each is multiplied once.
"""

from __future__ import annotations

import pytest
from torch import nn

import stochastic_depth as sd
from layers import Interlaced
from networks import WIDTH, residuals, vectors
from stochastic_depth.discovery import watch
from streams import Joint, JointBlock, OneLayer, Streams

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning"),
]


def test_the_inner_one_is_left_out_and_named() -> None:
    found = sd.find_residual_blocks(residuals(6, Interlaced), vectors(3, WIDTH))
    assert [block.left_out for block in found] == [(f"{n}.f",) for n in range(6)]


@pytest.mark.parametrize("joint", [Joint, OneLayer])
def test_one_module_that_ends_two_branches(joint: type[nn.Module]) -> None:
    model = Streams(lambda: JointBlock(joint))
    found, _ = watch(model, vectors(4, 3), None)
    for block in found.blocks:
        assert block.branches_leak  # so that both are drawn together
        assert block.refusal is None
        ends = [(b.modules[place], own) for b in block.branches for place, own in b.branch_outputs]
        attn = f"{block.name}.joint"
        assert ends == [(attn, 0), (attn, 1)]
        assert [branch.unscalable for branch in block.branches] == [None, None]
        parts = ("a", "b") if joint is Joint else ("mix", "mix")
        assert [branch.fold.parameters for branch in block.branches] == [
            (f"{attn}.{part}.bias", f"{attn}.{part}.weight") for part in parts
        ]
