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

The methods and their costs: `quality_methods.py`. What the results say: `quality_report.py`.

An answer is right only as a whole. Greedy generation gives it where at each of its tokens, the end included, the most
likely next token is the right one, so one teacher-forced pass tells; which vision tokens remain, the prompt's last
token decides there too, as in generation. `tests/test_quality.py` holds both ways against each other.

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
from transformers import AutoModel, AutoProcessor, DynamicCache, LlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits as task

from benchmarks import baselines, quality_methods, quality_report
from benchmarks.baselines import PrunedLlava
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
from benchmarks.quality_methods import LORA, SEEN, Routing, TrainedLast, name_of
from benchmarks.side_branch_seeds import (
    batches_of,
    check_weights,
    labelled,
    read_results,
    right_answers,
    text_batch,
)
from benchmarks.side_branch_seeds import train as train_late
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
FIRST_QUESTION_SEED = 2000  # other questions than those that trained and chose anything


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
        arguments = decoder_arguments(model, batch)
        tokens, states = model.model.run_layers(*arguments, end_layer=last)
        states = baselines.put(arguments[0], tokens, states)
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
    found = quality_methods.methods(llava.config.text_config.num_hidden_layers)
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
        record = read_record(args.output, quality_report.SHAPE)
        record["models"] = {name: result for name, result in record["models"].items() if name in args.models}
        if not record["models"]:
            raise SystemExit(f"{args.output} has no results of {', '.join(args.models)}.")
    else:
        settings = {name: getattr(args, name) for name in SETTINGS}
        record = read_results(args.output, {"settings": settings, "models": {}}, quality_report.SHAPE)
        for name in args.models:
            measure(name, ROOT / "examples" / name, args, record)
    entries = quality_report.summarize(record)
    print(quality_report.table(entries))
    print(quality_report.verdict(entries))
    quality_report.plot(entries, args.figure)
    print(f"{args.output}, {args.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, GOES_ON))
