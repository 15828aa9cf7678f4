"""Scripts in processes of their own, which need not import torch and transformers once more.

Where a second process is what a test is about, it costs seconds of imports. Here a server imports the libraries once
for each worker of pytest and forks: what a script imports beside them, sets or leaves behind stays its own. Tests of
what happens to a fresh interpreter start one themselves.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ["accelerate", "peft", "tokenizers", "torch.distributed.fsdp", "transformers.models.llava.modeling_llava"]
LIBRARIES += ["transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama"]
LIBRARIES += ["transformers.models.llava.processing_llava", "transformers.trainer"]


def _context() -> multiprocessing.context.BaseContext:
    """That of the server, which starts with the first process. It has one thread, as a fork needs it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


def _run(
    script: str, arguments: list[str], folder: str, environment: dict[str, str], outputs: tuple[str, str]
) -> None:
    """In the new process: what `python script` does."""
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    ours = [path for path in sys.path if ROOT in (Path(path).resolve(), Path(path).resolve().parent)]
    sys.path[:] = [str(Path(script).parent), *(path for path in sys.path if path not in ours)]
    sys.argv[:] = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _wait(processes: list[BaseProcess], timeout: float) -> int:
    """The first status that is not 0, at which the other processes are killed, as `torch.distributed.run` does."""
    deadline, running = time.monotonic() + timeout, processes
    try:
        while running and not any(process.exitcode for process in processes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{timeout} s were not enough")
            connection.wait([process.sentinel for process in running], 1)
            running = [process for process in running if process.exitcode is None]
        return next((process.exitcode for process in processes if process.exitcode), 0)
    finally:
        for process in processes:
            process.kill()
            process.join()


def start_script(script, *arguments, outputs=(os.devnull, os.devnull), cwd=None, **variables) -> BaseProcess:
    """Starts a script, its standard output and error added to two files."""
    arguments, folder = list(map(str, arguments)), str(cwd or Path.cwd())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    process = _context().Process(target=_run, args=(str(script), arguments, folder, environment, outputs))
    process.start()
    return process


def run_script(
    script, *arguments, num_processes=1, check=True, timeout=300, cwd=None, **variables
) -> subprocess.CompletedProcess:
    """Runs a script to its end, in several processes with the variables that `torch.distributed.run` sets."""
    if num_processes > 1:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        variables |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
    with tempfile.TemporaryDirectory() as folder:
        outputs, processes = (f"{folder}/stdout", f"{folder}/stderr"), []
        for rank in range(num_processes):
            own = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) if num_processes > 1 else {}
            processes.append(start_script(script, *arguments, outputs=outputs, cwd=cwd, **variables, **own))
        code = _wait(processes, timeout)
        texts = [Path(path).read_text(errors="replace") for path in outputs]
    assert code == 0 or not check, texts[1][-3000:]
    return subprocess.CompletedProcess([script, *arguments], code, *texts)
