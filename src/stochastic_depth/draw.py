"""How it is drawn which blocks run: a pure function of (seed, step, call, names), no hidden state.

So processes agree without talking, a resumed run continues the same sequence, and the global
generators of torch, NumPy and Python are never touched.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, shake_128
from typing import Any, Literal, get_args

from stochastic_depth.errors import OptionError, nearest

Sampling = Literal["independent", "balanced"]
AcrossRanks = Literal["auto", "same", "different"]
Redraw = Literal["forward", "step"]
_ROUNDING = 1e-9  # a sum of rates this close to an integer is one


@dataclass(frozen=True)
class Draw:
    """How the gates are drawn.

    Args:
        seed: Another seed, another sequence of draws.
        sampling: "independent": each block on its own (Huang et al. 2016, section 3). "balanced":
            at the same rates, but nearly the same number of blocks in every forward (one of two
            neighbouring integers), and with `across_ranks="different"` the same on every rank, so
            that none waits for another; for mode="batch" only.
        across_ranks: "same": every rank drops the same blocks, which saves most time;
            "different": each its own, which is more various. "auto": the same in mode "batch",
            different ones in mode "sample".
        redraw: "forward": each training forward has draws of its own (each microbatch under
            gradient accumulation); "step": one draw for all forwards of an optimizer step, which
            needs `depth.follow(optimizer)` or `depth.step()`.
        process_group: The ranks among which draws differ: those that train on different data.
            None: all. Copies share it; pickling leaves it out.

    Mode "sample" keeps a window of the batch from a random row on, wrapping around at its end (of
    half of the batch: either half).

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> Draw(seed=1, redraw="step")
        Draw(seed=1, sampling='independent', across_ranks='auto', redraw='step', process_group=None)
    """

    seed: int = 0
    sampling: Sampling = "independent"
    across_ranks: AcrossRanks = "auto"
    redraw: Redraw = "forward"
    process_group: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise OptionError(
                f"Draw(seed={self.seed!r})", expected="an integer", instead="pass any, seed=1, say"
            )
        check_choice("Draw(sampling=...)", self.sampling, get_args(Sampling))
        check_choice("Draw(across_ranks=...)", self.across_ranks, get_args(AcrossRanks))
        check_choice("Draw(redraw=...)", self.redraw, get_args(Redraw))

    def __deepcopy__(self, memo: dict[int, Any]) -> Draw:
        return self  # frozen, and a process group cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": None}


def check_choice(option: str, value: object, known: tuple[str, ...]) -> None:
    """Raises unless the value is one of the known ones."""
    if value not in known:
        text = " or ".join(f'"{choice}"' for choice in known)
        raise OptionError(
            f"{option} got {value!r}", expected=text, instead=nearest(str(value), known)
        )


def uniforms(
    seed: int, step: int, call: int, names: Sequence[str], rank: int | None = None
) -> tuple[float, ...]:
    """A number in [0, 1) for each name, all of them independent, from one hash.

    Another seed, step, call, rank or list of names gives other numbers.

    Args:
        seed: `Draw.seed`.
        step: The optimizer step.
        call: How often the gate was called before in this step.
        names: What is drawn for: blocks ("layer3.2") or branches ("blocks.3:0").
        rank: Of the process, where each has draws of its own.

    Example:
        >>> first, second = uniforms(0, 0, 0, ("layer3.1", "layer3.2"))
        >>> round(first, 4), round(second, 4)
        (0.1341, 0.1237)
    """
    return tuple(map(real, integers(seed, step, call, Names(names), rank)))


class Names:
    """Names that are drawn for time and again."""

    def __init__(self, names: Sequence[str]) -> None:
        self.digest = blake2b("\n".join(names).encode(), digest_size=16).digest()
        self.bytes, self.format = 8 * len(names), f"<{len(names)}Q"


def integers(seed: int, step: int, call: int, names: Names, rank: int | None) -> tuple[int, ...]:
    """The same as integers of 64 bits."""
    key = f"{seed},{step},{call},{rank}".encode() + names.digest
    return struct.unpack(names.format, shake_128(key).digest(names.bytes))


def real(number: int) -> float:
    """One of these integers as a real number in [0, 1)."""
    return (number >> 11) * 2.0**-53  # the 53 bits of a float


def limit(rate: float) -> int:
    """The integer below which a gate of this rate is closed: as `uniforms` below the rate."""
    return math.ceil(rate * 2.0**53) << 11


def balancing_order(seed: int, step: int, call: int, names: Sequence[str]) -> list[str]:
    """The random order in which `balanced` goes through the names, those of a stage together."""
    stages = list(dict.fromkeys(_stage(name) for name in names))
    places = uniforms(seed, step, call, ("the order", *stages, *names))[1:]
    of_stage = dict(zip(stages, places, strict=False))
    of_name = dict(zip(names, places[len(stages) :], strict=True))
    return sorted(names, key=lambda name: (of_stage[_stage(name)], of_name[name]))


def _stage(name: str) -> str:
    return name.rpartition(".")[0]


def rates_of_a_forward(rates: Mapping[str, float], u: float) -> dict[str, float]:
    """Rates that add up to an integer, one of the two around the sum, and on average to `rates`.

    So all ranks drop as many in one forward. What is added to a rate where the integer is the upper
    one, with probability f, and taken off where it is not, is in proportion to what it can bear:
    the smaller of `p / f` and `(1 - p) / (1 - f)`.

    Args:
        rates: Of all that gets a draw, by name.
        u: Uniform in [0, 1).

    Example:
        >>> rates_of_a_forward({"a": 0.5, "b": 0.0, "c": 0.25}, u=0.1)
        {'a': 0.6666666666666666, 'b': 0.0, 'c': 0.3333333333333333}
        >>> rates_of_a_forward({"a": 0.5, "b": 0.0, "c": 0.25}, u=0.9)
        {'a': 0.0, 'b': 0.0, 'c': 0.0}
    """
    part = math.fsum(rates.values()) % 1.0
    if not _ROUNDING < part < 1.0 - _ROUNDING:
        return dict(rates)
    bears = {name: min(p / part, (1.0 - p) / (1.0 - part)) for name, p in rates.items()}
    more = (1.0 - part if u < part else -part) / math.fsum(bears.values())
    return {name: rate + more * bears[name] for name, rate in rates.items()}


def balanced(
    seed: int, step: int, call: int, rates: Mapping[str, float], share: float = 0.0
) -> dict[str, bool]:
    """Which of all blocks are kept, so that the number of drops is nearly constant.

    Systematic sampling in a random order: with `C_i` the running sum of the rates and `u` uniform
    in [0, 1), block i is dropped where `floor(C_i + u) > floor(C_(i-1) + u)`. Every block is
    dropped at exactly its rate, and the number of drops is one of the two integers around the sum
    of the rates, on all ranks the same (see `rates_of_a_forward`). Blocks that stand side by side
    in the model ("layer3.0", "layer3.1") stay side by side in the order: they cost alike, so that
    the cost of what is dropped hardly varies either.

    Args:
        seed: `Draw.seed`.
        step: The optimizer step.
        call: Which forward of that step.
        rates: Of all that gets a draw, by name.
        share: `rank / ranks` where each rank has draws of its own: it shifts `u`, so that each
            block is dropped on its share of the ranks.

    Example:
        >>> rates = {"a": 0.5, "b": 0.25, "c": 0.25}
        >>> [name for name, kept in balanced(0, 0, 0, rates).items() if not kept]
        ['a']
    """
    number, offset = balancing_numbers(seed, step, call)
    rates, total = rates_of_a_forward(rates, number), (offset + share) % 1.0
    kept = {}
    for name in balancing_order(seed, step, call, list(rates)):
        before, total = math.floor(total), total + rates[name]
        kept[name] = math.floor(total) == before
    return kept


def balancing_numbers(seed: int, step: int, call: int) -> tuple[float, ...]:
    """The two numbers in [0, 1) of `balanced`: for the number of drops, and for where it begins."""
    return uniforms(seed, step, call, ("the number of drops", "the offset"))
