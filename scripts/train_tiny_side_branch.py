#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Train `examples/dpvr-tiny-adapter`: the side branch of a DPVR on `examples/tiny-llava`, all else frozen.

The answers of the dense LLaVA are the targets: the loss is the Kullback-Leibler divergence from its distribution over
the next token to DPVR's, at the tokens of the answers. Dense, untrained and trained models are then asked the same
questions about digits that none of them was trained on.

Shape letters: B conversations, T tokens, N answer tokens of a batch, V vocabulary.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits as task

from benchmarks.command import NOTHING, run_command
from read_weights import ConversionError
from scripts.train_tiny_llava import (
    answer_logits,
    answer_mask,
    generate_answers,
    learning_rate,
    read_record,
    replace_directory,
    sample_batch,
    versions,
    wilson_interval,
)
from training.adapters import AdapterError, add_adapter, from_llava, processor_from_llava, save_adapter
from training.trainer import count_trainable, trainable


def train(model, teacher, processor, args) -> list[float]:
    """Fits the side branch; returns the loss of each step."""
    branch = list(trainable(model).values())
    optimizer = torch.optim.AdamW(branch, lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, args.steps, warmup=20))
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    tokenizer = processor.tokenizer
    assistant_id = tokenizer.encode(" ASSISTANT", add_special_tokens=False)[0]
    losses = []
    bar = tqdm(range(args.steps), desc="side branch", mininterval=5)
    for step in bar:
        # progress=1: the later mixture of question kinds, every fifth batch of short conversations
        ids, pixel_values, _ = sample_batch(rng, generator, processor, progress=1.0, short=step % 5 == 4)
        mask = answer_mask(ids, assistant_id, tokenizer.eos_token_id)
        with torch.no_grad():
            target = answer_logits(teacher, ids, mask, pixel_values=pixel_values, use_cache=False)
        logits = answer_logits(model, ids, mask, pixel_values=pixel_values, use_cache=False)
        loss = functional.kl_div(
            logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(branch, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-10:]):.4f}")
    return losses


def accuracy(model, processor, pairs: list[tuple[task.Grid, task.Question]]) -> dict[str, dict]:
    """Right answers by kind, with their number, share and 95 % Wilson interval."""
    questions = [question for _, question in pairs]
    answers = generate_answers(model, processor, [grid.image for grid, _ in pairs], questions)
    right = [task.is_correct(answer, question.answer) for answer, question in zip(answers, questions, strict=True)]
    results = {}
    for kind in task.KINDS:
        hits = [hit for hit, question in zip(right, questions, strict=True) if question.kind == kind]
        interval = wilson_interval(sum(hits), len(hits))
        results[kind] = {"questions": len(hits), "accuracy": sum(hits) / len(hits), "wilson_95": interval}
    return results


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n"
        "  python scripts/train_tiny_side_branch.py                       the weights of examples/dpvr-tiny-adapter\n"
        "  python scripts/train_tiny_side_branch.py --saturation-layer 2 --output /tmp/adapter-2\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", default=str(ROOT / "examples" / "tiny-llava"), help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "examples" / "dpvr-tiny-adapter", help="default: %(default)s"
    )
    parser.add_argument("--saturation-layer", type=int, help="default: the paper's proportion of the layers")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of data and augmentation (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=500, help="evaluated, of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    for name, least in (("questions", 1), ("steps", 1), ("threads", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning-rate must be more than 0, got {args.learning_rate}")
    # The directory is replaced as a whole: one that this script did not write must not be lost
    if args.output.exists() and Path(__file__).name not in str(read_record(args.output).get("command")):
        parser.error(f"--output {args.output} exists and holds no training.json of this script")
    return args


def main() -> None:
    args = parse_args()
    start = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{args.output.name}-", dir=args.output.parent))
    try:
        model = from_llava(args.source, saturation_layer=args.saturation_layer, dtype=torch.float32)
        adapted, processor = add_adapter(model), processor_from_llava(args.source)  # in place
        teacher = LlavaForConditionalGeneration.from_pretrained(args.source, dtype=torch.float32).eval()
        pairs = task.make_questions(args.seed + 1000, args.questions, "test")
        results = {
            "dense": accuracy(teacher, AutoProcessor.from_pretrained(args.source), pairs),
            "untrained": accuracy(model, processor, pairs),
        }
        begin = time.monotonic()
        losses = train(model, teacher, processor, args)
        seconds = time.monotonic() - begin
        for weight in trainable(model).values():  # what is evaluated is what is saved
            weight.data = weight.half().float()
        results["trained"] = accuracy(model, processor, pairs)
        trained, total, _ = count_trainable(model)
        record = {
            "command": f"python scripts/train_tiny_side_branch.py --saturation-layer {model.config.saturation_layer} "
            f"--learning-rate {args.learning_rate} --steps {args.steps} --seed {args.seed}",
            "trains": "side branch",
            "loss": "KL divergence from the dense model's next-token distribution, on answer tokens",
            "loss_first_last_20_steps": [round(float(np.mean(part)), 5) for part in (losses[:20], losses[-20:])],
            "trainable_parameters": trained,
            "parameters": total,
            "training_seconds": round(seconds),
            "total_seconds": round(time.monotonic() - start),
            "threads": args.threads,
            "versions": versions(),
            "held_out": results,
        }
        save_adapter(adapted, work / "adapter", args.source, dtype=torch.float16)
        (work / "adapter" / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        replace_directory(work / "adapter", args.output)
    except (AdapterError, ConversionError) as error:  # a source or a layer that cannot be used
        raise SystemExit(f"error: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{'':9} {'dense':>22} {'untrained':>22} {'trained':>22}")
    for kind in task.KINDS:
        cells = [
            "{accuracy:.3f} [{wilson_95[0]:.3f}, {wilson_95[1]:.3f}]".format(**results[name][kind]) for name in results
        ]
        print(f"{kind:9} " + " ".join(f"{cell:>22}" for cell in cells))
    print(
        f"{args.output}: {record['trainable_parameters']:,} parameters in {record['total_seconds'] / 60:.1f} minutes"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, NOTHING))
