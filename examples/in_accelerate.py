"""Trains a ResNet-18 of timm on handwritten digits with Accelerate: two lines.

    python examples/in_accelerate.py --steps 100 --out runs/accelerate
    accelerate launch --num_processes 2 --cpu examples/in_accelerate.py --out runs/accelerate
    python examples/in_accelerate.py --steps 200 --out runs/accelerate --resume

`save_state` saves the optimizer, and with it the state of stochastic depth.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from timm import create_model

import stochastic_depth as sd
from in_lightning import loaders


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--drop-rate", type=float, default=0.2, help="of the last block")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--resume", action="store_true", help="go on from the last state")
    options = parser.parse_args(arguments)
    set_seed(0)
    shuffled_by_seed = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=shuffled_by_seed)
    training, held_out = loaders()
    images = next(iter(held_out))[0]
    model = create_model("resnet18", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    depth = sd.apply_drop_path(model, options.drop_rate, example_inputs=images[:4])
    depth.follow(optimizer)
    model, optimizer, training = accelerator.prepare(model, optimizer, training)
    step = 0
    if options.resume:
        accelerator.load_state(str(options.out))
        step = int(depth.state_dict()["step"])
    while step < options.steps:
        # What is left of the epoch that was cut off, in its order.
        rest = accelerator.skip_first_batches(training, step % len(training))
        rest.set_epoch(step // len(training))
        for images, labels in rest:
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 20 == 0:
                kept = f"{1 - depth.metrics()['stochastic_depth/skipped']:.0%} of the rows kept"
                accelerator.print(f"step {step}: loss {loss:.3f}, {kept}")
            if step == options.steps:
                break
    accelerator.save_state(str(options.out))
    plain = depth.fold().eval()
    with torch.no_grad():
        wrong = [(plain(images).argmax(1) != labels).float().mean() for images, labels in held_out]
    accelerator.print(f"test error of the plain model {sum(wrong) / len(wrong):.2%}")


if __name__ == "__main__":
    main()
