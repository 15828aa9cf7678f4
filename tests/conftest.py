"""Small random models and batches of the kinds that users send. Nothing here needs a network."""

import contextlib
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The code is loaded as users load it, as remote code, into a module cache of this run's own
_modules = tempfile.TemporaryDirectory(prefix="dpvr-modules-")
os.environ["HF_MODULES_CACHE"] = _modules.name

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hypothesis
import pytest
import torch

# The same examples in every run; other ones where DPVR_EXAMPLES asks for a longer sweep
is_sweep = "DPVR_EXAMPLES" in os.environ
hypothesis.settings.register_profile("dpvr", deadline=None, derandomize=not is_sweep, print_blob=True)
hypothesis.settings.load_profile("dpvr")
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """As on a disk that fills up: a write beyond so many bytes of a file is refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT
