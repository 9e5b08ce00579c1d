"""`apply_stochastic_depth`: watch, select, prove, gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn

from stochastic_depth import selection
from stochastic_depth.discovery import own_drops, plain_model, watch
from stochastic_depth.discovery.blocks import Discovery, ResidualBlock
from stochastic_depth.discovery.undisturbed import without_collecting
from stochastic_depth.distributed import ranks_in
from stochastic_depth.distributions import Distribution, DropRate, Spread, resolve_rates
from stochastic_depth.draw import Draw, check_choice
from stochastic_depth.errors import OptionError, warn, wrong_value
from stochastic_depth.gating.attach import attach, detach, gated_modules
from stochastic_depth.gating.batch import watch_more_rows
from stochastic_depth.gating.ranks import refuse, refuse_parts
from stochastic_depth.handle import StochasticDepth
from stochastic_depth.plan import Mode, Plan, Scale, Unit
from stochastic_depth.proving import prove
from stochastic_depth.schedules import ScheduleFunction, resolve_schedule
from stochastic_depth.selection import Keep, Selector
from stochastic_depth.torch_private.tracing import is_wrapper

Rates = tuple[DropRate, Spread] | None
"""A drop rate and how it spreads over depth; None: what the model drops by itself."""

_FEW_BLOCKS, _HIGH_RATE = 6, 0.2
_SCALES: dict[Mode, Scale] = {"batch": "eval", "sample": "train"}


def apply_stochastic_depth(
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
        mode: "batch" draws once for the whole batch. "sample" for each example (drop path): a
            branch runs on the rows of the batch that are kept, one of two allowed numbers of them
            (of images at most half of the batch, else three quarters, or all: fewer drops would
            not pay); BatchNorm sees these rows alone.
        scale: "eval" multiplies each branch by `1 - p` in inference (Huang et al. 2016, equation
            5); "train" by `1 / (1 - p)` in training; "none" never. "auto" is "eval" in mode
            "batch", "train" in mode "sample".
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
        3
    """
    example = example_inputs, example_kwargs
    rates = drop_rate, drop_distribution
    return apply(model, Options(rates, example, blocks, unit, mode, scale, schedule, draw))


class Options(NamedTuple):
    """What `apply` takes, as `apply_stochastic_depth` explains it."""

    rates: Rates
    example: tuple[Any, Mapping[str, Any] | None]
    blocks: Selector | Sequence[Selector] | None
    unit: Unit = "block"
    mode: Mode = "batch"
    scale: Literal["auto", "eval", "train", "none"] = "auto"
    schedule: ScheduleFunction | Mapping[str, ScheduleFunction] | None = None
    draw: Draw = Draw()


def apply(model: nn.Module, options: Options) -> StochasticDepth:
    """Puts stochastic depth on a model."""
    rates, example, blocks, unit, mode, scale, schedule, draw = options
    check_choice("unit=", unit, ("block", "branch"))
    check_choice("mode=", mode, ("batch", "sample"))
    check_choice("scale=", scale, ("auto", "eval", "train", "none"))
    if not isinstance(draw, Draw):
        raise wrong_value("draw", draw, expected="an sd.Draw", instead="pass sd.Draw(seed=1)")
    if mode == "sample" and draw.sampling == "balanced":
        raise OptionError(
            'mode="sample" with Draw(sampling="balanced")',
            expected='mode="batch": the number of rows that are kept hardly varies anyway',
            instead='leave sampling out, or pass mode="batch"',
        )
    passed, model = model, plain_model(model)
    refuse(model)
    refuse_parts(model)
    with without_collecting(), own_drops.switched_off(model) as drops:
        own_drops.check_own_drops(model, drops, wanted=rates is None)
        found, shown = watch(model, *example)
        own_drops.warn_of_masks(found)
        chosen = selection.select(model, found, blocks)
        scale = _SCALES[mode] if scale == "auto" else scale
        if blocks is None:
            chosen = selection.without_refused_parts(chosen, unit, scale)
        _refuse_gated(model, chosen)
        _refuse_compiled(passed, chosen)
        if rates is None:
            resolved = own_drops.rates_taken_over(drops, found, chosen, named=blocks is not None)
        else:
            resolved = resolve_rates(*rates, [block.name for block in chosen])
        plan = Plan(chosen, resolved, unit, mode, scale, resolve_schedule(None, []), draw)
        plan.schedule = resolve_schedule(schedule, plan.units)
        for name in plan.units:
            plan.schedule(0, name)  # where it fails, it is no fault of a block's
        plan.talks = _talks(model, found, plan)
        plan.counts = tuple(selection.allowed_counts(model, found, block) for block in chosen)
        selection.refuse_inexact(found, plan)
        by_watching = not all(block.explicit for block in chosen)
        by_rows = by_watching and mode == "sample"
        batches = watch_more_rows(model, found.recording, shown) if by_rows else None
        try:
            attach(model, found, plan, batches)
            if by_watching:
                prove(model, found, plan, shown)
            _warn(model, plan)
        except BaseException:  # also where a warning is an error
            detach(model, plan)
            raise
    for drop in drops:
        setattr(drop.holder, drop.attribute, 0.0)
    return StochasticDepth(model, plan, shown)


def prune(
    model: nn.Module,
    keep: Keep,
    *,
    exact: bool = True,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    blocks: Selector | Sequence[Selector] | None = None,
) -> nn.Module:
    """Take residual blocks out of a model that has no stochastic depth.

    As `depth.prune`: what is left computes what the model does without the branches of the other
    blocks.

    Args:
        model: Any residual model.
        keep: How many blocks to keep (an int), which fraction of them (a float), or names.
        exact: Whether a norm behind the sum of a block stays.
        example_inputs: As in `apply_stochastic_depth`.
        example_kwargs: Likewise.
        blocks: The blocks to choose from; all others stay.

    Returns:
        The model, the same object.

    Raises:
        StochasticDepthError: As `apply_stochastic_depth`, and `depth.prune`.

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
        >>> len(prune(model, 4, example_inputs=torch.randn(2, 4)))
        5
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise OptionError(
            f"a {type(plain_model(model)).__name__} that DistributedDataParallel wraps",
            expected="a model whose parameters nobody waits for",
            instead="prune the model first, and wrap it afterwards",
        )
    with own_drops.switched_off(plain_model(model)):  # which act in training only
        example = example_inputs, example_kwargs
        depth = apply(model, Options((0.0, None), example, blocks, scale="none"))
    try:
        return depth.prune(keep, exact=exact)
    except BaseException:
        depth.remove()
        raise


def _refuse_gated(model: nn.Module, chosen: Sequence[ResidualBlock]) -> None:
    """Raises where one of the blocks, or something in it, is gated already."""
    gated = {name for name, _, _ in gated_modules(model)}
    for block in chosen:
        inside = {block.block_module, *(m for branch in block.branches for m in branch.modules)}
        if inside & gated:
            raise OptionError(
                f'block "{block.name}" has stochastic depth already',
                expected="blocks that are not gated",
                instead="call sd.get_stochastic_depth(model).remove() first, or choose other "
                "blocks with blocks=",
            )


def _refuse_compiled(passed: nn.Module, chosen: Sequence[ResidualBlock]) -> None:
    """Raises where torch.compile calls the gated module itself, as it was when that was made."""
    if is_wrapper(passed) and any(not block.block_module for block in chosen):
        raise OptionError(
            f"model is what torch.compile made of a {type(plain_model(passed)).__name__}, whose "
            f'own forward holds residual connections ("{chosen[0].name}")',
            expected="the model before it is compiled",
            instead="apply to the model first, then call depth.compile() or torch.compile(model)",
        )


def _warn(model: nn.Module, plan: Plan) -> None:
    """Say at once what would only be felt after the training."""
    keeping = [block for block in plan.blocks if block.keeps is not None]
    if keeping:
        others = f", as do {len(keeping) - 1} others" if len(keeping) > 1 else ""
        warn(
            f'block "{keeping[0].name}" keeps a value of its branch: {keeping[0].keeps}{others}. '
            "Where the branch is dropped that is zero"
        )
    left = [block.left_behind for block in plan.blocks if block.left_behind]
    if left:
        others = f", as do {len(left) - 1} others" if len(left) > 1 else ""
        warn(
            f'"{left[0]}" holds a value of the last call of its module{others}: where a branch is '
            "dropped that of an earlier step. Set it to zero, or None, before each forward if a "
            "loss or a log reads it"
        )
    rate = max(plan.rates)
    if len(plan.blocks) < _FEW_BLOCKS and rate > _HIGH_RATE:
        blocks = "1 block" if len(plan.blocks) == 1 else f"{len(plan.blocks)} blocks"
        warn(
            f"{blocks} with a drop rate of {rate:g}: shallow networks bear little stochastic "
            f"depth; use at most {_HIGH_RATE}, or none"
        )
    inside = tuple(f"{block.scope}." for block in plan.blocks if block.scope)
    dropouts = [
        f"{name} p={module.p:g}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if name.startswith(inside)
    ]
    if dropouts and rate:
        more = f" and {len(dropouts) - 2} more" if len(dropouts) > 2 else ""
        warn(
            f"dropout is active beside stochastic depth ({', '.join(dropouts[:2])}{more}): "
            "several regularisers at once can give diminishing returns; set one to 0 or lower it"
        )
    dropped = [block for block, rate in zip(plan.blocks, plan.rates, strict=True) if rate]
    stuck = [b for block in dropped for b in block.branches if b.fold.obstacle]
    if stuck and plan.scale == "eval":
        warn(
            f"fold() will not be able to put the inference scale of {len(stuck)} branches into the "
            f'weights ("{stuck[0].name}": {stuck[0].fold.obstacle}); with scale="train" there is '
            "none to fold"
        )


def _talks(model: nn.Module, found: Discovery, plan: Plan) -> dict[str, str]:
    """For each block in whose branches ranks wait for each other: in what.

    Also for one with a rate of 0, which may be given another.
    """
    talks: dict[str, str] = {}
    recording, apart = found.recording, frozenset(ranks_in(plan.draw.process_group))
    names = [(b, n) for b in plan.blocks for branch in b.branches for n in branch.modules]
    for block, name in dict.fromkeys(names):  # a module may be called a thousand times
        owner = name if block.explicit else block.block_module
        for inside, module in model.get_submodule(name).named_modules(prefix=name):
            if isinstance(module, nn.SyncBatchNorm):
                talks[owner] = f'SyncBatchNorm "{inside}"'
        for call in recording.calls_of.get(name, ()):
            if talk := recording.talk_in(call, apart):
                talks.setdefault(owner, talk)
    return talks
