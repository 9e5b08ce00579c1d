"""The example that is watched: the user's, or the one that the model carries itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import ExampleInputsError
from stochastic_depth.torch_private.trees import tree_flatten, tree_unflatten

Example = tuple[tuple[Any, ...], dict[str, Any]]


def example_for(model: nn.Module, inputs: Any, kwargs: Mapping[str, Any] | None) -> Example:
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
        return (), {**(inputs or {}), **keywords}
    if isinstance(inputs, Tensor):
        return (inputs,), keywords
    if isinstance(inputs, tuple | list):
        return tuple(inputs), keywords
    raise ExampleInputsError(
        f"example_inputs is a {type(inputs).__name__}",
        expected="a tensor, a tuple of positional or a dict of keyword arguments",
        instead="pass what you would pass to the model: a batch of two is enough",
    )


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


def telling(example: Example) -> Example:
    """The same example, with noise in the place of a constant main input, which proves nothing.

    The main input is the largest tensor of floating numbers. All others are left alone: a noise
    level, say, may not be negative.
    """
    leaves, spec = tree_flatten(example)
    floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    main = max(floats, key=lambda leaf: leaf.numel(), default=None)
    if main is None or main.is_meta or main.numel() < 2 or bool((main != main.flatten()[0]).any()):
        return example
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(main.shape, generator=generator, device="cpu")
    made = noise.to(dtype=main.dtype, device=main.device)
    args, kwargs = tree_unflatten([made if leaf is main else leaf for leaf in leaves], spec)
    return args, kwargs
