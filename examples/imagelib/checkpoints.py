"""Checkpoints that survive being killed: written beside the old one, then put in its place.

The one before is kept too, for the day that the newest turns out to be damaged.
"""

import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from imagelib import InputError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is complete."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Checkpoints:
    """The newest checkpoint in a folder, and the one before."""

    def __init__(self, folder: Path, configuration: dict[str, object]) -> None:
        """`configuration`: what a run that goes on must have in common with the one that began."""
        self.configuration = configuration
        self.newest = folder / "checkpoint.pt"
        self.before = folder / "checkpoint.before.pt"

    def any(self) -> bool:
        """Whether there is one."""
        return self.newest.exists() or self.before.exists()

    def save(self, state: dict[str, Any]) -> None:
        with replacing(self.newest) as file:
            torch.save({**state, "configuration": self.configuration}, file)
            if self.newest.exists():
                self.newest.replace(self.before)

    def load(self) -> dict[str, Any]:
        """The newest state that can be read; where the newest file cannot, with a warning."""
        damaged = None
        for path in (self.newest, self.before):
            state = _read(path) if path.exists() else None
            if state is not None:
                self._refuse_other(path, state.get("configuration", {}))
                if damaged:
                    print(f"{damaged} is damaged: going on from {path}", file=sys.stderr)
                    damaged.replace(damaged.with_suffix(".damaged"))
                return state
            if path.exists():
                damaged = path
        missing = f"there is no {self.newest} to go on from"
        raise InputError(f"--resume: {f'{damaged} is damaged' if damaged else missing}")

    def _refuse_other(self, path: Path, theirs: dict[str, object]) -> None:
        ours = self.configuration
        differences = [
            f"{name} was {theirs.get(name)}, now {ours.get(name)}"
            for name in {**theirs, **ours}
            if theirs.get(name) != ours.get(name)
        ]
        if differences:
            raise InputError(f"--resume: {path} is of another run: {'; '.join(differences)}")


def _read(path: Path) -> dict[str, Any] | None:
    """None where the file is damaged: cut short, or a byte has changed (its checksums tell)."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.PickleError):
        return None
    return state
