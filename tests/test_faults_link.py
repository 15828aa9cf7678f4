# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`--link`: the source's own shards and one more, which transformers loads as it loads a full conversion."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_conversions import contents
from llava_checkpoints import (
    IMAGE,
    TRANSFORMERS_4,
    flip_a_bit,
    make_llava,
    refuse_links,
    write_llava_hf,
    write_original,
)
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

import convert_llava_to_dpvr as converter
import write_checkpoint
from convert_llava_to_dpvr import ConversionError, convert

BRANCH = "model-side-branch.safetensors"
LOGITS = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def example() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.tensor([[1, 7, *[IMAGE] * 4, 9, 11, 30]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28)}


def load(folder):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    return model.eval()


@pytest.mark.parametrize("names", [TRANSFORMERS_4, []], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize(("backbone", "num_files"), [("llama", 3), ("llama", 1), ("qwen2", 2)])
def test_links_load_as_a_full_conversion_does(tmp_path, names, backbone, num_files):
    source = write_llava_hf(tmp_path / "llava", make_llava(backbone), names, num_files=num_files)
    before = contents(source)
    summary = convert(source, tmp_path / "linked", link=True)
    full = convert(source, tmp_path / "full")
    linked = sorted(path.name for path in (tmp_path / "linked").glob("*.safetensors") if path.stat().st_nlink == 2)
    own = sorted(path.name for path in source.glob("*.safetensors"))
    assert linked == (own if num_files > 1 else ["model-base.safetensors"])
    assert (tmp_path / "linked" / BRANCH).stat().st_nlink == 1
    assert (summary.num_parameters, summary.num_trainable) == (full.num_parameters, full.num_trainable)
    assert f"{num_files} of the source's weight files" in str(summary)
    one, two = load(tmp_path / "linked"), load(tmp_path / "full")
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(tensor, two.state_dict()[key]) for key, tensor in one.state_dict().items())
    with torch.no_grad():
        assert torch.equal(one(**example()).logits, two(**example()).logits)
    assert contents(source) == before
    index = json.loads((tmp_path / "linked" / "model.safetensors.index.json").read_text())
    numbers = summary.num_parameters
    assert index["metadata"] == {"total_parameters": numbers, "total_size": 4 * numbers}


def test_links_load_in_a_fresh_process(tmp_path):
    source = write_llava_hf(tmp_path / "llava", make_llava())
    convert(source, tmp_path / "linked", link=True, saturation_layer=5)
    torch.save(example(), tmp_path / "inputs")
    command = [sys.executable, "-c", LOGITS, *(str(tmp_path / name) for name in ("linked", "inputs", "logits"))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    llava = LlavaForConditionalGeneration.from_pretrained(source).eval()
    with torch.no_grad():  # without text-only layers an identity side branch is LLaVA
        torch.testing.assert_close(torch.load(tmp_path / "logits"), llava(**example()).logits, atol=1e-4, rtol=1e-4)


def test_links_of_the_hubs_cache_are_made_to_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    write_llava_hf(snapshot, make_llava())
    blobs.mkdir()
    for path in snapshot.iterdir():
        shutil.move(path, blobs / f"sha-{path.name}")
        path.symlink_to(f"../../blobs/sha-{path.name}")
    convert(snapshot, tmp_path / "dpvr", link=True)
    for path in snapshot.glob("*.safetensors"):
        assert not (tmp_path / "dpvr" / path.name).is_symlink()
        assert (tmp_path / "dpvr" / path.name).samefile(path)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS])
def test_where_links_cannot_be_the_files_are_copied_with_a_word(tmp_path, monkeypatch, code):
    source = write_llava_hf(tmp_path / "llava", make_llava())

    refuse_links(monkeypatch, code)
    summary = convert(source, tmp_path / "dpvr", link=True)
    copied = sorted(path.name for path in source.glob("*.safetensors"))
    assert sorted(summary.copied) == copied
    assert str(summary).count(f"cannot be linked: {os.strerror(code)}") == 3
    for name in copied:
        assert (tmp_path / "dpvr" / name).read_bytes() == (source / name).read_bytes()
        assert not (tmp_path / "dpvr" / name).samefile(source / name)


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_copy_that_was_damaged_after_a_kill_is_made_again(tmp_path, monkeypatch, damage):
    source = write_llava_hf(tmp_path / "llava", make_llava())

    def interrupt(*_):
        raise KeyboardInterrupt

    refuse_links(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(converter, "write_shards", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "dpvr", link=True)
    first, second, third = sorted((tmp_path / ".dpvr.partial").glob("*.safetensors"))
    kept = third.stat().st_ino
    if damage == "gone":
        first.unlink()
    else:
        first.write_bytes(first.read_bytes()[:-4] + b"\0\0\0\0")
    second.write_bytes(b"")
    convert(source, tmp_path / "dpvr", link=True)
    for path in source.glob("*.safetensors"):
        assert (tmp_path / "dpvr" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "dpvr" / third.name).stat().st_ino == kept


def test_a_copy_that_is_not_what_was_read_is_refused(tmp_path, monkeypatch):
    source, sync = write_llava_hf(tmp_path / "llava", make_llava()), os.fsync
    refuse_links(monkeypatch)

    def spoil(descriptor: int) -> None:
        sync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name.endswith(".safetensors.tmp"):
            flip_a_bit(path)

    monkeypatch.setattr(os, "fsync", spoil)
    with pytest.raises(ConversionError, match=r"The copy of \S+\.safetensors differs from it when read back"):
        convert(source, tmp_path / "dpvr", link=True)
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]


def test_a_disk_too_full_for_a_copy_is_refused_before_the_copy(tmp_path, monkeypatch):
    source = write_llava_hf(tmp_path / "llava", make_llava(), num_files=1)
    refuse_links(monkeypatch)
    [shard] = source.glob("*.safetensors")
    usage = shutil.disk_usage(tmp_path)._replace(free=shard.stat().st_size - 1)  # more than the side branch needs
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(write_checkpoint, "_copy_file", lambda *_: pytest.fail("copied"))
    with pytest.raises(ConversionError, match=r" free, but the weights need "):
        convert(source, tmp_path / "dpvr", link=True)
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]


def test_links_that_are_refused(tmp_path):
    model = make_llava()
    deeper = [(r"^model\.language_model\.", "model."), *TRANSFORMERS_4]
    named = write_llava_hf(tmp_path / "e", model, num_files=2)
    index = json.loads((named / "model.safetensors.index.json").read_text())
    names = dict(zip(sorted(set(index["weight_map"].values())), ("base.safetensors", BRANCH), strict=True))
    for old, new in names.items():
        (named / old).rename(named / new)
    index["weight_map"] = {key: names[file] for key, file in index["weight_map"].items()}
    (named / "model.safetensors.index.json").write_text(json.dumps(index))
    cases = {
        "has files named as those to be written": (named, "auto"),
        "is stored as F32, but torch.bfloat16 is asked for": (write_llava_hf(tmp_path / "a", model), "bfloat16"),
        "is no safetensors file": (write_llava_hf(tmp_path / "b", model, suffix=".bin"), "auto"),
        "has the original layout": (write_original(tmp_path / "c", model, ".safetensors"), "auto"),
        "but transformers would load it as": (write_llava_hf(tmp_path / "d", model, deeper), "auto"),
    }
    for message, (source, dtype) in cases.items():
        before = contents(source)
        with pytest.raises(ConversionError, match=message) as refusal:
            convert(source, tmp_path / "dpvr", link=True, dtype=dtype)
        assert str(refusal.value).startswith("--link: ")
        assert contents(source) == before
        assert not (tmp_path / "dpvr").exists()
        assert not list(tmp_path.glob(".*"))
