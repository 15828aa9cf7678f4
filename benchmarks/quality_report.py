# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
What the results of `quality.py` say: tables, the cheapest settings that keep as much, and the plot.

The pages' tables are functions of a record here, as `benchmarks/report.py` calls them.
"""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import permutations, product
from numbers import Real
from pathlib import Path

import numpy as np
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits as task

from benchmarks import accounting, quality_methods
from benchmarks.command import save_figure
from benchmarks.quality_methods import (
    LAST,
    LORA,
    SEEN,
    TRAININGS,
    Routing,
    TrainedLast,
    name_of,
    relative_cost,
)
from benchmarks.side_branch_seeds import mean_interval
from benchmarks.tables import markdown
from configuration_dpvr import DPVRConfig

VISION_HEAVY = ("count", "describe")
KEPT = 0.99  # of dense accuracy: what methods are compared at
CELLS = {str: {str: dict.fromkeys(task.KINDS, Real)}}  # by method and seed
SHAPE = {"settings": {}, "models": {str: {"prompt_lengths": {str: {str: Real}}, "cells": CELLS}}}  # of a record
ONE_PROMPT = {64: 1}  # text tokens beside one image, and how many such prompts there are


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
    for name, method in quality_methods.methods(config.text_config.num_hidden_layers).items():
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


def shares_of_dense(entries: list[Entry]) -> dict[tuple[str, str], np.ndarray]:
    """By LLaVA and method the accuracy, the mean of all kinds, as shares of the dense model's, one for each seed."""
    dense = {entry.model: entry.accuracy["all"] for entry in entries if entry.name == "dense"}
    return {(entry.model, entry.name): entry.accuracy["all"] / dense[entry.model] for entry in entries}


def right_answers(entries: list[Entry]) -> dict[str, dict[str, float]]:
    """Right answers in percent, the mean of all kinds and seeds, by LLaVA and method."""
    right: dict[str, dict[str, float]] = {}
    for entry in entries:
        right.setdefault(entry.model, {})[entry.name] = 100 * float(entry.accuracy["all"].mean())
    return right


def cheapest_settings(entries: list[Entry]) -> dict[tuple[str, str], list[tuple[Entry, np.ndarray] | None]]:
    """By LLaVA and method the setting that keeps `KEPT` of dense accuracy, on the mean of all kinds, for the fewest
    FLOPs, and the one for the fewest bytes, with what it keeps in each seed; None where none keeps as much."""
    settings, kept = {}, shares_of_dense(entries)
    for model, (method, family) in product(dict.fromkeys(entry.model for entry in entries), EQUAL.items()):
        asked = [entry for entry in entries if (entry.model, entry.family) == (model, family)]
        pairs = [(entry, kept[model, entry.name]) for entry in asked]
        enough = [pair for pair in pairs if pair[1].mean() >= KEPT]
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


def figures(record: dict) -> dict:
    """What the pages' sentences say of the record.

    Returns:
        `right`: as of `right_answers`. `beyond`: by LLaVA and two methods of the same layer how many of a hundred
        answers the first has right beyond the second, and the half of the 95 % interval over the seeds. `kept`: share
        of dense accuracy by LLaVA and method. `kept_from`: by LLaVA the layer from which on DPVR with its fusion layer
        trained keeps `KEPT`. `flops`: by LLaVA and method, in percent of dense FLOPs. `fewest_flops`: as of that
        function. `flops_in_llava`: what the cheapest settings cost LLaVA-1.5-7B, as shares of its FLOPs, by LLaVA and
        method.
    """
    entries, own = summarize(record), depths(record)
    beyond, kept, kept_from, own_flops, flops = ({model: {} for model in own} for _ in range(5))
    for entry in entries:
        own_flops[entry.model][entry.name] = 100 * entry.flops
    for one, other in permutations(entries, 2):
        if one.model == other.model and one.name.split("/")[1:2] == other.name.split("/")[1:2]:
            lead = mean_interval(100 * (one.accuracy["all"] - other.accuracy["all"]))
            beyond[one.model].setdefault(one.name, {})[other.name] = list(lead)
    for (model, name), shares in shares_of_dense(entries).items():
        kept[model][name] = float(shares.mean())
    for model, num_layers in own.items():
        less = [layer for layer in range(1, num_layers) if kept[model][f"dpvr/{layer}/trained with fusion"] < KEPT]
        kept_from[model] = max(less, default=0) + 1
    for (model, method), (fewest, _) in cheapest_in_llava(entries, own).items():
        if fewest is not None:
            flops[model][method] = fewest
    return {
        "right": right_answers(entries),
        "beyond": beyond,
        "kept": kept,
        "kept_from": kept_from,
        "flops": own_flops,
        "fewest_flops": fewest_flops(entries),
        "flops_in_llava": flops,
    }


def fewest_flops(entries: list[Entry]) -> dict[str, dict[str, float]]:
    """By LLaVA and method what the setting of `cheapest_settings` costs, in percent of dense FLOPs."""
    costs: dict[str, dict[str, float]] = {}
    for (model, method), (pair, _) in cheapest_settings(entries).items():
        if pair is not None:
            costs.setdefault(model, {})[method] = 100 * pair[0].flops
    return costs


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
    found = quality_methods.methods(own)
    settings = cheapest_settings([entry for entry in entries if entry.model == model])
    return {
        name: [pair and at_depth_share(found[pair[0].name], own, num_layers) for pair in settings[model, name]]
        for name in EQUAL
    }


def cost_in_llava(method, num_layers: int) -> tuple[float, float]:
    """FLOPs and bytes of a method of a LLaVA of `num_layers` layers in LLaVA-1.5-7B, at the same shares of its depth,
    as shares of that one's own."""
    llava = accounting.dense_config(DPVRConfig())
    return relative_cost(llava, at_depth_share(method, num_layers, llava.text_config.num_hidden_layers), ONE_PROMPT)


def cheapest_in_llava(
    entries: list[Entry], own_depths: dict[str, int]
) -> dict[tuple[str, str], tuple[float | None, float | None]]:
    """By LLaVA and method the FLOPs and the bytes of the cheapest settings, as of `cost_in_llava`."""
    costs = {}
    for (model, method), pairs in cheapest_settings(entries).items():
        found = quality_methods.methods(own_depths[model])
        settings = [pair and cost_in_llava(found[pair[0].name], own_depths[model]) for pair in pairs]
        costs[model, method] = tuple(cost and cost[i] for i, cost in enumerate(settings))
    return costs


def costs_in_llava(record: dict) -> str:
    """`costs_at_llavas_depth` of the embedded LLaVAs."""
    return costs_at_llavas_depth(summarize(record), depths(record))


def costs_at_llavas_depth(entries: list[Entry], own_depths: dict[str, int]) -> str:
    """What the cheapest settings would cost LLaVA-1.5-7B at the same shares of its depth, by formula, a row for each
    method: there is less text beside an image there, and a layer is less of the whole.

    Args:
        own_depths: decoder layers of the LLaVAs, a column for each and each cost.
    """
    costs, rows = cheapest_in_llava(entries, own_depths), []
    for method in EQUAL:
        found = [cost for model in own_depths for cost in costs[model, method]]
        rows.append([method, *("none" if cost is None else f"{cost:.0%}" for cost in found)])
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
        found = quality_methods.methods(config.text_config.num_hidden_layers).values()
        routings = [method for method in found if isinstance(method, Routing)]
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
    save_figure(figure, path, dpi=110)
