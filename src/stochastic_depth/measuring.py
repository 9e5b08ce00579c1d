"""What a training step costs, and what each block adds to it: FLOPs, or time on this machine.

Each block is called by itself with what it is called with in a forward of the model, open and
closed: what that takes grows with the depth, not with its square.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.kept import put_back
from stochastic_depth.discovery.undisturbed import Arguments, fresh, undisturbed, without_values
from stochastic_depth.errors import ExampleInputsError, OptionError, StochasticDepthError
from stochastic_depth.handle import StochasticDepth
from stochastic_depth.torch_private.trees import tree_leaves

Measure = Callable[[Callable[[], None]], float]
"""Of a run, forward and backward: its FLOPs, or seconds."""

_ROUNDS = 9  # of timing, of which the median counts
_ON_THE_CPU = "_scaled_dot_product_flash_attention_for_cpu"


class Costs:
    """What a training step costs, and what each unit adds to it.

    Args:
        depth: The handle of a model to measure.
        example: What to call it with.
        timed: Whether to time it, too.

    Attributes:
        flops: Of a step, and how many less it has where each unit is dropped.
        seconds: Likewise; None where it is not timed.
    """

    def __init__(self, depth: StochasticDepth, example: Arguments, *, timed: bool) -> None:
        self._depth, self._plan, self._model = depth, depth._plan, depth.model
        self._calls: dict[str, list[Arguments]] = {}
        self.seconds: tuple[float, list[float]] | None = None
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))  # noqa: FBT003
            stack.enter_context(torch.enable_grad())
            example = fresh(example)
            arguments = stack.enter_context(without_values(self._model, example))
            stack.enter_context(undisturbed(self._model))
            self._begin(arguments)
            stack.enter_context(_failing_by_name(self._model))
            self.flops = self._costs(count_flops, arguments)
            if timed:
                rounds = [self._costs(_seconds, arguments) for _ in range(1 + _ROUNDS)][1:]
                of_units = map(median, zip(*(units for _, units in rounds), strict=True))
                self.seconds = median(step for step, _ in rounds), list(of_units)
        if not timed and not any(self.flops[1]):
            raise OptionError(
                f"torch counts no FLOPs in the blocks of {type(self._model).__name__}",
                expected="convolutions, matrix products or attention",
                instead="pass timed=True, to measure their time",
            )

    def _begin(self, example: Arguments) -> None:
        """Have it train, and write down what the outermost blocks are called with."""
        self._model.train()
        with suppress(Exception):  # a BatchNorm needs several values, or a GPU
            self._note_calls(example)
            return
        for module in self._model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()
        try:
            self._note_calls(example)
        except StochasticDepthError:
            raise
        except Exception as error:
            raise ExampleInputsError(
                f"{type(self._model).__name__} does not train on its example: {error}",
                expected="an example that it takes in training (with the targets, say)",
                instead="pass example_inputs=... as for a training step",
            ) from error

    def _note_calls(self, example: Arguments) -> None:
        names = sorted(gate.name for gate in self._plan.gates)
        self._roots = {n: next(root for root in names if _lies_in(n, root)) for n in names}
        with ExitStack() as stack:
            stack.enter_context(self._depth.fixed({}))
            for root in set(self._roots.values()):
                calls = self._calls[root] = []
                hook = self._model.get_submodule(root).register_forward_pre_hook
                stack.callback(hook(partial(_note, calls), with_kwargs=True).remove)
            output = self._model(*example[0], **example[1])
        trains = any(parameter.requires_grad for parameter in self._model.parameters())
        if trains and not any(map(_trains, tree_leaves(output))):
            raise ExampleInputsError(
                f"{type(self._model).__name__} returns nothing that has a gradient",
                expected="an output that a loss is made of",
                instead="pass a module around it that returns scores, or example_kwargs for that",
            )

    def _costs(self, measure: Measure, example: Arguments) -> tuple[float, list[float]]:
        """What a step costs by this measure, and how much less where each unit is dropped."""
        step = self._measured(measure, self._model, [example], {})
        of_units = [0.0] * len(self._plan.units)
        opened: dict[str, float] = {}
        for gate in self._plan.gates:
            root = self._roots[gate.name]
            run = partial(self._measured, measure, self._model.get_submodule(root))
            if root not in opened:
                opened[root] = run(self._calls[root], {})
            for unit in dict.fromkeys(gate.units):
                closed = {self._plan.units[unit]: False}
                of_units[unit] += opened[root] - run(self._calls[root], closed)
        return step, of_units

    def _measured(
        self, measure: Measure, module: nn.Module, calls: list[Arguments], gates: dict[str, bool]
    ) -> float:
        self._model.zero_grad()
        for part in module.modules():  # a state that it keeps is part of an earlier graph
            vars(part).update({k: v.detach() for k, v in vars(part).items() if _trains(v)})
        copies = [fresh(call, torch.clone) for call in calls]

        def run() -> None:
            for args, kwargs in copies:
                leaves = [leaf for leaf in tree_leaves(module(*args, **kwargs)) if _trains(leaf)]
                torch.autograd.backward(leaves, [torch.ones_like(leaf) for leaf in leaves])

        with self._depth.fixed(gates), put_back(module):
            return measure(run)


@contextmanager
def _failing_by_name(model: nn.Module) -> Iterator[None]:
    """Turns an error in a measured step into one that says what failed."""
    try:
        yield
    except StochasticDepthError:
        raise
    except Exception as error:
        raise ExampleInputsError(
            f"a step of {type(model).__name__}, or of one of its blocks alone, cannot be measured: "
            f"{type(error).__name__}: {error}",
            expected="a model whose blocks can be called by themselves, forward and backward",
            instead="leave the block out with blocks=, or time a training with and without it",
        ) from error


def _lies_in(name: str, other: str) -> bool:
    """Whether a module is another one or a part of it."""
    return f"{name}.".startswith(f"{other}." if other else "")


def _note(calls: list[Arguments], module: nn.Module, args: Any, kwargs: Any) -> None:
    calls.append(fresh((args, kwargs), _cut_off))


def _cut_off(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.requires_grad)


def _trains(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _seconds(run: Callable[[], None]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def count_flops(run: Callable[[], None]) -> float:
    """What a call comes to: convolutions, matrix products and attention.

    Torch's fused attention on the CPU counts as the one on a GPU: every pair of tokens, also those
    that a causal mask leaves out.
    """
    from torch.utils import flop_counter  # which loads triton, where there is one

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(flop_counter.sdpa_flop_count(query, key, value))

    def backward(out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(flop_counter.sdpa_backward_flop_count(out, query, key, value))

    formulas: dict[Any, Any] = {
        getattr(torch.ops.aten, _ON_THE_CPU): forward,
        getattr(torch.ops.aten, f"{_ON_THE_CPU}_backward"): backward,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()
