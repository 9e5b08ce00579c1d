"""Dropout that two runs can be compared under exactly, where one of them skips some of its calls.

Real dropout draws from torch's generator, so that a branch that does not run would change what all
later calls draw.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE = 0.1
_KINDS = "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split()
"""Functions of torch.nn.functional, which modules call, too."""


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set the rate of every dropout module and of every attention."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = rate
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = rate


@contextmanager
def predictable_dropout(*, acts: bool = True) -> Iterator[None]:
    """While dropout drops the same values of every input of one shape; or nothing, unless it acts.

    Kernels with a dropout of their own, those of attention, have none meanwhile.
    """
    attention = F.scaled_dot_product_attention

    def without(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        return attention(query, key, value, attn_mask, 0.0, *args, **kwargs)

    changed: dict[str, Any] = dict.fromkeys(_KINDS, _dropped if acts else _kept)
    with mock.patch.multiple(F, scaled_dot_product_attention=without, **changed):
        yield


def _dropped(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: FBT001, FBT002
    if not training or not p or not x.is_floating_point():
        return x
    return x * _mask(tuple(x.shape), p).to(dtype=x.dtype, device=x.device)


def _kept(x: Tensor, *_: object, **__: object) -> Tensor:
    return x


@cache
def _mask(shape: tuple[int, ...], p: float) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(repr(shape).encode()))
    return (torch.rand(shape, generator=generator) >= p) / (1 - p)
