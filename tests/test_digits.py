# Copyright 2026 The DPVR-LF authors. Licensed under the Apache License, Version 2.0.
"""The digit task: same seed same questions, no test image in training, right answers, fair scoring."""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import digits as task

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def answer_by_reading(text: str, rows: list[list[int]]) -> str:
    """Answer a question from its wording and the grid alone, without the generator's code."""
    cells = [rows[int(row) - 1][int(column) - 1] for row, column in re.findall(r"row (\d), column (\d)", text)]
    if text.startswith("What is in"):
        return WORDS[cells[0]]
    if text.startswith("Which is larger"):
        verdict = "first" if cells[0] > cells[1] else "second" if cells[0] < cells[1] else "equal"
        return f"{WORDS[cells[0]]} and {WORDS[cells[1]]}: {verdict}"
    line, index = re.search(r"(row|column) (\d)[.?]$", text).groups()
    read = [row[int(index) - 1] for row in rows] if line == "column" else rows[int(index) - 1]
    if text.startswith("Read"):
        return "{}, {} and {}".format(*(WORDS[digit] for digit in read))
    wanted = WORDS.index(text.split()[4])
    flags = ["yes" if digit == wanted else "no" for digit in read]
    marked = ", ".join(f"{WORDS[digit]} {flag}" for digit, flag in zip(read, flags, strict=True))
    return f"{marked}: {WORDS[flags.count('yes')]}"


def test_same_seed_same_questions():
    first, second = (task.make_questions(seed=3, n_per_kind=5, split="test") for _ in range(2))
    other = task.make_questions(seed=4, n_per_kind=5, split="test")
    assert [question for _, question in first] == [question for _, question in second]
    assert all(np.array_equal(a.cells, b.cells) for (a, _), (b, _) in zip(first, second, strict=True))
    assert [question for _, question in first] != [question for _, question in other]


def test_splits_share_no_image():
    indices = task.split_indices()
    assert len(indices["test"]) == task.NUM_TEST_IMAGES
    assert sorted([*indices["train"], *indices["test"]]) == list(range(1797))
    pictures = {split: {cell.tobytes() for cell in task.load_digits_split(split)[0]} for split in task.SPLITS}
    assert not pictures["train"] & pictures["test"]


def test_test_images_come_from_the_test_split():
    held_out = {cell.tobytes() for cell in task.load_digits_split("test")[0]}
    grid = task.make_grid(np.random.default_rng(0), "test")
    assert all(grid.cells[row, column].tobytes() in held_out for row in range(3) for column in range(3))


def test_image_shows_the_digits_where_they_are_said_to_be():
    grid = task.make_grid(np.random.default_rng(1), "train")
    cells, labels = task.load_digits_split("train")
    pixels = np.asarray(grid.image)
    assert pixels.shape == (task.IMAGE_PIXELS, task.IMAGE_PIXELS, 3)
    for row in range(3):
        for column in range(3):
            shown = pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16, 0]
            matches = np.flatnonzero((cells == shown).all((1, 2)))
            assert grid.digits[row, column] in labels[matches]


@pytest.mark.parametrize("kind", task.KINDS)
def test_answers_are_right(kind):
    rng = np.random.default_rng(2)
    for _ in range(300):
        grid = task.make_grid(rng, "test")
        question = task.ask(rng, grid, kind)
        assert question.kind == kind
        assert question.answer == answer_by_reading(question.text, grid.digits.tolist())


def test_answers_are_balanced():
    questions = [question for _, question in task.make_questions(seed=0, n_per_kind=1000, split="train")]
    for kind, limit in (("look", 0.15), ("count", 0.03), ("compare", 0.1), ("describe", 0.03)):
        answers = Counter(question.answer for question in questions if question.kind == kind)
        assert answers.most_common(1)[0][1] / 1000 < limit


def test_scoring_forgives_form_not_content():
    expected = "four, one and nine"
    assert task.is_correct(" Four, one  and nine.", expected)
    assert not task.is_correct("four, one and eight", expected)
    assert not task.is_correct("four, one and nine and two", expected)
    assert not task.is_correct("", expected)


def test_unknown_names_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="validation"):
        task.load_digits_split("validation")
    with pytest.raises(ValueError, match="paint"):
        task.ask(rng, task.make_grid(rng, "test"), "paint")
