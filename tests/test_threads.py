"""Promise: a decision belongs to a call, so threads may run the model at the same time."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from networks import assert_same, batch, make, sgd

pytestmark = pytest.mark.oldest


def test_inference_from_several_threads() -> None:
    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, unit="branch")
    model.eval()
    inputs = [torch.randn(number + 1, 5, 3) for number in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    # What one thread forces is not forced in another.
    with torch.no_grad(), depth.fixed({depth.blocks[1].branches[0].name: False}):
        assert not any(map(torch.equal, map(model, inputs), expected))
        wrong: list[int] = []

        def infer(number: int, x: Tensor) -> None:
            with torch.no_grad():
                wrong.extend(
                    number for _ in range(40) if not torch.equal(model(x), expected[number])
                )

        threads = [threading.Thread(target=infer, args=item) for item in enumerate(inputs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


OPTIONS: dict[str, dict[str, Any]] = {
    "batch": {"draw": sd.Draw(seed=1)},
    "rows": {"draw": sd.Draw(seed=1), "mode": "sample", "scale": "eval"},
}


@pytest.mark.parametrize(
    ("name", "options"), [("resnet", "batch"), ("post-norm", "rows"), ("explicit", "batch")]
)
def test_inference_of_copies_while_another_thread_trains(name: str, options: str) -> None:
    """Of a deepcopied average, whose clock is that of the training, and of a folded one.

    The training is, to the last bit, what it is alone.
    """

    def prepare() -> tuple[Any, Tensor, torch.optim.Optimizer]:
        model, x = make(name)
        depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, **OPTIONS[options])
        optimizer = sgd(model)
        depth.follow(optimizer)
        return model.train(), x, optimizer

    def train(model: Any, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
        for number in range(20):
            optimizer.zero_grad()
            run = checkpoint(model, batch(x, number), use_reentrant=False)
            run.square().mean().backward()
            optimizer.step()

    alone, x, optimizer = prepare()
    train(alone, x, optimizer)

    model, x, optimizer = prepare()
    average = copy.deepcopy(model).eval()
    folded = copy.deepcopy(average)
    sd.get_stochastic_depth(folded).fold()
    with torch.no_grad():
        expected = {copied: copied(x) for copied in (average, folded)}
    stop, count = threading.Event(), [0]
    wrong: list[Any] = []

    def infer() -> None:
        with torch.no_grad():
            while not stop.is_set():
                count[0] += 1
                wrong.extend(m for m, seen in expected.items() if not torch.equal(m(x), seen))

    threads = [threading.Thread(target=infer) for _ in range(2)]
    for thread in threads:
        thread.start()
    train(model, x, optimizer)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert count[0] > 2
    assert_same(model, alone)
