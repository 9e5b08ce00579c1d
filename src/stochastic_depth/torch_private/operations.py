"""Seeing operations, and hiding from those who look on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import nn


def without_modes() -> Any:
    """A context in which no dispatch mode of the user's sees the operations."""
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        return nullcontext()
    return _disable_current_modes()


def without_fused_path(kind: type[nn.Module]) -> dict[str, Any]:
    """What to override in a subclass, so that its modules' parts are called in inference, too.

    torch's encoder layer computes itself in one operation then, which no gate can look into; an
    encoder asks its first layer whether to prepare for that.
    """
    if not issubclass(kind, nn.TransformerEncoderLayer):
        return {}
    return {"activation_relu_or_gelu": property(lambda self: 0)}


def fake_mode() -> Any:
    """A context in which tensors have shapes but no values; real tensors may be met."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)
