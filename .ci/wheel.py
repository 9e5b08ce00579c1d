"""Beside torch alone, the wheel gates a plain network, trains it and folds it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import stochastic_depth as sd


class Block(nn.Module):
    """A residual block as anybody writes one."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


package = Path(sd.__file__).parent
assert package.is_relative_to(sys.prefix), f"{package} is not the installed wheel"
assert (package / "py.typed").exists(), "the wheel lacks py.typed"

torch.manual_seed(0)
images, labels = torch.randn(64, 16), torch.randint(4, (64,))
model = nn.Sequential(*[Block() for _ in range(8)], nn.Linear(16, 4))
depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=images)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
depth.follow(optimizer)

losses = []
for _ in range(30):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert sum(losses[-5:]) < sum(losses[:5]), f"the loss did not fall: {losses}"

model.eval()
with torch.no_grad():
    gated = model(images)
    plain = depth.fold()(images)
assert type(model[0]) is Block
torch.testing.assert_close(plain, gated)
print(f"the wheel works beside torch {torch.__version__} alone")
