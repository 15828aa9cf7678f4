# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Which saturation layer the measurements of `scripts/analyze_saturation.py` speak for, and what each layer would cost.

S may be any layer from 1 to F, the first fusion layer, where text meets vision again. The rule:

1. By KL: the first layer from which on, up to F, removing vision costs at most a threshold: the mean withdrawal KL is
   no larger at any layer measured. VTW (arXiv 2405.05803) chooses its layer by a threshold on that KL too, but takes
   the first layer below; 0.003 nats is what its public code has for LLaVA-1.5-7B, 0.0005 for 13B. If the withdrawal
   KL exceeds the threshold even at F, where the fusion layer must then still read vision, the routing KL takes its
   place: DPVR brings vision back there.
2. By attention: the first layer of the plateau, on which the mean text-to-image attention of every layer up to F - 1
   is at most half of the largest of all layers, and they differ by at most 5 % of that. A plateau has at least a
   quarter of the decoder's layers: of the last few alone any curve that falls has one. If there is none, attention
   has no say, nor has that of a DPVR, whose text-only layers hold no vision. The three numbers are ours.
3. The later of the two. Its 95 % interval is that of the same rule on 1,000 bootstrap resamples of the samples.

KL decides: text may attend to an image whose content it already holds, and the reverse. The plateau can only make the
choice more careful. No side branch is trained for any of it.
"""

import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from benchmarks.accounting import cache_bytes, decoder_flops, dense_config, prefill_loads
from configuration_dpvr import DPVRConfig

KL_THRESHOLD = 0.003
FALLEN, FLAT = 0.5, 0.05  # of the largest attention: where a plateau begins, how flat it is
PLATEAU = 0.25  # of the decoder's layers: how long it is at least
RESAMPLES = 1000


class AnalysisError(ValueError):
    """A model, data or a folder of results that cannot be used; the message says what and why."""


def plateau_layer(attention: np.ndarray, fusion: int) -> int | None:
    """The first layer of the plateau of a curve `(L,)` of attention by layer; None if it does not fall to one."""
    largest = attention.max()
    for layer in range(1, fusion + 1 - math.ceil(PLATEAU * len(attention))):
        rest = attention[layer:fusion]
        if rest.max() <= FALLEN * largest and np.ptp(rest) <= FLAT * largest:
            return layer
    return None


def kl_layer(curve: np.ndarray, fusion: int, threshold: float) -> int | None:
    """The first layer from which on `curve` `(L,)`, NaN where nothing was measured, is at most `threshold`, up to
    layer `fusion`; None if there is none, or if layer `fusion` was not measured."""
    if np.isnan(curve[fusion]):
        return None
    found = None
    for layer in range(fusion, 0, -1):
        if curve[layer] > threshold:
            break
        found = found if np.isnan(curve[layer]) else layer
    return found


@dataclass(frozen=True)
class Choice:
    """What the rule says of mean curves: the layer, that of each part of the rule, and which KL spoke."""

    layer: int
    by_kl: int
    by_attention: int | None
    criterion: str


def choose_layer(means: dict[str, np.ndarray], fusion: int, threshold: float) -> Choice | None:
    """The rule of this module; None if at layer F no KL was measured, or each exceeds the threshold."""
    for criterion in ("withdrawal", "routing"):
        by_kl = kl_layer(means[criterion], fusion, threshold) if criterion in means else None
        if by_kl is not None:
            by_attention = plateau_layer(means["attention"], fusion) if "attention" in means else None
            return Choice(max(by_kl, by_attention or 1), by_kl, by_attention, criterion)
    return None


def obstacle(means: dict[str, np.ndarray], fusion: int, threshold: float, layers: Iterable[int]) -> str | None:
    """Why the rule can choose no layer, and what to do, with the KLs of `layers` measured; None if it can."""
    kls = [name for name in ("withdrawal", "routing") if name in means]
    if not kls or fusion not in layers:
        return (
            f"the rule needs the withdrawal or routing KL at layer {fusion}, which was not measured. Have one of the "
            f"two in --metrics, and {fusion} in --layers"
        )
    for name in kls:
        for layer in layers:
            if 1 <= layer <= fusion and not math.isfinite(means[name][layer]):
                return f"the mean {name} KL at layer {layer} is not finite. Measure in float32, by --dtype"
        if means[name][fusion] <= threshold:  # this one decides
            return None
    hint = "" if "routing" in kls else ", and the routing KL was not measured. Add routing to --metrics"
    return f"the {' and '.join(kls)} KL at layer {fusion} exceeds the threshold of {threshold:g} nats{hint}"


def explain(choice: Choice, means: dict[str, np.ndarray], fusion: int, threshold: float, is_routed: bool) -> str:
    """Why the layer was chosen, in one sentence."""
    num_layers = len(means[choice.criterion])
    act = {"withdrawal": "removing vision", "routing": "routing vision past the text-only layers"}[choice.criterion]
    worst = np.nanmax(means[choice.criterion][choice.by_kl : fusion + 1])
    kl = (
        f"from layer {choice.by_kl} on {act} changes the next-token distribution by at most {worst:.2g} nats "
        f"(threshold {threshold:g})"
    )
    if choice.criterion == "routing" and "withdrawal" in means:
        kl += ", though the fusion layer still reads vision"
    if choice.layer == fusion:
        kl += ", which leaves no layer to skip"
    if is_routed:
        attention = "attention has no say, as a DPVR's text-only layers hold no vision"
    elif "attention" not in means:
        attention = "attention was not measured"
    elif choice.by_attention is None:
        attention = "text-to-image attention does not fall to a plateau, so it has no say"
    else:
        level = means["attention"][choice.by_attention : fusion].mean()
        attention = f"text-to-image attention is on its plateau of {level:.2f} from layer {choice.by_attention} on"
    return f"Layer {choice.layer} of {num_layers}: {kl}, and {attention}."


def curves_of(rows: list[dict], num_layers: int) -> dict[str, np.ndarray]:
    """Values by name, `(samples, L)`, NaN where nothing was measured."""
    names = [name for name, value in rows[0].items() if isinstance(value, list)]
    return {name: np.array([row[name] for row in rows], dtype=float).reshape(-1, num_layers) for name in names}


def rounded(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(x) else float(f"{x:.4g}") for x in values]


def recommend(
    curves: dict[str, np.ndarray],
    fusion: int,
    threshold: float,
    is_routed: bool = False,
    layers: Iterable[int] | None = None,
    seed: int = 0,
) -> dict:
    """The recommended layer with its reason and its 95 % bootstrap interval, as saturation.json states it.

    Args:
        curves: values by name, `(samples, L)`.
        fusion: F.
        threshold: of the KL, in nats.
        is_routed: whether the model is a DPVR.
        layers: those whose KLs were measured; by default every one.
        seed: of the resamples.
    """
    curves = {name: values for name, values in curves.items() if not (is_routed and name == "attention")}
    num_samples = len(next(iter(curves.values())))
    means = {name: values.mean(0) for name, values in curves.items()}
    reason = obstacle(means, fusion, threshold, range(fusion + 1) if layers is None else layers)
    if reason:
        return {"saturation_layer": None, "reason": f"No layer: {reason}.", "kl_threshold": threshold}
    choice = choose_layer(means, fusion, threshold)
    needed = [name for name in ("attention", "withdrawal", "routing") if name in curves]
    draws = np.random.default_rng(seed).integers(num_samples, size=(RESAMPLES, num_samples))
    chosen = []
    for draw in draws if num_samples > 1 else ():
        resampled = choose_layer({name: curves[name][draw].mean(0) for name in needed}, fusion, threshold)
        chosen.append(resampled.layer if resampled else fusion)
    return {
        "saturation_layer": choice.layer,
        "reason": explain(choice, means, fusion, threshold, is_routed),
        "interval_95": np.percentile(chosen, [2.5, 97.5], method="nearest").tolist() if chosen else None,
        "share_of_resamples": float(np.mean([layer == choice.layer for layer in chosen])) if chosen else None,
        "by_kl": choice.by_kl,
        "by_attention": choice.by_attention,
        "criterion": choice.criterion,
        "kl_threshold": threshold,
    }


def interval(values: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean of `(samples, L)`, each `(L,)`."""
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.stack([values[draw].mean(0) for draw in draws])
    return np.percentile(means, 2.5, axis=0), np.percentile(means, 97.5, axis=0)


def cost_table(settings: dict, vision_tokens: int, text_tokens: int) -> list[dict]:
    """Decoder FLOPs of reading a prompt and bytes of its 16-bit KV cache at every possible saturation layer, in
    themselves and relative to the dense model (`benchmarks/accounting.py`)."""
    num_layers, fusion = settings["num_hidden_layers"], settings["first_fusion_layer"]
    table = []
    for layer in range(1, fusion + 1):
        config = DPVRConfig(
            text_config=settings["text_config"],
            saturation_layer=layer,
            num_side_layers=settings["num_side_layers"],
            num_fusion_layers=num_layers - fusion,
        )
        flops, stored = (
            [count(each) for each in (config, dense_config(config))]
            for count in (
                lambda c: decoder_flops(c, prefill_loads(c, vision_tokens, text_tokens)),
                lambda c: sum(cache_bytes(c, vision_tokens, text_tokens).values()),
            )
        )
        table.append(
            {
                "saturation_layer": layer,
                "flops": flops[0],
                "flops_ratio": round(flops[0] / flops[1], 6),
                "cache_bytes": stored[0],
                "cache_ratio": round(stored[0] / stored[1], 6),
            }
        )
    return table


def summarize(settings: dict, rows: list[dict], threshold: float, command: str) -> dict:
    """The content of saturation.json."""
    curves = curves_of(rows, settings["num_hidden_layers"])
    vision = round(np.mean([row["vision_tokens"] for row in rows]))
    text = round(np.mean([row["text_tokens"] for row in rows]))
    statistics = {}
    for name, values in curves.items():
        low, high = map(rounded, interval(values)) if len(rows) > 1 else (None, None)
        statistics[name] = {"mean": rounded(values.mean(0)), "low_95": low, "high_95": high}
    return {
        "command": command,
        "settings": settings,
        "python": platform.python_version(),
        "samples": len(rows),
        "vision_tokens": vision,
        "text_tokens": text,
        "uniform_attention": round(float(np.mean([row["uniform_attention"] for row in rows])), 4),
        "recommendation": recommend(
            curves,
            settings["first_fusion_layer"],
            threshold,
            settings["saturation_layer"] is not None,
            settings["layers"],
        ),
        "curves": statistics,
        "cost": cost_table(settings, vision, text),
    }
