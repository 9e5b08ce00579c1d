"""Promise: a checkpoint that is loaded without the algorithm gets it, with a warning; never two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.algorithms import StochasticDepth as ComposersOwn

import stochastic_depth as sd
from stochastic_depth.integrations.composer import StochasticDepth
from with_composer.training import images, trainer


@pytest.fixture
def saved(tmp_path: Path) -> str:
    algorithm = StochasticDepth("ResNetBottleneck", drop_rate=0.5, drop_warmup="4ba")
    trainer(algorithm, max_duration="3ba", save_folder=str(tmp_path), save_filename="a.pt").fit()
    return str(tmp_path / "a.pt")


@pytest.mark.parametrize("load_weights_only", [True, False])
def test_it_is_added(saved: str, load_weights_only: bool) -> None:
    with pytest.warns(UserWarning, match="Automatically adding required_on_load algorithm Watched"):
        made = trainer(load_path=saved, load_weights_only=load_weights_only)
    (algorithm,) = made.state.algorithms
    assert isinstance(algorithm, StochasticDepth)
    assert repr(algorithm) == repr(
        StochasticDepth("ResNetBottleneck", drop_rate=0.5, drop_warmup="4ba")
    )
    blocks = sd.get_stochastic_depth(made.state.model).blocks
    rate = 0.5 if load_weights_only else 0.375
    assert [b.drop_rate for b in blocks] == pytest.approx([rate * (i + 1) / 8 for i in range(8)])
    made.fit()
    assert algorithm.depth.state_dict()["step"] == 8


def test_it_is_added_in_a_program_that_knows_nothing_of_it(saved: str, tmp_path: Path) -> None:
    program = f"""
import sys, torch
from composer import Trainer
from composer.models import ComposerClassifier
from torchvision.models.resnet import Bottleneck, ResNet
model = ResNet(Bottleneck, [2, 2, 2, 2], num_classes=4, width_per_group=16)
assert not any(name.startswith("stochastic_depth") for name in sys.modules)
model = ComposerClassifier(model, num_classes=4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
options = dict(device="cpu", progress_bar=False, optimizers=optimizer)
trainer = Trainer(model=model, load_path={saved!r}, **options)
print(len(trainer.state.algorithms), repr(trainer.state.algorithms[0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith("1 WatchedStochasticDepth(target_layer_name='ResNetBottleneck'")
    assert "Automatically adding required_on_load algorithm" in done.stderr


def test_it_can_be_left_out(saved: str) -> None:
    made = trainer(load_path=saved, load_exclude_algorithms=["WatchedStochasticDepth"])
    assert not made.state.algorithms
    with pytest.raises(sd.SelectionError):
        sd.get_stochastic_depth(made.state.model)


def test_beside_composers_own_it_is_refused() -> None:
    both = (StochasticDepth("ResNetBottleneck"), ComposersOwn("ResNetBottleneck"))
    for algorithms in (both, both[::-1]):
        with pytest.raises(sd.OptionError, match="Composer's own StochasticDepth is in"):
            trainer(*algorithms)


@pytest.mark.filterwarnings("ignore:Automatically adding", "ignore:.*is not in the state_dict")
def test_a_checkpoint_of_composers_own(tmp_path: Path) -> None:
    """It is taken over by leaving theirs out, as the error says."""
    composers = ComposersOwn("ResNetBottleneck", drop_rate=0.1)
    options: dict[str, Any] = {"max_duration": "8ba"}
    theirs = trainer(composers, save_folder=str(tmp_path), save_filename="a.pt", **options)
    theirs.fit()
    path = str(tmp_path / "a.pt")
    with pytest.raises(sd.OptionError, match=r'load_exclude_algorithms=\["StochasticDepth"\]'):
        trainer(StochasticDepth("ResNetBottleneck", drop_rate=0.1), load_path=path)
    made = trainer(
        StochasticDepth("ResNetBottleneck", drop_rate=0.1),
        load_path=path,
        load_weights_only=True,
        load_exclude_algorithms=["StochasticDepth"],
    )
    x, _ = images(4)
    with torch.no_grad():
        expected = theirs.state.model.module.eval()(x)
        torch.testing.assert_close(made.state.model.module.eval()(x), expected)
