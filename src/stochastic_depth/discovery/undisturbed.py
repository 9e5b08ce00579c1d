"""Running a model without leaving a trace: modes, buffers, attributes, generators and switches.

Also a model whose weights are not there yet (on the meta device): it is watched without values.
What needs values is proven on one block at a time: a copy of it, with random weights, called as it
was in the watch, with random numbers.
"""

from __future__ import annotations

import copy
import gc
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.kept import Originals, put_back, tables_of
from stochastic_depth.torch_private.tracing import fake_mode
from stochastic_depth.torch_private.trees import tensors_in, tree_flatten, tree_map, tree_unflatten

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model or a module is called with: positional and keyword arguments."""
Mode = Literal["train", "train but BatchNorm", "eval"]

_MARKS = ("gated_from", "_is_stochastic_depth_residual")  # of the classes of modules that may draw
_inside: list[Any] = []  # the stance, once for each caller who wants it
_lock = threading.Lock()


@contextmanager
def undisturbed(model: nn.Module, mode: Mode = "eval") -> Iterator[Originals]:
    """In this mode for a while; then modes, buffers and random generators are as before.

    While it lasts the modules have copies of their buffers: training writes to them unseen. Weights
    and tensor attributes hold afterwards what they held, as far as the result was told what is
    written.

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
    mha = torch.backends.mha
    with ExitStack() as stack:
        stack.enter_context(put_back(model))
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(same_generators())
        stack.enter_context(eagerly())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what there is to warn about comes again in the training
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)  # it hides the modules' calls
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            trains = mode == "train" or (mode != "eval" and not is_norm)
            may_draw = any(hasattr(type(module), name) for name in _MARKS)
            module.training = trains and not may_draw
            if module not in scripted:
                buffers = {k: b for k, b in module._buffers.items() if b is not None}
                module._buffers.update({k: copies[id(b)] for k, b in buffers.items()})
        originals = Originals(model)
        stack.callback(originals.restore)
        try:
            yield originals
        finally:
            with torch.no_grad():
                for buffer, version in versions.items():
                    if buffer._version != version:
                        buffer.copy_(saved[buffer])


@contextmanager
def same_generators() -> Iterator[None]:
    """The random generators of Python and numpy are as before afterwards."""
    numpy: Any = sys.modules.get("numpy")
    ours, theirs = random.getstate(), numpy and numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(ours)
        if numpy:
            numpy.random.set_state(theirs)


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


def is_unmaterialised(model: nn.Module) -> bool:
    """Whether some of its weights have a shape and no values."""
    return any(parameter.is_meta for parameter in model.parameters())


@contextmanager
def with_large_weights(module: nn.Module) -> Iterator[None]:
    """For a while weights that are nearly zero (ReZero, layer scale) are noise.

    So what they multiply shows, as it will in a training.
    """
    before = {p: p.data for p in module.parameters() if type(p) is nn.Parameter}
    for parameter, values in before.items():
        if _hides(values):
            noise = noise_like(values)
            is_matrix = values.ndim > 1
            # A gain stays positive: a forward may take its root.
            parameter.data = noise / values[0].numel() ** 0.5 if is_matrix else noise.abs() + 0.1
    try:
        yield
    finally:
        for parameter, values in before.items():
            parameter.data = values


def _hides(values: Tensor) -> bool:
    """Whether what is multiplied by these weights is nearly nothing."""
    is_plain = type(values) is Tensor and values.layout is torch.strided  # not a part of one
    if not is_plain or values.is_meta or not values.is_floating_point():
        return False
    largest = float(values.abs().max()) if values.numel() else 1.0
    is_constant = largest < 0.1 and bool((values == values.flatten()[0]).all())
    return largest < 1e-3 or is_constant


@contextmanager
def without_values(model: nn.Module, example: Arguments) -> Iterator[Arguments]:
    """Has a model without weights compute with shapes alone; gives an example to call it with.

    It computes as if on the CPU. Its weights are as before afterwards. With weights nothing is
    done.
    """
    if not is_unmaterialised(model):
        yield example
        return
    known: dict[int, Any] = {}

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known:
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            is_weight = isinstance(value, nn.Parameter)
            known[id(value)] = nn.Parameter(made, value.requires_grad) if is_weight else made
        return known[id(value)]

    with put_back(model), fake_mode():  # a module may keep what it has computed: no fake must stay
        for module in model.modules():
            for table in tables_of(module):
                table.update({key: fake(value) for key, value in table.items()})
        yield tree_map(fake, example)


def telling(example: Arguments) -> Arguments:
    """The same example, with noise in the place of a constant main input, which proves nothing.

    The main input is the largest tensor of floating numbers. All others are left alone: a noise
    level, say, may not be negative.
    """
    leaves, spec = tree_flatten(example)
    dense = [x for x in leaves if isinstance(x, Tensor) and x.layout is torch.strided]
    floats = [leaf for leaf in dense if leaf.is_floating_point()]
    main = max(floats, key=lambda leaf: leaf.numel(), default=None)
    if main is None or main.is_meta or main.numel() < 2 or bool((main != main.flatten()[0]).any()):
        return example
    made = noise_like(main)
    return tree_unflatten([made if leaf is main else leaf for leaf in leaves], spec)


def noise_like(tensor: Tensor) -> Tensor:
    """The same normal noise each time, in the form of a tensor."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tensor.shape, generator=generator, device="cpu")
    return noise.to(dtype=tensor.dtype, device=tensor.device)


def another(tensor: Tensor) -> Tensor:
    """A copy that belongs to no graph."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def fresh(arguments: Arguments, how: Callable[[Tensor], Tensor] = another) -> Arguments:
    """The same arguments for one more call, which may write to them.

    Args:
        arguments: The arguments; objects among them (caches) are copied.
        how: What becomes of each tensor.
    """
    args, kwargs = tree_map(partial(_copied, how=how), arguments)
    return args, kwargs


def _copied(leaf: Any, how: Callable[[Tensor], Tensor]) -> Any:
    """A copy of what a call may change: a tensor, or an object (a cache) that holds some."""
    if isinstance(leaf, Tensor):
        return how(leaf)
    if callable(leaf) or type(leaf) is object:  # a module, or a method of one; a mark
        return leaf
    # None of a graph, and none without values, can be copied.
    with suppress(Exception):
        return copy.deepcopy(leaf, {id(tensor): how(tensor) for tensor in tensors_in(leaf)})
    return leaf


class SingleBlock(nn.Module):
    """One block of a model and nothing around it, with random weights.

    Args:
        block: The block's module; the copy keeps its gates.
        calls: What to call it with: random numbers take the place of all tensors.
        plan: What the gates share, and the copy shares with them.
    """

    def __init__(self, block: nn.Module, calls: list[Arguments], plan: Any) -> None:
        super().__init__()
        self.calls, self.block = calls, copy.deepcopy(block, {id(plan): plan})
        for module in self.block.modules():
            for table in tables_of(module):
                table.update({key: _some(value) for key, value in table.items()})
            for buffer in module.buffers(recurse=False):
                if buffer.dtype is torch.bool:
                    buffer.zero_()  # of a constant mask a True hides something

    def forward(self) -> list[Any]:
        """All calls, one after the other."""
        return [self.block(*args, **kwargs) for args, kwargs in tree_map(_some, self.calls)]


def _some(like: Any) -> Any:
    """Random numbers in the form of a tensor; what is no tensor stays."""
    if not isinstance(like, Tensor):
        return like
    if like.is_floating_point():  # above zero: a variance is, and what comes out of a ReLU
        generator = torch.Generator().manual_seed(0)
        numbers = torch.rand(like.shape, generator=generator, device="cpu")
        return numbers.mul(0.1).add(0.01).to(like.dtype)  # so small that they stay so in half
    # A mask lets everything through; a number may be an index.
    return torch.full(like.shape, int(like.dtype is torch.bool), dtype=like.dtype, device="cpu")
