"""Running a model without leaving a trace: modes, buffers, attributes, generators and switches."""

from __future__ import annotations

import gc
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn

Mode = Literal["train", "train but BatchNorm", "eval"]

_inside: list[Any] = []  # the stance, once for each caller who wants it
_lock = threading.Lock()


@contextmanager
def undisturbed(model: nn.Module, mode: Mode = "eval") -> Iterator[None]:
    """In this mode for a while; then modes, buffers and random generators are as before.

    While it lasts the modules have copies of their buffers: training writes to them unseen.

    Args:
        model: The model.
        mode: As it trains, as it trains but for BatchNorm, or as in inference. Gated modules are
            as in inference, where they are open.
    """
    scripted = {m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)}
    unseen = {id(buffer) for module in scripted for buffer in module.buffers()}
    versions = {b: -1 if id(b) in unseen else b._version for b in model.buffers()}
    saved = {buffer: buffer.detach().clone() for buffer in versions}
    copies = {id(buffer): value.clone() for buffer, value in saved.items()}
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    mha, numpy = torch.backends.mha, sys.modules.get("numpy")
    with ExitStack() as stack:
        stack.enter_context(held(model))
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.callback(random.setstate, random.getstate())
        if numpy:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(eagerly())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what there is to warn about comes again in the training
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)  # it hides the modules' calls
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            trains = mode == "train" or (mode != "eval" and not is_norm)
            module.training = trains and not _may_draw(module)
            if module not in scripted:
                own = {k: b for k, b in module._buffers.items() if b is not None}
                module._buffers.update({k: copies[id(b)] for k, b in own.items()})
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, version in versions.items():
                    if buffer._version != version:
                        buffer.copy_(saved[buffer])


def _may_draw(module: nn.Module) -> bool:
    kind = type(module)
    return hasattr(kind, "gated_from") or hasattr(kind, "_is_stochastic_depth_residual")


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Attributes and buffers are afterwards the same objects, and no others are there.

    A scripted module keeps them where Python does not reach.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    tables: list[dict[str, Any]] = [table for m in modules for table in (vars(m), m._buffers)]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, were in zip(tables, before, strict=True):
            for added in table.keys() - were.keys():
                del table[added]
            table.update(were)


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


@contextmanager
def without_collecting() -> Iterator[None]:
    """While Python looks for no garbage: a recording is many objects, and none of them is any."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
