"""Does dropping layers help a language model? `examples/text.py` on Tiny Shakespeare, three seeds.

    PYTHONPATH=examples python benchmarks/language.py              # some twenty minutes
    PYTHONPATH=examples python benchmarks/language.py --steps=50   # text.py's options: only printed

Writes `results/text.json`, and for each seed `metrics.json` and `loss.png` in a folder of its own.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from interleaved import RESULTS, write

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
SEEDS = (0, 1, 2)
KEPT = ("metrics.json", "loss.png")

READ: dict[str, Callable[[dict[str, Any]], float]] = {
    "equal_steps": lambda variant: variant["equal_steps"]["perplexity"],
    "equal_flops": lambda variant: variant["equal_flops"]["perplexity"],
    "equal_flops_on_the_way": lambda variant: variant["equal_flops_on_the_way"]["perplexity"],
}


def main(options: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(seed, options, Path(folder, f"text-seed{seed}")) for seed in SEEDS]
        results = over_seeds(runs)
        print("\n".join(lines(results)))
        if options:
            return
        for seed in SEEDS:
            kept = RESULTS / f"text-seed{seed}"
            kept.mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                shutil.copy(Path(folder, kept.name, name), kept / name)
    print(f"Written to {write('text', results)}")


def run(seed: int, options: Sequence[str], out: Path) -> dict[str, Any]:
    """What `text.py` found out with this seed."""
    script = ROOT / "examples" / "text.py"
    given = [f"--data=text:{DATA}", *options, f"--seed={seed}", f"--out={out}"]
    subprocess.run([sys.executable, script, *given], check=True)
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each variant the perplexities, what it saved, and how it did beside plain."""
    configuration = {**runs[0]["configuration"], "seed": list(SEEDS)}
    names = list(runs[0]["variants"])
    return {
        "configuration": configuration,
        "text": runs[0]["text"],
        "trigram_perplexity": runs[0]["trigram"]["perplexity"],
        "every_model_beats_the_trigram": all(
            variant["beats_trigram"] for run in runs for variant in run["variants"].values()
        ),
        "variants": {name: _variant(name, runs) for name in names},
    }


def _variant(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mine, plain = ([run["variants"][which] for run in runs] for which in (name, "plain"))
    found: dict[str, Any] = {
        "flops_saved": [variant["flops_saved"] for variant in mine],
        "equal_flops_steps": [variant["equal_flops"]["steps"] for variant in mine],
    }
    for comparison, read in READ.items():
        perplexities = [read(variant) for variant in mine]
        found[comparison] = {
            "perplexity": perplexities,
            "mean": statistics.mean(perplexities),
            "deviation": statistics.stdev(perplexities),
        }
    if name != "plain":
        found["time_to_plain"] = [variant["time_to_plain"] for variant in mine]
        for comparison, read in READ.items():
            changes = [read(m) / read(p) - 1 for m, p in zip(mine, plain, strict=True)]
            found[comparison]["change"] = changes
            found[comparison]["helped"] = max(changes) < 0  # with every seed
    return found


def lines(results: dict[str, Any]) -> list[str]:
    """For the terminal: mean and deviation over the seeds."""
    found = [f"Trigram baseline: held-out perplexity {results['trigram_perplexity']:.3f}"]
    for comparison in READ:
        for name, variant in results["variants"].items():
            outcome = variant[comparison]
            text = f"{comparison}, {name}: {outcome['mean']:.3f} ± {outcome['deviation']:.3f}"
            if "change" in outcome:
                text += f", {'helped' if outcome['helped'] else 'did not help'} (beside plain "
                text += ", ".join(f"{change:+.1%}" for change in outcome["change"]) + ")"
            found.append(text)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
