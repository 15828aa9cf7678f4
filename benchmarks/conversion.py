# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Time and memory of conversions, beside a plain copy of the same files.

For each size a random checkpoint is written, and then, round by round, copied (`shutil.copyfile` and `fsync`),
converted in full and converted with `--link`, each in the same run, so that all three see the same disk. The page
cache is left as it is: a source that fits into memory is read from there by all three. The order of copy and
conversion changes from round to round. A conversion runs in a process of its own; its time is that of `convert()`, for
the imports before it are the same at every size, and are stated apart. Its memory is the peak of that process.

Example:

    python benchmarks/conversion.py --work /scratch/conversion
    python benchmarks/conversion.py --sizes 0.1 1 --rounds 2 --output /tmp/conversion.json
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.command import SO_FAR, check_folder, check_numbers, check_output, run_command, write_record
from benchmarks.tables import markdown

SIZES = {  # GB to the shape of the model: decoder layers, width, layers of the vision tower
    "0.1": (12, 256, 2),
    "1": (10, 1024, 24),
    "4": (31, 2048, 24),
    "14": (32, 4096, 24),
}


def peak_bytes() -> int:
    """The most memory this process has held; `ru_maxrss` would count that of the process which started it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def convert_here(source: str, output: str, link: bool) -> None:
    """Converts in this process and prints its times and peak memory as JSON."""
    start = time.perf_counter()
    from convert_llava_to_dpvr import convert

    imported = time.perf_counter()
    imported_bytes = peak_bytes()
    convert(source, output, link=link)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - imported,
                "import_seconds": imported - start,
                "peak_bytes": peak_bytes(),
                "imported_bytes": imported_bytes,
            }
        )
    )


def convert_apart(source: Path, output: Path, link: bool = False) -> dict:
    """Converts in a process of its own. Returns its times, its memory, and the bytes that the disk holds more."""
    os.sync()
    command = [sys.executable, __file__, "--convert", str(source), str(output), *(["--link"] if link else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr)
    files = [path.stat() for path in output.iterdir()]
    written = sum(file.st_size for file in files if file.st_nlink == 1)
    shutil.rmtree(output)
    return json.loads(result.stdout.splitlines()[-1]) | {"written_bytes": written}


def copy(source: Path, output: Path) -> float:
    """Seconds of copying the weight files, until they are on the disk."""
    os.sync()
    start = time.perf_counter()
    output.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, output / path.name)
        with (output / path.name).open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(output)
    return seconds


def measure(work: Path, size: str, rounds: int) -> dict:
    from benchmarks.make_random_llava import write_llava

    source = work / f"random-{size}gb"
    try:
        write_llava(source, *SIZES[size])
        copies, conversions, links = [], [], []
        for i in range(rounds):
            steps = [
                lambda: copies.append(copy(source, work / "copy")),
                lambda: conversions.append(convert_apart(source, work / "dpvr")),
            ]
            for step in steps if i % 2 == 0 else steps[::-1]:
                step()
            links.append(convert_apart(source, work / "dpvr", link=True))
        source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    finally:
        shutil.rmtree(source, ignore_errors=True)
    medians = [statistics.median(times) for times in (copies, [each["seconds"] for each in conversions])]
    return {
        "source_bytes": source_bytes,
        "copy_seconds": copies,
        "conversions": conversions,
        "links": links,
        "ratio": medians[1] / medians[0],
    }


def table(record: dict) -> str:
    """The results as Markdown, one row for each size: medians, and the range of the times."""

    def seconds(times: list[float]) -> str:
        return f"{statistics.median(times):.1f} [{min(times):.1f}, {max(times):.1f}]"

    rows = []
    for result in record["sizes"].values():
        conversions, links = result["conversions"], result["links"]
        rows.append(
            [
                f"{result['source_bytes'] / 1e9:.1f} GB",
                seconds(result["copy_seconds"]),
                seconds([each["seconds"] for each in conversions]),
                f"{result['ratio']:.2f}",
                f"{max(each['peak_bytes'] for each in conversions) / 2**20:,.0f} MiB",
                f"{seconds([each['seconds'] for each in links])} s, {links[0]['written_bytes'] / 1e9:.2f} GB",
                seconds([each["import_seconds"] for each in conversions]),
            ]
        )
    return markdown(["source", "copy, s", "conversion, s", "ratio", "peak memory", "`--link`", "imports, s"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time and memory of conversions beside a plain copy.",
        epilog="Needs three times the largest size free in --work; 14 GB takes about 30 minutes on one disk.",
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="GB", help="of 0.1, 1, 4, 14"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each size (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints (default: a temporary one)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "conversion.json", help="default: %(default)s"
    )
    parser.add_argument("--convert", nargs=2, metavar=("SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    parser.add_argument("--link", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        convert_here(*args.convert, args.link)
        return 0
    check_numbers(parser, args, 1, "rounds")
    check_output(parser, args.output)
    check_folder(parser, "--work", args.work)
    import torch

    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory(dir=args.work, prefix="conversion-") as work:
        sizes = {}
        for size in args.sizes:
            sizes[size] = result = measure(Path(work), size, args.rounds)
            print(
                f"{size} GB: {result['ratio']:.2f} of the copy's "
                f"{statistics.median(result['copy_seconds']):.1f} s, peak "
                f"{max(each['peak_bytes'] for each in result['conversions']) / 2**20:.0f} MiB; --link "
                f"{statistics.median(each['seconds'] for each in result['links']):.1f} s and "
                f"{result['links'][0]['written_bytes'] / 1e9:.3f} GB",
                flush=True,
            )
            write_record(args.output, {"machine": machine, "sizes": sizes})  # each as soon as it is measured
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, SO_FAR))
