"""Images in memory: everything is decoded once, to bytes of equal size.

In memory means: made for sets such as CIFAR, not for ImageNet; and waiting for data is rare.
"""

import hashlib
import io
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from imagelib import InputError
from imagelib.image_files import EncodedImage, Part, find_parts

Pixels = NDArray[np.uint8]  # (size, size, 3)


@dataclass(frozen=True)
class Images:
    """Pictures and the numbers of the classes that they show."""

    pixels: Tensor  # uint8, (number, 3, size, size)
    labels: Tensor  # int64, (number,)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """Images to train on and images to test on."""

    train: Images
    test: Images
    class_names: tuple[str, ...]
    flip: bool  # whether a mirrored image still shows the same: not so with digits

    @property
    def image_size(self) -> int:
        return self.train.pixels.shape[-1]

    @cached_property
    def fingerprint(self) -> str:
        """Differs when a pixel or a label does: a resumed run must see the same data."""
        digest = hashlib.blake2b(digest_size=8)
        for images in (self.train, self.test):
            digest.update(images.pixels.numpy().tobytes())
            digest.update(images.labels.numpy().tobytes())
        return digest.hexdigest()


def read_image_data(source: str, size: int | None = None) -> ImageData:
    """Reads "digits", a folder of parquet files, or a tree `train/CLASS/*`, `test/CLASS/*`.

    Images become RGB and `size` pixels square; without `size`, as large as the first one.
    """
    if source == "digits":
        return _digits(size)
    train_part, test_part = find_parts(Path(source))
    train = _decode_all(train_part, size, train_part.class_names)
    names = train_part.class_names
    if names is None:
        names = tuple(str(label) for label in range(int(train.labels.max()) + 1))
    test = _decode_all(test_part, train.pixels.shape[-1], names)
    return ImageData(train, test, names, flip=True)


def _digits(size: int | None) -> ImageData:
    """1,797 handwritten digits of 8 x 8 pixels, three quarters of them to train on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    gray = (digits.images * (255 / 16)).round().astype(np.uint8)
    pixels = [_fit(PIL.Image.fromarray(image), size or 8) for image in gray]
    train, test, train_labels, test_labels = train_test_split(
        pixels, digits.target, test_size=450, stratify=digits.target, random_state=0
    )
    return ImageData(
        _stack(train, train_labels.tolist()),
        _stack(test, test_labels.tolist()),
        class_names=tuple("0123456789"),
        flip=False,
    )


def _decode_all(part: Part, size: int | None, class_names: tuple[str, ...] | None) -> Images:
    pixels: list[Pixels] = []
    labels: list[int] = []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for image in _shown(part):
        if image.label < 0 or (class_names and image.label >= len(class_names)):
            allowed = f"0 to {len(class_names) - 1}" if class_names else "0 or more"
            raise InputError(f"--data: the label of {image.name} is {image.label}, not {allowed}")
        pixels.append(_decode(image, size))
        labels.append(image.label)
        size = len(pixels[0])
        if len(pixels) * pixels[0].nbytes > memory / 4:
            raise InputError(f"--data: {part.where} is too large to lie in memory, {size} x {size}")
    if not pixels:
        raise InputError(f"--data: {part.where} has no images")
    return _stack(pixels, labels)


def _shown(part: Part) -> Iterable[EncodedImage]:
    silent = not sys.stdout.isatty()
    return track(part, f"Reading {part.where}", transient=True, disable=silent)


def _decode(image: EncodedImage, size: int | None) -> Pixels:
    content = image.content
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        with PIL.Image.open(file) as found:
            return _fit(found, size or min(found.size))
    except (OSError, SyntaxError, ValueError) as error:  # a broken PNG is a SyntaxError to Pillow
        raise InputError(f"--data: cannot read the image {image.name}") from error


def _fit(image: PIL.Image.Image, size: int) -> Pixels:
    """As RGB, scaled and cut at the centre to a square where it is not one of this size."""
    image = image.convert("RGB")
    if image.size != (size, size):
        image = PIL.ImageOps.fit(image, (size, size), PIL.Image.Resampling.BICUBIC)
    return np.asarray(image)


def _stack(pixels: list[Pixels], labels: list[int]) -> Images:
    channels_first = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Images(channels_first, torch.tensor(labels))
