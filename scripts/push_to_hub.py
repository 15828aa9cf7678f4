#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Upload an adapter or a DPVR checkpoint to the Hugging Face Hub, with a model card made from its `training.json`
and checksums of all files.

All files arrive in one commit: a failed upload changes nothing that is published. Checkpoints of the training, logs
and lists of bad rows stay where they are.
"""

import argparse
import sys
import tempfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.command import given_path
from read_weights import ConversionError, read_json
from scripts.checksums import write_checksums
from scripts.output import interrupted_by_sigterm, say
from scripts.publish import SUFFIXES, PublishError, explain, open_repository, publish
from training.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterError, read_header
from training.card import (
    CARD_FILE,
    PLOT_FILE,
    RUN_FILE,
    UNNAMED,
    has_own_card,
    is_hub_id,
    make_card,
    plot_losses,
    read_run,
)

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, RUN_FILE)


def files_of(folder: Path) -> tuple[list[Path], bool]:
    """The files of an adapter or a checkpoint, checked to be whole, and whether it is an adapter.

    Raises:
        AdapterError: it is neither, both, or a file is missing or cannot be read.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder.")
    is_adapter, is_checkpoint = (folder / CONFIG_FILE).is_file(), (folder / "config.json").is_file()
    if is_adapter == is_checkpoint:
        raise AdapterError(
            f"{folder} holds {f'both {CONFIG_FILE} and' if is_adapter else f'neither {CONFIG_FILE} nor'} config.json: "
            "give the folder of an adapter or of a checkpoint."
        )
    _check_card(folder)  # which is made or read when a repository has been made already
    if is_adapter:
        read_header(folder / WEIGHTS_FILE)
        return [folder / name for name in ADAPTER_FILES if (folder / name).is_file()], True
    _check_checkpoint(folder)
    files = [path for pattern in ("[!.]*", "additional_chat_templates/*") for path in sorted(folder.glob(pattern))]
    return [path for path in files if path.is_file() and path.suffix in SUFFIXES], False


def _check_card(folder: Path) -> None:
    run = read_run(folder)
    try:
        make_card(run)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder / RUN_FILE} is no record that a card can be made of: {error}") from error
    try:
        if (folder / CARD_FILE).is_file():
            (folder / CARD_FILE).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{folder / CARD_FILE} is no UTF-8, as model cards are: {error}") from error


def _check_checkpoint(folder: Path) -> None:
    config, index = read_json(folder / "config.json"), folder / "model.safetensors.index.json"
    auto_map = config.get("auto_map", {})
    if not isinstance(auto_map, dict) or not all(isinstance(reference, str) for reference in auto_map.values()):
        raise AdapterError(f"{folder / 'config.json'} has {auto_map!r:.80} for auto_map, which names no code.")
    code = {reference.split(".")[0] + ".py" for reference in auto_map.values()}
    weights = read_json(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    if not weights or not isinstance(weights, dict):
        raise AdapterError(f"{index} has no weight_map that names files.")
    for name in weights.values():
        if not isinstance(name, str) or "/" in name or name.startswith("."):
            raise AdapterError(f"{index} names {name!r}, which is no file beside it, as all that is pushed are.")
    for name in sorted(code | {"processor_config.json"}):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} has no {name}: nobody could load it. Save model and processor there.")
    for name in sorted(set(weights.values())):
        read_header(folder / name)


def read_subfolder(given: str | None) -> str | None:
    """A folder of a repository as the Hub writes it, a/b, or None for its root, which has many names.

    Raises:
        AdapterError: it leads out of the repository.
    """
    path = PurePosixPath((given or "").strip("/"))
    if ".." in path.parts or "\\" in str(path):
        raise AdapterError(
            f"The subfolder {given!r} is none of a repository: give names with / between, and no .. in it."
        )
    return str(path) if path.parts else None


def make_card_files(folder: Path, target: Path, name: str, is_adapter: bool, subfolder: str | None) -> list[Path]:
    """Model card and loss plot, written to `target`. A card that somebody wrote is taken as it is; one that training
    wrote names its folder, and is made anew; one of the converter names none, and gets the repository's."""
    if has_own_card(folder):
        card = folder / CARD_FILE
        if UNNAMED in (text := card.read_text(encoding="utf-8")):
            card = target / CARD_FILE
            card.write_text(text.replace(UNNAMED, f'name = "{name}"'), encoding="utf-8")
        return [path for path in (card, folder / PLOT_FILE) if path.is_file()]
    run = read_run(folder)
    if is_adapter:
        stated, _ = read_header(folder / WEIGHTS_FILE)
        known = {"base_model", "base_type", "saturation_layer"} & stated.keys()
        run = {**{key: stated[key] for key in known}, **run}
    else:
        config = read_json(folder / "config.json")
        run = {**{key: config[key] for key in ("saturation_layer", "num_side_layers") if key in config}, **run}
    has_plot = plot_losses(run, target / PLOT_FILE)
    card = make_card(run, name, is_adapter=is_adapter, subfolder=subfolder, has_plot=has_plot)
    (target / CARD_FILE).write_text(card, encoding="utf-8")
    return [target / CARD_FILE, *([target / PLOT_FILE] if has_plot else [])]


def push_to_hub(
    folder: str | Path, repo: str, *, subfolder: str | None = None, private: bool = False, token: str | None = None
) -> str:
    """Uploads the adapter or the checkpoint in `folder` to `repo`, in one commit, which deletes the weights of a model
    that was there before and what an earlier push brought and this one does not. Returns the address of the commit.

    Args:
        folder: of `save_adapter`, or of a whole checkpoint with its processor.
        repo: Hub id; the repository is made if it does not exist.
        subfolder: where in it an adapter goes, without `..`; `/` and `.` mean the root. At the root of a repository
            that holds a checkpoint it would send `from_pretrained` to the adapter's base model, so that is refused.
        private: makes the repository private if it is new; one that is there and public is refused.
        token: by default the one that `hf auth login` keeps.

    Raises:
        AdapterError: the folder is not whole.
        PublishError: the repository is not for it.
        HfHubHTTPError: the Hub refuses, or fails; nothing is published then.
    """
    folder, subfolder = Path(folder), read_subfolder(subfolder)
    files, is_adapter = files_of(folder)
    if subfolder and not is_adapter:
        raise AdapterError(f"{folder} is a checkpoint, which lies at the root of its repository: give no subfolder.")
    base = read_json(folder / CONFIG_FILE).get("base_model_name_or_path") if is_adapter else None
    if is_adapter and not is_hub_id(base):
        print(
            f"warning: the adapter names its base {base!r}, which is no Hub id: others will not find it. Train with "
            "--base user/name to name one.",
            file=sys.stderr,
        )
    api, repo = open_repository(repo, private, token)
    inside = f"{subfolder}/" if subfolder else ""
    with tempfile.TemporaryDirectory(prefix="dpvr-card-") as made:
        target = Path(made)
        files += make_card_files(folder, target, repo, is_adapter, subfolder)
        names = {path.relative_to(target if target in path.parents else folder).as_posix(): path for path in files}
        checksums = write_checksums(target, names)
        names[checksums.name] = checksums
        message = f"Upload {'a side-branch adapter' if is_adapter else 'a DPVR checkpoint'}"
        return publish(api, repo, {inside + name: path for name, path in names.items()}, message)


@interrupted_by_sigterm()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n"
        "  python scripts/push_to_hub.py adapter user/charts-adapter          in a repository of its own\n"
        "  python scripts/push_to_hub.py adapter user/dpvr-7b --subfolder adapters/charts\n"
        "  python scripts/push_to_hub.py dpvr-7b user/dpvr-7b --private           a whole checkpoint\n"
        "Log in first with `hf auth login`, or set HF_TOKEN. HF_ENDPOINT names another Hub.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=given_path, help="of an adapter, or of a checkpoint with its processor")
    parser.add_argument("repo", help="Hub id, such as user/name; made if it does not exist")
    parser.add_argument("--subfolder", metavar="PATH", help="of the repository, for an adapter")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    options = parser.parse_args(arguments)
    try:
        address = push_to_hub(options.folder, options.repo, subfolder=options.subfolder, private=options.private)
    except Exception as error:  # client, network and file system fail in ways that have no common class
        print(f"error: {explain(error)}", file=sys.stderr)
        if not isinstance(error, (AdapterError, ConversionError, PublishError)):
            print(f"{options.repo}: the upload is one commit, so no part of it is published", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; {options.repo} has all of the upload, which is one commit, or none", file=sys.stderr)
        return 130
    say(f"pushed to {address}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
