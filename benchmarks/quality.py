#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Accuracy against cost: dense LLaVA, DPVR, FastV, VTW and PyramidDrop on the embedded LLaVAs.

Every method answers the same held-out questions about digits that nothing was trained on. A seed decides the
questions, and the order of training where there is any. DPVR stands here untrained (the identity side branch that the
converter writes) and trained (`training/staged.py`, all else frozen; or the fusion layers with it, or these alone
where there is no side branch), at every saturation layer; VTW at every layer; FastV and PyramidDrop over their ranges;
dense LLaVA and these three, where `may_gain` says, also with their last layer trained as the fusion layer is.

An answer is right only as a whole. Greedy generation gives it where at each of its tokens, the end included, the most
likely next token is the right one, so one teacher-forced pass tells; which vision tokens remain, the prompt's last
token decides there too, as in generation. `tests/test_quality.py` holds both ways against each other.

Costs are those of the formulas in `accounting.py` and `baselines.py`, for the lengths of the prompts that were asked:
FLOPs of the decoder for the prompt, and bytes of the KV cache after it.

All methods share the dense model's layers up to where they leave it, so these are computed once. Each result is
written as it is there; an interrupted run goes on where it was.
"""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor, DynamicCache, LlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits as task

from benchmarks import accounting, baselines
from benchmarks.baselines import PrunedLlava, fastv, pyramid_drop, vtw
from benchmarks.command import (
    GOES_ON,
    check_figure,
    check_learning_rate,
    check_numbers,
    check_output,
    read_record,
    run_command,
    write_record,
)
from benchmarks.side_branch_seeds import (
    batches_of,
    check_weights,
    labelled,
    mean_interval,
    read_results,
    right_answers,
    text_batch,
)
from benchmarks.side_branch_seeds import train as train_late
from benchmarks.tables import markdown
from configuration_dpvr import DPVRConfig
from convert_llava_to_dpvr import convert
from scripts.train_tiny_llava import (
    LONG_BATCH,
    LONG_TURNS,
    conversation_text,
    sample_conversations,
    to_pixel_values,
    training_images,
    versions,
)
from training.adapters import add_adapter
from training.staged import LOSSES, Features, StagedModel, predicts, split_rows

RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
FIGURE = ROOT / "figures" / "quality.png"
MODELS = ("tiny-llava", "tiny-llava-12")
SETTINGS = ("questions", "steps", "batch_size", "learning_rate", "pool", "loss")
TRAININGS = ("untrained", "trained", "trained with fusion")
LORA = "trained with LoRA"
LAST = "last layer trained"
SEEN = {  # in the side branch, by the places of the token that looks and of the one that is looked at
    "earlier vision tokens": torch.ge,
    "all vision tokens": lambda rows, columns: rows == rows,
    "itself alone": torch.eq,
}
FASTV_RATIOS = (0.25, 0.5, 0.75, 0.9)
PYRAMID_SHARES = (0.5, 0.25)
VISION_HEAVY = ("count", "describe")
KEPT = 0.99  # of dense accuracy: what methods are compared at
FIRST_QUESTION_SEED = 2000  # other questions than those that trained and chose anything


# The methods


@dataclass(frozen=True)
class Routing:
    """A DPVR.

    Attributes:
        training: `"untrained"`, `"trained"` for the side branch alone, `"trained with fusion"` for the fusion layers
            too, or `"trained with LoRA"` for LoRA on these instead, which an adapter can hold.
        num_side_layers: none tells what the side branch has to do with it.
        sees: what a vision token attends to in the side branch, a name of `SEEN`.
    """

    saturation_layer: int
    training: str
    num_side_layers: int = 1
    num_fusion_layers: int = 1
    sees: str = "earlier vision tokens"


@dataclass(frozen=True)
class TrainedLast:
    """A baseline, or with no stages dense LLaVA, whose last layer, which is DPVR's fusion layer, has trained as that
    one does: its authors train nothing."""

    stages: tuple[baselines.Stage, ...]


def name_of(routing: Routing) -> str:
    name = f"dpvr/{routing.saturation_layer}/{routing.training}"
    if routing.num_side_layers != 1:
        name += f"/{routing.num_side_layers or 'no'} side layers"
    if routing.num_fusion_layers > 1:
        name += f"/{routing.num_fusion_layers} fusion layers"
    if routing.sees != Routing.sees:
        name += f"/side branch sees {routing.sees}"
    return name


def fractions(num_layers: int, *shares: float) -> list[int]:
    """Layers at these shares of the depth, each once."""
    return sorted({max(1, round(share * num_layers)) for share in shares})


def methods(num_layers: int) -> dict[str, tuple[baselines.Stage, ...] | TrainedLast | Routing]:
    """All methods by name. PyramidDrop's layers are at the authors' shares of the depth, at later and at earlier ones;
    the variants of DPVR stand where vision leaves early, which is where it costs accuracy."""
    found: dict[str, tuple[baselines.Stage, ...] | TrainedLast | Routing] = {"dense": ()}
    for layer in range(1, num_layers):
        found[f"vtw/{layer}"] = vtw(layer)
    for layer in fractions(num_layers, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4):
        for ratio in FASTV_RATIOS:
            found[f"fastv/{layer}/{ratio}"] = fastv(layer, ratio)
            found[f"fastv, all ask/{layer}/{ratio}"] = fastv(layer, ratio, all_ask=True)
    for shares in ((1 / 4, 1 / 2, 3 / 4), (1 / 8, 1 / 4, 1 / 2), (1 / 2, 5 / 8, 3 / 4)):
        layers = tuple(fractions(num_layers, *shares))
        for share in PYRAMID_SHARES:
            found[f"pyramid/{'-'.join(map(str, layers))}/{share}"] = pyramid_drop(layers, share)
    found |= {f"{name}/{LAST}": TrainedLast(stages) for name, stages in found.items() if may_gain(stages, num_layers)}
    routings = [Routing(layer, training) for training in TRAININGS for layer in range(1, num_layers)]
    routings += [Routing(layer, "trained with fusion", num_side_layers=0) for layer in range(1, num_layers)]
    for layer in fractions(num_layers, 1 / 8, 1 / 4):
        routings += [Routing(layer, training, num_fusion_layers=2) for training in TRAININGS[1:]]
        routings.append(Routing(layer, LORA))
        routings.append(Routing(layer, "trained", num_side_layers=2))
    # Where a trained side branch, alone or with the fusion layer, adds most to what is there without it
    for layer, training in [*((layer, "trained") for layer in fractions(num_layers, 1 / 4, 3 / 8)), (1, TRAININGS[2])]:
        routings += [Routing(layer, training, sees=seen) for seen in SEEN if seen != Routing.sees]
    return found | {name_of(routing): routing for routing in routings}


def may_gain(stages: tuple[baselines.Stage, ...], num_layers: int) -> bool:
    """Whether the last layer of a baseline is trained: FastV where the prompt's last token asks, all where vision has
    gone by half of the depth, for later it costs next to nothing, and dense LLaVA, to tell what training does."""
    return not stages or (stages[0].layer <= num_layers // 2 and not stages[0].all_ask)


def routed_config(dense_config, routing: Routing) -> DPVRConfig:
    fields = dense_config.to_dict()
    del fields["model_type"]
    return DPVRConfig(
        **fields,
        saturation_layer=routing.saturation_layer,
        num_side_layers=routing.num_side_layers,
        num_fusion_layers=routing.num_fusion_layers,
    )


def prompt_cost(config, method, vision_tokens: int, text_tokens: int) -> tuple[int, int]:
    """FLOPs of the decoder for one prompt, and bytes of the KV cache after it in 16 bit. `config` is the dense model's
    or, of a `Routing`, its `routed_config`.

    Of the last layer only the prompt's last token is read. DPVR computes no other's output there; that has nothing to
    do with what it routes, so it is counted so for every method.
    """
    if isinstance(method, Routing):
        flops = accounting.prefill_flops(config, vision_tokens, text_tokens).decoder
        return flops, sum(accounting.cache_bytes(config, vision_tokens, text_tokens).values())
    stages = method.stages if isinstance(method, TrainedLast) else method
    arguments = (config, stages, vision_tokens, text_tokens)
    loads = accounting.read_one_token(baselines.prefill_loads(*arguments))
    flops = accounting.decoder_flops(config, loads) + baselines.ranking_flops(*arguments)
    return flops, baselines.cache_bytes(*arguments)


def relative_cost(dense_config, method, lengths: dict[int, int]) -> tuple[float, float]:
    """FLOPs and bytes as shares of the dense model's. Prompts hold one image; `lengths` counts their text tokens."""
    vision_tokens = accounting.tokens_per_image(dense_config)
    config = routed_config(dense_config, method) if isinstance(method, Routing) else dense_config
    totals = np.zeros((2, 2))
    for text_tokens, number in lengths.items():
        for row, pair in zip(totals, ((config, method), (dense_config, ())), strict=True):
            row += number * np.array(prompt_cost(*pair, vision_tokens, text_tokens))
    return tuple((totals[0] / totals[1]).tolist())


# What all methods start from


@dataclass
class Prepared:
    """A batch and what the dense model makes of it.

    Attributes:
        is_vision, attention_mask, labels: `(B, T)`, padded on the right; labels are -100 outside of answers.
        states: the states `(B, T, D)` that reach each layer; None for a layer of which none were kept.
        final_states: `(N, D)`, after the norm, of the tokens that predict the answers'.
        kind: of the questions, where all rows ask one of the same kind.
    """

    is_vision: torch.BoolTensor
    attention_mask: torch.Tensor
    labels: torch.LongTensor
    states: list[torch.Tensor | None]
    final_states: torch.Tensor
    kind: str

    @property
    def last_column(self) -> torch.LongTensor:
        """`(B,)`, where the prompt ends: the first token that predicts one of the answer."""
        return predicts(self.labels).to(torch.uint8).argmax(1)


@torch.no_grad()
def prepare(
    llava,
    batch: dict[str, torch.Tensor],
    kind: str = "",
    dtype: torch.dtype = torch.float32,
    layers: Collection[int] | None = None,
) -> Prepared:
    """Runs the dense `LlavaForConditionalGeneration` on a batch of `labelled`; states are kept in `dtype`, those that
    reach these `layers`, or all."""
    batch, labels = dict(batch), batch["labels"]
    del batch["labels"]
    outputs = llava.model(**batch, use_cache=False, output_hidden_states=True)
    return Prepared(
        is_vision=batch["input_ids"] == llava.config.image_token_id,
        attention_mask=batch["attention_mask"],
        labels=labels,
        states=[
            state.to(dtype) if layers is None or layer in layers else None
            for layer, state in enumerate(outputs.hidden_states[:-1])
        ],
        final_states=outputs.last_hidden_state[predicts(labels)],
        kind=kind,
    )


def question_batches(processor, seed: int, num_questions: int) -> dict[str, dict[str, torch.Tensor]]:
    """`num_questions` held-out questions of each kind with their answers; a kind, of similar lengths, is a batch."""
    pairs = task.make_questions(FIRST_QUESTION_SEED + seed, num_questions, "test")
    batches = {}
    for kind in task.KINDS:
        grids, questions = zip(*(pair for pair in pairs if pair[1].kind == kind), strict=True)
        ids = text_batch(processor, [conversation_text([question]) for question in questions])["input_ids"]
        cells = torch.from_numpy(np.stack([grid.cells for grid in grids])).float() / 255
        batches[kind] = labelled(processor, ids, to_pixel_values(cells, processor))
    return batches


def training_batches(
    llava, processor, num_batches: int, each_alone: bool = False, layers: Collection[int] | None = None
) -> list[Prepared]:
    """Conversations of many questions each to train on, the same for every method. With `each_alone` every question is
    a row by itself, as baselines need it: what they keep of an image, the first question decides. `layers` as of
    `prepare`."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    prepared = []
    for _ in tqdm(range(num_batches), desc="training conversations", mininterval=5):
        grids, conversations, _ = sample_conversations(rng, progress=1.0, short=False)
        pixel_values = training_images(grids, processor, generator)
        if each_alone:
            pixel_values = pixel_values.repeat_interleave(LONG_TURNS, dim=0)
            conversations = [[question] for turns in conversations for question in turns]
        texts = [conversation_text(turns) for turns in conversations]
        batch = labelled(processor, text_batch(processor, texts)["input_ids"], pixel_values)
        prepared.append(prepare(llava, batch, dtype=torch.float16, layers=layers))
    return prepared


# Answers


def first_layer(stages: tuple[baselines.Stage, ...]) -> int:
    """Where these leave the dense model."""
    return min(stages[0].ranking_layer, stages[0].layer) if stages[0].ranks else stages[0].layer


def decoder_arguments(model: PrunedLlava, batch: Prepared) -> tuple:
    """Those of `PrunedLlavaModel.run_layers`, which goes on from where the first of its stages leaves the dense
    model."""
    first = first_layer(model.stages)
    cache = DynamicCache(config=model.config.text_config)
    return batch.states[first].float(), batch.is_vision, batch.attention_mask, None, cache, batch.last_column, first


@torch.no_grad()
def pruned_accuracy(model: PrunedLlava, stages: tuple[baselines.Stage, ...], batches: list[Prepared]) -> dict:
    """Accuracy of a baseline, or with no stages of the dense model, by kind."""
    model.stages = stages
    accuracy = {}
    for batch in batches:
        states = batch.final_states
        if stages:
            states = model.model.decode(*decoder_arguments(model, batch))[predicts(batch.labels)]
        accuracy[batch.kind] = right_answers(model.lm_head(states), batch.labels).float().mean().item()
    return accuracy


@torch.no_grad()
def pruned_features(model: PrunedLlava, stages: tuple[baselines.Stage, ...], batch: Prepared) -> Features:
    """What the last layer of a baseline starts from; a dropped token is masked as padding is."""
    model.stages = stages
    last = len(model.model.language_model.layers) - 1
    if stages:
        tokens, states, all_states = model.model.run_layers(*decoder_arguments(model, batch), end_layer=last)
        states = baselines.put(all_states, tokens, states)
        is_kept = torch.zeros_like(batch.is_vision).scatter(1, tokens.index, tokens.valid)
    else:
        states, is_kept = batch.states[last].float(), batch.attention_mask.bool()
    return Features(states, torch.zeros_like(is_kept), is_kept.long(), batch.labels, batch.final_states)


def masked_rows(features: Features) -> list[dict[str, torch.Tensor]]:
    """Rows as of `split_rows`, but with dropped tokens and padding in their places, and a mask that says so."""
    names = ("hidden_states", "is_vision", "attention_mask", "labels")
    teachers = features.teacher_states.split(predicts(features.labels).sum(-1).tolist())
    return [
        {name: getattr(features, name)[i] for name in names} | {"teacher_states": teacher}
        for i, teacher in enumerate(teachers)
    ]


@torch.no_grad()
def routed_features(staged: StagedModel, batch: Prepared) -> Features:
    """What DPVR's side branch and fusion layers start from: the text-only layers are run."""
    states = batch.states[staged.config.saturation_layer].float()
    text = staged.core.plan_call(states, batch.is_vision, batch.attention_mask, None)[1]
    states = staged.code.run_stream(staged.layers()[1], states, text)
    return Features(states, batch.is_vision, batch.attention_mask, batch.labels, batch.final_states)


@torch.no_grad()
def routed_accuracy(staged: StagedModel, batches: list[tuple[Prepared, Features]]) -> dict:
    staged.eval()
    accuracy = {}
    for batch, features in batches:
        logits = staged.base.lm_head(staged.answer_states(features))
        accuracy[batch.kind] = right_answers(logits, batch.labels).float().mean().item()
    return accuracy


# The run


def measure_baselines(llava_folder: Path, found: dict, held_out: list[list[Prepared]], cells: dict, save) -> None:
    model = PrunedLlava.from_pretrained(llava_folder, dtype=torch.float32).eval()
    stages = {name: method for name, method in found.items() if isinstance(method, tuple)}
    for name in tqdm(stages, desc="baselines"):
        for seed, batches in enumerate(held_out):
            if str(seed) not in cells.setdefault(name, {}):
                cells[name][str(seed)] = pruned_accuracy(model, stages[name], batches)
        save()


def measure_trained_baselines(
    llava_folder: Path,
    found: dict[str, TrainedLast],
    held_out: list[list[Prepared]],
    pool: list[Prepared],
    args,
    cells_by_steps: dict[int, dict],
    save,
) -> None:
    """As `measure_routings`, from the same conversations and for as many steps, of as many answers each."""
    model = PrunedLlava.from_pretrained(llava_folder, dtype=torch.float32).eval()
    last = len(model.model.language_model.layers) - 1
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:  # nothing routed, nothing added: a last layer
        staged = load_routed(llava_folder, Routing(last, "untrained", num_side_layers=0), Path(folder), args.loss)
    [layer] = staged.layers()[2]
    layer.requires_grad_(True)
    untrained = {name: weight.clone() for name, weight in layer.state_dict().items()}
    for name, method in tqdm(found.items(), desc="baselines, last layer trained"):
        rows = [row for batch in pool for row in masked_rows(pruned_features(model, method.stages, batch))]
        for seed, (steps, cells) in product(range(len(held_out)), cells_by_steps.items()):
            if str(seed) in cells.setdefault(name, {}):
                continue
            layer.load_state_dict(untrained)
            batches = batches_of(rows, args.batch_size * LONG_TURNS, seed)
            train_late(staged, batches, steps, args.learning_rate)
            features = [(batch, pruned_features(model, method.stages, batch)) for batch in held_out[seed]]
            cells[name][str(seed)] = routed_accuracy(staged, features)
            save()


def load_routed(llava_folder: Path, routing: Routing, folder: Path, loss: str = "answer") -> StagedModel:
    """The DPVR that the converter makes, of which the side branch trains, and LoRA where there is to be any."""
    path = folder / name_of(routing).replace("/", "-").replace(" ", "-")
    convert(
        llava_folder,
        path,
        saturation_layer=routing.saturation_layer,
        num_side_layers=routing.num_side_layers,
        num_fusion_layers=routing.num_fusion_layers,
        dtype="float32",
    )
    model = AutoModel.from_pretrained(path, trust_remote_code=True).requires_grad_(False)
    shutil.rmtree(path)
    if routing.sees != Routing.sees:
        model.model.side_branch.register_forward_pre_hook(partial(set_mask, SEEN[routing.sees]))
    if routing.training == LORA:
        return StagedModel(add_adapter(model, "fusion"), loss)
    model.model.side_branch.requires_grad_(True)
    return StagedModel(model, loss)


def set_mask(sees: Callable, branch: torch.nn.Module, arguments: tuple) -> tuple:
    """A hook before the side branch: its tokens attend to those of their row that `sees` says, padding to itself."""
    states, plan = arguments
    place = torch.arange(states.shape[1])
    is_token = plan.stream.valid
    visible = sees(place[:, None], place) & is_token[:, None] | torch.eye(len(place), dtype=torch.bool)
    return states, replace(plan, mask=visible[:, None])


def reset_lora(staged: StagedModel, seed: int) -> None:
    """Draws LoRA's first matrices anew, as a run with this seed has them."""
    torch.manual_seed(seed)
    for module in staged.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("default", init_lora_weights=True)


def measure_routings(
    llava_folder: Path,
    routings: list[Routing],
    held_out: list[list[Prepared]],
    pool: list[Prepared],
    args,
    cells_by_steps: dict[int, dict],
    save,
) -> None:
    """Cells of routings that differ at most in what is trained, by steps of training."""
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        staged = load_routed(llava_folder, routings[0], Path(folder), args.loss)
    late = torch.nn.ModuleDict(
        {"side branch": staged.core.side_branch, "fusion": torch.nn.ModuleList(staged.layers()[2])}
    )
    untrained = {name: weight.clone() for name, weight in late.state_dict().items()}
    features = [[(batch, routed_features(staged, batch)) for batch in batches] for batches in held_out]
    rows = None
    for routing in routings:
        for (seed, batches), (steps, cells) in product(enumerate(features), cells_by_steps.items()):
            mine = cells.setdefault(name_of(routing), {})
            if str(seed) in mine:
                continue
            late.load_state_dict(untrained)
            if routing.training == LORA:
                reset_lora(staged, seed)
            else:
                late["side branch"].requires_grad_(True)
                late["fusion"].requires_grad_("fusion" in routing.training)
            if routing.training != "untrained":
                rows = rows or [row for batch in pool for row in split_rows(routed_features(staged, batch))]
                train_late(staged, batches_of(rows, args.batch_size, seed), steps, args.learning_rate)
            mine[str(seed)] = routed_accuracy(staged, batches)
            save()


def find_missing(found: dict, results: Collection[dict], num_seeds: int) -> dict:
    """The methods of `found` of which one of the `results`, by method and seed, lacks a seed."""

    def lacks(key: str) -> bool:
        return any(str(seed) not in cells.get(key, {}) for cells in results for seed in range(num_seeds))

    return {key: method for key, method in found.items() if lacks(key)}


def held_out_batches(name: str, llava, processor, args) -> list[list[Prepared]]:
    """The questions of each seed, a batch for each kind."""
    seeds = tqdm(range(args.seeds), desc=f"{name}: questions", mininterval=5)
    questions = (question_batches(processor, seed, args.questions) for seed in seeds)
    return [[prepare(llava, batch, kind) for kind, batch in batches.items()] for batches in questions]


def measure(name: str, folder: Path, args, record: dict, wanted: Collection[str] | None = None) -> None:
    """All cells of the LLaVA in `folder` that are not there yet, or those of the methods `wanted`."""
    result = record["models"].setdefault(name, {"prompt_lengths": {}, "cells": {}})
    cells = result["cells"]
    processor = AutoProcessor.from_pretrained(folder)
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    check_weights(args.output, result, llava, folder)
    found = methods(llava.config.text_config.num_hidden_layers)
    missing = find_missing({key: found[key] for key in (found if wanted is None else wanted)}, [cells], args.seeds)
    if not missing:
        return

    stated = ", ".join(f"{package} {version}" for package, version in versions().items())
    before = {key: set(cells.get(key, {})) for key in missing}

    def save() -> None:
        for key in missing:  # with what each method was measured, in order of time
            used = result.setdefault("measured_with", {}).setdefault(key, [])
            if stated not in used and cells.get(key, {}).keys() - before[key]:
                used.append(stated)
        write_record(args.output, record, indent=1)

    held_out = held_out_batches(name, llava, processor, args)
    result["prompt_lengths"] |= {str(seed): prompt_lengths(batches) for seed, batches in enumerate(held_out)}
    measure_baselines(folder, missing, held_out, cells, save)
    trained = {key: method for key, method in missing.items() if isinstance(method, TrainedLast)}
    num_batches = -(-args.pool // LONG_BATCH)
    if trained:
        pool = training_batches(llava, processor, num_batches, each_alone=True)
        measure_trained_baselines(folder, trained, held_out, pool, args, {args.steps: cells}, save)
    groups: dict[tuple, list[Routing]] = {}
    for method in missing.values():
        if isinstance(method, Routing):
            geometry = (
                method.num_side_layers,
                method.num_fusion_layers,
                method.training == LORA,
                method.sees,
                method.saturation_layer,
            )
            groups.setdefault(geometry, []).append(method)
    pool = training_batches(llava, processor, num_batches) if groups else []
    for geometry in tqdm(sorted(groups), desc=f"{name}: routings"):
        measure_routings(folder, groups[geometry], held_out, pool, args, {args.steps: cells}, save)


def prompt_lengths(batches: list[Prepared]) -> dict[str, int]:
    """How many prompts have how many text tokens."""
    counts: Counter[int] = Counter()
    for batch in batches:
        counts.update((batch.last_column + 1 - batch.is_vision.sum(1)).tolist())
    return {str(length): counts[length] for length in sorted(counts)}


# What it says


@dataclass
class Entry:
    """A method's cost as shares of the dense model's, and its accuracy.

    Attributes:
        flops, kv_bytes: shares.
        accuracy: by kind, and `"all"` for the mean of the kinds: one value for each seed.
    """

    model: str
    name: str
    flops: float
    kv_bytes: float
    accuracy: dict[str, np.ndarray]

    @property
    def family(self) -> str:
        return family_of(self.name)


def family_of(name: str) -> str:
    """Of the name of a method: those that one curve of the figure joins."""
    first, *rest = name.split("/")
    if first == "dpvr":
        return " ".join([first, *rest[1:]])
    return f"{first}, {LAST}" if rest and rest[-1] == LAST else first


def setting_of(name: str) -> str:
    """Of the name of a method that drops or routes: the layer, and what else its authors leave open."""
    family, setting, *rest = name.removesuffix(f"/{LAST}").split("/")
    return setting if family == "dpvr" else "/".join([setting, *rest])


def summarize(record: dict) -> list[Entry]:
    """All methods of all LLaVAs."""
    entries = []
    for model, result in record["models"].items():
        entries += summarize_model(model, result, AutoConfig.from_pretrained(ROOT / "examples" / model))
    return entries


def summarize_model(model: str, result: dict, config) -> list[Entry]:
    """All methods whose seeds are all there, with the costs that today's formulas give."""
    entries, lengths = [], Counter()
    for counts in result["prompt_lengths"].values():
        lengths.update({int(length): number for length, number in counts.items()})
    seeds = result["prompt_lengths"].keys()
    for name, method in methods(config.text_config.num_hidden_layers).items():
        cell = result["cells"].get(name, {})
        if not seeds <= cell.keys():
            continue
        accuracy = {kind: np.array([cell[seed][kind] for seed in seeds]) for kind in task.KINDS}
        accuracy["all"] = np.mean(list(accuracy.values()), axis=0)
        entries.append(Entry(model, name, *relative_cost(config, method, lengths), accuracy))
    return entries


def better(entry: Entry, others: list[Entry], cost: str, kind: str) -> Entry | None:
    """The most accurate of the others that cost no more, if that puts `entry` off the Pareto front."""

    def dominates(other: Entry) -> bool:
        difference = other.accuracy[kind].mean() - entry.accuracy[kind].mean()
        saving = getattr(entry, cost) - getattr(other, cost)
        return other is not entry and saving >= 0 and difference >= 0 and (saving > 0 or difference > 0)

    return max(filter(dominates, others), key=lambda other: other.accuracy[kind].mean(), default=None)


def percent(values: np.ndarray) -> str:
    mean, half = mean_interval(100 * values)
    return f"{mean:.1f}" if np.isnan(half) else f"{mean:.1f} ± {half:.1f}"


def table(entries: list[Entry]) -> str:
    """A row for each method. Front: F by FLOPs, K by KV bytes, for the mean of all kinds."""
    rows, header = [], ["LLaVA", "method", "FLOPs %", "KV %", *task.KINDS, "of dense %", "front"]
    for entry in entries:
        beside = [other for other in entries if other.model == entry.model]
        dense = next(other for other in beside if other.name == "dense")
        front = [
            letter for letter, cost in (("F", "flops"), ("K", "kv_bytes")) if not better(entry, beside, cost, "all")
        ]
        rows.append(
            [
                entry.model,
                entry.name,
                f"{100 * entry.flops:.1f}",
                f"{100 * entry.kv_bytes:.1f}",
                *(percent(entry.accuracy[kind]) for kind in task.KINDS),
                percent(entry.accuracy["all"] / dense.accuracy["all"]),
                "".join(front),
            ]
        )
    return markdown(header, rows)


BY_LAYER = {"VTW": "vtw/{}"} | {training: f"dpvr/{{}}/{training}" for training in TRAININGS}  # methods by column


def by_layer(record: dict) -> str:
    """What leaving at each layer does to the vision-heavy kinds: gone for good (VTW), or on the side (DPVR)."""
    found = {(entry.model, entry.name): entry for entry in summarize(record)}
    header = ["LLaVA", "layer", "FLOPs % VTW, DPVR", "KV % VTW, DPVR"]
    header += [f"{kind}: {column}" for kind in VISION_HEAVY for column in BY_LAYER]
    rows = []
    for model, name in found:
        family, _, layer = name.partition("/")
        entries = [found.get((model, column.format(layer))) for column in BY_LAYER.values()]
        if family != "vtw" or None in entries:
            continue
        costs = [[f"{100 * getattr(e, cost):.0f}" for e in entries[:2]] for cost in ("flops", "kv_bytes")]
        cells = [percent(entry.accuracy[kind]) for kind in VISION_HEAVY for entry in entries]
        rows.append([model, layer, *map(", ".join, costs), *cells])
    return markdown(header, rows)


EQUAL = {  # what is compared where it keeps as much: family by method
    "VTW": "vtw",
    f"VTW, {LAST}": f"vtw, {LAST}",
    "FastV": "fastv",
    "FastV, all ask": "fastv, all ask",
    f"FastV, {LAST}": f"fastv, {LAST}",
    "PyramidDrop": "pyramid",
    f"PyramidDrop, {LAST}": f"pyramid, {LAST}",
    "DPVR, side branch trained": "dpvr trained",
    "DPVR, fusion layer trained too": "dpvr trained with fusion",
    "DPVR without side branch, fusion layer trained": "dpvr trained with fusion no side layers",
}


def cheapest_settings(entries: list[Entry]) -> dict[tuple[str, str], list[tuple[Entry, np.ndarray] | None]]:
    """By LLaVA and method the setting that keeps `KEPT` of dense accuracy, on the mean of all kinds, for the fewest
    FLOPs, and the one for the fewest bytes, with what it keeps in each seed; None where none keeps as much."""
    settings, models = {}, dict.fromkeys(entry.model for entry in entries)
    for model, (method, family) in product(models, EQUAL.items()):
        beside = [entry for entry in entries if entry.model == model]
        dense = next(entry for entry in beside if entry.name == "dense").accuracy["all"]
        kept = [(entry, entry.accuracy["all"] / dense) for entry in beside if entry.family == family]
        enough = [pair for pair in kept if pair[1].mean() >= KEPT]
        settings[model, method] = [
            min(enough, key=lambda pair: getattr(pair[0], cost), default=None) for cost in ("flops", "kv_bytes")
        ]
    return settings


def cheapest(record: dict) -> str:
    """The cheapest settings, what they cost and what they keep."""
    rows = []
    for (model, method), pairs in cheapest_settings(summarize(record)).items():
        row = [model, method]
        for cost, pair in zip(("flops", "kv_bytes"), pairs, strict=True):
            if pair is None:
                row += ["none", "", ""]
                continue
            entry, kept = pair
            row += [setting_of(entry.name), f"{100 * getattr(entry, cost):.1f}", percent(kept)]
        rows.append(row)
    costs = [name for cost in ("FLOPs", "KV") for name in (f"fewest {cost}: setting", f"{cost} %", "of dense %")]
    return markdown(["LLaVA", "method", *costs], rows)


def costs_at_equal_accuracy(record: dict) -> str:
    """What the cheapest settings cost, a row for each method."""
    settings, rows = cheapest_settings(summarize(record)), []
    for method in EQUAL:
        row = [method]
        for model in record["models"]:
            for cost, pair in zip(("flops", "kv_bytes"), settings[model, method], strict=True):
                row.append("none" if pair is None else f"{100 * getattr(pair[0], cost):.0f}")
        rows.append(row)
    return markdown(["method", *(f"{m}: {cost} %" for m in record["models"] for cost in ("FLOPs", "KV"))], rows)


def at_depth_share(method, num_layers: int, new_num_layers: int):
    """A method with its layers at the same share of another depth, or the next layer."""

    def moved(layer: int) -> int:
        return -(-layer * new_num_layers // num_layers)

    if isinstance(method, Routing):
        return replace(method, saturation_layer=moved(method.saturation_layer))
    if isinstance(method, TrainedLast):
        return TrainedLast(at_depth_share(method.stages, num_layers, new_num_layers))
    return tuple(
        replace(stage, layer=moved(stage.layer), ranking_layer=moved(stage.layer) + stage.ranking_layer - stage.layer)
        for stage in method
    )


def depths(record: dict) -> dict[str, int]:
    """Decoder layers of the LLaVAs of a record."""
    configs = {model: AutoConfig.from_pretrained(ROOT / "examples" / model) for model in record["models"]}
    return {model: config.text_config.num_hidden_layers for model, config in configs.items()}


def settings_at_depth(entries: list[Entry], model: str, own: int, num_layers: int) -> dict[str, list]:
    """By method the cheapest settings of one LLaVA of `own` layers, at the same shares of another depth."""
    found, settings = methods(own), cheapest_settings([entry for entry in entries if entry.model == model])
    return {
        name: [pair and at_depth_share(found[pair[0].name], own, num_layers) for pair in settings[model, name]]
        for name in EQUAL
    }


def costs_in_llava(record: dict) -> str:
    """`costs_at_llavas_depth` of the embedded LLaVAs."""
    return costs_at_llavas_depth(summarize(record), depths(record))


def costs_at_llavas_depth(
    entries: list[Entry], own_depths: dict[str, int], vision_tokens: int = 576, text_tokens: int = 64
) -> str:
    """What the cheapest settings would cost LLaVA-1.5-7B at the same shares of its depth, by formula, a row for each
    method: there is less text beside an image there, and a layer is less of the whole.

    Args:
        own_depths: decoder layers of the LLaVAs, a column for each and each cost.
    """
    llava = accounting.dense_config(DPVRConfig())
    depth, prompt = llava.text_config.num_hidden_layers, (vision_tokens, text_tokens)
    dense, rows = prompt_cost(llava, (), *prompt), [[name] for name in EQUAL]
    for model, own in own_depths.items():
        for row, settings in zip(rows, settings_at_depth(entries, model, own, depth).values(), strict=True):
            for i, method in enumerate(settings):
                config = routed_config(llava, method) if isinstance(method, Routing) else llava
                row.append("none" if method is None else f"{prompt_cost(config, method, *prompt)[i] / dense[i]:.0%}")
    return markdown(["method", *(f"{m}: {cost}" for m in own_depths for cost in ("FLOPs", "KV"))], rows)


def variants(record: dict) -> str:
    """What trains, and how deep the side branch and the fusion are, where vision leaves so early that it shows."""
    rows = []
    for entry in summarize(record):
        layer = entry.name.split("/")[1] if entry.name.startswith("dpvr/") else ""
        if f"dpvr/{layer}/{LORA}" not in record["models"][entry.model]["cells"]:
            continue
        costs = [f"{100 * cost:.0f}" for cost in (entry.flops, entry.kv_bytes)]
        what = entry.name.split("/", 2)[2].replace("/", ", ")
        if "side branch sees" in what:  # has a table of its own
            continue
        rows.append(
            [entry.model, layer, what, *costs, *(percent(entry.accuracy[kind]) for kind in (*VISION_HEAVY, "all"))]
        )
    rows.sort(key=lambda row: (row[0], int(row[1])))
    return markdown(["LLaVA", "S", "DPVR", "FLOPs %", "KV %", *VISION_HEAVY, "all kinds"], rows)


def by_attention(record: dict) -> str:
    """What a vision token attends to in the side branch, where what is trained there adds most."""
    entries = {(entry.model, entry.name): entry for entry in summarize(record)}
    rows = []
    for model in record["models"]:
        config = AutoConfig.from_pretrained(ROOT / "examples" / model)
        routings = [r for r in methods(config.text_config.num_hidden_layers).values() if isinstance(r, Routing)]
        measured = [replace(r, sees=Routing.sees) for r in routings if r.sees != Routing.sees]
        for routing in dict.fromkeys(measured):
            for sees in SEEN:
                entry = entries.get((model, name_of(replace(routing, sees=sees))))
                if entry is not None:
                    accuracy = [percent(entry.accuracy[kind]) for kind in (*VISION_HEAVY, "all")]
                    rows.append([model, str(routing.saturation_layer), routing.training, sees, *accuracy])
    return markdown(["LLaVA", "S", "DPVR", "a vision token sees", *VISION_HEAVY, "all kinds"], rows)


def verdict(entries: list[Entry]) -> str:
    """Where another method costs a trained DPVR of the paper's shape the Pareto front, and by how much (paired)."""
    lines = []
    models = dict.fromkeys(entry.model for entry in entries)
    for model, training in product(models, TRAININGS[1:]):
        rows = [entry for entry in entries if entry.model == model]
        routed = [entry for entry in rows if entry.family == f"dpvr {training}"]
        others = [entry for entry in rows if not entry.name.startswith("dpvr")]
        for cost in ("flops", "kv_bytes"):
            for kind in (*task.KINDS, "all"):
                behind = [(entry, better(entry, others, cost, kind)) for entry in routed]
                off = [(entry, other) for entry, other in behind if other is not None]
                on = f"{len(routed) - len(off)} of {len(routed)} on the front"
                lines.append(f"{model}, DPVR {training}, {kind} by {cost}: {on}")
                for entry, other in off:
                    lead = percent(other.accuracy[kind] - entry.accuracy[kind])
                    lines.append(f"    {entry.name} is behind {other.name} by {lead} points")
    return "\n".join(lines)


FAMILIES = {
    "dense": ("black", "*", "none", "dense"),
    "dpvr trained": ("tab:blue", "o", "-", "DPVR, trained"),
    "dpvr untrained": ("tab:blue", "o", ":", "DPVR, untrained"),
    "dpvr trained with fusion": ("tab:purple", "P", "-", "DPVR, fusion layer trained too"),
    "dpvr trained with fusion no side layers": (
        "tab:pink",
        "X",
        "-",
        "DPVR without side branch, fusion layer trained",
    ),
    "dpvr trained with fusion 2 fusion layers": ("tab:cyan", "P", "none", "DPVR, 2 fusion layers, trained too"),
    "vtw": ("tab:red", "s", "-", "VTW"),
    f"vtw, {LAST}": ("tab:brown", "s", "--", f"VTW, {LAST}"),
    "fastv": ("tab:orange", "^", "none", "FastV"),
    "fastv, all ask": ("tab:olive", "v", "none", "FastV, all tokens ask"),
    "pyramid": ("tab:green", "D", "none", "PyramidDrop"),
}


def plot(entries: list[Entry], path: Path) -> None:
    """Accuracy over cost: a row for each model and cost, a column for each kind, 95 % intervals over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(entry.model for entry in entries))
    layout = [(model, cost) for model in models for cost in ("flops", "kv_bytes")]
    figure, axes = pyplot.subplots(
        len(layout),
        len(task.KINDS),
        figsize=(15, 3.4 * len(layout)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    labels = {"flops": "decoder FLOPs of the prompt, % of dense", "kv_bytes": "KV-cache bytes, % of dense"}
    for row, (model, cost) in zip(axes, layout, strict=True):
        for axis, kind in zip(row, task.KINDS, strict=True):
            for family, (color, marker, line, label) in FAMILIES.items():
                chosen = [entry for entry in entries if entry.model == model and entry.family == family]
                if not chosen:
                    continue
                chosen.sort(key=lambda entry: getattr(entry, cost))
                means, halves = np.array([mean_interval(100 * e.accuracy[kind]) for e in chosen]).T
                axis.errorbar(
                    [100 * getattr(entry, cost) for entry in chosen],
                    means,
                    np.nan_to_num(halves),
                    color=color,
                    marker=marker,
                    markerfacecolor="white" if line == ":" else color,
                    linestyle=line,
                    markersize=9 if marker == "*" else 4,
                    linewidth=1.2,
                    elinewidth=0.8,
                    label=label,
                )
            heavy = " (vision-heavy)" if kind in VISION_HEAVY else ""
            axis.set_title(f"{model}: {kind}{heavy}", fontsize=10)
            axis.set_xlabel(labels[cost], fontsize=8)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("right answers, %")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=-(-len(FAMILIES) // 2)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def add_settings(
    parser: argparse.ArgumentParser,
    seeds: int,
    questions: int,
    output: Path,
    pool: int = 800,
    steps: int | tuple[int, ...] = 200,
) -> None:
    """Options of how methods are trained and asked, with these defaults; several `steps` mean several trainings."""
    parser.add_argument("--seeds", type=int, default=seeds, help="of questions and training (default: %(default)s)")
    parser.add_argument(
        "--questions", type=int, default=questions, help="of each kind and seed (default: %(default)s)"
    )
    several = {} if isinstance(steps, int) else {"nargs": "+"}
    parser.add_argument("--steps", type=int, default=steps, **several, help="of a training (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak (default: %(default)s)")
    parser.add_argument("--loss", choices=LOSSES, default="answer", help="that trains (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=pool, help="conversations to learn from (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=output, help="default: %(default)s")


def check_settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (least := np.min(args.steps)) < 1:
        parser.error(f"--steps {least} must be at least 1")
    check_numbers(parser, args, 1, "seeds", "questions", "batch_size", "pool", "threads")
    check_learning_rate(parser, args)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        epilog="examples:\n"
        "  python benchmarks/quality.py                       all figures of benchmarks/results/quality.json\n"
        "  python benchmarks/quality.py --models tiny-llava   the smaller LLaVA alone\n"
        "  python benchmarks/quality.py --report              table, verdict and plot of what is there so far\n"
        "  python benchmarks/quality.py --models tiny-llava --seeds 2 --questions 4 --steps 2 --pool 16 \\\n"
        "      --output /tmp/quality.json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="folders of examples/ (default: %(default)s)"
    )
    add_settings(parser, seeds=5, questions=100, output=RESULTS)
    parser.add_argument("--figure", type=Path, help=f"default: beside --output; with that left out, {FIGURE}")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args(arguments)
    args.figure = args.figure or (FIGURE if args.output.resolve() == RESULTS else args.output.with_suffix(".png"))
    if args.report and not args.output.is_file():
        parser.error(f"there is no {args.output} to report on")
    for name in args.models:
        if not args.report and not (ROOT / "examples" / name / "model.safetensors").exists():
            layers = name.rpartition("-")[2]
            parser.error(
                f"there is no examples/{name}: train it with python scripts/train_tiny_llava.py "
                f"--layers {layers if layers.isdigit() else 8} --output examples/{name}"
            )
    check_settings(parser, args)
    if not args.report:
        check_output(parser, args.output)
    check_output(parser, args.figure)
    check_figure(parser, "--figure", args.figure)
    return args


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.report:
        record = read_record(args.output, ("settings", "models"))
        record["models"] = {name: result for name, result in record["models"].items() if name in args.models}
        if not record["models"]:
            raise SystemExit(f"{args.output} has no results of {', '.join(args.models)}.")
    else:
        settings = {name: getattr(args, name) for name in SETTINGS}
        record = read_results(args.output, {"settings": settings, "models": {}})
        for name in args.models:
            measure(name, ROOT / "examples" / name, args, record)
    entries = summarize(record)
    print(table(entries))
    print(verdict(entries))
    plot(entries, args.figure)
    print(f"{args.output}, {args.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, GOES_ON))
