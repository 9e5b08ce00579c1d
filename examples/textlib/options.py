"""The command line of `text.py`, and what can be refused before anything is read."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from imagelib import InputError
from imagelib.command_line import Parser, between, device, whole

SHIPPED = Path(__file__).parent / "data" / "coriolanus.txt"


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    model: str
    data: Path
    level: Literal["char", "byte"]
    steps: int
    batch_size: int
    context: int
    lr: float
    drop_rate: float
    theta: float
    gamma: float | None
    seed: int
    device: torch.device
    out: Path
    resume: bool

    def gamma_over(self, steps: int) -> float:
        """How fast progressive layer dropping sets in: 100/T, as in its paper, unless given."""
        return 100 / steps if self.gamma is None else self.gamma

    def configuration(self, fingerprint: str) -> dict[str, object]:
        """What decides the result. `fingerprint`: of the text, whatever its file is called."""
        free = ("data", "device", "out", "resume")
        chosen = {name: value for name, value in vars(self).items() if name not in free}
        return {"text": fingerprint, **chosen, "gamma": self.gamma_over(self.steps)}


def parse(arguments: Sequence[str] | None) -> Options:
    given = _parser().parse_args(arguments)
    if given.out is None:
        if given.resume:
            raise InputError("--resume: say with --out which folder holds the run to go on with")
        given.out = Path("runs", time.strftime("text-%Y%m%d-%H%M%S"))
    return Options(**vars(given))


def _parser() -> Parser:
    parser = Parser(
        prog="text.py",
        description="Train a language model without and with stochastic depth, side by side.",
    )
    add = parser.add_argument
    text = "gpt (default), or transformers:TYPE, a small gpt2, llama, gpt_neox ..."
    add("--model", metavar="NAME", default="gpt", help=text)
    text = "a file to learn from, whose last tenth is held out (default: the play that ships)"
    add("--data", metavar="text:PATH", type=text_path, default=SHIPPED, help=text)
    text = "what is predicted: characters (default) or bytes"
    add("--level", choices=("char", "byte"), default="char", help=text)
    text = "of each variant (default: 1500)"
    add("--steps", metavar="N", type=whole(1), default=1500, help=text)
    text = "sequences in a step (default: 12)"
    add("--batch-size", metavar="N", type=whole(1), default=12, help=text)
    text = "tokens in a sequence (default: 64)"
    add("--context", metavar="N", type=whole(2), default=64, help=text)
    text = "AdamW's, at its peak; then down a cosine (default: 0.003)"
    add("--lr", metavar="RATE", type=between(0, None), default=0.003, help=text)
    text = "of the decreasing variant, its peak in the last block (default: 0.5)"
    add("--drop-rate", metavar="P", type=between(0, 1), default=0.5, help=text)
    text = "of the progressive variant, the survival that it sinks to (default: 0.5)"
    add("--theta", metavar="SHARE", type=between(0, None), default=0.5, help=text)
    text = "how fast it gets there: exp(-GAMMA * step) (default: 100 / steps)"
    add("--gamma", metavar="GAMMA", type=between(0, None), help=text)
    text = "of weights, batches and draws (default: 0)"
    add("--seed", metavar="N", type=whole(0), default=0, help=text)
    text = "auto (default), cpu, cuda, cuda:1, mps"
    add("--device", metavar="NAME", type=device, default="auto", help=text)
    add("--out", metavar="FOLDER", type=Path, help="default: a new one in runs/")
    text = "go on from the checkpoint in --out, exactly"
    add("--resume", action="store_true", help=text)
    return parser


def text_path(text: str) -> Path:
    kind, _, path = text.partition(":")
    if kind != "text" or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not text:PATH")
    return Path(path)
