# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Writes a random LLaVA-1.5 checkpoint in llava-hf's layout, with its key names, for tests of memory and speed.

The default is the geometry of LLaVA-1.5-7B in bfloat16: 14 GB in three files, one of which is in memory at a time. The
tokenizer has LLaVA's ids for its special tokens and spells everything else in bytes.

Example:

    python benchmarks/make_random_llava.py random-llava-7b
    python benchmarks/make_random_llava.py random-llava-tiny --num-layers 2 --hidden-size 256
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import run_command

OLD_NAMES = [
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with `<image>` at 32000 and `<pad>` at 32001 as in LLaVA-1.5; the ids between are unused."""
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<unused{i}>" for i in range(len(tokens), 32000)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.add_tokens(["<image>"], special_tokens=True)
    fast.add_special_tokens({"pad_token": "<pad>"})
    return fast


def make_config(num_layers: int, hidden_size: int, tower_layers: int = 24) -> LlavaConfig:
    """LLaVA-1.5's config with a decoder of the given depth and width, in heads of 128, and a tower of some depth."""
    text_config = {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 11008 // 4096,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 128,
        "num_key_value_heads": hidden_size // 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32064,
    }
    config = LlavaConfig(text_config=text_config, pad_token_id=32001, dtype="bfloat16")
    config.vision_config.num_hidden_layers = tower_layers
    return config


def old_name(name: str) -> str:
    for pattern, replacement in OLD_NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def write_weights(folder: Path, config: LlavaConfig, max_bytes: int, seed: int) -> None:
    """Norms of one, all else normal with the config's deviation; one file in memory at a time."""
    with torch.device("meta"):
        weights = LlavaForConditionalGeneration(config).bfloat16().state_dict()
    split = split_torch_state_dict_into_shards(weights, max_shard_size=max_bytes)
    generator = torch.Generator().manual_seed(seed)
    weight_map, total = {}, split.metadata["total_size"]
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing random weights", disable=None) as bar:
        for file, names in split.filename_to_tensors.items():
            tensors = {}
            for name in names:
                tensor = torch.empty_like(weights[name], device="cpu")
                is_norm = tensor.ndim == 1 and "norm" in name and name.endswith("weight")
                tensors[old_name(name)] = (
                    tensor.fill_(1)
                    if is_norm
                    else tensor.normal_(0, config.text_config.initializer_range, generator=generator)
                )
                bar.update(tensor.nbytes)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_llava(
    output: Path,
    num_layers: int,
    hidden_size: int,
    tower_layers: int = 24,
    max_file_bytes: int = 5 * 10**9,
    seed: int = 0,
) -> None:
    """A whole checkpoint in the new folder `output`: config, processor, weights."""
    from transformers import CLIPImageProcessor  # here, for it warns where torchvision is missing

    output.mkdir(parents=True)
    config = make_config(num_layers, hidden_size, tower_layers)
    config.save_pretrained(output)
    size = config.vision_config.image_size
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer=make_tokenizer(),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    ).save_pretrained(output)
    write_weights(output, config, max_file_bytes, seed)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a random LLaVA-1.5 checkpoint in llava-hf's layout.")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--num-layers", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--tower-layers", type=int, default=24)
    parser.add_argument("--max-file-bytes", type=int, default=5 * 10**9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists")
    if args.hidden_size % 128 or args.hidden_size < 1:
        parser.error(f"--hidden-size {args.hidden_size} is not a multiple of 128")
    if min(args.num_layers, args.tower_layers, args.max_file_bytes) < 1:
        parser.error("--num-layers, --tower-layers and --max-file-bytes must be at least 1")
    write_llava(args.output, args.num_layers, args.hidden_size, args.tower_layers, args.max_file_bytes, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, "the folder is not whole: remove it"))
