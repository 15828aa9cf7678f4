#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Fill tables and figures of README.md and docs/ from result files and draw the plots: no number is typed by hand.

A table stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`. NAME is one of `TABLES`, or of a benchmark:
`speed` is `table(record)` of `benchmarks/speed.py`, `speed.parts` its `parts(record)`; both get what
`benchmarks/results/speed.json` holds and return Markdown. `speed-batch` is the same of `speed_batch.json`. Those of
`REPORTS` are functions of a module of their own.

A figure within a sentence stands between `<!-- value:PATH -->` and `<!-- /value -->`. PATH is the name of a file in
`benchmarks/results` and the keys and list positions in it, joined by full stops, with a Python format after a bar:
`<!-- value:conversion.peak_gib|.2f -->1.31<!-- /value -->`. A key that holds a full stop stands in double quotes.
What a sentence says of a whole record, its benchmark's `figures(record)` work out:
`<!-- value:quality.figures.KEY -->`. Sizes that follow from the geometry are those of `sizes`:
`<!-- value:sizes.KEY -->`. Not at the start of a line, where Markdown would take the whole line for HTML.

Plots are drawn into `figures/`. `--check` changes nothing, and fails if a page is not what the result files say.
"""

import argparse
import csv
import functools
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits as task
from accelerate import init_empty_weights

from benchmarks import speed
from benchmarks.accounting import (
    cache_bytes,
    decoder_flops,
    dense_config,
    prefill_flops,
    prefill_loads,
    read_one_token,
)
from benchmarks.command import run_command, save_figure
from benchmarks.tables import markdown
from configuration_dpvr import DPVRConfig
from scripts import run_transformers_tests, saturation_report
from scripts.output import written_whole

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
REPORTS = {"quality": "quality_report"}  # by benchmark
FIGURES = ROOT / "figures"
JOINT, VISION, TEXT, INK = "#8e7cc3", "#e69138", "#3d85c6", "#222222"
TABLE = re.compile(r"(<!-- begin:(?P<name>[^ ]+) -->\n)(?P<content>.*?)(<!-- end:(?P=name) -->)", re.DOTALL)
VALUE = re.compile(
    r"(<!-- value:(?P<path>[^|]+?)(?:\|(?P<format>[^ ]+))? -->)(?P<content>.*?)(<!-- /value -->)", re.DOTALL
)
MARKER = re.compile(r"<!-- (?:begin:|end:|value:|/value).*?-->")


class ReportError(Exception):
    """A marker that cannot be filled; the message names it and says what is missing."""


def read(path: Path, wanted_by: str):
    if not path.is_file():
        raise ReportError(f"The page shows {wanted_by}, but there is no {path.relative_to(ROOT)}.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ReportError(f"The page shows {wanted_by}, but {path.relative_to(ROOT)} is no JSON: {error}.") from error


def make_of(records: list, function: Callable, wanted_by: str):
    """What `function` makes of records, which may have another shape than it reads."""
    try:
        return function(*records)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, StopIteration) as error:
        raise ReportError(
            f"The page shows {wanted_by}, which cannot be made of its result files: {type(error).__name__}: {error}."
        ) from error


def accuracy_table(record: dict) -> str:
    """Held-out accuracy of the embedded model, from the record of the side branch's training."""
    held_out = record["held_out"]
    rows = []
    for kind in task.KINDS:
        cells = [
            "{:.1%} [{:.1%}, {:.1%}]".format(held_out[name][kind]["accuracy"], *held_out[name][kind]["wilson_95"])
            for name in ("dense", "untrained", "trained")
        ]
        rows.append([kind, str(held_out["dense"][kind]["questions"]), *cells])
    return markdown(["question", "number", "LLaVA", "DPVR, side branch untrained", "DPVR, side branch trained"], rows)


def cost_table() -> str:
    """Decoder FLOPs and KV-cache bytes of one image and 64 text tokens, by formula."""
    layers_13b = {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40}
    models = {
        "LLaVA-1.5-7B, S = 18 of 32": DPVRConfig(),
        "LLaVA-1.5-13B, S = 22 of 40": DPVRConfig(
            saturation_layer=22, text_config={"model_type": "llama", "num_key_value_heads": 40, **layers_13b}
        ),
    }
    rows = []
    for name, config in models.items():
        tokens = (config.image_seq_length, 64)
        dense = dense_config(config)
        flops = [prefill_flops(each, *tokens).decoder for each in (dense, config)]
        frugal = decoder_flops(dense, read_one_token(prefill_loads(dense, *tokens)))
        full = prefill_flops(config, *tokens, num_logits=sum(tokens)).decoder
        whole, kept, most = (
            sum(cache_bytes(each, *tokens, later_images=later).values())
            for each, later in ((dense, False), (config, False), (config, True))
        )
        rows.append(
            [
                name,
                f"{flops[0] / 1e12:.2f} to {flops[1] / 1e12:.2f} TFLOP",
                f"{flops[1] / flops[0]:.3f} ({flops[1] / frugal:.3f}, {full / flops[0]:.3f})",
                f"{whole / 2**20:.0f} to {kept / 2**20:.0f} MiB",
                f"{kept / whole:.3f} ({most / whole:.3f} where later images may come)",
            ]
        )
    return markdown(["576 image + 64 text tokens", "decoder, prefill", "ratio", "KV cache, 16 bit", "ratio"], rows)


def published_table(record: dict) -> str:
    """LLaVA-1.5-7B's published results, with the task of lmms-eval that comes nearest to each."""
    rows = [
        [name, f"`{row['task']}`", f"`{row['metric']}`", str(row["llava-1.5-7b"]), row["differs"]]
        for name, row in record["benchmarks"].items()
    ]
    return markdown(["benchmark", "task", "metric", "LLaVA-1.5-7B, published", "what differs there"], rows)


def side_branch_seeds_table(record: dict) -> str:
    from benchmarks.side_branch_seeds import summarize, table

    return table(summarize(record))


def soak_table(record: dict) -> str:
    """Memory and answers over thousands of calls."""
    held = [f"{record['held_bytes'][i] / 2**20:.1f}" for i in (0, len(record["held_bytes"]) // 2, -1)]
    (memory, low, high), (objects, *_) = record["slopes"]["bytes_per_call"], record["slopes"]["objects_per_call"]
    return markdown(
        [
            "calls",
            "memory held at first, half-way, at last",
            "a call adds, in the second half",
            "answers that changed",
        ],
        [
            [
                f"{record['calls'][-1]:,}",
                f"{', '.join(held)} MiB",
                f"{memory:.1f} bytes (95 %: {low:.1f} to {high:.1f}), {objects:.4f} Python objects",
                str(len(record["different"])),
            ]
        ],
    )


def fuzz_table(record: dict) -> str:
    """How many generated inputs ended how, by what they were given to."""
    rows = [
        [target, f"{result['inputs']:,}", "; ".join(f"{n:,} {outcome}" for outcome, n in result["outcomes"].items())]
        for target, result in record.items()
    ]
    return markdown(["given to", "inputs", "outcomes"], rows)


TABLES: dict[str, tuple[Callable[..., str], list[str]]] = {
    "accuracy": (accuracy_table, ["examples/dpvr-tiny-adapter/training.json"]),
    "cost": (cost_table, []),
    "fuzz": (fuzz_table, ["benchmarks/results/fuzz.json"]),
    "published": (published_table, ["examples/evaluation/published.json"]),
    "saturation": (saturation_report.table, ["figures/saturation.json", "figures/saturation-dpvr.json"]),
    "side-branch-seeds": (side_branch_seeds_table, ["benchmarks/results/side_branch_seeds.json"]),
    "soak": (soak_table, ["benchmarks/results/soak.json"]),
    "transformers-tests": (run_transformers_tests.table, ["benchmarks/results/transformers_tests.json"]),
}


def make_table(name: str) -> str:
    """The Markdown of a table, by its name in a page."""
    if name in TABLES:
        function, files = TABLES[name]
        return make_of([read(ROOT / file, f"table {name}") for file in files], function, f"table {name}")
    results, _, function_name = name.partition(".")
    record = read(RESULTS / f"{results.replace('-', '_')}.json", f"table {name}")
    try:
        function = getattr(module_of(results), function_name or "table")
    except (ModuleNotFoundError, AttributeError) as error:
        raise ReportError(
            f"The page shows table {name}, which is neither in TABLES nor a benchmark's: {error}."
        ) from error
    return make_of([record], function, f"table {name}")


def module_of(results: str):
    """The benchmark that `results`, a file's name with hyphens, are of."""
    benchmark = results.partition("-")[0]
    return importlib.import_module(f"benchmarks.{REPORTS.get(benchmark, benchmark)}")


@functools.cache
def figures_of(results: str, path: Path) -> dict:
    """What the benchmark of `results` makes of its record at `path`."""
    record = read(path, f"figures of {results}")
    try:
        function = module_of(results).figures
    except (ModuleNotFoundError, AttributeError) as error:
        raise ReportError(f"The page shows figures of {results}, which no benchmark works out: {error}.") from error
    return {"figures": make_of([record], function, f"figures of {results}")}


@functools.cache
def sizes() -> dict[str, float]:
    """Of LLaVA-1.5-7B as a DPVR: weights in GB of bfloat16, of all and of the side branch alone, the side branch's in
    millions, and in GB what training adds to them: float32 copies, gradients and two moments of AdamW."""
    with init_empty_weights():
        model = speed.CODE(DPVRConfig())
    total, branch = (sum(x.numel() for x in part.parameters()) for part in (model, model.model.side_branch))
    return {
        "weights_gb": total * 2 / 1e9,
        "side_branch_gb": branch * 2 / 1e9,
        "side_branch_millions": branch / 1e6,
        "training_gb": branch * 16 / 1e9,
    }


def find_value(path: str):
    """The number or text at `FILE.KEY.KEY` in the result files, or of `figures` or `sizes`; a key may be a list
    position."""
    stem, *keys = next(csv.reader([path], delimiter="."))  # what stands in double quotes is one key
    file = RESULTS / f"{stem.replace('-', '_')}.json"
    if stem == "sizes":
        value = sizes()
    else:
        value = figures_of(stem, file) if keys[:1] == ["figures"] else read(file, f"value {path}")
    for key in keys:
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            found = stem if stem == "sizes" else f"benchmarks/results/{file.name}"
            raise ReportError(f"The page shows value {path}, but {found} has no {key}.") from error
    if isinstance(value, (dict, list)):
        raise ReportError(f"The page shows value {path}, which is not one number or text: go on to {list(value)[:5]}.")
    return value


def fill_table(match: re.Match) -> str:
    return f"{match[1]}{make_table(match['name'])}\n{match[4]}"


def fill_value(match: re.Match) -> str:
    if not match.string[: match.start()].rpartition("\n")[2].strip():
        raise ReportError(f"Value {match['path']} stands at the start of a line, which Markdown takes for HTML.")
    return f"{match[1]}{format(find_value(match['path']), match['format'] or '')}{match[5]}"


def fill(text: str) -> str:
    """`text` with every table and value as the result files have it.

    Raises:
        ReportError: if a marker has no partner, or names what is not there.
    """
    stray = MARKER.findall(VALUE.sub("", TABLE.sub("", text)))
    if stray:
        raise ReportError(f"The page has markers without their partners, or in no line of their own: {stray}.")
    return VALUE.sub(fill_value, TABLE.sub(fill_table, text))


def stale(text: str, filled: str) -> list[str]:
    """Names of the tables and values that differ."""
    return [
        match.group(name)
        for pattern, name in ((TABLE, "name"), (VALUE, "path"))
        for match, new in zip(pattern.finditer(text), pattern.finditer(filled), strict=True)
        if match.group() != new.group()
    ]


def draw_routing(path: Path) -> None:
    """Which layers see which tokens, for LLaVA-1.5-7B."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure, axes = plt.subplots(figsize=(11, 3.9), layout="constrained")

    def box(x, y, width, height, colour, text):
        axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", color=colour, lw=0)
        )
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=10.5)

    def arrow(start, end, colour):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=colour, lw=2))

    box(0, 0.4, 3.9, 2.6, JOINT, "layers 0 .. 17\nvision and text tokens together\n(as in LLaVA)")
    box(5.1, 1.95, 5.4, 1.05, TEXT, "layers 18 .. 30: text tokens only\nno vision token in tensors or KV cache")
    box(5.1, 0.4, 2.3, 1.05, VISION, "side branch, 1 layer\nvision only, trained")
    box(11.7, 0.4, 2.5, 2.6, JOINT, "layer 31\nboth streams in\ntheir order,\nthen norm, head")
    arrow((3.9, 2.47), (5.1, 2.47), TEXT)
    arrow((10.5, 2.47), (11.7, 2.47), TEXT)
    arrow((3.9, 0.92), (5.1, 0.92), VISION)
    arrow((7.4, 0.92), (11.7, 0.92), VISION)
    axes.text(4.5, 3.3, "saturation layer S = 18", ha="center", color=INK, fontsize=10)
    axes.plot([4.5, 4.5], [0.2, 3.15], ls=":", color=INK, lw=1)
    axes.text(11.1, 3.3, "late fusion", ha="center", color=INK, fontsize=10)
    axes.plot([11.1, 11.1], [0.2, 3.15], ls=":", color=INK, lw=1)
    axes.set_xlim(-0.2, 14.4)
    axes.set_ylim(0, 3.6)
    axes.axis("off")
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def draw(folder: Path) -> list[Path]:
    """Draws every plot and returns their paths."""
    folder.mkdir(exist_ok=True)
    routing, saturation = folder / "routing.png", folder / "saturation.png"
    draw_routing(routing)
    runs = [read(ROOT / "figures" / f"{name}.json", saturation.name) for name in ("saturation", "saturation-dpvr")]
    saturation_report.draw_overview(saturation, runs)
    return [routing, saturation]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n  python benchmarks/report.py\n  python benchmarks/report.py --check\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only compare the pages with the result files")
    args = parser.parse_args(arguments)
    texts = {page: page.read_text() for page in PAGES}
    filled = {}
    for page, text in texts.items():
        try:
            filled[page] = fill(text)
        except ReportError as error:
            print(f"error: {page.name}: {error}", file=sys.stderr)
            return 2
    if args.check:
        differing = {page: stale(text, filled[page]) for page, text in texts.items() if text != filled[page]}
        for page, names in differing.items():
            print(f"{page.name} differs in {', '.join(names)}: run python benchmarks/report.py")
        if not differing:
            print(f"{', '.join(page.name for page in PAGES)}: up to date")
        return int(bool(differing))
    for page, text in filled.items():
        with written_whole(page) as new:
            new.write_text(text)
    print(*PAGES, *draw(FIGURES), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, "the same command starts anew"))
