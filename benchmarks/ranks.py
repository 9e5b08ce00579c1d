"""Ranks that drop other blocks wait for the slowest: how long, simulated and on two processes.

    PYTHONPATH=examples python benchmarks/ranks.py            # some twelve minutes on two cores
    PYTHONPATH=examples python benchmarks/ranks.py --quick    # a few steps; nothing is written

Balanced draws balance the number of dropped blocks, not their seconds: "balanced, equal costs" is
what they would come to if all blocks took as long. `work_to_plain` shows how many blocks were drawn
on the two processes; where it differs between variants, so do the images per second by chance.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from interleaved import Ratio, write
from ranks_cases import DRAWS, NETWORKS, RATES, rates_of
from ranks_measured import PROCESSES, measured
from ranks_simulated import WORLDS, simulated, timed, uniforms

PICTURE = Path(__file__).parents[1] / "docs" / "ranks.png"
TARGET = 1.03  # of balanced draws, at 1,024 ranks


@dataclass(frozen=True)
class Amounts:
    """How much is measured."""

    rounds: int = 40  # of timing every block
    simulated: int = 400  # steps
    measured: int = 100  # steps of each variant


QUICK = Amounts(rounds=3, simulated=30, measured=4)


def simulate(amounts: Amounts) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the blocks cost, and each network at each rate."""
    costs: dict[str, Any] = {}
    cases: dict[str, Any] = {}
    for name, network in NETWORKS.items():
        cost, costs[name] = timed(network, amounts.rounds)
        print(name, {k: v for k, v in costs[name].items() if k != "seconds_blocks"}, flush=True)
        for label, rate in RATES.items():
            case = f"{name}, {label}"
            numbers = uniforms(amounts.simulated, WORLDS[-1], len(cost.blocks))
            cases[case] = simulated(cost, rates_of(network, *rate), numbers)
            show_simulated(case, cases[case])
    return costs, cases


def draw_picture(cases: dict[str, dict[str, Any]], file: Path) -> None:
    """A panel for each network and rate, a line for each way to draw."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(len(NETWORKS), len(RATES), sharex=True, sharey=True)
    styles = {"balanced, equal costs": {"linestyle": ":", "color": "black", "marker": ""}}
    for axes, (case, found) in zip(panels.flat, cases.items(), strict=True):
        for name, line in found["slowest_over_mean"].items():
            values = [point.value for point in line]
            axes.plot(found["ranks"], values, label=name, **{"marker": "."} | styles.get(name, {}))
        axes.axhline(TARGET, color="gray", linewidth=0.8, label="target")
        axes.set_title(case, fontsize="medium")
        axes.set_xscale("log", base=2)
        axes.set_xticks(WORLDS, [f"{ranks:,}" for ranks in WORLDS], rotation=45)
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("ranks")
    for axes in panels[:, 0]:
        axes.set_ylabel("slowest rank over mean")
    panels[0, 0].legend()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=120)


def show_simulated(case: str, found: dict[str, Any]) -> None:
    """The ends of the simulated lines."""
    print(f"{case}: {found['dropped_blocks']:.4g} blocks dropped on average", flush=True)
    for name, line in found["slowest_over_mean"].items():
        left = found["saving_left_at_most_ranks"][name]
        print(
            f"  {name}: 2 ranks {line[0]}, {WORLDS[-1]:,} ranks {line[-1]}, "
            f"where {left:.0%} of the saving is left",
            flush=True,
        )


def show_measured(case: str, found: dict[str, Any]) -> None:
    """What the two processes found."""
    print(f"{case}, {PROCESSES} processes, {found['steps']} steps")
    for name in ("plain", *DRAWS):
        speed = found[name]["images_per_second"]
        ratios = {key: Ratio(**value) for key, value in found[name].items() if value is not speed}
        shown = ", ".join(f"{key} {value}" for key, value in ratios.items())
        print(f"  {name}: {speed:.1f} images/s, {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Slowest rank over mean.")
    parser.add_argument("--quick", action="store_true", help="a few steps; nothing is written")
    options = parser.parse_args()
    amounts = QUICK if options.quick else Amounts()
    torch.set_num_threads(1)
    costs, cases = simulate(amounts)
    on_processes = measured(amounts.measured)
    for case, found in on_processes.items():
        show_measured(case, found)
    if not options.quick:
        draw_picture(cases, PICTURE)
        print(write("ranks", {"costs": costs, "simulated": cases, "measured": on_processes}))


if __name__ == "__main__":
    main()
