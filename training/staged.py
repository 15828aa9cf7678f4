# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
A training step of DPVR in two parts: what is frozen, without a graph, and what trains.

    frozen     vision tower, projector, embeddings, joint layers, text-only layers      -> `Features`
    trained    side branch, fusion layers, norm, head at the answers' tokens            -> loss

The text-only layers never see the side branch, so with a frozen backbone the first part needs no graph, its results
can be kept (`training/features.py`), and the dense LLaVA that teaches shares its joint layers: it runs on from the
same states through layers S..L-1, and no second model is in memory.

Shape letters: B rows, T tokens, N answer tokens of a batch, D hidden size, V vocabulary.
"""

import contextlib
import sys
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache

IGNORED = -100  # the label of a token without a loss, as everywhere in transformers


@dataclass
class Features:
    """What the frozen part makes of a batch: all that the trained part needs.

    Rows are padded on the right: a token's place in its row is its rotary position.

    Attributes:
        hidden_states: `(B, T, D)`. Vision tokens as they leave layer S-1, text tokens as they reach the fusion.
        is_vision: `(B, T)`, bool.
        attention_mask: `(B, T)`, 0 at padding.
        labels: `(B, T)`, -100 where no loss is wanted.
        teacher_states: `(N, D)`, the dense model's final states (after its norm) that predict the answers' tokens,
            row after row; None if nothing is learned from it.
    """

    hidden_states: torch.Tensor
    is_vision: torch.BoolTensor
    attention_mask: torch.Tensor
    labels: torch.LongTensor
    teacher_states: torch.Tensor | None = None


def answer_loss(logits: torch.Tensor, labels: torch.Tensor, teacher_logits: None) -> torch.Tensor:
    """Cross entropy of the answers' tokens, summed. logits `(N, V)`, labels `(N,)`."""
    return functional.cross_entropy(logits, labels, reduction="sum")


def distillation_loss(logits: torch.Tensor, labels: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from the dense model's next-token distribution to DPVR's, summed over the answers'
    tokens (Hinton et al., arXiv 1503.02531, at temperature 1). logits and teacher_logits `(N, V)`."""
    target = teacher_logits.log_softmax(-1)
    return functional.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="sum")


LOSSES = {"answer": answer_loss, "distill": distillation_loss}


def predicts(labels: torch.LongTensor) -> torch.BoolTensor:
    """The tokens whose next token has a label: `(B, T)` to `(B, T)`, False in the last column."""
    return functional.pad(labels[:, 1:] != IGNORED, (0, 1))


class StagedModel(nn.Module):
    """A DPVR whose forward gives the loss of a batch, or of the batch's `Features` where these are at hand.

    Args:
        model: `DPVRForConditionalGeneration`, or a `PeftModel` around one. What trains is what requires a gradient.
        loss: a name of `LOSSES`.

    Attributes:
        features_frozen: whether nothing that trains comes before the fusion layers, the side branch apart: then
            `Features` do not change while it trains.
    """

    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch, and does not divide by the accumulated steps
    main_input_name = "labels"

    def __init__(self, model: nn.Module, loss: str = "answer"):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r} is none of {', '.join(LOSSES)}.")
        self.model, self.loss = model, loss
        base, decoder = self.base, self.core.language_model
        _, _, fusion_layers = self.layers()
        late = {id(weight) for part in (*fusion_layers, decoder.norm, base.lm_head) for weight in part.parameters()}
        branch = {id(weight) for weight in self.core.side_branch.parameters()}
        trained = {id(weight) for weight in base.parameters() if weight.requires_grad}
        self.features_frozen = not trained - late - branch
        self.teacher_frozen = not trained - branch

    @property
    def base(self) -> nn.Module:
        """The `DPVRForConditionalGeneration`, out of PEFT's wrapper if it is in one."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def core(self) -> nn.Module:
        return self.base.model

    @property
    def config(self):
        return self.base.config

    @property
    def code(self):
        """The module that the model's class comes from, which is remote code and has no name to import it by."""
        return sys.modules[type(self.core).__module__]

    @property
    def _no_split_modules(self) -> list[str]:
        """Of the model's, those that it has: accelerate shards each of them by itself."""
        present = {type(module).__name__ for module in self.modules()}
        return sorted(present & set(self.base._no_split_modules))

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """For the Trainer's `--gradient_checkpointing`."""
        self.base.activation_checkpointing_enable(**kwargs)

    def layers(self) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
        """Joint, text-only and fusion layers."""
        return self.code.split_layers(self.core.language_model, self.config)

    def forward(
        self,
        labels: torch.LongTensor,
        attention_mask: torch.Tensor,
        hidden_states: torch.Tensor | None = None,
        is_vision: torch.BoolTensor | None = None,
        teacher_states: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **inputs,
    ) -> dict[str, torch.Tensor]:
        """The loss of a batch, as the mean over its answers' tokens or, as the Trainer wants it where a step is made
        of several batches, its sum over `num_items_in_batch`.

        Args:
            hidden_states, is_vision, teacher_states: as in `Features`, instead of `inputs`.
            inputs: `input_ids` `(B, T)`, and where there are images `pixel_values` and `mm_token_type_ids`.
        """
        if hidden_states is None:
            features = self.compute_features(labels=labels, attention_mask=attention_mask, **inputs)
        else:
            features = Features(hidden_states, is_vision, attention_mask, labels, teacher_states)
        targets = labels[:, 1:][labels[:, 1:] != IGNORED]
        logits = self.base.lm_head(self.answer_states(features)).float()
        teacher_logits = None
        if self.loss == "distill":
            with torch.no_grad(), self.dense_weights():
                teacher_logits = self.base.lm_head(features.teacher_states.to(self.base.lm_head.weight.dtype)).float()
        loss = LOSSES[self.loss](logits, targets, teacher_logits)
        num_items = torch.as_tensor(len(targets) if num_items_in_batch is None else num_items_in_batch)
        return {"loss": loss / num_items.clamp(min=1)}

    # --- the frozen part

    def compute_features(self, with_teacher: bool | None = None, **inputs) -> Features:
        """The frozen part of a step. With its teacher, by default, if the loss learns from it."""
        wants_graph = torch.is_grad_enabled() and not self.features_frozen
        with_teacher = self.loss == "distill" if with_teacher is None else with_teacher
        with torch.no_grad():
            plan = self.embed_and_plan(**inputs) if self.features_frozen else None
            teacher = None
            if with_teacher:
                with self.dense_weights():
                    dense = plan or self.embed_and_plan(**inputs)
                    joint_states = self.run_joint(dense)
                    teacher = self.run_dense(joint_states, dense, inputs["labels"])
        with torch.set_grad_enabled(wants_graph):
            plan = plan or self.embed_and_plan(**inputs)
            if not (with_teacher and self.features_frozen):
                joint_states = self.run_joint(plan)
            _, text_only_layers, _ = self.layers()
            states = self.code.run_stream(text_only_layers, joint_states, plan.text)
        return Features(states, plan.is_vision, inputs["attention_mask"], inputs["labels"], teacher)

    def embed_and_plan(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        labels: torch.LongTensor,
        pixel_values: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
    ) -> "EmbeddedBatch":
        core = self.core
        embeddings = core.get_input_embeddings()(input_ids)
        is_vision = (
            mm_token_type_ids == 1 if mm_token_type_ids is not None else input_ids == core.config.image_token_id
        )
        image_features = None
        if pixel_values is None:
            if mm_token_type_ids is not None and is_vision.any():  # as the model itself has it
                raise ValueError(
                    f"mm_token_type_ids tell of image tokens (by row: {is_vision.sum(-1).tolist()}), but no "
                    "pixel_values came with them. Pass these too, or for text mm_token_type_ids of zeros."
                )
            is_vision = torch.zeros_like(is_vision)
            if self.is_sharded:  # every process must ask for the shards of the tower, or the others wait for ever
                size = core.config.vision_config.image_size
                core.encode_images(embeddings.new_zeros(1, 3, size, size), None)
        else:
            _, image_features = core.encode_images(pixel_values.to(embeddings.dtype), None)
            embeddings = self.code.insert_image_features(embeddings, is_vision, image_features)
        call, text, _, mask = core.plan_call(
            embeddings, is_vision, attention_mask, None, image_features=image_features
        )
        return EmbeddedBatch(embeddings, is_vision, text, self.code.joint_arguments(call, mask))

    def run_joint(self, batch: "EmbeddedBatch") -> torch.Tensor:
        joint_layers, _, _ = self.layers()
        return self.code.run_layers(joint_layers, batch.embeddings, batch.arguments)

    def run_dense(self, states: torch.Tensor, batch: "EmbeddedBatch", labels: torch.LongTensor) -> torch.Tensor:
        """LLaVA from layer S on, all tokens through all layers: its final states `(N, D)`."""
        for layers in self.layers()[1:]:
            states = self.code.run_layers(layers, states, batch.arguments)
        return self.core.language_model.norm(states[predicts(labels)])

    @contextlib.contextmanager
    def dense_weights(self):
        """The weights that LLaVA had before LoRA or other tuners came to them."""
        if self.teacher_frozen or not hasattr(self.model, "disable_adapter"):
            yield
        else:
            with self.model.disable_adapter():
                yield

    @property
    def is_sharded(self) -> bool:
        return any(isinstance(weight, DTensor) for weight in self.base.parameters())

    # --- the part that trains

    def answer_states(self, features: Features) -> torch.Tensor:
        """Final states `(N, D)`, after the norm, of the tokens that predict the answers. Of the last layer, other
        tokens need their keys and values only."""
        core, decoder = self.core, self.core.language_model
        call, vision, mask = self.plan_vision(features)
        states = self.code.run_stream(core.side_branch, features.hidden_states, vision)
        *fusion_layers, last = self.layers()[2]
        arguments = self.code.joint_arguments(call, mask)
        states = self.code.run_layers(fusion_layers, states, arguments)
        read = predicts(features.labels)
        if self.can_read(last):
            states = self.read(last, states, read, features.attention_mask.bool(), call.rotary)
        else:
            states = last(states, **arguments)[read]
        return decoder.norm(states)

    def plan_vision(self, features: Features) -> tuple:
        """The call, and the plan of its vision stream.

        With sharded weights every process must ask for the shards of the side branch, or the others wait for ever: the
        model runs it without an image too where it trains, and is told so where it is evaluated.
        """
        core, was_training = self.core, self.core.training
        core.training = was_training or self.is_sharded
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() or self.is_sharded):
                call, _, vision, mask = core.plan_call(
                    features.hidden_states, features.is_vision, features.attention_mask, None
                )
        finally:
            core.training = was_training
        return call, vision, mask

    def can_read(self, layer: nn.Module) -> bool:
        """Whether `read` may call the parts of `layer` one by one: not with weights that come and go with its
        `forward`, nor with an attention that takes no mask of any form."""
        decoder = self.core.language_model
        is_sharded = any(isinstance(weight, DTensor) for weight in layer.parameters())
        takes_masks = decoder.config._attn_implementation in ("sdpa", "eager")
        return takes_masks and not is_sharded and self.code.can_read_last(layer, None)

    def read(
        self,
        layer: nn.Module,
        states: torch.Tensor,
        read: torch.BoolTensor,
        is_token: torch.BoolTensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """What a decoder layer makes of `states` `(B, T, D)` where `read` `(B, T)`: `(N, D)`, row after row. The other
        tokens, where `is_token`, give it keys and values."""
        (others, is_other), (index, valid) = pack(is_token & ~read), pack(read)
        cache = DynamicCache()
        self.code.add_keys_and_values(layer, take(states, others), tuple(take(x, others) for x in rotary), cache)
        is_slot, columns = torch.cat([is_other, valid], 1), torch.cat([others, index], 1)
        visible = is_slot[:, None] & (columns[:, None] <= index[..., None])
        visible |= ~valid[..., None]  # a row of the mask that hides everything would give NaN
        mask = visible[:, None]
        if self.core.language_model.config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(states.dtype).min).to(states.dtype)
        outputs = layer(
            take(states, index),
            attention_mask=mask,
            position_embeddings=tuple(take(x, index) for x in rotary),
            **{self.code.CACHE: cache},
        )
        return outputs[valid]


def pack(belongs: torch.BoolTensor, width: int | None = None) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """Columns of the tokens where `belongs` `(B, T)` is True, packed to the right, and which are no padding.

    Args:
        width: how many the fullest row has, if that is known; else the host waits for the device to count them, and
            there is one column at least: attention takes no empty sequence.
    """
    if width is None:
        width = max(1, int(belongs.sum(-1).amax()))
    index = belongs.to(torch.uint8).argsort(dim=-1, stable=True)[:, belongs.shape[1] - width :]
    return index, belongs.gather(1, index)


def take(tensor: torch.Tensor, index: torch.LongTensor) -> torch.Tensor:
    """Columns of `(B or 1, T, D)`: `(B, N, D)`."""
    return tensor.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))


@dataclass
class EmbeddedBatch:
    """What the layers of the frozen part start from.

    Attributes:
        embeddings: `(B, T, D)`, image features inserted.
        is_vision: `(B, T)`.
        text: the plan of the text stream.
        arguments: those of the layers that see both streams.
    """

    embeddings: torch.Tensor
    is_vision: torch.BoolTensor
    text: object
    arguments: dict


def split_rows(features: Features) -> list[dict[str, torch.Tensor]]:
    """Each row by itself, without padding: `hidden_states` `(T, D)`, `is_vision` and `labels` `(T,)`, and
    `teacher_states` `(answer tokens of the row, D)` if there are any."""
    rows = []
    counts = predicts(features.labels).sum(-1).tolist()
    teachers = [None] * len(counts) if features.teacher_states is None else features.teacher_states.split(counts)
    for i, teacher in enumerate(teachers):
        kept = features.attention_mask[i].bool()
        row = {name: getattr(features, name)[i][kept] for name in ("hidden_states", "is_vision", "labels")}
        if teacher is not None:
            row["teacher_states"] = teacher
        rows.append(row)
    return rows


def collate_rows(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of `split_rows` as a batch for `StagedModel`, padded on the right. A row may have an `attention_mask`
    `(T,)` of its own, 0 at tokens that keep their place but are not seen."""

    def pad(name: str, value: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    masks = [row.get("attention_mask", torch.ones(len(row["labels"]), dtype=torch.long)) for row in rows]
    batch = Features(
        hidden_states=pad("hidden_states", 0),
        is_vision=pad("is_vision", False),
        attention_mask=nn.utils.rnn.pad_sequence(masks, batch_first=True),
        labels=pad("labels", IGNORED),
        teacher_states=torch.cat([row["teacher_states"] for row in rows]) if "teacher_states" in rows[0] else None,
    )
    named = ((field.name, getattr(batch, field.name)) for field in fields(batch))
    return {name: tensor for name, tensor in named if tensor is not None}
