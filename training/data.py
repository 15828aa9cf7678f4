# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Conversations about images, as token ids with a loss on the answers alone.

Two sources give the same rows:

- LLaVA's own JSON (llava_v1_5_mix665k.json): `[{"id", "image": path or list of paths, "conversations": [{"from":
  "human" or "gpt", "value": text with <image>}]}]`, also as JSON lines, or either compressed (.gz);
- a folder of the `datasets` library (saved by `save_to_disk`, an image folder, parquet, ...) with a column `messages`
  of chat messages or `conversations` as above, these also as JSON text, and `image` or `images`.

As in LLaVA, the images of a message come before its text. A row that cannot be trained on is never an exception in the
middle of a run: it is reported once, with its reason, to `bad_rows.jsonl`, and the next good row takes its place.
"""

import base64
import contextlib
import copy
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from processing_dpvr import decode_picture
from scripts.output import names_file
from training.staged import IGNORED

IMAGE = "<image>"
SPACE = re.compile(r"\s*")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
REASONS = (
    "no conversation",
    "empty answer",
    "image count",
    "missing image",
    "corrupt image",
    "too long",
    "template",
    "refused by the processor",
    "malformed",
)
MAX_DETAIL = 500  # characters, for some rows hold a picture where its name should be
IMAGE_WORDS = 128  # that an image counts for where rows are grouped by length, as in LLaVA


class BadRowError(ValueError):
    """A row that cannot be trained on; `reason` is one of `REASONS`, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@contextlib.contextmanager
def as_bad_row(reason: str, errors: type[Exception] = Exception):
    """What else comes of a row, its images or its turns is the row's fault too, and no reason to end a run."""
    try:
        yield
    except BadRowError:
        raise
    except errors as error:
        raise BadRowError(reason, f"{type(error).__name__}: {error}") from error


# --- sources


def read_rows(source: Path):
    """The rows of a JSON or JSON lines file of LLaVA's format, whatever its suffix (.gz: compressed), or of a folder,
    parquet, arrow or CSV file of the `datasets` library: anything with a length whose items are dictionaries.

    Raises:
        ValueError: the file does not hold a list of rows, or holds none.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"{source} does not exist.")
    rows = _read_rows(source)
    if not len(rows):
        raise ValueError(f"{source} is empty: it holds no rows.")
    return rows


def _read_rows(source: Path):
    if source.is_dir() or source.suffix in (".parquet", ".arrow", ".csv"):
        return read_datasets(source)
    try:
        with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8-sig") as file:
            values = read_values(file.read())
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from error
    # Files are called .json that hold lines, and .jsonl that hold one list
    is_whole = len(values) == 1 and (isinstance(values[0], list) or ".json" in source.suffixes)
    rows = values[0] if is_whole else values
    if not isinstance(rows, list):
        raise ValueError(f"{source} holds a {type(rows).__name__}, not a list of rows.")
    return rows


def read_values(text: str) -> list:
    """The JSON values of `text`: one, or one behind the other, as in JSON lines."""
    decoder, values, end = json.JSONDecoder(), [], 0
    while (start := SPACE.match(text, end).end()) < len(text):
        value, end = decoder.raw_decode(text, start)
        values.append(value)
    return values


def read_datasets(source: Path, split: str = "train"):
    """A split of a folder that `datasets` can read, or the only one that there is, its images undecoded: a broken one
    is then one bad row.

    Raises:
        ValueError: it cannot be read, the library is missing, or it has several splits but not this one.
    """
    try:
        from datasets import Image as ImageFeature
        from datasets import List, load_dataset, load_from_disk
    except ImportError as error:
        raise ValueError(
            f"{source} is read by the datasets library, which is missing: pip install datasets"
        ) from error

    is_saved = (source / "state.json").is_file() or (source / "dataset_dict.json").is_file()
    try:
        if is_saved:
            rows = load_from_disk(str(source))
        elif source.is_dir():
            rows = load_dataset(str(source))
        else:
            rows = load_dataset(source.suffix.lstrip("."), data_files=str(source))
    except Exception as error:  # of pyarrow, pandas, fsspec: they have no common class
        cause = error.__cause__ or error  # that of `datasets` itself says only that there was one
        raise ValueError(
            f"{source} cannot be read by the datasets library: {type(cause).__name__}: {cause}"
        ) from error
    if isinstance(rows, dict):
        if split not in rows:
            names = list(rows)
            if len(names) != 1:
                raise ValueError(
                    f"{source} has the splits {', '.join(names)}, and no {split}: give the folder or file of one."
                )
            print(f"{source} has no split {split!r}; its rows are those of {names[0]!r}", flush=True)
            split = names[0]
        rows = rows[split]
    for name, feature in rows.features.items():
        if isinstance(feature, ImageFeature):
            rows = rows.cast_column(name, ImageFeature(decode=False))
        elif isinstance(getattr(feature, "feature", None), ImageFeature):
            rows = rows.cast_column(name, List(ImageFeature(decode=False)))
    return rows


# --- one row


def first_of_dialogue(messages: list[dict]) -> int:
    """The number of the first message that is not of the system."""
    return next((i for i, message in enumerate(messages) if message["role"] != "system"), 0)


def read_conversation(row: dict) -> tuple[list[dict], list]:
    """Chat messages and images, not yet opened, of a row.

    Raises:
        BadRowError: no conversation, an empty answer, or another number of `<image>` than of images.
    """
    turns = row.get("conversations") or row.get("messages") if isinstance(row, dict) else None
    if isinstance(turns, str):  # as CSV files have lists
        with as_bad_row("no conversation", ValueError):
            turns = json.loads(turns)
    if not isinstance(turns, list) or not turns:
        raise BadRowError("no conversation", "neither `conversations` nor `messages` holds a list of turns")
    messages = [read_turn(turn, number) for number, turn in enumerate(turns)]
    first = first_of_dialogue(messages)
    if messages[first]["role"] == "assistant":  # as in LLaVA: a conversation begins with the human
        del messages[first]
        first = first_of_dialogue(messages)
    answers = [message["content"][-1]["text"] for message in messages if message["role"] == "assistant"]
    if not answers or messages[first]["role"] == "assistant":
        raise BadRowError("no conversation", "no question that is followed by an answer")
    if not all(answers):
        raise BadRowError("empty answer", f"answer {answers.index('')} has no text")
    images = row.get("images") or row.get("image") or []
    images = [image for image in (images if isinstance(images, list) else [images]) if image is not None]
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if images and not parts and "messages" in row:  # TRL's convention: unplaced images open the conversation
        messages[first]["content"][:0] = [{"type": "image"} for _ in images]
    elif len(parts) != len(images):
        hint = "" if images else ": a row lists them in `image` or `images`, not within its messages"
        raise BadRowError("image count", f"{len(parts)} {IMAGE} in the conversation, {len(images)} images{hint}")
    return messages, images


def read_turn(turn: dict, number: int) -> dict:
    """A turn of either format as a chat message whose content is its images, then one text."""
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    role = ROLES.get(role) if isinstance(role, str) else None
    content = turn.get("value", turn.get("content")) if role else None
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadRowError("no conversation", f"turn {number} has no role or no text")
    texts = [part.get("text") or "" for part in content if part.get("type") == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise BadRowError("no conversation", f"turn {number} has a text that is no string")
    num_images = sum(part.get("type") in ("image", "image_url") for part in content)
    num_images += sum(text.count(IMAGE) for text in texts)
    if num_images and role != "user":
        raise BadRowError("image count", f"turn {number}, of the {role}, holds {IMAGE}")
    text = " ".join(text.replace(IMAGE, "").strip() for text in texts).strip()
    return {"role": role, "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def read_picture(image: Image.Image | Path | BinaryIO) -> Image.Image:
    """A picture as the DPVR processor reads one. That of LLaVA does not turn pictures, nor scale 16 bits, and makes a
    transparent colour white: read by this first, it sees the same.

    Raises:
        OSError, ValueError, DecompressionBombError: it cannot be read, or its mode has no known range.
    """
    return decode_picture(image if isinstance(image, Image.Image) else Image.open(image), "The picture")


def source_of(image):
    """Where an image of a row is: the path or the bytes of one as `datasets` has it, the bytes of a `data:` URL in
    base64, or what it is already.

    Raises:
        BadRowError: the URL holds no base64.
    """
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, str) and image.startswith("data:image/"):
        with as_bad_row("corrupt image", ValueError):
            return base64.b64decode(image.partition(";base64,")[2])
    return image


def open_image(image, folder: Path) -> Image.Image:
    """An image of a row, decoded: of `source_of`, paths being below `folder`, or a PIL image.

    Raises:
        BadRowError: it is missing or broken.
    """
    image = source_of(image)
    if isinstance(image, str) and not os.path.isfile(folder / image):
        raise BadRowError("missing image", str(image))
    if not isinstance(image, str | bytes | Image.Image):
        raise BadRowError("corrupt image", f"is no picture: {type(image).__name__}")
    with as_bad_row("corrupt image"):  # codecs fail in ways that have no common class
        if isinstance(image, str):
            image = folder / image
        elif isinstance(image, bytes):
            image = io.BytesIO(image)
        return read_picture(image)


def answer_spans(processor, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the processor's chat template writes it, and where in it the answers stand: each from the
    end of the prompt to the end of its turn, `</s>` included.

    Raises:
        BadRowError: the template writes a turn another way once others follow it: its answer cannot be told apart.
    """

    def write(turns: list[dict], prompt: bool = False) -> str:
        return processor.apply_chat_template(turns, add_generation_prompt=prompt)

    text, spans = write(messages), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, until = write(messages[:number], prompt=True), write(messages[: number + 1])
        if not (text.startswith(until) and until.startswith(prompt)):
            raise BadRowError(
                "template", f"the chat template writes turn {number} in another way once others follow it"
            )
        spans.append((len(prompt), len(until)))
    return text, spans


def encode(processor, messages: list[dict], images: list[Image.Image], max_length: int) -> dict[str, torch.Tensor]:
    """A row as the model takes it, and its labels: -100 but at the tokens of answers.

    Returns:
        `input_ids`, `mm_token_type_ids` and `labels` `(T,)`, and `pixel_values` `(images, 3, H, W)` if there are any.

    Raises:
        BadRowError: it has more than `max_length` tokens, or the template cannot be followed.
    """
    with as_bad_row("template", ValueError):  # turns in an order that it does not take
        text, spans = answer_spans(processor, messages)
    tokenizer, image_id = processor.tokenizer, processor.image_token_id
    # As `apply_chat_template` of a processor has it: a template may write the token that begins a sequence itself
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    # One token for each image, as yet
    short = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not begins)
    is_answer = torch.tensor([any(a <= i and j <= b and i < j for a, b in spans) for i, j in short["offset_mapping"]])
    if len(is_answer) > max_length:
        raise BadRowError("too long", f"{len(is_answer)} tokens without those of images, more than {max_length}")
    try:
        encoded = processor(images=images or None, text=text, return_tensors="pt", add_special_tokens=not begins)
    except ValueError as error:
        is_too_long = "`tokenizer.model_max_length`" in str(error)  # as the processor says of a prompt
        raise BadRowError("too long" if is_too_long else "refused by the processor", str(error)) from error
    row = {name: encoded[name][0] for name in ("input_ids", "mm_token_type_ids")}
    num_image_tokens = int((row["input_ids"] == image_id).sum())
    repeats = torch.ones(len(is_answer), dtype=torch.long)
    repeats[torch.tensor(short["input_ids"]) == image_id] = num_image_tokens // max(len(images), 1)
    is_answer = is_answer.repeat_interleave(repeats)
    if len(is_answer) != len(row["input_ids"]):
        raise BadRowError(
            "template", f"{len(row['input_ids'])} tokens, but their places in the text give {len(is_answer)}"
        )
    if len(is_answer) > max_length:
        raise BadRowError("too long", f"{len(is_answer)} tokens, more than {max_length}")
    row["labels"] = torch.where(is_answer, row["input_ids"], IGNORED)
    if images:
        row["pixel_values"] = encoded["pixel_values"]
    return row


# --- all rows


class BadRows:
    """The rows that could not be trained on, in a file of JSON lines: `row` (number), `id`, `reason`, `detail`.

    Processes that load data append whole lines; a row that several epochs or processes met is counted once.

    Args:
        path: of the file.
        fresh: whether to begin it anew.
    """

    def __init__(self, path: str | Path, fresh: bool = True):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            self.path.unlink(missing_ok=True)
        self.seen, self.end = set(), 0
        self._catch_up()

    def _catch_up(self) -> None:
        """Takes note of the lines that other processes have added, such as those that load data."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.end)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self.end += len(whole)
        self.seen |= {line["row"] for line in self._parse(whole.decode(errors="replace"))}

    def add(self, number: int, rows, error: BadRowError) -> None:
        """Row `number` of `rows`, which may be so broken that it cannot be read again."""
        if number not in self.seen:
            self._catch_up()
        if number in self.seen:
            return
        self.seen.add(number)
        name = None
        with contextlib.suppress(Exception):
            name = rows[number].get("id")
        self._append({"row": number, "id": name, "reason": error.reason, "detail": error.detail[:MAX_DETAIL]})

    def add_all(self, other: "BadRows") -> None:
        """Those of another file that are not in this one."""
        for line in other.lines():
            if line["row"] not in self.seen:
                self.seen.add(line["row"])
                self._append(line)

    def _append(self, line: dict) -> None:
        with names_file(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def lines(self) -> list[dict]:
        """What the file holds, but for lines that a full disk or a kill has cut off."""
        return self._parse(self.path.read_text(encoding="utf-8")) if self.path.exists() else []

    @staticmethod
    def _parse(text: str) -> list[dict]:
        lines = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict) and "row" in line]

    def reasons(self) -> dict[int, str]:
        """Reason by number of the row."""
        return {line["row"]: line["reason"] for line in self.lines()}

    def summary(self) -> str:
        counts = Counter(self.reasons().values())
        listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        return f"{counts.total()} bad rows ({listed}), listed in {self.path}" if counts else "no bad rows"


class ConversationDataset(Dataset):
    """Rows of `read_rows`, encoded when they are asked for.

    What is wrong with the text of a row, and which image files do not exist, is found out at once, for all rows;
    broken images and rows that are too long, when they are loaded: the next good row then stands in for them, so that
    every epoch has the same number of steps.

    Args:
        rows: as from `read_rows`.
        processor: `DPVRProcessor`.
        image_folder: what the image paths of the rows start from.
        bad_rows: where to report.
        max_length: most tokens of a row.

    Attributes:
        good: numbers of the rows that are not known to be bad.
        sizes: bytes of the picture files of a row, by its number.

    Raises:
        ValueError: no row is any good; the message has the first reasons.
    """

    def __init__(self, rows, processor, image_folder: Path, bad_rows: BadRows, max_length: int):
        self.rows, self.processor, self.folder = rows, processor, Path(image_folder)
        self.bad_rows, self.max_length = bad_rows, max_length
        self.good, self.sizes = [], {}
        for number in tqdm(range(len(rows)), desc="checking rows", mininterval=1, disable=None):
            try:
                self.check(number)
                self.good.append(number)
            except BadRowError as error:
                bad_rows.add(number, rows, error)
        if not self.good:
            raise ValueError(f"None of {len(rows)} rows can be trained on: {bad_rows.summary()}.")

    @as_bad_row("malformed")
    def check(self, number: int) -> None:
        _, images = read_conversation(self.rows[number])
        sizes = []
        for image in images:
            path = source_of(image)
            if isinstance(path, str):
                if not os.path.isfile(self.folder / path):
                    raise BadRowError("missing image", path)
                sizes.append(os.path.getsize(self.folder / path))
        if sizes:
            self.sizes[number] = sizes

    def hold_back(self, num_rows: int) -> "ConversationDataset":
        """The last `num_rows` rows, which this dataset then no longer has.

        Raises:
            ValueError: nothing would be left.
        """
        if num_rows >= len(self.good):
            raise ValueError(f"Holding back {num_rows} of {len(self.good)} rows leaves nothing to train on.")
        held_back = copy.copy(self)
        held_back.good, self.good = self.good[-num_rows:], self.good[:-num_rows]
        return held_back

    def __len__(self) -> int:
        return len(self.good)

    def lengths(self) -> list[int]:
        """About how long each row is, from its words and the number of its images, as LLaVA has it: to group rows of
        like length, which need not be loaded for it."""
        lengths = []
        for number in self.good:
            messages, images = read_conversation(self.rows[number])
            words = sum(len(message["content"][-1]["text"].split()) for message in messages)
            lengths.append(words + IMAGE_WORDS * len(images))
        return lengths

    def num_rows(self) -> int:
        """Rows that turned out good so far."""
        return len(set(self.good) - self.bad_rows.reasons().keys())

    @as_bad_row("malformed")
    def load(self, number: int) -> dict[str, torch.Tensor]:
        """Row `number` of the source, encoded.

        Raises:
            BadRowError
        """
        messages, images = read_conversation(self.rows[number])
        opened = [open_image(image, self.folder) for image in images]
        return encode(self.processor, messages, opened, self.max_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)  # which ends a loop over the rows
        for step in range(len(self.good)):
            number = self.good[(index + step) % len(self.good)]
            if number in self.bad_rows.seen:
                continue
            try:
                return self.load(number)
            except BadRowError as error:
                self.bad_rows.add(number, self.rows, error)
        raise ValueError(f"No row is left of the {len(self.good)} to be used here: {self.bad_rows.summary()}.")


class Collator:
    """Rows of `ConversationDataset` as a batch, padded on the right.

    Returns:
        `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` `(B, T)`, and `pixel_values` `(images, 3, H, W)`
        if a row has an image.
    """

    def __init__(self, pad_token_id: int):
        self.padding = {"input_ids": pad_token_id, "mm_token_type_ids": 0, "labels": IGNORED}

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        def pad(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        batch = {name: pad([row[name] for row in rows], value) for name, value in self.padding.items()}
        batch["attention_mask"] = pad([torch.ones_like(row["input_ids"]) for row in rows], 0)
        images = [row["pixel_values"] for row in rows if "pixel_values" in row]
        if images:
            batch["pixel_values"] = torch.cat(images)
        return batch
