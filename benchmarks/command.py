# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What the benchmarks share as commands: which numbers mean something, where a record can go and how it gets there."""

import argparse
import contextlib
import errno
import json
import math
import sys
import tempfile
from collections.abc import Callable
from numbers import Real
from pathlib import Path

import torch

from read_weights import reason
from scripts.output import interrupted_by_sigterm, written_whole
from write_checkpoint import locked_file

# What an interrupted command has kept
GOES_ON = "what was measured so far is in --output, and the same command goes on from there"
SO_FAR = "what was measured so far is in --output, and the same command starts anew"
NOTHING = "nothing was written"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
LOCKS: dict[Path, contextlib.ExitStack] = {}  # of this process, by file that is locked


def run_command(main: Callable[[], int | None], kept: str) -> int:
    """The exit status of a command; of an interrupted one, by Ctrl-C or SIGTERM, 130, with a line that says what was
    kept; where the disk refuses, 1, with the reason."""
    with interrupted_by_sigterm():
        try:
            return main() or 0
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            print(f"\nerror: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"\ninterrupted; {kept}", file=sys.stderr)  # below a progress bar
            return 130
        finally:
            release_records()


def given_path(text: str) -> Path:
    """A path of a command line. An empty one, as of a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def usable_device(text: str) -> str:
    """A device of torch on which this build of it has put something."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason(error)}") from error
    return text


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace, least: int, *names: str) -> None:
    """Ends with a sentence where one of these options, by its name in `args`, is less than `least` or no number."""
    for name in names:
        if not (value := getattr(args, name)) >= least or math.isinf(value):
            parser.error(f"--{name.replace('_', '-')} {value} must be at least {least}")


def check_hidden_size(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Heads are 128 wide."""
    if args.hidden_size < 1 or args.hidden_size % 128:
        parser.error(f"--hidden-size {args.hidden_size} must be a multiple of 128")


def check_learning_rate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning-rate {args.learning_rate} must be more than 0")


def check_output(parser: argparse.ArgumentParser, *paths: Path) -> None:
    """Makes the folders of these files, and ends with a sentence where one cannot be written: now, and not after what
    it was to hold has been measured."""
    for path in paths:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.exists() and not path.is_file():
            parser.error(f"{path} cannot be written: it is {'a folder' if path.is_dir() else 'no regular file'}")
        if not folder.is_dir():
            parser.error(f"{path} cannot be written: {folder} is no folder")
    for path in paths:
        try:
            make_folder(path.parent)
        except OSError as error:
            parser.error(f"{path} cannot be written: {error.strerror}")


def check_folder(parser: argparse.ArgumentParser, option: str, path: Path | None) -> None:
    """Makes the folder of an option, if it is given, and ends with a sentence where there can be none."""
    try:
        if path is not None:
            make_folder(path)
    except OSError as error:
        parser.error(f"{option} {path} cannot be used as a folder: {error.strerror}")


def make_folder(path: Path) -> None:
    """Makes a folder and a file in it, which goes at once.

    Raises:
        OSError: one of the two cannot be made.
    """
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass


def check_figure(parser: argparse.ArgumentParser, option: str, path: Path) -> None:
    """Ends with a sentence where matplotlib has no format for the name of a figure: now, and not when it is drawn."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        parser.error(f"{option} {path}: the name must end in one of .{', .'.join(known)}")


def read_record(path: Path, shape: dict) -> dict:
    """A record that an earlier run wrote, of a `shape` as of `misfit`; ends with a sentence if there is none that can
    be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from error
    if wrong := misfit(record, shape):
        raise SystemExit(f"{path} is no record of this benchmark: {wrong}.")
    return record


def misfit(value, shape: type | dict, *keys: str) -> str | None:
    """What of a record is not as its shape says, or None: a type, or shapes by key, that of `str` for all others.
    `keys` lead to the value."""
    name = f"its {'.'.join(keys)}" if keys else "it"
    if not isinstance(shape, dict):
        return None if isinstance(value, shape) else f"{name} is no {'number' if shape is Real else shape.__name__}"
    if not isinstance(value, dict):
        return f"{name} holds no JSON object"
    if missing := [key for key in shape if key is not str and key not in value]:
        return f"{name} has no {', '.join(missing)}"
    wrong = (misfit(inner, shape.get(key, shape.get(str, object)), *keys, key) for key, inner in value.items())
    return next(filter(None, wrong), None)


def lock_record(path: Path) -> None:
    """Keeps a record, until `release_records`, for this run alone; ends with a sentence if another adds to it: each
    would drop what the other measured."""
    path = path.resolve()
    lock = path.with_name(f".{path.name}.lock")
    if lock in LOCKS:
        return
    refusal = SystemExit(f"Another run writes to {path}: choose another output, or wait for its end.")
    held = contextlib.ExitStack()
    held.enter_context(locked_file(lock, refusal))
    held.callback(lock.unlink, missing_ok=True)  # before another run can have it
    LOCKS[lock] = held


def release_records() -> None:
    while LOCKS:
        LOCKS.popitem()[1].close()


def save_figure(figure, path: Path, dpi: int) -> None:
    """Draws a figure of matplotlib into a file, which is there in full or as it was."""
    with written_whole(path) as new:
        figure.savefig(new, format=path.suffix.removeprefix(".").lower(), dpi=dpi)


def write_record(path: Path, record: dict, indent: int = 2) -> None:
    """Writes JSON; a run that is killed meanwhile leaves the file as it was, and two at once write each its own."""
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as new:
        new.write_text(json.dumps(record, indent=indent) + "\n")
