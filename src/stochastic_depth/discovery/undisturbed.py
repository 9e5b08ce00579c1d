"""Running a model without leaving a trace: modes, buffers, random generators and switches."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_inside: list[Any] = []  # the stance, once for each caller who wants it
_lock = threading.Lock()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; then modes, buffers and random generators are as before."""
    modules = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    with restored(model), eagerly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn about comes again in the training
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # it hides the modules' calls
            for module, _ in modules:
                module.training = False
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, training in modules:
                module.training = training


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Buffers and random generators are afterwards as they were."""
    modules = [(module, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    python_state = random.getstate()
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            for module, own in modules:
                module._buffers.update(own)
            with torch.no_grad():
                for buffer, version, saved in buffers:
                    if buffer._version != version:
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
