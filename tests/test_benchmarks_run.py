"""Promise: the benchmarks measure what they say: they run, and their arithmetic is right."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gates
from coveragelib.predictable import predictable_dropout
from gates_contests import Contest, open_and_closed
from gates_networks import ByHand, skip_path
from imagelib.cifar_resnet import CifarResNet


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark sets their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_case_runs(capsys: pytest.CaptureFixture[str]) -> None:
    gates.main(["keywords", "--repetitions", "2"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("called with keywords ")
    assert "calls of a Linear per gate, at most 3" in second


def test_blocks_are_left_out_by_hand() -> None:
    model, x = CifarResNet(20).train(), torch.randn(2, 3, 8, 8)
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    whole = [name for name, _ in model.named_modules()]
    by_hand = ByHand(model, names, skip_path)
    by_hand.leave_out({"layer1.1", "layer2.0"})
    assert [*model.layer1._modules] == ["0", "2"]
    assert isinstance(left := model.layer2[0], torch.nn.Sequential)
    assert type(left[0]).__name__ == "PaddedShortcut"
    assert model(x).shape == (2, 10)
    by_hand.leave_out(set())
    assert [name for name, _ in model.named_modules()] == whole


def test_open_and_closed_gates_are_told_apart() -> None:
    def contest(rate: float) -> Contest:
        dropped = np.random.default_rng(0).binomial(54, rate, size=200) / 54
        costs = 5.0 * (1 - dropped) + 1.0 * dropped
        seconds = {
            "twin": np.ones(200),
            "gated": 1 + 54 * costs * 1e-3,
            "linear": np.full(200, 1e-3),
        }
        return Contest(54, dropped, seconds)

    is_open, closed = open_and_closed(contest(0.2), contest(0.8))
    assert is_open.value == pytest.approx(5.0, abs=0.1)
    assert closed.value == pytest.approx(1.0, abs=0.1)
    assert is_open.low <= is_open.value <= is_open.high


def test_dropout_that_two_runs_can_be_compared_under() -> None:
    x = torch.randn(3, 5)
    layer = torch.nn.Dropout(0.5)
    with predictable_dropout():
        first, again, other = layer(x), layer(x), layer(torch.randn(4, 5))
        assert torch.equal(layer.eval()(x), x)
    assert torch.equal(first, again)
    assert bool((first == 0).any())
    assert torch.equal(first[first != 0], 2 * x[first != 0])
    assert bool((other != 0).any())
    with predictable_dropout(acts=False):
        assert torch.equal(layer.train()(x), x)
    q = torch.randn(1, 2, 3, 4)
    with predictable_dropout():
        kept = F.scaled_dot_product_attention(q, q, q, dropout_p=0.9)
    torch.testing.assert_close(kept, F.scaled_dot_product_attention(q, q, q))
    assert not torch.equal(layer(x), layer(x))
