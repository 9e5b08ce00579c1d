"""This process among others: its rank, and groups whose collectives do not wait for a device."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def is_running() -> bool:
    """Whether this process is one of several that know each other."""
    return dist.is_available() and dist.is_initialized()


def place(process_group: Any) -> tuple[int, int]:
    """This process's rank, and how many there are in the group (None: all)."""
    if not is_running():
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def ranks_in(process_group: Any) -> frozenset[int]:
    """The ranks of a group (None: all)."""
    if not is_running():
        return frozenset()
    return frozenset(dist.get_process_group_ranks(process_group or dist.group.WORLD))


_of_ranks: dict[tuple[Any, tuple[int, ...]], Any] = {}


def on_cpu(ranks: tuple[int, ...]) -> Any:
    """A group of these ranks whose collectives do not wait for a device; made by all of them."""
    world = dist.group.WORLD
    if dist.get_backend(world) == "gloo" and len(ranks) == dist.get_world_size():
        return world
    key = (world, ranks)  # a world that was destroyed took its groups along
    if key not in _of_ranks:
        group = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
        _of_ranks[key] = group
    return _of_ranks[key]
