"""Promise: the model stays the user's model, and a copy of it is a model with gates of its own."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import stochastic_depth as sd
from networks import (
    NETWORKS,
    BasicBlock,
    ResNet,
    Transformer,
    Wrapped,
    assert_same,
    batch,
    gated,
    make,
    residuals,
    settled,
    sgd,
    train,
    vectors,
)

pytestmark = pytest.mark.oldest


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "AveragedModel": AveragedModel,
    "a copy of a copy": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_way = pytest.mark.parametrize("way", COPIES)


def run(model: nn.Module, depth: sd.StochasticDepth, x: Tensor, count: int) -> list[Any]:
    """What some training forwards drew, and what came out of them."""
    model.train()
    found = []
    for number in range(count):
        output = model(batch(x, number))
        found.append((depth.last_gates, output.detach().cpu().numpy().tobytes()))
    return found


# Copies.


@every_way
@every_network
def test_a_copy_opens_the_same_gates_as_the_original_at_the_same_call(name: str, way: str) -> None:
    model, x, depth = gated(name)
    run(model, depth, x, 3)
    depth.step()
    run(model, depth, x, 2)
    twin = COPIES[way](model)
    own = sd.get_stochastic_depth(twin)
    assert own is not depth
    expected = run(model, depth, x, 8)
    assert run(twin, own, x, 8) == expected
    assert len({tuple(gates.values()) for gates, _ in expected}) > 1 or name == "shared"
    own.step()
    depth.step()
    assert run(twin, own, x, 4) == run(model, depth, x, 4)
    assert torch.equal(twin.eval()(x), model.eval()(x))


@every_way
def test_a_copy_advances_nothing_of_the_original(way: str) -> None:
    (model, x, depth), (other, _, other_depth) = gated("resnet"), gated("resnet")
    twin = COPIES[way](model)
    own = sd.get_stochastic_depth(twin)
    run(twin, own, x, 5)
    own.step()
    with own.fixed({"stages.0.0": False}), own.disabled():
        run(twin, own, x, 2)
    assert depth.last_gates == {}
    assert run(model, depth, x, 5) == run(other, other_depth, x, 5)
    assert depth.state_dict() == other_depth.state_dict()


@every_way
def test_a_copy_has_weights_and_a_handle_of_its_own(way: str) -> None:
    model, _, depth = gated("resnet")
    twin = COPIES[way](model)
    own = sd.get_stochastic_depth(twin)
    assert sd.get_stochastic_depth(model) is depth
    assert sd.get_stochastic_depth(twin) is own
    assert own.state_dict() == depth.state_dict()
    assert str(own) == str(depth)
    for mine, other in zip(twin.parameters(), model.parameters(), strict=True):
        assert mine is not other
        assert mine.data_ptr() != other.data_ptr()
    plain, _ = make("resnet")
    own.remove()
    assert len(depth.blocks) == 6
    inner = twin.get_submodule("module" if way == "AveragedModel" else "")
    assert [type(m) for m in inner.modules()] == [type(m) for m in plain.modules()]
    with pytest.raises(sd.SelectionError):
        sd.get_stochastic_depth(twin)
    assert sd.get_stochastic_depth(model) is depth


@every_way
@pytest.mark.parametrize("context", ["fixed", "disabled"])
def test_a_copy_does_not_inherit_what_is_forced_for_a_while(way: str, context: str) -> None:
    model, x, depth = gated("resnet")
    gates = {block.name: False for block in depth.blocks}
    expected = model.eval()(x)
    with depth.fixed(gates) if context == "fixed" else depth.disabled():
        twin = COPIES[way](model)
        assert torch.equal(twin.eval()(x), expected)
        own = sd.get_stochastic_depth(twin)
        run(twin, own, x, 1)
        assert own.last_gates


@every_way
def test_a_copy_of_a_followed_model_can_follow_an_optimizer_of_its_own(way: str) -> None:
    model, x, depth = gated("pre-norm")
    optimizer = sgd(model)
    depth.follow(optimizer)
    train(model, optimizer, x, 2)
    twin = COPIES[way](model)
    own = sd.get_stochastic_depth(twin)
    own_optimizer = sgd(twin)
    own.follow(own_optimizer)
    train(twin, own_optimizer, x, 3)
    assert (depth.state_dict()["step"], own.state_dict()["step"]) == (2, 5)


@every_network
def test_copies_train_on_alike(name: str) -> None:
    model, x, depth = gated(name)
    optimizer = sgd(model)
    depth.follow(optimizer)
    train(model, optimizer, x, 3)
    twin, own_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    sd.get_stochastic_depth(twin).follow(own_optimizer)
    train(model, optimizer, x, range(3, 6))
    train(twin, own_optimizer, x, range(3, 6))
    assert_same(model, twin)


PROGRAM = """
import sys, torch
import stochastic_depth as sd
from networks import batch
model = torch.load(sys.argv[1], weights_only=False)
depth = sd.get_stochastic_depth(model)
x = torch.load(sys.argv[2], weights_only=True)
for number in range(6):
    output = model.train()(batch(x, number))
torch.save({"output": output, "gates": depth.last_gates}, sys.argv[3])
"""


def test_a_whole_model_is_loaded_in_a_new_process(tmp_path: Path) -> None:
    model, x, depth = gated("resnet")
    run(model, depth, x, 3)
    torch.save(model, tmp_path / "model")
    torch.save(x, tmp_path / "x")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, "-c", PROGRAM, *(str(tmp_path / n) for n in ("model", "x", "out"))],
        check=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    theirs = torch.load(tmp_path / "out", weights_only=True)
    for number in range(6):
        output = model(batch(x, number))
    assert theirs["gates"] == depth.last_gates
    assert torch.equal(theirs["output"], output)


def test_copying_a_block_does_not_copy_the_model() -> None:
    model, x, depth = gated("resnet")
    block = model.stages[0][1]
    alone = copy.deepcopy(block)
    assert isinstance(alone, BasicBlock)
    size = len(pickle.dumps(block))
    whole = len(pickle.dumps(model))
    weights = sum(t.numel() * t.element_size() for t in block.state_dict().values())
    # Beside its own weights a block brings what is known about all blocks: numbers and names.
    assert size < weights + 16_000 < whole
    y = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(alone.eval()(y), block.eval()(y))
        block.conv1.weight.zero_()
    assert alone.conv1.weight.any()
    assert sd.get_stochastic_depth(model) is depth
    assert model.train()(x).shape == (4, 4)


def test_a_handle_does_not_keep_its_model_alive_through_a_cycle_of_its_own() -> None:
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        model, _, depth = gated("resnet")
        gone = weakref.ref(model)
        del model, depth
        assert gone() is None
    finally:
        gc.enable()


# Weights.


@every_network
def test_weights_loaded_after_or_before_apply(name: str) -> None:
    trained, x, depth = gated(name)
    optimizer = sgd(trained)
    depth.follow(optimizer)
    train(trained, optimizer, x, 3)
    weights = trained.state_dict()

    before, _ = make(name)
    before.load_state_dict(weights)
    sd.apply_stochastic_depth(before, 0.2, "uniform", example_inputs=x)
    after, _, _ = gated(name)
    after.load_state_dict(weights)
    plain, _ = make(name)
    plain.load_state_dict(weights)  # strict: the same keys
    assert torch.equal(before.eval()(x), trained.eval()(x))
    assert torch.equal(after.eval()(x), trained(x))


def test_weights_assigned_and_moved_after_apply() -> None:
    model, x, depth = gated("resnet")
    expected = model.eval()(x)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(weights, assign=True)
    assert torch.equal(model(x), expected)
    double = model.double()(x.double())
    # The rounding of single precision.
    torch.testing.assert_close(double.float(), expected, rtol=1e-5, atol=1e-5)
    with depth.fixed(dict.fromkeys([b.name for b in depth.blocks], False)):
        assert model.train()(x.double()).dtype == torch.float64


# The model stays the user's.


def test_removing_twice_does_nothing_and_the_removed_model_is_the_plain_one() -> None:
    model, x, depth = gated("resnet")
    plain, _ = make("resnet")
    depth.remove()
    depth.remove()
    for training in (True, False):
        assert torch.equal(model.train(training)(x), plain.train(training)(x))
    with pytest.raises(sd.SelectionError, match="has no stochastic depth"):
        sd.get_stochastic_depth(model)
    again = sd.apply_stochastic_depth(model, 0.1, example_inputs=x)
    assert sd.get_stochastic_depth(model) is again


def test_hooks_stay_and_fire_where_their_module_runs() -> None:
    model, x = make("resnet")
    fired: list[str] = []
    for name in ("stages.0.0", "stages.0.0.bn2", "stages.1.0"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, a, o, name=name: fired.append(name))
        module.register_forward_pre_hook(lambda m, a, name=name: fired.append(f"pre {name}"))
        module.register_full_backward_hook(lambda m, i, o, name=name: fired.append(f"back {name}"))
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)

    def passes(m: nn.Module) -> list[str]:
        fired.clear()
        m.train()(x).sum().backward()
        return list(fired)

    with depth.fixed({}):
        assert passes(model) == passes(plain)
    with depth.fixed({"stages.0.0": False}):
        assert all("stages.0.0" not in name for name in passes(model))
    depth.remove()
    assert passes(model) == passes(plain)


def test_attributes_and_methods_are_reached_as_ever() -> None:
    class Talking(BasicBlock):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.said = 0

        @property
        def words(self) -> int:
            return self.said

        def say(self) -> str:
            self.said += 1
            return f"{super().__repr__()[:5]} {self.words}"

    model: Any = nn.Sequential(*(Talking() for _ in range(6)))
    sd.apply_stochastic_depth(model, 0.2, example_inputs=torch.randn(2, 8, 6, 6))
    assert type(model[3]).__qualname__ == Talking.__qualname__ != Talking.__name__
    assert model[3].say() == "Talki 1"
    assert (model[3].say(), model[3].words, model[0].words) == ("Talki 2", 2, 0)
    model[3].extra = 5
    assert copy.deepcopy(model)[3].extra == 5


# What is changed after apply is noticed.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", ["eval", "train", "none"])
def test_convert_sync_batchnorm_after_apply_raises_at_the_next_forward(
    training: bool, scale: str
) -> None:
    model, x, _ = gated("resnet", drop_rate=0.05, scale=scale)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(sd.ChangedModelError) as caught:
        converted.train(training)(x)
    for part in (
        "does not run as it did when it was watched",
        "convert_sync_batchnorm",
        "remove()",
    ):
        assert part in str(caught.value)


def test_convert_sync_batchnorm_before_apply_works() -> None:
    model, x = make("resnet")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    assert len(depth.blocks) == 6
    assert model.eval()(x).shape == (4, 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "block", "child"),
    [
        ("resnet", "stages.0.1", "bn2"),
        ("resnet", "stages.1.0", "conv1"),
        ("resnet", "stages.1.0", "bn2"),
        ("pre-norm", "layers.3", "mlp"),
        ("pre-norm", "layers.3", "attention"),
        ("post-norm", "layers.5", "mlp"),
        ("nested", "2", "last"),
    ],
)
def test_a_replaced_child_raises(name: str, block: str, child: str, training: bool) -> None:
    model, x, depth = gated(name)
    parent = model.get_submodule(block)
    new = copy.deepcopy(dict(make(name)[0].named_modules())[f"{block}.{child}"])
    setattr(parent, child, new)
    model.train(training)
    context = depth.fixed({}) if training else depth.disabled()
    with context, pytest.raises(sd.ChangedModelError, match=f'"{block}" does not run as it did'):
        model(x)


def test_a_replaced_child_is_noticed_whenever_its_block_runs() -> None:
    (model, x, _), (twin, _, told) = gated("resnet"), gated("resnet")
    model.stages[0][1].bn2 = nn.BatchNorm2d(8)
    ran = []
    for _ in range(20):
        twin.train()(x)
        ran.append(told.last_gates["stages.0.1"])
        with pytest.raises(sd.ChangedModelError) if ran[-1] else nullcontext():
            model.train()(x)
    assert len(set(ran)) == 2


def test_a_replaced_block_is_plain_and_the_others_stay_gated() -> None:
    """Nothing is wrong with it: it was taken out together with its gate."""
    model, x, depth = gated("resnet")
    model.stages[0][1] = BasicBlock(8, 8)
    model.train()(x)
    assert "stages.0.1" not in depth.last_gates
    assert len(depth.last_gates) == 5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "block", "shape"),
    [
        ("resnet", "stages.0.1", (2, 8, 6, 6)),
        ("resnet", "stages.1.0", (2, 8, 6, 6)),
        ("pre-norm", "layers.1", (2, 5, 8)),
        ("post-norm", "layers.1", (2, 5, 8)),
    ],
)
def test_a_forward_that_bypasses_the_call_raises(
    name: str, block: str, shape: tuple[int, ...], training: bool
) -> None:
    model, _, _ = gated(name)
    module = model.get_submodule(block).train(training)
    with pytest.raises(sd.ChangedModelError) as caught:
        module.forward(torch.randn(shape))
    for part in (f'"{block}', "called outside of a call", ".forward(x)", "depth.remove()"):
        assert part in str(caught.value)
    module(torch.randn(shape))  # and through the call it works


# Several applies, and finding the handle.


def two_applies() -> tuple[ResNet, Tensor, sd.StochasticDepth, sd.StochasticDepth]:
    model, x = make("resnet")
    assert isinstance(model, ResNet)
    first = sd.apply_stochastic_depth(
        model, 0.2, "uniform", example_inputs=x, blocks=["stages.0.*"], draw=sd.Draw(seed=1)
    )
    second = sd.apply_stochastic_depth(
        model, 0.1, "uniform", example_inputs=x, blocks=["stages.1.*"], draw=sd.Draw(seed=2)
    )
    return model, x, first, second


@pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning")
def test_two_applies_on_disjoint_parts_work() -> None:
    model, x, first, second = two_applies()
    alone, _ = make("resnet")
    only_first = sd.apply_stochastic_depth(
        alone, 0.2, "uniform", example_inputs=x, blocks=["stages.0.*"], draw=sd.Draw(seed=1)
    )
    for number in range(10):
        model.train()(batch(x, number))
        alone.train()(batch(x, number))
        assert list(first.last_gates) == [f"stages.0.{n}" for n in range(3)]
        assert list(second.last_gates) == [f"stages.1.{n}" for n in range(3)]
        assert first.last_gates == only_first.last_gates
    first.step()
    assert second.state_dict()["step"] == 0

    together, _ = make("resnet")
    rates = {"stages.0.*": 0.2, "stages.1.*": 0.1}
    sd.apply_stochastic_depth(together, rates, example_inputs=x)
    together.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), together.eval()(x))
    first.remove()
    assert [block.name for block in sd.get_stochastic_depth(model).blocks] == [
        f"stages.1.{n}" for n in range(3)
    ]


def test_with_two_applies_the_handle_needs_blocks() -> None:
    model, _, first, second = two_applies()
    with pytest.raises(sd.SelectionError) as caught:
        sd.get_stochastic_depth(model)
    for part in ("ResNet has 2 stochastic depth", "pass blocks=", "stages.0.0", "stages.1.0"):
        assert part in str(caught.value)
    assert sd.get_stochastic_depth(model, blocks="stages.0.2") is first
    assert sd.get_stochastic_depth(model, blocks="stages.1.0") is second
    with pytest.raises(sd.SelectionError, match="no stochastic depth with a block 'nowhere'"):
        sd.get_stochastic_depth(model, blocks="nowhere")

    twin = copy.deepcopy(model)
    own = sd.get_stochastic_depth(twin, blocks="stages.1.0")
    assert own is not second
    own.remove()
    assert sd.get_stochastic_depth(twin).blocks[0].name == "stages.0.0"


def test_with_two_copies_the_handle_needs_the_part() -> None:
    student = residuals(6)
    depth = sd.apply_stochastic_depth(student, 0.2, example_inputs=vectors(1, 8))
    both = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student)})
    with pytest.raises(sd.SelectionError) as caught:
        sd.get_stochastic_depth(both)
    assert "blocks=" not in caught.value.instead
    for part in ("pass a part of the model", "'student'", "'teacher'"):
        assert part in caught.value.instead
    assert sd.get_stochastic_depth(both["student"]) is depth


def test_parts_of_a_model_are_gated_on_their_own() -> None:
    model = settled(Wrapped)
    x = vectors(1, 8)
    depth = sd.apply_stochastic_depth(model.backbone, 0.2, example_inputs=x)
    assert depth.model is model.backbone
    assert sd.get_stochastic_depth(model) is depth
    assert sd.get_stochastic_depth(nn.ModuleDict({"net": model})) is depth
    model.train()(x)
    assert list(depth.last_gates) == [str(n) for n in range(6)]


def test_a_root_that_is_a_block_itself_is_gated() -> None:
    block = settled(lambda: residuals(1))[0]
    depth = sd.apply_stochastic_depth(block, 0.2, example_inputs=vectors(1, 8))
    assert sd.get_stochastic_depth(block) is depth
    for number in range(20):
        block.train()(batch(vectors(1, 8), number))
    assert len(depth.last_gates) == 1
    own = sd.get_stochastic_depth(nn.Sequential(copy.deepcopy(block)))
    assert own.last_gates == depth.last_gates


@pytest.mark.parametrize("what", ["plain", "wrapped"])
def test_no_handle_where_there_is_none(what: str) -> None:
    model, _ = make("pre-norm")
    assert isinstance(model, Transformer)
    asked = model if what == "plain" else nn.Sequential(model)
    with pytest.raises(sd.SelectionError, match=r"has no stochastic depth.*apply_stochastic_depth"):
        sd.get_stochastic_depth(asked)


def test_the_handle_is_found_again_after_it_was_lost() -> None:
    model, x, depth = gated("resnet")
    run(model, depth, x, 2)
    depth.step()
    state, gates = depth.state_dict(), depth.last_gates
    del depth
    again = sd.get_stochastic_depth(model)
    assert (again.state_dict(), again.last_gates) == (state, gates)
    assert sd.get_stochastic_depth(model) is again


def test_asking_a_part_of_the_model_does_not_change_the_handle_of_the_whole() -> None:
    model, _, depth = gated("resnet")
    for part in (model.stages, model.stages[0][0]):
        try:
            found = sd.get_stochastic_depth(part)
        except sd.SelectionError:
            continue
        assert found is depth
    assert sd.get_stochastic_depth(model) is depth


@pytest.mark.parametrize("way_out", ["fold", "remove"])
def test_a_handle_whose_gates_are_out_folds_nothing(way_out: str) -> None:
    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    getattr(depth, way_out)()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    for call in (depth.fold, depth.folded_state_dict, depth.step):
        with pytest.raises(sd.ChangedModelError, match="out of the model already"):
            call()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])


@pytest.mark.parametrize("follows", [True, False])
def test_a_replaced_block_is_noticed_within_a_step_for_each_block_and_by_fold(
    follows: bool,
) -> None:
    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if follows:
        depth.follow(optimizer)
    plain, _ = make("pre-norm")
    model.layers[2] = plain.layers[2]
    model.train()(x).sum().backward()

    def a_step_for_each_block() -> None:
        for _ in depth.blocks:
            optimizer.step() if follows else depth.step()

    with pytest.raises(sd.ChangedModelError, match=r'block "layers\.2" was replaced'):
        a_step_for_each_block()
    for call in (depth.fold, depth.folded_state_dict):
        with pytest.raises(sd.ChangedModelError, match=r'block "layers\.2" was replaced'):
            call()


def test_following_an_optimizer_of_another_model_warns() -> None:
    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    other = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.warns(sd.StochasticDepthWarning, match="no parameter of the model"):
        depth.follow(other)
