#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Draw the README's figures and fill its tables from result files and formulas, so that no number is typed by hand.

A table stands in the README between `<!-- begin:NAME -->` and `<!-- end:NAME -->`. `--check` changes nothing and fails
if a table is not what the result files say.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits as task

from benchmarks.accounting import cache_bytes, dense_config, prefill_flops
from configuration_dpvr import DPVRConfig

README = ROOT / "README.md"
FIGURES = ROOT / "figures"
JOINT, VISION, TEXT, INK = "#8e7cc3", "#e69138", "#3d85c6", "#222222"


def read(*names: str) -> dict:
    return json.loads(ROOT.joinpath(*names).read_text())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def accuracy_table() -> str:
    """Held-out accuracy of the embedded model, from the record of the side branch's training."""
    held_out = read("examples", "dpvr-tiny-adapter", "training.json")["held_out"]
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
        stored = [cache_bytes(each, *tokens) for each in (dense, config)]
        total, branch = sum(stored[1].values()), stored[1]["side branch"]
        whole = sum(stored[0].values())
        rows.append(
            [
                name,
                f"{flops[0] / 1e12:.2f} to {flops[1] / 1e12:.2f} TFLOP",
                f"{flops[1] / flops[0]:.3f}",
                f"{whole / 2**20:.0f} to {total / 2**20:.0f} MiB",
                f"{total / whole:.3f} ({(total - branch) / whole:.3f} without the side branch's own)",
            ]
        )
    return markdown(["576 image + 64 text tokens", "decoder, prefill", "ratio", "KV cache, 16 bit", "ratio"], rows)


def saturation_table() -> str:
    """Attention and KL by layer of the embedded model, and what its trained side branch makes of the KL."""
    record, routed = read("figures", "saturation.json"), read("figures", "saturation-dpvr.json")
    curves = {name: record["curves"][name]["mean"] for name in ("attention", "withdrawal", "routing")}
    trained = routed["curves"]["routing_own"]["mean"]

    def cells(values: list[float | None], digits: str) -> list[str]:
        return ["" if value is None else format(value, digits) for value in values]

    shares = {entry["saturation_layer"]: entry["flops_ratio"] for entry in record["cost"]}
    layers = range(len(trained))
    return markdown(
        ["layer", *map(str, layers)],
        [
            ["text-to-image attention", *cells(curves["attention"], ".2f")],
            ["KL if vision is removed from here on, nats", *cells(curves["withdrawal"], ".2g")],
            ["KL if it is routed from here on, untrained", *cells(curves["routing"], ".2g")],
            ["the same, side branch trained", *cells(trained, ".2g")],
            ["decoder FLOPs if it is routed from here on", *cells([shares.get(i) for i in layers], ".0%")],
        ],
    )


def transformers_table() -> str:
    """How transformers' own tests went for LLaVA and DPVR."""
    record = read("benchmarks", "results", "transformers_tests.json")
    record.pop("versions")
    rows = []
    for title, pair in record.items():
        counts = [
            ", ".join(f"{pair[model].get(outcome, 0)} {outcome}" for outcome in ("passed", "skipped", "failed"))
            for model in ("LLaVA", "DPVR")
        ]
        lost = [
            f"`{test}` ({reason.removeprefix('skipped: ')})" for test, reason in pair["passed by LLaVA alone"].items()
        ]
        rows.append([title, *counts, "; ".join(lost)])
    return markdown(["transformers'", "LLaVA", "DPVR", "passed by LLaVA alone"], rows)


TABLES = {
    "transformers-tests": transformers_table,
    "accuracy": accuracy_table,
    "cost": cost_table,
    "saturation": saturation_table,
}


def fill(text: str) -> str:
    for name, table in TABLES.items():
        begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"README.md has no {begin} ... {end}")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table()}\n{end}{rest.split(end)[1]}"
    return text


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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n  python scripts/report.py\n  python scripts/report.py --check\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only compare the README with the result files")
    args = parser.parse_args()
    text = README.read_text()
    filled = fill(text)
    if args.check:
        print("README.md is up to date" if text == filled else "README.md differs: run python scripts/report.py")
        return int(text != filled)
    README.write_text(filled)
    from saturation_report import draw_overview

    FIGURES.mkdir(exist_ok=True)
    draw_routing(FIGURES / "routing.png")
    draw_overview(
        FIGURES / "saturation.png", [read("figures", "saturation.json"), read("figures", "saturation-dpvr.json")]
    )
    print(f"{README}\n{FIGURES / 'routing.png'}\n{FIGURES / 'saturation.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
