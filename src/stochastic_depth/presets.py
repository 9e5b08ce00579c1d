"""Stochastic depth as it is known under other names. Not yet supported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from stochastic_depth.draw import Draw
from stochastic_depth.errors import NotYetSupportedError
from stochastic_depth.handle import StochasticDepth
from stochastic_depth.schedules import ScheduleFunction
from stochastic_depth.selection import Selector

Blocks = Selector | Sequence[Selector] | None
Schedule = ScheduleFunction | Mapping[str, ScheduleFunction] | None


def apply_drop_path(
    model: nn.Module,
    drop_rate: float | Literal["model"],
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    blocks: Blocks = None,
    schedule: Schedule = None,
    draw: Draw = Draw(),  # noqa: B008  (frozen)
) -> StochasticDepth:
    """Drop path, as in timm. Not yet supported.

    Raises:
        NotYetSupportedError: Always.
    """
    raise _not_yet("apply_drop_path", 'unit="branch", scale="train"')


def apply_layer_drop(
    model: nn.Module,
    drop_rate: float | Literal["model"],
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    blocks: Blocks = None,
    schedule: Schedule = None,
    draw: Draw = Draw(),  # noqa: B008  (frozen)
) -> StochasticDepth:
    """LayerDrop (Fan et al. 2019). Not yet supported.

    Raises:
        NotYetSupportedError: Always.
    """
    raise _not_yet("apply_layer_drop", '"uniform", scale="none"')


def apply_progressive_layer_dropping(
    model: nn.Module,
    theta: float = 0.5,
    gamma: float = 0.001,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    blocks: Blocks = None,
    schedule: Schedule = None,
    draw: Draw = Draw(),  # noqa: B008  (frozen)
) -> StochasticDepth:
    """Progressive Layer Dropping (Zhang & He 2020). Not yet supported.

    Raises:
        NotYetSupportedError: Always.
    """
    raise _not_yet("apply_progressive_layer_dropping", 'scale="train", schedule=...')


def _not_yet(name: str, options: str) -> NotYetSupportedError:
    return NotYetSupportedError(
        f"{name} is not yet supported",
        expected="apply_stochastic_depth in this version",
        instead=f"call apply_stochastic_depth(model, rate, {options})",
    )
