"""Trains a small language model three times, side by side: plain, and dropping layers in two ways.

    python examples/text.py --steps 100                          # on a play that ships: a minute
    python examples/text.py --data text:input.txt --out RUN      # and, after Ctrl-C, --resume
    python examples/text.py --data text:input.txt --model transformers:llama --steps 500

"progressive" drops more and more (Zhang & He 2020), "decreasing" ever less, and nothing in the end.
All start from the same weights and see the same batches. They are compared after equal steps; and
at equal FLOPs, for which the more expensive ones are trained anew with fewer steps.

At the end: a table; and in the output folder `report.html`, a page that shows all of it,
`metrics.json`, `steps.csv` and `loss.png`. A checkpoint is written once a minute, and at Ctrl-C.
"""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

import stochastic_depth as sd
from imagelib import InputError
from imagelib.checkpoints import Checkpoints
from imagelib.flops import count_step_cost
from imagelib.progress import Interruption, progress_bar
from textlib.contender import Contender
from textlib.models import build_model
from textlib.options import Options, parse
from textlib.page import page_of
from textlib.race import affordable_steps, look_after, race
from textlib.recipe import adamw
from textlib.report import WRITTEN, print_looks, print_report, write_report
from textlib.results import gather
from textlib.text_data import read_text
from textlib.trigram import Trigram
from textlib.windows import Windows

INTERRUPTED = 130  # the exit code that shells expect after Ctrl-C
SAVE_EVERY = 60  # seconds
LOOKS = 10  # at the held-out part, beside the one before the first step


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(parse(arguments))
    except (InputError, sd.StochasticDepthError, OSError) as error:
        print("text.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def run(options: Options) -> int:
    refuse_used_folder(options.out, resume=options.resume)
    fabric = Fabric(
        accelerator=options.device.type,
        devices=[options.device.index or 0] if options.device.type == "cuda" else 1,
    )
    fabric.launch()
    text = read_text(options.data, options.level, options.context)
    windows = Windows(
        text,
        options.context,
        options.batch_size,
        options.seed,
        fabric.device,
        most=windows_at_a_look(options.steps * options.batch_size),
    )
    torch.manual_seed(options.seed)
    start = build_model(options.model, text.vocabulary, options.context).to(fabric.device)
    checkpoints = Checkpoints(options.out, options.configuration(text.fingerprint))
    saved = checkpoints.load()["contenders"] if options.resume else {}

    def entered(phase: str, name: str, steps: int) -> Contender:
        contender = enter(name, steps, options, fabric, start, windows)
        if f"{phase}: {name}" in saved:
            contender.load_state_dict(saved[f"{phase}: {name}"])
        return contender

    contenders = [entered("steps", name, options.steps) for name in VARIANTS]
    trigram = Trigram(text.training, text.vocabulary).loss(windows.held_out_with_past())
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    parts = f"{len(text.training):,} + {len(text.held_out):,} held out"
    console.print(f"{options.model}, {contenders[0].blocks} residual blocks; {parts}")

    for contender in contenders:
        if not contender.held_out:
            contender.look_at_held_out(windows)
    anew: list[Contender] = []

    def save() -> None:
        phases = [("steps", c) for c in contenders] + [("FLOPs", c) for c in anew]
        states = {f"{phase}: {c.name}": c.state_dict() for phase, c in phases}
        checkpoints.save({"contenders": states})

    finished = train(contenders, windows, LOOKS, "Equal steps", console, save)
    if finished:
        anew += [entered("FLOPs", *each) for each in affordable_steps(contenders).items()]
        finished = train(anew, windows, 1, "Equal FLOPs", console, save)

    results = gather(text, trigram, contenders, anew, finished=finished)
    configuration = checkpoints.configuration
    page = page_of(results, configuration, contenders)
    write_report(options.out, results, configuration, contenders, anew, page)
    print_report(results, console)
    console.print(f"All of it is in {options.out}; to look at:", highlight=False, soft_wrap=True)
    console.print(str(options.out / "report.html"), highlight=False, soft_wrap=True)
    return 0 if finished else INTERRUPTED


def windows_at_a_look(trained: int) -> int:
    """How many held-out windows are looked at, so that all looks take a fifth of the training.

    A look is a forward, a third of a training step. `trained`: the windows of all steps.

    >>> windows_at_a_look(1500 * 12), windows_at_a_look(10)
    (981, 32)
    """
    return max(32, int(0.2 * 3 * trained / (LOOKS + 1)))


def refuse_used_folder(folder: Path, *, resume: bool) -> None:
    used = [name for name in WRITTEN if (folder / name).exists()]
    if used and not resume:
        raise InputError(f"--out: {folder} holds another run ({used[0]}); --resume goes on with it")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out: {folder} is not a folder")


def progressive(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, options: Options, steps: int
) -> sd.StochasticDepth:
    """Progressive layer dropping: none at first, then more and more, the later layers most."""
    gamma, draw = options.gamma_over(steps), sd.Draw(options.seed)
    # What it adds to a training script is this call ...
    depth = sd.apply_progressive_layer_dropping(
        model, options.theta, gamma, example_inputs=tokens, draw=draw
    )
    depth.follow(optimizer)  # ... and this one.
    return depth


def decreasing(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, options: Options, steps: int
) -> sd.StochasticDepth:
    """Full drop rates for half of the training, down to 0 at four fifths, then every layer runs."""
    schedule, draw = sd.linear_decay(0.8 * steps, start=0.5 * steps), sd.Draw(options.seed)
    # What it adds to a training script is this call ...
    depth = sd.apply_stochastic_depth(
        model,
        options.drop_rate,
        "linear_from_zero",
        example_inputs=tokens,
        scale="train",
        schedule=schedule,
        draw=draw,
    )
    depth.follow(optimizer)  # ... and this one.
    return depth


Variant = Callable[
    [nn.Module, torch.optim.Optimizer, Tensor, Options, int], sd.StochasticDepth | None
]
VARIANTS: dict[str, Variant] = {
    "plain": lambda *_: None,
    "progressive": progressive,
    "decreasing": decreasing,
}


def enter(
    name: str, steps: int, options: Options, fabric: Fabric, start: nn.Module, windows: Windows
) -> Contender:
    """A variant that begins with the weights of `start`."""
    model = copy.deepcopy(start)
    optimizer = adamw(model)
    depth = VARIANTS[name](model, optimizer, windows.example(2), options, steps)
    batch = windows.example(options.batch_size)
    return Contender(
        fabric,
        name,
        model,
        optimizer,
        depth,
        count_step_cost(model, batch),
        blocks=len(sd.find_residual_blocks(start, windows.example(2))),
        total_steps=steps,
        peak=options.lr,
    )


def train(
    contenders: Sequence[Contender],
    windows: Windows,
    looks: int,
    title: str,
    console: Console,
    save: Callable[[], None],
) -> bool:
    """To the end (True), or until Ctrl-C (False)."""
    total = max((contender.total_steps for contender in contenders), default=0)
    done = max((len(contender.steps) for contender in contenders), default=0)
    saved_at = time.monotonic()
    with progress_bar(console) as progress, Interruption() as interruption:
        task = progress.add_task(title, total=total, completed=done)
        for number in race(contenders, windows, looks=looks):
            progress.advance(task)
            if looks > 1 and number in look_after(total, looks):
                print_looks(contenders, console)
            if interruption.asked or time.monotonic() - saved_at > SAVE_EVERY or number == total:
                save()
                saved_at = time.monotonic()
            if interruption.asked:
                return False
    return True


if __name__ == "__main__":
    sys.exit(main())
