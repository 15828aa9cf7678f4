# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The commands of benchmarks/ before they measure, and how they write what they measured."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import analysis, compiled, conversion, fuzz, quality, side_branch_seeds, soak, speed, training
from benchmarks.command import write_record

SCRIPTS = (analysis, compiled, conversion, fuzz, quality, side_branch_seeds, soak, speed, training)


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
    assert f"{inside} cannot be written: " in refusal(monkeypatch, capsys, script, "--output", inside)
    said = refusal(monkeypatch, capsys, script, "--output", tmp_path)
    assert f"{tmp_path} cannot be written: it is a folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
