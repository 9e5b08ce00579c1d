"""`torchrun --nproc-per-node 2 examples/images.py`: real processes that share the work.

One start costs seconds, so that all runs that come to their end are made in one.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import images
from imagelib.batches import Batches
from imagelib.cifar_resnet import CifarResNet
from imagelib.contender import count_wrong
from imagelib.image_data import read_image_data
from imagelib.report import WRITTEN

EXAMPLES = str(Path(images.__file__).parent)
SHORT = "--model=resnet20 --image-size=8 --batch-size=32 --lr=0.05 --seed=3 --device=cpu".split()
PER_EPOCH = 1347 // 64
# Without BatchNorm, which sees the images of its rank alone.
NO_BATCH_NORM = (
    "--model=timm:test_convnext --image-size=32 --epochs=1 --lr=0.05 --no-baseline --device=cpu"
).split()

# What each rank runs: images.py with each of several command lines; the second one sends itself a
# signal at some step. They leave their numbers, and in the end their exit codes.
PROGRAM = """
import json, os, sys
from pathlib import Path
import images
from imagelib.side_by_side import SideBySide

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
runs, step, signal = json.loads((folder / "task.json").read_text())
take_step = SideBySide.step

def take_step_or_signal(self, current, *arguments):
    (folder / f"pid {rank}").write_text(str(os.getpid()))
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if rank == "1" and current == step and first:
        (folder / "signalled").touch()
        os.kill(os.getpid(), signal)
    return take_step(self, current, *arguments)

SideBySide.step = take_step_or_signal
codes = []
for run in runs:
    if rank == "0":
        print("RUN", flush=True)
        print("RUN", file=sys.stderr, flush=True)
    try:
        codes.append(images.main(run))
    except RuntimeError:  # of torch.distributed
        (folder / f"failed {rank}").touch()
        raise
(folder / f"codes {rank}").write_text(json.dumps(codes))
"""


def start(
    folder: Path, runs: list[list[str]], step: int = -1, number: int = 0, restarts: int = 0
) -> subprocess.Popen[str]:
    """`step`, `number`: of the signal that the second rank sends itself, the first time."""
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(PROGRAM)
    (folder / "task.json").write_text(json.dumps((runs, step, number)))
    paths = os.pathsep.join([EXAMPLES, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(folder / "program.py"), str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@dataclass
class Ended:
    """One run of those that were made: what both ranks said, and their exit codes."""

    folder: Path
    out: str
    error: str
    codes: list[int]

    @property
    def metrics(self) -> Any:
        return json.loads((self.folder / "metrics.json").read_text())

    def column(self, name: str) -> list[float]:
        with (self.folder / "steps.csv").open() as file:
            return [float(row[name]) for row in csv.DictReader(file)]


RUNS = {
    "finished": [*SHORT, "--epochs=2"],
    "other draws": [*SHORT, "--epochs=2", "--across-ranks=different", "--resume"],
    "other sampling": [*SHORT, "--epochs=2", "--sampling=balanced", "--resume"],
    "bad model": [*SHORT, "--model=resnet111"],
    "bad pair": [*SHORT, "--mode=sample", "--sampling=balanced"],
    "too few images": [*SHORT, "--batch-size=700"],
    "bad value": [*SHORT, "--device=cpu:0"],
    "different": [*SHORT, "--epochs=1", "--across-ranks=different", "--sampling=balanced"],
    "sample": [*SHORT, "--epochs=1", "--mode=sample"],
    "no BatchNorm": [*NO_BATCH_NORM, "--batch-size=64"],
}
SAME_FOLDER = ("other draws", "other sampling")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("two ranks")
    outs = {name: folder / ("finished" if name in SAME_FOLDER else name) for name in RUNS}
    process = start(folder, [[*run, f"--out={outs[name]}"] for name, run in RUNS.items()])
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    codes = [json.loads((folder / f"codes {rank}").read_text()) for rank in (0, 1)]
    outputs, errors = (text.split("RUN\n")[1:] for text in (out, error))
    return {
        name: Ended(outs[name], outputs[number], errors[number], [c[number] for c in codes])
        for number, name in enumerate(RUNS)
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the networks and their optimizers, all state."""
    networks = torch.load(folder / "checkpoint.pt", weights_only=True)["networks"]
    found = {}
    for kind in [kind for kind in ("plain", "dropping") if networks[kind]]:
        for name, value in networks[kind]["model"].items():
            found[f"{kind}.{name}"] = value
        for number, state in networks[kind]["optimizer"]["state"].items():
            found[f"{kind}, momentum {number}"] = state["momentum_buffer"]
    return found


@pytest.mark.parametrize("name", ["finished", "different", "sample", "no BatchNorm"])
def test_one_rank_speaks_and_writes(ended: dict[str, Ended], name: str) -> None:
    run = ended[name]
    assert run.codes == [0, 0]
    assert len(re.findall("After . epochs?", run.out)) == 1
    assert len(re.findall("Epoch 1: test error", run.out)) == 1
    assert "images.py" not in run.error
    before = set() if run.metrics["epochs"] > 1 else {"checkpoint.before.pt"}
    assert {file.name for file in run.folder.iterdir()} == set(WRITTEN) - before


def test_what_both_ranks_did_counts(ended: dict[str, Ended]) -> None:
    run = ended["finished"]
    metrics = run.metrics
    expected = {"ranks": 2, "mode": "batch", "sampling": "independent", "across_ranks": "same"}
    assert expected.items() <= metrics["configuration"].items()
    speed = metrics["plain"]["speed"]  # both ranks' images: twice what one would
    images_per_epoch = speed["images_per_second"]["median"] * speed["seconds_per_epoch"]["median"]
    assert images_per_epoch == pytest.approx(64 * PER_EPOCH, rel=0.45)
    assert any("2 ranks" in remark for remark in metrics["remarks"])
    assert metrics["plain"]["test_error"] < 0.5
    model = CifarResNet(20)
    model.load_state_dict(torch.load(run.folder / "plain.pt", weights_only=True))
    wrong = count_wrong(model, Batches(read_image_data("digits"), 32, seed=0).for_testing())
    assert wrong / 450 == metrics["stochastic_depth"]["test_error"]
    assert run.column("step") == list(range(2 * PER_EPOCH))


@pytest.mark.parametrize("name", ["finished", "different", "sample"])
def test_flops_of_both_ranks_add_up(ended: dict[str, Ended], name: str) -> None:
    run = ended[name]
    counted = run.metrics["counted_steps"]
    assert len(counted) == 5
    for step in counted:
        assert step["executed"] == step["expected"]
        assert step["shortened"] == (None if name == "sample" else step["executed"])
        assert step["executed"] < run.metrics["plain"]["flops_per_step"]
    assert 0.1 < run.metrics["flops_saved"] < 0.4


def test_which_blocks_ran(ended: dict[str, Ended]) -> None:
    assert all(mean.is_integer() for mean in ended["finished"].column("blocks_run"))
    # Nine blocks at 1/18 to 9/18 drop 2.5 on average: balanced, both ranks 2 or both 3.
    assert set(ended["different"].column("blocks_run")) == {6.0, 7.0}
    assert ended["sample"].metrics["configuration"]["across_ranks"] == "different"


def test_two_ranks_train_as_one_with_the_batches_of_both(
    ended: dict[str, Ended], tmp_path: Path
) -> None:
    assert images.main([*NO_BATCH_NORM, "--batch-size=128", f"--out={tmp_path}"]) == 0
    one, two = weights(tmp_path), weights(ended["no BatchNorm"].folder)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)


REFUSED = {
    "other draws": "of another run: across_ranks was same, now different",
    "other sampling": "of another run: sampling was independent, now balanced",
    "bad model": "there is no 'resnet111'",
    "bad pair": 'mode="sample" with Draw',
    "too few images": "only 1347 images to train on, for 2 ranks",
    "bad value": "cpu:0 is one device; 2 ranks need cpu or cuda",
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_said_once(ended: dict[str, Ended], name: str) -> None:
    run = ended[name]
    assert run.codes == [2, 2]
    assert re.fullmatch(f"images.py: .*{re.escape(REFUSED[name])}.*\n", run.error), run.error
    assert not run.out
    assert run.folder.exists() == (name in SAME_FOLDER)


@pytest.mark.parametrize("step", [3, PER_EPOCH + 9])
def test_a_killed_rank_ends_the_other_and_restarted_they_end_with_the_same_weights(
    ended: dict[str, Ended], tmp_path: Path, step: int
) -> None:
    """By `torchrun --max-restarts`: from the beginning, or from the last checkpoint."""
    run = [*SHORT, "--epochs=2", f"--out={tmp_path}/out"]
    restarted = start(tmp_path, [run], step, signal.SIGKILL, restarts=1)
    _, error = restarted.communicate(timeout=180)
    assert restarted.returncode == 0, error
    took = (tmp_path / "failed 0").stat().st_mtime - (tmp_path / "signalled").stat().st_mtime
    assert took < 20  # far less than the time-out: the connection broke
    ours, theirs = weights(tmp_path / "out"), weights(ended["finished"].folder)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not value.equal(theirs[name])] == []


def test_a_rank_that_hangs_ends_the_other_after_the_timeout(tmp_path: Path) -> None:
    run = [*SHORT, "--epochs=2", "--timeout=8", f"--out={tmp_path}/out"]
    torchrun = start(tmp_path, [run], 2, signal.SIGSTOP)
    while not (tmp_path / "signalled").exists():
        assert torchrun.poll() is None
        time.sleep(0.05)
    begin = time.monotonic()
    first, other = (int((tmp_path / f"pid {rank}").read_text()) for rank in (0, 1))
    while Path("/proc", str(first)).exists() and time.monotonic() < begin + 30:
        time.sleep(0.05)
    took = time.monotonic() - begin
    os.kill(other, signal.SIGKILL)  # torchrun would, after half a minute
    torchrun.communicate(timeout=60)
    assert 6 < took < 30
    assert torchrun.returncode != 0
