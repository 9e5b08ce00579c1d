"""Scripts that measure on several processes: how they are launched, and what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def launched(script: str, processes: int, steps: int) -> dict[str, Any]:
    """What the first of so many processes wrote into the file that it was given."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(Path(__file__).with_name(script))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, str(file), str(steps)], env=environment, check=True)
        results: dict[str, Any] = json.loads(file.read_text())
    return results
