"""Promise: what is left of a model of transformers is saved, loaded and used as a smaller one.

And where that cannot be, a warning says so.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stochastic_depth as sd
from pruned import blocks_of, outputs, pruned_as_dropped, same

pytestmark = pytest.mark.filterwarnings("ignore:.*(shallow networks|dropout is active)")


def small(kind: str, **more: Any) -> tuple[Any, Any]:
    """A model of transformers with six layers, and its example."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4,
        "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "GPT2LMHeadModel":
        sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": 6, "n_head": 4}
        sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "ViTModel":
        sizes = {n: sizes[n] for n in ("hidden_size", "num_hidden_layers", "intermediate_size")}
        sizes |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    configs = {"GPT2LMHeadModel": "GPT2Config", "BertModel": "BertConfig", "ViTModel": "ViTConfig"}
    configs |= {"LlamaForCausalLM": "LlamaConfig", "Gemma3ForCausalLM": "Gemma3TextConfig"}
    configs |= {"Qwen3MoeForCausalLM": "Qwen3MoeConfig"}
    config = getattr(transformers, configs[kind])(**sizes, **more)
    if kind == "ViTModel":
        return transformers.ViTModel(config).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    model = getattr(transformers, kind)(config).eval()
    return model, {"input_ids": torch.randint(3, 60, (2, 5))}


@pytest.mark.parametrize("scale", ["none", "eval"])
@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM", "ViTModel"])
def test_models_of_transformers_are_saved_as_smaller_ones(
    kind: str, scale: Any, tmp_path: Path
) -> None:
    model, x = small(kind)
    names = blocks_of(model, x)
    model = pruned_as_dropped(model, x, [names[0], names[2], names[5]], scale)
    assert model.config.num_hidden_layers == 3
    saved_and_loaded(model, x, tmp_path)
    if hasattr(model, "generate") and "input_ids" in x:
        generates(model, x["input_ids"])


def saved_and_loaded(model: Any, x: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    assert sorted(again.state_dict()) == sorted(model.state_dict())
    assert torch.equal(outputs(again, x)[0], outputs(model, x)[0])


def generates(model: Any, tokens: Tensor) -> None:
    """With a cache the same tokens as without: each layer knows its new place in it."""
    torch.manual_seed(0)
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        cached = model.generate(tokens, use_cache=True, **options)
        assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
    places = [m.layer_idx for m in model.modules() if getattr(m, "layer_idx", None) is not None]
    assert set(places) == {0, 1, 2}


def test_lists_with_an_entry_for_each_layer_are_shortened(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    model, x = small("Gemma3ForCausalLM", layer_types=kinds, head_dim=8, num_key_value_heads=2)
    names = blocks_of(model, x)
    sd.prune(model, [names[0], names[1], names[3]], example_inputs=x)
    assert model.config.layer_types == [kinds[0], kinds[1], kinds[3]]
    saved_and_loaded(model, x, tmp_path)
    generates(model, x["input_ids"])


def test_a_bert_that_was_trained_with_layer_drop(tmp_path: Path) -> None:
    """Where a layer of it is dropped its norms run: they stay, or the whole layer is taken out."""
    model, x = small("BertModel")
    depth = sd.apply_layer_drop(model, 0.2, example_inputs=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    depth.follow(optimizer)
    for _ in range(3):
        model.train()(**x).last_hidden_state.square().mean().backward()
        optimizer.step()
    other = copy.deepcopy(model)
    keep = [f"encoder.layer.{number}" for number in (0, 2, 3, 5)]
    with depth.fixed({"encoder.layer.1": False, "encoder.layer.4": False}):
        expected = outputs(model, x)
    with pytest.warns(sd.StochasticDepthWarning, match=r"not what its class makes.* exact=False"):
        exact: Any = depth.prune(keep)
    assert same(outputs(exact, x), expected)
    behind = exact.encoder.layer[1].behind
    assert [type(module).__name__ for module in behind] == ["LayerNorm", "LayerNorm"]
    smaller: Any = sd.get_stochastic_depth(other).prune(keep, exact=False, example_inputs=x)
    assert smaller.config.num_hidden_layers == len(smaller.encoder.layer) == 4
    saved_and_loaded(smaller, x, tmp_path)


def test_encoders_and_decoders_have_numbers_of_their_own(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model, tokens = transformers.T5ForConditionalGeneration(config).eval(), torch.ones(2, 5).long()
    x = {"input_ids": tokens, "decoder_input_ids": tokens}
    keep = ["encoder.*", "decoder.block.1", "decoder.block.3"]
    blocks = ["!encoder.block.0", "!decoder.block.0"]
    sd.prune(model, keep, example_inputs=x, blocks=blocks)
    assert (model.config.num_layers, model.config.num_decoder_layers) == (4, 3)
    saved_and_loaded(model, x, tmp_path)


def test_a_configuration_that_two_models_share() -> None:
    transformers = pytest.importorskip("transformers")
    model, x = small("LlamaForCausalLM")
    teacher = transformers.LlamaForCausalLM(model.config).eval()
    before = outputs(teacher, x)
    sd.prune(model, 3, example_inputs=x)
    assert (model.config.num_hidden_layers, teacher.config.num_hidden_layers) == (3, 6)
    assert model.config is model.model.config
    assert same(outputs(teacher, x), before)


def test_hidden_states_that_the_example_asks_for() -> None:
    model, x = small("LlamaForCausalLM")
    x = {**x, "output_hidden_states": True}
    depth = sd.apply_stochastic_depth(model, 0.0, example_inputs=x)
    assert len(model(**x).hidden_states) == 7
    assert len(depth.prune(3)(**x).hidden_states) == 4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Bloom", {"n_layer": 6, "hidden_size": 32, "n_head": 4}),
        ("GPTNeo", {"num_layers": 6, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
                    "attention_types": [[["global", "local"], 3]]}),
    ],
)  # fmt: skip
def test_blocks_that_return_tuples(kind: str, options: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=60, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    x = {"input_ids": torch.randint(3, 60, (2, 5))}
    names = blocks_of(model, x)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", sd.StochasticDepthWarning)
        pruned = pruned_as_dropped(model, x, [names[0], names[2], names[4]])
    if not any("not what its class makes" in str(each.message) for each in said):
        saved_and_loaded(pruned, x, tmp_path)


def test_models_in_stages(tmp_path: Path) -> None:
    """Their configuration says how many blocks each stage has."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 4, 2], num_heads=[2, 2, 4],
        window_size=4, drop_path_rate=0.0,
    )  # fmt: skip
    model = transformers.SwinModel(config).eval()
    x = {"pixel_values": torch.randn(2, 3, 32, 32)}
    keep = ["encoder.layers.[02].*", "encoder.layers.1.blocks.[03]"]
    sd.prune(model, keep, example_inputs=x)
    assert list(model.config.depths) == [2, 2, 2]
    assert model.config.num_layers == 3
    saved_and_loaded(model, x, tmp_path)


def test_numbers_that_only_happen_to_be_equal(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        vocab_size=30, hidden_size=32, num_attention_heads=4, intermediate_size=48,
        num_hidden_layers=3, layerdrop=0.0, conv_dim=[8, 8, 8], conv_stride=[4, 2, 2],
        conv_kernel=[8, 3, 3], num_feat_extract_layers=3, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, do_stable_layer_norm=True, feat_extract_norm="layer",
        mask_time_prob=0.0,
    )  # fmt: skip
    model = transformers.Wav2Vec2Model(config).eval()
    x = {"input_values": torch.randn(2, 400)}
    out = "encoder.layers.1"
    sd.prune(model, [n for n in blocks_of(model, x) if n != out], example_inputs=x)
    assert model.config.num_hidden_layers == 2
    assert model.config.num_feat_extract_layers == 3
    saved_and_loaded(model, x, tmp_path)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0, 2, 4], "num_key_value_heads": 2,
                                 "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}),
    ],
)  # fmt: skip
def test_layers_whose_form_depends_on_their_number(kind: str, more: Any) -> None:
    """What cannot be loaded again is said."""
    model, x = small(kind, **more)
    names = blocks_of(model, x)
    with pytest.warns(sd.StochasticDepthWarning, match="not what its class makes"):
        pruned_as_dropped(model, x, [names[0], names[2]])


def test_strides_that_are_as_many_as_layers_stay(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    configs = [
        transformers.PoolFormerConfig(hidden_sizes=[16, 16, 32, 32], drop_path_rate=0.0),
        transformers.SegformerConfig(hidden_sizes=[16, 32, 40, 64], drop_path_rate=0.0),
    ]
    kinds = ["PoolFormerForImageClassification", "SegformerForImageClassification"]
    out = ["poolformer.encoder.block.1.1", "segformer.stages.3.blocks.1"]
    x = torch.randn(2, 3, 64, 64)
    for config, kind, name in zip(configs, kinds, out, strict=True):
        model = getattr(transformers, kind)(config).eval()
        strides = list(config.strides)
        sd.prune(model, [block for block in blocks_of(model, x) if block != name], example_inputs=x)
        assert list(model.config.strides) == strides
        assert sum(model.config.depths) == sum(config.depths) - 1
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert same(outputs(loaded, x), outputs(model, x))


def test_a_model_that_makes_a_cache_in_inference() -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 6}
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=4)).eval()
    x = {"input_ids": torch.randint(3, 60, (2, 8))}
    twin = copy.deepcopy(model)
    pruned: Any = sd.prune(model, 4, example_inputs=x)
    assert pruned.config.num_hidden_layers == 4
    for layer in (1, 4):
        twin.backbone.layers[layer].mixer.register_forward_hook(lambda module, args, out: out * 0)
    expected, found = (each(**x, use_cache=False).logits for each in (twin, pruned))
    assert torch.equal(found, expected)
    assert pruned(**x, use_cache=True).logits.shape == (2, 8, 60)


def test_a_configuration_that_could_not_be_read_again_is_named() -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.Dinov2Config(**sizes, image_size=32, patch_size=8)
    model = transformers.Dinov2Model(config).eval()
    with pytest.warns(sd.StochasticDepthWarning, match="from_pretrained.. would load something"):
        sd.prune(model, 2, example_inputs={"pixel_values": torch.randn(2, 3, 32, 32)})


@pytest.mark.parametrize("kind", ["DebertaV2", "MPNet"])
def test_layers_that_hand_out_tuples_go_with_their_norms(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, intermediate_size=48)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    x = {"input_ids": torch.randint(3, 60, (2, 7))}
    by_hand = copy.deepcopy(model)
    by_hand.encoder.layer = torch.nn.ModuleList(
        [by_hand.encoder.layer[0], by_hand.encoder.layer[3]]
    )
    generator = torch.get_rng_state()
    pruned: Any = sd.prune(model, 2, example_inputs=x, exact=False)
    assert torch.equal(torch.get_rng_state(), generator)
    assert pruned.config.num_hidden_layers == 2
    assert torch.equal(pruned(**x).last_hidden_state, by_hand(**x).last_hidden_state)


def test_no_random_number_is_drawn() -> None:
    """A model of speech draws some when it is built, on the meta device, too."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "layerdrop": 0.0}
    sizes |= {"intermediate_size": 48, "num_hidden_layers": 4, "conv_dim": [8, 8]}
    sizes |= {"conv_stride": [4, 2], "conv_kernel": [8, 3], "num_conv_pos_embeddings": 8}
    config = transformers.Wav2Vec2Config(**sizes, num_conv_pos_embedding_groups=2)
    model = transformers.Wav2Vec2Model(config).eval()
    generator = torch.get_rng_state()
    sd.prune(model, 3, exact=False, example_inputs={"input_values": torch.randn(2, 400)})
    torch.randn(2, 400)
    after = torch.get_rng_state()
    torch.set_rng_state(generator)
    torch.randn(2, 400), torch.randn(2, 400)
    assert torch.equal(torch.get_rng_state(), after)
