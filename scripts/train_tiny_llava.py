#!/usr/bin/env python
# Copyright 2026 The DPVR-LF authors. Licensed under the Apache License, Version 2.0.
"""Train `examples/tiny-llava`: a small LLaVA that reads grids of handwritten digits (`examples/digits.py`).

`--layers` and `--hidden-size` train a larger one, such as `examples/tiny-llava-12`; `--tower` spares it phase 1.

Three phases, as for LLaVA itself. The vision tower learns alone which digit each patch belongs to and where the patch
is. The decoder learns alone, from text, to count and compare the digits that an answer has named. Then the tower is
frozen, and projector and decoder learn from conversations of many questions about one image, with a loss on the
answers only. The result is saved in llava-hf's layout, loaded again, and evaluated through `AutoProcessor` and
`generate` on digit images that no phase has seen.

Shape letters: B images or conversations, T tokens of a conversation, P image patches, D hidden size.
"""

import argparse
import contextlib
import json
import platform
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits as task

from benchmarks.command import NOTHING, run_command

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
# Vicuna v1, as in the original LLaVA: turns end with " " after the user and with "</s>" after the assistant.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '" + SYSTEM.replace("'", "\\'") + "' %}"
    "{% set turns = messages %}{% endif %}"
    "{% if system is string %}{{ system + ' ' }}{% else %}{{ system[0]['text'] + ' ' }}{% endif %}"
    "{% for message in turns %}{{ message['role'] | upper + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
PATCH_PIXELS = 8
PATCHES_PER_SIDE = task.IMAGE_PIXELS // PATCH_PIXELS
NUM_HEADS = 4
TOWER_LAYERS = 5  # the projector reads the last but one, as LLaVA's does

# A CPU without bfloat16 instructions emulates it, at a tenth of the speed of float32
HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()

TOWER_BATCH = 64
TEXT_LINES, TEXT_BATCH = 12, 16
LONG_TURNS, LONG_BATCH = 8, 16  # most steps: many answers for each image
SHORT_TURNS, SHORT_BATCH = 2, 32  # every fifth step: conversations that look like single questions
MOSTLY_LOOKUP = 0.15  # of the steps: finding one digit comes first, the other kinds are built on it
FIRST_KINDS = (0.4, 0.1, 0.1, 0.4)  # probabilities in the order of task.KINDS
LATER_KINDS = (0.15, 0.3, 0.3, 0.25)


# Tokenizer, processor, model


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the task is one token and any text can still be encoded."""
    questions = [question for _, question in task.make_questions(seed, 500, "train")]
    later_turns = [f"USER: {question.text} ASSISTANT: {question.answer}" for question in questions]
    first_turns = [question.text for question in questions]  # after the image comes a newline: "What", not " What"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{SYSTEM} USER: ", *later_turns, *first_turns], trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": task.IMAGE_PIXELS},
        crop_size={"height": task.IMAGE_PIXELS, "width": task.IMAGE_PIXELS},
        do_pad=True,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,  # CLS, which "default" drops again
    )


def build_config(tokenizer: PreTrainedTokenizerFast, layers: int, hidden_size: int) -> LlavaConfig:
    """A LLaVA of `layers` decoder layers; vision tower and decoder are `hidden_size` wide."""
    vision_config = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=NUM_HEADS,
        image_size=task.IMAGE_PIXELS,
        patch_size=PATCH_PIXELS,
        projection_dim=hidden_size,
    )
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=NUM_HEADS,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES_PER_SIDE**2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        projector_hidden_act="gelu",
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def init_decoder(model: LlavaForConditionalGeneration) -> None:
    """Scale by fan-in: the library's fixed 0.02 is meant for hidden sizes of thousands and starts too flat here."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "vision_tower" in name:
            continue
        std = weight.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= (2 * model.config.text_config.num_hidden_layers) ** -0.5
        elif "embed_tokens" in name:
            std = 0.3
        elif "lm_head" in name:
            std = 0.02
        weight.normal_(0, std)


# Images


def augment(cells: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Distort each digit on its own, from hardly to strongly. (N, 16, 16) in 0..1 -> the same shape."""
    n = cells.shape[0]

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=generator) * 2 - 1

    strength = torch.rand(n, generator=generator)
    angle, shear = 0.25 * strength * uniform(), 0.2 * strength * uniform()
    scale = 1 + 0.15 * strength[:, None] * uniform(2)
    shift = 0.15 * strength[:, None] * uniform(2)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos, shear - sin, sin, cos], dim=1).view(n, 2, 2) * scale[:, None]
    grid = functional.affine_grid(
        torch.cat([matrix, shift[:, :, None]], dim=2), [n, 1, *cells.shape[1:]], align_corners=False
    )
    warped = functional.grid_sample(cells[:, None], grid, align_corners=False)[:, 0]
    gain = 1 + 0.3 * strength * uniform()
    noise = 0.08 * strength[:, None, None] * torch.randn(cells.shape, generator=generator)
    return (warped * gain[:, None, None] + noise).clamp(0, 1)


def to_pixel_values(cells: torch.Tensor, processor: LlavaProcessor) -> torch.Tensor:
    """What the processor makes of the grids: (B, 3, 3, 16, 16) in 0..1 -> (B, 3, 48, 48)."""
    pixels = cells.permute(0, 1, 3, 2, 4).reshape(-1, 1, task.IMAGE_PIXELS, task.IMAGE_PIXELS)
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    return (pixels - mean) / std


def training_images(grids: list[task.Grid], processor: LlavaProcessor, generator: torch.Generator) -> torch.Tensor:
    """Augmented (B, 3, 48, 48) pixel values of `grids`."""
    cells = torch.from_numpy(np.stack([grid.cells for grid in grids])).float() / 255
    return to_pixel_values(augment(cells.flatten(0, 2), generator).view(cells.shape), processor)


# Phase 1: the vision tower


def patch_targets(grids: list[task.Grid]) -> torch.Tensor:
    """(B, P) digit shown in the cell of each patch, in the tower's patch order."""
    digits = torch.from_numpy(np.stack([grid.digits for grid in grids]))
    patches = PATCHES_PER_SIDE // task.GRID_SIZE
    return digits.repeat_interleave(patches, 1).repeat_interleave(patches, 2).flatten(1)


def patch_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, P, D) features of the layer that the projector reads."""
    tower = model.model.vision_tower
    return tower(pixel_values, output_hidden_states=True).hidden_states[model.config.vision_feature_layer][:, 1:]


@torch.no_grad()
def tower_accuracy(model, heads, processor) -> float:
    """Share of held-out digits that the auxiliary head names rightly, voting over a cell's patches."""
    cells, labels = (torch.from_numpy(array) for array in task.load_digits_split("test"))
    grids = cells.view(-1, task.GRID_SIZE, task.GRID_SIZE, *cells.shape[1:]).float() / 255
    logits = heads(patch_features(model, to_pixel_values(grids, processor))).float()[..., :10]
    patches = PATCHES_PER_SIDE // task.GRID_SIZE
    votes = logits.log_softmax(-1).view(-1, task.GRID_SIZE, patches, task.GRID_SIZE, patches, 10).sum((2, 4))
    return (votes.argmax(-1).flatten() == labels).float().mean().item()


def train_tower(model, processor, args, rng: np.random.Generator, generator: torch.Generator) -> float:
    """Teach every patch its digit, row and column with linear heads that are thrown away."""
    tower = model.model.vision_tower
    heads = torch.nn.Linear(tower.config.hidden_size, 10 + 2 * PATCHES_PER_SIDE)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, args.tower_steps))
    rows = torch.arange(PATCHES_PER_SIDE).repeat_interleave(PATCHES_PER_SIDE)
    columns = torch.arange(PATCHES_PER_SIDE).repeat(PATCHES_PER_SIDE)
    bar = tqdm(range(args.tower_steps), desc="tower", mininterval=5)
    for step in bar:
        grids = [task.make_grid(rng, "train") for _ in range(TOWER_BATCH)]
        targets = patch_targets(grids)
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BFLOAT16):
            logits = heads(patch_features(model, training_images(grids, processor, generator))).float()
        digit, row, column = logits.split([10, PATCHES_PER_SIDE, PATCHES_PER_SIDE], dim=-1)
        loss = functional.cross_entropy(digit.flatten(0, 1), targets.flatten(), label_smoothing=0.05)
        loss = loss + 0.2 * functional.cross_entropy(row.flatten(0, 1), rows.repeat(TOWER_BATCH))
        loss = loss + 0.2 * functional.cross_entropy(column.flatten(0, 1), columns.repeat(TOWER_BATCH))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            hits = (digit.argmax(-1) == targets).float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", digit=f"{hits:.3f}")
    return tower_accuracy(model, heads, processor)


# Phase 2: the decoder, on text


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Factor of the peak: linear warmup, then cosine down to nearly zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup)))


class KeepFloat32(TorchFunctionMode):
    """Muon orthogonalizes its updates in bfloat16. Within this mode `Tensor.bfloat16` copies in float32 instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].float().clone()
        return func(*args, **(kwargs or {}))


def make_optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embedding and head, where it needs fewer steps than AdamW; AdamW for the rest."""
    inner, outer = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            is_inner = weight.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
            (inner if is_inner else outer).append(weight)
    return [
        torch.optim.Muon(inner, lr=4e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def make_schedules(optimizers: list, steps: int) -> list[torch.optim.lr_scheduler.LRScheduler]:
    return [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
        for optimizer in optimizers
    ]


def descend(model, loss: torch.Tensor, optimizers: list, schedules: list) -> None:
    """One step of every optimizer."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_([weight for weight in model.parameters() if weight.requires_grad], 1.0)
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        with contextlib.nullcontext() if HAS_BFLOAT16 else KeepFloat32():
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def answer_logits(model, ids: torch.Tensor, mask: torch.Tensor, **inputs) -> torch.Tensor:
    """Logits (N, V) that predict the tokens `ids[mask]`. ids, mask (B, T)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BFLOAT16):
        hidden = model.model(input_ids=ids, **inputs).last_hidden_state
        return model.lm_head(hidden[:, :-1][mask[:, 1:]]).float()


def text_line(rng: np.random.Generator) -> str:
    """A counting turn, or the answer to a comparison: what follows from the words before is there to be learned."""
    digits = task.sample_digits(rng)
    if rng.random() < 0.5:
        return f" ASSISTANT: {task.ask_compare(rng, digits)[1]}</s>"
    question, answer = task.ask_count(rng, digits)
    return f"USER: {question} ASSISTANT: {answer}</s>"


def train_language(model, processor, args, rng: np.random.Generator) -> None:
    """Predict the words that follow from others. With images alone, this has to wait until digits are found."""
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    tokenizer = processor.tokenizer
    flags = torch.tensor([tokenizer.encode(word, add_special_tokens=False)[0] for word in (" yes", " no")])
    optimizers = make_optimizers(model)
    schedules = make_schedules(optimizers, args.text_steps)
    bar = tqdm(range(args.text_steps), desc="language", mininterval=5)
    for step in bar:
        texts = ["".join(text_line(rng) for _ in range(TEXT_LINES)) for _ in range(TEXT_BATCH)]
        ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        mask = torch.isin(ids, flags) | (ids == tokenizer.eos_token_id).roll(-1, dims=1)  # yes, no and last words
        logits = answer_logits(model, ids, mask)
        labels = ids[mask]
        loss = functional.cross_entropy(logits, labels)
        descend(model, loss, optimizers, schedules)
        if step % 10 == 0:
            hits = (logits.argmax(-1) == labels).float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{hits:.3f}")
    model.model.multi_modal_projector.requires_grad_(True)


# Phase 3: projector and decoder


def conversation(questions: list[task.Question]) -> list[dict]:
    """Chat messages of several questions about one image."""
    messages = []
    for turn, question in enumerate(questions):
        image = [{"type": "image"}] if turn == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    return messages


def conversation_text(questions: list[task.Question]) -> str:
    """`conversation` as the chat template renders it: the same string, without the template engine's time."""
    turns = "".join(f"USER: {question.text} ASSISTANT: {question.answer}</s>" for question in questions)
    return f"{SYSTEM} " + turns.replace("USER: ", "USER: " + "<image>" * PATCHES_PER_SIDE**2 + "\n", 1)


def answer_mask(ids: torch.Tensor, assistant_id: int, eos_id: int) -> torch.Tensor:
    """True for the tokens of answers and the </s> that ends each. (B, T) ids -> (B, T)."""
    opened = (ids == assistant_id).cumsum(1)
    closed = (ids == eos_id).cumsum(1) - (ids == eos_id).long()  # </s> itself still counts as open
    inside = opened > closed
    head = ids == assistant_id
    head[:, 1:] |= head[:, :-1].clone()  # "ASSISTANT" and ":" are given, not answered
    return inside & ~head


def sample_conversations(
    rng, progress: float, short: bool
) -> tuple[list[task.Grid], list[list[task.Question]], np.ndarray]:
    """Grids to look at, the questions about each of them, and the kinds of these, `(grids, turns)`."""
    turns, size = (SHORT_TURNS, SHORT_BATCH) if short else (LONG_TURNS, LONG_BATCH)
    odds = np.cumsum(FIRST_KINDS if progress < MOSTLY_LOOKUP else LATER_KINDS)
    kinds = np.searchsorted(odds, rng.random((size, turns)) * odds[-1], side="right")
    grids = [task.make_grid(rng, "train") for _ in range(size)]
    questions = [
        [task.ask(rng, grid, task.KINDS[kind]) for kind in row] for grid, row in zip(grids, kinds, strict=True)
    ]
    return grids, questions, kinds


def sample_batch(rng, generator, processor, progress: float, short: bool):
    """Token ids (B, T), pixel values (B, 3, 48, 48) and, flat, the kind and turn of every answer of a batch."""
    grids, questions, kinds = sample_conversations(rng, progress, short)
    texts = [conversation_text(turns) for turns in questions]
    encoded = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return encoded["input_ids"], training_images(grids, processor, generator), torch.from_numpy(kinds)


def right_turns(logits: torch.Tensor, labels: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Which turns have every answer token right. logits (N, V) and labels (N,) of a batch's answers -> (turns,)."""
    ends = labels == eos_id
    turn = ends.cumsum(0) - ends.long()  # (N,) index of the turn that a token belongs to
    return torch.bincount(turn, weights=(logits.argmax(-1) != labels).float()) == 0


def train_decoder(model, processor, args, rng: np.random.Generator, generator: torch.Generator) -> None:
    """Projector and decoder learn to answer; the tower stays as it is."""
    model.model.vision_tower.requires_grad_(False)
    optimizers = make_optimizers(model)
    schedules = make_schedules(optimizers, args.steps)
    tokenizer = processor.tokenizer
    assistant_id = tokenizer.encode(" ASSISTANT", add_special_tokens=False)[0]
    running = np.zeros(len(task.KINDS))
    bar = tqdm(range(args.steps), desc="decoder", mininterval=5)
    for step in bar:
        short = step % 5 == 4
        ids, pixel_values, kinds = sample_batch(rng, generator, processor, step / args.steps, short)
        mask = answer_mask(ids, assistant_id, tokenizer.eos_token_id)
        logits = answer_logits(model, ids, mask, pixel_values=pixel_values)
        labels = ids[mask]
        loss = functional.cross_entropy(logits, labels)
        descend(model, loss, optimizers, schedules)
        right = right_turns(logits, labels, tokenizer.eos_token_id)
        for kind in range(len(task.KINDS)):
            chosen = right[kinds.flatten() == kind]
            if len(chosen):
                running[kind] += 0.05 * (chosen.float().mean().item() - running[kind])
        if step % 10 == 0:
            shares = {kind: f"{share:.2f}" for kind, share in zip(task.KINDS, running, strict=True)}
            bar.set_postfix(loss=f"{loss.item():.3f}", **shares)


# Evaluation, through the saved files


def wilson_interval(hits: int, n: int) -> list[float]:
    """95 % interval of a proportion."""
    return [round(float(end), 4) for end in binomtest(hits, n).proportion_ci(method="wilson")]


@torch.no_grad()
def generate_answers(model, processor, images: list, questions: list[task.Question], batch: int = 100) -> list[str]:
    """Greedy answers to single-turn questions, each with its image."""
    answers = []
    for start in tqdm(range(0, len(questions), batch), desc="evaluate", mininterval=5):
        part = slice(start, start + batch)
        prompts = [
            processor.apply_chat_template(conversation([question])[:1], add_generation_prompt=True)
            for question in questions[part]
        ]
        inputs = processor(images=images[part], text=prompts, padding=True, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(tokens, skip_special_tokens=True)
    return answers


def evaluate(directory: Path, seed: int, n_per_kind: int) -> dict:
    """Held-out accuracy per kind of the model saved in `directory`, and what it reaches without the right image."""
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(directory)
    pairs = task.make_questions(seed, n_per_kind, "test")
    questions = [question for _, question in pairs]
    images = [grid.image for grid, _ in pairs]
    # a neighbour of the same kind lends its image: same distribution, nothing to do with the question
    kinds = len(task.KINDS)
    blank = task.Image.new("RGB", images[0].size)
    views = {
        "accuracy": images,
        "shuffled_image": images[kinds:] + images[:kinds],
        "blank_image": [blank] * len(images),
    }
    hits = {}
    for view, shown in views.items():
        answers = generate_answers(model, processor, shown, questions)
        hits[view] = np.array([task.is_correct(a, q.answer) for a, q in zip(answers, questions, strict=True)])
    results = {}
    for kind in task.KINDS:
        of_kind = np.array([question.kind == kind for question in questions])
        expected = [question.answer for question in questions if question.kind == kind]
        results[kind] = {
            "questions": len(expected),
            "accuracy": float(hits["accuracy"][of_kind].mean()),
            "wilson_95": wilson_interval(int(hits["accuracy"][of_kind].sum()), len(expected)),
            "most_common_answer": max(map(expected.count, set(expected))) / len(expected),
            "shuffled_image": float(hits["shuffled_image"][of_kind].mean()),
            "blank_image": float(hits["blank_image"][of_kind].mean()),
        }
    return results


# Command


def take_tower(model: LlavaForConditionalGeneration, directory: Path) -> float:
    """Give `model` the vision tower trained in `directory`, and return the digit accuracy recorded there.

    Raises:
        ValueError: the tower there has another size.
    """
    trained = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    theirs, ours = trained.config.vision_config.to_dict(), model.config.vision_config.to_dict()
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size"):
        if theirs[field] != ours[field]:
            raise ValueError(f"--tower {directory}: {field} is {theirs[field]} there and {ours[field]} here")
    model.model.vision_tower.load_state_dict(trained.model.vision_tower.state_dict())
    return json.loads((directory / "training.json").read_text())["tower_digit_accuracy_held_out"]


def train(args, processor) -> tuple[LlavaForConditionalGeneration, dict]:
    """The trained model and what the phases report."""
    model = LlavaForConditionalGeneration(build_config(processor.tokenizer, args.layers, args.hidden_size))
    init_decoder(model)
    rng = np.random.default_rng(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    start = time.monotonic()
    if args.tower is None:
        digit_accuracy = train_tower(model, processor, args, rng, generator)
    else:
        digit_accuracy = take_tower(model, args.tower)
    tower_end = time.monotonic()
    train_language(model, processor, args, rng)
    language_end = time.monotonic()
    train_decoder(model, processor, args, rng, generator)
    facts = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "tower_digit_accuracy_held_out": digit_accuracy,
        "tower_seconds": round(tower_end - start),
        "text_seconds": round(language_end - tower_end),
        "decoder_seconds": round(time.monotonic() - language_end),
    }
    return model, facts


def versions() -> dict[str, str]:
    packages = ("numpy", "scikit-learn", "tokenizers", "torch", "transformers")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def save(model, processor, directory: Path) -> None:
    model.half().save_pretrained(directory)
    processor.save_pretrained(directory)


def replace_directory(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`, which exists in full before and after."""
    old = new.with_name(new.name + ".old")
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def read_record(directory: Path) -> dict:
    """The training.json of a directory, empty if it has none."""
    try:
        return dict(json.loads((directory / "training.json").read_text()))
    except (OSError, TypeError, ValueError):
        return {}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n"
        "  python scripts/train_tiny_llava.py                    the weights of examples/tiny-llava\n"
        "  python scripts/train_tiny_llava.py --seed 1 --output /tmp/tiny-llava-1\n"
        "  python scripts/train_tiny_llava.py --layers 12 --tower examples/tiny-llava \\\n"
        "      --output examples/tiny-llava-12\n"
        "  python scripts/train_tiny_llava.py --tower-steps 5 --text-steps 5 --steps 5 --questions 4 \\\n"
        "      --output /tmp/tiny-llava-smoke\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=ROOT / "examples" / "tiny-llava", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and augmentation (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of the decoder (default: %(default)s)")
    parser.add_argument(
        "--hidden-size", type=int, default=128, help="of tower and decoder, a multiple of 8 (default: %(default)s)"
    )
    parser.add_argument("--tower-steps", type=int, default=500, help="phase 1 (default: %(default)s)")
    parser.add_argument(
        "--tower", type=Path, metavar="DIR", help="take the trained tower of this LLaVA instead of training one"
    )
    parser.add_argument("--text-steps", type=int, default=300, help="phase 2 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="phase 3 (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=1000, help="evaluated, of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    steps = {"tower_steps": 0, "text_steps": 0, "steps": 0}
    for name, least in {"layers": 1, "questions": 1, "threads": 1, "seed": 0, **steps}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    step = 2 * NUM_HEADS  # rotary embedding splits the size of a head in two
    if args.hidden_size < step or args.hidden_size % step:
        parser.error(f"--hidden-size must be a multiple of {step} ({NUM_HEADS} heads), got {args.hidden_size}")
    if args.tower is not None and not (args.tower / "training.json").exists():
        parser.error(f"--tower {args.tower} holds no training.json: not a directory of this script")
    # the directory is replaced as a whole: one that this script did not write must not be lost
    if args.output.exists() and "tower_steps" not in read_record(args.output):
        parser.error(f"--output {args.output} exists and holds no training.json of this script")
    return args


def main() -> None:
    args = parse_args()
    start = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    processor = build_processor(build_tokenizer(args.seed))
    model, facts = train(args, processor)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{args.output.name}-", dir=args.output.parent))
    try:
        save(model, processor, directory)
        results = evaluate(directory, seed=args.seed + 1000, n_per_kind=args.questions)
        record = {
            "seed": args.seed,
            "layers": args.layers,
            "hidden_size": args.hidden_size,
            "tower_steps": args.tower_steps if args.tower is None else 0,
            "text_steps": args.text_steps,
            "steps": args.steps,
            **facts,
            "total_seconds": round(time.monotonic() - start),
            "threads": args.threads,
            "versions": versions(),
            "held_out": results,
        }
        (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        directory.chmod(0o755)  # mkdtemp makes it private, and so is what safetensors writes
        (directory / "model.safetensors").chmod(0o644)
        replace_directory(directory, args.output)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    for kind, result in results.items():
        low, high = result["wilson_95"]
        print(f"{kind:9} {result['accuracy']:.3f} [{low:.3f}, {high:.3f}]  shuffled {result['shuffled_image']:.3f}")
    print(f"{args.output}: {facts['parameters'] / 1e6:.2f} M parameters in {record['total_seconds'] / 60:.1f} minutes")


if __name__ == "__main__":
    sys.exit(run_command(main, NOTHING))
