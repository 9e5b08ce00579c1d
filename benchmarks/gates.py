"""What a gate costs: a network bound by Python beside a twin that leaves the same blocks out.

    export PYTHONPATH=examples                        # from a checkout
    python benchmarks/gates.py                        # all cases, some ten minutes on one core
    python benchmarks/gates.py eval ddp               # some of them; nothing is written
    python benchmarks/gates.py eval --repetitions 20  # fewer, to try it

ResNet-110 on two images of 8 pixels, on one thread, takes as long as Python and the launches of
its operations do, so that a gate's time shows. Its twin leaves out by hand, before the clock
starts, the blocks that the gated network drops in this step, and multiplies where the method
itself must: with scale "train" a branch by 1 / (1 - p) in training, with scale "eval" by 1 - p in
inference. The draws are real. The networks take turns step by step in one process, in several
rounds with new networks: where these lie in memory makes a difference as large as a gate. A figure
is the median of paired differences or ratios, with a 95% interval from a bootstrap over the steps.

The clock is that of the thread, which stands still while another program has the core. The unit is
a call of `nn.Linear(4, 4)` on one row, timed in the same loop, which makes figures of different
machines comparable.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from statistics import median
from time import thread_time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gates_networks as networks
import stochastic_depth as sd
from gates_contests import (
    PER_GATE,
    Line,
    Pair,
    Scale,
    Wrap,
    contest,
    contests,
    forward,
    forward_and_backward,
    inference,
    open_and_closed,
)
from imagelib.cifar_resnet import CifarResNet
from interleaved import Ratio, take_turns, typical, write

Lines = dict[str, Line]
TARGETS: dict[Scale, float] = {"eval": 1.2, "none": 1.2, "train": 2.0}
OPTIMIZER_STEPS = 100  # in one turn


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def skipped_whole(steps: int) -> Lines:
    """A drawn gate of ResNet-110, on average and at its two states."""
    lines = {}
    for scale, target in TARGETS.items():
        found = contests(partial(_pairs, scale), forward, steps)
        is_open, closed = open_and_closed(found[" few"], found[" many"])
        lines[f'gate, scale "{scale}"'] = found[" half"].cost(target)
        lines[f'gate, scale "{scale}", open'] = Line(is_open, PER_GATE)
        lines[f'gate, scale "{scale}", closed'] = Line(closed, PER_GATE)
    return lines


def _pairs(scale: Scale) -> dict[str, Pair]:
    """Pairs of which about half, few and many blocks are dropped."""
    plain, x = CifarResNet(110), images()
    pairs = {
        name: Pair(plain, x, rate=rate, distribution=distribution, scale=scale)
        for name, rate, distribution in (
            (" half", 0.5, "linear"),
            (" few", 0.2, "uniform"),
            (" many", 0.8, "uniform"),
        )
    }
    if scale == "train":
        for pair in pairs.values():
            networks.scale_by_hand(pair.twin, {name: 1 / (1 - p) for name, p in pair.rates.items()})
    return pairs


def _resnets() -> Pair:
    return Pair(CifarResNet(110), images())


def whole_network(steps: int) -> Lines:
    """ResNet-110 as a whole."""
    once = contest(_resnets, forward, steps, beside_plain=True)
    twice = contest(_resnets, forward_and_backward, steps, beside_plain=True)
    return {
        "forward": once.ratio("twin", 1.04),
        "forward, to plain": once.ratio("plain", 0.77),
        "forward and backward": twice.ratio("twin", 1.02),
        "forward and backward, to plain": twice.ratio("plain"),
    }


def in_inference(steps: int) -> Lines:
    """ResNet-110 in eval mode, where each branch is multiplied."""

    def make() -> Pair:
        pair = _resnets()
        networks.scale_by_hand(pair.twin, {name: 1 - p for name, p in pair.rates.items()})
        pair.gated.eval()
        pair.twin.eval()
        return pair

    return {'inference, scale "eval"': contest(make, inference, steps).cost(3)}


def at_branches(steps: int) -> Lines:
    """ResNet-110 with a norm behind each sum."""

    def make() -> Pair:
        return Pair(networks.normed_resnet(), images(), networks.normed_skip_path)

    return _forward_and_backward("gated at its branches", make, steps)


def with_keywords(steps: int) -> Lines:
    """A decoder whose layers are called with keywords, and return tuples."""

    def make() -> Pair:
        return Pair(networks.Decoder(), torch.randn(2, 8, 16), lambda layer: None)

    return _forward_and_backward("called with keywords", make, steps)


def _forward_and_backward(name: str, make: Callable[[], Pair], steps: int) -> Lines:
    return {
        name: contest(make, forward, steps).cost(3),
        f"{name}, with backward": contest(make, forward_and_backward, steps).cost(3),
    }


def under_ddp(steps: int) -> Lines:
    """DistributedDataParallel on one rank, which looks for the twin's unused parameters.

    The two don't share their parameters: each wrapper puts its hooks on them.
    """
    wrap: Wrap = {
        "gated": DistributedDataParallel,
        "twin": partial(DistributedDataParallel, find_unused_parameters=True),
    }

    def make() -> Pair:
        return Pair(CifarResNet(110), images(), share=deepcopy)

    with one_rank():
        found = contest(make, forward_and_backward, steps, wrap=wrap)
    return {"under DistributedDataParallel, with backward": found.cost(3)}


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def under_checkpoints(steps: int) -> Lines:
    """Each block under a non-reentrant checkpoint; the twin leaves it out inside of that."""

    def make() -> Pair:
        return Pair(networks.checkpointed_resnet(), images(), networks.inside_of_a_checkpoint)

    found = contest(make, forward_and_backward, steps)
    return {"under checkpoints, with backward": found.cost(3)}


def follow(steps: int) -> Lines:
    """What following adds to an optimizer's step."""
    model = CifarResNet(110)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=images())
    optimizers = {name: _of_one_parameter(model) for name in ("followed", "alone")}
    depth.follow(optimizers["followed"])
    seconds = take_turns(
        {name: partial(_steps, optimizer) for name, optimizer in optimizers.items()},
        steps,
        clock=thread_time,
    )
    more = typical((seconds["followed"] - seconds["alone"]) / OPTIMIZER_STEPS * 1e6)
    return {"follow(optimizer)": Line(more, "microseconds per step", 10)}


def _of_one_parameter(model: CifarResNet) -> torch.optim.Optimizer:
    """An optimizer whose own work does not hide what is added to it."""
    model.fc.bias.grad = torch.zeros_like(model.fc.bias)
    return torch.optim.SGD([model.fc.bias], lr=0.1)


def _steps(optimizer: torch.optim.Optimizer, turn: int) -> None:
    for _ in range(OPTIMIZER_STEPS):
        optimizer.step()


def apply(steps: int) -> Lines:
    """Long recurrences in Python, thousands of operations to watch: once, whatever `steps` is."""
    return {
        "apply, recurrence of 800 steps": _applied(networks.recurrence(), torch.randn(2, 800, 3)),
        "apply, scan of 768 tokens": _applied(networks.scans(), torch.randn(1, 768, 3)),
    }


def _applied(model: nn.Module, x: Tensor) -> Line:
    one = median(_seconds(lambda: model(x)) for _ in range(3))
    taken = _seconds(lambda: sd.apply_stochastic_depth(model, 0.2, example_inputs=x))
    return Line(Ratio(taken, taken, taken), "seconds", max(3.0, 10 * one))


def _seconds(run: Callable[[], object]) -> float:
    start = thread_time()
    run()
    return thread_time() - start


CASES: dict[str, Callable[[int], Lines]] = {
    "skipped-whole": skipped_whole,
    "network": whole_network,
    "eval": in_inference,
    "branches": at_branches,
    "keywords": with_keywords,
    "ddp": under_ddp,
    "checkpoint": under_checkpoints,
    "follow": follow,
    "apply": apply,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="all, where none is named")
    parser.add_argument("--repetitions", type=int, default=300)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines: Lines = {}
    for name in options.cases or CASES:
        torch.manual_seed(0)
        found = CASES[name](options.repetitions)
        for label, line in found.items():
            print(f"{label:<46} {line}", flush=True)
        lines |= found
    if not options.cases:
        print(write("gates", {"repetitions": options.repetitions, "lines": lines}))


if __name__ == "__main__":
    main()
