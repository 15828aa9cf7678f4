# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
FLOPs and KV-cache bytes of LLaVA and of DPVR, from a config alone.

A `LlavaConfig` is counted dense, a `DPVRConfig` routed. One row, batch 1. V vision tokens, T text tokens.

FLOPs are 2 per multiply-add of matrix products; norms, rotations, activations, softmax and sums are left out, as in
`torch.utils.flop_counter`, with which the tests compare these numbers for equality. With D hidden size, H heads and
G key/value heads of size h, I intermediate size, q positions that are computed, n positions that get keys and values,
c positions in reach, one decoder layer costs

    query and output projections   2 * q * (D * H * h + H * h * D)
    key and value projections      2 * n * (D * G * h) * 2
    scores and values              2 * q * c * H * h * 2       the full q x c matrix: causal masks save nothing here
    gated MLP                      2 * q * 3 * D * I

    layers          prefill: q, n, c                             decoding one token: q, n, c
    joint           V + T, V + T, V + T                          1, 1, V + T + 1
    side branch     V, V, V                                      not run
    text-only       T, T, T                                      1, 1, T + 1
    fusion          V + T, V + T, V + T                          1, 1, V + T + 1
    last            num_logits, V + T, V + T                     1, 1, V + T + 1

A dense LLaVA is all joint, and its last layer computes all V + T outputs, whoever reads them. The head costs
`2 * D * vocabulary` per logit and the projector `2 * (D_v * D + D * D)` per vision token. The CLIP tower, N patches
and all of its layers, costs `2 * 3 * patch^2 * D_v * N` for the patches and, per layer, the above with
q = n = c = N + 1, G = H and an MLP of two matrices.

A KV cache holds `2 * G * h * itemsize` bytes for each position of each layer: V + T in joint and fusion layers, T in
text-only layers, and V in the side branch where a later image may come, which alone reads them. Sliding windows are
taken to be longer than the prompt.

Example:

    python benchmarks/accounting.py                                    # LLaVA-1.5-7B, 576 + 64 tokens
    python benchmarks/accounting.py path/to/checkpoint --vision-tokens 1152 --text-tokens 200
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlavaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # configuration_dpvr lies beside this folder

from benchmarks.command import NOTHING, run_command
from configuration_dpvr import ROUTING, DPVRConfig, proportional_layer


def flop_counter() -> FlopCounterMode:
    """Torch's counter, which by itself takes the attention kernels of CPUs for nothing."""

    def forward(query, key, value, *args, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad, query, key, value, *args, **kwargs) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={forward_kernel: forward, backward_kernel: backward})


@dataclass(frozen=True)
class LayerLoad:
    """What one decoder layer works on.

    Attributes:
        role: `"joint"`, `"side branch"`, `"text-only"` or `"fusion"`.
        queries: positions whose output is computed.
        new: positions whose keys and values are computed.
        context: positions that a query can reach, those in the cache included.
    """

    role: str
    queries: int
    new: int
    context: int


@dataclass(frozen=True)
class Flops:
    """FLOPs of one call, by part."""

    vision_tower: int
    projector: int
    decoder: int
    head: int

    @property
    def total(self) -> int:
        return self.vision_tower + self.projector + self.decoder + self.head


def _head_dim(text_config) -> int:
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def _roles(config: LlavaConfig) -> list[str]:
    """The role of each layer that runs at prefill, in order; a dense LLaVA is all joint."""
    num_layers = config.text_config.num_hidden_layers
    if not hasattr(config, "saturation_layer"):
        return ["joint"] * num_layers
    num_text_only = num_layers - config.num_fusion_layers - config.saturation_layer
    return [
        *["joint"] * config.saturation_layer,
        *["side branch"] * config.num_side_layers,
        *["text-only"] * num_text_only,
        *["fusion"] * config.num_fusion_layers,
    ]


def prefill_loads(config: LlavaConfig, vision_tokens: int, text_tokens: int, num_logits: int = 1) -> list[LayerLoad]:
    """The load of every layer when a prompt is read in one call.

    Args:
        config: A `LlavaConfig` (dense) or a `DPVRConfig` (routed).
        vision_tokens, text_tokens: Tokens of each kind in the prompt.
        num_logits: Last positions that are read, 0 for all. For the others the last layer of a routed model computes
            only keys and values; LLaVA's of transformers computes them all.
    """
    seen = {"side branch": vision_tokens, "text-only": text_tokens}
    loads = []
    for role in _roles(config):
        length = seen.get(role, vision_tokens + text_tokens)
        loads.append(LayerLoad(role, length, length, length))
    if loads[-1].role == "fusion" and 0 < num_logits < loads[-1].new:
        loads[-1] = LayerLoad("fusion", num_logits, loads[-1].new, loads[-1].context)
    return [load for load in loads if load.new]


def read_one_token(loads: list[LayerLoad]) -> list[LayerLoad]:
    """The same, but that of the last layer only the last token's output is computed, as DPVR has it for one logit."""
    return [*loads[:-1], replace(loads[-1], queries=1)]


def decode_loads(config: LlavaConfig, vision_tokens: int, text_tokens: int) -> list[LayerLoad]:
    """The load of every layer when one text token follows a cached prompt of the given size."""
    context = {"text-only": text_tokens + 1}
    roles = [role for role in _roles(config) if role != "side branch"]
    return [LayerLoad(role, 1, 1, context.get(role, vision_tokens + text_tokens + 1)) for role in roles]


def layer_flops(text_config, load: LayerLoad) -> int:
    """FLOPs of one decoder layer with grouped-query attention and a gated MLP (llama, mistral, qwen2)."""
    hidden, head_dim = text_config.hidden_size, _head_dim(text_config)
    query_width = text_config.num_attention_heads * head_dim
    key_width = text_config.num_key_value_heads * head_dim
    projections = 2 * load.queries * 2 * hidden * query_width + 2 * load.new * 2 * hidden * key_width
    attention = 2 * 2 * load.queries * load.context * query_width
    mlp = 2 * load.queries * 3 * hidden * text_config.intermediate_size
    return projections + attention + mlp


def tokens_per_image(config: LlavaConfig) -> int:
    """Vision tokens of one image: CLIP's patches, and its class token if the config keeps it."""
    vision = config.vision_config
    num_patches = (vision.image_size // vision.patch_size) ** 2
    return num_patches + (config.vision_feature_select_strategy == "full")


def vision_tower_flops(vision_config) -> int:
    """FLOPs of a CLIP vision tower for one image; all layers run, whichever of them is read.

    Raises:
        ValueError: for another tower than `clip_vision_model`.
    """
    if vision_config.model_type != "clip_vision_model":
        raise ValueError(f"FLOPs of vision tower {vision_config.model_type!r} are unknown: only clip_vision_model is.")
    hidden, patch = vision_config.hidden_size, vision_config.patch_size
    num_patches = (vision_config.image_size // patch) ** 2
    length = num_patches + 1
    embedding = 2 * vision_config.num_channels * patch**2 * hidden * num_patches
    linear = 2 * length * (4 * hidden**2 + 2 * hidden * vision_config.intermediate_size)
    attention = 2 * 2 * length**2 * hidden
    return embedding + vision_config.num_hidden_layers * (linear + attention)


def projector_flops(config: LlavaConfig, vision_tokens: int) -> int:
    """FLOPs of the two-layer projector; several feature layers are concatenated before it."""
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    hidden = config.text_config.hidden_size
    return 2 * vision_tokens * (width * hidden + hidden * hidden)


def decoder_flops(config: LlavaConfig, loads: list[LayerLoad]) -> int:
    """FLOPs of all decoder layers."""
    return sum(layer_flops(config.text_config, load) for load in loads)


def _head_flops(config: LlavaConfig, num_logits: int) -> int:
    return 2 * num_logits * config.text_config.hidden_size * config.text_config.vocab_size


def prefill_flops(
    config: LlavaConfig,
    vision_tokens: int,
    text_tokens: int,
    *,
    num_logits: int = 1,
) -> Flops:
    """FLOPs of reading a prompt in one call.

    Args:
        config: A `LlavaConfig` (dense) or a `DPVRConfig` (routed).
        vision_tokens: Vision tokens, a multiple of those of one image.
        text_tokens: Text tokens.
        num_logits: Last positions that go through the head: 1 in `generate`, 0 (all of them) in a plain call.

    Raises:
        ValueError: if `vision_tokens` is not a whole number of images, or the tower is not CLIP's.
    """
    per_image = tokens_per_image(config)
    if vision_tokens % per_image:
        raise ValueError(f"vision_tokens={vision_tokens} is not a multiple of the {per_image} tokens of one image.")
    loads = prefill_loads(config, vision_tokens, text_tokens, num_logits)
    return Flops(
        vision_tower=vision_tokens // per_image * vision_tower_flops(config.vision_config),
        projector=projector_flops(config, vision_tokens),
        decoder=decoder_flops(config, loads),
        head=_head_flops(config, num_logits or vision_tokens + text_tokens),
    )


def decode_flops(config: LlavaConfig, vision_tokens: int, text_tokens: int) -> Flops:
    """FLOPs of one more text token after a cached prompt of `vision_tokens` and `text_tokens`."""
    loads = decode_loads(config, vision_tokens, text_tokens)
    decoder = decoder_flops(config, loads)
    return Flops(vision_tower=0, projector=0, decoder=decoder, head=_head_flops(config, 1))


def cache_bytes(
    config: LlavaConfig, vision_tokens: int, text_tokens: int, itemsize: int = 2, later_images: bool = False
) -> dict[str, int]:
    """Bytes of the KV cache after a prompt, by role of the layer.

    Args:
        config: A `LlavaConfig` (dense) or a `DPVRConfig` (routed).
        vision_tokens, text_tokens: Tokens of each kind.
        itemsize: Bytes of one number, 2 for float16 and bfloat16.
        later_images: Whether the cache may see another image, which reads what the side branch cached. `generate`
            leaves that out, unless it returns its cache or reads the prompt in chunks.
    """
    per_position = 2 * config.text_config.num_key_value_heads * _head_dim(config.text_config) * itemsize
    sizes: dict[str, int] = {}
    for load in prefill_loads(config, vision_tokens, text_tokens):
        if load.role != "side branch" or later_images:
            sizes[load.role] = sizes.get(load.role, 0) + load.context * per_position
    return sizes


def dense_config(config: DPVRConfig) -> LlavaConfig:
    """The LLaVA that a DPVR was made of."""
    fields = config.to_dict()
    for name in (*ROUTING, "model_type"):
        fields.pop(name, None)
    return LlavaConfig(**fields)


def _table(config: DPVRConfig, vision_tokens: int, text_tokens: int) -> str:
    """Rows of dense, routed and their ratio, for the command line."""
    dense = dense_config(config)
    prefill = [prefill_flops(each, vision_tokens, text_tokens) for each in (dense, config)]
    decode = [decode_flops(each, vision_tokens, text_tokens) for each in (dense, config)]
    caches = [sum(cache_bytes(each, vision_tokens, text_tokens).values()) for each in (dense, config)]
    rows = [(f"prefill {part}", *(getattr(flops, part) for flops in prefill)) for part in Flops.__annotations__]
    rows += [("prefill total", *(flops.total for flops in prefill)), ("decode", *(flops.total for flops in decode))]
    lines = [f"{'GFLOPs':24}{'LLaVA':>12}{'DPVR':>12}{'ratio':>9}"]
    lines += [f"{name:24}{one / 1e9:12.2f}{two / 1e9:12.2f}{two / one if one else 1:9.4f}" for name, one, two in rows]
    one, two = caches
    lines.append(f"{'KV cache, MiB (16 bit)':24}{one / 2**20:12.2f}{two / 2**20:12.2f}{two / one:9.4f}")
    return "\n".join(lines)


def _load_config(checkpoint: str | None, saturation_layer: int | None) -> DPVRConfig:
    """The config of a DPVR, or of the one that a LLaVA becomes; the layer that is given, or the converter's."""
    if checkpoint is None:
        config = DPVRConfig()
    else:
        # Not by AutoConfig: what is registered there, all later models of this process are loaded with
        model_type = DPVRConfig.get_config_dict(checkpoint)[0].get("model_type")
        if model_type not in ("llava", "dpvr"):
            raise ValueError(f"{checkpoint} has model_type {model_type!r}, not the config of a LLaVA or a DPVR.")
        config = (DPVRConfig if model_type == "dpvr" else LlavaConfig).from_pretrained(checkpoint)
    fields = config.to_dict()
    is_routed = fields.pop("model_type") == "dpvr"
    if saturation_layer is not None:
        fields["saturation_layer"] = saturation_layer
    elif not is_routed:
        fields["saturation_layer"] = proportional_layer(config.text_config.num_hidden_layers)
    return DPVRConfig(**fields)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="FLOPs and KV-cache bytes of LLaVA and DPVR, 2 FLOPs a multiply-add.")
    parser.add_argument("checkpoint", nargs="?", help="Hub id or folder with a config.json; default: LLaVA-1.5-7B")
    parser.add_argument(
        "--saturation-layer", type=int, help="default: the checkpoint's, or the converter's for a LLaVA"
    )
    parser.add_argument("--vision-tokens", type=int, help="default: one image")
    parser.add_argument("--text-tokens", type=int, default=64, help="of the prompt (default: %(default)s)")
    args = parser.parse_args(arguments)
    for name in ("vision_tokens", "text_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give 0 or more")
    if args.vision_tokens == args.text_tokens == 0:
        parser.error("--vision-tokens 0 --text-tokens 0: a prompt has at least one token")
    try:
        config = _load_config(args.checkpoint, args.saturation_layer)
        vision_tokens = tokens_per_image(config) if args.vision_tokens is None else args.vision_tokens
        table = _table(config, vision_tokens, args.text_tokens)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    num_layers = config.text_config.num_hidden_layers
    print(f"S = {config.saturation_layer} of {num_layers}, {vision_tokens} vision + {args.text_tokens} text tokens")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, NOTHING))
