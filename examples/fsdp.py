"""Trains a small language model under `fully_shard`, skipping the layers that are not needed.

    torchrun --nproc-per-node 2 examples/fsdp.py --data text:input.txt
    torchrun --nproc-per-node 2 --max-restarts 3 examples/fsdp.py --data text:input.txt --out runs/a

The order is that of large trainers: the model on the meta device, activation checkpointing and
`torch.compile` around each block, stochastic depth, `fully_shard`, and only then weights. A skipped
block's weights are neither gathered nor reduced. Checkpoints are written by
`torch.distributed.checkpoint`; started again with the same `--out`, it goes on from the last one,
bit by bit as if nothing had been. At the end `model.pt` holds the folded weights: a plain model.
"""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

import stochastic_depth as sd
from imagelib import InputError
from textlib.fsdp_options import Options, parse
from textlib.gpt import GPT
from textlib.text_data import Text, read_text
from textlib.windows import Windows

SIZE: dict[str, int] = {"layers": 8, "width": 64, "heads": 4}


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
        text = read_text(options.data, "char", options.context)
        device = prepare(options)
        train(options, text, device)
    except (InputError, sd.StochasticDepthError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":  # the others would say the same
            print("fsdp.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    dist.destroy_process_group()
    return 0


def prepare(options: Options) -> torch.device:
    """The process group, and this rank's device."""
    if not dist.is_torchelastic_launched():
        raise InputError("start it with torchrun: torchrun --nproc-per-node 2 examples/fsdp.py ...")
    store, rank, ranks = next(rendezvous("env://"))
    # The store outlives a restart, and with it the addresses of those who are gone.
    attempt = f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    own = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
    dist.init_process_group(
        store=own, rank=rank, world_size=ranks, timeout=timedelta(seconds=options.timeout)
    )
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def build(
    options: Options, text: Text, device: torch.device
) -> tuple[nn.Module, sd.StochasticDepth]:
    """The model in its shards, with the same weights however many ranks share them."""
    torch.manual_seed(options.seed)
    weights = GPT(text.vocabulary, options.context, **SIZE).state_dict()
    with torch.device("meta"):
        model = GPT(text.vocabulary, options.context, **SIZE)
    for number, block in enumerate(model.blocks):
        wrapped: Any = checkpoint_wrapper(block)
        if options.compile != "none":
            wrapped = torch.compile(wrapped, fullgraph=True, backend=options.compile)
        model.blocks[number] = wrapped
    depth = sd.apply_stochastic_depth(
        model,
        options.drop_rate,
        example_inputs=torch.zeros(2, options.context, dtype=torch.long),
        schedule=sd.linear_warmup(options.steps // 10),
        draw=sd.Draw(seed=options.seed),
    )
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device=device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    return model, depth


def train(options: Options, text: Text, device: torch.device) -> None:
    """From the last checkpoint, or from the beginning."""
    model, depth = build(options, text, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    depth.follow(optimizer)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch, over = divmod(options.batch_size, ranks)
    if over:
        raise InputError(f"--batch-size: {options.batch_size} cannot be shared by {ranks} ranks")
    windows = Windows(text, options.context, options.batch_size, options.seed, device)
    start = resume(options.out, model, optimizer, depth)
    for step in range(start, options.steps):
        tokens, following = (part[rank * batch :][:batch] for part in windows.for_training(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(tokens).flatten(0, 1), following.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step, loss.detach(), depth)
        if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
            save(options.out, step + 1, model, optimizer, depth)
    folded = {name: whole(value).cpu() for name, value in depth.folded_state_dict().items()}
    if rank == 0:
        torch.save(plain_names(folded), options.out / "model.pt")


def report(step: int, loss: Tensor, depth: sd.StochasticDepth) -> None:
    """One line, by the first rank."""
    dist.all_reduce(loss)
    run = sum(depth.last_gates.values())
    if dist.get_rank() == 0:
        mean = loss.item() / dist.get_world_size()
        blocks = f"{run} of {len(depth.last_gates)} blocks run"
        print(f"step {step + 1}: loss {mean:.4f}, {blocks}", flush=True)


def save(
    out: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    depth: sd.StochasticDepth,
) -> None:
    """Every rank its shards; the last complete checkpoint is the one that `last` names."""
    state = state_of(model, optimizer, depth)
    state_dict_saver.save(state, checkpoint_id=out / f"step-{step}")
    if dist.get_rank() == 0:
        (out / "last.new").write_text(str(step))
        (out / "last.new").replace(out / "last")


def resume(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, depth: sd.StochasticDepth
) -> int:
    """The step to go on from; on any number of ranks."""
    if not (out / "last").exists():
        return 0
    step = int((out / "last").read_text())
    state = state_of(model, optimizer, depth)
    state_dict_loader.load(state, checkpoint_id=out / f"step-{step}")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    depth.load_state_dict(state["depth"])
    return step


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, depth: sd.StochasticDepth
) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "depth": depth.state_dict()}


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what the wrappers around the blocks put into the names."""
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        state = {name.replace(wrapper, ""): value for name, value in state.items()}
    return state


def end(code: int) -> NoReturn:
    """Ends this process at once: a thread of gloo's may still hold a tensor, and would abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
