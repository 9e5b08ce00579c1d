"""Promise: a training that is resumed goes on to the same weights, optimizer and draws."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.algorithms import EMA, LabelSmoothing
from composer.algorithms import StochasticDepth as ComposersOwn
from composer.models import ComposerClassifier
from composer.optim import DecoupledAdamW, DecoupledSGDW
from torch import nn

import stochastic_depth as sd
from stochastic_depth.integrations.composer import StochasticDepth
from with_composer.training import CLASSES, Watch, loader, network, trainer

Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizers] = {
    "SGD": lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9, dampening=0.1, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9),
    "DecoupledSGDW": lambda p: DecoupledSGDW(p, 1e-4, momentum=0.9, weight_decay=1e-5),
    "DecoupledAdamW": lambda p: DecoupledAdamW(p, 1e-3, weight_decay=1e-5),
}


def make(
    folder: Path,
    optimizer: str = "SGD",
    *,
    method: str = "block",
    rate: float = 0.5,
    warmup: str = "0.5dur",
    before: tuple[Any, ...] = (),
    behind: tuple[Any, ...] = (),
    **options: Any,
) -> tuple[Trainer, StochasticDepth, Watch]:
    model = ComposerClassifier(network(), num_classes=CLASSES)
    algorithm = StochasticDepth("ResNetBottleneck", method, rate, drop_warmup=warmup)
    watch = Watch(algorithm)
    made = trainer(
        *before,
        algorithm,
        *behind,
        model=model,
        optimizer=OPTIMIZERS[optimizer](model.parameters()),
        callbacks=watch,
        train_dataloader=loader(shuffle=True),
        save_folder=str(folder),
        save_filename="ba{batch}.pt",
        save_interval="1ba",
        save_overwrite=True,
        **options,
    )
    return made, algorithm, watch


def assert_same(one: Trainer, other: Trainer) -> None:
    torch.testing.assert_close(
        one.state.model.state_dict(), other.state.model.state_dict(), rtol=0, atol=0
    )
    states = [t.state.optimizers[0].state_dict() for t in (one, other)]
    torch.testing.assert_close(*[without_empty(s["state"]) for s in states], rtol=0, atol=0)
    assert states[0]["param_groups"] == states[1]["param_groups"]


def without_empty(state: dict[int, Any]) -> dict[int, Any]:
    return {number: entry for number, entry in state.items() if entry}


@pytest.mark.parametrize(
    (
        "optimizer",
        "method",
        "at",
    ),  # within the warmup, shortly before its end, after it; an epoch has four
    [
        *(("SGD", method, at) for method in ("block", "sample") for at in (1, 3, 6)),
        *((optimizer, "block", 1) for optimizer in list(OPTIMIZERS)[1:]),
    ],
)
def test_mid_epoch(tmp_path: Path, optimizer: str, method: str, at: int) -> None:
    # Without a seed, so that the one of the checkpoint has to be taken over.
    whole, one, drawn = make(tmp_path / "whole", optimizer, method=method, seed=None)
    whole.fit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed, other, continued = make(
            tmp_path / "resumed",
            optimizer,
            method=method,
            seed=None,
            load_path=str(tmp_path / "whole" / f"ba{at}.pt"),
        )
        resumed.fit()
    assert [type(algorithm) for algorithm in resumed.state.algorithms] == [StochasticDepth]
    assert continued.gates == drawn.gates[at:]
    assert continued.rates == drawn.rates[at:]
    assert one.depth.state_dict() == other.depth.state_dict()
    assert_same(whole, resumed)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_where_a_block_has_not_run_yet(tmp_path: Path, optimizer: str) -> None:
    whole, _, drawn = make(tmp_path / "whole", optimizer, rate=0.9, warmup="0ba")
    whole.fit()
    assert not all(drawn.gates[0].values())
    saved = torch.load(tmp_path / "whole" / "ba1.pt", weights_only=False)
    (states,) = saved["state"]["optimizers"].values()
    idle = [name for name, state in states["state"].items() if not state]
    assert idle
    resumed, _, continued = make(
        tmp_path / "resumed",
        optimizer,
        rate=0.9,
        warmup="0ba",
        load_path=str(tmp_path / "whole" / "ba1.pt"),
    )
    parameters = dict(resumed.state.model.named_parameters())
    assert all(not resumed.state.optimizers[0].state[parameters[name]] for name in idle)
    resumed.fit()
    assert continued.gates == drawn.gates[1:]
    assert_same(whole, resumed)


def test_theirs_cannot_be_resumed_there(tmp_path: Path) -> None:
    """Why `note_idle_parameters` is there."""

    def composers(**options: Any) -> Trainer:
        algorithm = ComposersOwn("ResNetBottleneck", drop_rate=0.9)
        return trainer(algorithm, max_duration="1ba", **options)

    composers(save_folder=str(tmp_path), save_filename="a.pt").fit()
    with pytest.raises(KeyError, match=r"layer\d"):
        composers(load_path=str(tmp_path / "a.pt"))


@pytest.mark.parametrize("place", ["before", "behind"])
def test_beside_an_average_of_the_weights(tmp_path: Path, place: str) -> None:
    def run(folder: str, **options: Any) -> tuple[Trainer, Watch]:
        options[place] = (EMA(half_life="2ba"), LabelSmoothing(0.1))
        made, _, watch = make(tmp_path / folder, **options)
        made.fit()
        return made, watch

    whole, drawn = run("whole")
    resumed, continued = run("resumed", load_path=str(tmp_path / "whole" / "ba3.pt"))
    assert continued.gates == drawn.gates[3:]
    assert_same(whole, resumed)


def test_microbatches(tmp_path: Path) -> None:
    whole, _, drawn = make(tmp_path / "whole", device_train_microbatch_size=2)
    whole.fit()
    path = str(tmp_path / "whole" / "ba3.pt")
    resumed, _, continued = make(
        tmp_path / "resumed", device_train_microbatch_size=2, load_path=path
    )
    resumed.fit()
    assert continued.gates == drawn.gates[3:]
    assert_same(whole, resumed)


def test_a_checkpoint_that_is_only_evaluated_has_the_rate_of_its_time(tmp_path: Path) -> None:
    made, algorithm, _ = make(tmp_path, warmup="1.0dur")
    made.fit()
    for at, share in ((2, 0.25), (6, 0.75)):
        model = ComposerClassifier(network(), num_classes=CLASSES)
        twin = StochasticDepth("ResNetBottleneck", drop_rate=0.5, drop_warmup="1.0dur")
        options: dict[str, Any] = {"train_dataloader": None, "max_duration": None}
        trainer(twin, model=model, load_path=str(tmp_path / f"ba{at}.pt"), **options)
        assert twin.depth.blocks[-1].drop_rate == pytest.approx(0.5 * share)
    assert algorithm.depth.blocks[-1].drop_rate == 0.5


def test_another_rate_is_pointed_out(tmp_path: Path) -> None:
    make(tmp_path)[0].fit()
    with pytest.warns(UserWarning, match="is now specified in the following forms"):
        made, algorithm, _ = make(tmp_path / "b", rate=0.2, load_path=str(tmp_path / "ba3.pt"))
    made.fit()
    assert algorithm.depth.blocks[-1].drop_rate == pytest.approx(0.2)


def test_the_algorithm_is_pickled_and_copied() -> None:
    algorithm = StochasticDepth("ResNetBottleneck", drop_rate=0.5, drop_warmup="5ep")
    twin = copy.deepcopy(algorithm)
    assert repr(twin) == repr(algorithm)
    assert type(twin) is StochasticDepth


def test_weights_for_the_plain_network(tmp_path: Path) -> None:
    made, algorithm, _ = make(tmp_path)
    made.fit()
    plain = network()
    plain.load_state_dict(algorithm.depth.folded_state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), made.state.model.module.eval()(x))
    assert isinstance(sd.get_stochastic_depth(made.state.model), sd.StochasticDepth)
