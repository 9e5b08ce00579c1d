"""`torchrun examples/fsdp.py`: sharded training goes on exactly, whatever happens on the way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fsdp
from textlib.gpt import GPT
from textlib.text_data import read_text
from textlib.windows import Windows

EXAMPLES = Path(fsdp.__file__).parent
TEXT = EXAMPLES / "textlib" / "data" / "coriolanus.txt"
STEPS, EVERY, KILLED_AT = 12, 4, 6
OPTIONS = f"--data=text:{TEXT} --steps={STEPS} --checkpoint-every={EVERY} --timeout=60".split()
OPTIONS += ["--context=16", "--lr=0.01"]

# The example, whose second rank kills itself at a step where it has not been restarted yet.
KILLED = f"""
import os, signal, sys
import fsdp
report = fsdp.report

def report_or_die(step, *arguments):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and step == {KILLED_AT} and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    report(step, *arguments)

fsdp.report = report_or_die
fsdp.end(fsdp.main())
"""


def torchrun(ranks: int, script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    paths = [str(EXAMPLES.parent / "src"), str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={ranks}", "--max-restarts=1", str(script), *OPTIONS]
    return subprocess.run(
        [*command, *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def blocks_run(printed: str) -> dict[int, int]:
    """How many blocks ran in each step that was reported."""
    found = re.findall(r"step (\d+): loss [\d.]+, (\d+) of 8 blocks run", printed)
    return {int(step): int(blocks) for step, blocks in found}


def losses(printed: str) -> dict[int, float]:
    found = re.findall(r"step (\d+): loss ([\d.]+)", printed)
    return {int(step): float(loss) for step, loss in found}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run on two ranks, and what it printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = torchrun(2, EXAMPLES / "fsdp.py", "--compile=none", f"--out={folder}")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_it_learns_and_skips(undisturbed: tuple[Path, str]) -> None:
    _, printed = undisturbed
    assert list(losses(printed)) == list(range(1, STEPS + 1))
    assert losses(printed)[STEPS] < losses(printed)[1] - 0.5
    assert 8 in blocks_run(printed).values()  # in the warmup
    assert min(blocks_run(printed).values()) < 7


def test_the_weights_that_it_leaves_are_those_of_a_plain_model(
    undisturbed: tuple[Path, str],
) -> None:
    folder, printed = undisturbed
    text = read_text(TEXT, "char", 16)
    model = GPT(text.vocabulary, 16, **fsdp.SIZE)
    model.load_state_dict(torch.load(folder / "model.pt"))
    batch = Windows(text, 16, 16, seed=0).for_training(STEPS)
    with torch.no_grad():
        scores = model.eval()(batch.tokens).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(scores, batch.following.flatten())
    assert loss < losses(printed)[1] - 0.5


def test_a_killed_rank_is_started_again_from_the_last_checkpoint(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = torchrun(2, script, "--compile=none", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]
    # The step that it died in was reported by neither; it goes on behind the checkpoint.
    again = [*range(1, KILLED_AT + 1), *range(EVERY + 1, STEPS + 1)]
    assert [int(step) for step in re.findall(r"step (\d+)", done.stdout)] == again
    ours, theirs = (torch.load(folder / "model.pt") for folder in (tmp_path, undisturbed[0]))
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_other_ranks_and_compiled_blocks_draw_on_alike(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    folder, printed = undisturbed
    shutil.copytree(folder / f"step-{2 * EVERY}", tmp_path / f"step-{2 * EVERY}")
    (tmp_path / "last").write_text(str(2 * EVERY))
    done = torchrun(4, EXAMPLES / "fsdp.py", "--compile=aot_eager", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]
    rest = range(2 * EVERY + 1, STEPS + 1)
    assert blocks_run(done.stdout) == {step: blocks_run(printed)[step] for step in rest}
    for step, loss in losses(done.stdout).items():
        # Four sums in the place of two: printed with four digits, the losses part by one at most.
        assert abs(loss - losses(printed)[step]) < 2e-4, step


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data=text:nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["--drop-rate=1"], "--drop-rate"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], says: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    try:
        code = fsdp.main([*OPTIONS, *options, f"--out={tmp_path}"])
    except SystemExit as ended:
        code = ended.code  # type: ignore[assignment]
    assert code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert says in line


def test_without_torchrun_it_says_so(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fsdp.main([*OPTIONS, f"--out={tmp_path}"]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "torchrun" in line
