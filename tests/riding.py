"""A training of a plain loop that saves its model and its optimizer, and nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import stochastic_depth as sd
from networks import make

KEY = "stochastic_depth"
Optimizer = Callable[..., torch.optim.Optimizer]


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def images() -> torch.Tensor:
    return make("resnet")[1]


def network() -> Any:
    return make("resnet")[0]


def train(model: nn.Module) -> None:
    model.train()(images()).square().mean().backward()


class Run:
    """A training of a plain loop, which saves its model and its optimizer, and no more."""

    def __init__(self, make_optimizer: Optimizer = momentum, rate: float = 0.5, **options: Any):
        torch.manual_seed(0)
        self.model = network().train()
        options = {"schedule": sd.linear_warmup(10), **options}
        self.depth = sd.apply_stochastic_depth(self.model, rate, example_inputs=images(), **options)
        self.optimizer = make_optimizer(self.model.parameters())
        self.depth.follow(self.optimizer)

    def steps(self, count: int) -> list[dict[str, bool]]:
        drawn = []
        for _ in range(count):
            train(self.model)
            drawn.append(self.depth.last_gates)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return drawn

    def saved(self) -> Any:
        return through_a_file(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        )

    def load(self, saved: Any) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
