"""Which network of a ComposerModel is watched, and with which example.

At INIT there is no data: the example is the user's, or one that the network carries or that can be
guessed. Where there is none, it is the first batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from composer.models import ComposerClassifier, ComposerModel, HuggingFaceModel
from torch import nn
from torch.utils._pytree import tree_leaves

from stochastic_depth.discovery import plain_model
from stochastic_depth.errors import ExampleInputsError

_PIXELS = 64  # of an image that most networks take
# Where libraries keep an example, or what it takes to make one (`discovery.example` reads them).
_EXAMPLES = ("pretrained_cfg", "default_cfg", "dummy_inputs")


def network_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The network to watch, and the prefix of its modules' names in the model.

    A ComposerClassifier and a HuggingFaceModel hold a network that is called as any other. Another
    ComposerModel is watched as a whole: it takes a batch.
    """
    model = plain_model(model)
    if isinstance(model, ComposerClassifier):
        return model.module, "module."
    if isinstance(model, HuggingFaceModel):
        return model.model, "model."
    return model, ""


@dataclass(frozen=True)
class Call:
    """What a network is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def shows_tensors(self) -> bool:
        """Whether there is a tensor that is not hidden in some object."""
        return any(isinstance(x, torch.Tensor) for x in tree_leaves((self.args, self.kwargs)))


def call_with(model: nn.Module, batch: Any) -> Call:
    """What the network to watch is called with when the model is called with a batch.

    The model's own `forward` takes the batch apart. It ends where the network begins.

    Raises:
        ExampleInputsError: It does not call the network.
    """
    model = plain_model(model)
    network, _ = network_of(model)
    if network is model:
        return Call((batch,), {})

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Called(Call(args, kwargs))

    hook = network.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        model(batch)
    except _Called as called:
        return called.call
    finally:
        hook.remove()
    raise ExampleInputsError(
        f"{type(model).__name__} does not call its {type(network).__name__} with the first batch",
        expected="a forward(batch) that calls the network",
        instead="pass example_inputs= to StochasticDepth: what the network is called with",
    )


class _Called(Exception):  # noqa: N818  (it reports, it is no error)
    def __init__(self, call: Call) -> None:
        self.call = call


def example_for(network: nn.Module, example: Any) -> Any:
    """What to pass as `example_inputs`; None where the network carries an example itself."""
    if example is None:
        example = _sentences(network)
    if example is None:
        if any(getattr(network, name, None) for name in _EXAMPLES):
            return None
        example = _images(network)
        if example is not None and isinstance(network, ComposerModel):
            example = (example, torch.zeros(len(example), dtype=torch.long, device=example.device))
    # A ComposerModel takes one argument, the batch, also where that is a tuple or a dict.
    return (example,) if example is not None and isinstance(network, ComposerModel) else example


def _sentences(network: nn.Module) -> dict[str, Any] | None:
    """The example of a transformers model that reads tokens, with padding, as batches have it."""
    inputs = getattr(network, "dummy_inputs", None)
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs or "attention_mask" in inputs:
        return None
    if "attention_mask" not in inspect.signature(network.forward).parameters:
        return None
    device = next(network.parameters()).device
    example = {name: value.to(device) for name, value in inputs.items()}
    mask = torch.ones_like(example["input_ids"])
    mask[-1, -1] = 0
    return {**example, "attention_mask": mask}


def _images(network: nn.Module) -> torch.Tensor | None:
    """Two images that fit the first convolution, constant: private noise takes their place."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        return None
    size = getattr(network, "image_size", _PIXELS)
    size = size if isinstance(size, int) else _PIXELS
    return first.weight.new_zeros(2, first.in_channels, size, size)
