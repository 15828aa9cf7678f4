# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Small LLaVA checkpoints with the key names and file layouts of the real ones, for tests of the converter."""

import errno
import json
import os
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = 96  # words of the tokenizer, rows of the embeddings in the original layout
IMAGE, PAD, VOCABULARY = 96, 97, 128  # what converting the original layout makes of them
TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN2 = {"model_type": "qwen2", "tie_word_embeddings": True}
BACKBONES = {
    "llama": {},
    "mistral": {"model_type": "mistral", "head_dim": 16},
    "qwen2": QWEN2,
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
}
TRANSFORMERS_4 = [  # new names to those that llava-hf's checkpoints hold
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
]
ORIGINAL = [
    (r"^model\.language_model\.", "model."),
    (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
]


def renamed(key: str, names: list[tuple[str, str]]) -> str:
    for pattern, replacement in names:
        if re.match(pattern, key):
            return re.sub(pattern, replacement, key)
    return key


def make_llava(backbone: str = "llama", **text) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text_config = {**TEXT, **BACKBONES[backbone], **text}
    config = LlavaConfig(
        text_config=text_config, vision_config=VISION, image_token_index=IMAGE, pad_token_id=PAD, image_seq_length=4
    )
    model = LlavaForConditionalGeneration(config).eval()
    for weight in model.parameters():  # no tensor may be mistaken for another
        torch.nn.init.normal_(weight, std=0.2)
    return model


def make_tokenizer(special: bool) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    if special:
        fast.add_tokens(["<image>"], special_tokens=True)
        fast.add_special_tokens({"pad_token": "<pad>"})
    return fast


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], suffix: str, num_files: int) -> None:
    """As one file, or as shards with an index; `suffix` is .safetensors or .bin."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weight_map = {}
    for i in range(num_files):
        name = f"{stem}-{i + 1:05}-of-{num_files:05}{suffix}" if num_files > 1 else stem + suffix
        part = {key: tensors[key].contiguous() for key in list(tensors)[i::num_files]}
        if suffix == ".bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if num_files > 1:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_llava_hf(
    folder: Path, model, names=TRANSFORMERS_4, suffix: str = ".safetensors", num_files: int = 3, change=None
) -> Path:
    """llava-hf's layout: config, processor, weights; `change` edits the weights before they are written."""
    folder.mkdir(parents=True)
    model.config.dtype = next(model.parameters()).dtype
    model.config.save_pretrained(folder)
    LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=make_tokenizer(special=True),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    tensors = {renamed(key, names): tensor for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop(renamed("lm_head.weight", names), None)
    if names is TRANSFORMERS_4:  # buffers that old checkpoints hold
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    if change:
        change(tensors)
    write_weights(folder, tensors, suffix, num_files)
    return folder


def write_original(
    folder: Path, model, suffix: str = ".bin", num_files: int = 2, tower: str = "apart", change=None, **fields
) -> Path:
    """The layout of liuhaotian/llava-v1.5; `tower` is "apart" (beside it, a full CLIP) or "inside"."""
    folder.mkdir(parents=True)
    clip = folder.parent / "clip"
    clip.mkdir()
    CLIPVisionConfig(**VISION).save_pretrained(clip)
    image_processor().save_pretrained(clip)
    text = {key: value for key, value in model.config.text_config.to_dict().items() if key != "rope_parameters"}
    config = text | {
        "model_type": "llava_llama",
        "vocab_size": WORDS,
        "mm_vision_tower": str(clip),
        "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "rope_theta": 5000.0,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "architectures": ["LlavaLlamaForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(config | fields))
    make_tokenizer(special=False).save_pretrained(folder)
    tensors = {renamed(key, ORIGINAL): tensor for key, tensor in model.state_dict().items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:WORDS]
    inside = {key: tensors.pop(key) for key in list(tensors) if "vision_tower" in key}
    if tower == "inside":
        tensors |= inside
    else:
        full_clip = {
            key.removeprefix("model.vision_tower.vision_tower."): value.float() for key, value in inside.items()
        }
        full_clip["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        full_clip |= {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.tensor(2.0)}
        full_clip["visual_projection.weight"] = torch.ones(8, 16)
        write_weights(clip, full_clip, ".bin", 1)
    if change:
        change(tensors)
    write_weights(folder, tensors, suffix, num_files)
    return folder


def read_output(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors by way of the index, which must name every one of them once and nothing else."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        part = load_file(folder / file)
        assert set(part) == {key for key, name in index["weight_map"].items() if name == file}
        tensors |= part
    assert {path.name for path in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    return tensors


def assert_same_weights(output: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    base = {key: tensor for key, tensor in output.items() if not key.startswith("model.side_branch.")}
    assert base.keys() == expected.keys()
    for key, tensor in base.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key


def branch(tensors: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    prefix = f"model.side_branch.layers.{layer}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def decoder_layer(tensors: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    prefix = f"model.language_model.layers.{layer}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def trained_branch(num_layers: int = 1) -> dict[str, torch.Tensor]:
    layer = decoder_layer(dict(make_llava().state_dict()), 0)
    return {f"layers.{i}.{part}": tensor + 1 + i for i in range(num_layers) for part, tensor in layer.items()}


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refuse_links(monkeypatch, code: int = errno.EXDEV) -> None:
    """Has files that cannot be linked, as on another disk."""

    def link(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)


def flip_a_bit(path: Path) -> None:
    """Of a number near the end of a file, as a disk may."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
