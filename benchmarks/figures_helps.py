"""The figures that ask whether it helps: the error, the scale, cutting, and what is foretold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from figures_text import machine, read

NAMES = {"resnet56": "ResNet-56", "resnet110": "ResNet-110", "vit": "ViT, 12 layers of 64"}
ENOUGH = 2  # seeds, to say how sure a mean is


def errors() -> str:
    """Test errors at the end of long trainings on few images, of all runs that were begun."""
    content = read("errors.json")
    settings, runs = content["results"]["settings"], content["results"]["runs"]
    epochs = {int(images): number for images, number in settings["epochs"].items()}
    groups: dict[tuple[str, int, bool], dict[str, list[dict[str, Any]]]] = defaultdict(dict)
    for run in runs.values():
        ways = groups[run["network"], run["images"], run["augmented"]]
        ways.setdefault(run["way"], []).append(run)
    lines = [
        "| network, images | way | test error | of plain's time "
        "| ahead of plain for good, from epoch | seeds at the end |",
        "|---|---|---|---|---|---|",
    ]
    for (network, images, augmented), ways in groups.items():
        whole, altered = epochs[images], ", augmented" if augmented else ""
        for way, found in ways.items():
            done = [run for run in found if run["epochs"] == whole]
            plain = {run["seed"]: run for run in ways.get("plain", ()) if run["epochs"] == whole}
            pairs = [(run, plain[run["seed"]]) for run in done if run["seed"] in plain]
            lines.append(
                f"| {NAMES[network]}, {images:,}{altered} | {_way(way)} | {_mean(done)} "
                f"| {_time(way, pairs)} | {_ahead(way, pairs)} | {len(done)} of {len(found)} |"
            )
    return (
        "\n".join(lines) + f"\n\n{_epochs(epochs)} of CIFAR-10, {settings['pixels']} pixels, "
        f"batch {settings['batch']}, bfloat16; drop rate {settings['drop_rate']} linear (the ViT: "
        "float32, 0.2); augmented: on random crops, half of them mirrored. Means over the "
        "seeds with their standard error, at the end of the training, on 10,000 test images; the "
        "time is a core's. A run that is not at its end says nothing yet "
        f"(`python benchmarks/errors.py`; {machine(content)}).\n"
    )


def _long(way: str) -> list[dict[str, Any]]:
    """The runs of ResNet-56 on 2,000 images as they are that are at their end."""
    content = read("errors.json")["results"]
    whole = content["settings"]["epochs"]["2000"]
    found = [r for r in content["runs"].values() if r["network"] == "resnet56"]
    found = [r for r in found if r["images"] == 2000 and r["way"] == way and not r["augmented"]]
    return [run for run in found if run["epochs"] == whole]


def long_error(way: str) -> Callable[[], str]:
    """Their test error."""
    return lambda: _mean(_long(way))


def long_time() -> str:
    """The time of those with stochastic depth, of that of those without."""
    plain = {run["seed"]: run for run in _long("plain")}
    return _time("batch", [(r, plain[r["seed"]]) for r in _long("batch") if r["seed"] in plain])


def _epochs(epochs: dict[int, int]) -> str:
    return ", ".join(f"{number} epochs on {images:,} images" for images, number in epochs.items())


def _way(way: str) -> str:
    names = {"plain": "plain", "batch": 'mode "batch", scale "eval"', "sample": 'mode "sample"'}
    return names.get(way, f'mode "batch", scale "{way}"')


def _mean(done: list[dict[str, Any]]) -> str:
    values = [run["curve"][-1][1] for run in done]
    if not values:
        return "-"
    spread = f" ± {stdev(values) / len(values) ** 0.5:.1%}" if len(values) >= ENOUGH else ""
    return f"{mean(values):.1%}{spread}"


def _time(way: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    pairs = [(run, plain) for run, plain in pairs if run["processor"] == plain["processor"]]
    if way == "plain" or not pairs:
        return ""
    return f"{mean(run['seconds'] / plain['seconds'] for run, plain in pairs):.0%}"


def _ahead(way: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """From which epoch on its error was lower at every look; with each seed."""
    if way == "plain" or not pairs:
        return ""
    found = []
    for run, plain in pairs:
        behind = [
            epoch
            for (epoch, ours, _), (_, theirs, _) in zip(run["curve"], plain["curve"], strict=True)
            if ours >= theirs
        ]
        last = behind[-1] if behind else 0
        after = [epoch for epoch, *_ in run["curve"] if epoch > last]
        found.append(str(after[0]) if after else "never")
    return ", ".join(found)


def cutting() -> str:
    """What is left of networks when blocks are taken out."""
    content = read("cutting.json")
    tables = []
    for name, task in content["results"].items():
        blocks = [f"{n} blocks" for n in task["blocks"]]
        lines = [
            f"| {name}, trained | " + " | ".join(blocks) + " |",
            "|---|" + "---|" * len(blocks),
        ]
        for way, row in task["loss"].items():
            cells = (f"{each['mean']:.3f} ± {each['error']:.3f}" for each in row)
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines.append(f"\n{task['measure']}; {task['seeds']} seeds.")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + f"\n\n(`python benchmarks/cutting.py`; {machine(content)})\n"


def estimate() -> str:
    """What was foretold beside what was saved."""
    content = read("estimate.json")
    lines = [
        "| network, drop rate | FLOPs, foretold | time, foretold | time saved |",
        "|---|---|---|---|",
    ]
    for name, case in content["results"]["models"].items():
        saved = case["saved_time"]
        lines.append(
            f"| {name}, {case['drop_rate']} linear | {case['estimated_flops']:.1%} "
            f"| {case['estimated_time']:.1%} "
            f"| {saved['value']:.1%} ({saved['low']:.1%} to {saved['high']:.1%}) |"
        )
    return "\n".join(lines) + f"\n\n(`python benchmarks/estimate.py`; {machine(content)})\n"
