"""Running a model without leaving a trace: modes, buffers, attributes, generators and switches."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Mode = Literal["train", "train but BatchNorm", "eval"]

_inside: list[Any] = []  # the stance, once for each caller who wants it
_lock = threading.Lock()


@contextmanager
def undisturbed(
    model: nn.Module, mode: Mode = "eval", *, drawing: Collection[str] = ()
) -> Iterator[None]:
    """In this mode for a while; then modes, buffers and random generators are as before.

    Args:
        model: The model.
        mode: As it trains, as it trains but for BatchNorm, or as in inference.
        drawing: The gated modules that train, too; all others are as in inference, where they are
            open.
    """
    modules = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    with restored(model), eagerly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn about comes again in the training
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # it hides the modules' calls
            for module, _ in modules:
                is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
                module.training = mode == "train" or (mode != "eval" and not is_norm)
            for name, module in model.named_modules():
                if name not in drawing and _may_draw(module):
                    module.training = False
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, training in modules:
                module.training = training


def _may_draw(module: nn.Module) -> bool:
    kind = type(module)
    return hasattr(kind, "gated_from") or hasattr(kind, "_is_stochastic_depth_residual")


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Buffers, attributes and random generators are afterwards as they were.

    While it lasts the modules have copies of their buffers: training writes to them unseen.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    scripted = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
    known: dict[int, tuple[Tensor, int, Tensor]] = {
        id(buffer): (buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()
    }
    watched = {key: saved.clone() for key, (_, _, saved) in known.items()}
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = watched[id(buffer)]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    python_state = random.getstate()
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            for module, attributes, buffers in before:
                vars(module).update(attributes)
                module._buffers.update(buffers)
            unseen = {id(buffer) for module in scripted for buffer in module.buffers()}
            with torch.no_grad():
                for key, (buffer, version, saved) in known.items():
                    if buffer._version != version or key in unseen:
                        buffer.copy_(saved)
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled modules run eagerly, in all threads: the last one that leaves ends it for all."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with _lock:
        _inside.append(_inside[0] if _inside else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _lock:
            stance = _inside.pop()
            if not _inside:
                stance.__exit__(None, None, None)
