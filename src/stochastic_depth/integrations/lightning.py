"""Stochastic depth in a Lightning `Trainer`: a callback, and nothing else to remember."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from stochastic_depth.distributions import Distribution, DropRate
from stochastic_depth.draw import Draw
from stochastic_depth.errors import OptionError, StochasticDepthWarning
from stochastic_depth.folding import KEY, fold_state_dict
from stochastic_depth.gating.attach import gated_modules
from stochastic_depth.integrations.training import Scale, Training, unfold
from stochastic_depth.plan import Mode, Unit
from stochastic_depth.schedules import ScheduleFunction
from stochastic_depth.selection import Selector

_BAR = "stochastic_depth/skipped"  # what the progress bar shows; loggers get all metrics


class StochasticDepth(Training, Callback):
    """Has a LightningModule, or a part of it, skip its residual blocks at random in `fit`.

    It applies stochastic depth when `fit` sets the module up, follows the optimizer that trains it,
    logs `depth.metrics()`, and rides in the checkpoints, so that `fit(ckpt_path=)` goes on with the
    same draws. After `fit` the module is the plain one again, with the inference scale folded into
    its weights. Checkpoints of a training hold the weights as they are trained; `validate`, `test`
    and `predict` fold them as they load them, as do checkpoints with `save_weights_only` when they
    are saved. For other programs: `sd.fold_state_dict`.

    Args:
        drop_rate: As in `sd.apply_stochastic_depth`, like all that are not explained here.
        drop_distribution: Likewise.
        module: The name of the part that it is applied to, such as "backbone"; None: the
            LightningModule itself, by its `forward`.
        example_inputs: What to call that part with, to watch it; None: the `example_input_array` of
            the LightningModule, or else the part's own example.
        example_kwargs: Likewise.
        blocks: Likewise.
        unit: Likewise.
        mode: Likewise.
        scale: Likewise.
        schedule: Likewise.
        draw: Likewise.
        fold: Whether to fold at the end of `fit`, and as checkpoints are loaded otherwise. Without
            it the gates stay in the module.

    Raises:
        OptionError: The LightningModule has no part of that name; in `fit`.

    Example:
        >>> trainer = Trainer(callbacks=[StochasticDepth(0.2, module="backbone")])
    """

    def __init__(
        self,
        drop_rate: DropRate,
        drop_distribution: str | Distribution | None = None,
        *,
        module: str | None = None,
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
        super().__init__(
            drop_rate,
            drop_distribution,
            example_inputs=example_inputs,
            example_kwargs=example_kwargs,
            blocks=blocks,
            unit=unit,
            mode=mode,
            scale=scale,
            schedule=schedule,
            draw=draw,
            fold=fold,
        )
        self.module = module

    @property
    def state_key(self) -> str:
        """Its name in checkpoints: of several, each has that of its part of the module."""
        return self._generate_state_key(module=self.module)

    # What happens when.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gates the module in `fit`; folds what other stages load."""
        # Before a search for a learning rate, say, which trains when its own turn comes.
        trainer.callbacks.sort(key=lambda each: each is not self)  # type: ignore[attr-defined]
        vars(pl_module)["on_save_checkpoint"] = _Saving(pl_module, self)
        if stage == "fit":
            target, example = self._target(pl_module)
            self.put_on(target, example, self.scale)
        elif self._depth is None and self.fold:
            vars(pl_module)["on_load_checkpoint"] = _Loading(pl_module, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets the module's own hooks be."""
        for name in ("on_save_checkpoint", "on_load_checkpoint"):
            vars(pl_module).pop(name, None)

    def _target(self, pl_module: LightningModule) -> tuple[nn.Module, Any]:
        """What to gate, and what to call it with."""
        kind, names = type(pl_module), ", ".join(name for name, _ in pl_module.named_children())
        example = self.example_inputs
        if example is None and not self.example_kwargs:
            example = pl_module.example_input_array
        if self.module is None and kind.forward is not LightningModule.forward:
            return pl_module, example
        try:
            return pl_module.get_submodule(self.module or "-"), example
        except AttributeError as error:
            what = f'module="{self.module}", and {kind.__name__} has no such part'
            if self.module is None:
                what = f"{kind.__name__} has no forward of its own, and no part of it is named"
            raise OptionError(
                what,
                expected=f"module=, the name of one of its parts: {names}",
                instead="pass the name of the network in the LightningModule; where setup() or "
                "configure_model() makes it, call sd.apply_stochastic_depth there instead, and "
                "depth.follow(optimizer) in configure_optimizers()",
            ) from error

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follows the optimizer of the gated module, before its state is loaded."""
        depth, optimizers = self.depth, trainer.optimizers
        blocks = [module for _, module, _ in gated_modules(depth.model)]
        for modules in (blocks, [depth.model]):  # of a GAN's that of the gated part
            of_these = {parameter for module in modules for parameter in module.parameters()}
            for optimizer in optimizers:
                groups = optimizer.param_groups
                if not of_these.isdisjoint(p for group in groups for p in group["params"]):
                    depth.follow(optimizer)
                    return
        if not optimizers:
            return
        with warnings.catch_warnings():  # its parameters may be added later
            warnings.simplefilter("ignore", StochasticDepthWarning)
            self.depth.follow(optimizers[0])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what was skipped; of several parts each under its name."""
        several = sum(isinstance(each, StochasticDepth) for each in trainer.callbacks) > 1  # type: ignore[attr-defined]
        part = f"/{self.module}" if several else ""
        for name, value in self.depth.metrics().items():
            pl_module.log(name + part, value, prog_bar=name == _BAR)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the plain module back, its weights folded."""
        self.take_off()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        found: dict[str, Any] = {"prefix": f"{self.module}." if self.module else ""}
        if self._depth is not None:
            found |= {KEY: self._depth.state_dict(), "folded": False}
        elif self._finished is not None:
            found |= {KEY: self._finished.state, "folded": True}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint; from one of the end of a `fit` with its weights unfolded."""
        if self._depth is None or KEY not in state_dict:
            return
        if state_dict["folded"]:
            unfold(self._depth.model, state_dict[KEY]["fold"])
        self._depth.load_state_dict(state_dict[KEY])


def _fold(checkpoint: dict[str, Any], state: dict[str, Any]) -> None:
    """Folds the weights of a checkpoint by what a callback's state says, where they are not."""
    if KEY in state and not state["folded"]:
        weights = fold_state_dict(checkpoint["state_dict"], state[KEY], prefix=state["prefix"])
        checkpoint["state_dict"] = weights


class _Saving:
    """Stands in the place of a LightningModule's `on_save_checkpoint`.

    What is saved without the optimizers cannot be resumed: its weights are folded.
    """

    def __init__(self, pl_module: LightningModule, callback: StochasticDepth) -> None:
        self._next, self._callback = pl_module.on_save_checkpoint, callback

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        if "optimizer_states" not in checkpoint and self._callback.fold:
            _fold(checkpoint, self._callback.state_dict())
        self._next(checkpoint)


class _Loading:
    """Stands in the place of a LightningModule's `on_load_checkpoint`: folds what it loads."""

    def __init__(self, pl_module: LightningModule, callback: StochasticDepth) -> None:
        self._next, self._key = pl_module.on_load_checkpoint, callback.state_key

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        _fold(checkpoint, checkpoint.get("callbacks", {}).get(self._key, {}))
        self._next(checkpoint)
