# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Random damage to sources: a conversion either works or is refused, and never does anything else.

`DPVR_EXAMPLES` sets how many inputs each test tries, other ones in every run.
"""

import copy
import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kill_conversions import contents
from llava_checkpoints import make_llava, write_llava_hf

from convert_llava_to_dpvr import ConversionError, convert
from read_weights import read_safetensors

EXAMPLES = int(os.environ.get("DPVR_EXAMPLES", "40"))
FUZZ = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llava_hf(tmp_path_factory.mktemp("fuzz") / "llava", make_llava(), num_files=2)


@pytest.fixture(scope="module")
def originals(source) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in source.iterdir()}


def assert_converted_or_refused(source, originals, changed: dict[str, bytes]) -> None:
    """Converts `source` with files changed, which are put back after."""
    output = source.parent / "dpvr"
    try:
        for name, content in changed.items():
            (source / name).write_bytes(content)
        before = contents(source)
        try:
            convert(source, output)
        except ConversionError:
            assert not output.exists()
        else:
            shutil.rmtree(output)
        assert contents(source) == before
        assert [path.name for path in source.parent.iterdir()] == ["llava"]
    finally:
        for name in changed:
            (source / name).write_bytes(originals[name])


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


@FUZZ
@given(st.data())
def test_bytes_of_headers(source, originals, data):
    name = data.draw(st.sampled_from([name for name in originals if name.endswith(".safetensors")]))
    content = bytearray(originals[name])
    end = header_end(content)
    places = st.one_of(st.integers(0, 8), st.integers(8, end + 16))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6)):
        content[place] = value
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    assert_converted_or_refused(source, originals, {name: bytes(content[:cut])})


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.integers(-3, 300),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["F32", "I8", "llama", "mistral", "qwen2", "clip_vision_model", "default", "full", "auto"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


def edit(data, content):
    """Replaces, removes or adds a value at a random place of a JSON value."""
    parent, key = {"root": content}, "root"
    while isinstance(parent[key], dict | list) and parent[key] and data.draw(st.integers(0, 5)):
        parent = parent[key]
        key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
    if isinstance(parent, dict) and key != "root" and data.draw(st.integers(0, 3)) == 0:
        other = data.draw(st.sampled_from(sorted(parent)))
        parent[other] = parent.pop(key)
    else:
        parent[key] = data.draw(JSON)


@FUZZ
@given(st.data())
def test_values_in_headers(source, originals, data):
    name = data.draw(st.sampled_from([name for name in originals if name.endswith(".safetensors")]))
    content = originals[name]
    end = header_end(content)
    box = {"root": json.loads(content[8:end])}
    for _ in range(data.draw(st.integers(1, 3))):
        edit(data, box["root"])
    text = json.dumps(box["root"]).encode()
    assert_converted_or_refused(source, originals, {name: len(text).to_bytes(8, "little") + text + content[end:]})


@FUZZ
@given(st.data())
def test_values_in_configs(source, originals, data):
    names = ["config.json", INDEX, "config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"]
    name = data.draw(st.sampled_from([name for name in names if name in originals]))
    content = copy.deepcopy(json.loads(originals[name]))
    for _ in range(data.draw(st.integers(1, 3))):
        edit(data, content)
    assert_converted_or_refused(source, originals, {name: json.dumps(content).encode()})


@settings(FUZZ, max_examples=10 * EXAMPLES)
@given(st.binary(max_size=200), st.one_of(st.none(), JSON))
def test_any_bytes_as_safetensors(tmp_path_factory, content, header):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    if header is not None:
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + content
    path.write_bytes(content)
    try:
        tensors, _ = read_safetensors(path)
    except ConversionError:
        return
    for tensor in tensors.values():
        if tensor.dtype is not None:
            assert tensor.load().shape == tensor.shape
