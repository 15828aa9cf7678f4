#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Write held-out questions about digits, with their images, as the data set that the task files of this folder read.

The data set is one Parquet file, with the columns `image`, `kind`, `question` and `answer`. The task files look for
`digits.parquet` in the folder in which a harness is started.
"""

import argparse
import sys
from pathlib import Path

from datasets import Dataset, Features, Image, Value

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import digits as task

FEATURES = Features({"image": Image(), **dict.fromkeys(("kind", "question", "answer"), Value("string"))})


def write_questions(path: Path, seed: int, n_per_kind: int) -> None:
    """Writes `digits.make_questions(seed, n_per_kind, "test")` to `path`, in its order."""
    rows = [
        {"image": grid.image, "kind": question.kind, "question": question.text, "answer": question.answer}
        for grid, question in task.make_questions(seed, n_per_kind, "test")
    ]
    Dataset.from_list(rows, features=FEATURES).to_parquet(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n  python examples/evaluation/write_questions.py\n"
        "  python examples/evaluation/write_questions.py --questions 250 --seed 3\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("digits.parquet"), help="default: %(default)s")
    parser.add_argument("--questions", type=int, default=100, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=12345, help="of grids and questions (default: %(default)s)")
    args = parser.parse_args()
    for name, value, least in (("--questions", args.questions, 1), ("--seed", args.seed, 0)):
        if value < least:
            parser.error(f"{name} must be at least {least}, got {value}")
    write_questions(args.output, args.seed, args.questions)
    print(f"{args.output}: {args.questions * len(task.KINDS)} questions")


if __name__ == "__main__":
    main()
