#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Merge an adapter into its base and write a DPVR checkpoint, which loads without PEFT.

The base is a DPVR, or the LLaVA that one is made from. The output folder appears complete or not at all.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoProcessor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.command import given_path, lock_record, release_records
from read_llava import check_name
from read_weights import is_finite, reason
from scripts.output import interrupted_by_sigterm, say
from training.adapters import (
    adapter_path,
    from_llava,
    load_adapter,
    merge_adapter,
    processor_from_llava,
    refuse_missing,
)
from training.card import RUN_FILE
from write_checkpoint import check_empty, check_output


def refuse_infinite(model: torch.nn.Module) -> None:
    """Raises ValueError if a weight is infinite, as one becomes that its type cannot hold."""
    for name, weight in model.named_parameters():
        is_plain = type(weight.data) is torch.Tensor
        if is_plain and not is_finite(weight.detach()) and weight.isinf().any():
            raise ValueError(
                f"{name} holds numbers beyond the range of {str(weight.dtype).removeprefix('torch.')}, or infinite "
                "ones; merge with another --dtype."
            )


def write(merged: torch.nn.Module, processor, record: Path, folder: Path) -> None:
    merged.save_pretrained(folder)
    processor.save_pretrained(folder)
    if record.is_file():
        shutil.copyfile(record, folder / RUN_FILE)
    for weights in folder.glob("*.safetensors"):  # which safetensors makes for the owner only
        weights.chmod((folder / "config.json").stat().st_mode)


def merge(base: str, adapter: str, output: Path, subfolder: str | None = None, dtype: str = "auto") -> None:
    """Writes `base` with `adapter` merged, its processor, and the record of the training if the adapter has one, into
    `output`, which must not exist or be empty."""
    check_name(base)
    weights = adapter_path(adapter, subfolder)
    check_output(output, weights.resolve(), *([Path(base).resolve()] if Path(base).exists() else []))
    check_empty(output)
    if AutoConfig.from_pretrained(base, trust_remote_code=True).model_type == "dpvr":
        model, loaded = AutoModel.from_pretrained(base, trust_remote_code=True, dtype=dtype, output_loading_info=True)
        refuse_missing(loaded, base)
        merged = merge_adapter(load_adapter(model, weights))
        processor = AutoProcessor.from_pretrained(base, trust_remote_code=True)
    else:
        merged = from_llava(base, weights, dtype=dtype)
        processor = processor_from_llava(base)
    refuse_infinite(merged)
    target = output.resolve()  # "folder/.." is not the name that it gets
    target.parent.mkdir(parents=True, exist_ok=True)
    lock_record(target)
    staging = target.with_name(f".{target.name}.merging")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a merge that was killed
        try:
            staging.mkdir()
            write(merged, processor, weights.parent / RUN_FILE, staging)
        except Exception as error:  # safetensors and tokenizers have types of their own for a full disk
            raise OSError(f"{output} cannot be written: {reason(error)}") from error
        os.replace(staging, target)  # an empty folder there gives way
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        release_records()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n"
        "  python scripts/merge_adapter.py dpvr-7b ./adapter dpvr-7b-charts\n"
        "  python scripts/merge_adapter.py llava-hf/llava-1.5-7b-hf user/charts-adapter dpvr-7b-charts\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", help="Hub id or folder of a DPVR or a LLaVA checkpoint")
    parser.add_argument("adapter", help="Hub id or folder of the adapter")
    parser.add_argument("output", type=given_path, help="folder to make")
    parser.add_argument("--subfolder", metavar="PATH", help="of the adapter in its folder or repository")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the base (default: auto, as stored)")
    options = parser.parse_args(arguments)
    with interrupted_by_sigterm():
        try:
            merge(options.base, options.adapter, options.output, options.subfolder, options.dtype)
        except (OSError, SafetensorError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; nothing is left behind", file=sys.stderr)
            return 130
    say(f"{options.output}: {options.base} with {options.adapter}; it loads without PEFT")
    return 0


if __name__ == "__main__":
    sys.exit(main())
