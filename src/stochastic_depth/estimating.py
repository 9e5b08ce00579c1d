"""What stochastic depth will save, before any training: FLOPs of each block, and its time here.

What a step takes less where a block is dropped, times its drop rate, is saved on average.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from stochastic_depth.depth import Options, apply
from stochastic_depth.discovery import example_for, plain_model
from stochastic_depth.discovery.undisturbed import is_unmaterialised
from stochastic_depth.distributions import Distribution, DropRate
from stochastic_depth.errors import Number, OptionError
from stochastic_depth.gating.attach import detach, gated_modules
from stochastic_depth.handle import StochasticDepth
from stochastic_depth.measuring import Costs
from stochastic_depth.plan import Mode, Plan, Unit
from stochastic_depth.selection import Selector
from stochastic_depth.state import aligned, described

_HIGHEST = 1 - 1e-6  # of the rates that are tried


@dataclass(frozen=True)
class BlockSaving:
    """What one block costs in a step of training, and saves.

    Attributes:
        name: The block's name.
        kind: Its class.
        drop_rate: Its rate; where its branches have several, their mean.
        parameters: How many its branches have.
        flops: What is saved in a step in which it is dropped, forward and backward.
        flops_saved: What of it is saved on average.
        seconds: Likewise, of the time on this machine; None without timed=True.
        seconds_saved: Likewise.
        when_dropped: What happens then, in words.
    """

    name: str
    kind: str
    drop_rate: float
    parameters: int
    flops: int
    flops_saved: float
    seconds: float | None
    seconds_saved: float | None
    when_dropped: str


@dataclass(frozen=True)
class Saving:
    """What stochastic depth saves on average of a step, forward and backward; prints as a table.

    Attributes:
        model: The class of the model.
        flops: The fraction of a step's FLOPs, 0 to 1.
        time: The fraction of its time on this machine, 0 to 1; None without timed=True.
        step_flops: FLOPs of a step of the plain model.
        step_seconds: Its time.
        blocks: What each block contributes.
    """

    model: str
    flops: float
    time: float | None
    step_flops: int
    step_seconds: float | None
    blocks: tuple[BlockSaving, ...]

    def __str__(self) -> str:
        step, seconds = self.step_flops, self.step_seconds
        head = ["block", "class", "drop rate", "parameters", "MFLOPs", "saved"]
        rows = [head + (["ms", "saved"] if seconds else []) + ["when dropped"]]
        for block in self.blocks:
            rate, size = f"{block.drop_rate:.4g}", f"{block.parameters:,}"
            row = [block.name, block.kind, rate, size, f"{block.flops / 1e6:,.4g}"]
            row.append(f"{block.flops_saved / (step or 1):.1%}")
            if seconds and block.seconds is not None and block.seconds_saved is not None:
                row += [f"{1e3 * block.seconds:.3g}", f"{block.seconds_saved / seconds:.1%}"]
            rows.append([*row, block.when_dropped])
        what = f"{self.flops:.0%} of the FLOPs"
        if self.time is not None:
            what += f", {self.time:.0%} of a step's time here"
        title = f"Stochastic depth on {self.model}: a step has {step / 1e9:,.4g} GFLOPs"
        last = f"It saves {what}; nothing of the optimizer's and the loader's."
        return "\n".join([f"{title}, forward and backward", *aligned(rows), last])


def estimate_saving(
    model: nn.Module,
    drop_rate: DropRate,
    drop_distribution: str | Distribution | None = None,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    blocks: Selector | Sequence[Selector] | None = None,
    unit: Unit = "block",
    mode: Mode = "batch",
    scale: Literal["auto", "eval", "train", "none"] = "auto",
    timed: bool = False,
) -> Saving:
    """What stochastic depth would save of a training step, forward and backward.

    The model is left as it was: a copy is measured, without the gates that it has. FLOPs are those
    that torch counts, of convolutions, matrix products and attention. A schedule that lowers the
    rates saves less; activation checkpoints around blocks recompute them, which is not counted.

    Args:
        model: As in `apply_stochastic_depth`, like all that is not explained here.
        drop_rate: Likewise.
        drop_distribution: Likewise.
        example_inputs: Likewise. Times are of a batch as large as this one.
        example_kwargs: Likewise.
        blocks: Likewise.
        unit: Likewise.
        mode: Likewise; that taking rows takes time does not count.
        scale: Likewise.
        timed: Whether to time the blocks here as well, taking turns: some twenty steps.

    Raises:
        StochasticDepthError: As `apply_stochastic_depth`.
        OptionError: timed=True for a model on the meta device.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        ...
        ...     def forward(self, x):
        ...         return x + self.linear(self.norm(x))
        >>> model = nn.Sequential(nn.Linear(8, 8), *(Residual() for _ in range(7)))
        >>> saving = estimate_saving(model, 0.5, "uniform", example_inputs=torch.randn(2, 8))
        >>> round(saving.flops, 3), saving.blocks[0].flops, saving.step_flops
        (0.457, 768, 5888)
    """
    rates, example = (drop_rate, drop_distribution), (example_inputs, example_kwargs)
    options = Options(rates, example, blocks, unit, mode, scale)
    return _saving(*_measured(model, options, timed=timed))


def drop_rate_for(
    model: nn.Module,
    saving: float,
    drop_distribution: str | Distribution | None = None,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    blocks: Selector | Sequence[Selector] | None = None,
    unit: Unit = "block",
    mode: Mode = "batch",
    scale: Literal["auto", "eval", "train", "none"] = "auto",
    timed: bool = False,
) -> float:
    """The drop rate that saves so much of a step's FLOPs, forward and backward.

    Args:
        model: As in `estimate_saving`, like all that is not explained here.
        saving: The fraction of a step that is to be saved on average, 0 to 1.
        drop_distribution: Likewise.
        example_inputs: Likewise.
        example_kwargs: Likewise.
        blocks: Likewise.
        unit: Likewise.
        mode: Likewise.
        scale: Likewise.
        timed: Whether it is the fraction of a step's time on this machine.

    Returns:
        What to pass as `drop_rate`.

    Raises:
        StochasticDepthError: As `apply_stochastic_depth`.
        OptionError: No rate saves so much; it says how much can be saved.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        ...
        ...     def forward(self, x):
        ...         return x + self.linear(self.norm(x))
        >>> model = nn.Sequential(nn.Linear(8, 8), *(Residual() for _ in range(7)))
        >>> round(drop_rate_for(model, 0.25, example_inputs=torch.randn(2, 8)), 3)
        0.479
    """
    wanted = Number(
        lambda share: 0 <= share < 1,
        expected="a fraction of a step, from 0 to below 1",
        instead="pass 0.25 to save a quarter of it",
    ).read(saving, "saving")
    rates, example = (0.0, drop_distribution), (example_inputs, example_kwargs)
    options = Options(rates, example, blocks, unit, mode, scale)
    depth, costs = _measured(model, options, timed=timed)

    def saved_at(rate: float) -> float:
        depth.set_drop_rate(rate, drop_distribution)
        found = _saving(depth, costs)
        return (found.time if timed else found.flops) or 0.0

    def is_allowed(rate: float) -> bool:
        with suppress(OptionError):  # of a distribution of the user's
            depth.set_drop_rate(rate, drop_distribution)
            return True
        return False

    highest = _bisect(0.0, _HIGHEST, lambda rate: not is_allowed(rate))[0]
    most = saved_at(highest)
    if wanted > most:
        raise OptionError(
            f"saving is {wanted:g}, and the blocks of {type(model).__name__} that can be dropped "
            f"are {most:.1%} of a step with these options",
            expected="less than that",
            instead=f'pass saving={most / 2:.2f}, say; drop_distribution="uniform" saves most',
        )
    return _bisect(0.0, highest, lambda rate: saved_at(rate) >= wanted)[1]


def _bisect(low: float, high: float, is_enough: Callable[[float], bool]) -> tuple[float, float]:
    """Two neighbours between which something becomes true; both are the end where it always was."""
    if is_enough(low) or not is_enough(high):
        return (low, low) if is_enough(low) else (high, high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return low, high


def _measured(model: nn.Module, options: Options, *, timed: bool) -> tuple[StochasticDepth, Costs]:
    """The handle of a copy of the model, and what its blocks cost."""
    twin = _plain_copy(plain_model(model), timed=timed)
    depth = apply(twin, options)
    return depth, Costs(depth, example_for(twin, *options.example), timed=timed)


def _plain_copy(model: nn.Module, *, timed: bool) -> nn.Module:
    """A copy without gates."""
    if timed and is_unmaterialised(model):
        raise OptionError(
            f"timed=True for a {type(model).__name__} on the meta device",
            expected="a model that can be run",
            instead="leave timed out, or build the model on the device that it trains on",
        )
    try:
        with torch.inference_mode(False):  # noqa: FBT003
            twin = copy.deepcopy(model)
    except Exception as error:  # of a module's own, or a tensor of a graph that it keeps
        raise OptionError(
            f"{type(model).__name__} cannot be copied: {error}",
            expected="a model to measure a copy of",
            instead="estimate it as it was built, before it ran",
        ) from error
    for plan in {gate.plan for _, _, gate in gated_modules(twin)}:
        detach(twin, plan)
    return twin


def _saving(depth: StochasticDepth, costs: Costs) -> Saving:
    """What the rates of now save."""
    plan, chances = depth._plan, _chances(depth._plan)
    whole = {name for name, _, gate in gated_modules(depth.model) if gate.whole is not None}
    found = described(depth.model, plan, whole)

    def of_block(number: int, of_units: Sequence[float]) -> tuple[float, float]:
        """What it costs, and what of that is saved on average."""
        units = [unit for unit, block in enumerate(plan.block_of) if block == number]
        saved = sum(of_units[unit] * chances[unit] for unit in units)
        return sum(of_units[unit] for unit in units), saved

    (step, flops), seconds = costs.flops, costs.seconds
    blocks = []
    for number, (block, now, parameters, how) in enumerate(found):
        count, saved = of_block(number, flops)
        spent, spared = of_block(number, seconds[1]) if seconds else (None, None)
        what = block.name, block.kind, now.drop_rate, parameters
        blocks.append(BlockSaving(*what, round(count), saved, spent, spared, how))
    share = sum(block.flops_saved for block in blocks) / (step or 1)
    time = seconds and sum(block.seconds_saved or 0.0 for block in blocks) / seconds[0]
    name = type(depth.model).__name__
    return Saving(name, share, time, int(step), seconds and seconds[0], tuple(blocks))


def _chances(plan: Plan) -> list[float]:
    """How often each unit is dropped, where it is not inside of one that is dropped."""
    rates = plan.at(plan.clock.step).rates
    chances = list(rates)
    for unit, number in enumerate(plan.block_of):
        for around, branch in plan.blocks[number].branches_around(plan.blocks):
            chances[unit] *= 1.0 - rates[plan.units_of(around)[branch]]
    return chances
