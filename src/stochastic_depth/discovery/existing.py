"""What a model drops of its own accord, by the names that libraries give that.

timm and transformers call the module DropPath (`drop_prob`), torchvision StochasticDepth (`p`);
DINOv2's blocks run on a part of the batch (`sample_drop_ratio`). transformers' LayerDrop is an
attribute `layerdrop` of the module that runs the layers, or of its configuration.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from stochastic_depth.arguments import as_number
from stochastic_depth.errors import ActiveDropPathError

_MODULES = ("DropPath", "StochasticDepth", "DropConnect")
_LAYER_DROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "speech_encoder_layerdrop")

_Target = Literal["branch", "block", "layers"]
_RATES: dict[str, _Target] = {
    "drop_prob": "branch",
    "p": "branch",
    "drop_rate": "branch",
    "sample_drop_ratio": "block",
    **dict.fromkeys(_LAYER_DROP, "layers"),
}


@dataclass(frozen=True, slots=True, eq=False)
class OwnDrop:
    """A rate, above 0, at which a model drops something by itself.

    Attributes:
        holder: The module or configuration that has the rate as an attribute.
        attribute: The attribute's name.
        path: How it is reached from the model.
        rate: The rate.
        kind: The class that drops.
        acts_on: The "branch" that the module lies in, the module as a "block", or the "layers"
            that the modules run one after the other.
        modules: The names of these modules; none where nobody is known to read the rate.
    """

    holder: Any
    attribute: str
    path: str
    rate: float
    kind: str
    acts_on: _Target
    modules: tuple[str, ...]


def active_drops(model: nn.Module) -> list[OwnDrop]:
    """Every drop path and layerdrop of the model whose rate is above 0."""
    return [*_in_modules(model), *_in_configurations(model)]


def refuse_active_drop_path(model: nn.Module) -> None:
    """Raises where the model's own drop path or layerdrop is active, naming what to set to 0."""
    for drop in active_drops(model):
        preset = "apply_layer_drop" if drop.acts_on == "layers" else "apply_drop_path"
        raise ActiveDropPathError(
            f"{drop.path} is {drop.rate}: the model drops branches of its own accord ({drop.kind})",
            expected="a model whose own drop path and layerdrop are 0",
            instead=f"build the model without it (drop_path_rate=0, stochastic_depth_prob=0, "
            f'layerdrop=0) or set {drop.path} = 0; or call sd.{preset}(model, "model"), which '
            "takes its rates over",
        )


@contextmanager
def switched_off(drops: Sequence[OwnDrop]) -> Iterator[None]:
    """Sets the rates to 0; for good, unless what is done meanwhile raises."""
    before = [getattr(drop.holder, drop.attribute) for drop in drops]
    try:
        for drop in drops:
            setattr(drop.holder, drop.attribute, 0.0)
        yield
    except BaseException:
        for drop, value in zip(drops, before, strict=True):
            setattr(drop.holder, drop.attribute, value)
        raise


def _in_modules(model: nn.Module) -> Iterator[OwnDrop]:
    for name, module in model.named_modules():
        kind = type(module).__name__
        for attribute, acts_on in _RATES.items():
            if acts_on == "branch" and not kind.endswith(_MODULES):
                continue
            if rate := _rate(module, attribute):
                path = f"{name}.{attribute}" if name else attribute
                yield OwnDrop(module, attribute, path, rate, kind, acts_on, (name,))


def _in_configurations(model: nn.Module) -> Iterator[OwnDrop]:
    """A configuration counts once, where it is met first: parts of a model share one."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is None or id(config) in seen:
            continue
        seen.add(id(config))
        for attribute in _LAYER_DROP:
            if rate := _rate(config, attribute):
                path = f"{name}.config.{attribute}" if name else f"config.{attribute}"
                readers = tuple(_readers(model, config, attribute))
                kind = type(module).__name__
                yield OwnDrop(config, attribute, path, rate, kind, "layers", readers)


def _readers(model: nn.Module, config: Any, attribute: str) -> Iterator[str]:
    """The modules whose forward reads the rate off the configuration, not off themselves.

    Most have copied it when they were built; then the configuration's has no effect.
    """
    for name, module in model.named_modules():
        if getattr(module, "config", None) is not config or hasattr(module, attribute):
            continue
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and attribute in code.co_names:
            yield name


def _rate(holder: Any, attribute: str) -> float:
    rate = as_number(getattr(holder, attribute, None))
    return 0.0 if rate is None or rate <= 0 else rate
