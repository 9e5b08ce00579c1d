"""What a checkpoint of Composer's needs so that it can be resumed from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer


class SavedState(dict[str, Any]):
    """The algorithm's part of a checkpoint.

    To read it, pickle imports this package, which registers the algorithm with Composer: so a
    program that knows nothing of stochastic depth gets it added, or fails, but never goes on with
    weights that lack their inference scale.
    """


def note_idle_parameters(optimizers: Iterable[Optimizer]) -> None:
    """Give parameters that were never updated an empty state.

    That is what they have anyway, only that then it is in the checkpoint: torch's
    `set_optimizer_state_dict`, with which Composer resumes, raises a KeyError for a parameter
    without one. Optimizers take an empty state for none.
    """
    for optimizer in optimizers:
        if not optimizer.state:  # nothing was updated yet; torch then makes up a state of zeros
            continue
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state.setdefault(parameter, {})
