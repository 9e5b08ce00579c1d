"""What the coverage table is about: models of three libraries, small, with their ground truth."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from coveragelib import transformers_models
from coveragelib.drop_path_calls import with_all_drop_paths
from coveragelib.predictable import RATE, set_dropout

_SMALL_SIZES = (64, 112, 128)  # pixels that are tried, so that a model is quick


@dataclass(frozen=True)
class Subject:
    """One model of the table."""

    library: str
    family: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """The model in eval mode, with dropout, and without layers that start at zero."""
        torch.manual_seed(0)
        model = _MAKERS[self.library](self)
        set_dropout(model, RATE)
        for module in model.modules():
            if type(module).__name__ == "StochasticDepth":
                setattr(module, "p", 0.0)  # noqa: B010
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("running_var") or bool((tensor == 1).all()):
                    tensor.uniform_(0.5, 1.5)
                elif tensor.is_floating_point() and bool((tensor.abs() < 1e-3).all()):
                    tensor.uniform_(-0.2, 0.2)  # zero heads, tiny layer scales
        return model.eval()

    def example(self, model: Any, batch: int) -> Any:
        """Arguments to call it with."""
        if self.library == "transformers":
            return transformers_models.example(model, batch=batch)
        torch.manual_seed(1)
        if self.library == "timm":
            size: int = model.default_cfg["small_size"]
            return torch.randn(batch, model.default_cfg["input_size"][0], size, size)
        size = 224 if self.family in ("maxvit", "vision_transformer") else 96
        size = 320 if self.family in ("detection.ssd", "video.s3d") else size
        frames = [16] if self.family == "video.s3d" else [4]
        return torch.randn(batch, 3, *frames * self.family.startswith("video"), size, size)


def timm_families() -> Iterator[Subject]:
    """The smallest variant of every family that accepts a drop path rate.

    A family is what a name begins with (the letters), within one file of timm's.
    """
    import timm

    for module in timm.list_modules():
        smallest: dict[str, tuple[int, str]] = {}
        for name in timm.list_models(module=module):
            family = (re.match("[a-z]+(?:(?<=v)[0-9])?", name) or [name])[0]
            if name.startswith("test_"):
                continue  # not meant to be trained
            count = _parameters(partial(timm.create_model, name, drop_path_rate=0.1))
            if count is not None:
                smallest[family] = min((count, name), smallest.get(family, (count, name)))
        for family, (_, name) in smallest.items():
            yield Subject("timm", f"{module} {family}", name)


def _parameters(make: Callable[[], nn.Module]) -> int | None:
    """How many parameters a model has; None where it does not take these options."""
    for device in ("meta", "cpu"):  # some need values to be built
        with suppress(NotImplementedError, RuntimeError, TypeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device(device):
                return sum(p.numel() for p in make().parameters())
    return None


def torchvision_families() -> Iterator[Subject]:
    """The smallest variant of every file of models."""
    from torchvision import models

    smallest: dict[str, tuple[int, str]] = {}
    for name in models.list_models():
        family = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        if family.startswith(("quantization", "optical_flow")):
            continue  # quantised; two images
        count = _parameters(partial(models.get_model, name, **_no_weights(name))) or 0
        smallest[family] = min((count, name), smallest.get(family, (count, name)))
    for family, (_, name) in smallest.items():
        yield Subject("torchvision", family, name)


def transformers_types() -> Iterator[Subject]:
    """Model types from small configurations."""
    for kind, options in transformers_models.TYPES.items():
        yield Subject("transformers", kind, kind, options)


def _no_weights(name: str) -> dict[str, Any]:
    from torchvision import models

    known = inspect.signature(models.get_model_builder(name)).parameters
    return {option: None for option in ("weights", "weights_backbone") if option in known}


def _from_timm(subject: Subject) -> nn.Module:
    import timm

    make: Any = partial(timm.create_model, subject.name, drop_path_rate=0.0, num_classes=10)
    channels, *usual = make().default_cfg["input_size"]
    for size in (*_SMALL_SIZES, usual[-1]):
        for options in ({"img_size": size}, {}):
            with suppress(TypeError, RuntimeError, AssertionError, ValueError, IndexError):
                model = make(**options).eval()
                with torch.no_grad():
                    model(torch.zeros(1, channels, size, size))
                model.default_cfg["small_size"] = size
                return with_all_drop_paths(model)
    raise RuntimeError(f"{subject.name} runs on no size of images")


def _from_torchvision(subject: Subject) -> nn.Module:
    from torchvision import models

    mvit: Any = models.video.mvit
    with patch.object(mvit, "MViT", partial(_small_mvit, mvit.MViT)):
        model = models.get_model(subject.name, **_no_weights(subject.name))
    return getattr(model, "backbone", model) if "detection" in subject.family else model


def _small_mvit(make: Any, **options: Any) -> nn.Module:
    """A video transformer for small clips: as large as usual its checks take 19 GB."""
    model: nn.Module = make(**options | {"spatial_size": (96, 96), "temporal_size": 4})
    return model


def _from_transformers(subject: Subject) -> nn.Module:
    return transformers_models.small(subject.name, **subject.options)


_MAKERS = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "transformers": _from_transformers,
}


LIBRARIES: dict[str, Callable[[], Iterator[Subject]]] = {
    "timm": timm_families,
    "torchvision": torchvision_families,
    "transformers": transformers_types,
}
