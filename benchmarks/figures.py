"""Copies the figures of README and docs from the result files: `python benchmarks/figures.py`.

A figure stands between `<!-- figure: NAME -->` and `<!-- end -->`, a number in a sentence between
`<!-- NAME -->` and `<!-- / -->`. The tests run `rendered` and compare, so that no figure can differ
from its file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coveragelib.page import counts
from figures_helps import cutting, errors, estimate
from figures_ranks import distributed, ranks
from figures_text import machine, ratio, read
from figures_trained import NUMBERS, cifar, cifar_gpu, demo, language

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (
    ROOT / "README.md",
    DOCS / "measured.md",
    DOCS / "training.md",
    DOCS / "choosing-a-rate.md",
    DOCS / "batch-or-sample.md",
    DOCS / "pruning.md",
)
_FIGURE = re.compile(r"(<!-- figure: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NUMBER = re.compile(r"(<!-- (\w+) -->)[^<\n]*(<!-- / -->)")


def rendered(text: str) -> str:
    """The text with every figure as its result file has it."""
    text = _FIGURE.sub(lambda match: match[1] + FIGURES[match[2]]() + match[3], text)
    return _NUMBER.sub(lambda match: match[1] + NUMBERS[match[2]]() + match[3], text)


def saving() -> str:
    """Ratios of step times from `benchmarks/saving.py`."""
    return _saving("saving.json")


def saving_gpu() -> str:
    """The same on a GPU."""
    return _saving("saving-gpu.json")


def _saving(file: str) -> str:
    content = read(file)
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
                f"| {label} | {ratio(case['to_plain'])} | {ratio(case['to_shortened'])} "
                f"| {memory:.2f} |"
            )
    return (
        "\n".join(lines)
        + "\n\nTraining steps that take turns in one process, with 95% confidence intervals "
        "(`python benchmarks/saving.py`). The shortened network has the dropped blocks physically "
        f"taken out, step by step. ({machine(content)})\n"
    )


def gates() -> str:
    """What a gate costs where Python is what takes long, from `benchmarks/gates.py`."""
    content = read("gates.json")
    lines = ["| what | figure | unit | at most |", "|---|---|---|---|"]
    for name, line in content["results"]["lines"].items():
        target = "" if line["target"] is None else f"{line['target']:.3g}"
        lines.append(f"| {name} | {ratio(line['figure'])} | {line['unit']} | {target} |")
    return (
        "\n".join(lines)
        + "\n\nResNet-110 on two images of 8 pixels, beside a twin that leaves the same blocks out "
        f"by hand (`python benchmarks/gates.py`; {machine(content)}).\n"
    )


def composer() -> str:
    """The same ResNet-50 under the same draws, beside Composer's block mode."""
    content = read("beside_composer.json")
    results = content["results"]
    parts = [
        f"{ratio(case['ours_to_composer'])} at {name.split('-')[1]}"
        for name, case in results.items()
        if name != "mosaicml"
    ]
    return (
        f"Beside Composer {results['mosaicml']}'s block mode, on the same ResNet-50 under the same "
        f"draws, our steps take {' and '.join(parts)} of the time of theirs "
        f"(`python benchmarks/beside_composer.py`; {machine(content)}).\n"
    )


def coverage() -> str:
    """How many models' branches are found, as others see them, and skipped exactly."""
    content = read("coverage.json")
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
        "those of the plain model whose branches hooks force to zero. "
        f"{_left_out(content['results'])}Each model, and why a few "
        f"differ: [docs/coverage.md](docs/coverage.md) (`make coverage`; {machine(content)}).\n"
    )


def _left_out(libraries: dict[str, Any]) -> str:
    """The models of which some blocks are refused, and left out by name, as the error says."""
    names = [name for rows in libraries.values() for name, row in rows.items() if "left_out" in row]
    some = f"Of {len(names)} ({', '.join(names[-3:])} ...) apply refuses single blocks by name, "
    return some + "and these were left out. " if names else ""


def sample() -> str:
    """What mode "sample" saves, beside the ways that others have."""
    return _sample("sample.json")


def sample_gpu() -> str:
    """The same on a GPU."""
    return _sample("sample-gpu.json")


def _sample(file: str) -> str:
    content = read(file)
    lines = [
        "| network | way | time, of the plain network's | share of the possible saving | memory |",
        "|---|---|---|---|---|",
    ]
    for name, case in content["results"].items():
        memory = case["peak_mebibytes"]
        for way, found in case["ways"].items():
            share = found["share_of_possible"]
            lines.append(
                f"| {name} | {way} | {ratio(found['to_plain'])} | {share['value']:.0%} "
                f"({share['low']:.0%} to {share['high']:.0%}) "
                f"| {memory[way] / memory['plain']:.2f} |"
            )
    return "\n".join(lines) + f"\n\n(`python benchmarks/sample.py`; {machine(content)})\n"


def compiled() -> str:
    """What `depth.compile()` costs and saves, beside eager."""
    return _compiled("compile.json")


def compiled_gpu() -> str:
    """The same on a GPU, and what of a step Python needs."""
    needed = []
    for name, case in read("compile-gpu.json")["results"].items():
        python, step = case["seconds_of_python"], case["compiled"]["seconds"]["plain"]
        plain, gated = (1e3 * python[f"compiled {each}"] for each in ("plain", "all kept"))
        needed.append(f"{name} {plain:.0f}, {gated:.0f} of {1e3 * step:.0f} ms")
    return (
        _compiled("compile-gpu.json")
        + "\nOf a compiled step Python needs, in the plain network and with all gates open: "
        + f"{'; '.join(needed)}.\n"
    )


def _compiled(name: str) -> str:
    content = read(name)
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
            f"| {case['seconds_to_compile']:.0f} | {ratio(case['compiled']['to_plain'])} "
            f"| {ratio(case['compiled_to_eager'])} | {cells[0]} | {cells[1]} |"
        )
    return (
        "\n".join(lines)
        + "\n\nThe plain network and what is possible are compiled likewise, block by block "
        f"(`python benchmarks/compile.py`; {machine(content)}).\n"
    )


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
    "errors": errors,
    "cutting": cutting,
    "estimate": estimate,
    "compiled": compiled,
    "compiled_gpu": compiled_gpu,
}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
