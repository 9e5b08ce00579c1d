"""Small models of transformers' types, from configurations."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from coveragelib.predictable import RATE

# What a configuration calls its sizes, and how small they are made. Heads of 8, several layers.
_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "dim": 32,
    "emb_dim": 32,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "num_decoder_layers": 4,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "d_ff": 64,
    "n_inner": 64,
    "hidden_dim": 64,
    "ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "image_size": 64,
    "patch_size": 16,
    "num_labels": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}

_SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
_CONV = {"hidden_sizes": [16, 24], "depths": [2, 2], "patch_size": 4, "num_stages": 2}
_SPEECH = {
    "num_hidden_layers": 4,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}
_TWO_TOWERS = {
    "text_config": {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 64,
        "patch_size": 16,
    },
}
_ENCODERS = """
    bert roberta albert deberta deberta-v2 distilbert electra ernie mpnet xlm-roberta camembert
    roformer nystromformer squeezebert fnet xlnet longformer big_bird modernbert esm convbert
    megatron-bert layoutlm
"""
_DECODERS = """
    gpt2 gpt_neox gpt_bigcode llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 opt bloom
    falcon mpt olmo olmo2 stablelm starcoder2 cohere granite persimmon xglm biogpt glm smollm3
    nemotron mixtral qwen2_moe qwen3_moe olmoe granitemoe phimoe jetmoe gpt_oss mamba falcon_mamba
    recurrent_gemma rwkv
"""
_ENCODER_DECODERS = """
    t5 mt5 bart mbart pegasus marian blenderbot m2m_100 led longt5 switch_transformers prophetnet
    umt5
"""
_VISION = """
    vit deit beit dinov2 poolformer regnet mobilevit focalnet vit_mae ijepa clip_vision_model
    siglip_vision_model
"""
TYPES: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in (_ENCODERS + _DECODERS + _ENCODER_DECODERS + _VISION).split()},
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm", "unispeech", "sew"), _SPEECH),
    "data2vec-audio": {**_SPEECH, "num_conv_pos_embeddings": 2},
    **dict.fromkeys(("swin", "swinv2"), _SWIN),
    "resnet": {"hidden_sizes": [16, 32], "depths": [2, 2], "embedding_size": 16},
    **dict.fromkeys(("convnext", "convnextv2"), _CONV),
    **dict.fromkeys(("clip", "siglip"), _TWO_TOWERS),
    **{kind: {"router_jitter_noise": 0.0} for kind in ("phimoe", "switch_transformers")},
    **{kind: {"use_cache": False} for kind in ("rwkv", "mamba", "falcon_mamba", "bloom")},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "whisper": {"num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 32},
    "speech_to_text": {"input_feat_per_channel": 8, "conv_channels": 16},
    "segformer": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]},
    "pvt": {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 16, 32],
        "num_attention_heads": [1, 2, 2, 4],
        "image_size": 64,
    },
    "deepseek_v3": {
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
}


def small(kind: str, **options: Any) -> nn.Module:
    """A model of this type (as `AutoModel` knows it), small and with random weights."""
    from transformers import AutoConfig, AutoModel

    defaults = AutoConfig.for_model(kind)
    known = inspect.signature(type(defaults).__init__).parameters
    sizes = {
        name: value
        for name, value in _SIZES.items()
        if name in known and not isinstance(getattr(defaults, name, None), list | tuple)
    }
    dropouts = {
        name: RATE if "dropout" in name else 0.0  # no layerdrop, no drop path
        for name in known
        if re.search(r"drop", name) and isinstance(getattr(defaults, name, None), float)
    }
    config = AutoConfig.for_model(kind, **{**sizes, **dropouts, **options})
    torch.manual_seed(0)
    make: Any = AutoModel.from_config
    model: nn.Module = make(config)
    return model.eval()


def example(model: Any, *, batch: int = 2) -> dict[str, Tensor]:
    """Arguments for it, by name."""
    torch.manual_seed(1)
    config, name = model.config, model.main_input_name
    tokens = torch.randint(3, 90, (batch, 9))
    if name == "input_ids" and not hasattr(config, "vision_config"):
        given = {name: tokens}
    elif name == "input_values":
        given = {name: torch.randn(batch, 1600)}
    elif name == "input_features":
        bins = getattr(config, "num_mel_bins", 0)
        shape = (bins, 100) if bins else (100, config.input_feat_per_channel)
        given = {name: torch.randn(batch, *shape)}
    else:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 64)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        images = torch.randn(batch, getattr(vision, "num_channels", 3), *sides)
        given = {"pixel_values": images}
        if hasattr(config, "text_config"):
            given["input_ids"] = tokens
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = torch.randint(3, 90, (batch, 7))
    return given
