# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""benchmarks/quality.py, with quality_methods.py and quality_report.py: its short cuts give what plain generation
gives, its report says what is there."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration

from benchmarks import accounting, quality, quality_methods, quality_report
from benchmarks.baselines import PrunedLlava, fastv, prefill_loads, pyramid_drop, vtw
from benchmarks.quality_methods import Routing, TrainedLast
from benchmarks.quality_report import Entry
from configuration_dpvr import DPVRConfig

sys.path.insert(0, str(ROOT / "examples"))

import digits as task

from scripts.train_tiny_llava import generate_answers
from training.staged import collate_rows

TINY = ROOT / "examples" / "tiny-llava"
QUESTIONS = 4  # of each kind
WEAK = {"vtw/3": vtw(3), "fastv/1/0.75": fastv(1, 0.75), "pyramid/1-2-4/0.5": pyramid_drop((1, 2, 4), 0.5)}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def llava():
    return LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pruned():
    return PrunedLlava.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prepared(llava, processor):
    batches = quality.question_batches(processor, 0, QUESTIONS)
    return [quality.prepare(llava, batch, kind) for kind, batch in batches.items()]


def generated_accuracy(model, processor) -> dict[str, float]:
    """Greedy answers to the same questions, asked as a user asks."""
    pairs = task.make_questions(quality.FIRST_QUESTION_SEED, QUESTIONS, "test")
    questions = [question for _, question in pairs]
    answers = generate_answers(model, processor, [grid.image for grid, _ in pairs], questions)
    right = [task.is_correct(answer, question.answer) for answer, question in zip(answers, questions, strict=True)]
    kinds = np.array([question.kind for question in questions])
    return {kind: float(np.array(right)[kinds == kind].mean()) for kind in task.KINDS}


@pytest.mark.parametrize("name", ["dense", *WEAK])
def test_one_teacher_forced_pass_gives_the_accuracy_of_greedy_generation(name, pruned, processor, prepared):
    pruned.stages = WEAK.get(name, ())
    generated = generated_accuracy(pruned, processor)
    assert quality.pruned_accuracy(pruned, WEAK.get(name, ()), prepared) == generated
    assert (0 < np.mean(list(generated.values())) < 1) == (
        name != "dense"
    )  # where all or none is right, any way agrees


def test_so_it_does_for_dpvr(processor, prepared, tmp_path):
    staged = quality.load_routed(TINY, Routing(3, "untrained"), tmp_path)
    generated = generated_accuracy(staged.base, processor)
    batches = [(batch, quality.routed_features(staged, batch)) for batch in prepared]
    assert quality.routed_accuracy(staged, batches) == generated
    assert 0 < np.mean(list(generated.values())) < 1


def test_in_the_side_branch_a_vision_token_sees_what_the_variant_says(prepared, tmp_path):
    def side_states(sees):
        staged = quality.load_routed(TINY, Routing(3, "untrained", sees=sees), tmp_path)
        branch = staged.core.side_branch
        for weight in branch.parameters():  # no identity
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
        _, vision, _ = staged.plan_vision(features)
        return [branch(states, vision) for states in (states, changed)]

    batch = prepared[0]
    features = quality.routed_features(quality.load_routed(TINY, Routing(3, "untrained"), tmp_path), batch)
    states = torch.randn(len(batch.labels), 36, features.hidden_states.shape[-1])
    changed = states.clone()
    changed[:, 7] += 1
    unmasked = {"earlier vision tokens": slice(7, None), "all vision tokens": slice(None), "itself alone": slice(7, 8)}
    assert unmasked.keys() == quality_methods.SEEN.keys()
    for sees, columns in unmasked.items():
        before, after = side_states(sees)
        changes = (before != after).any(-1)
        assert changes[:, columns].all()
        assert changes.sum() == changes[:, columns].numel()
    staged = quality.load_routed(TINY, Routing(3, "untrained"), tmp_path)
    _, vision, _ = staged.plan_vision(features)
    _, masked = quality.set_mask(quality_methods.SEEN[Routing.sees], staged.core.side_branch, (states, vision))
    run = staged.core.side_branch
    torch.testing.assert_close(run(states, masked), run(states, vision))


@pytest.mark.parametrize("name", WEAK)
@torch.no_grad()
def test_going_on_from_the_dense_models_states_changes_nothing(name, pruned, processor, prepared):
    batch = quality.question_batches(processor, 0, QUESTIONS)["count"]
    [states] = [each for each in prepared if each.kind == "count"]
    labels = batch.pop("labels")
    pruned.stages = WEAK[name]
    whole = pruned(**batch, last_column=states.last_column).logits
    first = 1 if name == "pyramid/1-2-4/0.5" else {"vtw/3": 3, "fastv/1/0.75": 0}[name]
    arguments = (states.is_vision, states.attention_mask, None, DynamicCache(), states.last_column, first)
    continued = pruned.lm_head(pruned.model.decode(states.states[first], *arguments))
    read = quality.predicts(labels)
    torch.testing.assert_close(continued[read], whole[read], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dense", *WEAK])
@torch.no_grad()
def test_the_last_layer_that_trains_starts_as_the_baseline_itself(name, pruned, processor, prepared, tmp_path):
    staged = quality.load_routed(TINY, Routing(7, "untrained", num_side_layers=0), tmp_path)
    stages, rows, expected = WEAK.get(name, ()), [], []
    for batch in prepared:
        features = quality.pruned_features(pruned, stages, batch)
        states = batch.final_states
        if stages:
            states = pruned.model.decode(*quality.decoder_arguments(pruned, batch))[quality.predicts(batch.labels)]
        torch.testing.assert_close(staged.answer_states(features), states, rtol=1e-4, atol=1e-4)
        rows += quality.masked_rows(features)
        expected.append(states)
    assert len({len(row["labels"]) for row in rows}) > 1  # to be padded
    together = quality.Features(**collate_rows(rows))
    torch.testing.assert_close(staged.answer_states(together), torch.cat(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.teacher_states, torch.cat([batch.final_states for batch in prepared]))


def test_the_last_layer_trains_of_llava_and_of_baselines_that_drop_by_half_of_the_depth():
    trained = {name for name, method in quality_methods.methods(8).items() if isinstance(method, TrainedLast)}
    names = {name.removesuffix(f"/{quality_methods.LAST}") for name in trained}
    assert {"dense", "vtw/1", "vtw/4", "fastv/4/0.9", "pyramid/4-5-6/0.25"} <= names
    assert not names & {"vtw/5", "fastv/6/0.5"}
    assert not any("all ask" in name for name in names)


def test_every_seed_asks_about_other_pictures_of_held_out_digits(processor):
    first, other = (quality.question_batches(processor, seed, 1)["look"]["pixel_values"] for seed in (0, 1))
    pairs = task.make_questions(quality.FIRST_QUESTION_SEED, 1, "test")
    cells = np.stack([grid.cells for grid, question in pairs if question.kind == "look"])
    assert torch.equal(first, quality.to_pixel_values(torch.from_numpy(cells).float() / 255, processor))
    assert not torch.equal(first, other)


def test_a_last_layer_trains_on_the_questions_of_the_conversations(llava, processor):
    def answers(batches):
        return torch.cat([batch.labels[batch.labels != -100] for batch in batches]).tolist()

    batches = quality.training_batches(llava, processor, 1)
    questions = quality.training_batches(llava, processor, 1, each_alone=True)
    assert answers(questions) == answers(batches)
    assert len(questions[0].labels) == quality.LONG_TURNS * len(batches[0].labels)
    image = batches[0].is_vision[0]
    for i in range(quality.LONG_TURNS):  # the image of the conversation that it is from
        states = questions[0].states[0]
        torch.testing.assert_close(states[i, questions[0].is_vision[i]], batches[0].states[0][0, image])


def test_a_baselines_last_layer_learns_and_every_seed_starts_from_llavas(llava, processor, prepared, monkeypatch):
    def last_layer(staged, batches) -> float:
        return staged.layers()[2][0].mlp.up_proj.weight.double().abs().sum().item()

    def measured(cells: dict) -> dict[str, float]:
        found = {"vtw/3": TrainedLast(vtw(3))}
        quality.measure_trained_baselines(TINY, found, [prepared] * 2, pool, args, {2: cells}, lambda: None)
        return cells["vtw/3"]

    monkeypatch.setattr(quality, "routed_accuracy", last_layer)
    args = quality.parse_args(["--batch-size", "1"])
    pool = quality.training_batches(llava, processor, 1, each_alone=True)
    both, second = measured({}), measured({"vtw/3": {"0": "was there"}})
    assert second == {"0": "was there", "1": both["1"]}
    assert both["0"] != both["1"]
    before = llava.model.language_model.layers[-1].mlp.up_proj.weight.double().abs().sum().item()
    assert before not in both.values()


def test_a_training_moves_the_parts_of_dpvr_that_its_name_says(llava, processor, prepared, monkeypatch):
    def sums(staged, batches) -> dict[str, float]:
        parts = {"side branch": staged.core.side_branch, "fusion layer": staged.layers()[2][0]}
        return {name: sum(x.double().abs().sum().item() for x in part.parameters()) for name, part in parts.items()}

    monkeypatch.setattr(quality, "routed_accuracy", sums)
    args, cells = quality.parse_args(["--batch-size", "1"]), {}
    routings = [Routing(6, training) for training in ("untrained", "trained", "trained with fusion")]
    pool = quality.training_batches(llava, processor, 1)
    quality.measure_routings(TINY, routings, [prepared], pool, args, {2: cells}, lambda: None)
    start, *found = (cells[quality_methods.name_of(routing)]["0"] for routing in routings)
    moved = [{name for name in start if each[name] != start[name]} for each in found]
    assert moved == [{"side branch"}, {"side branch", "fusion layer"}]


def test_an_interrupted_run_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    found = {"dense": (), "vtw/6": vtw(6), f"vtw/6/{quality_methods.LAST}": TrainedLast(vtw(6))}
    trainings = (*quality_methods.TRAININGS, quality_methods.LORA)
    found |= {f"dpvr/6/{training}": Routing(6, training) for training in trainings}
    monkeypatch.setattr(quality_methods, "methods", lambda num_layers: found)
    output = tmp_path / "quality.json"
    arguments = ["--models", "tiny-llava", "--questions", "1", "--steps", "1", "--pool", "16", "--batch-size", "2"]
    arguments += ["--output", str(output)]  # the figure lies beside it
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments, "--seeds", "1"])
    assert quality.main() == 0
    record = json.loads(output.read_text())
    cells = record["models"]["tiny-llava"]["cells"]
    assert {name: list(seeds) for name, seeds in cells.items()} == {name: ["0"] for name in found}
    cells["vtw/6"]["0"]["look"] = 0.123  # kept only if it is not measured again
    del cells["dense"]["0"]
    output.write_text(json.dumps(record))
    assert quality.main() == 0
    again = json.loads(output.read_text())["models"]["tiny-llava"]["cells"]
    assert again["vtw/6"]["0"]["look"] == 0.123
    assert again["dense"]["0"].keys() == set(task.KINDS)
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert "| tiny-llava | vtw/6 |" in capsys.readouterr().out
    assert len(quality_report.by_layer(json.loads(output.read_text())).splitlines()) == 3
    record = json.loads(output.read_text())
    assert record["models"]["tiny-llava"]["measured_with"].keys() == found.keys()
    record["models"]["tiny-llava"]["weights"] = "of another model"
    output.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="with weights of fingerprint of another model, but those of"):
        quality.main()
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments[:4], "--steps", "2", *arguments[6:]])
    with pytest.raises(SystemExit, match="choose another --output"):
        quality.main()


def test_loras_first_matrices_follow_from_the_seed_alone(tmp_path):
    def drawn(seed):
        quality.reset_lora(staged, seed)
        return {name: weight.clone() for name, weight in staged.named_parameters() if ".lora_" in name}

    runs = []
    for global_seed in range(2):
        torch.manual_seed(global_seed)
        staged = quality.load_routed(TINY, Routing(6, quality_methods.LORA), tmp_path)
        runs.append((drawn(0), drawn(1)))
    (first, second), (again, _) = runs
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first if ".lora_A." in name)
    assert all(weight.abs().max() == 0 for name, weight in second.items() if ".lora_B." in name)


def entry(name, flops, kv_bytes, accuracy) -> Entry:
    return Entry("m", name, flops, kv_bytes, {kind: np.array(accuracy) for kind in (*task.KINDS, "all")})


def test_pareto_front_by_hand():
    dense = entry("dense", 1.0, 1.0, [0.9, 1.0])
    cheap = entry("vtw/1", 0.5, 0.7, [0.4, 0.6])
    better = entry("dpvr/1/trained", 0.5, 0.8, [0.8, 0.9])
    rows = [dense, cheap, better]
    assert quality_report.better(cheap, rows, "flops", "all") is better  # as cheap, more accurate
    assert quality_report.better(cheap, rows, "kv_bytes", "all") is None
    assert quality_report.better(better, rows, "flops", "all") is None
    assert quality_report.better(dense, rows, "flops", "all") is None
    twin = entry("fastv/1/0.5", 0.5, 0.7, [0.4, 0.6])
    assert quality_report.better(cheap, [*rows, twin], "kv_bytes", "all") is None  # a twin does not dominate
    text = quality_report.verdict(rows)
    assert "m, DPVR trained, all by flops: 1 of 1 on the front" in text
    ahead = entry("fastv/1/0.25", 0.4, 0.7, [0.9, 0.9])
    deeper = entry("dpvr/2/trained with fusion", 0.4, 0.7, [1.0, 1.0])  # the verdict is on others than DPVR
    lines = quality_report.verdict([*rows, ahead, deeper]).splitlines()
    number = lines.index("m, DPVR trained, all by flops: 0 of 1 on the front")
    assert lines[number + 1].startswith("    dpvr/1/trained is behind fastv/1/0.25 by 5.0 ±")
    assert "| m | vtw/1 | 50.0 | 70.0 | 50.0 ±" in quality_report.table(rows)
    assert "| 52.2 ±" in quality_report.table(rows)  # of dense %: 0.4 of 0.9 and 0.6 of 1


def test_the_cheapest_setting_that_keeps_as_much_by_hand(monkeypatch):
    entries = [
        entry("dense", 1.0, 1.0, [0.9, 1.0]),
        entry("vtw/3", 0.5, 0.4, [0.8, 0.9]),
        entry("vtw/4", 0.7, 0.8, [0.9, 1.0]),
        entry("vtw/5", 0.8, 0.7, [0.9, 0.99]),
        entry("vtw/4/last layer trained", 0.7, 0.8, [0.9, 1.0]),
        entry("fastv/2/0.5", 0.6, 0.6, [0.9, 0.9]),
        entry("dpvr/2/trained with fusion", 0.6, 0.6, [0.9, 0.99]),
        entry("dpvr/1/trained with fusion/2 fusion layers", 0.1, 0.1, [1.0, 1.0]),
    ]
    monkeypatch.setattr(quality_report, "summarize", lambda record: entries)
    rows = [line.strip("| ").split(" | ") for line in quality_report.cheapest({"models": {"m": {}}}).splitlines()[2:]]
    found = {row[1]: row for row in rows}
    assert [found["VTW"][i] for i in (2, 3, 5, 6)] == ["4", "70.0", "5", "70.0"]
    assert found["VTW, last layer trained"][2] == "4"
    assert found["FastV"][2].strip() == "none"  # the mean is too low
    assert found["DPVR, fusion layer trained too"][2:4] == ["2", "60.0"]
    assert found["DPVR, fusion layer trained too"][4].startswith("99.5")
    short = quality_report.costs_at_equal_accuracy({"models": {"m": {}}}).splitlines()
    assert "| VTW | 70 | 70 |" in short
    assert "| FastV | none | none |" in short


def test_costs_are_shares_of_the_dense_model(llava):
    lengths = {40: 3, 60: 1}
    assert quality_methods.relative_cost(llava.config, (), lengths) == (1, 1)
    shares = [quality_methods.relative_cost(llava.config, vtw(layer), lengths) for layer in range(1, 9)]
    assert shares == sorted(shares)
    assert shares[-1] == (1, 1)
    # 36 vision tokens leave 8 layers after the fourth: of 45 text tokens on average, 36 / 81 of half of all bytes
    assert shares[3][1] == pytest.approx(1 - 36 / 81 / 2)
    routed = quality_methods.relative_cost(llava.config, Routing(4, "trained"), lengths)
    assert shares[3][0] < routed[0] < 1
    assert routed[1] == pytest.approx(1 - 36 / 81 * 3 / 8)
    # training costs nothing later
    assert quality_methods.relative_cost(llava.config, TrainedLast(vtw(4)), lengths) == shares[3]
    # five layers of vision and a side branch against five layers: the last one's keys and values are what is left
    beside = quality_methods.relative_cost(llava.config, vtw(5), lengths)
    assert routed[1] == beside[1]
    assert beside[0] < routed[0] < beside[0] + 0.05


def test_a_cost_is_that_of_the_prompts_of_all_seeds(llava, monkeypatch):
    monkeypatch.setattr(quality_methods, "methods", lambda num_layers: {"vtw/4": vtw(4)})
    answers = {"vtw/4": {seed: dict.fromkeys(task.KINDS, 1.0) for seed in "01"}}
    result = {"prompt_lengths": {"0": {"40": 2}, "1": {"40": 1, "60": 1}}, "cells": answers}
    [found] = quality_report.summarize_model("m", result, llava.config)
    assert (found.flops, found.kv_bytes) == quality_methods.relative_cost(llava.config, vtw(4), {40: 3, 60: 1})


def test_every_method_of_the_larger_model_has_a_cost(llava):
    llava_config = type(llava.config)(
        **{**llava.config.to_dict(), "text_config": {**llava.config.text_config.to_dict()}}
    )
    llava_config.text_config.num_hidden_layers = 12
    for name, method in quality_methods.methods(12).items():
        flops, held = quality_methods.relative_cost(llava_config, method, {50: 1})
        assert 0 < flops <= 1.1, name
        assert 0 < held <= 1.1, name


def test_settings_keep_their_share_of_another_depth():
    moved = [quality_report.at_depth_share(method, 8, 32) for method in (vtw(5), fastv(4, 0.9), Routing(1, "trained"))]
    assert moved == [vtw(20), fastv(16, 0.9), Routing(4, "trained")]
    assert quality_report.at_depth_share(pyramid_drop((4, 5, 6), 0.25), 8, 32) == pyramid_drop((16, 20, 24), 0.25)
    assert quality_report.at_depth_share(TrainedLast(vtw(4)), 12, 32) == TrainedLast(vtw(11))  # 10.7: the next layer
    assert quality_report.at_depth_share((), 8, 32) == ()


def test_costs_in_llava_are_those_of_its_own_formulas(monkeypatch):
    entries = [Entry("tiny-llava", *x, {"all": np.ones(2)}) for x in (("dense", 1.0, 1.0), ("vtw/5", 0.8, 0.8))]
    entries.append(Entry("tiny-llava", "dpvr/4/trained", 0.7, 0.9, {"all": np.ones(2)}))
    monkeypatch.setattr(quality_report, "summarize", lambda record: entries)
    rows = quality_report.costs_in_llava({"models": {"tiny-llava": {}}}).splitlines()
    config = DPVRConfig(saturation_layer=16)
    dense = accounting.dense_config(config)
    held = [sum(accounting.cache_bytes(each, 576, 64).values()) for each in (config, dense)]
    read = accounting.read_one_token(accounting.prefill_loads(dense, 576, 64))
    flops = accounting.prefill_flops(config, 576, 64).decoder / accounting.decoder_flops(dense, read)
    assert f"| DPVR, side branch trained | {flops:.0%} | {held[0] / held[1]:.0%} |" in rows
    assert f"| VTW | {baselines_share(dense):.0%} | {(20 * 640 + 12 * 64) / (32 * 640):.0%} |" in rows
    assert "| FastV | none | none |" in rows


def test_figures_by_hand(monkeypatch):
    kept = {1: [0.98, 0.99], 2: [0.99, 0.98], 3: [1.0, 0.98]}
    entries = [Entry("tiny-llava", "dense", 1.0, 1.0, {"all": np.array([0.5, 1.0])})]
    for layer in range(1, 8):
        right = np.array([0.5, 1.0]) * kept.get(layer, [1.0, 0.99])
        entries.append(Entry("tiny-llava", f"dpvr/{layer}/trained with fusion", layer / 10, 0.9, {"all": right}))
    entries.append(Entry("tiny-llava", "vtw/3", 0.25, 0.9, {"all": np.array([0.49, 0.95])}))  # 98 and 95 % of dense
    monkeypatch.setattr(quality_report, "summarize", lambda record: entries)
    figures = quality_report.figures({"models": {"tiny-llava": {}}})
    assert figures["kept"]["tiny-llava"]["dense"] == 1
    assert figures["kept"]["tiny-llava"]["dpvr/1/trained with fusion"] == pytest.approx(0.985)
    assert figures["kept_from"] == {"tiny-llava": 3}
    assert figures["right"]["tiny-llava"]["dense"] == 75
    assert figures["right"]["tiny-llava"]["dpvr/3/trained with fusion"] == pytest.approx((50 + 98) / 2)
    mean, half = figures["beyond"]["tiny-llava"]["dpvr/3/trained with fusion"]["vtw/3"]  # 50 - 49 and 98 - 95 points
    assert mean == pytest.approx(2)
    assert half == pytest.approx(12.7062, abs=1e-4)  # Student's t of one degree of freedom; the standard error is 1
    assert figures["beyond"]["tiny-llava"]["vtw/3"].keys() == {"dpvr/3/trained with fusion"}
    assert "dense" not in figures["beyond"]["tiny-llava"]
    assert figures["flops"]["tiny-llava"]["vtw/3"] == 25
    assert figures["fewest_flops"] == {"tiny-llava": {"DPVR, fusion layer trained too": pytest.approx(30)}}
    [(name, flops)] = figures["flops_in_llava"]["tiny-llava"].items()
    config = DPVRConfig(saturation_layer=12)  # layer 3 of 8
    dense = accounting.dense_config(config)
    read = accounting.read_one_token(accounting.prefill_loads(dense, 576, 64))
    assert name == "DPVR, fusion layer trained too"
    assert flops == accounting.prefill_flops(config, 576, 64).decoder / accounting.decoder_flops(dense, read)


def baselines_share(dense) -> float:
    """FLOPs of VTW at layer 20 of 32, to those of LLaVA, both reading the last token alone in the last layer."""
    read = accounting.read_one_token
    loads = [read(prefill_loads(dense, vtw(20), 576, 64)), read(accounting.prefill_loads(dense, 576, 64))]
    return accounting.decoder_flops(dense, loads[0]) / accounting.decoder_flops(dense, loads[1])
