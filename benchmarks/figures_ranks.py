"""The figures of training on several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from figures_text import machine, ratio, read


def ranks() -> str:
    """How long the slowest rank takes, simulated and measured."""
    content = read("ranks.json")
    results = content["results"]
    lines = [
        "| network, drop rate | drawn | slowest rank over mean, 1,024 ranks (simulated) "
        "| 2 processes (measured) | images per second there |",
        "|---|---|---|---|---|",
    ]
    for name, case in results["simulated"].items():
        for way in ("same", "different", "different, balanced"):
            there = results["measured"][name][way]
            lines.append(
                f"| {name} | {way} | {case['slowest_over_mean'][way][-1]['value']:.3f} "
                f"| {there['slowest_over_mean']['value']:.3f} | {there['images_per_second']:.1f} |"
            )
    return (
        "\n".join(lines)
        + f"\n\n(`python benchmarks/ranks.py`; {machine(content)})\n\n"
        + "![the slowest rank over the mean, by number of ranks](ranks.png)\n"
    )


def distributed() -> str:
    """What DistributedDataParallel, fully_shard and the check across ranks cost."""
    content = read("distributed.json")
    results = content["results"]

    def row(label: str, cell: Callable[[dict[str, Any]], str]) -> str:
        return f"| {label} | " + " | ".join(map(cell, results.values())) + " |"

    def sent(kind: str) -> Callable[[dict[str, Any]], str]:
        def cell(found: dict[str, Any]) -> str:
            counts = found["sharded"]["mebibytes"]
            return f"{counts['half'][kind]:.1f} of {counts['plain'][kind]:.1f} MiB"

        return cell

    def time(part: str, key: str) -> Callable[[dict[str, Any]], str]:
        return lambda found: ratio(found[part][key])

    def check(found: dict[str, Any]) -> str:
        both = [found["check"][f"{key}_milliseconds"] for key in ("median", "95%")]
        return f"{both[0]:.2f} ms (95% within {both[1]:.1f})"

    ddp = "data parallel"
    lines = [
        "| | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
        row(
            "DDP with `find_unused_parameters`, of plain DDP's time",
            time(ddp, "find_unused_to_plain"),
        ),
        row("gated at rate 0, of plain DDP's time", time(ddp, "rate_0_to_plain")),
        row("gated at rate 0.5, of plain DDP's time", time(ddp, "rate_half_to_plain")),
        row("... of the same with `find_unused_parameters`", time(ddp, "rate_half_to_find_unused")),
        row("`fully_shard`, half of the blocks skipped: gathered", sent("gathered")),
        row("... reduced", sent("reduced")),
        row("... of the plain network's time", time("sharded", "half_to_plain")),
        row("the check across ranks, once in a forward", check),
    ]
    return (
        "\n".join(lines)
        + "\n\nA transformer of nine million parameters in 12 blocks; processes of one thread, "
        f"over gloo (`python benchmarks/distributed.py`; {machine(content)})\n"
    )
