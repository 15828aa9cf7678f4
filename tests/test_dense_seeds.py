# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""benchmarks/dense_seeds.py: each LLaVA is measured as one of quality.py, and counts once."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import dense_seeds, quality, quality_methods
from benchmarks.quality_report import Entry

TINY = ROOT / "examples" / "tiny-llava"
SETTINGS = ["--questions", "1", "--steps", "1", "--pool", "16", "--batch-size", "2", "--seeds", "1"]


@pytest.fixture
def other(tmp_path):
    """A LLaVA of another seed, by what it says."""
    folder = tmp_path / "other"
    shutil.copytree(TINY, folder)
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | {"seed": 7, "layers": 8, "hidden_size": 128}))
    return folder


def entry(model: str, name: str, flops: float, accuracy: float) -> Entry:
    values = {kind: np.array([accuracy, accuracy]) for kind in (*quality.task.KINDS, "all")}
    return Entry(model, name, flops, flops, values)


def test_every_llava_has_the_values_that_quality_gives_it(other, tmp_path, monkeypatch, capsys):
    names = ["dense", "vtw/4", f"vtw/4/{quality_methods.LAST}", "dpvr/4/untrained", "dpvr/4/trained"]
    monkeypatch.setattr(dense_seeds, "method_names", lambda: names)
    output = tmp_path / "dense_seeds.json"
    assert dense_seeds.main([str(TINY), str(other), *SETTINGS, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert list(record["models"]) == ["seed 0", "seed 7"]
    first, second = (result["cells"] for result in record["models"].values())
    assert list(first) == names
    assert first == second  # the same weights
    assert "| layer | VTW | untrained | trained | trained with fusion |" in capsys.readouterr().out
    first["vtw/4"]["0"]["look"] = 0.123  # kept only if it is not measured again
    output.write_text(json.dumps(record))
    assert dense_seeds.main([str(TINY), *SETTINGS, "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == record
    assert str(tmp_path) not in output.read_text()


def test_all_that_trains_nothing_is_asked_and_what_is_named_of_the_rest():
    names, found = dense_seeds.method_names(), quality_methods.methods(8)
    trains = [name for name in names if "trained" in name and "untrained" not in name]
    assert trains == [pattern.format(v) for pattern, values in dense_seeds.TRAINED.items() for v in values]
    assert not set(names) - set(found)
    assert all("trained" in name for name in set(found) - set(names))
    assert len(names) == len(set(names)) == 72


def test_llavas_count_once_each_by_hand(monkeypatch):
    entries = [entry(model, "dense", 1.0, 1.0) for model in ("seed 0", "seed 1")]
    entries += [entry("seed 0", "vtw/3", 0.5, 1.0), entry("seed 1", "vtw/3", 0.5, 0.5)]
    entries += [entry("seed 0", "vtw/4", 0.6, 1.0), entry("seed 1", "vtw/4", 0.6, 1.0)]
    entries += [entry("seed 0", "fastv/2/0.5", 0.6, 1.0), entry("seed 1", "fastv/2/0.5", 0.6, 0.5)]
    monkeypatch.setattr(dense_seeds, "summarize", lambda record: entries)
    record = {"models": {"seed 0": {}, "seed 1": {}}}
    lines = dense_seeds.table(record).splitlines()
    assert lines[0] == "| method | seed 0 | seed 1 | mean |"
    assert "| VTW | 50 | 60 | 55.0 ± 63.5 |" in lines  # half of 10 by Student's t of one degree of freedom, 12.7
    assert "| FastV | 60 | none |  |" in lines
    rows = dense_seeds.by_layer(record).splitlines()
    assert "| 3 | 75.0 ± 317.7 [50.0, 100.0] |  |  |  |" in rows
    assert "| 4 | 100.0 ± 0.0 [100.0, 100.0] |  |  |  |" in rows


def test_figures_by_hand(monkeypatch):
    entries = [entry("seed 0", "dense", 1, 0.75), entry("seed 0", "vtw/4", 0.5, 0.5), entry("seed 1", "dense", 1, 1)]
    monkeypatch.setattr(dense_seeds, "summarize", lambda record: entries)
    figures = dense_seeds.figures({})
    assert figures["lost"] == {"seed 0": {"dense": 0, "vtw/4": 25}, "seed 1": {"dense": 0}}
    assert figures["right"] == {"seed 0": {"dense": 75, "vtw/4": 50}, "seed 1": {"dense": 100}}
    assert figures["least"] == {"dense": 75, "vtw/4": 50}
    assert figures["fewest_flops"] == {}
    assert figures["training_adds"] == {"seed 0": {}, "seed 1": {}}
    entries += [entry("seed 1", "dpvr/4/untrained", 0.5, 0.5), entry("seed 1", "dpvr/4/trained", 0.5, 0.875)]
    entries += [entry("seed 0", "dpvr/4/untrained", 0.5, 0.75), entry("seed 0", "dpvr/4/trained", 0.5, 0.75)]
    figures = dense_seeds.figures({})
    assert figures["training_adds"] == {"seed 0": {"4": 0}, "seed 1": {"4": 37.5}}
    assert figures["recovered"] == {"seed 0": {}, "seed 1": {"4": 75}}  # nothing was lost in the first
    assert figures["fewest_flops"] == {"seed 0": {"DPVR, side branch trained": 50}}


def test_llavas_of_another_recipe_and_what_is_none_are_refused(other, tmp_path, capsys):
    record = json.loads((other / "training.json").read_text())
    (other / "training.json").write_text(json.dumps(record | {"steps": 5}))
    for folder, why in ((other, "was trained with {'tower_steps': 500, "), (tmp_path, "it has no weights or no")):
        with pytest.raises(SystemExit) as refused:
            dense_seeds.main([str(folder), "--output", str(tmp_path / "record.json")])
        assert refused.value.code == 2
        assert f"{folder} " in (said := capsys.readouterr().err)
        assert why in said
    for folders, why in (([], "and no LLaVAs are given to measure"), ([TINY, TINY], "from seeds [0, 0]: give each")):
        with pytest.raises(SystemExit) as refused:
            dense_seeds.main([*map(str, folders), "--output", str(tmp_path / "none.json")])
        assert refused.value.code == 2
        assert why in capsys.readouterr().err
