#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Does it hold for another LLaVA? The comparison of `quality.py` on LLaVAs trained alike, each from a seed of its own.

The seeds of `quality.py` are those of its questions and of training DPVR: all of them ask one and the same LLaVA. Here
LLaVA itself is made anew: its weights, the tower's included, the pictures and questions that it learned from. Every
LLaVA gives one value, the mean over its questions and seeds; intervals are over LLaVAs. What is trained stands where
it may be the cheapest by the results of `quality.py`: a baseline in the settings that were best there, or nearly.

Each result is written as it is there; an interrupted run goes on where it was.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from benchmarks import quality, quality_methods, quality_report
from benchmarks.command import GOES_ON, check_output, read_record, run_command
from benchmarks.quality import SETTINGS
from benchmarks.quality_methods import LAST
from benchmarks.quality_report import BY_LAYER, Entry, percent
from benchmarks.side_branch_seeds import read_results
from benchmarks.tables import markdown

RESULTS = ROOT / "benchmarks" / "results" / "dense_seeds.json"
TINY = ROOT / "examples" / "tiny-llava"
NUM_LAYERS = 8  # of all that are compared
RECIPE = ("tower_steps", "text_steps", "steps", "layers", "hidden_size")  # of a LLaVA's own training.json
TRAINED = {  # what is trained, where it may be the cheapest to keep as much
    f"vtw/{{}}/{LAST}": (3, 4),
    f"fastv/4/{{}}/{LAST}": (0.5, 0.75, 0.9),
    f"pyramid/4-5-6/{{}}/{LAST}": quality_methods.PYRAMID_SHARES,
    "dpvr/{}/trained": (2, 3, 4, 5, 6),
    "dpvr/{}/trained with fusion": (1, 2, 3, 4),
    "dpvr/{}/trained with fusion/no side layers": (1, 2, 3),
}


def method_names() -> list[str]:
    """All of `quality.py` that train nothing, and `TRAINED`."""
    found = quality_methods.methods(NUM_LAYERS)
    names = [name for name in found if "trained" not in name or name.endswith("/untrained")]
    return names + [pattern.format(value) for pattern, values in TRAINED.items() for value in values]


def read_training(folder: Path) -> tuple[int | None, dict]:
    """A LLaVA's seed, and how else it was trained; `examples/tiny-llava` is older than two of the fields."""
    record = {"layers": NUM_LAYERS, "hidden_size": 128} | json.loads((folder / "training.json").read_text())
    return record.get("seed"), {name: record.get(name) for name in RECIPE}


def summarize(record: dict) -> list[Entry]:
    config, results = AutoConfig.from_pretrained(TINY), record["models"].items()
    return [entry for result in results for entry in quality_report.summarize_model(*result, config)]


def table(record: dict) -> str:
    """What each method costs at least in each LLaVA, in FLOPs, where it keeps as much as `quality_report.KEPT` says;
    none where it does in no setting that was measured."""
    settings, models, rows = quality_report.cheapest_settings(summarize(record)), list(record["models"]), []
    for method in quality_report.EQUAL:
        pairs = [settings[model, method][0] for model in models]
        costs = np.array([np.nan if pair is None else pair[0].flops for pair in pairs])
        shown = ["none" if np.isnan(cost) else f"{100 * cost:.0f}" for cost in costs]
        rows.append([method, *shown, "" if np.isnan(costs).any() else percent(costs)])
    return markdown(["method", *models, "mean"], rows)


def costs_in_llava(record: dict) -> str:
    """What these settings would cost LLaVA-1.5-7B at the same shares of its depth."""
    return quality_report.costs_at_llavas_depth(summarize(record), dict.fromkeys(record["models"], NUM_LAYERS))


def figures(record: dict) -> dict:
    """What the pages' sentences say of the record.

    Returns:
        `right`: as of `quality_report.right_answers`, and `least`: those of the LLaVA that has the fewest, by method.
        `lost`: by LLaVA and method how many of a hundred answers dense LLaVA has right beyond it. `training_adds`: by
        LLaVA and layer those that DPVR, its side branch alone trained, has right beyond the untrained one, and
        `recovered`: in percent of what that one loses. `fewest_flops`: as of `quality_report.figures`.
    """
    entries = summarize(record)
    right, least = quality_report.right_answers(entries), {}
    lost, adds, recovered = ({model: {} for model in right} for _ in range(3))
    for model, found in right.items():
        for name, accuracy in found.items():
            least[name] = min(accuracy, least.get(name, accuracy))
        lost[model] = {name: found["dense"] - accuracy for name, accuracy in found.items()}
        for layer in map(str, range(1, NUM_LAYERS)):
            untrained, trained = f"dpvr/{layer}/untrained", f"dpvr/{layer}/trained"
            if {untrained, trained} <= found.keys():
                adds[model][layer] = found[trained] - found[untrained]
                if lost[model][untrained] > 0:
                    recovered[model][layer] = 100 * adds[model][layer] / lost[model][untrained]
    return {
        "right": right,
        "least": least,
        "lost": lost,
        "training_adds": adds,
        "recovered": recovered,
        "fewest_flops": quality_report.fewest_flops(entries),
    }


def by_layer(record: dict) -> str:
    """Right answers in percent, all kinds, where vision leaves at each layer: mean, interval and range over LLaVAs."""
    found: dict[str, list[float]] = {}
    for entry in summarize(record):
        found.setdefault(entry.name, []).append(100 * entry.accuracy["all"].mean())
    rows = []
    for layer in range(1, NUM_LAYERS):
        cells = [found.get(column.format(layer), []) for column in BY_LAYER.values()]
        shown = [f"{percent(np.array(x) / 100)} [{min(x):.1f}, {max(x):.1f}]" if x else "" for x in cells]
        rows.append([str(layer), *shown])
    return markdown(["layer", *BY_LAYER], rows)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        epilog="examples:\n"
        "  python scripts/train_tiny_llava.py --seed 1 --output /tmp/tiny-llava-1     25 minutes each\n"
        "  python benchmarks/dense_seeds.py examples/tiny-llava /tmp/tiny-llava-1 --output /tmp/dense_seeds.json\n"
        "  python benchmarks/dense_seeds.py                                           the table of what is there\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", type=Path, nargs="*", help="folders of scripts/train_tiny_llava.py")
    quality.add_settings(parser, seeds=2, questions=250, output=RESULTS)
    args = parser.parse_args(arguments)
    quality.check_settings(parser, args)
    args.trained_from, (_, wanted) = [], read_training(TINY)
    for folder in args.models:
        if not (folder / "training.json").is_file() or not (folder / "model.safetensors").is_file():
            parser.error(
                f"{folder} is no folder of scripts/train_tiny_llava.py: it has no weights or no training.json"
            )
        seed, recipe = read_training(folder)
        if recipe != wanted:
            parser.error(f"{folder} was trained with {recipe}, examples/tiny-llava with {wanted}")
        args.trained_from.append(seed)
    if len(set(args.trained_from)) < len(args.models):
        parser.error(f"these LLaVAs were trained from seeds {args.trained_from}: give each seed once")
    if args.models:
        check_output(parser, args.output)
    elif not args.output.is_file():
        parser.error(f"there is no {args.output}, and no LLaVAs are given to measure")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.models:
        settings = {name: getattr(args, name) for name in SETTINGS}
        record = read_results(args.output, {"settings": settings, "models": {}}, quality_report.SHAPE)
        for seed, folder in zip(args.trained_from, args.models, strict=True):
            quality.measure(f"seed {seed}", folder, args, record, method_names())
    else:
        record = read_record(args.output, quality_report.SHAPE)
    print(table(record), costs_in_llava(record), by_layer(record), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, GOES_ON))
