"""What each rank does for `test_two_processes.py`, started by Composer's own launcher.

    composer -n 2 tests/with_composer/rank_cases.py FOLDER

The reference of a batch is a copy of the gated network: it runs the rank's microbatches outside of
DistributedDataParallel, and its gradients are averaged over the ranks by hand.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import stochastic_depth as sd
from stochastic_depth.integrations.composer import StochasticDepth
from with_composer.training import CLASSES, Watch, classifier, images, network, trainer

RANKS, BATCHES, BATCH = 2, 4, 4
RATE = 0.6


def batches() -> DataLoader[Any]:
    """Each rank has its own part of the data."""
    data = TensorDataset(*images(RANKS * BATCHES * BATCH))
    sampler = dist.get_sampler(data, shuffle=True)
    return DataLoader(data, batch_size=BATCH, sampler=sampler)


class Compare(Callback):
    """Compares the gradients of every batch with the average by hand."""

    def __init__(self, microbatches: int) -> None:
        self.microbatches = microbatches
        self.twin: Any = None
        self.compared = self.without_any = self.ran_first_only = 0

    def before_train_batch(self, state: State, logger: Logger) -> None:
        assert isinstance(state.model, DistributedDataParallel)
        assert not state.model.find_unused_parameters
        self.twin = copy.deepcopy(state.model.module)
        self.twin.zero_grad(set_to_none=True)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        own = sd.get_stochastic_depth(self.twin)
        x, y = state.batch
        drawn = []
        parts = zip(x.chunk(self.microbatches), y.chunk(self.microbatches), strict=True)
        for part in parts:
            loss = self.twin.loss(self.twin(part), part) / self.microbatches
            loss.backward()
            drawn.append(own.last_gates)
        assert drawn[-1] == sd.get_stochastic_depth(state.model).last_gates
        self.ran_first_only += any(drawn[0][name] and not drawn[-1][name] for name in drawn[0])
        for (name, found), reference in zip(
            state.model.module.named_parameters(), self.twin.parameters(), strict=True
        ):
            expected = averaged(reference.grad, found)
            if expected is None:
                assert found.grad is None, f"{name} has a gradient, though it ran on no rank"
                self.without_any += 1
            else:
                assert found.grad is not None, f"{name} has no gradient"
                torch.testing.assert_close(found.grad, expected, rtol=1e-5, atol=1e-7)
                self.compared += 1


def averaged(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """The average over the ranks; None where no rank has one."""
    ran = torch.tensor(float(gradient is not None))
    total = torch.zeros_like(like) if gradient is None else gradient.clone()
    torch.distributed.all_reduce(ran)
    torch.distributed.all_reduce(total)
    return total / RANKS if ran else None


def gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * RANKS
    torch.distributed.all_gather_object(found, value)
    return found


def train(
    *, method: str = "block", same: bool = True, microbatches: int = 1, **options: Any
) -> tuple[Trainer, Watch, Compare]:
    algorithm = StochasticDepth("ResNetBottleneck", method, RATE, use_same_gpu_seed=same)
    watch, compare = Watch(algorithm), Compare(microbatches)
    made = trainer(
        algorithm,
        model=ComposerClassifier(network(), num_classes=CLASSES),
        callbacks=[watch, compare],
        train_dataloader=batches(),
        device_train_microbatch_size=BATCH // microbatches,
        **options,
    )
    made.fit()
    return made, watch, compare


def same_everywhere(made: Trainer) -> None:
    weights = [p.double().sum().item() for p in made.state.model.parameters()]
    assert gather(weights)[0] == gather(weights)[1]


def blocks_alike(microbatches: int = 1) -> None:
    made, watch, compare = train(microbatches=microbatches)
    one, other = gather(watch.gates)
    assert one == other
    assert compare.compared
    assert compare.without_any
    assert compare.ran_first_only or microbatches == 1
    same_everywhere(made)


def blocks_of_its_own(microbatches: int = 1) -> None:
    made, watch, compare = train(same=False, microbatches=microbatches)
    one, other = gather(watch.gates)
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert compare.compared
    assert compare.ran_first_only or microbatches == 1
    same_everywhere(made)


def rows_of_its_own(microbatches: int = 1) -> None:
    made, watch, compare = train(method="sample", microbatches=microbatches)
    one, other = gather(watch.gates)
    assert one != other
    assert compare.compared
    same_everywhere(made)


def resumed(*, same: bool) -> None:
    folder = Path(gather(sys.argv[1])[0]) / f"checkpoints-{same}"
    saving: dict[str, Any] = {
        "save_filename": "ba{batch}.pt",
        "save_interval": "1ba",
        "save_overwrite": True,
    }
    whole, drawn, _ = train(same=same, save_folder=str(folder / "a"), seed=None, **saving)
    path = str(folder / "a" / "ba3.pt")
    again, continued, _ = train(same=same, load_path=path, seed=None)
    assert continued.gates == drawn.gates[3:]
    weights = [trained.state.model.state_dict() for trained in (whole, again)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    states = [trained.state.optimizers[0].state_dict()["state"] for trained in (whole, again)]
    torch.testing.assert_close(
        *[{n: s for n, s in state.items() if s} for state in states], rtol=0, atol=0
    )


def first_batch() -> None:
    """Watched under DistributedDataParallel, each rank with a batch of its own."""
    data = TensorDataset(torch.randn(32, 5), torch.arange(32) % 3)
    states, gates = [], []
    for example in (torch.randn(2, 5), None):
        algorithm = StochasticDepth(None, "block", RATE, example_inputs=example)
        sampler = dist.get_sampler(data, shuffle=False)
        made = trainer(
            algorithm,
            model=classifier(),
            train_dataloader=DataLoader(data, batch_size=4, sampler=sampler),
        )
        made.fit()
        same_everywhere(made)
        states.append({k: v.clone() for k, v in made.state.model.state_dict().items()})
        gates.append(algorithm.depth.last_gates)
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert gates[0] == gates[1]


CASES: dict[str, Callable[[], None]] = {
    "blocks alike": blocks_alike,
    "blocks alike, microbatches": lambda: blocks_alike(2),
    "blocks of its own": blocks_of_its_own,
    "blocks of its own, microbatches": lambda: blocks_of_its_own(2),
    "rows of its own": rows_of_its_own,
    "rows of its own, microbatches": lambda: rows_of_its_own(2),
    "watched with the first batch": first_batch,
    "resumed, alike": lambda: resumed(same=True),
    "resumed, of its own": lambda: resumed(same=False),
}


def main() -> None:
    torch.set_num_threads(1)
    dist.initialize_dist("cpu")
    results = {}
    for name, case in CASES.items():
        try:
            case()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()[-2000:]
        dist.barrier()
    Path(sys.argv[1], f"{dist.get_global_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
