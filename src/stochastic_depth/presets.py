"""Stochastic depth as it is known under other names. Not yet supported."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

from torch import nn

from stochastic_depth.errors import NotYetSupportedError


def apply_drop_path(
    model: nn.Module, drop_rate: float | Literal["model"], **options: Any
) -> NoReturn:
    """Drop path, as in timm. Not yet supported.

    Raises:
        NotYetSupportedError: Always.
    """
    raise _not_yet("apply_drop_path", 'unit="branch", scale="train"')


def apply_layer_drop(
    model: nn.Module, drop_rate: float | Literal["model"], **options: Any
) -> NoReturn:
    """LayerDrop (Fan et al. 2019). Not yet supported.

    Raises:
        NotYetSupportedError: Always.
    """
    raise _not_yet("apply_layer_drop", '"uniform", scale="none"')


def apply_progressive_layer_dropping(
    model: nn.Module, theta: float = 0.5, gamma: float = 0.001, **options: Any
) -> NoReturn:
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
