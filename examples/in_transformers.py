"""Trains a small GPT-2 on the characters of a text in transformers' Trainer: one callback.

    python examples/in_transformers.py --steps 200 --out runs/transformers
    python examples/in_transformers.py --steps 400 --out runs/transformers --resume

What `--resume` continues draws on as if nothing had been. The folder `plain` holds what
`GPT2LMHeadModel.from_pretrained` loads, wherever this package is not installed, too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import stochastic_depth as sd
from stochastic_depth.integrations.transformers import StochasticDepthCallback
from textlib.text_data import Text, read_text

TEXT = Path(__file__).parent / "textlib" / "data" / "coriolanus.txt"
CONTEXT = 64


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--drop-rate", type=float, default=0.3, help="of the last layer")
    parser.add_argument("--data", type=Path, default=TEXT, help="a text file")
    parser.add_argument("--out", type=Path, default=Path("runs/transformers"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args(arguments)
    set_seed(0)
    text = read_text(options.data, "char", CONTEXT)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=text.vocabulary,
            n_positions=CONTEXT,
            n_embd=64,
            n_layer=options.layers,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    warmup = sd.linear_warmup(options.steps // 10)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            save_steps=50,
            logging_steps=10,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=pieces(text),
        callbacks=[StochasticDepthCallback(options.drop_rate, schedule=warmup)],
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    model.save_pretrained(options.out / "plain")
    print(f"loss of the plain model on held-out text {held_out_loss(options.out, text):.3f}")


def pieces(text: Text) -> list[dict[str, Tensor]]:
    """The text in sequences; transformers shifts the labels itself."""
    tokens = torch.tensor(text.training)
    whole = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return [{"input_ids": piece, "labels": piece} for piece in whole]


def held_out_loss(folder: Path, text: Text) -> float:
    """Of the model as anybody would load it."""
    model = GPT2LMHeadModel.from_pretrained(folder / "plain")  # in eval mode
    tokens = torch.tensor(text.held_out)
    tokens = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


if __name__ == "__main__":
    main()
