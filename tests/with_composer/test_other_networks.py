"""Promise: it works on a transformers BERT and a timm ViT as on a ResNet."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from composer.models import ComposerClassifier, HuggingFaceModel
from torch.utils.data import DataLoader

import stochastic_depth as sd
from stochastic_depth.integrations.composer import StochasticDepth, apply_stochastic_depth
from with_composer.training import Watch, drawn, loader, trainer

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def plain_bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))


def bert() -> HuggingFaceModel:
    return HuggingFaceModel(plain_bert())


def sentences() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 100, (16, 12), generator=generator)
    mask = (torch.arange(12) < torch.randint(6, 13, (16, 1), generator=generator)).long()
    labels = torch.randint(3, (16,), generator=generator)
    rows = [
        {"input_ids": t, "attention_mask": m, "labels": label}
        for t, m, label in zip(tokens, mask, labels, strict=True)
    ]
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [None, "BertLayer", "bert.encoder.layer.*", "model.bert.*"])
def test_bert(target: str | None) -> None:
    model = bert()
    plain = plain_bert()
    algorithm = StochasticDepth(target, drop_rate=0.5)
    watch = Watch(algorithm)
    made = trainer(algorithm, model=model, callbacks=watch, train_dataloader=sentences())
    made.fit()
    names = [f"bert.encoder.layer.{i}" for i in range(6)]
    assert [block.name for block in algorithm.depth.blocks] == names
    batch = next(iter(sentences()))
    assert watch.gates == drawn(plain_bert(), batch, 8)
    plain.load_state_dict(algorithm.depth.folded_state_dict())
    with torch.no_grad():
        expected = plain.eval()(**batch).logits
        torch.testing.assert_close(model.eval()(batch).logits, expected)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_samples(kind: str) -> None:
    model: Any = bert() if kind == "bert" else vit()
    batches = sentences() if kind == "bert" else loader()
    example = None if kind == "bert" else next(iter(batches))[0]
    algorithm = StochasticDepth(None, "sample", 0.5, example_inputs=example)
    watch = Watch(algorithm)
    trainer(algorithm, model=model, callbacks=watch, train_dataloader=batches).fit()
    rows = [kept for gates in watch.gates for kept in gates.values()]
    assert any(0 < len(kept) < 4 for kept in rows)
    expected = 4 * (1 - 0.5 * 7 / 12)  # the rates of six blocks are 7 / 12 of the last's
    assert sum(map(len, rows)) / len(rows) == pytest.approx(expected, abs=0.5)
    gated = model.eval()
    batch = next(iter(batches))
    with torch.no_grad():
        before = gated(batch)
        algorithm.depth.fold()
        after = gated(batch)
    if kind == "bert":
        before, after = before.logits, after.logits
    torch.testing.assert_close(before, after)


def test_a_dropped_layer_of_bert_has_no_gradient() -> None:
    model = bert()
    algorithm = StochasticDepth(drop_rate=0.5)
    trainer(algorithm, model=model, train_dataloader=sentences())
    batch = next(iter(sentences()))
    with algorithm.depth.fixed({"bert.encoder.layer.2": False}):
        model.train()(batch).loss.backward()
    for name, parameter in model.named_parameters():
        # The norms behind the sums are no part of the branches: they run all the same.
        dropped = name.startswith("model.bert.encoder.layer.2.") and "LayerNorm" not in name
        assert (parameter.grad is None) == dropped, name


def vit() -> ComposerClassifier:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, depth=6)
    return ComposerClassifier(network, num_classes=4)


@pytest.mark.parametrize("target", [None, "Block", "blocks.*"])
def test_vit(target: str | None) -> None:
    model = vit()
    x = next(iter(loader()))[0]
    algorithm = StochasticDepth(target, drop_rate=0.5, example_inputs=x[:2])
    watch = Watch(algorithm)
    trainer(algorithm, model=model, callbacks=watch).fit()
    assert [block.name for block in algorithm.depth.blocks] == [f"blocks.{i}" for i in range(6)]
    assert watch.gates == drawn(vit().module, x[:2], 8)
    plain = vit().module
    plain.load_state_dict(algorithm.depth.folded_state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.module.eval()(x), plain.eval()(x))


def test_a_vit_brings_its_own_example() -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=6)
    algorithm = StochasticDepth(drop_rate=0.5)
    trainer(algorithm, model=ComposerClassifier(network, num_classes=4))
    assert algorithm.num_stochastic_layers == 6


def test_a_network_of_nothing_known_asks_for_an_example() -> None:
    model = ComposerClassifier(torch.nn.Linear(4, 4), num_classes=4)
    with pytest.raises(sd.ExampleInputsError, match="example_inputs"):
        apply_stochastic_depth(model)


def test_no_residual_block() -> None:
    model = ComposerClassifier(torch.nn.Linear(4, 4), num_classes=4)
    with pytest.raises(sd.NoResidualBlocksError):
        trainer(StochasticDepth(example_inputs=torch.randn(2, 4)), model=model)
