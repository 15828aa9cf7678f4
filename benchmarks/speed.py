#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Prefill, decoding, memory and KV cache of dense LLaVA, DPVR, FastV, VTW and PyramidDrop, measured in one run.

All models share one set of random weights of LLaVA-1.5-7B's layer sizes, so that a method costs no memory of its own.
Runs are interleaved: every repetition measures each method once, in another order, after one round that is not
counted. DPVR's parts are measured beside its prefill.

    prefill    the decoder on embeddings of the prompt with the image features in place, logits of the last token
    tower      vision tower and projector, the same for all; time to the first token is tower + prefill
    parts      DPVR's layers alone, on inputs made beforehand and with a KV cache to fill: joint, text-only, side
               branch, last
    routing    what DPVR does beside its layers: plans, packing, masks
    decode     one token after the other, from the cache that prefill left, the methods in turns
    memory     on a GPU: most memory during prefill beyond what was held before it
    host       on a GPU: until the host has launched all of a prefill. Where that is as long as prefill, the GPU waited
               for the host, or, of a method that reads from it on the way, the host for the GPU
    profile    one more prefill of LLaVA and of DPVR under torch's profiler: where the time goes

Times are medians with the 10th and 90th percentile, and ratios are medians of ratios within a repetition or, of
decoding, which is measured in the first of them, a step. Beside them stands the ratio of decoder FLOPs
(`accounting.py`, `baselines.py`), which a machine bound by arithmetic shows. On a GPU, CUDA events take the times.

With `--one-layer` all layers of the decoder have the same weights in memory, so that LLaVA-1.5-7B in fp32 fits where
27 GB do not. What is computed is the same, and the 0.8 GB of a layer stay in no cache from one to the next.
"""

import argparse
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from tqdm import tqdm
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import accounting, baselines
from benchmarks.caches import CACHE, make_cache, stored_bytes
from benchmarks.command import (
    SO_FAR,
    check_hidden_size,
    check_numbers,
    check_output,
    read_record,
    run_command,
    usable_device,
    write_record,
)
from benchmarks.make_random_llava import make_config
from benchmarks.tables import markdown
from configuration_dpvr import proportional_layer

CODE = get_class_from_dynamic_module("modeling_dpvr.DPVRForConditionalGeneration", str(ROOT))
ROUTING = sys.modules[CODE.__module__]
RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
EQUAL_RESULTS = RESULTS.with_name("speed_equal.json")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EMBEDDED = {"tiny-llava": 8, "tiny-llava-12": 12}  # LLaVAs and their decoder layers
OPERATORS = {  # of a profile, by how their names begin
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": (
        "aten::_scaled_dot_product",
        "aten::_flash_attention",
        "aten::_efficient_attention",
        "aten::_cudnn_attention",
    ),
    "indexing": ("aten::gather", "aten::scatter", "aten::masked_scatter", "aten::index", "aten::sort"),
}


@dataclass(frozen=True)
class Routed:
    """A DPVR, by fields of its config."""

    saturation_layer: int
    num_side_layers: int


@dataclass
class Method:
    """A model to measure, and what the formulas say of it.

    Attributes:
        flops: of a prompt, from its numbers of vision and text tokens.
        stages: of a baseline, see `baselines.py`.
    """

    name: str
    model: torch.nn.Module
    flops: Callable[[int, int], accounting.Flops]
    stages: tuple = ()

    def __call__(self, **inputs):
        """The outputs for the last token; baselines share a model, which drops tokens as the last of them said."""
        if self.stages:
            self.model.stages = self.stages
        return self.model(**inputs, logits_to_keep=1)


# ---------------------------------------------------------------------------------------------- models


@torch.no_grad()
def fill(model: torch.nn.Module, std: float, seed: int = 0) -> None:
    """Random weights at the speed of copying: one block of numbers over and over."""
    block = torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(seed)) * std
    block = block.to(next(model.parameters()).device)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(float("norm" in name and name.endswith("weight")))
        else:
            repeats = -(-weight.numel() // len(block))
            weight.copy_(block.to(weight.dtype).repeat(repeats)[: weight.numel()].view(weight.shape))


def build(model_class, config, weights: dict, dtype: torch.dtype, device: torch.device):
    """A model on `weights`, which it shares; what they lack is made."""
    with init_empty_weights():
        model = model_class(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert not unexpected, unexpected
    for name in missing:
        module, _, leaf = name.rpartition(".")
        module = model.get_submodule(module)
        shape = getattr(module, leaf).shape
        setattr(module, leaf, torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
    if missing:
        fill(model.model.side_branch, config.text_config.initializer_range, seed=1)
    return model.to(device).eval().requires_grad_(False)


def make_weights(config, num_layers: int, one_layer: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """Random weights of a dense LLaVA, with `one_layer` the same tensors for every layer of the decoder."""
    fields = config.to_dict()
    fields.pop("model_type")
    if one_layer:
        fields["text_config"]["num_hidden_layers"] = 1
    with no_init_weights(), device:
        model = LlavaForConditionalGeneration(LlavaConfig(**fields)).requires_grad_(False)
    fill(model, config.text_config.initializer_range)
    weights, first = model.state_dict(), "model.language_model.layers.0."
    if one_layer:
        layer = {name.removeprefix(first): weight for name, weight in weights.items() if name.startswith(first)}
        for i in range(1, num_layers):
            weights |= {f"{first.replace('0', str(i))}{name}": weight for name, weight in layer.items()}
    return weights


def default_settings(args) -> dict[str, Routed | tuple]:
    """DPVR with its saturation layer, and the baselines as their authors use them."""
    num_layers = args.layers
    layer = proportional_layer(num_layers) if args.saturation_layer is None else args.saturation_layer
    quarters = tuple(num_layers * i // 4 for i in (1, 2, 3))
    return {
        f"DPVR (S={layer})": Routed(layer, 1),
        "FastV (K=2, R=0.5)": baselines.fastv(2, 0.5),
        f"VTW (K={num_layers // 2})": baselines.vtw(num_layers // 2),
        f"PyramidDrop ({', '.join(map(str, quarters))}; 0.5)": baselines.pyramid_drop(quarters, 0.5),
    }


def equal_settings(llava: str, num_layers: int) -> dict[str, Routed | tuple]:
    """Where each method of `quality.py` keeps 99 % of the accuracy of an embedded LLaVA for the fewest FLOPs, at the
    same shares of the depth; what is computed alike, because only its training differs, stands there once."""
    from benchmarks import quality, quality_methods, quality_report

    record, found = read_record(quality.RESULTS, quality_report.SHAPE), {}
    entries, own = quality_report.summarize(record), quality_report.depths(record)[llava]
    for name, (setting, _) in quality_report.settings_at_depth(entries, llava, own, num_layers).items():
        if isinstance(setting, quality_methods.Routing):
            setting = Routed(setting.saturation_layer, setting.num_side_layers)
        elif isinstance(setting, quality_methods.TrainedLast):
            setting = setting.stages
        if setting is not None and setting not in found.values():
            found[f"{name} ({describe(setting)})"] = setting
    return dict(sorted(found.items(), key=lambda item: not isinstance(item[1], Routed)))


def describe(setting: Routed | tuple) -> str:
    """By the letters of the papers."""
    if isinstance(setting, Routed):
        return f"S={setting.saturation_layer}"
    first, *later = setting
    if later:
        return f"{', '.join(str(stage.layer) for stage in setting)}; {first.share}"
    return f"K={first.layer}, R={1 - first.share:.2g}" if first.ranks else f"K={first.layer}"


def make_methods(args, settings: dict[str, Routed | tuple], device: torch.device) -> list[Method]:
    """Dense LLaVA, and a method for each of `settings`."""
    dtype, num_layers = DTYPES[args.dtype], args.layers
    config = make_config(num_layers, args.hidden_size)
    fields = config.to_dict()
    fields.pop("model_type")
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        weights = make_weights(config, num_layers, args.one_layer, device)
        dense = build(LlavaForConditionalGeneration, LlavaConfig(**fields), weights, dtype, device)
        pruned = build(baselines.PrunedLlava, LlavaConfig(**fields), weights, dtype, device)
        methods = [Method("LLaVA", dense, partial(accounting.prefill_flops, config))]
        for name, setting in settings.items():
            if isinstance(setting, Routed):
                routed = CODE.config_class(**fields, **asdict(setting))
                model = build(CODE, routed, weights, dtype, device)
                methods.append(Method(name, model, partial(accounting.prefill_flops, routed)))
            else:
                count = partial(baselines.prefill_flops, config, setting)
                methods.append(Method(name, pruned, count, setting))
    finally:
        torch.set_default_dtype(default)
    return methods


# ---------------------------------------------------------------------------------------------- measuring


class Meter:
    """Time and memory of a call on one device.

    Attributes:
        host_seconds: until the last call that was timed on a GPU returned, with all its kernels launched.
    """

    host_seconds: float | None = None

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:  # memory that torch has in hand already: no call waits for more
            torch.empty(torch.cuda.mem_get_info()[0] * 3 // 4, dtype=torch.uint8, device=device)

    def time(self, function: Callable) -> tuple[float, object]:
        """Seconds that a call takes, and its result."""
        if not self.is_cuda:
            start = time.perf_counter()
            result = function()
            return time.perf_counter() - start, result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        start.record()
        result = function()
        end.record()
        self.host_seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, result

    def peak(self, function: Callable) -> tuple[int | None, object]:
        """Most bytes of a GPU's memory that a call took beyond those before it, and its result."""
        if not self.is_cuda:
            return None, function()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        return torch.cuda.max_memory_allocated() - before, result


def make_prompt(config, num_vision: int, num_text: int, batch: int, device: torch.device) -> dict:
    """Token ids with the image after the first text token, as LLaVA's prompts have it."""
    ids = torch.full((batch, num_vision + num_text), 100, device=device)
    ids[:, 1 : 1 + num_vision] = config.image_token_id
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def make_pixels(model, num_vision: int, batch: int) -> torch.Tensor:
    """The images that `num_vision` tokens in each of `batch` rows stand for."""
    num_images = batch * num_vision // accounting.tokens_per_image(model.config)
    size = model.config.vision_config.image_size
    return torch.zeros(num_images, 3, size, size, dtype=model.dtype, device=model.device)


def prefill(method: Method, prompt: dict, features) -> object:
    """The prompt in one call, as `generate` makes it."""
    cache = make_cache(method.model.config)
    return method(**prompt, **{CACHE: cache}, mm_encoder_outputs={"image": features}, use_cache=True)


def decode(
    methods: list[Method], prompt: dict, prefilled: dict[str, object], num_tokens: int, meter: Meter
) -> dict[str, list[float]]:
    """Seconds of each of `num_tokens` greedy steps of each method, whose prefill gave `prefilled`: a step of each in
    turn, since a machine is not as fast at one time as at another."""
    mask, seconds = prompt["attention_mask"], {method.name: [] for method in methods}
    tokens = {name: outputs.logits[:, -1:].argmax(-1) for name, outputs in prefilled.items()}
    caches = {name: outputs[CACHE] for name, outputs in prefilled.items()}
    for _ in range(num_tokens):
        mask = torch.cat([mask, mask[:, :1]], 1)
        for method in methods:
            step = {"input_ids": tokens[method.name], "attention_mask": mask, CACHE: caches[method.name]}
            taken, outputs = meter.time(lambda m=method, step=step: m(**step))
            tokens[method.name] = outputs.logits[:, -1:].argmax(-1)
            seconds[method.name].append(taken)
    return seconds


def flops_ratio(method: Method, base: Method, num_vision: int, num_text: int) -> float:
    """Of the decoder, for a prompt."""
    return method.flops(num_vision, num_text).decoder / base.flops(num_vision, num_text).decoder


def shuffled(methods: list[Method], repetition: int) -> list[Method]:
    """In another order each time, so that none is always timed behind the same other."""
    return random.Random(repetition).sample(methods, len(methods))


def profile(method: Method, prompt: dict, features, meter: Meter) -> dict[str, float]:
    """Seconds of one prefill by kind of operator."""
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * meter.is_cuda]
    with torch.profiler.profile(activities=activities) as profiler:
        prefill(method, prompt, features)
    seconds = dict.fromkeys([*OPERATORS, "other"], 0.0)
    for event in profiler.key_averages():
        if not event.key.startswith("aten::"):  # kernels, whose time is that of the operator too
            continue
        kind = next((kind for kind, names in OPERATORS.items() if event.key.startswith(names)), "other")
        # own time, without that of the operators it calls
        seconds[kind] += (event.self_device_time_total if meter.is_cuda else event.self_cpu_time_total) / 1e6
    return seconds


class Parts:
    """DPVR's parts on inputs made beforehand, each to be timed alone. As in a prefill, layers write to a KV cache."""

    def __init__(self, model, prompt: dict, features):
        self.model, base = model, model.model
        self.decoder, config = base.language_model, model.config
        embeds = base.get_input_embeddings()(prompt["input_ids"])
        self.is_vision = prompt["input_ids"] == config.image_token_id
        flat = torch.cat(list(features.pooler_output))
        self.states = ROUTING.insert_image_features(embeds, self.is_vision, flat)
        self.mask = prompt["attention_mask"]
        self.joint, self.text_only, self.fusion = ROUTING.split_layers(self.decoder, config)
        _, text, vision, _ = self.plan(make_cache(config))
        self.text_states, self.vision_states = text.stream.take(self.states), vision.stream.take(self.states)

    def plan(self, cache):
        """The plans of a prefill into an empty cache."""
        self.model.model.add_stream_layers(cache)
        return self.model.model.plan_call(self.states, self.is_vision, self.mask, None, cache)

    def prepare(self) -> dict[str, Callable]:
        """The parts as calls, each good for one time: the next would find its keys and values in the cache."""
        config = self.model.config
        call, text, vision, mask = self.plan(make_cache(config))
        empty = make_cache(config)  # beforehand: LLaVA makes one too
        joint = ROUTING.joint_arguments(call, mask)
        return {
            "joint": lambda: ROUTING.run_layers(self.joint, self.states, joint),
            "text-only": lambda: ROUTING.run_layers(self.text_only, self.text_states, ROUTING.stream_arguments(text)),
            "side branch": lambda: self.model.model.side_branch(self.vision_states, vision),
            "last layer and head": lambda: self.read_last(call, mask),
            "routing": lambda: self.routing(empty),
        }

    def read_last(self, call, mask):
        states = ROUTING.read_last(self.decoder, self.fusion[-1], self.states, call, mask, 1)
        return self.model.lm_head(self.decoder.norm(states))

    def routing(self, cache):
        """Plans, masks and the way of the states into the streams and back."""
        _, text, vision, _ = self.plan(cache)
        for plan in (text, vision):
            plan.stream.put(self.states, plan.stream.take(self.states))


def summary(values: list[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile."""
    return {name: float(np.percentile(values, q)) for name, q in (("median", 50), ("p10", 10), ("p90", 90))}


@torch.no_grad()
def measure(methods: list[Method], num_vision: int, num_text: int, batch: int, args, meter: Meter, device) -> dict:
    """One prompt shape: all methods, interleaved."""
    dense, routed = methods[0].model, methods[1].model
    config = dense.config
    prompt = make_prompt(config, num_vision, num_text, batch, device)
    pixels = make_pixels(dense, num_vision, batch)

    def encode():
        return dense.model.get_image_features(pixels, return_dict=True)

    features = encode()
    parts = Parts(routed, prompt, features)
    seconds, host = ({method.name: [] for method in methods} for _ in range(2))
    memory, stored, alone, tower = {}, {}, {name: [] for name in parts.prepare()}, []
    title = f"{num_vision} + {num_text}, batch {batch}"
    for repetition in tqdm(range(args.repeats + 1), desc=title, disable=None):
        is_counted, prefilled = repetition > 0, {}
        # On a GPU not counted at first: libraries make plans for each new number of keys
        decodes = repetition == 1 or (repetition == 0 and meter.is_cuda)
        for method in shuffled(methods, repetition):
            if is_counted:
                taken, outputs = meter.time(lambda m=method: prefill(m, prompt, features))
                seconds[method.name].append(taken)
                host[method.name].append(meter.host_seconds)
            else:
                memory[method.name], outputs = meter.peak(lambda m=method: prefill(m, prompt, features))
                stored[method.name] = stored_bytes(outputs[CACHE], method.model.config)
            if decodes:
                prefilled[method.name] = outputs
            if method is methods[1]:  # beside its parts, for a machine is not as fast at one time as at another
                for name, call in parts.prepare().items():
                    taken, _ = meter.time(call)
                    alone[name] += [taken] * is_counted
        if decodes:
            steps = decode(methods, prompt, prefilled, args.decode_tokens, meter)
        tower += [meter.time(encode)[0]] * is_counted
    results = {}
    base = methods[0]
    for method in methods:
        ratios = [a / b for a, b in zip(seconds[method.name], seconds[base.name], strict=True)]
        results[method.name] = {
            "prefill_seconds": summary(seconds[method.name]),
            "prefill_ratio": summary(ratios),
            "host_seconds": summary(host[method.name]) if meter.is_cuda else None,
            "flops_ratio": flops_ratio(method, base, num_vision, num_text),
            "first_token_seconds": summary([a + b for a, b in zip(seconds[method.name], tower, strict=True)]),
            "decode_step_seconds": summary(steps[method.name]),
            "decode_ratio": float(np.median(np.divide(steps[method.name], steps[base.name]))),
            "peak_bytes": memory[method.name],
            "cache_bytes": stored[method.name],
            "cache_ratio": stored[method.name] / stored[base.name],
        }
    layers = [name for name in alone if name != "routing"]
    sums = [sum(alone[name][i] for name in layers) for i in range(args.repeats)]
    own = seconds[methods[1].name]
    return {
        "vision_tokens": num_vision,
        "text_tokens": num_text,
        "batch": batch,
        "tower_seconds": summary(tower),
        "methods": results,
        "parts_seconds": {name: summary(values) for name, values in alone.items()},
        "prefill_over_parts": summary([a / b for a, b in zip(own, sums, strict=True)]),
        "routing_share": summary([a / b for a, b in zip(alone["routing"], own, strict=True)]),
        "profile": {method.name: profile(method, prompt, features, meter) for method in methods[:2]},
    }


def spread(seconds: dict[str, float]) -> str:
    """A `summary` as the tables show it."""
    return "{median:.3g} [{p10:.3g}, {p90:.3g}]".format(**seconds)


def table(record: dict) -> str:
    """The results as markdown, one row for each method of each prompt, and the conditions they were measured under."""
    results = [result for run in record["runs"] for result in run["methods"].values()]
    has_host, has_peak = (results[0].get(key) is not None for key in ("host_seconds", "peak_bytes"))
    rows = []
    for run in record["runs"]:
        prompt = prompt_name(run)
        for name, result in run["methods"].items():
            row = [prompt, name, spread(result["prefill_seconds"])]
            row += [f"{result['prefill_ratio']['median']:.3f}", f"{result['flops_ratio']:.3f}"]
            if has_host:
                row.append(f"{result['host_seconds']['median']:.3g}")
            first, dense = (each["first_token_seconds"]["median"] for each in (result, run["methods"]["LLaVA"]))
            row += [f"{first:.3g}", f"{first / dense:.3f}"]
            row += [f"{result['decode_step_seconds']['median']:.3g}", f"{result['decode_ratio']:.3f}"]
            row.append(f"{result['cache_ratio']:.3f}")
            if has_peak:
                row.append(f"{result['peak_bytes'] / 2**20:,.0f}")
            rows.append(row)
            prompt = ""
    header = [
        "prompt",
        "method",
        "prefill, s",
        "ratio",
        "by FLOPs",
        *["host, s"] * has_host,
        "first token, s",
        "ratio",
    ]
    header += ["decode step, s", "ratio", "KV cache, ratio"] + ["peak, MiB"] * has_peak
    return f"{markdown(header, rows)}\n\n{conditions(record)}"


def conditions(record: dict) -> str:
    """On what machine, when and with what a record was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"{record['date']}, {record['device']}: {record['layers']} layers of width {record['hidden_size']} in "
        f"{record['dtype']}, {record['repeats']} repetitions; {versions}."
    )


def prompt_name(run: dict) -> str:
    return f"{run['vision_tokens']} + {run['text_tokens']}, batch {run['batch']}"


def figures(record: dict) -> dict:
    """What the pages' sentences say of the record: `decode_differs`, by method the most that a decode step's ratio to
    LLaVA's differs from 1 in any run."""
    ratios: dict[str, list[float]] = {}
    for run in record["runs"]:
        for name, measured in run["methods"].items():
            ratios.setdefault(name, []).append(measured["decode_ratio"])
    return {"decode_differs": {name: max(abs(ratio - 1) for ratio in found) for name, found in ratios.items()}}


def parts(record: dict) -> str:
    """DPVR's prefill beside its parts, each measured alone in the same run, as markdown: medians."""
    names = list(record["runs"][0]["parts_seconds"])
    rows = []
    for run in record["runs"]:
        own = next(result for name, result in run["methods"].items() if name.startswith("DPVR"))
        rows.append(
            [
                prompt_name(run),
                *(f"{run['parts_seconds'][name]['median']:.3g}" for name in names),
                f"{own['prefill_seconds']['median']:.3g}",
                f"{run['prefill_over_parts']['median']:.3f}",
                f"{run['routing_share']['median']:.2%}",
            ]
        )
    seconds = [f"{name}, s" for name in (*names, "prefill")]
    return markdown(["prompt", *seconds, "to the sum of its parts", "routing to prefill"], rows)


def profiles(record: dict) -> str:
    """Where the time of a prefill goes, as markdown: shares of LLaVA's time in torch's operators."""
    rows = []
    for run in record["runs"]:
        total = sum(run["profile"]["LLaVA"].values())
        for name, seconds in run["profile"].items():
            shares = [f"{own / total:.2%}" for own in (*seconds.values(), sum(seconds.values()))]
            rows.append([prompt_name(run), name, *shares])
    return markdown(["prompt", "model", *OPERATORS, "other", "all"], rows)


def parse_prompt(text: str) -> tuple[int, int]:
    vision, text_tokens = text.split("+")
    return int(vision), int(text_tokens)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured: model, device, prompts and repetitions."""
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--one-layer", action="store_true", help="keep one set of weights for all layers")
    parser.add_argument("--saturation-layer", type=int, metavar="S", help="default: 18 of 32")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--prompts",
        type=parse_prompt,
        nargs="+",
        default=[(576, 64), (2880, 64)],
        metavar="V+T",
        help="vision and text tokens (default: 576+64 2880+64)",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="default: 1 4")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a sentence where they mean nothing, and warns where they take long without need."""
    if args.layers < 4:
        parser.error(f"--layers {args.layers} must be at least 4: PyramidDrop drops at each quarter of them")
    if args.saturation_layer is not None and not 0 < args.saturation_layer < args.layers:
        parser.error(f"--saturation-layer {args.saturation_layer} must be between 1 and {args.layers - 1}")
    check_hidden_size(parser, args)
    check_numbers(parser, args, 1, "threads")
    per_image = accounting.tokens_per_image(make_config(args.layers, args.hidden_size))
    for num_vision, num_text in args.prompts:
        if num_vision % per_image or min(num_vision, num_text) < 1:
            parser.error(f"--prompts {num_vision}+{num_text}: whole images of {per_image} tokens each, and some text")
    if min(args.repeats, *args.batch) < 1:
        parser.error("--repeats and --batch must be at least 1")
    warn_of_a_slow_type(args)


def product_seconds(dtype: torch.dtype) -> float:
    """What 64 tokens take through a matrix of LLaVA-1.5-7B's width on this CPU, once they have done so before."""
    tokens, weight = torch.ones(64, 4096, dtype=dtype), torch.ones(4096, 4096, dtype=dtype)
    for _ in range(2):
        start = time.perf_counter()
        torch.nn.functional.linear(tokens, weight)
    return time.perf_counter() - start


def warn_of_a_slow_type(args: argparse.Namespace) -> None:
    """Before hours go by: a CPU without instructions for a type of half precision computes in it at a crawl."""
    if torch.device(args.device).type != "cpu" or args.dtype == "float32":
        return
    times = product_seconds(DTYPES[args.dtype]) / product_seconds(torch.float32)
    if times > 2:
        print(
            f"{args.dtype} takes about {times:.0f} times as long as float32 on this CPU; --one-layer --dtype float32 "
            "is the faster way, in 8 GB",
            file=sys.stderr,
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n"
        "  python benchmarks/speed.py                                      LLaVA-1.5-7B in bfloat16\n"
        "  python benchmarks/speed.py --one-layer --dtype float32          where a CPU has no bfloat16, in 8 GB\n"
        "  python benchmarks/speed.py --equal-accuracy tiny-llava --output s.json\n"
        "  python benchmarks/speed.py --layers 4 --hidden-size 256 --prompts 576+64 --repeats 2 --output s.json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument(
        "--equal-accuracy",
        choices=EMBEDDED,
        help="instead of the authors' settings those in which the methods keep 99 %% of the accuracy of this embedded "
        "LLaVA for the fewest FLOPs, at the same shares of the depth",
    )
    parser.add_argument("--decode-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, help=f"default: {RESULTS}, of equal accuracy {EQUAL_RESULTS.name} there"
    )
    args = parser.parse_args()
    args.output = args.output or (EQUAL_RESULTS if args.equal_accuracy else RESULTS)
    check_arguments(parser, args)
    check_numbers(parser, args, 1, "decode_tokens")
    if args.equal_accuracy and args.saturation_layer is not None:
        parser.error("--saturation-layer and --equal-accuracy, which chooses it, exclude each other")
    if args.equal_accuracy and args.layers < (least := EMBEDDED[args.equal_accuracy]):
        parser.error(f"--layers {args.layers} must be at least the {least} of {args.equal_accuracy}")
    check_output(parser, args.output)
    return args


def new_record(script: str, args: argparse.Namespace) -> dict:
    """What is measured, on what, when and with what."""
    is_cuda = torch.device(args.device).type == "cuda"
    return {
        "command": " ".join(["python", script, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU, {args.threads} threads",
        "layers": args.layers,
        "hidden_size": args.hidden_size,
        "dtype": args.dtype,
        "one_layer": args.one_layer,
        "repeats": args.repeats,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers")},
        },
        "runs": [],
    }


def measure_prompts(record: dict, args: argparse.Namespace, measured: Callable[[int, int, int], dict]) -> None:
    """What `measured` gives for vision tokens, text tokens and rows, of each prompt, and writes it at once."""
    for num_vision, num_text in args.prompts:
        for batch in args.batch:
            record["runs"].append(measured(num_vision, num_text, batch))
            write_record(args.output, record)


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    meter = Meter(device)
    settings = equal_settings(args.equal_accuracy, args.layers) if args.equal_accuracy else default_settings(args)
    methods = make_methods(args, settings, device)
    record = new_record("benchmarks/speed.py", args)
    measure_prompts(record, args, lambda *prompt: measure(methods, *prompt, args, meter, device))
    print(table(record))
    for run in record["runs"]:
        print(
            f"{prompt_name(run)}: DPVR's prefill takes {run['prefill_over_parts']['median']:.3f} of its parts alone, "
            f"routing {run['routing_share']['median']:.2%} of prefill"
        )
    print(f"{args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, SO_FAR))
