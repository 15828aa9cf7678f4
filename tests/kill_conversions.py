# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Runs one conversion many times, each cut off at another step, and prints what was left as JSON, a line for each run.

A step is a call by which Python changes files or locks them: counted with a profiling hook, in every thread, so that
nothing of the converter or of transformers is replaced. Every run is forked from one process that has everything
imported and the source read; only what comes after reading can leave anything behind.

    python tests/kill_conversions.py kill SOURCE WORK_FOLDER [--link]
    python tests/kill_conversions.py fail SOURCE WORK_FOLDER [--link]
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import convert_llava_to_dpvr as converter
import read_llava
import read_weights
import write_checkpoint

# Threads that check what is written have steps too: as many in every run, if not always in the same order
CHANGES = {"open", "write", "truncate", "ftruncate", "fsync", "replace", "rename", "mkdir", "link"}
CHANGES |= {"unlink", "rmdir", "flock", "sendfile", "copy_file_range", "writelines", "save", "close"}
FAILS = {"open", "write", "fsync", "replace", "mkdir", "link", "sendfile", "truncate", "flock"}


def is_change(function) -> bool:
    name, owner = function.__name__, getattr(function, "__self__", None)
    of_files = isinstance(owner, io.IOBase) or getattr(owner, "__name__", "") in ("posix", "io", "_io")
    return name in CHANGES and (of_files or getattr(function, "__module__", None) in ("posix", "_io", "fcntl"))


def at_step(number: int, act: Callable[[str], None], names: set[str] = CHANGES) -> list[str]:
    """Calls `act` with the name of change `number` before it happens. Returns the list of changes, as it grows."""
    steps: list[str] = []

    def hook(frame, event, function):
        if event == "c_call" and function.__name__ in names and is_change(function):
            steps.append(function.__name__)
            if len(steps) == number:
                act(function.__name__)

    threading.setprofile(hook)
    sys.setprofile(hook)
    return steps


def kill(number: int) -> Callable[[str], None]:
    return lambda name: os.kill(os.getpid(), number)


def fail_with(number: int) -> Callable[[str], None]:
    def fail(name: str) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def forked(arguments: list[str], prepare: Callable[[], object], log: Path) -> int:
    """Converts in a child process; its exit code, or less than 0 for a signal. Its stderr is appended to `log`."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 99
    try:
        with log.open("a") as errors, contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            prepare()
            try:
                code = converter.main(arguments)
            finally:
                sys.setprofile(None)
                threading.setprofile(None)
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        log.write_text(f"Traceback: {error!r}")
    finally:
        os._exit(code)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def identities(folder: Path) -> dict[str, tuple]:
    """What tells whether a file was written again; the number of links and its time are not the file's own."""
    stats = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


class Runs:
    """One conversion, to be run many times."""

    def __init__(self, source: Path, work: Path, options: list[str]):
        self.source, self.work, self.output, self.log = source, work, work / "new" / "dpvr", work / "stderr"
        self.arguments = [str(source), str(self.output), *options]
        self.source_before = (contents(source), identities(source))
        assert self.convert() == 0, self.log.read_text()
        self.expected = contents(self.output)
        self.clear()

    def convert(self, prepare: Callable[[], object] = lambda: None) -> int:
        self.log.write_text("")
        return forked(self.arguments, prepare, self.log)

    def clear(self) -> None:
        shutil.rmtree(self.output.parent)

    def count(self, names: set[str]) -> int:
        report = self.work / "steps"

        def counted() -> None:
            steps = at_step(0, print, names)
            end = os._exit

            def write_and_exit(code):
                sys.setprofile(None)
                report.write_text(str(len(steps)))
                end(code)

            os._exit = write_and_exit

        assert self.convert(counted) == 0, self.log.read_text()
        self.clear()
        return int(report.read_text())

    def finished(self) -> dict[str, tuple]:
        """The shards that the journal notes, and what tells whether they were written again."""
        staging, journal = write_checkpoint.staging_of(self.output), write_checkpoint.journal_of(self.output)
        if not staging.is_dir() or not journal.is_file():
            return {}
        noted = {line.get("shard") for line in write_checkpoint.read_journal(journal.read_bytes())}
        return {name: value for name, value in identities(staging).items() if name in noted}

    def is_source_untouched(self) -> bool:
        return self.source_before == (contents(self.source), identities(self.source))

    def killed(self, step: int, number: int) -> dict:
        """Cuts off a conversion before `step` by signal `number`, and asks for it again."""
        code = self.convert(lambda: at_step(step, kill(number)))
        interrupted = self.log.read_text()
        appeared, finished = self.output.exists(), self.finished()
        result = {"step": step, "signal": number, "code": code, "stderr": interrupted, "finished": len(finished)}
        result["appeared"] = "no" if not appeared else "complete" if contents(self.output) == self.expected else "torn"
        result["source untouched"] = self.is_source_untouched()
        result["was over"] = appeared and not write_checkpoint.journal_of(self.output).exists()
        result["again"] = 0 if result["was over"] else self.convert()
        after = identities(self.output) if self.output.exists() else {}
        result["written again"] = [name for name, identity in finished.items() if after.get(name) != identity]
        result["identical"] = bool(after) and contents(self.output) == self.expected
        result["left"] = sorted(path.name for path in self.output.parent.iterdir() if path != self.output)
        result["stderr again"] = self.log.read_text()
        self.clear()
        return result

    def failed(self, what: str, prepare: Callable[[], object]) -> dict:
        """A conversion whose disk refuses something."""
        code = self.convert(prepare)
        left = sorted(str(path.relative_to(self.work)) for path in self.output.parent.rglob("*"))
        left += ["new"] if self.output.parent.exists() else []
        complete = self.output.exists() and contents(self.output) == self.expected
        shutil.rmtree(self.output.parent, ignore_errors=True)
        errors = self.log.read_text()
        untouched = self.is_source_untouched()
        result = {"what": what, "code": code, "left": left, "complete": complete, "stderr": errors}
        return result | {"source untouched": untouched}


def limit_file_size(num_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def spread(total: int, number: int) -> list[int]:
    return sorted({1 + i * (total - 1) // (number - 1) for i in range(number)})


def main() -> None:
    mode, source, work, *options = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which what a shell starts in the background ignores
    torch.set_num_threads(1)
    write_checkpoint.MAX_SHARD_BYTES, read_weights.PIECE_BYTES, write_checkpoint.SYNC_BYTES = 40_000, 4096, 8192
    checkpoint = converter.read_checkpoint(source)
    converter.find_tensors(checkpoint)
    shapes = read_llava.expected_shapes(checkpoint)
    converter.read_checkpoint, converter.find_tensors = lambda *_: checkpoint, lambda _: None
    read_llava.expected_shapes = lambda _: shapes
    runs = Runs(Path(source), Path(work), options)
    if mode == "kill":
        total = runs.count(CHANGES)
        last = range(total - 8, total + 1)
        points = [(step, signal.SIGKILL) for step in sorted({*spread(total, 48 if not options else 8), *last})]
        if not options:
            points += [(step, number) for step in spread(total, 6) for number in (signal.SIGTERM, signal.SIGINT)]
        results = (runs.killed(*point) for point in points)
    else:
        total = runs.count(FAILS)
        cases = []
        for i, step in enumerate(spread(total, 24 if not options else 6)):
            number = (errno.ENOSPC, errno.EROFS, errno.EIO)[i % 3]
            cases.append((f"{os.strerror(number)} at step {step}", partial(at_step, step, fail_with(number), FAILS)))
        cases += [(f"no file beyond {size} bytes", limit_file_size(size)) for size in (300, 5000, 20_000, 39_000)]
        results = (runs.failed(*case) for case in cases)
    for result in results:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
