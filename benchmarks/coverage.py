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
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from multiprocessing import Lock
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
LARGE = 120_000_000  # parameters: the checks of a model this large take 8 GB of memory and more
_one_at_a_time: AbstractContextManager[object] = nullcontext()


def _use(lock: AbstractContextManager[object]) -> None:
    """Share a lock between the processes, so that large models are checked one at a time."""
    global _one_at_a_time
    _one_at_a_time = lock


def measure(subject: Subject) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    key = f"{subject.library}:{subject.family}"
    row: dict[str, Any] = {"model": subject.name, "note": PLACES.get(key, "")}
    try:
        model = subject.model()
        large = sum(parameter.numel() for parameter in model.parameters()) > LARGE
        with _one_at_a_time if large else nullcontext():
            row |= _compared(subject, model, key)
            del model
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
        with ProcessPoolExecutor(2, initializer=_use, initargs=(Lock(),)) as pool:
            waiting = {pool.submit(measure, subject): subject for subject in wanted}
            for done in as_completed(waiting):
                family = waiting[done].family
                known[family] = done.result()
                print(library, family, known[family], flush=True)
                results[library] = {name: known[name] for name in found if name in known}
                _write(results)


def _write(results: dict[str, Any]) -> None:
    content = {"machine": machine(), "results": {n: results[n] for n in LIBRARIES if n in results}}
    FILE.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(page(json.loads(FILE.read_text())))


def _prefixes(names: Iterable[str]) -> set[str]:
    return {name.partition(":")[0] for name in names}


if __name__ == "__main__":
    main(sys.argv[1:])
