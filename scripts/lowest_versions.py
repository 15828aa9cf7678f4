#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Run the core tests with the lowest version of each package that requirements.txt allows.

Makes a fresh environment with exactly those versions and what the tests need besides, and runs the tests there. Torch
is taken as `--torch` says, since its builds for CPUs are not on PyPI.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/test_processing_dpvr.py", "tests/test_modeling_dpvr.py", "tests/test_convert_llava_to_dpvr.py"]
TEST_PACKAGES = ["hypothesis", "numpy", "pytest", "pytest-xdist", "scikit-learn"]
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)>=([0-9.]+)")


def lowest_versions(path: Path) -> dict[str, str]:
    """Package and lowest version of each line of a requirements file.

    Raises:
        ValueError: a line that is neither `name>=version` nor a comment.
    """
    versions = {}
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        match = REQUIREMENT.fullmatch(line)
        if match is None:
            raise ValueError(f"{path.name}: {line!r} is not `name>=version`.")
        versions[match[1]] = match[2]
    return versions


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n  python scripts/lowest_versions.py\n"
        "  python scripts/lowest_versions.py --tests tests/test_processing_dpvr.py --folder lowest\n\n"
        "exit codes: 0 the tests pass, else that of pip or pytest\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, help="where to make the environment and keep it (default: a temporary)")
    parser.add_argument("--torch", help="what pip is to install for torch (default: exactly the lowest version)")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="default: %(default)s")
    return parser.parse_args()


def run(folder: Path, torch: str | None, tests: list[str]) -> int:
    versions = lowest_versions(ROOT / "requirements.txt")
    pins = [f"{name}=={version}" for name, version in versions.items() if name != "torch"]
    python = folder / "bin" / "python"
    venv.create(folder, with_pip=True)
    print(f"torch {versions['torch']}, {', '.join(pins)}", flush=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Torch first, and by itself: what pins its own needs must not be taken for ours
    for packages in ([torch or f"torch=={versions['torch']}"], [*pins, *TEST_PACKAGES]):
        code = subprocess.run([*pip, *packages], check=False).returncode
        if code:
            return code
    return subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT, check=False).returncode


def main() -> int:
    args = parse_args()
    if args.folder:
        return run(args.folder.resolve(), args.torch, args.tests)
    with tempfile.TemporaryDirectory(prefix="dpvr-lowest-") as folder:
        return run(Path(folder), args.torch, args.tests)


if __name__ == "__main__":
    sys.exit(main())
