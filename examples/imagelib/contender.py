"""A network in training: one step at a time, with the clock (and at times a counter) running."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn

from imagelib.batches import Batch, Batches
from imagelib.flops import counting
from imagelib.ranks import Ranks
from imagelib.records import NOT_MEASURED


class Turn(NamedTuple):
    """A step of training, and what it took."""

    seconds: float
    loss: float
    flops: float = NOT_MEASURED


class Contender:
    """A network, its optimizer, and Fabric's wrappers around both."""

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        label_smoothing: float = 0.0,
        ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._fabric, self._ranks = fabric, ranks
        self._wrapped_model, self._wrapped_optimizer = fabric.setup(model, optimizer)
        self._label_smoothing = label_smoothing

    def take_turn(
        self, batch: Batch, learning_rate: float, seed: int, absent: Iterable[nn.Parameter] = ()
    ) -> Turn:
        """One step of training; the `absent` parameters end it without a gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        torch.manual_seed(seed)  # dropout, where a network has any, then needs no checkpoint
        self._ranks.meet()  # nobody's clock shows how long another prepared
        start = self._now()
        logits = self._wrapped_model(batch.images)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self._label_smoothing)
        self._wrapped_optimizer.zero_grad()
        self._fabric.backward(loss)
        for parameter in absent:
            parameter.grad = None
        self._wrapped_optimizer.step()
        return Turn(self._now() - start, loss.item())

    def take_counted_turn(
        self, batch: Batch, learning_rate: float, seed: int, absent: Iterable[nn.Parameter] = ()
    ) -> Turn:
        """The same, while torch counts the FLOPs of every operation, which takes long."""
        with counting() as counter:
            turn = self.take_turn(batch, learning_rate, seed, absent)
        return turn._replace(flops=counter.get_total_flops())

    def count_wrong(self, batches: Batches) -> int:
        # As under DistributedDataParallel in training, the first rank's BatchNorm statistics hold.
        self._ranks.copy_from_first(self.model.buffers())
        return count_wrong_together(self._fabric, self.model, batches)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _now(self) -> float:
        if self._fabric.device.type != "cpu":
            torch.accelerator.synchronize(self._fabric.device)
        return time.perf_counter()


def count_wrong(model: nn.Module, batches: Iterable[Batch]) -> int:
    """How many images a network, as it is used in inference, takes for something else."""
    model.eval()
    with torch.inference_mode():
        wrong = [(model(b.images).argmax(1) != b.labels).sum() for b in batches]
    model.train()
    return int(sum(wrong))


def count_wrong_together(fabric: Fabric, model: nn.Module, batches: Batches) -> int:
    """The same, of all ranks. Each counts its own images, which need not be equally many.

    Hence the network itself, without DistributedDataParallel, which would wait for the others.
    """
    with fabric.autocast():
        wrong = count_wrong(model, batches.for_testing())
    return int(batches.ranks.sum([wrong])[0])
