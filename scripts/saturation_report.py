# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Plots and the HTML page of `scripts/analyze_saturation.py`, from its saturation.json and maps alone.

The page needs no other file and no network. Its plots are the SVGs that are also written beside it, with the colours
of `INK` and `SERIES` replaced by CSS variables, so that they follow the reader's light or dark setting.
"""

import base64
import io
import json
import math
import re
from collections.abc import Callable
from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from benchmarks.command import save_figure
from benchmarks.tables import markdown
from scripts import saturation_metrics, saturation_rule
from scripts.output import written_whole
from scripts.saturation_rule import AnalysisError

INK, FAINT = "#222222", "#8a8a8a"
# Okabe and Ito's colours, which people of every kind of colour vision tell apart; a dark page has lighter ones
SERIES = {"vision": "#d55e00", "text": "#0072b2", "third": "#009e73", "fourth": "#aa4499"}
DARK = {"vision": "#ff9248", "text": "#5db8ff", "third": "#3fd8a8", "fourth": "#e99ad0"}
SMALLEST_KL = 1e-6  # nats; what is smaller is drawn here
STYLE = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.markersize": 4.5,
}
MAP_PIXELS = 168
# What is read of a saturation.json
KEYS = {"cost", "curves", "label", "recommendation", "samples", "settings"}
KEYS |= {"text_tokens", "uniform_attention", "vision_tokens"}


def read_summary(folder: Path) -> dict:
    """saturation.json of a run.

    Raises:
        AnalysisError: `folder` has none, or none that can be read.
    """
    path = folder / "saturation.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AnalysisError(f"{path} cannot be read: {error}") from error
    missing = sorted(KEYS - summary.keys()) if isinstance(summary, dict) else sorted(KEYS)
    if missing:
        raise AnalysisError(f"{path} is not a result of analyze_saturation.py: it has no {', '.join(missing)}.")
    return summary


# ------------------------------------------------------------------------------------------------------------ plots


def curve(summary: dict, name: str) -> np.ndarray | None:
    """Means of a metric by layer, NaN where nothing was measured; None if it was not asked for."""
    return np.array(summary["curves"][name]["mean"], dtype=float) if name in summary["curves"] else None


def draw_curve(axes, runs: list[dict], name: str, label: str, colour: str, floor: float | None = None) -> None:
    """A line for each run, the first solid with its 95 % interval, the other dashed with open marks.

    With a `floor`, smaller values are drawn there and the line skips layers that were not measured; else it breaks.
    """
    for index, summary in enumerate(runs):
        values = curve(summary, name)
        if values is None:
            continue
        layers = np.arange(len(values))
        chosen = layers if floor is None else layers[~np.isnan(values)]
        shown = values.clip(min=floor)
        look = {"ls": "--", "mfc": "none"} if index else {"ls": "-", "label": label}
        axes.plot(chosen, shown[chosen], marker="o", color=colour, **look)
        statistics = summary["curves"][name]
        if index == 0 and statistics["low_95"]:
            low, high = (np.array(statistics[end], dtype=float).clip(min=floor) for end in ("low_95", "high_95"))
            axes.fill_between(chosen, low[chosen], high[chosen], color=colour, alpha=0.2, lw=0)


def mark_layers(axes, runs: list[dict]) -> None:
    """The recommended saturation layer, in a DPVR the layers that hold no vision token, and whose the lines are."""
    settings, layer = runs[0]["settings"], runs[0]["recommendation"]["saturation_layer"]
    axes.set_xlabel("decoder layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if settings["saturation_layer"] is not None:
        first, end = settings["saturation_layer"] - 0.5, settings["first_fusion_layer"] - 0.5
        axes.axvspan(first, end, color=FAINT, alpha=0.15, lw=0, label="its text-only layers")
    if layer is not None:
        axes.axvline(layer, color=INK, ls=":", lw=1.5, label=f"recommended: S = {layer}")
    if len(runs) > 1:
        axes.plot([], [], color=INK, ls="-", label=runs[0]["label"])
        axes.plot([], [], color=INK, ls="--", marker="o", mfc="none", label=runs[1]["label"])


def draw_attention(axes, runs: list[dict]) -> None:
    draw_curve(axes, runs, "attention", "text to image", SERIES["vision"])
    axes.axhline(runs[0]["uniform_attention"], color=FAINT, ls="-.", lw=1.2, label="attention that does not look")
    axes.set_ylabel("share of attention (0 to 1)")
    axes.set_ylim(bottom=0)


def draw_efficiency(axes, runs: list[dict]) -> None:
    kinds = {"image": ("an image token", "vision"), "system": ("a system token", "third")}
    kinds["instruction"] = ("an instruction token", "text")
    for kind, (label, colour) in kinds.items():
        draw_curve(axes, runs, f"efficiency_{kind}", label, SERIES[colour], floor=1e-7)
    axes.set_yscale("log")
    axes.set_ylabel("share of attention per token")


def draw_pair(name: str, unit: str) -> Callable:
    def draw(axes, runs: list[dict]) -> None:
        draw_curve(axes, runs, f"{name}_vision", "vision tokens", SERIES["vision"])
        draw_curve(axes, runs, f"{name}_text", "text tokens", SERIES["text"])
        axes.set_ylabel(unit)

    return draw


def draw_kl(axes, runs: list[dict]) -> None:
    labels = {
        "withdrawal": ("vision removed from here on", "vision"),
        "routing": ("routed from here on", "text"),
        "contribution": ("vision frozen in this layer", "third"),
    }
    for name, (label, colour) in labels.items():
        draw_curve(axes, runs, name, label, SERIES[colour], floor=SMALLEST_KL)
    for summary in runs:
        own, layer = curve(summary, "routing_own"), summary["settings"]["saturation_layer"]
        if own is not None:
            label = f"{summary['label']}'s side branch" if len(runs) > 1 else "its own side branch"
            axes.plot([layer], own[layer].clip(min=SMALLEST_KL), "*", ms=13, color=SERIES["fourth"], label=label)
    threshold = runs[0]["recommendation"]["kl_threshold"]
    axes.axhline(threshold, color=FAINT, ls="-.", lw=1.2, label=f"threshold, {threshold:g}")
    axes.set_yscale("log")
    axes.set_ylabel("KL divergence (nats)")


def draw_cost(axes, runs: list[dict]) -> None:
    for index, summary in enumerate(runs):
        layers = [entry["saturation_layer"] for entry in summary["cost"]]
        for name, label, key in (("flops_ratio", "FLOPs", "vision"), ("cache_ratio", "KV cache", "text")):
            shares = [100 * entry[name] for entry in summary["cost"]]
            look = {"ls": "--", "mfc": "none"} if index else {"ls": "-", "label": label}
            axes.plot(layers, shares, marker="o", color=SERIES[key], **look)
    axes.axhline(100, color=FAINT, ls="-.", lw=1.2, label="dense LLaVA")
    axes.set_ylabel("share of the dense model (%)")
    axes.set_ylim(bottom=0)


# name: title, metric that it needs, what draws it
PLOTS: dict[str, tuple[str, str | None, Callable]] = {
    "attention": ("Attention from text to image", "attention", draw_attention),
    "kl": ("What the answer loses", "withdrawal routing contribution", draw_kl),
    "cost": ("What a saturation layer costs", None, draw_cost),
    "cosine_next": (
        "Change from layer to layer",
        "cosine_next_vision",
        draw_pair("cosine_next", "cosine to next layer"),
    ),
    "cosine_last": (
        "Distance to the last layer",
        "cosine_last_vision",
        draw_pair("cosine_last", "cosine to last layer"),
    ),
    "curvature": ("Turns of the trajectory", "curvature_vision", draw_pair("curvature", "curvature (radians)")),
    "efficiency": ("Attention that one token receives", "efficiency_image", draw_efficiency),
}


def make_plot(name: str, runs: list[dict]):
    """One plot as a figure of its own."""
    figure, axes = plt.subplots(figsize=(4.7, 4.0), layout="constrained")
    PLOTS[name][2](axes, runs)
    mark_layers(axes, runs)
    if name == "cost":
        axes.set_xlabel("saturation layer")
    figure.legend(loc="outside upper left", ncols=2, fontsize=10, columnspacing=1, handlelength=1.6)
    return figure


def available_plots(runs: list[dict]) -> list[str]:
    measured = runs[0]["curves"].keys()
    return [name for name, (_, needs, _) in PLOTS.items() if needs is None or measured & set(needs.split())]


def svg_of(figure, name: str) -> str:
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": name}):  # ids that differ between the plots of a page, and not between runs
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def table(record: dict, routed: dict) -> str:
    """Attention and KL by layer of the embedded model, and what its trained side branch makes of the KL."""
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


def draw_overview(path: Path, runs: list[dict]) -> None:
    """The plots that the recommendation rests on, side by side, as one picture."""
    names = [name for name in ("attention", "kl", "cosine_last", "cost") if name in available_plots(runs)]
    with plt.rc_context(STYLE):
        figure, all_axes = plt.subplots(2, 2, figsize=(11, 8.6), layout="constrained")
        for axes, name in zip(all_axes.flat, names, strict=False):
            PLOTS[name][2](axes, runs)
            mark_layers(axes, runs)
            axes.set_title(PLOTS[name][0], loc="left", fontweight="bold")
            axes.legend(fontsize=9, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.14))
        all_axes.flat[len(names) - 1].set_xlabel("saturation layer")
        for axes in all_axes.flat[len(names) :]:
            axes.axis("off")
        save_figure(figure, path, dpi=100)
        plt.close(figure)


# --------------------------------------------------------------------------------------------------------- findings


def span(values: np.ndarray) -> str:
    low, high = np.nanmin(values), np.nanmax(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def find_attention(summary: dict) -> str:
    values, fusion = curve(summary, "attention"), summary["settings"]["first_fusion_layer"]
    top = int(values.argmax())
    return (
        f"Text pays {values[0]:.2f} of its attention to the image in layer 0, the most, {values[top]:.2f}, in layer "
        f"{top}, and {span(values[fusion // 2 : fusion])} in layers {fusion // 2} to {fusion - 1}; attention that "
        f"does not look would pay {summary['uniform_attention']:.2f}."
    )


def find_kl(summary: dict) -> str:
    parts, fusion, layers = [], summary["settings"]["first_fusion_layer"], summary["settings"]["layers"]
    threshold = summary["recommendation"]["kl_threshold"]
    for name, text in (("withdrawal", "removing vision"), ("routing", "routing it around the text-only layers")):
        values = curve(summary, name)
        if values is None:
            continue
        layer = saturation_rule.kl_layer(values, fusion, threshold)
        where = "at no layer" if layer is None else f"from layer {layer} on"
        if np.isnan(values[fusion]):
            fault = "is not finite" if layers is None or fusion in layers else "was not measured"
            parts.append(f"the KL of {text} {fault} at layer {fusion}")
        else:
            parts.append(f"{text} stays within {threshold:g} nats {where}")
    own, layer = curve(summary, "routing_own"), summary["settings"]["saturation_layer"]
    if own is not None:
        identity = curve(summary, "routing")[layer]
        beside = "" if np.isnan(identity) else f", an identity {identity:.2g}"
        parts.append(f"its own side branch costs {own[layer]:.2g} nats at layer {layer}{beside}")
    text = "; ".join(parts) or "freezing vision in one layer costs at most {:.2g} nats".format(
        np.nanmax(curve(summary, "contribution"))
    )
    return f"{text[0].upper()}{text[1:]}."


def find_cost(summary: dict) -> str:
    layer = summary["recommendation"]["saturation_layer"]
    tokens = f"{summary['vision_tokens']} vision and {summary['text_tokens']} text tokens"
    if layer is None:
        return f"Decoder FLOPs and 16-bit KV cache of reading {tokens}, by formula."
    entry = summary["cost"][layer - 1]
    return (
        f"With S = {layer}, reading {tokens} takes {entry['flops_ratio']:.0%} of the decoder's FLOPs and leaves "
        f"{entry['cache_ratio']:.0%} of the KV cache, by formula; the side branch's own, which only a later image "
        "reads, is not in it."
    )


def average(values: np.ndarray) -> str:
    """The mean of what was measured, or a word: tokens that do not move have no angle."""
    return "none" if np.isnan(values).all() else f"{np.nanmean(values):.2f}"


def find_pair(name: str, what: str) -> Callable:
    def find(summary: dict) -> str:
        vision, text = (curve(summary, f"{name}_{kind}") for kind in ("vision", "text"))
        middle = len(vision) // 2
        return (
            f"{what}: {average(vision[:middle])} for vision and {average(text[:middle])} for text on average over the "
            f"first {middle} layers, {average(vision[middle:])} and {average(text[middle:])} over the rest."
        )

    return find


def find_efficiency(summary: dict) -> str:
    image, system = curve(summary, "efficiency_image"), curve(summary, "efficiency_system")
    middle = len(image) // 2
    ratios = [np.nanmean(image[part]) / np.nanmean(system[part]) for part in (slice(middle), slice(middle, None))]
    return (
        f"An image token receives {ratios[0]:.2g} times the attention of a system token in the first {middle} layers, "
        f"{ratios[1]:.2g} times in the rest."
    )


FINDINGS: dict[str, Callable[[dict], str]] = {
    "attention": find_attention,
    "kl": find_kl,
    "cost": find_cost,
    "cosine_next": find_pair("cosine_next", "Cosine between a token's states before and after a layer"),
    "cosine_last": find_pair("cosine_last", "Cosine between a token's state and its last one"),
    "curvature": find_pair("curvature", "Angle between two updates of a token, in radians"),
    "efficiency": find_efficiency,
}


# ------------------------------------------------------------------------------------------------------------- maps


def overlay(picture: np.ndarray, attention: np.ndarray) -> Image.Image:
    """The picture `(H, W, 3)` in grey under the attention `(side, side)`, scaled to its largest value."""
    size = (MAP_PIXELS, MAP_PIXELS)
    how = Image.Resampling.NEAREST if picture.shape[0] < MAP_PIXELS else Image.Resampling.LANCZOS
    grey = np.asarray(Image.fromarray(picture).convert("L").resize(size, how), dtype=float)[..., None] / 255
    share = attention / max(attention.max(), 1e-12)
    share = np.asarray(Image.fromarray(share.astype(np.float32)).resize(size, Image.Resampling.NEAREST))
    heat = plt.get_cmap("inferno")(0.25 + 0.75 * share)[..., :3]
    weight = (0.85 * share**0.7)[..., None]
    return Image.fromarray(((1 - weight) * 0.8 * grey + weight * heat).clip(0, 1).__mul__(255).astype(np.uint8))


def read_maps(folder: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Question, attention `(L, side, side)` and picture `(H, W, 3)` of each sample that has a map."""
    found = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            maps, picture, question = file["maps"], file["picture"], str(file["question"])
        side = math.isqrt(maps.shape[1])
        found.append((question, maps.reshape(-1, side, side), picture))
    return found


def layers_to_draw(summary: dict, chosen: list[int] | None) -> list[int]:
    """Those asked for, else about six over the depth of the decoder, the recommended one among them."""
    num_layers = summary["settings"]["num_hidden_layers"]
    if chosen:
        return chosen
    spread = {round(x) for x in np.linspace(0, num_layers - 1, min(6, num_layers))}
    return sorted(spread | {summary["recommendation"]["saturation_layer"] or 0})


def png_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_maps(path: Path, maps: list, layers: list[int]) -> None:
    """All maps as one picture, a row for each sample."""
    with plt.rc_context({**STYLE, "axes.grid": False}):
        size = (1.6 * len(layers), 2.1 * len(maps))
        figure, rows = plt.subplots(len(maps), len(layers), figsize=size, layout="constrained", squeeze=False)
        for row, (question, attention, picture) in zip(rows, maps, strict=True):
            for axes, layer in zip(row, layers, strict=True):
                axes.imshow(overlay(picture, attention[layer]))
                axes.set_axis_off()
                axes.set_title(f"layer {layer}: {attention[layer].sum():.2f}", fontsize=9)
            text = row[0].text(0, -0.04, question, transform=row[0].transAxes, fontsize=9, va="top")
            text.set_in_layout(False)  # it may be wider than its picture
        save_figure(figure, path, dpi=110)
        plt.close(figure)


# ------------------------------------------------------------------------------------------------------------- page

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --ink: #222222; --faint: #6b6b6b; --page: #f6f6f4; --card: #ffffff; --line: #dddddb; {light} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8e8e6; --faint: #a8a8a6; --page: #16181a; --card: #1f2225; --line: #3a3e42; {dark} }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }}
main {{ max-width: 1240px; margin: 0 auto; padding: 20px 16px 60px; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 8px 0 4px; }}
h2 {{ font-size: 1.1rem; margin: 0 0 6px; }}
p {{ margin: 0 0 10px; }}
.faint {{ color: var(--faint); }}
code, pre {{ font: 0.85rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }}
pre {{ white-space: pre-wrap; }}
.card {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; min-width: 0; }}
.verdict {{ border-left: 6px solid var(--vision); margin: 16px 0; font-size: 1.05rem; }}
.verdict strong {{ font-size: 1.3rem; }}
.plots {{ display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }}
.plots > .card:only-child {{ max-width: 620px; }}
section {{ margin-top: 16px; }}
svg {{ width: 100%; max-width: 520px; height: auto; display: block; margin: 0 auto; }}
svg text {{ font-family: system-ui, sans-serif !important; }}
.maps {{ display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(124px, 1fr)); margin: 8px 0 20px; }}
figure {{ margin: 0; }}
figure img {{ width: 100%; height: auto; display: block; border-radius: 4px; }}
figcaption {{ font-size: 0.85rem; color: var(--faint); }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.92rem; }}
th, td {{ text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }}
tr.chosen td {{ font-weight: 700; }}
summary {{ cursor: pointer; }}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def follow_theme(svg: str) -> str:
    """An SVG of matplotlib as it stands in the page: no prologue, a size that follows, colours as CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    names = {INK: "--ink", FAINT: "--faint", **{colour: f"--{name}" for name, colour in SERIES.items()}}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var({name})")
    return svg


def plot_card(name: str, runs: list[dict], svg: str) -> str:
    sentences = [FINDINGS[name](runs[0])]
    if len(runs) > 1 and (PLOTS[name][1] is None or name in available_plots(runs[1:])):
        sentences.append(f"{runs[1]['label']}: {FINDINGS[name](runs[1])}")
    findings = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    label = escape(" ".join(sentences), quote=True)
    drawing = follow_theme(svg).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f'<div class="card"><h2>{escape(PLOTS[name][0])}</h2>{findings}{drawing}</div>'


def map_section(maps: list, layers: list[int]) -> str:
    if not maps:
        return ""
    parts = [
        '<section class="card"><h2>Where the answer looks</h2><p>Attention of the prompt\'s last token, from which '
        "the answer begins, mean over heads. Each map is scaled to its own largest value; the number is the share of "
        "attention that the whole image receives.</p>"
    ]
    for question, attention, picture in maps:
        cells = "".join(
            f'<figure><img alt="attention of layer {layer} over the picture" '
            f'src="{png_uri(overlay(picture, attention[layer]))}"><figcaption>layer {layer}: '
            f"{attention[layer].sum():.2f}</figcaption></figure>"
            for layer in layers
        )
        parts.append(f'<p>{escape(question)}</p><div class="maps">{cells}</div>')
    return "".join(parts) + "</section>"


def cost_section(summary: dict) -> str:
    chosen = summary["recommendation"]["saturation_layer"]
    kls = {name: curve(summary, name) for name in ("withdrawal", "routing")}
    kls = {name: values for name, values in kls.items() if values is not None}
    header = ["saturation layer", "decoder GFLOPs", "of dense", "KV cache, MiB", "of dense"]
    header += [f"{name} KL, nats" for name in kls]
    rows = []
    for entry in summary["cost"]:
        layer = entry["saturation_layer"]
        cells = [
            str(layer),
            f"{entry['flops'] / 1e9:,.4g}",
            f"{entry['flops_ratio']:.1%}",
            f"{entry['cache_bytes'] / 2**20:,.4g}",
            f"{entry['cache_ratio']:.1%}",
            *("-" if math.isnan(values[layer]) else f"{values[layer]:.2g}" for values in kls.values()),
        ]
        mark = ' class="chosen"' if layer == chosen else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    return (
        '<section class="card"><h2>Every possible saturation layer</h2><div class="scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def verdict(summary: dict) -> str:
    chosen = summary["recommendation"]
    layer = chosen["saturation_layer"]
    title = "No recommendation" if layer is None else f"Saturation layer {layer}"
    text = escape(chosen["reason"])
    if chosen.get("interval_95"):
        low, high = chosen["interval_95"]
        text += (
            f" Over {summary['samples']} samples the 95 % interval is layer {low} to {high}; "
            f"{chosen['share_of_resamples']:.0%} of the resamples choose layer {layer}."
        )
    elif layer is not None:
        text += " One sample gives no interval."
    if layer is not None:
        text += f" {find_cost(summary)}"
    return f'<div class="card verdict"><strong>{title}</strong><p>{text}</p></div>'


def page(folder: Path, runs: list[dict], drawings: dict[str, str], layers: list[int]) -> str:
    summary = runs[0]
    settings = summary["settings"]
    title = f"Where vision saturates in {summary['label']}"
    facts = (
        f"{settings['model_type']}, {settings['num_hidden_layers']} decoder layers, {settings['dtype']}, "
        f"{settings['attention']} attention; {summary['samples']} samples of {settings['data']}, on average "
        f"{summary['vision_tokens']} vision and {summary['text_tokens']} text tokens."
    )
    if len(runs) > 1:
        facts += f" Dashed: {runs[1]['label']}, {runs[1]['samples']} samples of {runs[1]['settings']['data']}."
    cards = "".join(plot_card(name, runs, svg) for name, svg in drawings.items())
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(facts)}</p>',
        verdict(summary),
        f'<div class="plots">{cards}</div>',
        map_section(read_maps(folder / "maps"), layers),
        cost_section(summary),
        '<section class="card"><details><summary>What was measured, by which formulas, and how the layer is chosen'
        f"</summary><pre>{escape(saturation_metrics.__doc__.strip())}\n\n{escape(saturation_rule.__doc__.strip())}"
        f"</pre></details><p class='faint'>Shaded bands: 95 % bootstrap intervals of the mean over samples. KLs below "
        f"{SMALLEST_KL:g} nats are drawn there.</p><p><code>{escape(summary['command'])}</code></p></section>",
    ]
    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in set_.items()) for set_ in (SERIES, DARK))
    return PAGE.format(title=escape(title), light=light, dark=dark, body="\n".join(body))


def write_report(folder: Path, summary: dict, other: dict | None, map_layers: list[int] | None) -> None:
    """Writes the plots as PNG and SVG, overview.png, maps.png and report.html into `folder`."""
    runs = [summary] if other is None else [summary, other]
    drawings = {}
    with plt.rc_context(STYLE):
        for name in available_plots(runs):
            figure = make_plot(name, runs)
            save_figure(figure, folder / f"{name}.png", dpi=150)
            drawings[name] = svg_of(figure, name)
            with written_whole(folder / f"{name}.svg") as new:
                new.write_text(drawings[name], encoding="utf-8")
            plt.close(figure)
    draw_overview(folder / "overview.png", runs)
    layers = layers_to_draw(summary, map_layers)
    maps = read_maps(folder / "maps")
    if maps:
        draw_maps(folder / "maps.png", maps, layers)
    with written_whole(folder / "report.html") as new:
        new.write_text(page(folder, runs, drawings, layers), encoding="utf-8")
