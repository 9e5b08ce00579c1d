"""Promise: a model whose weights are still on the meta device is gated as the real one is."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from comparing import assert_identical_gradients, every_network, run
from networks import NETWORKS, WIDTH, make
from specimen import Specimen

pytestmark = pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning")


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return NETWORKS[name][0]()


@every_network
@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_it_is_gated_and_trains_as_the_real_one(specimen: Specimen, mode: Any) -> None:
    if mode == "sample" and specimen.rowless:
        return
    real, x = specimen.model(), specimen.example_inputs()
    with torch.device("meta"):
        later = specimen.make(0.0)
    options: dict[str, Any] = {"mode": mode, "draw": sd.Draw(seed=2)}
    options |= {"example_inputs": x, "blocks": specimen.gated_blocks}
    shown = [str(sd.apply_stochastic_depth(model, 0.5, **options)) for model in (real, later)]
    assert shown[0] == shown[1]
    assert all(parameter.is_meta for parameter in later.parameters())
    later.to_empty(device="cpu").load_state_dict(real.state_dict())
    for _ in range(2):
        outputs = []
        for model in (real, later):
            model.train().zero_grad()
            outputs.append(run(model, x))
            outputs[-1].square().sum().backward()
        assert torch.equal(outputs[0], outputs[1])
        assert_identical_gradients(later, real)
    assert sd.get_stochastic_depth(real).last_gates == sd.get_stochastic_depth(later).last_gates


def test_blocks_are_found_without_a_value() -> None:
    real, x = make("resnet")
    found = sd.find_residual_blocks(on_meta("resnet"), x.to("meta"))
    assert found == sd.find_residual_blocks(real, x)


def test_what_is_not_exact_is_refused_as_ever() -> None:
    class Leaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (self.b(self.a(x).relu()) + 1)

    with torch.device("meta"):
        model = nn.Sequential(*(Leaks() for _ in range(6)))
    with pytest.raises(sd.RefusedBlockError):
        sd.apply_stochastic_depth(model, 0.1, example_inputs=torch.randn(2, 4), scale="none")


class Masked(nn.Module):
    """Attention with a causal mask in a buffer, wide enough for large values in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(512), nn.Linear(512, 1536), nn.Linear(512, 512)
        self.second, self.up, self.down = (
            nn.LayerNorm(512),
            nn.Linear(512, 2048),
            nn.Linear(2048, 512),
        )
        self.mask: torch.Tensor
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.mT / 512**0.5).masked_fill(self.mask, -torch.inf)
        x = x + self.out(scores.softmax(-1) @ v)
        return x + self.down(self.up(self.second(x)).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_block_alone_computes_finite_numbers(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(Masked() for _ in range(6))).to(dtype)
        x = torch.empty(5, 4, 512, dtype=dtype)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, mode="sample")
    assert len(depth.blocks) == 6


class Caches(nn.Module):
    """Keeps what it has computed, and is given a function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(WIDTH, WIDTH), nn.Embedding(1, WIDTH)
        self.shift: torch.Tensor | None = None
        self.scale = torch.ones(WIDTH)

    def forward(self, x: torch.Tensor, act: Any, index: torch.Tensor) -> torch.Tensor:
        if self.shift is None:
            self.shift = torch.linspace(0, 1, WIDTH, device=x.device)
        shifted = (x + self.shift) * self.scale.to(x.device)
        return x + self.linear(act(shifted) + self.table(index))


class CachingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Caches() for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.zeros(len(x), dtype=torch.long, device=x.device)
        for layer in self.layers:
            x = layer(x, lambda x: x.tanh(), index)
        return x


def test_the_watch_leaves_nothing_behind() -> None:
    with torch.device("meta"):
        model = CachingNet()
    x = torch.randn(2, WIDTH)
    before = [set(vars(module)) for module in model.modules()]
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    assert str(depth).count("skipped whole") == 6
    depth.remove()
    assert [set(vars(module)) for module in model.modules()] == before
    assert all(layer.shift is None for layer in model.layers)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x)
    depth.fold()
    model.to_empty(device="cpu")
    for layer in model.layers:
        layer.scale = torch.ones(WIDTH)
    assert type(model.train()(x)) is torch.Tensor


BIG = """
import resource, torch
from torch import nn
import stochastic_depth as sd

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(2048)
        self.up, self.down = nn.Linear(2048, 10240), nn.Linear(10240, 2048)
    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())

with torch.device("meta"):
    model = nn.Sequential(*(Layer() for _ in range(24)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=torch.zeros(2, 2048))
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
print(sum(p.numel() for p in model.parameters()), used, str(depth).count("skipped whole"))
"""


def test_a_billion_parameters_take_the_memory_of_one_block() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BIG], capture_output=True, text=True, check=True
    )
    parameters, gibibytes, whole = done.stdout.split()
    assert int(parameters) > 1e9
    assert float(gibibytes) < 1  # all weights: 3.8; one block: 0.16; the rest is code
    assert int(whole) == 24
