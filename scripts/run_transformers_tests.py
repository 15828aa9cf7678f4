#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Run transformers' own tests, as it runs them for LLaVA, on LLaVA and on DPVR, from a checkout of transformers.

`tests/transformers_suite.py` says what is run and what is changed for DPVR. A test that LLaVA passes and DPVR does
not is an error, unless the suite skips it with a reason of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import markdown

SUITE = ROOT / "tests" / "transformers_suite.py"
PAIRS = {
    "its tests of LLaVA": ("LlavaForConditionalGenerationModelTest", "DPVRForConditionalGenerationModelTest"),
    "its tester of vision-language models": ("LlavaVLMTest", "DPVRVLMTest"),
}
EXAMPLES = """\
examples:
  git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers
  pip install parameterized requests httpx pytest-rerunfailures
  python scripts/run_transformers_tests.py transformers
  RUN_SLOW=1 python scripts/run_transformers_tests.py transformers -k export
"""


def run_pytest(checkout: Path, report: Path, arguments: list[str]) -> int:
    """Runs the suite among the checkout's own tests; what pytest says goes to the terminal. Returns pytest's code."""
    command = ["-m", "pytest", "-q", "--rootdir", checkout, "-c", checkout / "pyproject.toml", "-p", "conftest"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="dpvr-modules-") as modules:
        return subprocess.run(
            [sys.executable, *map(str, command), str(SUITE), f"--junitxml={report}", *arguments],
            cwd=checkout,
            env={**environment, "HF_MODULES_CACHE": modules},
            check=False,
        ).returncode


def read_report(report: Path) -> dict[str, dict[str, str]]:
    """Of each class its tests and how they went: `"passed"`, `"failed"` or `"skipped: reason"`. One failed subtest
    makes a failed test."""
    results: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tests = results.setdefault(case.get("classname").split(".")[-1], {})
        skipped = case.find("skipped")
        outcome = "passed" if skipped is None else f"skipped: {skipped.get('message')}"
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
        name = case.get("name")
        if tests.get(name) != "failed" and (outcome == "failed" or tests.get(name) != "passed"):
            tests[name] = outcome
    return results


def compare(results: dict[str, dict[str, str]]) -> dict:
    """Counts for each pair of classes, and the tests that LLaVA alone passes with what became of them for DPVR."""
    record = {}
    for title, (dense, ours) in PAIRS.items():
        counts = {
            model: Counter(outcome.split(":")[0] for outcome in results.get(name, {}).values())
            for model, name in (("LLaVA", dense), ("DPVR", ours))
        }
        lost = {
            test: results.get(ours, {}).get(test, "not run")
            for test, outcome in results.get(dense, {}).items()
            if outcome == "passed" and results.get(ours, {}).get(test) != "passed"
        }
        record[title] = {**counts, "passed by LLaVA alone": lost}
    return record


def table(record: dict) -> str:
    """What `--output` wrote, as Markdown."""
    rows = []
    for title in PAIRS:
        pair = record[title]
        counts = [
            ", ".join(f"{pair[model].get(outcome, 0)} {outcome}" for outcome in ("passed", "skipped", "failed"))
            for model in ("LLaVA", "DPVR")
        ]
        lost = [
            f"`{test}` ({reason.removeprefix('skipped: ')})" for test, reason in pair["passed by LLaVA alone"].items()
        ]
        rows.append([title, *counts, "; ".join(lost)])
    return markdown(["transformers'", "LLaVA", "DPVR", "passed by LLaVA alone"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="folder of a transformers checkout, of the installed version")
    parser.add_argument("--output", type=Path, help="write the counts to this JSON file")
    args, arguments = parser.parse_known_args()
    checkout = args.checkout.resolve()
    for needed in (
        "pyproject.toml",
        "conftest.py",
        "tests/vlm_tester.py",
        "tests/models/llava/test_modeling_llava.py",
    ):
        if not (checkout / needed).is_file():
            print(f"error: {checkout} is no checkout of transformers: it has no {needed}", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        code = run_pytest(checkout, report, arguments)
        if code not in (0, 1) or not report.is_file():
            print(f"error: pytest ended with {code}; what it said stands above. Nothing is recorded", file=sys.stderr)
            return 2
        record = compare(read_report(report))
    if not any(pair["LLaVA"]["passed"] for pair in record.values()):
        print("error: no test of LLaVA passed, so there is nothing to compare. Nothing is recorded", file=sys.stderr)
        return 2
    unexplained = False
    for title, pair in record.items():
        print(f"\n{title}")
        for model in ("LLaVA", "DPVR"):
            print(f"  {model:6}" + ", ".join(f"{pair[model][key]} {key}" for key in ("passed", "skipped", "failed")))
        for test, outcome in pair["passed by LLaVA alone"].items():
            print(f"  LLaVA alone passes {test}: {outcome}")
            unexplained |= not outcome.startswith("skipped")
    if args.output:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        args.output.write_text(json.dumps({"versions": versions, **record}, indent=2) + "\n")
    return int(unexplained)


if __name__ == "__main__":
    sys.exit(main())
