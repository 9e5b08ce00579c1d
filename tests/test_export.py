"""Promise: what torch.export and ONNX write down of a gated model for inference has its scale.

With the gates still in, and folded. A model in train mode is refused: its draw would be there for
good.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import stochastic_depth as sd
from networks import NETWORKS, make

KINDS: dict[str, dict[str, Any]] = {
    "eval": {"scale": "eval"},
    "none": {"scale": "none"},
    "sample": {"mode": "sample"},
    "by branch": {"unit": "branch", "schedule": sd.constant(0.5)},
}


FEW = ("resnet", "post-norm")


def gated(name: str, **options: Any) -> tuple[Any, Tensor, sd.StochasticDepth]:
    model, x = make(name)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, **options)
    return model.eval(), x, depth


def is_scaled(name: str, x: Tensor, output: Tensor) -> bool:
    """Whether it is far from what the model computes without its scale."""
    return not torch.allclose(make(name)[0].eval()(x), output, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in NETWORKS for k in KINDS if k == "eval" or n in FEW]
)
def test_torch_export(name: str, kind: str) -> None:
    model, x, _ = gated(name, **KINDS[kind])
    expected = model(x)
    exported = torch.export.export(model, (x,), strict=False).module()
    assert torch.equal(exported(x), expected)
    assert is_scaled(name, x, expected) == (kind in ("eval", "by branch"))


@pytest.mark.oldest
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # a None
@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in NETWORKS for k in KINDS if k == "eval" or n in FEW]
)
def test_torch_export_by_its_strict_way(name: str, kind: str) -> None:
    """Which reads the code of the gates, and is what torch 2.6 takes where nothing is said."""
    model, x, _ = gated(name, **KINDS[kind])
    expected = model(x)
    program = torch.export.export(model, (x,), strict=True)
    assert torch.equal(program.module()(x), expected)
    assert is_scaled(name, x, expected) == (kind in ("eval", "by branch"))
    assert set(program.state_dict) == set(model.state_dict())


@pytest.mark.parametrize("name", [*FEW, "explicit"])
def test_any_number_of_examples(name: str) -> None:
    model, x, _ = gated(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False).module()
    for rows in (2, 7):
        more = torch.cat([x, x])[:rows]
        # Other sizes may take other kernels.
        torch.testing.assert_close(exported(more), model(more), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*FEW, "explicit"])
def test_a_saved_program_needs_nothing_of_this_package(name: str) -> None:
    model, x, _ = gated(name)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), strict=False), file)
    file.seek(0)
    program = torch.export.load(file)
    assert torch.equal(program.module()(x), model(x))
    assert "stochastic_depth" not in program.graph_module.code


@pytest.mark.parametrize("name", FEW)
def test_onnx(name: str) -> None:
    onnx_reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    model, x, _ = gated(name)
    expected = model(x).detach()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    proto = program.model_proto
    given = {proto.graph.input[0].name: x.numpy()}
    (output,) = onnx_reference.ReferenceEvaluator(proto).run(None, given)
    # Single precision, and other kernels; without the scale it is 1e-2 off.
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-5, atol=1e-5)
    assert is_scaled(name, x, expected)


@pytest.mark.parametrize("name", FEW)
def test_folded_copies_and_averages_are_exported_alike(name: str) -> None:
    model, x, depth = gated(name)
    average: Any = AveragedModel(model).eval()
    folded = copy.deepcopy(model)
    sd.get_stochastic_depth(folded).fold()
    expected = model(x)
    for each in (average, copy.deepcopy(model)):
        assert torch.equal(torch.export.export(each, (x,), strict=False).module()(x), expected)
    exported = torch.export.export(folded, (x,)).module()
    # A factor in the weights rounds otherwise than one on the output.
    torch.testing.assert_close(exported(x), expected, rtol=1e-5, atol=1e-5)
    assert depth.state_dict()["calls"] == []


@pytest.mark.parametrize("name", [*FEW, "explicit"])
def test_a_model_in_train_mode_is_refused(name: str) -> None:
    model, x, depth = gated(name)
    model.train()
    with pytest.raises(sd.SetupError, match=r"torch.export met block .* model.eval\(\) is enough"):
        torch.export.export(model, (x,), strict=False)
    with depth.disabled():  # every block runs
        exported = torch.export.export(model, (x,), strict=False).module()
    with depth.disabled():
        assert torch.equal(exported(x), model(x))
