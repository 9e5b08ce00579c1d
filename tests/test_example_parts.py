"""The parts of `examples/images.py` on their own: recipe, networks, measurements, checkpoints."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from imagelib import InputError
from imagelib.batches import Batch, metered
from imagelib.checkpoints import Checkpoints, replacing
from imagelib.cifar_resnet import CifarResNet, PaddedShortcut, Shrink
from imagelib.flops import count_step_cost, counting
from imagelib.models import build_model
from imagelib.recipe import Time, learning_rate
from imagelib.records import Records, Step
from imagelib.shortened import can_be_taken_out, taken_out
from imagelib.timing import Saving, saving_of, speed_of


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0dur", 0),
        ("0.1dur", 100),
        (".25dur", 250),
        ("1dur", 1000),
        ("5ep", 500),
        ("1000ba", 1000),
        ("70", 70),
        (" 70ba ", 70),
    ],
)
def test_times(text: str, steps: int) -> None:
    assert Time.parse(text).steps(epochs=10, steps_per_epoch=100) == steps


@pytest.mark.parametrize(
    "text", ["", "dur", "0.1", "0.1 dur", "1.5dur", "-1ep", "2.5ep", "1e3ba", "10s", "0.1Dur"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"no time|longer than|not a whole number"):
        Time.parse(text)


def test_learning_rate_falls_after_a_half_and_three_quarters() -> None:
    rates = [learning_rate(0.1, step, total_steps=8) for step in range(8)]
    assert rates == [0.1] * 4 + [0.1 / 10] * 2 + [0.1 / 100] * 2


def slow_shortcut(x: Tensor, new_channels: int, shrink: Shrink) -> Tensor:
    """Pixel by pixel; at an odd border only the pixels that are there are averaged."""
    number, channels, height, width = x.shape
    out = torch.zeros(number, channels + new_channels, (height + 1) // 2, (width + 1) // 2)
    for row in range(out.shape[2]):
        for column in range(out.shape[3]):
            window = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            pixel = window.mean((2, 3)) if shrink == "pool" else window[:, :, 0, 0]
            out[:, :channels, row, column] = pixel
    return out


@pytest.mark.parametrize("size", [4, 7])
@pytest.mark.parametrize("shrink", ["pool", "subsample"])
def test_shortcut_equals_a_slow_reference(shrink: Shrink, size: int) -> None:
    x = torch.randn(2, 3, size, size)
    torch.testing.assert_close(PaddedShortcut(5, shrink)(x), slow_shortcut(x, 5, shrink))


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_are_as_large_as_published(depth: int, millions: float) -> None:
    """He et al. 2016, table 6."""
    model = CifarResNet(depth)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.04)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_other_depths_are_none() -> None:
    with pytest.raises(ValueError, match=r"6n \+ 2 layers, but depth is 21"):
        CifarResNet(21)


NAMES = ["resnet20", "torchvision:resnet18", "torchvision:resnet50", "timm:vit_tiny_patch16_224"]


def gated(name: str) -> tuple[nn.Module, nn.Module, sd.StochasticDepth, Tensor]:
    """The plain network, the same one with stochastic depth, its handle, and what it takes."""
    torch.manual_seed(0)
    size = 224 if "224" in name else 16
    example = torch.randn(2, 3, size, size)
    plain = build_model(name, 10, example).train()
    model = copy.deepcopy(plain)
    return plain, model, sd.apply_stochastic_depth(model, 0.5, example_inputs=example), example


def flops(model: nn.Module, example: Tensor) -> int:
    with counting() as counter:
        model(example).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_flops_add_up_and_equal_the_shortened_network(name: str) -> None:
    plain, model, depth, example = gated(name)
    before = copy.deepcopy(plain)
    assert can_be_taken_out(plain, model, depth, example)
    cost = count_step_cost(model, example)
    assert cost.everything == flops(plain, example)
    for _ in range(2):
        executed = flops(model, example)
        gates = depth.last_gates
        closed = [block for block, is_open in gates.items() if not is_open]
        assert executed == cost.with_gates(gates)
        with taken_out(plain, closed):
            assert flops(plain, example) == executed
    assert str(plain) == str(before)
    assert plain.state_dict().keys() == before.state_dict().keys()


def test_counting_leaves_the_network_alone() -> None:
    _, model, depth, example = gated("resnet20")
    weights = copy.deepcopy(model.state_dict())
    count_step_cost(model, example)
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not depth.last_gates


def test_a_wrong_guess_at_what_remains_is_noticed() -> None:
    plain, model, depth, example = gated("resnet20")
    with torch.no_grad():
        plain.get_parameter("conv1.weight").mul_(2)
    assert not can_be_taken_out(plain, model, depth, example)


def throttled(batch: Batch, seconds: float) -> Iterator[Batch]:
    for _ in range(8):
        time.sleep(seconds)
        yield batch


@pytest.mark.parametrize(("seconds", "slow"), [(0.02, True), (0.0, False)])
def test_a_slow_loader_is_said_to_be_the_bottleneck(seconds: float, *, slow: bool) -> None:
    batch = Batch(torch.zeros(2), torch.zeros(2))
    steps = []
    for number, (waited, _) in enumerate(metered(throttled(batch, seconds))):
        start = time.perf_counter()
        time.sleep(0.01)
        steps.append(step(number, data_seconds=waited, seconds=time.perf_counter() - start))
    speed = speed_of(steps, "seconds", batch_size=2, steps_per_epoch=8)
    assert speed is not None
    remark = speed.remark()
    assert (remark is not None and "bottleneck" in remark) if slow else remark is None


def step(number: int, **measured: Any) -> Step:
    """A step of 10 ms without stochastic depth and 8 ms with it, where nothing else is said."""
    standard = {
        "epoch": number // 100,
        "timed": True,
        "data_seconds": 0.0,
        "plain_seconds": 0.010,
        "plain_loss": 1.0,
        "seconds": 0.008,
        "loss": 1.0,
        "blocks_run": 7,
        "flops": 1000,
        "gates": "999",
    }
    return Step(step=number, **{**standard, **measured})


def saving(ours: float, shortened: float, noise: float = 0.0) -> Saving:
    """Out of 300 steps, each third of them compared with the shortened network."""
    generator = np.random.default_rng(0)

    def around(seconds: float) -> float:
        return seconds * math.exp(noise * generator.standard_normal())

    steps = [
        step(
            number,
            plain_seconds=around(0.010),
            seconds=around(ours),
            shortened_seconds=around(shortened) if number % 3 == 0 else math.nan,
        )
        for number in range(300)
    ]
    found = saving_of(steps)
    assert found is not None
    return found


def test_saving() -> None:
    found = saving(ours=0.0080, shortened=0.0075)
    assert found.time_saved.value == pytest.approx(0.2)
    assert found.possible.value == pytest.approx(0.25)
    assert found.share_of_possible.value == pytest.approx(0.8)
    assert found.compared_steps == 100


@pytest.mark.parametrize(
    ("ours", "shortened", "noise", "remark"),
    [
        (0.0075, 0.0075, 0.01, "At least 80%"),
        (0.0090, 0.0075, 0.01, "Less than 80%"),
        (0.0110, 0.0075, 0.01, "Less than 80%"),
        (0.0080, 0.0075, 0.05, "Too noisy to tell"),
        (0.0075, 0.0075, 0.50, "Too noisy to tell"),
        (0.0100, 0.0100, 0.01, "Too noisy to tell"),
    ],
)
def test_the_table_says_what_the_saving_is_worth(
    ours: float, shortened: float, noise: float, remark: str
) -> None:
    assert saving(ours, shortened, noise).remark().startswith(remark)


def test_interrupted_steps_are_left_out() -> None:
    steps = [
        step(n, shortened_seconds=0.0075, seconds=0.5 if n == 7 else 0.0075) for n in range(50)
    ]
    found = saving_of(steps)
    assert found is not None
    assert found.interrupted_steps == 1
    assert found.share_of_possible.value == pytest.approx(1.0)


def test_nothing_is_said_about_the_saving_without_a_comparison() -> None:
    assert saving_of([]) is None
    assert saving_of([step(n) for n in range(50)]) is None
    assert saving_of([step(n, plain_seconds=math.nan) for n in range(50)]) is None


def test_records_as_csv() -> None:
    records = Records()
    records.steps = [step(0), step(1, timed=False, shortened_seconds=0.25, loss=math.inf)]
    header, *lines = records.as_csv().splitlines()
    assert header == ",".join(Step._fields)
    assert lines == [
        "0,0,1,0,0.01,1,0.008,1,7,1000,999,,,",
        "1,0,0,0,0.01,1,0.008,inf,7,1000,999,0.25,,",
    ]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with replacing(file) as content:
        content.write(b"old")
    with pytest.raises(TypeError), replacing(file) as content:
        content.writelines([b"new", "of the wrong type"])  # type: ignore[list-item]
    assert file.read_bytes() == b"old"


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_a_bit(content: bytes) -> bytes:
    place = content.index(torch.full((500,), 2.0).numpy().tobytes()) + 1000
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda _: b""])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, {"lr": 0.1})
    for epoch in (1.0, 2.0):
        checkpoints.save({"weights": torch.full((1000,), epoch)})
    assert checkpoints.load()["weights"][0] == 2
    checkpoints.newest.write_bytes(damage(checkpoints.newest.read_bytes()))
    assert checkpoints.load()["weights"][0] == 1
    assert f"{checkpoints.newest} is damaged" in capsys.readouterr().err
    checkpoints.save({"weights": torch.full((1000,), 2.0)})
    assert checkpoints.load()["weights"][0] == 2
    for file in (checkpoints.newest, checkpoints.before):
        file.write_bytes(b"")
    with pytest.raises(InputError, match="is damaged"):
        checkpoints.load()


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {"lr": 0.1, "seed": 1}).save({})
    with pytest.raises(InputError, match=r"of another run: lr was 0\.1, now 0\.2$"):
        Checkpoints(tmp_path, {"lr": 0.2, "seed": 1}).load()
    with pytest.raises(InputError, match="there is no"):
        Checkpoints(tmp_path / "elsewhere", {}).load()
