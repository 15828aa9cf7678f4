"""lm-evaluation-harness and lmms-eval, as published and unpatched, give a converted folder the accuracies that it has.

Runs where they are installed (`make test-eval`); takes a minute.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import AutoModel, AutoProcessor

from convert_llava_to_dpvr import convert

sys.path.insert(0, str(ROOT / "examples"))

import digits as task

from scripts.train_tiny_llava import generate_answers

TASKS = ROOT / "examples" / "evaluation"
SEED, PER_KIND, BATCH = 12345, 4, 8
LAYER_THAT_LOSES_ACCURACY = 3  # with an untrained side branch: some answers are wrong, and differ from model to model


def needs(package: str):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed: make test-eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A converted folder of middling accuracy, and the questions as a data set beside it."""
    working = tmp_path_factory.mktemp("evaluation")
    convert(ROOT / "examples" / "tiny-llava", working / "dpvr", saturation_layer=LAYER_THAT_LOSES_ACCURACY)
    run(working, TASKS / "write_questions.py", "--seed", SEED, "--questions", PER_KIND)
    return working


def run(working: Path, *arguments) -> str:
    """What a command printed."""
    environment = {**os.environ, "HF_HOME": str(working / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=working,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-4000:]
    return printed


def harness(working: Path, module: str, name: str, *arguments) -> tuple[list[str], dict[str, float]]:
    """Runs a harness on the questions; its record of the answers, in their order, and its means by metric."""
    output = working / module
    options = ("--tasks", name, "--include_path", TASKS, "--batch_size", BATCH, "--output_path", output)
    printed = run(working, "-m", module, *arguments, *options, "--log_samples")
    samples = list(output.rglob(f"*samples_{name}*.jsonl"))
    assert len(samples) == 1, printed[-4000:]  # lmms-eval ends with status 0 where it fails
    (results,) = output.rglob("*results*.json")
    rows = sorted(map(json.loads, samples[0].read_text().splitlines()), key=lambda row: row["doc_id"])
    answers = ["".join(row["filtered_resps"]).strip() for row in rows]  # a list of one answer, or an answer
    metrics = json.loads(results.read_text())["results"][name]
    return answers, {key: metrics[f"{key},none"] for key in ("accuracy", *task.KINDS)}


def own_answers(folder: Path, dtype: torch.dtype) -> tuple[list[str], dict[str, float]]:
    """What the scripts of this repository generate and score for the same questions."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    pairs = task.make_questions(SEED, PER_KIND, "test")
    questions = [question for _, question in pairs]
    answers = generate_answers(model, processor, [grid.image for grid, _ in pairs], questions, batch=BATCH)
    right = {kind: [] for kind in ("accuracy", *task.KINDS)}
    for answer, question in zip(answers, questions, strict=True):
        for key in ("accuracy", question.kind):
            right[key].append(task.is_correct(answer, question.answer))
    return [answer.strip() for answer in answers], {key: sum(hits) / len(hits) for key, hits in right.items()}


@needs("lm_eval")
def test_lm_evaluation_harness_gives_the_answers_and_accuracies_of_the_scripts(folder):
    arguments = f"pretrained={folder / 'dpvr'},trust_remote_code=True,dtype=float32"
    answers, accuracies = harness(
        *(folder, "lm_eval", "digits_lm_eval", "--model", "hf-multimodal", "--model_args", arguments),
        *("--device", "cpu", "--apply_chat_template"),
    )
    assert (answers, accuracies) == own_answers(folder / "dpvr", torch.float32)
    assert 0 < accuracies["accuracy"] < 1


@needs("lmms_eval")
def test_lmms_eval_gives_the_answers_and_accuracies_of_the_scripts(folder):
    arguments = f"pretrained={folder / 'dpvr'},trust_remote_code=True,device=cpu,device_map=cpu"
    answers, accuracies = harness(
        folder, "lmms_eval", "digits_lmms_eval", "--model", "huggingface", "--model_args", arguments
    )
    assert (answers, accuracies) == own_answers(folder / "dpvr", torch.bfloat16)  # it loads every model in bf16
    assert 0 < accuracies["accuracy"] < 1


@needs("lmms_eval")
def test_the_benchmarks_of_the_readme_are_tasks_of_lmms_eval_with_these_metrics():
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    tasks = TaskManager().task_index
    for row in json.loads((TASKS / "published.json").read_text())["benchmarks"].values():
        config = load_yaml_config(tasks[row["task"]]["yaml_path"], mode="full")
        assert row["metric"] in [metric["metric"] for metric in config["metric_list"]]
