"""Real processes: launch a script of the tests on several ranks, and read what each case gave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

TESTS = Path(__file__).parent


def launch(
    script: str,
    ranks: int,
    folder: Path,
    only: Sequence[str] = (),
    *,
    seconds: int = 400,
    device: str = "cpu",
) -> dict[str, str]:
    """What each case of the script gave on the first rank that it failed on: "" for nothing.

    Args:
        script: A file of the tests that ends in `report(cases)`.
        ranks: How many processes.
        folder: Where they leave their results.
        only: The names of the cases to run; without any, all.
        seconds: After that it counts as hung.
        device: Where their tensors are made; on "cpu" they talk over gloo, on "cuda" over NCCL.
    """
    source = TESTS.parent / "src"
    paths = [str(source), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"DEVICE": device, "PYTHONFAULTHANDLER": "1"}  # says where one dies
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(TESTS / script), str(folder), *only]
    for _ in range(2):
        for file in _files(folder, ranks):
            file.unlink(missing_ok=True)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        # Once in some hundred launches torch's native code spoils the heap ("free(): invalid size"
        # in the collectives of gloo), and the process dies on a signal. No line of Python can.
        if "Fatal Python error" not in done.stderr:
            break
    if done.returncode:
        raise AssertionError(done.stdout[-2000:] + done.stderr[-12000:])
    found: dict[str, str] = {}
    for rank, file in enumerate(_files(folder, ranks)):
        for case, wrong in json.loads(file.read_text()).items():
            found[case] = found.get(case, "") or (wrong and f"rank {rank}: {wrong}")
    return found


def _files(folder: Path, ranks: int) -> list[Path]:
    """Where each of so many ranks leaves its results."""
    return [folder / f"{rank}-of-{ranks}.json" for rank in range(ranks)]


def report(cases: Callable[[], Mapping[str, Callable[[], None]]]) -> None:
    """Run those cases that are asked for on this rank, and write down which raised what."""
    device = os.environ["DEVICE"]
    torch.set_default_device(device)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    folder, *only = sys.argv[1:]
    results = {}
    for name, case in cases().items():
        if only and name not in only:
            continue
        sys.stderr.write(f"rank {dist.get_rank()}: {name}\n")  # shown where this process dies
        try:
            case()
            results[name] = ""
        except (Exception, pytest.fail.Exception):
            results[name] = traceback.format_exc()[-1500:]
        dist.barrier()
    files = _files(Path(folder), dist.get_world_size())
    files[dist.get_rank()].write_text(json.dumps(results))
    # Not `destroy_process_group`: in torch 2.6 it waits forever for gloo, once in a while. Who goes
    # first would cut the barrier of the others, so all wait until the last has written.
    while not all(file.exists() for file in files):
        time.sleep(0.01)
    # Threads of torch's that still let go of a tensor abort a Python that is ending under them.
    sys.stdout.flush()
    os._exit(0)


def leave() -> None:
    """End this process's group.

    Torch 2.6 holds Python's lock while it waits for gloo's threads, which may need that to let go
    of the last tensors: they are given time to do so before.
    """
    if torch.__version__ < "2.7":
        time.sleep(0.5)
    dist.destroy_process_group()


def results_of(script: str, ranks: int, *, seconds: int = 400) -> Any:
    """A fixture: what `launch` gives for the cases of a module that pytest runs."""

    @pytest.fixture(scope="module")
    def results(asked_for: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        return launch(script, ranks, tmp_path_factory.mktemp("ranks"), asked_for, seconds=seconds)

    return results
