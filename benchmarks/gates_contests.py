"""The contests of `gates.py`: a gated network and its twin, step by step on the same draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import thread_time
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import stochastic_depth as sd
from gates_networks import ByHand, Instead, skip_path
from interleaved import Draws, Ratio, Step, sharing, take_turns, typical

Figures = NDArray[np.float64]
Scale = Literal["eval", "train", "none"]

WARMUP = 3
ROUNDS = 4  # each with networks of its own
CALLS = 100  # of the Linear in one turn
PER_GATE = "calls of a Linear per gate"


@dataclass(frozen=True)
class Line:
    """A line of the table: a figure, and what it should be at most."""

    figure: Ratio
    unit: str
    target: float | None = None

    def __str__(self) -> str:
        target = "" if self.target is None else f", at most {self.target:g}"
        return f"{self.figure} {self.unit}{target}"


class Pair:
    """A gated network, and its twin that leaves the same blocks out by hand.

    Args:
        plain: The network.
        example: What it is called with.
        instead: What the twin calls in the place of a block.
        rate: As in `sd.apply_stochastic_depth`.
        distribution: Likewise.
        scale: Likewise.
        share: How the two are made of the network; they share its parameters.
    """

    def __init__(
        self,
        plain: nn.Module,
        example: Tensor,
        instead: Instead = skip_path,
        *,
        rate: float = 0.5,
        distribution: str = "linear",
        scale: Scale = "eval",
        share: Callable[[nn.Module], nn.Module] = sharing,
    ) -> None:
        self.plain, self.example = plain, example
        self.gated, self.twin = share(plain), share(plain)
        self.depth = sd.apply_stochastic_depth(
            self.gated, rate, distribution, example_inputs=example, scale=scale
        )
        self.rates = {block.name: block.drop_rate for block in self.depth.blocks}
        self._by_hand = ByHand(self.twin, self.rates, instead)

    def draw(self, steps: int) -> list[frozenset[str]]:
        """Draw for so many steps: the names of the blocks that each drops."""
        self._draws = Draws(self.depth, steps)
        self._dropped = [frozenset[str]()] * steps
        if self.gated.training:
            self._dropped = self._draws.dropped(self.gated, self.example)
        return self._dropped

    def prepare(self, step: int) -> None:
        """Have both drop at their next forward what this step drops."""
        self.gated.zero_grad(set_to_none=True)
        self.twin.zero_grad(set_to_none=True)
        self._draws.begin(step)
        self._by_hand.leave_out(self._dropped[step])


Way = Callable[[nn.Module, Tensor, int], Tensor]
Wrap = dict[str, Callable[[nn.Module], nn.Module]]


def forward(model: nn.Module, x: Tensor, step: int) -> Tensor:
    return model(x)


def forward_and_backward(model: nn.Module, x: Tensor, step: int) -> Tensor:
    output = model(x)
    output.sum().backward()
    return output


@torch.no_grad()
def inference(model: nn.Module, x: Tensor, step: int) -> Tensor:
    return model(x)


@dataclass(frozen=True)
class Contest:
    """What a contest of a pair found, step by step."""

    gates: int
    dropped: Figures  # the share of the gates
    seconds: dict[str, Figures]  # of "gated", "twin", "linear" (one call) and others

    @property
    def costs(self) -> Figures:
        """What a gate costs, in calls of a Linear."""
        more = self.seconds["gated"] - self.seconds["twin"]
        return more / self.gates / self.seconds["linear"]

    def cost(self, target: float) -> Line:
        return Line(typical(self.costs), PER_GATE, target)

    def ratio(self, name: str, target: float | None = None) -> Line:
        return Line(typical(self.seconds["gated"] / self.seconds[name]), f"of the {name}", target)


def contest(
    make: Callable[[], Pair],
    way: Way,
    steps: int,
    *,
    wrap: Wrap | None = None,
    beside_plain: bool = False,
) -> Contest:
    """Have a pair take turns with calls of a Linear, in several rounds.

    Args:
        make: Makes the networks, both in training or both in inference. Each round has new ones:
            where their objects lie in memory makes a difference of a call or so for each gate.
        way: What a step does with a network.
        steps: How many.
        wrap: What is put around the gated network, and around its twin.
        beside_plain: Whether the network without gates takes turns with them.
    """
    return contests(lambda: {"": make()}, way, steps, wrap=wrap, beside_plain=beside_plain)[""]


def contests(
    make: Callable[[], Mapping[str, Pair]],
    way: Way,
    steps: int,
    *,
    wrap: Wrap | None = None,
    beside_plain: bool = False,
) -> dict[str, Contest]:
    """Likewise with several pairs at once, so that their figures are of the same minutes."""
    rounds = [
        _round(make(), way, -(-steps // ROUNDS), wrap=wrap, beside_plain=beside_plain)
        for _ in range(ROUNDS)
    ]
    return {key: _joined([one[key] for one in rounds]) for key in rounds[0]}


def _round(
    pairs: Mapping[str, Pair], way: Way, steps: int, *, wrap: Wrap | None, beside_plain: bool
) -> dict[str, Contest]:
    dropped = {key: pair.draw(WARMUP + steps) for key, pair in pairs.items()}

    def prepare(step: int) -> None:
        for pair in pairs.values():
            pair.prepare(step)

    x = next(iter(pairs.values())).example
    turns: dict[str, Step] = {"linear": calls_of_a_linear()}
    for key, pair in pairs.items():
        if beside_plain:
            turns["plain" + key] = partial(way, pair.plain, x)
        for name, model in (("gated", pair.gated), ("twin", pair.twin)):
            turns[name + key] = partial(way, wrap[name](model) if wrap else model, x)
        for step in range(WARMUP):
            prepare(step)
            ours, theirs = turns["gated" + key](step), turns["twin" + key](step)
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    seconds = take_turns(turns, steps, warmup=WARMUP, prepare=prepare, clock=thread_time)
    seconds["linear"] /= CALLS
    return {
        key: _result(pair, dropped[key], {n.removesuffix(key): s for n, s in seconds.items()})
        for key, pair in pairs.items()
    }


def _joined(rounds: Sequence[Contest]) -> Contest:
    names = rounds[0].seconds
    return Contest(
        rounds[0].gates,
        np.concatenate([one.dropped for one in rounds]),
        {name: np.concatenate([one.seconds[name] for one in rounds]) for name in names},
    )


def _result(pair: Pair, dropped: list[frozenset[str]], seconds: dict[str, Figures]) -> Contest:
    pair.prepare(len(dropped) - 1)
    if pair.gated.training:
        pair.gated(pair.example)
    last = {name for name, kept in pair.depth.last_gates.items() if not kept}
    assert last == dropped[-1], "it drew something else than before"
    shares = np.array([len(names) for names in dropped[WARMUP:]]) / len(pair.rates)
    return Contest(len(pair.rates), shares, seconds)


def calls_of_a_linear() -> Step:
    """The unit: as many calls as are timed in one turn."""
    linear, x = nn.Linear(4, 4), torch.randn(1, 4)

    def calls(step: int) -> None:
        for _ in range(CALLS):
            linear(x)

    return calls


def open_and_closed(few: Contest, many: Contest) -> tuple[Ratio, Ratio]:
    """What an open gate and a closed one cost, by contests in which few and many are closed.

    On average a gate costs `open + dropped * (closed - open)`, on both of two lines.
    """
    drawn = np.random.default_rng(0).integers(len(few.costs), size=(4000, len(few.costs)))

    def solve(drawn: NDArray[np.int64]) -> tuple[Figures, Figures]:
        (x1, y1), (x2, y2) = (
            (each.dropped[drawn].mean(-1), np.median(each.costs[drawn], axis=-1))
            for each in (few, many)
        )
        slope = (y2 - y1) / (x2 - x1)
        return y1 - slope * x1, y1 + slope * (1 - x1)

    values = solve(np.arange(len(few.costs)))
    intervals = [np.quantile(figures, (0.025, 0.975)) for figures in solve(drawn)]
    is_open, closed = (
        Ratio(float(value), float(low), float(high))
        for value, (low, high) in zip(values, intervals, strict=True)
    )
    return is_open, closed
