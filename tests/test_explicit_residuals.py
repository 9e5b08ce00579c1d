"""Promise: a model that is written with `sd.Residual` skips by itself, without being watched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, make, vectors

pytestmark = pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning")


without_deprecations = pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning"
)


class Tanh(nn.Module):
    """A layer whose branch ends in a function, and takes something beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.add = sd.Residual()
        self.ran = 0

    def branch(self, x: Tensor, shift: Tensor) -> Tensor:
        self.ran += 1
        return torch.tanh(self.linear(self.norm(x)) + shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.branch, x.sin())


def tanhs() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Tanh() for _ in range(6)))


def by_hand(model: nn.Sequential, x: Tensor, factors: list[float | Tensor]) -> Tensor:
    """What the layers come to with their branches times these factors."""
    for layer, factor in zip(model, factors, strict=True):
        assert isinstance(layer, Tanh)
        x = x + factor * layer.branch(x, x.sin())
    return x


@pytest.mark.oldest
def test_they_are_found_without_an_example_and_make_up_layers() -> None:
    model, x = make("explicit")
    blocks = sd.find_residual_blocks(model)
    assert [block.name for block in blocks] == [f"layers.{n}" for n in range(6)]
    assert [b.name for b in blocks[0].branches] == ["layers.0:0", "layers.0:1"]
    assert sd.find_residual_blocks(model, x) == blocks
    lone = nn.Sequential(*(sd.Residual(nn.Linear(4, 4)) for _ in range(3)))
    assert [block.name for block in sd.find_residual_blocks(lone)] == ["0", "1", "2"]


@pytest.mark.oldest
def test_without_stochastic_depth_it_is_the_sum() -> None:
    model, x = tanhs(), vectors(3, WIDTH)
    assert torch.equal(model(x), by_hand(model, x, [1.0] * 6))
    assert not list(sd.Residual().parameters())
    assert sd.Residual().state_dict() == {}


@pytest.mark.oldest
@pytest.mark.parametrize("watched", [False, True])
def test_a_dropped_branch_does_not_run(watched: bool) -> None:
    model, x = tanhs(), vectors(3, WIDTH)
    depth = sd.apply_stochastic_depth(
        model, 0.5, example_inputs=x if watched else None, scale="none"
    )
    before = [layer.ran for layer in model if isinstance(layer, Tanh)]
    with depth.fixed({"1": False, "4": False}):
        out = model.train()(x)
    ran = [layer.ran for layer in model if isinstance(layer, Tanh)]
    assert [b - a for a, b in zip(before, ran, strict=True)] == [1, 0, 1, 1, 0, 1]
    out.sum().backward()
    assert [p.grad is None for p in model[1].parameters()] == [True] * 4
    assert torch.equal(out, by_hand(model, x, [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]))


@pytest.mark.oldest
def test_a_branch_that_ends_in_a_function_is_scaled() -> None:
    model, x = tanhs(), vectors(3, WIDTH)
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.6)
    survival = [block.survival_probability for block in depth.blocks]
    expected = by_hand(plain, x, list(survival))
    # `torch.add(..., alpha)` rounds once where the product and the sum round twice.
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-6, atol=1e-6)
    trained = sd.apply_stochastic_depth(plain, 0.6, scale="train")
    with trained.fixed({}):
        ours = plain.train()(x)
    expected = by_hand(plain, x, [1 / p for p in survival])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.oldest
def test_rows_equal_masks_and_arguments_follow() -> None:
    model, x = tanhs().double(), vectors(8, WIDTH).double().requires_grad_()
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", mode="sample")
    ours = model.train()(x)
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    masks = []
    for kept in depth.last_gates.values():
        mask = torch.zeros(8, 1)
        mask[list(kept)] = 2.0
        masks.append(mask)
    assert any(0 < len(kept) < 8 for kept in depth.last_gates.values())
    expected = by_hand(model, x, list(masks))
    bound = 1e-12  # other kernels for fewer rows
    torch.testing.assert_close(ours, expected, rtol=bound, atol=bound, check_dtype=False)
    (other,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(gradient, other, rtol=bound, atol=bound)


def exported(model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    return torch.export.export(model, (x,)).module()


def traced(model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    return torch.jit.trace(model, (x,))


def compiled(model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@without_deprecations
@pytest.mark.parametrize("way", [exported, traced, compiled])
def test_inference_leaves_python_with_its_scale(
    way: Callable[[nn.Module, Tensor], Callable[[Tensor], Any]],
) -> None:
    model, x = tanhs(), vectors(3, WIDTH)
    plain = model.eval()(x)
    sd.apply_stochastic_depth(model, 0.5)
    expected = model.eval()(x)
    assert not torch.allclose(plain, expected)
    assert torch.equal(way(model, x)(x), expected)


@without_deprecations
def test_a_folded_model_is_scripted_with_its_scale() -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(sd.Residual(nn.Linear(4, 4)) for _ in range(6)))
    x = vectors(3, 4)
    plain = model.eval()(x)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    expected = model.eval()(x)
    assert not torch.allclose(plain, expected)
    with pytest.raises(sd.SetupError, match=r"depth.fold\(\) first"):
        torch.jit.script(model)
    scripted: Any = torch.jit.script(depth.fold())
    torch.testing.assert_close(scripted(x), expected)  # the factors are in the weights: rounding


@without_deprecations
def test_what_cannot_be_scripted_says_so() -> None:
    with pytest.raises(sd.SetupError, match=r"sd.Residual\(branch\)"):
        torch.jit.script(tanhs())
    model = nn.Sequential(*(sd.Residual(nn.Linear(4, 4)) for _ in range(6)))
    sd.apply_stochastic_depth(model, 0.1)
    with pytest.raises(sd.SetupError, match=r"with its gate.*depth.fold"):
        torch.jit.script(model.train())


@pytest.mark.oldest
def test_one_branch_and_not_two() -> None:
    with pytest.raises(sd.OptionError, match="no branch"):
        sd.Residual()(vectors(2, 4))
    with pytest.raises(sd.OptionError, match="second branch"):
        sd.Residual(nn.Linear(4, 4))(vectors(2, 4), nn.Linear(4, 4))


@pytest.mark.oldest
def test_watched_blocks_beside_explicit_ones() -> None:
    model, _ = make("pre-norm")
    model.layers[3] = Tanh()
    x = vectors(4, 5, 3)
    names = [block.name for block in sd.find_residual_blocks(model, x)]
    assert names == [f"layers.{n}" if n != 3 else "layers.3.add" for n in range(6)]
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x, scale="none")
    plain = copy.deepcopy(model)
    sd.get_stochastic_depth(plain).remove()
    with depth.fixed(dict.fromkeys(names, False)):
        assert torch.equal(model.train()(x), model.head(model.embed(x).mean(1)))
    assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.oldest
def test_a_watched_one_folds() -> None:
    model, x = make("explicit")
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    expected = model.eval()(x)
    torch.testing.assert_close(depth.fold().eval()(x), expected, rtol=1e-5, atol=1e-6)
    unwatched, _ = make("explicit")
    depth = sd.apply_stochastic_depth(unwatched, 0.5)
    with pytest.raises(sd.RefusedBlockError, match="was not watched: pass example_inputs"):
        depth.fold()


@pytest.mark.oldest
def test_one_that_is_called_with_several_branches_folds_all_of_them() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.add = nn.Linear(4, 4), nn.Linear(4, 4), sd.Residual()

        def first(self, x: Tensor) -> Tensor:
            return self.a(x.tanh())

        def second(self, x: Tensor) -> Tensor:
            return self.b(x.tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.add(self.add(x, self.first), self.second)

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Twice() for _ in range(6))), vectors(3, 4)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    expected = model.eval()(x)
    torch.testing.assert_close(depth.fold().eval()(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.oldest
def test_what_follows_may_work_in_place() -> None:
    layers = (nn.Sequential(sd.Residual(nn.Linear(4, 4)), nn.ReLU(inplace=True)) for _ in "ab")
    model, x = nn.Sequential(*layers), vectors(3, 4)
    depth = sd.apply_stochastic_depth(model, 0.1)
    before = x.clone()
    with depth.fixed({"0.0": False, "1.0": False}):
        assert torch.equal(model.train()(x), before.relu())
    assert torch.equal(x, before)


@torch.no_grad()
def test_code_that_was_compiled_before_asks_for_the_gate() -> None:
    torch.compiler.reset()
    model, x = tanhs().eval(), vectors(3, WIDTH)
    compiled_model: Any = torch.compile(model, backend="aot_eager")
    plain = compiled_model(x)
    for rate in (0.5, 0.2):
        depth = sd.apply_stochastic_depth(model, rate)
        assert torch.equal(compiled_model(x), model(x))
        assert not torch.allclose(compiled_model(x), plain)
        with depth.fixed({"1": False}):
            assert torch.equal(compiled_model(x), model(x))
        depth.remove()
        assert torch.equal(compiled_model(x), plain)


@pytest.mark.oldest
def test_a_branch_of_another_shape_is_named() -> None:
    model = nn.Sequential(*(sd.Residual(nn.Linear(4, 1)) for _ in range(6)))
    sd.apply_stochastic_depth(model, 0.0)
    with pytest.raises(sd.OptionError, match=r'the branch of "0" .* shape \(2, 1\)'):
        model(vectors(2, 4))


@pytest.mark.oldest
def test_a_branch_that_is_no_modules_is_refused() -> None:
    """Its parameters could not be told: under DistributedDataParallel they are needed."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.add = nn.Linear(4, 4), sd.Residual()

        def forward(self, x: Tensor) -> Tensor:
            return self.add(x, lambda x: self.linear(x))

    model = nn.Sequential(*(Net() for _ in range(6)))
    sd.apply_stochastic_depth(model, 0.2)
    with pytest.raises(sd.OptionError, match=r'the branch of "0\.add" is .*lambda.*a method of'):
        model(vectors(2, 4))


@pytest.mark.oldest
def test_batch_norm_never_sees_a_single_row() -> None:
    rows: list[int] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear, self.add = nn.BatchNorm1d(4), nn.Linear(4, 4), sd.Residual()

        def branch(self, x: Tensor) -> Tensor:
            rows.append(len(x))
            return self.norm(self.linear(x))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(6):
                x = self.add(x, self.branch)
            return x

    model = Net()
    sd.apply_stochastic_depth(model, 0.6, mode="sample")
    for _ in range(20):
        model.train()(vectors(3, 4))
    assert 2 in rows
    assert 1 not in rows


def vit() -> tuple[nn.Module, nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    from explicit_vit import VisionTransformer

    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    return VisionTransformer(5, 32), theirs, vectors(4, 3, 32, 32)


def resnet() -> tuple[nn.Module, nn.Module, Tensor]:
    models = pytest.importorskip("torchvision.models")
    from explicit_resnet import ResNet

    return ResNet(5), models.resnet18(num_classes=5), vectors(4, 3, 96, 96)


@pytest.mark.parametrize("make_pair", [vit, resnet])
@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_the_examples_equal_the_watched_versions(make_pair: Any, mode: Any) -> None:
    torch.manual_seed(0)
    # In double precision: BatchNorm over few values makes much of single rounding.
    ours, theirs, x = (given.double() for given in make_pair())
    ours.load_state_dict(theirs.state_dict())
    explicit = sd.apply_stochastic_depth(ours, 0.5, mode=mode, scale="train")
    watched = sd.apply_stochastic_depth(theirs, 0.5, example_inputs=x, mode=mode, scale="train")
    assert [b.name for b in watched.blocks] == [
        b.name.removesuffix(".add") for b in explicit.blocks
    ]
    dropped = 0
    for step in range(3):
        for model in (ours, theirs):
            model.train().zero_grad()
            model(x).square().mean().backward()
        dropped += sum(kept is False for kept in explicit.last_gates.values())
        assert list(explicit.last_gates.values()) == list(watched.last_gates.values())
        for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), (step, name)
            if p.grad is not None and q.grad is not None:
                # A factor goes into the sum here, into the branch there.
                assert (p.grad - q.grad).norm() <= 1e-9 * p.grad.norm() + 1e-12, (step, name)
    assert dropped or mode == "sample"
