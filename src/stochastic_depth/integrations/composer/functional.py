"""Composer's arguments in the words of `sd.apply_stochastic_depth`, and the functional form."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, Literal

from torch import nn

from stochastic_depth.depth import apply_stochastic_depth as apply_to_network
from stochastic_depth.draw import Draw, check_choice
from stochastic_depth.errors import OptionError, SelectionError, StateMismatchError, as_number
from stochastic_depth.gating.attach import gated_modules
from stochastic_depth.handle import StochasticDepth as Handle
from stochastic_depth.handle import get_stochastic_depth
from stochastic_depth.integrations.composer.networks import Call, example_for, network_of
from stochastic_depth.integrations.composer.targets import Target
from stochastic_depth.schedules import ScheduleFunction

_MODES: dict[str, Literal["batch", "sample"]] = {"block": "batch", "sample": "sample"}
_DISTRIBUTIONS = ("linear", "uniform", "linear_from_zero")
_ALWAYS = math.nextafter(1.0, 0.0)  # a rate of 1: a draw, of 53 bits, that is as large is not made


def check(stochastic_method: object, drop_rate: object, drop_distribution: object) -> None:
    """Raises where one of Composer's arguments has a value that it cannot take."""
    check_choice("stochastic_method=", stochastic_method, tuple(_MODES))
    check_choice("drop_distribution=", drop_distribution, _DISTRIBUTIONS)
    rate = as_number(drop_rate)
    if rate is None or not 0 <= rate <= 1:
        raise OptionError(
            f"drop_rate is {drop_rate!r}, of type {type(drop_rate).__name__}",
            expected="a number from 0 to 1",
            instead="pass the share of steps in which the last block is dropped, such as 0.2",
        )


def apply_stochastic_depth(
    model: nn.Module,
    target_layer_name: str | None = None,
    stochastic_method: str = "block",
    drop_rate: float = 0.2,
    drop_distribution: str = "linear",
    *,
    example_inputs: Any = None,
    schedule: ScheduleFunction | None = None,
    draw: Draw = Draw(),  # noqa: B008  (frozen)
) -> Handle:
    """Have a model skip its residual blocks at random, with the arguments of Composer's function.

    Stochastic depth that is on the model already makes room; where it was the same, its draws go
    on where they were.

    Args:
        model: A network, or a ComposerModel with a network inside.
        target_layer_name: Which blocks: "ResNetBottleneck" (Composer's registry), the name of
            their class, a name or glob of blocks, or None for all that are found.
        stochastic_method: "block" drops a block for the whole batch; "sample" for each of its
            examples. Both are unscaled in training, and multiply by `1 - p` in inference.
        drop_rate: From 0 to 1. With 1 the last block ("linear") never runs in training.
        drop_distribution: "linear" rises with depth up to `drop_rate`; "uniform".
        example_inputs: What to call the network with once, to watch it, where it carries no
            example and is not a vision model; of a ComposerModel that is neither a
            ComposerClassifier nor a HuggingFaceModel: a batch.
        schedule: A function of the optimizer step that returns a factor on the rates; needs
            `follow(optimizer)` on what is returned.
        draw: How it is drawn.

    Returns:
        The handle. (Composer's function returns None.)

    Raises:
        SelectionError: `target_layer_name` matches no block.
        OptionError: An argument has a value that it cannot take.

    Example:
        >>> from torchvision.models import resnet50
        >>> depth = apply_stochastic_depth(resnet50(), "ResNetBottleneck", drop_rate=0.2)
        >>> len(depth.blocks), depth.blocks[-1].name, depth.blocks[-1].drop_rate
        (16, 'layer4.2', 0.2)
    """
    check(stochastic_method, drop_rate, drop_distribution)
    network, prefix = network_of(model)
    if isinstance(example_inputs, Call):
        example, keywords = example_inputs.args, example_inputs.kwargs
    else:
        example, keywords = example_for(network, example_inputs), None
    target = None if target_layer_name is None else Target(target_layer_name, network, prefix)
    before = _make_room(model)
    try:
        depth = apply_to_network(
            network,
            min(float(drop_rate), _ALWAYS),
            drop_distribution,
            example_inputs=example,
            example_kwargs=keywords,
            blocks=target,
            mode=_MODES[stochastic_method],
            scale="eval",
            schedule=schedule,
            draw=draw,
        )
    except SelectionError:
        if target is None or target.matched:
            raise
        raise target.nothing() from None
    if before is not None and before["drop_rates"] == depth.state_dict()["drop_rates"]:
        with suppress(StateMismatchError):  # it was another one: the draws begin anew
            depth.load_state_dict(before)
    return depth


def _make_room(model: nn.Module) -> dict[str, Any] | None:
    """Takes off the stochastic depth that is there; where its draws had got to."""
    if next(gated_modules(model), None) is None:
        return None
    depth = get_stochastic_depth(model)
    state = depth.state_dict()
    depth.remove()
    return state
