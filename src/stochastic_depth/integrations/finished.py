"""The end of a training in which the weights are folded, and how another one goes on from it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from stochastic_depth.errors import RefusedBlockError, warn
from stochastic_depth.handle import StochasticDepth


class Finished:
    """What a training left whose model is plain again.

    Attributes:
        state: `depth.state_dict()` at its end.
    """

    def __init__(self, depth: StochasticDepth) -> None:
        self.state = depth.state_dict()
        self._model: Any = weakref.ref(depth.model)
        self._versions: dict[str, int] = {}

    def goes_on(self, depth: StochasticDepth) -> None:
        """Have the handle of the same model go on where this training ended."""
        if self._model() is depth.model:
            depth.load_state_dict(self.state)

    def unfold(self, model: nn.Module) -> None:
        """Take the factors out of the weights again, of those that nobody has changed since."""
        if self._model() is not model:
            return
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, factor in self._factors():
                if parameters[name]._version == self._versions[name]:
                    parameters[name].div_(factor)

    def note_versions(self, model: nn.Module) -> None:
        """Note how often the folded weights were changed so far."""
        parameters = dict(model.named_parameters())
        self._versions = {name: parameters[name]._version for name, _ in self._factors()}

    def _factors(self) -> Any:
        return self.state["fold"] if isinstance(self.state["fold"], list) else []


def unfold(model: nn.Module, state: dict[str, Any]) -> None:
    """Take the factors of a state out of weights that were folded with it, to rounding."""
    with torch.no_grad():
        for name, factor in state["fold"] if isinstance(state["fold"], list) else ():
            model.get_parameter(name).div_(factor)


def fold_at_the_end(depth: StochasticDepth) -> Finished | None:
    """Make the model plain, with the inference scale in its weights.

    Returns:
        What another training goes on from; None where the scale cannot be folded: the gates then
        stay, with a warning.
    """
    finished = Finished(depth)
    try:
        model = depth.fold()
    except RefusedBlockError as error:
        warn(f"the gates stay in the model, as their scale cannot be folded: {error.arrived}")
        return None
    finished.note_versions(model)
    return finished
