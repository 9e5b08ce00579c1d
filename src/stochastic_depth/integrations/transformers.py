"""Stochastic depth in the `Trainer` of transformers: a callback, and nothing else to remember."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from stochastic_depth.discovery import plain_model
from stochastic_depth.errors import OptionError, warn
from stochastic_depth.folding import KEY
from stochastic_depth.integrations.training import Scale, Training


class StochasticDepthCallback(Training, TrainerCallback, ExportableState):
    """Has a model skip its residual blocks at random while a `Trainer` trains it.

    It applies stochastic depth when the Trainer is made (or, with `model_init`, when the training
    begins), follows the optimizer, logs `depth.metrics()`, and rides in `trainer_state.json`, so
    that `train(resume_from_checkpoint=)` goes on with the same draws. With `torch_compile=True` the
    blocks are compiled, one by one, beneath their gates, and not the model as a whole.

    When `train` ends the model is the plain one again, with the inference scale folded into its
    weights, and so is what `save_model` and `save_pretrained` write then. The checkpoints of a
    training hold the weights as they are trained: `sd.fold_state_dict` makes plain ones of them.

    Args:
        drop_rate: As in `sd.apply_stochastic_depth`, like all that are not explained here.
        drop_distribution: Likewise.
        example_inputs: Likewise. Without one the model's own is taken, with a mask beside its
            tokens; a model that is trained with other tensors needs a batch of these.
        example_kwargs: Likewise.
        blocks: Likewise.
        unit: Likewise.
        mode: Likewise.
        scale: Likewise; "auto" is "train" with the adapters of PEFT, as the weights that would take
            the scale in are not among those that they save.
        schedule: Likewise.
        draw: Likewise.
        fold: Whether to fold when the training ends. Without it the gates stay in the model.

    Raises:
        OptionError: An option of the Trainer's arguments does not go with it.

    Example:
        >>> trainer = Trainer(model, callbacks=[StochasticDepthCallback(0.2)])
    """

    _start: dict[str, Any]  # its state when the training begins

    # What happens when.

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Applies stochastic depth, before the optimizer is made and the model is wrapped."""
        if args.restore_callback_states_from_checkpoint:
            raise OptionError(
                "TrainingArguments(restore_callback_states_from_checkpoint=True), which makes "
                "callbacks anew, with StochasticDepthCallback",
                expected="the callback as it was made: it restores itself",
                instead="leave that argument out",
            )
        _come_first(self)
        if args.torch_compile:
            _leave_to_the_blocks()
        model: Any = kwargs.get("model")
        if hasattr(getattr(model, "config", None), "use_cache"):
            # As the Trainer does right behind this: layers are to be watched as they train.
            model.config.use_cache = args.use_cache
        if model is not None:
            self._apply(model, args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follows the optimizer, and goes on from the checkpoint that was loaded."""
        self._apply(kwargs["model"], args)
        self.depth.follow(kwargs["optimizer"])
        saved: Any = state.stateful_callbacks  # by class, as `trainer_state.json` has them
        if not state.global_step:
            # It may be the second attempt, with a smaller batch.
            self.depth.load_state_dict(self._start)
        elif not self._load(saved):
            saved[type(self).__name__] = self.state()  # where the Trainer looks when it saves
            warn(
                "the checkpoint that is resumed holds no state of stochastic depth, which begins "
                f"at step {self._start['step']}, beside step {state.global_step} of the training"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds what was skipped to the log of a training step."""
        if self._depth is not None and logs is not None and "loss" in logs:
            metrics = self._depth.metrics()
            logs.update(metrics)
            if state.log_history:  # of which the Trainer keeps a copy
                state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the plain model back, its weights folded."""
        if self._depth is None:
            return
        self._start = self._depth.state_dict()
        if self.fold and args.load_best_model_at_end and state.best_model_checkpoint:
            # The weights are those of that checkpoint now, and so have to be the rates.
            saved = Path(state.best_model_checkpoint, "trainer_state.json")
            self._load(json.loads(saved.read_text())["stateful_callbacks"])
        self.take_off()

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` holds of it."""
        saved = {} if self._depth is None else {KEY: self._depth.state_dict()}
        return {"args": {}, "attributes": saved}

    def _load(self, callbacks: Mapping[str, Any]) -> bool:
        """Goes on from what `trainer_state.json` holds, if anything."""
        saved = callbacks.get(type(self).__name__, {}).get("attributes", {})
        if KEY in saved:
            self.depth.load_state_dict(saved[KEY])
        return KEY in saved

    def _apply(self, model: nn.Module, args: TrainingArguments) -> None:
        before = self._depth
        model = plain_model(model)
        self.put_on(model, self._example(model), self._scale_for(model))
        if self._depth is before:
            return
        self._start = self.depth.state_dict()
        if args.torch_compile:
            self.depth.compile(args.torch_compile_backend or "inductor", args.torch_compile_mode)

    def _example(self, model: nn.Module) -> Any:
        """The example: the model's own is of tokens alone, and in a training a mask comes along."""
        own = getattr(model, "dummy_inputs", None)
        if self.example_inputs is not None or self.example_kwargs or not isinstance(own, Mapping):
            return self.example_inputs
        tokens = own.get("input_ids")
        if not isinstance(tokens, torch.Tensor) or getattr(model, "main_input_name", "") not in own:
            return None
        mask = torch.ones_like(tokens)
        mask[-1, -1] = 0  # where nothing is masked layers are called without
        return {"attention_mask": mask, **own}

    def _scale_for(self, model: nn.Module) -> Scale:
        if not hasattr(model, "peft_config") or self.mode == "sample":
            return self.scale
        if self.scale == "eval":
            raise OptionError(
                'scale="eval" with the adapters of PEFT, which save no weights but their own',
                expected="a scale that is not folded into the weights of the model beneath",
                instead='leave scale out, or pass scale="train"',
            )
        return "train" if self.scale == "auto" else self.scale


def _leave_to_the_blocks() -> None:
    """Have accelerate compile no model: its blocks are compiled instead."""
    AcceleratorState().dynamo_plugin.backend = DynamoBackend.NO


def _come_first(callback: TrainerCallback) -> None:
    """Have the loggers among the other callbacks see what this one adds to a log.

    They come before those that a user passes, and a callback is not told of its companions: only
    the handler that calls it, two frames up, knows.
    """
    handler = sys._getframe(2).f_locals.get("self")
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
