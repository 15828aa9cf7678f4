"""The slow, plain meaning of DPVR-LF, written apart from the model: every token passes every layer, masks stand in for
routing, no cache, no padding, one row at a time, all arithmetic from the weights by their names."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of `(heads, T, head_dim)`, halves convention of Llama."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / theta ** (torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def decoder_layer(x: Tensor, weights: dict[str, Tensor], prefix: str, config, visible: Tensor) -> Tensor:
    """One Llama, Mistral or Qwen2 layer on `(T, D)`; `visible` `(T, T)` says which key a query may see."""

    def linear(y: Tensor, name: str) -> Tensor:
        return torch.nn.functional.linear(y, weights[f"{prefix}{name}.weight"], weights.get(f"{prefix}{name}.bias"))

    def heads(y: Tensor) -> Tensor:
        return y.view(len(y), -1, head_dim).transpose(0, 1)

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = torch.arange(len(x), dtype=torch.float32)
    theta = config.rope_parameters["rope_theta"]

    y = rms_norm(x, weights[f"{prefix}input_layernorm.weight"], config.rms_norm_eps)
    query = rotate(heads(linear(y, "self_attn.q_proj")), positions, theta)
    key = rotate(heads(linear(y, "self_attn.k_proj")), positions, theta)
    value = heads(linear(y, "self_attn.v_proj"))
    repeats = len(query) // len(key)
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    scores = (query @ key.transpose(1, 2) / head_dim**0.5).masked_fill(~visible, -1e9)
    x = x + linear((scores.softmax(-1) @ value).transpose(0, 1).reshape(len(x), -1), "self_attn.o_proj")

    y = rms_norm(x, weights[f"{prefix}post_attention_layernorm.weight"], config.rms_norm_eps)
    gate = torch.nn.functional.silu(linear(y, "mlp.gate_proj"))
    return x + linear(gate * linear(y, "mlp.up_proj"), "mlp.down_proj")


@torch.no_grad()
def row_logits(model, input_ids: Tensor, is_vision: Tensor, image_features: Tensor | None) -> Tensor:
    """Logits `(T, vocabulary)` of one row without padding.

    Args:
        model: read for its configuration and its weights alone.
        input_ids: `(T,)`.
        is_vision: `(T,)`.
        image_features: `(number of vision tokens, D)`.
    """
    config, text = model.config, model.config.text_config
    weights = {name: weight.float() for name, weight in model.state_dict().items()}
    x = weights["model.language_model.embed_tokens.weight"][input_ids]
    if is_vision.any():
        x = x.clone()
        x[is_vision] = image_features.float()

    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    layer = "model.language_model.layers.{}.".format
    fusion = text.num_hidden_layers - config.num_fusion_layers
    for i in range(config.saturation_layer):
        x = decoder_layer(x, weights, layer(i), text, causal)
    vision = x
    for i in range(config.num_side_layers):
        vision = decoder_layer(vision, weights, f"model.side_branch.layers.{i}.", text, causal & is_vision)
    for i in range(config.saturation_layer, fusion):
        x = decoder_layer(x, weights, layer(i), text, causal & ~is_vision)
    x = torch.where(is_vision[:, None], vision, x)
    for i in range(fusion, text.num_hidden_layers):
        x = decoder_layer(x, weights, layer(i), text, causal)
    x = rms_norm(x, weights["model.language_model.norm.weight"], text.rms_norm_eps)
    return x @ weights["lm_head.weight"].T


@torch.no_grad()
def batch_logits(model, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None) -> list[Tensor]:
    """Logits of the real tokens of each row of a padded batch, `(tokens of the row, vocabulary)` each."""
    features = None
    if pixel_values is not None:
        features = torch.cat(list(model.model.get_image_features(pixel_values, return_dict=True).pooler_output))
    logits, start = [], 0
    for row_ids, row_mask in zip(input_ids, attention_mask.bool(), strict=True):
        ids = row_ids[row_mask]
        is_vision = ids == model.config.image_token_id
        stop = start + int(is_vision.sum())
        logits.append(row_logits(model, ids, is_vision, features[start:stop] if features is not None else None))
        start = stop
    return logits
