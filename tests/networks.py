"""Small networks, one of each kind that matters, made of torch alone; and how they are trained.

They live in a module of their own so that they can be pickled. A fresh network hides mistakes
(norms and biases that do nothing yet), so `make` moves every parameter and buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd

WIDTH = 8


class BasicBlock(nn.Module):
    """Post-activation (He et al. 2016): a ReLU behind the sum, a projection where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        return F.relu(skip + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """Six blocks in two stages; `stages.1.0` has a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 1, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.stages = nn.Sequential(
            nn.Sequential(*(BasicBlock(WIDTH, WIDTH) for _ in range(3))),
            nn.Sequential(
                BasicBlock(WIDTH, 2 * WIDTH, 2),
                *(BasicBlock(2 * WIDTH, 2 * WIDTH) for _ in range(2)),
            ),
        )
        self.head = nn.Linear(2 * WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class PreNormLayer(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class PostNormLayer(PreNormLayer):
    """`norm(x + attention(x))`, then `norm(x + mlp(x))`: no such layer returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.mlp(x))


class ExplicitLayer(PreNormLayer):
    """A pre-norm layer that says where its residual connections are."""

    def __init__(self) -> None:
        super().__init__()
        self.add1, self.add2 = sd.Residual(), sd.Residual()

    def attend(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        return self.attention(y, y, y, need_weights=False)[0]

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.add2(self.add1(x, self.attend), self.feed_forward)


class Transformer(nn.Module):
    """Six layers over vectors, and a head over their mean."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(6))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Residual(nn.Module):
    """The smallest residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return self.linear(F.gelu(self.norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class TwoBranches(nn.Module):
    """The smallest residual block of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(F.gelu(x))
        return x + self.second(F.gelu(x))


class Bypass(nn.Module):
    """A module of the branch computes with the output of another, which also reaches the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        y = self.first(x.tanh())
        return y + self.second(y.tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class DenseBypass(Bypass):
    """The same, joined by a concatenation."""

    def branch(self, x: Tensor) -> Tensor:
        y = self.first(x.tanh())
        return torch.cat([y, self.second(y.tanh())], -1).view(-1, 2, WIDTH).sum(1)


class InLineBypass(Bypass):
    """The same, with a value that is computed in line on both ways."""

    def branch(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x.tanh()))
        return 0.5 * y - self.second(y.tanh())


class ProductBypass(Bypass):
    """The same, joined by a product: a factor on its last module's output will do."""

    def branch(self, x: Tensor) -> Tensor:
        y = self.first(x.tanh())
        return y * self.second(y.tanh())


class ProductPostNorm(ProductBypass):
    """The same, not skipped whole: the branch is gated at its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class TwoOutputs(nn.Module):
    """A block that also hands out a value from inside of its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *earlier = x if isinstance(x, tuple) else (x,)
        inside = self.first(x)
        return (x + self.second(inside.relu()), *earlier, inside)


def residuals(blocks: int = 8, kind: Callable[[], nn.Module] = Residual) -> nn.Sequential:
    """A stack of them, the fastest network with many gates."""
    return nn.Sequential(*(kind() for _ in range(blocks)))


class Shared(nn.Module):
    """One layer called several times in a forward, as in ALBERT."""

    def __init__(self, calls: int = 6) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(3, WIDTH), Residual(), nn.Linear(WIDTH, 4)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(self.calls):
            x = self.layer(x)
        return self.head(x)


class Outer(nn.Module):
    """A residual block whose branch holds residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Residual(), Residual())
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.inner(x))


def nested(blocks: int = 3) -> nn.Sequential:
    """Blocks within blocks: for each outer one, two inner ones."""
    return nn.Sequential(nn.Linear(3, WIDTH), *(Outer() for _ in range(blocks)))


class Wrapped(nn.Module):
    """A backbone and a head, as many projects hold them: the root need not be called."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = residuals(6), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def images(batch: int = 4) -> Tensor:
    return vectors(batch, 3, 6, 6)


def vectors(*shape: int, seed: int = 1) -> Tensor:
    """Random numbers, the same at every call and on every device."""
    numbers = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=numbers, device="cpu").to(torch.get_default_device())


def sequences(batch: int = 4) -> Tensor:
    return vectors(batch, 5, 3)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet": (ResNet, images),
    "pre-norm": (lambda: Transformer(PreNormLayer), sequences),
    "post-norm": (lambda: Transformer(PostNormLayer), sequences),
    "explicit": (lambda: Transformer(ExplicitLayer), sequences),
    "shared": (Shared, sequences),
    "nested": (nested, sequences),
}
"""Each kind of network, and what to call it with."""


def make(name: str) -> tuple[Any, Tensor]:
    """A network of the table, the same at every call, and its example (`Any`: its attributes)."""
    build, example = NETWORKS[name]
    return settled(build), example()


def gated(
    name: str, drop_rate: Any = 0.2, **options: Any
) -> tuple[Any, Tensor, sd.StochasticDepth]:
    """A network of the table with stochastic depth, at one rate, its example, and the handle."""
    model, x = make(name)
    if isinstance(drop_rate, float):
        options = {"drop_distribution": "uniform", **options}
    return model, x, sd.apply_stochastic_depth(model, drop_rate, example_inputs=x, **options)


def settled(build: Callable[[], nn.Module]) -> Any:
    """A network with weights that do something, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point():
                    tensor.add_(torch.rand_like(tensor) - 0.5, alpha=0.4)
    return model


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, **options)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, example: Tensor, steps: range | int
) -> None:
    """Some steps; each has data of its own, told by its number alone."""
    model.train()
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        model(batch(example, step)).square().mean().backward()
        optimizer.step()


def batch(example: Tensor, number: int) -> Tensor:
    """The data of a step or microbatch."""
    return vectors(*example.shape, seed=number).to(example.device)


def assert_same(left: nn.Module, right: nn.Module) -> None:
    """Every parameter and buffer, bit by bit."""
    ours, theirs = left.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_equal(left: Any, right: Any) -> None:
    """Tensors, or dictionaries of them: the same values, without a tolerance."""
    torch.testing.assert_close(left, right, rtol=0, atol=0)
