"""A fit on two processes, which `test_in_lightning` starts."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))

from test_in_lightning import STEPS, Net, callback, images


class Sharded(Net):
    """Shards its network, as Lightning has it, in `configure_model`."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for stage in self.net.stages:
            for block in stage:
                fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def main(strategy: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module = Net() if strategy == "ddp" else Sharded()
    way: Any = "ddp" if strategy == "ddp" else ModelParallelStrategy(2, 1)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=way,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[callback()],
        default_root_dir=folder,
    )
    trainer.fit(module, images())
    full = {
        key: value.full_tensor() if isinstance(value, DTensor) else value
        for key, value in module.net.state_dict().items()
    }
    state = {
        "drawn": module.drawn,
        "weights": full,
        "class": type(module.net).__name__,
        "gated": any("_stochastic_depth" in vars(part) for part in module.modules()),
    }
    torch.save(state, Path(folder) / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
