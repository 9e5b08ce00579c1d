"""The examples in other people's trainers learn, and go on where they were cut."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import in_accelerate
import in_lightning
import in_transformers
from imagelib.cifar_resnet import CifarResNet

Main = Callable[[list[str]], None]
pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:::transformers"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


def plain(printed: str) -> float:
    """What the example says of the plain model at its end."""
    return float(re.findall(r"of the plain model (?:on held-out text )?([\d.]+)", printed)[-1])


@pytest.mark.parametrize(
    ("main", "unit", "first", "more", "bound"),
    [
        (in_lightning.main, "--epochs", 1, 2, 40.0),  # percent
        (in_transformers.main, "--steps", 50, 60, 3.2),  # nats; 4.0 where nothing is learned
        (in_accelerate.main, "--steps", 20, 40, 60.0),
    ],
    ids=["lightning", "transformers", "accelerate"],
)
def test_it_learns_and_goes_on(
    main: Main,
    unit: str,
    first: int,
    more: int,
    bound: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main([f"{unit}={first}", f"--out={tmp_path}"])
    main([f"{unit}={more}", f"--out={tmp_path}", "--resume"])
    assert plain(capsys.readouterr().out) < bound


def test_the_weights_that_lightning_leaves_are_those_of_a_plain_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_lightning.main(["--epochs=1", f"--out={tmp_path}"])
    error = plain(capsys.readouterr().out)
    network = CifarResNet(20)
    network.load_state_dict(torch.load(tmp_path / "plain.pt"))
    network.eval()
    wrong = [
        (network(images).argmax(1) != labels).float().mean()
        for images, labels in in_lightning.loaders()[1]
    ]
    assert 100 * sum(wrong) / len(wrong) == pytest.approx(error, abs=0.01)  # as printed


def test_accelerate_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """With the weights that it would have had."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    in_accelerate.main(["--steps=4", f"--out={cut}"])
    in_accelerate.main(["--steps=8", f"--out={cut}", "--resume"])
    in_accelerate.main(["--steps=8", f"--out={whole}"])
    mine, its = (load_file(folder / "model.safetensors") for folder in (cut, whole))
    assert all(torch.equal(mine[name], its[name]) for name in its)
