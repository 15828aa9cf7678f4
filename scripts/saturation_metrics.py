# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
What each decoder layer does with vision tokens: the metrics of `scripts/analyze_saturation.py`, one prompt at a time.

A LLaVA of L layers turns embeddings h_0 into h_1 .. h_L, h_{l+1} = layer l of h_l, before the final norm. V are the
vision tokens, Q the text tokens of the prompt behind the last image, P the next-token distribution. Every prompt is a
batch of one, without padding, so that no metric has to know padding. For one prompt:

attention           A_l = mean over q in Q and heads of  sum over k in V of a_l(q, k), the attention weights of layer
                    l. The abstract of arXiv 2606.09131 gives 0.68 at layer 0, 0.07 at layer 4, about 0.04 after layer
                    18; that the queries are the text behind the image is our reading.
efficiency          E_l(kind) = mean over q in Q, heads of  sum over k of that kind of a_l(q, k) / number of those in
                    reach of q, for kind image, system (text before the image) and instruction (text behind it): what
                    FastV (arXiv 2403.06764) calls attention efficiency, the attention that one token receives. That
                    paper's text was not at hand, and it speaks of generated tokens where we take the prompt's.
cosine_next         mean over tokens of cos(h_l, h_{l+1}); `cosine_last`: of cos(h_l, h_L). For the tokens in V and,
                    for the asymmetry between the two, for those in Q. Ours; cosines between layers are common.
curvature           C_l = mean over tokens of the angle, in radians, between v_l = h_{l+1} - h_l and v_{l-1}, l > 0.
                    arXiv 2604.09425, whose formula we have from public notes about it. V and Q apart.
contribution        LC_l = KL(P with the states of V frozen in layer l || P): the layer's attention and MLP add nothing
                    to vision tokens, whose keys and values text still reads. Visual layer contribution of ShortV
                    (arXiv 2504.00502), as its public code computes it, the direction of the KL included.
withdrawal          W_K = KL(P with V removed before layer K || P). VTW (arXiv 2405.05803), as in its public code: text
                    keeps its positions. K = 0 is a model that has never seen the image.
routing             R_K = KL(P where layers K..F-1 see text only and V comes back unchanged at layer F || P): DPVR with
                    saturation layer K and an identity side branch, F = L - `num_fusion_layers`. From the definition
                    in modeling_dpvr.py. R_F = 0.
routing_own         for a DPVR checkpoint, at its own saturation layer and with its own side branch.

KL is in nats, a mean over the positions that are read: the last of the prompt, as VTW and ShortV have it, or, with an
answer, those that predict its tokens. h_0 .. h_L of one prompt are kept while it is measured, (L + 1) * T * D
numbers: 173 MB for 640 tokens of LLaVA-1.5-7B in 16 bits. Attention is reduced to sums inside its layer, some queries
at a time, and no map is kept but the row of the prompt's last token.

A DPVR checkpoint is measured in its own pass for attention, cosine and curvature; its text-only layers hold no vision
token, which gives attention 0 and states that do not change. The KLs are those of the LLaVA whose weights it holds.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SYSTEM, IMAGE, INSTRUCTION = range(3)
KINDS = ("system", "image", "instruction")
METRICS = ("attention", "hidden", "contribution", "withdrawal", "routing")
QUERY_CHUNK = 64


@dataclass(frozen=True)
class Prompt:
    """One prompt with its images, as a batch of one.

    Attributes:
        inputs: what the processor gave; `input_ids` is `(1, T)`.
        is_vision: `(T,)`, bool.
        length: number of tokens of the prompt; what follows is its answer.

    Raises:
        ValueError: there is no vision token, or no text between the last one and the end of the prompt.
    """

    inputs: dict[str, Tensor]
    is_vision: Tensor
    length: int

    def __post_init__(self):
        if not self.is_vision.any():
            raise ValueError(f"none of its {len(self.is_vision)} tokens is a vision token")
        if int(self.is_vision.nonzero().max()) + 1 >= self.length:
            raise ValueError(f"no text follows the image within the {self.length} tokens of the prompt")

    @property
    def queries(self) -> Tensor:
        """`(N,)` positions Q of the text behind the last image."""
        device = self.is_vision.device
        return torch.arange(int(self.is_vision.nonzero().max()) + 1, self.length, device=device)

    @property
    def read(self) -> Tensor:
        """`(R,)` positions whose next-token distributions are compared."""
        end = max(self.length, len(self.is_vision) - 1)
        return torch.arange(self.length - 1, end, device=self.is_vision.device)

    @property
    def kinds(self) -> Tensor:
        """`(T,)` SYSTEM, IMAGE or INSTRUCTION. Text between images counts as SYSTEM: it is not behind the last."""
        kinds = torch.where(self.is_vision, IMAGE, SYSTEM)
        kinds[self.queries[0] :] = INSTRUCTION
        return kinds


# ------------------------------------------------------------------------------------------------------- attention


def attention_rows(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, rows: Tensor) -> Tensor:
    """Attention weights `(H, n, T)`, in float32, of the query positions `rows` `(n,)` alone.

    Args:
        query, key: `(1, H, T, d)` and `(1, G, T, d)`, H a multiple of G.
        mask: `(1, 1, T, T)`, boolean or additive, or None for a causal one.
    """
    grouped = query[0, :, rows].float().unflatten(0, (key.shape[1], -1))  # (G, H / G, n, d)
    scores = grouped @ key[0].float()[:, None].transpose(-1, -2) * scaling
    if mask is None:
        columns = torch.arange(key.shape[2], device=rows.device)
        scores = scores.masked_fill(columns > rows[:, None], -torch.inf)
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[0, 0, rows], -torch.inf)
    else:
        scores = scores + mask[0, 0, rows].float()
    return scores.softmax(-1).flatten(0, 1)


class AttentionRecorder:
    """While it is entered, every decoder layer that runs leaves sums of its attention weights here.

    It stands in for the backbone's attention function, "sdpa" or "eager", which still computes the layer's output.

    Attributes:
        rows: by layer, the row's values under the names of the module's docstring.
        maps: by layer, `(number of vision tokens,)`, attention of the last token of the prompt, mean over heads.
    """

    def __init__(self, model: nn.Module, prompt: Prompt, chunk: int = QUERY_CHUNK):
        self.stack = model.model.language_model
        self.prompt, self.chunk = prompt, chunk
        self.base = self.stack.config._attn_implementation
        if self.base not in ("sdpa", "eager"):
            raise ValueError(f"Attention {self.base!r} cannot be measured; load the model with 'sdpa' or 'eager'.")
        self.rows: dict[int, dict[str, float | None]] = {}
        self.maps: dict[int, Tensor] = {}

    def __enter__(self) -> "AttentionRecorder":
        name = f"measured_{self.base}"
        ALL_ATTENTION_FUNCTIONS[name] = self.attend
        # By `register`, for transformers looks for no other
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[self.base])
        self.stack.config._attn_implementation = name
        return self

    def __exit__(self, *_) -> None:
        name, self.stack.config._attn_implementation = self.stack.config._attn_implementation, self.base
        del ALL_ATTENTION_FUNCTIONS[name]  # which would keep the model in memory

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, **kwargs):
        """An attention function of transformers, which also records."""
        if module.layer_idx < self.stack.config.num_hidden_layers:  # those behind are a side branch's
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            self.record(module.layer_idx, query, key, attention_mask, scale)
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.base, own)
        return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    def record(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        prompt, kinds, queries = self.prompt, self.prompt.kinds, self.prompt.queries
        if key.shape[2] < len(kinds):  # a text-only layer of DPVR
            text = ~prompt.is_vision
            kinds, queries = kinds[text], text.cumsum(0)[queries] - 1
        one_hot = nn.functional.one_hot(kinds, len(KINDS)).float()  # (T, 3)
        mass, last = [], None
        for rows in queries.split(self.chunk):
            weights = attention_rows(query, key, mask, scaling, rows)
            mass.append(weights @ one_hot)
            last = weights[:, -1].mean(0)
        mass = torch.cat(mass, 1)  # (H, N, 3)
        in_reach = one_hot.cumsum(0)[queries].clamp(min=1)
        efficiency = (mass / in_reach).mean((0, 1))
        exists = one_hot.any(0)  # a text-only layer has no image token
        self.rows[layer] = {
            "attention": mass[..., IMAGE].mean().item(),
            **{f"efficiency_{kind}": efficiency[i].item() if exists[i] else None for i, kind in enumerate(KINDS)},
        }
        vision = last[kinds == IMAGE].cpu()
        self.maps[layer] = vision if len(vision) else torch.zeros(int(prompt.is_vision.sum()))


def uniform_attention(prompt: Prompt) -> float:
    """What A would be if every text token paid the same attention to every token in its reach."""
    is_vision = prompt.is_vision.float()
    shares = is_vision.cumsum(0) / torch.arange(1, len(is_vision) + 1, device=is_vision.device)
    return shares[prompt.queries].mean().item()


# ---------------------------------------------------------------------------------------------------- hidden states


class StateRecorder:
    """While it is entered, keeps the hidden states h_0 .. h_L, `(1, T, D)` each, of the pass that runs.

    What a text-only layer of DPVR gives is set among the states with which vision tokens were routed out; the side
    branch's output stands in the state that the first fusion layer reads.
    """

    def __init__(self, stack: nn.Module, prompt: Prompt):
        self.layers = stack.layers[: stack.config.num_hidden_layers]
        self.is_vision = prompt.is_vision
        self.states: list[Tensor | None] = [None] * (len(self.layers) + 1)
        self.hooks: list = []

    def __enter__(self) -> "StateRecorder":
        for index, layer in enumerate(self.layers):
            self.hooks.append(layer.register_forward_pre_hook(self.before(index), with_kwargs=True))
            self.hooks.append(layer.register_forward_hook(self.after(index)))
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def before(self, index: int) -> Callable:
        def keep(_, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            if states.shape[1] == len(self.is_vision):
                self.states[index] = states

        return keep

    def after(self, index: int) -> Callable:
        def keep(_, args, output):
            if output.shape[1] < len(self.is_vision):
                full = self.states[index].clone()
                full[:, ~self.is_vision] = output
                output = full
            self.states[index + 1] = output

        return keep


def cosine(one: Tensor, other: Tensor) -> float:
    """Mean cosine of two `(N, D)`."""
    return nn.functional.cosine_similarity(one.float(), other.float(), dim=-1).mean().item()


def angle(one: Tensor, other: Tensor) -> float | None:
    """Mean angle in radians between rows of two `(N, D)`, by half-angle, which is exact where arccos is not. Rows of
    zeros, updates of tokens that did not move, have none; None if that leaves no row."""
    moved = (one != 0).any(-1) & (other != 0).any(-1)
    one, other = (nn.functional.normalize(x[moved].float(), dim=-1) for x in (one, other))
    angles = 2 * torch.atan2((one - other).norm(dim=-1), (one + other).norm(dim=-1))
    return angles.mean().item() if len(angles) else None


def hidden_metrics(states: list[Tensor], prompt: Prompt) -> dict[str, list[float | None]]:
    """Cosines and curvature by layer, each of length L; None where a layer has none."""
    num_layers = len(states) - 1
    rows: dict[str, list[float | None]] = {}
    for name, tokens in (("vision", prompt.is_vision), ("text", prompt.queries)):
        h = [state[0, tokens] for state in states]
        rows[f"cosine_next_{name}"] = [cosine(h[i], h[i + 1]) for i in range(num_layers)]
        rows[f"cosine_last_{name}"] = [cosine(h[i], h[-1]) for i in range(num_layers)]
        rows[f"curvature_{name}"] = [None] + [
            angle(h[i + 1].float() - h[i].float(), h[i].float() - h[i - 1].float()) for i in range(1, num_layers)
        ]
    return rows


# ------------------------------------------------------------------------------------------------------- divergence


def divergence(one: Tensor, other: Tensor) -> float:
    """KL(one || other) in nats of two log-distributions `(R, vocabulary)`, mean over R."""
    return (one.exp() * (one - other)).sum(-1).mean().clamp(min=0).item()


class Decoder:
    """The text backbone of a LLaVA or DPVR as a plain loop over its layers, from any layer to any other."""

    def __init__(self, model: nn.Module):
        self.stack = model.model.language_model
        self.head = model.get_output_embeddings()
        self.num_layers = self.stack.config.num_hidden_layers

    def run(self, states: Tensor, positions: Tensor, first: int, end: int) -> Tensor:
        """Layers `first..end-1` on `states` `(1, N, D)`, causal, with rotary positions `(N,)`."""
        if first == end:
            return states
        rotary = self.stack.rotary_emb(states, position_ids=positions[None])
        # Without positions: gaps among them would be read as borders of packed sequences
        mask = create_causal_mask(self.stack.config, states, None, None)
        for layer in self.stack.layers[first:end]:
            states = layer(states, attention_mask=mask, position_embeddings=rotary)
        return states

    def all_states(self, states: Tensor) -> list[Tensor]:
        """h_0 .. h_L from h_0, all tokens through all layers."""
        positions = torch.arange(states.shape[1], device=states.device)
        every = [states]
        for layer in range(self.num_layers):
            every.append(self.run(every[-1], positions, layer, layer + 1))
        return every

    def distributions(self, states: Tensor, read: Tensor) -> Tensor:
        """Log-distributions `(R, vocabulary)` over the next token, in float64, from h_L `(1, N, D)`."""
        return self.head(self.stack.norm(states[:, read]))[0].double().log_softmax(-1)


class Divergences:
    """The KL metrics of one prompt, from the hidden states h_0 .. h_L of the dense pass."""

    def __init__(self, decoder: Decoder, states: list[Tensor], prompt: Prompt, first_fusion_layer: int):
        self.decoder, self.states, self.fusion = decoder, states, first_fusion_layer
        self.is_vision = prompt.is_vision
        self.text = (~prompt.is_vision).nonzero()[:, 0]
        self.read = prompt.read
        self.read_text = torch.searchsorted(self.text, prompt.read)  # the same positions among the text tokens
        self.positions = torch.arange(len(prompt.is_vision), device=self.text.device)
        self.reference = decoder.distributions(states[-1], self.read)

    def from_reference(self, states: Tensor, read: Tensor | None = None) -> float:
        read = self.read if read is None else read
        return divergence(self.decoder.distributions(states, read), self.reference)

    def contribution(self, layer: int) -> float:
        frozen = self.states[layer + 1].clone()
        frozen[:, self.is_vision] = self.states[layer][:, self.is_vision]
        return self.from_reference(self.decoder.run(frozen, self.positions, layer + 1, self.decoder.num_layers))

    def text_only(self, first: int, end: int) -> Tensor:
        return self.decoder.run(self.states[first][:, self.text], self.positions[self.text], first, end)

    def withdrawal(self, layer: int) -> float:
        return self.from_reference(self.text_only(layer, self.decoder.num_layers), self.read_text)

    def routing(self, layer: int) -> float | None:
        """None where DPVR cannot leave the decoder: at layer 0 and behind the first fusion layer."""
        if not 1 <= layer <= self.fusion:
            return None
        states = self.states[layer].clone()
        states[:, self.text] = self.text_only(layer, self.fusion)
        return self.from_reference(self.decoder.run(states, self.positions, self.fusion, self.decoder.num_layers))


# ---------------------------------------------------------------------------------------------------------- a prompt


def first_fusion_layer(config, num_fusion_layers: int | None) -> int:
    """F of a DPVR config, which states it, else L - `num_fusion_layers`, or L - 1 where that is None."""
    num_layers = config.text_config.num_hidden_layers
    return getattr(config, "first_fusion_layer", num_layers - (num_fusion_layers or 1))


def num_passes(metrics: Iterable[str], layers: Iterable[int]) -> int:
    """How often `measure` reports progress for one prompt."""
    per_layer = [name for name in ("contribution", "withdrawal", "routing") if name in metrics]
    return 1 + len(per_layer) * len(list(layers))


@torch.no_grad()
def measure(
    model: nn.Module,
    prompt: Prompt,
    metrics: Iterable[str] = METRICS,
    layers: Iterable[int] | None = None,
    num_fusion_layers: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[float | None] | float], Tensor | None]:
    """Measures one prompt.

    Args:
        model: a LLaVA or DPVR in evaluation mode, its backbone on "sdpa" or "eager" attention.
        metrics: of `METRICS`.
        layers: for the KL metrics, which cost a pass each; by default every layer of the decoder.
        num_fusion_layers: for `routing` of a LLaVA; a DPVR has its own.
        progress: called after each pass.

    Returns:
        Values by name, each a list over the L layers with None where nothing was measured, and the attention of the
        prompt's last token to the vision tokens, `(L, number of vision tokens)`, or None without "attention".
    """
    decoder = Decoder(model)
    num_layers = decoder.num_layers
    recorder = AttentionRecorder(model, prompt)
    is_recording = "attention" in metrics
    with StateRecorder(decoder.stack, prompt) as record, recorder if is_recording else torch.no_grad():
        model(**prompt.inputs, use_cache=False, logits_to_keep=1)
    row: dict[str, list[float | None] | float] = {"uniform_attention": uniform_attention(prompt)}
    maps = None
    if is_recording:
        names = recorder.rows[0]
        row |= {name: [recorder.rows[i][name] for i in range(num_layers)] for name in names}
        maps = torch.stack([recorder.maps[i] for i in range(num_layers)])
    if "hidden" in metrics:
        row |= hidden_metrics(record.states, prompt)
    progress()

    names = [name for name in ("contribution", "withdrawal", "routing") if name in metrics]
    if not names:
        return row, maps
    saturation_layer = getattr(model.config, "saturation_layer", None)
    states = record.states if saturation_layer is None else decoder.all_states(record.states[0])
    fusion = first_fusion_layer(model.config, num_fusion_layers)
    divergences = Divergences(decoder, states, prompt, fusion)
    chosen = set(range(num_layers) if layers is None else layers)
    for name in names:
        values: list[float | None] = [None] * num_layers
        for layer in sorted(chosen):
            values[layer] = getattr(divergences, name)(layer)
            progress()
        row[name] = values
    if saturation_layer is not None and "routing" in metrics:
        own: list[float | None] = [None] * num_layers
        own[saturation_layer] = divergences.from_reference(record.states[-1])
        row["routing_own"] = own
    return row, maps
