"""Whether all ranks are about to draw the same, where a difference would be a hang or worse.

Under `fully_shard` a block that is skipped is not gathered. Were it skipped on one rank alone, the
others would wait for it; were another block of the same shapes skipped there, gradients of one
would silently be added to those of the other.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from stochastic_depth.distributed.groups import on_cpu
from stochastic_depth.errors import SetupError


def check_agreement(block: str, ranks: tuple[int, ...] | None, own: dict[str, object]) -> None:
    """Compare what the draws of a forward follow from; one collective of 16 bytes, on the CPU.

    Args:
        block: The block that is called first in it.
        ranks: Those that have to agree; None: all.
        own: What this rank's draws follow from.

    Raises:
        SetupError: On all ranks, where they differ.
    """
    if ranks is None:
        ranks = tuple(range(dist.get_world_size()))
    if len(ranks) == 1:
        return
    digest = hashlib.blake2b(repr(own).encode(), digest_size=7).digest()
    number = int.from_bytes(digest, "big")
    most = torch.tensor([number, -number], dtype=torch.int64, device="cpu")
    group = on_cpu(ranks)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    if most.tolist() == [number, -number]:
        return
    everybodys: list[dict[str, object]] = [{} for _ in ranks]
    dist.all_gather_object(everybodys, own, group=group)
    first, other = everybodys[0], next(them for them in everybodys if them != everybodys[0])
    key = next(key for key in first if first[key] != other[key])
    raise SetupError(
        f'ranks do not draw the same in the forward that begins with "{block}": {key} is '
        f"{_shown(first[key])} on one, {_shown(other[key])} on another",
        expected="the same seed, rates, steps and calls on all ranks, as their parameters are "
        "sharded over all of them",
        instead="step, force (fixed, disabled) and load the same on all ranks",
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
