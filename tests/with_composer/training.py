"""A small training with Composer's Trainer, and what can be seen of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composer import Trainer
from composer.core import Algorithm, Callback, State
from composer.loggers import InMemoryLogger, Logger
from composer.models import ComposerClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models.resnet import Bottleneck, ResNet

import stochastic_depth as sd
from stochastic_depth.integrations.composer import StochasticDepth

CLASSES, PIXELS = 4, 32


def network(blocks: Sequence[int] = (2, 2, 2, 2)) -> ResNet:
    torch.manual_seed(0)
    return ResNet(Bottleneck, list(blocks), num_classes=CLASSES, width_per_group=16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def classifier() -> ComposerClassifier:
    """A network without convolutions, so that nobody can guess an example."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), *(Block() for _ in range(6)), nn.Linear(8, 3))
    return ComposerClassifier(network, num_classes=3)


def images(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    return torch.randn(number, 3, PIXELS, PIXELS, generator=generator), labels


def loader(batches: int = 4, batch_size: int = 4, *, shuffle: bool = False) -> DataLoader[Any]:
    data: Dataset[Any] = TensorDataset(*images(batches * batch_size))
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle)


class Watch(Callback):
    """Notes at every batch which gates were open, and the rate that the gates then had."""

    def __init__(self, algorithm: StochasticDepth) -> None:
        self.algorithm = algorithm
        self.gates: list[dict[str, Any]] = []
        self.rates: list[float] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        self.rates.append(self.algorithm.depth.blocks[-1].drop_rate)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.gates.append(self.algorithm.depth.last_gates)


def drawn(
    network: nn.Module, example: Any, steps: int, *, forwards: int = 1, **options: Any
) -> list[dict[str, Any]]:
    """The gates of each forward, as a plain network draws them with the Trainer's seed."""
    settings: dict[str, Any] = {"drop_rate": 0.5, "draw": sd.Draw(7), **options}
    depth = sd.apply_stochastic_depth(network.train(), example_inputs=example, **settings)
    found = []
    for _ in range(steps):
        for _ in range(forwards):
            with torch.no_grad():
                network(**example) if isinstance(example, dict) else network(example)
            found.append(depth.last_gates)
        depth.step()
    return found


def trainer(
    *algorithms: Algorithm,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer on the CPU, with a seed, that shows nothing."""
    if model is None:
        model = ComposerClassifier(network(), num_classes=CLASSES)
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    settings: dict[str, Any] = {
        "train_dataloader": loader(),
        "max_duration": "2ep",
        "seed": 7,
        "device": "cpu",
        "progress_bar": False,
        "loggers": InMemoryLogger(),
    }
    return Trainer(
        model=model, algorithms=list(algorithms), optimizers=optimizer, **(settings | options)
    )


def logged(of: Trainer, name: str) -> list[float]:
    """The values of a metric, at every batch."""
    memory = next(d for d in of.logger.destinations if isinstance(d, InMemoryLogger))
    return [float(value) for _, value in memory.data[f"stochastic_depth/{name}"]]
