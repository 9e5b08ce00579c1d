"""What the callbacks for trainers share: their options, applying them, and the end of a training.

At the end the weights are folded and the model is plain. Another training of the same model goes on
from there.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from stochastic_depth.depth import apply_stochastic_depth
from stochastic_depth.distributions import Distribution, DropRate
from stochastic_depth.draw import Draw
from stochastic_depth.errors import OptionError, RefusedBlockError, SelectionError, warn
from stochastic_depth.handle import StochasticDepth, get_stochastic_depth
from stochastic_depth.plan import Mode, Unit
from stochastic_depth.schedules import ScheduleFunction
from stochastic_depth.selection import Selector

Scale = Literal["auto", "eval", "train", "none"]


class Training:
    """Stochastic depth on the model of a trainer, for one training after the other."""

    def __init__(
        self,
        drop_rate: DropRate,
        drop_distribution: str | Distribution | None = None,
        *,
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
        blocks: Selector | Sequence[Selector] | None = None,
        unit: Unit = "block",
        mode: Mode = "batch",
        scale: Scale = "auto",
        schedule: ScheduleFunction | Mapping[str, ScheduleFunction] | None = None,
        draw: Draw = Draw(),  # noqa: B008  (frozen)
        fold: bool = True,
    ) -> None:
        self.drop_rate, self.drop_distribution = drop_rate, drop_distribution
        self.example_inputs, self.example_kwargs = example_inputs, example_kwargs
        self.blocks, self.unit, self.mode, self.scale = blocks, unit, mode, scale
        self.schedule, self.draw, self.fold = schedule, draw, fold
        self._depth: StochasticDepth | None = None
        self._finished: Finished | None = None  # what the last training left

    @property
    def depth(self) -> StochasticDepth:
        """The handle: to look, to force gates, to fold.

        Raises:
            OptionError: It is on no model: before the training, or behind it.
        """
        if self._depth is None:
            raise OptionError(
                "the handle of a callback that is on no model",
                expected="a training that runs; afterwards the model is the plain one",
                instead="begin the training first, or pass fold=False to keep the gates",
            )
        return self._depth

    def put_on(self, model: nn.Module, example: Any, scale: Scale) -> None:
        """Gate a model, to go on where its last training ended.

        Args:
            model: It is left alone where this callback has gated it already.
            example: What to watch it with; None: its own.
            scale: As in `sd.apply_stochastic_depth`.
        """
        handle = _handle_of(model)
        if handle is not None and handle is self._depth:
            return
        if handle is not None and handle.model is model and handle._plan.is_of_a_callback:
            handle.remove()  # another callback's, whose training was broken off
        if self._finished is not None:
            self._finished.unfold(model)
        self._depth = apply_stochastic_depth(
            model,
            self.drop_rate,
            self.drop_distribution,
            example_inputs=example,
            example_kwargs=self.example_kwargs,
            blocks=self.blocks,
            unit=self.unit,
            mode=self.mode,
            scale=scale,
            schedule=self.schedule,
            draw=self.draw,
        )
        self._depth._plan.is_of_a_callback = True
        if self._finished is not None:
            self._finished.goes_on(self._depth)

    def take_off(self) -> None:
        """Make the model plain, with the inference scale in its weights.

        Where that cannot be folded the gates stay, with a warning; with `fold=False` without one.
        """
        if not self.fold:
            return
        finished = Finished(self.depth)
        try:
            finished.note_versions(self.depth.fold())
        except RefusedBlockError as error:
            warn(f"the gates stay in the model, as their scale cannot be folded: {error.arrived}")
            return
        self._finished, self._depth = finished, None


class Finished:
    """What a training left whose model is plain again.

    Attributes:
        state: `depth.state_dict()` at its end.
    """

    def __init__(self, depth: StochasticDepth) -> None:
        self.state = depth.state_dict()
        self._model: Any = weakref.ref(depth.model)
        self._versions: dict[str, int] = {}

    def note_versions(self, model: nn.Module) -> None:
        """Note how often the folded weights were changed so far."""
        self._versions = {name: model.get_parameter(name)._version for name, _ in self._factors}

    def unfold(self, model: nn.Module) -> None:
        """Take the factors out of the weights again, of those that nobody has changed since."""
        if self._model() is model:
            unfold(model, [[n, f] for n, f in self._factors if self._is_as_it_was(model, n)])

    def goes_on(self, depth: StochasticDepth) -> None:
        """Have the handle of the same model go on where this training ended."""
        if self._model() is depth.model:
            depth.load_state_dict(self.state)

    def _is_as_it_was(self, model: nn.Module, name: str) -> bool:
        return model.get_parameter(name)._version == self._versions[name]

    @property
    def _factors(self) -> list[Any]:
        factors: list[Any] = self.state["fold"]  # a training that has ended could be folded
        return factors


def unfold(model: nn.Module, factors: list[Any]) -> None:
    """Take the factors of a state ("fold") out of weights that hold them, to rounding."""
    with torch.no_grad():
        for name, factor in factors:
            model.get_parameter(name).div_(factor)


def _handle_of(model: nn.Module) -> StochasticDepth | None:
    try:
        return get_stochastic_depth(model)
    except SelectionError:  # none; or several
        return None
