"""A variant in training: one step at a time, with the clock (and at times a counter) running."""

import contextlib
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

import stochastic_depth as sd
from imagelib.flops import StepCost, counting
from textlib.recipe import learning_rate
from textlib.records import NOT_COUNTED, HeldOut, Step
from textlib.windows import Batch, Windows

UNTIMED = 3  # steps to warm up


class Contender:
    """A model, its optimizer and, where it drops, its gates; and what has been written down."""

    def __init__(
        self,
        fabric: Fabric,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        depth: sd.StochasticDepth | None,
        cost: StepCost,
        *,
        blocks: int,
        total_steps: int,
        peak: float,
    ) -> None:
        """`blocks`: how many the model has; `peak`: of the learning rate."""
        self.name, self.model, self.optimizer, self.depth = name, model, optimizer, depth
        self.cost, self.blocks, self.total_steps = cost, blocks, total_steps
        self.steps: list[Step] = []
        self.held_out: list[HeldOut] = []
        self._peak = peak
        self._fabric = fabric
        self._wrapped_model, self._wrapped_optimizer = fabric.setup(model, optimizer)
        self._counted = {total_steps * share // 10 for share in (1, 3, 5, 7, 9)}

    @property
    def finished(self) -> bool:
        return len(self.steps) == self.total_steps

    @property
    def flops(self) -> int:
        """Spent on training so far."""
        return sum(step.flops for step in self.steps)

    def take_turn(self, batch: Batch) -> None:
        """One step of training. Some are counted by torch, which takes long."""
        number = len(self.steps)
        rate = learning_rate(self._peak, number, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        counted = number in self._counted
        counter = counting()
        with counter if counted else contextlib.nullcontext():
            start = self._now()
            loss = cross_entropy(self._wrapped_model(batch.tokens), batch.following)
            self._wrapped_optimizer.zero_grad()
            self._fabric.backward(loss)
            self._wrapped_optimizer.step()
            seconds = self._now() - start
        gates = self.depth.last_gates if self.depth else {}
        step = Step(
            step=number,
            timed=not counted and number >= UNTIMED,
            seconds=seconds,
            loss=loss.item(),
            learning_rate=rate,
            blocks_run=self.blocks - sum(not is_open for is_open in gates.values()),
            flops=self.cost.with_gates(gates),
            gates="".join("9" if is_open else "0" for is_open in gates.values()),
            counted_flops=counter.get_total_flops() if counted else NOT_COUNTED,
        )
        self.steps.append(step)

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on. That of the gates rides in the optimizer's."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": [tuple(step) for step in self.steps],
            "held_out": [tuple(look) for look in self.held_out],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = [Step(*values) for values in state["steps"]]
        self.held_out = [HeldOut(*values) for values in state["held_out"]]

    def look_at_held_out(self, windows: Windows) -> None:
        """How well it predicts the held-out part now, as it is used in inference."""
        loss = held_out_loss(self._wrapped_model, windows.held_out())
        self.held_out.append(HeldOut(len(self.steps), self.flops, loss))

    def _now(self) -> float:
        if self._fabric.device.type != "cpu":
            torch.accelerator.synchronize(self._fabric.device)
        return time.perf_counter()


def cross_entropy(scores: Tensor, following: Tensor) -> Tensor:
    """The mean of -log p, in nats."""
    return F.cross_entropy(scores.flatten(0, 1), following.flatten())


def held_out_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The mean over all tokens of all batches."""
    total, tokens = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            number = batch.following.numel()
            total += number * cross_entropy(model(batch.tokens), batch.following).item()
            tokens += number
    model.train()
    return total / tokens
