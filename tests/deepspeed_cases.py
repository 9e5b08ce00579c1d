"""A training under DeepSpeed's ZeRO, cut and resumed: `python deepspeed_cases.py STAGE FOLDER`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import stochastic_depth as sd
from networks import assert_equal, make

ONE_RANK = {"MASTER_ADDR": "localhost", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def main(stage: str, folder: str, port: str) -> None:
    os.environ.update(ONE_RANK, DS_ACCELERATOR="cpu", MASTER_PORT=port)
    deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.init_distributed("gloo")

    def begin() -> tuple[Any, sd.StochasticDepth, Tensor]:
        model, x = make("pre-norm")
        depth = sd.apply_stochastic_depth(
            model.train(), 0.5, example_inputs=x, schedule=sd.linear_warmup(10)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        depth.follow(optimizer)
        config = {
            "train_batch_size": len(x),
            "zero_optimization": {"stage": int(stage)},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return engine, depth, x

    def steps(count: int, engine: Any, depth: sd.StochasticDepth, x: Tensor) -> list[Any]:
        drawn = []
        for _ in range(count):
            engine.backward(engine(x).square().mean())
            engine.step()
            drawn.append(depth.last_gates)
        return drawn

    whole = begin()
    drawn = steps(4, *whole)
    assert whole[1].state_dict()["step"] == 4
    whole[0].save_checkpoint(folder)
    drawn += steps(3, *whole)
    second = begin()
    second[0].load_checkpoint(folder)
    assert second[1].state_dict()["step"] == 4
    assert steps(3, *second) == drawn[4:]
    assert_equal(second[0].module.state_dict(), whole[0].module.state_dict())


if __name__ == "__main__":
    main(*sys.argv[1:])
