"""One process of several that `torchrun` started: what they tell each other, and who speaks.

Each rank trains on its own part of every step's images; Fabric averages the gradients. The first
rank alone prints and writes. A rank that is gone, or hangs, ends the others: at once where its
connection breaks, else after the time-out of `--timeout`.
"""

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from imagelib import InputError

Made = TypeVar("Made")

PATIENCE = timedelta(seconds=10)  # how long the others wait for the first rank to say what is wrong
_SAID = "said"
_meetings = itertools.count()  # of one process, so that a program can call `main` repeatedly


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together; by itself it is the first of one."""

    rank: int = 0
    number: int = 1
    store: Any = None  # where they meet before, and beside, the process group
    restarted: bool = False  # by `torchrun --max-restarts`, after one of them was gone

    def connect(self, device: torch.device, seconds: int) -> None:
        """Who does not answer for so many seconds counts as gone."""
        if self.store is not None:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=self.store,
                rank=self.rank,
                world_size=self.number,
                timeout=timedelta(seconds=seconds),
            )

    def sum(self, values: Sequence[float]) -> list[float]:
        """Of each value, its sum over the ranks."""
        if self.number == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return cast(list[float], total.tolist())

    def any(self, *, asked: bool) -> bool:
        """Whether one of them asked."""
        return self.sum([float(asked)])[0] > 0

    def part(self, everything: Tensor) -> Tensor:
        """This rank's part of what all of them share."""
        return everything.chunk(self.number)[self.rank]

    def meet(self) -> None:
        """Go on when all have come here."""
        self.sum([0.0])

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        if self.number > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def from_first(self, make: Callable[[], Made]) -> Made:
        """What the first rank makes, or why it cannot, for all of them."""
        if self.number == 1:
            return make()
        made, problem = None, None
        if self.rank == 0:
            try:
                made = make()
            except (InputError, OSError) as error:
                problem = str(error)
        message = [made, problem]
        dist.broadcast_object_list(message, src=0)
        if message[1] is not None:
            raise InputError(message[1])
        return cast(Made, message[0])

    def complain(self, message: str) -> None:
        """Said once: by another rank only where the first has not said anything for a while."""
        if self.store is not None and self.rank > 0:
            try:
                self.store.wait([_SAID], PATIENCE)
            except RuntimeError:
                message = f"rank {self.rank}: {message}"
            else:
                return
        print(message, file=sys.stderr, flush=True)
        if self.store is not None:
            self.store.set(_SAID, message)


@contextmanager
def together() -> Iterator[Ranks]:
    """This process and those beside it, where `torchrun` started several."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Ranks()
        return
    number = int(os.environ["WORLD_SIZE"])
    if number == 1:
        yield Ranks()
        return
    store, rank, number = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # The store outlives a restart, and with it the addresses of those who are gone.
    own = f"images {attempt}.{next(_meetings)}"
    store = dist.PrefixStore(own, store)  # type: ignore[attr-defined]
    try:
        if rank == 0:
            yield Ranks(rank, number, store, attempt != "0")
        else:
            with _silence():
                yield Ranks(rank, number, store, attempt != "0")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stdout, and no warnings: the first rank's are the same."""
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def fabric_on(
    device: torch.device, precision: Literal["32-true", "bf16-mixed"], ranks: Ranks
) -> Fabric:
    """Several ranks: each on a GPU of its own, or all on the CPU, under DistributedDataParallel."""
    if ranks.number == 1:
        devices: list[int] | int = [device.index or 0] if device.type == "cuda" else 1
        return Fabric(accelerator=device.type, devices=devices, precision=precision)
    local, found = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if str(device) not in ("cpu", "cuda"):
        raise InputError(f"--device: {device} is one device; {ranks.number} ranks need cpu or cuda")
    if device.type == "cuda" and found < local:
        raise InputError(f"--device: {local} ranks need as many GPUs; here are {found}")
    return Fabric(
        accelerator=device.type,
        strategy="ddp",
        devices=local,
        num_nodes=ranks.number // local,
        precision=precision,
    )
