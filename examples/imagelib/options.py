"""The command line, and what can be refused before anything is read."""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch

from imagelib import InputError
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

    def configuration(self, images: str) -> dict[str, object]:
        """What decides the result, and what a resumed run must therefore share.

        `images`: the fingerprint of the data, whatever its folder is called.
        """
        free = ("data", "device", "out", "resume")
        chosen = {name: value for name, value in vars(self).items() if name not in free}
        return {"images": images, **chosen, "drop_warmup": str(self.drop_warmup)}


def parse(arguments: Sequence[str] | None) -> Options:
    given = _parser().parse_args(arguments)
    for name, value in (DIGITS if given.data == "digits" else PAPER).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.out is None:
        if given.resume:
            raise InputError("--resume: say with --out which folder holds the run to go on with")
        given.out = Path("runs", time.strftime("images-%Y%m%d-%H%M%S"))
    return Options(**vars(given))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)  # one line; argparse's own would show the usage first


def _parser() -> _Parser:
    parser = _Parser(
        prog="images.py",
        description="Train an image classifier without and with stochastic depth, side by side.",
    )
    add = parser.add_argument
    text = "resnet20, 32, 44, 56 or 110 (default), made for CIFAR; torchvision:NAME; timm:NAME"
    add("--model", metavar="NAME", default="resnet110", help=text)
    text = "digits (default), or a folder: parquet files train*, test*, or folders train/CLASS ..."
    add("--data", metavar="PATH", default="digits", help=text)
    text = "default: the first image's; 16 for digits, which have 8"
    add("--image-size", metavar="PIXELS", type=_whole(1), help=text)
    text = "chance that the last block is dropped in a step (default: 0.5)"
    add("--drop-rate", metavar="P", type=_between(0, 1), default=0.5, help=text)
    text = "how that chance grows over depth (default: linear)"
    distributions = ("linear", "linear_from_zero", "uniform")
    add("--drop-distribution", choices=distributions, default="linear", help=text)
    text = "how long it rises from 0: 0.1dur (a share), 5ep(ochs), 1000ba(tches) (default: 0dur)"
    add("--drop-warmup", metavar="TIME", type=_time, default="0dur", help=text)
    text = "goes well with stochastic depth: 0.1, say (default: 0)"
    add("--label-smoothing", metavar="SHARE", type=_between(0, 1), default=0.0, help=text)
    add("--epochs", metavar="N", type=_whole(1), help="default: 500; 24 for digits")
    add("--batch-size", metavar="N", type=_whole(2), help="default: 128; 64 for digits")
    text = "divided by 10 after 50%% and 75%% of the training (default: 0.1; 0.01 for digits)"
    add("--lr", metavar="RATE", type=_between(0, None), help=text)
    text = "of weights, order, augmentation and draws (default: 0)"
    add("--seed", metavar="N", type=_whole(0), default=0, help=text)
    text = "auto (default), cpu, cuda, cuda:1, mps"
    add("--device", metavar="NAME", type=_device, default="auto", help=text)
    precisions = ("32-true", "bf16-mixed")
    add("--precision", choices=precisions, default="32-true", help="as Fabric calls it")
    add("--out", metavar="FOLDER", type=Path, help="default: a new one in runs/")
    text = "go on from the checkpoint in --out, exactly"
    add("--resume", action="store_true", help=text)
    text = "train the network with stochastic depth only"
    add("--no-baseline", dest="baseline", action="store_false", help=text)
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return read


def _between(least: float, limit: float | None) -> Callable[[str], float]:
    """From `least` to below `limit`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < (math.inf if limit is None else limit):
            wanted = f"from {least} on" if limit is None else f"in [{least}, {limit})"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {wanted}")
        return value

    return read


def _time(text: str) -> Time:
    try:
        return Time.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _device(text: str) -> torch.device:
    if text == "auto":
        best = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device("mps" if torch.mps.is_available() else best)
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or mps")
    return device
