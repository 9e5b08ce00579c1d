"""A command line whose mistakes are one line each; numbers and devices as they are read off it."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

import torch

from imagelib import InputError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)  # one line; argparse's own would show the usage first


def whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return read


def between(least: float, limit: float | None) -> Callable[[str], float]:
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


def device(text: str) -> torch.device:
    if text == "auto":
        best = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device("mps" if torch.mps.is_available() else best)
    try:
        found = torch.device(text)
        torch.empty(1, device=found)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here") from error
    if found.type not in ("cpu", "cuda", "mps"):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or mps")
    return found
