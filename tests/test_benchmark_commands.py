# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The commands of benchmarks/ before they measure, and how they write what they measured."""

import argparse
import fcntl
import functools
import json
import os
import re
import runpy
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, files_of_at_most

from benchmarks import (
    analysis,
    compiled,
    conversion,
    dense_seeds,
    fuzz,
    quality,
    side_branch_seeds,
    soak,
    speed,
    training,
    training_steps,
)
from benchmarks.command import run_command, save_figure, write_record

COMMANDS = sorted(
    path for path in (ROOT / "benchmarks").glob("*.py") if "argparse" in path.read_text() and path.stem != "command"
)
SCRIPTS = (analysis, compiled, conversion, fuzz, quality, side_branch_seeds, soak, speed, training, training_steps)


def refusal(monkeypatch, capsys, script, *options) -> str:
    """The last line of what a command says that ends before it does anything."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, options)])
    with pytest.raises(SystemExit) as refused:
        script.main(None) if script in (fuzz, soak) else script.main()
    assert refused.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_an_output_that_cannot_be_written_is_refused_at_once(script, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    inside = tmp_path / "file" / "record.json"
    said = refusal(monkeypatch, capsys, script, "--output", inside)
    assert f"{inside} cannot be written: {tmp_path / 'file'} is no folder" in said
    said = refusal(monkeypatch, capsys, script, "--output", tmp_path)
    assert f"{tmp_path} cannot be written: it is a folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("script", "option"), [(analysis, "--work"), (conversion, "--work"), (training, "--folder")])
def test_a_folder_that_cannot_be_used_is_refused_at_once(script, option, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for folder, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "inside", "Not a directory")):
        said = refusal(monkeypatch, capsys, script, option, folder, "--output", tmp_path / "record.json")
        assert f"{option} {folder} cannot be used as a folder: {why}" in said


@pytest.mark.parametrize("script", [quality, soak], ids=lambda script: script.__name__)
def test_a_figure_of_no_known_format_is_refused_at_once(script, monkeypatch, tmp_path, capsys):
    options = ("--output", tmp_path / "record.json", "--figure", tmp_path / "figure.xyz")
    said = refusal(monkeypatch, capsys, script, *options)
    assert f"--figure {tmp_path / 'figure.xyz'}: the name must end in one of ." in said


@pytest.mark.parametrize(
    ("script", "options", "sentence"),
    [
        (quality, "--seeds 0", "--seeds 0 must be at least 1"),
        (quality, "--questions -1", "--questions -1 must be at least 1"),
        (quality, "--learning-rate nan", "--learning-rate nan must be more than 0"),
        (dense_seeds, "--pool 0", "--pool 0 must be at least 1"),
        (training_steps, "--steps 5 0", "--steps 0 must be at least 1"),
        (side_branch_seeds, "--seeds -1", "--seeds -1 must be at least 0"),
        (side_branch_seeds, "--batch-size 0", "--batch-size 0 must be at least 1"),
        (side_branch_seeds, "--learning-rate inf", "--learning-rate inf must be more than 0"),
        (speed, "--threads 0", "--threads 0 must be at least 1"),
        (speed, "--layers 4 --equal-accuracy tiny-llava", "--layers 4 must be at least the 8 of tiny-llava"),
        (speed, "--equal-accuracy tiny-llava --saturation-layer 2", "which chooses it, exclude each other"),
        (speed, "--device gpu", "'gpu' cannot be used: "),
        (training, "--device gpu", "'gpu' cannot be used: "),
        (compiled, "--hidden-size 100", "--hidden-size 100 must be a multiple of 128"),
        (training, "--batch-size 0", "--batch-size 0 must be at least 1"),
        (training, "--warmup -1", "--warmup -1 must be at least 0"),
        (training, "--text-only 31", "--text-only 31 must be between 0 and 30"),
        (training, "--tokens 575+64", "575 vision tokens are no square of patches"),
        (training, "--tokens 576+1", "--tokens 576+1: give at least 2 text tokens"),
        (conversion, "--rounds 0", "--rounds 0 must be at least 1"),
        (analysis, "--num-layers 1", "--num-layers 1 must be at least 2"),
        (soak, "--max-bytes-per-call nan", "--max-bytes-per-call nan must be at least 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_at_once(script, options, sentence, monkeypatch, tmp_path, capsys):
    assert sentence in refusal(monkeypatch, capsys, script, *options.split(), "--output", tmp_path / "record.json")
    assert not list(tmp_path.iterdir())


def test_a_record_is_whole_whenever_its_run_is_killed(monkeypatch, tmp_path):
    path = tmp_path / "new" / "record.json"
    write_record(path, {"runs": [1]})
    write_text = Path.write_text

    def killed(self, text):
        write_text(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        write_record(path, {"runs": [1, 2]})
    assert json.loads(path.read_text()) == {"runs": [1]}


def test_a_record_that_another_run_adds_to_is_refused_at_once(tmp_path):
    path, new = tmp_path / "record.json", {"settings": {}}
    other = (tmp_path / ".record.json.lock").open("ab")
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(SystemExit, match=r"Another run writes to .*record\.json: choose another output"):
        side_branch_seeds.read_results(path, new, {})
    other.close()
    for _ in range(2):  # a run does not refuse itself
        assert side_branch_seeds.read_results(path, new, {}) is new
    with pytest.raises(BlockingIOError):
        fcntl.flock((tmp_path / ".record.json.lock").open("ab"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert run_command(lambda: 0, "nothing") == 0  # whose end releases all
    assert not list(tmp_path.iterdir())


def test_two_runs_that_write_a_record_at_once_write_each_its_own(monkeypatch, tmp_path):
    path, write_text = tmp_path / "record.json", Path.write_text

    def other_run_meanwhile(self, text):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
            monkeypatch.setattr(Path, "write_text", write_text)
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                write_record(path, {"runs": [2]})
            assert json.loads(path.read_text()) == {"runs": [2]}
            file.write(text[len(text) // 2 :])

    monkeypatch.setattr(Path, "write_text", other_run_meanwhile)
    write_record(path, {"runs": [1]})
    assert json.loads(path.read_text()) == {"runs": [1]}


def test_a_record_goes_through_a_link_and_replaces_nothing_but_files(monkeypatch, tmp_path, capsys):
    link, pipe = tmp_path / "link.json", tmp_path / "pipe.json"
    link.symlink_to(tmp_path / "record.json")
    write_record(link, {"runs": []})
    assert link.is_symlink()
    assert json.loads((tmp_path / "record.json").read_text()) == {"runs": []}
    os.mkfifo(pipe)
    assert "it is no regular file" in refusal(monkeypatch, capsys, speed, "--output", pipe)


def test_a_file_that_is_no_record_is_refused_by_its_name(monkeypatch, tmp_path):
    path = tmp_path / "record.json"
    broken = (('{"settings": ', "cannot be read"), ("[]", "no JSON object"), ('{"settings": {}}', "it has no "))
    for content, why in broken:
        path.write_text(content)
        for script, report in ((quality, "--report"), (side_branch_seeds, "--table")):
            for options in ([], [report]):
                monkeypatch.setattr(sys, "argv", ["benchmark", "--output", str(path), *options])
                with pytest.raises(SystemExit, match=why) as refused:
                    script.main()
                assert str(path) in str(refused.value)
        assert path.read_text() == content
    path.write_text("[]")  # fuzz.py, which asks for no key, replaces an entry
    with pytest.raises(SystemExit, match="no JSON object"):
        fuzz.main(["--output", str(path), "--inputs", "1"])


@pytest.mark.parametrize(
    ("script", "report", "place", "value", "why"),
    [
        (quality, ["--report"], ["models"], [], "its models holds no JSON object"),
        (quality, [], ["models", "tiny-llava"], {}, "its models.tiny-llava has no prompt_lengths, cells"),
        (quality, [], ["models", "tiny-llava", "cells", "vtw/3", "0"], {}, "its .*.cells.vtw/3.0 has no look, count"),
        (
            dense_seeds,
            [],
            ["models", "seed 1", "cells", "dense", "0", "look"],
            "x",
            "its .*.dense.0.look is no number",
        ),
        (side_branch_seeds, ["--table"], ["cells", "3/dense", "kl"], None, "its cells.3/dense.kl is no number"),
        (training_steps, [], ["models", "tiny-llava", "cells"], 1, "its models.tiny-llava.cells holds no JSON object"),
    ],
)
def test_a_record_that_is_damaged_within_is_refused_by_what_is_wrong(
    script, report, place, value, why, monkeypatch, tmp_path
):
    path, record = tmp_path / "record.json", json.loads(script.RESULTS.read_text())
    *outer, last = place
    functools.reduce(dict.__getitem__, outer, record)[last] = value
    path.write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["benchmark", "--output", str(path), *report])
    with pytest.raises(SystemExit, match=rf"record.json is no record of this benchmark: {why}"):
        script.main()


def test_a_report_on_a_model_without_results_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quality.py", "--report", "--models", "other"])
    with pytest.raises(SystemExit, match=r"quality\.json has no results of other\."):
        quality.main()


def test_results_that_do_not_say_of_which_weights_they_are_get_no_others_beside_them(monkeypatch, tmp_path):
    path = tmp_path / "record.json"
    monkeypatch.setattr(side_branch_seeds, "fingerprint", lambda llava: "of today")
    with pytest.raises(SystemExit, match="does not say of which weights of llava its results are"):
        side_branch_seeds.check_weights(path, {"cells": {"3/dense": {}}}, None, tmp_path / "llava")
    result = {"cells": {}}
    side_branch_seeds.check_weights(path, result, None, tmp_path / "llava")
    assert result["weights"] == "of today"


def test_committed_results_say_of_which_weights_they_are():
    for script in (quality, side_branch_seeds, dense_seeds, training_steps):
        record = json.loads(script.RESULTS.read_text())
        assert all(result["weights"] for result in record.get("models", {"one": record}).values())


def test_a_terminated_command_ends_as_an_interrupted_one_and_takes_its_temporary_folder_along(tmp_path, capsys):
    def terminated() -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert run_command(terminated, "all was kept") == 130
    assert capsys.readouterr().err == "\ninterrupted; all was kept\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_disk_that_refuses_leaves_a_record_as_it_was_and_is_told_in_a_line(tmp_path, capsys):
    record = tmp_path / "record.json"
    write_record(record, {"measured": "before"})
    before = record.read_bytes()
    with files_of_at_most(100):
        assert run_command(lambda: write_record(record, {"measured": list(range(1000))}), "all was kept") == 1
    assert capsys.readouterr().err == f"\nerror: [Errno 27] File too large: '{record}'\n"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == {record: before}


@pytest.mark.parametrize("name", ["figure.png", "figure.SVG"])
def test_a_figure_is_there_in_full_or_as_it_was(name, tmp_path):
    from matplotlib.figure import Figure

    with files_of_at_most(100), pytest.raises(OSError, match=name):
        save_figure(Figure(), tmp_path / name, dpi=50)
    assert not list(tmp_path.iterdir())
    save_figure(Figure(), tmp_path / name, dpi=50)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_an_interrupted_command_says_in_a_line_what_was_kept(path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupted)  # the first thing that each of them does
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 130
    assert re.fullmatch(r"\ninterrupted; .{10,100}\n", capsys.readouterr().err)
