"""What stochastic depth will save, before any training: FLOPs of each block, and its time here.

Each block is called with what it is called with in a forward of the model, open and closed. What
the difference comes to, times its drop rate, is saved on average.
"""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stochastic_depth.depth import apply_stochastic_depth
from stochastic_depth.discovery import example_for, plain_model
from stochastic_depth.discovery.undisturbed import (
    Arguments,
    copied,
    is_unmaterialised,
    undisturbed,
    without_values,
)
from stochastic_depth.distributions import Distribution, DropRate
from stochastic_depth.errors import ExampleInputsError, Number, OptionError
from stochastic_depth.gating.attach import detach, gated_modules
from stochastic_depth.handle import StochasticDepth
from stochastic_depth.plan import Mode, Unit
from stochastic_depth.selection import Selector
from stochastic_depth.state import aligned, described
from stochastic_depth.torch_private.flops import count_flops
from stochastic_depth.torch_private.trees import tree_leaves, tree_map

Measure = Callable[[Callable[[], None]], float]
"""Of a run, forward and backward: its FLOPs, or seconds."""

_ROUNDS = 9  # of timing, of which the median counts
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
    twin = _twin(model, timed=timed)
    depth = apply_stochastic_depth(
        twin,
        drop_rate,
        drop_distribution,
        example_inputs=example_inputs,
        example_kwargs=example_kwargs,
        blocks=blocks,
        unit=unit,
        mode=mode,
        scale=scale,
    )
    example = example_for(twin, example_inputs, example_kwargs)
    return _Costs(depth, example, timed=timed).saving()


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
    twin = _twin(model, timed=timed)
    depth = apply_stochastic_depth(
        twin,
        0.0,
        drop_distribution,
        example_inputs=example_inputs,
        example_kwargs=example_kwargs,
        blocks=blocks,
        unit=unit,
        mode=mode,
        scale=scale,
    )
    costs = _Costs(depth, example_for(twin, example_inputs, example_kwargs), timed=timed)

    def saved_at(rate: float) -> float:
        depth.set_drop_rate(rate, drop_distribution)
        found = costs.saving()
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


def _twin(model: nn.Module, *, timed: bool) -> nn.Module:
    """A copy of the model to measure."""
    model = plain_model(model)
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
    for plan in {id(gate.plan): gate.plan for _, _, gate in gated_modules(twin)}.values():
        detach(twin, plan)
    return twin


class _Costs:
    """What a training step costs, and what each unit adds to it.

    Args:
        depth: The handle of a model to measure.
        example: What to call it with.
        timed: Whether to time it, too.
    """

    def __init__(self, depth: StochasticDepth, example: Arguments, *, timed: bool) -> None:
        self._depth, self._plan, self._model = depth, depth._plan, depth.model
        self._calls: dict[str, list[Arguments]] = {}
        self._seconds: tuple[float, list[float]] | None = None
        example = tree_map(partial(copied, how=_cut_off), example)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))  # noqa: FBT003
            stack.enter_context(torch.enable_grad())
            arguments = stack.enter_context(without_values(self._model, example))
            stack.enter_context(undisturbed(self._model))
            self._begin(arguments)
            self._flops = self._costs(count_flops, arguments)
            if timed:
                rounds = [self._costs(_seconds, arguments) for _ in range(1 + _ROUNDS)][1:]
                of_units = map(median, zip(*(units for _, units in rounds), strict=True))
                self._seconds = median(step for step, _ in rounds), list(of_units)
        if not timed and not any(self._flops[1]):
            raise OptionError(
                f"torch counts no FLOPs in the blocks of {type(self._model).__name__}",
                expected="convolutions, matrix products or attention",
                instead="pass timed=True, to measure their time",
            )

    def _begin(self, example: Arguments) -> None:
        """Have it train, and write down what the outermost blocks are called with."""
        self._model.train()
        try:
            self._note_calls(example)
        except ValueError:  # a BatchNorm needs several values, or a GPU
            for module in self._model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()
            self._note_calls(example)

    def _note_calls(self, example: Arguments) -> None:
        names = sorted(gate.name for gate in self._plan.gates)
        self._roots = {n: next(root for root in names if _lies_in(n, root)) for n in names}
        with ExitStack() as stack:
            stack.enter_context(self._depth.fixed({}))
            for root in set(self._roots.values()):
                calls = self._calls[root] = []
                hook = self._model.get_submodule(root).register_forward_pre_hook
                stack.callback(hook(partial(_note, calls), with_kwargs=True).remove)
            output = self._model(*example[0], **example[1])
        trains = any(parameter.requires_grad for parameter in self._model.parameters())
        if trains and not any(map(_trains, tree_leaves(output))):
            raise ExampleInputsError(
                f"{type(self._model).__name__} returns nothing that has a gradient",
                expected="an output that a loss is made of",
                instead="pass a module around it that returns its scores, or example_kwargs "
                "with which it does",
            )

    def _costs(self, measure: Measure, example: Arguments) -> tuple[float, list[float]]:
        """What a step costs by this measure, and how much less where each unit is dropped."""
        step = self._measured(measure, self._model, [example], {})
        of_units = [0.0] * len(self._plan.units)
        opened: dict[str, float] = {}
        for gate in self._plan.gates:
            root = self._roots[gate.name]
            run = partial(self._measured, measure, self._model.get_submodule(root))
            if root not in opened:
                opened[root] = run(self._calls[root], {})
            for unit in dict.fromkeys(gate.units):
                closed = {self._plan.units[unit]: False}
                of_units[unit] += opened[root] - run(self._calls[root], closed)
        return step, of_units

    def _measured(
        self, measure: Measure, module: nn.Module, calls: list[Arguments], gates: dict[str, bool]
    ) -> float:
        self._model.zero_grad()
        fresh = [tree_map(partial(copied, how=torch.clone), call) for call in calls]

        def run() -> None:
            for args, kwargs in fresh:
                leaves = [leaf for leaf in tree_leaves(module(*args, **kwargs)) if _trains(leaf)]
                torch.autograd.backward(leaves, [torch.ones_like(leaf) for leaf in leaves])

        with self._depth.fixed(gates):
            return measure(run)

    def saving(self) -> Saving:
        """What the rates of now save."""
        dropped, ones = self._dropped(), [1.0] * len(self._plan.units)
        (step, flops), seconds = self._flops, self._seconds
        whole = {name for name, _, gate in gated_modules(self._model) if gate.whole is not None}
        blocks = []
        found = described(self._model, self._plan, whole)
        for number, (block, now, parameters, how) in enumerate(found):
            units = [unit for unit, of in enumerate(self._plan.block_of) if of == number]
            cost, saved = (sum(flops[u] * by[u] for u in units) for by in (ones, dropped))
            times = seconds and [
                sum(seconds[1][u] * by[u] for u in units) for by in (ones, dropped)
            ]
            blocks.append(
                BlockSaving(
                    name=block.name,
                    kind=block.kind,
                    drop_rate=now.drop_rate,
                    parameters=parameters,
                    flops=round(cost),
                    flops_saved=saved,
                    seconds=times[0] if times else None,
                    seconds_saved=times[1] if times else None,
                    when_dropped=how,
                )
            )
        return Saving(
            model=type(self._model).__name__,
            flops=sum(block.flops_saved for block in blocks) / (step or 1),
            time=seconds and sum(map(operator.mul, seconds[1], dropped)) / seconds[0],
            step_flops=int(step),
            step_seconds=seconds and seconds[0],
            blocks=tuple(blocks),
        )

    def _dropped(self) -> list[float]:
        """How often each unit is dropped, where it is not inside of one that is dropped."""
        plan, rates = self._plan, self._plan.at(self._plan.clock.step).rates
        chances = list(rates)
        for unit, number in enumerate(plan.block_of):
            for around, branch in plan.blocks[number].branches_around(plan.blocks):
                chances[unit] *= 1.0 - rates[plan.units_of(around)[branch]]
        return chances


def _lies_in(name: str, other: str) -> bool:
    """Whether a module is another one or a part of it."""
    return f"{name}.".startswith(f"{other}." if other else "")


def _note(calls: list[Arguments], module: nn.Module, args: Any, kwargs: Any) -> None:
    calls.append(tree_map(partial(copied, how=_cut_off), (args, kwargs)))


def _cut_off(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.requires_grad)


def _trains(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _seconds(run: Callable[[], None]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
