"""A training step in two parts, the data, the cache of features, and the command that trains."""

import base64
import contextlib
import copy
import csv
import datetime
import errno
import fcntl
import gzip
import importlib.metadata
import inspect
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import ROOT, files_of_at_most
from hypothesis import given, settings
from peft import get_peft_model_state_dict
from PIL import Image
from processes import run_script, start_script
from safetensors.torch import load_file, save_file
from tiny import make_llava
from tiny_training import gradients, shared_model, staged, training_batch
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
from transformers.utils import is_lomo_available

sys.path.insert(0, str(ROOT / "examples"))

import digits as task

from benchmarks import side_branch_seeds
from benchmarks import training as training_benchmark
from convert_llava_to_dpvr import convert
from scripts import train_side_branch
from scripts.train_tiny_llava import answer_mask, conversation, generate_answers
from training import features as feature_cache
from training.adapters import from_llava, load_adapter, processor_from_llava
from training.data import (
    BadRowError,
    BadRows,
    Collator,
    ConversationDataset,
    encode,
    open_image,
    read_conversation,
    read_rows,
)
from training.staged import IGNORED, LOSSES, StagedModel, collate_rows, predicts, split_rows
from training.trainer import TRAINED_WEIGHTS, GroupedByLength, SideBranchTrainer, end_process, last_checkpoint


def assert_same(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=tolerance, rtol=1e-4, msg=name)


# --- the two parts of a step


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("num_fusion_layers", [1, 2])
def test_the_parts_of_a_step_give_the_logits_of_the_model_and_of_llava(attention, num_fusion_layers):
    model = staged(num_fusion_layers=num_fusion_layers, attn_implementation=attention)
    batch = training_batch()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    llava = make_llava()
    llava.load_state_dict(model.base.state_dict(), strict=False)
    with torch.no_grad():
        features = model.compute_features(**batch)
        student = model.base.lm_head(model.answer_states(features))
        teacher = model.base.lm_head(features.teacher_states)
        read = predicts(batch["labels"])
        torch.testing.assert_close(student, model.base.eval()(**inputs).logits[read], atol=1e-4, rtol=0)
        inputs.pop("mm_token_type_ids")
        torch.testing.assert_close(teacher, llava(**inputs).logits[read], atol=1e-4, rtol=0)
    assert (student - teacher).abs().max() > 0.1


@given(rows=st.lists(st.text("tI", min_size=0, max_size=5), min_size=1, max_size=4), seed=st.integers(0, 9))
@settings(max_examples=25)
def test_any_ragged_batch_gives_the_gradients_of_the_whole_last_layer_and_of_its_cached_rows(rows, seed):
    """The last layer computes the answers' tokens alone; features cut into rows and padded again change nothing."""
    model, batch = shared_model(), training_batch([row + "ttt" for row in rows], seed)
    loss, expected = gradients(model, batch)
    cached = collate_rows(split_rows(model.compute_features(**batch)))
    cached_loss, actual = gradients(model, cached)
    assert cached_loss == pytest.approx(loss, abs=1e-6)
    assert_same(actual, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "can_read", lambda layer: False)
        assert_same(gradients(model, batch)[1], expected)


def test_nothing_before_the_side_branch_has_a_graph():
    model, batch = staged(), training_batch()
    assert model.features_frozen
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        features = model.compute_features(**batch)
    assert features.hidden_states.grad_fn is None
    assert features.teacher_states.grad_fn is None
    assert not saved
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model(**batch)
    assert saved


@pytest.mark.parametrize(
    ("options", "tuned"), [({"lora": "fusion"}, "lora_"), ({"whole_fusion": True}, "language_model.layers.5.")]
)
def test_a_fusion_layer_that_trains_gets_gradients_and_the_teacher_stays_llava(options, tuned):
    model = staged(**options)
    for name, weight in model.named_parameters():
        if "lora_B" in name or ("ln_tuning_layers" in name and "language_model" in name):
            torch.nn.init.normal_(weight, std=0.1)
    batch = training_batch()
    assert model.features_frozen
    assert not model.teacher_frozen
    # so each may read features that the other has kept
    assert feature_cache.weights_digest(model) == feature_cache.weights_digest(staged())
    plain = staged().compute_features(**batch)
    features = model.compute_features(**batch)
    torch.testing.assert_close(features.teacher_states, plain.teacher_states)
    _, grads = gradients(model, batch)
    assert any(tuned in name for name in grads)
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_lora_in_the_joint_layers_trains_and_its_features_are_not_kept(tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=r".*language_model\.layers\.0\.self_attn\.q_proj", init_lora_weights=False)
    model = staged(lora=lora)
    assert not model.features_frozen
    batch = training_batch()
    plain = staged().compute_features(**batch)
    features = model.compute_features(**batch)
    torch.testing.assert_close(features.teacher_states, plain.teacher_states)
    assert (features.hidden_states - plain.hidden_states).abs().max() > 1e-3
    assert all(grad.abs().max() > 0 for grad in gradients(model, batch)[1].values())
    with torch.no_grad():
        features = model.compute_features(with_teacher=False, **batch)
    assert features.hidden_states.grad_fn is None
    assert features.teacher_states is None
    with pytest.raises(ValueError, match="before the fusion layers trains"):
        feature_cache.cache_features(tmp_path, model, None)


def test_the_answer_loss_is_that_of_the_model_itself():
    model, batch = staged("answer"), training_batch()
    expected = model.base(**batch).loss
    assert model(**batch)["loss"].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("target", [None, r".*lm_head"])
def test_the_distillation_loss_is_the_divergence_from_llavas_answers(target):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=target, init_lora_weights=False) if target else None
    model, plain, batch = staged(lora=lora), staged(), training_batch()
    assert model.features_frozen
    with torch.no_grad():
        features = model.compute_features(**batch)
        student = model.base.lm_head(model.answer_states(features)).softmax(-1)
        teacher = plain.base.lm_head(plain.compute_features(**batch).teacher_states).softmax(-1)
        expected = (teacher * (teacher / student).log()).sum(-1).mean().item()
        assert model(**batch)["loss"].item() == pytest.approx(expected, rel=1e-4)
        cached = collate_rows(split_rows(features))
        cached["teacher_states"] = cached["teacher_states"].bfloat16()  # as they may have been stored
        assert model(**cached)["loss"].item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("step", [{}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(3)}])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_an_answer_adds_nothing(loss, step):
    model, batch = staged(loss), training_batch() | step
    batch["labels"].fill_(IGNORED)
    value, grads = gradients(model, batch)
    assert value == 0
    assert not any(grad.any() for grad in grads.values())


def test_a_loss_that_is_none_is_refused():
    with pytest.raises(ValueError, match="loss='mse' is none of answer, distill"):
        staged("mse")


def test_pictures_come_in_the_type_of_the_model():
    features = staged().bfloat16().compute_features(**training_batch())
    assert features.hidden_states.dtype == features.teacher_states.dtype == torch.bfloat16


def test_an_attention_that_takes_no_mask_runs_the_last_layer_whole(monkeypatch):
    model = staged()
    last = model.layers()[2][-1]
    assert model.can_read(last)
    monkeypatch.setattr(model.core.language_model.config, "_attn_implementation", "flash_attention_2")
    assert not model.can_read(last)


def test_a_plan_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model, batch = staged().eval(), training_batch()
    features = model.compute_features(**batch)
    monkeypatch.setattr(StagedModel, "is_sharded", True)
    monkeypatch.setattr(model.core, "plan_call", lambda *args: [])
    with pytest.raises(ValueError, match="not enough values"):
        model.plan_vision(features)
    assert not model.core.training


def test_image_tokens_without_pictures_are_refused():
    model, batch = staged(), training_batch()
    del batch["pixel_values"]
    with pytest.raises(ValueError, match=r"tell of image tokens \(by row: \[.+\]\), but no pixel_values came"):
        model(**batch)
    batch["mm_token_type_ids"].zero_()
    model(**batch)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, batch = staged(), training_batch()
    _, expected = gradients(model, batch)
    model.activation_checkpointing_enable()
    assert_same(gradients(model, batch)[1], expected)


def test_parts_of_a_batch_add_up_to_its_gradients():
    model, batch = staged(), training_batch(("ttIttt", "ttItttttttt"))
    _, expected = gradients(model, batch)
    count = (batch["labels"] != IGNORED).sum()
    rows = split_rows(model.compute_features(**batch))
    model.zero_grad()
    for row in rows:
        model(**collate_rows([row]), num_items_in_batch=count)["loss"].backward()
    actual = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert_same(actual, expected)


# --- several processes

PROCESSES = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import conftest, torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tiny_training import staged, training_batch
from training.trainer import end_process

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
batch = training_batch(("ttItt",) if rank == 0 else ("ttttt",))


def shard(model):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if type(module).__name__ in ("LlamaDecoderLayer", "CLIPEncoderLayer"):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


for kind, wrap in (("ddp", DistributedDataParallel), ("fsdp2", shard)):
    model = wrap(staged())
    for _ in range(2):
        model.zero_grad()
        (model(**batch, num_items_in_batch={count})["loss"] * 2).backward()
    with torch.no_grad():
        model(**batch)
        model.eval()
        model(**batch)
    grads = {{name.removeprefix("module."): w.grad for name, w in model.named_parameters() if w.requires_grad}}
    grads = {{name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}}
    torch.save(grads, f"{{sys.argv[1]}}.{{kind}}.{{rank}}")
torch.distributed.destroy_process_group()
end_process(0)
"""


def test_processes_of_which_one_has_no_image_train_as_one_process_does(tmp_path):
    """DDP, and FSDP2 that shards every weight: no process waits for one that has nothing to do."""
    batches = [training_batch(("ttItt",)), training_batch(("ttttt",))]
    count = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    model = staged()
    for batch in batches:
        model(**batch, num_items_in_batch=count)["loss"].backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    (tmp_path / "run.py").write_text(PROCESSES.format(root=str(ROOT), count=count))
    run_script(tmp_path / "run.py", tmp_path / "out", num_processes=2)
    for kind in ("ddp", "fsdp2"):
        for rank in range(2):
            assert_same(torch.load(tmp_path / f"out.{kind}.{rank}"), expected, 1e-5)


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "2"}], ids=str)
def test_one_of_several_processes_ends_before_the_interpreter_does(variables):
    """What may still happen then aborts it. Its output, its status, its threads and what is due at its exit are not
    lost."""
    program = f"""
import atexit, os, sys, threading, time
from typing import NoReturn

{inspect.getsource(end_process)}

class Kept:
    def __del__(self, write=print):
        write("end of the interpreter", flush=True)

kept = Kept()
atexit.register(print, "exit functions")
print("output", end=", ")
threading.Thread(target=lambda: (time.sleep(0.5), print("thread", end=", "))).start()
end_process(3)
"""
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | variables
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 3, result.stderr
    ended = "" if variables else "end of the interpreter\n"
    assert result.stdout == "output, thread, exit functions\n" + ended


# --- data


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    """A DPVR of the embedded LLaVA whose routing costs something, as a folder."""
    folder = tmp_path_factory.mktemp("embedded") / "dpvr"
    convert(ROOT / "examples" / "tiny-llava", folder, saturation_layer=3, dtype="float32")
    return folder


@pytest.fixture(scope="session")
def processor(embedded):
    return AutoProcessor.from_pretrained(embedded, trust_remote_code=True)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of pictures with `good.json`, rows of LLaVA's format: one, two or no image, several turns."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = []
    for number in range(10):
        grid = task.make_grid(rng, "train")
        grid.image.save(folder / f"{number}.png")
        turns = [task.ask(rng, grid, kind) for kind in task.KINDS[: 1 + number % 4]]
        values = [value for turn in turns for value in (turn.text, turn.answer)]
        row = {"id": f"row {number}"}
        if number % 5:
            values[0] = f"<image>\n{values[0]}"
            row["image"] = f"{number}.png"
        if number == 3:
            values[-2] += "\n<image>"
            row["image"] = ["3.png", "2.png"]
        roles = ("human", "gpt")
        row["conversations"] = [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]
        rows.append(row)
    (folder / "good.json").write_text(json.dumps(rows))
    return folder


def open_data(source, folder, processor, report, max_length=1024):
    return ConversationDataset(read_rows(source), processor, folder, BadRows(report), max_length)


def test_labels_are_the_answers_tokens_that_the_tiny_llava_was_trained_on(processor):
    rng = np.random.default_rng(0)
    tokenizer = processor.tokenizer
    assistant_id = tokenizer.encode(" ASSISTANT", add_special_tokens=False)[0]
    for turns in range(1, 5):
        grid = task.make_grid(rng, "train")
        questions = [task.ask(rng, grid, kind) for kind in task.KINDS[:turns]]
        row = encode(processor, conversation(questions), [grid.image], 1024)
        expected = answer_mask(row["input_ids"][None], assistant_id, tokenizer.eos_token_id)[0]
        assert torch.equal(row["labels"] != IGNORED, expected)
        text = tokenizer.decode(row["input_ids"][expected])
        assert text.split("</s>")[:-1] == [f" {question.answer}" for question in questions]


def test_labels_follow_the_default_template_of_llava_with_any_number_of_images(processor):
    from processing_dpvr import CHAT_TEMPLATE

    template, processor.chat_template = processor.chat_template, CHAT_TEMPLATE
    try:
        turns = [{"from": "human", "value": "<image>\nthis\n<image>"}, {"from": "gpt", "value": "one two"}]
        turns += [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "three"}]
        messages, images = read_conversation({"image": ["a", "b"], "conversations": turns})
        assert images == ["a", "b"]
        row = encode(processor, messages, [Image.new("RGB", (48, 48))] * 2, 1024)
    finally:
        processor.chat_template = template
    answers = row["input_ids"][row["labels"] != IGNORED]
    assert processor.tokenizer.decode(answers) == " one two</s> three</s>"
    assert row["pixel_values"].shape[0] == 2


def bad_row(**changes):
    row = {
        "image": "1.png",
        "conversations": [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "a"}],
    }
    return {**row, **changes}


TURNS = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
BAD = {
    "missing image": bad_row(image="none.png"),
    "corrupt image": bad_row(image="broken.png"),
    "image count": bad_row(image=["1.png", "2.png"]),
    "image count ": bad_row(conversations=[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "<image>"}]),
    "empty answer": bad_row(conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}]),
    "no conversation": bad_row(conversations=[]),
    "no conversation ": bad_row(conversations=[{"from": "human", "value": "<image>"}]),
    "no conversation  ": bad_row(conversations=[{"from": "robot", "value": "<image>"}]),
    "no conversation   ": "not a row",
    "no conversation    ": {"messages": [{"role": "user", "content": ["x"]}, {"role": "assistant", "content": "a"}]},
    "no conversation     ": {"messages": [{"role": ["user"], "content": "x"}, {"role": "assistant", "content": "a"}]},
    "no conversation      ": {"conversations": [{"from": "human", "value": [{"type": "text", "text": 5}]}]},
    "no conversation       ": {
        "images": ["1.png"],
        "messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "a"}],
    },
    "no conversation        ": {"messages": [{"role": "system", "content": "x"}, *[TURNS["messages"][1]] * 2]},
    "corrupt image  ": bad_row(image="data:image/png;base64," + "A" * 9999),
    "missing image ": bad_row(image="half a pair \ud83d.png"),
    "malformed": bad_row(conversations=[{"from": "human", "value": "<image> \ud83d"}, {"from": "gpt", "value": "a"}]),
    "corrupt image ": bad_row(image=5),
    "image count  ": bad_row(image=[None]),
    "too long": bad_row(conversations=[{"from": "human", "value": "<image> b"}, {"from": "gpt", "value": "a " * 999}]),
}


def test_bad_rows_are_listed_with_their_reasons_and_good_ones_stand_in(pictures, processor, tmp_path):
    (pictures / "broken.png").write_bytes((pictures / "1.png").read_bytes()[:200])
    rows = [*BAD.values(), *json.loads((pictures / "good.json").read_text())]
    (tmp_path / "rows.ndjson").write_text("\n".join(map(json.dumps, rows)))
    data = open_data(tmp_path / "rows.ndjson", pictures, processor, tmp_path / "bad.jsonl")
    loaded = [data[index] for index in range(len(data))]
    for _ in range(2):  # a second epoch reports nothing twice
        assert [data[index]["input_ids"].tolist() for index in range(len(data))] == [
            row["input_ids"].tolist() for row in loaded
        ]
    assert len(list(data)) == len(data) == len(rows) - 16  # four were found out only when they were loaded
    reported = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {line["row"]: line["reason"] for line in reported} == dict(enumerate(key.strip() for key in BAD))
    assert len(reported) == len(BAD)
    assert all(len(line["detail"]) <= 500 for line in reported)
    details = {line["row"]: line["detail"] for line in reported}
    assert details[list(BAD).index("corrupt image ")] == "is no picture: int"
    assert "20 bad rows (9 no conversation, 3 image count, 3 corrupt image" in data.bad_rows.summary()
    with (tmp_path / "bad.jsonl").open("a") as file:
        file.write('{"row": 99, "rea')  # as a full disk leaves it
        file.write('\n5\n{"reason": "no row"}\n')
    assert len(BadRows(tmp_path / "bad.jsonl", fresh=False).reasons()) == len(BAD)
    assert data.num_rows() == len(rows) - len(BAD)


def test_behind_the_last_row_the_first_stands_in_and_no_row_comes_before_it(pictures, processor, tmp_path):
    (pictures / "broken.png").write_bytes(b"no image")
    first, last = {"id": datetime.date(2026, 1, 1), **TURNS}, bad_row(image="broken.png", id=datetime.date(2026, 1, 2))
    data = ConversationDataset([first, last], processor, pictures, BadRows(tmp_path / "bad.jsonl"), 1024)
    assert torch.equal(data[1]["input_ids"], data[0]["input_ids"])
    assert [line["id"] for line in data.bad_rows.lines()] == ["2026-01-02"]
    with pytest.raises(IndexError):
        data[-1]


def test_rows_are_held_back_from_the_end_and_as_long_as_llava_counts_them(pictures, processor, tmp_path):
    data = open_data(pictures / "good.json", pictures, processor, tmp_path / "bad.jsonl")
    rows = json.loads((pictures / "good.json").read_text())
    words = [sum(len(turn["value"].replace("<image>", "").split()) for turn in row["conversations"]) for row in rows]
    assert data.lengths() == [n + 128 * (1 if i % 5 else 0) + 128 * (i == 3) for i, n in enumerate(words)]
    held_back = data.hold_back(3)
    assert (data.good, held_back.good) == ([*range(7)], [7, 8, 9])
    with pytest.raises(ValueError, match="Holding back 7 of 7 rows leaves nothing to train on"):
        data.hold_back(7)


def test_padding_is_no_token_no_image_and_no_answer():
    rows = [{name: torch.full((n,), 1) for name in ("input_ids", "mm_token_type_ids", "labels")} for n in (1, 3)]
    batch = Collator(pad_token_id=7)(rows)
    assert {name: values[0].tolist() for name, values in batch.items()} == {
        "input_ids": [1, 7, 7],
        "attention_mask": [1, 0, 0],
        "mm_token_type_ids": [1, 0, 0],
        "labels": [1, IGNORED, IGNORED],
    }


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }} {{ m.content[-1].text }}"
        "{{ '!' if loop.last and m.role == 'assistant' }}{% endfor %}",
        "{% for m in messages %}{{ m.role }} {{ m.content[-1].text }}{% endfor %}{{ '?' if add_generation_prompt }}",
    ],
)
def test_a_template_that_writes_a_turn_another_way_once_others_follow_makes_bad_rows(template, processor):
    writes = copy.deepcopy(processor)
    writes.chat_template = template
    messages, _ = read_conversation({"messages": TURNS["messages"] * 2})
    with pytest.raises(BadRowError, match="template: the chat template writes turn 1 in another way"):
        encode(writes, messages, [], 1024)


def test_processes_that_load_data_list_a_bad_row_once(pictures, processor, tmp_path):
    (pictures / "broken.png").write_bytes(b"no image")
    rows = [bad_row(image="broken.png"), *json.loads((pictures / "good.json").read_text())]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = open_data(tmp_path / "rows.json", pictures, processor, tmp_path / "bad.jsonl")
    for _ in range(3):  # epochs, each with a worker that knows what this process knew
        list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=1))
    data[0]
    assert [json.loads(line)["row"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [0]
    assert data.bad_rows.seen == {0}


def test_of_a_row_with_a_picture_in_the_place_of_its_name_the_beginning_is_listed(tmp_path):
    bad_rows = BadRows(tmp_path / "bad_rows.jsonl")
    bad_rows.add(0, [], BadRowError("missing image", "A" * 10_000))
    assert [len(line["detail"]) for line in bad_rows.lines()] == [500]


def test_a_row_that_cannot_even_be_read_is_a_bad_row(pictures, processor, tmp_path):
    class Rows(list):  # as parquet with a broken page
        def __getitem__(self, number):
            if number == 1:
                raise OSError("Corrupt snappy compressed data.")
            return super().__getitem__(number)

    rows = Rows(json.loads((pictures / "good.json").read_text()))
    data = ConversationDataset(rows, processor, pictures, BadRows(tmp_path / "bad.jsonl"), 1024)
    assert len(data) == len(rows) - 1
    assert data.bad_rows.reasons() == {1: "malformed"}


def test_a_conversation_that_the_template_refuses_is_a_bad_row(processor, monkeypatch):
    from processing_dpvr import CHAT_TEMPLATE

    turns = [{"role": role, "content": "x"} for role in ("user", "system", "assistant")]
    messages, _ = read_conversation({"messages": turns})
    monkeypatch.setattr(processor, "chat_template", CHAT_TEMPLATE)
    with pytest.raises(BadRowError, match=r"^template: .*system for the first message only"):
        encode(processor, messages, [], 1024)


def test_a_row_that_its_images_make_too_long_is_called_so(processor):
    messages, _ = read_conversation({"images": ["a"] * 2, **TURNS})
    pictures = [Image.new("RGB", (48, 31))] * 2
    length = len(encode(processor, messages, pictures, 1024)["input_ids"])
    short = copy.deepcopy(processor)
    short.tokenizer.model_max_length = length - 1
    for each, limit in ((short, length - 1), (short, 1024), (processor, length - 1)):
        with pytest.raises(BadRowError, match=f"^too long: .*{length} tokens, more than "):
            encode(each, messages, pictures, limit)
    assert len(encode(processor, messages, pictures, length)["input_ids"]) == length


@pytest.mark.parametrize("crop_size", [None, {"height": 16, "width": 16}])
def test_a_row_is_as_long_as_its_images_are_whatever_crop_size_an_image_processor_does_not_use(processor, crop_size):
    messages, _ = read_conversation({"images": ["a"], **TURNS})
    stretching = copy.deepcopy(processor)
    images = stretching.image_processor
    images.size, images.do_center_crop, images.crop_size = images.crop_size, False, crop_size
    pictures = [Image.new("RGB", (48, 31))]
    length = len(encode(processor, messages, pictures, 1024)["input_ids"])
    assert len(encode(stretching, messages, pictures, length)["input_ids"]) == length
    with pytest.raises(BadRowError, match="^too long"):
        encode(stretching, messages, pictures, length - 1)


def test_data_without_a_good_row_is_refused_with_the_reasons(pictures, processor, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([BAD["empty answer"]]))
    with pytest.raises(ValueError, match=r"None of 1 rows .* 1 bad rows \(1 empty answer\)"):
        open_data(tmp_path / "rows.json", pictures, processor, tmp_path / "bad.jsonl")


def test_a_datasets_folder_gives_the_rows_of_the_json_file(pictures, processor, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = json.loads((pictures / "good.json").read_text())
    columns = {"images": [], "messages": []}
    for row in rows:
        names = row.get("image", [])
        names = names if isinstance(names, list) else [names]
        columns["images"].append([{"path": None, "bytes": (pictures / name).read_bytes()} for name in names])
        messages, _ = read_conversation(row)
        for message in messages:
            parts = [{"type": part["type"], "text": part.get("text")} for part in message["content"]]
            message["content"] = parts
        columns["messages"].append(messages)
    table = datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(datasets.Image()))
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    expected = open_data(pictures / "good.json", pictures, processor, tmp_path / "bad.jsonl")
    for source in ("saved", "rows.parquet"):
        actual = open_data(tmp_path / source, pictures, processor, tmp_path / "bad.jsonl")
        assert len(actual) == len(expected)
        for index in range(len(expected)):
            assert actual[index].keys() == expected[index].keys()
            for name, value in expected[index].items():
                assert torch.equal(actual[index][name], value), (source, index, name)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "rows.arrow", "folder"])
def test_data_that_the_datasets_library_cannot_read_is_named(name, tmp_path):
    pytest.importorskip("datasets")
    source = tmp_path / name
    damaged = source / "rows.json" if name == "folder" else source
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(b'{"messages": [\xff')
    with pytest.raises(ValueError, match=rf"{name} cannot be read by the datasets library: \w+: "):
        read_rows(source)


def test_a_broken_image_of_a_datasets_row_is_called_so_and_its_bytes_come_before_its_path(
    pictures, processor, tmp_path
):
    datasets = pytest.importorskip("datasets")
    contents = [(pictures / "1.png").read_bytes(), b"no image"]
    for name in ("image", "images"):
        images = [{"path": "of another machine.png", "bytes": content} for content in contents]
        columns = {"messages": [TURNS["messages"]] * 2, name: [[image] for image in images]}
        kind = datasets.List(datasets.Image())
        if name == "image":
            columns[name], kind = images, datasets.Image()
        datasets.Dataset.from_dict(columns).cast_column(name, kind).save_to_disk(tmp_path / name)
        data = open_data(tmp_path / name, tmp_path, processor, tmp_path / f"{name}.jsonl")
        assert torch.equal(data[0]["pixel_values"], data[1]["pixel_values"])
        assert data.bad_rows.reasons() == {1: "corrupt image"}
        again, digest = (
            open_data(tmp_path / name, tmp_path, processor, tmp_path / "2.jsonl"),
            feature_cache.data_digest,
        )
        assert digest(data) == digest(again)
        columns[name] = columns[name][::-1]
        datasets.Dataset.from_dict(columns).cast_column(name, kind).save_to_disk(tmp_path / f"other {name}")
        assert digest(data) != digest(open_data(tmp_path / f"other {name}", tmp_path, processor, tmp_path / "3.jsonl"))


def test_a_folder_of_data_without_the_datasets_library_is_told_of_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="which is missing: pip install datasets"):
        read_rows(tmp_path)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([TURNS]), encoding="utf-8-sig")
    assert read_rows(tmp_path / "rows.json") == [TURNS]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_list_and_json_lines_are_read_whatever_the_suffix(name, tmp_path):
    rows = [{**TURNS, "id": "\u2028"}, TURNS]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    compressed = tmp_path / f"{name}.gz"
    for text in (json.dumps(rows), json.dumps(rows, indent=2), "\n".join(lines), "\n\n".join([*lines, ""])):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_rows(tmp_path / name) == rows
        compressed.write_bytes(gzip.compress(text.encode()))
        assert read_rows(compressed) == rows
    for damaged in (compressed.read_bytes()[:-9], compressed.read_bytes()[:12] + b"\xff" * 99, text.encode()):
        compressed.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}.gz is not valid JSON: "):
            read_rows(compressed)
    (tmp_path / name).write_text(f"{lines[0]}\n{lines[1][:-1]}")
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON: .*: line 2 column"):
        read_rows(tmp_path / name)


def test_one_object_is_a_row_of_json_lines_but_no_list(tmp_path):
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_text(json.dumps(TURNS))
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps(TURNS).encode()))
    with pytest.raises(ValueError, match=r"rows.json.gz holds a dict, not a list of rows"):
        read_rows(tmp_path / "rows.json.gz")
    assert read_rows(tmp_path / "rows.jsonl") == [TURNS]
    with pytest.raises(ValueError, match=r"rows.json holds a dict, not a list of rows"):
        read_rows(tmp_path / "rows.json")


def test_data_without_rows_is_called_empty(tmp_path):
    for name, text in (("rows.json", "[]"), ("rows.jsonl", "\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} is empty: it holds no rows"):
            read_rows(tmp_path / name)


def test_a_split_that_is_not_for_training_is_named(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({name: [turns] for name, turns in TURNS.items()})
    datasets.DatasetDict(test=split).save_to_disk(tmp_path / "one")
    assert read_rows(tmp_path / "one")[0]["messages"] == TURNS["messages"]
    assert "one has no split 'train'; its rows are those of 'test'" in capsys.readouterr().out
    datasets.DatasetDict(test=split, validation=split).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match="two has the splits test, validation, and no train: give the folder or file"):
        read_rows(tmp_path / "two")


def test_a_csv_file_has_its_conversations_as_json_and_pictures_may_be_data_urls(pictures, processor, tmp_path):
    pytest.importorskip("datasets")
    url = "data:image/png;base64," + base64.b64encode((pictures / "1.png").read_bytes()).decode()
    texts = [json.dumps(TURNS["messages"]), "[{'role': 'user'}]", "[" * 9999]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("messages", "image"), *((text, url) for text in texts)])
    data = open_data(tmp_path / "rows.csv", tmp_path, processor, tmp_path / "bad.jsonl")
    assert data.bad_rows.reasons() == {1: "no conversation", 2: "malformed"}
    expected = encode(processor, read_conversation({"image": "1", **TURNS})[0], [open_image("1.png", pictures)], 1024)
    assert_same(data[0], expected)


def test_an_answer_before_the_first_question_is_left_out():
    system, answer = {"role": "system", "content": "s"}, {"role": "assistant", "content": "hello"}
    for start in ([], [system]):
        messages, _ = read_conversation({"images": ["a"], "messages": [*start, answer, *TURNS["messages"]]})
        assert [message["role"] for message in messages] == [*(["system"] if start else []), "user", "assistant"]
        assert [part["type"] for part in messages[-2]["content"]] == ["image", "text"]
    messages, _ = read_conversation({"images": ["a"], "messages": [answer, system, *TURNS["messages"]]})
    assert [[part["type"] for part in message["content"]] for message in messages[:2]] == [["text"], ["image", "text"]]


def test_messages_that_place_no_image_begin_with_all():
    row = {"images": ["a", "b"], **copy.deepcopy(TURNS)}
    messages, _ = read_conversation(row)
    assert [part["type"] for part in messages[0]["content"]] == ["image", "image", "text"]
    assert read_conversation({"messages": TURNS["messages"], "images": [None]})[1] == []
    row["messages"][0]["content"] = [{"type": "image"}, {"type": "text", "text": "x"}]
    with pytest.raises(BadRowError, match="image count: 1 <image> in the conversation, 2 images"):
        read_conversation(row)
    row["messages"][0]["content"][0] = {"type": "image_url", "image_url": {"url": "a.png"}}
    with pytest.raises(BadRowError, match="1 <image> in the conversation, 0 images: a row lists them in `image` or"):
        read_conversation({"messages": row["messages"]})
    with pytest.raises(BadRowError, match="image count: 0 <image> in the conversation, 1 images"):
        read_conversation(bad_row(conversations=[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}]))
    with pytest.raises(BadRowError, match="image count: turn 0, of the system, holds <image>"):
        read_conversation({"messages": [{"role": "system", "content": "<image>"}, *TURNS["messages"]]})


def test_the_texts_of_a_message_are_joined_by_a_space_behind_its_images():
    texts = [{"type": "text", "text": text} for text in (" a <image>", None, "b ")]
    content = [texts[0], {"type": "image_url", "image_url": {"url": "c"}}, *texts[1:]]
    messages, _ = read_conversation(
        {"images": ["d", "c"], "messages": [{"role": "user", "content": content}, *TURNS["messages"][1:]]}
    )
    assert messages[0]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a  b"}]


# --- cached features


@contextlib.contextmanager
def to_be_cached(embedded, pictures, processor, folder):
    model = AutoModel.from_pretrained(embedded, trust_remote_code=True).requires_grad_(False)
    model.model.side_branch.requires_grad_(True)
    data = open_data(pictures / "good.json", pictures, processor, folder / "bad.jsonl")
    model = StagedModel(model, "distill")
    size = feature_cache.estimate_row(model, data, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "SHARD_BYTES", 3 * size)
        yield model, data, folder / "features"


@pytest.fixture
def cached(embedded, pictures, processor, tmp_path):
    """A model, its data, and a folder for features in shards of three rows."""
    with to_be_cached(embedded, pictures, processor, tmp_path) as parts:
        yield parts


@pytest.fixture(scope="session")
def features_of_all(embedded, pictures, processor, tmp_path_factory):
    with to_be_cached(embedded, pictures, processor, tmp_path_factory.mktemp("features")) as (model, data, folder):
        return feature_cache.cache_features(folder, model, data)


@pytest.fixture
def filled(features_of_all, tmp_path):
    """A folder of features, to be damaged."""
    return Path(shutil.copytree(features_of_all, tmp_path / "features"))


def test_cached_features_give_the_gradients_of_the_data(cached, processor):
    model, data, folder = cached
    features = feature_cache.CachedFeatures(feature_cache.cache_features(folder, model, data, batch_size=4))
    assert len(features) == len(data) == 10
    assert len(list(folder.glob("*.safetensors"))) == 4
    collate = Collator(processor.tokenizer.pad_token_id)
    for rows in ([0, 3, 7], [9, 1], [5]):
        loss, expected = gradients(model, collate([data[row] for row in rows]))
        cached_loss, actual = gradients(model, collate_rows([features[row] for row in rows]))
        assert cached_loss == pytest.approx(loss, abs=1e-6)
        assert_same(actual, expected)


def test_the_size_that_is_stated_is_that_of_the_files(cached, capsys):
    model, data, folder = cached
    feature_cache.cache_features(folder, model, data)
    stated = float(capsys.readouterr().out.split("about ")[1].split(" GB")[0])
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    assert stated == pytest.approx(written, rel=0.02)


def test_features_of_something_else_are_refused_with_both_values(cached):
    model, data, folder = cached
    feature_cache.cache_features(folder, model, data)
    feature_cache.cache_features(folder, model, data)  # nothing to do
    with pytest.raises(feature_cache.CacheError, match="with dtype 'float32', but this run has 'bfloat16'"):
        feature_cache.cache_features(folder, model, data, dtype=torch.bfloat16)
    model.loss = "answer"
    with pytest.raises(feature_cache.CacheError, match="with teacher True, but this run has False"):
        feature_cache.cache_features(folder, model, data)
    model.loss = "distill"
    data.rows[2]["conversations"][1]["value"] += "!"
    with pytest.raises(feature_cache.CacheError, match="with data '"):
        feature_cache.cache_features(folder, model, data)
    data.rows[2]["conversations"][1]["value"] = data.rows[2]["conversations"][1]["value"][:-1]
    for config, field, value in (
        (model.config, "vision_feature_layer", -1),
        (model.config.text_config, "rms_norm_eps", 0.1),
        (model.config.text_config, "rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
    ):
        before = getattr(config, field)
        setattr(config, field, value)
        with pytest.raises(feature_cache.CacheError, match="with config '"):
            feature_cache.cache_features(folder, model, data)
        setattr(config, field, before)
    data.processor.num_additional_image_tokens += 1
    with pytest.raises(feature_cache.CacheError, match="with processor '"):
        feature_cache.cache_features(folder, model, data)
    data.processor.num_additional_image_tokens -= 1
    processor = data.processor
    other_template, other_words = copy.deepcopy(processor), copy.deepcopy(processor)
    other_template.chat_template += "{# other #}"
    other_words.tokenizer.add_tokens(["new"])
    for data.processor in (other_template, other_words):
        with pytest.raises(feature_cache.CacheError, match="with processor '"):
            feature_cache.cache_features(folder, model, data)
    data.processor, data.max_length = processor, 1025
    with pytest.raises(feature_cache.CacheError, match="with max_length 1024, but this run has 1025"):
        feature_cache.cache_features(folder, model, data)
    data.max_length = 1024
    model.config.num_side_layers, model.config.use_cache = 5, False  # on neither do features depend
    feature_cache.cache_features(folder, model, data)
    model.config.num_side_layers = 1
    with torch.no_grad():
        model.core.side_branch.layers[0].mlp.up_proj.weight.add_(1)  # what trains may differ
        feature_cache.cache_features(folder, model, data)
        model.core.language_model.norm.weight[-1].add_(1)
    with pytest.raises(feature_cache.CacheError, match="with weights '"):
        feature_cache.cache_features(folder, model, data)


def test_features_of_something_else_are_refused_before_a_row_is_loaded(cached, monkeypatch):
    model, data, folder = cached
    feature_cache.cache_features(folder, model, data)
    loaded = []
    monkeypatch.setattr(data, "load", loaded.append)
    with pytest.raises(feature_cache.CacheError, match="with dtype 'float32', but this run has 'bfloat16'"):
        feature_cache.cache_features(folder, model, data, dtype=torch.bfloat16)
    assert not loaded


def test_features_of_pictures_of_another_folder_are_refused(cached, pictures, processor, tmp_path):
    model, data, folder = cached
    feature_cache.cache_features(folder, model, data)
    others = tmp_path / "others"
    shutil.copytree(pictures, others)
    feature_cache.cache_features(folder, model, open_data(pictures / "good.json", others, processor, tmp_path / "b"))
    Image.open(others / "2.png").rotate(90).resize((99, 99)).save(others / "2.png")
    data = open_data(pictures / "good.json", others, processor, tmp_path / "bad.jsonl")
    with pytest.raises(feature_cache.CacheError, match="with picture_files '.*', but this run has '"):
        feature_cache.cache_features(folder, model, data)


def test_features_of_a_llava_as_it_is_are_those_of_its_dpvr(cached, pictures, tmp_path):
    model, data, folder = cached
    llava = ROOT / "examples" / "tiny-llava"
    layer = model.config.saturation_layer
    same = StagedModel(from_llava(llava, saturation_layer=layer, dtype=torch.float32), model.loss)
    rows = open_data(pictures / "good.json", pictures, processor_from_llava(llava), tmp_path / "bad too.jsonl")
    prints = [feature_cache.fingerprint(*each, torch.float32) for each in ((model, data), (same, rows))]
    assert prints[0] == prints[1]
    feature_cache.cache_features(folder, model, data)
    index = json.loads((folder / "index.json").read_text())
    del index["fingerprint"]["config"]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(feature_cache.CacheError, match="earlier version, which did not note their config"):
        feature_cache.cache_features(folder, model, data)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"fingerprint": ',
        '{"fingerprint": {}, "num_rows": 1}',
        "5",
        '{"fingerprint": {"rows": 10}, "num_rows": 1000000000000, "rows_per_shard": 3}',
    ],
)
def test_a_damaged_index_is_named(cached, content):
    model, data, folder = cached
    folder.mkdir()
    (folder / "index.json").write_text(content)
    with pytest.raises(feature_cache.CacheError, match=r"index.json is damaged: .* delete this one"):
        feature_cache.cache_features(folder, model, data)
    with pytest.raises(feature_cache.CacheError, match=r"index.json is damaged: .* delete this one"):
        feature_cache.CachedFeatures(folder)


def test_a_full_disk_leaves_no_half_shard_and_the_next_run_goes_on(cached, monkeypatch):
    model, data, folder = cached
    synced, calls = os.fsync, []

    def full_at_the_third(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # index, first shard, second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_third)
    with pytest.raises(feature_cache.CacheError, match=r"disk of .* is full.*make room and run the same command"):
        feature_cache.cache_features(folder, model, data)
    assert sorted(path.name for path in folder.iterdir()) == ["features-00000.safetensors", "index.json"]
    with pytest.raises(feature_cache.CacheError, match="lacks 3 of 4 shards"):
        feature_cache.CachedFeatures(folder)
    first = (folder / "features-00000.safetensors").stat().st_mtime_ns
    features = feature_cache.CachedFeatures(feature_cache.cache_features(folder, model, data))
    assert (folder / "features-00000.safetensors").stat().st_mtime_ns == first
    assert len(features) == 10


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(cached, monkeypatch):
    model, data, folder = cached
    usage = type(feature_cache.shutil.disk_usage("/"))(10**6, 10**6, 1000)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(feature_cache.CacheError, match=r"need about .* GB more, but .* has 1e-06 GB free"):
        feature_cache.cache_features(folder, model, data)
    assert not list(folder.iterdir())
    usage = usage._replace(
        free=int(feature_cache.SHARD_BYTES / 3 * 11)
    )  # the last of four shards has one row of three
    feature_cache.cache_features(folder, model, data)


def test_a_shard_has_one_row_at_least(tmp_path):
    index = feature_cache.open_index(tmp_path, {}, 2 * feature_cache.SHARD_BYTES, 3, is_told=False)
    assert (index["rows_per_shard"], feature_cache.num_shards(index)) == (1, 3)


@pytest.mark.parametrize(("code", "error"), [(errno.EDQUOT, feature_cache.CacheError), (errno.EIO, OSError)])
def test_a_file_that_cannot_be_written_leaves_nothing(code, error, tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(code, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(error):
        feature_cache.write_whole(tmp_path / "file", b"content")
    assert not list(tmp_path.iterdir())


def test_features_are_made_as_the_trainer_evaluates_whatever_is_stored(cached, processor):
    model, data, folder = cached
    for layer in model.core.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    features = feature_cache.CachedFeatures(
        feature_cache.cache_features(folder, model, data, dtype=torch.bfloat16, batch_size=1)
    )
    assert model.training
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (row,) = split_rows(model.compute_features(**Collator(processor.tokenizer.pad_token_id)([data[1]])))
    for name in ("hidden_states", "teacher_states"):
        assert features[1][name].dtype == torch.bfloat16
        assert torch.equal(features[1][name], row[name].bfloat16())
    feature_cache.cache_features(folder, model, data, dtype=torch.bfloat16)
    assert not model.training


def test_processes_share_the_shards_and_readers_can_be_sent_to_others(cached):
    model, data, folder = cached
    feature_cache.cache_features(folder, model, data, rank=1, world_size=2)
    names = [f"features-{shard:05}.safetensors" for shard in (1, 3)]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == names
    features = feature_cache.CachedFeatures(feature_cache.cache_features(folder, model, data, rank=0, world_size=2))
    assert len(list(features)) == 10
    sent = pickle.loads(pickle.dumps(features))  # with files open
    assert_same(sent[9], features[9])
    with pytest.raises(IndexError):
        features[-1]


def test_rows_that_turn_out_bad_are_left_out_of_the_features(cached, pictures, monkeypatch):
    model, data, folder = cached
    monkeypatch.setattr(feature_cache, "SAMPLED_ROWS", 1)  # or the estimate of the size meets the bad row first
    (pictures / "broken.png").write_bytes(b"no image")
    data.rows[1] = bad_row(image="broken.png")
    features = feature_cache.CachedFeatures(feature_cache.cache_features(folder, model, data))
    assert len(features) == 9
    assert data.bad_rows.reasons() == {1: "corrupt image"}
    assert data.num_rows() == 9
    data.bad_rows = BadRows(folder.parent / "another run.jsonl")
    for _ in range(2):
        feature_cache.cache_features(folder, model, data)  # which computes nothing
    assert [line["row"] for line in data.bad_rows.lines()] == [1]


def test_leavings_of_a_kill_are_removed_and_a_broken_shard_is_named(cached):
    model, data, folder = cached
    folder.mkdir()
    left, written = folder / ".features-00001.safetensors.123", folder / ".features-00002.safetensors.45"
    for path in (left, written):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    features = feature_cache.CachedFeatures(feature_cache.cache_features(folder, model, data))
    assert list(folder.glob(".*")) == [written]  # another run may be writing it
    assert features.lengths() == [len(features[i]["labels"]) for i in range(len(features))]
    shard = folder / "features-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(feature_cache.CacheError, match=r"features-00002.safetensors cannot be read: .* Delete it"):
        feature_cache.CachedFeatures(folder)
    shard.unlink()
    assert len(feature_cache.CachedFeatures(feature_cache.cache_features(folder, model, data))) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": lambda tokens: tokens * 2}, "hidden_states has the shape"),
        ({"tokens": lambda tokens: tokens.float()}, "its lengths of rows are none"),
        ({"hidden_states": None}, "hidden_states has the shape None"),
        ({"checksums": None}, "checksums has the shape None, but its rows have 3"),
        ({"labels": lambda labels: labels[1:].clone()}, "labels has the shape"),
    ],
)
def test_a_shard_whose_lengths_disagree_is_named(change, message, filled):
    shard = min(filled.glob("features-*.safetensors"))
    tensors = load_file(shard)
    for name, make in change.items():
        tensor = tensors.pop(name)
        if make:
            tensors[name] = make(tensor)
    save_file(tensors, shard, {"index": feature_cache.index_digest(json.loads((filled / "index.json").read_text()))})
    with pytest.raises(feature_cache.CacheError, match=rf"{shard.name} cannot be read: {message}.* Delete it"):
        feature_cache.CachedFeatures(filled)


@pytest.mark.parametrize("change", [{"rows_per_shard": 2}, {"rows_per_shard": 4}, {"fingerprint": {"rows": 10}}])
def test_a_shard_of_another_index_is_named(change, filled):
    index = json.loads((filled / "index.json").read_text()) | change
    (filled / "index.json").write_text(json.dumps(index))
    shutil.copy(filled / "features-00000.safetensors", filled / "features-00004.safetensors")
    with pytest.raises(
        feature_cache.CacheError, match=r"features-00000\S+ cannot be read: it was written for the index"
    ):
        feature_cache.CachedFeatures(filled)


def test_features_that_are_no_numbers_are_not_written(cached):
    model, data, folder = cached
    with torch.no_grad():
        model.core.language_model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        feature_cache.CacheError, match=r"00000\S+ is not written: its hidden_states, .* would hold NaN"
    ):
        feature_cache.cache_features(folder, model, data)
    assert [path.name for path in folder.iterdir()] == ["index.json"]


def test_no_flipped_bit_of_a_shard_changes_what_is_read(filled):
    expected = copy.deepcopy(list(feature_cache.CachedFeatures(filled)))  # which are in the files, until copied
    shard, rng = min(filled.glob("features-*.safetensors")), np.random.default_rng(0)
    whole = shard.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for place in [*rng.integers(8, header, 40), *rng.integers(header, len(whole), 40)]:
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.integers(8)]) + whole[place + 1 :])
        try:
            for row, features in zip(expected, feature_cache.CachedFeatures(filled), strict=True):
                assert row.keys() == features.keys()
                assert all(torch.equal(row[name], features[name]) for name in row)
        except feature_cache.CacheError as error:
            assert re.search(rf"{shard.name} cannot be read: .+ Delete it", str(error))  # noqa: PT017
            refused += 1
    assert refused > 70


@pytest.mark.parametrize("state", ["null", "[]", "{}", '{"global_step": "two"}'])
def test_a_checkpoint_whose_state_is_none_is_passed_by(state, tmp_path):
    for step, text in ((1, '{"global_step": 1}'), (2, state)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


# --- the command


def train(embedded, pictures, output, *options):
    arguments = [embedded, "--data", pictures / "good.json", "--output", output, "--use_cpu", "--logging_steps", 1]
    arguments += ["--per_device_train_batch_size", 2, "--report_to", "none", *options]
    return list(map(str, arguments))


def losses(output):
    return [loss for _, loss in json.loads((output / "training.json").read_text())["loss_curve"]]


def test_training_lowers_the_loss_and_writes_an_adapter_that_loads(embedded, pictures, tmp_path, capsys):
    output = tmp_path / "adapter"
    options = ("--max_steps", 12, "--eval-rows", 2, "--eval_steps", 6, "--save_steps", 12)
    assert train_side_branch.main(train(embedded, pictures, output, *options)) == 0
    assert "213,248 of 3,089,152 parameters train (6.90%)" in capsys.readouterr().out
    record = json.loads((output / "training.json").read_text())
    assert (record["rows"], record["eval_data"], record["eval_rows"]) == (8, "good.json", 2)
    assert "| eval data | good.json |\n| eval rows | 2 |" in (output / "README.md").read_text()
    steps, evaluated = zip(*record["eval_loss_curve"], strict=True)
    assert steps == (6, 12)  # the last one once
    assert evaluated[-1] < evaluated[0]
    assert train_side_branch.main(train(embedded, pictures, output, *options, "--resume")) == 0  # it was at its end
    assert json.loads((output / "training.json").read_text())["eval_loss_curve"] == record["eval_loss_curve"]
    checkpoint = last_checkpoint(output)
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 4 * 4 * 213_248
    assert (checkpoint / TRAINED_WEIGHTS).stat().st_size < 4.1 * 213_248
    plain = AutoModel.from_pretrained(embedded, trust_remote_code=True)
    before = plain.model.side_branch.layers[0].mlp.down_proj.weight.abs().max().item()
    loaded = load_adapter(plain, output)
    copies = [w for name, w in loaded.named_parameters() if "ln_tuning_layers" in name and "down_proj" in name]
    assert before == 0 < copies[0].abs().max()
    with pytest.raises(SystemExit):
        train_side_branch.main(train(embedded, pictures, tmp_path / "none", "--data", tmp_path / "none.json"))
    assert "none.json does not exist" in capsys.readouterr().err


def test_a_killed_run_resumes_with_the_losses_of_one_that_was_not(embedded, pictures, tmp_path):
    """With batches in random order, over several epochs, from the data and from cached features."""
    options = ("--num_train_epochs", 3, "--save_steps", 4, "--cache-features", tmp_path / "features")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script = ROOT / "scripts" / "train_side_branch.py"
    process = start_script(script, *train(embedded, pictures, killed, *options))
    deadline = time.monotonic() + 300
    while last_checkpoint(killed) is None and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (killed / "training.json").exists()
    (killed / ".results-cut-off").mkdir()  # as of a kill a moment later
    with pytest.raises(SystemExit):
        train_side_branch.main(train(embedded, pictures, killed, *options))
    assert train_side_branch.main(train(embedded, pictures, killed, *options, "--resume")) == 0
    assert train_side_branch.main(train(embedded, pictures, whole, *options)) == 0
    assert not [path for path in killed.iterdir() if path.name.startswith(".")]
    assert len(losses(whole)) == 15
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-6)
    uncached = tmp_path / "uncached"
    assert train_side_branch.main(train(embedded, pictures, uncached, *options[:4])) == 0
    assert losses(uncached) == pytest.approx(losses(whole), abs=1e-4)


def test_a_run_that_goes_on_at_its_end_trains_no_step_more(embedded, pictures, tmp_path):
    options = ("--max_steps", 3)  # of the five of an epoch
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "out", *options)) == 0
    before = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "out", *options, "--resume")) == 0
    assert json.loads((tmp_path / "out" / "training.json").read_text())["hyperparameters"]["steps"] == 3
    assert all(map(torch.equal, before.values(), load_file(tmp_path / "out" / "adapter_model.safetensors").values()))


@pytest.mark.parametrize("saving", [("--save_steps", 1), ("--save_strategy", "no")])
def test_a_training_that_diverges_ends_with_a_word_and_writes_no_adapter(embedded, pictures, tmp_path, capsys, saving):
    options = ("--max_steps", 3, "--learning_rate", 1e38, "--warmup_steps", 0, "--max_grad_norm", 0, *saving)
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "out", *options)) == 1
    printed = capsys.readouterr()
    assert re.search(r"holds NaN or infinite values at step \d: the training has diverged", printed.err)
    assert "'loss': '0'" not in printed.out
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_run_that_goes_on_from_another_folder_finds_its_best_checkpoint(embedded, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--max_steps", 1, "--save_steps", 1, "--eval-rows", 2, "--eval_steps", 1)
    options += ("--load_best_model_at_end", "true")
    assert train_side_branch.main(train(embedded, pictures, "out", *options)) == 0
    monkeypatch.chdir(pictures)
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert os.path.isdir(state["best_model_checkpoint"])


def test_a_run_that_goes_on_elsewhere_keeps_its_best_checkpoint_and_takes_its_own_intervals(
    embedded, pictures, tmp_path
):
    options = ("--eval-rows", 2, "--load_best_model_at_end", "true", "--save_total_limit", 9)
    every = ("--save_steps", 1, "--eval_steps", 1, "--max_steps", 2)
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "out", *options, *every)) == 0
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)
    path = moved / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"best_global_step": 1}))
    assert train_side_branch.main(train(embedded, pictures, moved, *options, *every, "--resume")) == 0  # at its end
    best, adapter = load_file(moved / "checkpoint-1" / TRAINED_WEIGHTS), load_file(moved / "adapter_model.safetensors")
    assert {tensor.sum().item() for tensor in best.values()} == {tensor.sum().item() for tensor in adapter.values()}
    seldom = ("--save_steps", 2, "--eval_steps", 2, "--max_steps", 4)
    assert train_side_branch.main(train(embedded, pictures, moved, *options, *seldom, "--resume")) == 0
    assert {path.name for path in moved.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-4"}
    evaluated = json.loads((moved / "training.json").read_text())["eval_loss_curve"]
    assert [step for step, _ in evaluated] == [1, 2, 4]


def test_rows_of_like_length_are_grouped_without_being_loaded(embedded, pictures, tmp_path, monkeypatch):
    options = ("--train_sampling_strategy", "group_by_length", "--max_steps", 1)
    loaded, load = [], ConversationDataset.load
    monkeypatch.setattr(ConversationDataset, "load", lambda self, number: loaded.append(number) or load(self, number))
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "data", *options)) == 0
    assert len(loaded) <= 5  # of ten rows: the first one as a check, the batch, and the next one ahead of time
    loaded.clear()
    options += ("--eval-rows", 2)
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "evaluated", *options)) == 0
    assert len(loaded) <= 8  # and both that are held back, the first as a check too
    options += ("--cache-features", tmp_path / "features")
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "cached", *options)) == 0


def test_rows_grouped_by_length_come_in_the_same_order_when_a_run_goes_on(embedded, pictures, tmp_path):
    options = ("--train_sampling_strategy", "group_by_length", "--num_train_epochs", 3, "--save_steps", 7)
    options += ("--save_total_limit", 9)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train_side_branch.main(train(embedded, pictures, whole, *options)) == 0
    shutil.copytree(whole / "checkpoint-7", resumed / "checkpoint-7")
    assert train_side_branch.main(train(embedded, pictures, resumed, *options, "--resume")) == 0
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_so_they_do_in_several_processes(num_processes):
    """As the Trainer and accelerate go on in the middle of an epoch."""
    from accelerate import PartialState
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    def loader():
        trainer = object.__new__(SideBranchTrainer)
        trainer.sampler = GroupedByLength(2, lengths, seed=5)
        plain = torch.utils.data.DataLoader(range(40), batch_size=2, sampler=trainer.sampler)
        prepared = prepare_data_loader(plain, num_processes=num_processes, process_index=0, put_on_device=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "get_train_dataloader", lambda self: prepared)
            return trainer.get_train_dataloader()

    PartialState()
    lengths = np.random.default_rng(0).integers(1, 9, 40).tolist()
    whole, epochs = loader(), []
    for epoch in range(3):
        whole.set_epoch(epoch)
        epochs.append([batch.tolist() for batch in whole])
    assert epochs[0] != epochs[1]
    resumed = skip_first_batches(loader(), 3)
    resumed.set_epoch(1)
    if hasattr(getattr(resumed.batch_sampler, "batch_sampler", None), "set_epoch"):
        resumed.batch_sampler.batch_sampler.set_epoch(1)
    assert [batch.tolist() for batch in resumed] == epochs[1][3:]


def test_rows_grouped_by_length_come_in_the_same_order_however_a_step_is_spread_over_processes():
    def order(batch_size, num_parts, world_size):
        trainer = object.__new__(SideBranchTrainer)
        trainer.train_dataset = SimpleNamespace(lengths=lambda: np.random.default_rng(0).integers(1, 99, 40).tolist())
        trainer.args = SimpleNamespace(
            train_sampling_strategy="group_by_length",
            train_batch_size=batch_size,
            gradient_accumulation_steps=num_parts,
            world_size=world_size,
            seed=5,
            data_seed=None,
        )
        return list(trainer._get_train_sampler())

    assert order(4, 1, 1) == order(2, 1, 2) == order(1, 2, 2) != order(2, 1, 1)


@pytest.mark.skipif(is_lomo_available(), reason="the package is there")
def test_an_optimizer_whose_package_is_missing_is_named_in_one_line(embedded, pictures, tmp_path, capsys):
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "out", "--optim", "lomo")) == 1
    assert re.fullmatch("error: .*lomo.*\n", capsys.readouterr().err.splitlines(keepends=True)[-1])


def test_what_cannot_be_trained_together_is_refused_at_once(embedded, pictures, tmp_path, capsys):
    arguments = train(embedded, pictures, tmp_path / "out", "--dtype", "bfloat16")
    assert train_side_branch.main(arguments) == 1
    assert "frozen weights are torch.bfloat16, but what trains is float32. Pass --bf16" in capsys.readouterr().err
    for options, why in {
        ("--label_smoothing_factor", 0.1): "the loss is that of --loss",
        ("--neftune_noise_alpha", 5): "are frozen",
        ("--bf16_full_eval", "true"): "round the weights that train",
        ("--push_to_hub", "true"): "use scripts/push_to_hub.py",
        ("--resume_from_checkpoint", tmp_path): "is --resume here",
        ("--save_only_model", "true"): "would leave the optimizer out",
        ("--gradient_checkpointing_kwargs", '{"use_reentrant": true}'): "needs inputs that train",
        ("--fp16",): "--fp16 needs a GPU",
        ("--eval-rows", -3): "--eval-rows -3: give a number of rows",
        ("--eval-rows", 3, "--eval-data", pictures / "good.json"): "give one of the two",
        ("--output_dir", tmp_path / "other"): f"--output_dir is set by this command, to {tmp_path / 'out'}",
        ("--remove-unused-columns=true",): "--remove_unused_columns is set by this command",
        ("--eval_strategy", "epoch"): "--eval_strategy needs rows to evaluate on: give --eval-data or --eval-rows",
        ("--eval_on_start", "true"): "--eval_on_start needs rows to evaluate on",
        ("--max-length", 0): "--max-length 0: give at least 1 token",
        ("--max_steps", 0): "--max_steps 0: give at least 1",
        ("--num_train_epochs", 0): "--num_train_epochs 0.0: give more than 0",
        ("--gradient_accumulation_steps", 0): "--gradient_accumulation_steps 0: give at least 1",
        ("--per_device_train_batch_size", 0): "--per_device_train_batch_size 0: give at least 1",
        ("--per_device_eval_batch_size", 0): "--per_device_eval_batch_size 0: give at least 1",
        ("--metric_for_best_model", "accuracy"): "--metric_for_best_model accuracy: only the loss is evaluated",
        ("--bf16", "--fp16"): "",  # which TrainingArguments refuses
        ("--dtype", "bloat16"): "invalid choice: 'bloat16'",
        ("--eval-data", "typo.json"): "--eval-data typo.json does not exist",
        ("--image-folder", "typo"): "--image-folder typo does not exist",
        ("--peft-config", "typo"): "--peft-config typo does not exist",
        ("--output", ""): "argument --output: the name is empty",
        ("--peft-config", pictures / "good.json"): "good.json: give a folder that holds an adapter_config.json",
        ("--peft-config", pictures): "give a folder that holds an adapter_config.json",
    }.items():
        with pytest.raises(SystemExit) as status:
            train_side_branch.main(train(embedded, pictures, tmp_path / "out", *options))
        assert status.value.code == 2
        assert why in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingArguments, "__post_init__", lambda self: importlib.metadata.version("no-such-package"))
        with pytest.raises(SystemExit):
            train_side_branch.main(train(embedded, pictures, tmp_path / "out"))
    assert "error: No package metadata was found for no-such-package" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingArguments, "n_gpu", 2)
        with pytest.raises(SystemExit):
            train_side_branch.main(train(embedded, pictures, tmp_path / "out"))
    assert "one process would train on 2 GPUs: use torchrun --nproc-per-node 2" in capsys.readouterr().err
    given = train(embedded, pictures, tmp_path / "out", "--eval-rows", 2)
    for options, strategy in (([], "steps"), (["--eval_strategy=epoch"], "epoch"), (["--eval_strategy", "no"], "no")):
        assert train_side_branch.parse_args([*given, *options])[1].eval_strategy == strategy


def test_a_picture_of_16_bits_or_turned_by_its_camera_is_trained_on_as_it_looks(tmp_path):
    grey = np.array([[0, 257], [515, 65535]], "<u2")
    Image.frombytes("I;16", (2, 2), grey.tobytes()).save(tmp_path / "deep.png")
    assert np.asarray(open_image("deep.png", tmp_path))[..., 0].tolist() == [[0, 1], [2, 255]]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(np.array([[[0] * 3, [90] * 3]], "uint8")).save(tmp_path / "turned.png", exif=exif)
    turned = open_image("turned.png", tmp_path)
    assert np.asarray(turned)[..., 0].tolist() == [[0], [90]]
    assert not turned.getexif().get(0x0112)


def test_an_adapter_that_is_there_is_not_trained_over(embedded, pictures, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_model.safetensors").write_bytes(b"trained for a week")
    for options in ((), ("--resume",)):
        with pytest.raises(SystemExit):
            train_side_branch.main(train(embedded, pictures, tmp_path / "out", *options))
        assert "holds an adapter and no checkpoint to go on from" in capsys.readouterr().err


def test_an_adapter_is_not_trained_into_the_folder_of_a_model(embedded, pictures, capsys):
    with pytest.raises(SystemExit):
        train_side_branch.main(train(embedded, pictures, embedded, "--max_steps", 1))
    assert "holds a model, which would load with the adapter from then on" in capsys.readouterr().err
    assert not (embedded / "adapter_config.json").exists()


def test_no_weight_that_the_model_lacks_is_made_up(embedded, pictures, tmp_path, capsys):
    shutil.copytree(embedded, tmp_path / "dpvr")
    index = tmp_path / "dpvr" / "model.safetensors.index.json"
    stated, lacking = json.loads(index.read_text()), "model.multi_modal_projector.linear_1.weight"
    shard = index.parent / stated["weight_map"].pop(lacking)
    weights = load_file(shard)
    del weights[lacking]
    save_file(weights, shard, {"format": "pt"})
    index.write_text(json.dumps(stated))
    assert train_side_branch.main(train(tmp_path / "dpvr", pictures, tmp_path / "out", "--max_steps", 1)) == 1
    assert f"lacks {lacking}: it is no whole checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--max_steps", 2)])
def test_rows_that_are_fewer_than_a_batch_which_is_then_left_out_are_refused(
    embedded, pictures, tmp_path, capsys, options
):
    options += ("--per_device_train_batch_size", 11, "--dataloader_drop_last", "true")
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "out", *options)) == 1
    assert "--dataloader_drop_last leaves out all of 10 rows" in capsys.readouterr().err


def test_a_run_beside_one_that_still_trains_is_refused_and_touches_none_of_its_files(embedded, pictures, tmp_path):
    """Both would end well, one of them with the other's adapter."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "bad_rows.jsonl").write_text("of the other\n")
    with (output / ".training.json.lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match=r"Another run writes to .*training\.json: choose another output"):
            train_side_branch.main(train(embedded, pictures, output, "--max_steps", 1))
    assert (output / "bad_rows.jsonl").read_text() == "of the other\n"
    assert {path.name for path in output.iterdir()} == {"bad_rows.jsonl", ".training.json.lock"}


def test_a_run_that_finds_nothing_to_go_on_from_says_so(embedded, pictures, tmp_path, capsys, monkeypatch):
    def end(*_):
        raise ValueError("enough")

    monkeypatch.setattr(train_side_branch, "load_processor", end)  # what comes next
    output = tmp_path / "out"
    (output / "checkpoint-2").mkdir(parents=True)  # killed while it was written
    assert train_side_branch.main(train(embedded, pictures, output, "--resume")) == 1
    assert f"{output} holds no whole checkpoint to go on from: the training starts anew" in capsys.readouterr().out
    (output / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    assert train_side_branch.main(train(embedded, pictures, output, "--resume")) == 1
    assert "starts anew" not in capsys.readouterr().out


def test_a_run_whose_held_out_rows_are_all_corrupt_ends_before_it_trains(embedded, pictures, tmp_path, capsys):
    (pictures / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.json").write_text(json.dumps([bad_row(image="broken.png")] * 2))
    options = ("--eval-data", tmp_path / "broken.json", "--image-folder", pictures)
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "out", *options)) == 1
    assert "No row is left of the 2 to be used here: 2 bad rows (2 corrupt image)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bad_rows_eval.jsonl"]


def test_paths_of_images_start_from_the_folder_of_the_data_that_names_them(processor, tmp_path):
    """Of two files that name their pictures alike, each beside its own; and of a folder of data."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([bad_row()]).save_to_disk(tmp_path / "saved")
    for name, colour in (("train", "red"), ("eval", "blue"), ("saved", "blue")):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (48, 48), colour).save(tmp_path / name / "1.png")
        (tmp_path / name / "rows.json").write_text(json.dumps([bad_row()]))

    def pixels(data: str, evaluation: str) -> list[torch.Tensor]:
        arguments = ("model", "--data", tmp_path / data, "--eval-data", tmp_path / evaluation, "--output", tmp_path)
        options, _ = train_side_branch.parse_args([*map(str, arguments), "--use_cpu"])
        return [rows[0]["pixel_values"] for rows in train_side_branch.make_datasets(options, processor, fresh=True)]

    red, blue = pixels("train/rows.json", "eval/rows.json")
    assert not torch.equal(red, blue)
    assert torch.equal(pixels("saved", "train/rows.json")[0], blue)
    assert torch.equal(pixels("train/rows.json", "saved")[1], blue)


def test_what_is_wrong_with_data_or_a_peft_config_is_told_before_the_model_is_loaded(
    embedded, pictures, tmp_path, capsys, monkeypatch
):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(train_side_branch.AutoModel, "from_pretrained", load)
    monkeypatch.setattr(train_side_branch, "from_llava", load)
    (pictures / "broken.png").write_bytes(b"no image")
    rows = {
        "is not valid JSON": "{",
        "No row is left of the 1 to be used here: 1 bad rows (1 corrupt image)": json.dumps(
            [bad_row(image="broken.png")]
        ),
        "None of 1 rows can be trained on: 1 bad rows (1 missing image)": json.dumps([bad_row(image="none.png")]),
        "is empty: it holds no rows": "[]",
    }
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NONE"}')
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "out", "--peft-config", tmp_path)) == 1
    assert "adapter_config.json is no config that PEFT can read" in capsys.readouterr().err
    for model in (embedded, ROOT / "examples" / "tiny-llava"):
        for message, text in rows.items():
            (tmp_path / "rows.json").write_text(text)
            for option in ("--data", "--eval-data"):
                options = (option, tmp_path / "rows.json", "--image-folder", pictures)
                assert train_side_branch.main(train(model, pictures, tmp_path / "out", *options)) == 1
                assert message in capsys.readouterr().err
    with pytest.raises(AssertionError, match="the model was loaded"):
        train_side_branch.main(train(embedded, pictures, tmp_path / "out"))


def test_a_run_is_not_resumed_at_another_layer_or_with_another_loss_or_base(pictures, tmp_path, capsys):
    llava, options = ROOT / "examples" / "tiny-llava", ("--max_steps", 1, "--save_steps", 1)
    first = train(llava, pictures, tmp_path / "out", *options, "--saturation-layer", 3)
    assert train_side_branch.main(first) == 0
    options = ("--max_steps", 2, "--resume")
    other = train(llava, pictures, tmp_path / "out", *options, "--saturation-layer", 5)
    assert train_side_branch.main(other) == 1
    assert "was trained for saturation_layer=3, but the model has saturation_layer=5" in capsys.readouterr().err
    other = train(llava, pictures, tmp_path / "out", *options, "--saturation-layer", 3, "--loss", "distill")
    assert train_side_branch.main(other) == 1
    assert "was trained with loss=answer, but this run has distill" in capsys.readouterr().err
    shutil.copy(pictures / "good.json", pictures / "more.json")
    other = train(
        llava, pictures, tmp_path / "out", *options, "--saturation-layer", 3, "--data", pictures / "more.json"
    )
    assert train_side_branch.main(other) == 1
    assert "with data=good.json of 10 rows, but this run has more.json of 10 rows" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(llava, other)
    weights = load_file(other / "model.safetensors")
    weights["multi_modal_projector.linear_1.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    other = train(other, pictures, tmp_path / "out", *options, "--saturation-layer", 3)
    assert train_side_branch.main(other) == 1
    assert "has other weights: value 0 of model.multi_modal_projector.linear_1.weight" in capsys.readouterr().err


def test_the_held_out_loss_is_the_mean_over_tokens_whatever_a_batch_holds(embedded, pictures, tmp_path):
    """Also with two processes, of which the last has a row that the first has counted."""

    def held_out(name, *options, num_processes=1):
        options += ("--max_steps", 1, "--eval-rows", 3, "--eval_steps", 1)
        arguments = train(embedded, pictures, tmp_path / name, *options)
        if num_processes == 1:
            assert train_side_branch.main(arguments) == 0
        else:
            run_script(ROOT / "scripts" / "train_side_branch.py", *arguments, num_processes=num_processes)
        return json.loads((tmp_path / name / "training.json").read_text())["eval_loss_curve"][-1][1]

    expected = held_out("one", "--per_device_eval_batch_size", 3)
    assert held_out("smaller", "--per_device_eval_batch_size", 2) == pytest.approx(expected, abs=1e-5)
    options = ("--per_device_train_batch_size", 1, "--per_device_eval_batch_size", 1)
    assert held_out("two", *options, num_processes=2) == pytest.approx(expected, abs=1e-5)
    options = ("--per_device_train_batch_size", 1, "--per_device_eval_batch_size", 2)  # the last batch has one of each
    assert held_out("two of two", *options, num_processes=2) == pytest.approx(expected, abs=1e-5)
    options += ("--loss", "distill", "--cache-features", tmp_path / "features")
    expected = held_out("learnt", *options[:2], "--per_device_eval_batch_size", 3, *options[4:6])
    assert held_out("two cached", *options, num_processes=2) == pytest.approx(expected, abs=1e-4)


def test_a_run_goes_on_with_its_own_options_alone(embedded, pictures, tmp_path, capsys):
    from peft import LoraConfig

    for rank in (2, 3):
        lora = LoraConfig(r=rank, target_modules=r".*language_model\.layers\.7\.mlp\.up_proj")
        lora.save_pretrained(tmp_path / f"rank {rank}")
    output, given = tmp_path / "out", ("--save_steps", 1, "--peft-config", tmp_path / "rank 2")
    assert train_side_branch.main(train(embedded, pictures, output, *given, "--max_steps", 1)) == 0

    def resume(*options):
        more = ("--max_steps", 2, "--resume", *options)
        return train_side_branch.main(train(embedded, pictures, output, *given, *more))

    state = output / "checkpoint-1" / "trainer_state.json"
    whole = json.loads(state.read_text())
    for changed, said in (
        (whole | {"batch_size": 3}, "state.json has a field batch_size, which transformers"),
        ({name: whole[name] for name in whole if name != "log_history"}, "has no log_history"),
    ):
        state.write_text(json.dumps(changed))
        assert resume() == 1
        assert said in capsys.readouterr().err
    state.write_text(json.dumps(whole))
    for option, value, stated in (
        ("--learning_rate", 0.5, "learning_rate=0.001, but this run has 0.5"),
        ("--lr_scheduler_type", "linear", "lr_scheduler_type=cosine, but this run has linear"),
        ("--seed", 7, "seed=42, but this run has 7"),
        ("--data_seed", 7, "data_seed=None, but this run has 7"),
        ("--optim", "adafactor", "but this run has adafactor"),
        ("--max-length", 999, "max_length=1024, but this run has 999"),
        ("--dtype", "bfloat16", "dtype=float32, but this run has bfloat16"),
        ("--gradient_accumulation_steps", 2, "total_batch_size=2, but this run has 4"),
        ("--cache-features", tmp_path / "features", "cached_features=False, but this run has True"),
        ("--peft-config", tmp_path / "rank 3", "with peft_config="),
    ):
        assert resume(option, value) == 1
        assert stated in capsys.readouterr().err
    weights = output / "checkpoint-1" / TRAINED_WEIGHTS
    tensors = load_file(weights)
    save_file({name: tensor[..., :1].clone() for name, tensor in tensors.items()}, weights)  # of no stated run
    assert resume() == 1
    assert re.search(r"has shape \(\d+, 1\) there, but \(\d+, \d+\) in this run", capsys.readouterr().err)
    shutil.rmtree(output / "checkpoint-1")
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "new", *given, "--max_steps", 1)) == 0
    shutil.copytree(tmp_path / "new" / "checkpoint-1", output / "checkpoint-1")
    assert resume("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2) == 0


@pytest.mark.parametrize(
    ("file", "kept"),
    [
        *((TRAINED_WEIGHTS, kept) for kept in (100, None)),
        *(("optimizer.pt", kept) for kept in (100, 0, None)),
        ("scheduler.pt", None),
        ("rng_state.pth", 100),
    ],
)
def test_a_checkpoint_that_is_damaged_or_lacks_a_file_is_named(embedded, pictures, tmp_path, capsys, file, kept):
    options = ("--save_steps", 1, "--max_steps")
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "out", *options, 2)) == 0
    damaged = tmp_path / "out" / "checkpoint-2" / file
    damaged.unlink() if kept is None else damaged.write_bytes(damaged.read_bytes()[:kept])
    resumed = train(embedded, pictures, tmp_path / "out", *options, 3, "--resume")
    assert train_side_branch.main(resumed) == 1
    assert re.search(r"error: \S*checkpoint-2 is damaged: .+ Delete that folder", capsys.readouterr().err)
    shutil.rmtree(damaged.parent)
    assert train_side_branch.main(resumed) == 0


def test_a_card_that_somebody_wrote_stays_and_one_that_training_wrote_is_made_anew(
    embedded, pictures, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "out"
    output.mkdir()
    monkeypatch.chdir(output)
    options = ("--save_steps", 1, "--output", ".")
    assert train_side_branch.main(train(embedded, pictures, output, *options, "--max_steps", 1)) == 0
    first = (output / "README.md").read_text()
    assert "# out\n" in first
    record = json.loads((output / "training.json").read_text())
    assert train_side_branch.main(train(embedded, pictures, output, *options, "--max_steps", 2, "--resume")) == 0
    assert (output / "README.md").read_text() != first
    assert json.loads((output / "training.json").read_text())["training_seconds"] > record["training_seconds"] - 1
    (output / "README.md").write_text("mine")
    assert train_side_branch.main(train(embedded, pictures, output, *options, "--max_steps", 3, "--resume")) == 0
    assert (output / "README.md").read_text() == "mine"
    assert "README.md was not written by a training and stays as it is" in capsys.readouterr().out


def test_a_template_that_writes_the_first_token_itself_gives_it_once(processor):
    text = [{"type": "text", "text": "hi"}]
    messages = [
        {"role": "user", "content": [{"type": "image"}, *text]},
        {"role": "assistant", "content": text},
    ]
    image = Image.new("RGB", (48, 48))
    plain = encode(processor, messages, [image], 2048)
    writes = copy.deepcopy(processor)
    writes.tokenizer.bos_token = "<s>"
    writes.chat_template = "{{ bos_token }}" + processor.chat_template
    written = encode(writes, messages, [image], 2048)
    messages[0]["content"] = [{"type": "image", "image": image}, *text]
    inference = writes.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert written["input_ids"].tolist() == inference["input_ids"][0].tolist()
    assert (written["labels"] != IGNORED).sum() == (plain["labels"] != IGNORED).sum()


def test_a_disk_that_is_full_at_a_checkpoint_ends_the_run_with_a_word(
    embedded, pictures, tmp_path, capsys, monkeypatch
):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    arguments = train(embedded, pictures, tmp_path / "out", "--max_steps", 1, "--save_steps", 1)
    assert train_side_branch.main(arguments) == 1
    assert "The checkpoint of step 1 cannot be written" in capsys.readouterr().err
    assert last_checkpoint(tmp_path / "out") is None


@pytest.mark.parametrize("what", ["adapter", "plot"])
def test_a_disk_that_is_full_at_the_end_leaves_no_part_of_an_adapter(
    what, embedded, pictures, tmp_path, capsys, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = train(embedded, pictures, tmp_path / "out", "--max_steps", 1, "--save_strategy", "no")
    with monkeypatch.context() as patch, files_of_at_most(400_000 if what == "adapter" else 10**9):
        if what == "plot":
            patch.setattr(train_side_branch, "plot_losses", full)
        assert train_side_branch.main(arguments) == 1
    assert f"error: The adapter cannot be written into {tmp_path / 'out'}: " in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    assert train_side_branch.main(arguments) == 0
    assert {"README.md", "training.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "out"))


def test_a_training_that_is_terminated_ends_as_one_that_is_interrupted(
    embedded, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train_side_branch, "run", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert train_side_branch.main(train(embedded, pictures, tmp_path / "out")) == 130
    assert "interrupted; with --resume a run goes on from the last checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_bad_row_that_a_full_disk_refuses_is_told_with_its_file(tmp_path):
    report = BadRows(tmp_path / "bad_rows.jsonl")
    with files_of_at_most(10), pytest.raises(OSError, match=r"bad_rows\.jsonl"):
        report.add(0, [{}], BadRowError("broken", "a" * 100))


@pytest.mark.parametrize(
    ("option", "trains", "peft_type"),
    [
        (("--lora", "fusion"), "side branch and LoRA", "LORA"),
        (("--whole-fusion",), "side branch and fusion layer", "LN_TUNING"),
    ],
)
def test_accumulated_bf16_steps_of_more_than_the_branch_run(option, trains, peft_type, embedded, pictures, tmp_path):
    options = ("--max_steps", 2, "--gradient_accumulation_steps", 2, "--bf16", "--gradient_checkpointing")
    output = tmp_path / "adapter"
    assert train_side_branch.main(train(embedded, pictures, output, *options, *option)) == 0
    assert json.loads((output / "training.json").read_text())["trains"] == trains
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == peft_type


def test_a_llava_as_it_is_and_any_peft_config_train(pictures, tmp_path):
    from peft import LoraConfig

    LoraConfig(r=3, target_modules=r".*language_model\.layers\.[67]\.mlp\.up_proj").save_pretrained(tmp_path / "lora")
    options = ("--saturation-layer", 3, "--peft-config", tmp_path / "lora", "--max_steps", 1)
    llava, output = ROOT / "examples" / "tiny-llava", tmp_path / "adapter"
    assert train_side_branch.main(train(llava, pictures, output, *options)) == 0
    record = json.loads((output / "training.json").read_text())
    assert (record["base_type"], record["base_model"], record["saturation_layer"]) == ("llava", "tiny-llava", 3)
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 3
    assert str(tmp_path) not in (output / "training.json").read_text() + (output / "adapter_config.json").read_text()


def test_a_card_names_what_else_trained_and_loads_it_though_it_cannot_be_merged(pictures, tmp_path, monkeypatch):
    from peft import IA3Config

    places = {"target_modules": r".*language_model\.layers\.7\.mlp\.down_proj", "modules_to_save": ["linear_2"]}
    IA3Config(feedforward_modules=places["target_modules"], **places).save_pretrained(tmp_path / "ia3")
    options = ("--saturation-layer", 4, "--peft-config", tmp_path / "ia3", "--max_steps", 1)
    llava, output = ROOT / "examples" / "tiny-llava", tmp_path / "adapter"
    assert train_side_branch.main(train(llava, pictures, output, *options)) == 0
    card = (output / "README.md").read_text()
    assert "A trained side branch, IA3 and linear_2 of DPVR-LF" in card
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("tiny-llava", str(llava)), names)
    assert names["model"].base_model.config.saturation_layer == 4
    loaded = {name: weight.float() for name, weight in get_peft_model_state_dict(names["model"]).items()}
    assert_same(loaded, load_file(output / "adapter_model.safetensors"), 1e-3)  # the base is in half precision


def test_two_processes_train_a_layer_that_a_batch_without_an_image_does_not_use(embedded, pictures, tmp_path):
    from peft import LoraConfig

    LoraConfig(r=2, target_modules=r".*multi_modal_projector\.linear_1").save_pretrained(tmp_path / "lora")
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}]
    rows = json.loads((pictures / "good.json").read_text())
    rows = [row for row in rows if row.get("image")][:3] + [{"conversations": turns}] * 3
    (pictures / "mixed.json").write_text(json.dumps(rows))
    options = ("--peft-config", tmp_path / "lora", "--per_device_train_batch_size", 1, "--num_train_epochs", 2)
    options += ("--data", pictures / "mixed.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "scripts" / "train_side_branch.py")]
    subprocess.run(
        [*command, *train(embedded, pictures, tmp_path / "out", *options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=300,
        check=True,
    )
    assert len(losses(tmp_path / "out")) == 6


SHARDED = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from accelerate_on_cpu import take_cpus_for_gpus

take_cpus_for_gpus()
from scripts import train_side_branch
from training.trainer import SideBranchTrainer, end_process, trainable

save_model = SideBranchTrainer.save_model


def save_sharded_model(trainer, *args, **kwargs):
    layers = [part for part in trainer.model.modules() if type(part).__name__.endswith("LlamaDecoderLayer")]
    assert layers and all(isinstance(layer, FSDPModule) for layer in layers)  # each gathered by itself
    if not trainer.eval_dataset:  # behind an evaluation, weights of no layer are still gathered
        assert all(isinstance(weight, DTensor) for weight in trainable(trainer.model).values())
    save_model(trainer, *args, **kwargs)


SideBranchTrainer.save_model = save_sharded_model
end_process(train_side_branch.main())
"""


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ((), {}),
        (("--loss", "distill", "--whole-fusion"), {"FSDP_ACTIVATION_CHECKPOINTING": "true"}),
        (("--lora", "fusion"), {"FSDP_ACTIVATION_CHECKPOINTING": "true"}),
        (("--eval-rows", "2", "--eval_steps", "1"), {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}),
    ],
    ids=["", "checkpointing, all of fusion", "checkpointing, LoRA", "evaluation, a LLaVA as it is"],
)
def test_accelerates_fsdp2_trains_and_resumes_as_one_process_does(embedded, pictures, tmp_path, options, variables):
    """With the variables that `accelerate launch --use_fsdp` sets."""
    one, sharded, base = tmp_path / "one", tmp_path / "sharded", embedded
    options += ("--max_steps", 4, "--save_steps", 2)
    if "FSDP_CPU_RAM_EFFICIENT_LOADING" in variables:
        base, options = ROOT / "examples" / "tiny-llava", (*options, "--saturation-layer", 3)
    assert train_side_branch.main(train(base, pictures, one, *options)) == 0
    program = tmp_path / "program.py"
    program.write_text(SHARDED.format(root=str(ROOT)))
    arguments = train(base, pictures, sharded, *options, "--per_device_train_batch_size", 1)
    arguments.remove("--use_cpu")
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    environment |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    written = []
    for resume in ([], ["--resume"]):
        run_script(program, *arguments, *resume, num_processes=2, **environment, **variables)
        assert losses(sharded) == pytest.approx(losses(one), abs=1e-5)
        expected, actual = (load_file(folder / "adapter_model.safetensors") for folder in (one, sharded))
        assert_same(actual, expected, 1e-5)
        written.append((sharded / "checkpoint-2" / TRAINED_WEIGHTS).stat().st_mtime_ns)
        shutil.rmtree(sharded / "checkpoint-4")
        (sharded / "training.json").unlink()
    assert written[0] == written[1]  # the second run began behind it


def test_the_trl_example_trains_a_checkpoint_in_half_precision_in_small_steps(tmp_path):
    pytest.importorskip("trl")
    model, adapter = tmp_path / "dpvr", tmp_path / "adapter"
    convert(ROOT / "examples" / "tiny-llava", model, saturation_layer=3)  # in float16, as its source
    program = ROOT / "examples" / "train_with_trl.py"
    run_script(program, model, adapter, "--steps", 3, "--rows", 12, CUDA_VISIBLE_DEVICES="")
    adapted = load_adapter(AutoModel.from_pretrained(model, trust_remote_code=True), adapter)
    weights = [w for name, w in adapted.named_parameters() if "ln_tuning_layers" in name and "down_proj" in name]
    assert 0 < weights[0].abs().max() < 0.01  # from zero, by three steps of Adam at 1e-3
    for option in ("--steps", "--rows"):
        refused = run_script(program, model, adapter, option, 0, check=False)
        assert refused.returncode == 2
        assert refused.stderr.endswith(f"error: {option} must be at least 1, got 0\n")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "nowhere does not exist"),
        (str(ROOT / "examples" / "tiny-llava"), "is no DPVR and has no side branch"),
    ],
)
def test_the_trl_example_refuses_a_model_that_it_cannot_train(model, message, tmp_path):
    pytest.importorskip("trl")
    program = ROOT / "examples" / "train_with_trl.py"
    result = run_script(program, model, tmp_path / "adapter", cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


# --- the benchmarks


def test_teacher_forced_answers_are_those_of_greedy_generation(embedded, processor):
    """On which `side_branch_seeds` relies: an answer is right if each of its tokens is, given those before."""
    model = AutoModel.from_pretrained(embedded, trust_remote_code=True).eval()
    pairs = task.make_questions(1000, 8, "test")
    batches = side_branch_seeds.held_out_batches(StagedModel(model), processor, 8)
    forced = side_branch_seeds.evaluate(StagedModel(model), batches)
    answers = generate_answers(model, processor, [grid.image for grid, _ in pairs], [each for _, each in pairs])
    right = [task.is_correct(answer, each.answer) for answer, (_, each) in zip(answers, pairs, strict=True)]
    assert forced["accuracy"] == pytest.approx(np.mean(right))
    assert 0.2 < np.mean(right) < 0.9


def test_the_table_of_seeds_has_means_and_intervals():
    cells = {"3/dense": 0.9, "3/untrained/identity/0": 0.5}
    cells |= {f"3/distill/identity/{seed}": 0.7 + 0.1 * seed for seed in range(2)}
    names = (*task.KINDS, "token_accuracy", "kl")
    record = {"cells": {name: {"accuracy": value, **dict.fromkeys(names, 0.1)} for name, value in cells.items()}}
    entries = {entry["loss"]: entry for entry in side_branch_seeds.summarize(record)}
    mean, half = entries["distill"]["accuracy"]
    assert mean == pytest.approx(0.75)
    assert half == pytest.approx(12.706 * 0.05, rel=1e-3)  # Student's t with one degree of freedom
    assert entries["distill"]["recovered"][0] == pytest.approx(0.625)
    assert "| 3 | distill | identity | 2 | 75.0 ± 63.5 |" in side_branch_seeds.table(list(entries.values()))
    assert side_branch_seeds.best(list(entries.values())) == {"loss": "distill", "init": "identity"}


def test_seeds_of_other_weights_are_not_mixed(monkeypatch, tmp_path):
    settings = f"--saturation-layers 4 --seeds 0 --inits identity --questions 1 --output {tmp_path / 'seeds.json'}"
    monkeypatch.setattr(sys, "argv", ["side_branch_seeds.py", *settings.split()])
    side_branch_seeds.main()
    record = json.loads((tmp_path / "seeds.json").read_text())
    (tmp_path / "seeds.json").write_text(json.dumps(record | {"weights": "of another model"}))
    with pytest.raises(SystemExit, match="with weights of fingerprint of another model, but those of"):
        side_branch_seeds.main()


def test_a_benchmark_that_is_killed_keeps_what_it_measured(monkeypatch, tmp_path):
    def measure(kind, arguments):
        if kind == "distill":
            raise SystemExit("killed, most likely out of memory")
        names = ("flops", "bytes_beyond_weights", "frozen_bytes", "trained_parameters")
        return {"seconds": [1.0], **dict.fromkeys(names, 1)}

    monkeypatch.setattr(training_benchmark, "in_child", measure)
    output = tmp_path / "training.json"
    monkeypatch.setattr(sys, "argv", ["training.py", "--output", str(output), "--kinds", "lora", "answer", "distill"])
    with pytest.raises(SystemExit):
        training_benchmark.main()
    assert json.loads(output.read_text())["kinds"].keys() == {"lora", "answer"}


def test_the_training_benchmark_measures_each_kind_and_its_ratios():
    options = "--layers 4 --vision-layers 2 --hidden-size 128 --tokens 4+8 --dtype float32"
    args = training_benchmark.parse_args(f"{options} --steps 1 --warmup 0 --threads 1".split())
    results = {kind: [training_benchmark.measure(kind, args)] for kind in training_benchmark.KINDS}
    assert all(result["seconds"][0] > 0 for (result,) in results.values())
    assert len({result["trained_parameters"] for kind, (result,) in results.items() if kind != "lora"}) == 1
    ratios = training_benchmark.summarize(results)["ratios"]
    assert all(value for values in ratios.values() for value in values)
    matrices = results["answer"][0]["trained_parameters"] - 2 * 128  # of the side branch, without its norms
    flops = [results[kind][0]["flops"] for kind in ("cached-answer", "answer", "distill")]
    assert 3 * 2 * 4 * matrices < flops[0] < flops[1] < flops[2]  # 4 vision tokens, forward and twice backward
    assert len(ratios) == 6  # time and memory of either loss, and a second epoch of either
