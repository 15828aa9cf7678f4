# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
FastV, VTW and PyramidDrop on the LLaVA of transformers, with what each costs: the methods that DPVR is compared with.

All three read the prompt once and drop vision tokens on the way, without training. A dropped token is computed by no
later layer and holds no key or value there. They differ in where, how many and which tokens are dropped:

    VTW (arXiv 2405.05803)           before layer K all vision tokens are dropped
    FastV (arXiv 2403.06764)         before layer K the share R of them that the last token of the prompt attended to
                                     least in layer K - 1, by the mean of its heads; so the authors' code. Their
                                     paper's text has all tokens of the prompt ask, which `fastv` does if told to
    PyramidDrop (arXiv 2410.17247)   before each of several layers a share of those that remain: the ones that the last
                                     token of the prompt attends to least by the query and keys of the layer to come

Layers count from 0, so K layers see all tokens, as in the authors' code. Written from the papers and checked against
the authors' repositories (pkunlp-icler/FastV, lzhxmu/VTW, Cooperx521/PyramidDrop) for which layer ranks and which
drops. Where the repositories differ among themselves, one rule holds for all three here, so that they can be compared:
the number of tokens kept is the floor of a share of the row's image tokens (FastV's rounds to the nearest), remaining
tokens keep their rotary positions (PyramidDrop's renumbers them), all images of a row are ranked together, and
generated tokens change nothing: what a row keeps, its prompt decides.

    model = PrunedLlava.from_pretrained("llava-hf/llava-1.5-7b-hf")
    model.stages = fastv(layer=2, ratio=0.5)        # or vtw(16), or pyramid_drop((8, 16, 24), 0.5), or () for dense
    model.generate(**inputs)

What it costs, one row, batch 1, V vision and T text tokens: layers after a drop are counted by `accounting.py` with
the vision tokens that remain. To rank c tokens, the last token's query and scores are computed once more, and
PyramidDrop computes keys of a layer that has not yet run (D hidden size, H heads and G key/value heads of size h):

    query      2 * D * H * h           times c where all tokens ask
    keys       2 * c * D * G * h       PyramidDrop only; FastV reads them from the cache
    scores     2 * c * H * h           times c where all tokens ask

Shapes: B batch, T tokens of the call, N tokens that remain, Q tokens that ask, D hidden size.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, LlavaConfig, LlavaForConditionalGeneration
from transformers.cache_utils import Cache, DynamicLayer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv
from transformers.models.llava.modeling_llava import LlavaModel, LlavaModelOutputWithPast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file may be run or imported from anywhere

from benchmarks import accounting
from benchmarks.accounting import Flops, LayerLoad
from benchmarks.caches import CACHE
from configuration_dpvr import BACKBONES, attention_window
from training.staged import pack, take

# Checkpoints name LLaVA's weights as transformers 4 did; classes that are not its own are left out of the renaming
for ours, llavas in (("PrunedLlava", "llava"), ("PrunedLlavaModel", "LlavaModel")):
    register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(llavas), overwrite=True)


@dataclass(frozen=True)
class Stage:
    """One drop.

    Attributes:
        layer: the first layer that no longer sees the dropped tokens, at least 1.
        share: of the row's image tokens, those that remain; never more than remained before.
        ranking_layer: whose attention ranks them: `layer - 1`, which has run, or `layer`, which has not.
        all_ask: whether the attention that a token gets from all tokens of the prompt ranks it, not from the last.
    """

    layer: int
    share: float
    ranking_layer: int
    all_ask: bool = False

    @property
    def ranks(self) -> bool:
        """Whether attention decides; not where all tokens go or stay."""
        return 0 < self.share < 1

    def num_kept(self, num_vision: int) -> int:
        return math.floor(self.share * num_vision + 1e-6)  # 0.29 * 100 is 28.999999999999996


def vtw(layer: int) -> tuple[Stage, ...]:
    """Visual token withdrawal: no vision token from `layer` (K) on."""
    return (Stage(layer, 0.0, layer - 1),)


def fastv(layer: int, ratio: float, all_ask: bool = False) -> tuple[Stage, ...]:
    """FastV: before `layer` (K) drop the share `ratio` (R) of the vision tokens that layer K - 1 attended to least:
    its last token, or all of them."""
    return (Stage(layer, 1.0 - ratio, layer - 1, all_ask),)


def pyramid_drop(layers: tuple[int, ...], share: float) -> tuple[Stage, ...]:
    """PyramidDrop: before each of `layers` keep the `share` of the remaining vision tokens that it attends to most."""
    return tuple(Stage(layer, share ** (i + 1), layer) for i, layer in enumerate(layers))


# Which tokens remain


def attention_received(
    layer: nn.Module,
    states: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    visible: torch.BoolTensor,
) -> torch.Tensor:
    """Attention weights of Q queries, their sum, the mean over heads: `(B, N)`.

    Args:
        layer: decoder layer whose query projection is used.
        states: `(B, Q, D)`, normalized input of `layer` at the tokens that ask.
        rotary: cosines and sines of their positions, each `(B, Q, head_dim)`.
        keys: `(B, key/value heads, N, head_dim)`, rotated, of the same layer.
        visible: `(B, Q, N)`, False at padding and at tokens after the one that asks.
    """
    attention = layer.self_attn
    queries = rotate(attention.q_proj(states), attention.head_dim, rotary)
    scores = queries @ repeat_kv(keys, attention.num_key_value_groups).transpose(2, 3) * attention.scaling
    scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    return (scores.softmax(-1, dtype=torch.float32).mean(1) * visible).sum(1)  # what padding asks counts nothing


def rotate(projected: torch.Tensor, head_dim: int, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Queries or keys `(B, N, heads * head_dim)` in the positions of `rotary`: `(B, heads, N, head_dim)`."""
    heads = projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return apply_rotary_pos_emb(heads[:, :0], heads, *rotary)[1]


# The tokens of a call on their way through the layers


@dataclass
class Tokens:
    """The tokens of a call that a layer sees, packed to the right so that new ones line up.

    Attributes:
        index: `(B, N)`, their columns in the call.
        valid: `(B, N)`, False where a row has fewer tokens than N.
        is_vision: `(B, N)`.
        rotary: cosines and sines of their positions, each `(B, N, head_dim)`.
        is_whole: whether they are the call as it is.
        is_ragged: False if `valid` is known to be True everywhere.
    """

    index: torch.LongTensor
    valid: torch.BoolTensor
    is_vision: torch.BoolTensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    is_whole: bool = False
    is_ragged: bool = True

    def select(self, kept: torch.BoolTensor, widths: list[int]) -> tuple["Tokens", torch.LongTensor]:
        """Those of `kept` `(B, N)`, by row as many as `widths` says, and where they were among these, `(B, N)`."""
        where, valid = pack(kept, max(widths))
        rotary = tuple(take(x, where) for x in self.rotary)
        index, is_vision = self.index.gather(1, where), (self.is_vision & kept).gather(1, where)
        return Tokens(index, valid, is_vision, rotary, is_ragged=len(set(widths)) > 1), where


class SlotLayer(DynamicLayer):
    """Which slots of the layers behind a drop hold a token.

    Attributes:
        is_ragged: whether some of those that the prompt filled hold none.
    """

    is_ragged = True


def choose(tokens: Tokens, scores: torch.Tensor, num_kept: torch.LongTensor) -> torch.BoolTensor:
    """The vision tokens with the highest scores `(B, N)`, the earlier of equals, of each row `num_kept` `(B,)`: where
    they are, `(B, N)`."""
    order = scores.masked_fill(~tokens.is_vision, -math.inf).argsort(dim=-1, descending=True, stable=True)
    is_high = torch.arange(order.shape[1], device=order.device) < num_kept[:, None]
    return torch.zeros_like(tokens.is_vision).scatter(1, order, is_high)


def put(tensor: torch.Tensor, tokens: Tokens, update: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` `(B, T, D)` with `update` `(B, N, D)` in the columns of `tokens`."""
    if tokens.is_whole:
        return update
    if tokens.is_ragged:
        update = torch.where(tokens.valid[..., None], update, take(tensor, tokens.index))
    return tensor.scatter(1, tokens.index[..., None].expand_as(update), update)


class PrunedLlavaModel(LlavaModel):
    """LLaVA without its head, whose decoder drops vision tokens before the layers that `stages` names."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.stages: tuple[Stage, ...] = ()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        last_column: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """As LLaVA's, but for hidden states and attentions, which are not recorded. `last_hidden_state` is
        `(B, T, D)`; that of a dropped token is its embedding.

        Args:
            past_key_values, cache: a DynamicCache, by its name before or after transformers 5.24. Layers after a drop
                hold no key or value of a dropped token.
            mm_token_type_ids: `(B, T)`, 1 at vision tokens; needed where `inputs_embeds` come without `input_ids`.
            last_column: `(B,)`, the column of the prompt's last token, which ranks; by default each row's last token.
                Where a call reads the answer along with the prompt, this keeps the answer out of the ranking.

        Raises:
            ValueError: an image comes in a later call than the first, or which tokens are vision tokens is unknown.
        """
        if mm_token_type_ids is None and input_ids is None:
            raise ValueError("inputs_embeds do not tell which tokens are vision tokens: pass mm_token_type_ids too.")
        is_vision = input_ids == self.config.image_token_id if mm_token_type_ids is None else mm_token_type_ids == 1
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        images = (mm_encoder_outputs or {}).get("image")
        if images is None and pixel_values is not None:
            images = self.get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
            )
        if images is not None:
            features = torch.cat(list(images.pooler_output)).to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(
                self.get_placeholder_mask(input_ids, inputs_embeds, features), features
            )
        if use_cache is None:
            use_cache = self.config.text_config.use_cache
        cache = past_key_values if cache is None else cache
        if cache is None:  # FastV ranks by the keys in it, whether or not the caller wants it
            cache = DynamicCache(config=self.config.text_config)
        hidden_states = self.decode(inputs_embeds, is_vision, attention_mask, position_ids, cache, last_column)
        return LlavaModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: cache if use_cache else None})

    def decode(self, inputs_embeds: torch.Tensor, *arguments) -> torch.Tensor:
        """The decoder on embeddings `(B, T, D)`: its last, normalized states, `(B, T, D)`. Other arguments as in
        `run_layers`."""
        tokens, hidden_states = self.run_layers(inputs_embeds, *arguments)
        return put(inputs_embeds, tokens, self.language_model.norm(hidden_states))

    def run_layers(
        self,
        inputs_embeds: torch.Tensor,
        is_vision: torch.BoolTensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        cache: Cache,
        last_column: torch.LongTensor | None,
        first_layer: int = 0,
        end_layer: int | None = None,
    ) -> tuple[Tokens, torch.Tensor]:
        """The tokens that `end_layer` sees, and their states `(B, N, D)`.

        Args:
            first_layer: where to begin, if `inputs_embeds` are the states that reach this layer; no stage and no
                ranking layer may come before it.
            end_layer: the first layer not to run; by default all run.
        """
        layers = self.language_model.layers
        end_layer = len(layers) if end_layer is None else end_layer
        stages = {stage.layer: stage for stage in self.stages if stage.layer < len(layers)}
        is_prompt = cache.get_seq_length() == 0
        if is_prompt:  # behind the layers' keys and values: which slots of each stage hold a token
            cache.layers.extend(SlotLayer() for _ in stages)
        elif is_vision.shape[1] > 1 and is_vision.any():  # one token is a generated one: nothing to ask the device
            raise ValueError("Image tokens in a later call: read the whole prompt, all images included, in one call.")
        tokens = self.find_tokens(inputs_embeds, is_vision, attention_mask, position_ids, cache.get_seq_length())
        if last_column is None and is_prompt:
            last_column = torch.where(tokens.valid, tokens.index, 0).amax(1)

        mask = self.make_mask(inputs_embeds, attention_mask, cache, 0)
        # Counted before the layers run: on the way, the host would wait for the device at every stage
        num_kept, widths = self.count_kept(tokens, stages) if is_prompt else ({}, {})
        hidden_states = layer_input = inputs_embeds
        for i in range(first_layer, end_layer + 1):
            if i in stages:
                if is_prompt:
                    kept = tokens.valid if stages[i].share == 1 else tokens.valid & ~tokens.is_vision
                    if stages[i].ranks and i in num_kept:
                        scores = self.rank(stages[i], tokens, layer_input, hidden_states, last_column, cache)
                        kept = kept | choose(tokens, scores, num_kept[i])
                    tokens, where = tokens.select(kept, widths[i])
                    hidden_states = take(hidden_states, where)
                slot_layer = len(layers) + list(stages).index(i)
                slots = tokens.valid[:, None, :, None]
                slots = cache.update(slots, slots[..., :0], slot_layer)[0]
                if is_prompt:
                    cache.layers[slot_layer].is_ragged = tokens.is_ragged
                is_ragged = cache.layers[slot_layer].is_ragged
                if mask is not None or is_ragged:
                    # Where it is known to be needed, the host does not wait for the device to tell
                    mask = self.make_mask(
                        hidden_states, slots[:, 0, :, 0], cache, i, allow_is_causal_skip=not is_ragged
                    )
            if i < end_layer:
                layer_input = hidden_states
                hidden_states = layers[i](
                    hidden_states, attention_mask=mask, position_embeddings=tokens.rotary, **{CACHE: cache}
                )
        return tokens, hidden_states

    def count_kept(
        self, tokens: Tokens, stages: dict[int, Stage]
    ) -> tuple[dict[int, torch.LongTensor], dict[int, list[int]]]:
        """By stage how many vision tokens each row keeps, `(B,)`, where any does; and how many tokens in all, `B`
        numbers."""
        marks = torch.stack([tokens.valid & ~tokens.is_vision, tokens.is_vision])
        num_text, num_vision = marks.sum(-1).tolist()
        num_kept = {i: [stage.num_kept(n) for n in num_vision] for i, stage in stages.items()}
        widths = {i: [sum(pair) for pair in zip(num_text, kept, strict=True)] for i, kept in num_kept.items()}
        num_kept = {i: torch.tensor(kept, device=marks.device) for i, kept in num_kept.items() if any(kept)}
        return num_kept, widths

    def find_tokens(
        self,
        inputs_embeds: torch.Tensor,
        is_vision: torch.BoolTensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        num_seen: int,
    ) -> Tokens:
        """All tokens of a call."""
        length = is_vision.shape[1]
        valid = torch.ones_like(is_vision) if attention_mask is None else attention_mask[:, -length:].bool()
        columns = torch.arange(length, device=is_vision.device)
        position_ids = columns[None] + num_seen if position_ids is None else position_ids
        rotary = self.language_model.rotary_emb(inputs_embeds, position_ids=position_ids)
        rotary = tuple(x.expand(len(valid), -1, -1) for x in rotary)
        return Tokens(columns.expand_as(is_vision), valid, is_vision & valid, rotary, is_whole=True)

    def rank(
        self,
        stage: Stage,
        tokens: Tokens,
        layer_input: torch.Tensor,
        hidden_states: torch.Tensor,
        last_column: torch.LongTensor,
        cache: Cache,
    ) -> torch.Tensor:
        """Attention that the prompt's last token, or all of it, pays to each of `tokens`, `(B, N)`.

        Args:
            layer_input, hidden_states: `(B, N, D)`, input and output of the layer before `stage.layer`.
            last_column: `(B,)`.
        """
        layer = self.language_model.layers[stage.ranking_layer]
        visible = tokens.valid & (tokens.index <= last_column[:, None])
        if stage.all_ask:
            asking = torch.arange(visible.shape[1], device=visible.device).expand_as(visible)
            is_earlier = tokens.index[:, None] <= tokens.index[..., None]
            seen = is_earlier & visible[..., None] & visible[:, None]
        else:
            asking = torch.where(visible, tokens.index, -1).argmax(1, keepdim=True)
            seen = visible[:, None]  # the last of them asks
        if stage.ranking_layer == stage.layer:
            normalized = layer.input_layernorm(hidden_states)
            keys = rotate(layer.self_attn.k_proj(normalized), layer.self_attn.head_dim, tokens.rotary)
            states = take(normalized, asking)
        else:
            keys = cache.layers[stage.ranking_layer].keys
            states = layer.input_layernorm(take(layer_input, asking))
        return attention_received(layer, states, tuple(take(x, asking) for x in tokens.rotary), keys, seen)

    def make_mask(
        self, hidden_states: torch.Tensor, slots: torch.Tensor | None, cache: Cache, layer_idx: int, **options
    ) -> torch.Tensor | None:
        """Causal mask of the layers from `layer_idx` on. `slots` `(B, seen + N)` is 0 or False at padding; `options`
        of `create_causal_mask`."""
        config, num_tokens = self.language_model.config, cache.get_seq_length(layer_idx) + hidden_states.shape[1]
        window = attention_window(config)
        if window and num_tokens > window:
            raise ValueError(
                f"{num_tokens} tokens exceed text_config.sliding_window={window}; keep within the window."
            )
        return create_causal_mask(
            config=config,
            inputs_embeds=hidden_states,
            attention_mask=slots,
            layer_idx=layer_idx,
            **{CACHE: cache},
            **options,
        )


class PrunedLlava(LlavaForConditionalGeneration):
    """LLaVA with a language modeling head that drops vision tokens; loads any LLaVA checkpoint of a backbone that DPVR
    routes. `stages` may be set at any time, before a prompt is read; without, it is a dense LLaVA.

    Raises:
        ValueError: for another backbone, whose attention may rank tokens in other ways, and for prompts beyond a
            sliding window.
    """

    def __init__(self, config: LlavaConfig):
        if (backbone := config.text_config.model_type) not in BACKBONES:
            raise ValueError(f"text_config.model_type={backbone!r} is none of {', '.join(BACKBONES)}.")
        super().__init__(config)
        self.model = PrunedLlavaModel(config)
        self.post_init()

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.model.stages

    @stages.setter
    def stages(self, stages: tuple[Stage, ...]) -> None:
        """Raises ValueError for stages that are not in order, or that drop before any layer has seen the image."""
        layers = [stage.layer for stage in stages]
        shares = [stage.share for stage in stages]
        if layers != sorted(set(layers)) or (layers and layers[0] < 1):
            raise ValueError(f"Tokens are dropped before layers {layers}: they must increase and start at 1 or later.")
        if shares != sorted(shares, reverse=True) or any(not 0 <= share <= 1 for share in shares):
            raise ValueError(
                f"Shares {shares} of the image tokens remain: they must fall, from 1 or less to 0 or more."
            )
        self.model.stages = tuple(stages)


# What it costs


def vision_tokens_by_layer(config: LlavaConfig, stages: tuple[Stage, ...], vision_tokens: int) -> list[int]:
    """Vision tokens that each decoder layer sees."""
    counts = [vision_tokens] * config.text_config.num_hidden_layers
    for stage in stages:
        counts[stage.layer :] = [stage.num_kept(vision_tokens)] * len(counts[stage.layer :])
    return counts


def prefill_loads(
    config: LlavaConfig, stages: tuple[Stage, ...], vision_tokens: int, text_tokens: int
) -> list[LayerLoad]:
    """The load of every layer when a prompt is read."""
    counts = vision_tokens_by_layer(config, stages, vision_tokens)
    return [LayerLoad("joint", count + text_tokens, count + text_tokens, count + text_tokens) for count in counts]


def decode_loads(
    config: LlavaConfig, stages: tuple[Stage, ...], vision_tokens: int, text_tokens: int
) -> list[LayerLoad]:
    """The load of every layer when one text token follows a cached prompt."""
    counts = vision_tokens_by_layer(config, stages, vision_tokens)
    return [LayerLoad("joint", 1, 1, count + text_tokens + 1) for count in counts]


def ranking_flops(config: LlavaConfig, stages: tuple[Stage, ...], vision_tokens: int, text_tokens: int) -> int:
    """FLOPs of choosing the tokens that remain, beside those of the layers."""
    text = config.text_config
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query_width, key_width = text.num_attention_heads * head_size, text.num_key_value_heads * head_size
    counts = vision_tokens_by_layer(config, stages, vision_tokens)
    flops = 0
    for stage in stages:
        if not stage.ranks or stage.layer >= len(counts) or not counts[stage.layer]:
            continue
        ranked = counts[stage.layer - 1] + text_tokens
        num_asking = ranked if stage.all_ask else 1
        flops += num_asking * (2 * text.hidden_size * query_width + 2 * ranked * query_width)
        if stage.ranking_layer == stage.layer:
            flops += 2 * ranked * text.hidden_size * key_width
    return flops


def prefill_flops(
    config: LlavaConfig, stages: tuple[Stage, ...], vision_tokens: int, text_tokens: int, num_logits: int = 1
) -> Flops:
    """FLOPs of reading a prompt; arguments and errors as in [`accounting.prefill_flops`]."""
    layers = accounting.decoder_flops(config, prefill_loads(config, stages, vision_tokens, text_tokens))
    ranking = ranking_flops(config, stages, vision_tokens, text_tokens)
    dense = accounting.prefill_flops(config, vision_tokens, text_tokens, num_logits=num_logits)
    return replace(dense, decoder=layers + ranking)


def decode_flops(config: LlavaConfig, stages: tuple[Stage, ...], vision_tokens: int, text_tokens: int) -> Flops:
    """FLOPs of one more text token after a cached prompt."""
    loads = decode_loads(config, stages, vision_tokens, text_tokens)
    dense = accounting.decode_flops(config, vision_tokens, text_tokens)
    return replace(dense, decoder=accounting.decoder_flops(config, loads))


def cache_bytes(
    config: LlavaConfig, stages: tuple[Stage, ...], vision_tokens: int, text_tokens: int, itemsize: int = 2
) -> int:
    """Bytes of the keys and values in the cache after a prompt."""
    one_position = sum(accounting.cache_bytes(config, 0, 1, itemsize).values())  # of all layers
    num_positions = sum(load.new for load in prefill_loads(config, stages, vision_tokens, text_tokens))
    return one_position // config.text_config.num_hidden_layers * num_positions
