# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
The results of a model's frozen part, on disk: computed once, read in every later epoch and run.

    DIR/index.json                      what the features were made from, and how many rows a shard takes
    DIR/features-00000.safetensors      rows 0 .. R-1 of the data, one after the other, without padding, and a checksum
                                        of each, which is compared whenever the row is read
    DIR/features-00001.safetensors      ...
    DIR/bad_rows.jsonl                  the rows that turned out bad, and are in no shard

A shard is there in full or not at all, so whatever stopped a run, the next goes on with the shards that lack. Rotary
positions and masks follow from the lengths, and are not stored; nor are the dense model's logits, which its final
states give (D numbers for a token instead of V).
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from xxhash import xxh3_64

from read_weights import is_finite
from scripts.output import written_whole
from training.adapters import base_state
from training.data import BadRowError, BadRows, Collator, ConversationDataset
from training.staged import IGNORED, StagedModel, split_rows

INDEX, BAD_ROWS = "index.json", "bad_rows.jsonl"
SHARD_BYTES = 512 * 2**20
SAMPLED_ROWS = 32  # whose sizes foretell that of all
SAMPLED_VALUES = 64  # of each weight, for the fingerprint
LEFT_AFTER_SECONDS = 3600  # an unfinished shard that nobody has written to for so long was left by a kill
# Fields of configs and processors on which features do not depend
BESIDE_THE_POINT = {
    "num_side_layers",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "architectures",
    "auto_map",
    "chat_template",
    "tokenizer",
    "use_cache",
    "_attn_implementation",
}


class CacheError(RuntimeError):
    """Features that cannot be written, or were made from something else; the message says what to do."""


# --- what features depend on


def digest(*parts: bytes) -> str:
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def weights_digest(model: StagedModel) -> str:
    """Of name, shape and evenly spaced values of every weight of the model that is frozen."""
    parts = []
    for name, weight in sorted(base_state(model.base).items()):
        if "side_branch" in name:
            continue
        values = weight.detach().flatten()
        chosen = torch.linspace(0, len(values) - 1, SAMPLED_VALUES, dtype=torch.float64).long()
        parts += [f"{name} {tuple(weight.shape)}".encode(), values[chosen.to(values.device)].float().cpu().numpy()]
    return digest(*parts)


def data_digest(dataset: ConversationDataset) -> str:
    """Of the rows' text and the names of their images, or the pictures themselves where rows hold them."""
    rows = dataset.rows
    if hasattr(rows, "_fingerprint"):  # of the datasets library
        return digest(rows._fingerprint.encode(), str(len(rows)).encode())
    return digest(*(json.dumps(rows[number], sort_keys=True).encode() for number in dataset.good))


def pictures_digest(dataset: ConversationDataset) -> str:
    """Of the sizes of the picture files, whose pixels are not read: those of another folder tell themselves apart."""
    return digest(*(json.dumps([number, dataset.sizes.get(number)]).encode() for number in dataset.good))


def fingerprint(model: StagedModel, dataset: ConversationDataset, dtype: torch.dtype) -> dict:
    """All that features depend on, by names a user understands."""
    processor, config = dataset.processor, model.config
    return {
        "dtype": str(dtype).removeprefix("torch."),  # first: another one rounds the weights to others
        "weights": weights_digest(model),
        "saturation_layer": config.saturation_layer,
        "num_fusion_layers": config.num_fusion_layers,
        "config": digest(_fields(config)),
        "processor": digest(
            _fields(processor), str(processor.chat_template).encode(), _vocabulary(processor.tokenizer)
        ),
        "data": data_digest(dataset),
        "picture_files": pictures_digest(dataset),
        "rows": len(dataset),
        "max_length": dataset.max_length,
        "pictures": "upright, of 8 bits",  # as `read_picture` makes them
        "teacher": model.loss == "distill",
        "checksums": "xxh3_64 of each row",
    }


def _fields(stated) -> bytes:
    """What a config, or a processor with its image processor, states on any level of what features depend on."""

    def kept(value):
        if isinstance(value, dict):
            return {name: kept(part) for name, part in value.items() if name not in BESIDE_THE_POINT}
        return value

    return json.dumps(kept(stated.to_dict()), sort_keys=True, default=str).encode()


def _vocabulary(tokenizer) -> bytes:
    return json.dumps(sorted(tokenizer.get_vocab().items())).encode()


# --- writing


def row_bytes(num_tokens: int, num_answers: int, hidden_size: int, itemsize: int, with_teacher: bool) -> int:
    """Bytes of one row in a shard: states, kind and label of each token, teacher states of the answers' tokens."""
    return num_tokens * (hidden_size * itemsize + 1 + 8) + with_teacher * num_answers * hidden_size * itemsize + 24


def estimate_row(model: StagedModel, dataset: ConversationDataset, dtype: torch.dtype) -> float:
    """Mean bytes of a row, from rows spaced evenly over the data."""
    sizes = []
    for index in np.linspace(0, len(dataset) - 1, min(SAMPLED_ROWS, len(dataset))).astype(int):
        row = dataset[int(index)]
        answers = int((row["labels"] != IGNORED).sum())
        hidden_size = model.config.text_config.hidden_size
        sizes.append(row_bytes(len(row["labels"]), answers, hidden_size, dtype.itemsize, model.loss == "distill"))
    return float(np.mean(sizes))


def find_index(folder: Path, expected: dict) -> dict | None:
    """The index of `folder`, if there is one.

    Raises:
        CacheError: it was made from something else, or is broken.
    """
    if not (folder / INDEX).exists():
        return None
    index = read_index(folder)
    for name, value in expected.items():
        if name not in index["fingerprint"]:
            raise CacheError(
                f"The features in {folder} were made by an earlier version, which did not note their {name}. Give "
                "another folder, or delete this one."
            )
        if index["fingerprint"][name] != value:
            raise CacheError(
                f"The features in {folder} were made with {name} {index['fingerprint'][name]!r}, but this run "
                f"has {value!r}. Give another folder, or delete this one."
            )
    return index


def open_index(folder: Path, expected: dict, bytes_per_row: float, num_rows: int, is_told: bool = True) -> dict:
    """The index of `folder`; made if there is none. Prints what is to be computed and its size, unless `is_told` is
    False.

    Raises:
        CacheError: it was made from something else, or the disk cannot hold what is missing.
    """
    path = folder / INDEX
    index = find_index(folder, expected)
    if index is None:
        rows_per_shard = max(1, int(SHARD_BYTES // bytes_per_row))
        index = {"fingerprint": expected, "rows_per_shard": rows_per_shard, "num_rows": num_rows}
    missing = [shard for shard in range(num_shards(index)) if not shard_path(folder, shard).exists()]
    needed, free = bytes_per_row * index["rows_per_shard"] * len(missing), shutil.disk_usage(folder).free
    needed = min(needed, bytes_per_row * num_rows)
    if missing and is_told:
        print(
            f"Features of {num_rows:,} rows: about {bytes_per_row * num_rows / 1e9:.3g} GB in {num_shards(index)} "
            f"shard(s), of which {len(missing)} ({needed / 1e9:.3g} GB) are still to be computed; "
            f"{free / 1e9:.3g} GB are free in {folder}",
            flush=True,
        )
    if needed > free:
        raise CacheError(
            f"The features need about {needed / 1e9:.3g} GB more, but {folder} has {free / 1e9:.3g} GB free. Nothing "
            "was written: give a folder on a larger disk, or fewer rows."
        )
    if not path.exists():
        write_whole(path, (json.dumps(index, indent=2) + "\n").encode())
    return index


def read_index(folder: Path) -> dict:
    """
    Raises:
        CacheError: it is broken.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
        numbers = (index["num_rows"], index["rows_per_shard"])
        is_whole = all(type(each) is int and each > 0 for each in numbers)
        is_whole = is_whole and index["fingerprint"]["rows"] == index["num_rows"]
    except (ValueError, TypeError, KeyError):
        is_whole = False
    if not is_whole:
        raise CacheError(
            f"{path} is damaged: it does not say what the features beside it were made from. Give another folder, or "
            "delete this one: the same command computes it anew."
        )
    return index


def index_digest(index: dict) -> str:
    """By which shards of other features, or of other lengths, are told apart."""
    return digest(json.dumps(index, sort_keys=True).encode())


def num_shards(index: dict) -> int:
    return -(-index["num_rows"] // index["rows_per_shard"])


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"features-{shard:05}.safetensors"


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there in full or not at all.

    Raises:
        CacheError: the disk is full; what had been written of the file is gone.
    """
    try:
        with written_whole(path) as new, new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CacheError(
            f"The disk of {path.parent} is full: {path.name} needs {len(content) / 1e9:.3g} GB. What was finished "
            "before is kept: make room and run the same command again."
        ) from error


def remove_leavings(path: Path) -> None:
    """What a process that was killed has written of a file; not what another run may be writing just now."""
    for left in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > LEFT_AFTER_SECONDS:
                left.unlink()


class _Loaded(Dataset):
    """Rows of a `ConversationDataset`, None in the place of a bad one, which is reported to `bad_rows`."""

    def __init__(self, dataset: ConversationDataset, bad_rows: BadRows):
        self.dataset, self.bad_rows = dataset, bad_rows

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor] | None:
        number = self.dataset.good[index]
        try:
            return self.dataset.load(number)
        except BadRowError as error:
            self.bad_rows.add(number, self.dataset.rows, error)
            return None


def compute_rows(model: StagedModel, batches: DataLoader, dtype: torch.dtype, bar: tqdm) -> list[dict]:
    """The features of all rows of `batches`, in memory of the CPU."""
    device = model.core.language_model.norm.weight.device
    is_mixed = dtype != torch.float32  # as the Trainer has it, which may hold frozen weights of this dtype too
    rows = []
    for batch, size in batches:
        if batch is not None:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=is_mixed):
                features = model.compute_features(**batch)
            rows += [{name: tensor.cpu() for name, tensor in row.items()} for row in split_rows(features)]
        bar.update(size)
    return rows


def cache_features(
    folder: str | Path,
    model: StagedModel,
    dataset: ConversationDataset,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Path:
    """Computes what is missing of the features of `dataset` in `folder`.

    Args:
        model: whose frozen part makes them, on its device; with the dense model's states if its loss is `distill`.
        dtype: in which they are computed, under autocast unless it is float32, and stored; by default that of the
            frozen weights.
        batch_size: rows in one call.
        num_workers: processes that read images.
        rank, world_size: of this process; each makes its share of the shards.

    Raises:
        CacheError: the folder holds features of something else, or the disk cannot hold them.
        ValueError: something before the fusion layers trains, so that features change from step to step.
    """
    if not model.features_frozen:
        raise ValueError("Features cannot be kept: something before the fusion layers trains, and would change them.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.core.language_model.norm.weight.dtype
    expected = fingerprint(model, dataset, dtype)
    find_index(folder, expected)  # before rows are loaded, whose sizes are asked for
    index = open_index(folder, expected, estimate_row(model, dataset, dtype), len(dataset), rank == 0)
    bad_rows = BadRows(folder / BAD_ROWS, fresh=False)
    loaded, collate = _Loaded(dataset, bad_rows), _GoodRows(Collator(dataset.processor.tokenizer.pad_token_id))
    shards = [s for s in range(rank, num_shards(index), world_size) if not shard_path(folder, s).exists()]
    spans = [range(s * index["rows_per_shard"], min((s + 1) * index["rows_per_shard"], len(loaded))) for s in shards]
    was_training = model.training
    model.eval()
    with tqdm(total=sum(map(len, spans)), desc="computing features", mininterval=1, disable=rank > 0) as bar:
        for shard, span in zip(shards, spans, strict=True):
            remove_leavings(shard_path(folder, shard))
            batches = DataLoader(Subset(loaded, span), batch_size, collate_fn=collate, num_workers=num_workers)
            rows = compute_rows(model, batches, dtype, bar)
            packed = pack_rows(rows, dtype, model.config.text_config.hidden_size)
            for name, tensor in packed.items():
                if tensor.is_floating_point() and not is_finite(tensor):
                    raise CacheError(
                        f"{shard_path(folder, shard)} is not written: its {name}, computed in {dtype}, would hold "
                        "NaN or infinite values, from which nothing is learned. Compute them in another type (--bf16, "
                        "or float32 without it) into another folder, or look for such values in the model's weights."
                    )
            write_whole(shard_path(folder, shard), save(packed, {"index": index_digest(index)}))
    model.train(was_training)
    dataset.bad_rows.add_all(bad_rows)
    return folder


class _GoodRows:  # a class, not a closure, so that worker processes can be sent it
    """A collator that leaves out rows that are None, and tells how many rows there were."""

    def __init__(self, collate: Collator):
        self.collate = collate

    def __call__(self, rows: list) -> tuple[dict | None, int]:
        good = [row for row in rows if row is not None]
        return (self.collate(good) if good else None), len(rows)


def row_checksum(row: dict[str, torch.Tensor]) -> int:
    checksum = xxh3_64()
    for name, tensor in sorted(row.items()):
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        checksum.update(tensor.contiguous().view(torch.uint8).numpy())
    return checksum.intdigest()


def pack_rows(rows: list[dict[str, torch.Tensor]], dtype: torch.dtype, hidden_size: int) -> dict[str, torch.Tensor]:
    """Rows of `split_rows` end to end, their checksums, and the lengths that tell them apart."""
    states = torch.empty(0, hidden_size, dtype=dtype)
    empty = {"hidden_states": states, "is_vision": torch.empty(0, dtype=torch.bool)}
    empty |= {"labels": torch.empty(0, dtype=torch.long), "teacher_states": states}
    rows = [{name: x.to(dtype) if x.is_floating_point() else x for name, x in row.items()} for row in rows]
    names = rows[0].keys() if rows else empty
    packed = {name: torch.cat([row[name] for row in rows]) if rows else empty[name] for name in names}
    packed["tokens"] = torch.tensor([len(row["labels"]) for row in rows], dtype=torch.long)
    packed["answers"] = torch.tensor([len(row.get("teacher_states", ())) for row in rows], dtype=torch.long)
    packed["checksums"] = torch.tensor([row_checksum(row) for row in rows], dtype=torch.uint64)
    return {name: tensor.contiguous() for name, tensor in packed.items()}


# --- reading


class CachedFeatures(Dataset):
    """Rows of a folder that `cache_features` filled, for `collate_rows`. Nothing is in memory but what is asked for.

    Raises:
        CacheError: shards are missing or broken.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.paths = [shard_path(self.folder, shard) for shard in range(num_shards(index))]
        missing = [path.name for path in self.paths if not path.exists()]
        if missing:
            raise CacheError(f"{self.folder} lacks {len(missing)} of {len(self.paths)} shards, {missing[0]} first.")
        self.tokens, self.answers, self.checksums, self.starts = [], [], [], [0]
        expected = index_digest(index)
        for path in self.paths:
            with _names_shard(path), safe_open(path, framework="pt") as file:
                made_for = (file.metadata() or {}).get("index")
                if made_for != expected:
                    raise ValueError(f"it was written for the {INDEX} {made_for}, but the one beside it is {expected}")
                tokens, answers = file.get_tensor("tokens"), file.get_tensor("answers")
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                _check_lengths(tokens, answers, shapes)
                self.checksums.append(file.get_tensor("checksums").tolist())
            self.tokens.append(_ends(tokens))
            self.answers.append(_ends(answers))
            self.starts.append(self.starts[-1] + len(tokens))
        self.files = {}

    def __len__(self) -> int:
        return self.starts[-1]

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [end - start for ends in self.tokens for start, end in pairwise(ends)]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "files": {}}  # a process that loads data opens its own

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self.starts, index) - 1
        row = index - self.starts[shard]
        tokens = slice(*self.tokens[shard][row : row + 2])
        answers = slice(*self.answers[shard][row : row + 2])
        with _names_shard(self.paths[shard]):
            if shard not in self.files:
                self.files[shard] = safe_open(self.paths[shard], framework="pt")
            file = self.files[shard]
            names = {"hidden_states", "is_vision", "labels", "teacher_states"} & set(file.keys())
            features = {name: file.get_slice(name)[answers if name == "teacher_states" else tokens] for name in names}
            if row_checksum(features) != self.checksums[shard][row]:
                raise ValueError(f"row {row} in it does not have the checksum that it was written with")
        return features


@contextlib.contextmanager
def _names_shard(path: Path):
    """Has the error of a shard that is damaged name it.

    Raises:
        CacheError
    """
    try:
        yield
    except (SafetensorError, ValueError) as error:
        raise CacheError(f"{path} cannot be read: {error}. Delete it: the same command computes it anew.") from error


def _check_lengths(tokens: torch.Tensor, answers: torch.Tensor, shapes: dict[str, list[int]]) -> None:
    """Raises ValueError where a shard's tensors are not as long as all its rows together."""
    if any(lengths.dtype != torch.long or lengths.ndim != 1 or (lengths < 0).any() for lengths in (tokens, answers)):
        raise ValueError("its lengths of rows are none")
    expected = dict.fromkeys(("hidden_states", "is_vision", "labels"), int(tokens.sum()))
    expected |= {"answers": len(tokens), "checksums": len(tokens)}
    if "teacher_states" in shapes or answers.any():
        expected["teacher_states"] = int(answers.sum())
    for name, length in expected.items():
        if shapes.get(name, [None])[:1] != [length]:
            raise ValueError(f"{name} has the shape {shapes.get(name)}, but its rows have {length} in all")


def _ends(lengths: torch.Tensor) -> list[int]:
    return [0, *lengths.cumsum(0).tolist()]
