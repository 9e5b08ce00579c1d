"""Trains an image classifier twice, side by side: plain, and with stochastic depth.

    python examples/images.py                              # ResNet-110 on digits: some minutes
    python examples/images.py --model resnet20 --data CIFAR --batch-size 128 --drop-warmup 0.1dur
    python examples/images.py --model torchvision:resnet50 --data PHOTOS --image-size 96
    torchrun --nproc-per-node 2 examples/images.py --across-ranks different --sampling balanced
    torchrun --nproc-per-node 2 --max-restarts 3 examples/images.py --out RUN  # goes on by itself

At the end: a table of what it saved and what it did to the error; and in the output folder
`report.html`, a page that shows all of it, `metrics.json`, `steps.csv`, `error.png` and `plain.pt`,
the weights of the network with stochastic depth for the plain network, which any PyTorch program
loads. A checkpoint is written after each epoch, once a minute, and at Ctrl-C.
"""

import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

import stochastic_depth as sd
from imagelib import InputError
from imagelib.batches import Batches, metered
from imagelib.checkpoints import Checkpoints, replacing
from imagelib.contender import Contender, count_wrong_together
from imagelib.flops import count_step_cost
from imagelib.image_data import read_image_data
from imagelib.models import build_model
from imagelib.options import Options, parse
from imagelib.page import page_of
from imagelib.progress import Interruption, progress_bar
from imagelib.ranks import Ranks, fabric_on, together
from imagelib.recipe import learning_rate, sgd
from imagelib.records import Records, over_ranks
from imagelib.report import WRITTEN, print_epoch, print_report, write_report
from imagelib.results import gather
from imagelib.shortened import can_be_taken_out
from imagelib.side_by_side import SideBySide

INTERRUPTED = 130  # the exit code that shells expect after Ctrl-C
SAVE_EVERY = 60  # seconds, beside the end of each epoch


def main(arguments: Sequence[str] | None = None) -> int:
    with together() as ranks:
        try:
            return run(parse(arguments), ranks)
        except (InputError, sd.StochasticDepthError, OSError) as error:
            ranks.complain(f"images.py: {' '.join(str(error).split())}")
            return 2
        except KeyboardInterrupt:
            return INTERRUPTED


def run(options: Options, ranks: Ranks) -> int:
    fabric = fabric_on(options.device, options.precision, ranks)
    ranks.connect(options.device, options.timeout)
    resume = options.resume or ranks.restarted
    ranks.from_first(lambda: refuse_used_folder(options.out, resume=resume))
    fabric.launch()
    data = read_image_data(options.data, options.image_size)
    batches = Batches(data, options.batch_size, options.seed, fabric.device, ranks)
    networks = set_up(options, fabric, batches)
    records = Records()
    checkpoints = Checkpoints(options.out, options.configuration(data.fingerprint, ranks.number))
    if options.resume or (ranks.restarted and ranks.from_first(checkpoints.any)):
        state = ranks.from_first(checkpoints.load)
        networks.load_state_dict(state["networks"])
        records.load_state_dict(state["records"])
    ranks.from_first(lambda: options.out.mkdir(parents=True, exist_ok=True))
    console = Console()
    blocks, images = len(networks.depth.blocks), f"{len(data.train):,} + {len(data.test):,} images"
    console.print(f"{options.model}, {blocks} residual blocks; {options.data}, {images}")
    finished = train(options, networks, batches, records, checkpoints, console)
    wrong = None
    try:
        plain = take_home(options, networks.depth, batches)
        if finished:
            wrong = count_wrong_together(fabric, plain.to(fabric.device), batches)
    except sd.RefusedBlockError as error:  # of which sd.apply_stochastic_depth has warned
        console.print(f"There is no plain.pt: {error}", highlight=False)
    results = gather(records, networks.cost, batches, wrong, finished=finished)
    configuration, per_epoch = checkpoints.configuration, batches.steps_per_epoch
    page = page_of(results, records, configuration, networks.depth, per_epoch)
    ranks.from_first(
        lambda: write_report(options.out, results, configuration, records, batches, page)
    )
    print_report(results, console)
    console.print(f"All of it is in {options.out}; to look at:", highlight=False, soft_wrap=True)
    console.print(str(options.out / "report.html"), highlight=False, soft_wrap=True)
    return 0 if finished else INTERRUPTED


def refuse_used_folder(folder: Path, *, resume: bool) -> None:
    used = [name for name in WRITTEN if (folder / name).exists()]
    if used and not resume:
        raise InputError(f"--out: {folder} holds another run ({used[0]}); --resume goes on with it")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out: {folder} is not a folder")


def set_up(options: Options, fabric: Fabric, batches: Batches) -> SideBySide:
    """The network with stochastic depth and, with the same weights, those beside it."""
    example = batches.example(2)
    torch.manual_seed(options.seed)
    model = build_model(options.model, len(batches.data.class_names), example.cpu())
    model = model.to(memory_format=torch.channels_last).to(fabric.device)
    plain, shortened = copy.deepcopy(model), copy.deepcopy(model)
    rate, distribution, mode = options.drop_rate, options.drop_distribution, options.mode
    draw = sd.Draw(options.seed, options.sampling, options.across_ranks)
    warmup = sd.linear_warmup(options.drop_warmup.steps(options.epochs, batches.steps_per_epoch))

    # What stochastic depth adds to a training script is this call ...
    depth = sd.apply_stochastic_depth(
        model, rate, distribution, example_inputs=example, mode=mode, schedule=warmup, draw=draw
    )
    optimizer = sgd(model, options.lr)
    depth.follow(optimizer)  # ... and this one. All the rest would be here without it.

    def beside(network: nn.Module) -> Contender:
        optimizer = sgd(network, options.lr)
        return Contender(fabric, network, optimizer, options.label_smoothing, batches.ranks)

    comparable = options.baseline and mode == "batch"  # else blocks run, on a part of the batch
    comparable = comparable and can_be_taken_out(shortened, model, depth, example)
    return SideBySide(
        depth,
        count_step_cost(model, batches.example(options.batch_size)),
        Contender(fabric, model, optimizer, options.label_smoothing, batches.ranks),
        plain=beside(plain) if options.baseline else None,
        shortened=beside(shortened) if comparable else None,
        ranks=batches.ranks,
    )


def train(
    options: Options,
    networks: SideBySide,
    batches: Batches,
    records: Records,
    checkpoints: Checkpoints,
    console: Console,
) -> bool:
    """From the last checkpoint to the end (True), or until Ctrl-C (False)."""
    per_epoch, done, ranks = batches.steps_per_epoch, len(records.steps), batches.ranks
    total = options.epochs * per_epoch
    networks.plan_measurements(total, options.seed)

    saved_at = time.monotonic()

    def save() -> None:
        nonlocal saved_at
        state = {"networks": networks.state_dict(), "records": records.state_dict()}
        ranks.from_first(lambda: checkpoints.save(state))
        saved_at = time.monotonic()

    with progress_bar(console) as progress, Interruption() as interruption:
        task = progress.add_task("Training", total=total, completed=done)
        for epoch in range(len(records.epochs), options.epochs):
            first = done - epoch * per_epoch if done > epoch * per_epoch else 0
            waited_for = metered(batches.for_training(epoch, first))
            for step, (seconds, batch) in enumerate(waited_for, epoch * per_epoch + first):
                rate = learning_rate(options.lr, step, total)
                taken = networks.step(step, epoch, batch, seconds, rate)
                records.steps.append(over_ranks(taken, ranks))
                progress.advance(task)
                is_asked = ranks.any(asked=interruption.asked)
                if is_asked or ranks.any(asked=time.monotonic() - saved_at > SAVE_EVERY):
                    save()
                if is_asked:
                    return False
            records.epochs.append(networks.count_wrong(epoch, batches))
            save()
            print_epoch(records, batches, console)
    return True


def take_home(options: Options, depth: sd.StochasticDepth, batches: Batches) -> nn.Module:
    """The plain network, which knows nothing of stochastic depth, out of its file `plain.pt`."""
    folded = {name: value.cpu() for name, value in depth.folded_state_dict().items()}
    plain = build_model(options.model, len(batches.data.class_names), batches.example(2).cpu())
    plain.load_state_dict(batches.ranks.from_first(lambda: there_and_back(folded, options.out)))
    return plain


def there_and_back(weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    file = folder / "plain.pt"
    with replacing(file) as content:
        torch.save(weights, content)
    read: dict[str, Tensor] = torch.load(file, weights_only=True)
    return read


if __name__ == "__main__":
    sys.exit(main())
