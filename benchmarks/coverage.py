"""Which models the library finds all branches of, and skips exactly: `make coverage`.

    export PYTHONPATH=src:examples            # from a checkout
    python benchmarks/coverage.py             # all three libraries, an hour or so on two cores
    python benchmarks/coverage.py timm        # one of them
    python benchmarks/coverage.py "timm:cait cait"   # one family
    python benchmarks/coverage.py --missing   # what has no row yet

Each model is set beside what others say of it: timm's own drop path calls; for torchvision and
transformers the additions in the source of their layers. Then each is checked against hooks that
force branches to zero. The result file keeps what was measured before for what is not run.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

import torch

from coveragelib.checks import check, pasted
from coveragelib.explained import LEFT_OUT, PLACES
from coveragelib.page import page
from coveragelib.places import places
from coveragelib.predictable import RATE
from coveragelib.subjects import LIBRARIES, Subject
from imagelib.machine import machine
from interleaved import RESULTS
from stochastic_depth import RefusedBlockError
from stochastic_depth.discovery import watch

FILE = RESULTS / "coverage.json"
PAGE = RESULTS.parents[1] / "docs" / "coverage.md"
LARGE = 120_000_000  # parameters: the checks of a larger model take 6 to 14 GB of memory
AT_ONCE = 30  # models: what a process keeps of those before piles up


def measure(subject: Subject, *, at_most: float = math.inf) -> dict[str, Any]:
    """One row of the table; empty where the model has more parameters than these."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    key = f"{subject.library}:{subject.family}"
    row: dict[str, Any] = {"model": subject.name, "note": PLACES.get(key, "")}
    try:
        model = subject.model()
        if sum(parameter.numel() for parameter in model.parameters()) > at_most:
            return {}
        row |= _compared(subject, model, key)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    row["seconds"] = round(time.perf_counter() - start)
    return row


def _compared(subject: Subject, model: Any, key: str) -> dict[str, Any]:
    example = subject.example(model, 2)
    found, _ = watch(model, example, None)
    row = asdict(places(subject, model, example, found))
    if row["found"]:
        row |= _checked(subject, model, example, found, key)
    return row


def _checked(subject: Subject, model: Any, example: Any, found: Any, key: str) -> dict[str, Any]:
    try:
        keep = pasted(model, example)
    except RefusedBlockError as error:
        return {"refused": str(error).partition(" Expected")[0][:200]}
    row = asdict(check(model, example, subject.example(model, 6), found, keep))
    row["dropout"] = RATE
    return row if keep is None else row | {"left_out": f"{len(keep)} blocks: {LEFT_OUT.get(key)}"}


def main(arguments: Sequence[str]) -> None:
    """Measure the named libraries or families, or all; write each row as soon as it is there."""
    names = [argument for argument in arguments if argument != "--missing"]
    content: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    results: dict[str, dict[str, Any]] = content.get("results", {})
    for library in (name for name in LIBRARIES if not names or name in _prefixes(names)):
        whole = not names or library in names
        known = results.get(library, {})
        found = {subject.family: subject for subject in LIBRARIES[library]()}
        wanted = [
            subject
            for subject in found.values()
            if (whole or f"{library}:{subject.family}" in names)
            and not ("--missing" in arguments and subject.family in known)
        ]
        for family, row in _rows(wanted):
            known[family] = row
            print(library, family, row, flush=True)
            results[library] = {name: known[name] for name in found if name in known}
            _write(results)


def _rows(wanted: Sequence[Subject]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of these models: two at a time, and then the large ones, each in a new process.

    Two large ones, or what a process keeps of one before, fill the memory.
    """
    large: list[Subject] = []
    for first in range(0, len(wanted), AT_ONCE):
        some = wanted[first : first + AT_ONCE]
        with ProcessPoolExecutor(2) as pool:
            waiting = {pool.submit(measure, each, at_most=LARGE): each for each in some}
            for done in as_completed(waiting):
                row = done.result()
                if row:
                    yield waiting[done].family, row
                else:
                    large.append(waiting[done])
    for subject in large:
        with ProcessPoolExecutor(1) as pool:
            yield subject.family, pool.submit(measure, subject).result()


def _write(results: dict[str, Any]) -> None:
    content = {"machine": machine(), "results": {n: results[n] for n in LIBRARIES if n in results}}
    FILE.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(page(json.loads(FILE.read_text())))


def _prefixes(names: Iterable[str]) -> set[str]:
    return {name.partition(":")[0] for name in names}


if __name__ == "__main__":
    main(sys.argv[1:])
