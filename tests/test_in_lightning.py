"""Promise: in a Lightning Trainer a callback is all; checkpoints and the model come out right."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stochastic_depth as sd
from networks import assert_equal, make
from stochastic_depth.integrations.lightning import StochasticDepth

pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]
STEPS, EPOCH = 12, 4
WARMUP = sd.linear_warmup(10)


def network() -> Any:
    return make("resnet")[0]


def example() -> Tensor:
    return make("resnet")[1]


class Net(LightningModule):
    """A network in the attribute `net`, trained by momentum on images that are no pictures."""

    def __init__(self, *, apply: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = network()
        self.lr = 0.05
        self.apply_here = apply
        self.drawn: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, images: list[Tensor], index: int) -> Tensor:
        loss = self(images[0]).square().mean()
        self.drawn.append(sd.get_stochastic_depth(self.net).last_gates)
        return loss

    def validation_step(self, images: list[Tensor], index: int) -> None:
        self.log("val_loss", self(images[0]).square().mean())

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=self.lr, momentum=0.9)
        if self.apply_here:  # the two lines
            depth = sd.apply_stochastic_depth(
                self.net, 0.5, example_inputs=example(), schedule=WARMUP
            )
            depth.follow(optimizer)
        return optimizer


def images() -> DataLoader[Any]:
    torch.manual_seed(1)
    found = torch.cat([example()] * EPOCH)  # Lightning begins an epoch anew when it resumes
    return DataLoader(TensorDataset(found), batch_size=len(example()))


def callback(**options: Any) -> StochasticDepth:
    options = {
        "module": "net",
        "example_inputs": example(),
        "schedule": WARMUP,
        **options,
    }
    return StochasticDepth(0.5, **options)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    options = {
        "max_steps": STEPS,
        "logger": False,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
        **options,
    }
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def each_step(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder,
        "{step}",
        every_n_train_steps=1,
        save_top_k=-1,
        auto_insert_metric_name=False,
        **options,
    )


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def by_hand(steps: int = STEPS) -> tuple[nn.Module, sd.StochasticDepth, list[Any]]:
    """The same training as a plain loop."""
    module = Net()
    depth = sd.apply_stochastic_depth(module.net, 0.5, example_inputs=example(), schedule=WARMUP)
    optimizer = module.configure_optimizers()
    depth.follow(optimizer)
    loader = images()
    module.train()
    for step in range(steps):
        module.training_step(list(loader.dataset[_rows(step)]), 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.net, depth, module.drawn


def _rows(step: int) -> slice:
    size = len(example())
    return slice(step % EPOCH * size, (step % EPOCH + 1) * size)


def test_fit_trains_as_a_plain_loop_does_and_gives_the_plain_model_back(tmp_path: Path) -> None:
    module, ours = Net(), callback()
    fit = trainer(tmp_path, ours)
    fit.fit(module, images())
    _, depth, drawn = by_hand()
    assert module.drawn == drawn
    assert_equal(module.net.state_dict(), depth.folded_state_dict())
    assert type(module.net) is type(network())
    with pytest.raises(sd.SelectionError):
        sd.get_stochastic_depth(module)
    assert_equal(module.net.eval()(example()), depth.fold().eval()(example()))
    fit.save_checkpoint(tmp_path / "end.ckpt")
    assert_equal(Net.load_from_checkpoint(tmp_path / "end.ckpt").state_dict(), module.state_dict())


def test_the_gates_can_stay(tmp_path: Path) -> None:
    module, ours = Net(), callback(fold=False)
    trainer(tmp_path, ours).fit(module, images())
    assert_equal(module.net.state_dict(), by_hand()[0].state_dict())
    assert ours.depth.state_dict()["step"] == STEPS


@pytest.mark.parametrize("way", ["callback", "two lines"])
@pytest.mark.parametrize("cut", [4, 6])
def test_a_resumed_fit_goes_on_bit_for_bit(tmp_path: Path, way: str, cut: int) -> None:
    def run(folder: Path, **options: Any) -> Net:
        module = Net(apply=way == "two lines")
        more = [callback()] if way == "callback" else []
        checkpoint = options.pop("ckpt_path", None)
        trainer(folder, *more, each_step(folder), **options).fit(
            module, images(), ckpt_path=checkpoint
        )
        return module

    whole, first = run(tmp_path / "whole"), run(tmp_path / "cut", max_steps=cut)
    second = run(tmp_path / "second", ckpt_path=tmp_path / "cut" / f"{cut}.ckpt")
    assert first.drawn + second.drawn == whole.drawn
    assert_equal(second.state_dict(), whole.state_dict())


def test_what_test_loads_is_folded(tmp_path: Path) -> None:
    module, ours = Net(), callback()
    fit = trainer(tmp_path, ours, each_step(tmp_path))
    fit.fit(module, images())
    _, depth, _ = by_hand(7)
    for runner in (fit, trainer(tmp_path, callback())):
        runner.test(module, images(), ckpt_path=tmp_path / "7.ckpt", verbose=False)
        assert_equal(module.net.state_dict(), depth.folded_state_dict())
    assert "on_load_checkpoint" not in vars(module)


def test_a_checkpoint_of_the_training_is_folded_without_a_model(tmp_path: Path) -> None:
    trainer(tmp_path, callback(), each_step(tmp_path)).fit(Net(), images())
    saved = torch.load(tmp_path / "7.ckpt", weights_only=False)
    _, depth, _ = by_hand(7)
    expected = {f"net.{key}": value for key, value in depth.folded_state_dict().items()}
    assert_equal(sd.fold_state_dict(saved["state_dict"], saved["optimizer_states"][0]), expected)


def test_checkpoints_of_weights_alone_are_folded(tmp_path: Path) -> None:
    trainer(tmp_path, callback(), each_step(tmp_path, save_weights_only=True)).fit(Net(), images())
    _, depth, _ = by_hand(7)
    loaded = Net.load_from_checkpoint(tmp_path / "7.ckpt")
    assert_equal(loaded.net.state_dict(), depth.folded_state_dict())


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    module, ours = Net(), callback()
    for steps in (6, STEPS):
        trainer(tmp_path, ours, max_steps=steps if steps == 6 else STEPS - 6).fit(module, images())
    drawn = by_hand()[2]
    assert module.drawn[:6] == drawn[:6]
    assert len(module.drawn) == STEPS
    # The clock goes on, and the weights are unfolded, to rounding.
    assert ours._finished is not None
    assert ours._finished.state["step"] == STEPS
    first, again = Net(), callback()
    trainer(tmp_path, again, max_steps=6).fit(first, images())
    folded = {k: v.clone() for k, v in first.net.state_dict().items()}
    assert again._finished is not None
    again._finished.unfold(first.net)
    torch.testing.assert_close(first.net.state_dict(), by_hand(6)[0].state_dict())
    again._finished.unfold(first.net)  # changed since: left alone
    torch.testing.assert_close(first.net.state_dict(), by_hand(6)[0].state_dict())
    assert any(not torch.equal(folded[k], v) for k, v in first.net.state_dict().items())


def test_a_fit_that_broke_off_goes_on(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("broken")

    module, ours = Net(), callback()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, ours, Breaks()).fit(module, images())
    trainer(tmp_path, ours, max_steps=3).fit(module, images())
    assert ours._finished is not None
    assert ours._finished.state["step"] == 6


def test_metrics_reach_the_loggers_and_the_bar(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Logger(DummyLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            seen.append(metrics)

    fit = trainer(tmp_path, callback(), logger=Logger(), log_every_n_steps=1)
    module = Net()
    fit.fit(module, images())
    found = [each for each in seen if "stochastic_depth/skipped" in each]
    assert len(found) == STEPS
    shares = [1 - sum(gates.values()) / len(gates) for gates in module.drawn]
    assert [each["stochastic_depth/skipped"] for each in found] == pytest.approx(shares, abs=1e-6)
    assert {"stochastic_depth/drop_rate", "stochastic_depth/blocks_run"} <= set(found[0])
    assert "stochastic_depth/skipped" in fit.progress_bar_metrics


class TwoParts(Net):
    """Two networks of one kind in one module, trained by one optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.other = network()

    def training_step(self, images: list[Tensor], index: int) -> Tensor:
        return self.net(images[0]).square().mean() + self.other(images[0]).square().mean()

    def validation_step(self, images: list[Tensor], index: int) -> None:
        self.log("val_loss", self.net(images[0]).square().mean() + self.other(images[0]).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def test_two_parts_of_one_module(tmp_path: Path) -> None:
    """Each is resumed, logged and folded by its own state."""

    def callbacks() -> list[StochasticDepth]:
        return [callback(), StochasticDepth(0.25, module="other", example_inputs=example())]

    seen: list[dict[str, float]] = []

    class Logger(DummyLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            seen.append(metrics)

    whole = TwoParts()
    fit = trainer(tmp_path, *callbacks(), each_step(tmp_path), logger=Logger(), log_every_n_steps=1)
    fit.fit(whole, images())
    names = {name for each in seen for name in each}
    assert {f"stochastic_depth/skipped/{part}" for part in ("net", "other")} <= names
    second = TwoParts()
    trainer(tmp_path / "second", *callbacks()).fit(second, images(), ckpt_path=tmp_path / "6.ckpt")
    assert_equal(second.state_dict(), whole.state_dict())
    third = TwoParts()
    trainer(tmp_path, *callbacks()).test(third, images(), ckpt_path=tmp_path / "12.ckpt")
    assert_equal(third.state_dict(), whole.state_dict())


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_module_that_holds_the_network_twice(tmp_path: Path, weights_only: bool) -> None:
    """A teacher, say: a copy with the same names."""

    class WithTeacher(Net):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = network()

    module = WithTeacher()
    saving = each_step(tmp_path, save_weights_only=weights_only)
    trainer(tmp_path, callback(), saving).fit(module, images())
    loaded = WithTeacher()
    trainer(tmp_path, callback()).test(loaded, images(), ckpt_path=tmp_path / "12.ckpt")
    assert_equal(loaded.state_dict(), module.state_dict())
    assert_equal(loaded.teacher.state_dict(), network().state_dict())


def test_parameters_that_the_optimizer_gets_later(tmp_path: Path) -> None:
    """As Lightning's BaseFinetuning adds them."""

    class Late(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.extra = nn.Parameter(torch.zeros(1))
            return torch.optim.SGD([self.extra], lr=self.lr, momentum=0.9)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.optimizers[0].add_param_group({"params": self.net.parameters()})

        def training_step(self, images: list[Tensor], index: int) -> Tensor:
            return super().training_step(images, index) + self.extra.sum()

    ours = callback(fold=False)
    trainer(tmp_path, ours).fit(Late(), images())
    assert ours.depth.state_dict()["step"] == STEPS


def test_of_several_optimizers_that_of_the_blocks_counts(tmp_path: Path) -> None:
    """Of a GAN the module's forward is the generator's; the discriminator steps twice as often."""

    class Gan(Net):
        def __init__(self) -> None:
            super().__init__()
            self.critic, self.automatic_optimization = nn.Linear(3, 1), False

        def configure_optimizers(self) -> Any:
            made = super().configure_optimizers()
            return [torch.optim.SGD(self.critic.parameters(), lr=self.lr), made]

        def training_step(self, images: list[Tensor], index: int) -> Any:
            optimizers: Any = self.optimizers()
            critic, made = optimizers
            for _ in range(2):
                critic.zero_grad()
                self.critic(images[0].mean((2, 3))).mean().backward()
                critic.step()
            made.zero_grad()
            self(images[0]).square().mean().backward()
            made.step()

    ours = callback(module=None, fold=False)
    trainer(tmp_path, ours, max_steps=-1, max_epochs=1).fit(Gan(), images())
    assert ours.depth.state_dict()["step"] == EPOCH


def test_what_is_saved_behind_a_fit_goes_on_unfolded(tmp_path: Path) -> None:
    fit = trainer(tmp_path, callback(), max_steps=6)
    module = Net()
    fit.fit(module, images())
    fit.save_checkpoint(tmp_path / "end.ckpt")
    tested = Net()
    trainer(tmp_path, callback()).test(tested, images(), ckpt_path=tmp_path / "end.ckpt")
    assert_equal(tested.state_dict(), module.state_dict())  # folded once
    second = Net()
    trainer(tmp_path, callback()).fit(second, images(), ckpt_path=tmp_path / "end.ckpt")
    _, depth, drawn = by_hand()
    assert module.drawn + second.drawn == drawn
    # A factor in and out again is a rounding of the weights.
    torch.testing.assert_close(second.net.state_dict(), depth.folded_state_dict())


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    ours = callback(fold=False)
    trainer(tmp_path, ours, max_steps=3, accumulate_grad_batches=2).fit(Net(), images())
    assert ours.depth.state_dict()["step"] == 3


def test_in_half_a_precision(tmp_path: Path) -> None:
    module = Net()
    trainer(tmp_path, callback(), precision="bf16-mixed").fit(module, images())
    assert module.drawn == by_hand()[2]


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:torch.compile.model. meets")
def test_a_compiled_module_trains(tmp_path: Path) -> None:
    module = Net()
    compiled: Any = torch.compile(module, backend="eager")
    trainer(tmp_path, callback()).fit(compiled, images())
    assert module.drawn == by_hand()[2]
    assert type(module.net) is type(network())


def test_an_average_of_the_weights_is_folded(tmp_path: Path) -> None:
    module = Net()
    trainer(tmp_path, callback(), EMAWeightAveraging(decay=0.5)).fit(module, images(), images())
    assert module.drawn == by_hand()[2]
    assert type(module.net) is type(network())
    twin, kept = Net(), callback(fold=False)
    trainer(tmp_path, kept, EMAWeightAveraging(decay=0.5)).fit(twin, images(), images())
    assert_equal(module.net.state_dict(), kept.depth.folded_state_dict())


def test_stochastic_weight_averaging(tmp_path: Path) -> None:
    module = Net()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer(tmp_path, callback(), swa, max_steps=-1, max_epochs=3).fit(module, images())
    assert type(module.net) is type(network())
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_the_steps_of_a_search_for_a_learning_rate_are_undone(tmp_path: Path) -> None:
    module, ours = Net(), callback()
    fit = trainer(tmp_path, ours)
    Tuner(fit).lr_find(module, images(), num_training=5, update_attr=False)
    module.drawn.clear()
    fit.fit(module, images())
    assert module.drawn == by_hand()[2]


def test_the_lightning_module_itself_by_its_own_example(tmp_path: Path) -> None:
    module = Net()
    module.example_input_array = example()
    trainer(tmp_path, StochasticDepth(0.5, schedule=WARMUP)).fit(module, images())
    assert [list(gates.values()) for gates in module.drawn]


def test_a_part_by_the_example_of_the_module(tmp_path: Path) -> None:
    module = Net()
    module.example_input_array = example()
    trainer(tmp_path, callback(example_inputs=None)).fit(module, images())
    assert module.drawn == by_hand()[2]


class WithoutForward(Net):
    forward = LightningModule.forward


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(sd.OptionError, match=r"has no forward of its own.*module=.*: net"):
        trainer(tmp_path, callback(module=None)).fit(WithoutForward(), images())
    with pytest.raises(sd.OptionError, match='module="backbone", and Net has no such part'):
        trainer(tmp_path, callback(module="backbone")).fit(Net(), images())
    with pytest.raises(sd.OptionError, match="is on no model"):
        _ = callback().depth
    with pytest.raises(sd.ExampleInputsError):
        trainer(tmp_path, callback(example_inputs=None)).fit(Net(), images())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_on_two_processes(tmp_path: Path, strategy: str) -> None:
    """Each process writes what it drew and what came out of it."""
    script = Path(__file__).parent / "lightning_cases.py"
    command = [sys.executable, str(script), strategy, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["drawn"] == second["drawn"] == by_hand()[2]
    assert_equal(first["weights"], second["weights"])
    assert first["class"] == ("ResNet" if strategy == "ddp" else "FSDPResNet")
    assert not first["gated"]


def test_importing_the_package_loads_no_trainer() -> None:
    code = (
        "import sys, stochastic_depth; "
        "assert not {'lightning', 'transformers', 'accelerate'} & sys.modules.keys()"
    )
    with warnings.catch_warnings():
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_fit_that_broke_off_begins_anew_with_another_callback(tmp_path: Path) -> None:
    """As in a notebook whose cell is run again."""

    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
            raise RuntimeError("broken")

    module = Net()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, callback(), Breaks()).fit(module, images())
    ours = callback()
    trainer(tmp_path, ours, max_steps=3).fit(module, images())
    assert ours._finished is not None
    assert ours._finished.state["step"] == 3
