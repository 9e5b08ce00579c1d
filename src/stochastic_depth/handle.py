"""The handle of a gated model: what `apply_stochastic_depth` returns, and how to find it again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stochastic_depth import folding, pruning, state
from stochastic_depth.counting import CallCount
from stochastic_depth.discovery import example_for, plain_model
from stochastic_depth.discovery.blocks import ResidualBlock
from stochastic_depth.discovery.undisturbed import Arguments
from stochastic_depth.distributions import Distribution, DropRate, resolve_rates
from stochastic_depth.draw import check_choice
from stochastic_depth.errors import ChangedModelError, OptionError, SelectionError, nearest, warn
from stochastic_depth.following import Following
from stochastic_depth.gating.attach import detach, gated_modules
from stochastic_depth.gating.compiled import compile_blocks
from stochastic_depth.gating.gate import KEY, Gate
from stochastic_depth.plan import Plan
from stochastic_depth.selection import Keep, taken_out
from stochastic_depth.torch_private.tracing import WRAPPED


class StochasticDepth:
    """The handle of a model with stochastic depth: look, step, save, force, and the ways out.

    `apply_stochastic_depth` makes it, `get_stochastic_depth(model)` finds it again. It holds no
    state of its own: that lies with the gates, and is copied and pickled with the model.

    Attributes:
        model: The model that was watched.
    """

    def __init__(self, model: nn.Module, plan: Plan, example: Arguments | None = None) -> None:
        self.model = model
        self._example = example if example and any(example) else None
        self._plan = plan
        plan.handle = weakref.ref(self)

    @property
    def blocks(self) -> tuple[state.GatedBlock, ...]:
        """The gated blocks in forward order, with their rates at this step."""
        return state.gated_blocks(self._plan)

    @property
    def last_gates(self) -> dict[str, Any]:
        """Whether each gate was open in its last training call, by name of block or branch.

        In mode "sample" the numbers of the rows that were kept, in rising order; of a block inside
        of another one's branch they count the rows that this one ran on.
        """
        return self._plan.last_gates()

    def follow(self, optimizer: Optimizer, *, save_state: bool = True) -> Following:
        """Advance at every `optimizer.step()`, and let the state ride in the optimizer's.

        `optimizer.state_dict()` then holds `depth.state_dict()` under "stochastic_depth", and
        `optimizer.load_state_dict()` sets it, so that whoever saves the optimizer saves both. A
        plain optimizer does not mind the key. Where another optimizer is followed, this one takes
        its place; the steps go on.

        Args:
            optimizer: Any optimizer; a wrapper that holds one as `.optimizer` is unwrapped. A
                step that a GradScaler leaves out does not count.
            save_state: Whether the state rides along.

        Returns:
            A handle whose `.remove()` ends it.

        Raises:
            OptionError: This is no optimizer.
        """
        for name in ("optimizer", "_base_optimizer"):  # the latter is that of timm's Lookahead
            while isinstance(inner := getattr(optimizer, name, None), Optimizer):
                optimizer = inner
        # PostLocalSGDOptimizer is one by its class alone: it holds another, and takes no hooks.
        if getattr(optimizer, "defaults", None) is None or not isinstance(optimizer, Optimizer):
            raise OptionError(
                f"follow() got a {type(optimizer).__name__}",
                expected="a torch.optim.Optimizer whose step runs hooks",
                instead="pass the optimizer, or call depth.step() after each of its steps",
            )
        parameters = set(self.model.parameters())
        if parameters.isdisjoint(p for group in optimizer.param_groups for p in group["params"]):
            warn("the optimizer that is followed holds no parameter of the model")
        plan, handle = self._plan, weakref.ref(self)
        if plan.following is not None:
            plan.following.remove()
        for clock in plan.clock.with_followers():
            clock.is_told = True
        plan.following = Following(
            optimizer, plan, lambda: _advance(plan, handle()), save_state=save_state
        )
        return plan.following

    def step(self) -> None:
        """Advance by one optimizer step: call it after each, where nothing is followed.

        Raises:
            OptionError: An optimizer is followed, which would count every step twice.
        """
        if self._plan.following is not None and self._plan.following.is_active:
            raise OptionError(
                "step() while an optimizer is followed",
                expected="either follow(optimizer) or step(), not both",
                instead="leave step() out",
            )
        _advance(self._plan, self)

    def set_drop_rate(
        self, drop_rate: DropRate, drop_distribution: str | Distribution | None = None
    ) -> None:
        """Draw with other rates from now on; the step, the schedule and the draws go on.

        Copies of the model that follow it (an average of its weights, say) have them, too.

        Args:
            drop_rate: As in `apply_stochastic_depth`, for the blocks that are gated.
            drop_distribution: Likewise.

        Raises:
            OptionError, SelectionError: An argument cannot be used; the rates stay as they were.
        """
        names = [block.name for block in self._plan.blocks]
        self._plan.set_rates(resolve_rates(drop_rate, drop_distribution, names))

    @contextmanager
    def fixed(self, gates: Mapping[str, bool]) -> Iterator[None]:
        """Force gates open (True) or closed (False), in train and eval, scaled as ever.

        Args:
            gates: By name; what is not listed stays open. With unit="branch" a block's name
                stands for all its branches.

        Raises:
            SelectionError: A name that no gate has.
        """
        plan, forced = self._plan, dict[str, bool]()
        units = {unit: [unit] for unit in plan.units}
        for number, block in enumerate(plan.blocks):
            units[block.name] = [plan.units[unit] for unit in plan.units_of(number)]
        for name, is_open in gates.items():
            if name not in units:
                raise SelectionError(
                    f'fixed() got "{name}", which no gate is called',
                    expected='the name of a block, or with unit="branch" of a branch',
                    instead=nearest(name, units),
                )
            if is_open not in (True, False):
                raise OptionError(
                    f'fixed() got {is_open!r} for "{name}"',
                    expected="True (open) or False (closed)",
                    instead="pass one of them",
                )
            forced |= dict.fromkeys(units[name], bool(is_open))
        with plan.force(forced):
            yield

    def disabled(self) -> AbstractContextManager[None]:
        """Every branch runs at its inference scale, in train mode and in copies (`update_bn`)."""
        return self._plan.force(None, disabled=True)

    def metrics(self) -> dict[str, float]:
        """What a logger shows: the same names in every trainer.

        Returns:
            "stochastic_depth/drop_rate", the mean of the rates at this step; and, once a training
            forward was made, of the last one "stochastic_depth/blocks_run", how many blocks ran
            (in mode "sample" on average over the rows, with unit="branch" over their branches),
            and "stochastic_depth/skipped", the fraction of all blocks that did not, 0 to 1.
        """
        return state.metrics(self._plan)

    def statistics(self) -> dict[str, CallCount]:
        """How often each block was called in training so far, and dropped.

        Counted from the draws, at no cost in a forward; the numbers are part of `state_dict()`.
        What is `fixed`, `disabled` or in eval mode does not count. On several processes that draw
        differently each counts its own calls, and begins anew in a resumed run.

        Returns:
            By name of block, or with unit="branch" of branch, an object with `.calls` and
            `.dropped`.
        """
        return self._plan.count_calls()

    def state_dict(self) -> dict[str, Any]:
        """What it takes to continue the sequence of draws exactly; plain numbers and strings."""
        return state.save(self._plan)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken.

        Where it was taken with other rates those of this model stand, with a warning.

        Raises:
            StateMismatchError: It was taken with other blocks, options or draws.
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
        arguments = {"backend": backend, "mode": mode, "options": options}
        compile_blocks(self.model, self._plan, arguments)

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
        self._plan.warn_unstepped("fold()")
        with torch.no_grad():
            for parameter, value in folding.scaled_parameters(self.model, self._plan).items():
                parameter.copy_(value)
        return self.remove()

    def folded_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the folded model, for a checkpoint during training; the gates stay.

        Raises:
            RefusedBlockError: As `fold()`.
        """
        self._check_gates()
        self._plan.warn_unstepped("folded_state_dict()")
        return folding.folded(self.model, self._plan)

    def prune(
        self,
        keep: Keep,
        *,
        order: Literal["even", "least_dropped"] = "even",
        exact: bool = True,
        example_inputs: Any = None,
        example_kwargs: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """Take blocks out for good: what is left is a smaller plain model.

        In eval mode it computes, bit for bit, what the folded model does with these blocks dropped.
        A block that is skipped whole leaves its `Sequential` or `ModuleList`, which is renumbered,
        and with it the numbers of layers in a configuration of transformers; elsewhere a module
        stands in that hands its input on.

        Args:
            keep: How many of the gated blocks to keep (an int), which fraction of them (a float),
                or the names of some (globs, too).
            order: Which of so many: "even" keeps evenly spaced ones, the first and the last among
                them (as LayerDrop, Fan et al., section 4.2), "least_dropped" those that ran most
                often in training.
            exact: Whether a norm behind the sum of a block (BERT's) stays, as it runs where the
                block is dropped. False takes it out as well, and then the model computes something
                else; but its class, and so `from_pretrained`, knows it as one with fewer layers.
            example_inputs: What to call the model with, to see that the outcome is right. None: as
                in `apply_stochastic_depth`.
            example_kwargs: Likewise.

        Returns:
            The model, the same object, without gates.

        Raises:
            OptionError, SelectionError: `keep` stands for no blocks of this model.
            RefusedBlockError: A block has a projection on its skip path, a branch has no weight
                that could take its scale, or the model needs a block; nothing is changed then.
        """
        check_choice("order=", order, ("even", "least_dropped"))
        self._check_gates()
        self._plan.warn_unstepped("prune()")
        trained = state.times_trained(self._plan) if order == "least_dropped" else None
        out = taken_out(self._plan, keep, trained)
        is_passed = example_inputs is not None or example_kwargs
        example = None if is_passed else self._example
        if example is None:
            example = example_for(self.model, example_inputs, example_kwargs)
        pruning.prune(self.model, self._plan, out, example, exact=exact)
        return self.remove()

    def remove(self) -> nn.Module:
        """Take the gates out.

        Returns:
            The plain model, the same object, with its weights as they are: a model trained with
            scale "eval" loses its inference scale; `fold()` keeps it.
        """
        detach(self.model, self._plan)
        if self._plan.following is not None:
            self._plan.following.remove()
        return self.model

    def _check_gates(self) -> None:
        """Raises where the gates were taken out, or a gated block was replaced."""
        blocks = self._plan.blocks
        missing = [block.name for block in blocks if not self._is_gated(block)]
        if not missing:
            return
        what = "the gates are out of the model already"
        instead = "use the model that fold() or remove() gave back"
        if any(map(self._is_gated, blocks)):
            what = f'block "{missing[0]}" was replaced after stochastic depth was applied'
            instead = "change the model first and apply stochastic depth afterwards"
        raise ChangedModelError(what, expected="the blocks that are gated", instead=instead)

    def _is_gated(self, block: ResidualBlock) -> bool:
        part: Any = self.model
        for name in block.block_module.split(".") if block.block_module else ():
            part = getattr(part, name, None)  # also through a wrapper put around later
        gate = getattr(part, KEY, None)
        return gate is not None and gate.plan is self._plan

    def __str__(self) -> str:
        gates = [gate for _, _, gate in gated_modules(self.model) if gate.plan is self._plan]
        if not gates:
            return f"No stochastic depth on {type(self.model).__name__}: the gates are taken out"
        whole = {gate.name for gate in gates if gate.whole is not None}
        return state.table(self.model, self._plan, whole)

    def __repr__(self) -> str:
        what = f"{type(self.model).__name__}: {len(self._plan.blocks)} blocks"
        return f"<StochasticDepth of {what}, step {self._plan.clock.step}>"


def _advance(plan: Plan, handle: StochasticDepth | None) -> None:
    """One optimizer step, and a look at one of the blocks, in turn: all would take too long."""
    step = plan.clock.step
    if handle is not None and not handle._is_gated(plan.blocks[step % len(plan.blocks)]):
        handle._check_gates()
    plan.clock.set(step + 1)


def get_stochastic_depth(model: nn.Module, *, blocks: str | None = None) -> StochasticDepth:
    """The handle of a gated model again: after `torch.load`, `deepcopy`, in a callback.

    Args:
        model: The gated model, or anything that holds it.
        blocks: Where stochastic depth was applied several times: the name of a block of the one
            that is meant, in the model that it was applied to.

    Raises:
        SelectionError: It has no stochastic depth, or several.
    """
    model = plain_model(model)
    applied = {g.plan: _root(name, g) for name, _, g in gated_modules(model)}
    found = [p for p in applied if blocks is None or any(b.name == blocks for b in p.blocks)]
    if len(found) != 1:
        names = [plan.blocks[0].name for plan in found or applied]
        instead = f"pass blocks= with one of {names}" if names else "call apply_stochastic_depth"
        if len(set(names)) < len(names):  # copies
            instead = f"pass a part of the model, one of {[applied[plan] for plan in found]}"
        raise SelectionError(
            f"{type(model).__name__} has {len(found) or 'no'} stochastic depth"
            + (f" with a block {blocks!r}" if blocks else ""),
            expected="a model on which it was applied once",
            instead=instead,
        )
    plan = found[0]
    root = applied[plan]
    handle: StochasticDepth | None = plan.handle() if plan.handle is not None else None
    if handle is not None and (root is None or handle.model is model.get_submodule(root)):
        return handle
    if root is None:
        raise SelectionError(
            f"{type(model).__name__} is a part of the model that stochastic depth was applied to",
            expected="that model, or anything around it",
            instead="pass the whole model",
        )
    return StochasticDepth(model.get_submodule(root), plan)


def _root(name: str, gate: Gate) -> str | None:
    """Where the model that was watched lies; None where only a part of it is at hand."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPED)
    if gate.name and not f".{name}".endswith(f".{gate.name}"):
        return None
    return name.removesuffix(gate.name).removesuffix(".")
