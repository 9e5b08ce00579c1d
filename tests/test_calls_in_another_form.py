"""Promise: a block that is called in another way than it was watched is still exact when closed."""

from __future__ import annotations

import copy
import enum
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import stochastic_depth as sd

pytestmark = pytest.mark.oldest


class Masked(nn.Module):
    """Hands its input on, but for a mask or a gain, where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor, mask: Tensor | None = None, gain: int = 1) -> Tensor:
        y = x + self.branch(x)
        y = y if mask is None else y * mask
        return y if gain == 1 else y * gain


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Masked() for _ in range(6))

    def forward(self, x: Tensor, mask: Tensor | None = None, gain: int = 1) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask=mask, gain=gain)
        return x


def closed(depth: sd.StochasticDepth) -> dict[str, bool]:
    return {block.name: False for block in depth.blocks}


@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("training", [True, False])
def test_a_mask_that_the_example_did_not_have(unit: str, training: bool) -> None:
    torch.manual_seed(0)
    model = Network().train(training)
    x, mask = torch.randn(2, 8), torch.rand(2, 1)
    options = {"unit": unit, "example_inputs": x}
    depth = sd.apply_stochastic_depth(model, 0.2, scale="none", **options)  # type: ignore[arg-type]
    assert str(depth).count("whole") == 6
    with depth.fixed(closed(depth)):
        assert torch.equal(model(x), x)
        with pytest.raises(sd.ChangedModelError, match='"mask", where the example had none'):
            model(x, mask)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sd.StochasticDepthWarning)
            assert torch.equal(model(x, gain=2), 64 * x)
    if training:
        with pytest.raises(sd.ChangedModelError, match="pass the example that you train with"):
            model(x, mask)
    else:  # nothing is dropped
        assert torch.equal(model(x, mask), depth.remove()(x, mask))


@pytest.mark.oldest
def test_another_flag_is_exact_and_says_what_it_costs() -> None:
    torch.manual_seed(0)
    model, x = Network().train(), torch.randn(2, 8)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    with depth.fixed({"layers.3": False}):
        with pytest.warns(sd.StochasticDepthWarning, match=r'"layers\.3" .*gain.*: 2.*thrown away'):
            found = model(x.requires_grad_(), gain=2)
        found.sum().backward()
    dropped = [p.grad is None for p in model.layers[3].parameters()]
    assert all(dropped)
    twin: Any = depth.remove()
    twin.layers[3].branch[2].register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(found, twin(x, gain=2))


def test_a_mask_that_the_example_had_as_well() -> None:
    torch.manual_seed(0)
    model = Network().train()
    x, mask = torch.randn(2, 8), torch.rand(2, 1)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=(x, mask))
    assert str(depth).count("whole") == 0
    with depth.fixed(closed(depth)):
        assert torch.equal(model(x), x)
        model(x.requires_grad_(), mask).sum().backward()
    assert all(p.grad is None for p in model.parameters())


class Decoder(nn.Module):
    """A second branch where it is given states."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = (
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2)
        )

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.own(x)
        return x if memory is None else x + self.cross(x * memory)


class Decoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Decoder() for _ in range(6))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory)
        return x


@pytest.mark.parametrize("scale", ["eval", "train", "none"])
@pytest.mark.parametrize("unit", ["block", "branch"])
def test_fewer_branches_than_in_the_example_run(unit: Any, scale: Any) -> None:
    """A decoder without its encoder's states."""
    torch.manual_seed(0)
    model, x = Decoders(), torch.randn(4, 8)
    plain: Any = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(
        model, 0.5, "uniform", example_inputs=(x, x), unit=unit, scale=scale
    )
    for training, factor in ((True, {"train": 2.0}), (False, {"eval": 0.5})):
        times = factor.get(scale, 1.0)
        hooks = [
            layer.own.register_forward_hook(lambda *call, times=times: times * call[-1])
            for layer in plain.layers
        ]
        expected = plain(x)
        for hook in hooks:
            hook.remove()
        with depth.fixed({}):
            torch.testing.assert_close(model.train(training)(x), expected)
        with depth.fixed({block.name: False for block in depth.blocks}):
            assert torch.equal(model(x), x)
    model.train()(x).sum().backward()


@pytest.mark.parametrize("unit", ["block", "branch"])
def test_more_branches_than_in_the_example_are_refused_in_training(unit: Any) -> None:
    torch.manual_seed(0)
    model, x = Decoders(), torch.randn(4, 8)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x, unit=unit, scale="train")
    with pytest.raises(
        sd.ChangedModelError, match=r'"layers\.0" .*"memory", where the example had'
    ):
        model.train()(x, x)
    with (
        depth.fixed({block.name: False for block in depth.blocks}),
        pytest.raises(sd.ChangedModelError, match="pass the example that you train with"),
    ):
        model.eval()(x, x)
    assert torch.equal(model.eval()(x, x), copy.deepcopy(depth).remove().eval()(x, x))


class Doubling(nn.Module):
    """Hands on twice its input, unless it is told not to; or the first of two in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor | tuple[Tensor, Tensor], double: bool = True) -> Tensor:
        x = x if isinstance(x, Tensor) else x[0]
        x = 2 * x if double else x
        return x + self.branch(x)


class Doublings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Doubling() for _ in range(6))

    def forward(self, x: Tensor, *, paired: bool = False, **flags: bool) -> Tensor:
        for layer in self.layers:
            x = layer((x, x + 1) if paired else x, **flags)
        return x


def drawn_without_blocks(**example: bool) -> tuple[nn.Module, Tensor]:
    """A model in training whose next forward drops every block, and its input."""
    torch.manual_seed(0)
    model, x = Doublings().train(), torch.randn(2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sd.StochasticDepthWarning)
        depth = sd.apply_stochastic_depth(
            model, 1 - 1e-9, "uniform", example_inputs=x, example_kwargs=example, scale="none"
        )
    assert str(depth).count("whole") == 6
    return model, x


@pytest.mark.filterwarnings("ignore:block .* is called with")
def test_a_drawn_block_is_called_without_the_flag_that_it_was_watched_with() -> None:
    model, x = drawn_without_blocks(double=False)
    assert torch.equal(model(x, double=False), x)
    assert torch.equal(model(x), 64 * x)


def test_a_drawn_block_hands_on_a_tensor_out_of_its_argument() -> None:
    model, x = drawn_without_blocks(double=False, paired=True)
    assert torch.equal(model(x, double=False, paired=True), x)


class Handing(nn.Module):
    """Hands on what it is given beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(
        self, x: Tensor, memory: Tensor | None = None, *, other: Any = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        return x + self.branch(x), memory, other


class HandingOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Handing() for _ in range(6))

    def forward(self, x: Tensor, *besides: Tensor, **named: Any) -> tuple[Any, ...]:
        result, (besides, named) = (2 * x, None, None), tree_map(_doubled, (besides, named))
        for layer in self.layers:
            result = layer(result[0], *besides, **named)
        made: tuple[Any, ...] = tree_map(_doubled, result)
        return made


def _doubled(leaf: Any) -> Any:
    return 2 * leaf if isinstance(leaf, Tensor) else leaf


def _handing_on(example: tuple[Tensor, ...], **named: Any) -> HandingOn:
    model = HandingOn().train()
    options: dict[str, Any] = {"example_inputs": example, "example_kwargs": named}
    depth = sd.apply_stochastic_depth(model, 0.2, **options)
    assert str(depth).count("whole") == 6
    return model


def assert_handed_on(model: HandingOn, *args: Tensor, **named: Any) -> None:
    """By dropped blocks as by those that run, drawn and forced."""
    depth, plain = sd.get_stochastic_depth(model), copy.deepcopy(model)
    expected = sd.get_stochastic_depth(plain).remove()(*args, **named)
    with depth.fixed(closed(depth)):
        results = [model(*args, **named)]
    assert torch.equal(results[0][0], 4 * args[0])
    results += [model(*args, **named) for _ in range(8)]
    for result in results:
        for found, wanted in zip(result[1:], expected[1:], strict=True):
            assert (found is wanted is None) or torch.equal(found, wanted)


@pytest.mark.parametrize("same", ["none", "two", "all"])
def test_one_tensor_in_several_places_of_the_example_is_told_apart(same: str) -> None:
    """What is handed on is known by its identity."""
    x, memory, other = (torch.randn(2, 8) for _ in range(3))
    memory, other = {"none": (memory, other), "two": (memory, memory), "all": (x, x)}[same]
    model = _handing_on((x, memory), other=other)
    assert_handed_on(model, torch.randn(2, 8), torch.randn(2, 8), other=torch.randn(2, 8))


def test_a_block_that_has_nothing_to_hand_on_hands_on_its_default() -> None:
    model = _handing_on((torch.randn(2, 8), torch.randn(2, 8)), other=torch.randn(2, 8))
    x = torch.randn(2, 8)
    assert_handed_on(model, x, x + 1, other=x + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sd.StochasticDepthWarning)
        assert_handed_on(model, x)
        assert_handed_on(model, x, x + 1)
        assert_handed_on(model, x, other=x + 2)


def test_what_lies_inside_of_an_argumentassert_handed_on() -> None:
    x = torch.randn(2, 8)
    model = _handing_on((x, x), other={"a": x, "b": [x, (x, 3)], "c": None})
    others: Any = {"a": x + 1, "b": [x + 2, (x + 3, 3)], "c": None}
    depth = sd.get_stochastic_depth(model)
    with depth.fixed(closed(depth)):
        forced = model(x, x + 4, other=others)[2]
    for found in (forced, *(model(x, x + 4, other=others)[2] for _ in range(8))):
        assert torch.equal(found["a"], 4 * others["a"])
        assert torch.equal(found["b"][0], 4 * others["b"][0])
        assert torch.equal(found["b"][1][0], 4 * others["b"][1][0])
        assert found["b"][1][1] == 3
        assert found["c"] is None


class Kind(enum.Enum):
    PLAIN = 0
    SQUASHED = 1


class Flagged(Masked):
    def inner(self, x: Tensor, flag: Any) -> Tensor:
        x = super().forward(x)
        is_on = flag in (True, Kind.SQUASHED, (True,), (2.0, True)) or (
            isinstance(flag, dict) and flag["on"]
        )
        return x.tanh() if is_on else x

    def forward(self, x: Tensor, flag: Any) -> Tensor:  # type: ignore[override]
        return self.inner(x, flag)


class Passing(Flagged):
    """Declares nothing of what it takes."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs)


class Behind(Flagged):
    """Takes more streams than it names, and a flag behind them."""

    def forward(self, x: Tensor, *rest: Tensor, flag: Any = False) -> Tensor:  # type: ignore[override]
        return self.inner(x + 0.0 * sum(rest), flag)


class Flags(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(6))

    def forward(self, x: Tensor, flag: Any) -> Tensor:
        more = (x, x) if isinstance(self.layers[0], Behind) else ()
        for layer in self.layers:
            x = layer(x, *more, flag=flag)
        return x


@pytest.mark.parametrize("kind", [Flagged, Passing, Behind])
@pytest.mark.parametrize(
    ("shown", "passed"),
    [
        (False, True),
        (Kind.PLAIN, Kind.SQUASHED),
        ((False,), (True,)),
        ({"on": False}, {"on": True}),
        ({"on": False, "size": 3}, {"on": True, "size": 4}),
        ((1.0, False), (2.0, True)),
    ],
    ids=["bool", "enum", "tuple", "dict", "dict of several kinds", "tuple of several kinds"],
)
@pytest.mark.filterwarnings("ignore:.*unlike in the example")
def test_flags_of_any_kind(kind: type[nn.Module], shown: Any, passed: Any) -> None:
    torch.manual_seed(0)
    plain: Any = Flags(kind).train()
    model, x = copy.deepcopy(plain), torch.randn(2, 8)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=(x, shown), scale="none")
    for flag in (shown, passed):
        with depth.fixed({"layers.1": False, "layers.5": False}):
            found = model(x, flag)
        twin = copy.deepcopy(plain)
        for number in (1, 5):
            twin.layers[number].branch.register_forward_hook(lambda module, args, out: out * 0)
        assert torch.equal(found, twin(x, flag))


class Noting(Masked):
    """Is called with what describes the image, which is another one each time."""

    def forward(self, x: Tensor, flag: Any) -> Tensor:  # type: ignore[override]
        return x + self.branch(x)


def test_names_of_files_are_no_flags() -> None:
    torch.manual_seed(0)
    model, x = Flags(Noting), torch.randn(2, 8)
    options: Any = {"example_inputs": (x, {"file": "0.png", "height": 3}), "scale": "none"}
    depth = sd.apply_stochastic_depth(model, 0.2, **options)
    ran: list[str] = []
    for name, layer in model.layers.named_children():
        branch: Any = layer.branch
        branch.register_forward_hook(lambda *_, name=name: ran.append(name))
    with depth.fixed({"layers.1": False}), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, {"file": "1.png", "height": 4})
    assert ran == ["0", "2", "3", "4", "5"]
