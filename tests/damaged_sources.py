# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Random damage to the files of a checkpoint, and what a conversion makes of it."""

import copy
import json
import shutil
from pathlib import Path

from hypothesis import strategies as st
from kill_conversions import contents

from convert_llava_to_dpvr import ConversionError, convert

INDEX = "model.safetensors.index.json"
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


def read_source(source: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in source.iterdir()}


def converted_or_refused(source: Path, originals: dict[str, bytes], changed: dict[str, bytes]) -> str:
    """Converts `source` with files changed, which are put back after. Returns which of the two it was."""
    output, beside = source.parent / "dpvr", sorted(source.parent.iterdir())
    try:
        for name, content in changed.items():
            (source / name).write_bytes(content)
        before = contents(source)
        try:
            convert(source, output)
        except ConversionError:
            outcome = "refused"
            assert not output.exists()
        else:
            outcome = "converted"
            shutil.rmtree(output)
        assert contents(source) == before
        assert sorted(source.parent.iterdir()) == beside
    finally:
        for name in changed:
            (source / name).write_bytes(originals[name])
    return outcome


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _weights(data, originals: dict[str, bytes]) -> str:
    return data.draw(st.sampled_from([name for name in originals if name.endswith(".safetensors")]))


def edit(data, content) -> None:
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


def damage_header_bytes(data, originals: dict[str, bytes]) -> dict[str, bytes]:
    """Bytes changed in a header and around it, and the file cut."""
    name = _weights(data, originals)
    content = bytearray(originals[name])
    end = header_end(content)
    places = st.one_of(st.integers(0, 8), st.integers(8, end + 16))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6)):
        content[place] = value
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    return {name: bytes(content[:cut])}


def damage_header_values(data, originals: dict[str, bytes]) -> dict[str, bytes]:
    """Values changed in a header that stays JSON."""
    name = _weights(data, originals)
    content = originals[name]
    end = header_end(content)
    box = {"root": json.loads(content[8:end])}
    for _ in range(data.draw(st.integers(1, 3))):
        edit(data, box["root"])
    text = json.dumps(box["root"]).encode()
    return {name: len(text).to_bytes(8, "little") + text + content[end:]}


def damage_json(data, originals: dict[str, bytes]) -> dict[str, bytes]:
    """Values changed in a config, the index, or the files of the processor."""
    names = ["config.json", INDEX, "config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"]
    name = data.draw(st.sampled_from([name for name in names if name in originals]))
    content = copy.deepcopy(json.loads(originals[name]))
    for _ in range(data.draw(st.integers(1, 3))):
        edit(data, content)
    return {name: json.dumps(content).encode()}


DAMAGES = {"header bytes": damage_header_bytes, "header values": damage_header_values, "JSON files": damage_json}
