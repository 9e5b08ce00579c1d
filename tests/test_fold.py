"""Promise: `fold()` gives back a plain model that computes in eval mode what the gated one did.

Everything but the exports is compared in double precision. Folding moves one factor for each
branch past the sums and products of its last operation, which rounds to some 1e-16 of them; over
the 50 blocks of the deepest model that stays far below 1e-9 of the largest output, while a factor
that is missing or wrong in a single branch is seen at 1e-3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import stochastic_depth as sd
from comparing import every_model_and_unit, run
from layers import Ended, Excite, TwiceTheSame
from networks import (
    WIDTH,
    Residual,
    ResNet,
    assert_same,
    make,
    residuals,
    settled,
    sgd,
    train,
    vectors,
)
from specimen import Specimen

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
    if isinstance(example, tuple):
        return tuple(map(in_double, example))
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


@pytest.mark.filterwarnings("ignore:dropout is active")
@every_model_and_unit
def test_every_model_folds_or_says_early_that_it_cannot(specimen: Specimen, unit: str) -> None:
    dropout = 0.3 if specimen.is_small else 0.0  # which the watch sees behind a branch's end
    plain = specimen.model(dropout).double().eval()
    example = in_double(specimen.example_inputs())
    model = copy.deepcopy(plain)
    options = {"unit": unit, "blocks": specimen.gated_blocks}
    rate = 0.5 if specimen.blocks - len(specimen.leave_out) >= 5 else 0.2
    if says := specimen.unfoldable:
        with pytest.warns(sd.StochasticDepthWarning, match=CANNOT_FOLD) as caught:
            model, depth = gated(model, example, rate, **options)
        (warning,) = caught
        name = next(
            branch.name
            for block in depth.blocks
            for branch in block.branches
            if f'"{branch.name}"' in str(warning.message)
        )
        assert all(part in str(warning.message) for part in ("branches", says, 'scale="train"'))
        assert warning.filename == __file__  # it points at the caller
        refused_unchanged(model, depth, f'"{name}"', says, 'scale="train"')
        return
    model, depth = gated(model, example, rate, **options)
    with torch.no_grad():
        expected = run(model, example)
        with depth.fixed({}), depth.disabled():
            assert torch.equal(run(model, example), expected)
        fresh = copy.deepcopy(plain)
        fresh.load_state_dict(depth.folded_state_dict())
        assert_close(run(fresh, example), expected)
        assert torch.equal(run(model, example), expected)  # its gates and weights stayed
        assert depth.fold() is model
        assert_plain(model, plain)
        assert torch.equal(run(model, example), run(fresh, example))
        assert differs(run(plain, example), expected)


@oldest
@settings(max_examples=30)
@given(st.lists(st.floats(0, 0.99), min_size=6, max_size=6))
def test_any_rates_fold(rates: list[float]) -> None:
    model, x = make("resnet")
    model, depth = gated(model, x.double(), rates)
    with torch.no_grad():
        expected = model(x.double())
        assert_close(depth.fold()(x.double()), expected)


@pytest.mark.filterwarnings("ignore:.*at step 0 of a schedule")
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


@oldest
def test_one_layer_that_ends_branches_of_different_rates_is_refused() -> None:
    model = settled(lambda: residuals(6, TwiceTheSame))
    model, depth = gated(
        model, vectors(4, WIDTH).double(), unit="branch", schedule={"*:1": sd.constant(0.5)}
    )
    refused_unchanged(model, depth, "linear.weight")


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


@oldest
@pytest.mark.parametrize("scale", ["train", "none"])
def test_no_warning_where_there_is_no_scale_to_fold(scale: str) -> None:
    model, x = settled(lambda: residuals(6, lambda: Ended(Excite))), vectors(4, WIDTH).double()
    model, depth = gated(model, x, scale=scale)
    assert depth.fold() is model


@oldest
def test_a_branch_that_is_never_dropped_need_not_fold() -> None:
    network = settled(lambda: nn.Sequential(*residuals(5), Ended(Excite)))
    model, depth = gated(network, vectors(4, WIDTH).double(), {"[0-4]": 0.5})
    assert depth.fold() is model


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


def values_of(head: nn.Linear, end: nn.Linear) -> None:
    head.weight = nn.Parameter(end.weight.data)


def some_values_of(head: nn.Linear, end: nn.Linear) -> None:
    rows = torch.cat([end.weight.data, end.weight.data])
    end.weight.data, head.weight.data = rows[:WIDTH], rows[WIDTH // 2 :][:WIDTH]


def a_buffer_of(head: nn.Linear, end: nn.Linear) -> None:
    head.register_buffer("copy", end.weight.data.t())


@oldest
@pytest.mark.parametrize("alias", [values_of, some_values_of, a_buffer_of])
def test_two_tensors_on_the_same_values_are_refused_by_name(alias: Callable[..., None]) -> None:
    network = nn.Sequential(*settled(residuals), nn.Linear(WIDTH, WIDTH)).double()
    alias(network[8], network[5].linear)
    x = vectors(4, WIDTH).double()
    says = r"5.linear.weight lies in the same memory as 8\.(weight|copy)"
    with pytest.warns(sd.StochasticDepthWarning, match=says):
        depth = sd.apply_stochastic_depth(network, 0.5, "uniform", example_inputs=x)
    refused_unchanged(network, depth, '"5:0"', "5.linear.weight lies in the same memory as 8.")
    with pytest.raises(sd.RefusedBlockError, match=says):
        sd.fold_state_dict(network.state_dict(), depth.state_dict())


class Regularised(nn.Module):
    """Hands out what is computed from the weights of its blocks alone, beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = residuals(6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = [self.body.get_parameter(f"{n}.linear.weight") for n in (2, 5)]
        return self.body(x), torch.stack([weight.t().square().sum() for weight in weights]).sum()


@oldest
def test_weights_that_the_model_reads_besides_are_refused_by_name() -> None:
    x = vectors(4, WIDTH).double()
    says = "body.2.linear.weight is shared with the model"
    with pytest.warns(sd.StochasticDepthWarning, match=says):
        model, depth = gated(settled(Regularised), x)
    refused_unchanged(model, depth, '"body.2:0"', says)


@oldest
def test_weights_side_by_side_in_one_memory_fold() -> None:
    """As in a flat buffer, and as columns of one matrix."""
    network = settled(residuals).double()
    ends = [block.get_submodule("linear").get_parameter("weight") for block in network]
    flat = torch.cat([end.data.reshape(-1) for end in ends[:4]]).split(WIDTH * WIDTH)
    columns = torch.cat([end.data for end in ends[4:]], dim=1).split(WIDTH, dim=1)
    for end, place in zip(ends, [*flat, *columns], strict=True):
        end.data = place.view(WIDTH, WIDTH)
    x = vectors(4, WIDTH).double()
    depth = sd.apply_stochastic_depth(network, 0.5, "uniform", example_inputs=x)
    expected = network.eval()(x).detach()
    assert_close(depth.fold()(x).detach(), expected)


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


@oldest
def test_weights_that_a_module_shares_which_is_not_called() -> None:
    model: Any = settled(lambda: nn.Sequential(*residuals(6)))
    model[2].idle = nn.Linear(WIDTH, WIDTH)
    model[2].idle.weight = model[4].linear.weight
    x = vectors(2, WIDTH)
    with pytest.warns(sd.StochasticDepthWarning, match=CANNOT_FOLD) as caught:
        depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    assert "4.linear shares a weight with 2.idle, which was not called" in str(caught[0].message)
    refused_unchanged(model, depth, '"4:0"', "which was not called")


@oldest
@pytest.mark.parametrize("change", [
    lambda layer: nn.utils.parametrizations.weight_norm(layer),
    lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
])  # fmt: skip
def test_weights_that_were_parametrized_after_apply(change: Any) -> None:
    model: Any = settled(lambda: nn.Sequential(*residuals(6)))
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=vectors(2, WIDTH))
    change(model[4].linear)
    for fold in (depth.folded_state_dict, depth.fold, lambda: depth.prune(3)):
        with pytest.raises(
            sd.RefusedBlockError, match=r'folded: "4\.linear\.weight" is no parameter any'
        ):
            fold()
