"""Copies the figures of README and docs from the result files: `python benchmarks/figures.py`.

A figure stands between `<!-- figure: NAME -->` and `<!-- end -->`. The tests run `rendered` and
compare, so that no figure can differ from its file.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coveragelib.page import counts

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "measured.md", ROOT / "docs" / "training.md")
_FIGURE = re.compile(r"(<!-- figure: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(text: str) -> str:
    """The text with every figure as its result file has it."""
    return _FIGURE.sub(lambda match: match[1] + FIGURES[match[2]]() + match[3], text)


def demo() -> str:
    """What `make demo` printed, as a table, with its picture."""
    run = _read("demo/metrics.json")
    rows = _networks([run])
    saving = run["saving"]
    settings = run["configuration"]
    return (
        f"`make demo` trains a ResNet-110 on scikit-learn's handwritten digits twice, side by side "
        f"(drop rate {settings['drop_rate']}, {settings['drop_distribution']}, "
        f"{run['epochs']} epochs):\n\n"
        + rows
        + f"\nIt saved {_percent(saving['time_saved'])} of the time; a network with the dropped "
        f"blocks physically removed would have saved {_percent(saving['possible'])}. "
        f"({_machine(run)})\n\n"
        "![test error over training time](benchmarks/results/demo/error.png)\n"
    )


def cifar() -> str:
    """ResNet-20 on CIFAR-10, over the seeds."""
    return _cifar("cifar10-resnet20-seed*", "benchmarks/results")


def cifar_gpu() -> str:
    """ResNet-110 on CIFAR-10, on a GPU."""
    return _cifar("cifar10-resnet110-gpu", "../benchmarks/results")


def _cifar(folders: str, results: str) -> str:
    found = sorted(RESULTS.glob(f"{folders}/metrics.json"))
    runs = [_read(f"{path.parent.name}/metrics.json") for path in found]
    settings = runs[0]["configuration"]
    saved = [run["saving"]["time_saved"]["value"] for run in runs]
    possible = [run["saving"]["possible"]["value"] for run in runs]
    return (
        f"{settings['model'].replace('resnet', 'ResNet-')} on CIFAR-10, drop rate "
        f"{settings['drop_rate']} linear, {runs[0]['epochs']} epochs, "
        f"{len(runs)} {'seeds' if len(runs) > 1 else 'seed'}:\n\n"
        + _networks(runs)
        + f"\nTime saved: {_over(saved, '.1%')}, of a possible {_over(possible, '.1%')}. "
        f"({_machine(runs[0])})\n\n"
        f"![test error over training time, seed 0]({results}/{found[0].parent.name}/error.png)\n"
    )


def saving() -> str:
    """Ratios of step times from `benchmarks/saving.py`."""
    return _saving("saving.json")


def saving_gpu() -> str:
    """The same on a GPU."""
    return _saving("saving-gpu.json")


def _saving(file: str) -> str:
    content = _read(file)
    lines = [
        "| network, drop rate | time, of the plain network's | of the shortened network's "
        "| peak memory, of the plain network's |",
        "|---|---|---|---|",
    ]
    for name, case in content["results"].items():
        if "to_plain" in case:
            memory = case["peak_mebibytes_gated"] / case["peak_mebibytes_plain"]
            label = f"{name.split('-')[0]}, {case['drop_rate']} {case['distribution']}"
            if case.get("scale", "eval") != "eval":
                label += f', scale "{case["scale"]}"'
            lines.append(
                f"| {label} | {_ratio(case['to_plain'])} | {_ratio(case['to_shortened'])} "
                f"| {memory:.2f} |"
            )
    return (
        "\n".join(lines)
        + "\n\nTraining steps that take turns in one process, with 95% confidence intervals "
        "(`python benchmarks/saving.py`). The shortened network has the dropped blocks physically "
        f"taken out, step by step. ({_machine(content)})\n"
    )


def gates() -> str:
    """What a gate costs where Python is what takes long, from `benchmarks/gates.py`."""
    content = _read("gates.json")
    lines = ["| what | figure | unit | at most |", "|---|---|---|---|"]
    for name, line in content["results"]["lines"].items():
        target = "" if line["target"] is None else f"{line['target']:.3g}"
        lines.append(f"| {name} | {_ratio(line['figure'])} | {line['unit']} | {target} |")
    return (
        "\n".join(lines)
        + "\n\nResNet-110 on two images of 8 pixels, beside a twin that leaves the same blocks out "
        f"by hand (`python benchmarks/gates.py`; {_machine(content)}).\n"
    )


def composer() -> str:
    """The same ResNet-50 under the same draws, beside Composer's block mode."""
    content = _read("beside_composer.json")
    results = content["results"]
    parts = [
        f"{_ratio(case['ours_to_composer'])} at {name.split('-')[1]}"
        for name, case in results.items()
        if name != "mosaicml"
    ]
    return (
        f"Beside Composer {results['mosaicml']}'s block mode, on the same ResNet-50 under the same "
        f"draws, our steps take {' and '.join(parts)} of the time of theirs "
        f"(`python benchmarks/beside_composer.py`; {_machine(content)}).\n"
    )


def coverage() -> str:
    """How many models' branches are found, as others see them, and skipped exactly."""
    content = _read("coverage.json")
    lines = [
        "| library | families | agree with the ground truth | exact | refused |",
        "|---|---|---|---|---|",
    ]
    for library, rows in content["results"].items():
        n = counts(rows)
        lines.append(
            f"| {library} | {n.known} | {n.agree} ({n.agree / n.known:.0%}) "
            f"| {n.exact} of {n.checked} | {n.refused} |"
        )
    return (
        "\n".join(lines)
        + "\n\nThe ground truth is timm's own drop path calls, one by one and in order; for the "
        "others the additions in the source of their layers. Exact: outputs and gradients equal "
        "those of the plain model whose branches hooks force to zero. Each model, and why a few "
        f"differ: [docs/coverage.md](docs/coverage.md) (`make coverage`; {_machine(content)}).\n"
    )


def sample() -> str:
    """What mode "sample" saves, beside the ways that others have."""
    return _sample("sample.json")


def sample_gpu() -> str:
    """The same on a GPU."""
    return _sample("sample-gpu.json")


def _sample(file: str) -> str:
    content = _read(file)
    lines = [
        "| network | way | time, of the plain network's | share of the possible saving | memory |",
        "|---|---|---|---|---|",
    ]
    for name, case in content["results"].items():
        memory = case["peak_mebibytes"]
        for way, found in case["ways"].items():
            share = found["share_of_possible"]
            lines.append(
                f"| {name} | {way} | {_ratio(found['to_plain'])} | {share['value']:.0%} "
                f"({share['low']:.0%} to {share['high']:.0%}) "
                f"| {memory[way] / memory['plain']:.2f} |"
            )
    return "\n".join(lines) + f"\n\n(`python benchmarks/sample.py`; {_machine(content)})\n"


def compiled() -> str:
    """What `depth.compile()` costs and saves, beside eager."""
    return _compiled("compile.json")


def compiled_gpu() -> str:
    """The same on a GPU, and what of a step Python needs."""
    needed = []
    for name, case in _read("compile-gpu.json")["results"].items():
        python, step = case["seconds_of_python"], case["compiled"]["seconds"]["plain"]
        plain, gated = (1e3 * python[f"compiled {each}"] for each in ("plain", "all kept"))
        needed.append(f"{name} {plain:.0f}, {gated:.0f} of {1e3 * step:.0f} ms")
    return (
        _compiled("compile-gpu.json")
        + "\nOf a compiled step Python needs, in the plain network and with all gates open: "
        + f"{'; '.join(needed)}.\n"
    )


def _compiled(name: str) -> str:
    content = _read(name)
    lines = [
        "| network, drop rate | graphs, of later draws | seconds to build them "
        "| compiled time, of the plain network's | of eager's | share of the possible saving, "
        "compiled | eager |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in content["results"].items():
        shares = [case[way]["share_of_possible"] for way in ("compiled", "eager")]
        cells = [f"{s['value']:.0%} ({s['low']:.0%} to {s['high']:.0%})" for s in shares]
        lines.append(
            f"| {name} | {case['graphs']}, {case['graphs_of_later_draws']} "
            f"| {case['seconds_to_compile']:.0f} | {_ratio(case['compiled']['to_plain'])} "
            f"| {_ratio(case['compiled_to_eager'])} | {cells[0]} | {cells[1]} |"
        )
    return (
        "\n".join(lines)
        + "\n\nThe plain network and what is possible are compiled likewise, block by block "
        f"(`python benchmarks/compile.py`; {_machine(content)}).\n"
    )


def ranks() -> str:
    """How long the slowest rank takes, simulated and measured."""
    content = _read("ranks.json")
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
        + f"\n\n(`python benchmarks/ranks.py`; {_machine(content)})\n\n"
        + "![the slowest rank over the mean, by number of ranks](ranks.png)\n"
    )


def distributed() -> str:
    """What DistributedDataParallel, fully_shard and the check across ranks cost."""
    content = _read("distributed.json")
    results = content["results"]

    def row(label: str, cell: Callable[[dict[str, Any]], str]) -> str:
        return f"| {label} | " + " | ".join(map(cell, results.values())) + " |"

    def sent(kind: str) -> Callable[[dict[str, Any]], str]:
        def cell(found: dict[str, Any]) -> str:
            counts = found["sharded"]["mebibytes"]
            return f"{counts['half'][kind]:.1f} of {counts['plain'][kind]:.1f} MiB"

        return cell

    def time(part: str, key: str) -> Callable[[dict[str, Any]], str]:
        return lambda found: _ratio(found[part][key])

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
        f"over gloo (`python benchmarks/distributed.py`; {_machine(content)})\n"
    )


def language() -> str:
    """Held-out perplexities of `benchmarks/language.py`."""
    content = _read("text.json")
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
    saved = [_over(v["flops_saved"], ".1%") for v in variants.values()]
    lines.append("| FLOPs saved at equal steps | " + " | ".join(saved) + " |")
    return (
        f"{settings['model']}, {settings['steps']} steps on Tiny Shakespeare, "
        f"{len(settings['seed'])} seeds; the trigram baseline has a held-out perplexity of "
        f"{results['trigram_perplexity']:.3f}:\n\n"
        + "\n".join(lines)
        + f"\n\n(`python benchmarks/language.py`; {_machine(content)})\n"
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
    for label, read, form in rows:
        cells = [
            _over([read(run[name]) for run in runs], form) for name in ("plain", "stochastic_depth")
        ]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def _over(values: list[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def _percent(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.1%} ({estimate['low']:.1%} to {estimate['high']:.1%})"


def _ratio(estimate: dict[str, float]) -> str:
    if estimate["low"] == estimate["high"]:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _machine(content: dict[str, Any]) -> str:
    machine = content["machine"]
    where = machine["gpu"] or f"{_cores(machine['threads'])} of an {machine['processor']}"
    return f"{where}, torch {machine['torch']}, {machine['date']}"


def _cores(number: int) -> str:
    return "one core" if number == 1 else f"{number} cores"


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


FIGURES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "saving": saving,
    "gates": gates,
    "composer": composer,
    "coverage": coverage,
    "distributed": distributed,
    "sample": sample,
    "ranks": ranks,
    "cifar": cifar,
    "cifar_gpu": cifar_gpu,
    "saving_gpu": saving_gpu,
    "sample_gpu": sample_gpu,
    "language": language,
    "compiled": compiled,
    "compiled_gpu": compiled_gpu,
}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
