# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Random damage to sources: a conversion either works or is refused, and never does anything else.

`DPVR_EXAMPLES` sets how many inputs each test tries, other ones in every run.
"""

import json
import os

import pytest
from damaged_sources import DAMAGES, JSON, converted_or_refused, read_source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llava_checkpoints import make_llava, write_llava_hf, write_original

from read_weights import ConversionError, read_safetensors

EXAMPLES = int(os.environ.get("DPVR_EXAMPLES", "40"))
FUZZ = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=["llava-hf", "original"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "llava"
    if request.param == "original":
        return write_original(folder, make_llava(), ".safetensors")
    return write_llava_hf(folder, make_llava(), num_files=2)


@pytest.fixture(scope="module")
def originals(source) -> dict[str, bytes]:
    return read_source(source)


@pytest.mark.parametrize("kind", DAMAGES)
@FUZZ
@given(data=st.data())
def test_a_damaged_source_is_converted_or_refused_and_nothing_else(source, originals, kind, data):
    assert converted_or_refused(source, originals, DAMAGES[kind](data, originals)) in ("converted", "refused")


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
