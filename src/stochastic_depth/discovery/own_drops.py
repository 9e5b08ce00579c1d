"""What a model drops by itself, drop path and layerdrop, and how its rates are taken over.

Both are known by the names that libraries give them. timm and transformers call the module
DropPath (`drop_prob`), torchvision StochasticDepth (`p`); DINOv2's blocks run on a part of the
batch (`sample_drop_ratio`). transformers' layerdrop is an attribute `layerdrop` of the module that
runs the layers, or of its configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from stochastic_depth.arguments import as_number
from stochastic_depth.discovery.blocks import Discovery, ResidualBlock, ResidualBranch
from stochastic_depth.errors import ActiveDropPathError, warn

_DROP_PATHS = ("DropPath", "StochasticDepth", "DropConnect")  # how the names of classes end
_DROP_PATH_RATES = ("drop_prob", "p", "drop_rate")
# Modules copy the first when they are built; the second they read from their configuration.
_COPIED_LAYERDROPS = ("encoder_layerdrop", "decoder_layerdrop")
_LAYERDROPS = ("layerdrop", "speech_encoder_layerdrop")


@dataclass(frozen=True, slots=True, eq=False)
class OwnDrop:
    """A rate above 0 at which a model drops something by itself.

    Attributes:
        holder: The module or configuration that has the rate as an attribute.
        owner: The name of the holder in the model.
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
    in_modules: list[OwnDrop] = []
    in_configurations: list[OwnDrop] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        layers = frozenset(
            f"{prefix}{child}.{number}"
            for child, modules in module.named_children()
            if isinstance(modules, nn.ModuleList)
            for number in range(len(modules))
        )
        if type(module).__name__.endswith(_DROP_PATHS):
            in_modules += _above_zero(module, name, _DROP_PATH_RATES, None)
        in_modules += _above_zero(module, name, ["sample_drop_ratio"], frozenset([name]))
        in_modules += _above_zero(module, name, _LAYERDROPS + _COPIED_LAYERDROPS, layers)
        config, copied = getattr(module, "config", None), hasattr(module, "layerdrop")
        read = frozenset[str]() if copied else layers
        in_configurations += _above_zero(config, f"{prefix}config", _LAYERDROPS, read)
        in_configurations += _above_zero(config, f"{prefix}config", _COPIED_LAYERDROPS, frozenset())
    return in_modules + in_configurations


def _above_zero(
    holder: Any, owner: str, attributes: Iterable[str], layers: frozenset[str] | None
) -> Iterator[OwnDrop]:
    for attribute in attributes:
        rate = as_number(getattr(holder, attribute, None))
        if rate is not None and rate > 0:
            yield OwnDrop(holder, owner, attribute, rate, layers)


def refuse_own_drops(model: nn.Module) -> None:
    """Raises where the model's own drop path or layerdrop is active, naming what to set to 0."""
    for drop in own_drops(model):
        preset = "apply_layer_drop" if "layerdrop" in drop.attribute else "apply_drop_path"
        raise ActiveDropPathError(
            f"{drop.path} is {drop.rate}: the model drops branches of its own accord "
            f"({type(drop.holder).__name__})",
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


def rates_taken_over(
    drops: Sequence[OwnDrop], found: Discovery, gated: Sequence[ResidualBlock], *, chosen: bool
) -> dict[str, float]:
    """The model's own rate of each gated block that has one.

    Args:
        drops: What the model drops by itself.
        found: What was found in the model.
        gated: The blocks to gate.
        chosen: Whether the user chose the blocks; then what is dropped elsewhere is given up.

    Raises:
        ActiveDropPathError: A block has two rates, or something is dropped that is no gated block.
    """
    drops_of: dict[str, list[OwnDrop]] = {b.name: [] for block in gated for b in block.branches}
    for drop in drops:
        dropped = list(_dropped_by(drop, found))
        for block, branch in dropped:
            if not chosen and branch.name not in drops_of:
                raise _not_gated(drop, f'block "{block.name}" is affine')
            drops_of.setdefault(branch.name, []).append(drop)
        # Some are built and never called (EfficientNet).
        if not chosen and not dropped and drop.owner in found.recording.calls_of:
            raise _not_gated(drop, "what it drops was not found as a residual block")
    rates: dict[str, float] = {}
    partly: list[str] = []
    for block in gated:
        acting = [drop for branch in block.branches for drop in drops_of[branch.name]]
        if not acting:
            continue
        rates[block.name] = _the_one_rate(block, acting)
        if not all(drops_of[branch.name] for branch in block.branches):
            partly.append(block.name)
    if not rates:
        raise _not_gated(drops[0], "it drops none of the gated blocks")
    if partly:
        warn(
            f'the model itself drops only some of the branches of {len(partly)} blocks ("'
            f'{partly[0]}"): now all of their branches have that rate'
        )
    return rates


def _dropped_by(drop: OwnDrop, found: Discovery) -> Sequence[tuple[ResidualBlock, ResidualBranch]]:
    """The branches that it drops: those of its layers, or those around a drop path."""
    branches = [(block, branch) for block in found.blocks for branch in block.branches]
    if drop.layers is not None:
        return [(block, branch) for block, branch in branches if block.name in drop.layers]
    if around := [pair for pair in branches if _lies_in(drop.owner, *pair[1].modules)]:
        innermost = max(block.nesting for block, _ in around)
        return [pair for pair in around if pair[0].nesting == innermost]
    # In eval mode some do not call it (DINOv2): its name says where it belongs.
    names = [block.name for block in found.blocks if _lies_in(drop.owner, block.name)]
    nearest = max(names, key=len, default=None)
    return [pair for pair in branches if pair[0].name == nearest]


def _lies_in(module: str, *modules: str) -> bool:
    return any(f"{module}.".startswith(f"{around}." if around else "") for around in modules)


def _the_one_rate(block: ResidualBlock, acting: Sequence[OwnDrop]) -> float:
    low, high = min(acting, key=lambda d: d.rate), max(acting, key=lambda d: d.rate)
    if low.rate != high.rate:
        raise ActiveDropPathError(
            f'block "{block.name}" has two rates of its own: {low.path} is {low.rate}, '
            f"{high.path} is {high.rate}",
            expected="one rate for a block",
            instead="set them to the same rate; or leave the block out, "
            f'blocks=["!{block.name}"], which sets both to 0',
        )
    return low.rate


def _not_gated(drop: OwnDrop, why: str) -> ActiveDropPathError:
    return ActiveDropPathError(
        f'{drop.path} is {drop.rate}, which "model" cannot take over: {why}',
        expected="rates of residual blocks that are gated",
        instead='pass blocks="*" to do without it, or name the blocks that you want: what is '
        "dropped elsewhere is then set to 0",
    )
