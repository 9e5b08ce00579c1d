"""From images in memory to batches: order, augmentation, and how long the training waited for them.

Order and augmentation are pure functions of (seed, epoch, step), so a resumed run sees the same
batches, and so do two networks that train side by side. Several ranks share each step's images:
together they see what one process would with batches as large as theirs together.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imagelib import InputError
from imagelib.image_data import ImageData, Images
from imagelib.ranks import Ranks


class Batch(NamedTuple):
    images: Tensor  # float, (batch, 3, size, size), zero mean and unit variance
    labels: Tensor


class Batches:
    """The batches of a data set: augmented ones to train on, plain ones to test on."""

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
        *,
        augmented: bool = True,
    ) -> None:
        """`batch_size`: of each rank; `augmented`: whether images to train on are altered."""
        self.data = data
        self.augmented = augmented
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.ranks = ranks
        self.images_per_step = batch_size * ranks.number
        # The last batch, which is not full, is left out.
        self.steps_per_epoch = len(data.train) // self.images_per_step
        if not self.steps_per_epoch:
            shared = f", for {ranks.number} ranks" if ranks.number > 1 else ""
            images = f"{len(data.train)} images to train on{shared}"
            raise InputError(f"--batch-size: there are only {images}")
        mean, deviation = _mean_and_deviation(data.train)
        self._mean, self._deviation = mean.to(self.device), deviation.to(self.device)

    def for_training(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """One epoch: every image once, in a new order, cropped and (where it may be) mirrored.

        `first`: the step of the epoch to begin with.
        """
        order = torch.randperm(len(self.data.train), generator=_generator(self.seed, epoch))
        steps = list(enumerate(order.split(self.images_per_step)[: self.steps_per_epoch]))
        for step, chosen in steps[first:]:
            batch = self._batch(self.data.train, self.ranks.part(chosen))
            if self.augmented:
                generator = _generator(self.seed, epoch, step)
                images = augment(batch.images, generator, flip=self.data.flip, ranks=self.ranks)
                batch = batch._replace(images=images)
            yield batch

    def for_testing(self) -> Iterator[Batch]:
        """The test images in their order, all of them; of several ranks, each has its own."""
        everything = torch.arange(len(self.data.test)).split(2 * self.batch_size)
        for chosen in everything[self.ranks.rank :: self.ranks.number]:
            yield self._batch(self.data.test, chosen)

    def example(self, number: int) -> Tensor:
        """The first training images, as a network sees them."""
        return self._batch(self.data.train, torch.arange(number)).images

    def _batch(self, images: Images, chosen: Tensor) -> Batch:
        pixels = images.pixels[chosen].to(self.device)
        standardised = (pixels.float() - self._mean) / self._deviation
        return Batch(standardised, images.labels[chosen].to(self.device))


def augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    flip: bool,
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
) -> Tensor:
    """Crops each image at random out of itself with a border of zeros; mirrors half of them.

    The border is an eighth of the image: 4 pixels at CIFAR's 32. It is drawn for the images of all
    ranks, on each of them.
    """
    number, _, size, _ = images.shape
    border, drawn = size // 8, (number * ranks.number, 1)
    # Drawn on the CPU, so that every device sees the same crops.
    down = ranks.part(torch.randint(2 * border + 1, drawn, generator=generator))
    right = ranks.part(torch.randint(2 * border + 1, drawn, generator=generator))
    mirrored = ranks.part(torch.rand(drawn, generator=generator)) < (0.5 if flip else 0.0)
    rows = down + torch.arange(size)
    columns = right + torch.where(mirrored, torch.arange(size).flip(0), torch.arange(size))
    padded = F.pad(images, (border,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(number)[:, None, None].to(images.device)
    rows, columns = rows[:, :, None].to(images.device), columns[:, None, :].to(images.device)
    return padded[image, rows, columns].permute(0, 3, 1, 2)


def metered(batches: Iterable[Batch]) -> Iterator[tuple[float, Batch]]:
    """Each batch, and for how many seconds the training waited for it."""
    iterator = iter(batches)
    while True:
        start = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        yield time.perf_counter() - start, batch


def _mean_and_deviation(images: Images) -> tuple[Tensor, Tensor]:
    """Of each colour, over all training images, for which as floats there might be no room."""
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for pixels in images.pixels.split(1000):
        values = pixels.double()
        sums += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
    mean, square = sums / images.pixels[:, 0].numel()
    deviation = (square - mean**2).clamp_min(1.0).sqrt()
    return mean.float().view(-1, 1, 1), deviation.float().view(-1, 1, 1)


def _generator(*numbers: int) -> torch.Generator:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
