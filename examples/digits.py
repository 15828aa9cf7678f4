# Copyright 2026 The DPVR-LF authors. Licensed under the Apache License, Version 2.0.
"""Grids of handwritten digits and questions about them: the task of `examples/tiny-llava`.

An image is a 3 x 3 grid of real handwritten digits (scikit-learn's `load_digits`, 1,797 images of 8 x 8 pixels),
48 x 48 pixels in all. Digit images are split once and for all into `train` and `test`: no test image is trained on.
Four kinds of question are asked about a grid:

    look      What is in row 2, column 3?                              seven
    count     How many times does seven occur in row 2?                seven yes, one no, seven yes: two
    compare   Which is larger, row 1, column 2 or row 3, column 1?     seven and four: first
    describe  Read row 2.  |  Read column 3.                           four, one and nine

A count reads the row or column, saying of each digit whether it is the one asked for, then how many were; a comparison
names both digits, then `first`, `second` or `equal`. An answer is right only as a whole.

Everything random takes a `numpy.random.Generator`, so a seed fixes every image, question and answer.

    rng = np.random.default_rng(0)
    grid = make_grid(rng, "test")              # Grid: grid.digits (3, 3) ints, grid.image a PIL image
    question = ask(rng, grid, "describe")      # Question: question.kind, question.text, question.answer
    pairs = make_questions(seed=1, n_per_kind=500, split="test")  # [(Grid, Question), ...], a new grid for each
    is_correct("Four, one and nine.", question.answer)
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

KINDS = ("look", "count", "compare", "describe")
SPLITS = ("train", "test")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GRID_SIZE = 3
CELL_PIXELS = 16
IMAGE_PIXELS = GRID_SIZE * CELL_PIXELS
DIGIT_PIXELS = 14  # a digit is drawn smaller than its cell, so that neighbours do not touch
NUM_TEST_IMAGES = 297
MAX_COUNT = 5  # of one digit in a grid, so that some two cells always differ
PALETTE_SIZES = (2, 3, 4, 5, 6, 8)  # distinct digits to draw from: under 9, so that some two cells are always equal


@dataclass(frozen=True)
class Grid:
    """`digits`: (3, 3) ints. `cells`: (3, 3, 16, 16) uint8, the picture of each cell, white on black."""

    digits: np.ndarray
    cells: np.ndarray

    @property
    def image(self) -> Image.Image:
        """The grid as a 48 x 48 RGB image."""
        pixels = self.cells.transpose(0, 2, 1, 3).reshape(IMAGE_PIXELS, IMAGE_PIXELS)
        return Image.fromarray(pixels).convert("RGB")


@dataclass(frozen=True)
class Question:
    """A question of one of `KINDS` and its only right answer."""

    kind: str
    text: str
    answer: str


def draw_cell(digit_image: np.ndarray) -> np.ndarray:
    """(8, 8) intensities in 0..16 -> (16, 16) uint8, the digit enlarged within a black margin."""
    pixels = np.round(digit_image * (255 / 16)).astype(np.uint8)
    enlarged = Image.fromarray(pixels).resize((DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC)
    return np.pad(np.asarray(enlarged), (CELL_PIXELS - DIGIT_PIXELS) // 2)


@cache
def split_indices() -> dict[str, np.ndarray]:
    """Indices into `load_digits` of each split. The permutation is fixed: it is part of the task, not of a run."""
    order = np.random.default_rng(0).permutation(len(load_digits().images))
    return {"test": np.sort(order[:NUM_TEST_IMAGES]), "train": np.sort(order[NUM_TEST_IMAGES:])}


@cache
def load_digits_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Cells (N, 16, 16) uint8 and labels (N,) of the digit images of one split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    data = load_digits()
    indices = split_indices()[split]
    return np.stack([draw_cell(data.images[i]) for i in indices]), data.target[indices]


@cache
def images_of_digit(split: str) -> list[np.ndarray]:
    """For each digit 0..9, the positions of its images in `load_digits_split(split)`."""
    _, labels = load_digits_split(split)
    return [np.flatnonzero(labels == digit) for digit in range(10)]


def sample_digits(rng: np.random.Generator) -> np.ndarray:
    """(3, 3) digits from a small palette, so that repeated digits and absent ones are both common."""
    while True:
        size = PALETTE_SIZES[rng.integers(len(PALETTE_SIZES))]
        palette = rng.permutation(10)[:size]
        digits = palette[rng.integers(size, size=(GRID_SIZE, GRID_SIZE))]
        if np.bincount(digits.ravel()).max() <= MAX_COUNT:
            return digits


def make_grid(rng: np.random.Generator, split: str) -> Grid:
    """A random grid drawn with the digit images of `split`."""
    cells, _ = load_digits_split(split)
    by_digit = images_of_digit(split)
    digits = sample_digits(rng)
    chosen = [by_digit[digit][rng.integers(len(by_digit[digit]))] for digit in digits.ravel()]
    return Grid(digits, cells[chosen].reshape(GRID_SIZE, GRID_SIZE, CELL_PIXELS, CELL_PIXELS))


def pick(rng: np.random.Generator, options):
    """One of `options`, all equally likely (`rng.choice` is ten times slower)."""
    return options[rng.integers(len(options))]


def place(cell: int) -> str:
    """How a question names cell 0..8 of the grid, in reading order; rows and columns count from 1."""
    row, column = divmod(int(cell), GRID_SIZE)
    return f"row {row + 1}, column {column + 1}"


def ask_look(rng: np.random.Generator, digits: np.ndarray) -> tuple[str, str]:
    cell = rng.integers(digits.size)
    return f"What is in {place(cell)}?", WORDS[digits.flat[cell]]


def pick_line(rng: np.random.Generator, digits: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and digits of a random row or column."""
    index = rng.integers(GRID_SIZE)
    name, line = pick(rng, (("row", digits[index]), ("column", digits[:, index])))
    return f"{name} {index + 1}", line


def ask_count(rng: np.random.Generator, digits: np.ndarray) -> tuple[str, str]:
    """The count is chosen before the digit, so that a large count is not asked for less often than zero."""
    name, line = pick_line(rng, digits)
    counts = np.bincount(line, minlength=10)
    count = pick(rng, np.unique(counts))
    digit = pick(rng, np.flatnonzero(counts == count))
    read = ", ".join(f"{WORDS[other]} {'yes' if other == digit else 'no'}" for other in line)
    return f"How many times does {WORDS[digit]} occur in {name}?", f"{read}: {WORDS[count]}"


def ask_compare(rng: np.random.Generator, digits: np.ndarray) -> tuple[str, str]:
    """The verdict is chosen before the cells: each of the three is right for a third of the questions."""
    flat = digits.ravel()
    sign = np.sign(flat[:, None] - flat[None, :])
    np.fill_diagonal(sign, 2)  # a cell is not compared with itself
    wanted, verdict = pick(rng, ((1, "first"), (-1, "second"), (0, "equal")))
    first, second = pick(rng, np.argwhere(sign == wanted))
    text = f"Which is larger, {place(first)} or {place(second)}?"
    return text, f"{WORDS[flat[first]]} and {WORDS[flat[second]]}: {verdict}"


def ask_describe(rng: np.random.Generator, digits: np.ndarray) -> tuple[str, str]:
    name, line = pick_line(rng, digits)
    first, second, third = (WORDS[digit] for digit in line)
    return f"Read {name}.", f"{first}, {second} and {third}"


ASK = {"look": ask_look, "count": ask_count, "compare": ask_compare, "describe": ask_describe}


def ask(rng: np.random.Generator, grid: Grid, kind: str) -> Question:
    """A random question of `kind` about `grid`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    return Question(kind, *ASK[kind](rng, grid.digits))


def make_questions(seed: int, n_per_kind: int, split: str) -> list[tuple[Grid, Question]]:
    """`n_per_kind` questions of each kind, each about a grid of its own; kinds take turns."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n_per_kind):
        for kind in KINDS:
            grid = make_grid(rng, split)
            pairs.append((grid, ask(rng, grid, kind)))
    return pairs


def is_correct(answer_text: str, expected: str) -> bool:
    """Whether an answer is the expected one, but for case, spacing and a full stop at the end."""

    def normalize(text: str) -> str:
        return " ".join(text.lower().split()).removesuffix(".")

    return normalize(answer_text) == normalize(expected)
