"""How to train: the recipe of He et al. and Huang et al. for CIFAR, and times such as "0.1dur".

SGD with Nesterov momentum 0.9 and weight decay 1e-4; a learning rate that is divided by ten after
half and after three quarters of the training.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn


def sgd(model: nn.Module, learning_rate: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(), learning_rate, momentum=0.9, weight_decay=1e-4, nesterov=True
    )


def learning_rate(base: float, step: int, total_steps: int) -> float:
    if step >= 0.75 * total_steps:
        return base / 100
    return base / 10 if step >= 0.5 * total_steps else base


@dataclass(frozen=True)
class Time:
    """A stretch of training: a share of it ("dur"), epochs ("ep") or optimizer steps ("ba")."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Time":
        """Reads "0.1dur", "5ep", "1000ba" or "1000".

        >>> Time.parse("0.1dur").steps(epochs=20, steps_per_epoch=100)
        200
        """
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(dur|ep|ba|)", text.strip())
        if match is None:
            raise ValueError(f"{text!r} is no time; write 0.1dur, 5ep, 1000ba or a number of steps")
        value, unit = float(match[1]), match[2] or "ba"
        if unit == "dur" and value > 1:
            raise ValueError(f"{text!r} is longer than the training: dur is a share of it, 0 to 1")
        if unit != "dur" and not value.is_integer():
            raise ValueError(f"{text!r} is not a whole number of {_UNITS[unit]}")
        return cls(value, unit)

    def steps(self, epochs: int, steps_per_epoch: int) -> int:
        per_unit = {"dur": epochs * steps_per_epoch, "ep": steps_per_epoch, "ba": 1}[self.unit]
        return round(self.value * per_unit)

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}"


_UNITS = {"ep": "epochs", "ba": "steps"}
