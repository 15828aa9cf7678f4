# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""One commit to a Hub repository: files, and nothing beside them of an earlier model or push."""

import re
import tempfile
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from scripts.checksums import NAME, read_checksums
from training.adapter_files import CONFIG_FILE
from training.card import CARD_FILE, PLOT_FILE

MODEL_CONFIG = "config.json"
# What is pushed of a checkpoint, and all of an adapter but for card and plot
SUFFIXES = (".json", ".safetensors", ".py", ".jinja", ".model", ".txt")
# What transformers and the converter call weights; from_pretrained reads model.safetensors before an index
MODEL_WEIGHTS = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5}|-base|-side-branch)?\.(safetensors|bin)(\.index\.json)?")


class PublishError(ValueError):
    """A repository that the files are not for."""


def open_repository(repo: str, private: bool, token: str | None = None) -> tuple[HfApi, str]:
    """The Hub's client and the full name of a repository, which is made, private if so asked, if it does not exist.

    Raises:
        PublishError: a private one is asked for, and it is there and public.
    """
    api = HfApi(token=token)
    repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    if private and not api.repo_info(repo).private:
        raise PublishError(
            f"{repo} is there and public, and --private makes only new ones private. Change its visibility in its "
            "settings, or leave out --private."
        )
    return api, repo


def explain(error: Exception) -> str:
    """What an error of an upload says, with its cause where the client names that alone, and what to do without a
    login."""
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return f"{error}\nLog in with `hf auth login`, or set HF_TOKEN."
    return f"{error} {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else str(error)


def _is_pushed(name: str) -> bool:
    """Whether scripts/push_to_hub.py brings such a file, by its name beside SHA256SUMS."""
    path = PurePosixPath(name)
    has_place = str(path.parent) in (".", "additional_chat_templates")
    return (has_place and path.suffix in SUFFIXES) or name in (CARD_FILE, PLOT_FILE)


def _brought_before(api: HfApi, repo: str, files: dict[str, Path], present: set[str]) -> set[str]:
    """What the SHA256SUMS that `files` replace name of what a push brings, by its names in the repository. It may name
    what somebody else brought, a licence or pictures."""
    names = set()
    for path in (path for path in files.keys() & present if Path(path).name == NAME):
        with tempfile.TemporaryDirectory(prefix="dpvr-sums-") as folder:
            sums = Path(api.hf_hub_download(repo, path, local_dir=folder))
            try:
                names |= {path.removesuffix(NAME) + name for name in read_checksums(sums) if _is_pushed(name)}
            except ValueError:  # somebody else's: no push brought what it names
                continue
    return names


def publish(api: HfApi, repo: str, files: dict[str, Path], message: str) -> str:
    """Uploads `files`, by their names in the repository, in one commit, which also deletes the weights that an earlier
    model left beside a new one, and what the SHA256SUMS of an earlier push names and the new one does not bring, which
    would fail the check; other files stay. Returns the commit's address.

    Raises:
        PublishError: a checkpoint and an adapter would lie at the root of one repository.
        HfHubHTTPError: the Hub refuses, or fails; nothing is published then.
    """
    present = set(api.list_repo_files(repo))
    for new, other in ((CONFIG_FILE, MODEL_CONFIG), (MODEL_CONFIG, CONFIG_FILE)):
        if new in files and other in present:
            raise PublishError(
                f"{repo} has {other} at its root: an adapter beside a checkpoint would send from_pretrained to the "
                "adapter's base model. Put the adapter into a subfolder, or a repository of its own."
            )
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    stale = _brought_before(api, repo, files, present) & present
    if MODEL_CONFIG in files:
        stale |= set(filter(MODEL_WEIGHTS.fullmatch, present))
    operations += map(CommitOperationDelete, sorted(stale - files.keys()))
    return str(api.create_commit(repo, operations, commit_message=message).commit_url)
