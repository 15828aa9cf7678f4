# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""benchmarks/training_steps.py: each number of steps is the training of quality.py of so many steps."""

import json
import sys

import pytest

from benchmarks import quality, quality_methods, training_steps

METHODS = ("dpvr/3/trained", f"vtw/3/{quality_methods.LAST}", f"fastv/4/0.5/{quality_methods.LAST}")
SETTINGS = ["--models", "tiny-llava", "--questions", "1", "--pool", "16", "--batch-size", "2", "--seeds", "1"]


@pytest.fixture
def studied(monkeypatch):
    monkeypatch.setitem(training_steps.STUDIED, "tiny-llava", METHODS)


def test_each_number_of_steps_gives_the_weights_that_quality_trains_in_so_many(studied, monkeypatch, tmp_path):
    def late_weights(staged, batches) -> dict[str, float]:
        sums = [weight.double().abs().sum().item() for weight in staged.parameters() if weight.requires_grad]
        return dict.fromkeys(quality.task.KINDS, sum(sums))

    monkeypatch.setattr(quality, "routed_accuracy", late_weights)
    output, single = tmp_path / "steps.json", tmp_path / "quality.json"
    assert training_steps.main([*SETTINGS, "--steps", "1", "3", "--output", str(output)]) == 0
    cells = json.loads(output.read_text())["models"]["tiny-llava"]["cells"]
    found = {name: quality_methods.methods(8)[name] for name in ("dense", *METHODS)}
    monkeypatch.setattr(quality_methods, "methods", lambda num_layers: found)
    monkeypatch.setattr(sys, "argv", ["quality.py", *SETTINGS, "--steps", "3", "--output", str(single)])
    assert quality.main() == 0
    expected = json.loads(single.read_text())["models"]["tiny-llava"]["cells"]
    assert cells["3"] == {name: expected[name] for name in METHODS}
    assert all(cells["1"][name] != cells["3"][name] for name in METHODS)


def test_what_is_there_is_not_measured_again_and_more_steps_are_added(studied, tmp_path, capsys):
    output = tmp_path / "steps.json"
    arguments = [*SETTINGS, "--output", str(output), "--steps"]
    assert training_steps.main([*arguments, "1"]) == 0
    record = json.loads(output.read_text())
    cell = record["models"]["tiny-llava"]["cells"]["1"]["dpvr/3/trained"]["0"]
    cell["look"] = 0.123
    output.write_text(json.dumps(record))
    assert training_steps.main([*arguments, "1", "2"]) == 0
    cells = json.loads(output.read_text())["models"]["tiny-llava"]["cells"]
    assert cells["1"]["dpvr/3/trained"]["0"] == cell
    assert {steps: sorted(by_method) for steps, by_method in cells.items()} == dict.fromkeys("12", sorted(METHODS))
    assert (
        "| LLaVA | setting | method | 1 steps | 2 steps | dense LLaVA | FLOPs in LLaVA-1.5 |"
        in capsys.readouterr().out
    )


def test_the_table_has_means_over_kinds_and_intervals_over_seeds_by_hand(studied):
    kinds = quality.task.KINDS
    by_seed = {"0": dict.fromkeys(kinds, 0.5), "1": dict.fromkeys(kinds, 0.5) | {kinds[0]: 0.9}}
    result = {"cells": {"800": {METHODS[0]: by_seed}, "5": {}}, "untrained": {"dense": {"0": dict.fromkeys(kinds, 1)}}}
    rows = training_steps.table({"models": {"tiny-llava": result}}).splitlines()
    assert rows[0] == "| LLaVA | setting | method | 5 steps | 800 steps | dense LLaVA | FLOPs in LLaVA-1.5 |"
    # Half of 10 by Student's t of one degree of freedom, 12.7
    assert rows[2] == "| tiny-llava | 3 | DPVR, side branch trained |  | 55.0 ± 63.5 | 100.0 | 48% |"
    assert rows[3] == "| tiny-llava | 3 | VTW, last layer trained |  |  | 100.0 | 45% |"
    assert rows[4] == "| tiny-llava | 4/0.5 | FastV, last layer trained |  |  | 100.0 | 78% |"


def test_figures_by_hand():
    def cells(right: dict[str, float]) -> dict:
        return {method: {"0": dict.fromkeys(quality.task.KINDS, share)} for method, share in right.items()}

    branch, fused, alone = "dpvr/2/trained", training_steps.WITH_FUSION, training_steps.WITHOUT_BRANCH
    few, some = {branch: 0.25, fused: 0.75, alone: 0.5}, {branch: 0.5, fused: 0.75}
    record = {"models": {"tiny-llava": {"cells": {"800": cells(some), "1000": {}, "90": cells(few)}}}}
    figures = training_steps.figures(record)
    assert figures["right"]["tiny-llava"]["90"] == {method: 100 * share for method, share in few.items()}
    assert figures["gained"]["tiny-llava"] == {branch: 25, fused: 0}  # from 90 to 800 steps
    assert figures["side_branch_adds"]["tiny-llava"] == {"90": 25}
    flops = figures["flops_in_llava"]["tiny-llava"]
    assert flops.keys() == set(training_steps.STUDIED["tiny-llava"])
    assert flops[alone] < flops[fused] < flops[branch] < 1


def test_every_method_that_is_studied_is_one_of_quality():
    for layers, name in ((8, "tiny-llava"), (12, "tiny-llava-12")):
        assert set(training_steps.STUDIED[name]) <= set(quality_methods.methods(layers))
