"""Who looks on while modules run: torch.compile, torch.fx, dispatch modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

without_modes: Callable[[], Any] = _disable_current_modes
"""A context in which no dispatch mode of the user's sees the operations."""

autocasts: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any kind of device."""

WRAPPED = frozenset({"_checkpoint_wrapped_module", "_orig_mod"})
"""What `checkpoint_wrapper` and `torch.compile` call the module that they are made around."""

_plain_call = nn.Module.__call__


class DispatchMode(TorchDispatchMode):
    """Sees every operation while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch imports its compiler, which takes seconds, to hide such a class from it."""
        return False


Call = TypeVar("Call", bound=Callable[..., Any])


def is_traced_by_fx() -> bool:
    """Whether torch.fx traces what this thread calls: while it does it replaces `__call__` for all.

    Older torch does not know of threads; there it may be another one, which compiles.
    """
    if nn.Module.__call__ is _plain_call:
        return False
    asks = getattr(torch.fx._symbolic_trace, "_get_is_fx_tracing", None)
    return asks is None or bool(asks())


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` or `checkpoint_wrapper` made around another module."""
    return not WRAPPED.isdisjoint(module._modules)


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module runs a graph."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def let_vary(tensor: torch.Tensor, dim: int) -> None:
    """Have torch.compile make a graph that holds for other lengths of this dimension, too.

    Where the length is 1, or code asks for it, a graph still holds for this one alone.
    """
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


# No function of our own, which would be compiled itself. In torch 2.6 the one that only asks loses
# a reference at each call.
set_compiler: Callable[[Any], Any] = eval_frame.set_eval_frame
"""Sets what torch.compile does with the frames of functions that are called from here on.

Returns what it did before; None: nothing.
"""


def begins_no_graph(function: Call) -> Call:
    """Have torch.compile begin no graph with this function.

    It may become a part of one, and what it calls may begin one.
    """
    code = function.__code__
    if hasattr(eval_frame, "skip_code"):  # torch 2.6
        eval_frame.skip_code(code)
    else:
        skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
        eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, default))
    return function


def traced_as(function: Call, trace: Callable[..., Any]) -> Call:
    """Have torch.compile trace another function where it meets this one, and begin no graph here.

    So this one need not ask at each call whether it is traced.
    """
    function._torchdynamo_inline = trace  # type: ignore[attr-defined]
    return begins_no_graph(function)


def ends_a_graph(why: str) -> Callable[[Call], Call]:
    """Have no graph hold this function; what it calls may be compiled.

    As `torch.compiler.disable(recursive=False, reason=why)`, which takes a second to import.
    """

    def mark(function: Call) -> Call:
        begins_no_graph(function)
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = why  # type: ignore[attr-defined]
        return function

    return mark


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
