"""Promise: pruning leaves a smaller plain model, which computes what the other blocks computed.

Bit for bit what the model does with these blocks dropped; and it is saved, loaded, exported and
trained as any model of its class.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import (
    NETWORKS,
    WIDTH,
    PreNormLayer,
    Residual,
    Transformer,
    make,
    residuals,
    settled,
    vectors,
)
from pruned import blocks_of, outputs, pruned_as_dropped, same, size

pytestmark = pytest.mark.filterwarnings("ignore:.*(shallow networks|dropout is active)")


@pytest.mark.oldest
@pytest.mark.parametrize("scale", ["none", "train", "eval"])
@pytest.mark.parametrize("keep", [1, 4, 0.5, 1.0])
def test_of_blocks_in_a_list(keep: float, scale: Any) -> None:
    x = vectors(2, WIDTH)
    pruned = pruned_as_dropped(residuals(8), x, keep, scale)
    assert list(pruned._modules) == [str(number) for number in range(len(pruned))]
    assert len(pruned) == (keep if isinstance(keep, int) else round(8 * keep))


def test_with_scale_eval_it_is_what_the_gated_model_computes_to_rounding() -> None:
    model, x = residuals(8), vectors(2, WIDTH)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    with depth.fixed({"2": False, "5": False}):
        expected = outputs(model, x)
    pruned: Any = depth.prune(["0", "1", "3", "4", "6", "7"])
    assert torch.allclose(outputs(pruned, x)[0], expected[0], rtol=1e-5, atol=1e-6)
    assert type(pruned[0]) is Residual
    with pytest.raises(sd.SelectionError):
        sd.get_stochastic_depth(pruned)


def test_the_first_and_the_last_are_kept_and_others_evenly() -> None:
    model, x = residuals(12), vectors(2, WIDTH)
    marks = {id(block): number for number, block in enumerate(model)}
    pruned: Any = sd.prune(model, 4, example_inputs=x)
    assert [marks[id(block)] for block in pruned] == [0, 4, 7, 11]


@pytest.mark.oldest
@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in ("shared", "nested")])
def test_of_each_kind_of_network(name: str) -> None:
    model, x = make(name)
    names = blocks_of(model, x)
    stuck = {"resnet": ["stages.1.0"]}.get(name, [])
    keep = sorted({names[0], *stuck}, key=names.index)
    pruned = pruned_as_dropped(model, x, keep)
    # It trains, is copied and goes through a file as any model.
    pruned.train()(x).sum().backward()
    for other in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert same(outputs(other, x), outputs(pruned, x))


def test_a_projection_is_refused_by_name_and_nothing_is_changed() -> None:
    model, x = make("resnet")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    state, before = copy.deepcopy(model.state_dict()), outputs(model, x)
    with pytest.raises(sd.RefusedBlockError, match=r'"stages.1.0" cannot be taken out: its skip'):
        depth.prune([block.name for block in depth.blocks if block.name != "stages.1.0"])
    assert same(outputs(model, x), before)
    assert sd.get_stochastic_depth(model) is depth
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_of_a_number_what_cannot_be_taken_out_is_always_kept() -> None:
    model, x = make("resnet")
    assert "stages.1.0" in blocks_of(sd.prune(model, 2, example_inputs=x), x)
    model, x = make("resnet")
    total = len(blocks_of(model, x))
    for wrong in (0, total + 1, 0.0, 1.5, -1):
        with pytest.raises(sd.OptionError, match=f"keep is {wrong}"):
            sd.prune(model, wrong, example_inputs=x)
    kinds: list[Any] = [True, None, [], 1j]
    for kind in kinds:
        with pytest.raises(sd.OptionError, match="keep is"):
            sd.prune(model, kind, example_inputs=x)
    with pytest.raises(sd.SelectionError, match="keep names 'layer9'"):
        sd.prune(model, ["layer9"], example_inputs=x)
    assert len(blocks_of(model, x)) == total


class Looped(nn.Module):
    """Runs its blocks by their numbers: none may leave the list."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.stem, self.blocks = (
            nn.Linear(3, WIDTH),
            nn.ModuleList(Residual() for _ in range(blocks)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number in range(4):
            x = self.blocks[number](x)
        return x


class Named(Looped):
    """Calls each by its name."""

    def __init__(self) -> None:
        super().__init__(0)
        self.first, self.second, self.third = Residual(), Residual(), Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(self.stem(x))))


class InLine(Looped):
    """Takes the sums in its own forward, over a list."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block.branch(x) if isinstance(block, Residual) else x + block(x)
        return x


class Counting(Looped):
    """What a block's place is worth differs: it may not move."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            x = block(x) * (1.0 + number)
        return x


@pytest.mark.parametrize("build", [Looped, Named, Counting])
def test_elsewhere_a_module_stands_in(build: Callable[[], Any]) -> None:
    model, x = build(), vectors(2, 3)
    names = blocks_of(model, x)
    pruned = pruned_as_dropped(model, x, [names[0], names[-1]])
    assert type(pruned.get_submodule(names[1])).__name__ == "PassThrough"
    assert not list(pruned.get_submodule(names[1]).parameters())


def test_a_sum_in_the_models_own_loop() -> None:
    model, x = InLine(), vectors(2, 3)
    model.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in "abcd")
    assert len(pruned_as_dropped(model, x, 2).blocks) == 2


class Needs(Looped):
    """Fails without its second block."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.blocks[1], Residual):
            raise TypeError("where is it?")
        return super().forward(x)


def test_where_a_block_is_needed_nothing_is_changed() -> None:
    model, x = Needs(), vectors(2, 3)
    before, keys = outputs(model, x), list(model.state_dict())
    depth = sd.apply_stochastic_depth(model, 0.2, "uniform", example_inputs=x)
    scaled = outputs(model, x)
    with pytest.raises(sd.RefusedBlockError, match=r"without blocks\.1.* Needs fails.*where is it"):
        depth.prune(["blocks.0", "blocks.3"])
    assert same(outputs(model, x), scaled)
    assert sd.get_stochastic_depth(model) is depth
    depth.remove()
    assert (list(model.state_dict()), same(outputs(model, x), before)) == (keys, True)


def test_blocks_inside_of_blocks_go_with_them() -> None:
    model, x = make("nested")
    pruned: Any = sd.prune(model, 2, example_inputs=x)
    assert blocks_of(pruned, x) == [
        f"{n}{inner}" for n in "12" for inner in (".inner.0", ".inner.1", "")
    ]
    model, x = make("nested")
    pruned = sd.prune(model, ["2.inner.1"], example_inputs=x)
    assert [len(pruned), len(pruned[1].inner)] == [2, 1]


def test_what_was_trained_least_goes() -> None:
    model, x = residuals(6), vectors(2, WIDTH)
    marks = {id(block): str(number) for number, block in enumerate(model)}
    rates = {"1": 0.9, "3": 0.8, "4": 0.7}
    depth = sd.apply_stochastic_depth(model, rates, example_inputs=x, scale="none")
    with pytest.raises(sd.OptionError, match="was not trained"):
        depth.prune(3, order="least_dropped")
    for _ in range(100):
        model.train()(x)
        depth.step()
    pruned: Any = depth.prune(3, order="least_dropped")
    assert [marks[id(block)] for block in pruned] == ["0", "2", "5"]
    with pytest.raises(sd.OptionError, match="order="):
        sd.apply_stochastic_depth(pruned, 0.0, example_inputs=x).prune(2, order="best")  # type: ignore[arg-type]


def test_it_has_to_see_the_model_run() -> None:
    model = nn.Sequential(*(sd.Residual(nn.Linear(WIDTH, WIDTH)) for _ in range(4)))
    depth = sd.apply_stochastic_depth(model, 0.1, scale="none")
    with pytest.raises(sd.ExampleInputsError):
        depth.prune(2)
    pruned: Any = depth.prune(2, example_inputs=vectors(2, WIDTH))
    assert len(pruned) == 2
    with torch.device("meta"):
        on_meta = residuals(4)
    x = torch.empty(2, WIDTH, device="meta")
    with pytest.raises(sd.OptionError, match="on the meta device"):
        sd.prune(on_meta, 2, example_inputs=x)
    assert len(on_meta) == 4


def test_a_model_that_drops_on_its_own_is_pruned_all_the_same() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32, drop_path_rate=0.2)
    rates = [model.blocks[n].drop_path1.drop_prob for n in (1, 3)]
    x = torch.randn(2, 3, 32, 32)
    pruned: Any = sd.prune(model, ["blocks.1", "blocks.3"], example_inputs=x)
    assert [block.drop_path1.drop_prob for block in pruned.blocks] == rates


TIMM: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 6}, 3),
    "resnet26": ({}, 6),
    "convnext_atto": ({}, 6),
    "cait_xxs24_224": ({"img_size": 32, "depth": 4}, 3),
    "regnetx_002": ({}, 8),
}


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name: str) -> None:
    options, keep = TIMM[name]
    model = pytest.importorskip("timm").create_model(name, **options)
    _assert_as_dropped(model, torch.randn(2, 3, 32, 32), keep)


@pytest.mark.parametrize(("name", "keep"), [("resnet50", 8), ("vit_b_32", 4)])
def test_models_of_torchvision(name: str, keep: int) -> None:
    options = {"image_size": 32} if name.startswith("vit") else {}
    model = pytest.importorskip("torchvision.models").get_model(name, **options)
    _assert_as_dropped(model, torch.randn(2, 3, 32, 32), keep)


def _assert_as_dropped(model: nn.Module, x: Tensor, keep: int) -> None:
    before, names = size(model), blocks_of(model.eval(), x)
    twin = copy.deepcopy(model)
    modules = {id(module): name for name, module in model.named_modules()}
    pruned = sd.prune(model, keep, example_inputs=x)
    left = {modules[id(module)] for module in pruned.modules() if id(module) in modules}
    reference = sd.apply_stochastic_depth(twin, 0.0, example_inputs=x, scale="none")
    out = [name for name in names if name not in left]
    assert len(out) == len(names) - keep
    with reference.fixed(dict.fromkeys(out, False)):
        assert same(outputs(twin, x), outputs(pruned, x))
    assert size(pruned) < before
    keys = [key for key in pruned.state_dict() if key.split(".")[-2:-1]]
    assert len(keys) == len(set(keys))


class Features(Looped):
    """Returns what some of its blocks return."""

    def forward(self, x: Tensor) -> Any:
        x, found = self.stem(x), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in (1, 3):
                found.append(x)
        return found


class Box:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Boxed(Counting):
    def forward(self, x: Tensor) -> Any:
        return Box(super().forward(x))


class Says(Looped):
    def forward(self, x: Tensor) -> Any:
        super().forward(x)
        return "done"


def test_all_that_is_returned_is_compared() -> None:
    x = vectors(2, 3)
    found = sd.prune(Features(), ["blocks.0", "blocks.1", "blocks.3"], example_inputs=x)(x)
    assert len(found) == 2
    model = Boxed()
    with sd.apply_stochastic_depth(model, 0.0, example_inputs=x).fixed({"blocks.1": False}):
        expected = model.eval()(x).value
    keep = ["blocks.0", "blocks.2", "blocks.3"]
    pruned = sd.get_stochastic_depth(model).prune(keep, example_inputs=x)
    assert torch.equal(pruned(x).value, expected)
    with pytest.raises(sd.RefusedBlockError, match="returns no tensor that could be compared"):
        sd.prune(Says(), keep, example_inputs=x)


class Clamped(nn.Module):
    """Does something behind its sum that small values do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.linear(x).tanh()).clamp(-4, 4)


def test_what_the_example_does_not_show() -> None:
    model, x = nn.Sequential(*(Clamped() for _ in range(4))), vectors(2, WIDTH)
    with pytest.raises(sd.RefusedBlockError, match="does more than call one module after"):
        sd.prune(model, ["3"], example_inputs=x / x.abs().max())


class Growing(nn.Module):
    """Multiplies by the number of the block: zeros do not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(WithoutBias() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks, start=1):
            x = block(x) * number
        return x


class WithoutBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_an_example_of_zeros_is_no_proof() -> None:
    model, x = Growing(), torch.randn(2, 4)
    gated = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(gated, 0.1, example_inputs=x, scale="none")
    with depth.fixed({"blocks.1": False, "blocks.2": False}):
        expected = gated(x)
    pruned = sd.prune(model, ["blocks.0", "blocks.3"], example_inputs=torch.zeros(2, 4))
    assert torch.equal(pruned(x), expected)


def test_taking_norms_out_changes_nothing_else() -> None:
    x = vectors(2, 3)
    keep = ["blocks.0", "blocks.3"]
    exact = sd.prune(settled(Counting), keep, example_inputs=x)
    other = sd.prune(settled(Counting), keep, exact=False, example_inputs=x)
    assert same(outputs(exact, x), outputs(other, x))


@pytest.mark.parametrize("exact", [True, False])
def test_a_sum_in_the_models_own_loop_is_left_out_once(exact: bool) -> None:
    torch.manual_seed(0)
    model, x = OwnLoop().eval(), vectors(2, 8)
    depth = sd.apply_stochastic_depth(model, 0.2, scale="none", example_inputs=x)
    first, *inner, last = [block.name for block in depth.blocks]
    with depth.fixed(dict.fromkeys(inner, False)):
        expected = model(x)
    assert torch.equal(depth.prune([first, last], exact=exact)(x), expected)


class OwnLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_refusal_keeps_what_was_compiled() -> None:
    model, x = make("resnet")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    depth.compile(backend="eager")
    model.train()(x)
    before = [vars(m).get("_compiled_call_impl") for m in model.modules()]
    assert any(before)
    with depth.fixed({"stages.0.0": False}), pytest.raises(sd.RefusedBlockError):
        depth.prune(["stages.0.0"])
    assert [vars(m).get("_compiled_call_impl") for m in model.modules()] == before


def test_set_ups_that_renumbering_would_break() -> None:
    model, x = residuals(8), vectors(2, WIDTH)
    for blocks in (["0", "1", "2"], ["4", "5", "6"]):
        depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, blocks=blocks)
    with pytest.raises(sd.OptionError, match="applied to Sequential several times"):
        depth.prune(1)
    wrapped = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = residuals(8)
    with pytest.raises(sd.OptionError, match="DistributedDataParallel wraps"):
        sd.prune(wrapped, 2, example_inputs=x)


def test_the_example_follows_the_model() -> None:
    model, x = residuals(8), vectors(2, WIDTH)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x)
    model.double()
    with pytest.raises(sd.ExampleInputsError, match="failed on the example"):
        depth.prune(4, example_inputs=vectors(2, 3))
    assert outputs(depth.prune(4), x.double())[0].dtype is torch.float64


class Projecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.skip, self.linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.skip(x) + self.linear(x).relu()
        return out


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Sequential(Projecting(), Residual())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.last(self.inner(self.norm(x)))
        return out


def test_a_projection_goes_with_the_block_around_it() -> None:
    x = vectors(2, WIDTH)
    for keep in (2, ["0*", "3*"]):
        pruned: Any = sd.prune(nn.Sequential(*(Around() for _ in "abcd")), keep, example_inputs=x)
        assert len(pruned) == 2


@pytest.mark.parametrize(
    "keep",
    [np.int64(4), np.float32(0.5), Fraction(1, 2), {"0", "2", "4", "7"}, iter(["0", "1", "[67]"])],
    ids=["numpy's integer", "numpy's fraction", "fraction", "set", "iterator"],
)
def test_numbers_and_names_of_any_kind(keep: Any) -> None:
    pruned: Any = sd.prune(residuals(8), keep, example_inputs=vectors(2, WIDTH))
    assert len(pruned) == 4


def test_numbers_that_are_none() -> None:
    for keep in (float("nan"), float("inf"), 10**400):
        with pytest.raises(sd.OptionError, match="keep is"):
            sd.prune(residuals(8), keep, example_inputs=vectors(2, WIDTH))


def test_weights_that_are_computed_since() -> None:
    model, x = residuals(8), vectors(2, WIDTH)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, scale="none")
    nn.utils.parametrizations.weight_norm(model.get_submodule("5.linear"))
    pruned: Any = depth.prune(4)
    assert len(pruned) == 4


@pytest.mark.parametrize("name", ["folded", "pruned", "plain"])
@pytest.mark.filterwarnings("ignore")  # of the exporters'
def test_it_exports(name: str, tmp_path: Path) -> None:
    """To torch.export and ONNX, equal to eager."""
    model, x = make("pre-norm")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    leave: dict[str, Callable[[], nn.Module]]
    leave = {"folded": depth.fold, "plain": depth.remove, "pruned": lambda: depth.prune(1)}
    model = leave[name]().eval()
    assert name != "pruned" or size(model) < size(Transformer(PreNormLayer))
    expected = model(x)  # with gradients, without which other kernels run
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), expected)
    pytest.importorskip("onnxscript")
    reference: Any = pytest.importorskip("onnx.reference")
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
    (found,) = reference.ReferenceEvaluator(str(file)).run(None, {"x": x.numpy()})
    # Another library's kernels sum in another order.
    assert torch.allclose(torch.from_numpy(found.copy()), expected, rtol=1e-4, atol=1e-5)


def test_a_sparse_matrix_among_the_inputs() -> None:
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
            return x + torch.sparse.mm(matrix, self.linear(self.norm(x)).relu())

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Convolved() for _ in range(6))

        def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, matrix)
            return x

    x, matrix = torch.randn(30, 8), torch.eye(30).roll(1, 0).to_sparse()
    model = Graph()
    first, last = model.blocks[0], model.blocks[5]
    pruned = sd.prune(model, 2, example_inputs=(x, matrix))
    assert torch.equal(pruned(x, matrix), last(first(x, matrix), matrix))
