# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Time and memory of `scripts/analyze_saturation.py` at LLaVA-1.5-7B's geometry.

A checkpoint with random bf16 weights is written, and one picture analyzed: all metrics, KL at the last half of the
layers. Time and peak memory are those of the whole process, imports and loading included.

Example:

    python benchmarks/analysis.py --work /scratch
    python benchmarks/analysis.py --num-layers 4 --hidden-size 256 --output /tmp/analysis.json
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.command import (
    NOTHING,
    check_folder,
    check_hidden_size,
    check_numbers,
    check_output,
    run_command,
    write_record,
)
from benchmarks.make_random_llava import write_llava

COMMAND = [sys.executable, str(ROOT / "scripts" / "analyze_saturation.py")]


def measure(work: Path, num_layers: int, hidden_size: int) -> dict:
    """Seconds and peak bytes of an analysis, in a process of its own."""
    model, pictures = work / "model", work / "pictures"
    write_llava(model, num_layers, hidden_size)
    pictures.mkdir()
    Image.effect_noise((640, 480), 80).convert("RGB").save(pictures / "noise.png")
    layers = f"{num_layers // 2}-{num_layers - 1}"
    start = time.perf_counter()
    options = ["--data", str(pictures), "--layers", layers, "--output", str(work / "saturation")]
    subprocess.run([*COMMAND, str(model), *options], check=True)
    seconds = time.perf_counter() - start
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"layers": layers, "seconds": seconds, "minutes": seconds / 60, "peak_gib": peak_bytes / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of an analysis at LLaVA-1.5-7B's geometry.")
    parser.add_argument("--num-layers", type=int, default=32, help="of the decoder (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=4096, help="a multiple of 128 (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder with room for the checkpoint (default: a temporary one)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "analysis.json", help="default: %(default)s"
    )
    args = parser.parse_args()
    check_numbers(parser, args, 2, "num_layers")
    check_hidden_size(parser, args)
    check_output(parser, args.output)
    check_folder(parser, "--work", args.work)
    with tempfile.TemporaryDirectory(dir=args.work, prefix="analysis-") as work:
        result = measure(Path(work), args.num_layers, args.hidden_size)
    record = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": {"num_layers": args.num_layers, "hidden_size": args.hidden_size},
        **result,
    }
    write_record(args.output, record)
    print(f"{record['seconds']:.0f} s, peak {record['peak_gib']:.1f} GiB\n{args.output}")


if __name__ == "__main__":
    sys.exit(run_command(main, NOTHING))
