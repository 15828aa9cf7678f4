"""Adapters and checkpoints on a Hub: uploaded in one commit with their cards, loaded by name into an empty cache."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT
from hub_server import TOKEN, Hub

from convert_llava_to_dpvr import convert
from scripts import checksums, publish, push_to_hub
from training.adapters import add_adapter, from_llava, save_adapter
from training.card import make_card, plot_losses, read_license

RUN = {
    "base_model": "org/dpvr",
    "data": "digits.json",
    "rows": 1000,
    "loss": "kl",
    "saturation_layer": 4,
    "trainable_parameters": 213248,
    "parameters": 3089152,
    "hyperparameters": {"learning_rate": 0.001, "steps": 400},
    "loss_curve": [[10, 0.5], [20, 0.25], [30, 0.125]],
    "training_seconds": 1234,
    "held_out": {
        "dense": {"look": {"questions": 500, "accuracy": 0.996, "wilson_95": [0.9855, 0.9989]}},
        "trained": {"look": {"questions": 500, "accuracy": 0.99, "wilson_95": [0.9768, 0.9957]}},
    },
}


def environment(home, hub):
    """That of a process that knows nothing but the Hub's address and a token."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return {**inherited, **variables, "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}


def run(arguments, home, hub, **variables):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=home,
        env={**environment(home, hub), **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The embedded LLaVA and its DPVR, and an adapter for both with the leavings of its training."""
    path = tmp_path_factory.mktemp("folders")
    convert(ROOT / "examples" / "tiny-llava", path / "dpvr", adapter=ROOT / "examples" / "dpvr-tiny-adapter")
    (path / "dpvr" / "README.md").unlink()
    model = add_adapter(from_llava(ROOT / "examples" / "tiny-llava", saturation_layer=4, dtype=torch.float32))
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_(0, 0.1, generator=generator)
    save_adapter(model, path / "adapter", "org/dpvr")
    (path / "adapter" / "training.json").write_text(json.dumps(RUN))
    (path / "adapter" / "README.md").write_text(make_card(RUN, "adapter"))  # as training writes it
    (path / "adapter" / "bad_rows.jsonl").write_text("private")
    (path / "adapter" / "checkpoint-10").mkdir()
    shutil.copytree(path / "adapter", path / "without-losses")
    (path / "without-losses" / "README.md").unlink()
    (path / "without-losses" / "training.json").write_text(json.dumps({**RUN, "loss_curve": []}))
    return path


OLDER = {  # what an earlier model has left in a repository
    "config.json": b"{}",
    "model.safetensors": b"old",
    "pytorch_model-00001-of-00002.bin": b"old",
    "pytorch_model.bin.index.json": b"{}",
    "adapters/a/adapter_model.safetensors": b"kept",
    "model_ema.safetensors": b"kept",
    "loss.png": b"of an earlier push",
    "additional_chat_templates/old.jinja": b"of an earlier push",
    "notes.txt": b"kept",
}
NAMED = ("config.json", "model.safetensors", "loss.png", "additional_chat_templates/old.jinja", "gone.txt")
OLDER["SHA256SUMS"] = "".join(f"{64 * '0'}  {name}\n" for name in NAMED).encode()
PUSH_ALL = """
import os
import sys

sys.path.insert(0, sys.argv[1])
import huggingface_hub.utils._http as http

http.time.sleep = lambda seconds: None  # between the client's tries
import convert_llava_to_dpvr
from scripts.push_to_hub import main

def push(label, *arguments, main=main):
    print(f"== {label}", file=sys.stderr, flush=True)
    print(f"== {label}")
    print(main(list(arguments)), flush=True)

def convert(label, repo):
    options = ("--push-to-hub", repo, "--private")
    push(label, f"{sys.argv[1]}/examples/tiny-llava", f"out/{label}", *options, main=convert_llava_to_dpvr.main)

dpvr, adapter = f"{sys.argv[2]}/dpvr", f"{sys.argv[2]}/adapter"
push("checkpoint", dpvr, "org/dpvr")
push("adapter", adapter, "org/adapter", "--private")
push("private where all can read", adapter, "org/llava", "--subfolder", "a", "--private")
push("adapter beside a checkpoint", adapter, "org/dpvr")
for root in ("/", ".", "./", "", "//."):
    push(f"adapter at {root!r}", adapter, "org/dpvr", "--subfolder", root)
push("adapter in a subfolder", adapter, "org/dpvr", "--subfolder", "/adapters//./a/")
push("adapter outside", adapter, "org/dpvr", "--subfolder", "adapters/../..")
push("with a plot", adapter, "org/again", "--subfolder", "a/b")
push("without a plot", f"{sys.argv[2]}/without-losses", "org/again", "--subfolder", "a/b")
push("over an older model", dpvr, "org/older")
convert("conversion", "org/converted")
convert("conversion beside an adapter", "org/adapter")
convert("conversion with a failing upload", "org/failing-upload")
push("failing upload", adapter, "org/failing-upload")
push("failing commit", adapter, "org/failing-commit")
os.environ["HF_TOKEN"] = "hf_wrong"
push("wrong token", adapter, "org/wrong-token")
"""


def sections(text):
    """What a push said, by its label."""
    return {part.split("\n")[0]: part.split("\n", 1)[1] for part in text.split("== ")[1:]}


@pytest.fixture(scope="module")
def pushed(folders, tmp_path_factory):
    """A Hub after a number of pushes in one process, what they printed and their errors, by label."""
    with Hub() as hub:
        llava = (ROOT / "examples" / "tiny-llava").iterdir()
        hub.commits["org/llava"] = []
        hub.add("org/llava", {path.name: path.read_bytes() for path in llava})
        hub.commits["org/older"] = []
        hub.add("org/older", OLDER)
        hub.failures = {r"PUT /org/failing-upload/lfs/": 500, r"POST .*/org/failing-commit/commit/": 500}
        result = run(["-c", PUSH_ALL, ROOT, folders], tmp_path_factory.mktemp("pusher"), hub)
        assert result.returncode == 0, result.stderr[-3000:]
        yield hub, sections(result.stdout), sections(result.stderr)


def test_a_checkpoint_and_an_adapter_are_pushed_whole_each_in_one_commit(folders, pushed):
    hub, said, _ = pushed
    for label in ("checkpoint", "adapter"):
        assert f"pushed to {hub.url}/org/" in said[label]
        assert said[label].endswith("\n0\n")
    expected = {path.name: path.read_bytes() for path in (folders / "dpvr").iterdir()}
    _, first, _ = (files for _, files in hub.commits["org/dpvr"])
    assert expected.items() <= first.items()
    assert first.keys() - expected == {"README.md", "SHA256SUMS"}
    files = hub.files("org/adapter")
    assert set(files) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
        "README.md",
        "loss.png",
        "SHA256SUMS",
    }
    assert files["adapter_model.safetensors"] == (folders / "adapter" / "adapter_model.safetensors").read_bytes()
    assert len(hub.commits["org/adapter"]) == 2  # the empty repository, and one more
    assert {f"adapters/a/{name}" for name in files} <= set(hub.files("org/dpvr"))
    run = {"base_type": "llava", **RUN}  # as the adapter's own file states
    assert files["README.md"].decode() == make_card(run, "org/adapter", has_plot=True)
    inside = make_card(run, "org/dpvr", subfolder="adapters/a", has_plot=True)
    assert hub.files("org/dpvr")["adapters/a/README.md"].decode() == inside


def test_weights_of_an_earlier_model_are_deleted_by_the_commit_that_brings_new_ones(folders, pushed):
    """transformers would read them and not the new ones; what the new SHA256SUMS does not name fails its check."""
    hub = pushed[0]
    files = hub.files("org/older")
    assert len(hub.commits["org/older"]) == 2
    assert files.keys() & OLDER.keys() == {
        "config.json",
        "adapters/a/adapter_model.safetensors",
        "model_ema.safetensors",
        "notes.txt",
        "SHA256SUMS",
    }
    for path in (folders / "dpvr").iterdir():
        assert files[path.name] == path.read_bytes()


def test_a_push_takes_away_nothing_that_no_push_brings(tmp_path):
    """Whoever uploaded a licence or pictures may have written sums of them too."""
    names = ("LICENSE", "USE_POLICY.md", "images/a.png", "loss.png", "special_tokens_map.json")
    (tmp_path / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in names))

    class Api:
        def hf_hub_download(self, *_, **__):
            return tmp_path / "SHA256SUMS"

    files = {"a/SHA256SUMS": tmp_path / "SHA256SUMS"}
    brought = publish._brought_before(Api(), "org/x", files, {"a/SHA256SUMS"})
    assert brought == {"a/loss.png", "a/special_tokens_map.json"}


def test_a_push_that_is_to_be_private_goes_into_no_public_repository(pushed):
    hub, _, errors = pushed
    assert (
        "error: org/llava is there and public, and --private makes only new ones"
        in errors["private where all can read"]
    )
    assert {"org/adapter", "org/converted"} <= hub.private
    assert len(hub.commits["org/llava"]) == 1


def test_a_second_push_leaves_nothing_that_the_check_of_the_sums_would_find(pushed, tmp_path):
    hub = pushed[0]
    first, second = (files for _, files in hub.commits["org/again"][1:])
    assert first.keys() - second.keys() == {"a/b/loss.png"}
    for path, data in second.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    assert checksums.main([str(tmp_path / "a" / "b"), "--check"]) == 0


def test_the_converter_pushes_what_it_has_made_and_says_how_to_push_it_again(pushed, tmp_path):
    hub, said, errors = pushed
    assert said["conversion"].endswith("\n0\n")
    assert f"pushed to {hub.url}/org/converted/commit/" in said["conversion"]
    for name, data in hub.files("org/converted").items():
        (tmp_path / name).write_bytes(data)
    assert checksums.main([str(tmp_path), "--check"]) == 0
    assert len(hub.commits["org/converted"]) == 2
    assert 'name = "org/converted"\n' in (tmp_path / "README.md").read_text()
    assert {"README.md", "modeling_dpvr.py", "model.safetensors.index.json"} <= hub.files("org/converted").keys()
    for label, repo, word in (
        ("conversion beside an adapter", "org/adapter", "org/adapter has adapter_config.json at its root"),
        ("conversion with a failing upload", "org/failing-upload", "500"),
    ):
        assert said[label].endswith("\n1\n")
        assert word in errors[label]
        command = f"python scripts/push_to_hub.py 'out/{label}' {repo} --private"
        assert f"out/{label} is converted; push it again with `{command}`" in errors[label]
        assert "Traceback" not in errors[label]
        assert not any("modeling_dpvr.py" in files for _, files in hub.commits[repo])


def test_a_repository_that_cannot_be_is_refused_before_anything_is_converted(tmp_path, capsys):
    from convert_llava_to_dpvr import main

    with pytest.raises(SystemExit) as status:
        main([str(ROOT / "examples" / "tiny-llava"), str(tmp_path / "out"), "--push-to-hub", "my repo!/x"])
    assert status.value.code == 2
    assert "--push-to-hub: Repo id must use alphanumeric chars" in capsys.readouterr().err
    options = [str(tmp_path / "out"), "--push-to-hub", "me/dpvr", "--dry-run"]  # which pushes nothing
    assert main([str(ROOT / "examples" / "tiny-llava"), *options]) == 0
    assert not list(tmp_path.iterdir())


def test_a_card_that_somebody_wrote_is_pushed_as_it_is(folders, tmp_path):
    from scripts.push_to_hub import make_card_files

    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    card = tmp_path / "adapter" / "README.md"
    card.write_text(card.read_text() + "By hand.\n")
    assert make_card_files(tmp_path / "adapter", tmp_path, "org/x", True, None) == [card]


def test_a_card_that_the_converter_wrote_gets_the_name_of_the_repository(tmp_path):
    convert(ROOT / "examples" / "tiny-llava", tmp_path / "dpvr")
    written = (tmp_path / "dpvr" / "README.md").read_text()
    (card,) = push_to_hub.make_card_files(tmp_path / "dpvr", tmp_path, "org/dpvr", False, None)
    assert '\nname = "org/dpvr"\n' in card.read_text()
    assert "path/to/this/folder" not in card.read_text()
    assert (tmp_path / "dpvr" / "README.md").read_text() == written


def test_an_adapter_beside_a_checkpoint_is_refused_at_the_root_and_taken_in_a_subfolder(pushed):
    hub, said, errors = pushed
    assert said["adapter beside a checkpoint"] == "1\n"
    assert "org/dpvr has config.json at its root" in errors["adapter beside a checkpoint"]
    for root in ("/", ".", "./", "", "//."):
        assert said[f"adapter at {root!r}"] == "1\n"
        assert "org/dpvr has config.json at its root" in errors[f"adapter at {root!r}"]
    assert said["adapter outside"] == "1\n"
    assert "The subfolder 'adapters/../..' is none of a repository" in errors["adapter outside"]
    assert said["adapter in a subfolder"].endswith("\n0\n")
    assert "adapter_config.json" not in hub.files("org/dpvr")


def test_what_is_pushed_can_be_checked_where_it_is_downloaded(pushed, tmp_path):
    """With what the Hub and its client put beside it, and an adapter in a subfolder that came later."""
    files = pushed[0].files("org/dpvr") | {".gitattributes": b"", ".cache/huggingface/.gitignore": b"*"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for folder in (tmp_path, tmp_path / "adapters" / "a"):
        assert checksums.main([str(folder), "--check"]) == 0
        assert set(checksums.read_checksums(folder / "SHA256SUMS")) >= {"README.md"}
    (tmp_path / "adapters" / "a" / "README.md").write_text("changed")
    assert checksums.main([str(tmp_path), "--check"]) == 0
    assert checksums.main([str(tmp_path / "adapters" / "a"), "--check"]) == 1


LOAD = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModel, AutoProcessor

sys.path.insert(0, sys.argv[1])
from training.adapters import from_llava, load_adapter, merge_adapter, processor_from_llava

def load():
    return AutoModel.from_pretrained("org/dpvr", trust_remote_code=True, dtype="auto").eval()

def branch(model):
    return {name: weight for name, weight in model.state_dict().items() if ".side_branch." in name}

processor = AutoProcessor.from_pretrained("org/dpvr", trust_remote_code=True)
print(type(processor).__name__, type(load()).__name__)
ours = branch(merge_adapter(load_adapter(load(), "org/adapter")))
pefts = branch(PeftModel.from_pretrained(load(), "org/adapter").merge_and_unload())
inside = branch(merge_adapter(load_adapter(load(), "org/dpvr", subfolder="adapters/a")))
straight = from_llava("org/llava", adapter="org/adapter", dtype=torch.float16).eval()
assert processor_from_llava("org/llava").chat_template == processor.chat_template
native = load()
native.load_adapter("org/adapter")
natives = {n.replace(".ln_tuning_layers.default", ""): w for n, w in branch(native).items() if "ln_tuning" in n}
for other in (pefts, inside, natives, branch(straight)):
    assert all(torch.equal(weight, other[name]) for name, weight in ours.items())
assert not any(torch.equal(weight, branch(load())[name]) for name, weight in ours.items())
torch.save(ours, "branch.pt")
"""


def test_they_load_by_name_in_a_fresh_process_with_an_empty_cache(folders, pushed, tmp_path):
    from safetensors.torch import load_file

    from training.adapters import branch_name

    hub = pushed[0]
    result = run(["-c", LOAD, ROOT], tmp_path, hub)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "DPVRProcessor DPVRForConditionalGeneration" in result.stdout
    loaded = torch.load(tmp_path / "branch.pt", weights_only=True)
    for key, weight in load_file(folders / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(loaded[branch_name(key)], weight.to(torch.float16)), key


@pytest.mark.parametrize(
    ("label", "repo", "word"),
    [
        ("failing upload", "org/failing-upload", "Error while uploading '.*' to the Hub.*500"),
        ("failing commit", "org/failing-commit", "500"),
        ("wrong token", "org/wrong-token", "401.*Log in with `hf auth login`, or set HF_TOKEN."),
    ],
)
def test_a_failed_upload_says_so_and_publishes_nothing(pushed, label, repo, word):
    hub, said, errors = pushed
    assert said[label] == "1\n"
    assert re.search(rf"^error: .*{word}", errors[label], re.MULTILINE | re.DOTALL)
    assert f"{repo}: the upload is one commit, so no part of it is published" in errors[label]
    assert "Traceback" not in errors[label]
    assert all(not files for _, files in hub.commits.get(repo, []))


def test_a_checkpoint_is_pushed_where_peft_is_not_installed(folders, tmp_path):
    program = """
    import sys
    sys.modules["peft"] = None
    sys.path.insert(0, sys.argv[1])
    from scripts import push_to_hub
    push_to_hub.open_repository = lambda repo, *_: (None, repo)
    push_to_hub.publish = lambda api, repo, files, message: f"{len(files)} files"
    sys.exit(push_to_hub.main([sys.argv[2], "org/x"]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), ROOT, folders / "dpvr"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def test_folders_that_are_not_whole_are_refused_before_anything_is_sent(folders, tmp_path, capsys, monkeypatch):
    from scripts.push_to_hub import main

    monkeypatch.setattr(push_to_hub, "open_repository", lambda *_: pytest.fail("a repository was made"))

    def word(folder):
        assert main([str(folder), "org/x"]) == 1
        return capsys.readouterr().err

    assert "neither adapter_config.json nor config.json" in word(tmp_path)
    assert "is not a folder" in word(tmp_path / "absent")
    for name, message in (
        ("modeling_dpvr.py", "has no modeling_dpvr.py: nobody could load it"),
        ("processor_config.json", "has no processor_config.json: nobody could load it"),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
    ):
        shutil.copytree(folders / "dpvr", tmp_path / name)
        (tmp_path / name / name).unlink()
        assert message in word(tmp_path / name)
    shutil.copytree(folders / "dpvr", tmp_path / "no map")
    (tmp_path / "no map" / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json has no weight_map that names files" in word(tmp_path / "no map")
    for folder, name in (
        ("dpvr", "config.json"),
        ("dpvr", "model.safetensors.index.json"),
        ("adapter", "adapter_config.json"),
        ("adapter", "training.json"),
    ):
        for text, message in (('{"a": ', "is not valid JSON: "), ("[1]", "holds a list, not a JSON object")):
            broken = tmp_path / f"broken {name}"
            shutil.copytree(folders / folder, broken, dirs_exist_ok=True)
            (broken / name).write_text(text)
            assert f"error: {broken / name} {message}" in word(broken)
    shutil.copytree(folders / "adapter", tmp_path / "cut")
    data = (tmp_path / "cut" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(data[:-1])
    assert "cannot be read" in word(tmp_path / "cut")
    shutil.copy(folders / "dpvr" / "config.json", tmp_path / "cut")
    assert "both adapter_config.json and config.json" in word(tmp_path / "cut")


@pytest.mark.parametrize(
    ("of", "name", "change", "why"),
    [
        ("dpvr", "config.json", {"auto_map": None}, "has None for auto_map, which names no code"),
        ("dpvr", "config.json", {"auto_map": {"AutoModel": 3}}, "has {'AutoModel': 3} for auto_map"),
        ("adapter", "training.json", {"training_seconds": "long"}, "is no record that a card can be made of: "),
        ("adapter", "training.json", {"hyperparameters": None}, "is no record that a card can be made of: "),
        ("adapter", "README.md", None, "is no UTF-8, as model cards are: "),
    ],
)
def test_a_file_of_no_use_to_a_card_or_a_model_is_named(folders, tmp_path, capsys, monkeypatch, of, name, change, why):
    monkeypatch.setattr(push_to_hub, "open_repository", lambda *_: pytest.fail("a repository was made"))
    shutil.copytree(folders / of, tmp_path / of)
    path = tmp_path / of / name
    if change is None:
        path.write_text("# Über", encoding="latin-1")
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert push_to_hub.main([str(tmp_path / of), "org/x"]) == 1
    assert f"error: {path} {why}" in capsys.readouterr().err


def test_a_card_in_another_encoding_is_somebodys_own(tmp_path):
    from training.card import has_own_card

    (tmp_path / "README.md").write_text("# Über", encoding="latin-1")
    assert has_own_card(tmp_path)


@pytest.mark.parametrize("name", ["parts/model.safetensors", "../model.safetensors", ".model.safetensors", 3])
def test_a_checkpoint_whose_index_names_weights_that_are_not_pushed_is_refused(folders, tmp_path, name):
    folder = tmp_path / "dpvr"
    shutil.copytree(folders / "dpvr", folder)
    shard = next(folder.glob("*.safetensors"))
    target = folder / str(name)
    target.parent.mkdir(exist_ok=True)
    shutil.copy(shard, target)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name, "b": shard.name}}))
    with pytest.raises(push_to_hub.AdapterError, match="which is no file beside it"):
        push_to_hub.files_of(folder)


# ---------------------------------------------------------------------------------------------- cards


def test_a_card_states_base_data_hyperparameters_plot_accuracy_and_how_to_load():
    from huggingface_hub import ModelCard

    text = make_card(RUN, "org/adapter", has_plot=True)
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("org/dpvr", "peft", "image-text-to-text")
    for part in (
        'PeftModel.from_pretrained(base, "org/adapter")',
        "| data | digits.json |",
        "| learning rate | 0.001 |",
        "| trained parameters | 213,248 of 3,089,152 (6.90%) |",
        "![Loss by step](loss.png)",
        "| look | 500 | 99.6% [98.6%, 99.9%] | 99.0% [97.7%, 99.6%] |",
    ):
        assert part in text, part
    for code in text.split("```python")[1:]:
        compile(textwrap.dedent(code.split("```")[0]), "card", "exec")


def test_a_card_calls_a_share_of_the_steps_so_and_rounds_what_has_been_divided():
    hyperparameters = {"learning_rate": 2e-05, "warmup_steps": 0.03, "epochs": 2 / 33, "steps": 1200}
    card = make_card({**RUN, "hyperparameters": hyperparameters}, "org/adapter")
    for row in ("learning rate | 2e-05", "warmup steps | 0.03 of all steps", "epochs | 0.06061", "steps | 1,200"):
        assert f"| {row} |" in card
    assert "| warmup steps | 20 |" in make_card({**RUN, "hyperparameters": {"warmup_steps": 20.0}}, "org/adapter")


@pytest.mark.parametrize(("command", "code"), [("a b", "`a b`"), ("a `b` c", "`` a `b` c ``"), ("``", "``` `` ```")])
def test_a_command_in_a_card_is_code_whatever_backticks_it_has(command, code):
    assert f"| command | {code} |" in make_card({**RUN, "command": command})


def test_a_card_claims_nothing_that_the_run_does_not_state():
    text = make_card({})
    assert "All other" not in text  # which nobody knows
    assert "All other\nweights are those of" in make_card({**RUN, "trains": "side branch"})
    assert "wait as they are" in make_card({**RUN, "num_side_layers": 0})
    assert "Accuracy was not measured" in text
    assert "loss.png" not in text
    assert "## Training" not in text
    assert "None" not in text
    assert "base_model_relation" not in text  # of a base that has no name on the Hub


def test_a_card_states_the_licence_of_its_base_as_far_as_that_is_known(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama2\nlanguage: en\n---\n")
    assert read_license(tmp_path) == {"license": "other", "license_name": "llama2"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlicense_name: 2023-07-18\nlicense_link: LICENSE\n---\n")
    assert read_license(tmp_path) == {"license": "mit"}  # YAML's dates, and links into files that stay behind
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama2\nlanguage: en\n---\n")
    assert "license_name: llama2" in make_card({**RUN, **read_license(tmp_path)})
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert read_license(tmp_path) == read_license(tmp_path / "none") == {}


def test_a_base_that_others_cannot_load_is_told_of(tmp_path, monkeypatch, capsys):
    model = add_adapter(from_llava(ROOT / "examples" / "tiny-llava", saturation_layer=4))
    save_adapter(model, tmp_path, "dpvr-7b")
    monkeypatch.setattr(push_to_hub, "open_repository", lambda api, *_: (api, "org/adapter"))
    monkeypatch.setattr(push_to_hub, "publish", lambda *_: "an address")
    assert push_to_hub.main([str(tmp_path), "org/adapter"]) == 0
    assert "names its base 'dpvr-7b', which is no Hub id" in capsys.readouterr().err
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for base, is_told in ((None, True), ("/home/dpvr-7b", True), ("./dpvr-7b", True), ("org/dpvr-7b", False)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        assert push_to_hub.main([str(tmp_path), "org/adapter"]) == 0
        assert ("which is no Hub id" in capsys.readouterr().err) == is_told


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"subfolder": "adapters/a"}, 'PeftModel.from_pretrained(base, "org/x", subfolder="adapters/a")'),
        ({"is_adapter": False}, 'AutoModel.from_pretrained("org/x", trust_remote_code=True, dtype="auto")'),
    ],
)
def test_a_card_loads_what_it_belongs_to(options, line):
    assert line in make_card(RUN, "org/x", **options)


def test_a_card_of_an_adapter_on_llava_loads_it_there():
    run = {**RUN, "base_type": "llava", "base_model": "llava-hf/llava-1.5-7b-hf"}
    assert 'from_llava("llava-hf/llava-1.5-7b-hf", adapter="org/x")' in make_card(run, "org/x")


def test_a_run_without_losses_gets_no_plot(tmp_path):
    assert not plot_losses({}, tmp_path / "loss.png")
    assert plot_losses(RUN, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1
