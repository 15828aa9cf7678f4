#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Convert the embedded LLaVA, attach its trained side branch, and ask both models about a picture of digits.

Prints the answers of LLaVA and DPVR side by side, their accuracy on digits that neither was trained on, decoder FLOPs
and KV-cache bytes, and writes the picture with the answers to a file.
"""

import argparse
import filecmp
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor, LlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits as task

from benchmarks.accounting import prefill_flops
from benchmarks.caches import CACHE, make_cache, stored_bytes
from benchmarks.command import check_figure, run_command, save_figure
from convert_llava_to_dpvr import convert
from read_weights import ConversionError
from scripts.train_tiny_llava import conversation, generate_answers
from scripts.train_tiny_side_branch import accuracy

QUESTIONS_ABOUT_THE_PICTURE = 2  # of each kind


@dataclass
class Result:
    """What one model does: answers about the picture, held-out accuracy by kind, and what a prompt costs."""

    answers: list[str]
    held_out: dict[str, dict]
    gflops: float
    cache_bytes: int
    num_vision: int
    num_text: int


def make_checkpoint(output: Path) -> None:
    """The DPVR checkpoint of the embedded LLaVA; one that an earlier run left, and nothing else, is made anew.

    Raises:
        ConversionError: `output` is something else, or cannot be written.
    """
    examples = ROOT / "examples"
    make = partial(convert, examples / "tiny-llava", adapter=examples / "dpvr-tiny-adapter")
    if not output.is_dir() or not any(output.iterdir()):
        print(make(output), end="\n\n")
        return
    target = output.resolve()  # of a link, what it leads to
    with tempfile.TemporaryDirectory(prefix=".dpvr-demo-", dir=target.parent) as folder:
        made = Path(folder, "dpvr")
        summary = make(made)
        if not is_like(output, made):
            raise ConversionError(f"{output} is not what this demo makes, and stays; give another --output.")
        target.rename(Path(folder, "old"))
        made.rename(target)
    print(replace(summary, output=output), end="\n\n")


def is_like(folder: Path, made: Path) -> bool:
    """Whether a folder holds the weights of `made`, and no file that `made` has not: code and cards may be older."""
    names = {path.name for path in made.iterdir()}
    weights = {name for name in names if name.endswith(".safetensors")}
    equal, _, _ = filecmp.cmpfiles(folder, made, weights, shallow=False)
    return set(equal) == weights and {path.name for path in folder.iterdir()} <= names


def run(model, processor, picture, questions, held_out) -> Result:
    """Asks a model about the picture and about the held-out grids."""
    answers = generate_answers(model, processor, [picture] * len(questions), questions)
    prompt = processor.apply_chat_template(conversation(questions[:1])[:1], add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    vision = model.config.image_seq_length
    cache = make_cache(model.config)
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
    num_text = inputs["input_ids"].shape[1] - vision
    flops = prefill_flops(model.config, vision, num_text)
    num_bytes = stored_bytes(cache, model.config)
    return Result(answers, accuracy(model, processor, held_out), flops.decoder / 1e9, num_bytes, vision, num_text)


def summary_rows(dense: Result, dpvr: Result) -> list[tuple[str, str, str]]:
    """Rows of accuracy and cost: name, LLaVA, DPVR."""

    def share(result: Result, kind: str) -> str:
        return "{accuracy:.3f} [{wilson_95[0]:.2f}, {wilson_95[1]:.2f}]".format(**result.held_out[kind])

    rows = [(f"accuracy, {kind}", share(dense, kind), share(dpvr, kind)) for kind in task.KINDS]
    flops, cache = dpvr.gflops / dense.gflops, dpvr.cache_bytes / dense.cache_bytes
    prompt = f"prompt of {dense.num_vision} image + {dense.num_text} text tokens"
    rows.append((f"decoder GFLOPs, {prompt}", f"{dense.gflops:.3f}", f"{dpvr.gflops:.3f} (x {flops:.3f})"))
    rows.append(
        ("KV-cache bytes after it, float32", f"{dense.cache_bytes:,}", f"{dpvr.cache_bytes:,} (x {cache:.3f})")
    )
    return rows


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, tuple("-" * width for width in widths), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


def draw(path: Path, picture, questions, dense: Result, dpvr: Result, rows) -> None:
    """The picture, the answers about it (green: right, red: wrong) and the summary, as one image file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6), width_ratios=(1, 2.1), layout="constrained")
    left.imshow(picture, interpolation="nearest")
    left.set_xticks(np.arange(3) * 16 + 7.5, ["column 1", "column 2", "column 3"])
    left.set_yticks(np.arange(3) * 16 + 7.5, ["row 1", "row 2", "row 3"])
    left.tick_params(length=0)
    left.set_title("A picture that neither model has seen")
    right.axis("off")
    header = ["question", "LLaVA", "DPVR"]
    cells = [[q.text, a, b] for q, a, b in zip(questions, dense.answers, dpvr.answers, strict=True)]
    colours = [
        ["white", *("#d9f2d9" if task.is_correct(answer, q.answer) else "#f8d0d0" for answer in row[1:])]
        for q, row in zip(questions, cells, strict=True)
    ]
    blank = [["", "", ""]]
    table = right.table(
        cells + blank + [list(row) for row in rows],
        colLabels=header,
        cellColours=colours + [["white"] * 3] * (len(rows) + 1),
        colWidths=[0.46, 0.27, 0.27],
        cellLoc="left",
        loc="center",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9.5)
    table.scale(1, 1.45)
    for cell in table.get_celld().values():
        cell.set_edgecolor("#cccccc")
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n  python scripts/demo.py\n  python scripts/demo.py --seed 3 --questions 250\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("dpvr-tiny"), help="checkpoint (default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=7, help="of the picture and the questions (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=100, help="held-out, of each kind (default: %(default)s)")
    args = parser.parse_args()
    for name, value, least in (("--questions", args.questions, 1), ("--seed", args.seed, 0)):
        if value < least:
            parser.error(f"{name} must be at least {least}, got {value}")
    check_figure(parser, "--picture", args.picture)
    if not args.picture.absolute().parent.is_dir():
        parser.error(f"--picture {args.picture}: {args.picture.parent} is no folder")
    return args


def main() -> None:
    args = parse_args()
    try:
        make_checkpoint(args.output)
    except (ConversionError, OSError) as error:
        sys.exit(f"error: {error}")
    source = ROOT / "examples" / "tiny-llava"
    dpvr = AutoModel.from_pretrained(args.output, trust_remote_code=True, dtype=torch.float32).eval()
    dpvr_processor = AutoProcessor.from_pretrained(args.output, trust_remote_code=True)
    llava = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    llava_processor = AutoProcessor.from_pretrained(source)

    rng = np.random.default_rng(args.seed)
    grid = task.make_grid(rng, "test")
    questions = [task.ask(rng, grid, kind) for kind in task.KINDS for _ in range(QUESTIONS_ABOUT_THE_PICTURE)]
    held_out = task.make_questions(args.seed, args.questions, "test")
    dense = run(llava, llava_processor, grid.image, questions, held_out)
    routed = run(dpvr, dpvr_processor, grid.image, questions, held_out)

    header = ("question", "right answer", "LLaVA", "DPVR")
    rows = list(
        zip([q.text for q in questions], [q.answer for q in questions], dense.answers, routed.answers, strict=True)
    )
    print()
    print_table(header, rows)
    rows = summary_rows(dense, routed)
    print_table((f"{args.questions} held-out questions of each kind", "LLaVA", "DPVR"), rows)
    draw(args.picture, grid.image, questions, dense, routed, rows)
    print(f"The picture with the answers: {args.picture}. The checkpoint: {args.output}.")


if __name__ == "__main__":
    sys.exit(run_command(main, "the same command starts anew"))
