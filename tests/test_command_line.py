"""Promise: `python -m stochastic_depth MODEL` shows what it would do, and trains nothing.

Bad input: one line, exit code 2, and no traceback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from networks import residuals, vectors
from stochastic_depth.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:.*(shallow networks|dropout is active)")


def small() -> nn.Module:
    return residuals(6)


def small_with_example() -> tuple[nn.Module, torch.Tensor]:
    return residuals(6), vectors(2, 8)


def broken() -> nn.Module:
    raise RuntimeError("not today")


def alone() -> tuple[nn.Module]:
    return (residuals(6),)


def three() -> tuple[nn.Module, torch.Tensor, int]:
    return residuals(6), vectors(2, 8), 3


def nothing_made() -> None:
    return None


def chatters() -> tuple[nn.Module, torch.Tensor]:
    sys.stdout.write("I am built\n")
    return small_with_example()


def foreign() -> tuple[nn.Module, torch.Tensor]:
    kind = type("Größe", (nn.Sequential,), {})
    return kind(*residuals(6)), vectors(2, 8)


class Untold(nn.Module):
    """A model of tokens, without an example of its own."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids


def untold() -> nn.Module:
    return Untold()


class Leaking(nn.Module):
    """A block that hands out what is made inside of its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).tanh()
        return (x + self.second(h)) * h.exp()


def all_refused() -> tuple[nn.Module, torch.Tensor]:
    return residuals(3, Leaking), vectors(2, 8)


def leaves() -> nn.Module:
    sys.exit(3)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_a_function_of_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    expected = sd.estimate_saving(residuals(6), 0.2, example_inputs=vectors(2, 8))
    name = f"{__name__}:small"
    assert shown(capsys, name, "--input", "2,8") == f"{expected}\n"
    assert shown(capsys, f"{name}_with_example", "--drop-rate", "0.2") == f"{expected}\n"


def test_an_example_on_the_command_line_goes_first(capsys: pytest.CaptureFixture[str]) -> None:
    once = shown(capsys, f"{__name__}:small_with_example")
    twice = shown(capsys, f"{__name__}:small_with_example", "--input", "4,8")
    assert once != twice
    assert shown(capsys, f"{__name__}:alone", "--input", "4,8") == twice


def test_json_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, f"{__name__}:small_with_example", "--json", "--drop-rate", "0.4")
    found, expected = json.loads(text), sd.estimate_saving(*small_with_example_at(0.4))
    assert found["flops"] == expected.flops
    assert [block["flops"] for block in found["blocks"]] == [b.flops for b in expected.blocks]
    assert found["refused"] == {}


def small_with_example_at(rate: float) -> tuple[nn.Module, float]:
    model = residuals(6)
    model.dummy_inputs = {"input": vectors(2, 8)}  # type: ignore[assignment]
    return model, rate


def test_options_reach_it(capsys: pytest.CaptureFixture[str]) -> None:
    name, options = f"{__name__}:small_with_example", ["--drop-distribution", "uniform"]
    text = shown(capsys, name, *options, "--unit", "branch", "--mode", "sample", "--timed")
    assert text.count(" 0.2 ") == 6
    assert "of a step's time here" in text
    assert "kept rows" in text


def test_models_of_timm_and_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    size = ["--input", "2,3,64,64"]
    assert shown(capsys, "timm:resnet18", *size).count("BasicBlock") == 8
    assert shown(capsys, "torchvision:resnet18", *size).count("BasicBlock") == 8


def test_what_drops_on_its_own_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    text = shown(capsys, "torchvision:convnext_tiny", "--input", "2,3,32,32")
    assert text.count("CNBlock") == 18


@pytest.mark.filterwarnings("ignore:fold\\(\\) will not be able")
def test_models_of_transformers_and_what_of_them_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    text = shown(capsys, "transformers:t5")
    assert text.count("skipped whole") == 10
    assert "Refused: encoder.block.0: " in text
    found = json.loads(shown(capsys, "transformers:t5", "--json"))
    assert list(found["refused"]) == ["encoder.block.0", "decoder.block.0"]
    # Of seven billion weights, none of which is there.
    assert "MFLOPs" in shown(capsys, "transformers:llama")
    # Whose router sends rows to experts, how many is told by values alone.
    assert "MFLOPs" in shown(capsys, "transformers:olmoe")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([f"{__name__}:nothing"], "has no attribute 'nothing'"),
        ([f"{__name__}:broken"], "RuntimeError: not today"),
        (["nowhere:at_all"], "No module named 'nowhere'"),
        (["small"], "cannot be built"),
        ([f"{__name__}:small"], "carries no example of its own"),
        ([f"{__name__}:small", "--input", "2,9"], "failed on its example inputs"),
        ([f"{__name__}:small", "--input", "2,9"], "pass an --input that fits"),
        ([f"{__name__}:small", "--input", "2,x"], "--input"),
        ([f"{__name__}:small", "--input=-2,8"], "--input"),
        ([f"{__name__}:small", "--input=0,8"], "--input"),
        ([f"{__name__}:small", "--input=2,99999999999999"], "--input"),
        ([f"{__name__}:three"], "three() returns no model, or more than one"),
        ([f"{__name__}:nothing_made"], "nothing_made() returns no model"),
        ([f"{__name__}:leaves"], "SystemExit: 3"),
        ([f"{__name__}:small_with_example", "--drop-rate", "1.5"], "drop_rate is 1.5"),
        ([f"{__name__}:small_with_example", "--drop-rate", "much"], "--drop-rate"),
        ([f"{__name__}:small_with_example", "--unit", "layer"], "--unit"),
        ([f"{__name__}:small_with_example", "--fast"], "--fast"),
        ([], "model"),
        ([f"{__name__}:untold"], "package.module:function that returns the model and a dict"),
        ([f"{__name__}:all_refused"], "computes with a value made inside of it"),
        (["timm:resnet_one"], "timm:resnet_one"),
        (["torchvision:resnet_one"], "torchvision:resnet_one"),
        (["transformers:bort"], "transformers:bort"),
        (["transformers:segformer"], "pass an --input that fits"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stochastic_depth: ")
    assert err.count("\n") == 1
    assert why in err
    assert len(err) < 1100  # of a library that lists all that it knows


def test_as_a_command() -> None:
    command = [sys.executable, "-m", "stochastic_depth"]
    folder = Path(__file__).parent
    run = subprocess.run(
        [*command, "networks:nested", "--input", "2,3"], cwd=folder, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "It saves" in run.stdout.splitlines()[-1]
    run = subprocess.run([*command, "networks:none"], cwd=folder, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)


def run(command: str, *, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    program = f"{sys.executable} -W ignore -m stochastic_depth {Path(__file__).stem}"
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program}:{command}"],
        cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_whoever_reads_may_stop_and_what_cannot_be_written_is_said() -> None:
    stopped = run("small_with_example --json | true")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    full = run("small_with_example > /dev/full")
    assert (full.returncode, full.stderr.count("\n")) == (2, 1)
    assert "cannot write" in full.stderr


def test_letters_that_the_terminal_does_not_know() -> None:
    found = run("foreign", encoding="ascii")
    assert (found.returncode, found.stderr) == (0, "")
    assert "Gr\\xf6\\xdfe" in found.stdout


def test_what_a_model_prints_is_no_part_of_the_numbers() -> None:
    found = run("chatters --json")
    assert json.loads(found.stdout)["blocks"]
    assert found.stderr == "I am built\n"
