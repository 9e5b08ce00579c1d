"""What training on several processes costs, and saves: DistributedDataParallel and fully_shard.

    export PYTHONPATH=examples                  # from a checkout
    python benchmarks/distributed.py            # some seven minutes on two cores
    python benchmarks/distributed.py --steps 5  # a try; nothing is written

Real processes over gloo, each with one thread. Under DistributedDataParallel: the step time with
stochastic depth, beside `find_unused_parameters=True`, which others need. Under `fully_shard`: what
is sent with half of the blocks skipped. And what it costs that ranks compare their draws.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from interleaved import write

STEPS = 40
RANKS = (2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps of each variant")
    steps: int = parser.parse_args().steps
    results = {f"{ranks} ranks": launched(ranks, steps) for ranks in RANKS}
    for name, found in results.items():
        print(name, json.dumps(found, indent=2))
    if steps == STEPS:
        print(write("distributed", results))


def launched(ranks: int, steps: int) -> dict[str, Any]:
    """What that many processes found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks)]
    command.append(str(Path(__file__).with_name("distributed_ranks.py")))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, str(file), str(steps)], env=environment, check=True)
        found: dict[str, Any] = json.loads(file.read_text())
    return found


if __name__ == "__main__":
    main()
