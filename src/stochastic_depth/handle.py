"""The handle of a gated model: what `apply_stochastic_depth` returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from stochastic_depth import folding, state
from stochastic_depth.errors import (
    ChangedModelError,
    OptionError,
    SelectionError,
    nearest,
    warn,
)
from stochastic_depth.gating.attach import detach, gated_modules
from stochastic_depth.gating.compiled import compile_blocks
from stochastic_depth.gating.gate import KEY
from stochastic_depth.plan import Plan
from stochastic_depth.table import table

_AT_A_STEP = 8  # blocks that are looked at


@dataclass(frozen=True)
class GatedBranch:
    """A branch and its rate at this step.

    Attributes:
        name: The block's name and the branch's number, `"blocks.3:0"`.
        drop_rate: The chance that it is dropped now.
    """

    name: str
    drop_rate: float

    @property
    def survival_probability(self) -> float:
        """`1 - drop_rate`."""
        return 1.0 - self.drop_rate


@dataclass(frozen=True)
class GatedBlock(GatedBranch):
    """A block and its rate at this step; where branches are drawn on their own, their mean.

    Attributes:
        branches: Its branches, likewise.
    """

    branches: tuple[GatedBranch, ...]


class StochasticDepth:
    """The handle of a model with stochastic depth: look, step, save, force, and the ways out.

    `apply_stochastic_depth` makes it, `get_stochastic_depth(model)` finds it again. It holds no
    state of its own: that lies with the gates, and is copied and pickled with the model.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model = model
        self._plan = plan
        plan.handle = weakref.ref(self)

    @property
    def model(self) -> nn.Module:
        """The model that was watched."""
        return self._model

    @property
    def blocks(self) -> tuple[GatedBlock, ...]:
        """The gated blocks in forward order, with their rates at this step."""
        found = []
        for number, block in enumerate(self._plan.blocks):
            now = self._plan.rates_at(self._plan.clock.step)
            rates = [now[unit] for unit in self._plan.units_of(number)]
            each = rates * len(block.branches) if self._plan.unit == "block" else rates
            branches = tuple(
                GatedBranch(branch.name, rate)
                for branch, rate in zip(block.branches, each, strict=True)
            )
            found.append(GatedBlock(block.name, sum(rates) / len(rates), branches))
        return tuple(found)

    @property
    def last_gates(self) -> dict[str, Any]:
        """Whether each gate was open in its last training call, by name of block or branch.

        In mode "sample" the numbers of the rows that were kept, in rising order.
        """
        return self._plan.last_gates()

    def follow(self, optimizer: Optimizer) -> Following:
        """Advance at every `optimizer.step()`.

        Args:
            optimizer: Any optimizer; a wrapper that holds one as `.optimizer` is unwrapped. A
                step that a GradScaler leaves out does not count.

        Returns:
            A handle whose `.remove()` ends it.

        Raises:
            OptionError: It follows an optimizer already, or this is none.
        """
        if self._plan.following is not None:
            raise OptionError(
                "follow() while an optimizer is followed already",
                expected="one optimizer whose steps are counted",
                instead="call .remove() on what the first follow() returned",
            )
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner
        if not isinstance(optimizer, Optimizer):
            raise OptionError(
                f"follow() got a {type(optimizer).__name__}",
                expected="a torch.optim.Optimizer",
                instead="pass the optimizer, or call depth.step() after each of its steps",
            )
        own = {id(parameter) for parameter in self._model.parameters()}
        if own.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
            warn("the optimizer that is followed holds no parameter of the model")
        plan, handle = self._plan, weakref.ref(self)

        def advance(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # A fused optimizer is called, too, where its GradScaler leaves the step out.
            if not bool(getattr(optimizer, "found_inf", False)):
                if (owner := handle()) is not None:
                    owner._look_at_some_gates()
                plan.advance()

        plan.following = Following(plan, optimizer.register_step_post_hook(advance))
        return plan.following

    def step(self) -> None:
        """Advance by one optimizer step: call it after each, where nothing is followed.

        Raises:
            OptionError: An optimizer is followed, which would count every step twice.
        """
        if self._plan.following is not None:
            raise OptionError(
                "step() while an optimizer is followed",
                expected="either follow(optimizer) or step(), not both",
                instead="leave step() out",
            )
        self._look_at_some_gates()
        self._plan.advance()

    @contextmanager
    def fixed(self, gates: Mapping[str, bool]) -> Iterator[None]:
        """Force gates open (True) or closed (False), in train and eval, scaled as ever.

        Args:
            gates: By name; what is not listed stays open. With unit="branch" a block's name
                stands for all its branches.

        Raises:
            SelectionError: A name that no gate has.
        """
        forced: dict[str, bool] = {}
        units = {
            block.name: [self._plan.units[unit] for unit in self._plan.units_of(number)]
            for number, block in enumerate(self._plan.blocks)
        }
        known = dict.fromkeys([*units, *(unit for names in units.values() for unit in names)])
        for name, is_open in gates.items():
            if name not in known:
                raise SelectionError(
                    f'fixed() got "{name}", which no gate is called',
                    expected='the name of a block, or with unit="branch" of a branch',
                    instead=nearest(name, known),
                )
            if is_open not in (True, False):
                raise OptionError(
                    f'fixed() got {is_open!r} for "{name}"',
                    expected="True (open) or False (closed)",
                    instead="pass one of them",
                )
            forced |= dict.fromkeys(units.get(name, (name,)), bool(is_open))
        undo = self._plan.force(forced, disabled=False)
        try:
            yield
        finally:
            undo()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Every branch runs at its inference scale, in train mode too (`update_bn`)."""
        undo = self._plan.force(None, disabled=True)
        try:
            yield
        finally:
            undo()

    def state_dict(self) -> dict[str, Any]:
        """What it takes to continue the sequence of draws exactly; plain numbers and strings."""
        return state.save(self._plan)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken.

        Raises:
            StateMismatchError: It was taken with other blocks, rates or draws.
        """
        state.load(self._plan, state_dict)

    def compile(
        self,
        backend: str | Callable[..., Any] = "inductor",
        mode: str | None = None,
        options: Any = None,
    ) -> None:
        """Compile block by block, beneath the gates, so that no draw needs another graph.

        A graph is built where it is needed first: one for each kind of block, shared by those that
        are alike, and in mode "sample" one more or two for all numbers of rows. After some steps,
        when every kind ran, no draw and no step of a schedule brings another. Where a memory format
        depends on the draw (a dropped block hands its input on as it is) there is one for each. A
        block of which only a part runs is run eagerly. Call it before or after wrapping the model;
        again to compile anew.

        Args:
            backend: As for `torch.compile`.
            mode: Likewise.
            options: Likewise.

        Raises:
            OptionError: None of the blocks can be compiled.
        """
        self._check_gates()
        compile_blocks(
            self._model, self._plan, {"backend": backend, "mode": mode, "options": options}
        )

    def fold(self) -> nn.Module:
        """Put the inference scale into the weights and take the gates out.

        Returns:
            The plain model, the same object: in eval mode it computes what the gated one did, to
            rounding. With scale "train" or "none" no weight changes.

        Raises:
            RefusedBlockError: A branch has no weight that could take its scale, or shares it with
                something outside; nothing is changed then.
        """
        self._check_gates()
        folding.fold_into(self._model, folding.fold_factors(self._plan))
        return self.remove()

    def folded_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the folded model, for a checkpoint during training; the gates stay.

        Raises:
            RefusedBlockError: As `fold()`.
        """
        self._check_gates()
        return folding.folded(self._model, folding.fold_factors(self._plan))

    def remove(self) -> nn.Module:
        """Take the gates out.

        Returns:
            The plain model, the same object, with its weights as they are: a model trained with
            scale "eval" loses its inference scale; `fold()` keeps it.
        """
        detach(self._model, self._plan)
        if self._plan.following is not None:
            self._plan.following.remove()
        return self._model

    def _look_at_some_gates(self) -> None:
        """The same for a few blocks at each step, in turn: all of them would take too long."""
        gates, step = self._plan.gates, self._plan.clock.step
        for number in range(step * _AT_A_STEP, step * _AT_A_STEP + min(_AT_A_STEP, len(gates))):
            module: Any = self._model
            try:
                for part in filter(None, gates[number % len(gates)].name.split(".")):
                    module = module._modules[part]
                found = module.__dict__[KEY]
            except (KeyError, AttributeError):  # replaced, or wrapped
                found = None
            if found is None or found.plan is not self._plan:
                self._check_gates()

    def _check_gates(self) -> None:
        """Raises where the gates were taken out, or a gated block was replaced."""
        missing = [b.name for b in self._plan.blocks if not self._is_gated(b.container)]
        if missing:
            everything = len(missing) == len(self._plan.blocks)
            raise ChangedModelError(
                "the gates are out of the model already"
                if everything
                else f'block "{missing[0]}" was replaced after stochastic depth was applied',
                expected="the blocks that are gated",
                instead="use the model that fold() or remove() gave back"
                if everything
                else "change the model first and apply stochastic depth afterwards",
            )

    def _is_gated(self, name: str) -> bool:
        try:
            # A wrapper around it (a checkpoint's, say) hands its attributes on.
            gate = getattr(self._model.get_submodule(name), KEY, None)
        except AttributeError:  # not even there any more
            return False
        return gate is not None and gate.plan is self._plan

    def __str__(self) -> str:
        gates = [gate for _, _, gate in gated_modules(self._model)]
        whole = {gate.name for gate in gates if gate.whole is not None}
        blocks = self._plan.blocks
        names = {b.name for b in blocks if b.explicit or b.container in whole}
        return table(self._model, self._plan, frozenset(names))

    def __repr__(self) -> str:
        return (
            f"<StochasticDepth of {type(self._model).__name__}: {len(self._plan.blocks)} blocks, "
            f"step {self._plan.clock.step}>"
        )


class Following:
    """An optimizer that is followed."""

    def __init__(self, plan: Plan, hook: Any) -> None:
        self._plan, self._hook = plan, hook

    def remove(self) -> None:
        """Follow it no longer."""
        self._hook.remove()
        self._plan.following = None
