"""Networks as strangers write them, in styles of their own, none with this library in mind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PreAct(nn.Module):
    """Pre-activation (He et al. 2016b): norms first, the projection reads the activated input."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.bn_a = nn.BatchNorm2d(cin)
        self.conv_a = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn_b = nn.BatchNorm2d(cout)
        self.conv_b = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        if stride != 1 or cin != cout:
            self.proj = nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        o = F.relu(self.bn_a(x))
        sc = self.proj(o) if hasattr(self, "proj") else x
        o = self.conv_a(o)
        o = self.conv_b(F.relu(self.bn_b(o)))
        o += sc
        return o


class PreActNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 1, 1)
        self.body = nn.Sequential(
            PreAct(8, 8, 1),
            PreAct(8, 8, 1),
            PreAct(8, 16, 2),
            PreAct(16, 16, 1),
            PreAct(16, 32, 2),
            PreAct(32, 32, 1),
        )
        self.bn = nn.BatchNorm2d(32)
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.body(self.first(x))))
        return self.out(F.adaptive_avg_pool2d(h, 1).flatten(1))


def double(c: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c, c, 3, padding=1),
        nn.GroupNorm(2, c),
        nn.SiLU(),
        nn.Conv2d(c, c, 3, padding=1),
        nn.GroupNorm(2, c),
    )


class Res(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.f = double(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.f(x))


class UNet(nn.Module):
    """U-shaped: residual blocks, skips by concatenation, one by addition, one around everything."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = nn.Conv2d(3, 8, 3, padding=1)
        self.enc1, self.enc2, self.mid = Res(8), Res(16), nn.Sequential(Res(32), Res(32))
        self.down1, self.down2 = nn.Conv2d(8, 16, 2, 2), nn.Conv2d(16, 32, 2, 2)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge, self.dec2, self.dec1 = nn.Conv2d(32, 16, 1), Res(16), Res(8)
        self.outc = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(self.inc(x))
        b = self.enc2(self.down1(a))
        m = self.mid(self.down2(b))
        u = self.dec2(self.merge(torch.cat([self.up2(m), b], 1)))
        u = self.dec1(self.up1(u) + a)
        return x + self.outc(u)


class InlineLoop(nn.Module):
    """Layers as pairs in a list, written out in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()),
                    nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
                ]
            )
            for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for pair in self.layers:
            mix, feed = pair.children()
            x = mix(x) + x
            x = feed(x) + x
        return x


class InlineLists(nn.Module):
    """Norms in one list, layers in another, zipped in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(6))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x).relu())
        return x


class Group(nn.Module):
    """Residual blocks within a residual group (as in RCAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Res(8), Res(8))
        self.tail = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(self.blocks(x))


class NestedGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.groups = nn.Sequential(Group(), Group(), Group())
        self.tail = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x)
        return self.tail(h + self.groups(h))


class ResidualPart(nn.Module):
    """A residual block that is the whole branch of another one's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        v = self.a(x)
        return v + self.b(F.gelu(v))


class ResidualInResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.part = nn.LayerNorm(8), ResidualPart()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(self.norm(x))


class Matryoshka(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.layers = nn.Sequential(*(ResidualInResidual() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.stem(x))


class Local(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x.tanh())


class Beside(nn.Module):
    """A layer that runs residual blocks of its own before its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.local, self.g = nn.Sequential(Local(), Local()), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x)
        return x + self.g(x.sigmoid())


class BesideNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Conv2d(3, 4, 3), nn.Sequential(*(Beside() for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.stem(x))


class Triangular(nn.Linear):
    """Half of its weights count, by a mask that is made anew, as large as the weights say."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * torch.ones_like(self.weight).tril())


class Masked(nn.Module):
    """Attention in line, with a mask that is made anew, as large as the activations say."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(4), nn.Linear(4, 12)
        self.out = Triangular(4, 4, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out((q @ k.mT + mask).softmax(-1) @ v)


class MaskedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(4, 4), nn.ModuleList(Masked() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        mask = torch.full_like(x @ x.mT, float("-inf")).triu(1)
        for layer in self.layers:
            x = layer(x, mask + torch.zeros_like(mask))
        return x
