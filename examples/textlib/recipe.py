"""How to train: AdamW, and a learning rate that rises for a while and goes down a cosine to 0."""

import math

import torch
from torch import nn

WARMUP = 0.05  # of the steps


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Its learning rate is set step by step."""
    parameters = model.parameters()
    return torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def learning_rate(peak: float, step: int, total_steps: int) -> float:
    """Of the step with this number, from 0 on.

    >>> [round(learning_rate(1.0, step, 100), 3) for step in (0, 4, 5, 52, 99)]
    [0.2, 1.0, 1.0, 0.508, 0.0]
    """
    warmup = WARMUP * total_steps
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup))) / 2
