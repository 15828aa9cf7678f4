# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Broken sources: each is refused in a sentence that names file, key and what disagrees; nothing is left behind."""

import io
import json
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kill_conversions import contents
from llava_checkpoints import Canary, edit_config, make_llava, trained_branch, write_llava_hf
from safetensors.torch import load_file, save_file

from convert_llava_to_dpvr import main
from read_weights import ConversionError, read_safetensors

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
KEY = "language_model.model.layers.1.mlp.up_proj.weight"  # F32, (48, 32)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    """A sound source of each kind, to break copies of."""
    folder, model = tmp_path_factory.mktemp("sound"), make_llava()
    return {
        "shards": write_llava_hf(folder / "shards", model, num_files=2),
        "single": write_llava_hf(folder / "single", model, num_files=1),
        "bin": write_llava_hf(folder / "bin", model, suffix=".bin", num_files=1),
    }


@pytest.fixture
def refuse(tmp_path, sound, capsys) -> Callable:
    """Breaks a copy of a source and checks that it is refused in one line that `message` matches, at no cost."""

    def check(change: Callable[[Path], object], message: str, kind: str = "shards", *options: str) -> None:
        source = tmp_path / "llava"
        shutil.copytree(sound[kind], source)
        change(source)
        before, listing = contents(source), sorted(path.name for path in tmp_path.iterdir())
        assert main([str(source), str(tmp_path / "dpvr"), *options]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: "), error
        assert error.count("\n") == 1, error
        assert "Traceback" not in error
        assert re.search(message, error), error
        assert contents(source) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == listing

    return check


# ---------------------------------------------------------------------------------------------- safetensors files


def split(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(path: Path, header, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def holder(source: Path, key: str = KEY) -> Path:
    return source / json.loads((source / INDEX).read_text())["weight_map"][key]


def edit_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        path = holder(source)
        header, data = split(path)
        change(header)
        join(path, header, data)

    return edit


def edit_entry(**fields) -> Callable[[Path], None]:
    return edit_header(lambda header: header[KEY].update(fields))


def shift(header: dict, begin: int, end: int) -> None:
    offsets = header[KEY]["data_offsets"]
    header[KEY]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]


def resize(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda source: holder(source).write_bytes(change(holder(source).read_bytes()))


def state_length(length: int) -> Callable[[Path], None]:
    return resize(lambda content: length.to_bytes(8, "little") + content[8:])


def raw_header(text: bytes) -> Callable[[Path], None]:
    return lambda source: join(holder(source), text, b"")


def name_twice(source: Path) -> None:
    header, data = split(holder(source))
    text = json.dumps(header)
    join(holder(source), (text[:-1] + f', "{KEY}": {json.dumps(header[KEY])}}}').encode(), data)


UP = re.escape(KEY)
FILE = r"llava/model-0000\d-of-00002\.safetensors"
SAFETENSORS = {
    "cut in the data": (
        resize(lambda content: content[:-100]),
        rf"{FILE} is truncated: .* at byte \d+, but it has \d+",
    ),
    "cut in the header": (resize(lambda content: content[:50]), rf"{FILE} .* header of \d+ bytes, but only 1 to 42"),
    "cut in the length": (resize(lambda content: content[:5]), rf"{FILE} .* it has 5 bytes, too few"),
    "bytes at the end": (
        resize(lambda content: content + b"12"),
        rf"{FILE} has bytes that belong to no tensor: .*\d+",
    ),
    "empty": (resize(lambda content: b""), rf"{FILE} .* an empty file"),
    "length zero": (state_length(0), rf"{FILE} .* header of 0 bytes, but only 1 to \d+"),
    "length too large": (state_length(10**6), rf"{FILE} .* header of 1000000 bytes, but only 1 to \d+"),
    "length negative": (state_length(2**64 - 1), rf"{FILE} .* header of 18446744073709551615 bytes"),
    "length too small": (state_length(40), rf"{FILE} .* header is not valid JSON"),
    "overlap": (edit_header(lambda header: shift(header, -4, -4)), rf"{FILE}: .* begins at byte \d+, which overlaps"),
    "gap": (edit_header(lambda header: shift(header, 4, 4)), rf"{FILE}: {UP} begins at byte \d+, which leaves a gap"),
    "past the end": (
        edit_header(lambda header: shift(header, 2**40, 2**40)),
        rf"{FILE}: {UP} spans bytes \d+ to \d+, but there are only \d+",
    ),
    "negative offset": (edit_entry(data_offsets=[-4, 6140]), rf"{FILE}: {UP} has data_offsets \[-4, 6140\]"),
    "three offsets": (edit_entry(data_offsets=[0, 1, 2]), rf"{FILE}: {UP} has data_offsets \[0, 1, 2\]"),
    "offsets reversed": (
        edit_entry(data_offsets=[6144, 0]),
        rf"{FILE}: {UP} .*\(48, 32\).* 6144 bytes, .* span -6144",
    ),
    "other size": (
        edit_entry(shape=[48, 33]),
        rf"{FILE}: {UP} of shape \(48, 33\) in F32 has 6336 bytes, .* span 6144",
    ),
    "other type": (edit_entry(dtype="F16"), rf"{FILE}: {UP} of shape \(48, 32\) in F16 has 3072 bytes, .* span 6144"),
    "unknown type": (edit_entry(dtype="F12"), rf"{FILE}: {UP} has dtype 'F12', none of"),
    "integers": (edit_entry(dtype="I32"), rf"{UP} in .*{FILE} has dtype I32, but weights have one of F64, F32"),
    "quantized": (edit_entry(dtype="I8", shape=[48, 128]), rf"{UP} in .*{FILE} has dtype I8, but .* not quantized"),
    "fp8": (edit_entry(dtype="F8_E4M3", shape=[48, 128]), rf"{UP} in .*{FILE} has dtype F8_E4M3"),
    "transposed": (
        edit_entry(shape=[32, 48]),
        rf"{UP} in .*{FILE} has shape \(32, 48\), but by the config .*\(48, 32\)",
    ),
    "flat": (edit_entry(shape=[1536]), rf"{UP} in .*{FILE} has shape \(1536,\), but by the config it has \(48, 32\)"),
    "negative shape": (edit_entry(shape=[-48, -32]), rf"{FILE}: {UP} has shape \[-48, -32\]"),
    "shape of true": (edit_entry(shape=[True, 1536]), rf"{FILE}: {UP} has shape \[True, 1536\]"),
    "entry is a list": (edit_header(lambda header: header.update({KEY: [1]})), rf"{FILE}: .* {UP} is \[1\]"),
    "metadata of numbers": (edit_header(lambda header: header.update(__metadata__={"a": 1})), r"__metadata__"),
    "key twice in a header": (name_twice, rf"{FILE}: its header names {UP} 2 times"),
    "header is a list": (raw_header(b"[1]"), rf"{FILE} .* its header is a list"),
    "header is no text": (raw_header(b"\xff\xfe{}"), rf"{FILE} .* its header is not valid JSON"),
    "header is too deep": (raw_header(b"[" * 100_000), rf"{FILE} .* its header is not valid JSON"),
    "Git LFS pointer": (
        resize(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"),
        rf"{FILE} .* Git LFS pointer; .*git lfs pull",
    ),
    "web page": (resize(lambda _: b"<!DOCTYPE html><html>404</html>"), rf"{FILE} .* a web page"),
    "zip archive": (resize(lambda _: b"PK\x03\x04" + bytes(100)), rf"{FILE} .* a zip archive"),
    "gzip archive": (resize(lambda _: b"\x1f\x8b" + bytes(100)), rf"{FILE} .* a gzip archive"),
    "tar archive": (resize(lambda _: bytes(257) + b"ustar" + bytes(300)), rf"{FILE} .* a tar archive"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_broken_safetensors(refuse, case):
    refuse(*SAFETENSORS[case])


# ---------------------------------------------------------------------------------------------- keys and the index


def edit_weights(change: Callable[[dict], object], index: bool = True) -> Callable[[Path], None]:
    """Edits the tensors of the file of `KEY`, and the index with them."""

    def edit(source: Path) -> None:
        path = holder(source)
        tensors = load_file(path)
        before = set(tensors)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        record = json.loads((source / INDEX).read_text())
        for key in before - set(tensors):
            del record["weight_map"][key]
        record["weight_map"] |= dict.fromkeys(tensors, path.name) if index else {}
        (source / INDEX).write_text(json.dumps(record))

    return edit


def in_both_files(source: Path) -> None:
    other = source / (FIRST if holder(source).name == SECOND else SECOND)
    save_file(load_file(other) | {KEY: torch.ones(48, 32)}, other, metadata={"format": "pt"})


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        index = json.loads((source / INDEX).read_text())
        change(index)
        (source / INDEX).write_text(json.dumps(index))

    return edit


def point_to(file) -> Callable[[Path], None]:
    return edit_index(lambda index: index["weight_map"].update({KEY: file}))


def swap(index: dict) -> None:
    index["weight_map"][KEY] = FIRST if index["weight_map"][KEY] == SECOND else SECOND


def link_out(source: Path) -> None:
    path, outside = holder(source), source.parent / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def link_single_out(source: Path) -> None:
    outside = source.parent / "outside.safetensors"
    (source / "model.safetensors").rename(outside)
    (source / "model.safetensors").symlink_to(outside)


def absolute(source: Path) -> None:
    outside = source.parent / "outside.safetensors"
    shutil.copyfile(holder(source), outside)
    point_to(str(outside))(source)


NO_FILE = "which is not a file of that folder"
KEYS = {
    "missing": (edit_weights(lambda tensors: tensors.pop(KEY)), rf"Missing weight model\.{UP[:14]}.*\(48, 32\)"),
    "unknown": (edit_weights(lambda t: t.update(extra=torch.ones(3))), rf"extra in .*{FILE}, of shape \(3,\), is no"),
    "twice": (in_both_files, rf"Duplicate weight .*: {UP} in .*{FILE} and {UP} in .*{FILE}"),
    "in another layer": (
        edit_weights(lambda t: t.update({KEY.replace("1", "7"): t.pop(KEY)})),
        r"Missing weight .*layers\.1\.mlp\.up_proj",
    ),
    "missing shard": (lambda source: holder(source).unlink(), rf"{INDEX} has \S+ in '{FILE[6:]}', {NO_FILE}"),
    "other shard": (edit_index(swap), rf"has {UP} in {FILE[6:]}, which does not hold it; it is in {FILE[6:]}"),
    "key of no shard": (edit_index(lambda index: index["weight_map"].update(x=FIRST)), "x in .* not hold it; no file"),
    "path up": (point_to("../llava/" + FIRST), rf"{INDEX} has {UP} in '\.\./llava/{FIRST}', {NO_FILE}"),
    "path absolute": (absolute, rf"{INDEX} has {UP} in '/.*outside\.safetensors', {NO_FILE}"),
    "path into a folder": (point_to("a/" + FIRST), NO_FILE),
    "path of another kind": (point_to("config.json"), rf"{INDEX} has {UP} in 'config\.json', {NO_FILE}"),
    "path is a number": (point_to(3), rf"{INDEX} has {UP} in 3, {NO_FILE}"),
    "path is a list": (point_to([FIRST]), rf"{INDEX} has {UP} in \['{FIRST}'\], {NO_FILE}"),
    "path with a null": (point_to("a\0.safetensors"), NO_FILE),
    "path too long": (point_to("a" * 5000 + ".safetensors"), NO_FILE),
    "link out of the folder": (link_out, rf"{FILE} is a link that leaves the folder, to .*outside\.safetensors"),
    "index is not JSON": (lambda source: (source / INDEX).write_text("{"), rf"{INDEX} is not valid JSON"),
    "index is a list": (lambda source: (source / INDEX).write_text("[]"), rf"{INDEX} holds a list"),
    "no weight_map": (edit_index(lambda index: index.pop("weight_map")), rf"{INDEX}: weight_map is None"),
    "weight_map is a list": (edit_index(lambda index: index.update(weight_map=[KEY])), rf"{INDEX}: weight_map is \["),
    "weight_map is empty": (edit_index(lambda index: index.update(weight_map={})), rf"{INDEX}: weight_map is {{}}"),
}


@pytest.mark.parametrize("case", KEYS)
def test_broken_keys_and_indices(refuse, case):
    refuse(*KEYS[case])


def test_a_single_file_that_links_out_of_the_folder_is_refused_too(refuse):
    refuse(link_single_out, r"llava/model\.safetensors is a link that leaves the folder, to .*outside", "single")


def test_links_of_the_hubs_cache_to_its_blobs_are_followed(tmp_path, sound):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    shutil.copytree(sound["shards"], snapshot)
    blobs.mkdir()
    for path in snapshot.iterdir():
        shutil.move(path, blobs / f"sha-{path.name}")
        path.symlink_to(f"../../blobs/sha-{path.name}")
    assert main([str(snapshot), str(tmp_path / "dpvr")]) == 0


# ---------------------------------------------------------------------------------------------- configs and tokenizer


def config(**fields) -> Callable[[Path], None]:
    return lambda source: edit_config(source, **fields)


def part(name: str, **fields) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        stored = json.loads((source / "config.json").read_text())[name]
        edit_config(source, **{name: stored | fields})

    return edit


def edit_file(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda source: (source / name).write_text(change((source / name).read_text()))


CONFIG = r"llava/config\.json"
CONFIGS = {
    "not JSON": (edit_file("config.json", lambda text: text[:-3]), rf"{CONFIG} is not valid JSON"),
    "a list": (edit_file("config.json", lambda text: "[]"), rf"{CONFIG} holds a list"),
    "too deep": (edit_file("config.json", lambda text: "[" * 100_000), rf"{CONFIG} is not valid JSON"),
    "not UTF-8": (lambda source: (source / "config.json").write_bytes(b"\xff\xff"), rf"{CONFIG} is not valid JSON"),
    "absent": (lambda source: (source / "config.json").unlink(), r"has no config\.json"),
    "of another model": (config(model_type="llama"), r"model_type 'llama'"),
    "of LLaVA-NeXT": (config(model_type="llava_next"), r"model_type 'llava_next'"),
    "unknown backbone": (part("text_config", model_type="nobody"), rf"{CONFIG} is not a config .*nobody"),
    "other backbone": (part("text_config", model_type="gpt2"), rf"{CONFIG}: the backbone is 'gpt2', none of llama"),
    "backbone of other weights": (part("text_config", model_type="qwen2"), r"q_proj\.bias"),
    "too many layers": (part("text_config", num_hidden_layers=7), rf"{CONFIG}: .* is 7, but the weights have 6"),
    "absurdly many layers": (part("text_config", num_hidden_layers=10**7), rf"{CONFIG}: .* is 10000000, but .* 6"),
    "too few layers": (part("text_config", num_hidden_layers=5), r"layers\.5\..* is no weight of this LLaVA"),
    "negative layers": (part("text_config", num_hidden_layers=-1), rf"{CONFIG}"),
    "no heads": (part("text_config", num_attention_heads=0), rf"{CONFIG}"),
    "other heads": (part("text_config", num_key_value_heads=4), r"k_proj.* has shape \(16, 32\), .* \(32, 32\)"),
    "other width": (part("text_config", hidden_size=64), r"has shape .*, but by the config it has"),
    "larger vocabulary": (
        part("text_config", vocab_size=192),
        r"embed_tokens\S* in \S+ has shape \(128, 32\), .*\(192,",
    ),
    "smaller vocabulary": (part("text_config", vocab_size=97), rf"at 97, but \S+{CONFIG} has a vocabulary of 97"),
    "image token elsewhere": (config(image_token_index=5), rf"has <image> at 96, but \S+{CONFIG} has it at 5"),
    "image token beyond": (config(image_token_index=999), rf"has <image> at 96, but \S+{CONFIG} has it at 999"),
    "no image token": (
        edit_file("tokenizer.json", lambda text: text.replace("<image>", "<picture>")),
        r"no <image> among its \d+ tokens, but .* has it at 96",
    ),
    "tokenizer is not JSON": (edit_file("tokenizer.json", lambda text: text[:50]), r"cannot be loaded from \S*llava"),
    "image_seq_length": (config(image_seq_length=9), rf"{CONFIG}: image_seq_length is 9, but images of 28 .* give 4"),
    "patch size": (part("vision_config", patch_size=7), r"image_seq_length is 4, but .* patches of 7 give 16"),
    "patch of zero": (
        part("vision_config", patch_size=0),
        rf"{CONFIG}: vision_config has image_size 28 and patch_size 0",
    ),
    "select strategy": (config(vision_feature_select_strategy="full"), r"image_seq_length is 4, but .* give 5"),
    "image size": (part("vision_config", image_size=42), r"image_seq_length is 4, but images of 42 .* give 9"),
    "feature layer": (config(vision_feature_layer=-5), rf"{CONFIG}: vision_feature_layer is -5, but .* 3 layers"),
    "processor's images": (
        edit_file("processor_config.json", lambda text: text.replace("28", "42")),
        r"image processor of \S+ makes images of .*42.*, but vision_config\.image_size is 28",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_broken_configs(refuse, case):
    refuse(*CONFIGS[case])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--saturation-layer", "6"], r"saturation_layer=6 must be between 1 and 5"),
        (["--saturation-layer", "-1"], r"saturation_layer=-1 must be between 1 and 5"),
        (["--num-fusion-layers", "6"], r"num_fusion_layers=6 must be between 1 and 5"),
        (["--num-side-layers", "-1"], r"num_side_layers=-1 must be between 0 and 6"),
    ],
)
def test_layers_out_of_range(refuse, options, message):
    refuse(lambda source: None, message, "shards", *options)


# ---------------------------------------------------------------------------------------------- pickled files


def zip_archive() -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/readme.txt", "no weights")
        return file.getvalue()


def tar_archive() -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("storages"))
        return file.getvalue()


def legacy_archive() -> bytes:
    with io.BytesIO() as file:
        torch.save({KEY: torch.ones(2)}, file, _use_new_zipfile_serialization=False)
        return file.getvalue()


def saved(content) -> bytes:
    with io.BytesIO() as file:
        torch.save(content, file)
        return file.getvalue()


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(48, 32), 0.1, 0, torch.qint8)


BIN = r"pytorch_model\.bin"
PICKLES = {
    "zip archive": (zip_archive, rf"{BIN} cannot be read: "),
    "tar archive": (tar_archive, rf"{BIN} cannot be read: it is a tar archive"),
    "archive of torch before 1.6": (legacy_archive, rf"{BIN} cannot be read: it is a bare pickle"),
    "empty": (lambda: b"", rf"{BIN} cannot be read: it is an empty file"),
    "truncated": (lambda: saved({KEY: torch.ones(99)})[:-200], rf"{BIN} cannot be read: "),
    "web page": (lambda: b"<html></html>", rf"{BIN} cannot be read: it is a web page"),
    "Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", rf"{BIN} .* Git LFS pointer"),
    "safetensors": (lambda: bytes(100), rf"{BIN} cannot be read: it is no archive of torch\.save"),
    "a list": (lambda: saved([torch.ones(2)]), rf"{BIN} holds a list, not a dictionary of tensors"),
    "a number": (lambda: saved({KEY: 3}), rf"{BIN} holds a int at '{UP}', not a tensor"),
    "key that is a number": (lambda: saved({3: torch.ones(2)}), rf"{BIN} holds a Tensor at 3"),
    "integers": (lambda: saved({KEY: torch.ones(48, 32).int()}), rf"{UP} in .*{BIN} has dtype torch\.int32"),
    "quantized": (lambda: saved({KEY: quantized()}), rf"{UP} in .*{BIN} has dtype torch\.qint8.*is not quantized"),
    "sparse": (lambda: saved({KEY: torch.eye(4).to_sparse()}), rf"{BIN}: {UP} is no plain tensor"),
    "without numbers": (lambda: saved({KEY: torch.ones(48, 32, device="meta")}), rf"{BIN}: {UP} is no plain tensor"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_broken_pickled_weights(refuse, case):
    make, message = PICKLES[case]
    refuse(lambda source: (source / "pytorch_model.bin").write_bytes(make()), message, "bin")


@pytest.mark.parametrize(
    ("file", "auto_map"),
    [
        ("processor_config.json", {"AutoProcessor": "own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", None]}),
    ],
)
def test_code_that_a_source_brings_is_never_run(tmp_path, sound, file, auto_map):
    source = shutil.copytree(sound["shards"], tmp_path / "llava")
    (source / "own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    fields = json.loads((source / file).read_text())
    (source / file).write_text(json.dumps(fields | {"auto_map": auto_map}))
    main([str(source), str(tmp_path / "dpvr")])
    assert not (tmp_path / "canary").exists()


def test_a_file_that_ends_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({KEY: torch.ones(4)}, path)
    tensor = read_safetensors(path)[0][KEY]
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(ConversionError, match=rf"model\.safetensors ended within {KEY}: it was changed while it was"):
        list(tensor.pieces())


@pytest.mark.parametrize("how", ["torch.save", "torch.save before 1.6", "pickle", "pickle named safetensors"])
def test_pickled_code_is_never_run(tmp_path, refuse, how):
    canary = tmp_path / "canary"
    content = {KEY: Canary(canary)}
    data = pickle.dumps(content, protocol=2)
    if how.startswith("torch"):
        with io.BytesIO() as file:
            torch.save(content, file, _use_new_zipfile_serialization=how == "torch.save")
            data = file.getvalue()
    if how == "pickle named safetensors":
        refuse(lambda source: (source / "model.safetensors").write_bytes(data), "model.safetensors", "single")
    else:
        refuse(lambda source: (source / "pytorch_model.bin").write_bytes(data), BIN, "bin")
    assert not canary.exists()
    pickle.loads(pickle.dumps(content))
    assert canary.exists()  # it does sing


# ---------------------------------------------------------------------------------------------- adapters

SIDE = "model.side_branch.layers.0.mlp.up_proj.weight"


def adapter_case(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = {f"model.side_branch.{key}": tensor for key, tensor in trained_branch().items()}
        change(tensors)
        save_file(tensors, path)

    return write


def adapter_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        adapter_case(lambda tensors: None)(path)
        path.write_bytes(change(path.read_bytes()))

    return write


ADAPTERS = {
    "truncated": (adapter_bytes(lambda content: content[:-8]), r"side\.safetensors is truncated"),
    "empty": (adapter_bytes(lambda content: b""), r"side\.safetensors .* an empty file"),
    "a zip archive": (adapter_bytes(lambda content: zip_archive()), r"side\.safetensors .* a zip archive"),
    "length lies": (adapter_bytes(lambda content: b"\xff" * 8 + content[8:]), r"side\.safetensors .* a header of \d+"),
    "missing": (
        adapter_case(lambda t: t.pop(SIDE)),
        r"Missing weight .*up_proj\.weight of shape \(48, 32\): .*side\.",
    ),
    "extra": (adapter_case(lambda t: t.update(x=torch.ones(2))), r"x in \S+side\.safetensors, of shape \(2,\), is no"),
    "shape": (
        adapter_case(lambda t: t.update({SIDE: torch.ones(48, 3)})),
        r"up_proj.* has shape \(48, 3\), .*\(48, 32\)",
    ),
    "integers": (adapter_case(lambda t: t.update({SIDE: torch.ones(48, 32).int()})), r"up_proj.* has dtype I32"),
    "twice": (
        adapter_case(lambda t: t.update({SIDE.removeprefix("model."): torch.ones(48, 32)})),
        r"Duplicate weight .*up_proj\.weight: .* both in \S+side\.safetensors",
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_broken_adapters(tmp_path, refuse, case):
    write, message = ADAPTERS[case]
    path = tmp_path / "side.safetensors"
    write(path)
    refuse(lambda source: None, message, "shards", "--adapter", str(path))
