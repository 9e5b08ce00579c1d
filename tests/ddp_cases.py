"""What each rank does for `test_data_parallel.py`: train under DistributedDataParallel and compare.

The reference is the gated network itself, copied, on one process: its gradients are averaged over
the ranks by hand, and a parameter has none where no rank has one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import networks
import stochastic_depth as sd
from networks import ResNet, settled
from processes import report

NETWORKS = {
    name: (build, tuple(example().shape))
    for name, (build, example) in networks.NETWORKS.items()
    if name not in ("shared", "nested")
}
DRAWS = {
    "same": sd.Draw(seed=3),
    "different": sd.Draw(seed=3, across_ranks="different"),
    "balanced": sd.Draw(seed=3, sampling="balanced", across_ranks="different"),
    "one a step": sd.Draw(seed=3, across_ranks="different", redraw="step"),
}
SAMPLE_DRAWS = {
    "rows": sd.Draw(seed=3),
    "rows alike": sd.Draw(seed=3, across_ranks="same"),
}
STEPS = 3


@dataclass(frozen=True)
class Setup:
    """How the network is wrapped and trained."""

    microbatches: int = 1
    find_unused: bool = False
    bucket_view: bool = False
    wrapped_first: bool = False  # before stochastic depth is applied, to the wrapper
    reentrant: bool | None = None  # of a checkpoint around each block; None: no checkpoint


SETUPS = {
    "plain": Setup(),
    "wrapped first": Setup(wrapped_first=True),
    "accumulated": Setup(microbatches=3),
    "bucket view": Setup(bucket_view=True),
    "bucket view, accumulated": Setup(bucket_view=True, microbatches=2),
    "find unused": Setup(find_unused=True),
    "find unused, accumulated": Setup(find_unused=True, microbatches=2),
    "checkpoint": Setup(reentrant=False),
    "checkpoint, accumulated": Setup(reentrant=False, microbatches=2),
    "reentrant checkpoint": Setup(reentrant=True),
}


def containers(model: Any) -> Iterable[Any]:
    return model.stages if isinstance(model, ResNet) else [model.layers]


class Checkpointed(nn.Module):
    """Runs a block under activation checkpointing."""

    def __init__(self, block: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def build(network: str, setup: Setup) -> tuple[nn.Module, tuple[int, ...]]:
    maker, shape = NETWORKS[network]
    model = settled(maker)
    if setup.reentrant is not None:
        for stage in containers(model):
            for number, block in enumerate(stage):
                stage[number] = Checkpointed(block, reentrant=setup.reentrant)
    return model, shape


def wrap(model: nn.Module, setup: Setup) -> DistributedDataParallel:
    return DistributedDataParallel(
        model,
        find_unused_parameters=setup.find_unused,
        gradient_as_bucket_view=setup.bucket_view,
        bucket_cap_mb=0.005,  # several buckets
    )


def averaged(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients averaged over the ranks by hand; None where no rank has one."""
    result: dict[str, Tensor | None] = {}
    ranks = dist.get_world_size()
    for name, parameter in model.named_parameters():
        have = torch.tensor([float(parameter.grad is not None)])
        dist.all_reduce(have)
        if not have:
            result[name] = None
            continue
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        total = gradient.clone() / ranks
        dist.all_reduce(total)
        result[name] = total
    return result


def same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    if dist.get_world_size() == 2:  # a sum of two numbers has one order
        return torch.equal(ours, theirs)
    return torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def train(
    network: str,
    setup: Setup,
    draw: sd.Draw,
    *,
    mode: Literal["batch", "sample"] = "batch",
    patterns: list[dict[str, bool]] | None = None,
) -> None:
    """Some steps; after each the gradients are as by hand, and weights the same on all ranks."""
    model, shape = build(network, setup)
    wrapped = wrap(model, setup) if setup.wrapped_first else None
    depth = sd.apply_stochastic_depth(
        model if wrapped is None else wrapped,
        [0.3, 0.5, 0.6, 0.7, 0.8, 0.9],
        example_inputs=torch.randn(shape),
        mode=mode,
        draw=draw,
    )
    alone = copy.deepcopy(model)
    wrapped = wrapped or wrap(model, setup)
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        for net in (model, alone)
    ]
    following = depth.follow(optimizers[0])
    untouched = 0
    for step in range(STEPS):
        torch.manual_seed(100 * step + dist.get_rank())
        batches = [torch.randn(shape) for _ in range(setup.microbatches)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        for number, batch in enumerate(batches):
            pattern = patterns[(step + number) % len(patterns)] if patterns else None
            quiet = wrapped.no_sync() if number < len(batches) - 1 else nullcontext()
            with depth.fixed(pattern) if pattern else nullcontext(), quiet:
                run = wrapped(batch)
                (run.square().mean() / len(batches)).backward()
            twin = sd.get_stochastic_depth(alone)
            with twin.fixed(pattern) if pattern else nullcontext():
                (alone(batch).square().mean() / len(batches)).backward()
        expected = averaged(alone)
        for name, parameter in model.named_parameters():
            ours, theirs = parameter.grad, expected[name]
            assert same(ours, theirs), f"step {step}, {name}: {ours} instead of {theirs}"
            untouched += ours is None
        for name, parameter in alone.named_parameters():
            parameter.grad = None if expected[name] is None else model.get_parameter(name).grad
        for optimizer in optimizers:
            optimizer.step()
        for (name, a), (_, b) in zip(
            model.named_parameters(), alone.named_parameters(), strict=True
        ):
            assert torch.equal(a, b), f"step {step}: weights differ at {name}"
    following.remove()
    if mode == "batch" and draw.across_ranks != "different":
        assert untouched, "no block was skipped by all ranks: the case shows nothing"


def names_of(network: str) -> list[str]:
    maker, shape = NETWORKS[network]
    return [block.name for block in sd.find_residual_blocks(settled(maker), torch.randn(shape))]


def other_patterns(network: str) -> list[dict[str, bool]]:
    """Each rank closes other blocks, and one block is closed on all."""
    names, rank = names_of(network), dist.get_rank()
    return [
        {name: (number + step) % 3 != rank % 3 and number != 4 for number, name in enumerate(names)}
        for step in range(3)
    ]


def forced_alike(network: str) -> None:
    names = names_of(network)
    patterns = [dict.fromkeys([*names[start::2], names[3]], False) for start in (0, 1)]
    train(network, Setup(), DRAWS["same"], patterns=patterns)
    train(network, Setup(microbatches=2), DRAWS["same"], patterns=patterns)


def forced_otherwise(network: str) -> None:
    train(network, Setup(), DRAWS["same"], patterns=other_patterns(network))
    train(network, Setup(microbatches=2), DRAWS["same"], patterns=other_patterns(network))


@dataclass
class Output:
    """As transformers' models return."""

    logits: Tensor
    states: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.besides = "no field"


@dataclass(frozen=True, slots=True)
class Slots:
    """A dataclass without a dictionary."""

    logits: Tensor


class Result:
    """An object that torch does not look into."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.itself = logits, self


class Named(dict[str, Tensor]):
    """A dictionary that torch does not look into."""


class Returning(nn.Module):
    """Returns what its body does in another form."""

    def __init__(self, body: nn.Module, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.form = body, form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.body(x))


RETURNED: list[tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = [
    (lambda out: (out.detach(), [out], 3), lambda result: result[1][0]),
    (lambda out: {"unused": 2 * out, "used": out}, lambda result: result["used"]),
    (lambda out: Output(2 * out, {"last": out}), lambda result: result.states["last"]),
    (lambda out: Output(out, {}), lambda result: {"no field": result.logits}[result.besides]),
    (lambda out: Slots(out), lambda result: result.logits),
    (lambda out: [Result(out)], lambda result: result[0].itself.logits),
    (lambda out: Named(out=out), lambda result: result["out"]),
    (lambda out: (out, out), lambda result: result[0].mul_(2) + result[1]),
]


def whatever_the_forward_returns() -> None:
    """The loss may take a part of it, and change that in place."""
    for form, taken in RETURNED:
        body, shape = build("resnet", Setup())
        model = Returning(body, form)
        sd.apply_stochastic_depth(body, 0.5, "uniform", example_inputs=torch.randn(shape))
        alone = copy.deepcopy(model)
        wrapped = wrap(model, Setup())
        for step in range(STEPS):
            torch.manual_seed(100 * step + dist.get_rank())
            x = torch.randn(shape)
            for net in (wrapped, alone):
                net.zero_grad()
                taken(net.train()(x)).mul_(2).square().mean().backward()
            expected = averaged(alone)
            assert any(gradient is None for gradient in expected.values())
            for name, parameter in model.named_parameters():
                assert same(parameter.grad, expected[name]), f"step {step}, {name}"


def a_value_of_the_forward_before() -> None:
    """Whose graph is gone, and which no loss takes."""

    class Kept(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            before, self.last = self.last, self.body(x)
            return self.last, before

    body, shape = build("resnet", Setup())
    sd.apply_stochastic_depth(body, 0.5, "uniform", example_inputs=torch.randn(shape))
    wrapped = wrap(Kept(body), Setup())
    for _ in range(STEPS):
        wrapped.train()(torch.randn(shape))[0].mean().backward()


def parts_of_one_value() -> None:
    """A change in place of one that would be lost on the other is refused."""
    body, shape = build("resnet", Setup())
    model = Returning(body, lambda out: (out, out[:1]))
    sd.apply_stochastic_depth(body, 0.9, "uniform", example_inputs=torch.randn(shape))
    whole, part = wrap(model, Setup()).train()(torch.randn(shape))
    (whole.mean() + part.mean()).backward()
    with pytest.raises(RuntimeError, match="modified inplace"):
        whole.mul_(2)


def parameters_that_were_replaced() -> None:
    """By `load_state_dict(assign=True)`, say; the wrapper is made anew then."""
    model, shape = build("resnet", Setup())
    sd.apply_stochastic_depth(model, 0.9, "uniform", example_inputs=torch.randn(shape))
    for _ in range(2):
        wrapped = wrap(model, Setup())
        for _ in range(STEPS):
            wrapped.train()(torch.randn(shape)).mean().backward()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)


def several_forwards_before_one_backward() -> None:
    """Forwards in which the ranks draw alike, and others; a rank may leave one out of its loss."""
    model, shape = build("resnet", Setup())
    depth = sd.apply_stochastic_depth(model, 0.6, "uniform", example_inputs=torch.randn(shape))
    patterns, alone = other_patterns("resnet"), copy.deepcopy(model)
    # Each forward would write to the buffers, which torch 2.6 does not allow before the backward.
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    for step in range(STEPS):
        torch.manual_seed(100 * step + dist.get_rank())
        x = torch.randn(shape)
        for net, handle in ((wrapped, depth), (alone, sd.get_stochastic_depth(alone))):
            net.train().zero_grad()
            first, usual = net(x), net(x)
            with handle.fixed(patterns[step]):
                last = net(x) + usual
            (last if step and dist.get_rank() else first + last).square().mean().backward()
        expected = averaged(alone)
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (expected[name] is None), f"step {step}, {name}"
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, expected[name])


def refuses_a_static_graph() -> None:
    model, shape = build("resnet", Setup())
    sd.apply_stochastic_depth(model, 0.2, example_inputs=torch.randn(shape))
    wrapped = DistributedDataParallel(model, static_graph=True)
    with pytest.raises(sd.SetupError, match="static_graph=True"):
        wrapped(torch.randn(shape))


def ranks_draw(draw: sd.Draw) -> list[dict[str, bool]]:
    """The gates of each rank in one forward."""
    model, shape = build("resnet", Setup())
    depth = sd.apply_stochastic_depth(
        model, 0.5, "uniform", example_inputs=torch.randn(shape), draw=draw
    )
    model.train()(torch.randn(shape))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, depth.last_gates)
    return gathered


def same_draws_need_no_talk() -> None:
    first, *others = ranks_draw(sd.Draw(seed=1))
    assert all(gates == first for gates in others)


def different_draws_differ() -> None:
    gathered = ranks_draw(sd.Draw(seed=1, across_ranks="different"))
    assert any(gates != gathered[0] for gates in gathered[1:])


def balanced_draws_share_the_load() -> None:
    draw = sd.Draw(seed=1, sampling="balanced", across_ranks="different")
    gathered = ranks_draw(draw)
    run = [sum(gates.values()) for gates in gathered]
    assert len(set(run)) == 1
    # At a rate of one half each block is dropped on half of the ranks.
    for name in gathered[0]:
        assert sum(gates[name] for gates in gathered) == len(gathered) // 2


def a_group_of_its_own() -> None:
    """Ranks of other data-parallel groups (the tensor-parallel twins of this one) draw alike."""
    if dist.get_world_size() < 4:
        return
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[dist.get_rank() // 2]
    gathered = ranks_draw(sd.Draw(seed=1, across_ranks="different", process_group=mine))
    assert (gathered[0], gathered[1]) == (gathered[2], gathered[3])
    assert gathered[0] != gathered[1]


def cases(ranks: int) -> dict[str, Callable[[], None]]:
    """By name: every set-up with the usual draws, and every kind of draw with some set-ups."""
    few = ("plain", "find unused, accumulated")
    some = (*few, "accumulated", "checkpoint", "reentrant checkpoint")
    found: dict[str, Callable[[], None]] = {}
    for name, draw in {**DRAWS, **SAMPLE_DRAWS}.items():
        mode: Literal["batch", "sample"] = "sample" if name in SAMPLE_DRAWS else "batch"
        usual = ranks <= 2 and name in ("same", "different", "rows")
        for network in NETWORKS:
            setups: Iterable[str] = SETUPS if network in ("resnet", "pre-norm") else some
            for setup in setups if usual else few:
                found[f"{network}, {name}, {setup}"] = partial(
                    train, network, SETUPS[setup], draw, mode=mode
                )
    if ranks > 2:
        found = {name: case for name, case in found.items() if name.startswith("resnet")}
    for network in NETWORKS:
        found[f"{network}, forced alike"] = partial(forced_alike, network)
        found[f"{network}, forced otherwise"] = partial(forced_otherwise, network)
    singles = (
        refuses_a_static_graph,
        same_draws_need_no_talk,
        whatever_the_forward_returns,
        a_value_of_the_forward_before,
        parts_of_one_value,
        parameters_that_were_replaced,
        several_forwards_before_one_backward,
        different_draws_differ,
        balanced_draws_share_the_load,
        a_group_of_its_own,
    )
    chosen = singles if ranks > 1 else singles[:6]  # one rank differs from no other
    return {**found, **{case.__name__.replace("_", " "): case for case in chosen}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(lambda: cases(dist.get_world_size()))
