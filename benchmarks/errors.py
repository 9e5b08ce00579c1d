"""Does stochastic depth help? Few images, long training, deep networks, several seeds.

    export PYTHONPATH=examples
    python benchmarks/errors.py --minutes 60             # goes on with what is there, then stops
    python benchmarks/errors.py --only resnet56 --workers 1
    python benchmarks/errors.py --list                   # what is done, what is left

Each run trains one network on a part of CIFAR-10 at 16 pixels: 400 epochs on 2,000 images, as many
steps (160 epochs) on 5,000, as they are, with three seeds; with one seed, "augmented", also on
random crops, half of them mirrored.
ResNets train in bfloat16 by autocast, in which their steps take two thirds of the time. The ViT
trains in float32: in bfloat16 its steps take longer.
Runs are processes of one thread, two at a time; a run that is cut off goes on from its checkpoint
in `runs/errors`, with the very same steps. `results/errors.json` has every run that was begun, and
how far it is: none is left out. A run that it has at its end is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import stochastic_depth as sd
from imagelib.batches import Batches
from imagelib.checkpoints import replacing
from imagelib.cifar_resnet import CifarResNet
from imagelib.image_data import ImageData, Images, read_image_data
from imagelib.machine import machine
from imagelib.recipe import learning_rate, sgd
from interleaved import RESULTS, write

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "cifar10"
RUNS = ROOT / "runs" / "errors"
FILE = RESULTS / "errors.json"
EPOCHS = {2000: 400, 5000: 160}  # by the number of images: as many steps
BATCH, RATE, SIZE = 64, 0.5, 16
LOOKS = 20  # at all 10,000 test images, and one more after the first epoch
SAVE_EVERY = 60  # seconds
AUGMENTED = "augmented"  # in the names of runs


@dataclass(frozen=True)
class Case:
    """One run."""

    network: str
    images: int
    way: str
    seed: int
    augmented: bool = False

    @property
    def name(self) -> str:
        parts = self.network, self.images, *[AUGMENTED] * self.augmented, self.way, self.seed
        return "-".join(map(str, parts))

    @property
    def epochs(self) -> int:
        return EPOCHS[self.images]

    @classmethod
    def parse(cls, name: str) -> Case:
        network, images, *augmented, way, seed = name.split("-")
        return cls(network, int(images), way, int(seed), augmented=bool(augmented))


# What is asked first is first: does it help; then the scales; then larger ones.
WAYS = ("plain", "batch", "sample")
SCALES = ("train", "none")  # of mode "batch", beside its default "eval"


def cases() -> Iterator[Case]:
    """All runs, in the order in which they are done."""
    for network, images, ways in (
        ("resnet56", 2000, (*WAYS, *SCALES)),
        ("vit", 2000, ("plain", "batch", *SCALES)),
        ("resnet56", 5000, WAYS),
        ("resnet110", 2000, WAYS),
        ("resnet110", 5000, WAYS),
    ):
        for seed in range(3):
            for way in ways:
                yield Case(network, images, way, seed)
    for way in (*WAYS, "train"):
        yield Case("resnet56", 2000, way, 0, augmented=True)


def data_of(images: int) -> ImageData:
    """The first so many of the training images, shuffled once; all test images."""
    file = RUNS / f"cifar10-{SIZE}.pt"
    if not file.exists():
        RUNS.mkdir(parents=True, exist_ok=True)
        read = read_image_data(str(DATA), SIZE)
        with replacing(file) as content:
            torch.save([read.train.pixels, read.train.labels, read.test.pixels, read.test.labels],
                       content)  # fmt: skip
    train, labels, test, test_labels = torch.load(file, weights_only=True)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:images]
    names = tuple(map(str, range(10)))
    return ImageData(Images(train[chosen], labels[chosen]), Images(test, test_labels), names,
                     flip=True)  # fmt: skip


class Training:
    """One network in training, which can be cut off after any step."""

    def __init__(self, case: Case) -> None:
        self.case, self.data = case, data_of(case.images)
        self.batches = Batches(self.data, BATCH, case.seed, augmented=case.augmented)
        torch.manual_seed(case.seed)
        self.model = _network(case.network).to(memory_format=torch.channels_last)
        self.optimizer = _optimizer(case.network, self.model)
        self.depth = _dropping(case, self.model, self.batches.example(2))
        if self.depth is not None:
            self.depth.follow(self.optimizer)  # the state rides in the optimizer's
        self.steps, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float, float]] = []  # epoch, test error, seconds of a core

    @property
    def epochs(self) -> int:
        """How many are over."""
        return self.steps // self.batches.steps_per_epoch

    def train(self, deadline: float) -> None:
        """Until the end, or this time."""
        per_epoch, epochs = self.batches.steps_per_epoch, self.case.epochs
        saved_at = time.monotonic()
        while self.epochs < epochs:
            for batch in self.batches.for_training(self.epochs, self.steps % per_epoch):
                self._step(batch, epochs * per_epoch)
                if time.monotonic() - saved_at > SAVE_EVERY:
                    self.save()
                    saved_at = time.monotonic()
                if time.time() > deadline:
                    self.save()
                    return
            if self.epochs % (epochs // LOOKS) == 0 or self.epochs == 1:
                self.curve.append((self.epochs, self.error(), self.seconds))
        self.save()

    def _step(self, batch: Any, total: int) -> None:
        start = time.process_time()  # other processes don't count
        base = 0.1 if self.case.network.startswith("resnet") else 1e-3
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(base, self.steps, total)
        self.optimizer.zero_grad()
        F.cross_entropy(self._outputs(batch), batch.labels).backward()
        self.optimizer.step()
        self.steps += 1
        self.seconds += time.process_time() - start

    def _outputs(self, batch: Any) -> torch.Tensor:
        images = batch.images.contiguous(memory_format=torch.channels_last)
        is_resnet = self.case.network.startswith("resnet")
        with torch.autocast("cpu", torch.bfloat16, enabled=is_resnet):
            outputs: torch.Tensor = self.model(images)
        return outputs.float()

    def error(self) -> float:
        """The fraction of the test images that is wrongly classified."""
        self.model.eval()
        with torch.no_grad():
            wrong = sum(
                int((self._outputs(b).argmax(1) != b.labels).sum())
                for b in Batches(self.data, 500, 0).for_testing()
            )
        self.model.train()
        return wrong / len(self.data.test)

    def save(self) -> None:
        """Everything that it takes to go on."""
        names = ("steps", "seconds", "curve")
        with replacing(RUNS / f"{self.case.name}.pt") as file:
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    **{name: getattr(self, name) for name in names},
                },
                file,
            )

    def load(self) -> None:
        """Go on from the last checkpoint, where there is one."""
        file = RUNS / f"{self.case.name}.pt"
        if file.exists():
            state = torch.load(file, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.steps, self.seconds, self.curve = state["steps"], state["seconds"], state["curve"]


def _network(name: str) -> nn.Module:
    if name.startswith("resnet"):
        return CifarResNet(int(name.removeprefix("resnet")))
    import timm

    sizes: dict[str, Any] = {
        "img_size": SIZE,
        "patch_size": 4,
        "embed_dim": 64,
        "depth": 12,
        "num_heads": 2,
    }
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    return model


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name.startswith("resnet"):
        return sgd(model, 0.1)
    return torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)


def _dropping(case: Case, model: nn.Module, example: Any) -> sd.StochasticDepth | None:
    if case.way == "plain":
        return None
    rate = RATE if case.network.startswith("resnet") else 0.2
    return sd.apply_stochastic_depth(
        model,
        rate,
        example_inputs=example,
        mode="sample" if case.way == "sample" else "batch",
        scale=case.way if case.way in SCALES else "auto",  # type: ignore[arg-type]
        draw=sd.Draw(case.seed),
    )


def worker(name: str, deadline: float) -> None:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    training = Training(Case.parse(name))
    training.load()
    training.train(deadline)


def progress(case: Case) -> dict[str, Any]:
    """How far a run is, by its checkpoint; by the result file, where that has its end.

    And on which processor: times of two are not compared.
    """
    here = {"processor": machine()["processor"]}
    known: dict[str, Any] = json.loads(FILE.read_text())["results"]["runs"] if FILE.exists() else {}
    if known.get(case.name, {}).get("epochs") == case.epochs:
        names = ("epochs", "curve", "seconds", "processor")
        return here | {name: known[case.name][name] for name in names if name in known[case.name]}
    file = RUNS / f"{case.name}.pt"
    if not file.exists():
        return here | {"epochs": 0, "curve": [], "seconds": 0.0}
    state = torch.load(file, weights_only=True)
    epochs = state["steps"] // (case.images // BATCH)
    return here | {"epochs": epochs, "curve": state["curve"], "seconds": state["seconds"]}


def results() -> dict[str, Any]:
    """All runs that were begun."""
    found = {case.name: {**asdict(case), **progress(case)} for case in cases()}
    begun = {name: run for name, run in found.items() if run["epochs"]}
    settings = {"epochs": EPOCHS, "batch": BATCH, "drop_rate": RATE, "pixels": SIZE}
    return {"settings": settings, "runs": begun}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="runs whose name begins so")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        worker(options.run, options.until)
        return
    wanted = [case for case in cases() if case.name.startswith(options.only)]
    if options.list:
        for case in wanted:
            print(f"{case.name:<36} {progress(case)['epochs']:>4} of {case.epochs} epochs")
        return
    data_of(BATCH)  # once, before several processes ask for it
    deadline = time.time() + 60 * options.minutes
    left = [case for case in wanted if progress(case)["epochs"] < case.epochs]
    running: list[subprocess.Popen[bytes]] = []
    while (left or running) and time.time() < deadline + 60:
        running = [process for process in running if process.poll() is None]
        while left and len(running) < options.workers and time.time() < deadline:
            command = [sys.executable, __file__, "--run", left.pop(0).name]
            running.append(subprocess.Popen([*command, "--until", str(deadline)]))
        time.sleep(1)
    found = results()
    print(json.dumps({n: run["epochs"] for n, run in found["runs"].items()}, indent=1))
    print(write("errors", found))


if __name__ == "__main__":
    main()
