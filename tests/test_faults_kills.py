# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A conversion that is killed, or whose disk refuses: complete or not at all, and it goes on where it was."""

import contextlib
import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from kill_conversions import contents, identities
from llava_checkpoints import flip_a_bit, make_llava, read_output, refuse_links, write_llava_hf
from safetensors.torch import load_file, save, save_file

import convert_llava_to_dpvr as converter
import write_checkpoint
from convert_llava_to_dpvr import ConversionError, convert, main


@pytest.fixture
def source(tmp_path) -> Path:
    return write_llava_hf(tmp_path / "llava", make_llava())


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(write_checkpoint, "MAX_SHARD_BYTES", 40_000)


def many_runs(mode: str, source: Path, *options: str) -> list[dict]:
    work = source.parent / "work"
    work.mkdir()
    script = Path(__file__).with_name("kill_conversions.py")
    command = [sys.executable, str(script), mode, str(source), str(work), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_resumed(runs: list[dict]) -> None:
    for run in runs:
        assert run["source untouched"], run
        assert run["appeared"] in ("no", "complete"), run
        assert (run["again"], run["identical"], run["written again"], run["left"]) == (0, True, [], []), run
        assert "Traceback" not in run["stderr"] + run["stderr again"], run


def test_killed_at_any_moment_it_goes_on_where_it_was(source):
    runs = many_runs("kill", source)
    assert_resumed(runs)
    killed = [run for run in runs if run["code"] == -signal.SIGKILL]
    assert len(killed) >= 50
    assert {run["finished"] for run in killed} >= set(range(1, 9))  # at every state of the work
    assert {run["appeared"] for run in killed} == {"no", "complete"}
    interrupted = [run for run in runs if run["signal"] != signal.SIGKILL and not run["was over"]]
    assert {run["signal"] for run in interrupted} == {signal.SIGTERM, signal.SIGINT}
    assert all(run["code"] == 130 and run["stderr"].startswith("interrupted; ") for run in interrupted)


def test_a_killed_conversion_to_links_goes_on(source):
    runs = many_runs("kill", source, "--link")
    assert_resumed(runs)
    assert sum(run["code"] == -signal.SIGKILL for run in runs) >= 10


@pytest.mark.parametrize("options", [[], ["--link"]])
def test_a_disk_that_refuses_gets_one_sentence_and_keeps_nothing(source, options):
    runs = many_runs("fail", source, *options)
    assert len(runs) >= 10
    assert sum(run["code"] == 1 for run in runs) >= 8
    for run in runs:
        assert run["source untouched"], run
        if run["code"] == 0:  # nothing was lost: Python writes where sendfile fails, or the journal stayed
            assert (run["complete"], run["stderr"]) == (True, ""), run
            continue
        assert (run["code"], run["left"]) == (1, []), run
        assert run["stderr"].startswith("error: "), run
        assert run["stderr"].count("\n") == 1, run


def test_a_full_disk_is_refused_before_and_while_writing(tmp_path, source, monkeypatch, capsys):
    before = contents(source)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        (disk / "other").write_bytes(bytes(300_000))
        assert main([str(source), str(disk / "dpvr")]) == 1
        assert "kB free, but the weights need 318kB" in capsys.readouterr().err
        monkeypatch.setattr(write_checkpoint, "check_room", lambda *_: None)
        assert main([str(source), str(disk / "dpvr")]) == 1
        assert capsys.readouterr().err == f"error: {disk / 'dpvr'} cannot be written: No space left on device.\n"
        assert [path.name for path in disk.iterdir()] == ["other"]
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert main([str(source), str(disk / "dpvr")]) == 1
        assert "Read-only file system" in capsys.readouterr().err
        assert [path.name for path in disk.iterdir()] == ["other"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert contents(source) == before


def interrupt_at_shard(number: int, monkeypatch) -> None:
    """Interrupts the next conversion once `number` shards are noted."""
    finish = write_checkpoint.Staging.note

    def note(staging, **line):
        finish(staging, **line)
        if "shard" in line and len(staging.finished) >= number - 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(write_checkpoint.Staging, "note", note)


def interrupted(source: Path, output: Path, monkeypatch, **options) -> dict[str, tuple]:
    """Leaves a conversion behind that was interrupted after three shards. Returns what these shards are."""
    with monkeypatch.context() as patch:
        interrupt_at_shard(3, patch)
        with pytest.raises(KeyboardInterrupt):
            convert(source, output, **options)
    staging = write_checkpoint.staging_of(output)
    shards = {name: identity for name, identity in identities(staging).items() if not name.endswith(".tmp")}
    assert len(shards) >= 3
    assert not output.exists()
    return shards


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", ["options", "source", "replaced", "written over", "nothing"])
def test_only_the_same_request_goes_on(tmp_path, source, monkeypatch, change):
    shards = interrupted(source, tmp_path / "dpvr", monkeypatch)
    options = {}
    if change == "options":
        options["dtype"] = "bfloat16"
    elif change == "source":
        path = next(source.glob("*.safetensors"))
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    elif change != "nothing":  # other weights of the same size and time
        path = next(source.glob("*.safetensors"))
        weights, status = load_file(path), path.stat()
        if change == "replaced":
            path.unlink()
        path.write_bytes(save({name: weight + 1 for name, weight in weights.items()}, {"format": "pt"}))
        os.utime(path, ns=(1, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
    convert(source, tmp_path / "dpvr", **options)
    after = identities(tmp_path / "dpvr")
    kept = [name for name, identity in shards.items() if after.get(name) == identity]
    assert len(kept) == (len(shards) if change == "nothing" else 0)
    convert(source, tmp_path / "expected", **options)
    assert contents(tmp_path / "dpvr") == contents(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpvr", "expected", "llava"]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("cut", [1, 20])
def test_a_journal_whose_last_line_was_cut_off_is_whole_again_when_the_conversion_goes_on(
    tmp_path, source, monkeypatch, cut
):
    interrupted(source, tmp_path / "dpvr", monkeypatch)
    journal = write_checkpoint.journal_of(tmp_path / "dpvr")
    os.truncate(journal, journal.stat().st_size - cut)
    with monkeypatch.context() as patch:
        interrupt_at_shard(4, patch)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "dpvr")
    *lines, end = journal.read_bytes().split(b"\n")
    names = [json.loads(line).get("shard") for line in lines[1:]]
    assert len(names) == len(set(names)) >= 4
    assert end == b""


@pytest.mark.usefixtures("small_shards")
def test_a_finished_shard_that_was_damaged_meanwhile_is_written_again(tmp_path, source, monkeypatch):
    shards = interrupted(source, tmp_path / "dpvr", monkeypatch)
    first, second, *_ = sorted(shards)
    path = write_checkpoint.staging_of(tmp_path / "dpvr") / first
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (path.parent / "templates").mkdir()
    (path.parent / "templates" / "half.jinja").touch()
    (path.parent / "link").symlink_to(source)  # what it leads to is left alone
    before = contents(source)
    convert(source, tmp_path / "dpvr")
    assert contents(source) == before
    after = identities(tmp_path / "dpvr")
    assert after[first] != shards[first]
    assert after[second] == shards[second]
    convert(source, tmp_path / "expected")
    assert contents(tmp_path / "dpvr") == contents(tmp_path / "expected")


@pytest.mark.usefixtures("small_shards")
def test_a_finished_shard_that_was_replaced_by_a_link_is_written_again(tmp_path, source, monkeypatch):
    first = min(interrupted(source, tmp_path / "dpvr", monkeypatch))
    path = write_checkpoint.staging_of(tmp_path / "dpvr") / first
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    convert(source, tmp_path / "dpvr")
    assert not any(path.is_symlink() for path in (tmp_path / "dpvr").iterdir())
    assert (tmp_path / "dpvr" / first).read_bytes() == (tmp_path / "elsewhere").read_bytes()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_is_read_back_must_be_what_was_read(tmp_path, source, monkeypatch, dtype):
    sync = write_checkpoint.sync

    def spoil(path: Path) -> None:
        sync(path)
        if path.name == "model-00002-of-00009.safetensors.tmp" or path.name == "model-00002-of-00005.safetensors.tmp":
            flip_a_bit(path)

    monkeypatch.setattr(write_checkpoint, "sync", spoil)
    with pytest.raises(
        ConversionError, match=r"model\.\S+ in model-00002-of-\d+\.safetensors\.tmp differs from its source"
    ):
        convert(source, tmp_path / "dpvr", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("link", [False, True])
def test_all_is_on_the_disk_before_the_output_gets_its_name_and_the_name_before_the_journal_goes(
    tmp_path, source, monkeypatch, link
):
    done, sync, replace, unlink = [], os.fsync, os.replace, Path.unlink

    def note_sync(descriptor: int) -> None:
        sync(descriptor)
        done.append(("on the disk", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def note_replace(old, new) -> None:
        done.append(("renamed", Path(new).name))
        replace(old, new)

    def note_unlink(path, **options) -> None:
        done.append(("removed", path.name))
        unlink(path, **options)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(Path, "unlink", note_unlink)
    refuse_links(monkeypatch)  # the source's files are copied then
    (source / "additional_chat_templates").mkdir()  # in which the output has files too
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ 'rag' }}")
    output = tmp_path / "dpvr"
    folder, journal = write_checkpoint.staging_of(output).name, write_checkpoint.journal_of(output).name
    convert(source, output, link=link)
    named = done.index(("renamed", output.name))
    assert ("on the disk", folder) == done[:named][-2]  # and then the journal, which says so
    for path in output.rglob("*"):
        if path.suffix != ".safetensors":
            assert ("on the disk", path.name) in done[:named]
            continue
        renamed = done.index(("renamed", path.name))  # before the journal says that it is finished
        assert ("on the disk", f"{path.name}.tmp") in done[:renamed]
        assert done.index(("on the disk", folder), renamed) < done.index(("on the disk", journal), renamed)
    assert ("on the disk", tmp_path.name) in done[named : done.index(("removed", journal))]


def test_a_source_that_changes_under_the_conversion_is_refused(tmp_path, source, monkeypatch):
    write = write_checkpoint.ShardWriter.write

    def touch_and_write(*args):
        path = next(source.glob("*.safetensors"))
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        return write(*args)

    monkeypatch.setattr(write_checkpoint.ShardWriter, "write", touch_and_write)
    with pytest.raises(ConversionError, match=r"\.safetensors was changed while it was read"):
        convert(source, tmp_path / "dpvr")
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]


def test_a_source_that_is_written_anew_between_its_header_and_its_numbers_is_refused(tmp_path, source, monkeypatch):
    summarize = converter.summarize

    def write_anew(*args):
        for path in source.glob("*.safetensors"):
            save_file(dict(reversed(load_file(path).items())), path, {"format": "pt"})
        return summarize(*args)

    monkeypatch.setattr(converter, "summarize", write_anew)
    with pytest.raises(ConversionError, match=r"\.safetensors was changed while it was read"):
        convert(source, tmp_path / "dpvr")
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]


def test_a_conversion_killed_after_its_rename_is_not_taken_for_another_one(tmp_path, source, monkeypatch):
    output, sync = tmp_path / "dpvr", write_checkpoint.sync

    def interrupt_when_it_is_there(path):
        if path == tmp_path and output.exists():
            raise KeyboardInterrupt
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(write_checkpoint, "sync", interrupt_when_it_is_there)
        with pytest.raises(KeyboardInterrupt):
            convert(source, output)
    before, journal = contents(output), write_checkpoint.journal_of(output).read_bytes()
    for options in ({"num_fusion_layers": 2}, {"tokenizer": str(source)}):
        write_checkpoint.journal_of(output).write_bytes(journal)
        with pytest.raises(ConversionError, match="is not an empty folder; nothing is overwritten"):
            convert(source, output, **options)
    for name, text in (("generation_config.json", '{"pad_token_id": 5}'), ("chat_template.jinja", "{{ 'mine' }}")):
        write_checkpoint.journal_of(output).write_bytes(journal)
        (source / name).write_text(text)
        with pytest.raises(ConversionError, match="is not an empty folder; nothing is overwritten"):
            convert(source, output)
        (source / name).unlink()
    assert contents(output) == before
    write_checkpoint.journal_of(output).write_bytes(journal)
    assert convert(source, output).output == output
    assert contents(output) == before
    next(output.glob("*.safetensors")).unlink()  # no more the result of that conversion
    write_checkpoint.journal_of(output).write_bytes(journal)
    with pytest.raises(ConversionError, match="is not an empty folder; nothing is overwritten"):
        convert(source, output)
    convert(source, tmp_path / "another")
    output.rename(tmp_path / "damaged")
    (tmp_path / "another").rename(output)
    write_checkpoint.journal_of(output).write_bytes(journal)
    with pytest.raises(ConversionError, match="is not an empty folder; nothing is overwritten"):
        convert(source, output)


def test_what_only_bears_the_names_of_a_killed_conversion_is_left_alone(tmp_path, source):
    staging, journal = (made(tmp_path / "dpvr") for made in (write_checkpoint.staging_of, write_checkpoint.journal_of))
    staging.mkdir()
    (staging / "mine.txt").write_text("mine")
    with pytest.raises(ConversionError, match=r"dpvr\.partial is in the way, and no \.dpvr\.partial\.json says"):
        convert(source, tmp_path / "dpvr")
    assert not journal.exists()
    journal.write_text('{"mine": 1}')
    with pytest.raises(ConversionError, match="in the way and was not written by a conversion"):
        convert(source, tmp_path / "dpvr")
    assert ((staging / "mine.txt").read_text(), journal.read_text()) == ("mine", '{"mine": 1}')


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("inside", ["", "deep/llava"])
def test_a_source_or_adapter_where_the_output_is_prepared_is_refused(tmp_path, source, link, inside):
    moved = write_checkpoint.staging_of(tmp_path / "dpvr") / inside
    moved.parent.mkdir(parents=True, exist_ok=True)
    source.rename(moved)
    before = contents(moved)
    with pytest.raises(ConversionError, match=r"lies where a conversion to \S+ is prepared"):
        convert(moved, tmp_path / "dpvr", link=link)
    with pytest.raises(ConversionError, match=r"lies where a conversion to \S+ is prepared"):
        convert(ROOT / "examples" / "tiny-llava", tmp_path / "dpvr", adapter=next(moved.glob("*.safetensors")))
    assert contents(moved) == before


def test_a_mount_point_and_a_loop_of_links_are_refused_before_anything_is_written(tmp_path, source, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    loop = "cannot be written|is a symbolic link"  # Python 3.13 follows it no further
    for output, sentence in {"disk": "is a mount point", "loop": loop, "loop/x": "cannot be"}.items():
        with pytest.raises(ConversionError, match=sentence):
            convert(source, tmp_path / output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "llava", "loop"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_conversion_whose_summary_nobody_can_be_told_is_one_all_the_same(tmp_path, source):
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "convert_llava_to_dpvr.py", source, tmp_path / "late"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name, stream in {
        "full": io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True),  # noqa: SIM115
        "\xf6": io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
    }.items():
        with stream, contextlib.redirect_stdout(stream):
            assert main([str(source), str(tmp_path / name)]) == 0
    for name in ("late", "full", "\xf6"):
        assert (tmp_path / name / "config.json").is_file()


def test_links_in_the_place_of_its_own_files_are_not_followed(tmp_path, source):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    (tmp_path / "notes.json").write_text("mine")
    (tmp_path / ".dpvr.partial").symlink_to("precious")
    with pytest.raises(ConversionError, match=r"\.dpvr\.partial is a symbolic link; what it leads to is left alone"):
        convert(source, tmp_path / "dpvr")
    (tmp_path / ".dpvr.partial").unlink()
    (tmp_path / ".dpvr.partial.json").symlink_to("notes.json")
    with pytest.raises(ConversionError, match="Too many levels of symbolic links"):
        convert(source, tmp_path / "dpvr")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == (tmp_path / "notes.json").read_text() == "mine"
    assert not (tmp_path / "dpvr").exists()


def test_the_current_folder_is_refused_with_a_word(tmp_path, source, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (".", "../here", "sub/.."):
        with pytest.raises(ConversionError, match="is the current folder; give the name of one to make"):
            convert(source, output)
    assert not list((tmp_path / "here").iterdir())


def test_two_conversions_to_one_folder_at_once(tmp_path, source, capsys):
    output = tmp_path / "dpvr"
    journal = write_checkpoint.journal_of(output)
    with write_checkpoint.locked(journal, output):
        assert main([str(source), str(output)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: Another conversion to {output} is running")
        assert sorted(path.name for path in tmp_path.iterdir()) == [journal.name, "llava"]
    assert main([str(source), str(output)]) == 0  # the lock went with its holder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpvr", "llava"]


@pytest.mark.parametrize("ending", ["removed", "begun anew"])
def test_a_journal_whose_holder_ended_meanwhile_is_not_taken_for_the_one_that_is_there(tmp_path, monkeypatch, ending):
    output, lock = tmp_path / "dpvr", fcntl.flock
    journal, calls = write_checkpoint.journal_of(output), []

    def end_and_lock(file, operation):
        if not calls:
            journal.rename(tmp_path / "ended")  # a name keeps its inode from being used again
        if not calls and ending == "begun anew":
            journal.touch()
        calls.append(file)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", end_and_lock)
    with write_checkpoint.locked(journal, output) as file:
        assert os.path.samestat(os.fstat(file.fileno()), journal.stat())
    assert len(calls) == 2


def test_a_file_system_without_locks_takes_conversions_all_the_same(tmp_path, source, monkeypatch):
    def no_lock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    assert main([str(source), str(tmp_path / "dpvr")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpvr", "llava"]


def test_targets_that_are_refused(tmp_path, source, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "to-source").symlink_to(source)
    before, listing = contents(source), sorted(path.name for path in tmp_path.iterdir())
    refused = {
        tmp_path / "full": "is not an empty folder; nothing is overwritten",
        tmp_path / "full" / "mine.txt": "is not an empty folder; nothing is overwritten",
        tmp_path / "full" / "mine.txt" / "dpvr": "cannot be written: File exists",
        tmp_path / "link": "is a symbolic link; nothing is overwritten",
        source: "is the source; nothing is overwritten",
        tmp_path: "lies in the output",
        source / "inside" / "deep": "lies in the source",
        tmp_path / "to-source" / "inside": "lies in the source",
        Path("/proc/dpvr"): "cannot be written",
        tmp_path / ("long" * 70): "cannot be written: File name too long",
    }
    for output, sentence in refused.items():
        assert main([str(source), str(output)]) == 1, output
        error = capsys.readouterr().err
        assert sentence in error, (output, error)
        assert error.count("\n") == 1, error
    assert contents(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == listing
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path, source, monkeypatch):
    write_index = converter.write_index

    def make_output_and_write(*args):
        (tmp_path / "dpvr").mkdir()
        (tmp_path / "dpvr" / "mine.txt").write_text("mine")
        write_index(*args)

    monkeypatch.setattr(converter, "write_index", make_output_and_write)
    with pytest.raises(ConversionError, match="cannot be written: Directory not empty"):
        convert(source, tmp_path / "dpvr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpvr", "llava"]
    assert [path.name for path in (tmp_path / "dpvr").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_nan_and_infinite_weights_are_counted_and_kept(tmp_path, dtype, capsys):
    keys = ("language_model.model.layers.1.mlp.up_proj.weight", "vision_tower.vision_model.pre_layrnorm.bias")

    def spoil(tensors):
        tensors[keys[0]][3, :5] = float("nan")
        tensors[keys[0]][4, 0] = float("-inf")
        tensors[keys[1]][1] = float("inf")

    source = write_llava_hf(tmp_path / "llava", make_llava(), change=spoil)
    assert main([str(source), str(tmp_path / "dpvr"), "--dtype", dtype]) == 0
    printed = capsys.readouterr().out
    assert f"6 of the numbers of {keys[0]} in {source}/model-0000" in printed
    assert f"1 of the numbers of {keys[1]} in {source}/model-0000" in printed
    assert printed.count("NaN or infinite") == 2
    written = read_output(tmp_path / "dpvr")["model.language_model.layers.1.mlp.up_proj.weight"]
    assert int((~written.isfinite()).sum()) == 6


def test_files_are_made_for_everyone_that_the_umask_allows(tmp_path, source):
    mask = os.umask(0o027)
    try:
        convert(source, tmp_path / "dpvr")
    finally:
        os.umask(mask)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "dpvr").iterdir()}
    assert modes == {0o640}
    assert (tmp_path / "dpvr").stat().st_mode & 0o777 == 0o750
