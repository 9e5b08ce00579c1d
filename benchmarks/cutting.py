"""What is left when blocks are taken out: trained plain, with layer drop, with drop path.

    PYTHONPATH=examples python benchmarks/cutting.py            # some ten minutes
    PYTHONPATH=examples python benchmarks/cutting.py digits     # some seconds; nothing is written

A residual MLP on scikit-learn's digits, 6 blocks, 5 seeds; and a transformer of 8 layers on the
characters of a play, 3 seeds. Each is trained once in each way, and then pruned, evenly, without
any training after it. Beside them stands a network that had so many blocks from the beginning.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from imagelib.image_data import read_image_data
from interleaved import write
from textlib.contender import cross_entropy, held_out_loss
from textlib.gpt import GPT
from textlib.options import SHIPPED
from textlib.text_data import read_text
from textlib.windows import Windows

Trained = Callable[[nn.Module], None]
WAYS: dict[str, Callable[[nn.Module, Tensor], sd.StochasticDepth] | None] = {
    "plain": None,
    "layer drop, 0.2": lambda model, x: sd.apply_layer_drop(model, 0.2, example_inputs=x),
    "layer drop, 0.5": lambda model, x: sd.apply_layer_drop(model, 0.5, example_inputs=x),
    "drop path, 0.2": lambda model, x: sd.apply_drop_path(model, 0.2, example_inputs=x),
}
FROM_THE_START = "so many blocks from the start"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Digits:
    """A residual MLP on handwritten digits."""

    blocks, keep, seeds = 6, (6, 5, 4, 3, 2), range(5)
    measure = "test loss, nats"

    def __init__(self) -> None:
        data = read_image_data("digits")
        self.train = self._floats(data.train.pixels), data.train.labels
        self.test = self._floats(data.test.pixels), data.test.labels
        self.example = self.train[0][:4]

    @staticmethod
    def _floats(pixels: Tensor) -> Tensor:
        return pixels[:, 0].flatten(1).float() / 255 - 0.5

    def network(self, blocks: int) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), *(Block(64) for _ in range(blocks)),
                             nn.LayerNorm(64), nn.Linear(64, 10))  # fmt: skip

    def fit(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        order = torch.Generator().manual_seed(seed)
        for _ in range(600):
            chosen = torch.randint(len(self.train[0]), (64,), generator=order)
            optimizer.zero_grad()
            F.cross_entropy(model(self.train[0][chosen]), self.train[1][chosen]).backward()
            optimizer.step()

    def loss(self, model: nn.Module) -> float:
        with torch.no_grad():
            return F.cross_entropy(model.eval()(self.test[0]), self.test[1]).item()


class Characters:
    """A small transformer that predicts the characters of a play."""

    blocks, keep, seeds = 8, (8, 6, 4, 2), range(3)
    measure = "held-out loss, nats per character"

    def __init__(self) -> None:
        self.text = read_text(SHIPPED, "char", 32)
        self.windows = Windows(self.text, 32, 16, seed=0)
        self.example = self.windows.example(2)

    def network(self, blocks: int) -> nn.Module:
        return GPT(self.text.vocabulary, 32, blocks, 64, 4)

    def fit(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        windows = Windows(self.text, 32, 16, seed)
        for step in range(800):
            batch = windows.for_training(step)
            optimizer.zero_grad()
            cross_entropy(model(batch.tokens), batch.following).backward()
            optimizer.step()

    def loss(self, model: nn.Module) -> float:
        return held_out_loss(model, self.windows.held_out())


TASKS: dict[str, Callable[[], Digits | Characters]] = {"digits": Digits, "characters": Characters}


def losses(task: Digits | Characters, seed: int) -> dict[str, list[float]]:
    """For each way, the loss with each number of blocks."""
    found: dict[str, list[float]] = {}
    for name, drop in WAYS.items():
        model, optimizer = _start(task, task.blocks, seed)
        depth = drop(model, task.example) if drop else None
        if depth:
            depth.follow(optimizer)
        task.fit(model.train(), optimizer, seed)
        plain = depth.fold() if depth else model
        found[name] = [
            task.loss(sd.prune(copy.deepcopy(plain), keep, example_inputs=task.example))
            for keep in task.keep
        ]
    found[FROM_THE_START] = []
    for keep in task.keep:
        model, optimizer = _start(task, keep, seed)
        task.fit(model.train(), optimizer, seed)
        found[FROM_THE_START].append(task.loss(model))
    return found


def _start(
    task: Digits | Characters, blocks: int, seed: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = task.network(blocks)
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


def over_seeds(runs: Sequence[dict[str, list[float]]]) -> dict[str, list[dict[str, float]]]:
    """Mean and standard error of each figure."""
    return {
        way: [
            {"mean": mean(each), "error": stdev(each) / len(each) ** 0.5}
            for each in zip(*(run[way] for run in runs), strict=True)
        ]
        for way in runs[0]
    }


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in names or TASKS:
        task = TASKS[name]()
        runs = [losses(task, seed) for seed in task.seeds]
        found = over_seeds(runs)
        sizes = {"blocks": list(task.keep), "seeds": len(runs), "measure": task.measure}
        results[name] = {**sizes, "loss": found}
        for way, row in found.items():
            cells = (f"{each['mean']:.3f} ± {each['error']:.3f}" for each in row)
            print(f"{name}, {way}: {', '.join(cells)}", flush=True)
    if not names:
        print(write("cutting", results))


if __name__ == "__main__":
    main(sys.argv[1:])
