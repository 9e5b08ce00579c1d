"""What `test_sharded_by_accelerate` runs on two ranks: its FSDP, in a Trainer and in a loop.

Accelerate shards on accelerators only. Here it is told that the processor is one: what it does to a
model, an optimizer and their checkpoints is the same.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import stochastic_depth as sd
from networks import assert_equal
from processes import report
from test_in_transformers import STEPS, WARMUP, Notes, gpt2, ours, texts, trainer

SHARDED: dict[str, Any] = {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}


def begin(distributed: DistributedType) -> None:
    """Forget the setting of the case before."""

    def backend(*_: Any, **__: Any) -> Any:
        return "gloo", distributed

    def device(state: Any) -> None:
        state.device = torch.device("cpu")

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    PartialState._prepare_backend = backend
    PartialState.set_device = device


def folder() -> Path:
    """Of this run; the ranks share it."""
    return Path(sys.argv[1])


def full(model: nn.Module) -> dict[str, Tensor]:
    """The weights, put together again."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in model.state_dict().items()
    }


def trained(name: str, checkpoint: str | None = None, **options: Any) -> tuple[Any, list[Any]]:
    """A Trainer at its end, and what its steps drew."""
    begin(DistributedType.MULTI_GPU if "fsdp" in options else DistributedType.MULTI_CPU)
    notes = Notes()
    made = trainer(folder() / name, gpt2(), texts(labels=False), ours(), notes, **options)
    made.train(resume_from_checkpoint=checkpoint and str(folder() / checkpoint))
    return made, notes.drawn


def a_trainer_shards() -> None:
    """As DistributedDataParallel trains it, but for the order in which gradients are summed."""
    made, drawn = trained("sharded", **SHARDED)
    beside, theirs = trained("replicated")
    assert type(made.model).__name__ == "FSDPGPT2LMHeadModel"
    assert type(beside.model).__name__ == "GPT2LMHeadModel"
    assert drawn == theirs
    assert len(drawn) == STEPS
    assert not all(all(step.values()) for step in drawn)
    ours_, others = full(made.model), full(beside.model)
    torch.testing.assert_close(ours_, others, rtol=0, atol=1e-4)


def what_it_saves_is_plain() -> None:
    made, _ = trained("saving", **SHARDED)
    made.save_model(str(folder() / "plain"))
    dist.barrier()
    saved = load_file(folder() / "plain" / "model.safetensors")
    plain = gpt2()
    plain.load_state_dict(saved)
    assert_equal(plain.state_dict(), full(made.model))


def a_trainer_resumes() -> None:
    made, drawn = trained("whole", save_strategy="steps", save_steps=3, **SHARDED)
    again, rest = trained("resumed", "whole/checkpoint-3", **SHARDED)
    assert rest == drawn[3:]
    assert_equal(full(again.model), full(made.model))


def with_checkpoints_of_activations() -> None:
    made, drawn = trained("plainly", **SHARDED)
    config = {"activation_checkpointing": True}
    other, theirs = trained("recomputing", fsdp=True, fsdp_config=config)
    assert drawn == theirs
    assert_equal(full(other.model), full(made.model))


def in_a_loop() -> tuple[Accelerator, Any, sd.StochasticDepth, Any]:
    """What a user of Accelerate has, prepared."""
    begin(DistributedType.MULTI_GPU)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model: nn.Module = gpt2().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=tokens, schedule=WARMUP)
    depth.follow(optimizer)
    accelerator.register_for_checkpointing(depth)
    return accelerator, *accelerator.prepare(model, optimizer), depth


def steps(
    count: int, accelerator: Accelerator, model: Any, optimizer: Any, depth: Any
) -> list[Any]:
    drawn = []
    for _ in range(count):
        tokens = torch.arange(24).view(2, 12) + dist.get_rank()
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
        drawn.append(depth.last_gates)
    return drawn


def a_loop_resumes() -> None:
    whole: Any = in_a_loop()
    drawn = steps(3, *whole)
    whole[0].save_state(str(folder() / "state"))
    drawn += steps(4, *whole)
    again: Any = in_a_loop()
    again[0].load_state(str(folder() / "state"))
    assert steps(4, *again) == drawn[3:]
    assert type(whole[1]).__name__ == "FSDPGPT2LMHeadModel"
    assert_equal(full(again[1]), full(whole[1]))
    assert not all(all(step.values()) for step in drawn)


CASES: dict[str, Callable[[], None]] = {
    "a Trainer shards": a_trainer_shards,
    "what a Trainer saves is plain": what_it_saves_is_plain,
    "a Trainer resumes": a_trainer_resumes,
    "with checkpoints of activations": with_checkpoints_of_activations,
    "a loop resumes": a_loop_resumes,
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report(lambda: CASES)
