#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Prefill of dense LLaVA and of DPVR as they are and compiled by `torch.compile`, all four in turns in one run.

Run as they are, models launch their kernels one by one, and a GPU that is faster with a short prompt than
its host waits for it: what routing saves does not show. Compiled, a layer is a few fused kernels. The same random
weights, prompts, cache and meter as in `speed.py`; the vision tower is not in it. For every shape both models are
compiled anew, for that shape alone (`dynamic=False`), which takes the time that stands beside.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import speed
from benchmarks.command import SO_FAR, check_output, run_command
from benchmarks.tables import markdown

RESULTS = ROOT / "benchmarks" / "results" / "compiled.json"


@torch.no_grad()
def measure(models: list[speed.Method], num_vision: int, num_text: int, batch: int, args, meter: speed.Meter) -> dict:
    """One prompt shape: LLaVA and DPVR, as they are and compiled, in turns."""
    dense = models[0].model
    prompt = speed.make_prompt(dense.config, num_vision, num_text, batch, dense.device)
    features = dense.get_image_features(speed.make_pixels(dense, num_vision, batch), return_dict=True)
    torch.compiler.reset()
    kinds = {
        "eager": models,
        "compiled": [
            replace(method, model=torch.compile(method.model, mode=args.mode, dynamic=False)) for method in models
        ],
    }
    results = {}
    for method, compiled in zip(*kinds.values(), strict=True):
        expected = speed.prefill(method, prompt, features).logits
        begin = time.perf_counter()
        logits = speed.prefill(compiled, prompt, features).logits
        results[method.name] = {
            "logits_difference": float((logits - expected).norm() / expected.norm()),
            "compile_seconds": time.perf_counter() - begin,
            "flops_ratio": speed.flops_ratio(method, models[0], num_vision, num_text),
        }
    seconds = {kind: {name: [] for name in results} for kind in kinds}
    title = f"{num_vision} + {num_text}, batch {batch}"
    for repetition in tqdm(range(args.repeats + 1), desc=title, disable=None):
        for kind, methods in kinds.items():
            for method in speed.shuffled(methods, repetition):
                torch.compiler.cudagraph_mark_step_begin()  # what the call before gave is needed no more
                taken, _ = meter.time(lambda m=method: speed.prefill(m, prompt, features))
                seconds[kind][method.name] += [taken] * (repetition > 0)
    for kind, taken in seconds.items():
        for name, result in results.items():
            ratios = [a / b for a, b in zip(taken[name], taken[models[0].name], strict=True)]
            result[f"{kind}_seconds"], result[f"{kind}_ratio"] = speed.summary(taken[name]), speed.summary(ratios)
    return {"vision_tokens": num_vision, "text_tokens": num_text, "batch": batch, "methods": results}


def table(record: dict) -> str:
    """Prefill of both models, as they are and compiled, as markdown, and under what conditions it was measured."""
    rows = []
    for run in record["runs"]:
        prompt = speed.prompt_name(run)
        for name, result in run["methods"].items():
            row = [prompt, name]
            for kind in ("eager", "compiled"):
                row.append(speed.spread(result[f"{kind}_seconds"]))
                row.append(f"{result[f'{kind}_ratio']['median']:.3f}")
            rows.append([*row, f"{result['flops_ratio']:.3f}", f"{result['compile_seconds']:.0f}"])
            prompt = ""
    header = ["prompt", "model", "as it is, s", "ratio", "compiled, s", "ratio", "by FLOPs", "compiling, s"]
    return f"{markdown(header, rows)}\n\n{speed.conditions(record)}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n"
        "  python benchmarks/compiled.py --prompts 576+64                LLaVA-1.5-7B in bfloat16, on a GPU\n"
        "  python benchmarks/compiled.py --layers 4 --hidden-size 256 --prompts 576+64 --output compiled.json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    speed.add_arguments(parser)
    parser.add_argument(
        "--mode",
        choices=("default", "reduce-overhead"),
        default="default",
        help="of torch.compile; reduce-overhead replays CUDA graphs (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args()
    speed.check_arguments(parser, args)
    check_output(parser, args.output)
    return args


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    models = speed.make_methods(args, speed.default_settings(args), device)[:2]
    meter = speed.Meter(device)
    record = speed.new_record("benchmarks/compiled.py", args) | {"mode": args.mode}
    speed.measure_prompts(record, args, lambda *prompt: measure(models, *prompt, args, meter))
    print(table(record))
    print(f"{args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, SO_FAR))
