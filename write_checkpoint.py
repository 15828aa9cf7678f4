# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
The output folder of a conversion: it appears complete or not at all, and a conversion that was killed goes on.

    .NAME.partial        becomes NAME by one rename, at the very end
    .NAME.partial.json   journal: what was asked for; then a line for each shard that is written, read back and checked

Both lie beside NAME. The journal is locked while its conversion runs. After a kill both stay: the same request goes on
behind the last shard that was noted; any other request throws both away. After an error nothing stays.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm
from xxhash import xxh3_128

from read_weights import (
    PIECE_BYTES,
    ConversionError,
    StoredTensor,
    Weight,
    is_finite,
    load_pickled,
    read_safetensors,
)

MAX_SHARD_BYTES = 10**9
JOURNAL_START = b'{"sources"'  # how the journal of any conversion begins
PIECES_AHEAD = 4
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as some clusters mount Lustre and NFS
SYNC_BYTES = 2**26  # after so many the disk starts to write, and what is written is checked


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------- staging


def staging_of(output: Path) -> Path:
    output = output.resolve()  # "folder/.." is not the name that it gets
    return output.parent / f".{output.name}.partial"


def journal_of(output: Path) -> Path:
    return staging_of(output).with_suffix(".partial.json")


def check_leftovers(output: Path, journal: BinaryIO) -> None:
    """Refuses what bears the names of a killed conversion to `output` and is none: it would be thrown away."""
    start = journal.read(len(JOURNAL_START))
    journal.seek(0)
    if not JOURNAL_START.startswith(start):
        raise ConversionError(f"{journal_of(output)} is in the way and was not written by a conversion. Move it.")
    folder = staging_of(output)
    if folder.is_symlink():
        raise ConversionError(f"{folder} is a symbolic link; what it leads to is left alone. Remove it.")
    if folder.exists() and start != JOURNAL_START:
        raise ConversionError(
            f"{folder} is in the way, and no {journal_of(output).name} says that a conversion has left it. Move it."
        )


def read_journal(text: bytes) -> list[dict]:
    """The complete lines of a journal; the last one may have been cut off by a kill."""
    lines = []
    for line in text.split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines if all(isinstance(line, dict) for line in lines) else []


def was_renamed(output: Path) -> bool:
    """Whether `output` is the result of a conversion that was killed between its rename and its end."""
    try:
        lines = read_journal(journal_of(output).read_bytes())
        is_same = bool(lines) and lines[-1].get("complete") == output.stat().st_ino
        is_whole = all((output / line["shard"]).is_file() for line in lines if "shard" in line)
        return is_same and is_whole and not staging_of(output).exists()
    except OSError:
        return False


def check_output(output: Path, *sources: Path) -> None:
    """Refuses to write over a source, into it, or around it, and what no rename can replace."""
    try:
        is_link, target = output.is_symlink(), output.resolve()
    except (OSError, RuntimeError) as error:  # a name that is too long, a loop of links
        why = getattr(error, "strerror", None) or error
        raise ConversionError(f"{output} cannot be written: {why}.") from error
    if is_link:
        raise ConversionError(f"{output} is a symbolic link; nothing is overwritten.")
    if target == Path.cwd():
        raise ConversionError(f"The output {output} is the current folder; give the name of one to make.")
    if os.path.ismount(target):
        raise ConversionError(f"{output} is a mount point, which no rename can replace; give a folder in it.")
    for source in sources:
        check_apart(output, source)


def check_apart(output: Path, source: Path) -> None:
    """Refuses to write over the folder or file `source`, into it, or around it, also on the way."""
    target = output.resolve()
    if source == target:
        raise ConversionError(f"The output {output} is the source; nothing is overwritten.")
    if source in target.parents:
        raise ConversionError(f"The output {output} lies in the source {source}.")
    if target in source.parents:
        raise ConversionError(f"The source {source} lies in the output {output}; nothing is overwritten.")
    for path in (staging_of(output), journal_of(output)):
        if path in (source, *source.parents):
            raise ConversionError(
                f"The source {source} lies where a conversion to {output} is prepared, in {path}. Give another output."
            )


def check_empty(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} exists and is not an empty folder; nothing is overwritten.")


def check_disk(output: Path, shards: Iterable[list[Weight]], dtype: torch.dtype) -> None:
    """Refuses, before anything is written, an output that the disk will refuse. Where a killed conversion has left
    some of it, what room is missing is not asked."""
    parent = next(path for path in output.absolute().parents if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "may not be written to" if parent.is_dir() else "is no folder"
        raise ConversionError(f"{output} cannot be written: {parent} {why}.")
    if not staging_of(output).exists():
        check_room(parent, sum(num_bytes(shard, dtype) for shard in shards))


def locked(journal: Path, output: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    """The journal, open and locked by this process alone, made if there is none."""
    return locked_file(
        journal, ConversionError(f"Another conversion to {output} is running: it holds the lock on {journal}.")
    )


@contextlib.contextmanager
def locked_file(path: Path, refusal: BaseException) -> Iterator[BinaryIO]:
    """A file, open and locked by this process alone, made if there is none; `refusal` is raised if another has it.
    Where the file system has no locks nobody can tell, and the file is open alone."""
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise refusal from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            try:
                is_current = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                is_current = False
            if is_current:  # and was not removed by a process that ended meanwhile
                yield file
                return


@dataclass
class Staging:
    """A folder that will become the output, and its journal.

    Attributes:
        folder: where to write.
        journal: open and locked.
        finished: what was noted of each finished shard, by file name.
        is_done: whether the folder was renamed already, by a conversion that was killed right after.
    """

    folder: Path
    journal: BinaryIO
    finished: dict[str, dict]
    is_done: bool = False

    def note(self, **line) -> None:
        data = memoryview(json.dumps(line).encode() + b"\n")
        write_all(self.journal, data)
        os.fsync(self.journal.fileno())


def _resume(output: Path, journal: BinaryIO, request: dict) -> Staging:
    """What an earlier conversion with the same request has left, or an empty folder."""
    folder, text = staging_of(output), journal.read()
    lines = read_journal(text)
    finished = {line["shard"]: line for line in lines[1:] if "shard" in line}
    is_same = bool(lines) and lines[0] == json.loads(json.dumps(request))
    if is_same and was_renamed(output):
        return Staging(folder, journal, finished, is_done=True)
    check_empty(output)
    if is_same and folder.is_dir():
        staging = Staging(folder, journal, finished)
        whole = text.split(b"\n")[: sum("complete" not in line for line in lines)]
        journal.seek(sum(len(line) + 1 for line in whole))
        journal.truncate()  # the last line may have been cut off
    else:
        staging = Staging(folder, journal, {})
        shutil.rmtree(folder, ignore_errors=True)
        journal.seek(0)
        journal.truncate()
        staging.note(**request)
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_symlink():
            staging.finished.pop(path.name, None)
        if path.name not in staging.finished:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return staging


@contextlib.contextmanager
def staged(output: Path, request: dict) -> Iterator[Staging]:
    """A folder beside `output` that becomes `output` at the end.

    An error removes it. A kill, an interrupt among them, leaves it for the same `request` to go on with.

    Raises:
        ConversionError: if another conversion to `output` runs, or the disk refuses.
    """
    made = [parent for parent in output.absolute().parents if not parent.exists()]
    folder, journal = staging_of(output), journal_of(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with locked(journal, output) as file:
            try:
                check_leftovers(output, file)
            except ConversionError:
                if not os.fstat(file.fileno()).st_size:  # made just now
                    journal.unlink()
                raise
            try:
                staging = _resume(output, file, request)
                yield staging
                if not staging.is_done:
                    _publish(staging, output)
                with contextlib.suppress(OSError):  # the output is there, and complete
                    sync(output.parent)
                    journal.unlink()
            except Exception:
                shutil.rmtree(folder, ignore_errors=True)
                journal.unlink(missing_ok=True)
                raise
    except Exception as error:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            where = f" ({error.filename})" if error.filename else ""
            raise ConversionError(f"{output} cannot be written: {error.strerror or error}{where}.") from error
        raise


def _publish(staging: Staging, output: Path) -> None:
    for path in [*staging.folder.rglob("*"), staging.folder]:
        if path.name not in staging.finished:
            sync(path)
    staging.note(complete=staging.folder.stat().st_ino)
    os.replace(staging.folder, output)  # an empty folder there gives way


# ---------------------------------------------------------------------------------------------- shards


def write_all(file: BinaryIO, data: memoryview) -> None:
    """An unbuffered write may stop half way, as on a full disk; the next one then says why."""
    while data:
        data = data[file.write(data) :]


def plan_shards(base: list[Weight], branch: list[Weight], itemsize: int) -> dict[str, list[Weight]]:
    """Output files by name, of at most `MAX_SHARD_BYTES` or one tensor; the side branch has the last to itself."""
    shards: list[list[Weight]] = [[]]
    size = 0
    for weight in base:
        if shards[-1] and size + weight.numel * itemsize > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += weight.numel * itemsize
    if branch:
        shards.append(branch)
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def num_bytes(shard: list[Weight], dtype: torch.dtype) -> int:
    return sum(weight.numel for weight in shard) * dtype.itemsize


def shard_header(shard: list[Weight], dtype: torch.dtype) -> bytes:
    """The header of a safetensors file with the weights of `shard` one behind the other."""
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    header, begin = {"__metadata__": {"format": "pt"}}, 0
    for weight in shard:
        end = begin + weight.numel * dtype.itemsize
        header[weight.name] = {"dtype": name, "shape": list(weight.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_bytes(piece: torch.Tensor) -> memoryview:
    return memoryview(piece.view(torch.uint8).numpy())


def ahead(items: Iterator, thread: ThreadPoolExecutor) -> Iterator:
    """The same items, of which a thread makes a few in advance."""
    end = object()
    made = deque(thread.submit(next, items, end) for _ in range(PIECES_AHEAD))
    while (item := made.popleft().result()) is not end:
        made.append(thread.submit(next, items, end))
        yield item


class ShardWriter:
    """Writes shards while it reads on, and puts on the disk, reads back and checks what is written.

    A copy of the same files waits for the disk most of its time; the checks fit in there.

    Args:
        staging: where to write, and where finished shards are noted.
        dtype: of all weights.
        advance: called with numbers of bytes written.
    """

    def __init__(self, staging: Staging, dtype: torch.dtype, advance: Callable[[int], object]):
        self.staging, self.dtype, self.advance = staging, dtype, advance
        self.reading = ThreadPoolExecutor(1)
        self.checking = ThreadPoolExecutor(2)  # one waits for the disk while the other one reads
        self.checks: list[Future] = []
        self.finishing: Future | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self.reading.shutdown(cancel_futures=True)
        self.checking.shutdown(cancel_futures=True)

    def write(self, name: str, shard: list[Weight]) -> None:
        """Writes a shard. It is finished when the next one is written, or after `finish`."""
        path, header = self.staging.folder / f"{name}.tmp", shard_header(shard, self.dtype)
        checks, written, num_written = [], [], 0
        with path.open("wb", buffering=0) as file:
            write_all(file, memoryview(header))
            file.truncate(len(header) + num_bytes(shard, self.dtype))
            stored = read_safetensors(path)[0]
            for weight in shard:
                written.append(Written(weight, stored.pop(weight.name), self._write_tensor(file, weight)))
                num_written += num_bytes([weight], self.dtype)
                if num_written >= SYNC_BYTES:
                    checks.append(self._check(path, written))
                    written, num_written = [], 0
        checks.append(self._check(path, written))
        load_pickled.cache_clear()  # the pages that were read stay in memory as long as the file is mapped
        self.finish()
        self.finishing = self.checking.submit(_finish_shard, self.staging, name, checks)

    def finish(self) -> None:
        """Waits for the shard before."""
        if self.finishing is not None:
            self.finishing.result()

    def _write_tensor(self, file: BinaryIO, weight: Weight) -> str:
        """Returns the checksum of what came from the source."""
        checksum = xxh3_128()
        for piece in ahead(weight.pieces(self.dtype), self.reading):
            data = as_bytes(piece)
            checksum.update(data)
            write_all(file, data)
            self.advance(len(data))
        return checksum.hexdigest()

    def _check(self, path: Path, written: list["Written"]) -> Future:
        if len(self.checks) >= 2:
            self.checks[-2].result()  # no faster than the disk
        self.checks.append(self.checking.submit(sync_and_check, path, written))
        return self.checks[-1]


@dataclass(frozen=True)
class Written:
    """A weight, where it was written, and its checksum as it came from its source."""

    weight: Weight
    stored: StoredTensor
    checksum: str

    def count_nonfinite(self) -> int:
        """Reads it back. Returns how many of its numbers are not finite.

        Raises:
            ConversionError: naming file and key, if they are not what came from the source.
        """
        checksum, count = xxh3_128(), 0
        for piece in self.stored.pieces():
            checksum.update(as_bytes(piece))
            if not is_finite(piece):
                count += int((~piece.isfinite()).sum())
        if checksum.hexdigest() != self.checksum:
            raise ConversionError(
                f"{self.weight.name} in {self.stored.path.name} differs from its source ({self.weight.origin}) when "
                f"read back: checksum {checksum.hexdigest()}, not {self.checksum}. Is the disk sound?"
            )
        return count


def sync_and_check(path: Path, written: list[Written]) -> tuple[dict[str, str], dict[str, int]]:
    """Waits until weights are on the disk and reads them back. Returns the checksum of each, and how many numbers are
    not finite where any are not."""
    sync(path)
    counts = {each.weight.name: each.count_nonfinite() for each in written}
    checksums = {each.weight.name: each.checksum for each in written}
    return checksums, {name: count for name, count in counts.items() if count}


def _finish_shard(staging: Staging, name: str, checks: list[Future]) -> None:
    """Gives a shard its name once all of it is checked, and notes it."""
    checksums, nonfinite = {}, {}
    for check in checks:
        checksums |= check.result()[0]
        nonfinite |= check.result()[1]
    os.replace(staging.folder / f"{name}.tmp", staging.folder / name)
    sync(staging.folder)
    line = {"shard": name, "checksums": checksums, "nonfinite": nonfinite}
    staging.note(**line)
    staging.finished[name] = line


def _is_finished(staging: Staging, name: str, shard: list[Weight], dtype: torch.dtype) -> bool:
    """Whether an earlier conversion has finished this shard, and it is still what was noted."""
    if name not in staging.finished:
        return False
    with contextlib.suppress(ConversionError, OSError):
        stored = read_safetensors(staging.folder / name)[0]
        checksums = staging.finished[name]["checksums"]
        if [(w.name, w.shape, dtype) for w in shard] == [(t.key, t.shape, t.dtype) for t in stored.values()]:
            for weight in shard:
                Written(weight, stored[weight.name], checksums.get(weight.name)).count_nonfinite()
            return True
    del staging.finished[name]
    return False


def write_shards(staging: Staging, shards: dict[str, list[Weight]], dtype: torch.dtype, progress: bool) -> None:
    """Writes all shards that are not finished.

    Raises:
        ConversionError: if the disk has too little room, a number does not fit into `dtype`, or what is read back is
            not what was written.
    """
    sizes = {name: num_bytes(shard, dtype) for name, shard in shards.items()}
    total, disable = sum(sizes.values()), None if progress else True
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights", disable=disable)
    todo = {name: shard for name, shard in shards.items() if not _is_finished(staging, name, shard, dtype)}
    check_room(staging.folder.parent, sum(sizes[name] for name in todo))
    with bar, ShardWriter(staging, dtype, bar.update) as writer:
        bar.update(total - sum(sizes[name] for name in todo))
        for name, shard in todo.items():
            writer.write(name, shard)
        writer.finish()


def link_files(staging: Staging, files: dict[str, Path]) -> None:
    """Makes hard links to files of the source, by their new names; what cannot be linked is copied, and noted."""
    for name, path in files.items():
        if not _is_copied(staging, name):
            _link_or_copy(staging, name, path)


def _is_copied(staging: Staging, name: str) -> bool:
    """Whether an earlier conversion has copied this file, and the copy is still what was noted."""
    if name not in staging.finished:
        return False
    with contextlib.suppress(OSError):
        if _checksum(staging.folder / name) == staging.finished[name]["checksum"]:
            return True
    del staging.finished[name]
    return False


def _link_or_copy(staging: Staging, name: str, path: Path) -> None:
    target = staging.folder / name
    target.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        check_room(staging.folder.parent, path.stat().st_size)
        line = {"shard": name, "reason": error.strerror, "checksum": _copy_file(path, target)}
        sync(staging.folder)
        staging.note(**line)
        staging.finished[name] = line


def _file_pieces(path: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def _checksum(path: Path) -> str:
    checksum = xxh3_128()
    for data in _file_pieces(path):
        checksum.update(data)
    return checksum.hexdigest()


def _copy_file(path: Path, target: Path) -> str:
    """Returns the checksum of both."""
    written, copied = target.with_name(target.name + ".tmp"), xxh3_128()
    with written.open("wb", buffering=0) as file:
        for data in _file_pieces(path):
            copied.update(data)
            write_all(file, data)
        os.fsync(file.fileno())
    if (checksum := _checksum(written)) != copied.hexdigest():
        raise ConversionError(
            f"The copy of {path} differs from it when read back: checksum {checksum}, not {copied.hexdigest()}."
        )
    os.replace(written, target)
    return checksum


def check_room(folder: Path, needed: int) -> None:
    if (free := shutil.disk_usage(folder).free) < needed:
        free, needed = (tqdm.format_sizeof(number, "B") for number in (free, needed))
        raise ConversionError(f"{folder} has {free} free, but the weights need {needed}.")


def write_index(folder: Path, tensors: list[tuple[str, str, int, int]]) -> None:
    """model.safetensors.index.json of tensors given as name, file, how many numbers, and bytes of each number."""
    write_json(
        folder / "model.safetensors.index.json",
        {
            "metadata": {
                "total_parameters": sum(numel for _, _, numel, _ in tensors),
                "total_size": sum(numel * itemsize for _, _, numel, itemsize in tensors),
            },
            "weight_map": {name: file for name, file, _, _ in tensors},
        },
    )
