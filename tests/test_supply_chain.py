"""What the Hub files import and call, which versions they are tested with, and checksums that notice a change."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, files_of_at_most

from scripts import checksums, lowest_versions

HUB_FILES = {"configuration_dpvr", "modeling_dpvr", "processing_dpvr"}
PACKAGES = {"torch", "transformers"}
# What is needed of it; os, sys, subprocess, importlib, urllib and the like are not
STANDARD_LIBRARY = {"dataclasses", "functools"}
RUNS_OR_OPENS = {"__import__", "breakpoint", "compile", "eval", "exec", "globals", "input", "open", "vars"}
# Attributes that reach files, processes, networks, pickles or other modules from torch, transformers and plain objects
REACHES_OUT = {
    *("__builtins__", "__globals__", "__loader__", "__subclasses__", "hub", "import_module", "load_library"),
    *("open", "popen", "read_bytes", "read_text", "run", "spawn", "system", "unlink", "urlopen", "write_bytes"),
    *("write_text", "cpp_extension", "load_url", "download_url_to_file", "dynamic_module_utils", "requests", "httpx"),
    *("load", "save", "serialization", "pickle", "os", "sys", "subprocess", "importlib", "builtins"),
}


def find_faults(source: str) -> list[str]:
    """A sentence for each import, name or attribute that a Hub file must not have, wherever it stands in the file."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
            faults += [f"line {line}: imports everything" for alias in node.names if alias.name == "*"]
        elif isinstance(node, ast.ImportFrom):
            names = []
            if node.level != 1 or node.module not in HUB_FILES:
                faults.append(f"line {line}: imports .{node.module}")
        else:
            names = []
        for name in names:
            root, *parts = name.split(".")
            if root not in PACKAGES | STANDARD_LIBRARY or REACHES_OUT & set(parts):
                faults.append(f"line {line}: imports {name}")
        if isinstance(node, ast.Name) and node.id in RUNS_OR_OPENS:
            faults.append(f"line {line}: names {node.id}")
        if isinstance(node, ast.Attribute) and node.attr in REACHES_OUT:
            faults.append(f"line {line}: reaches {node.attr}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            of, name, *_ = node.args
            is_plain = isinstance(name, ast.Constant) and name.value not in REACHES_OUT
            if not is_plain and not isinstance(name, ast.Name | ast.Attribute):
                faults.append(f"line {line}: gets {ast.unparse(name)} of {ast.unparse(of)}")
            if isinstance(of, ast.Name) and of.id in PACKAGES:
                faults.append(f"line {line}: gets an attribute of {of.id} by its name")
    return faults


@pytest.mark.parametrize("name", sorted(HUB_FILES))
def test_hub_files_import_torch_transformers_and_each_other_and_run_or_open_nothing(name):
    assert find_faults((ROOT / f"{name}.py").read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "import numpy as np",
        "import torch, subprocess",
        "from urllib.request import urlopen",
        "from torch.hub import load_state_dict_from_url",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
        "from transformers import dynamic_module_utils",
        "from .other import f",
        "from ..modeling_dpvr import f",
        "from . import modeling_dpvr",
        "from transformers import *",
        "def f():\n    import socket",
        "class C:\n    def f(self):\n        from pathlib import Path",
        "try:\n    import flash_attn\nexcept ImportError:\n    pass",
        "f = lambda: __import__('os')",
        "eval('1')",
        "exec('1')",
        "open('a')",
        "e = eval",
        "torch.load('a')",
        "import torch as t\nt.load('a')",
        "from torch import load",
        "torch.serialization.load('a')",
        "torch.jit.load('a')",
        "getattr(torch, 'load')",
        "torch.os.remove('a')",
        "from transformers.utils import os",
        "torch.hub.load('a', 'b')",
        "().__class__.__base__.__subclasses__()",
        "f.__globals__['os']",
        "x.system('a')",
    ],
)
def test_the_check_finds_what_it_is_to_find(source):
    assert find_faults(source)


def test_the_check_covers_the_files_that_travel_with_a_checkpoint():
    assert {path.stem for path in ROOT.glob("*_dpvr.py")} - {"convert_llava_to_dpvr"} == HUB_FILES


# ----------------------------------------------------------------------------------------------------------- versions


def test_every_requirement_has_a_lowest_version_and_no_highest():
    versions = lowest_versions.lowest_versions(ROOT / "requirements.txt")
    packages = {"torch", "transformers", "safetensors", "huggingface_hub", "jinja2", "pillow", "tqdm"}
    assert set(versions) == packages | {"sentencepiece", "protobuf", "xxhash"}
    assert versions["transformers"] == "5.23.0"


def test_the_torch_that_make_installs_is_the_lowest_that_is_tested():
    pinned = re.search(r"torch==([0-9.]+)", (ROOT / "Makefile").read_text())[1]
    assert pinned == lowest_versions.lowest_versions(ROOT / "requirements.txt")["torch"]


@pytest.mark.parametrize("line", ["torch", "torch<3", "torch==2.13.0", "torch>=2,<3"])
def test_a_requirement_that_is_not_a_lowest_version_is_refused(line, tmp_path):
    (tmp_path / "requirements.txt").write_text(f"# comment\n\ntqdm>=4.60\n{line}\n")
    with pytest.raises(ValueError, match=f"requirements.txt: '{line}' is not `name>=version`"):
        lowest_versions.lowest_versions(tmp_path / "requirements.txt")


# ---------------------------------------------------------------------------------------------------------- checksums


@pytest.fixture
def release(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, data in {"model.safetensors": b"\0\1" * 999, "sub/code.py": b"x = 1\n", "with space.txt": b""}.items():
        (tmp_path / name).write_bytes(data)
    assert checksums.main([str(tmp_path)]) == 0
    return tmp_path


def test_an_unchanged_folder_passes_also_by_sha256sum(release, capsys):
    assert checksums.main([str(release), "--check"]) == 0
    assert capsys.readouterr().out.endswith("3 files compared, 0 faults\n")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=release, check=True)


def test_a_changed_a_missing_and_an_added_file_are_named(release, capsys):
    data = bytearray((release / "model.safetensors").read_bytes())
    data[500] ^= 1
    (release / "model.safetensors").write_bytes(data)
    (release / "sub" / "code.py").unlink()
    (release / "sub" / "other.py").write_text("import os")
    assert checksums.main([str(release), "--check"]) == 1
    output = capsys.readouterr().out
    assert re.search(r"^model.safetensors: is [0-9a-f]{64}, not [0-9a-f]{64}$", output, re.MULTILINE)
    assert "sub/code.py: missing\n" in output
    assert "sub/other.py: not named in SHA256SUMS\n" in output
    assert output.endswith("2 files compared, 3 faults\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_exit_status_is_of_the_files_where_nobody_can_be_told(unbuffered, release):
    program, environment = ROOT / "scripts" / "checksums.py", {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    for options, status in (([], 0), (["--check"], 0), (["--check"], 1)):
        if status:
            (release / "sub" / "code.py").unlink()
        with open("/dev/full", "w") as full:
            command = [sys.executable, program, release, *options]
            result = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, check=False)
        assert (result.returncode, result.stderr) == (status, b"")


@pytest.mark.parametrize("line", ["", "abc  code.py", f"{'0' * 64}  ../code.py", f"{'0' * 64}  /code.py"])
def test_a_checksum_file_that_is_none_is_refused_with_its_line(line, release, capsys):
    path = release / "SHA256SUMS"
    path.write_text(path.read_text() + line + "\n")
    assert checksums.main([str(release), "--check"]) == 1
    assert "SHA256SUMS, line 4: " in capsys.readouterr().err
    path.write_bytes(b"\xff" * 64)
    assert checksums.main([str(release), "--check"]) == 1
    assert "SHA256SUMS is no text" in capsys.readouterr().err


def test_a_link_that_leads_out_of_the_folder_is_refused(release, tmp_path_factory, capsys):
    outside = tmp_path_factory.mktemp("outside") / "secret.txt"
    outside.write_text("secret")
    (release / "link.txt").symlink_to(outside)
    assert checksums.main([str(release)]) == 1
    assert "link.txt is a link that leaves the folder" in capsys.readouterr().err


def test_links_to_folders_and_to_nothing_are_not_overlooked(release, tmp_path_factory, capsys):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "evil.py").write_text("")
    (release / "sub" / "link").symlink_to(outside)
    (release / "nothing").symlink_to(release / "none")
    assert checksums.main([str(release), "--check"]) == 1
    output = capsys.readouterr().out
    assert "nothing: not named in SHA256SUMS\nsub/link: not named in SHA256SUMS\n" in output
    (release / "with space.txt").unlink()
    (release / "with space.txt").symlink_to(release / "none")
    assert checksums.main([str(release), "--check"]) == 1
    assert "with space.txt is no file, or a link to none" in capsys.readouterr().err


def test_code_in_a_folder_with_checksums_of_its_own_is_not_overlooked(release, capsys):
    (release / "torch").mkdir()
    (release / "torch" / "__init__.py").write_text("")
    (release / "torch" / "README.md").write_text("")
    (release / "torch" / "SHA256SUMS").write_text("")
    assert checksums.main([str(release), "--check"]) == 1
    output = capsys.readouterr().out
    assert "torch/__init__.py: not named in SHA256SUMS\n" in output
    assert "README" not in output


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\u2028b"])
def test_a_name_that_a_line_cannot_hold_is_refused(release, name, capsys):
    (release / name).write_text("")
    assert checksums.main([str(release)]) == 1
    assert "has a line break in its name" in capsys.readouterr().err


def test_sums_that_a_full_disk_refuses_leave_those_that_are_there(release, capsys):
    before = (release / "SHA256SUMS").read_bytes()
    (release / "one more").write_text("")
    with files_of_at_most(100):
        assert checksums.main([str(release)]) == 1
    assert capsys.readouterr().err == f"[Errno 27] File too large: '{release / 'SHA256SUMS'}'\n"
    assert (release / "SHA256SUMS").read_bytes() == before
    assert not list(release.glob("*.new"))


def test_sums_that_a_kill_has_cut_off_are_removed_and_not_named(release):
    before = (release / "SHA256SUMS").read_bytes()
    (release / ".SHA256SUMS.123.new").write_bytes(before[:50])
    assert checksums.main([str(release)]) == 0
    assert (release / "SHA256SUMS").read_bytes() == before
    assert not list(release.glob(".*"))


def test_a_name_that_is_no_utf8_is_refused_and_the_sums_that_are_there_stay(release, capsys):
    before = (release / "SHA256SUMS").read_bytes()
    (release / os.fsdecode(b"\xff.txt")).write_text("")
    assert checksums.main([str(release)]) == 1
    assert r"'\udcff.txt' is no UTF-8" in capsys.readouterr().err
    assert (release / "SHA256SUMS").read_bytes() == before


def test_a_checkout_that_git_refuses_is_told_in_a_sentence(release, capsys):
    (release / ".git").mkdir()
    assert checksums.main([str(release)]) == 1
    assert "git" in capsys.readouterr().err


def test_what_python_leaves_behind_is_no_fault_and_torch_is_not_needed(release):
    (release / "sub" / "__pycache__").mkdir()
    (release / "sub" / "__pycache__" / "code.cpython-311.pyc").write_bytes(b"")
    program = "import sys; sys.modules['torch'] = None; sys.path[:0] = sys.argv[1:2]; from scripts import checksums; "
    program += "sys.exit(checksums.main([sys.argv[2], '--check']))"
    command = [sys.executable, "-c", program, str(ROOT), str(release)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "1 compiled files in __pycache__ were not: remove them" in result.stdout


def test_a_library_among_what_python_leaves_behind_is_a_fault(release, capsys):
    (release / "sub" / "__pycache__").mkdir()
    (release / "sub" / "__pycache__" / "code.so").write_bytes(b"")
    assert checksums.main([str(release), "--check"]) == 1
    assert "sub/__pycache__/code.so: not named in SHA256SUMS" in capsys.readouterr().out


def test_nothing_is_written_through_a_link(release, tmp_path, capsys):
    (release / "SHA256SUMS").unlink()
    (release / "SHA256SUMS").symlink_to(tmp_path / "elsewhere")
    assert checksums.main([str(release)]) == 1
    assert "SHA256SUMS is a link; nothing is written through it" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


def test_a_snapshot_of_the_hubs_cache_is_checked_through_its_links(release, tmp_path, capsys):
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    shutil.copytree(release, snapshot)
    blobs.mkdir()
    for path in [path for path in snapshot.rglob("*") if path.is_file()]:
        blob = blobs / hashlib.sha256(path.name.encode()).hexdigest()
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    assert checksums.main([str(snapshot), "--check"]) == 0
    (snapshot / "model.safetensors").resolve().write_bytes(b"other")
    assert checksums.main([str(snapshot), "--check"]) == 1
    assert "model.safetensors: is " in capsys.readouterr().out


def test_a_check_runs_nothing_that_the_folder_brings_and_sees_what_its_git_does_not(release, capsys):
    subprocess.run(["git", "init", "-q", release], check=True)
    subprocess.run(["git", "add", "."], cwd=release, check=True)
    subprocess.run(["git", "config", "core.fsmonitor", f"touch {release / 'canary'}; false"], cwd=release, check=True)
    (release / "evil.py").write_text("")
    assert checksums.main([str(release), "--check"]) == 1
    assert "evil.py: not named in SHA256SUMS\n" in capsys.readouterr().out
    assert not (release / "canary").exists()


def test_a_tracked_file_that_is_gone_is_refused_with_a_sentence(tmp_path, capsys):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "gone.py").write_text("")
    subprocess.run(["git", "add", "gone.py"], cwd=tmp_path, check=True)
    (tmp_path / "gone.py").unlink()
    assert checksums.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == "gone.py is no file, or a link to none.\n"


def test_a_checkout_lists_what_git_tracks(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name in ("tracked.py", "untracked.py"):
        (tmp_path / name).write_text("")
    subprocess.run(["git", "add", "tracked.py"], cwd=tmp_path, check=True)
    assert checksums.main([str(tmp_path)]) == 0
    assert list(checksums.read_checksums(tmp_path / "SHA256SUMS")) == ["tracked.py"]


def test_wrong_arguments_end_with_2(tmp_path):
    for arguments in ([str(tmp_path / "none")], [str(tmp_path), "--check"]):
        with pytest.raises(SystemExit) as error:
            checksums.main(arguments)
        assert error.value.code == 2
