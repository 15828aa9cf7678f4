"""Tiny random LLaVA and DPVR models, and ragged batches for them."""

import torch
from conftest import ROOT
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.cache_utils import StaticLayer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

DPVRConfig = get_class_from_dynamic_module("configuration_dpvr.DPVRConfig", str(ROOT))
DPVRForConditionalGeneration = get_class_from_dynamic_module("modeling_dpvr.DPVRForConditionalGeneration", str(ROOT))

PAD, IMAGE, FIRST_TEXT, VOCABULARY = 0, 5, 6, 99
TOKENS_PER_IMAGE = 4
NUM_LAYERS = 6
CROPPED_CACHES = ["dynamic", *(["static"] if hasattr(StaticLayer, "crop") else [])]  # since transformers 5.24

LLAVA_FIELDS = {
    "image_token_id": IMAGE,
    "image_seq_length": TOKENS_PER_IMAGE,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}


def text_config(cls=LlamaConfig, **overrides):
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,  # large enough that every token matters to the logits
    }
    return cls(**{**fields, **overrides})


def vision_config():
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )


def make_llava(seed=0, text=None, **overrides):
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision_config(), text_config=text or text_config(), **{**LLAVA_FIELDS, **overrides}
    )
    return LlavaForConditionalGeneration(config).eval()


def make_dpvr(seed=0, text=None, saturation_layer=2, num_side_layers=1, num_fusion_layers=1, random_branch=True, **kw):
    """A DPVR whose side branch does something: random, unless `random_branch` is False (identity)."""
    torch.manual_seed(seed)
    config = DPVRConfig(
        vision_config=vision_config(),
        text_config=text or text_config(),
        saturation_layer=saturation_layer,
        num_side_layers=num_side_layers,
        num_fusion_layers=num_fusion_layers,
        **{**LLAVA_FIELDS, **kw},
    )
    model = DPVRForConditionalGeneration(config).eval()
    if random_branch:
        for weight in model.model.side_branch.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return model


def make_batch(rows, padding_side="left", seed=0):
    """Inputs from rows such as "ttIt": t is a text token, I an image.

    Returns:
        `input_ids`, `attention_mask`, `mm_token_type_ids` of shape `(B, T)`, and `pixel_values` or None.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for row in rows:
        tokens = [
            [IMAGE] * TOKENS_PER_IMAGE
            if kind == "I"
            else [int(torch.randint(FIRST_TEXT, VOCABULARY, (1,), generator=generator))]
            for kind in row
        ]
        ids.append([token for group in tokens for token in group])
    width = max(map(len, ids))
    padding = [[PAD] * (width - len(row)) for row in ids]
    masks = [[1] * len(row) for row in ids]
    zeros = [[0] * len(pad) for pad in padding]
    left = padding_side == "left"
    input_ids = torch.tensor([pad + row if left else row + pad for pad, row in zip(padding, ids, strict=True)])
    attention_mask = torch.tensor([pad + row if left else row + pad for pad, row in zip(zeros, masks, strict=True)])
    num_images = sum(row.count("I") for row in rows)
    pixel_values = torch.randn(num_images, 3, 16, 16, generator=generator) if num_images else None
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == IMAGE).long(),
        "pixel_values": pixel_values,
    }


def record_reads(monkeypatch) -> list[str]:
    """The list of reads of tensor values by the host, to which every one from now on is added. On a GPU each waits."""
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "__index__", "__float__", "nonzero", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, m=method, n=name, **kw: reads.append(n) or m(*args, **kw)
        )
    return reads
