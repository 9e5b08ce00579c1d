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

from interleaved import write
from launching import launched

STEPS = 40
RANKS = (2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps of each variant")
    steps: int = parser.parse_args().steps
    results = {f"{ranks} ranks": launched("distributed_ranks.py", ranks, steps) for ranks in RANKS}
    for name, found in results.items():
        print(name, json.dumps(found, indent=2))
    if steps == STEPS:
        print(write("distributed", results))


if __name__ == "__main__":
    main()
