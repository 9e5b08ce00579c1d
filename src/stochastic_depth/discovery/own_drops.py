"""What a model drops by itself, drop path and layerdrop, and how its rates are taken over.

Both are known by the names that libraries give them. timm and transformers call the module
DropPath (`drop_prob`), torchvision StochasticDepth (`p`); DINOv2's blocks run on a part of the
batch (`sample_drop_ratio`). transformers' layerdrop is an attribute `layerdrop` of the module that
runs the layers, or of its configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from stochastic_depth.arguments import as_number
from stochastic_depth.discovery.blocks import Discovery, ResidualBlock
from stochastic_depth.errors import ActiveDropPathError, OptionError, warn

_DROP_PATHS = ("DropPath", "StochasticDepth", "DropConnect")  # how the names of classes end
_DROP_PATH_RATES = ("drop_prob", "p", "drop_rate")
# Modules copy the first when they are built; the second they read from their configuration.
_COPIED_LAYERDROPS = ("encoder_layerdrop", "decoder_layerdrop")
_LAYERDROPS = ("layerdrop", "speech_encoder_layerdrop")

Rates = dict[str, frozenset[str] | None]  # the name of an attribute -> the layers that it skips


@dataclass(frozen=True, slots=True, eq=False)
class OwnDrop:
    """A rate above 0 at which a model drops something by itself.

    Attributes:
        holder: The module or configuration that has the rate as an attribute.
        owner: The holder's name in the model.
        attribute: The attribute's name.
        rate: The rate.
        layers: The names of the layers that it skips as a whole; None for a drop path.
    """

    holder: Any
    owner: str
    attribute: str
    rate: float
    layers: frozenset[str] | None

    @property
    def path(self) -> str:
        """How the attribute is reached from the model."""
        return f"{self.owner}.{self.attribute}" if self.owner else self.attribute


def own_drops(model: nn.Module) -> list[OwnDrop]:
    """Every drop path and layerdrop of the model whose rate is above 0, configurations last."""
    drops: list[OwnDrop] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        layers = frozenset(
            f"{prefix}{child}.{number}"
            for child, modules in module.named_children()
            if isinstance(modules, nn.ModuleList)
            for number in range(len(modules))
        )
        rates: Rates = {"sample_drop_ratio": frozenset([name])}
        rates |= dict.fromkeys(_LAYERDROPS + _COPIED_LAYERDROPS, layers)
        if type(module).__name__.endswith(_DROP_PATHS):
            rates |= dict.fromkeys(_DROP_PATH_RATES)
        drops += _above_zero(module, name, rates)
        rates = dict.fromkeys(_LAYERDROPS + _COPIED_LAYERDROPS, frozenset())
        if not hasattr(module, "layerdrop"):
            rates |= dict.fromkeys(_LAYERDROPS, layers)
        drops += _above_zero(getattr(module, "config", None), f"{prefix}config", rates)
    return sorted(drops, key=lambda drop: not isinstance(drop.holder, nn.Module))


def _above_zero(holder: Any, owner: str, rates: Rates) -> Iterator[OwnDrop]:
    for attribute, layers in rates.items():
        rate = as_number(getattr(holder, attribute, None))
        if rate is not None and rate > 0:
            yield OwnDrop(holder, owner, attribute, rate, layers)


def refuse_own_drops(model: nn.Module) -> None:
    """Raises where the model's own drop path or layerdrop is active, naming what to set to 0."""
    if drops := own_drops(model):
        first = drops[0]
        preset = "apply_layer_drop" if "layerdrop" in first.attribute else "apply_drop_path"
        raise ActiveDropPathError(
            f"{first.path} is {first.rate}: the model drops branches of its own accord "
            f"({type(first.holder).__name__})",
            expected="a model whose own drop path and layerdrop are 0",
            instead="build the model without it (drop_path_rate=0, stochastic_depth_prob=0, "
            f"layerdrop=0) or set {_all_to_zero(drops)}; or call "
            f'sd.{preset}(model, "model"), which takes its rates over',
        )


@contextmanager
def switched_off(model: nn.Module) -> Iterator[list[OwnDrop]]:
    """Sets the model's own rates to 0; for good, unless what is done meanwhile raises."""
    drops = own_drops(model)
    if not drops:
        raise OptionError(
            f'drop_rate is "model", but no drop path or layerdrop of {type(model).__name__} is '
            "above 0",
            expected="a model that drops branches of its own accord",
            instead="build the model with it (drop_path_rate=0.1, stochastic_depth_prob=0.1, "
            "layerdrop=0.1), or pass a number as drop_rate",
        )
    try:
        for drop in drops:
            setattr(drop.holder, drop.attribute, 0.0)
        yield drops
    except BaseException:
        for drop in drops:
            setattr(drop.holder, drop.attribute, drop.rate)
        raise


def rates_taken_over(
    drops: Sequence[OwnDrop], found: Discovery, gated: Sequence[ResidualBlock], *, chosen: bool
) -> dict[str, float]:
    """The model's own rate of each gated block that has one.

    Args:
        drops: What the model drops by itself.
        found: What was found in the model.
        gated: The blocks to gate.
        chosen: Whether the user chose them; then what is dropped elsewhere is given up.

    Raises:
        ActiveDropPathError: A block has two rates, or something is dropped that is no gated block.
    """
    dropped = {drop: _branches_of(drop, found) for drop in drops}
    rates: dict[str, float] = {}
    partly: list[str] = []
    for block in gated:
        names = [branch.name for branch in block.branches]
        acting = [drop for drop in drops if dropped[drop].intersection(names)]
        if acting:
            rates[block.name] = _common_rate(block, acting)
            if not all(any(name in dropped[drop] for drop in acting) for name in names):
                partly.append(block.name)
    if not rates:
        to_zero = f"set {_all_to_zero(drops)} and pass a number as drop_rate"
        raise _not_taken_over(drops[0], "it drops none of the gated blocks", to_zero)
    if not chosen:
        _refuse_dropped_elsewhere(dropped, found, gated)
    if partly:
        warn(
            f'the model itself drops only some of the branches of {len(partly)} blocks ("'
            f'{partly[0]}"): now all of their branches have that rate'
        )
    return rates


def _branches_of(drop: OwnDrop, found: Discovery) -> set[str]:
    """The names of the branches that it drops."""
    pairs = [(block, branch) for block in found.blocks for branch in block.branches]
    if drop.layers is not None:
        return {branch.name for block, branch in pairs if block.name in drop.layers}
    around = [pair for pair in pairs if any(_lies_in(drop.owner, m) for m in pair[1].modules)]
    if around:
        innermost = max(block.nesting for block, _ in around)
        return {branch.name for block, branch in around if block.nesting == innermost}
    # In eval mode some do not call it (DINOv2): its name says where it belongs.
    names = [block.name for block in found.blocks if _lies_in(drop.owner, block.name)]
    nearest = max(names, key=len, default=None)
    return {branch.name for block, branch in pairs if block.name == nearest}


def _lies_in(module: str, around: str) -> bool:
    return f"{module}.".startswith(f"{around}." if around else "")


def _common_rate(block: ResidualBlock, acting: Sequence[OwnDrop]) -> float:
    first = acting[0]
    for other in acting:
        if other.rate != first.rate:
            raise ActiveDropPathError(
                f'block "{block.name}" has two rates of its own: {first.path} is {first.rate}, '
                f"{other.path} is {other.rate}",
                expected="one rate for a block",
                instead="set them to the same rate; or leave the block out, "
                f'blocks=["!{block.name}"], which sets both to 0',
            )
    return first.rate


def _refuse_dropped_elsewhere(
    dropped: Mapping[OwnDrop, set[str]], found: Discovery, gated: Sequence[ResidualBlock]
) -> None:
    instead = (
        'pass blocks="*" to do without it, or name the blocks that you want: what is dropped '
        "elsewhere is then set to 0"
    )
    kept = {branch.name for block in gated for branch in block.branches}
    for drop, branches in dropped.items():
        for branch in sorted(branches - kept):
            why = f'block "{branch.partition(":")[0]}" is affine'
            raise _not_taken_over(drop, why, instead)
        # Others are built and never called (EfficientNet).
        if not branches and drop.owner in found.recording.calls_of:
            why = "what it drops was not found as a residual block"
            raise _not_taken_over(drop, why, instead)


def _not_taken_over(drop: OwnDrop, why: str, instead: str) -> ActiveDropPathError:
    return ActiveDropPathError(
        f'{drop.path} is {drop.rate}, which "model" cannot take over: {why}',
        expected="rates of residual blocks that are gated",
        instead=instead,
    )


def _all_to_zero(drops: Sequence[OwnDrop]) -> str:
    """What to set, in words; the modules of a model share one configuration."""
    more = len({(id(drop.holder), drop.attribute) for drop in drops}) - 1
    return f"{drops[0].path} = 0" + (f" (and {more} more)" if more else "")
