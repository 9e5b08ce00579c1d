"""The networks of `gates.py`, each bound by Python, and how a twin leaves their blocks out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imagelib.cifar_resnet import BasicBlock, CifarResNet

Instead = Callable[[Any], nn.Module | None]


class ByHand:
    """Leaves blocks out of the containers that hold them.

    Args:
        model: A plain network whose blocks lie in containers that call them one after another.
        names: Of the blocks.
        instead: What is called in the place of a block; None where nothing is.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], instead: Instead) -> None:
        self._blocks: dict[str, nn.Module] = {name: model.get_submodule(name) for name in names}
        self._instead = {name: instead(block) for name, block in self._blocks.items()}
        parents = dict.fromkeys(name.rpartition(".")[0] for name in self._blocks)
        self._containers = {name: model.get_submodule(name) for name in parents}

    def leave_out(self, dropped: Set[str]) -> None:
        """Have these blocks left out, and all others run."""
        running = {
            name: self._instead[name] if name in dropped else block
            for name, block in self._blocks.items()
        }
        for parent, container in self._containers.items():
            inside = ((name.rpartition("."), module) for name, module in running.items())
            container._modules = {
                key: module for (owner, _, key), module in inside if owner == parent and module
            }


class Scaled(BasicBlock):
    """A block that multiplies its branch by hand."""

    factor: float

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch)) * self.factor
        return self.relu2(self.shortcut(x) + branch)


def scale_by_hand(model: nn.Module, factors: dict[str, float]) -> None:
    """Have these blocks multiply their branch."""
    for name, factor in factors.items():
        block = cast(Scaled, model.get_submodule(name))
        block.__class__, block.factor = Scaled, factor


def skip_path(block: BasicBlock) -> nn.Module | None:
    """What is left of a block without its branch: nothing, unless it shrinks the image."""
    if isinstance(block.shortcut, nn.Identity):
        return None  # the input comes out of a ReLU
    return nn.Sequential(block.shortcut, nn.ReLU())


class Normed(BasicBlock):
    """A block with a norm behind its sum: it can be skipped at its branch only."""

    norm: nn.BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.relu2(self.norm(self.shortcut(x) + branch))


def normed_resnet() -> CifarResNet:
    """ResNet-110 of such blocks."""
    model = CifarResNet(110)
    for block in blocks_of(model):
        block.__class__ = Normed
        block.norm = nn.BatchNorm2d(cast(BasicBlock, block).conv2.out_channels)
    return model


def normed_skip_path(block: Normed) -> nn.Module:
    """What is left of such a block without its branch."""
    shortcut = [] if isinstance(block.shortcut, nn.Identity) else [block.shortcut]
    return nn.Sequential(*shortcut, block.norm, block.relu2)


class Checkpointed(nn.Sequential):
    """Blocks that are run again in the backward, one by one, instead of keeping what they made."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def checkpointed_resnet() -> CifarResNet:
    """ResNet-110 with each block under a checkpoint."""
    model = CifarResNet(110)
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.__class__ = Checkpointed
    return model


def inside_of_a_checkpoint(block: BasicBlock) -> nn.Module:
    """What a checkpoint runs in the place of a block: something, also where nothing is left."""
    return skip_path(block) or nn.Identity()


def blocks_of(model: CifarResNet) -> Iterator[nn.Module]:
    """Its residual blocks."""
    for stage in (model.layer1, model.layer2, model.layer3):
        yield from stage


class Layer(nn.Module):
    """A decoder layer as transformers has them: called with keywords, returns a tuple."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> tuple[Tensor]:
        split = self.qkv(self.norm1(hidden_states)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        q, k = (_rotated(part, *position_embeddings) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, attention_mask)
        hidden_states = hidden_states + self.out(mixed.transpose(1, 2).flatten(2))
        return (hidden_states + self.mlp(self.norm2(hidden_states)),)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Decoder(nn.Module):
    """Layers that are called one after another, with a mask and rotary positions."""

    mask: Tensor
    angles: Tensor

    def __init__(self, layers: int = 32, tokens: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.register_buffer("mask", torch.ones(tokens, tokens, dtype=torch.bool).tril())
        self.register_buffer("angles", torch.randn(tokens, 8))

    def forward(self, x: Tensor) -> Tensor:
        positions = self.angles.cos(), self.angles.sin()
        for layer in self.layers:
            x = layer(x, attention_mask=self.mask, position_embeddings=positions)[0]
        return x


class Recurrent(nn.Module):
    """A block with a recurrence over its tokens, step by step in Python."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.cell = nn.LayerNorm(width), nn.GRUCell(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        state, tokens, states = torch.zeros_like(x[:, 0]), self.norm(x), []
        for t in range(x.shape[1]):
            state = self.cell(tokens[:, t], state)
            states.append(state)
        return x + self.out(torch.stack(states, 1))


class Scan(nn.Module):
    """A selective scan (Gu & Dao 2023) as transformers' Mamba runs it without its own kernels."""

    def __init__(self, width: int = 16, states: int = 4) -> None:
        super().__init__()
        self.norm, self.split = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, 4, groups=width, padding=3)
        self.rates, self.reads = nn.Linear(width, width), nn.Linear(width, 2 * states)
        self.decay = nn.Parameter(-torch.rand(width, states))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.split(self.norm(x)).chunk(2, dim=-1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        rate = F.softplus(self.rates(u))[..., None]
        writes, reads = self.reads(u).chunk(2, dim=-1)
        kept, added = torch.exp(rate * self.decay), rate * writes[:, :, None] * u[..., None]
        state, outputs = torch.zeros_like(added[:, 0]), []
        for t in range(x.shape[1]):
            state = kept[:, t] * state + added[:, t]
            outputs.append((state @ reads[:, t, :, None])[..., 0])
        return x + self.out(torch.stack(outputs, 1) * F.silu(gate))


def recurrence() -> nn.Module:
    """Six blocks with a recurrence."""
    return nn.Sequential(nn.Linear(3, 8), *(Recurrent() for _ in range(6)))


def scans() -> nn.Module:
    """24 blocks with a scan."""
    return nn.Sequential(nn.Linear(3, 16), *(Scan() for _ in range(24)))
