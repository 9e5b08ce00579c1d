"""Following an optimizer: its steps are counted, and its state dict carries the handle's state.

A trainer that saves its optimizer then saves stochastic depth with it, and a resumed run goes on
with the same draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from stochastic_depth import state
from stochastic_depth.errors import warn
from stochastic_depth.folding import KEY, is_riding
from stochastic_depth.plan import Plan
from stochastic_depth.torch_private.processes import is_inner_step, is_made_up_step


class Following:
    """What following an optimizer returns: `remove()` ends it.

    Args:
        optimizer: Whose steps count.
        plan: What the gates of the model share.
        advance: Counts a step.
        save_state: Whether the state rides along in the optimizer's.
    """

    def __init__(
        self, optimizer: Optimizer, plan: Plan, advance: Callable[[], None], *, save_state: bool
    ) -> None:
        self._plan, self._advance = plan, advance
        self._lacks_state = False  # the optimizer was loaded, without a state of ours in it
        self._hooks: list[RemovableHandle] = [optimizer.register_step_post_hook(self._count)]
        if isinstance(optimizer, SGD) and any(group["fused"] for group in optimizer.param_groups):
            self._hooks.append(optimizer.register_step_pre_hook(_begin_momenta))
        if save_state:
            self._hooks += [
                optimizer.register_state_dict_post_hook(self._put_in),
                optimizer.register_load_state_dict_pre_hook(self._take_out),
            ]

    def remove(self) -> None:
        """Follow no more."""
        for hook in self._hooks:
            hook.remove()

    @property
    def is_active(self) -> bool:
        """Whether the optimizer is still followed."""
        hook = self._hooks[0]
        return hook.id in (hook.hooks_dict_ref() or ())

    def _count(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer is called, too, where its GradScaler leaves the step out.
        if getattr(optimizer, "found_inf", False) or is_made_up_step() or is_inner_step(optimizer):
            return
        if self._lacks_state and self._plan.clock.step == 0:
            warn(
                "the optimizer that is followed was loaded from a state with steps behind it, "
                "which held none of stochastic depth: it begins at step 0. Pass the saved "
                "depth.state_dict() to depth.load_state_dict(), or take no notice where the "
                "checkpoint is of a training without stochastic depth"
            )
        self._lacks_state = False
        self._advance()

    # Of several that follow one optimizer each puts its state beside the others.

    def _put_in(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        others = sum(map(is_riding, state_dict))
        state_dict[f"{KEY}.{others}" if others else KEY] = state.save(self._plan)

    def _take_out(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        names = [block.name for block in self._plan.blocks]
        riding = sorted(key for key in state_dict if is_riding(key))
        alike = [k for k in riding if [name for name, _ in state_dict[k]["drop_rates"]] == names]
        if riding:  # what is left is for the others: the dictionary is a copy
            state.load(self._plan, state_dict.pop((alike or riding)[0]))
        self._lacks_state = not riding and bool(state_dict.get("state"))


def _begin_momenta(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """A momentum of zeros where a parameter has its first gradient later than another.

    It is the same as none, but that torch's fused SGD fails where only some have one.
    """
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in (each for each in group["params"] if each.grad is not None):
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
