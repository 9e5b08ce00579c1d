"""Promise: where no example is known, the first batch is watched, before its first forward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Callback, DataSpec, State
from composer.loggers import Logger
from composer.models import ComposerClassifier, ComposerModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

import stochastic_depth as sd
from stochastic_depth.integrations.composer import StochasticDepth
from with_composer.training import classifier, drawn, logged, trainer

Batch = dict[str, Tensor]


class Layer(nn.Module):
    """Reads only what the mask shows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, key_padding_mask=mask, need_weights=False)[0]


class Reader(ComposerModel):
    """Takes a dict with a mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(Layer() for _ in range(6))
        self.forwards = 0

    def forward(self, batch: Batch) -> Tensor:
        self.forwards += self.training
        x = self.embedding(batch["tokens"])
        for layer in self.layers:
            x = layer(x, batch["padding"])
        return self.head(x.mean(1))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch["labels"])

    def eval_forward(self, batch: Batch, outputs: Any = None) -> Tensor:
        return self(batch) if outputs is None else outputs


def texts() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 7, (16, 1), generator=generator)
    columns = {
        "tokens": torch.randint(20, (16, 6), generator=generator),
        "padding": torch.arange(6) >= lengths,
        "labels": torch.randint(3, (16,), generator=generator),
    }
    rows = [{key: column[i] for key, column in columns.items()} for i in range(16)]
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


def vectors() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 5, generator=generator)
    labels = torch.randint(3, (16,), generator=generator)
    return DataLoader(list(zip(x, labels, strict=True)), batch_size=4)  # type: ignore[arg-type]


class Gates(Callback):
    def __init__(self, algorithm: StochasticDepth) -> None:
        self.algorithm, self.seen = algorithm, list[dict[str, Any]]()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.seen.append(self.algorithm.depth.last_gates)


def train(
    model: nn.Module, batches: DataLoader[Any], example: Any = None, **options: Any
) -> tuple[Trainer, StochasticDepth, list[dict[str, Any]]]:
    method = options.pop("method", "block")
    algorithm = StochasticDepth(None, method, 0.5, example_inputs=example, drop_warmup="2ba")
    gates = Gates(algorithm)
    made = trainer(algorithm, model=model, train_dataloader=batches, callbacks=gates, **options)
    made.fit()
    return made, algorithm, gates.seen


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("kind", ["dict with a mask", "tuple"])
def test_it_is_as_if_the_batch_had_been_passed(
    kind: str, method: str, microbatch: int | None
) -> None:
    is_dict = kind == "dict with a mask"
    model, batches = (Reader, texts()) if is_dict else (classifier, vectors())
    batch = next(iter(batches))
    options: dict[str, Any] = {"method": method, "device_train_microbatch_size": microbatch}
    given, one, expected = train(model(), batches, batch if is_dict else batch[0], **options)
    watched, other, found = train(model(), batches, **options)
    names = [f"layers.{i}" if is_dict else str(i + 1) for i in range(6)]
    assert [block.name for block in other.depth.blocks] == names
    assert found == expected
    assert one.depth.state_dict() == other.depth.state_dict()
    states = [made.state.model.state_dict() for made in (given, watched)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_the_first_batch_is_drawn_for_too() -> None:
    _, _, found = train(classifier(), vectors())
    network, x = classifier().module, torch.randn(2, 5)
    assert found == drawn(network, x, 8, schedule=sd.linear_warmup(2))
    assert not all(all(gates.values()) for gates in found)


def test_a_dropped_layer_is_skipped_and_the_scale_is_folded() -> None:
    model = Reader()
    _, algorithm, _ = train(model, texts())
    batch = next(iter(texts()))
    plain: Any = copy.deepcopy(model)
    sd.get_stochastic_depth(plain).remove()
    for parameter in plain.layers[2].attention.out_proj.parameters():
        parameter.data.zero_()
    with torch.no_grad(), algorithm.depth.fixed({"layers.2": False}):
        torch.testing.assert_close(model.train()(batch), plain.train()(batch))
    folded = Reader()
    folded.load_state_dict(algorithm.depth.folded_state_dict())
    with torch.no_grad():
        torch.testing.assert_close(folded.eval()(batch), model.eval()(batch))


def test_a_model_that_is_evaluated_first_is_scaled() -> None:
    model = classifier()
    plain = copy.deepcopy(model)
    algorithm = StochasticDepth(drop_rate=0.5)
    made = trainer(algorithm, model=model, train_dataloader=None, max_duration=None)
    with pytest.raises(sd.OptionError, match="waits for the first batch"):
        _ = algorithm.depth
    made.eval(eval_dataloader=vectors())
    depth = sd.apply_stochastic_depth(plain.module, 0.5, example_inputs=torch.randn(2, 5))
    x = torch.randn(4, 5)
    with torch.no_grad():
        torch.testing.assert_close(model.module.eval()(x), plain.module.eval()(x))
    assert algorithm.depth.blocks == depth.blocks


@pytest.mark.parametrize("same", [True, False])
def test_a_second_trainer_begins_anew(same: bool) -> None:
    first, algorithm, _ = train(classifier(), vectors())
    model = first.state.model if same else classifier()
    second = trainer(algorithm, model=model, train_dataloader=vectors(), seed=8)
    second.fit()
    assert algorithm.depth is sd.get_stochastic_depth(model)
    assert algorithm.depth.state_dict()["step"] == 8
    assert algorithm.depth.state_dict()["seed"] == 8
    assert logged(second, "num_stochastic_layers") == [6]


def test_it_is_logged_once() -> None:
    made, _, _ = train(classifier(), vectors())
    assert logged(made, "num_stochastic_layers") == [6]
    assert len(logged(made, "drop_rate")) == 8


def test_resuming(tmp_path: Path) -> None:
    options = {"save_filename": "ba{batch}.pt", "save_interval": "1ba", "seed": None}
    whole, _, found = train(Reader(), texts(), save_folder=str(tmp_path / "a"), **options)
    path = str(tmp_path / "a" / "ba3.pt")
    resumed, _, continued = train(
        Reader(), texts(), save_folder=str(tmp_path / "b"), load_path=path, **options
    )
    assert continued == found[3:]
    states = [made.state.model.state_dict() for made in (whole, resumed)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


class Wrapped:
    """A batch that hides its tensors."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels = x, labels


class Hidden(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.network, self.forwards = classifier().module, 0

    def forward(self, batch: Wrapped) -> Tensor:
        self.forwards += self.training
        return self.network(batch.x)

    def loss(self, outputs: Tensor, batch: Wrapped) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch.labels)


def train_hidden(method: str) -> tuple[Trainer, StochasticDepth, Hidden]:
    model, batches = Hidden(), [Wrapped(x, labels) for x, labels in vectors()]
    algorithm = StochasticDepth(None, method, 0.5)
    data = DataSpec(
        batches,
        get_num_samples_in_batch=lambda batch: len(batch.x),
        split_batch=lambda batch, size: [batch],
    )
    options: dict[str, Any] = {"train_dataloader": data, "device_train_microbatch_size": 4}
    return trainer(algorithm, model=model, max_duration="4ba", **options), algorithm, model


def test_a_batch_that_hides_its_tensors_has_no_rows_to_take() -> None:
    made, _, model = train_hidden("sample")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(sd.ExampleInputsError, match="first batch, of type Wrapped") as caught:
        made.fit()
    assert "finds no tensor in it" in str(caught.value)
    assert model.forwards == 0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_batch_that_hides_its_tensors_can_be_watched() -> None:
    made, algorithm, _ = train_hidden("block")
    made.fit()
    assert [b.name for b in algorithm.depth.blocks] == [f"network.{i + 1}" for i in range(6)]
    assert not all(algorithm.depth.last_gates.values())


class Hinted(ComposerClassifier):
    """Cannot be called as the classifier that it is."""

    def forward(self, batch: Any) -> Tensor:
        return self.module(batch[0], hint=True)


def test_a_forward_that_fails_is_said_before_the_training() -> None:
    model = Hinted(classifier().module, num_classes=3)
    made = trainer(StochasticDepth(), model=model, train_dataloader=vectors())
    with pytest.raises(sd.ExampleInputsError, match="watched was the first batch") as caught:
        made.fit()
    assert "hint" in str(caught.value)


def test_a_network_that_is_not_called_is_said() -> None:
    class Idle(ComposerClassifier):
        def forward(self, batch: Any) -> Tensor:
            return torch.zeros(4, 3, requires_grad=True)

    model = Idle(classifier().module, num_classes=3)
    made = trainer(StochasticDepth(), model=model, train_dataloader=vectors())
    with pytest.raises(sd.ExampleInputsError, match="Idle does not call its Sequential"):
        made.fit()


def test_no_residual_block_is_said_before_the_training() -> None:
    model = ComposerClassifier(nn.Linear(5, 3), num_classes=3)
    made = trainer(StochasticDepth(), model=model, train_dataloader=vectors())
    with pytest.raises(sd.NoResidualBlocksError):
        made.fit()
