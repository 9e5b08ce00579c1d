"""Promise: what a block does besides its output is not skipped silently with it."""

from __future__ import annotations

import copy
from collections import UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.oldest
SEEN: list[Any] = []


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.calls, self.kept = 0, [torch.zeros(1)]
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(8))

    def branch(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Counts(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Collects(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x.mean())
        return super().forward(x)


class CollectsOutside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.mean())
        return super().forward(x)


class HandsOnOutside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x)
        return super().forward(x)


class Averages(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return super().forward(x)


class Rebinds(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return super().forward(x)


class RebindsItsOwn(Plain):
    """A buffer whose name begins with an underscore."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: Tensor
        self.register_buffer("_steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self._steps = self._steps + 1
        return super().forward(x)


class Reversing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Reverses(Plain):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Reversing.apply(super().forward(x))
        return result


class Caches(Plain):
    """A constant that is made once is no effect."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 8)
        return x + self.branch(x * self.table)


def network(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), *(kind() for _ in range(6)))


@pytest.mark.parametrize(
    "kind", [Counts, Collects, CollectsOutside, HandsOnOutside, Averages, Rebinds]
)
def test_it_is_done_in_a_dropped_block(kind: type[nn.Module]) -> None:
    model, x = network(kind), torch.randn(4, 3)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    SEEN.clear()
    before = [(b.calls, len(b.kept), b.mean.clone()) for b in model[1:]]
    with depth.fixed({block.name: False for block in depth.blocks}):
        model.train()(x)
    after = [(b.calls, len(b.kept), b.mean.clone()) for b in model[1:]]
    changed = [
        a[0] > b[0] or a[1] > b[1] or not torch.equal(a[2], b[2])
        for a, b in zip(after, before, strict=True)
    ]
    assert all(changed) or len(SEEN) == 6


def test_a_buffer_of_any_name_is_bound_anew_in_a_dropped_block() -> None:
    model, x = network(RebindsItsOwn), torch.randn(4, 3)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    before = [block._steps.item() for block in model[1:]]
    with depth.fixed({block.name: False for block in depth.blocks}):
        model.train()(x)
    assert [block._steps.item() for block in model[1:]] == [steps + 1 for steps in before]


def test_a_function_of_its_own_backward_is_called_in_a_dropped_block() -> None:
    model, x = network(Reverses), torch.randn(4, 3)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    given = torch.randn(4, 8, requires_grad=True)
    with depth.fixed({block.name: False for block in depth.blocks}):
        model.train()[1](given).sum().backward()
    assert given.grad is not None
    assert bool((given.grad == -1).all())


@pytest.mark.parametrize("kind", [Plain, Caches])
def test_others_are_skipped(kind: type[nn.Module]) -> None:
    depth = sd.apply_stochastic_depth(network(kind), 0.2, example_inputs=torch.randn(4, 3))
    assert str(depth).count("skipped whole") == 6


class AveragesItsBranch(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        self.mean.lerp_(y.detach().mean(0), 0.1)
        return x + y


def test_a_kept_value_of_the_branch_warns() -> None:
    with pytest.warns(sd.StochasticDepthWarning, match='block "1" keeps a value of its branch'):
        sd.apply_stochastic_depth(
            network(AveragesItsBranch), 0.2, example_inputs=torch.randn(4, 3), scale="none"
        )


class Writes(Plain):
    """Puts its sum into a dict that it is given, and returns nothing."""

    def forward(self, stream: Any) -> None:  # type: ignore[override]
        stream["x"] = stream["x"] + self.branch(stream["x"])


class ByWriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Writes() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        stream = {"x": x}
        for layer in self.layers:
            layer(stream)
        return stream["x"]


def test_a_kept_sum_is_no_kept_branch() -> None:
    """Warnings are errors here."""
    model, x = ByWriting(), torch.randn(4, 8)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    assert len(depth.blocks) == 6
    with depth.fixed({block.name: False for block in depth.blocks}):
        assert torch.equal(model(x), x)


class Appends(Plain):
    """Puts its output into a list, or an object, that it is given."""

    def forward(self, x: Tensor, seen: Any) -> Tensor:  # type: ignore[override]
        x = super().forward(x)
        if isinstance(seen, list):
            seen.append(x)
        else:
            seen.last = x + getattr(seen, "last", 0.0)
        return x


class Holder:
    """Something with attributes."""


class Pyramid(nn.Module):
    def __init__(self, kind: type[nn.Module], make: Any) -> None:
        super().__init__()
        self.stem, self.make = nn.Linear(3, 8), make
        self.blocks = nn.ModuleList(kind() for _ in range(6))

    def forward(self, x: Tensor) -> Any:
        seen, x = self.make(), self.stem(x)
        for block in self.blocks:
            x = block(x, seen)
        return sum(seen) if isinstance(seen, list) else seen.last


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("make", [list, Holder])
def test_what_is_put_into_an_argument_is_put_there(make: Any, mode: Any) -> None:
    torch.manual_seed(0)
    plain: Any = Pyramid(Appends, make).train()
    model, x = copy.deepcopy(plain), torch.randn(4, 3)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, mode=mode, scale="none")
    with depth.fixed({"blocks.1": False, "blocks.4": False}):
        found = model(x)
    for number in (1, 4):
        plain.blocks[number].linear.register_forward_hook(lambda module, args, out: out * 0)
    assert torch.equal(found, plain(x))


class InAnObject(Plain):
    """A norm behind the sum, of a stream that lies in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.behind = nn.LayerNorm(8)

    def forward(self, graph: Any) -> Any:
        graph.x = self.behind(graph.x + self.branch(graph.x)).tanh()
        return graph


class Graphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(3, 8), nn.ModuleList(InAnObject() for _ in range(6))

    def forward(self, x: Tensor) -> Any:
        graph: Any = Holder()
        graph.x = self.stem(x)
        for block in self.blocks:
            graph = block(graph)
        return graph


def test_a_stream_in_an_object() -> None:
    torch.manual_seed(0)
    plain: Any = Graphs().train()
    model, x = copy.deepcopy(plain), torch.randn(4, 3)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    for number in (5, 2):
        with depth.fixed({f"blocks.{number}": False}):
            found = model(x).x
        twin = copy.deepcopy(plain)
        twin.blocks[number].linear.register_forward_hook(lambda module, args, out: out * 0)
        assert torch.equal(found, twin(x).x)


class Counting(Plain):
    """In what its attributes hold."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.things, self.other = {"calls": 0}, deque([0], maxlen=9), Holder()

    def forward(self, x: Tensor) -> Tensor:
        self.numbers["calls"] += 1
        self.things.append(self.numbers["calls"])
        return super().forward(x)


def test_what_attributes_hold_is_counted_on_and_left_as_it_was_by_apply() -> None:
    model, x = network(Counting), torch.randn(4, 3)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    assert [block.numbers["calls"] for block in model[1:]] == [0] * 6
    assert [len(block.things) for block in model[1:]] == [1] * 6
    with depth.fixed({"3": False}):
        model(x)
    assert [block.numbers["calls"] for block in model[1:]] == [1] * 6


class Clipped(Plain):
    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = super().__call__(x).clamp(-0.5, 0.5)
        return result


def test_what_surrounds_a_forward_is_not_skipped_silently() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(sd.RefusedBlockError, match='"1": what its hooks, or its `__call__`, do'):
        sd.apply_stochastic_depth(network(Clipped), 0.2, example_inputs=x)
    hooked = network(Plain)
    hooked[3].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    for mode in ("batch", "sample"):
        with pytest.raises(sd.RefusedBlockError, match="'!3'"):
            sd.apply_stochastic_depth(hooked, 0.2, example_inputs=x, mode=mode)
    looked_at = network(Plain)
    looked_at[3].register_forward_pre_hook(lambda module, args: None)
    depth = sd.apply_stochastic_depth(looked_at, 0.2, example_inputs=x)
    assert len(depth.blocks) == 6


def input_into(seen: list[Tensor], block: nn.Module) -> None:
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))


def view_of_input_into(seen: list[Tensor], block: nn.Module) -> None:
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0].view(-1, 8)))


def output_into(seen: list[Tensor], block: nn.Module) -> None:
    block.register_forward_hook(lambda module, args, output: seen.append(output))


def detached_output_into(seen: list[Tensor], block: nn.Module) -> None:
    block.register_forward_hook(lambda module, args, output: seen.append(output.detach()))


class Tapped(nn.Module):
    """Reads what hooks on some of its blocks have kept, as DPT does."""

    def __init__(self, hook: Callable[[list[Tensor], nn.Module], None]) -> None:
        super().__init__()
        self.body, self.seen = network(Plain), list[Tensor]()
        for number in (2, 3, 6):
            hook(self.seen, self.body[number])

    def forward(self, x: Tensor) -> Tensor:
        self.seen.clear()
        return torch.stack([self.body(x), *self.seen]).sum(0)


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize(
    "hook", [input_into, view_of_input_into, output_into, detached_output_into]
)
def test_hooks_that_keep_what_they_see_fire_where_a_block_is_dropped(
    hook: Callable[[list[Tensor], nn.Module], None], mode: Any, *, called_before: bool
) -> None:
    x = torch.randn(6, 3)
    model = Tapped(hook)
    if called_before:  # what was kept then must not be taken for what is kept now
        model(x)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, mode=mode, scale="none")
    assert len(depth.blocks) == 6
    assert str(depth).count("skipped whole") == (3 if mode == "batch" else 0)
    for dropped in ([1, 3], [2, 3, 6]):
        twin, batch = Tapped(hook), torch.randn(6, 3)
        for number in dropped:
            end = twin.get_submodule(f"body.{number}.linear")
            end.register_forward_hook(lambda module, args, output: output * 0)
        with depth.fixed({f"body.{number}": False for number in dropped}):
            assert torch.equal(model.train()(batch), twin.train()(batch))


class Experts(nn.Module):
    """Leaves a loss in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(8, 2), nn.Linear(8, 8)
        self.loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        chances = self.router(x).softmax(-1)
        self.loss = chances.mean(0).square().sum()
        out: Tensor = chances[:, :1] * self.expert(x)
        return out


class Routed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.experts(self.norm(x)))
        return out


def test_a_loss_that_a_branch_leaves_behind_is_named() -> None:
    with pytest.warns(sd.StochasticDepthWarning, match=r'"1\.experts\.loss" .* 5 others'):
        sd.apply_stochastic_depth(network(Routed), 0.2, example_inputs=torch.randn(4, 3))


class Slotted:
    """An object without a `__dict__`."""

    __slots__ = ("count", "found")

    def __init__(self) -> None:
        self.count = 0
        self.found: list[Any] = []


@dataclass
class Record:
    last: Any = None
    found: list[Any] = field(default_factory=list)


class Found(NamedTuple):
    found: list[Any]


class Into(Plain):
    """Puts its output into something that it is given."""

    def forward(self, x: Tensor, into: Any) -> Tensor:  # type: ignore[override]
        x = super().forward(x)
        PUTS[type(into)](into, x)
        return x


PUTS: dict[type, Any] = {
    Slotted: lambda into, x: into.found.append(x),
    Record: lambda into, x: into.found.append(x),
    Found: lambda into, x: into.found.append(x),
    UserDict: lambda into, x: into.update({len(into): x}),
    dict: lambda into, x: into["found"].append(x),
    tuple: lambda into, x: into[0].append(x),
    list: lambda into, x: into[0].append(x),
    deque: lambda into, x: into.append(x),
    SimpleNamespace: lambda into, x: into.found["all"].append(x),
}
MAKES: dict[type, Any] = {
    **{kind: kind for kind in (Slotted, Record, UserDict, deque)},
    Found: lambda: Found([]),
    dict: lambda: {"found": []},
    tuple: lambda: ([], None),
    list: lambda: [[]],
    SimpleNamespace: lambda: SimpleNamespace(found={"all": []}),
}


class IntoIt(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind, self.blocks = kind, nn.ModuleList(Into() for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        into = MAKES[self.kind]()
        for block in self.blocks:
            x = block(x, into)
        return x, into


def tensors(value: Any) -> list[Tensor]:
    """In any of these."""
    if isinstance(value, Tensor):
        return [value]
    parts: Any = value.values() if isinstance(value, dict | UserDict) else ()
    if isinstance(value, list | tuple | deque):
        parts = value
    elif isinstance(value, Slotted | Record | SimpleNamespace):
        found = value.found
        parts = found.values() if isinstance(found, dict) else found
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("kind", [*PUTS])
def test_what_a_dropped_block_puts_into_something_nested_arrives(kind: type, mode: Any) -> None:
    model, x = IntoIt(kind), torch.randn(8, 8)
    depth = sd.apply_stochastic_depth(model, 0.3, example_inputs=x, mode=mode, scale="none")
    with depth.fixed({block.name: False for block in depth.blocks}):
        _, into = model.train()(x)
    assert [torch.equal(each, x) for each in tensors(into)] == [True] * 6
    for _ in range(5):
        out, into = model(x)
        assert [each.shape for each in tensors(into)] == [x.shape] * 6
        assert torch.equal(tensors(into)[-1], out)


def _in_a_list(block: Any) -> None:
    block.stats["calls"][0] += 1


def _in_an_object(block: Any) -> None:
    block.object.stats["calls"] += 1


def _in_slots(block: Any) -> None:
    block.holder.count += 1


def _in_a_default(block: Any) -> None:
    block.default["calls"].append(1)


class CountsDeeply(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.stats, self.object = {"calls": [0]}, SimpleNamespace(stats={"calls": 0})
        self.holder = Slotted()
        self.default: dict[str, list[int]] = defaultdict(list)
        self.count: Any = None

    def read(self) -> list[int]:
        return [
            self.stats["calls"][0],
            self.object.stats["calls"],
            self.holder.count,
            len(self.default["calls"]),
        ]

    def forward(self, x: Tensor) -> Tensor:
        self.count(self)
        return super().forward(x)


@pytest.mark.parametrize("count", [_in_a_list, _in_an_object, _in_slots, _in_a_default])
def test_a_count_in_something_nested_goes_on_in_a_dropped_block(count: Any) -> None:
    model, x = network(CountsDeeply), torch.randn(4, 3)
    for block in model[1:]:
        block.count = count
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    before = [sum(block.read()) for block in model[1:]]
    with depth.fixed({block.name: False for block in depth.blocks}):
        model.train()(x)
    assert [sum(block.read()) - n for block, n in zip(model[1:], before, strict=True)] == [1] * 6
