# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
The methods that `quality.py` compares, by name, and what they cost.

Costs are those of the formulas in `accounting.py` and `baselines.py`, for the lengths of the prompts that were asked:
FLOPs of the decoder for the prompt, and bytes of the KV cache after it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import accounting, baselines
from benchmarks.baselines import fastv, pyramid_drop, vtw
from configuration_dpvr import DPVRConfig

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
