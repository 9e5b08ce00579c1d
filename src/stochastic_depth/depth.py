"""`apply_stochastic_depth`: watch, select, prove, gate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from stochastic_depth.discovery import Discovery, ResidualBlock, plain_model, watch
from stochastic_depth.discovery.example import Example
from stochastic_depth.discovery.existing import refuse_active_drop_path
from stochastic_depth.discovery.proofs import branch_not_closed, skip_path, skip_value
from stochastic_depth.discovery.templates import SkipPath, Template
from stochastic_depth.discovery.watch import record
from stochastic_depth.distributed import refuse_sharded
from stochastic_depth.distributions import Distribution, DropRate, resolve_rates
from stochastic_depth.draw import Draw, check_choice
from stochastic_depth.errors import (
    NotYetSupportedError,
    OptionError,
    StochasticDepthWarning,
)
from stochastic_depth.gating.attach import attach, detach, gated_modules
from stochastic_depth.handle import StochasticDepth
from stochastic_depth.plan import Plan, Unit
from stochastic_depth.schedules import ScheduleFunction, resolve_schedule
from stochastic_depth.selection import Selector, refusal, refuse, select

_FEW_BLOCKS, _HIGH_RATE = 6, 0.2


def apply_stochastic_depth(
    model: nn.Module,
    drop_rate: DropRate,
    drop_distribution: str | Distribution | None = None,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    blocks: Selector | Sequence[Selector] | None = None,
    unit: Unit = "block",
    mode: Literal["batch", "sample"] = "batch",
    scale: Literal["auto", "eval", "train", "none"] = "auto",
    schedule: ScheduleFunction | Mapping[str, ScheduleFunction] | None = None,
    draw: Draw = Draw(),  # noqa: B008  (frozen)
) -> StochasticDepth:
    """Have a model skip its residual blocks at random while it trains, in place.

    In train mode each call of a block is dropped with its rate: the branch is not computed,
    forward or backward, and its parameters keep `grad is None`. In eval mode everything runs.
    The classes of the gated modules are swapped for subclasses; parameters, state-dict keys,
    hooks and `isinstance` stay as they are.

    Args:
        model: Any residual model; wrapped by DistributedDataParallel or compiled: unwrapped.
        drop_rate: In [0, 1): of the last block ("linear") or of every block ("uniform"); or a
            list, one rate for each block; or `{name or glob: rate}`, 0 for the others.
        drop_distribution: How a number spreads over depth: "linear" (the default), `l / L *
            drop_rate` for l = 1..L (Huang et al. 2016, equation 4); "linear_from_zero", from 0 in
            the first block to `drop_rate` in the last (timm); "uniform"; or a callable
            `(num_blocks, drop_rate) -> rates`.
        example_inputs: What to call the model with once, to watch it: a tensor, a tuple
            (positional) or a dict (keywords). None: the example that timm's and transformers'
            models carry.
        example_kwargs: More keyword arguments for that call.
        blocks: Which blocks to gate: found blocks, names, globs ("!layer1.*" leaves out), classes
            or a predicate. None: all that are found.
        unit: "block" draws once for a block; "branch" for each of its branches.
        mode: "batch" draws once for the whole batch. "sample" is not yet supported.
        scale: "eval" multiplies each branch by `1 - p` in inference (Huang et al. 2016, equation
            5); "train" by `1 / (1 - p)` in training; "none" never. "auto" is "eval".
        schedule: A function of the optimizer step that returns a factor in [0, 1] on the rates;
            or `{name or glob: schedule}`, of blocks or branches. Needs `depth.follow(optimizer)`.
        draw: How it is drawn: the seed, and when to draw anew.

    Returns:
        The handle.

    Raises:
        NoResidualBlocksError: There is nothing to skip.
        RefusedBlockError: A block cannot be skipped exactly with these options.
        ActiveDropPathError: The model drops branches on its own already.
        OptionError, SelectionError, ExampleInputsError: An argument cannot be used.

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
        >>> model = nn.Sequential(nn.Linear(4, 8), *(Residual() for _ in range(8)))
        >>> depth = apply_stochastic_depth(model, 0.5, example_inputs=torch.randn(2, 4))
        >>> [block.drop_rate for block in depth.blocks][-2:]
        [0.4375, 0.5]
        >>> _ = model.train()(torch.randn(2, 4))
        >>> sum(depth.last_gates.values())  # blocks that ran
        5
    """
    check_choice("unit=", unit, ("block", "branch"))
    check_choice("mode=", mode, ("batch", "sample"))
    check_choice("scale=", scale, ("auto", "eval", "train", "none"))
    if mode == "sample":
        raise NotYetSupportedError(
            'mode="sample" is not yet supported',
            expected='mode="batch" in this version',
            instead="leave mode out",
        )
    if not isinstance(draw, Draw):
        raise OptionError(
            f"draw is {draw!r}",
            expected="an sd.Draw",
            instead="pass sd.Draw(seed=1), say",
        )
    draw.check_supported()
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"model is a {type(model).__name__}",
            expected="a torch.nn.Module",
            instead="pass the model itself",
        )
    model = plain_model(model)
    refuse_sharded(model)
    refuse_active_drop_path(model)
    found, example = watch(model, example_inputs, example_kwargs)
    chosen = select(model, found, blocks)
    _refuse_gated(model, chosen)
    plan = Plan(
        blocks=chosen,
        rates=resolve_rates(drop_rate, drop_distribution, [block.name for block in chosen]),
        unit=unit,
        scale="eval" if scale == "auto" else scale,
        schedule=resolve_schedule(None, []),
        draw=draw,
    )
    units = [name for number in range(len(chosen)) for name in plan.units(number)]
    plan.schedule = resolve_schedule(schedule, units)
    whole = _proven(model, found, plan, example)
    _warn(plan)  # before anything is changed: a warning may be an error
    attach(model, found, plan, whole)
    return StochasticDepth(model, plan)


def _refuse_gated(model: nn.Module, chosen: Sequence[ResidualBlock]) -> None:
    """Raises where one of the blocks, or something in it, is gated already."""
    gated = {name for name, _, _ in gated_modules(model)}
    for block in chosen:
        own = {block.container, *(m for branch in block.branches for m in branch.modules)}
        if own & gated:
            raise OptionError(
                f'block "{block.name}" has stochastic depth already',
                expected="blocks that are not gated",
                instead="call sd.get_stochastic_depth(model).remove() first, or choose other "
                "blocks with blocks=",
            )


def _proven(
    model: nn.Module, found: Discovery, plan: Plan, example: Example
) -> dict[str, Template | SkipPath]:
    """What the blocks return that can be skipped whole; raises where a block is not exact.

    Every branch is gated for a while and the model watched with all of them closed.
    """
    reasons = {
        block.name: why
        for block in plan.blocks
        if (why := refusal(block, unit=plan.unit, scale=plan.scale))
    }
    whole: dict[str, Template | SkipPath] = {}
    if not reasons:
        attach(model, found, plan, {})
        try:
            whole, reasons = _prove(model, found, plan, example)
        finally:
            detach(model, plan)
    if reasons:
        raise refuse(reasons, plan.blocks, found=found)
    return whole


def _prove(
    model: nn.Module, found: Discovery, plan: Plan, example: Example
) -> tuple[dict[str, Template | SkipPath], dict[str, str]]:
    """Which blocks return their input when dropped, and which are not exact when dropped."""
    whole: dict[str, Template | SkipPath] = {}
    reasons: dict[str, str] = {}
    for level in sorted({block.nesting for block in plan.blocks}):
        level_blocks = [block for block in plan.blocks if block.nesting == level]
        units = [
            unit
            for number, block in enumerate(plan.blocks)
            if block.nesting == level
            for unit in plan.units(number)
        ]
        plan.forced = dict.fromkeys(units, False)
        try:
            closed = record(
                model, *example, keep=frozenset(block.container for block in level_blocks)
            )
        except Exception as error:
            names = level_blocks[0].name if len(level_blocks) == 1 else "its blocks"
            reasons[level_blocks[0].name] = f"with {names} dropped the forward fails: {error}"
            break
        finally:
            plan.forced = None
        for block in level_blocks:
            stuck = branch_not_closed(found, block, closed)
            if stuck is not None:
                reasons[block.name] = f"{stuck} is not zero when its modules are dropped"
            elif value := skip_value(found, block, closed) or skip_path(found, block, closed):
                whole[block.name] = value
    return whole, reasons


def _warn(plan: Plan) -> None:
    """Say at once what would only be felt after the training."""
    few = len(plan.blocks) < _FEW_BLOCKS
    if few and max(plan.rates) > _HIGH_RATE:
        warnings.warn(
            f"{len(plan.blocks)} blocks with a drop rate of {max(plan.rates):g}: shallow networks "
            f"bear little stochastic depth; use at most {_HIGH_RATE}, or none",
            StochasticDepthWarning,
            stacklevel=3,
        )
    if plan.scale != "eval":
        return
    stuck = [
        branch
        for block, rate in zip(plan.blocks, plan.rates, strict=True)
        for branch in block.branches
        if rate and branch.fold.obstacle
    ]
    if stuck:
        warnings.warn(
            f"fold() will not be able to put the inference scale of {len(stuck)} branches into the "
            f'weights ("{stuck[0].name}": {stuck[0].fold.obstacle}); with scale="train" there is '
            "none to fold",
            StochasticDepthWarning,
            stacklevel=3,
        )
