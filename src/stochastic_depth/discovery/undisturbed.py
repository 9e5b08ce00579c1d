"""Running a model without leaving a trace: modes, buffers, random generators and switches."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; then modes, buffers and random generators are as before."""
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    python_state = random.getstate()
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=cuda), _eagerly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn about comes again in the training
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # it hides the modules' calls
            for module, _, _ in modules:
                module.training = False
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, training, own in modules:
                module.training = training
                module._buffers.update(own)
            with torch.no_grad():
                for buffer, version, saved in buffers:
                    if buffer._version != version:
                        buffer.copy_(saved)
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


@contextmanager
def _eagerly() -> Iterator[None]:
    """Compiled modules run eagerly, so that their operations are seen."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
