"""Depth -> rates: how the drop rates are spread over the blocks. Pure functions, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from stochastic_depth import errors

DropRate = float | Iterable[float] | Mapping[str, float]
Distribution = Callable[[int, float], Iterable[float]]
Spread = str | Distribution | None


_RATE = errors.Number(
    lambda rate: 0 <= rate < 1,
    expected="a number from 0 up to, but not including, 1",
    instead="pass the share of steps in which the block is dropped, such as 0.2",
)


def linear(num_blocks: int, drop_rate: float) -> list[float]:
    """Rises with depth up to the rate: ``(l / L) * drop_rate``, l = 1..L.

    Huang et al. 2016 (arXiv 1603.09382), equation 4: the first block has a small rate already.

    Example:
        >>> linear(4, 0.5)
        [0.125, 0.25, 0.375, 0.5]
    """
    return [(block / num_blocks) * drop_rate for block in range(1, num_blocks + 1)]


def linear_from_zero(num_blocks: int, drop_rate: float) -> list[float]:
    """Rises from 0 for the first block to the rate for the last, as timm's drop path does.

    Example:
        >>> linear_from_zero(5, 0.5)
        [0.0, 0.125, 0.25, 0.375, 0.5]
    """
    steps = max(num_blocks - 1, 1)
    return [(block / steps) * drop_rate for block in range(num_blocks)]


def uniform(num_blocks: int, drop_rate: float) -> list[float]:
    """Gives every block the same rate, as LayerDrop does (Fan et al. 2019).

    Example:
        >>> uniform(3, 0.2)
        [0.2, 0.2, 0.2]
    """
    return [drop_rate] * num_blocks


_BY_NAME: dict[str, Distribution] = {f.__name__: f for f in (linear, linear_from_zero, uniform)}


def resolve_rates(
    drop_rate: DropRate, drop_distribution: Spread, names: Sequence[str]
) -> tuple[float, ...]:
    """Returns one drop rate for each named block.

    Args:
        drop_rate: A number; one number per block; or ``{name or glob: number}``, where later
            keys override earlier ones and blocks that no key matches get 0.
        drop_distribution: How a number is spread over the blocks: "linear" (also None),
            "linear_from_zero", "uniform" or a function ``(num_blocks, drop_rate) -> rates``.
            Must be None for a list or mapping.
        names: The blocks' names, in forward order.

    Raises:
        OptionError: A rate outside [0, 1), or rates that do not fit the blocks.
        SelectionError: A key that matches no block, or an unknown distribution.

    Example:
        >>> names = ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
        >>> resolve_rates(0.5, "linear", names)
        (0.125, 0.25, 0.375, 0.5)
        >>> resolve_rates({"layer2.*": 0.2, "layer2.1": 0.4}, None, names)
        (0.0, 0.0, 0.2, 0.4)
    """
    is_scalar = isinstance(drop_rate, str | AbstractSet) or getattr(drop_rate, "ndim", 1) == 0
    if is_scalar or not isinstance(drop_rate, Iterable):
        return _spread(_rate(drop_rate, "drop_rate"), drop_distribution, names)
    if drop_distribution is not None:
        raise errors.OptionError(
            f"drop_distribution is {drop_distribution!r} although drop_rate says each block's rate",
            expected="a distribution only beside a single number",
            instead="leave drop_distribution out, or pass one number as drop_rate",
        )
    if not isinstance(drop_rate, Mapping):
        return _per_block(drop_rate, names, source="drop_rate")
    if not drop_rate:
        raise errors.SelectionError(
            "drop_rate is an empty mapping",
            expected="at least one name or glob of a block with its rate",
            instead=errors.nearest("", names),
        )
    by_name = dict.fromkeys(names, 0.0)
    for key, value in drop_rate.items():
        rate = _rate(value, f"drop_rate[{key!r}]")
        by_name |= dict.fromkeys(errors.matching(key, names, argument="drop_rate"), rate)
    return tuple(by_name.values())


def _spread(rate: float, distribution: Spread, names: Sequence[str]) -> tuple[float, ...]:
    known = f"one of {', '.join(_BY_NAME)}, or a function (num_blocks, drop_rate)"
    name = "linear" if distribution is None else distribution
    if isinstance(name, str) and name not in _BY_NAME:
        raise errors.SelectionError(
            f'drop_distribution is "{name}"', expected=known, instead=errors.nearest(name, _BY_NAME)
        )
    function = _BY_NAME[name] if isinstance(name, str) else name
    if not callable(function):
        raise errors.wrong_value(
            "drop_distribution",
            distribution,
            expected=known,
            instead="pass the rates themselves as drop_rate, and no distribution",
        )
    rates = function(len(names), rate)
    source = f"{getattr(function, '__name__', repr(function))}({len(names)}, {rate})"
    if not isinstance(rates, Iterable):
        raise errors.OptionError(
            f"drop_distribution returned {rates!r} from {source}",
            expected="a list of rates, one per block",
            instead='return a list; for one rate everywhere, pass drop_distribution="uniform"',
        )
    return _per_block(rates, names, source=source)


def _per_block(rates: Iterable[float], names: Sequence[str], *, source: str) -> tuple[float, ...]:
    values = list(rates)
    if len(values) != len(names):
        raise errors.OptionError(
            f"{source} holds {len(values)} rates for {len(names)} blocks",
            expected="one rate per block, in forward order",
            instead=f"give {len(names)} rates, or a mapping {{name or glob: rate}} for some blocks",
        )
    return tuple(_rate(value, f"{source}[{index}]") for index, value in enumerate(values))


def _rate(value: object, source: str) -> float:
    return float(_RATE.read(value, source))
