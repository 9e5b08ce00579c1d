"""Promise: blocks are found and named as a person would, however the forward is written."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
import strangers

pytestmark = [pytest.mark.oldest, pytest.mark.filterwarnings("ignore:fold")]
SIX = [f"layers.{n}" for n in range(6)]


class Skip(nn.Module):
    """Adds what a module makes of x; it has no part of its own."""

    def forward(self, x: Tensor, branch: nn.Module) -> Tensor:
        return x + branch(x)


def branch() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh())


class WithHelper(nn.Module):
    def __init__(self, skip: nn.Module) -> None:
        super().__init__()
        self.skip, self.branch = skip, branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x, self.branch)


class CalledByTheModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.skip, self.layers = Skip(), nn.ModuleList(branch() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.skip(x, layer)
        return x


def own() -> nn.Module:
    return nn.Sequential(*(WithHelper(Skip()) for _ in range(6)))


def shared() -> nn.Module:
    skip = Skip()
    return nn.Sequential(*(WithHelper(skip) for _ in range(6)))


@pytest.mark.parametrize(
    ("make", "names"), [(own, list("012345")), (shared, list("012345")), (CalledByTheModel, SIX)]
)
def test_a_helper_that_adds_stands_for_nothing(make: object, names: list[str]) -> None:
    x = torch.randn(4, 8)
    model = make()  # type: ignore[operator]
    assert [block.name for block in sd.find_residual_blocks(model, x)] == names
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, scale="none", blocks="*3")
    assert [block.name for block in depth.blocks] == names[3:4]


class Scripted(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.pre, self.embed = part, nn.Linear(3, 8)
        self.layers = nn.Sequential(*(WithHelper(Skip()) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.embed(self.pre(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("part", [nn.Identity(), nn.BatchNorm1d(3), nn.Linear(3, 3)])
def test_a_scripted_module_somewhere_in_the_model(part: nn.Module) -> None:
    x = torch.randn(4, 3)
    model = Scripted(torch.jit.script(nn.Sequential(part)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, scale="none")
    assert [block.name for block in depth.blocks] == SIX
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_lazy_module_wants_one_forward_first() -> None:
    model, x = Scripted(nn.LazyLinear(3)), torch.randn(4, 3)
    with pytest.raises(sd.ExampleInputsError, match=r"call the model once .* and then apply"):
        sd.apply_stochastic_depth(model, 0.1, example_inputs=x)
    model(x)
    assert len(sd.apply_stochastic_depth(model, 0.1, example_inputs=x).blocks) == 6


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.noise = nn.Linear(3, 8), nn.Linear(1, 8)
        self.layers = nn.Sequential(*(WithHelper(Skip()) for _ in range(6)))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        if float(sigma.min()) <= 0:
            raise ValueError("sigma must be positive")
        return self.layers(self.embed(x) + self.noise(sigma.log()[:, None]))


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("x", [torch.zeros(4, 3), torch.ones(4, 3), torch.randn(4, 3)])
def test_a_constant_stays_what_it_is(mode: str, x: Tensor) -> None:
    sigma = torch.ones(4)
    options = {"example_inputs": (x, sigma), "mode": mode}
    depth = sd.apply_stochastic_depth(Denoiser(), 0.1, **options)  # type: ignore[arg-type]
    assert len(depth.blocks) == 6


def test_merging_additions_are_no_blocks() -> None:
    """A skip around everything and additions of two streams are left alone."""
    model, x = strangers.UNet(), torch.randn(2, 3, 16, 16)
    names = {
        module
        for b in sd.find_residual_blocks(model, x)
        for r in b.branches
        for module in r.modules
    }
    assert not names & {"outc", "up1", "up2", "merge", "inc"}
    assert all(not a.startswith(f"{b}.") for a, b in itertools.permutations(names, 2)), (
        "the branches of a U-shaped net are apart"
    )
