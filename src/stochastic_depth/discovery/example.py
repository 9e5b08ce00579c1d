"""The example that is watched: the user's, or the one that the model carries itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import ExampleInputsError
from stochastic_depth.torch_private import tree_map

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
    args: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    if isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, tuple | list):
        args = tuple(inputs)
    elif isinstance(inputs, Mapping):
        keywords = dict(inputs)
    elif inputs is not None:
        raise ExampleInputsError(
            f"example_inputs is a {type(inputs).__name__}",
            expected="a tensor, a tuple of positional or a dict of keyword arguments",
            instead="pass what you would pass to the model: a batch of two is enough",
        )
    elif not kwargs:
        keywords_or_args = _own_example(model)
        if isinstance(keywords_or_args, dict):
            keywords = keywords_or_args
        else:
            args = (keywords_or_args,)
    generator = torch.Generator().manual_seed(0)
    keywords |= dict(kwargs or {})
    return tree_map(lambda leaf: _telling(leaf, generator), (args, keywords))


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


def _telling(leaf: Any, generator: torch.Generator) -> Any:
    """A constant tensor proves nothing: private noise of its shape takes its place."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.numel() < 2:
        return leaf
    if leaf.is_meta or bool((leaf != leaf.flatten()[0]).any()):
        return leaf
    noise = torch.randn(leaf.shape, generator=generator, device="cpu")
    return noise.to(dtype=leaf.dtype, device=leaf.device)
