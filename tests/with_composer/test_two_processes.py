"""Promise: under `composer -n 2`, without `find_unused_parameters`, gradients equal the average."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from with_composer import rank_cases

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("ranks")
    launcher = Path(sys.executable).with_name("composer")
    paths = [str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [launcher, "-n", "2", "--stdout", folder / "out{rank}.txt", rank_cases.__file__, folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", rank_cases.CASES)
def test_on_two_processes(results: list[dict[str, str]], case: str) -> None:
    assert [of_rank[case] for of_rank in results] == ["", ""]
