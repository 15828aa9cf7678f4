# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the task files of both harnesses call: the image of a question, and whether an answer is right."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digits import is_correct


def images(row: dict) -> list:
    """The one image that a question is about."""
    return [row["image"]]


def score(row: dict, answers: list[str]) -> dict[str, float]:
    """1 or 0, as `accuracy` and under the name of the question's kind, so that each kind has a mean of its own."""
    right = float(is_correct(answers[0], row["answer"]))
    return {"accuracy": right, row["kind"]: right}
