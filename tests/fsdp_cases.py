"""What each of two ranks does for `test_sharded.py`: train under `fully_shard` and compare."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import stochastic_depth as sd
from ddp_cases import NETWORKS, averaged, same
from layers import Dropped
from networks import WIDTH, settled, vectors
from processes import report
from sharding import (
    DRAWS,
    SETUPS,
    Setup,
    blocks_of,
    full,
    gradients_agree,
    pair,
    shard,
    trained_as_alone,
    weights_agree,
)


def forced(network: str, setup: Setup) -> None:
    maker, shape = NETWORKS[network]
    names = [b.name for b in sd.find_residual_blocks(settled(maker), torch.randn(shape))]
    patterns = [dict.fromkeys([*names[start::2], names[3]], False) for start in (0, 1)]
    trained_as_alone(network, setup, {}, patterns)


def two_forwards(network: str, setup: Setup) -> None:
    """Before their backwards, which come in either order; each forward has its own draw."""
    model, depth, alone, twin, shape = pair(network, setup, {})
    differ = 0
    for step, in_order in enumerate((True, False, True)):
        torch.manual_seed(100 * step + dist.get_rank())
        batches = [torch.randn(shape), torch.randn(shape)]
        for net, handle in ((model, depth), (alone, twin)):
            net.zero_grad()
            losses, gates = [], []
            for batch in batches:
                losses.append(net.train()(batch).square().mean())
                gates.append(handle.last_gates)
            for loss in losses if in_order else reversed(losses):
                loss.backward()
            differ += gates[0] != gates[1]
        nothing_is_left_gathered(model)
        gradients_agree(model, alone, replace(setup, microbatches=2), {})
    assert differ


@contextmanager
def traffic() -> Iterator[dict[str, int]]:
    """Counts the collectives of `fully_shard`."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    group: Any = _fsdp_param_group
    counts = {"gathered": 0, "reduced": 0}
    gather, reduce = group.foreach_all_gather, group.foreach_reduce

    def count_gather(*args: Any, **kwargs: Any) -> Any:
        counts["gathered"] += 1
        return gather(*args, **kwargs)

    def count_reduce(*args: Any, **kwargs: Any) -> Any:
        counts["reduced"] += 1
        return reduce(*args, **kwargs)

    with (
        patch.object(group, "foreach_all_gather", count_gather),
        patch.object(group, "foreach_reduce", count_reduce),
    ):
        yield counts


def skipped_blocks_are_not_sent(network: str, setup: Setup) -> None:
    """A kept block is gathered for the forward and for the backward, and reduced; no other is."""
    model, depth, _, _, shape = pair(network, setup, {})
    names = [block.name for block in depth.blocks]
    for dropped in ([], names[1:3], names[:4], [*names[:1], *names[4:]]):
        with depth.fixed(dict.fromkeys(dropped, False)), traffic() as counts:
            model.train()(torch.randn(shape)).square().mean().backward()
        kept = len(names) - len(dropped)
        gathered = (kept + 1) * (2 if setup.reshard else 1)  # the root has weights of its own
        assert counts == {"gathered": gathered, "reduced": kept + 1}, (dropped, counts)
        nothing_is_left_gathered(model)


def nothing_is_left_gathered(model: nn.Module) -> None:
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            state = unit._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            assert all(group._all_gather_result is None for group in groups)


def explicit_prefetching_is_refused() -> None:
    """A skipped block would lie there gathered, with weights that change meanwhile."""
    maker, shape = NETWORKS["pre-norm"]
    for way in ("forward", "backward"):
        model = settled(maker)
        sd.apply_stochastic_depth(model, 0.2, example_inputs=torch.randn(shape))
        shard(model)
        first, second, *_ = blocks_of(model)
        model.train()(torch.randn(shape))  # they may be set later
        getattr(first, f"set_modules_to_{way}_prefetch")([second])
        with pytest.raises(sd.SetupError, match=f"set_modules_to_{way}_prefetch.*implicit"):
            model.train()(torch.randn(shape))


def refused_under_shards() -> None:
    """What cannot be exact there, each with its remedy."""
    maker, shape = NETWORKS["pre-norm"]
    x = torch.randn(shape)
    model = settled(maker)
    shard(model)
    with pytest.raises(sd.SetupError, match="apply stochastic depth first, then fully_shard"):
        sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    for options, remedy in (
        ({"draw": sd.Draw(across_ranks="different")}, 'leave across_ranks="different" out'),
        ({"mode": "sample"}, "use a larger batch or a lower rate"),
    ):
        model = settled(maker)
        sd.apply_stochastic_depth(model, [0.9] * 6, example_inputs=x, **options)
        shard(model)
        with pytest.raises(sd.SetupError, match=remedy):
            model.train()(x)


def ranks_that_differ_raise(network: str) -> None:
    rank = dist.get_rank()
    maker, shape = NETWORKS[network]

    def gated(draw: sd.Draw) -> tuple[nn.Module, sd.StochasticDepth]:
        model = settled(maker)
        depth = sd.apply_stochastic_depth(
            model, 0.5, "uniform", example_inputs=torch.randn(shape), draw=draw
        )
        shard(model)
        return model.train(), depth

    model, depth = gated(sd.Draw(seed=rank))
    with pytest.raises(sd.SetupError, match=r"ranks do not draw the same.*seed is 0 on one, 1 on"):
        model(torch.randn(shape))
    model, depth = gated(sd.Draw())
    with (
        depth.fixed({depth.blocks[rank].name: False}),
        pytest.raises(sd.SetupError, match="what is fixed"),
    ):
        model(torch.randn(shape))
    model, depth = gated(sd.Draw())
    model(torch.randn(shape)).sum().backward()
    if rank:
        depth.step()
    with pytest.raises(sd.SetupError, match="the step is 0 on one, 1 on another"):
        model(torch.randn(shape))
    model, depth = gated(sd.Draw())
    model.train(mode=rank == 0)
    with pytest.raises(sd.SetupError, match="training is True on one, False on another"):
        model(torch.randn(shape))
    model, depth = gated(sd.Draw())
    with (
        depth.fixed({}) if rank else depth.disabled(),
        pytest.raises(sd.SetupError, match="what is disabled"),
    ):
        model(torch.randn(shape))


def mixed_precision(network: str) -> None:
    """As the plain network sharded in the same way, with the ends of dropped branches set to 0."""
    maker, shape = NETWORKS[network]
    ends = {"resnet": ("bn2",), "pre-norm": ("attention", "mlp")}[network]
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    policies = [
        (half, half),
        # The blocks compute in bfloat16, what is between them in float32.
        (replace(half, output_dtype=torch.float32), MixedPrecisionPolicy()),
        (replace(half, reduce_dtype=torch.float32), half),
        (replace(half, cast_forward_inputs=False), half),
    ]
    for (policy, root), dropped in itertools.product(policies, ([0, 3, 5], range(6))):
        plain, model = settled(maker), settled(maker)
        depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=torch.randn(shape))
        for net in (model, plain):
            # BatchNorm wants its buffers in the dtype of its weights here.
            for part in [net] if root.param_dtype else blocks_of(net):
                for buffer in part.buffers():
                    buffer.data = buffer.bfloat16() if buffer.is_floating_point() else buffer
            for block in blocks_of(net):
                fully_shard(block, mp_policy=policy)
            fully_shard(net, mp_policy=root)
        for number in dropped:
            for end in ends:
                blocks_of(plain)[number].get_submodule(end).register_forward_hook(_zeroed)
        torch.manual_seed(dist.get_rank())
        x = torch.randn(shape)
        with depth.fixed({depth.blocks[number].name: False for number in dropped}):
            ours = model.train()(x)
        theirs = plain.train()(x)
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs), (policy, dropped)
        ours.square().mean().backward()
        theirs.square().mean().backward()
        for name, parameter in model.named_parameters():
            mine, other = full(parameter.grad), full(plain.get_parameter(name).grad)
            if mine is None:
                assert other is None or not other.any()
            else:
                assert other is not None
                assert mine.dtype is other.dtype
                assert torch.equal(mine, other), (policy, dropped, name)


def _zeroed(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


def the_way_out(network: str, setup: Setup) -> None:
    """`remove()` gives the very classes back, `fold()` the scale; both in the sharded model."""
    maker, shape = NETWORKS[network]
    x = vectors(*shape, seed=3)
    plain = settled(maker)
    shard(plain)
    kinds = kinds_of(plain)
    model, depth, alone, twin, _ = pair(network, setup, {})
    model.eval()(x).sum().backward()
    assert depth.remove() is model
    assert kinds_of(model) == kinds
    assert torch.equal(model.eval()(x), settled(maker).eval()(x))

    model, depth, alone, twin, _ = pair(network, setup, {})
    model.eval()(x)  # leaves the root's weights gathered
    state, expected = depth.folded_state_dict(), twin.folded_state_dict()
    for name, value in state.items():
        assert torch.equal(full(value), expected[name]), name  # type: ignore[arg-type]
    before = model(x)
    assert torch.equal(before, alone.eval()(x))
    assert depth.fold() is model
    twin.fold()
    assert kinds_of(model) == kinds
    weights_agree(model, alone)
    assert torch.equal(model(x), alone(x))
    # The factor lies in the weights, not behind the sum: as far as float32 tells.
    assert torch.allclose(model(x), before, rtol=1e-4, atol=1e-5)


def kinds_of(model: nn.Module) -> list[Any]:
    """The classes; those of `fully_shard` by what they are made of."""
    kinds = [type(module) for module in model.modules()]
    return [(kind.__name__, kind.__bases__) if "FSDP" in kind.__name__ else kind for kind in kinds]


def units_inside_of_a_branch() -> None:
    """A dropped one is not gathered."""
    maker, shape = NETWORKS["post-norm"]
    model, alone = settled(maker), settled(maker)
    handles = [
        sd.apply_stochastic_depth(net, 0.5, "uniform", example_inputs=torch.randn(shape))
        for net in (model, alone)
    ]
    for layer in blocks_of(model):
        fully_shard(layer.get_submodule("mlp"))
    shard(model)
    for batch in (4, 3):  # 3: shapes of outputs that have to be looked up
        x = vectors(batch, *shape[1:], seed=dist.get_rank())
        for net in (model, alone):
            net.zero_grad()
            net.train()(x).square().mean().backward()
        assert not all(handles[0].last_gates.values())
        for name, value in averaged(alone).items():
            assert same(full(model.get_parameter(name).grad), value), name


def fsdp1_is_refused() -> None:
    maker, shape = NETWORKS["pre-norm"]
    x = torch.randn(shape)
    for use_orig_params in (False, True):
        model = settled(maker)
        sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
        wrapped = FullyShardedDataParallel(
            model, device_id=torch.get_default_device(), use_orig_params=use_orig_params
        )
        with pytest.raises(sd.SetupError, match=r"FSDP1.*fully_shard"):
            wrapped.train()(x)
        plain = FullyShardedDataParallel(
            settled(maker), device_id=torch.get_default_device(), use_orig_params=use_orig_params
        )
        for part in (plain, plain.module):
            with pytest.raises(sd.SetupError, match=r"FSDP1.*fully_shard"):
                sd.apply_stochastic_depth(part, 0.2, example_inputs=x)


def a_pipeline_is_refused() -> None:
    """One of a single stage, as the next ones would wait for it."""
    groups: list[Any] = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    maker, shape = NETWORKS["pre-norm"]
    x = torch.randn(shape)
    model = settled(maker)
    sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    stage = PipelineStage(
        model.train(), 0, 1, torch.get_default_device(), group=groups[dist.get_rank()]
    )
    with pytest.raises(sd.SetupError, match=r"a pipeline of torch\.distributed\.pipelining"):
        ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss).step(x)


def own_rates_come_to_the_same_as_a_number(wrap: Callable[[nn.Module], Any]) -> None:
    """Where a number works on a model "model" does, and where it is refused "model" is, too."""

    def outcome(drop_prob: float, drop_rate: Any) -> Any:
        model = nn.Sequential(*(Dropped(drop_prob) for _ in range(6)))
        try:
            depth = sd.apply_layer_drop(wrap(model), drop_rate, example_inputs=vectors(4, WIDTH))
        except sd.StochasticDepthError as error:
            return type(error), error.instead
        return [(block.name, block.drop_rate) for block in depth.blocks]

    assert outcome(0.1, "model") == outcome(0.0, 0.1)


def sharded(model: nn.Module) -> nn.Module:
    for unit in [*model.children(), model]:
        fully_shard(unit)
    return model


OWN_RATES_OF: dict[str, Callable[[nn.Module], Any]] = {
    "sharded": sharded,
    "meta": lambda model: model.to("meta"),
    "meta, sharded": lambda model: sharded(model.to("meta")),
    "wrapped": lambda model: nn.parallel.DistributedDataParallel(model),
}


def shared_cases() -> dict[str, Callable[[], None]]:
    """Training as one process does, in every way of sharding and of drawing."""
    found: dict[str, Callable[[], None]] = {}
    for network in NETWORKS:
        usual = network in ("resnet", "pre-norm")
        for draws in DRAWS if usual else ("same", "rows"):
            for setup in SETUPS if usual and draws == "same" else ("plain",):
                found[f"{network}, {draws}, {setup}"] = partial(
                    trained_as_alone, network, SETUPS[setup], DRAWS[draws]
                )
    for network in ("resnet", "pre-norm"):
        for setup in ("plain", "checkpoint"):
            found[f"{network}, two forwards, {setup}"] = partial(
                two_forwards, network, SETUPS[setup]
            )
        tried = Setup(root_alone=True, tried_before=True)
        found[f"{network}, rows, tried before"] = partial(
            trained_as_alone, network, tried, DRAWS["rows"]
        )
        found[f"{network}, forced"] = partial(forced, network, Setup())
        for setup in ("one unit", "checkpoint"):
            found[f"{network}, rows, {setup}"] = partial(
                trained_as_alone, network, SETUPS[setup], DRAWS["rows"]
            )
    return found


def cases(ranks: int) -> dict[str, Callable[[], None]]:
    """By name; a single rank sends nothing, and has no other to differ from."""
    found = shared_cases()
    for network in ("resnet", "pre-norm"):
        found[f"{network}, mixed precision"] = partial(mixed_precision, network)
        found[f"{network}, the way out"] = partial(the_way_out, network, Setup())
    for name in ("plain", "kept gathered") if ranks > 1 else ():
        found[f"traffic, {name}"] = partial(skipped_blocks_are_not_sent, "pre-norm", SETUPS[name])
    if ranks > 1:
        found["ranks that differ"] = partial(ranks_that_differ_raise, "pre-norm")
    for name, wrap in OWN_RATES_OF.items():
        found[f"own rates, {name}"] = partial(own_rates_come_to_the_same_as_a_number, wrap)
    found["refused"] = refused_under_shards
    found["explicit prefetching"] = explicit_prefetching_is_refused
    found["FSDP1"] = fsdp1_is_refused
    found["pipeline"] = a_pipeline_is_refused
    found["units inside of a branch"] = units_inside_of_a_branch
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    # What changes such an output in place loses its gradient.
    warnings.filterwarnings("error", r".*CheckpointWrapper\) returned a view tensor")
    report(lambda: cases(dist.get_world_size()))
