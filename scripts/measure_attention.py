#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Measure how much attention text pays to the image in each decoder layer of the embedded LLaVA.

The metric of the abstract of arXiv 2606.09131: in layer l, the attention weights of a text query on all image tokens
together, averaged over the heads, over the text tokens behind the image, and over the questions:

    A_l = mean over questions, text queries q and heads h of  sum over image tokens k of  a_{l,h}(q, k)

Image tokens are 36 of about 80 tokens here, so 0.4 to 0.5 is what attention that does not look would pay.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "scripts")]

import digits as task
from train_tiny_llava import conversation


@torch.no_grad()
def attention_to_image(model, inputs) -> tuple[torch.Tensor, float]:
    """(L,) attention from text behind the image to the image, and what uniform attention would pay, of one prompt."""
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    queries = torch.arange(len(is_image)) > int(is_image.nonzero().max())
    attentions = model(**inputs, output_attentions=True).attentions
    masses = [attention[0, :, queries][:, :, is_image].sum(-1).mean().item() for attention in attentions]
    positions = torch.arange(len(is_image))[queries]
    return torch.tensor(masses), (is_image.sum() / (positions + 1)).mean().item()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="example:\n  python scripts/measure_attention.py --questions 50\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=str(ROOT / "examples" / "tiny-llava"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "figures" / "attention.json", help="%(default)s")
    parser.add_argument("--questions", type=int, default=50, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation={"text_config": "eager"}
    ).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    masses, uniform = [], []
    for grid, question in tqdm(task.make_questions(args.seed, args.questions, "test"), desc="questions"):
        prompt = processor.apply_chat_template(conversation([question])[:1], add_generation_prompt=True)
        by_layer, share = attention_to_image(model, processor(images=grid.image, text=prompt, return_tensors="pt"))
        masses.append(by_layer)
        uniform.append(share)
    masses = torch.stack(masses)
    record = {
        "command": f"python scripts/measure_attention.py --questions {args.questions} --seed {args.seed}",
        "questions": len(masses),
        "text_to_image_attention": [round(x, 4) for x in masses.mean(0).tolist()],
        "standard_deviation": [round(x, 4) for x in masses.std(0).tolist()],
        "uniform_attention": round(sum(uniform) / len(uniform), 4),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=2) + "\n")
    for layer, (mean, spread) in enumerate(zip(masses.mean(0), masses.std(0), strict=True)):
        print(f"layer {layer}  {mean:.3f} +- {spread:.3f}  " + "#" * round(60 * float(mean)))
    print(f"uniform  {record['uniform_attention']:.3f}\n{args.output}")


if __name__ == "__main__":
    main()
