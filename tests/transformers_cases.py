"""A training on two processes, which `test_in_transformers` starts: `torchrun ... FOLDER`."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from test_in_transformers import Notes, ours, pictures, trainer, vit


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, notes = vit(), Notes()
    trainer(Path(folder), model, pictures(), ours(), notes).train()
    weights = sum(float(parameter.double().sum()) for parameter in model.parameters())
    found = {"drawn": notes.drawn, "weights": weights, "class": type(model).__name__}
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
