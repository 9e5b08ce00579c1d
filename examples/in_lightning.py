"""Trains a small ResNet on handwritten digits in a Lightning Trainer: one callback, no other line.

    python examples/in_lightning.py --epochs 10 --out runs/lightning
    python examples/in_lightning.py --epochs 20 --out runs/lightning --resume

What `--resume` continues goes on with the same draws; its loader shuffles anew. `plain.pt` holds a
plain model's weights.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import stochastic_depth as sd
from imagelib.cifar_resnet import CifarResNet
from stochastic_depth.integrations.lightning import StochasticDepth

HELD_OUT = 360


class Digits(LightningModule):
    """A ResNet that tells digits apart; nothing in it knows of stochastic depth."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.backbone = CifarResNet(layers)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.backbone(images), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        wrong = self.backbone(images).argmax(1) != labels
        self.log("error", wrong.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--layers", type=int, default=20, help="6 n + 2")
    parser.add_argument("--drop-rate", type=float, default=0.3, help="of the last block")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    training, held_out = loaders()
    module = Digits(options.layers)
    images = next(iter(training))[0]
    warmup = sd.linear_warmup(2 * len(training))
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        default_root_dir=options.out,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(options.out, "last", save_top_k=1),
            StochasticDepth(
                options.drop_rate, module="backbone", example_inputs=images[:2], schedule=warmup
            ),
        ],
    )
    checkpoint = options.out / "last.ckpt" if options.resume else None
    trainer.fit(module, training, held_out, ckpt_path=checkpoint)
    (metrics,) = trainer.validate(module, held_out, verbose=False)
    torch.save(module.backbone.state_dict(), options.out / "plain.pt")
    print(f"test error of the plain model {metrics['error']:.2%}")


def loaders() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """The digits as images of 8 pixels, shuffled alike at every run."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images[order], torch.tensor(digits.target)[order])
    training = TensorDataset(*data[:-HELD_OUT])
    held_out = TensorDataset(*data[-HELD_OUT:])
    return DataLoader(training, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=120)


if __name__ == "__main__":
    main()
