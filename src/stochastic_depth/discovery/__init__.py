"""Finding the residual blocks of a model: look, change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stochastic_depth.discovery.blocks import Discovery, ResidualBlock, discover, explicit_residuals
from stochastic_depth.discovery.own_drops import switched_off
from stochastic_depth.discovery.recording import Recording
from stochastic_depth.discovery.undisturbed import (
    Arguments,
    Mode,
    fresh,
    is_unmaterialised,
    undisturbed,
    without_collecting,
    without_values,
)
from stochastic_depth.discovery.watch import Watcher
from stochastic_depth.errors import ExampleInputsError, NoResidualBlocksError, OptionError
from stochastic_depth.torch_private.trees import tree_map


def find_residual_blocks(
    model: nn.Module, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None
) -> tuple[ResidualBlock, ...]:
    """Watch one forward and find every residual block; the model is left as it was.

    Branches that are affine as a whole (position encodings such as `x + dwconv(x)`) are left out.
    A model that is written with `sd.Residual` needs no example: those are its blocks.

    Args:
        model: Any module; wrapped by DistributedDataParallel or compiled: unwrapped.
        example_inputs: What to call it with: a tensor, a tuple (positional) or a dict (keywords).
            None: the model's own example, which timm's and transformers' models carry.
        example_kwargs: More keyword arguments.

    Returns:
        The blocks in forward order, each with `.name` and `.branches`; each branch with `.name`
        and `.modules`.

    Raises:
        NoResidualBlocksError: There is none.
        ExampleInputsError: The forward failed, or there is no example.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        ...
        ...     def forward(self, x):
        ...         return x + self.linear(self.norm(x))
        >>> model = nn.Sequential(nn.Linear(4, 8), Residual(), Residual())
        >>> [block.name for block in find_residual_blocks(model, torch.randn(2, 4))]
        ['1', '2']
    """
    model = plain_model(model)
    with without_collecting():
        found, _ = watch(model, example_inputs, example_kwargs)
    blocks = tuple(block for block in found.blocks if not block.affine)
    if not blocks:
        raise none_found(model, found)
    return blocks


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel or `torch.compile`."""
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
        raise OptionError(
            f"model is a {type(model).__name__}",
            expected="a torch.nn.Module, no script",
            instead="pass the model itself",
        )
    while True:
        is_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
        inner = getattr(model, "module" if is_ddp else "_orig_mod", None)  # of torch.compile
        if inner is None:
            return model
        model = inner


def watch(
    model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> tuple[Discovery, Arguments]:
    """One watched forward, what was found in it, and the example that was used.

    A model with `Residual`s need not be watched: without an example those are all its blocks.
    """
    if example_inputs is None and not example_kwargs and explicit_residuals(model):
        return discover(Recording(), model), ((), {})
    _refuse_lazy(model)
    example = example_for(model, example_inputs, example_kwargs)
    whose = " (the example that it carries)" if example_inputs is None else ""
    try:
        with switched_off(model):  # it would act as the model trains
            recording = watch_once(model, example)
    except Exception as error:
        instead = "pass example_inputs=... (a tensor, a tuple or a dict) as for training, on the "
        instead += "model's device"
        if is_unmaterialised(model):
            instead += "; or build the model on the CPU: not every operation runs on meta"
        raise ExampleInputsError(
            f"the forward of {type(model).__name__} failed on its example inputs{whose}: "
            f"{type(error).__name__}: {error}",
            expected="an example that the model takes",
            instead=instead,
        ) from error
    return discover(recording, model), example


def watch_once(model: nn.Module, example: Arguments) -> Recording:
    """The recording of one forward; without values where the model has none.

    As the model trains, where it can run so: BatchNorm, which needs several values, and then
    everything else, are put into inference where it fails.
    """
    with without_values(model, example) as arguments:
        for mode in ("train", "train but BatchNorm"):
            with suppress(Exception):  # what fails in inference, too, is raised there
                return record(model, arguments, mode)
        return record(model, arguments, "eval")


def record(model: nn.Module, example: Arguments, mode: Mode) -> Recording:
    """Call the model once, without gradients, and write down what happened."""
    with ExitStack() as stack:
        originals = stack.enter_context(undisturbed(model, mode))
        args, kwargs = fresh(example)
        watcher = Watcher(model, mode, originals)
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # its operations show all the same
                enter = partial(watcher.enter, name)
                for register, then in (
                    (module.register_forward_pre_hook, enter),
                    (module.register_forward_hook, watcher.leave),
                ):
                    stack.enter_context(register(watcher.look, prepend=True, with_kwargs=True))
                    stack.enter_context(register(then, with_kwargs=True))
        stack.enter_context(torch.no_grad())
        stack.callback(watcher.note_functions())
        stack.enter_context(watcher)
        model(*args, **kwargs)
    return watcher.recording


def example_for(model: nn.Module, inputs: Any, kwargs: Mapping[str, Any] | None) -> Arguments:
    """The positional and keyword arguments to watch the model with.

    Args:
        model: What is called.
        inputs: A tensor, a tuple (positional), a mapping (keywords), or None for the model's own.
        kwargs: More keyword arguments.

    Raises:
        ExampleInputsError: The model carries no example, or `inputs` is something else.
    """
    keywords = dict(kwargs or {})
    if inputs is None and not keywords:
        inputs = _own_example(model)
    if inputs is None or isinstance(inputs, Mapping):
        return _told_apart(((), {**(inputs or {}), **keywords}))
    if isinstance(inputs, Tensor | tuple | list):
        return _told_apart(((inputs,) if isinstance(inputs, Tensor) else tuple(inputs), keywords))
    raise ExampleInputsError(
        f"example_inputs is a {type(inputs).__name__}",
        expected="a tensor, a tuple of positional or a dict of keyword arguments",
        instead="pass what you would pass to the model: a batch of two is enough",
    )


def _told_apart(example: Arguments) -> Arguments:
    """The example, in which a tensor that stands in several places is another object in each.

    Which argument a block hands on is told by the object. In a training the places may differ.
    """
    seen: set[int] = set()

    def another(leaf: Any) -> Any:
        if _is_of_a_plain_subclass(leaf):  # the watch does not see how its results get their class
            leaf = leaf.as_subclass(Tensor)
        is_again = isinstance(leaf, Tensor) and id(leaf) in seen
        seen.add(id(leaf))
        return leaf.detach() if is_again else leaf

    args, kwargs = tree_map(another, example)
    return args, kwargs


def _is_of_a_plain_subclass(leaf: Any) -> bool:
    """Whether it is a tensor of a class that computes as tensors do."""
    if not isinstance(leaf, Tensor) or type(leaf) in (Tensor, nn.Parameter):
        return False
    return type(leaf).__torch_dispatch__ is Tensor.__torch_dispatch__


def _own_example(model: nn.Module) -> Tensor | dict[str, Any]:
    """As timm and transformers describe their models' inputs."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        channels, *size = config["input_size"]
        # A model that was built for images of another size says so there.
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
        return torch.zeros(2, channels, *size, device=device)
    settings = getattr(model, "config", None)
    size = getattr(settings, "image_size", None)
    if getattr(model, "main_input_name", None) == "pixel_values" and size is not None:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(settings, "num_channels", 3)
        return {"pixel_values": torch.zeros(2, channels, height, width, device=device)}
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping) and dummy:
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in dummy.items()}
    raise ExampleInputsError(
        f"{type(model).__name__} without example_inputs, and it carries no example of its own",
        expected="an example of what the model is called with, to watch one forward",
        instead="pass example_inputs=batch (a tensor), a tuple for several positional arguments, "
        "or a dict for keyword arguments; a batch of two is enough",
    )


def _refuse_lazy(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ExampleInputsError(
                f'"{name}" is the weight of a lazy module, which has no shape yet',
                expected="a model whose weights are there",
                instead="call the model once with a batch, model(batch), and then apply",
            )


def none_found(model: nn.Module, found: Discovery) -> NoResidualBlocksError:
    """The error for a model without a block to gate."""
    if found.blocks:
        names = ", ".join([block.name for block in found.blocks[:4]])
        more = f" and {len(found.blocks) - 4} more" if len(found.blocks) > 4 else ""
        return NoResidualBlocksError(
            f"all branches of {type(model).__name__} are affine ({names}{more}): a branch without "
            "a nonlinearity makes one affine map of its block",
            expected="blocks that compute more where their branch runs",
            instead='pass blocks=["*"] to gate them all the same',
        )
    return NoResidualBlocksError(
        f"{type(model).__name__} has no residual block: no addition in its forward joins a "
        "value with a branch of modules computed from it",
        expected="a model with skip connections, y = x + branch(x)",
        instead="train it as it is; stochastic depth needs a skip connection to fall back on "
        "(concatenation, as in DenseNet, is none)",
    )
