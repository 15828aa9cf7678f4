"""Training steps of tiny random models."""

from functools import cache

import torch
from tiny import IMAGE, make_batch, make_dpvr

from training.staged import IGNORED, StagedModel

ROWS = ("ttIttt", "tttt", "IttItttt", "ttttttI")


def training_batch(rows=ROWS, seed=0):
    """`make_batch` with about half of the text tokens as labels, one a row at least."""
    batch = make_batch(list(rows), padding_side="right", seed=seed)
    is_text = (batch["input_ids"] != IMAGE) & batch["attention_mask"].bool()
    generator = torch.Generator().manual_seed(seed)
    is_answer = is_text & (torch.rand(is_text.shape, generator=generator) < 0.5)
    is_answer[:, 0] = False
    for row, text in zip(is_answer, is_text, strict=True):
        row[text.nonzero()[1:][-1]] |= not row.any()
    batch["labels"] = torch.where(is_answer, batch["input_ids"], IGNORED)
    return {name: value for name, value in batch.items() if value is not None}


def staged(loss="distill", lora=None, seed=0, whole_fusion=False, **options):
    model = make_dpvr(seed, **options).requires_grad_(False)
    if lora or whole_fusion:
        from training.adapters import add_adapter  # not in the processes that start many at once

        model = add_adapter(model, lora, whole_fusion=whole_fusion)
    else:
        model.model.side_branch.requires_grad_(True)
    return StagedModel(model, loss).train()


shared_model = cache(staged)


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch)["loss"]
    loss.backward()
    return loss.item(), {name: w.grad.clone() for name, w in model.named_parameters() if w.requires_grad}
