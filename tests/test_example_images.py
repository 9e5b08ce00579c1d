"""`examples/images.py` as users run it: what it leaves behind, how it goes on, what it refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import images
from imagelib.batches import Batches
from imagelib.checkpoints import Checkpoints
from imagelib.cifar_resnet import CifarResNet
from imagelib.contender import count_wrong
from imagelib.image_data import read_image_data
from imagelib.records import Step
from imagelib.side_by_side import SideBySide

EXAMPLES = Path(images.__file__).parent
# Small and short: four epochs of 42 steps of a few milliseconds.
SHORT = (
    "--model=resnet20 --image-size=8 --epochs=4 --batch-size=32 --lr=0.05 --seed=3 "
    "--drop-warmup=0.25dur --label-smoothing=0.1 --device=cpu"
).split()
PLAIN_ERROR, ERROR = 0.06, 0.12  # that four epochs are known to reach


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of both networks, all their state, and the plain network that was taken home."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    parts = {
        f"{network}.{name}": value
        for network in ("plain", "dropping")
        for name, value in state["networks"][network]["model"].items()
    }
    return {**parts, **torch.load(folder / "plain.pt", weights_only=True)}


def assert_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not value.equal(theirs[name])] == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that came to its end."""
    folder = tmp_path_factory.mktemp("finished")
    assert images.main([*SHORT, f"--out={folder}"]) == 0
    return folder


@pytest.fixture
def metrics(finished: Path) -> Any:
    return json.loads((finished / "metrics.json").read_text())


def test_both_networks_learn(metrics: Any) -> None:
    assert metrics["plain"]["test_error"] < PLAIN_ERROR
    assert metrics["stochastic_depth"]["test_error"] < ERROR


def test_flops_executed_are_those_of_the_shortened_network(metrics: Any, finished: Path) -> None:
    counted = metrics["counted_steps"]
    assert len(counted) == 5
    for step in counted:
        assert step["executed"] == step["shortened"] == step["expected"]
    assert any(step["executed"] < metrics["plain"]["flops_per_step"] for step in counted)
    with (finished / "steps.csv").open() as file:
        flops = [int(row["flops"]) for row in csv.DictReader(file)]
    assert np.mean(flops) == pytest.approx(metrics["stochastic_depth"]["flops_per_step"])
    assert 0.1 < metrics["flops_saved"] < 0.3


def test_what_is_measured(metrics: Any, finished: Path) -> None:
    assert metrics["finished"]
    assert metrics["plain"]["blocks_per_step"] == 9
    assert 5 < metrics["stochastic_depth"]["blocks_per_step"] < 9
    assert metrics["saving"]["compared_steps"] > 30
    for network in ("plain", "stochastic_depth"):
        speed = metrics[network]["speed"]
        assert speed["images_per_second"]["low"] <= speed["images_per_second"]["median"]
        assert 0 < speed["waiting_for_data"] < 1
    with (finished / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 42
    assert tuple(rows[0]) == Step._fields
    with PIL.Image.open(finished / "error.png") as picture:
        assert picture.size[0] > 600


def test_the_plain_weights_need_nothing_but_torch(metrics: Any, finished: Path) -> None:
    model = CifarResNet(20)
    model.load_state_dict(torch.load(finished / "plain.pt", weights_only=True))
    data = read_image_data("digits")
    wrong = count_wrong(model, Batches(data, 32, seed=0).for_testing())
    assert wrong / len(data.test) == metrics["stochastic_depth"]["test_error"]
    # As the network with its gates scored, to a rounding: the scale is in the weights.
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    *_, wrong_with_gates = checkpoint["records"]["epochs"][-1]
    assert abs(wrong - wrong_with_gates) <= 1


def test_the_table(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert images.main([*SHORT, f"--out={finished}", "--resume"]) == 0  # nothing left to train
    table = capsys.readouterr().out
    for row in ("test error", "images per second", "seconds per epoch", "waiting for data"):
        assert re.search(rf"{row} .*\d.*\d", table), row
    assert "Time saved:" in table
    assert re.search("(Less than|At least|Too noisy to tell whether) 80%", table)


KILLED = """
import os, signal, sys
import images
from imagelib.side_by_side import SideBySide
take_step = SideBySide.step
def step(self, number, *arguments):
    if number == 100:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(self, number, *arguments)
SideBySide.step = step
images.main(sys.argv[1:])
"""


def test_killed_and_resumed_it_ends_with_the_same_weights(finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, *SHORT, f"--out={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "plain.pt").exists()
    assert images.main([*SHORT, f"--out={tmp_path}", "--resume"]) == 0
    assert_same_weights(tmp_path, finished)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C in the middle of this step."""
    take_step = SideBySide.step

    def step(self: SideBySide, current: int, *arguments: Any) -> Step:
        if current == number:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(self, current, *arguments)

    monkeypatch.setattr(SideBySide, "step", step)


def test_ctrl_c_and_a_damaged_checkpoint(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 130)
        assert images.main([*SHORT, f"--out={tmp_path}"]) == 130
    assert "After 3 epochs, interrupted" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert not metrics["finished"]
    assert metrics["stochastic_depth"]["test_error"] is not None
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 1 + 131
    assert (tmp_path / "plain.pt").exists()

    newest = tmp_path / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert images.main([*SHORT, f"--out={tmp_path}", "--resume"]) == 0
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert_same_weights(tmp_path, finished)


def test_a_checkpoint_within_an_epoch_loses_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the second and of the third epoch: no step is taken twice."""
    taken: list[int] = []
    take_step = SideBySide.step

    def step(self: SideBySide, number: int, *arguments: Any) -> Step:
        taken.append(number)
        return take_step(self, number, *arguments)

    monkeypatch.setattr(SideBySide, "step", step)
    options = [*SHORT, f"--out={tmp_path}"]
    for at in (60, 100):
        with monkeypatch.context() as patch:
            interrupt_at(patch, at)
            assert images.main(options) == 130
        options = [*SHORT, f"--out={tmp_path}", "--resume"]
    assert images.main(options) == 0
    assert taken == list(range(4 * 42))
    assert_same_weights(tmp_path, finished)
    counts = [
        torch.load(folder / "checkpoint.pt", weights_only=True)["networks"]["depth"]["statistics"]
        for folder in (tmp_path, finished)
    ]
    assert counts[0] == counts[1]


def test_a_checkpoint_is_written_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "SAVE_EVERY", 0)
    saved: list[int] = []
    save = Checkpoints.save

    def counted(self: Checkpoints, state: dict[str, Any]) -> None:
        saved.append(len(state["records"]["steps"]))
        save(self, state)

    monkeypatch.setattr(Checkpoints, "save", counted)
    interrupt_at(monkeypatch, 5)
    assert images.main([*SHORT, f"--out={tmp_path}"]) == 130
    assert saved == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_in_the_first_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, 2)
    assert images.main([*SHORT, f"--out={tmp_path}"]) == 130
    assert "After 0 epochs, interrupted" in capsys.readouterr().out


def write_photos(folder: Path) -> None:
    """Two classes that differ in colour: 12 images to train on and 4 to test on."""
    generator = np.random.default_rng(0)
    for part, number in (("train", 6), ("test", 2)):
        for shift, name in ((0, "dark"), (128, "light")):
            (folder / part / name).mkdir(parents=True)
            for n in range(number):
                pixels = generator.integers(shift, shift + 128, (32, 32, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(folder / part / name / f"{n}.png")


@pytest.mark.filterwarnings("ignore:fold():stochastic_depth.StochasticDepthWarning")
@pytest.mark.parametrize(
    "options",
    [
        "--model=torchvision:resnet18 --no-baseline",
        "--model=torchvision:convnext_tiny --precision=bf16-mixed",
        "--model=timm:resnetv2_18 --drop-distribution=linear_from_zero",
        "--model=timm:legacy_seresnet18",  # squeeze-excite ends its branches: they do not fold
    ],
)
def test_other_networks_on_a_folder_of_images(tmp_path: Path, options: str) -> None:
    write_photos(tmp_path / "photos")
    given = f"{options} --data={tmp_path}/photos --epochs=2 --batch-size=4 --lr=0.001".split()
    assert images.main([*given, "--drop-rate=0.2", f"--out={tmp_path}/out"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["stochastic_depth"]["test_error"] <= 1
    assert (metrics["plain"] is None) == ("--no-baseline" in options)
    assert (tmp_path / "out" / "plain.pt").exists() == ("seresnet" not in options)
    assert (tmp_path / "out" / "error.png").exists()


BAD_INPUT = {
    "--data=/no/such/folder": "there is no folder '/no/such/folder'",
    "--model=resnet111": "no 'resnet111'; the nearest names are .*resnet110",
    "--model=resnet50": "nearest names are .*torchvision:resnet50",
    "--model=torchvision:resnet19": "nearest names are torchvision:resnet1",
    "--model=timm:vit_tny_patch16_224": "nearest names are timm:vit_tiny_patch16_224",
    "--model=torchvision:vit_b_16": r"cannot take images of 8 x 8 pixels \(Wrong image height",
    "--model=torchvision:squeezenet1_1 --image-size=32": "SqueezeNet",
    "--drop-warmup=soon": "'soon' is no time; write 0.1dur, 5ep, 1000ba",
    "--drop-warmup=1.5dur": "longer than the training",
    "--drop-rate=1": r"'1' is not a number in \[0, 1\)",
    "--drop-rate=-0.1": r"'-0.1' is not a number in \[0, 1\)",
    "--drop-rate=half": r"'half' is not a number in \[0, 1\)",
    "--label-smoothing=2": r"not a number in \[0, 1\)",
    "--drop-distribution=cubic": "invalid choice: 'cubic'",
    "--epochs=0": "'0' is not a whole number from 1 on",
    "--batch-size=5000": "only 1347 images to train on",
    "--lr=fast": "'fast' is not a number",
    "--lr=nan": "'nan' is not a number",
    "--device=cuda:9": "no device 'cuda:9'",
    "--device=quantum": "no device 'quantum'",
    "--device=meta": "'meta' is not cpu, cuda or mps",
    "--resume": "there is no .*checkpoint.pt to go on from",
    "--no-such-option": "unrecognized arguments: --no-such-option",
}


@pytest.mark.parametrize("options", BAD_INPUT)
def test_bad_input_is_one_line(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert images.main([*SHORT, f"--out={folder}", *options.split()]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"images.py: .*{BAD_INPUT[options]}.*\n", error), error
    assert not folder.exists()


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "holds another run"),
        ("--resume --lr=0.1 --drop-rate=0.4", r"drop_rate was 0\.5, now 0\.4; lr was 0\.05, now 0"),
        ("--resume --image-size=9", "image_size was 8, now 9"),
    ],
)
def test_another_run_is_left_alone(
    finished: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    before = content(finished)
    assert images.main([*SHORT, f"--out={finished}", *options.split()]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert content(finished) == before


def test_a_file_is_no_folder_to_write_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert images.main([*SHORT, f"--out={tmp_path}/out"]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert images.main([*SHORT, "--out=/dev/null/out"]) == 2
    assert re.fullmatch("images.py: .*Not a directory: '/dev/null/out'\n", capsys.readouterr().err)
