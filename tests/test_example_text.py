"""`examples/text.py` as users run it: what it measures, what it leaves behind, what it refuses."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import text
from imagelib.flops import count_step_cost
from textlib.contender import Contender
from textlib.gpt import GPT
from textlib.models import build_model
from textlib.options import parse
from textlib.race import affordable_steps, look_after
from textlib.recipe import learning_rate
from textlib.records import HeldOut, Step
from textlib.results import on_the_way
from textlib.text_data import Text, read_text
from textlib.timing import time_to_plain
from textlib.trigram import Trigram
from textlib.windows import Batch, Windows

SAMPLE = Path(text.__file__).parent / "textlib" / "data" / "coriolanus.txt"
SHAKESPEARE = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare" / "input.txt"
# Small and short: 20 steps of some milliseconds, three times.
SHORT = f"--data=text:{SAMPLE} --steps=20 --batch-size=4 --context=16 --seed=3 --device=cpu".split()
VARIANTS = ["plain", "progressive", "decreasing"]


def rows(folder: Path, variant: str, comparison: str = "steps") -> list[dict[str, str]]:
    with (folder / "steps.csv").open() as file:
        everything = list(csv.DictReader(file))
    assert tuple(everything[0]) == ("comparison", "variant", *Step._fields)
    return [r for r in everything if (r["variant"], r["comparison"]) == (variant, comparison)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that came to its end; `printed` is what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert text.main([*SHORT, f"--out={folder}"]) == 0
    (folder / "printed").write_text(printed.getvalue())
    return folder


@pytest.fixture
def metrics(finished: Path) -> Any:
    return json.loads((finished / "metrics.json").read_text())


def test_the_table_has_all_variants(finished: Path) -> None:
    table = (finished / "printed").read_text()
    assert re.search("plain .* progressive .* decreasing", table)
    for row in ("held-out perplexity", "GFLOPs per step", "seconds per step", "  on the way"):
        assert re.search(rf"{row} +│ +[\d.]+ │ +[\d.]+ │ +[\d.]+ │", table), row
    assert re.search(r"Trigram baseline: held-out perplexity \d+\.\d+. Not better than it", table)
    assert re.search(r"Dropping (did not help|lowered the perplexity): \w+ at equal", table)


def test_what_is_measured(metrics: Any, finished: Path) -> None:
    assert metrics["finished"]
    assert metrics["steps"] == 20
    assert metrics["configuration"]["gamma"] == 100 / 20
    assert list(metrics["variants"]) == VARIANTS
    for name, variant in metrics["variants"].items():
        assert len(rows(finished, name)) == 20
        assert [look["step"] for look in variant["curve"]] == [0, *sorted(look_after(20, 10))]
        for outcome in (variant["equal_steps"], variant["equal_flops"]):
            assert outcome["perplexity"] == pytest.approx(np.exp(outcome["held_out_loss"]))
        assert variant["curve"][-1]["loss"] < variant["curve"][0]["loss"]
        assert variant["beats_trigram"] is False  # after 20 steps
    assert metrics["variants"]["plain"]["time_to_plain"] is None
    assert metrics["variants"]["progressive"]["time_to_plain"]["low"] > 0
    assert metrics["machine"]["torch"] == torch.__version__
    with PIL.Image.open(finished / "loss.png") as picture:
        assert picture.size[0] > 600


def test_dropping_executes_fewer_flops(metrics: Any, finished: Path) -> None:
    counted = metrics["counted_steps"]
    assert [step["variant"] for step in counted[:15:5]] == VARIANTS
    for step in counted:
        assert step["executed"] == step["expected"]
    plain = metrics["variants"]["plain"]
    assert plain["blocks_per_step"] == 8
    for name in VARIANTS[1:]:
        executed = [s["executed"] for s in counted if s["variant"] == name]
        assert min(executed) < plain["flops_per_step"]
        variant = metrics["variants"][name]
        assert variant["flops_saved"] == pytest.approx(
            1 - variant["flops_per_step"] / plain["flops_per_step"]
        )
        assert 0.05 < variant["flops_saved"] < 0.5
        steps = rows(finished, name)
        assert sum(int(s["flops"]) for s in steps) == variant["equal_steps"]["flops"]
    # The last fifth of the decreasing variant runs everything; the first layer always does.
    assert {int(step["blocks_run"]) for step in rows(finished, "decreasing")[16:]} == {8}
    assert {int(step["blocks_run"]) for step in rows(finished, "progressive")[:1]} == {8}


def test_equal_flops_are_equal(metrics: Any, finished: Path) -> None:
    budget = metrics["equal_flops"]
    spent = {name: v["equal_steps"]["flops"] for name, v in metrics["variants"].items()}
    assert budget == min(spent.values()) == spent[metrics["cheapest"]]
    for name, variant in metrics["variants"].items():
        assert variant["equal_flops"]["flops"] == pytest.approx(budget, rel=0.15)  # 20 draws
        anew = rows(finished, name, "FLOPs")
        assert len(anew) in (0, variant["equal_flops"]["steps"])
        assert (name == "plain") <= (0 < len(anew) < 20)
        # Down to 0 at their end, too.
        assert not anew or float(anew[-1]["learning_rate"]) < 1e-4


def test_all_start_from_the_same_weights_and_see_the_same_batches(tmp_path: Path) -> None:
    assert text.main([*SHORT, "--steps=6", "--drop-rate=0", "--theta=1", f"--out={tmp_path}"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    curves = [variant["curve"] for variant in metrics["variants"].values()]
    assert curves[0] == curves[1] == curves[2]  # nothing drops: nothing may differ
    losses = [[step["loss"] for step in rows(tmp_path, name)] for name in VARIANTS]
    assert losses[0] == losses[1] == losses[2]


def test_dropping_starts_from_those_weights_too(metrics: Any) -> None:
    assert len({variant["curve"][0]["loss"] for variant in metrics["variants"].values()}) == 1


def test_the_held_out_part_is_never_trained_on() -> None:
    positions = Text(np.arange(1000), vocabulary=1000, fingerprint="")
    windows = Windows(positions, context=8, batch_size=64, seed=0)
    trained = torch.cat([windows.for_training(step).following.flatten() for step in range(50)])
    assert trained.max() == 899  # it reaches the last token before it, and no further
    first = torch.cat([windows.for_training(step).tokens[:, 0] for step in range(50)])
    assert first.min() == 0
    held_out = torch.cat([batch.following.flatten() for batch in windows.held_out()])
    assert held_out.tolist() == list(range(901, 901 + 12 * 8))
    assert torch.cat([batch.tokens.flatten() for batch in windows.held_out()]).min() == 900
    assert windows.held_out_with_past().tolist() == list(range(899, 901 + 12 * 8))


def test_batches_are_a_function_of_seed_and_step() -> None:
    sample = read_text(SAMPLE, "char", 8)
    one, same, other = (Windows(sample, 8, 4, seed) for seed in (0, 0, 1))
    for step in (5, 2):
        assert torch.equal(one.for_training(step).tokens, same.for_training(step).tokens)
        assert not torch.equal(one.for_training(step).tokens, other.for_training(step).tokens)
    batch = one.for_training(0)
    assert torch.equal(batch.tokens[:, 1:], batch.following[:, :-1])


def test_trigram_equals_a_computation_by_hand() -> None:
    a, b, c = range(3)
    trigram = Trigram(np.array([a, b, a, b, a, a]), vocabulary=3)
    # a 4 times, b 2 times: two different tokens. Each is interpolated with 1/3.
    of_a, of_b, of_c = (4 + 2 / 3) / 8, (2 + 2 / 3) / 8, (2 / 3) / 8
    # a is followed by b twice and by a once; b by a twice.
    a_after_a, b_after_a, c_after_a = (1 + 2 * of_a) / 5, (2 + 2 * of_b) / 5, 2 * of_c / 5
    a_after_b = (2 + of_a) / 3
    # "ba" is followed by b and by a, once each; "ab" by a twice; "aa" by nothing, nor "ca".
    by_hand = {
        (b, a, a): (1 + 2 * a_after_a) / 4,
        (b, a, b): (1 + 2 * b_after_a) / 4,
        (b, a, c): 2 * c_after_a / 4,
        (a, b, a): (2 + a_after_b) / 3,
        (a, a, b): b_after_a,
        (c, a, b): b_after_a,
        (a, c, a): of_a,
    }
    for tokens, probability in by_hand.items():
        assert trigram.probabilities(np.array(tokens)) == pytest.approx([probability])
    everything = sum(trigram.probabilities(np.array([b, a, token]))[0] for token in range(3))
    assert everything == pytest.approx(1)
    loss = -np.log([by_hand[b, a, a], by_hand[a, a, b]]).mean()
    assert trigram.loss(np.array([b, a, a, b])) == pytest.approx(loss)


def test_trigram_on_the_reference_text() -> None:
    if not SHAKESPEARE.exists():
        pytest.skip("needs ../shared/data/tinyshakespeare")
    shakespeare = read_text(SHAKESPEARE, "char", 64)
    assert shakespeare.vocabulary == 65
    assert len(shakespeare.held_out) == 50_000
    windows = Windows(shakespeare, 64, 16, seed=0)
    trigram = Trigram(shakespeare.training, 65)
    assert 6 < np.exp(trigram.loss(windows.held_out_with_past())) < 9


def test_flops_of_attention_are_counted_on_the_cpu() -> None:
    vocabulary, context, layers, width, sequences = 11, 16, 2, 32, 3
    model = GPT(vocabulary, context, layers, width, heads=4)
    tokens = torch.zeros(sequences, context, dtype=torch.long)
    linear = 3 * 2 * (layers * 12 * width**2 + width * vocabulary)  # forward, and twice backward
    attention = (2 + 5) * 2 * layers * context * width  # products: 2 forward, 5 backward
    assert count_step_cost(model, tokens).everything == tokens.numel() * (linear + attention)


def test_the_gpt_does_not_look_ahead() -> None:
    model = build_model("gpt", 11, 8).eval()
    tokens = torch.arange(8)[None]
    other = tokens.clone()
    other[:, 5] = 10
    with torch.no_grad():
        same = torch.isclose(model(tokens), model(other)).all(-1)
    assert same.squeeze().tolist() == [True] * 5 + [False] * 3


def test_learning_rate_rises_and_goes_down_a_cosine() -> None:
    rates = [learning_rate(1.0, step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[52] == pytest.approx(0.5, abs=0.02)
    assert rates[-1] < 0.001
    assert learning_rate(1.0, 0, 1) == 1


def test_on_the_way_lies_between_two_looks() -> None:
    curve = [HeldOut(0, 0, 4.0), HeldOut(10, 100, 2.0), HeldOut(20, 300, 1.0)]
    found = on_the_way(curve, 200)
    assert (found.steps, found.flops, found.held_out_loss) == (15, 200, 1.5)
    assert on_the_way(curve, 300).held_out_loss == 1.0


def test_time_is_compared_step_by_step() -> None:
    seconds = np.random.default_rng(0).uniform(1, 1.2, 40)
    plain = [Step(n, n > 2, s, 0.0, 0.0, 8, 1, "9") for n, s in enumerate(seconds)]
    faster = [step._replace(seconds=0.5 * step.seconds) for step in plain]
    faster[7] = faster[7]._replace(seconds=50.0)  # something else held up this one
    found = time_to_plain(faster, plain)
    assert found is not None
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(0.5)
    assert time_to_plain(faster[:10], plain) is None


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int, *, anew: bool = False) -> None:
    """Ctrl-C in the middle of this step of the plain model, or of the one that is trained anew."""
    take_turn = Contender.take_turn

    def interrupted(self: Contender, batch: Batch) -> None:
        is_anew = self.total_steps < 20
        if self.name == "plain" and len(self.steps) == number and anew is is_anew:
            os.kill(os.getpid(), signal.SIGINT)
        take_turn(self, batch)

    monkeypatch.setattr(Contender, "take_turn", interrupted)


def test_ctrl_c_leaves_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, 6)
    assert text.main([*SHORT, f"--out={tmp_path}"]) == 130
    output = capsys.readouterr().out
    assert "After 7 steps, interrupted" in output
    assert "perplexities are those after step 6." in output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert not metrics["finished"]
    for name, variant in metrics["variants"].items():
        assert len(rows(tmp_path, name)) == 7
        assert variant["equal_flops"] is None
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("anew", [False, True])
def test_ctrl_c_and_resume_end_as_one_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    """In the first comparison, and in the second."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6, anew=anew)
        assert text.main([*SHORT, f"--out={tmp_path}"]) == 130
    assert text.main([*SHORT, f"--out={tmp_path}", "--resume"]) == 0
    assert losses(tmp_path) == losses(finished)
    one, other = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["contenders"]
        for folder in (tmp_path, finished)
    )
    assert one.keys() == other.keys()
    for name, state in one.items():
        for key, value in state["model"].items():
            assert torch.equal(value, other[name]["model"][key]), (name, key)


def losses(folder: Path) -> Any:
    """All that does not depend on the clock."""
    metrics = json.loads((folder / "metrics.json").read_text())
    variants = metrics["variants"].items()
    clocks = ("seconds_per_step", "time_to_plain")
    return {n: {k: x for k, x in v.items() if k not in clocks} for n, v in variants}


def test_resume_needs_a_run_to_go_on_with(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, why in (
        (["--resume"], "say with --out which folder"),
        (["--resume", f"--out={tmp_path}"], "there is no"),
        (["--resume", f"--out={finished}", "--lr=0.1"], "is of another run: lr was 0.003, now 0.1"),
    ):
        assert text.main([*SHORT, *arguments]) == 2
        assert why in capsys.readouterr().err


def test_the_play_that_ships_is_the_default() -> None:
    assert parse(["--steps=10"]).data == SAMPLE


def test_looks_take_a_part_of_the_time() -> None:
    """All of the held-out part in a long training, less of it in a short one."""
    for steps, most in ((10, 32), (100, 65), (1500, 981)):
        assert text.windows_at_a_look(steps * 12) == most
    windows = Windows(read_text(SAMPLE, "char", 16), 16, 4, seed=0, most=40)
    assert sum(len(batch.tokens) for batch in windows.held_out()) == 40
    assert len(windows.held_out_with_past()) == 40 * 16 + 2


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox"])
def test_models_of_transformers(tmp_path: Path, model_type: str) -> None:
    pytest.importorskip("transformers")
    given = [*SHORT, "--steps=4", f"--model=transformers:{model_type}", "--level=byte"]
    assert text.main([*given, f"--out={tmp_path}"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["text"]["vocabulary"] == 256
    assert metrics["variants"]["plain"]["blocks_per_step"] == 8
    assert metrics["variants"]["decreasing"]["flops_saved"] > 0
    for step in metrics["counted_steps"]:
        assert step["executed"] == step["expected"]


@pytest.mark.parametrize("rate", [10, 100])
def test_a_training_that_diverges_is_reported(rate: int, tmp_path: Path) -> None:
    """Perplexities beyond all numbers, or none: null in JSON, which has neither."""
    assert text.main([*SHORT, f"--lr={rate}", f"--out={tmp_path}"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["variants"]) == set(VARIANTS)
    assert (tmp_path / "report.html").stat().st_size > 1000


BAD_INPUT = {
    "--data=text:/no/such/file": "there is no file '/no/such/file'",
    "--data=text:/tmp": "there is no file '/tmp'",
    "--data=input.txt": "'input.txt' is not text:PATH",
    "--data=text:": "'text:' is not text:PATH",
    "--context=2000": "too short: it has 15,957 characters, and at least 20,010 are needed",
    "--level=word": "invalid choice: 'word'",
    "--model=gtp": "'gtp' is neither gpt nor transformers:TYPE",
    "--model=timm:gpt2": "'timm:gpt2' is neither gpt nor transformers:TYPE",
    "--model=transformers:gtp2": "no language model 'gtp2'; the nearest types are .*gpt2",
    "--model=transformers:bert": "looks at the tokens that it is to predict",
    "--steps=0": "'0' is not a whole number from 1 on",
    "--lr=nan": "'nan' is not a number",
    "--drop-rate=1": r"'1' is not a number in \[0, 1\)",
    "--theta=1.5": "theta is 1.5",
    "--gamma=-1": "'-1' is not a number from 0 on",
    "--device=quantum": "no device 'quantum'",
    "--no-such-option": "unrecognized arguments: --no-such-option",
}


@pytest.mark.parametrize("options", BAD_INPUT)
def test_bad_input_is_one_line(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "transformers:" in options:
        pytest.importorskip("transformers")
    folder = tmp_path / "out"
    assert text.main([*SHORT, f"--out={folder}", options]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"text.py: .*{BAD_INPUT[options]}.*\n", error), error
    assert not folder.exists()


def test_bytes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "noise"
    file.write_bytes(bytes(range(256)) * 10)
    assert text.main([*SHORT, f"--data=text:{file}", f"--out={tmp_path}/out"]) == 2
    assert "is not UTF-8 text (byte 128); --level byte takes any" in capsys.readouterr().err
    assert read_text(file, "byte", 16).vocabulary == 256


def test_another_run_is_left_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    assert text.main([*SHORT, f"--out={finished}"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_a_file_is_no_folder_to_write_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert text.main([*SHORT, f"--out={tmp_path}/out"]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_the_budget_buys_fewer_steps_of_the_expensive() -> None:
    class Spent:
        def __init__(self, name: str, flops: int) -> None:
            self.name, self.flops, self.total_steps = name, flops, 100

    contenders: Any = [Spent("plain", 1000), Spent("nearly", 801), Spent("cheapest", 800)]
    assert affordable_steps(contenders) == {"plain": 80}
