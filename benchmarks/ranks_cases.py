"""What `ranks.py` compares: networks, rates, and ways in which ranks draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import stochastic_depth as sd
from imagelib.cifar_resnet import CifarResNet

DRAWS = {
    "same": sd.Draw(across_ranks="same"),
    "different": sd.Draw(across_ranks="different"),
    "different, balanced": sd.Draw(across_ranks="different", sampling="balanced"),
}
RATES = {"0.5 linear": (0.5, "linear"), "0.2 uniform": (0.2, "uniform")}


@dataclass(frozen=True)
class Network:
    """A network, and how many images of 32 pixels make its batch."""

    make: Callable[[], nn.Module]
    batch: int

    def data(self, seed: int) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        torch.manual_seed(seed)
        return torch.randn(self.batch, 3, 32, 32), torch.randint(0, 10, (self.batch,))


def _transformer() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=128, depth=24, num_heads=4, num_classes=10
    )
    return model


NETWORKS = {
    "ResNet-110": Network(lambda: CifarResNet(110), 32),
    "24-layer transformer": Network(_transformer, 8),
}


def rates_of(network: Network, drop_rate: float, distribution: str) -> tuple[float, ...]:
    """The drop rates of a network's blocks."""
    images, _ = network.data(0)
    model = network.make()
    depth = sd.apply_stochastic_depth(model, drop_rate, distribution, example_inputs=images[:2])
    return tuple(block.drop_rate for block in depth.blocks)
