# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""benchmarks/speed.py and benchmarks/compiled.py end with a whole record at small sizes, whatever their times."""

import json
import sys
from functools import partial

import pytest
import torch

from benchmarks import accounting, compiled, speed
from benchmarks.baselines import fastv, pyramid_drop, vtw
from benchmarks.make_random_llava import make_config

SMALL = ["--layers", "4", "--hidden-size", "128", "--prompts", "576+8", "--repeats", "1", "--device", "cpu"]
SMALL += ["--dtype", "float32"]


def run(monkeypatch, script, path, *options):
    monkeypatch.setattr(speed, "make_config", partial(make_config, tower_layers=2))
    monkeypatch.setattr(sys, "argv", ["benchmark", *SMALL, *options, "--output", str(path)])
    assert script.main() == 0
    return json.loads(path.read_text())


def test_speed_measures_every_method_and_its_cache_is_that_of_the_formulas(monkeypatch, tmp_path, capsys):
    record = run(monkeypatch, speed, tmp_path / "speed.json", "--batch", "2", "--decode-tokens", "2")
    (measured,) = record["runs"]
    names = [name.split(" (")[0] for name in measured["methods"]]
    assert names == ["LLaVA", "DPVR", "FastV", "VTW", "PyramidDrop"]
    config = speed.CODE.config_class(**_fields(record), saturation_layer=2)
    sizes = [sum(accounting.cache_bytes(each, 576, 8).values()) for each in (accounting.dense_config(config), config)]
    dense, routed, *_ = measured["methods"].values()
    assert routed["cache_bytes"] / dense["cache_bytes"] == sizes[1] / sizes[0]
    assert all(result["decode_step_seconds"]["median"] > 0 for result in measured["methods"].values())
    shown = capsys.readouterr().out
    assert speed.table(record) in shown
    assert all(f"| {name} |" in shown for name in measured["methods"])


def test_figures_by_hand():
    runs = [{"methods": {"LLaVA": {"decode_ratio": 1}, "DPVR": {"decode_ratio": ratio}}} for ratio in (1.25, 0.5)]
    assert speed.figures({"runs": runs}) == {"decode_differs": {"LLaVA": 0, "DPVR": 0.5}}


def test_methods_of_equal_accuracy_are_the_cheapest_that_quality_found(monkeypatch, tmp_path):
    at_llavas_depth = speed.equal_settings("tiny-llava", 32)
    assert list(at_llavas_depth) == list(json.loads(speed.EQUAL_RESULTS.read_text())["runs"][0]["methods"])[1:]
    assert at_llavas_depth["DPVR, fusion layer trained too (S=4)"] == speed.Routed(4, 1)
    assert at_llavas_depth["DPVR without side branch, fusion layer trained (S=8)"] == speed.Routed(8, 0)
    assert at_llavas_depth["VTW, last layer trained (K=16)"] == vtw(16)
    assert at_llavas_depth["FastV (K=16, R=0.9)"] == fastv(16, 0.9)  # and with its last layer trained
    assert at_llavas_depth["PyramidDrop (16, 20, 24; 0.25)"] == pyramid_drop((16, 20, 24), 0.25)
    settings = speed.equal_settings("tiny-llava", 8)
    options = ["--layers", "8", "--equal-accuracy", "tiny-llava", "--batch", "1", "--decode-tokens", "1"]
    (measured,) = run(monkeypatch, speed, tmp_path / "speed.json", *options)["runs"]
    names = list(measured["methods"])
    assert names == ["LLaVA", *settings]
    assert measured["methods"][names[1]]["cache_bytes"] < measured["methods"]["LLaVA"]["cache_bytes"]


def _fields(record):
    fields = speed.make_config(record["layers"], record["hidden_size"]).to_dict()
    fields.pop("model_type")
    return fields


def test_compiled_prefills_give_the_logits_of_those_that_are_not(monkeypatch, tmp_path, capsys):
    graphs, prefill, counts = {}, speed.prefill, torch._dynamo.utils.counters["stats"]

    def count(method, *inputs):
        before = counts["unique_graphs"]
        outputs = prefill(method, *inputs)
        is_compiled = isinstance(method.model, torch._dynamo.OptimizedModule)
        graphs.setdefault((method.name.split(" (")[0], is_compiled), []).append(counts["unique_graphs"] - before)
        return outputs

    monkeypatch.setattr(speed, "prefill", count)
    record = run(monkeypatch, compiled, tmp_path / "compiled.json", "--batch", "1")
    (measured,) = record["runs"]
    assert [name.split(" (")[0] for name in measured["methods"]] == ["LLaVA", "DPVR"]
    assert all(result["logits_difference"] < 1e-5 for result in measured["methods"].values())
    for name in ("LLaVA", "DPVR"):  # compiled once, and the others never
        first, *later = graphs[name, True]
        assert first > 0
        assert not any(later + graphs[name, False])
    assert compiled.table(record) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "3"], "--layers 3 must be at least 4"),
        (["--prompts", "100+8"], "--prompts 100+8: whole images of 576 tokens each"),
        (["--saturation-layer", "4"], "--saturation-layer 4 must be between 1 and 3"),
        (["--repeats", "0"], "--repeats and --batch must be at least 1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_before_anything_runs(monkeypatch, tmp_path, capsys, options, message):
    for script in (speed, compiled):
        with pytest.raises(SystemExit) as refused:
            run(monkeypatch, script, tmp_path / "record.json", *options)
        assert refused.value.code == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("times", "is_said"), [(1, False), (5, True)])
def test_a_type_that_the_cpu_is_slow_in_is_told_before_anything_runs(monkeypatch, capsys, times, is_said):
    monkeypatch.setattr(speed, "product_seconds", lambda dtype: 0.1 if dtype == torch.float32 else 0.1 * times)
    for arguments in (["speed.py"], ["speed.py", "--dtype", "float32"]):
        monkeypatch.setattr(sys, "argv", [*arguments, "--device", "cpu"])
        speed.parse_args()
        said = capsys.readouterr().err
        assert ("bfloat16 takes about 5 times as long as float32" in said) == (is_said and len(arguments) == 1)
