"""The figures of trained networks: the demo, CIFAR-10, a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from figures_helps import long_error, long_time
from figures_text import RESULTS, machine, over, percent, read


def demo() -> str:
    """What `make demo` printed, as a table, with its picture."""
    run = read("demo/metrics.json")
    rows = _networks([run])
    saving = run["saving"]
    settings = run["configuration"]
    return (
        f"`make demo` trains a ResNet-110 on scikit-learn's handwritten digits twice, side by side "
        f"(drop rate {settings['drop_rate']}, {settings['drop_distribution']}, "
        f"{run['epochs']} epochs):\n\n"
        + rows
        + f"\nIt saved {percent(saving['time_saved'])} of the time; a network with the dropped "
        f"blocks physically removed would have saved {percent(saving['possible'])}. "
        f"({machine(run)})\n\n"
        "![test error over training time](benchmarks/results/demo/error.png)\n"
    )


def cifar() -> str:
    """ResNet-20 on CIFAR-10, over the seeds."""
    return _cifar("cifar10-resnet20-seed*", "../benchmarks/results")


def cifar_gpu() -> str:
    """ResNet-110 on CIFAR-10, on a GPU."""
    return _cifar("cifar10-resnet110-gpu", "../benchmarks/results")


def _cifar(folders: str, results: str) -> str:
    found = sorted(RESULTS.glob(f"{folders}/metrics.json"))
    runs = [read(f"{path.parent.name}/metrics.json") for path in found]
    settings = runs[0]["configuration"]
    saved = [run["saving"]["time_saved"]["value"] for run in runs]
    possible = [run["saving"]["possible"]["value"] for run in runs]
    return (
        f"{settings['model'].replace('resnet', 'ResNet-')} on CIFAR-10, drop rate "
        f"{settings['drop_rate']} linear, {runs[0]['epochs']} epochs, "
        f"{len(runs)} {'seeds' if len(runs) > 1 else 'seed'}:\n\n"
        + _networks(runs)
        + f"\nTime saved: {over(saved, '.1%')}, of a possible {over(possible, '.1%')}. "
        f"({machine(runs[0])})\n\n"
        f"![test error over training time, seed 0]({results}/{found[0].parent.name}/error.png)\n"
    )


def language() -> str:
    """Held-out perplexities of `benchmarks/language.py`."""
    content = read("text.json")
    results = content["results"]
    settings, variants = results["configuration"], results["variants"]
    lines = ["| | " + " | ".join(variants) + " |", "|---|" + "---|" * len(variants)]
    for key, label in (
        ("equal_steps", "perplexity at equal steps"),
        ("equal_flops", "perplexity at equal FLOPs, trained for them"),
        ("equal_flops_on_the_way", "perplexity at equal FLOPs, on the way"),
    ):
        cells = [f"{v[key]['mean']:.3f} ± {v[key]['deviation']:.3f}" for v in variants.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    saved = [over(v["flops_saved"], ".1%") for v in variants.values()]
    lines.append("| FLOPs saved at equal steps | " + " | ".join(saved) + " |")
    return (
        f"{settings['model']}, {settings['steps']} steps on Tiny Shakespeare, "
        f"{len(settings['seed'])} seeds; the trigram baseline has a held-out perplexity of "
        f"{results['trigram_perplexity']:.3f}:\n\n"
        + "\n".join(lines)
        + f"\n\n(`python benchmarks/language.py`; {machine(content)})\n"
    )


def _networks(runs: list[dict[str, Any]]) -> str:
    rows: list[tuple[str, Callable[[dict[str, Any]], float], str]] = [
        ("test error", lambda n: n["test_error"], ".2%"),
        ("images per second", lambda n: n["speed"]["images_per_second"]["median"], ".0f"),
        ("seconds per epoch", lambda n: n["speed"]["seconds_per_epoch"]["median"], ".3g"),
        ("GFLOPs per step", lambda n: n["flops_per_step"] / 1e9, ".2f"),
        ("blocks run per step", lambda n: n["blocks_per_step"], ".1f"),
    ]
    lines = ["| | plain | stochastic depth |", "|---|---|---|"]
    for label, value_of, form in rows:
        cells = [
            over([value_of(run[name]) for run in runs], form)
            for name in ("plain", "stochastic_depth")
        ]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def _steps(case: str) -> Callable[[], str]:
    """The time of a step in `benchmarks/saving.py`, of the plain network's."""
    return lambda: f"{read('saving.json')['results'][case]['to_plain']['value']:.3f}"


def _errors(name: str) -> Callable[[], str]:
    """How many of its test images the demo's network got wrong."""

    def count() -> str:
        run = read("demo/metrics.json")
        return str(round(run[name]["test_error"] * run["test_images"]))

    return count


def _short(value_of: Callable[[dict[str, Any]], float], form: str) -> Callable[[], str]:
    """A mean of the three short trainings on CIFAR-10."""

    def mean() -> str:
        found = sorted(RESULTS.glob("cifar10-resnet20-seed*/metrics.json"))
        return over([value_of(read(f"{path.parent.name}/metrics.json")) for path in found], form)

    return mean


def _cut(way: str) -> Callable[[], str]:
    """The loss of the residual MLP on digits when two of its blocks are left."""
    return lambda: f"{read('cutting.json')['results']['digits']['loss'][way][-1]['mean']:.2f}"


def _lost(run: dict[str, Any]) -> float:
    return 100 * (run["stochastic_depth"]["test_error"] - run["plain"]["test_error"])


NUMBERS: dict[str, Callable[[], str]] = {
    "resnet110_half": _steps("resnet110-0.5"),
    "resnet50_half": _steps("resnet50-0.5"),
    "resnet50_fifth": _steps("resnet50-0.2"),
    "cut_plain": _cut("plain"),
    "cut_dropped": _cut("layer drop, 0.5"),
    "demo_images": lambda: str(read("demo/metrics.json")["test_images"]),
    "demo_errors": _errors("stochastic_depth"),
    "demo_errors_plain": _errors("plain"),
    "long_error": long_error("batch"),
    "long_error_plain": long_error("plain"),
    "long_time": long_time,
    "short_error": _short(lambda run: run["stochastic_depth"]["test_error"], ".2%"),
    "short_error_plain": _short(lambda run: run["plain"]["test_error"], ".2%"),
    "short_lost": _short(_lost, ".1f"),
    "short_saved": _short(lambda run: run["saving"]["time_saved"]["value"], ".1%"),
}
"""Numbers that stand in sentences."""
