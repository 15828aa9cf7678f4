"""A converted folder as its users load it: by the auto classes, in a process that knows nothing of this repository."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

from convert_llava_to_dpvr import convert

ASK = """
import sys
import numpy as np
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline

name, picture = sys.argv[1:]
image = Image.open(picture)
question = "What is in row 2, column 3?"
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
"""
ANSWER_BY_AUTO_CLASSES = (
    ASK
    + """
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(name, trust_remote_code=True).eval()
    assert type(model).__name__ == "DPVRForConditionalGeneration", type(model)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1]:]
    print("answer:", processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
"""
)
ANSWER_BY_PIPELINE = (
    ASK
    + """
pipe = pipeline("image-text-to-text", model=name, trust_remote_code=True)
output = pipe(text=messages, max_new_tokens=8, do_sample=False, return_full_text=False)
print("answer:", output[0]["generated_text"].strip())
"""
)
SAVE_AND_LOAD_AGAIN = (
    ASK
    + """
copy = name + "-copy"
AutoModel.from_pretrained(name, trust_remote_code=True).save_pretrained(copy)
processor.save_pretrained(copy)
model = AutoModel.from_pretrained(copy, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(copy, trust_remote_code=True)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1]:]
print("answer:", processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
"""
)


def run(program, *arguments, cwd, **environment):
    """Standard output of a fresh process with an empty Hugging Face home, offline."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    environment = {**inherited, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf-home"), **environment}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [line.removeprefix("answer: ") for line in result.stdout.splitlines() if line.startswith("answer: ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded LLaVA, converted with its trained side branch, and a picture beside it."""
    import numpy as np

    sys.path.insert(0, str(ROOT / "examples"))
    import digits

    path = tmp_path_factory.mktemp("remote")
    convert(ROOT / "examples" / "tiny-llava", path / "dpvr", adapter=ROOT / "examples" / "dpvr-tiny-adapter")
    grid = digits.make_grid(np.random.default_rng(0), "train")
    grid.image.save(path / "picture.png")
    return path


@pytest.fixture(scope="module")
def answer(folder):
    """What the model says in this process, where it is loaded by its class."""
    from digits import WORDS, make_grid
    from numpy.random import default_rng

    return WORDS[make_grid(default_rng(0), "train").digits[1, 2]]


def test_every_auto_class_answers_from_a_folder(folder, answer):
    answers = run(ANSWER_BY_AUTO_CLASSES, folder / "dpvr", folder / "picture.png", cwd=folder)
    assert answers == [answer] * 3


def test_the_pipeline_answers(folder, answer):
    assert run(ANSWER_BY_PIPELINE, folder / "dpvr", folder / "picture.png", cwd=folder) == [answer]


def test_a_loaded_model_and_processor_save_a_folder_that_loads_again(folder, answer):
    assert run(SAVE_AND_LOAD_AGAIN, folder / "dpvr", folder / "picture.png", cwd=folder) == [answer]
    names = {path.name for path in (folder / "dpvr-copy").iterdir()}
    assert {"configuration_dpvr.py", "modeling_dpvr.py", "processing_dpvr.py", "chat_template.jinja"} <= names


@pytest.mark.parametrize("program", [ANSWER_BY_AUTO_CLASSES, ANSWER_BY_PIPELINE], ids=["auto classes", "pipeline"])
def test_a_repository_in_the_hub_cache_answers_by_its_name(program, folder, answer, tmp_path):
    repository = tmp_path / "hub" / "models--org--dpvr"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder / "dpvr", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    answers = run(program, "org/dpvr", folder / "picture.png", cwd=tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert answers == [answer] * (3 if program == ANSWER_BY_AUTO_CLASSES else 1)


def test_remote_code_is_not_run_without_trust(folder):
    program = """
    import sys
    from transformers import AutoModel
    try:
        AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)
    except ValueError as error:
        print("answer:", "trust_remote_code" in str(error))
    """
    assert run(program, folder / "dpvr", cwd=folder) == ["True"]


def test_the_hub_files_import_nothing_but_torch_transformers_and_each_other():
    import ast

    allowed = {"torch", "transformers", "dataclasses", "functools"}
    for name in ("configuration_dpvr.py", "modeling_dpvr.py", "processing_dpvr.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, (name, node.module)
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name


def test_the_auto_map_names_every_auto_class(folder):
    auto_map = json.loads((folder / "dpvr" / "config.json").read_text())["auto_map"]
    model = "modeling_dpvr.DPVRForConditionalGeneration"
    assert auto_map == {
        "AutoConfig": "configuration_dpvr.DPVRConfig",
        "AutoProcessor": "processing_dpvr.DPVRProcessor",
        "AutoModel": model,
        "AutoModelForImageTextToText": model,
        "AutoModelForMultimodalLM": model,
    }
