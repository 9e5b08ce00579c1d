"""Models of torchvision, timm and transformers, and those of the example, for the table of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from imagelib.cifar_resnet import CifarResNet
from specimen import Ends, Specimen


def pixels(size: int, batch: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, 3, size, size)


def tokens(*names: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randint(0, 90, (2, 7)) for name in names}


def _vision(name: str, size: int, blocks: int, ends: Ends, **more: Any) -> Specimen:
    options: dict[str, Any] = {"num_classes": 10, **more.pop("options", {})}

    def make(dropout: float) -> nn.Module:
        models = pytest.importorskip("torchvision.models")
        return models.get_model(name, weights=None, **options)

    return Specimen(f"torchvision:{name}", make, pixels(size), blocks, ends, **more)


def _timm(name: str, size: int, blocks: int, ends: Ends, **more: Any) -> Specimen:
    options = {"num_classes": 10, **more.pop("options", {})}

    def make(dropout: float) -> nn.Module:
        return pytest.importorskip("timm").create_model(name, **options)

    return Specimen(f"timm:{name}", make, pixels(size), blocks, ends, **more)


_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT = {"vocab_size": 99, "max_position_embeddings": 32}
_DROPOUTS = {
    "Bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "GPT2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "Llama": ("attention_dropout",),
    "T5": ("dropout_rate",),
    "ViT": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "GPTNeoX": ("hidden_dropout", "attention_dropout"),
}


def _transformers(
    family: str,
    kind: str,
    options: dict[str, Any],
    example: Any,
    blocks: int,
    ends: Ends,
    **more: Any,
) -> Specimen:
    def make(dropout: float) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        drops = dict.fromkeys(_DROPOUTS[family], dropout)
        config = getattr(transformers, f"{family}Config")(**options, **drops)
        return getattr(transformers, f"{family}{kind}")(config)

    return Specimen(f"transformers:{family}", make, example, blocks, ends, **more)


def _cifar(depth: int, shrink: Literal["pool", "subsample"]) -> Specimen:
    def make(dropout: float) -> nn.Module:
        return CifarResNet(depth, shrink=shrink)

    name, blocks = f"examples:resnet{depth}-{shrink}", (depth - 2) // 2
    return Specimen(name, make, pixels(32), blocks, (("bn2",),))


_BASIC, _BOTTLENECK = (("bn2",),), (("bn3",),)
_PRE_NORM = (("attn",), ("mlp",))

LIBRARIES = [
    _cifar(20, "pool"),
    _cifar(20, "subsample"),
    _cifar(32, "pool"),
    _cifar(44, "subsample"),
    _cifar(56, "pool"),
    _cifar(110, "pool"),
    _cifar(110, "subsample"),
    _vision("resnet18", 32, 8, _BASIC),
    _vision("resnet34", 32, 16, _BASIC),
    _vision("resnet50", 32, 16, _BOTTLENECK),
    _vision("resnet101", 32, 33, _BOTTLENECK),
    _vision("resnet152", 32, 50, _BOTTLENECK),
    _vision("resnext50_32x4d", 32, 16, _BOTTLENECK),
    _vision("wide_resnet50_2", 32, 16, _BOTTLENECK),
    _vision(
        "efficientnet_b0",
        64,
        9,
        (("block",),),
        options={"stochastic_depth_prob": 0.0, "dropout": 0.0},
    ),
    _vision("swin_t", 64, 12, _PRE_NORM),
    _vision("convnext_tiny", 64, 18, (("block",),), options={"stochastic_depth_prob": 0.0}),
    _vision("vit_b_16", 64, 12, (("self_attention",), ("mlp",)), options={"image_size": 64}),
    _timm("resnet50", 32, 16, _BOTTLENECK),
    _timm("resnetv2_50", 32, 16, (("conv3",),)),
    _timm("seresnext26d_32x4d", 32, 8, (("se",),), unfoldable="se"),
    _timm("vit_tiny_patch16_224", 64, 12, _PRE_NORM, options={"img_size": 64}),
    _timm("deit_tiny_patch16_224", 64, 12, _PRE_NORM, options={"img_size": 64}),
    _timm("convnext_atto", 64, 12, (("mlp",),)),
    _timm("mixer_s16_224", 64, 8, (("mlp_tokens",), ("mlp_channels",)), options={"img_size": 64}),
    _timm(
        "swin_tiny_patch4_window7_224",
        64,
        12,
        _PRE_NORM,
        options={"img_size": 64, "window_size": 2, "drop_path_rate": 0.0},
    ),
    _transformers(
        "Bert",
        "Model",
        {**_SMALL, **_TEXT},
        tokens("input_ids"),
        3,
        (("attention.output.dense",), ("output.dense",)),
    ),
    _transformers(
        "GPT2",
        "LMHeadModel",
        {
            "vocab_size": 99,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        tokens("input_ids"),
        3,
        _PRE_NORM,
    ),
    _transformers(
        "Llama",
        "ForCausalLM",
        {**_SMALL, **_TEXT},
        tokens("input_ids"),
        3,
        (("self_attn",), ("mlp",)),
    ),
    _transformers(
        "T5",
        "ForConditionalGeneration",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4},
        tokens("input_ids", "decoder_input_ids"),
        6,
        (
            ("layer.0.SelfAttention",),
            ("layer.1.EncDecAttention", "layer.1.DenseReluDense"),
            ("layer.2.DenseReluDense",),
        ),
        leave_out=("encoder.block.0", "decoder.block.0"),
    ),
    _transformers(
        "ViT",
        "Model",
        {**_SMALL, "image_size": 64},
        lambda: {"pixel_values": torch.randn(2, 3, 64, 64)},
        3,
        (("attention",), ("mlp",)),
    ),
    _transformers(
        "GPTNeoX",
        "ForCausalLM",
        {**_SMALL, **_TEXT},
        tokens("input_ids"),
        3,
        (("attention", "mlp"),),
    ),
]


def wav2vec2(**options: Any) -> Any:
    """A small Wav2Vec2, for what only it has: layerdrop, and a position encoding with a skip."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        **{"apply_spec_augment": False, **options},
    )
    return transformers.Wav2Vec2Model(config)


def bart(**layerdrop: float) -> Any:
    """A small one, whose encoder and decoder have a layerdrop each."""
    transformers = pytest.importorskip("transformers")
    layers = {"layers": 3, "attention_heads": 2, "ffn_dim": 16}
    sizes = {f"{end}_{what}": n for end in ("encoder", "decoder") for what, n in layers.items()}
    sizes |= {"vocab_size": 99, "d_model": 16, "max_position_embeddings": 32}
    return transformers.BartModel(transformers.BartConfig(**sizes, **layerdrop))
