"""Stochastic depth as it is known under other names: drop path, LayerDrop, progressive dropping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from stochastic_depth.depth import Options, Rates, apply
from stochastic_depth.draw import Draw
from stochastic_depth.errors import Number
from stochastic_depth.handle import StochasticDepth
from stochastic_depth.schedules import Progressive, Schedule, ScheduleFunction
from stochastic_depth.selection import Selector

_RATE = Number(
    lambda rate: 0 <= rate < 1,
    expected='a number from 0 up to, but not including, 1, or "model"',
    instead="pass 0.1, say; sd.apply_stochastic_depth takes a rate for each block",
)
_THETA = Number(
    lambda p: 0 < p <= 1, expected="a probability above 0 and at most 1", instead="pass 0.5, say"
)
_GAMMA = Number(
    lambda gamma: gamma >= 0, expected="0 or more, per step", instead="pass 100 / T for T steps"
)


def apply_drop_path(
    model: nn.Module,
    drop_rate: float | Literal["model"],
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    blocks: Selector | Sequence[Selector] | None = None,
    schedule: ScheduleFunction | Mapping[str, ScheduleFunction] | None = None,
    draw: Draw = Draw(),  # noqa: B008  (frozen)
) -> StochasticDepth:
    """Drop path as timm and torchvision have it, with the dropped rows not computed.

    Each residual branch draws for each example of the batch on its own; the rows that are kept
    are multiplied by `1 / (1 - p)` in training, so inference is the plain model's. It is
    `apply_stochastic_depth` with `unit="branch"`, `mode="sample"`, `scale="train"` and the
    distribution "linear_from_zero": over the blocks l = 0..L-1, `p_l = drop_rate * l / (L - 1)`,
    as `timm.layers.calculate_drop_path_rates` has it. (Huang et al. 2016, arXiv 1603.09382,
    equation 4, start above 0 instead, and draw for the whole batch, equation 2.)

    Args:
        model: Any residual model; wrapped by DistributedDataParallel or compiled: unwrapped.
        drop_rate: In [0, 1): the chance that a branch of the last block is dropped, for each
            example and training forward. "model" takes over what the model has built in: the
            rates of timm's and transformers' DropPath, of torchvision's StochasticDepth (of its
            mode "row" and of its mode "batch" alike) and of transformers' layerdrop, block by
            block. They are set to 0 in the model (and in its configuration), so that nothing is
            dropped twice; where an error is raised they stay as they were.
        example_inputs: What to call the model with once, as in `apply_stochastic_depth`.
        example_kwargs: More keyword arguments for that call.
        blocks: Which blocks to gate: found blocks, names, globs ("!layer1.*" leaves out), classes
            or a predicate. None: all that are found. With "model", what the model drops elsewhere
            is set to 0 too.
        schedule: A function of the optimizer step that returns a factor in [0, 1] on the rates;
            or `{name or glob: schedule}`, of blocks or branches. Needs `depth.follow(optimizer)`.
        draw: How it is drawn: the seed, and when to draw anew.

    Returns:
        The handle.

    Raises:
        NoResidualBlocksError: There is nothing to skip.
        RefusedBlockError: A block cannot be skipped exactly with these options.
        ActiveDropPathError: The model drops branches on its own already, and `drop_rate` is a
            number; or it is "model", and what the model drops is no residual block.
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
        >>> model = nn.Sequential(*(Residual() for _ in range(5)))
        >>> depth = apply_drop_path(model, 0.2, example_inputs=torch.randn(16, 8))
        >>> [round(block.drop_rate, 2) for block in depth.blocks]
        [0.0, 0.05, 0.1, 0.15, 0.2]
    """
    example = example_inputs, example_kwargs
    rates = _rates(drop_rate, "linear_from_zero")
    options = Options(rates, example, blocks, "branch", "sample", "train", schedule, draw)
    return apply(model, options)


def apply_layer_drop(
    model: nn.Module,
    drop_rate: float | Literal["model"],
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    blocks: Selector | Sequence[Selector] | None = None,
    schedule: ScheduleFunction | Mapping[str, ScheduleFunction] | None = None,
    draw: Draw = Draw(),  # noqa: B008  (frozen)
) -> StochasticDepth:
    """LayerDrop (Fan et al. 2019, arXiv 1909.11556): whole layers, one rate, no scaling.

    Each block as a whole is dropped for the whole batch, all with the same rate, and nothing is
    multiplied, neither in training nor in inference. It is `apply_stochastic_depth` with
    `unit="block"`, `mode="batch"`, `scale="none"` and the distribution "uniform" (the paper's
    section 3, which gives no formula: a layer runs or it does not). Where a layer ends in a norm
    behind the sum (post-norm), the branches are dropped and the norm still runs.

    Args:
        model: Any residual model; wrapped by DistributedDataParallel or compiled: unwrapped.
        drop_rate: In [0, 1): the chance that a block is dropped, for each training forward.
            "model" takes over what the model has built in: the rate of transformers' layerdrop,
            for the layers that it drops and no other block; the rates of timm's and transformers'
            DropPath and of torchvision's StochasticDepth, block by block. They are set to 0 in
            the model (and in its configuration), so that nothing is dropped twice; where an error
            is raised they stay as they were.
        example_inputs: What to call the model with once, as in `apply_stochastic_depth`.
        example_kwargs: More keyword arguments for that call.
        blocks: Which blocks to gate: found blocks, names, globs ("!layer1.*" leaves out), classes
            or a predicate. None: all that are found, which may be more than the layers: a
            position encoding with a skip connection, say. With "model", what the model drops
            elsewhere is set to 0 too.
        schedule: A function of the optimizer step that returns a factor in [0, 1] on the rates;
            or `{name or glob: schedule}`, of blocks. Needs `depth.follow(optimizer)`.
        draw: How it is drawn: the seed, and when to draw anew.

    Returns:
        The handle.

    Raises:
        NoResidualBlocksError: There is nothing to skip.
        RefusedBlockError: A block cannot be skipped exactly with these options.
        ActiveDropPathError: The model drops branches on its own already, and `drop_rate` is a
            number; or it is "model", and what the model drops is no residual block.
        OptionError, SelectionError, ExampleInputsError: An argument cannot be used.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        >>> model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        >>> depth = apply_layer_drop(model, 0.2, example_inputs=torch.randn(2, 5, 8))
        >>> [block.drop_rate for block in depth.blocks]
        [0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
    """
    example = example_inputs, example_kwargs
    rates = _rates(drop_rate, "uniform")
    return apply(model, Options(rates, example, blocks, "block", "batch", "none", schedule, draw))


def apply_progressive_layer_dropping(
    model: nn.Module,
    theta: float = 0.5,
    gamma: float = 0.001,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    blocks: Selector | Sequence[Selector] | None = None,
    schedule: ScheduleFunction | Mapping[str, ScheduleFunction] | None = None,
    draw: Draw = Draw(),  # noqa: B008  (frozen)
) -> StochasticDepth:
    """Progressive Layer Dropping (Zhang & He 2020, arXiv 2010.13369), as DeepSpeed had it.

    The more steps, and the deeper the layer, the more often a layer is dropped. At the optimizer
    step t the global survival probability is `theta(t) = (1 - theta) * exp(-gamma * t) + theta`,
    and layer i of L, i = 0..L-1, survives with `p_i(t) = 1 - i / L * (1 - theta(t))` (the paper's
    section 4): the first layer always runs, and at step 0 all of them do. One gate decides about a
    layer; each of its branches (attention, feed-forward) is multiplied by `1 / p_i(t)` in training,
    so inference is the plain model's. It is `apply_stochastic_depth` with `unit="block"`,
    `mode="batch"`, `scale="train"`, the rates `i / L * (1 - theta)` and the schedule
    `1 - exp(-gamma * t)`.

    It waits for the optimizer: call `depth.follow(optimizer)`, or `depth.step()` once a step.

    Args:
        model: Any residual model; wrapped by DistributedDataParallel or compiled: unwrapped. The
            paper's are transformers with the norm in front (pre-norm).
        theta: In (0, 1]: what the survival probability sinks to in the end.
        gamma: How fast, per optimizer step, 0 or more: after `1 / gamma` steps 63% of the way are
            done. The paper has 100 / T for T steps in all, DeepSpeed's documentation 0.001.
        example_inputs: What to call the model with once, as in `apply_stochastic_depth`.
        example_kwargs: More keyword arguments for that call.
        blocks: Which blocks to gate, the layers 0..L-1: found blocks, names, globs ("!layer1.*"
            leaves out), classes or a predicate. None: all that are found.
        schedule: Another factor in [0, 1] on the rates, multiplied with the one above: a function
            of the optimizer step, or `{name or glob: schedule}`, of blocks.
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
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        >>> model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        >>> x = torch.randn(2, 5, 8)
        >>> depth = apply_progressive_layer_dropping(model, 0.5, gamma=0.1, example_inputs=x)
        >>> for _ in range(10):
        ...     depth.step()
        >>> [round(block.survival_probability, 3) for block in depth.blocks]
        [1.0, 0.947, 0.895, 0.842, 0.789, 0.737]
    """
    floor, speed = _THETA.read(theta, "theta"), _GAMMA.read(gamma, "gamma")
    example = example_inputs, example_kwargs
    rates = 1.0 - floor, _below_the_rate
    product = _times(Schedule((Progressive(speed),)), schedule)
    return apply(model, Options(rates, example, blocks, "block", "batch", "train", product, draw))


def _below_the_rate(num_blocks: int, drop_rate: float) -> list[float]:
    """`i / L * drop_rate`, i = 0..L-1: the first block always runs."""
    return [block / num_blocks * drop_rate for block in range(num_blocks)]


def _times(factor: Schedule, schedule: Any) -> Any:
    """The product; what is no schedule stays, for `apply` to refuse."""
    if schedule is None:
        return factor
    if not isinstance(schedule, Mapping):
        return factor * schedule if callable(schedule) else schedule
    # What no key matches has the preset's schedule; a "*" of the user's says so of everything.
    rest = {} if "*" in schedule else {"*": factor}
    return rest | {key: factor * each if callable(each) else each for key, each in schedule.items()}


def _rates(drop_rate: object, distribution: str) -> Rates:
    """A number spread over the blocks, or None for the model's own rates."""
    if isinstance(drop_rate, str) and drop_rate == "model":
        return None
    return _RATE.read(drop_rate, "drop_rate"), distribution
