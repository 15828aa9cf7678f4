#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Train the side branch of a DPVR with TRL's SFTTrainer, on pictures of digits, and save it as a PEFT adapter.

    pip install trl datasets
    python convert_llava_to_dpvr.py examples/tiny-llava dpvr-tiny-3 --saturation-layer 3
    python examples/train_with_trl.py dpvr-tiny-3 trl-adapter --steps 20

TRL's own collator asks the processor for no `<s>`, because most chat templates write it; LLaVA-1.5's does not. The
collator below encodes conversations as `scripts/train_side_branch.py` does: with `<s>`, loss on the answers alone.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image, List
from transformers import AutoModel, AutoProcessor
from trl import SFTConfig, SFTTrainer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import digits as task

from read_llava import check_name
from training.adapters import add_adapter, save_adapter, train_in_float32
from training.data import Collator, encode, read_conversation


def make_dataset(num_rows: int) -> Dataset:
    """Rows of one picture and a conversation about it, in the layout that TRL documents."""
    rng = np.random.default_rng(0)
    rows = {"images": [], "messages": []}
    for _ in range(num_rows):
        grid = task.make_grid(rng, "train")
        turns = []
        for question in (task.ask(rng, grid, kind) for kind in task.KINDS):
            turns += [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]
        rows["images"].append([grid.image])
        rows["messages"].append(turns)
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


class ConversationCollator:
    """Rows of `images` and `messages` as a batch with labels at the answers."""

    def __init__(self, processor, max_length: int = 2048):
        self.processor, self.max_length = processor, max_length
        self.collate = Collator(processor.tokenizer.pad_token_id)

    def __call__(self, rows: list[dict]) -> dict:
        conversations = map(read_conversation, rows)
        return self.collate([encode(self.processor, *each, self.max_length) for each in conversations])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a DPVR")
    parser.add_argument("output", type=Path, help="folder for the adapter")
    parser.add_argument("--rows", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    args = parser.parse_args()
    for name, value in (("--rows", args.rows), ("--steps", args.steps)):
        if value < 1:
            parser.error(f"{name} must be at least 1, got {value}")

    has_gpu = torch.cuda.is_available()
    try:
        check_name(args.model)
        model = AutoModel.from_pretrained(
            args.model, trust_remote_code=True, dtype=torch.bfloat16 if has_gpu else torch.float32
        )
        model = add_adapter(model)
        processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    train_in_float32(model)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(args.output / "trl"),
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=False,  # nothing before the side branch has a graph
            max_length=None,
            bf16=has_gpu,
        ),
        train_dataset=make_dataset(args.rows),
        processing_class=processor,
        data_collator=ConversationCollator(processor),
    )
    trainer.train()
    save_adapter(trainer.model, args.output, args.model)
    print(f"{args.output}: the adapter")


if __name__ == "__main__":
    main()
