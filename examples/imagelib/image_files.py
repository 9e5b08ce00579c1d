"""Finding images on disk, still encoded: parquet files as on the Hugging Face hub, or folders.

Hugging Face `datasets` reads both, in place (streaming): no second copy in its cache folder.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from imagelib import InputError


class EncodedImage(NamedTuple):
    """An image as it lies on disk, its class, and what to call it in an error message."""

    name: str
    content: bytes | str  # a PNG's or JPEG's bytes, or the path of the file
    label: int


class Part:
    """The training part or the test part of a data set; iterating yields its images."""

    def __init__(self, where: str, rows: Any) -> None:
        features = rows.features or {}
        columns = [column for column in ("img", "image") if column in features]
        if not columns or "label" not in features:
            raise InputError(
                f"--data: {where} has the columns {', '.join(features)}; "
                "needed are 'img' or 'image', and 'label'"
            )
        self.where = where
        self._column = columns[0]
        self._rows = _undecoded(rows, self._column)
        self.class_names: tuple[str, ...] | None = None
        if hasattr(features["label"], "names"):
            self.class_names = tuple(features["label"].names)

    def __iter__(self) -> Iterator[EncodedImage]:
        try:
            yield from self._images()
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise InputError(f"--data: cannot read {self.where}: {error}") from error

    def _images(self) -> Iterator[EncodedImage]:
        for number, row in enumerate(self._rows):
            value, label = row[self._column], row["label"]
            name = f"{self.where}, row {number}"
            if not isinstance(label, int):
                raise InputError(f"--data: the label of {name} is {label!r}, not a whole number")
            if isinstance(value, dict) and (value.get("bytes") or value.get("path")):
                name = f"{name} ({value['path']})" if value.get("path") else name
                value = value.get("bytes") or value["path"]
            if not isinstance(value, bytes | str):
                raise InputError(f"--data: {self._column!r} of {name} holds no image")
            yield EncodedImage(name, value, label)


def find_parts(folder: Path) -> tuple[Part, Part]:
    """The training part and the test part (or, where there is none, the validation part)."""
    if not folder.is_dir():
        raise InputError(f"--data: there is no folder {str(folder)!r} (nor is it 'digits')")
    files = sorted(folder.rglob("*.parquet"))
    if files:
        parts = {part: [str(f) for f in files if _part_of(f, folder) == part] for part in _PARTS}
    else:
        parts = {part: _class_folders(folder / part) for part in _PARTS}
    test = parts["test"] or parts["val"]
    if not parts["train"] or not test:
        raise InputError(
            f"--data: {folder} has neither parquet files named train* and test* (or val*), "
            "nor folders train/CLASS/ and test/CLASS/ (or val/CLASS/)"
        )
    kind = "parquet" if files else "imagefolder"
    train_rows, test_rows = _open(kind, folder, parts["train"], test)
    return Part(f"{folder} (train)", train_rows), Part(f"{folder} (test)", test_rows)


_PARTS = ("train", "test", "val")


def _part_of(file: Path, folder: Path) -> str | None:
    """By the hub's names: `data/train-00000-of-00001.parquet`, `default/train/0000.parquet`."""
    for name in reversed(file.relative_to(folder).parts):
        for part in _PARTS:
            if name.startswith(part):
                return part
    return None


def _class_folders(part: Path) -> list[str]:
    if not part.is_dir():
        return []
    return [f"{child}/*" for child in sorted(part.iterdir()) if child.is_dir()]


def _open(kind: str, folder: Path, train: list[str], test: list[str]) -> tuple[Any, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # local files only: never ask the network
    import datasets

    files = {"train": train, "test": test}
    labelled = {"drop_labels": False} if kind == "imagefolder" else {}
    try:
        with tempfile.TemporaryDirectory() as locks:  # nothing else goes there
            rows = datasets.load_dataset(
                kind, data_files=files, streaming=True, cache_dir=locks, **labelled
            )
    except (OSError, ValueError) as error:
        raise InputError(f"--data: cannot read {folder}: {error}") from error
    return rows["train"], rows["test"]


def _undecoded(rows: Any, column: str) -> Any:
    import datasets

    if isinstance(rows.features[column], datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    return rows
