"""The command line, and what can be refused before anything is read."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from imagelib import InputError
from imagelib.command_line import Parser, between, device, whole
from imagelib.recipe import Time

# Huang et al. 2016, on CIFAR; and the demo, whose few steps need a gentler learning rate.
PAPER = {"image_size": None, "epochs": 500, "batch_size": 128, "lr": 0.1}
DIGITS = {"image_size": 16, "epochs": 24, "batch_size": 64, "lr": 0.01}


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    model: str
    data: str
    image_size: int | None
    drop_rate: float
    drop_distribution: str
    drop_warmup: Time
    mode: Literal["batch", "sample"]
    sampling: Literal["independent", "balanced"]
    across_ranks: Literal["same", "different"]
    label_smoothing: float
    epochs: int
    batch_size: int
    lr: float
    seed: int
    device: torch.device
    precision: Literal["32-true", "bf16-mixed"]
    out: Path
    resume: bool
    baseline: bool
    timeout: int

    def configuration(self, images: str, ranks: int) -> dict[str, object]:
        """What decides the result, and what a resumed run must therefore share.

        `images`: the fingerprint of the data, whatever its folder is called.
        `ranks`: how many processes train together.
        """
        free = ("data", "device", "out", "resume", "timeout")
        chosen = {name: value for name, value in vars(self).items() if name not in free}
        return {"images": images, **chosen, "drop_warmup": str(self.drop_warmup), "ranks": ranks}


def parse(arguments: Sequence[str] | None) -> Options:
    given = _parser().parse_args(arguments)
    for name, value in (DIGITS if given.data == "digits" else PAPER).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.across_ranks is None:
        given.across_ranks = "different" if given.mode == "sample" else "same"
    if given.out is None:
        if given.resume:
            raise InputError("--resume: say with --out which folder holds the run to go on with")
        given.out = Path("runs", time.strftime("images-%Y%m%d-%H%M%S"))
    return Options(**vars(given))


def _parser() -> Parser:
    parser = Parser(
        prog="images.py",
        description="Train an image classifier without and with stochastic depth, side by side.",
    )
    _add_data(parser)
    _add_drops(parser)
    _add_recipe(parser)
    _add_machine(parser)
    return parser


def _add_data(parser: Parser) -> None:
    add = parser.add_argument
    text = "resnet20, 32, 44, 56 or 110 (default), made for CIFAR; torchvision:NAME; timm:NAME"
    add("--model", metavar="NAME", default="resnet110", help=text)
    text = "digits (default), or a folder: parquet files train*, test*, or folders train/CLASS ..."
    add("--data", metavar="PATH", default="digits", help=text)
    text = "default: the first image's; 16 for digits, which have 8"
    add("--image-size", metavar="PIXELS", type=whole(1), help=text)


def _add_drops(parser: Parser) -> None:
    add = parser.add_argument
    text = "chance that the last block is dropped in a step (default: 0.5)"
    add("--drop-rate", metavar="P", type=between(0, 1), default=0.5, help=text)
    text = "how that chance grows over depth (default: linear)"
    distributions = ("linear", "linear_from_zero", "uniform")
    add("--drop-distribution", choices=distributions, default="linear", help=text)
    text = "how long it rises from 0: 0.1dur (a share), 5ep(ochs), 1000ba(tches) (default: 0dur)"
    add("--drop-warmup", metavar="TIME", type=_time, default="0dur", help=text)
    text = "drop blocks for the whole batch (default), or for each sample on its own (drop path)"
    add("--mode", choices=("batch", "sample"), default="batch", help=text)
    text = "each block on its own (default), or nearly as many drops in every step, on every rank"
    add("--sampling", choices=("independent", "balanced"), default="independent", help=text)
    text = "which blocks the ranks that torchrun starts drop (default: same; by sample: different)"
    add("--across-ranks", choices=("same", "different"), help=text)


def _add_recipe(parser: Parser) -> None:
    add = parser.add_argument
    text = "goes well with stochastic depth: 0.1, say (default: 0)"
    add("--label-smoothing", metavar="SHARE", type=between(0, 1), default=0.0, help=text)
    add("--epochs", metavar="N", type=whole(1), help="default: 500; 24 for digits")
    text = "of each rank, where torchrun starts several (default: 128; 64 for digits)"
    add("--batch-size", metavar="N", type=whole(2), help=text)
    text = "divided by 10 after 50%% and 75%% of the training (default: 0.1; 0.01 for digits)"
    add("--lr", metavar="RATE", type=between(0, None), help=text)
    text = "of weights, order, augmentation and draws (default: 0)"
    add("--seed", metavar="N", type=whole(0), default=0, help=text)


def _add_machine(parser: Parser) -> None:
    add = parser.add_argument
    text = "auto (default), cpu, cuda, cuda:1, mps"
    add("--device", metavar="NAME", type=device, default="auto", help=text)
    precisions = ("32-true", "bf16-mixed")
    add("--precision", choices=precisions, default="32-true", help="as Fabric calls it")
    add("--out", metavar="FOLDER", type=Path, help="default: a new one in runs/")
    text = "go on from the checkpoint in --out, exactly"
    add("--resume", action="store_true", help=text)
    text = "train the network with stochastic depth only"
    add("--no-baseline", dest="baseline", action="store_false", help=text)
    text = "a rank that does not answer for so long ends the others (default: 60)"
    add("--timeout", metavar="SECONDS", type=whole(1), default=60, help=text)


def _time(text: str) -> Time:
    try:
        return Time.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
