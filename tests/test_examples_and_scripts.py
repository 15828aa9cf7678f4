"""The embedded models do what their records say, and every command of the README runs."""

import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from processes import run_script
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, LlavaForConditionalGeneration

from benchmarks.quality import MODELS
from convert_llava_to_dpvr import convert

sys.path.insert(0, str(ROOT / "examples"))

import digits as task

from scripts import run_transformers_tests
from scripts.train_tiny_llava import generate_answers

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text())
QUESTIONS = 25


def refusal(script, *arguments, monkeypatch, capsys) -> tuple[int, str]:
    """Status and last line of a script that ends with an error, run here: a process of its own imports for seconds."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    said = capsys.readouterr().err
    if isinstance(ended.value.code, str):  # which Python would print
        return 1, f"{said}{ended.value.code}".splitlines()[-1]
    return ended.value.code, said.splitlines()[-1]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded LLaVA and the DPVR made of it with its trained side branch, each with its processor."""
    folder = tmp_path_factory.mktemp("embedded") / "dpvr"
    convert(EXAMPLES / "tiny-llava", folder, adapter=EXAMPLES / "dpvr-tiny-adapter")
    llava = LlavaForConditionalGeneration.from_pretrained(EXAMPLES / "tiny-llava", dtype=torch.float32).eval()
    dpvr = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(EXAMPLES / "tiny-llava")
    return (llava, processor), (dpvr, AutoProcessor.from_pretrained(folder, trust_remote_code=True))


def recorded(name, *path):
    record = json.loads((EXAMPLES / name / "training.json").read_text())["held_out"]
    for key in path:
        record = record[key]
    return record


def test_the_records_reach_the_aims_on_enough_questions():
    for kind in task.KINDS:
        for name in MODELS:
            result = recorded(name, kind)
            assert result["questions"] >= 500
            assert result["accuracy"] >= (0.95 if kind == "look" else 0.85)
        assert recorded("dpvr-tiny-adapter", "trained", kind)["questions"] >= 500


def assert_as_accurate(model, processor, *record):
    pairs = task.make_questions(12345, QUESTIONS, "test")
    questions = [question for _, question in pairs]
    answers = generate_answers(model, processor, [grid.image for grid, _ in pairs], questions)
    right = np.array([task.is_correct(a, q.answer) for a, q in zip(answers, questions, strict=True)])
    expected = np.mean([recorded(*record, kind)["accuracy"] for kind in task.KINDS])
    spread = (expected * (1 - expected) / len(right)) ** 0.5
    assert right.mean() > expected - 4 * spread - 0.01


@pytest.mark.parametrize(("index", "record"), [(0, "dense"), (1, "trained")])
def test_the_embedded_models_are_as_accurate_as_recorded(embedded, index, record):
    assert_as_accurate(*embedded[index], "dpvr-tiny-adapter", record)


def test_the_second_llava_is_as_accurate_as_recorded():
    folder = EXAMPLES / MODELS[1]
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    assert_as_accurate(llava, AutoProcessor.from_pretrained(folder), MODELS[1])


def test_stop_strings_end_an_answer(embedded):
    grid, question = next(pair for pair in task.make_questions(1, 1, "test") if pair[1].kind == "describe")
    model, processor = embedded[1]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=grid.image, text=prompt, return_tensors="pt")
    second = question.answer.split()[1]

    def answer(**options):
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, **options)
        return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]

    stopped = answer(stop_strings=[second.strip(",.")], tokenizer=processor.tokenizer)
    assert stopped == answer()[: len(stopped)]
    assert second.strip(",.") in stopped.split()[-1]
    assert len(stopped.split()) <= 2 < len(answer().split())


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/dpvr", "file.json"])
def test_a_model_that_is_not_there_is_called_so_by_each_command(name, tmp_path, monkeypatch, capsys):
    from convert_llava_to_dpvr import main as convert_command
    from scripts import analyze_saturation, merge_adapter, train_side_branch

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.json").write_text("[]")
    for main, options in (
        (convert_command, ["out"]),
        (analyze_saturation.main, ["--output", "out"]),
        (merge_adapter.main, [str(EXAMPLES / "dpvr-tiny-adapter"), "out"]),
        (train_side_branch.main, ["--data", "file.json", "--output", "out", "--use_cpu"]),
    ):
        assert main([name, *options]) == 1
        what = "is a file" if name == "file.json" else "does not exist"
        assert f"{name} {what}: give the folder of a checkpoint, or a Hub id, owner/name." in capsys.readouterr().err


def test_the_embedded_files_are_small():
    for name in MODELS:
        assert (EXAMPLES / name / "model.safetensors").stat().st_size < 10_000_000
    assert (EXAMPLES / "dpvr-tiny-adapter" / "adapter_model.safetensors").stat().st_size < 1_000_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_has_help_with_examples(script, tmp_path):
    assert "example" in run_script(script, "--help", cwd=tmp_path).stdout


@pytest.fixture
def ignored_sigterm():
    """So that one which nothing handles does not end the tests."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.usefixtures("ignored_sigterm")
@pytest.mark.parametrize(
    ("script", "options", "stopped"),
    [
        ("checksums", ["."], "scripts.checksums.write_checksums"),
        ("demo", [], "argparse.ArgumentParser.parse_args"),
        ("push_to_hub", ["folder", "user/name"], "scripts.push_to_hub.push_to_hub"),
        (
            "train_side_branch",
            ["model", "--output", "adapter", "--data", str(ROOT / "README.md")],
            "scripts.train_side_branch.run",
        ),
        ("train_tiny_llava", [], "argparse.ArgumentParser.parse_args"),
        ("train_tiny_side_branch", [], "argparse.ArgumentParser.parse_args"),
    ],
)
def test_an_interrupted_script_says_in_a_line_what_was_kept(script, options, stopped, monkeypatch, capsys):
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGTERM)  # which ends as Ctrl-C does

    main = importlib.import_module(f"scripts.{script}").main
    monkeypatch.setattr(stopped, interrupted)
    if stopped.startswith("scripts."):
        assert main(options) == 130
    else:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
        assert ended.value.code == 130
    assert re.fullmatch(r"\ninterrupted; .{10,100}\n", capsys.readouterr().err)


def test_the_demo_writes_a_checkpoint_and_a_picture_and_can_be_run_again(tmp_path):
    for _ in range(2):
        output = run_script(ROOT / "scripts" / "demo.py", "--questions", 2, cwd=tmp_path).stdout
        assert "KV-cache bytes" in output
        assert (tmp_path / "demo.png").stat().st_size > 10_000
        assert (tmp_path / "dpvr-tiny" / "config.json").is_file()


@pytest.mark.parametrize("script", ["scripts/demo.py", "examples/evaluation/write_questions.py"])
def test_numbers_that_give_no_questions_are_refused(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for option, value, least in (("--questions", 0, 1), ("--questions", -1, 1), ("--seed", -1, 0)):
        status, line = refusal(script, option, value, monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2
        assert line.endswith(f"error: {option} must be at least {least}, got {value}")
    assert not list(tmp_path.iterdir())


def test_the_demo_deletes_nothing_of_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    convert(EXAMPLES / "tiny-llava", tmp_path / "noted", adapter=EXAMPLES / "dpvr-tiny-adapter")
    (tmp_path / "noted" / "notes.txt").write_text("mine")
    convert(EXAMPLES / "tiny-llava-12", tmp_path / "another", saturation_layer=5)
    (tmp_path / "file").write_text("mine")
    for name in ("noted", "another", "file"):
        path = tmp_path / name
        before = {each: each.read_bytes() for each in (path.iterdir() if path.is_dir() else [path])}
        status, line = refusal("scripts/demo.py", "--output", name, monkeypatch=monkeypatch, capsys=capsys)
        assert status == 1
        assert line.startswith(f"error: {name} ")
        assert all(each.read_bytes() == content for each, content in before.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "file", "noted"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_clean_leaves_a_checkpoint_that_somebody_may_have_put_there(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("dpvr-tiny/notes.txt", ".venv/x", ".pytest_cache/x", "demo.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    result = subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "dpvr-tiny stays" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "dpvr-tiny"]
    assert (tmp_path / "dpvr-tiny" / "notes.txt").read_text() == "x"


def test_embedded_models_are_not_trained_into_a_folder_of_something_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "chapter1.txt").write_text("mine")
    (tmp_path / "training.json").write_text('{"base_model": "of another script"}')
    for script in ("scripts/train_tiny_side_branch.py", "scripts/train_tiny_llava.py"):
        status, line = refusal(script, "--output", tmp_path, monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2
        assert "exists and holds no training.json of this script" in line
    assert (tmp_path / "chapter1.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("script", "options", "status", "why"),
    [
        ("scripts/train_tiny_side_branch.py", "--steps 0", 2, "--steps must be at least 1, got 0"),
        ("scripts/train_tiny_side_branch.py", "--seed -1", 2, "--seed must be at least 0, got -1"),
        (
            "scripts/train_tiny_side_branch.py",
            "--learning-rate nan",
            2,
            "--learning-rate must be more than 0, got nan",
        ),
        ("scripts/train_tiny_llava.py", "--seed -1", 2, "--seed must be at least 0, got -1"),
        ("scripts/train_tiny_llava.py", "--tower-steps -1", 2, "--tower-steps must be at least 0, got -1"),
        ("scripts/train_tiny_llava.py", "--threads 0", 2, "--threads must be at least 1, got 0"),
        ("scripts/train_tiny_side_branch.py", "--saturation-layer 99", 1, "error: saturation_layer=99 must be "),
        ("benchmarks/side_branch_seeds.py", "--saturation-layers 99", 1, "error: saturation_layer=99 must be "),
    ],
)
def test_numbers_that_mean_nothing_are_refused_with_a_sentence(
    tmp_path, monkeypatch, capsys, script, options, status, why
):
    options = [*options.split(), "--output", tmp_path / "out"]
    found, line = refusal(script, *options, monkeypatch=monkeypatch, capsys=capsys)
    assert found == status
    assert why in line
    assert not list(tmp_path.iterdir())


def test_the_training_scripts_run_and_write_what_the_converter_takes(tmp_path):
    llava, adapter = tmp_path / "llava", tmp_path / "adapter"
    steps = ("--tower-steps", 1, "--text-steps", 1, "--steps", 1, "--questions", 1)
    run_script(ROOT / "scripts" / "train_tiny_llava.py", *steps, "--output", llava)
    run_script(
        *(ROOT / "scripts" / "train_tiny_side_branch.py", "--source", llava, "--output", adapter),
        *("--steps", 1, "--questions", 1),
    )
    summary = convert(llava, tmp_path / "dpvr", adapter=adapter)
    assert summary.side_branch == "trained"


def test_another_llava_is_trained_on_the_tower_of_one_that_is_there(tmp_path):
    steps = ("--text-steps", 1, "--steps", 1, "--questions", 1, "--layers", 2)
    run_script(
        *(ROOT / "scripts" / "train_tiny_llava.py", *steps, "--output", tmp_path / "llava"),
        *("--tower", EXAMPLES / "tiny-llava"),
    )
    theirs, own = (load_file(path / "model.safetensors") for path in (EXAMPLES / "tiny-llava", tmp_path / "llava"))
    tower = [name for name in own if "vision_tower" in name]
    assert tower
    assert all(torch.equal(own[name], theirs[name]) for name in tower)
    assert json.loads((tmp_path / "llava" / "training.json").read_text())["tower_steps"] == 0


REPORT = """<testsuites><testsuite>
<testcase classname="LlavaVLMTest" name="test_a"/><testcase classname="DPVRVLMTest" name="test_a"/>
<testcase classname="LlavaVLMTest" name="test_b"/><testcase classname="DPVRVLMTest" name="test_b"><failure/></testcase>
<testcase classname="DPVRVLMTest" name="test_b"/>
<testcase classname="LlavaVLMTest" name="test_c"/>
<testcase classname="DPVRVLMTest" name="test_c"><skipped message="why"/></testcase>
<testcase classname="LlavaVLMTest" name="test_d"><failure/></testcase><testcase classname="DPVRVLMTest" name="test_d"/>
</testsuite></testsuites>"""


def test_a_test_that_only_llava_passes_is_told_with_what_became_of_it(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    pair = run_transformers_tests.compare(run_transformers_tests.read_report(tmp_path / "report.xml"))[
        "its tester of vision-language models"
    ]
    assert pair["DPVR"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert pair["passed by LLaVA alone"] == {"test_b": "failed", "test_c": "skipped: why"}


NO_TESTS = '<testsuites><testsuite><testcase classname="" name="suite"><error/></testcase></testsuite></testsuites>'


@pytest.mark.parametrize(
    ("code", "report", "message"),
    [
        (0, REPORT, None),
        (2, NO_TESTS, "pytest ended with 2"),  # it could not import the suite
        (5, NO_TESTS, "pytest ended with 5"),
        (1, NO_TESTS, "no test of LLaVA passed"),
        (1, None, "pytest ended with 1"),
    ],
)
def test_a_run_without_tests_is_an_error_and_recorded_nowhere(code, report, message, tmp_path, monkeypatch, capsys):
    for name in ("pyproject.toml", "conftest.py", "tests/vlm_tester.py", "tests/models/llava/test_modeling_llava.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def run_pytest(_, path, arguments):
        if report:
            path.write_text(report)
        return code

    (tmp_path / "record.json").write_text("as it was")
    monkeypatch.setattr(run_transformers_tests, "run_pytest", run_pytest)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "--output", str(tmp_path / "record.json")])
    assert run_transformers_tests.main() == (2 if message else 1)  # of REPORT's tests DPVR failed one
    assert (tmp_path / "record.json").read_text().startswith("as it was" if message else "{")
    assert (message or "") in capsys.readouterr().err


@pytest.mark.skipif(
    "TRANSFORMERS_CHECKOUT" not in os.environ, reason="set TRANSFORMERS_CHECKOUT to a checkout's folder"
)
def test_transformers_own_tests_pass_wherever_llavas_do():
    subprocess.run(
        [sys.executable, "scripts/run_transformers_tests.py", os.environ["TRANSFORMERS_CHECKOUT"]],
        cwd=ROOT,
        check=True,
    )
