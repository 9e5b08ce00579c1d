"""Modules that users compiled or wrapped, and what torch.compile is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Call = TypeVar("Call", bound=Callable[..., Any])


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` or `checkpoint_wrapper` made around another module."""
    return "_orig_mod" in module._modules or "_checkpoint_wrapped_module" in module._modules


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module runs a graph."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def let_vary(tensor: Tensor, dim: int) -> None:
    """Have torch.compile make a graph that holds for other lengths of this dimension, too.

    Where the length is 1, or code asks for it, a graph still holds for this one alone.
    """
    mark: Callable[[Tensor, int], None] | None = getattr(torch._dynamo, "maybe_mark_dynamic", None)
    if mark is not None:
        mark(tensor, dim)


def set_compiler(callback: Any) -> Any:
    """Set what torch.compile does with the frames of functions that are called from here on.

    Returns:
        What it did before; None: nothing.
    """
    from torch._C._dynamo.eval_frame import set_eval_frame

    return set_eval_frame(callback)


def outside_of_graphs(function: Call, why: str) -> Call:
    """A function that torch.compile does not look into; what it calls may be compiled."""
    try:
        return torch.compiler.disable(function, recursive=False, reason=why)
    except TypeError:  # torch 2.6 takes no reason
        return torch.compiler.disable(function, recursive=False)


def once_in_a_trace(function: Call) -> Call:
    """Have a function run while torch.compile traces a call of it, and its result be a constant.

    As `torch.compiler.assume_constant_result`, which takes a second to import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
