#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Would more training help? Accuracy after more steps, where after those of `quality.py` something was still missing.

DPVR's side branch alone, DPVR whose fusion layer trains too, and the baselines whose last layer trains, each where it
keeps less than dense LLaVA. Each number of steps is a training of its own, with a learning rate that falls to nothing
at its end. All draw from one pool of conversations, larger than that of `quality.py`, so that more steps see more.

Each result is written as it is there; an interrupted run goes on where it was.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from benchmarks import quality, quality_methods, quality_report
from benchmarks.command import GOES_ON, check_output, run_command, write_record
from benchmarks.quality_methods import LAST, Routing, TrainedLast
from benchmarks.quality_report import percent
from benchmarks.side_branch_seeds import check_weights, read_results
from benchmarks.tables import markdown
from scripts.train_tiny_llava import LONG_BATCH, versions

RESULTS = ROOT / "benchmarks" / "results" / "training_steps.json"
WITH_FUSION, WITHOUT_BRANCH = "dpvr/1/trained with fusion", "dpvr/1/trained with fusion/no side layers"
STUDIED = {  # by LLaVA; names as of `quality_methods.methods`
    "tiny-llava": (
        "dpvr/2/trained",
        "dpvr/3/trained",
        WITH_FUSION,
        WITHOUT_BRANCH,
        f"vtw/2/{LAST}",
        f"vtw/3/{LAST}",
        f"fastv/2/0.5/{LAST}",
        f"pyramid/2-4-6/0.5/{LAST}",
    ),
    "tiny-llava-12": (
        "dpvr/4/trained",
        WITH_FUSION,
        WITHOUT_BRANCH,
        "dpvr/2/trained with fusion",
        f"vtw/3/{LAST}",
        f"fastv/3/0.5/{LAST}",
        f"pyramid/3-6-9/0.5/{LAST}",
    ),
}
SETTINGS = ("questions", "batch_size", "learning_rate", "pool", "loss")
SHAPE = {"models": {str: {"cells": {str: quality_report.CELLS}, "untrained": quality_report.CELLS}}}  # of a record


def measure(name: str, args, record: dict) -> None:
    """All cells of one of the embedded LLaVAs that are not there yet."""
    folder = ROOT / "examples" / name
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    result = record["models"].setdefault(name, {"cells": {}})
    check_weights(args.output, result, llava, folder)
    cells = {steps: result["cells"].setdefault(str(steps), {}) for steps in args.steps}
    found = quality_methods.methods(llava.config.text_config.num_hidden_layers)
    missing = quality.find_missing({key: found[key] for key in STUDIED[name]}, cells.values(), args.seeds)
    if not missing:
        return

    def save() -> None:
        write_record(args.output, record, indent=1)

    processor, num_batches = AutoProcessor.from_pretrained(folder), -(-args.pool // LONG_BATCH)
    held_out = quality.held_out_batches(name, llava, processor, args)
    quality.measure_baselines(folder, {"dense": ()}, held_out, result.setdefault("untrained", {}), save)
    if routings := [method for method in missing.values() if isinstance(method, Routing)]:
        layers = {routing.saturation_layer for routing in routings}
        pool = quality.training_batches(llava, processor, num_batches, layers=layers)
        for routing in routings:
            quality.measure_routings(folder, [routing], held_out, pool, args, cells, save)
    if baselines := {key: method for key, method in missing.items() if isinstance(method, TrainedLast)}:
        layers = {quality.first_layer(method.stages) for method in baselines.values()}
        pool = quality.training_batches(llava, processor, num_batches, each_alone=True, layers=layers)
        quality.measure_trained_baselines(folder, baselines, held_out, pool, args, cells, save)


def table(record: dict) -> str:
    """Right answers in percent, the mean of all kinds, a column for each number of steps, beside dense LLaVA's and
    what the setting would cost LLaVA-1.5-7B."""
    lengths = sorted({int(steps) for result in record["models"].values() for steps in result["cells"]})
    labels, rows = {family: label for label, family in quality_report.EQUAL.items()}, []
    flops = flops_in_llava(record)
    for name, result in record["models"].items():
        for method in STUDIED[name]:
            measured = [result["cells"].get(str(steps), {}).get(method, {}) for steps in lengths]
            shown = [percent(over_kinds(by_seed)) if by_seed else "" for by_seed in measured]
            described = [quality_report.setting_of(method), labels[quality_report.family_of(method)]]
            dense = percent(over_kinds(result["untrained"]["dense"]))
            rows.append([name, *described, *shown, dense, f"{flops[name][method]:.0%}"])
    columns = [*(f"{steps:,} steps" for steps in lengths), "dense LLaVA", "FLOPs in LLaVA-1.5"]
    return markdown(["LLaVA", "setting", "method", *columns], rows)


def figures(record: dict) -> dict:
    """What the pages' sentences say of the record, in points of a hundred answers.

    Returns:
        `right`: by LLaVA, steps and method the right answers, the mean of all kinds and seeds. `gained`: by LLaVA and
        method what the most steps give beyond the fewest. `side_branch_adds`: by LLaVA and steps what DPVR at layer 1,
        its fusion layer trained, has beyond the same without a side branch. `flops_in_llava`: as of that function.
    """
    right, gained, adds = ({name: {} for name in record["models"]} for _ in range(3))
    for name, result in record["models"].items():
        by_method: dict[str, list[float]] = {}
        for steps in sorted(result["cells"], key=int):
            cells = result["cells"][steps]
            means = {method: 100 * float(over_kinds(by_seed).mean()) for method, by_seed in cells.items() if by_seed}
            right[name][steps] = means
            for method, mean in means.items():
                by_method.setdefault(method, []).append(mean)
            if {WITH_FUSION, WITHOUT_BRANCH} <= means.keys():
                adds[name][steps] = means[WITH_FUSION] - means[WITHOUT_BRANCH]
        gained[name] = {method: means[-1] - means[0] for method, means in by_method.items() if len(means) > 1}
    return {"right": right, "gained": gained, "side_branch_adds": adds, "flops_in_llava": flops_in_llava(record)}


def flops_in_llava(record: dict) -> dict[str, dict[str, float]]:
    """By LLaVA and method what its setting would cost LLaVA-1.5-7B at the same share of its depth, as a share of its
    FLOPs."""
    costs = {}
    for name, num_layers in quality_report.depths(record).items():
        found = quality_methods.methods(num_layers)
        costs[name] = {method: quality_report.cost_in_llava(found[method], num_layers)[0] for method in STUDIED[name]}
    return costs


def over_kinds(by_seed: dict[str, dict[str, float]]) -> np.ndarray:
    """One value for each seed."""
    return np.array([np.mean(list(by_kind.values())) for by_kind in by_seed.values()])


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        epilog="examples:\n"
        "  python benchmarks/training_steps.py             what is missing of benchmarks/results/training_steps.json\n"
        "  python benchmarks/training_steps.py --steps 1 2 --seeds 1 --questions 2 --pool 16 --output steps.json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=STUDIED, default=list(STUDIED), help="default: %(default)s")
    quality.add_settings(parser, seeds=3, questions=250, pool=3200, steps=(200, 800, 3200), output=RESULTS)
    args = parser.parse_args(arguments)
    quality.check_settings(parser, args)
    check_output(parser, args.output)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    settings = {name: getattr(args, name) for name in SETTINGS}
    record = read_results(args.output, {"settings": settings, "versions": versions(), "models": {}}, SHAPE)
    for name in args.models:
        measure(name, args, record)
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, GOES_ON))
