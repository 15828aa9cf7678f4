#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
How much of the dense model's accuracy the side branch recovers, by initialisation and loss, over seeds.

The embedded LLaVA (`examples/tiny-llava`) is routed at each of `--saturation-layers`. What its frozen part makes of a
pool of training conversations is computed once per layer; every side branch is trained from these features, from the
same pool and for the same number of steps. A seed decides which conversations a step sees, and the weights of the
random initialisation.

Accuracy is that of greedy generation, an answer right only as a whole, on digits that no model has trained on: greedy
generation gives the right answer where the most likely next token is the right one at each of its tokens, so one
teacher-forced pass tells. KL is the divergence from the dense model's next-token distribution at the same tokens, in
nats per token. "Recovered" is the share of the accuracy that routing costs (with the untrained identity side branch,
which the converter writes by default) that training brings back.

Each result is written as it is there; an interrupted run goes on where it was.
"""

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from scipy import stats
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, LlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits as task

from benchmarks.command import (
    GOES_ON,
    check_learning_rate,
    check_numbers,
    check_output,
    lock_record,
    read_record,
    run_command,
    write_record,
)
from benchmarks.tables import markdown
from convert_llava_to_dpvr import convert
from read_weights import ConversionError
from scripts.analyze_saturation import fingerprint
from scripts.train_tiny_llava import (
    LONG_BATCH,
    answer_mask,
    conversation_text,
    learning_rate,
    sample_batch,
    to_pixel_values,
    versions,
)
from training.staged import IGNORED, LOSSES, StagedModel, collate_rows, predicts, split_rows

RESULTS = ROOT / "benchmarks" / "results" / "side_branch_seeds.json"
LLAVA = ROOT / "examples" / "tiny-llava"
INITS = ("identity", "copy", "random")
SETTINGS = ("steps", "batch_size", "learning_rate", "pool", "questions")
MEASURED = ("accuracy", *task.KINDS, "token_accuracy", "kl")
SHAPE = {"settings": {}, "cells": {str: dict.fromkeys(MEASURED, Real)}}  # of a record


def converted(saturation_layer: int, init: str, seed: int, folder: Path) -> Path:
    path = folder / f"{saturation_layer}-{init}-{seed}"
    if not path.exists():
        convert(LLAVA, path, saturation_layer=saturation_layer, side_branch_init=init, seed=seed, dtype="float32")
    return path


def load_side_branch(model, checkpoint: Path) -> None:
    """Gives `model` the side branch of another checkpoint of the same geometry."""
    prefix = "model.side_branch."
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        if weights:
            model.model.side_branch.load_state_dict({name[len(prefix) :]: weights[name] for name in weights})
            return
    raise FileNotFoundError(f"{checkpoint} holds no side branch")


# Features


def text_batch(processor, texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt"))


def labelled(processor, ids: torch.Tensor, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch for `StagedModel`, with the answers' tokens as labels. ids `(B, T)`, padded on the right."""
    tokenizer = processor.tokenizer
    assistant_id = tokenizer.encode(" ASSISTANT", add_special_tokens=False)[0]
    mask = answer_mask(ids, assistant_id, tokenizer.eos_token_id)
    return {
        "input_ids": ids,
        "attention_mask": (ids != tokenizer.pad_token_id).long(),
        "labels": torch.where(mask, ids, IGNORED),
        "pixel_values": pixel_values,
    }


@torch.no_grad()
def training_rows(model: StagedModel, processor, num_batches: int) -> list[dict[str, torch.Tensor]]:
    """Features of `num_batches` batches of conversations, row by row."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    rows = []
    for _ in tqdm(range(num_batches), desc="features", mininterval=5):
        ids, pixel_values, _ = sample_batch(rng, generator, processor, progress=1.0, short=False)
        rows += split_rows(model.compute_features(with_teacher=True, **labelled(processor, ids, pixel_values)))
    return rows


@torch.no_grad()
def held_out_batches(model: StagedModel, processor, num_questions: int, batch_size: int = 100) -> list[dict]:
    """Features of held-out questions, one to a row, and their kinds."""
    pairs = task.make_questions(1000, num_questions, "test")
    batches = []
    for start in range(0, len(pairs), batch_size):
        grids, questions = zip(*pairs[start : start + batch_size], strict=True)
        ids = text_batch(processor, [conversation_text([question]) for question in questions])["input_ids"]
        cells = torch.from_numpy(np.stack([grid.cells for grid in grids])).float() / 255
        batch = labelled(processor, ids, to_pixel_values(cells, processor))
        features = model.compute_features(with_teacher=True, **batch)
        batches.append({"features": features, "kinds": [question.kind for question in questions]})
    return batches


# One cell


def batches_of(rows: list[dict], batch_size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end; each pass through the rows in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(batch_size):
            yield collate_rows([rows[i] for i in chosen.tolist()])


def train(model: StagedModel, batches: Iterator[dict[str, torch.Tensor]], steps: int, peak: float) -> None:
    """`steps` steps of all that requires a gradient, at a learning rate of at most `peak`."""
    branch = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(branch, lr=peak, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps, warmup=20))
    model.train()
    for _, batch in zip(range(steps), batches, strict=False):
        model(**batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(branch, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def right_answers(logits: torch.Tensor, labels: torch.LongTensor) -> torch.BoolTensor:
    """Which answers `(B,)` greedy generation gets right. logits `(N, V)` of the tokens that predict the answers'."""
    answers = predicts(labels)
    wrong = logits.argmax(-1) != labels[:, 1:][answers[:, :-1]]
    return torch.bincount(answers.nonzero()[:, 0], wrong.float(), minlength=len(answers)) == 0


@torch.no_grad()
def evaluate(model: StagedModel, batches: list[dict], dense: bool = False) -> dict:
    """Accuracy by kind and in all, share of right tokens, and KL from the dense model (0 for itself)."""
    model.eval()
    head = model.base.lm_head
    right, kinds, hits, divergence = [], [], [], []
    for batch in batches:
        features = batch["features"]
        teacher = head(features.teacher_states)
        logits = teacher if dense else head(model.answer_states(features))
        right.append(right_answers(logits, features.labels))
        kinds += batch["kinds"]
        labels = features.labels[:, 1:]
        hits.append(logits.argmax(-1) == labels[labels != IGNORED])
        divergence.append(LOSSES["distill"](logits, None, teacher))
    right, hits = torch.cat(right).float(), torch.cat(hits).float()
    by_kind = {kind: right[[i for i, k in enumerate(kinds) if k == kind]].mean().item() for kind in task.KINDS}
    kl = sum(divergence).item() / len(hits)
    return {"accuracy": right.mean().item(), **by_kind, "token_accuracy": hits.mean().item(), "kl": kl}


# The run


def read_results(path: Path, new: dict, shape: dict) -> dict:
    """The record of an earlier run, which must be of this `shape` and one with the settings of `new`, or `new` if
    there is none; no other run may add to it now."""
    lock_record(path)
    if not path.exists():
        return new
    record = read_record(path, {**dict.fromkeys(new, object), **shape})
    if record["settings"] != new["settings"]:
        raise SystemExit(
            f"{path} was made with {record['settings']}, this run would be with {new['settings']}: choose another "
            "--output, or delete it."
        )
    return record


def check_weights(path: Path, result: dict, llava, folder: Path) -> None:
    """Refuses to mix results of other weights with those of this run."""
    weights = fingerprint(llava)
    if result["cells"] and "weights" not in result:
        raise SystemExit(
            f"{path} does not say of which weights of {folder.name} its results are: choose another --output, or "
            "delete it."
        )
    if result.setdefault("weights", weights) != weights:
        raise SystemExit(
            f"{path} has results of {folder.name} with weights of fingerprint {result['weights']}, but those of "
            f"{folder} have {weights}: choose another --output, or delete it."
        )


def measure(saturation_layer: int, args, record: dict, folder: Path) -> None:
    """All cells of one saturation layer that are not there yet."""
    cells = record["cells"]
    wanted = [f"{saturation_layer}/dense", *(f"{saturation_layer}/untrained/{init}/0" for init in args.inits)]
    wanted += [
        f"{saturation_layer}/{loss}/{init}/{seed}"
        for seed, loss, init in product(range(args.seeds), args.losses, args.inits)
    ]
    wanted = [cell for cell in wanted if cell not in cells]
    if not wanted:
        return
    checkpoint = converted(saturation_layer, "identity", 0, folder)
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).requires_grad_(False)
    model.model.side_branch.requires_grad_(True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    staged = StagedModel(model)
    held_out = held_out_batches(staged, processor, args.questions)
    rows = None
    for cell in tqdm(wanted, desc=f"S = {saturation_layer}"):
        _, loss, *rest = cell.split("/")
        if loss != "dense":
            init, seed = rest[0], int(rest[1])
            load_side_branch(model, converted(saturation_layer, init, seed if init == "random" else 0, folder))
        if loss in LOSSES:
            rows = rows or training_rows(staged, processor, -(-args.pool // LONG_BATCH))
            staged.loss = loss
            train(staged, batches_of(rows, args.batch_size, seed), args.steps, args.learning_rate)
        cells[cell] = evaluate(staged, held_out, dense=loss == "dense")
        write_record(args.output, record, indent=1)


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t."""
    values = np.asarray(values)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def summarize(record: dict) -> list[dict]:
    """One entry for each layer, loss and initialisation: seeds, and mean and interval of every figure."""
    groups: dict[tuple, list[dict]] = {}
    for cell, result in record["cells"].items():
        layer, loss, *rest = cell.split("/")
        groups.setdefault((int(layer), loss, rest[0] if rest else ""), []).append(result)
    entries = []
    for (layer, loss, init), results in sorted(groups.items()):
        entry = {"saturation_layer": layer, "loss": loss, "init": init, "seeds": len(results)}
        dense = groups[layer, "dense", ""][0]["accuracy"]
        routed = groups.get((layer, "untrained", "identity"), [{"accuracy": float("nan")}])[0]["accuracy"]
        for result in results:
            lost = dense - routed
            result["recovered"] = (result["accuracy"] - routed) / lost if lost > 0 else float("nan")
        for name in ("recovered", *MEASURED):
            entry[name] = mean_interval([result[name] for result in results])
        entries.append(entry)
    return entries


def best(entries: list[dict]) -> dict:
    """Loss and initialisation to take: the cheapest of those that are not shown to be worse than the best.

    The best has the fewest wrong answers, as a share of the most at each layer, averaged over the layers at which all
    were measured. Shown to be worse is what has an interval of accuracy below, and apart from, the best's at some
    layer. The next-token loss is cheaper than distillation, which runs the dense layers too; then the order is that of
    `INITS`.
    """
    accuracy: dict[tuple, dict[int, tuple]] = {}
    for entry in entries:
        if entry["loss"] in LOSSES:
            accuracy.setdefault((entry["loss"], entry["init"]), {})[entry["saturation_layer"]] = entry["accuracy"]
    layers = set.intersection(*map(set, accuracy.values())) if accuracy else set()
    if not layers:
        raise ValueError("No saturation layer has results of every loss and initialisation.")
    worst = {layer: max(1 - each[layer][0] for each in accuracy.values()) or 1 for layer in layers}
    first = min(accuracy, key=lambda key: np.mean([(1 - accuracy[key][layer][0]) / worst[layer] for layer in layers]))

    def is_worse(key: tuple) -> bool:
        pairs = [(accuracy[key][layer], accuracy[first][layer]) for layer in layers]
        return any(mean + np.nan_to_num(half) < top - np.nan_to_num(reach) for (mean, half), (top, reach) in pairs)

    equal = [key for key in accuracy if key == first or not is_worse(key)]
    loss, init = min(equal, key=lambda key: (list(LOSSES).index(key[0]), INITS.index(key[1])))
    return {"loss": loss, "init": init}


def table(entries: list[dict]) -> str:
    """Accuracy, what training recovers of it, and KL, by layer, loss and initialisation, as Markdown."""

    def interval(pair: tuple[float, float], scale: float, digits: str) -> str:
        half = "" if np.isnan(pair[1]) else f" ± {format(scale * pair[1], digits)}"
        return "" if np.isnan(pair[0]) else format(scale * pair[0], digits) + half

    rows = []
    for entry in entries:
        names = [str(entry[key]) for key in ("saturation_layer", "loss", "init", "seeds")]
        shares = [interval(entry[key], 100, ".1f") for key in ("accuracy", "recovered")]
        rows.append([*names, *shares, interval(entry["kl"], 1, ".4f")])
    return markdown(["S", "loss", "initialisation", "seeds", "accuracy %", "recovered %", "KL, nats"], rows)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        epilog="examples:\n"
        "  python benchmarks/side_branch_seeds.py --saturation-layers 3 4     the figures of benchmarks/results\n"
        "  python benchmarks/side_branch_seeds.py --table                     what is there so far\n"
        "  python benchmarks/side_branch_seeds.py --seeds 1 --steps 5 --pool 16 --questions 5 --output seeds.json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--saturation-layers", type=int, nargs="+", default=[3, 4], help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--inits", nargs="+", choices=INITS, default=list(INITS), help="default: all")
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES), help="default: all")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=800, help="conversations to learn from (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=250, help="held out, of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="only print the table of --output")
    args = parser.parse_args(arguments)
    if args.table and not args.output.is_file():
        parser.error(f"there is no {args.output} to print a table of")
    if not args.table:
        check_numbers(parser, args, 0, "seeds")
        check_numbers(parser, args, 1, "steps", "batch_size", "pool", "questions", "threads")
        check_learning_rate(parser, args)
        check_output(parser, args.output)
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.table:
        record = read_record(args.output, SHAPE)
    else:
        settings = {name: getattr(args, name) for name in SETTINGS}
        record = read_results(args.output, {"settings": settings, "versions": versions(), "cells": {}}, SHAPE)
        llava = LlavaForConditionalGeneration.from_pretrained(LLAVA, dtype=torch.float32)
        check_weights(args.output, record, llava, LLAVA)
        folder = Path(tempfile.mkdtemp(prefix="side-branch-seeds-"))
        try:
            for saturation_layer in args.saturation_layers:
                measure(saturation_layer, args, record, folder)
        except ConversionError as error:  # a layer that the model does not have
            raise SystemExit(f"error: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    entries = summarize(record)
    print(table(entries))
    with contextlib.suppress(ValueError):  # too early
        print("to take: {loss} loss, {init} initialisation".format(**best(entries)))


if __name__ == "__main__":
    sys.exit(run_command(main, GOES_ON))
