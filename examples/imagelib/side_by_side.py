"""Two networks that train side by side: the same batches, taking turns step by step.

Turns, so that a machine that becomes slower or faster meanwhile does so for both. At some steps a
third network joins in, the physically shortened one: it shows how much time could have been saved.
"""

from collections.abc import Mapping
from typing import Any

import stochastic_depth as sd
from imagelib.batches import Batch, Batches
from imagelib.contender import Contender, Turn
from imagelib.flops import StepCost
from imagelib.ranks import Ranks
from imagelib.records import NOT_MEASURED, Epoch, Step
from imagelib.shortened import taken_out

_NO_TURN = Turn(NOT_MEASURED, NOT_MEASURED)


class SideBySide:
    """The network with stochastic depth and, where they are wanted, the others beside it."""

    def __init__(
        self,
        depth: sd.StochasticDepth,
        cost: StepCost,
        dropping: Contender,
        plain: Contender | None,
        shortened: Contender | None,
        ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    ) -> None:
        self.depth, self.cost, self.ranks = depth, cost, ranks
        self.dropping, self.plain, self.shortened = dropping, plain, shortened

    def plan_measurements(self, total_steps: int, seed: int) -> None:
        """A hundred steps or so are compared with the shortened network; five are counted."""
        self._compare_every = max(3, total_steps // 100 | 1)  # odd: so the first turn alternates
        self._counted = {total_steps * share // 10 for share in (1, 3, 5, 7, 9)}
        self._untimed = 3  # steps to warm up
        self._seed = seed << 32

    def step(
        self, number: int, epoch: int, batch: Batch, data_seconds: float, learning_rate: float
    ) -> Step:
        """One step of training of each network."""
        counted, self._untimed = number in self._counted, self._untimed - 1
        own_seed = self._seed + number * self.ranks.number + self.ranks.rank
        turn = (batch, learning_rate, own_seed)
        plain = self.plain.take_turn(*turn) if self.plain and number % 2 == 0 else _NO_TURN
        take = self.dropping.take_counted_turn if counted else self.dropping.take_turn
        dropping = take(*turn)
        gates = _shares(self.depth.last_gates, len(batch.labels))
        shortened = _NO_TURN
        if self.shortened and (counted or number % self._compare_every == 0):
            take = self.shortened.take_counted_turn if counted else self.shortened.take_turn
            closed = [name for name, is_open in gates.items() if not is_open]
            several = self.ranks.number > 1
            with taken_out(self.shortened.model, closed, exchanged=several) as absent:
                shortened = take(*turn, absent)
        if self.plain and number % 2 == 1:
            plain = self.plain.take_turn(*turn)
        return Step(
            step=number,
            epoch=epoch,
            timed=not counted and self._untimed < 0,
            data_seconds=data_seconds,
            plain_seconds=plain.seconds,
            plain_loss=plain.loss,
            seconds=dropping.seconds,
            loss=dropping.loss,
            blocks_run=sum(gates.values()),
            flops=self.cost.with_gates(gates),
            gates="".join(f"{9 * share:.0f}" for share in gates.values()),
            shortened_seconds=shortened.seconds,
            counted_flops=dropping.flops,
            counted_shortened_flops=shortened.flops,
        )

    def count_wrong(self, epoch: int, batches: Batches) -> Epoch:
        """Both networks on the test images, as they are used in inference."""
        plain = self.plain.count_wrong(batches) if self.plain else NOT_MEASURED
        return Epoch(epoch, plain, self.dropping.count_wrong(batches))

    def state_dict(self) -> dict[str, Any]:
        """Without the shortened network, whose weights do not matter."""
        return {
            "plain": self.plain.state_dict() if self.plain else None,
            "dropping": self.dropping.state_dict(),
            "depth": self.depth.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.plain:
            self.plain.load_state_dict(state["plain"])
        self.dropping.load_state_dict(state["dropping"])
        self.depth.load_state_dict(state["depth"])


def _shares(gates: Mapping[str, Any], batch_size: int) -> dict[str, float]:
    """Open (1) or closed (0); example-wise, the share of the batch that each block ran on."""
    return {
        name: int(gate) if isinstance(gate, bool) else len(gate) / batch_size
        for name, gate in gates.items()
    }
