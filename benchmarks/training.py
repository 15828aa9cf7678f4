#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Time and memory of a training step: the side branch of DPVR against LoRA on LLaVA, at LLaVA-1.5-7B's layer sizes.

    lora        dense LLaVA, LoRA of rank 128 on all linear layers of the decoder (LLaVA's own recipe for tuning)
    answer      DPVR's side branch, next-token loss
    distill     the same, learning from the dense model, which runs in the same step
    cached-...  the two from cached features (`training/features.py`), read from disk: every epoch after the first

Weights are random, frozen ones in `--dtype`, trained ones in fp32 under autocast; fused AdamW, the Trainer's default.
A step is forward, backward, clipping and update; reading and decoding of pictures is not in it. Every measurement is a
process of its own, and the kinds take turns, `--rounds` times. Memory is the peak less the frozen weights (on a CPU:
and less what Python and its libraries take): trained weights, gradients, optimizer and activations. FLOPs are those
that torch's counter counts in one more step, forward and backward: beside a ratio of times stands what a machine that
arithmetic alone holds up would show.

With `--one-layer` all layers of the decoder have the same frozen weights in memory, so that all 32 fit where 27 GB do
not. What is computed, and what it takes beyond the weights, is the same, and the 0.8 GB of a layer stay in no cache
from one to the next.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from transformers import LlavaForConditionalGeneration
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.accounting import dense_config, flop_counter
from benchmarks.command import (
    SO_FAR,
    check_folder,
    check_hidden_size,
    check_numbers,
    check_output,
    run_command,
    usable_device,
    write_record,
)
from benchmarks.tables import markdown
from configuration_dpvr import proportional_layer
from training.features import INDEX, CachedFeatures, index_digest, pack_rows, shard_path, write_whole
from training.staged import IGNORED, StagedModel, collate_rows, split_rows

RESULTS = ROOT / "benchmarks" / "results" / "training.json"
KINDS = ("lora", "answer", "distill", "cached-answer", "cached-distill")
AIMS = {"time": 0.4, "memory": 0.6, "cache": 10}
LORA = {"r": 128, "lora_alpha": 256, "lora_dropout": 0.05}  # scripts/v1_5/finetune_task_lora.sh of LLaVA


def make_config(args):
    """LLaVA-1.5-7B's geometry at another depth, with as many vision tokens as asked for."""
    config_class = get_class_from_dynamic_module("configuration_dpvr.DPVRConfig", str(ROOT))
    side = math.isqrt(args.vision_tokens)
    layers = args.layers
    saturation_layer = proportional_layer(layers) if args.text_only is None else layers - 1 - args.text_only
    text = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": 32064}
    text |= {"hidden_size": args.hidden_size, "intermediate_size": args.hidden_size * 11008 // 4096}
    text |= {"num_attention_heads": args.hidden_size // 128, "num_key_value_heads": args.hidden_size // 128}
    config = config_class(text_config=text, saturation_layer=saturation_layer, image_seq_length=args.vision_tokens)
    config.vision_config.image_size = 14 * side
    config.vision_config.num_hidden_layers = args.vision_layers
    return config


def build(kind: str, args) -> torch.nn.Module:
    """The model with random weights, ready to be trained."""
    config = make_config(args)
    dpvr_class = get_class_from_dynamic_module("modeling_dpvr.DPVRForConditionalGeneration", str(ROOT))
    dtype = getattr(torch, args.dtype)
    torch.set_default_dtype(dtype)
    with no_init_weights(), torch.device(args.device):
        model = (
            LlavaForConditionalGeneration(dense_config(config)) if kind == "lora" else dpvr_class(config)
        ).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    if args.one_layer:
        first, *others = model.model.language_model.layers
        for layer in others:
            for weight, same in zip(layer.parameters(), first.parameters(), strict=True):
                weight.data = same.data
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(2**20, generator=generator) * 0.02).to(args.device, dtype)
    distinct = {weight.data_ptr(): (name, weight) for name, weight in model.named_parameters()}
    for name, weight in distinct.values():
        if "norm" in name and name.endswith("weight"):
            weight.data.fill_(1)
        else:
            flat = weight.data.view(-1)
            for start in range(0, len(flat), len(block)):
                flat[start : start + len(block)] = block[: len(flat) - start]
    if kind == "lora":
        targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        model = get_peft_model(model, LoraConfig(target_modules=targets, **LORA))
    else:
        model.model.side_branch.requires_grad_(True)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if args.gradient_checkpointing:
        base = model.get_base_model() if kind == "lora" else model
        base.activation_checkpointing_enable()
    return model if kind == "lora" else StagedModel(model, kind.split("-")[-1])


def make_batch(config, args) -> dict[str, torch.Tensor]:
    """One image and a question and answer of equal length in each row."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 31000, (args.batch_size, args.text_tokens), generator=generator)
    image = torch.full((args.batch_size, args.vision_tokens), config.image_token_id)
    ids = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
    labels = ids.clone()
    labels[:, : ids.shape[1] - args.text_tokens // 2] = IGNORED
    size = config.vision_config.image_size
    return {
        "input_ids": ids.to(args.device),
        "attention_mask": torch.ones_like(ids).to(args.device),
        "labels": labels.to(args.device),
        "pixel_values": torch.randn(args.batch_size, 3, size, size, generator=generator).to(args.device),
    }


def cached_batches(model: StagedModel, batch: dict, args, folder: Path):
    """Batches without end of rows that are read from a folder of features."""
    dtype = getattr(torch, args.dtype)
    with torch.no_grad():
        rows = [{k: v.cpu() for k, v in row.items()} for row in split_rows(model.compute_features(**batch))]
    index = {"fingerprint": {"rows": len(rows)}, "rows_per_shard": len(rows), "num_rows": len(rows)}
    packed = pack_rows(rows, dtype, model.config.text_config.hidden_size)
    write_whole(shard_path(folder, 0), save(packed, {"index": index_digest(index)}))
    (folder / INDEX).write_text(json.dumps(index))
    features = CachedFeatures(folder)
    while True:
        read = collate_rows([features[i] for i in range(len(features))])
        yield {name: tensor.to(args.device) for name, tensor in read.items()}


def peak_bytes(args) -> int:
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset_peak(args) -> None:
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure(kind: str, args) -> dict:
    """Steps of one kind, in this process."""
    torch.set_num_threads(args.threads)
    before = 0 if args.device == "cuda" else psutil.Process().memory_info().rss
    model = build(kind, args).train()
    frozen = sum(
        {weight.data_ptr(): weight.nbytes for weight in model.parameters() if not weight.requires_grad}.values()
    )
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    config = model.config
    batch = make_batch(config, args)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        batches = cached_batches(model, batch, args, Path(folder)) if kind.startswith("cached") else None
        if batches:
            next(batches)
        reset_peak(args)
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        seconds = [step(model, batches, batch, optimizer, trained, args) for _ in range(args.warmup + args.steps)]
        peak = peak_bytes(args)
        with flop_counter() as counter:  # last: what checkpointing recomputes, it keeps in memory
            step(model, batches, batch, optimizer, trained, args)
    return {
        "seconds": seconds[args.warmup :],
        "flops": counter.get_total_flops(),
        "bytes_beyond_weights": peak - before - frozen,
        "frozen_bytes": frozen,
        "trained_parameters": sum(weight.numel() for weight in trained),
    }


def step(model, batches, batch: dict, optimizer, trained: list, args) -> float:
    begin = time.perf_counter()
    inputs = next(batches) if batches else batch
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        loss = model(**inputs)["loss"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if args.device == "cuda":
        torch.cuda.synchronize()
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the loss is {loss.item()}")
    return time.perf_counter() - begin


def in_child(kind: str, arguments: list[str]) -> dict:
    result = subprocess.run(
        [sys.executable, __file__, *arguments, "--child", kind], stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"{kind} ended with status {result.returncode} (-9: killed, most likely out of memory)")
    return json.loads(result.stdout.splitlines()[-1])


def summarize(runs: dict[str, list[dict]]) -> dict:
    """Medians of each kind, and what they are to LoRA, as `[measured, by FLOPs]`; memory without the latter."""
    kinds = {}
    for kind, results in runs.items():
        kinds[kind] = {
            "seconds": statistics.median(value for result in results for value in result["seconds"]),
            "seconds_range": [f(value for result in results for value in result["seconds"]) for f in (min, max)],
            "flops": results[0]["flops"],
            "bytes_beyond_weights": statistics.median(result["bytes_beyond_weights"] for result in results),
            "frozen_bytes": results[0]["frozen_bytes"],
            "trained_parameters": results[0]["trained_parameters"],
        }

    def ratio(kind: str, other: str, *fields: str) -> list[float]:
        return [kinds[kind][field] / kinds[other][field] for field in fields]

    ratios = {}
    for kind in kinds:
        if "lora" in kinds and kind in ("answer", "distill"):
            ratios[f"{kind} to lora, time"] = ratio(kind, "lora", "seconds", "flops")
            ratios[f"{kind} to lora, memory beyond weights"] = ratio(kind, "lora", "bytes_beyond_weights")
        whole = kind.removeprefix("cached-")
        if whole != kind and whole in kinds:
            name = f"{whole}, second epoch: times faster with cached features"
            ratios[name] = ratio(whole, kind, "seconds", "flops")
    return {"kinds": kinds, "ratios": ratios}


def table(record: dict) -> str:
    """Seconds, FLOPs and memory of a training step, by what is trained and how."""
    rows = [
        [
            kind,
            f"{result['trained_parameters'] / 1e6:.1f} M",
            "{:.2f} s ({:.2f} to {:.2f})".format(result["seconds"], *result["seconds_range"]),
            f"{result['flops'] / 1e12:.2f} TFLOP",
            f"{result['bytes_beyond_weights'] / 2**30:.2f} GiB",
        ]
        for kind, result in record["kinds"].items()
    ]
    header = ["what trains", "parameters", "a step, median (range)", "arithmetic", "memory beyond the weights"]
    return markdown(header, rows)


def ratios(record: dict) -> str:
    """What the kinds are to each other, as Markdown, beside what is aimed at."""
    rows = []
    for name, values in record["ratios"].items():
        measured, by_flops, *_ = [*(f"{value:.2f}" for value in values), ""]
        rows.append([name, measured, by_flops, f"at {'least' if 'faster' in name else 'most'} {aim(name)}"])
    return markdown(["", "measured", "by FLOPs", "aim"], rows)


def aim(ratio: str) -> float:
    return AIMS["cache" if "faster" in ratio else "time" if "time" in ratio else "memory"]


def device_name(args) -> str:
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {args.threads} threads"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n"
        "  python benchmarks/training.py --device cuda                 all 32 layers\n"
        "  python benchmarks/training.py --one-layer --gradient-checkpointing --rounds 1       on a CPU, in 16 GB\n"
        "  python benchmarks/training.py --layers 4 --hidden-size 256 --tokens 36+16 --steps 2 --output out.json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (default: %(default)s)")
    parser.add_argument("--text-only", type=int, help="of these, text-only (default: the paper's share, 13 of 32)")
    parser.add_argument("--hidden-size", type=int, default=4096, help="a multiple of 128 (default: %(default)s)")
    parser.add_argument("--vision-layers", type=int, default=24, help="of the vision tower (default: %(default)s)")
    parser.add_argument("--tokens", default="576+64", help="vision + text tokens of a row (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="rows (default: %(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="as LLaVA's recipe has it; for all kinds"
    )
    parser.add_argument("--one-layer", action="store_true", help="keep one set of frozen weights for all layers")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="measured in each process (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before these (default: %(default)s)")
    parser.add_argument(
        "--device", type=usable_device, choices=["cpu", "cuda"], default="cpu", help="default: %(default)s"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for the cached features (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        args.vision_tokens, args.text_tokens = map(int, args.tokens.split("+"))
    except ValueError:
        parser.error(f"--tokens {args.tokens}: give vision and text tokens, such as 576+64")
    if min(args.rounds, args.steps) < 1:
        parser.error(f"--rounds {args.rounds} --steps {args.steps}: give at least 1 of each")
    check_numbers(parser, args, 1, "vision_layers", "batch_size", "threads")
    check_numbers(parser, args, 2, "layers")
    if args.text_tokens < 2:
        parser.error(f"--tokens {args.tokens}: give at least 2 text tokens; half of them are the answer")
    check_numbers(parser, args, 0, "warmup")
    if args.text_only is not None and not 0 <= args.text_only <= args.layers - 2:
        parser.error(f"--text-only {args.text_only} must be between 0 and {args.layers - 2}")
    check_hidden_size(parser, args)
    if args.vision_tokens < 1 or math.isqrt(args.vision_tokens) ** 2 != args.vision_tokens:
        parser.error(f"--tokens: {args.vision_tokens} vision tokens are no square of patches; 576 are 24 x 24.")
    check_output(parser, args.output)
    check_folder(parser, "--folder", args.folder)
    return args


def record_of(args, runs: dict[str, list[dict]]) -> dict:
    """What was measured so far, and how."""
    names = (
        "layers",
        "text_only",
        "hidden_size",
        "vision_layers",
        "tokens",
        "batch_size",
        "dtype",
        "gradient_checkpointing",
        "one_layer",
    )
    config = make_config(args)
    return {
        "settings": {name: getattr(args, name) for name in (*names, "rounds", "steps", "warmup")}
        | {"saturation_layer": config.saturation_layer, "text_only": config.num_text_only_layers},
        "device": device_name(args),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **summarize(runs),
    }


def main() -> int:
    args = parse_args()
    if args.child:
        try:
            print(json.dumps(measure(args.child, args)))
        except KeyboardInterrupt:
            return 130  # the command that started this one says so
        return 0
    runs: dict[str, list[dict]] = {}
    for turn in range(args.rounds):
        for kind in args.kinds:
            shown = in_child(kind, sys.argv[1:])
            runs.setdefault(kind, []).append(shown)
            print(
                f"round {turn + 1}/{args.rounds} {kind:15} {statistics.median(shown['seconds']):8.3f} s  "
                f"{shown['bytes_beyond_weights'] / 1e9:7.3f} GB beyond {shown['frozen_bytes'] / 1e9:.2f} of weights",
                flush=True,
            )
            record = record_of(args, runs)
            write_record(args.output, record)  # each at once: the next may be killed for its memory
    print(ratios(record))
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, SO_FAR))
