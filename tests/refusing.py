"""What is refused, and how that is checked: an error that says what to do, and no trace."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from networks import (
    WIDTH,
    residuals,
    settled,
    vectors,
)

oldest = pytest.mark.oldest
Model = Callable[[], nn.Module]


def stack() -> nn.Module:
    return settled(residuals)


X = vectors(2, WIDTH)
EIGHT = 'choose from "0", "1", "2", "3", "4", "5" and 2 more'


def gate(model: nn.Module, drop_rate: Any = 0.1, *more: Any, **options: Any) -> sd.StochasticDepth:
    return sd.apply_stochastic_depth(model, drop_rate, *more, **{"example_inputs": X, **options})


def pasted(error: sd.StochasticDepthError) -> Any:
    """The `blocks=[...]` that an error offers."""
    found = re.search(r"blocks=(\[.*?\])", error.instead)
    assert found, error
    return ast.literal_eval(found[1])


@dataclass
class Refusal:
    """What is called, the error that comes, and what it has to say; it is named by the first."""

    says: tuple[str, ...]
    call: Callable[[nn.Module], Any]
    kind: type[sd.StochasticDepthError]
    model: Model = stack


def refused(
    *says: str, kind: Any = sd.OptionError, model: Model = stack, **options: Any
) -> Refusal:
    """By `apply_stochastic_depth` with these options."""
    return Refusal(says, lambda model: gate(model, **options), kind, model)


def called(*says: str, by: Callable[[nn.Module], Any], kind: Any = sd.OptionError) -> Refusal:
    return Refusal(says, by, kind)


def check(refusal: Refusal) -> sd.StochasticDepthError:
    model = refusal.model()
    classes = [type(module) for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    mode = model.training
    with pytest.raises(sd.StochasticDepthError) as caught:
        refusal.call(model)
    error = caught.value
    assert type(error) is refusal.kind
    for part in refusal.says:
        assert part in str(error)
    # Where it was gated first (fixed, compile), it is the gated model that stays as it was.
    if not any("_stochastic_depth" in vars(module) for module in model.modules()):
        assert [type(module) for module in model.modules()] == classes
    assert model.training == mode
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    return error
