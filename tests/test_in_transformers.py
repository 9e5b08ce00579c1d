"""Promise: in transformers' Trainer a callback is all; checkpoints and the model come out right."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import stochastic_depth as sd
from networks import assert_equal
from stochastic_depth.integrations.transformers import StochasticDepthCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:::transformers"),
    pytest.mark.filterwarnings("ignore:::accelerate"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*dropout is active"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
]
STEPS = 8
WARMUP = sd.linear_warmup(10)
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_positions=16, n_embd=16, n_layer=6, n_head=2,
            bos_token_id=0, eos_token_id=0, pad_token_id=0, **NO_DROPOUT,
        )
    )  # fmt: skip


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=6, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16, pad_token_id=0,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32,
            image_size=16, patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def texts(labels: bool) -> list[dict[str, Tensor]]:
    """Sequences of which the later part is padding, of several lengths."""
    torch.manual_seed(1)
    found = []
    for n in range(32):
        tokens, mask = torch.randint(1, 64, (12,)), torch.ones(12, dtype=torch.long)
        mask[12 - n % 4 :] = 0
        tokens = tokens * mask
        target = tokens.masked_fill(mask == 0, -100) if not labels else torch.tensor(n % 2)
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": target})
    return found


def pictures() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [
        {"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(n % 2)} for n in range(32)
    ]


MODELS: dict[str, tuple[Any, Any]] = {
    "gpt2": (gpt2, lambda: texts(labels=False)),
    "bert": (bert, lambda: texts(labels=True)),
    "vit": (vit, pictures),
}


class Notes(TrainerCallback):
    """What each step drew."""

    def __init__(self) -> None:
        self.drawn: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.drawn.append(sd.get_stochastic_depth(kwargs["model"]).last_gates)


def trainer(
    folder: Path, model: nn.Module, data: Any, *callbacks: TrainerCallback, **options: Any
) -> Trainer:
    init, evaluated = options.pop("model_init", None), options.pop("eval_data", None)
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
        **options,
    }
    args = TrainingArguments(str(folder), **arguments)
    model_or_init: dict[str, Any] = {"model": model} if init is None else {"model_init": init}
    return Trainer(
        args=args,
        train_dataset=data,
        eval_dataset=evaluated,
        callbacks=list(callbacks),
        **model_or_init,
    )


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)


def ours(**options: Any) -> StochasticDepthCallback:
    return StochasticDepthCallback(0.5, **{"schedule": WARMUP, **options})


def own(folder: Path, name: str, **options: Any) -> tuple[nn.Module, sd.StochasticDepth, list[Any]]:
    """The same training with apply and follow around the Trainer."""
    make, data = MODELS[name]
    model, notes = make(), Notes()
    example = {k: torch.stack([row[k] for row in data()[:4]]) for k in data()[0]}
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=example, schedule=WARMUP)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    depth.follow(optimizer)
    runner = trainer(folder, model, data(), notes, **options)
    runner.optimizer = optimizer
    runner.train()
    return model, depth, notes.drawn


@pytest.mark.parametrize("name", MODELS)
def test_train_gives_the_plain_model_back_and_what_it_saves_is_plain(
    tmp_path: Path, name: str
) -> None:
    make, data = MODELS[name]
    model, notes, callback = make(), Notes(), ours()
    runner = trainer(tmp_path / "ours", model, data(), notes, callback)
    runner.train()
    assert len(notes.drawn) == STEPS
    assert not all(all(g.values()) for g in notes.drawn)
    assert type(model) is type(make())
    with pytest.raises(sd.SelectionError):
        sd.get_stochastic_depth(model)
    runner.save_model(str(tmp_path / "saved"))
    model.save_pretrained(tmp_path / "pretrained")
    row = {k: v[None] for k, v in data()[0].items()}
    for folder in ("saved", "pretrained"):
        # Weights lie in a file where they do, and some kernels round by that: in memory of its own.
        again = copy.deepcopy(type(model).from_pretrained(tmp_path / folder)).eval()
        assert_equal(again(**row).logits, model.eval()(**row).logits)
    assert runner.evaluate(data()[:4])["eval_loss"] > 0


def test_it_trains_as_apply_and_follow_do(tmp_path: Path) -> None:
    model, notes = gpt2(), Notes()
    options: dict[str, Any] = {"optim": "adamw_torch", "lr_scheduler_type": "constant"}
    data = texts(labels=False)
    trainer(tmp_path / "a", model, data, notes, ours(), **options, weight_decay=0.0).train()
    _, depth, drawn = own(tmp_path / "b", "gpt2", **options)
    assert notes.drawn == drawn
    assert_equal(model.state_dict(), depth.folded_state_dict())


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_resumed_training_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    make, data = MODELS[name]
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole, notes = make(), Notes()
    trainer(tmp_path, whole, data(), ours(), notes, **saving).train()
    second, rest = make(), Notes()
    runner = trainer(tmp_path, second, data(), ours(), rest, **saving)
    runner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert rest.drawn == notes.drawn[3:]
    assert_equal(second.state_dict(), whole.state_dict())


def test_two_lines_without_the_callback_resume_by_the_optimizer(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole, depth, drawn = own(tmp_path, "gpt2", **saving)
    model, notes = gpt2(), Notes()
    example = {k: torch.stack([row[k] for row in texts(labels=False)[:4]]) for k in texts(False)[0]}
    again = sd.apply_stochastic_depth(model, 0.5, example_inputs=example, schedule=WARMUP)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    again.follow(optimizer)
    runner = trainer(tmp_path, model, texts(labels=False), notes, **saving)
    runner.optimizer = optimizer
    runner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert notes.drawn == drawn[3:]
    assert_equal(model.state_dict(), whole.state_dict())
    del depth


def saved_optimizer(folder: Path) -> Any:
    return torch.load(folder / "optimizer.pt", weights_only=True)


def test_a_checkpoint_in_between_is_folded_without_a_model(tmp_path: Path) -> None:
    data = texts(labels=True)
    trainer(tmp_path, bert(), data, ours(), save_strategy="steps", save_steps=3).train()
    folder = tmp_path / "checkpoint-3"
    weights, optimizer = load_file(folder / "model.safetensors"), saved_optimizer(folder)
    plain = sd.fold_state_dict(weights, optimizer)
    factors = dict(optimizer["stochastic_depth"]["fold"])
    assert factors
    for key, value in weights.items():
        assert_equal(plain[key], value * factors[key] if key in factors else value)


def test_a_checkpoint_whose_names_were_converted_is_folded_by_way_of_the_model(
    tmp_path: Path,
) -> None:
    """transformers saves a ViT under the names that it had in earlier releases."""
    trainer(tmp_path, vit(), pictures(), ours(), save_strategy="steps", save_steps=3).train()
    folder = tmp_path / "checkpoint-3"
    with pytest.raises(sd.StateMismatchError, match="names that were converted"):
        sd.fold_state_dict(load_file(folder / "model.safetensors"), saved_optimizer(folder))
    model = ViTForImageClassification.from_pretrained(folder)
    folded = sd.fold_state_dict(model.state_dict(), saved_optimizer(folder))
    factors = dict(saved_optimizer(folder)["stochastic_depth"]["fold"])
    for key, value in model.state_dict().items():
        assert_equal(folded[key], value * factors[key] if key in factors else value)
    assert len(factors) == 24  # of 6 layers the weights and biases of 2 branches


def test_the_best_model_is_folded_by_the_rates_of_its_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
        "greater_is_better": True, "learning_rate": 0.05,
    }  # fmt: skip
    model, data = bert(), texts(labels=True)
    runner = trainer(tmp_path, model, data, ours(), eval_data=data[:8], **options)
    runner.train()
    folder = Path(str(runner.state.best_model_checkpoint))
    weights, optimizer = load_file(folder / "model.safetensors"), saved_optimizer(folder)
    assert optimizer["stochastic_depth"]["step"] < STEPS
    assert_equal(model.state_dict(), sd.fold_state_dict(weights, optimizer))


def test_metrics_reach_all_loggers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runner = trainer(tmp_path, vit(), pictures(), ours(), report_to=["tensorboard"])
    runner.train()
    events = next(tmp_path.rglob("events.out*"))
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    for name in ("drop_rate", "blocks_run", "skipped"):
        assert f"train/stochastic_depth/{name}" in accumulator.Tags()["scalars"]
    assert "stochastic_depth/skipped" in runner.state.log_history[0]


def test_in_half_a_precision(tmp_path: Path) -> None:
    found = []
    for bf16 in (False, True):
        model, notes = gpt2(), Notes()
        trainer(tmp_path, model, texts(labels=False), ours(), notes, bf16=bf16).train()
        found.append(notes.drawn)
    assert found[0] == found[1]


def test_layers_are_skipped_for_real(tmp_path: Path) -> None:
    """The Trainer turns the cache off behind our backs: the layers are watched without it."""
    model, notes = gpt2(), Notes()
    calls: list[int] = []
    layers: Any = model.transformer.h
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *rest: calls.append(1))
    runner = trainer(tmp_path, model, texts(labels=False), ours(), notes)
    calls.clear()  # of the watch
    runner.train()
    assert len(calls) == sum(sum(gates.values()) for gates in notes.drawn) < 6 * STEPS


def test_a_checkpoint_of_a_plain_training_is_resumed_with_a_warning(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, gpt2(), texts(labels=False), **saving).train()
    runner = trainer(tmp_path, gpt2(), texts(labels=False), ours(), **saving)
    with pytest.warns(sd.StochasticDepthWarning, match="holds no state of stochastic depth"):
        runner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_second_attempt_begins_anew(tmp_path: Path) -> None:
    """As with `auto_find_batch_size`."""

    class Fails(TrainerCallback):
        times = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.times += 1
            if self.times == 3:
                raise RuntimeError("CUDA out of memory.")

    callback = ours(fold=False)
    trainer(
        tmp_path, gpt2(), texts(labels=False), callback, Fails(), auto_find_batch_size=True
    ).train()
    assert callback.depth.state_dict()["step"] == STEPS


def test_accumulation_and_checkpoints_of_activations(tmp_path: Path) -> None:
    """The same draws and weights with activations kept and recomputed."""
    found = []
    for checkpointing in (False, True):
        model, notes = gpt2(), Notes()
        trainer(
            tmp_path, model, texts(labels=False), ours(), notes, gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing, max_steps=4,
        ).train()  # fmt: skip
        found.append((notes.drawn, model.state_dict()))
    assert found[0][0] == found[1][0]
    assert_equal(found[1][1], found[0][1])


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_blocks_are_compiled_one_by_one(tmp_path: Path) -> None:
    model, notes, callback = vit(), Notes(), ours()
    trainer(
        tmp_path, model, pictures(), callback, notes, torch_compile=True,
        torch_compile_backend="eager",
    ).train()  # fmt: skip
    plain, eager = vit(), Notes()
    trainer(tmp_path, plain, pictures(), ours(), eager).train()
    assert notes.drawn == eager.drawn
    assert_equal(model.state_dict(), plain.state_dict())


def test_a_model_that_is_made_by_model_init(tmp_path: Path) -> None:
    notes = Notes()
    runner = trainer(
        tmp_path, vit(), pictures(), ours(), notes, model_init=lambda trial=None: vit()
    )
    runner.train()
    assert len(notes.drawn) == STEPS
    assert type(runner.model) is ViTForImageClassification


def test_generating_in_an_evaluation_works(tmp_path: Path) -> None:
    class Generates(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"].eval()
            tokens = torch.tensor([[1, 2, 3]])
            found = model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=True)
            again = model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False)
            assert_equal(found, again)
            model.train()

    trainer(tmp_path, gpt2(), texts(labels=False), ours(), Generates()).train()


def test_a_second_train_goes_on(tmp_path: Path) -> None:
    model, callback = vit(), ours()
    runner = trainer(tmp_path, model, pictures(), callback)
    runner.train()
    runner.train()
    assert callback._finished is not None
    assert callback._finished.state["step"] == 2 * STEPS
    assert type(model) is ViTForImageClassification


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(sd.OptionError, match="restore_callback_states_from_checkpoint"):
        trainer(tmp_path, vit(), pictures(), ours(), restore_callback_states_from_checkpoint=True)
    with pytest.raises(sd.OptionError, match="is on no model"):
        _ = ours().depth


def test_adapters_of_peft_keep_the_scale_in_training(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = peft.get_peft_model(gpt2(), lora)
    notes = Notes()
    data = texts(labels=False)
    trainer(tmp_path, model, data, ours(), notes).train()
    assert len(notes.drawn) == STEPS
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "adapter").eval()
    row = {k: v[None] for k, v in data[0].items()}
    assert_equal(again(**row).logits, model.eval()(**row).logits)
    with pytest.raises(sd.OptionError, match="PEFT"):
        trainer(tmp_path, peft.get_peft_model(gpt2(), lora), data, ours(scale="eval"))


def test_on_two_processes(tmp_path: Path) -> None:
    script = Path(__file__).parent / "transformers_cases.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first["drawn"]) == STEPS
    assert first["class"] == "ViTForImageClassification"


def test_in_trls_trainer_for_fine_tuning(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [
        {k: v.tolist() for k, v in row.items() if k == "input_ids"} for row in texts(labels=False)
    ]
    config = trl.SFTConfig(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="steps", save_steps=3, disable_tqdm=True, bf16=False, loss_type="nll",
        gradient_checkpointing=True, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip

    def run(checkpoint: str | None) -> tuple[nn.Module, list[Any]]:
        model, notes = gpt2(), Notes()
        trl.SFTTrainer(
            model, config, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(), callbacks=[ours(), notes],
        ).train(resume_from_checkpoint=checkpoint)  # fmt: skip
        return model, notes.drawn

    whole, drawn = run(None)
    second, rest = run(str(tmp_path / "checkpoint-3"))
    assert rest == drawn[3:]
    assert_equal(second.state_dict(), whole.state_dict())
    assert type(whole) is GPT2LMHeadModel


def tokenizer() -> Any:
    """One that needs no download."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(n): n for n in range(64)}, unk_token="0"))
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=words, pad_token="0", eos_token="1")


def test_a_second_trainer_of_one_model(tmp_path: Path) -> None:
    """The first one was broken off, or never trained."""
    model = gpt2()
    trainer(tmp_path, model, texts(labels=False), ours())
    callback = ours(fold=False)
    trainer(tmp_path, model, texts(labels=False), callback).train()
    assert callback.depth.state_dict()["step"] == STEPS
