"""The same ResNet-50 under the same draws: plain, Composer's block mode, ours. Needs mosaicml.

python benchmarks/beside_composer.py   # in an environment with mosaicml (torch < 2.7.1)
"""

from __future__ import annotations

import copy
import importlib.metadata
from typing import Any

import torch
from composer.algorithms.stochastic_depth.stochastic_depth import (
    apply_stochastic_depth as composer_apply,
)

import stochastic_depth as sd
from interleaved import ratio, take_turns, write
from saving import CASES, training_step
from stochastic_depth.draw import uniform


def measure(name: str, steps: int) -> dict[str, Any]:
    """Ratios of step times with their intervals."""
    case = CASES[name]
    torch.manual_seed(0)
    number, size = case.images
    images, labels = torch.randn(number, 3, size, size), torch.randint(0, 10, (number,))
    plain = case.make()
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    depth = sd.apply_stochastic_depth(ours, case.drop_rate, example_inputs=images[:2])
    composer_apply(theirs, "ResNetBottleneck", "block", case.drop_rate, "linear")
    run_plain, run_ours, run_theirs = (
        training_step(model, images, labels) for model in (plain, ours, theirs)
    )

    def ours_step(step: int) -> None:
        depth.load_state_dict({**depth.state_dict(), "step": step, "calls": {}})
        run_ours()

    def theirs_step(step: int) -> None:
        for block in depth.blocks:
            is_open = uniform(0, step, (0,), block.name) >= block.drop_rate
            # They keep a block where bernoulli(1 - drop_rate) is 1.
            module: Any = theirs.get_submodule(block.name)
            module.drop_rate = torch.tensor(0.0 if is_open else 1.0)
        run_theirs()

    variants = {"plain": lambda step: run_plain(), "ours": ours_step, "theirs": theirs_step}
    seconds = take_turns(variants, steps)
    return {
        "steps": steps,
        "ours_to_plain": ratio(seconds["ours"], seconds["plain"]),
        "composer_to_plain": ratio(seconds["theirs"], seconds["plain"]),
        "ours_to_composer": ratio(seconds["ours"], seconds["theirs"]),
    }


def main() -> None:
    results: dict[str, Any] = {"mosaicml": importlib.metadata.version("mosaicml")}
    for name in ("resnet50-0.2", "resnet50-0.5"):
        results[name] = measure(name, steps=80)
        print(name, {key: str(value) for key, value in results[name].items()}, flush=True)
    print(write("beside_composer", results))


if __name__ == "__main__":
    main()
