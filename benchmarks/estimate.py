"""What `sd.estimate_saving` says beside what training steps then save, on the same machine.

    export PYTHONPATH=examples                # from a checkout
    python benchmarks/estimate.py             # some ten minutes on two cores
    python benchmarks/estimate.py bert        # one of them; nothing is written

Steps are forward and backward of the plain network and of one with stochastic depth, which take
turns in one process. Balanced draws, so that luck has little part in what was dropped.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import stochastic_depth as sd
from imagelib.cifar_resnet import CifarResNet
from interleaved import Step, ratio, sharing, take_turns, write


@dataclass(frozen=True)
class Case:
    """A network, what it is called with, and its drop rate."""

    make: Callable[[], nn.Module]
    example: Callable[[], Any]
    drop_rate: float


def resnet50() -> nn.Module:
    from torchvision.models import get_model

    return get_model("resnet50", weights=None, num_classes=10)


def vit() -> nn.Module:
    from timm import create_model

    return create_model("vit_tiny_patch16_224", num_classes=10, img_size=112)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=8, num_attention_heads=4,
        intermediate_size=1024, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config)


def _images(number: int, size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(number, 3, size, size)


CASES = {
    "resnet110": Case(lambda: CifarResNet(110), _images(16, 32), 0.5),
    "resnet50": Case(resnet50, _images(8, 96), 0.5),
    "vit_tiny": Case(vit, _images(16, 112), 0.4),
    "bert": Case(bert, lambda: {"input_ids": torch.randint(0, 1000, (8, 64))}, 0.4),
}
STEPS = 60


def training_step(model: nn.Module, example: Any) -> Step:
    """Forward and backward."""
    model.train()

    def step(number: int) -> None:
        model.zero_grad(set_to_none=True)
        output = model(**example)[0] if isinstance(example, dict) else model(example)
        output.float().square().mean().backward()

    return step


def measure(case: Case) -> dict[str, Any]:
    """The estimate, and what was saved."""
    torch.manual_seed(0)
    plain, example = case.make(), case.example()
    estimate = sd.estimate_saving(plain, case.drop_rate, example_inputs=example, timed=True)
    gated = sharing(plain)
    draw = sd.Draw(0, "balanced")
    depth = sd.apply_stochastic_depth(gated, case.drop_rate, example_inputs=example, draw=draw)
    seconds = take_turns(
        {"plain": training_step(plain, example), "gated": training_step(gated, example)}, STEPS
    )
    of_plain = ratio(seconds["gated"], seconds["plain"])
    counts = depth.statistics().values()
    return {
        "drop_rate": case.drop_rate,
        "estimated_flops": estimate.flops,
        "estimated_time": estimate.time,
        "saved_time": {
            "value": 1 - of_plain.value,
            "low": 1 - of_plain.high,
            "high": 1 - of_plain.low,
        },
        "dropped": sum(c.dropped for c in counts) / sum(c.calls for c in counts),
        "dropped_on_average": sum(b.drop_rate for b in depth.blocks) / len(depth.blocks),
    }


def main(names: Sequence[str]) -> None:
    warnings.simplefilter("ignore", sd.StochasticDepthWarning)
    found = {}
    for name in names or CASES:
        found[name] = measure(CASES[name])
        print(name, found[name], flush=True)
    if not names:
        print(write("estimate", {"steps": STEPS, "models": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
