# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The formulas of benchmarks/accounting.py against torch's counter, real caches and the figures of the model card."""

import re

import pytest
import torch
from tiny import DPVRConfig, DPVRForConditionalGeneration
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, LlavaConfig, LlavaForConditionalGeneration

from benchmarks import accounting
from benchmarks.accounting import (
    cache_bytes,
    decode_flops,
    dense_config,
    flop_counter,
    layer_flops,
    prefill_flops,
    prefill_loads,
    vision_tower_flops,
)
from benchmarks.caches import make_cache, stored_bytes

IMAGE = 120
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 14,
}
NUM_PATCHES = 9
SHAPES = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "grouped": {"model_type": "llama", "num_key_value_heads": 2},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
}


def llava_config(shape: str, **fields) -> LlavaConfig:
    return LlavaConfig(text_config={**TEXT, **SHAPES[shape]}, vision_config=VISION, image_token_index=IMAGE, **fields)


def dpvr_config(shape: str, **fields) -> DPVRConfig:
    return DPVRConfig(text_config={**TEXT, **SHAPES[shape]}, vision_config=VISION, image_token_index=IMAGE, **fields)


def build(model_class, config, attention: str = "eager"):
    config._attn_implementation = attention
    torch.manual_seed(0)
    return model_class(config).eval()


def prompt(num_images: int, num_text: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1] + [IMAGE] * NUM_PATCHES * num_images + [7] * (num_text - 1)])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long()}
    if num_images:
        inputs["pixel_values"] = torch.randn(num_images, 3, 42, 42)
    return inputs


@torch.no_grad()
def count(module, **inputs) -> int:
    """FLOPs that torch counts."""
    with flop_counter() as counter:
        module(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(2, 4, 5, 8), (1, 4, 64, 8)])
def test_attention_and_its_backward_count_as_the_plain_products_do(shape):
    counts = {}
    for attention in ("fused", "plain"):
        query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
        with flop_counter() as counter:
            if attention == "fused":
                output = nn.functional.scaled_dot_product_attention(query, key, value)
            else:
                output = (query @ key.transpose(-1, -2)).softmax(-1) @ value
            forward = counter.get_total_flops()
            output.sum().backward()
        counts[attention] = forward, counter.get_total_flops() - forward
    assert counts["fused"][0] == counts["plain"][0] > 0
    # the fused backward computes the scores once more: five products for four
    assert counts["fused"][1] * 4 == counts["plain"][1] * 5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_prefill_is_what_torch_counts(shape, attention):
    config = llava_config(shape)
    model = build(LlavaForConditionalGeneration, config, attention)
    inputs = prompt(num_images=2, num_text=11)
    del inputs["mm_token_type_ids"]
    for num_logits in (1, 29):
        counted = count(model, **inputs, logits_to_keep=num_logits)
        assert prefill_flops(config, 18, 11, num_logits=num_logits).total == counted


def test_parts_are_what_torch_counts_for_each_module():
    config = llava_config("grouped", vision_feature_layer=[-1, -2])
    model = build(LlavaForConditionalGeneration, config)
    flops = prefill_flops(config, NUM_PATCHES, 4)
    pixels = torch.randn(1, 3, 42, 42)
    assert count(model.model.vision_tower, pixel_values=pixels) == flops.vision_tower
    features = torch.randn(1, NUM_PATCHES, 48)
    assert count(model.model.multi_modal_projector, image_features=features) == flops.projector
    embeds = torch.randn(1, 13, 32)
    assert count(model.model.language_model, inputs_embeds=embeds) == flops.decoder
    assert count(model.lm_head, input=embeds[:, :1]) == flops.head


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_decode_is_what_torch_counts(shape):
    config = llava_config(shape)
    model = build(LlavaForConditionalGeneration, config)
    inputs = prompt(num_images=1, num_text=6)
    del inputs["mm_token_type_ids"]
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    step = torch.tensor([[9]])
    assert decode_flops(config, 9, 6).total == count(model, input_ids=step, past_key_values=cache)


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_cache_is_what_the_cache_holds(shape):
    config = llava_config(shape)
    language_model = build(AutoModel.from_config, config.text_config)
    cache = make_cache(config)
    with torch.no_grad():
        language_model(inputs_embeds=torch.randn(1, 15, 32), past_key_values=cache)
    assert len(cache.layers) == config.text_config.num_hidden_layers  # stored_bytes would pass over what lies behind
    assert all(layer.is_initialized for layer in cache.layers)
    assert cache_bytes(config, 9, 6, itemsize=4) == {"joint": stored_bytes(cache, config)}


ROUTINGS = {
    "one of each": {"saturation_layer": 2},
    "two of each": {"saturation_layer": 1, "num_side_layers": 2, "num_fusion_layers": 2},
    "no side branch": {"saturation_layer": 2, "num_side_layers": 0},
    "nothing skipped": {"saturation_layer": 4},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_routed_prefill_is_what_torch_counts(shape, routing, attention):
    config = dpvr_config(shape, **ROUTINGS[routing])
    model = build(DPVRForConditionalGeneration, config, attention)
    inputs = prompt(num_images=2, num_text=11)
    for num_logits in (0, 1, 5):
        counted = count(model, **inputs, logits_to_keep=num_logits)
        assert prefill_flops(config, 18, 11, num_logits=num_logits).total == counted


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_routed_decode_and_cache_are_what_the_model_does(shape, routing):
    config = dpvr_config(shape, **ROUTINGS[routing])
    model = build(DPVRForConditionalGeneration, config)
    for later_images in (True, False):
        cache = make_cache(config)
        cache.expects_images = later_images
        with torch.no_grad():
            model(**prompt(num_images=1, num_text=6), past_key_values=cache)
        counted = cache_bytes(config, 9, 6, itemsize=4, later_images=later_images)
        assert sum(counted.values()) == stored_bytes(cache, config)
    step = {"input_ids": torch.tensor([[9]]), "mm_token_type_ids": torch.tensor([[0]])}
    assert decode_flops(config, 9, 6).total == count(model, **step, past_key_values=cache)


def test_tiny_routed_loads_by_hand():
    config = dpvr_config("llama", saturation_layer=2, num_side_layers=2, num_fusion_layers=2)
    loads = [(load.role, load.queries, load.new, load.context) for load in prefill_loads(config, 9, 4)]
    joint, side = ("joint", 13, 13, 13), ("side branch", 9, 9, 9)
    assert loads == [joint, joint, side, side, ("text-only", 4, 4, 4), ("fusion", 13, 13, 13), ("fusion", 1, 13, 13)]
    whole = prefill_loads(config, 9, 4, num_logits=0)
    assert (whole[-1].queries, whole[-1].new) == (13, 13)


def test_without_an_image_routing_changes_nothing():
    config = dpvr_config("grouped", saturation_layer=2)
    assert prefill_flops(config, 0, 12, num_logits=0) == prefill_flops(dense_config(config), 0, 12, num_logits=0)
    assert decode_flops(config, 0, 12) == decode_flops(dense_config(config), 0, 12)
    sizes = cache_bytes(config, 0, 12, later_images=True)
    assert "side branch" not in sizes
    assert sum(sizes.values()) == cache_bytes(dense_config(config), 0, 12)["joint"]


def test_llava_7b_figures():
    config = DPVRConfig()
    dense = prefill_flops(dense_config(config), 576, 64)
    routed = prefill_flops(config, 576, 64)
    whole = prefill_flops(config, 576, 64, num_logits=0)
    assert whole.decoder / dense.decoder == pytest.approx(0.662, abs=5e-4)
    assert routed.decoder / dense.decoder == pytest.approx(0.635, abs=5e-4)
    assert routed.vision_tower == dense.vision_tower
    before = cache_bytes(dense_config(config), 576, 64)["joint"]
    sizes = cache_bytes(config, 576, 64, later_images=True)
    assert before == 320 * 2**20  # 32 layers, 640 positions, 2 * 4096 numbers of 2 bytes
    assert sizes["side branch"] / before == pytest.approx(0.028, abs=5e-4)
    assert sum(sizes.values()) / before == pytest.approx(0.6625)
    assert sum(cache_bytes(config, 576, 64).values()) / before == pytest.approx(0.634, abs=5e-4)


def test_one_layer_of_7b_by_hand():
    text_config = DPVRConfig().text_config
    text_config.intermediate_size = 11008
    load = prefill_loads(DPVRConfig(), 576, 64)[0]
    assert layer_flops(text_config, load) == 640 * 2 * (4 * 4096**2 + 3 * 4096 * 11008) + 4 * 640**2 * 4096


def test_an_image_has_a_token_more_where_the_class_token_is_kept():
    """As many as the vision tower gives."""
    for strategy, num_tokens in (("default", 9), ("full", 10)):
        config = llava_config("llama", vision_feature_select_strategy=strategy)
        size = config.vision_config.image_size
        with torch.no_grad():
            images = build(LlavaForConditionalGeneration, config).get_image_features(torch.zeros(1, 3, size, size))
        assert accounting.tokens_per_image(config) == len(images.pooler_output[0]) == num_tokens


def test_part_of_an_image_is_refused():
    with pytest.raises(ValueError, match="vision_tokens=10 is not a multiple of the 9 tokens"):
        prefill_flops(llava_config("llama"), 10, 4)


def test_unknown_vision_tower_is_refused():
    config = LlavaConfig(vision_config={"model_type": "siglip_vision_model"})
    with pytest.raises(ValueError, match="siglip_vision_model"):
        vision_tower_flops(config.vision_config)


def test_the_command_registers_nothing_that_later_models_of_the_process_would_be_loaded_with(tmp_path):
    DPVRConfig().save_pretrained(tmp_path)
    assert accounting.main([str(tmp_path)]) == 0
    assert "dpvr" not in CONFIG_MAPPING


def test_the_command_takes_the_layer_that_the_converter_would_and_says_which(tmp_path, capsys):
    shape = {"model_type": "llama", "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824}
    heads = {"num_attention_heads": 40, "num_key_value_heads": 40}
    LlavaConfig(text_config=shape | heads).save_pretrained(tmp_path)
    assert accounting.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "S = 22 of 40, 576 vision + 64 text tokens" in printed
    assert re.search(r"prefill decoder .* 0\.618", printed)
    assert accounting.main([str(tmp_path), "--saturation-layer", "30"]) == 0
    assert "S = 30 of 40" in capsys.readouterr().out
    negative = [tmp_path, "--text-tokens", -1]
    for wrong in (
        negative,
        [tmp_path, "--vision-tokens", 0, "--text-tokens", 0],
        [tmp_path, "--vision-tokens", 100],
        [tmp_path, "--saturation-layer", 40],
        [tmp_path / "none"],
    ):
        with pytest.raises(SystemExit) as status:
            accounting.main(list(map(str, wrong)))
        assert status.value.code == 2
