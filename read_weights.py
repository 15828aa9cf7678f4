# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Weight files of a checkpoint, read tensor by tensor in small pieces, and trusted in nothing.

The header of a safetensors file is read here and not by its library, which tells neither where a tensor's bytes lie,
so that they could be copied in pieces, nor which key and which two numbers of a broken file disagree. Pickled weights
are read by torch's `weights_only` loader, which runs no code.
"""

import fnmatch
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

from scripts.checksums import leads_out

PIECE_BYTES = 2**20  # large enough that threads seldom hand one on
MAX_HEADER_BYTES = 10**8  # safetensors' own limit
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1}
ITEM_BYTES |= {"F8_E5M2FNUZ": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "C64": 8}
ITEM_BYTES |= {name: dtype.itemsize for name, dtype in FLOATS.items()}
OTHER_FILES = {  # how files begin that pose as weights, and what they are
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"<!DOCTYPE": "a web page",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstandard archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x80\x02": "a bare pickle, as torch before 1.6 wrote it; save it again with a newer torch",
}
PARTS = {  # files of what is published in place of a checkpoint, and what to convert instead
    "adapter_config.json": "It is an adapter: merge it into its base (with PEFT's merge_and_unload, or LLaVA's "
    "scripts/merge_lora_weights.py) and convert that; a side branch is for --adapter.",
    "mm_projector.bin": "It is a projector alone: convert a model that was fine-tuned with it.",
    "*.gguf": "It holds GGUF files, which other programs read: convert the checkpoint that they were made from.",
}


class ConversionError(ValueError):
    """A source or an option that cannot be converted; the message says what and why in one sentence."""


def reason(error: Exception) -> str:
    """The first line of an error's message and what it announces, or the error's type where it has none."""
    lines = [line.rstrip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def advice(files: Iterable[str]) -> str:
    """What to do with files that are no checkpoint, as the end of a message; nothing where that is not known."""
    return next((f" {what}" for pattern, what in PARTS.items() if fnmatch.filter(files, pattern)), "")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path.parent} has no {path.name}.") from error
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not valid JSON: {reason(error)}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


# ---------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of the source lies.

    Attributes:
        path, key: its file, and its name there.
        shape: as stored.
        dtype: as stored; None for types that are no weights, such as integers.
        stated_dtype: name of that type in the file.
        offset: first byte in a safetensors file; None in a pickled one.
        version: of its file when this was read, see `version_of`.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    stated_dtype: str
    offset: int | None = None
    version: tuple[int, int, int] | None = None

    def pieces(self) -> Iterator[torch.Tensor]:
        """Its numbers in order, in one-dimensional tensors of at most `PIECE_BYTES`."""
        if self.offset is None:
            yield from load_pickled(self.path)[self.key].contiguous().flatten().split(PIECE_BYTES // 8)
            return
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, num_bytes, PIECE_BYTES):
                piece = torch.empty(min(num_bytes - start, PIECE_BYTES), dtype=torch.uint8)
                if not _read_into(file, memoryview(piece.numpy())):
                    raise ConversionError(f"{self.path} ended within {self.key}: it was changed while it was read.")
                yield piece.view(self.dtype)

    def load(self) -> torch.Tensor:
        """All of it in memory, which nothing else refers to."""
        tensor, done = torch.empty(math.prod(self.shape), dtype=self.dtype), 0
        for piece in self.pieces():
            tensor[done : done + len(piece)] = piece
            done += len(piece)
        return tensor.view(self.shape)


def _read_into(file, buffer: memoryview) -> bool:
    done = 0
    while done < len(buffer) and (count := file.readinto(buffer[done:])):
        done += count
    return done == len(buffer)


@dataclass(frozen=True)
class MadeTensor:
    """A tensor that no file holds: what it is, in words, how it is made, and what is read for it."""

    origin: str
    make: Callable[[], torch.Tensor]
    read: StoredTensor | None = None

    def pieces(self) -> Iterator[torch.Tensor]:
        yield from self.make().flatten().split(PIECE_BYTES // 4)


@dataclass(frozen=True)
class Weight:
    """One tensor of the output: its name and shape, and what it is read from."""

    name: str
    shape: tuple[int, ...]
    source: StoredTensor | MadeTensor

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def origin(self) -> str:
        source = self.source
        return source.origin if isinstance(source, MadeTensor) else f"{source.key} in {source.path}"

    def pieces(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Its numbers in order, cast to `dtype`, in one-dimensional tensors.

        Raises:
            ConversionError: if a finite number is not finite any more in `dtype`.
        """
        for piece in self.source.pieces():
            result = piece.to(dtype)
            if piece.dtype != dtype and not is_finite(result) and (piece.isfinite() & ~result.isfinite()).any():
                number, name = piece[piece.isfinite()].abs().max().item(), str(dtype).removeprefix("torch.")
                limit = torch.finfo(dtype).max
                raise ConversionError(
                    f"{self.name} ({self.origin}) holds numbers beyond the range of {name}: up to {number:.4g}, which "
                    f"ends at {limit:.4g}; convert with another --dtype."
                )
            yield result


def is_finite(piece: torch.Tensor) -> bool:
    """Whether all numbers are; `aminmax` passes NaN on and is many times faster than `isfinite`."""
    return not piece.numel() or all(math.isfinite(number) for number in piece.aminmax())


# ---------------------------------------------------------------------------------------------- one file


def version_of(status: os.stat_result) -> tuple[int, int, int]:
    """Size, time of change and inode."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, by its header alone.

    Raises:
        ConversionError: naming the file, the key and the values that disagree, unless the tensors fill the file
            exactly, one behind the other.
    """
    header, data_start, version = _read_header(path)
    file_bytes = version[0]
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConversionError(f"{path}: __metadata__ in its header is {metadata!r:.80}, not names with strings.")
    spans = {key: _read_entry(path, key, entry) for key, entry in header.items()}
    data_bytes = file_bytes - data_start
    if sum(stop - begin for _, _, begin, stop in spans.values()) <= data_bytes:  # else it is truncated
        for key, (_, _, begin, stop) in spans.items():
            if stop > data_bytes:
                raise ConversionError(f"{path}: {key} spans bytes {begin} to {stop}, but there are only {data_bytes}.")
    end, last = 0, "the header"
    for key, (_, _, begin, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != end:
            kind = "overlaps" if begin < end else "leaves a gap behind"
            raise ConversionError(f"{path}: {key} begins at byte {begin}, which {kind} {last}, which ends at {end}.")
        end, last = stop, key
    if data_start + end != file_bytes:
        kind = "is truncated" if data_start + end > file_bytes else "has bytes that belong to no tensor"
        raise ConversionError(
            f"{path} {kind}: by its header it ends with {last} at byte {data_start + end}, but it has {file_bytes} "
            "bytes."
        )
    return {
        key: StoredTensor(path, key, shape, FLOATS.get(dtype), dtype, data_start + begin, version)
        for key, (dtype, shape, begin, _) in spans.items()
    }, metadata


def _read_header(path: Path) -> tuple[dict, int, tuple[int, int]]:
    """The header, where it ends, and the version of the file."""
    try:
        with path.open("rb") as file:
            version, start = version_of(os.fstat(file.fileno())), file.read(8)
            file_bytes, length = version[0], int.from_bytes(start, "little")
            limit = min(file_bytes - 8, MAX_HEADER_BYTES)
            text = file.read(length) if 0 < length <= limit else b""
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}.") from error
    if kind := posing_as_weights(path):
        raise ConversionError(f"{path} cannot be read: it is no safetensors file but {kind}.")
    if len(start) < 8:
        raise ConversionError(f"{path} cannot be read: it has {file_bytes} bytes, too few for a safetensors file.")
    if not text:
        raise ConversionError(
            f"{path} cannot be read: it states a header of {length} bytes, but only 1 to {limit} can be."
        )
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=partial(_unique, path))
    except ConversionError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read: its header is not valid JSON: {reason(error)}") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{path} cannot be read: its header is a {type(header).__name__}, not a JSON object.")
    return header, 8 + length, version


def _unique(path: Path, pairs: list[tuple]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConversionError(f"{path}: its header names {twice} {keys.count(twice)} times.")
    return content


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _read_entry(path: Path, key: str, entry) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, first byte and end of a tensor, as its entry in the header says."""
    if not isinstance(entry, dict):
        raise ConversionError(f"{path}: the header's entry of {key} is {entry!r:.80}, not a JSON object.")
    dtype, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ConversionError(f"{path}: {key} has dtype {dtype!r:.80}, none of {', '.join(ITEM_BYTES)}.")
    if not isinstance(shape, list) or len(shape) > 64 or not all(_is_count(size) for size in shape):
        raise ConversionError(f"{path}: {key} has shape {shape!r:.80}, not a list of sizes.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise ConversionError(f"{path}: {key} has data_offsets {offsets!r:.80}, not a first byte and an end.")
    begin, end = offsets
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != num_bytes:
        raise ConversionError(
            f"{path}: {key} of shape {tuple(shape)} in {dtype} has {num_bytes} bytes, but its data_offsets {begin} "
            f"and {end} span {end - begin}."
        )
    return dtype, tuple(shape), begin, end


def posing_as_weights(path: Path) -> str | None:
    """What a file is that is neither safetensors nor torch's, if its first bytes say so."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}.") from error
    if not start:
        return "an empty file"
    if start[257:262] == b"ustar":
        return "a tar archive"
    return next((what for magic, what in OTHER_FILES.items() if start.startswith(magic)), None)


@lru_cache(maxsize=64)
def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .bin file, mapped into memory until `cache_clear`."""
    kind = posing_as_weights(path)
    if kind != "a zip archive":  # torch.save writes one
        what = f"it is {kind}" if kind else "it is no archive of torch.save"
        raise ConversionError(f"{path} cannot be read: {what}; what it may have pickled is never executed.")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # broken pickles and archives fail in every way there is
        if type(error).__name__ == "UnpicklingError":
            raise ConversionError(
                f"{path} holds pickled objects other than tensors; they are never executed."
            ) from error
        raise ConversionError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(tensors, dict):
        raise ConversionError(f"{path} holds a {type(tensors).__name__}, not a dictionary of tensors.")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(f"{path} holds a {type(value).__name__} at {key!r:.80}, not a tensor.")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ConversionError(f"{path}: {key} is no plain tensor: {value.layout}, {value.dtype}, {value.device}.")
    return dict(tensors)


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by their names there, without their numbers."""
    if path.suffix != ".bin":
        return read_safetensors(path)[0]
    names, version = {dtype: name for name, dtype in FLOATS.items()}, version_of(path.stat())
    return {
        key: StoredTensor(
            path,
            key,
            tuple(tensor.shape),
            tensor.dtype if tensor.dtype in names else None,
            names.get(tensor.dtype, str(tensor.dtype)),
            version=version,
        )
        for key, tensor in load_pickled(path).items()
    }


def check_dtype(tensor: StoredTensor) -> None:
    if tensor.dtype is None:
        raise ConversionError(
            f"{tensor.key} in {tensor.path} has dtype {tensor.stated_dtype}, but weights have one of "
            f"{', '.join(FLOATS)}; convert a checkpoint that is not quantized."
        )


# ---------------------------------------------------------------------------------------------- the files of a folder


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a checkpoint, safetensors before .bin, and in which of them its index, if it has one, says
    that each tensor lies."""
    for name in ("model.safetensors", "pytorch_model.bin"):  # in the order in which transformers looks for them
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            check_inside(folder, folder / name)
            return [folder / name], {}
        if index.is_file():
            weight_map = _read_weight_map(index)
            return [folder / file for file in sorted(set(weight_map.values()))], weight_map
    raise ConversionError(
        f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor the index of either."
        f"{advice(os.listdir(folder))}"
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: weight_map is {weight_map!r:.80}, not names of tensors with files.")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    checked = set()
    for key, file in weight_map.items():
        if isinstance(file, str) and file in checked:
            continue
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffix):
            raise ConversionError(f"{index} has {key} in {file!r:.300}, which is not a file of that folder.")
        if not os.path.isfile(index.parent / file):  # False for a name that is too long, too
            raise ConversionError(f"{index} has {key} in {file!r:.300}, which is not a file of that folder.")
        check_inside(index.parent, index.parent / file, f"; {index.name} has {key} there")
        checked.add(file)
    return weight_map


def check_inside(folder: Path, path: Path, why: str = "") -> None:
    if leads_out(folder, path):
        raise ConversionError(f"{path} is a link that leaves the folder, to {path.resolve()}{why}.")


def tensors_of_folder(folder: Path) -> Iterator[StoredTensor]:
    """All tensors of a checkpoint's files.

    Raises:
        ConversionError: if its index has one in a file that does not hold it, or lies in any other way.
    """
    files, weight_map = weight_files(folder)
    contents = {path.name: read_tensors(path) for path in files}
    for key, file in weight_map.items():
        if key not in contents[file]:
            others = [other for other, tensors in contents.items() if key in tensors]
            where = f"it is in {others[0]}" if others else "no file does"
            raise ConversionError(f"The index of {folder} has {key} in {file}, which does not hold it; {where}.")
    for tensors in contents.values():
        yield from tensors.values()
