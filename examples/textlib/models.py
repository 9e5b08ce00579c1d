"""Language models by name: gpt, transformers:TYPE. All small, new, and without dropout."""

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from imagelib import InputError
from textlib.gpt import GPT

LAYERS, WIDTH, HEADS = 8, 128, 4
MOST_PARAMETERS = 20_000_000  # above, a type did not take the small sizes: it calls them otherwise


def build_model(name: str, vocabulary: int, context: int) -> nn.Module:
    """Tokens (batch, context) -> scores (batch, context, vocabulary).

    Torch's global generator draws the weights.
    """
    source, _, model_type = name.rpartition(":")
    if name == "gpt":
        return GPT(vocabulary, context, LAYERS, WIDTH, HEADS)
    if source != "transformers":
        raise InputError(f"--model: {name!r} is neither gpt nor transformers:TYPE")
    model = _transformers(model_type, vocabulary, context)
    _check(name, model, vocabulary, context)
    return model


class ScoresOnly(nn.Module):
    """A model of transformers that takes tokens alone and returns scores alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def _transformers(model_type: str, vocabulary: int, context: int) -> nn.Module:
    try:
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise InputError("--model: transformers is not installed here") from error
    known = list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if model_type not in known:
        near = difflib.get_close_matches(model_type, known, n=3) or ["gpt2", "llama", "gpt_neox"]
        raise InputError(
            f"--model: transformers has no language model {model_type!r}; the nearest types are "
            f"{', '.join(near)}"
        )
    build: Any = modeling_auto.AutoModelForCausalLM  # which has no types
    try:
        config = _small_config(model_type, vocabulary, context)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in build.from_config(config).parameters())
        if size <= MOST_PARAMETERS:
            return ScoresOnly(build.from_config(config)).train()
    except Exception as error:  # every type has its own ways to fail on sizes
        raise _unusable(f"transformers:{model_type}", error) from error
    raise InputError(
        f"--model: transformers:{model_type} does not become small: {size:,} parameters"
    )


def _small_config(model_type: str, vocabulary: int, context: int) -> object:
    """The type's own configuration, in the names that most of them share."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=4 * WIDTH,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    for option, value in vars(config).items():
        if "drop" in option and isinstance(value, float):
            setattr(config, option, 0.0)
    return config


def _check(name: str, model: nn.Module, vocabulary: int, context: int) -> None:
    """That it returns scores, and that none depends on a token that comes later."""
    tokens = torch.arange(2 * context).view(2, context) % vocabulary
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % vocabulary
    try:
        with torch.no_grad():
            scores, otherwise = model.eval()(tokens), model(other)
    except Exception as error:  # whatever it needs beside tokens
        raise _unusable(name, error) from error
    finally:
        model.train()
    if not isinstance(scores, Tensor) or scores.shape != (2, context, vocabulary):
        raise InputError(f"--model: {name} does not return one score for each token")
    if not torch.allclose(scores[:, :-1], otherwise[:, :-1], atol=1e-5):
        raise InputError(f"--model: {name} looks at the tokens that it is to predict")


def _unusable(name: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(f"--model: {name} cannot be used: {reason}")
