"""Networks of several streams, and loops that are written out in the model's own forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import WIDTH


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)
    )


class Coupling(nn.Module):
    """Of two streams (RevNet): `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(), mlp()

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)


class Crossed(Coupling):
    """The second stream first."""

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y2 = self.g(x1) + x2
        return self.f(y2) + x1, y2


class Halved(Coupling):
    """Both streams are halves of one tensor."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return torch.cat(Coupling.forward(self, *x.chunk(2, -1)), -1)


class Joint(nn.Module):
    """Attention over two streams, as multimodal diffusion transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.a, self.b = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.mix(torch.cat([a, b], -1)).tanh()
        return self.a(mixed), self.b(mixed)


class OneLayer(Joint):
    """Both are parts of one layer's output."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y, z = self.mix(torch.cat([a, b], -1).tanh()).chunk(2, -1)
        return y, z


class JointBlock(nn.Module):
    """One module ends the branches of two streams."""

    def __init__(self, joint: type[nn.Module] = Joint) -> None:
        super().__init__()
        self.norm_a, self.norm_b, self.joint = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), joint()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        da, db = self.joint(self.norm_a(a), self.norm_b(b))
        return a + da, b + db


class Swapped(JointBlock):
    """Adds the outputs in the other order."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        da, db = self.joint(self.norm_a(a), self.norm_b(b))
        b = b + db
        return a + da, b


class Streams(nn.Module):
    """Six blocks over two streams."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(3, 2 * WIDTH), nn.ModuleList(kind() for _ in range(6))

    def forward(self, x: Tensor) -> Any:
        streams = self.stem(x)
        if isinstance(self.blocks[0], Halved):
            for block in self.blocks:
                streams = block(streams)
            return streams
        a, b = streams.chunk(2, -1)
        for block in self.blocks:
            a, b = block(a, b)
        return torch.cat([a, b], -1)


class Positioned(nn.Module):
    """A position that is added once on the way into the branch is no stream."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return x + self.g((position + self.f(x)).tanh())


class WithPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(3, WIDTH), nn.ModuleList()
        self.blocks.extend(Positioned() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        position = x.cumsum(-1)
        for block in self.blocks:
            x = block(x, position)
        return x


class GraphLayer(nn.Module):
    """Messages along edges, added to each node's own value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.message = nn.LayerNorm(WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.update = nn.Linear(WIDTH, WIDTH)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        x = self.norm(nodes)
        source, target = edges
        messages = self.message(torch.cat([x[source], x[target]], 1)).relu()
        gathered = torch.zeros_like(x).index_add(0, target, messages)
        return nodes + self.update(gathered)


class TimedBlock(nn.Module):
    """As in a diffusion model's U-net: the time is added in the middle of the branch."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, given), nn.Conv2d(given, made, 3, padding=1)
        self.time = nn.Linear(WIDTH, made)
        self.norm2, self.conv2 = nn.GroupNorm(2, made), nn.Conv2d(made, made, 3, padding=1)
        self.skip = nn.Conv2d(given, made, 1) if given != made else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Diffusion(nn.Module):
    """Down, and up again with what was on the way down beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([TimedBlock(8, 8), TimedBlock(8, 16)])
        self.middle = nn.ModuleList([TimedBlock(16, 16), TimedBlock(16, 16)])
        self.up = nn.ModuleList([TimedBlock(32, 8), TimedBlock(16, 8)])
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x, kept = self.stem(x), []
        for block in self.down:
            x = block(x, time)
            kept.append(x)
            x = F.avg_pool2d(x, 2)
        for block in self.middle:
            x = block(x, time)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, kept.pop()], 1), time)
        return self.out(x)


# Loops in the model's own forward.


class Mixer(nn.Module):
    """Holds a sum of its own: what goes in directly."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.x, self.out = (nn.Linear(8, 8) for _ in range(3))
        self.direct = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        u = self.inner(x)
        return self.out(torch.relu(self.x(u)) + u * self.direct)


class Handed(nn.Module):
    """A layer whose sum is taken in the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(8), Mixer()

    def forward(self, h: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = h if residual is None else h + residual
        return self.mixer(self.norm(residual)), residual


class Loop(nn.Module):
    layers: Any

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layers = nn.ModuleList(Handed() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        h, residual = self.embed(x), None
        for layer in self.layers:
            h, residual = layer(h, residual)
        return h + residual


class LoopInLine(Loop):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer.mixer(layer.norm(x))
        return x


class LoopInDict(LoopInLine):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(n): Handed() for n in range(6)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers.values():
            x = x + layer.mixer(layer.norm(x))
        return x
