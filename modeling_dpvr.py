# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
DPVR-LF, dual-path vision routing with late fusion (arXiv 2606.09131), on the LLaVA of transformers.

For LLaVA-1.5-7B (L = 32 layers, saturation layer S = 18, first fusion layer F = 31):

    embeddings + image features
        |
    layers 0..S-1        vision and text tokens together, as in LLaVA
        |------------------------.
    layers S..F-1            side branch
    text tokens only         vision tokens only, `num_side_layers` decoder layers, trainable
        |------------------------'
    layers F..L-1        both streams in their original order
        |
    norm, lm_head

Text-only layers hold no state of a vision token, neither in their tensors nor in the KV cache. Rows of a batch may
hold different numbers of vision tokens: each stream of a row is packed to the right, so that new tokens line up.

Everything that routing does not change is imported: vision tower, projector, decoder layers, rotary embedding, masks,
caches, loss and generation. Shapes: B batch, T tokens of this call, N tokens of one stream, D hidden size.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModel,
    LlavaModelOutputWithPast,
    LlavaPreTrainedModel,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.output_capturing import capture_outputs, selected_hidden_states

from .configuration_dpvr import AUTO_MAP, DPVRConfig, attention_window

logger = logging.get_logger(__name__)

# LLaVA-1.5 checkpoints name their weights as transformers 4 did. Custom code is left out of transformers' own renaming
# unless it registers; `overwrite`, because every copy of this file is imported under its own module name.
for ours, llavas in (("dpvr", "llava"), ("DPVRModel", "LlavaModel")):
    register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(llavas), overwrite=True)

# Transformers 5.24 renamed `past_key_values` to `cache`, as an argument and in outputs
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
IMAGES = "image_outputs" if "image_outputs" in LlavaModelOutputWithPast.__dataclass_fields__ else "image_hidden_states"


def warn_of_the_old_name(forward):
    """Says, as LLaVA does where transformers calls it `cache`, that `past_key_values` will go."""
    return forward if CACHE == "past_key_values" else deprecate_kwarg("past_key_values", "5.40.0", CACHE)(forward)


@dataclass
class Stream:
    """The tokens of one kind, vision or text, of each row, packed to the right.

    Attributes:
        index (`torch.LongTensor` of shape `(B, N)` or None): columns of the call, within a row all different; None if
            the stream is the whole call as it is, which costs no copy.
        valid (`torch.BoolTensor` of shape `(B, N)`): False where a row has fewer than N tokens of this kind.
        is_ragged: False if `valid` is known to be True everywhere.
    """

    index: torch.LongTensor | None
    valid: torch.BoolTensor
    is_ragged: bool

    @property
    def columns(self) -> torch.LongTensor:
        """Columns of the call, `(B, N)`."""
        if self.index is not None:
            return self.index
        return torch.arange(self.valid.shape[1], device=self.valid.device).expand_as(self.valid)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Columns of this stream: `(B or 1, T, D)` to `(B, N, D)`."""
        if self.index is None:
            return tensor
        index = self.index.to(tensor.device)
        return tensor.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))

    def put(self, tensor: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` `(B, T, D)` with `update` `(B, N, D)` in the columns of this stream."""
        update = update.to(tensor.device, tensor.dtype)
        if self.index is None:
            return update
        if self.is_ragged:
            update = torch.where(self.valid[..., None].to(tensor.device), update, self.take(tensor))
        return tensor.scatter(1, self.index.to(tensor.device)[..., None].expand_as(update), update)


def pack_stream(belongs: torch.BoolTensor, counts: list[int], min_width: int = 0) -> Stream | None:
    """The stream of the tokens where `belongs` `(B, T)` is True, None if there are none.

    The sort is stable and puts False first, so the last columns are each row's tokens in their order.

    Args:
        counts: tokens of each row.
        min_width: least width of the stream; what no row fills is padding.
    """
    width = max(*counts, min_width)
    if width == 0:
        return None
    index = belongs.to(torch.uint8).argsort(dim=-1, stable=True)[:, belongs.shape[1] - width :]
    return Stream(index, belongs.gather(1, index), is_ragged=min(counts) < width)


@torch.compiler.disable
def split_streams(
    is_vision: torch.BoolTensor, is_token: torch.BoolTensor, num_features: int | None = None, min_vision: int = 0
) -> tuple[Stream | None, Stream | None]:
    """Text and vision streams of a call, None where no row has such a token. Padding belongs to neither.

    Args:
        is_vision: `(B, T)`, True at vision tokens.
        is_token: `(B, T)`, False at padding.
        num_features: image features that come with the call, if any do.
        min_vision: least width of the vision stream; what no row fills is padding.

    Raises:
        ValueError: there are not as many image features as vision tokens.
    """
    marks = torch.stack([is_vision, is_token & ~is_vision, is_token & is_vision])
    num_marked, num_text, num_vision = marks.sum(-1).tolist()  # the routing's only wait for the device
    if num_features not in (None, sum(num_marked)):
        raise ValueError(
            f"Image features and image tokens do not match: the prompts hold {sum(num_marked)} image tokens (by row: "
            f"{num_marked}) but the images give {num_features} features. Each image needs as many image tokens as "
            "it has features: let the processor expand <image>, and pass every image of the batch."
        )
    return pack_stream(marks[1], num_text), pack_stream(marks[2], num_vision, min_vision)


class StreamLayer(DynamicLayer):
    """KV cache of a layer that one stream alone passes. How many of its slots a crop removes, `SlotLayer` knows."""

    def crop(self, tokens_to_remove: int) -> None:
        pass


class SlotLayer(DynamicLayer):
    """For each slot of a stream's KV cache the column that it came from, plus 1; 0 in slots that pad a shorter row.

    A row's slots cannot be told from masks alone: how a stream is padded depends on how the prompt was cut into calls.
    As a layer of the cache they follow when the cache is reordered, repeated or cropped.
    """

    def __init__(self, joint_layer: DynamicLayer, stream_layers: list[DynamicLayer]):
        super().__init__()
        self.joint_layer = joint_layer  # holds every column
        self.stream_layers = stream_layers
        self.is_ragged = False  # whether a slot may be padding

    def reset(self) -> None:
        super().reset()
        self.is_ragged = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the columns that `joint_layer`, cropped before this layer, has lost, and the last slots that no row
        needs any more, here and in the layers of the stream."""
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.keys = torch.where(self.keys > self.joint_layer.get_seq_length(), 0, self.keys)
        self.is_ragged = True
        used = self.keys.amax((0, 1, 3)).nonzero()
        num_kept = int(used[-1]) + 1 if len(used) else 0
        for layer in [self, *self.stream_layers]:
            num_slots = layer.get_seq_length()
            if num_slots < num_kept:
                raise ValueError(
                    f"A layer of the cache ({type(layer).__name__}) dropped {abs(tokens_to_remove)} tokens, but "
                    "text-only layers hold fewer of those. Crop a DynamicCache, or generated tokens only."
                )
            if num_slots > num_kept:
                layer.keys, layer.values = layer.keys[..., :num_kept, :], layer.values[..., :num_kept, :]


class StaticStreamLayer(StaticLayer):
    """`StreamLayer` of a static cache."""

    def crop(self, tokens_to_remove: int) -> None:
        pass


class StaticSlotLayer(StaticLayer):
    """`SlotLayer` of a static cache: nothing is cut off, the last slots that no row needs any more are free again."""

    def __init__(self, joint_layer: StaticLayer, stream_layers: list[StaticLayer]):
        super().__init__(joint_layer.max_cache_len)
        self.joint_layer = joint_layer
        self.stream_layers = stream_layers

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.keys.masked_fill_(self.keys > self.joint_layer.get_seq_length(), 0)
        ends = torch.arange(1, self.max_cache_len + 1, device=self.keys.device)
        num_kept = torch.where(self.keys.amax((0, 1, 3)) > 0, ends, 0).amax()
        for layer in [self, *self.stream_layers]:
            layer.cumulative_length.copy_(num_kept)  # in place, for compiled graphs


@dataclass
class StreamPlan:
    """All that the layers of one stream need beside its hidden states.

    Attributes:
        stream: the tokens of this call that belong to it.
        rotary: cosines and sines of the tokens' original positions, each `(B, N, head_dim)`.
        mask: attention mask over the slots of the stream's cache, in the form that the attention backend takes.
        slots: column of each slot plus 1, `(B, slots)`, 0 where a slot is padding.
        cache: the KV cache that the layers of the stream extend, or None.
    """

    stream: Stream
    rotary: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None
    slots: torch.LongTensor
    cache: Cache | None


@dataclass
class Call:
    """What a call says of its tokens.

    Attributes:
        attention_mask: 2D `(B, seen + T)`, 4D `(B, 1, T, columns)` or None.
        position_ids: `(B or 1, T)`, rotary positions.
        columns: `(T,)`, the place of the tokens in the whole sequence, those in the cache counted.
        rotary: cosines and sines of `position_ids`, each `(B or 1, T, head_dim)`.
        cache: the KV cache that the call extends, or None.
    """

    attention_mask: torch.Tensor | None
    position_ids: torch.LongTensor
    columns: torch.LongTensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    cache: Cache | None

    @property
    def padding_mask(self) -> torch.Tensor | None:
        is_2d = self.attention_mask is not None and self.attention_mask.ndim == 2
        return self.attention_mask if is_2d else None

    def last(self, num_tokens: int, cache: Cache) -> "Call":
        """The call of the last `num_tokens` alone, after the others went into `cache`."""
        mask = self.attention_mask
        return Call(
            attention_mask=mask if mask is None or mask.ndim == 2 else mask[:, :, -num_tokens:],
            position_ids=self.position_ids[:, -num_tokens:],
            columns=self.columns[-num_tokens:],
            rotary=tuple(x[:, -num_tokens:] for x in self.rotary),
            cache=cache,
        )


def select_mask(mask: torch.Tensor, rows: torch.LongTensor, slots: torch.LongTensor) -> torch.Tensor:
    """The part of a 4D mask `(B or 1, 1, T, columns)`, boolean or additive, that a stream's tokens and slots need."""
    mask = mask.expand(len(rows), -1, -1, -1)
    mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    columns = (slots - 1).clamp(min=0)[:, None, None].expand(-1, *mask.shape[1:3], -1)
    is_visible, mask = (slots > 0)[:, None, None], mask.gather(3, columns)
    if mask.dtype == torch.bool:
        return mask & is_visible
    return mask.masked_fill(~is_visible, torch.finfo(mask.dtype).min)


class SideBranch(nn.Module):
    """Decoder layers of the backbone's own class that only vision tokens pass. The trainable part of DPVR.

    Layer i caches at `num_hidden_layers + i`, behind the decoder's own layers.
    """

    def __init__(self, config: DPVRConfig, backbone: nn.Module):
        super().__init__()
        make_layer = type(backbone.layers[0])
        self.layers = nn.ModuleList(
            make_layer(backbone.config, config.saturation_layer) for _ in range(config.num_side_layers)
        )
        for i, layer in enumerate(self.layers):
            layer.self_attn.layer_idx = config.text_config.num_hidden_layers + i
        # Found by `post_init` of the model around it: the side branch is sharded as the decoder's layers are.
        self._tp_plan = _layer_plan(config.text_config.base_model_tp_plan)
        self._fsdp_plan = _layer_plan(config.text_config.base_model_fsdp_plan)

    def forward(self, hidden_states: torch.Tensor, plan: StreamPlan, **kwargs) -> torch.Tensor:
        return run_layers(self.layers, hidden_states, stream_arguments(plan, **kwargs))


def _layer_plan(plan: dict | None) -> dict:
    return {name: style for name, style in (plan or {}).items() if name.startswith("layers.")}


def joint_mask(decoder: nn.Module, hidden_states: torch.Tensor, call: Call, layer_idx: int = 0, **options):
    """Mask of a layer that sees both streams, in the form that the attention backend takes.

    Args:
        hidden_states: `(B, T, D)`, gives shape, dtype and device.
        layer_idx: whose cache sizes it; else transformers takes the first that is not sliding, maybe a side branch's.
        options: of `create_causal_mask`.
    """
    return create_causal_mask(
        config=decoder.config,
        inputs_embeds=hidden_states,
        attention_mask=call.attention_mask,
        position_ids=call.position_ids,
        layer_idx=layer_idx,
        **{CACHE: call.cache},
        **options,
    )


def joint_arguments(call: Call, mask: torch.Tensor | None, **kwargs) -> dict:
    """Arguments of the layers that see both streams."""
    return {
        "attention_mask": mask,
        "position_embeddings": call.rotary,
        "position_ids": call.position_ids,
        CACHE: call.cache,
        **kwargs,
    }


def stream_arguments(plan: StreamPlan, **kwargs) -> dict:
    """Arguments of the layers that one stream passes.

    Without `position_ids`: flash attention reads gaps in them as borders of packed sequences.
    """
    return {"attention_mask": plan.mask, "position_embeddings": plan.rotary, CACHE: plan.cache, **kwargs}


def run_layers(layers: list[nn.Module] | nn.ModuleList, hidden_states: torch.Tensor, arguments: dict) -> torch.Tensor:
    for layer in layers:
        hidden_states = layer(hidden_states, **arguments)
    return hidden_states


def run_stream(
    layers: list[nn.Module] | SideBranch, hidden_states: torch.Tensor, plan: StreamPlan | None, **kwargs
) -> torch.Tensor:
    """`hidden_states` `(B, T, D)` whose tokens of one stream have passed `layers`; the others stay as they are."""
    if plan is None:
        return hidden_states
    states = plan.stream.take(hidden_states)
    if isinstance(layers, list):
        states = run_layers(layers, states, stream_arguments(plan, **kwargs))
    else:  # as a module, for hooks and wrappers
        states = layers(states, plan, **kwargs)
    return plan.stream.put(hidden_states, states)


def may_overlap(
    layers: list[nn.Module],
    hidden_states: torch.Tensor,
    text: StreamPlan | None,
    vision: StreamPlan | None,
    cache: Cache | None,
) -> bool:
    """Whether both kinds of tokens may pass their `layers` at once, vision tokens in a CUDA stream of their own.

    Not where others order the work: autograd, compilers, whatever brings weights with a layer's `forward`, parallel
    processes, caches that come and go. And not where keys of the side branch are kept, which outlive the wait for it.
    """
    if text is None or vision is None or vision.cache is not None or not hidden_states.is_cuda:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or (cache is not None and cache.offloading):
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    parts = [part for layer in layers for part in layer.modules()]
    return not any("forward" in part.__dict__ or part._compiled_call_impl is not None for part in parts)


@functools.cache
def side_cuda_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each GPU, since each has memory set aside for it."""
    return torch.cuda.Stream(device)


def run_both_streams(
    text_only_layers: list[nn.Module],
    side_branch: SideBranch,
    hidden_states: torch.Tensor,
    text: StreamPlan,
    vision: StreamPlan,
    **kwargs,
) -> torch.Tensor:
    """`hidden_states` `(B, T, D)` on a GPU after `run_stream` of both kinds of tokens; neither reads the other's."""
    main, side = torch.cuda.current_stream(hidden_states.device), side_cuda_stream(hidden_states.device)
    side.wait_stream(main)
    try:
        with torch.cuda.stream(side):
            routed = run_stream(side_branch, hidden_states, vision, **kwargs)
        text_states = text.stream.take(hidden_states)
        text_states = run_layers(text_only_layers, text_states, stream_arguments(text, **kwargs))
    finally:  # also after an error: what `side` still reads is freed, for `main` to write to
        main.wait_stream(side)
    routed.record_stream(main)  # its memory is that of `side`
    return text.stream.put(routed, text_states)


def can_read_last(layer: nn.Module, cache: Cache | None) -> bool:
    """Whether `layer` may get its tokens in two parts: first, for keys and values only, those nobody reads.

    Not where something else runs the layer's `forward` (weights that come and go with it, gradient checkpointing) or
    looks at what its parts get (PEFT's aLoRA counts tokens from the end), and not where a cache holds something other
    than the keys and values that it is given.
    """
    is_wrapped = any("forward" in x.__dict__ for x in (layer, layer.self_attn)) or any(
        part._forward_pre_hooks for part in layer.modules()
    )
    is_checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
    is_plain = cache is None or (
        type(cache.layers[layer.self_attn.layer_idx]) in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
        and not cache.offloading
    )
    return is_plain and not is_wrapped and not is_checkpointed


def add_keys_and_values(layer: nn.Module, hidden_states: torch.Tensor, rotary: tuple, cache: Cache) -> None:
    """Puts the keys and values of `(B, N, D)`, tokens whose outputs nobody reads, into the cache of `layer`."""
    attention, hidden_states = layer.self_attn, layer.input_layernorm(hidden_states)
    shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(hidden_states).view(shape).transpose(1, 2)
    values = attention.v_proj(hidden_states).view(shape).transpose(1, 2)
    _, keys = apply_rotary_pos_emb(keys[:, :0], keys, *rotary)
    cache.update(keys, values, attention.layer_idx)


def read_last(
    decoder: nn.Module,
    layer: nn.Module,
    hidden_states: torch.Tensor,
    call: Call,
    mask: torch.Tensor | None,
    num_read: int,
    **kwargs,
) -> torch.Tensor:
    """`layer` on `(B, T, D)` for the last `num_read` tokens alone: `(B, num_read, D)`. `mask` is that of all.

    A mask is made anew where there is no other way: some are made by looking at the padding, for which the host would
    wait until the device has come so far.
    """
    num_unread = hidden_states.shape[1] - num_read
    cache = DynamicCache() if call.cache is None else call.cache
    add_keys_and_values(layer, hidden_states[:, :num_unread], tuple(x[:, :num_unread] for x in call.rotary), cache)
    states, last = hidden_states[:, num_unread:], call.last(num_read, cache)
    layer_idx = layer.self_attn.layer_idx
    sees_all = mask is None and num_read == 1 and not isinstance(cache.layers[layer_idx], StaticLayer)
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        mask = mask[:, :, -num_read:]
    elif not sees_all and not is_flash_attention_requested(decoder.config):  # whose masks are of keys alone
        mask = joint_mask(decoder, states, last, layer_idx, allow_is_causal_skip=False)
    return layer(states, **joint_arguments(last, mask, **kwargs))


@capture_outputs
def route(
    decoder: nn.Module,
    side_branch: SideBranch,
    config: DPVRConfig,
    hidden_states: torch.Tensor,
    text: StreamPlan | None,
    vision: StreamPlan | None,
    call: Call,
    mask: torch.Tensor | None,
    num_read: int = 0,
    **kwargs,
) -> BaseModelOutputWithPast:
    """Dual-path routing through `decoder`, the text backbone of LLaVA, whose own recorders `capture_outputs` uses.

    Rotary phases come from the original positions in every stream. `mask` is that of the layers that see both streams.
    With `num_read`, only that many last positions are read: the last layer computes no others, `(B, num_read, D)`.
    """
    joint_layers, text_only_layers, fusion_layers = split_layers(decoder, config)
    joint = joint_arguments(call, mask, **kwargs)
    hidden_states = run_layers(joint_layers, hidden_states, joint)
    if may_overlap([*text_only_layers, side_branch], hidden_states, text, vision, call.cache):
        hidden_states = run_both_streams(text_only_layers, side_branch, hidden_states, text, vision, **kwargs)
    else:  # text first: with a frozen backbone, the graph begins at the side branch
        hidden_states = run_stream(text_only_layers, hidden_states, text, **kwargs)
        hidden_states = run_stream(side_branch, hidden_states, vision, **kwargs)
    hidden_states = run_layers(fusion_layers[:-1], hidden_states, joint)
    if 0 < num_read < hidden_states.shape[1] and can_read_last(fusion_layers[-1], call.cache):
        hidden_states = read_last(decoder, fusion_layers[-1], hidden_states, call, mask, num_read, **kwargs)
    else:
        hidden_states = run_layers(fusion_layers[-1:], hidden_states, joint)[:, -num_read:]  # -0 keeps all
    return BaseModelOutputWithPast(decoder.norm(hidden_states), call.cache)


def split_layers(decoder: nn.Module, config: DPVRConfig) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Joint, text-only and fusion layers of the decoder."""
    saturation, fusion, layers = config.saturation_layer, config.first_fusion_layer, list(decoder.layers)
    if len(layers) != config.text_config.num_hidden_layers:
        raise ValueError(
            f"text_config.num_hidden_layers={config.text_config.num_hidden_layers}, but the decoder has {len(layers)} "
            "layers: which of them fuse is unknown. Load or make the model with that number."
        )
    return layers[:saturation], layers[saturation:fusion], layers[fusion:]


def insert_image_features(
    inputs_embeds: torch.Tensor, is_vision: torch.BoolTensor, image_features: torch.Tensor
) -> torch.Tensor:
    """Puts image features `(number of vision tokens of the batch, D)` at the vision tokens of `(B, T, D)`."""
    is_vision = is_vision[..., None].to(inputs_embeds.device)
    return inputs_embeds.masked_scatter(is_vision, image_features.to(inputs_embeds.device, inputs_embeds.dtype))


def expand_outputs(
    outputs: BaseModelOutputWithPast, text: StreamPlan | None, config: DPVRConfig
) -> BaseModelOutputWithPast:
    """Gives what the text-only layers recorded the shapes of all tokens.

    Their hidden states `(B, N, D)` become `(B, T, D)`; a vision token keeps the state in which it was routed out.
    Their attentions `(B, H, N, slots)` become `(B, H, T, columns)`, zero in the rows and columns of vision tokens.
    """
    first, last = config.saturation_layer, config.first_fusion_layer
    if outputs.hidden_states:
        states = list(outputs.hidden_states)
        routed_out = states[first]
        if text is None:
            states[first + 1 : first + 1] = [routed_out] * (last - first)
        else:
            states[first + 1 : last + 1] = [text.stream.put(routed_out, x) for x in states[first + 1 : last + 1]]
        outputs.hidden_states = tuple(states)
    if outputs.attentions:
        attentions = list(outputs.attentions)
        if text is None:
            attentions[first:first] = [torch.zeros_like(attentions[0])] * (last - first)
        else:
            attentions[first:last] = [expand_attention(x, text, attentions[0].shape) for x in attentions[first:last]]
        outputs.attentions = tuple(attentions)
    return outputs


def expand_attention(attention: torch.Tensor, text: StreamPlan, shape: torch.Size) -> torch.Tensor:
    """Attention of the text stream `(B, H, N, slots)` among all tokens, `shape` `(B, H, T, columns)`."""
    attention = attention * (text.stream.valid[:, None, :, None] & (text.slots > 0)[:, None, None])
    columns = (text.slots - 1).clamp(min=0)[:, None, None].expand_as(attention)
    rows = attention.new_zeros(*attention.shape[:3], shape[3]).scatter_add(3, columns, attention)
    index = text.stream.columns[:, None, :, None].expand_as(rows)
    return attention.new_zeros(shape).scatter_add(2, index, rows)


def check_mask(
    attention_mask: torch.Tensor | None, shape: torch.Size, cache: Cache | None, num_seen: int | torch.Tensor
) -> None:
    """Refuses a mask that is no tensor, too short, of other rows, or 4D of another form than that of `(B, T, D)`,
    `shape`, with `num_seen` tokens in the cache."""
    if attention_mask is None:
        return
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(
            f"attention_mask is a {type(attention_mask).__name__}, of which streams cannot take a part. Pass a "
            "tensor, 2D or 4D."
        )
    given, (num_rows, length, _) = tuple(attention_mask.shape), shape
    if len(given) == 2:
        if given[0] not in (1, num_rows):
            raise ValueError(
                f"attention_mask has {given[0]} rows, but this call holds {num_rows}. Pass a mask of each row, or one "
                "of all."
            )
        # How many tokens a static cache holds is on the device: a mask too short for it fails where it is read
        if isinstance(num_seen, int) and given[1] < num_seen + length:
            raise ValueError(
                f"attention_mask covers {given[1]} tokens, but the cache holds {num_seen} and this call {length} "
                f"more. Pass a mask of {num_seen + length} columns."
            )
        return
    is_static = cache is not None and isinstance(cache.layers[0], StaticLayer)
    num_columns = cache.layers[0].max_cache_len if is_static else num_seen + length
    if len(given) != 4 or given[0] not in (1, num_rows) or given[2:] != (length, num_columns):
        raise ValueError(
            f"attention_mask has shape {given}, but this call holds {num_rows} rows of {length} tokens that "
            f"see {num_columns} columns. Pass a 2D mask, or one of shape (rows, 1, tokens, columns)."
        )
    if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise ValueError(
            f"The 4D attention_mask is of {attention_mask.dtype}. Pass one of torch.bool, True where a token "
            "is seen, or floats that are added to the scores."
        )


class DPVRPreTrainedModel(LlavaPreTrainedModel):
    config: DPVRConfig
    config_class = DPVRConfig

    @torch.no_grad()
    def initialize_weights(self):
        """Side-branch weights that a checkpoint lacks start as the identity map, so the model starts from LLaVA's own.

        Each layer is a copy of the saturation layer whose two output projections are zero. Here and not in
        `_init_weights`, which transformers skips for custom code on modules without parameters of their own.
        """
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and not module.is_custom_code():
                module.initialize_weights()  # LLaVA's parts, by rules that transformers skips below custom code
        super().initialize_weights()
        for model in (module for module in self.modules() if isinstance(module, DPVRModel)):
            if hasattr(model, "side_branch"):  # absent while LlavaModel's own constructor runs
                model.initialize_side_branch()

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; the code files and the entries of every auto class are written along."""
        self.config.auto_map = dict(AUTO_MAP)
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        self.config.auto_map = dict(AUTO_MAP)  # where the model without its head is saved, transformers changes it
        return saved


class DPVRModel(DPVRPreTrainedModel, LlavaModel):
    """LLaVA without its head, whose decoder routes vision tokens (see the figure at the top of this file)."""

    def __init__(self, config: DPVRConfig):
        config.check_routing()
        super().__init__(config)
        self.side_branch = SideBranch(config, self.language_model)
        self.post_init()
        self._pp_plan = {}  # LLaVA's describes a plain loop over the layers

    @property
    def _routing(self) -> tuple[int, int, int, int]:
        """What a cache is filled for."""
        config = self.config
        num_layers = config.text_config.num_hidden_layers
        return num_layers, config.saturation_layer, config.first_fusion_layer, config.num_side_layers

    def initialize_side_branch(self) -> None:
        source = self.language_model.layers[self.config.saturation_layer]
        for layer in self.side_branch.layers:
            for name, weight in layer.named_parameters():
                origin = source.get_parameter(name)
                is_loaded = getattr(weight, "_is_hf_initialized", False)  # from a checkpoint, and is kept
                if name.startswith(("self_attn.o_proj", "mlp.down_proj")):
                    initialization.zeros_(weight)
                elif is_loaded or weight.is_meta or not origin.is_meta:
                    initialization.copy_(weight, origin)
                else:
                    raise ValueError(
                        "The checkpoint lacks a layer of the side branch, which would start as a copy of the "
                        f"decoder's layer {self.config.saturation_layer}, but that one is offloaded to disk. Keep it "
                        "on a device (device_map), or convert the checkpoint first."
                    )

    @can_return_tuple
    @warn_of_the_old_name
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
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaModelOutputWithPast:
        """Arguments and errors as in [`DPVRForConditionalGeneration.forward`]; `last_hidden_state` is `(B, T, D)`, or
        `(B, logits_to_keep, D)` of the last tokens if that is a positive integer."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        cache = past_key_values if cache is None else cache
        image_outputs = image_features = None
        if pixel_values is not None or mm_encoder_outputs:
            image_outputs, image_features = self.encode_images(
                pixel_values,
                mm_encoder_outputs,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                **kwargs,
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        num_seen = 0 if cache is None else cache.get_seq_length()
        is_vision = self.find_vision_tokens(
            input_ids, inputs_embeds, mm_token_type_ids, image_features is not None, num_seen
        )

        if self.drops_caches():
            length = inputs_embeds.shape[1]
            num_masked = attention_mask.shape[1] if attention_mask is not None and attention_mask.ndim == 2 else length
            if int(num_seen) > 0 or num_masked > length:
                raise ValueError(
                    f"This call goes on from tokens in a cache ({int(num_seen)} there, {num_masked} in the mask), but "
                    "layers with gradient checkpointing drop caches. Go on in eval mode, or without checkpointing."
                )
            use_cache, cache = False, None
        elif use_cache is None:
            use_cache = self.config.text_config.use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config.text_config)
        outputs = self.decode(
            inputs_embeds, is_vision, image_features, attention_mask, position_ids, cache, logits_to_keep, **kwargs
        )
        images = {IMAGES: image_features if IMAGES == "image_hidden_states" else image_outputs}
        return LlavaModelOutputWithPast(**outputs, **images)

    def drops_caches(self) -> bool:
        """Whether the layers drop any cache, because backward would run them, and fill it, once more."""
        is_checkpointing = self.training and any(x.gradient_checkpointing for x in self.language_model.layers)
        # Until transformers 5.23 without gradients too
        return is_checkpointing and (torch.is_grad_enabled() or CACHE == "past_key_values")

    @torch.compiler.disable
    def encode_images(
        self, pixel_values: torch.Tensor | None, mm_encoder_outputs: dict | None, **kwargs
    ) -> tuple[BaseModelOutputWithPooling | None, torch.Tensor | None]:
        """Outputs of `get_image_features` and the features of all images, `(number of vision tokens, D)`, or None.

        Not compiled: LLaVA lists features by image, so each number of images would be compiled by itself. To compile
        the vision tower, compile `model.vision_tower`.

        Raises:
            ValueError: the images come twice, as pixels and as features, or no shape that the vision tower takes.
        """
        outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if outputs is not None:
                raise ValueError(
                    "Pass pixel_values or mm_encoder_outputs['image'], not both: they are the same images."
                )
            num_channels = getattr(self.config.vision_config, "num_channels", None)
            has_size = hasattr(self.config.vision_config, "image_size")  # else patches come one by one, or in any form
            is_shaped = (
                pixel_values.ndim == 4 and 0 not in pixel_values.shape and pixel_values.shape[1] == num_channels
            )
            if has_size and num_channels is not None and not is_shaped:
                raise ValueError(
                    f"pixel_values has shape {tuple(pixel_values.shape)}; the vision tower takes (number of images, "
                    f"{num_channels}, height, width). Leave pixel_values out where there is no image."
                )
            if kwargs.get("output_hidden_states") is not True:
                kwargs.pop("output_hidden_states", None)  # a selection is of the decoder's layers
            outputs = self.get_image_features(pixel_values, return_dict=True, **kwargs)
        if outputs is None:
            return None, None
        return outputs, torch.cat(list(outputs.pooler_output))

    def find_vision_tokens(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        mm_token_type_ids: torch.LongTensor | None,
        has_images: bool,
        num_seen: int | torch.Tensor,
    ) -> torch.BoolTensor | None:
        """Where this call holds vision tokens, `(B, T)`, or None if nowhere. Never guesses: it knows or raises.

        `mm_token_type_ids` says it. Without, image tokens among `input_ids` are vision tokens if images come with
        them. If none come, a single token after a filled cache is text, as it is when it was generated, and so is a
        whole prompt, as it is to LLaVA. A static cache tells how many tokens it holds, `num_seen`, on the device
        alone: it is asked where that decides, not at every token.
        """
        shape = inputs_embeds.shape[:2]
        if mm_token_type_ids is not None:
            if mm_token_type_ids.shape != shape:
                raise ValueError(
                    f"mm_token_type_ids has shape {tuple(mm_token_type_ids.shape)} but this call holds tokens of "
                    f"shape {tuple(shape)}. Pass those of the new tokens alone, 1 at image tokens and 0 elsewhere."
                )
            is_vision = mm_token_type_ids == 1
        elif input_ids is None and has_images:
            image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            is_vision = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        elif input_ids is None:
            raise ValueError(
                "inputs_embeds alone does not tell which tokens are vision tokens. Pass mm_token_type_ids of shape "
                f"{tuple(shape)}: 1 where inputs_embeds holds an image feature, 0 elsewhere (all zeros for text)."
            )
        elif not has_images and shape[1] == 1 and (isinstance(num_seen, torch.Tensor) or num_seen > 0):
            return None
        else:
            is_vision = input_ids == self.config.image_token_id
        if has_images:
            return is_vision
        if is_vision.any():
            if input_ids is None:
                return is_vision
            advice = (
                "but no image came with them. Pass pixel_values; or inputs_embeds that hold the image features, with "
                "mm_token_type_ids; or, if these are generated tokens and no images, mm_token_type_ids of zeros."
            )
            if mm_token_type_ids is not None or int(num_seen) > 0:
                raise ValueError(f"input_ids hold image tokens (by row: {is_vision.sum(-1).tolist()}) {advice}")
            # Without numbers: `warning_once` keeps every text that it has seen
            logger.warning_once(f"input_ids hold image tokens {advice} They are taken for text.")
        return None

    def decode(
        self,
        inputs_embeds: torch.Tensor,
        is_vision: torch.BoolTensor | None,
        image_features: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        cache: Cache | None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The decoder on embeddings `(B, T, D)`: finds the streams, routes them, gives outputs their usual shapes."""
        if False in (kwargs.get("is_causal"), getattr(self.language_model.config, "is_causal", None)):
            raise ValueError("is_causal=False: tokens that see later ones are not routed. Leave it out.")
        wanted = kwargs.get("output_hidden_states", self.language_model.config.output_hidden_states)
        if wanted:
            kwargs["output_hidden_states"] = True  # of all layers, until the states of text-only layers are expanded
        if cache is not None:
            self.add_stream_layers(cache)
            if cache.offloading:  # the layer prefetched after the decoder's last is the side branch's, not the first
                cache.layers[0].prefetch()
        is_packed = "cu_seq_lens_q" in kwargs
        call, text, vision, mask = self.plan_call(
            inputs_embeds, is_vision, attention_mask, position_ids, cache, image_features, is_packed
        )
        if image_features is not None:
            inputs_embeds = insert_image_features(inputs_embeds, is_vision, image_features)
        is_recorded = any(
            kwargs.get(name, getattr(self.language_model.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )
        outputs = route(
            self.language_model,
            self.side_branch,
            self.config,
            inputs_embeds,
            text,
            vision,
            call,
            mask,
            num_read=max(logits_to_keep, 0) if isinstance(logits_to_keep, int) and not is_recorded else 0,
            return_dict=True,
            **kwargs,
        )
        outputs = expand_outputs(outputs, text, self.config)
        if outputs.hidden_states and (selected := selected_hidden_states(wanted)) is not None:
            kept = {i if i >= 0 else i + len(outputs.hidden_states) for i in selected}
            outputs.hidden_states = tuple(x if i in kept else None for i, x in enumerate(outputs.hidden_states))
        return outputs

    def plan_call(
        self,
        inputs_embeds: torch.Tensor,
        is_vision: torch.BoolTensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        cache: Cache | None = None,
        image_features: torch.Tensor | None = None,
        is_packed: bool = False,
    ) -> tuple[Call, StreamPlan | None, StreamPlan | None, torch.Tensor | None]:
        """What the call says of its tokens, the plans of the text and the vision stream, and the mask of the layers
        that see both.

        Args:
            inputs_embeds: `(B, T, D)`.
            is_vision: `(B, T)`, or None if all tokens are text.
            image_features: `(number of vision tokens, D)`, whose number is checked.
            is_packed: whether the caller says that a row holds several sequences.
        """
        num_seen = 0 if cache is None else cache.get_seq_length()
        columns = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + num_seen
        self._refuse_unsupported(inputs_embeds.shape, attention_mask, position_ids, cache, num_seen, is_packed)
        if attention_mask is not None and attention_mask.ndim == 2:  # one of all rows is expanded, as a 4D mask is
            attention_mask = attention_mask.expand(inputs_embeds.shape[0], -1)
        elif attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = self.to_additive(attention_mask, inputs_embeds.dtype)
        position_ids = columns[None] if position_ids is None else position_ids
        rotary = self.language_model.rotary_emb(inputs_embeds, position_ids=position_ids)
        call = Call(attention_mask, position_ids, columns, rotary, cache)
        if call.padding_mask is None:
            is_token = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=columns.device)
        else:
            new = slice(num_seen, num_seen + len(columns)) if isinstance(num_seen, int) else columns
            is_token = call.padding_mask[:, new].bool()
        text, vision = self.find_streams(is_vision, is_token, call, image_features)
        if self.config.num_side_layers == 0:
            vision = None  # it has nowhere to go
        mask = joint_mask(self.language_model, inputs_embeds, call)
        num_layers = self.config.text_config.num_hidden_layers
        text_slots = num_layers + self.config.num_side_layers
        # Keys and values of the side branch are read by later vision tokens alone
        kept = cache if getattr(cache, "expects_images", True) else None
        if is_vision is not None and vision and cache is not kept and int(num_seen) > 0:
            raise ValueError(
                f"The cache holds {int(num_seen)} tokens and, as its expects_images is False, nothing of the side "
                "branch, which the image of this call would read. Leave expects_images at True where images may "
                "follow."
            )
        return (
            call,
            text
            and self.plan_stream(text, self.config.saturation_layer, text_slots, inputs_embeds, call, mask, cache),
            vision and self.plan_stream(vision, num_layers, text_slots + 1, inputs_embeds, call, mask, kept),
            mask,
        )

    def to_additive(self, mask: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
        """A caller's 4D mask as floats, but for SDPA: other attention functions add a boolean one to the scores."""
        if self.language_model.config._attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def find_streams(
        self,
        is_vision: torch.BoolTensor | None,
        is_token: torch.BoolTensor,
        call: Call,
        image_features: torch.Tensor | None,
    ) -> tuple[Stream | None, Stream | None]:
        """The text and the vision stream, None for one without tokens in this call. Padding belongs to neither.

        Args:
            is_vision: `(B, T)`, or None if all tokens are text.
            is_token: `(B, T)`, False at padding.
            image_features: `(number of vision tokens, D)` or None.
        """
        # A training step without an image runs the side branch on padding, whose gradients are zero: processes that
        # train together wait for each other's gradients, and with sharded weights for each other's calls
        is_training = self.training and torch.is_grad_enabled()
        if is_vision is None and is_training:
            is_vision = torch.zeros_like(is_token)
        if is_vision is None:  # no packing: shapes that do not depend on the data let the decode step compile
            return Stream(None, is_token, is_ragged=call.padding_mask is not None), None
        num_features = None if image_features is None else len(image_features)
        return split_streams(is_vision.to(is_token.device), is_token, num_features, min_vision=int(is_training))

    def plan_stream(
        self,
        stream: Stream,
        layer_idx: int,
        slot_idx: int,
        hidden_states: torch.Tensor,
        call: Call,
        mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> StreamPlan:
        """The plan of one stream, whose keys and values `cache` has from layer `layer_idx` on and its slots at
        `slot_idx`. `mask` is that of the layers that see both streams."""
        if mask is None and stream.index is None:
            stream.is_ragged = False  # the backend saw no padding
        columns = call.columns if stream.index is None else call.columns[stream.index]
        slots = (columns + 1) * stream.valid
        is_ragged = stream.is_ragged
        if cache is not None:
            layer, stored = cache.layers[slot_idx], slots[:, None, :, None]
            slots = layer.update(stored, stored[..., :0])[0][:, 0, :, 0]
            is_ragged = layer.is_ragged = is_ragged or getattr(layer, "is_ragged", True)
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            mask = select_mask(mask, stream.columns, slots)
        elif is_ragged or mask is not None:  # else the backend needs no mask for the stream either
            attention = self.language_model.config._attn_implementation
            # As transformers looks, which says nothing
            if attention not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
                raise ValueError(
                    f"attn_implementation={attention!r} has no function that makes its masks, and rows that hold "
                    "different numbers of tokens of a kind need one. Register it: "
                    "transformers.AttentionMaskInterface.register."
                )
            is_visible = slots > 0
            if call.padding_mask is not None:
                is_visible = is_visible & call.padding_mask.gather(1, (slots - 1).clamp(min=0)).bool()
            mask = create_causal_mask(
                config=self.language_model.config,
                inputs_embeds=stream.take(hidden_states[..., :0]),
                attention_mask=is_visible,
                layer_idx=layer_idx,
                allow_is_causal_skip=False,  # what is known need not be looked up on the device
                **{CACHE: cache},
            )
        return StreamPlan(stream, tuple(stream.take(x) for x in call.rotary), mask, slots, cache)

    def has_filled(self, cache: Cache) -> bool:
        """Whether a model of this geometry extended the cache, which it does when it first writes to it."""
        return getattr(cache, "routing", None) == self._routing

    def add_stream_layers(self, cache: Cache) -> None:
        """Extends any cache that `generate` or a user made, once: after the decoder's layers come those of the side
        branch, the slots of the text stream and the slots of the vision stream.

        Raises:
            ValueError: the cache already holds tokens that this model did not write.
        """
        layers, num_layers = cache.layers, self.config.text_config.num_hidden_layers
        num_side_layers = self.config.num_side_layers
        if self.has_filled(cache):
            return
        is_used = bool(layers) and layers[0].is_initialized and layers[0].get_seq_length() > 0
        if is_used or len(layers) > num_layers or hasattr(cache, "routing"):
            raise ValueError(
                f"past_key_values has {len(layers)} layers and holds {cache.get_seq_length()} tokens, but this model, "
                f"of {num_layers} layers and {num_side_layers} side layers, did not write them: which are vision "
                "tokens is unknown. Pass an empty cache, or one that this model filled."
            )
        cache.routing = self._routing
        layers.extend(DynamicLayer() for _ in range(num_layers - len(layers)))
        text_only = range(self.config.saturation_layer, self.config.first_fusion_layer)
        if isinstance(layers[0], StaticLayer):
            length, slot_class = layers[0].max_cache_len, StaticSlotLayer
            for i, layer in enumerate(layers):
                if i in text_only:
                    layers[i] = StaticStreamLayer(length)
                elif layer.max_cache_len != length:  # one mask serves them all; none comes to the end of its window
                    layers[i] = StaticLayer(length)
            layers.extend(StaticStreamLayer(length) for _ in range(num_side_layers))
        else:
            slot_class = SlotLayer
            for i in text_only:  # sliding ones count their slots apart, and none comes to the end of its window
                is_replaced = type(layers[i]) in (DynamicLayer, DynamicSlidingWindowLayer)
                layers[i] = StreamLayer() if is_replaced else layers[i]
            layers.extend(StreamLayer() for _ in range(num_side_layers))
        layers.append(slot_class(layers[0], [layers[i] for i in text_only]))
        layers.append(slot_class(layers[0], layers[num_layers : num_layers + num_side_layers]))

    def _refuse_unsupported(
        self,
        shape: torch.Size,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        cache: Cache | None,
        num_seen: int | torch.Tensor,
        is_packed: bool,
    ) -> None:
        """Refuses what would be computed wrongly without a word, or would fail where the cache has the tokens' slots
        but not their keys. `shape` is that of the embeddings, `(B, T, D)`."""
        length = shape[1]
        check_mask(attention_mask, shape, cache, num_seen)
        if position_ids is not None and position_ids.shape[-1] != length:
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)} but this call holds {length} tokens. Pass those "
                "of the new tokens alone."
            )
        if attention_mask is None and position_ids is not None and length > 1:
            steps = position_ids.diff(dim=-1)  # without a cache, transformers reads any gap as the start of a sequence
            is_packed = is_packed or bool((steps != 1).any() if cache is None else (steps < 0).any())
        if is_packed:
            raise ValueError(
                "Several sequences packed into one row (cu_seq_lens_q, or position_ids that restart or leave gaps and "
                "no attention_mask) cannot be routed. Pass one sequence a row, padded, with an attention_mask."
            )
        window = attention_window(self.config.text_config)
        if window is not None and int(num_seen) + length > window:
            raise ValueError(
                f"{int(num_seen) + length} tokens exceed text_config.sliding_window={window}. Sliding attention is "
                "not routed: keep within the window, or set sliding_window to None if the backbone allows it."
            )


class DPVRForConditionalGeneration(DPVRPreTrainedModel, GenerationMixin):
    """DPVR-LF with a language modeling head: LLaVA at a lower cost, with the same inputs, outputs and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DPVRConfig):
        super().__init__(config)
        self.model = DPVRModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def init_continuous_batching(self, *args, **kwargs):
        """Raises ValueError: `generate_batch` keeps keys and values in pages of one size for every layer."""
        raise ValueError(
            "Continuous batching (generate_batch) keeps the same tokens for every layer, and DPVR's layers see "
            "different ones. Use generate, with padded batches."
        )

    def get_image_features(self, pixel_values: torch.Tensor, *args, **kwargs) -> BaseModelOutputWithPooling:
        """Image features after the projector, as [`~transformers.LlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, *args, **kwargs)

    @can_return_tuple
    @warn_of_the_old_name
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
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaCausalLMOutputWithPast:
        r"""
        Args:
            input_ids: `(B, T)`, prompts with `<image>` expanded to one image token per image feature.
            pixel_values: `(number of images, channels, height, width)`, in the order of the prompts.
            attention_mask: `(B or 1, tokens in the cache + T)`, 0 at padding on either side; or 4D, taken as it is.
            position_ids: `(B, T)`; by default the place in the row.
            past_key_values: any transformers cache, empty or filled by this model. It is extended in place. From
                transformers 5.24 on it is called `cache`; either name is taken. With `cache.expects_images = False` it
                holds no keys of the side branch, which only a later image reads; `generate` sets that on caches of its
                own.
            inputs_embeds: `(B, T, D)` in place of `input_ids`.
            mm_token_type_ids: `(B, T)`, 1 at vision tokens, 0 at text. `DPVRProcessor` and `generate` give it. Needed
                with `inputs_embeds`; with `input_ids` the image tokens tell, where images come with them.
            labels: `(B, T)`, -100 where no loss is wanted.
            logits_to_keep: number of last positions (0: all) to compute logits for; or their indices, `(K,)` for all
                rows or `(B, K)`; or a bool mask `(B, T)`, whose logits come without a dimension of rows. The last
                layer computes nothing but keys and values for tokens before the last `logits_to_keep`.
            mm_encoder_outputs: `{"image": outputs of get_image_features}` in place of `pixel_values`.

        Returns:
            `LlavaCausalLMOutputWithPast`. `hidden_states` and `attentions` have the usual full shapes: in text-only
            layers a vision token keeps the state in which it was routed out, and its attention is zero.

        Raises:
            ValueError: which tokens are vision tokens is unknown, their number differs from that of the image
                features, shapes disagree, or the cache holds tokens of another model.

        Example:

        ```python
        >>> from PIL import Image
        >>> from transformers import AutoModel, AutoProcessor

        >>> model = AutoModel.from_pretrained("dpvr-tiny", trust_remote_code=True)
        >>> processor = AutoProcessor.from_pretrained("dpvr-tiny", trust_remote_code=True)
        >>> prompt = "USER: <image>\nHow many times does seven occur in row 2? ASSISTANT:"
        >>> inputs = processor(images=Image.open("digits.png"), text=prompt, return_tensors="pt")
        >>> processor.batch_decode(model.generate(**inputs, max_new_tokens=20), skip_special_tokens=True)
        ```"""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            use_cache=use_cache,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{name: getattr(outputs, name) for name in (CACHE, IMAGES)},
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict:
        """As in transformers; keeps `mm_token_type_ids` in step with the tokens, and takes them from `input_ids` that
        come with `inputs_embeds`."""
        if mm_token_type_ids is None and inputs_embeds is not None and input_ids.shape[:2] == inputs_embeds.shape[:2]:
            mm_token_type_ids = (input_ids == self.config.image_token_id).long()
        if mm_token_type_ids is not None:
            # Candidate tokens of assisted decoding are text that transformers adds to `attention_mask` and to
            # `input_ids`, of which this may be a chunk
            num_tokens = input_ids.shape[1]
            if mm_token_type_ids.shape[1] > num_tokens and attention_mask is not None and attention_mask.ndim == 2:
                num_tokens = attention_mask.shape[1]
            num_candidates = max(num_tokens - mm_token_type_ids.shape[1], 0)
            mm_token_type_ids = nn.functional.pad(mm_token_type_ids, (0, num_candidates))
            length = mm_token_type_ids.shape[1]
            if length != input_ids.shape[1] and attention_mask is not None and length != attention_mask.shape[-1]:
                raise ValueError(
                    f"mm_token_type_ids cover {length} tokens, but input_ids hold {input_ids.shape[1]} and "
                    f"attention_mask {attention_mask.shape[-1]}: which tokens they speak of is unknown. Pass the full "
                    "sequence in all three."
                )
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if is_first_iteration or inputs.get("input_ids") is None:
            return inputs
        if inputs["input_ids"].shape[1] == 1:
            inputs.pop("mm_token_type_ids", None)  # a generated token is text: nothing to look up on the device
        elif "mm_encoder_outputs" not in inputs and "pixel_values" not in inputs:
            self._mark_later_tokens(inputs, kwargs.get("mm_encoder_outputs") or {})
        return inputs

    def _mark_later_tokens(self, inputs: dict, mm_encoder_outputs: dict) -> None:
        """Several tokens of a later step are text that was drafted, or an assistant's prompt, from which transformers
        drops the target model's image features. They fit where both share a vision tower and projector; else the
        assistant takes image tokens for text, as LLaVA does, and the target corrects it. A prompt that is read in
        chunks is one over all of them. What else a caller says of later tokens stands."""
        cache = inputs.get(CACHE)
        is_prompt = cache is None or cache.get_seq_length() == 0
        features = mm_encoder_outputs["image"].pooler_output if mm_encoder_outputs.get("image") else []
        num_image_tokens = (inputs["input_ids"] == self.config.image_token_id).sum()
        fits = len(features) > 0 and features[0].shape[-1] == self.config.text_config.hidden_size
        if is_prompt and fits and num_image_tokens == sum(map(len, features)):
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
            return
        if is_prompt and cache is not None:
            cache.images_are_text = True
        is_stated = inputs.get("mm_token_type_ids") is not None and not mm_encoder_outputs
        if is_prompt or not is_stated or getattr(cache, "images_are_text", False):
            inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])

    def _expand_multimodal_outputs(
        self, input_ids: torch.LongTensor | None, mm_encoder_output: dict, expand_size: int = 1, **kwargs
    ) -> dict:
        """As in transformers, for beams and several samples. It drops, without a word, images that it finds no tokens
        for: these are refused."""

        def count_features() -> int:
            return sum(map(len, mm_encoder_output["image"].pooler_output)) if mm_encoder_output.get("image") else 0

        num_features = count_features()
        mm_encoder_output = super()._expand_multimodal_outputs(input_ids, mm_encoder_output, expand_size, **kwargs)
        if count_features() != num_features * expand_size:
            raise ValueError(
                f"Image features and image tokens do not match: the images give {num_features} features, of which "
                f"{count_features() // expand_size} fill the image tokens of whole prompts. Each image needs as many "
                "image tokens as it has features: let the processor expand <image>, and pass every image of the batch."
            )
        return mm_encoder_output

    def _get_candidate_generator(
        self, *args, model_kwargs: dict, assistant_model: PreTrainedModel | None = None, **kwargs
    ):
        """As in transformers, which gives an assistant all arguments: only a DPVR takes `mm_token_type_ids`."""
        if assistant_model is not None and assistant_model.config.model_type != self.config.model_type:
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "mm_token_type_ids"}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        """A cache that ends with this call of `generate`, its prompt read in one piece, sees no later image."""
        is_given = model_kwargs.get(CACHE) is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if not is_given and model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE].expects_images = bool(
                generation_config.return_dict_in_generate or generation_config.prefill_chunk_size
            )

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, **kwargs):
        """Keeps the 2D mask, which routing needs to know padding, at the constant width that compilation needs."""
        if attention_mask is None:
            return None
        return nn.functional.pad(attention_mask, (0, kwargs[CACHE].get_max_length(0) - attention_mask.shape[1]))


DPVRModel.register_for_auto_class("AutoModel")
DPVRForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["DPVRForConditionalGeneration", "DPVRModel", "DPVRPreTrainedModel"]
