"""The command line of `fsdp.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imagelib.command_line import Parser, between, whole
from textlib.options import text_path


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    data: Path
    steps: int
    batch_size: int
    context: int
    lr: float
    drop_rate: float
    checkpoint_every: int
    compile: str
    timeout: int
    seed: int
    out: Path


def parse(arguments: Sequence[str] | None) -> Options:
    given = _parser().parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    return Options(**vars(given))


def _parser() -> Parser:
    parser = Parser(
        prog="fsdp.py",
        description="Train a language model in shards, skipping blocks: run it with torchrun.",
    )
    add = parser.add_argument
    text = "a file to learn from"
    add("--data", metavar="text:PATH", type=text_path, required=True, help=text)
    text = "of the optimizer (default: 200)"
    add("--steps", metavar="N", type=whole(1), default=200, help=text)
    text = "sequences in a step, shared by the ranks (default: 16)"
    add("--batch-size", metavar="N", type=whole(1), default=16, help=text)
    text = "tokens in a sequence (default: 64)"
    add("--context", metavar="N", type=whole(2), default=64, help=text)
    text = "AdamW's (default: 0.003)"
    add("--lr", metavar="RATE", type=between(0, None), default=0.003, help=text)
    text = "of the last block, after a tenth of the steps (default: 0.5)"
    add("--drop-rate", metavar="P", type=between(0, 1), default=0.5, help=text)
    text = "steps between checkpoints (default: 50)"
    add("--checkpoint-every", metavar="N", type=whole(1), default=50, help=text)
    text = "what torch.compile compiles the blocks with: inductor (default), aot_eager, none"
    add("--compile", choices=("inductor", "aot_eager", "none"), default="inductor", help=text)
    text = "a rank that does not answer for so many seconds counts as gone (default: 600)"
    add("--timeout", metavar="SECONDS", type=whole(1), default=600, help=text)
    text = "of weights, batches and draws (default: 0)"
    add("--seed", metavar="N", type=whole(0), default=0, help=text)
    text = "folder of the checkpoints and of model.pt (default: runs/fsdp)"
    add("--out", metavar="FOLDER", type=Path, default=Path("runs/fsdp"), help=text)
    return parser
