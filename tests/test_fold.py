"""Promise: `fold()` gives back a plain model that computes in eval mode what the gated one did.

Everything but the exports is compared in double precision. Folding moves one factor for each
branch past the sums and products of its last operation, which rounds to some 1e-16 of them; over
the 50 blocks of the deepest model that stays far below 1e-9 of the largest output, while a factor
that is missing or wrong in a single branch is seen at 1e-3.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import stochastic_depth as sd
from comparing import run
from networks import (
    NETWORKS,
    WIDTH,
    Residual,
    ResNet,
    TwoBranches,
    assert_same,
    make,
    residuals,
    settled,
    sgd,
    train,
    vectors,
)
from zoo import SPECIMENS, Specimen

oldest = pytest.mark.oldest
TOLERANCE = 1e-9
CANNOT_FOLD = r"fold\(\) will not be able to put the inference scale of"


def assert_close(mine: Tensor, other: Tensor) -> None:
    assert float((mine - other).abs().max()) <= TOLERANCE * float(other.abs().max())


def differs(mine: Tensor, other: Tensor) -> bool:
    return float((mine - other).abs().max()) > 1e-3 * float(other.abs().max())


def in_double(example: Any) -> Any:
    if isinstance(example, Mapping):
        return {name: in_double(tensor) for name, tensor in example.items()}
    return example.double() if example.is_floating_point() else example


def gated(
    model: nn.Module, x: Any, drop_rate: Any = 0.5, **options: Any
) -> tuple[Any, sd.StochasticDepth]:
    model = model.double().eval()
    return model, sd.apply_stochastic_depth(model, drop_rate, example_inputs=x, **options)


def check(model: nn.Module, x: Tensor, drop_rate: Any = 0.5, **options: Any) -> None:
    """Both ways of folding give a plain model that computes the same."""
    plain = copy.deepcopy(model).double().eval()
    model, depth = gated(model, x.double(), drop_rate, **options)
    with torch.no_grad():
        expected = model(x.double())
        fresh = copy.deepcopy(plain)
        fresh.load_state_dict(depth.folded_state_dict())
        assert_close(fresh(x.double()), expected)
        assert torch.equal(model(x.double()), expected)  # its gates and weights stayed
        assert depth.fold() is model
        assert_plain(model, plain)
        assert torch.equal(model(x.double()), fresh(x.double()))
        assert differs(plain(x.double()), expected)


def assert_plain(model: nn.Module, plain: nn.Module) -> None:
    """The classes and keys of a model that never met the library."""
    for mine, other in zip(model.modules(), plain.modules(), strict=True):
        assert type(mine) is type(other)
        assert mine.__dict__.keys() == other.__dict__.keys()
    assert list(model.state_dict()) == list(plain.state_dict())


# It computes the same.


@pytest.mark.parametrize("specimen", [s for s in SPECIMENS if s.foldable], ids=lambda s: s.name)
def test_every_model_folds(specimen: Specimen) -> None:
    model, example = specimen.model().double(), in_double(specimen.example_inputs())
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    leave_out = [f"!{name}" for name in specimen.leave_out] or None
    rate = 0.5 if specimen.blocks - len(specimen.leave_out) >= 6 else 0.2
    model, depth = gated(model, example, rate, blocks=leave_out)
    with torch.no_grad():
        expected = run(model, example)
        with depth.fixed({}), depth.disabled():
            assert torch.equal(run(model, example), expected)
        folded = depth.folded_state_dict()
        assert list(folded) == keys
        plain = depth.fold()
        assert_close(run(plain, example), expected)
    assert plain is model
    assert [type(module) for module in plain.modules()] == classes
    own = plain.state_dict()
    assert list(own) == keys
    assert all(torch.equal(folded[key], own[key]) for key in keys)


@oldest
@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "nested"])
def test_every_kind_of_network_folds(name: str, unit: str) -> None:
    model, x = make(name)
    check(model, x, 0.2, unit=unit)


@oldest
@given(st.lists(st.floats(0, 0.99), min_size=6, max_size=6))
def test_any_rates_fold(rates: list[float]) -> None:
    model, x = make("resnet")
    model, depth = gated(model, x.double(), rates)
    with torch.no_grad():
        expected = model(x.double())
        assert_close(depth.fold()(x.double()), expected)


@oldest
def test_folding_during_a_warmup_takes_the_rates_of_the_moment() -> None:
    model, x = make("pre-norm")
    plain = copy.deepcopy(model).double().eval()
    model, depth = gated(model, x.double(), schedule=sd.linear_warmup(4))
    with torch.no_grad():
        for step in range(5):
            plain.load_state_dict(depth.folded_state_dict())
            assert_close(plain(x.double()), model(x.double()))
            if step == 0:
                assert_same(plain, model)
            depth.step()
        expected = model(x.double())
        assert_close(depth.fold()(x.double()), expected)


@oldest
def test_each_branch_is_folded_with_the_rate_of_its_own_schedule() -> None:
    model, x = make("post-norm")
    check(model, x, unit="branch", schedule={"*:0": sd.constant(0.3), "layers.5:1": sd.constant(0)})


@oldest
@pytest.mark.parametrize("scale", ["train", "none"])
def test_there_is_nothing_to_fold_where_eval_is_not_scaled(scale: str) -> None:
    model, x = make("resnet")
    plain = copy.deepcopy(model).double().eval()
    model, depth = gated(model, x.double(), scale=scale)
    folded = depth.folded_state_dict()
    depth.fold()
    assert_plain(model, plain)
    assert_same(model, plain)
    plain.load_state_dict(folded)
    assert_same(model, plain)


@oldest
def test_a_folded_state_dict_holds_during_training_and_is_no_view_of_it() -> None:
    model, x = make("resnet")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    optimizer = sgd(model)
    depth.follow(optimizer)
    train(model, optimizer, x, 2)
    plain, _ = make("resnet")
    plain.load_state_dict(depth.folded_state_dict())
    expected = model.eval()(x)
    train(model, optimizer, x, range(2, 4))
    assert depth.last_gates
    # In single precision: the rounding of six blocks is some 1e-6 of an output of size one.
    torch.testing.assert_close(plain.eval()(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(tensor.requires_grad for tensor in depth.folded_state_dict().values())


@oldest
def test_a_folded_copy_leaves_the_original_alone() -> None:
    model, x = make("resnet")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    before = model.eval()(x)
    folded = sd.get_stochastic_depth(copy.deepcopy(model)).fold()
    assert torch.equal(model(x), before)
    assert sd.get_stochastic_depth(model) is depth
    with pytest.raises(sd.SelectionError):
        sd.get_stochastic_depth(folded)


@oldest
def test_a_folded_model_trains_on_and_can_be_gated_again() -> None:
    model, x = make("resnet")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    optimizer = sgd(model)
    depth.follow(optimizer)
    train(model, optimizer, x, 1)
    depth.fold()
    train(model, optimizer, x, 1)  # the hook on the optimizer has gone with the gates
    again = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    assert len(again.blocks) == 6


# Branches of other structures.


class TwiceTheSame(nn.Module):
    """Two branches that end in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(F.gelu(self.norm1(x)))
        return x + self.linear(F.gelu(self.norm2(x)))


class LayerScale(nn.Module):
    """A raw parameter behind the branch's last module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gamma = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.linear(F.gelu(x))


class Conv1D(nn.Module):
    """transformers' Conv1D is a Linear with its weight the other way around; this is one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class BehindMoves(nn.Module):
    """Dropout, Identity, a reshape and a ReLU come after the last affine operation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.identity = Conv1D(), nn.Dropout(0.3), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.conv(x.tanh())).view(-1, 2, WIDTH // 2)
        return x + self.identity(F.relu(y.flatten(1)))


class Parallel(nn.Module):
    """A branch that is the sum of two (GPT-NeoX)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.first(y.tanh()) + self.second(F.gelu(y)) + x


@oldest
@pytest.mark.filterwarnings("ignore:dropout is active")
@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("kind", [TwiceTheSame, LayerScale, BehindMoves, Parallel, TwoBranches])
def test_branches_of_many_structures_fold(kind: type[nn.Module], unit: str) -> None:
    check(settled(lambda: residuals(6, kind)), vectors(4, WIDTH), unit=unit)


@oldest
def test_one_layer_that_ends_branches_of_different_rates_is_refused() -> None:
    model = settled(lambda: residuals(6, TwiceTheSame))
    model, depth = gated(
        model, vectors(4, WIDTH).double(), unit="branch", schedule={"*:1": sd.constant(0.5)}
    )
    refused_unchanged(model, depth, "linear.weight")


class Last(nn.Module):
    """An affine operation whose output a residual connection of its own goes around."""

    def __init__(self, inner: type[nn.Module]) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(WIDTH, WIDTH), nn.Sequential(inner(), inner())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.linear(x.tanh()))


class Cubic(nn.Module):
    """A residual block that tells from the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x.tanh())


@oldest
@pytest.mark.parametrize("inner", [Residual, Cubic])
def test_a_branch_that_ends_in_a_block_is_folded_right_or_refused(inner: type[nn.Module]) -> None:
    """A factor on what goes into the inner block is none on what comes out of its branch."""
    model = settled(lambda: nn.Sequential(*(Last(inner) for _ in range(3))))
    right_or_refused(model)


def right_or_refused(model: nn.Module) -> None:
    x = vectors(4, WIDTH)
    try:
        check(copy.deepcopy(model), x)
    except sd.StochasticDepthWarning:
        with pytest.warns(sd.StochasticDepthWarning, match=CANNOT_FOLD):
            model, depth = gated(model, x.double())
        refused_unchanged(model, depth)


@oldest
def test_nested_blocks_fold() -> None:
    model, x = make("nested")
    check(model, x)


@oldest
def test_extra_state_passes_through() -> None:
    model, x = settled(lambda: residuals(6, WithExtraState)), vectors(4, WIDTH)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    folded = depth.folded_state_dict()
    assert folded["3._extra_state"] == {"version": 3}
    expected = model.eval()(x)
    plain = residuals(6, WithExtraState).eval()
    plain.load_state_dict(folded)
    # One operation of each of six blocks rounds at another place, in single precision.
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


class WithExtraState(Residual):
    def get_extra_state(self) -> object:
        return {"version": 3}

    def set_extra_state(self, state: object) -> None:
        assert state == {"version": 3}


# It refuses, says so early, and then changes nothing.


def refused_unchanged(model: nn.Module, depth: sd.StochasticDepth, *says: str) -> None:
    """Both ways of folding are refused by name; weights, gates and outputs stay."""
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    for fold in (depth.fold, depth.folded_state_dict):
        with pytest.raises(sd.RefusedBlockError) as caught:
            fold()
        assert all(part in str(caught.value) for part in says), caught.value
    after = model.state_dict()
    assert all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)
    assert [type(module) for module in model.modules()] == classes
    assert sd.get_stochastic_depth(model) is depth


class SqueezeExcite(nn.Module):
    """The branch ends in a product of two computed values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.excite = Excite()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.excite(self.linear(self.norm(x)))


class Excite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).sigmoid()


class NoAffine(nn.Module):
    """The branch ends in a norm without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = (
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH, elementwise_affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.linear(x))


class Saturated(nn.Module):
    """The branch ends in an activation that no factor passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(WIDTH, WIDTH), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.linear(x))


class WeightNorm(nn.Module):
    """The weight that would take the factor is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(F.gelu(self.norm(x)))


UNFOLDABLE: dict[type[nn.Module], str] = {
    SqueezeExcite: "mul in 0.excite",
    NoAffine: "the norm 0.norm has no weight",
    Saturated: "tanh in 0.act",
    WeightNorm: "weight of 0.linear is itself computed",
}


@oldest
@pytest.mark.parametrize("kind", UNFOLDABLE)
def test_what_cannot_be_folded_is_said_by_apply_and_refused_by_fold(kind: type[nn.Module]) -> None:
    model, x = settled(lambda: residuals(6, kind)), vectors(4, WIDTH).double()
    with pytest.warns(sd.StochasticDepthWarning, match=CANNOT_FOLD) as caught:
        model, depth = gated(model, x)
    (warning,) = caught
    assert all(
        part in str(warning.message)
        for part in ("6 branches", '"0:0"', 'scale="train"', UNFOLDABLE[kind])
    )
    assert warning.filename == __file__  # it points at the caller
    refused_unchanged(model, depth, '"0:0"', UNFOLDABLE[kind], 'scale="train"')


@oldest
@pytest.mark.parametrize("scale", ["train", "none"])
def test_no_warning_where_there_is_no_scale_to_fold(scale: str) -> None:
    model, x = settled(lambda: residuals(6, SqueezeExcite)), vectors(4, WIDTH).double()
    model, depth = gated(model, x, scale=scale)
    assert depth.fold() is model


@oldest
def test_a_branch_that_is_never_dropped_need_not_fold() -> None:
    network = settled(lambda: nn.Sequential(*residuals(5), SqueezeExcite()))
    model, depth = gated(network, vectors(4, WIDTH).double(), {"[0-4]": 0.5})
    assert depth.fold() is model


def test_squeeze_excite_of_the_zoo_warns_and_is_refused() -> None:
    for specimen in (s for s in SPECIMENS if not s.foldable):
        example = specimen.example_inputs()
        model = specimen.model().eval()
        with pytest.warns(sd.StochasticDepthWarning, match=CANNOT_FOLD):
            depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=example)
        refused_unchanged(model, depth, depth.blocks[0].branches[0].name, "se")


class Tied(nn.Module):
    """A weight of the last block is also the head's; or only that of a head for training."""

    def __init__(self, *, in_eval: bool) -> None:
        super().__init__()
        self.body, self.head = residuals(6), nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.body.get_parameter("5.linear.weight")
        self.in_eval = in_eval

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x) if self.training or self.in_eval else x


@oldest
def test_a_weight_shared_with_a_head_is_refused_by_name() -> None:
    x = vectors(4, WIDTH).double()
    with pytest.warns(sd.StochasticDepthWarning, match="body.5.linear.weight is shared with head"):
        model, depth = gated(settled(lambda: Tied(in_eval=True)), x)
    refused_unchanged(model, depth, '"body.5:0"', "body.5.linear.weight is shared with head")


@oldest
def test_a_weight_shared_with_what_the_watched_forward_leaves_out_is_refused() -> None:
    x = vectors(4, WIDTH).double()
    with pytest.warns(sd.StochasticDepthWarning, match=r"body.5.linear.weight is shared"):
        model, depth = gated(settled(lambda: Tied(in_eval=False)), x)
    refused_unchanged(model, depth, '"body.5:0"', "body.5.linear.weight")


@oldest
def test_a_weight_shared_between_blocks_is_refused_by_name() -> None:
    network = settled(residuals)
    network[3].linear.weight = network[5].linear.weight
    x = vectors(4, WIDTH).double()
    with pytest.warns(sd.StochasticDepthWarning, match="3.linear.weight is shared with 5.linear"):
        model, depth = gated(network, x)
    refused_unchanged(model, depth, '"3:0"', "3.linear.weight is shared with 5.linear")


@oldest
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model, x = make("resnet")
    model, depth = gated(model, x.double())
    with torch.no_grad():
        model.stages[1][2].bn2.weight[3] = value
    refused_unchanged(model, depth, '"stages.1.2.bn2.weight"', "not finite")


# The folded model is a model like any other.


@pytest.mark.parametrize("name", ["resnet", "pre-norm"])
def test_torch_export_and_onnx_of_the_folded_model_equal_eval(name: str) -> None:
    onnx_reference = pytest.importorskip("onnx.reference")
    model, x = make(name)
    model.eval()
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    expected = model(x).detach()
    plain = depth.fold()
    exported = torch.export.export(plain, (x,))
    program = torch.onnx.export(plain, (x,), dynamo=True, verbose=False)
    assert program is not None
    proto = program.model_proto
    (output,) = onnx_reference.ReferenceEvaluator(proto).run(
        None, {proto.graph.input[0].name: x.numpy()}
    )
    # Single precision, and other kernels for ONNX: some 1e-6 of outputs of size one. Without the
    # scale the outputs are 1e-2 off.
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(make(name)[0].eval()(x), expected, rtol=1e-2, atol=1e-2)


@oldest
def test_a_resnet_checkpoint_is_read_by_code_that_knows_nothing(tmp_path: Any) -> None:
    model, x = make("resnet")
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    torch.save(depth.folded_state_dict(), tmp_path / "model.pt")
    plain = ResNet()
    plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    torch.testing.assert_close(plain.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)
