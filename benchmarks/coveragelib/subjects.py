"""What the coverage table is about: models of three libraries, small, with their ground truth."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coveragelib import transformers_models
from coveragelib.drop_path_calls import drop_path_calls, with_all_drop_paths
from coveragelib.source_additions import source_additions
from stochastic_depth.discovery import Discovery
from stochastic_depth.discovery.additions import is_affine, residual_additions
from stochastic_depth.discovery.branches import member_calls
from stochastic_depth.discovery.recording import Call


_SMALL_SIZES = (64, 112, 128)  # pixels that are tried, so that a model is quick


@dataclass(frozen=True)
class Subject:
    """One model of the table."""

    library: str
    family: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """The model in eval mode, without dropout or layers that start at zero."""
        torch.manual_seed(0)
        model = _MAKERS[self.library](self)
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
            if type(module).__name__ == "StochasticDepth":
                setattr(module, "p", 0.0)  # noqa: B010
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("running_var") or bool((tensor == 1).all()):
                    tensor.uniform_(0.5, 1.5)
                elif tensor.is_floating_point() and bool((tensor.abs() < 1e-3).all()):
                    tensor.uniform_(-0.2, 0.2)  # zero heads, tiny layer scales
        return model.eval()

    def example(self, model: nn.Module, batch: int) -> Any:
        """Arguments to call it with."""
        if self.library == "transformers":
            return transformers_models.example(model, batch=batch)
        torch.manual_seed(1)
        if self.library == "timm":
            size: int = model.default_cfg["small_size"]
            return torch.randn(batch, model.default_cfg["input_size"][0], size, size)
        size = 224 if self.family in ("maxvit", "vision_transformer", "video.mvit") else 96
        size = 320 if self.family in ("detection.ssd", "video.s3d") else size
        frames = {"video.mvit": [16], "video.s3d": [16]}.get(self.family, [4])
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
        try:
            with torch.device(device), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return sum(p.numel() for p in make().parameters())
        except TypeError:
            return None
        except (NotImplementedError, RuntimeError):
            continue
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

    make = partial(timm.create_model, subject.name, drop_path_rate=0.0, num_classes=10)
    usual = timm.models.get_pretrained_cfg(subject.name).input_size
    for size in (*_SMALL_SIZES, usual[-1]):
        for options in ({"img_size": size}, {}):
            try:
                model = make(**options).eval()
                with torch.no_grad():
                    model(torch.zeros(1, usual[0], size, size))
            except (TypeError, RuntimeError, AssertionError, ValueError, IndexError):
                continue
            model.default_cfg["small_size"] = size
            return with_all_drop_paths(model)
    raise RuntimeError(f"{subject.name} runs on no size of images")


def _from_torchvision(subject: Subject) -> nn.Module:
    from torchvision import models

    model = models.get_model(subject.name, **_no_weights(subject.name))
    return getattr(model, "backbone", model) if "detection" in subject.family else model


def _from_transformers(subject: Subject) -> nn.Module:
    return transformers_models.small(subject.name, **subject.options)


_MAKERS = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "transformers": _from_transformers,
}


@dataclass(frozen=True)
class Places:
    """Where a model can drop a branch: what we find, and what the others say."""

    found: int
    expected: int
    agree: bool
    apart: str  # what is left out of the comparison


def places(subject: Subject, model: nn.Module, example: Any, found: Discovery) -> Places:
    """Our branches beside the ground truth."""
    if subject.library == "timm":
        return _beside_drop_paths(model, example, found)
    run = (lambda: model(**example)) if isinstance(example, dict) else (lambda: model(example))
    expected = sum(source_additions(model, run).values())
    count = {
        affine: sum(
            len(block.branches) * len(found.groups[block.name])
            for block in found.blocks
            if block.affine is affine
        )
        for affine in (False, True)
    }
    apart = f"{count[True]} affine" if count[True] else ""
    agree = expected in (count[False], count[False] + count[True])
    return Places(count[False], expected, agree, apart)


def _beside_drop_paths(model: nn.Module, example: Tensor, found: Discovery) -> Places:
    """Our branches in order, against the drop path calls that an addition follows.

    A call is known by its number; those of an affine branch are left out, as are such branches.
    """
    calls = drop_path_calls(model, example)
    recording = found.recording
    names = {name for name, _ in calls}
    recorded = [call for call in recording.calls if call.module in names]

    def drop_path_in(addition: Any) -> int | None:
        members = member_calls(recording, addition, addition.container)
        inside = [
            number
            for number, call in enumerate(recorded)
            if any(m.start <= call.start and call.end <= m.end for m in members)
        ]
        return inside[-1] if inside else None

    affine = {drop_path_in(a) for a in residual_additions(recording) if a.affine}
    affine |= {n for n, call in enumerate(recorded) if _is_affine_up_to(found, call)}
    additions = [a for b in found.blocks if not b.affine for a in found.groups[b.name][0].additions]
    ours = [drop_path_in(a) for a in sorted(additions, key=lambda a: a.node)]
    theirs = [n for n, (_, added) in enumerate(calls) if added and n not in affine]
    no_addition = sum(not added for _, added in calls)
    parts = ((no_addition, "without an addition"), (len(affine - {None}), "affine"))
    apart = ", ".join(f"{number} {what}" for number, what in parts if number)
    return Places(len(ours), len(theirs), ours == theirs, apart)


def _is_affine_up_to(found: Discovery, call: Call) -> bool:
    """Whether the block around a call is affine up to there (parallel convolutions, to be merged)."""
    recording = found.recording
    around = recording.calls[call.parent or 0]
    given, value = next(iter(around.arguments.values())), next(iter(call.arguments.values()))
    path = tuple(recording.between(given, value))
    return bool(path) and is_affine(recording, given, path)


LIBRARIES: dict[str, Callable[[], Iterator[Subject]]] = {
    "timm": timm_families,
    "torchvision": torchvision_families,
    "transformers": transformers_types,
}
