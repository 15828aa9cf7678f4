# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How commands end and what they leave behind: files that are there in full or as they were, and words that may reach
nobody."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def names_file(path: Path) -> Iterator[None]:
    """Has the error of a disk that is full, which names no file, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name once it is there in full: until then what bore the name stays, two
    processes at once write each its own, and an error leaves nothing else behind."""
    path = path.resolve()  # a link stays one
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with names_file(path):
            yield new
            new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Has SIGTERM end what runs as Ctrl-C does, which cleans up behind it."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def say(text: str) -> None:
    """Prints, as far as it can: that nobody is told changes nothing about what was done."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # else the end of the program would try once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
