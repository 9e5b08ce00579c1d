"""The algorithm: what happens at which event of Composer's Trainer."""

from __future__ import annotations

import warnings
from typing import Any

import composer.algorithms
from composer.algorithms.stochastic_depth import StochasticDepth as ComposersOwn
from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from stochastic_depth.draw import Draw
from stochastic_depth.errors import (
    ExampleInputsError,
    OptionError,
    StochasticDepthWarning,
    warn,
)
from stochastic_depth.handle import StochasticDepth as Handle
from stochastic_depth.integrations.composer.checkpoints import SavedState, note_idle_parameters
from stochastic_depth.integrations.composer.functional import apply_stochastic_depth, check
from stochastic_depth.integrations.composer.networks import call_with
from stochastic_depth.integrations.composer.waiting import Waiting, remark
from stochastic_depth.integrations.composer.warmup import Factor, as_time, warmed_up


class StochasticDepth(Algorithm):
    """Skips residual blocks at random, with the arguments of Composer's own algorithm.

    It is put on the model at `Event.INIT`, before there is data; a network that no example is known
    of is watched with the first batch, right before its first forward. The draws follow the
    Trainer's seed and its count of batches, so that a resumed training continues them.

    Args:
        target_layer_name: Which blocks: "ResNetBottleneck" (Composer's registry), the name of
            their class, a name or glob of blocks, or None for all that are found.
        stochastic_method: "block" drops a block for the whole batch, "sample" for each of its
            examples. Both are unscaled in training, and multiply by `1 - p` in inference.
        drop_rate: From 0 to 1.
        drop_distribution: "linear" rises with depth up to `drop_rate`; "uniform".
        drop_warmup: The part of the training over which the rate rises linearly from 0: a number
            from 0 to 1, a time string ("0.1dur", "5ep", "1000ba"), or a `Time`.
        use_same_gpu_seed: Whether all ranks drop the same blocks (faster), or each draws its own
            (usually more accurate). With "sample" each always draws its own.
        example_inputs: What to call the network with once, to watch it; of a ComposerModel that is
            neither a ComposerClassifier nor a HuggingFaceModel: a batch. None: the network's own
            example, images for a vision model, else the first batch.

    Raises:
        OptionError: An argument has a value that it cannot take.

    Example:
        >>> StochasticDepth("ResNetBottleneck", drop_rate=0.2, drop_warmup="0.1dur")
        WatchedStochasticDepth(target_layer_name='ResNetBottleneck', stochastic_method='block',
            drop_rate=0.2, drop_distribution='linear', drop_warmup=Time(0.1, 'dur'),
            use_same_gpu_seed=True)
    """

    # Composer looks an algorithm of a checkpoint up in `composer.algorithms` by this name, and
    # evaluates its repr there. Under its own algorithm's name it would add that one beside ours.
    __qualname__ = "WatchedStochasticDepth"

    def __init__(
        self,
        target_layer_name: str | None = None,
        stochastic_method: str = "block",
        drop_rate: float = 0.2,
        drop_distribution: str = "linear",
        drop_warmup: float | str | Time = 0.0,
        *,
        use_same_gpu_seed: bool = True,
        example_inputs: Any = None,
    ) -> None:
        check(stochastic_method, drop_rate, drop_distribution)
        self.target_layer_name = target_layer_name
        self.stochastic_method = stochastic_method
        self.drop_rate = drop_rate
        self.drop_distribution = drop_distribution
        self.drop_warmup = as_time(drop_warmup)
        self.use_same_gpu_seed = use_same_gpu_seed
        self.example_inputs = example_inputs
        self._depth: Handle | None = None
        self._awaits_batch = False  # as no example is known
        self._seed = 0
        self._factor = Factor()
        self._statistics: list[Any] = []  # of the training that is resumed
        self._modules: dict[str, nn.Module] = {}  # of the model at INIT, until it is complete
        self._waiting: Waiting | None = Waiting()

    def __repr__(self) -> str:
        warmup = f"Time({self.drop_warmup.value!r}, {self.drop_warmup.unit.value!r})"
        return (
            f"{type(self).__qualname__}(target_layer_name={self.target_layer_name!r}, "
            f"stochastic_method={self.stochastic_method!r}, drop_rate={self.drop_rate!r}, "
            f"drop_distribution={self.drop_distribution!r}, drop_warmup={warmup}, "
            f"use_same_gpu_seed={self.use_same_gpu_seed!r})"
        )

    @property
    def depth(self) -> Handle:
        """The handle, `sd.StochasticDepth`: to look, to force gates, to fold.

        Raises:
            OptionError: It is on no model yet.
        """
        if self._depth is not None:
            return self._depth
        if self._awaits_batch:
            raise OptionError(
                "the handle of an algorithm that waits for the first batch, to watch the network",
                expected="a training that has begun, or an example",
                instead="call trainer.fit() first, or pass example_inputs= to StochasticDepth",
            )
        raise OptionError(
            "the handle of an algorithm that is on no model yet",
            expected="an algorithm that a Trainer was made with",
            instead="make the Trainer first: Trainer(model=..., algorithms=[this one])",
        )

    @property
    def num_stochastic_layers(self) -> int:
        """How many blocks are gated."""
        return 0 if self._depth is None else len(self._depth.blocks)

    @property
    def rate_in_force(self) -> float:
        """`min(1, elapsed / drop_warmup) * drop_rate`."""
        return self._factor.value * self.drop_rate

    @property
    def find_unused_parameters(self) -> bool:
        """A skipped block's parameters are accounted for, so that nobody has to look for them."""
        return False

    @staticmethod
    def required_on_load() -> bool:
        """The weights of a checkpoint expect the inference scale."""
        return True

    def match(self, event: Event, state: State) -> bool:
        """Whether something is to be done at an event."""
        return event in _AT and (self._awaits_batch or event not in _FORWARDS)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do what is to be done at an event."""
        _AT[event](self, state, logger)

    def state_dict(self) -> dict[str, Any]:
        """The draws depend on the seed and the time, which Composer saves itself."""
        counts = self._depth.state_dict()["statistics"] if self._depth is not None else []
        own = {"factor": self._factor.value, "statistics": counts}
        return SavedState({**super().state_dict(), **own})

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:  # noqa: FBT001, FBT002
        """Take over the rate in force, for a model that is only evaluated."""
        self._factor.value = float(state.get("factor", 1.0))
        self._statistics = state.get("statistics", [])

    # What is done at each event

    def _begin(self, state: State, logger: Logger) -> None:
        """INIT: in place, before any data. The algorithm may have served another Trainer before."""
        self._factor, self._waiting = Factor(), Waiting()
        self._depth, self._awaits_batch, self._modules = None, False, {}
        try:
            self._put_on(state, self.example_inputs)
        except ExampleInputsError:
            if self.example_inputs is not None:
                raise
            self._awaits_batch = True

    def _watch_batch(self, state: State, logger: Logger) -> None:
        """Before a forward, where no example is known: the batch is the example."""
        kind = f"the first batch, of type {type(state.batch).__name__}, as no example is known"
        call = call_with(state.model, state.batch)
        if self.stochastic_method == "sample" and not call.shows_tensors:
            raise ExampleInputsError(
                f'stochastic_method="sample" watches {kind}, but finds no tensor in it',
                expected="a tensor, or tuples, lists and dicts of tensors: rows are taken of them",
                instead='give the model such a batch, or pass stochastic_method="block"',
            )
        try:
            self._put_on(state, call)
        except ExampleInputsError as error:
            raise ExampleInputsError(
                f"watched was {kind}: {error}",
                expected="a batch that shows how the network is called",
                instead="pass example_inputs= to StochasticDepth",
            ) from error
        self._modules = {}
        self._log_number(logger)
        self._set_clock(state)

    def _put_on(self, state: State, example: Any) -> None:
        own_seed = self.use_same_gpu_seed or self.stochastic_method == "sample"
        self._seed = state.rank_zero_seed
        self._depth = apply_stochastic_depth(
            state.model,
            self.target_layer_name,
            self.stochastic_method,
            self.drop_rate,
            self.drop_distribution,
            example_inputs=example,
            schedule=self._factor if self.drop_warmup.value else None,
            draw=Draw(self._seed, across_ranks="auto" if own_seed else "different"),
        )
        self._modules = dict(state.model.named_modules())
        self._awaits_batch = False

    def _complete(self, state: State, logger: Logger) -> None:
        """BEFORE_LOAD: other algorithms may have replaced modules since (BlurPool and the like)."""
        now = dict(state.model.named_modules())
        if any(now.get(name) is not module for name, module in self._modules.items()):
            self._put_on(state, self.example_inputs)

    def _follow_checkpoint(self, state: State, logger: Logger) -> None:
        """AFTER_LOAD: go on with the seed of the training that is resumed."""
        if any(isinstance(algorithm, ComposersOwn) for algorithm in state.algorithms):
            raise OptionError(
                "Composer's own StochasticDepth is in the Trainer beside this one, perhaps added "
                "from a checkpoint",
                expected="one of the two, as each drops the blocks that the other keeps",
                instead="leave Composer's out of algorithms=[...]; to resume from a checkpoint of "
                'it, pass load_exclude_algorithms=["StochasticDepth"] to the Trainer',
            )
        if self._awaits_batch:
            return
        if state.rank_zero_seed != self._seed:
            with warnings.catch_warnings():  # what there is to say about it was said at INIT
                warnings.simplefilter("ignore", StochasticDepthWarning)
                self._put_on(state, self.example_inputs)
        self._modules = {}
        self._log_number(logger)
        self._set_clock(state)

    def _begin_fit(self, state: State, logger: Logger) -> None:
        self._factor.value = warmed_up(state, self.drop_warmup)

    def _begin_batch(self, state: State, logger: Logger) -> None:
        self._factor.value = warmed_up(state, self.drop_warmup)
        logger.log_metrics({"stochastic_depth/drop_rate": self.rate_in_force})

    def _begin_train_batch(self, state: State, logger: Logger) -> None:
        """Also where Composer begins a batch anew, after it ran out of memory: with its draws."""
        if not self._awaits_batch:
            self._set_clock(state)

    def _end_batch(self, state: State, logger: Logger) -> None:
        self.depth.step()
        self._factor.value = warmed_up(state, self.drop_warmup)
        note_idle_parameters(state.optimizers)
        self._judge_waiting()

    def _end_epoch(self, state: State, logger: Logger) -> None:
        """Where the loader has no length, only now the time moves."""
        self._factor.value = warmed_up(state, self.drop_warmup)

    def _ask_for_data(self, state: State, logger: Logger) -> None:
        if self._waiting is not None:
            self._waiting.ask()

    def _receive_data(self, state: State, logger: Logger) -> None:
        if self._waiting is not None:
            self._waiting.receive(first_of_epoch=state.timestamp.batch_in_epoch.value == 0)

    # What they use

    def _log_number(self, logger: Logger) -> None:
        """Once, when it is known for good."""
        logger.log_metrics({"stochastic_depth/num_stochastic_layers": self.num_stochastic_layers})

    def _set_clock(self, state: State) -> None:
        """The draws of this batch, from their beginning."""
        batch, plan = state.timestamp.batch.value, self.depth._plan
        was_begun = any(gate.calls and gate.step == batch for gate in plan.gates)
        if plan.clock.step != batch or was_begun or self._statistics:
            saved = self.depth.state_dict()
            counts = self._statistics or saved["statistics"]
            self.depth.load_state_dict({**saved, "step": batch, "calls": {}, "statistics": counts})
            self._statistics = []

    def _judge_waiting(self) -> None:
        if self._waiting is None:
            return
        self._waiting.finish()
        share = self._waiting.share()
        if share is None or dist.get_global_rank() != 0:
            return
        rates = [block.drop_rate for block in self.depth.blocks]
        told = remark(share, sum(rates) / len(rates))
        if told is not None:
            self._waiting = None  # once is enough
            warn(told)


_FORWARDS = (Event.BEFORE_FORWARD, Event.EVAL_BEFORE_FORWARD, Event.PREDICT_BEFORE_FORWARD)
_AT = {
    **dict.fromkeys(_FORWARDS, StochasticDepth._watch_batch),
    Event.INIT: StochasticDepth._begin,
    Event.BEFORE_LOAD: StochasticDepth._complete,
    Event.AFTER_LOAD: StochasticDepth._follow_checkpoint,
    Event.FIT_START: StochasticDepth._begin_fit,
    Event.BEFORE_DATALOADER: StochasticDepth._ask_for_data,
    Event.AFTER_DATALOADER: StochasticDepth._receive_data,
    Event.BATCH_START: StochasticDepth._begin_batch,
    Event.BEFORE_TRAIN_BATCH: StochasticDepth._begin_train_batch,
    Event.BATCH_END: StochasticDepth._end_batch,
    Event.EPOCH_END: StochasticDepth._end_epoch,
}

WatchedStochasticDepth = StochasticDepth  # where pickle looks for it
setattr(composer.algorithms, StochasticDepth.__qualname__, StochasticDepth)
