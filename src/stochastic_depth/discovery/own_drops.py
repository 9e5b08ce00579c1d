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

from stochastic_depth.discovery.blocks import Discovery, ResidualBlock
from stochastic_depth.discovery.recording import Recording
from stochastic_depth.distributions import resolve_rates
from stochastic_depth.errors import ActiveDropPathError, OptionError, as_number, warn

_DROP_PATHS = ("DropPath", "StochasticDepth", "DropConnect")  # how the names of classes end
_DROP_PATH_RATES = ("drop_prob", "p", "drop_rate")
# Modules read the first from their configuration; the second they copy when they are built.
_LAYERDROPS = ("layerdrop", "speech_encoder_layerdrop")
_COPIED_LAYERDROPS = ("encoder_layerdrop", "decoder_layerdrop")
_COINS = frozenset(("bernoulli", "native_dropout"))
_UNIFORM = frozenset(("rand", "rand_like", "uniform"))
_COMPARED = frozenset("floor ceil round lt le gt ge".split())
Known = dict[str, frozenset[str] | None]  # attribute -> the lists whose layers it skips


@dataclass(frozen=True, slots=True, eq=False)
class OwnDrop:
    """A rate above 0 at which a model drops something by itself.

    Attributes:
        holder: The module or configuration that has the rate as an attribute.
        owner: The holder's name in the model.
        attribute: The attribute's name.
        rate: The rate.
        lists: The names of the lists whose layers it skips as a whole; None for a drop path.
    """

    holder: Any
    owner: str
    attribute: str
    rate: float
    lists: frozenset[str] | None

    @property
    def path(self) -> str:
        """How the attribute is reached from the model."""
        return f"{self.owner}.{self.attribute}" if self.owner else self.attribute


def own_drops(model: nn.Module) -> list[OwnDrop]:
    """Every drop path and layerdrop of the model whose rate is above 0, configurations last."""
    drops: list[OwnDrop] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        children = module.named_children()
        lists = frozenset(f"{prefix}{n}" for n, m in children if isinstance(m, nn.ModuleList))
        known: Known = dict.fromkeys(_LAYERDROPS + _COPIED_LAYERDROPS, lists)
        is_path = type(module).__name__.endswith(_DROP_PATHS)
        known |= dict.fromkeys(("sample_drop_ratio", *(_DROP_PATH_RATES if is_path else ())))
        read = frozenset[str]() if hasattr(module, "layerdrop") else lists
        shared: Known = dict.fromkeys(_COPIED_LAYERDROPS, frozenset())
        shared |= dict.fromkeys(_LAYERDROPS, read)
        config = getattr(module, "config", None)
        drops += [
            OwnDrop(holder, owner, attribute, rate, skipped)
            for holder, owner, of in ((module, name, known), (config, f"{prefix}config", shared))
            for attribute, skipped in of.items()
            if (rate := as_number(getattr(holder, attribute, None))) and rate > 0
        ]
    return sorted(drops, key=lambda drop: not isinstance(drop.holder, nn.Module))


@contextmanager
def switched_off(model: nn.Module) -> Iterator[list[OwnDrop]]:
    """What the model drops by itself, which is off while this lasts."""
    drops = own_drops(model)
    try:
        for drop in drops:
            setattr(drop.holder, drop.attribute, 0.0)
        yield drops
    finally:
        for drop in drops:
            setattr(drop.holder, drop.attribute, drop.rate)


def check_own_drops(model: nn.Module, drops: Sequence[OwnDrop], *, wanted: bool) -> None:
    """Raises where a model does not drop anything by itself though that is wanted, or does."""
    if wanted and not drops:
        raise OptionError(
            'drop_rate is "model", but no drop path or layerdrop of '
            f"{type(model).__name__} is above 0",
            expected="a model that drops branches of its own accord",
            instead="build the model with it (drop_path_rate=0.1, stochastic_depth_prob=0.1, "
            "layerdrop=0.1), or pass a number as drop_rate",
        )
    if drops and not wanted:
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


def warn_of_masks(found: Discovery) -> None:
    """Warn of a branch that is multiplied by a random number of each example: a drop path, too."""
    for sites in found.sites.values():
        for site in sites:
            recording, nodes = site.recording, site.recording.nodes
            for node in (nodes[index] for index in sorted(site.path)):
                masks = node.inputs if node.op in ("mul", "div") else ()
                if any(_is_drawn_by_row(recording, index) for index in masks):
                    warn(
                        f'"{recording.module_at(node.index)}" multiplies a branch by a number '
                        "that it draws for each example: the model drops branches of its own "
                        "accord, besides; set its rate to 0"
                    )
                    return


def _is_drawn_by_row(recording: Recording, value: int) -> bool:
    node = recording.nodes[value]
    rows, *others = node.shape if len(node.shape) > 1 else (1,)
    return (
        node.fixed
        and rows > 1
        and all(size == 1 for size in others)
        and _is_coin({recording.nodes[index].op for index in recording.behind([value], 0)})
    )


def _is_coin(ops: set[str]) -> bool:
    """Whether operations draw one of two values."""
    is_compared = not ops.isdisjoint(_COMPARED) and not ops.isdisjoint(_UNIFORM)
    return is_compared or not ops.isdisjoint(_COINS)


def rates_taken_over(
    drops: Sequence[OwnDrop], found: Discovery, gated: Sequence[ResidualBlock], *, named: bool
) -> tuple[float, ...]:
    """The model's own rate of each gated block, 0 where it has none.

    Args:
        drops: What the model drops by itself.
        found: What was found in the model.
        gated: The blocks to gate.
        named: Whether the user named them; then what is dropped elsewhere is given up.

    Raises:
        ActiveDropPathError: A block has two rates, or something is dropped that is no gated block.
    """
    dropped = {drop: _branches_of(drop, found) for drop in drops}
    rates: dict[str, float] = {}
    partly: list[str] = []
    for block in gated:
        names = {branch.name for branch in block.branches}
        if acting := [drop for drop in drops if dropped[drop] & names]:
            rates[block.name] = acting[0].rate
            _refuse_two_rates(block, {drop.rate: drop for drop in acting})
            partly += [block.name] if names.difference(*(dropped[drop] for drop in acting)) else []
    if not rates:
        to_zero = f"set {_all_to_zero(drops)} and pass a number as drop_rate"
        raise _not_taken_over(drops[0], "it drops none of the gated blocks", to_zero)
    kept = {branch.name for block in gated for branch in block.branches}
    for drop, branches in ({} if named else dropped).items():
        affine = sorted(branches - kept)
        # Others are built and never called (EfficientNet).
        if affine or (not branches and drop.owner in found.recording.calls_of):
            why = "what it drops was not found as a residual block"
            raise _not_taken_over(
                drop,
                f'block "{affine[0].partition(":")[0]}" is affine' if affine else why,
                'pass blocks="*" to do without it, or name the blocks that you want: what is '
                "dropped elsewhere is then set to 0",
            )
    if partly:
        warn(
            f'the model itself drops only some of the branches of {len(partly)} blocks ("'
            f'{partly[0]}"): now all of their branches have that rate'
        )
    return resolve_rates(rates, None, [block.name for block in gated])


def _branches_of(drop: OwnDrop, found: Discovery) -> set[str]:
    """The names of the branches that it drops."""
    pairs = [(block, branch) for block in found.blocks for branch in block.branches]
    if drop.lists is not None:
        return {b.name for block, b in pairs if block.name.rpartition(".")[0] in drop.lists}
    # At rate 0 some are not called (DINOv2): then its name says in which block it belongs.
    around = [
        (len(name), branch.name)
        for block, branch in pairs
        for name in (block.name, *branch.modules)
        if f"{drop.owner}.".startswith(f"{name}." if name else "")
    ]
    innermost = max(around, default=(0, ""))[0]
    return {branch for depth, branch in around if depth == innermost}


def _refuse_two_rates(block: ResidualBlock, acting: Mapping[float, OwnDrop]) -> None:
    if len(acting) > 1:
        raise ActiveDropPathError(
            f'block "{block.name}" has two rates of its own: '
            + ", ".join(f"{drop.path} is {drop.rate}" for drop in acting.values()),
            expected="one rate for a block",
            instead="set them to the same rate; or leave the block out, "
            f'blocks=["!{block.name}"], which sets both to 0',
        )


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
