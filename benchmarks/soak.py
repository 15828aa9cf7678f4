#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Thousands of requests to the embedded model in one process: is memory flat, are answers constant?

They go round a fixed list of requests: prompts without, with one and with two images, ragged batches, padding on
either side, beams, samples, a static cache, and requests that are refused. Every call makes its inputs anew with the
processor and seeds torch. The tokens of a request must be those of its first time; over the second half of the run,
neither the resident memory nor the number of objects that Python's collector follows may grow by more than a limit.

Memory is judged after garbage is collected and what the allocator has free is given back to the system (glibc's
`malloc_trim`): then what grows is held, and not kept for later. A slope is Theil and Sen's, the median over all pairs
of samples, with its interval of 95 %, which must lie below the limit.
"""

import argparse
import ctypes
import gc
import hashlib
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
import transformers
from scipy.stats import theilslopes
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits as task

from benchmarks.command import (
    NOTHING,
    check_figure,
    check_numbers,
    check_output,
    run_command,
    save_figure,
    write_record,
)
from convert_llava_to_dpvr import convert

WARM_UP = 0.5  # share of the samples before which slopes are not measured: allocators fill their pools, caches fill
QUESTION = "What is in row {}, column {}?"


@dataclass
class Request:
    """One call of the processor and of `generate`; `seed` is given to torch before the latter."""

    name: str
    questions: list[str]
    images: list[list]
    seed: int = 0
    padding_side: str = "left"
    options: dict = field(default_factory=dict)


def make_requests(variants: int = 3) -> list[Request]:
    """The kinds of request, each with `variants` sets of pictures and questions."""
    kinds = {
        "no image": ([0], {}),
        "one image": ([1], {}),
        "two images": ([2], {}),
        "ragged batch": ([1, 0, 2], {}),
        "ragged batch, padded right": ([0, 2, 1], {}),
        "beam search": ([1, 2], {"num_beams": 2}),
        "samples": ([1], {"do_sample": True, "num_return_sequences": 2}),
        "prefill in chunks": ([2], {"prefill_chunk_size": 16}),
        "no cache": ([1], {"use_cache": False}),
        "static cache": ([1, 0], {"cache_implementation": "static", "disable_compile": True}),
        "refused": ([2], {}),
    }
    requests = []
    for variant in range(variants):
        rng = np.random.default_rng(variant)
        for name, (counts, options) in kinds.items():
            images = [[task.make_grid(rng, "test").image for _ in range(count)] for count in counts]
            questions = [QUESTION.format(*rng.integers(1, task.GRID_SIZE + 1, 2)) for _ in counts]
            side = "right" if name.endswith("right") else "left"
            requests.append(Request(name, questions, images, variant, side, options))
    return requests


def load_embedded(folder: Path):
    """The embedded LLaVA converted into `folder`, with its trained side branch, and its processor."""
    examples = ROOT / "examples"
    convert(examples / "tiny-llava", folder, adapter=examples / "dpvr-tiny-adapter")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def answer(model, processor, request: Request, max_new_tokens: int) -> str:
    """A hash of the tokens that the request gets, or the sentence with which it is refused."""
    prompts = []
    for question, images in zip(request.questions, request.images, strict=True):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(messages, add_generation_prompt=True))
    images = [row[1:] for row in request.images] if request.name == "refused" else request.images
    try:
        inputs = processor(
            images=images, text=prompts, padding=True, padding_side=request.padding_side, return_tensors="pt"
        )
    except ValueError as error:
        return str(error)
    torch.manual_seed(request.seed)
    tokens = model.generate(**inputs, **{"max_new_tokens": max_new_tokens, "do_sample": False, **request.options})
    return hashlib.sha256(tokens[:, inputs["input_ids"].shape[1] :].numpy().tobytes()).hexdigest()


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def resident_bytes_held() -> int:
    """Resident memory without garbage and without what malloc keeps for later (glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def slope(calls: list[int], values: list[int]) -> tuple[float, float, float]:
    """Theil and Sen's slope after the warm-up, and the ends of its interval of 95 %.

    Args:
        calls: number of calls at each sample, ascending.
        values: what was measured then.
    """
    start = int(len(calls) * WARM_UP)
    if len(calls) - start < 2:
        raise ValueError(
            f"{len(calls) - start} samples after the warm-up; a slope takes 2. Make more calls or sample more often."
        )
    result = theilslopes(values[start:], calls[start:], 0.95)
    return float(result.slope), float(result.low_slope), float(result.high_slope)


@dataclass
class Soak:
    """What a run saw; one entry of `calls`, `rss_bytes` (as it was), `held_bytes` and `objects` per sample."""

    hashes: dict[str, str] = field(default_factory=dict)
    different: list[dict] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    held_bytes: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    seconds: float = 0.0


def run(model, processor, requests: list[Request], calls: int, every: int, max_new_tokens: int) -> Soak:
    """Makes the calls and samples memory before the first and after every `every`th."""
    soak = Soak()
    start = time.perf_counter()
    for call in tqdm(range(calls + 1), desc="soak", mininterval=10):
        if call % every == 0:
            soak.calls.append(call)
            soak.rss_bytes.append(resident_bytes())
            soak.held_bytes.append(resident_bytes_held())
            soak.objects.append(len(gc.get_objects()))
        if call == calls:
            break
        request = requests[call % len(requests)]
        key = f"{request.name}, variant {request.seed}"
        got = answer(model, processor, request, max_new_tokens)
        if soak.hashes.setdefault(key, got) != got:
            soak.different.append({"call": call, "request": key, "got": got})
    soak.seconds = round(time.perf_counter() - start, 1)
    return soak


def judge(
    soak: Soak, max_bytes_per_call: float, max_objects_per_call: float
) -> tuple[dict[str, tuple[float, float, float]], list[str]]:
    """The slopes with the ends of their intervals, and a sentence for each thing that is not as it should be."""
    slopes = {
        "bytes_per_call": slope(soak.calls, soak.held_bytes),
        "objects_per_call": slope(soak.calls, soak.objects),
    }
    faults = []
    for (value, low, high), limit, name in (
        (slopes["bytes_per_call"], max_bytes_per_call, "bytes of memory"),
        (slopes["objects_per_call"], max_objects_per_call, "Python objects"),
    ):
        if high > limit:
            faults.append(f"A call adds {value:.3f} {name} (95 %: {low:.3f} to {high:.3f}); {limit} are allowed.")
    if soak.different:
        faults.append(f"{len(soak.different)} answers differ from the first of their request: {soak.different[:3]}")
    return slopes, faults


def draw(path: Path, soak: Soak, slopes: dict[str, tuple[float, float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.plot(soak.calls, np.array(soak.rss_bytes) / 2**20, color="#b7d3ea", label="as it is")
    held = np.array(soak.held_bytes) / 2**20
    axes.plot(soak.calls, held, color="#3d85c6", label="without what malloc keeps free")
    axes.axvspan(0, soak.calls[int(len(soak.calls) * WARM_UP)], color="#eeeeee", label="warm-up, not judged")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, soak.calls[-1])
    axes.set_xlabel("requests")
    axes.set_ylabel("resident memory, MiB")
    axes.set_title(
        f"{soak.calls[-1]:,} calls: {slopes['bytes_per_call'][0]:.0f} bytes and {slopes['objects_per_call'][0]:.3f} "
        f"Python objects a call, {len(soak.different)} answers changed",
        fontsize=10,
    )
    axes.legend(loc="lower right", frameon=False)
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n  python benchmarks/soak.py\n"
        "  python benchmarks/soak.py --calls 1320 --every 66 --output soak.json\n\n"
        "exit codes: 0 flat and constant, 1 memory grows or answers differ, 2 wrong arguments,\n"
        "130 interrupted, and nothing is written\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--calls", type=int, default=11_088, help="default: %(default)s, of which 10,080 generate")
    parser.add_argument(
        "--every",
        type=int,
        default=66,
        help="calls between two samples; a multiple of the number of requests, 33, samples after the same one each "
        "time (default: %(default)s)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--max-bytes-per-call", type=float, default=200, help="slope allowed (default: %(default)s)")
    parser.add_argument("--max-objects-per-call", type=float, default=0.01, help="default: %(default)s")
    results = ROOT / "benchmarks" / "results"
    committed, figure = results / "soak.json", ROOT / "figures" / "soak.png"
    parser.add_argument("--output", type=Path, default=committed, help="default: the committed file")
    parser.add_argument("--figure", type=Path, help=f"default: beside --output; with that left out, {figure}")
    args = parser.parse_args(arguments)
    args.figure = args.figure or (figure if args.output.resolve() == committed else args.output.with_suffix(".png"))
    if args.every < 1 or args.calls < 2 * args.every:
        parser.error(f"--calls {args.calls} must be at least twice --every {args.every}, and both positive")
    check_numbers(parser, args, 1, "max_new_tokens")
    check_numbers(parser, args, 0, "max_bytes_per_call", "max_objects_per_call")  # nothing is more than nan
    check_output(parser, args.output, args.figure)
    check_figure(parser, "--figure", args.figure)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="dpvr-soak-") as folder:
        model, processor = load_embedded(Path(folder) / "dpvr")
        soak = run(model, processor, make_requests(), args.calls, args.every, args.max_new_tokens)
    slopes, faults = judge(soak, args.max_bytes_per_call, args.max_objects_per_call)
    record = {
        "command": f"python benchmarks/soak.py --calls {args.calls} --every {args.every} "
        f"--max-new-tokens {args.max_new_tokens}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "limits": {"bytes_per_call": args.max_bytes_per_call, "objects_per_call": args.max_objects_per_call},
        "slopes": slopes,
        "faults": faults,
        **asdict(soak),
    }
    write_record(args.output, record, indent=1)
    draw(args.figure, soak, slopes)
    (held, *held_ends), (objects, *_) = slopes["bytes_per_call"], slopes["objects_per_call"]
    print(
        f"{args.calls} calls in {soak.seconds:.0f} s: {soak.held_bytes[0] / 2**20:.1f} MiB held at first, "
        f"{soak.held_bytes[-1] / 2**20:.1f} at last; in the second half {held:.1f} bytes a call (95 %: "
        f"{held_ends[0]:.1f} to {held_ends[1]:.1f}) and {objects:.4f} Python objects; {len(soak.different)} answers "
        "changed."
    )
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(run_command(main, NOTHING))
