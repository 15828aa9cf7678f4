#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Write or check SHA256SUMS, the checksums of a release or of a converted checkpoint.

The file has the format of `sha256sum`, which checks it too: `sha256sum --check SHA256SUMS`. It names each file under
the folder; in a git checkout, each that git tracks. A check fails if a file differs, is missing, or is not named, and
runs nothing that lies in the folder. What the Hub, its client, git and a virtual environment (.venv) add is left out,
and so is a subfolder with a SHA256SUMS of its own, such as an adapter's, but for code in it. Compiled files of
`__pycache__`, which Python reads in place of their sources, are not compared: a check counts them.
"""

import argparse
import hashlib
import re
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.dont_write_bytecode |= __name__ == "__main__"  # a check would find what it has left itself

from scripts.output import interrupted_by_sigterm, say, written_whole

NAME = "SHA256SUMS"
LEFT_OUT = (".gitattributes", ".cache", ".git", ".venv")  # of the Hub, its client, git and Python
CODE = (".py", ".pyc", ".pyd", ".so")  # what an import finds
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def list_tracked(folder: Path) -> list[str]:
    """Names, relative to the folder, of what git tracks in it. Runs git, which the folder's own config steers."""
    output = subprocess.run(["git", "ls-files", "-z"], cwd=folder, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in output.split("\0") if name and name != NAME)


def list_files(folder: Path) -> list[str]:
    """Names, relative to the folder, of all files in it, sorted."""
    names = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if (path.is_symlink() or not path.is_dir()) and not _is_apart(folder, name) and name.name != NAME:
            names.append(name.as_posix())
    return sorted(names)


def leads_out(folder: Path, path: Path) -> bool:
    """Whether a link leads out of a folder; those of the Hub's cache to its own blobs do not."""
    folder, target = folder.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    return not target.is_relative_to(folder) and not target.is_relative_to(blobs)


def check_files(folder: Path, names: list[str]) -> None:
    """Refuses what has no checksum of its own.

    Raises:
        ValueError: a name has a line break or is no UTF-8, a link leads out of the folder, or something is no file.
    """
    for name in names:
        if len(name.splitlines()) != 1:
            raise ValueError(f"{name!r} has a line break in its name, which {NAME} cannot hold.")
        if name != name.encode(errors="replace").decode():
            raise ValueError(f"{name!r} is no UTF-8, as names in {NAME} are.")
        if leads_out(folder, folder / name):
            raise ValueError(f"{name} is a link that leaves the folder {folder}.")
        if not (folder / name).is_file():
            raise ValueError(f"{name} is no file, or a link to none.")


def _is_apart(folder: Path, path: Path) -> bool:
    if path.parts[0] in LEFT_OUT or (path.parent.name == "__pycache__" and path.suffix == ".pyc"):
        return True
    return path.suffix not in CODE and any((folder / parent / NAME).is_file() for parent in path.parents[:-1])


def compute_checksums(files: dict[str, Path]) -> dict[str, str]:
    """SHA-256 of files by their names, in hexadecimal."""
    sums = {}
    total = sum(path.stat().st_size for path in files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="SHA-256", disable=None) as bar:
        for name, path in files.items():
            with path.open("rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
                bar.update(file.tell())
    return sums


def write_checksums(folder: Path, files: dict[str, Path] | None = None) -> Path:
    """Writes SHA256SUMS into `folder`, of files given by their names there or of all that it holds."""
    path = folder / NAME
    if path.is_symlink():
        raise ValueError(f"{path} is a link; nothing is written through it.")
    if files is None:
        for left in folder.glob(f".{NAME}.*.new"):  # by a run that was killed while it wrote
            left.unlink()
        names = list_tracked(folder) if (folder / ".git").exists() else list_files(folder)
        check_files(folder, names)
        files = {name: folder / name for name in names}
    lines = [f"{checksum}  {name}\n" for name, checksum in compute_checksums(files).items()]
    with written_whole(path) as new:
        new.write_text("".join(lines), encoding="utf-8")
    return path


def read_checksums(path: Path) -> dict[str, str]:
    """The names and checksums of a SHA256SUMS file.

    Raises:
        ValueError: it is no text; or with the line's number, if a line is none of `sha256sum`, or names a file twice
            or one outside.
    """
    sums = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text, so it holds no checksums.") from error
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{path}, line {number}: {line[:100]!r} is not a checksum and a file's name.")
        checksum, name = match.groups()
        if name in sums or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path}, line {number}: {name} is named twice or lies outside the folder.")
        sums[name] = checksum
    return sums


def find_faults(folder: Path) -> tuple[int, list[str]]:
    """How many files were compared, and a sentence for each that is not as SHA256SUMS says."""
    expected = read_checksums(folder / NAME)
    present = set(list_files(folder))
    compared = sorted(present & set(expected))
    check_files(folder, compared)
    actual = compute_checksums({name: folder / name for name in compared})
    faults = [f"{name}: missing" for name in sorted(set(expected) - present)]
    faults += [f"{name}: not named in {NAME}" for name in sorted(present - set(expected))]
    faults += [f"{name}: is {actual[name]}, not {expected[name]}" for name in actual if actual[name] != expected[name]]
    return len(actual), faults


@interrupted_by_sigterm()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n  python scripts/checksums.py              # of this checkout, before a release\n"
        "  python scripts/checksums.py dpvr-7b      # of a converted checkpoint\n"
        "  python scripts/checksums.py dpvr-7b --check\n\n"
        "In a checkout all tracked files are named; check a fresh one, since `make demo` adds files to yours.\n\n"
        "exit codes: 0 written, or all files are as named; 1 a file is not; 2 there is no such folder or file\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path(), help="default: the current one")
    parser.add_argument("--check", action="store_true", help=f"compare the files with {NAME} and change nothing")
    args = parser.parse_args(arguments)
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is not a folder")
    path = args.folder / NAME
    if args.check and not path.is_file():
        parser.error(f"{path} does not exist; write it with `python scripts/checksums.py {args.folder}`")
    try:
        if args.check:
            number, faults = find_faults(args.folder)
            say("\n".join([*faults, f"{number} files compared, {len(faults)} faults"]))
            compiled = (path.relative_to(args.folder) for path in args.folder.rglob("__pycache__/*.pyc"))
            if number := sum(name.parts[0] not in LEFT_OUT for name in compiled):
                say(f"{number} compiled files in __pycache__ were not: remove them, and Python makes them anew")
            return int(bool(faults))
        write_checksums(args.folder)
        say(f"{path}: {len(read_checksums(path))} files")
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
