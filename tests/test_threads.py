"""Promise: a decision belongs to a call, so threads may run the model at the same time."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import stochastic_depth as sd
from networks import make

pytestmark = pytest.mark.oldest


def test_inference_from_several_threads() -> None:
    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, unit="branch")
    model.eval()
    inputs = [torch.randn(number + 1, 5, 3) for number in range(4)]
    with torch.no_grad(), depth.fixed({depth.blocks[1].branches[0].name: False}):
        expected = [model(x) for x in inputs]
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
