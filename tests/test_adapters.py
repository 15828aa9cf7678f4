"""Adapters: PEFT files that hold the side branch and nothing else, on a DPVR or straight on a LLaVA checkpoint."""

import copy
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, files_of_at_most
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from processes import start_script
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny import (
    NUM_LAYERS,
    TOKENS_PER_IMAGE,
    DPVRForConditionalGeneration,
    make_batch,
    make_dpvr,
    make_llava,
    text_config,
)
from transformers import MistralConfig, Qwen2Config, modeling_utils
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from read_weights import ConversionError, Weight
from side_branch_weights import adapter_file, adapter_saturation_layer, adapter_weights, find_mismatch, make_sample
from training.adapters import (
    AdapterError,
    add_adapter,
    base_state,
    branch_name,
    from_llava,
    load_adapter,
    merge_adapter,
    processor_from_llava,
    save_adapter,
    train_in_float32,
)
from training.trainer import count_trainable

BASE = "org/dpvr-tiny"
BATCH = make_batch(["tIttt", "ttIt"])
KINDS = {
    "side branch": {},
    "whole fusion": {"whole_fusion": True},
    "fusion": {"lora": "fusion"},
    "user's": {"lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], exclude_modules=r".*vision_tower.*")},
}


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def num_weights(module):
    return sum(weight.numel() for weight in module.parameters())


def train(model, seed):
    """Gives all that is trainable random values, as if it had been trained; returns the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.3, generator=generator)
    return logits(model.eval())


def make_base(**options):
    return make_dpvr(random_branch=False, **options)


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """Two adapters of one kind, saved: their folders and the logits that they gave."""
    folder, results = tmp_path_factory.mktemp("adapters"), []
    for seed in (1, 2):
        model = add_adapter(make_base(), **KINDS[request.param])
        expected = train(model, seed)
        save_adapter(model, folder / str(seed), BASE)
        results.append((folder / str(seed), expected))
    assert not torch.allclose(results[0][1], results[1][1])
    return results


def stored(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


# ---------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_trains_the_side_branch_alone_or_with_what_was_asked_for(kind):
    base = make_base()
    expected, whole, of_base = logits(base), num_weights(base.model.side_branch), num_weights(base)
    if kind == "whole fusion":
        whole += num_weights(base.model.language_model.layers[-1])
    model = add_adapter(base, **KINDS[kind])
    assert torch.equal(logits(model), expected)
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert sum(weight.numel() for name, weight in trainable.items() if "lora_" not in name) == whole
    with_lora = {name for name in trainable if "lora_" in name}
    in_lora = sum(trainable[name].numel() for name in with_lora)
    assert count_trainable(model)[:2] == (whole + in_lora, of_base + in_lora)
    assert not any("side_branch" in name or "vision_tower" in name for name in with_lora)
    if kind == "fusion":
        assert with_lora
        assert all(f"language_model.layers.{NUM_LAYERS - 1}." in name for name in with_lora)


@pytest.mark.parametrize("text", [MistralConfig, Qwen2Config])
def test_every_weight_of_the_side_branch_is_trained_whatever_the_backbone(text):
    base = make_base(text=text_config(text), num_side_layers=2)
    branch, fusion = num_weights(base.model.side_branch), num_weights(base.model.language_model.layers[-1])
    model = add_adapter(base)
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == branch
    model = add_adapter(make_base(text=text_config(text), num_side_layers=2), whole_fusion=True)
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == branch + fusion


def test_without_a_side_branch_lora_or_the_fusion_layer_alone_is_trained_saved_and_loaded(tmp_path):
    options = {"num_side_layers": 0}
    with pytest.raises(AdapterError, match=r"no side branch \(num_side_layers=0\), so nothing would train"):
        add_adapter(make_base(**options))
    model = add_adapter(make_base(**options), "fusion")
    assert all("lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)
    expected = train(model, 1)
    save_adapter(model, tmp_path / "adapter", BASE)
    assert all("lora_" in key for key in stored(tmp_path / "adapter")[0])
    torch.testing.assert_close(logits(load_adapter(make_base(**options), tmp_path / "adapter")), expected)
    with pytest.raises(AdapterError, match="trained for num_side_layers=0, but the model has num_side_layers=1"):
        load_adapter(make_base(), tmp_path / "adapter")
    model = add_adapter(make_base(**options), whole_fusion=True)
    expected = train(model, 1)
    save_adapter(model, tmp_path / "whole", BASE)
    assert all(f"language_model.layers.{NUM_LAYERS - 1}." in key for key in stored(tmp_path / "whole")[0])
    torch.testing.assert_close(logits(load_adapter(make_base(**options), tmp_path / "whole")), expected)


def test_with_a_side_branch_adapter_the_graph_begins_at_the_side_branch():
    model = add_adapter(make_base()).train()
    states = []
    layers = model.get_base_model().model.language_model.layers
    hooks = [layer.register_forward_hook(lambda module, args, output: states.append(output)) for layer in layers]
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    for hook in hooks:
        hook.remove()
    assert [state.requires_grad for state in states] == [False] * (NUM_LAYERS - 1) + [True]
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for is_checkpointing in (False, True):
        model = add_adapter(make_base()).train()
        if is_checkpointing:
            model.gradient_checkpointing_enable()
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        gradients.append([weight.grad for weight in model.parameters() if weight.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj", "down_proj"]])
@pytest.mark.parametrize("made_by", ["add_adapter", "PEFT"])
def test_dora_trains_beside_a_side_branch_that_is_the_identity(targets, made_by):
    """Within it, DoRA divides by the norms of weights that are zero."""
    options = {"r": 2, "target_modules": targets, "use_dora": True}
    if made_by == "PEFT":
        options |= {"exclude_modules": r".*side_branch.*", "modules_to_save": ["side_branch"]}
    config = LoraConfig(**options)
    model = (get_peft_model if made_by == "PEFT" else add_adapter)(make_base(), config).train()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    gradients = {name: w.grad for name, w in model.named_parameters() if w.requires_grad and w.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any("side_branch" in name and gradient.any() for name, gradient in gradients.items())


def test_what_cannot_hold_a_side_branch_is_refused():
    from peft import PromptTuningConfig

    with pytest.raises(AdapterError, match="PromptTuningConfig cannot save the side branch"):
        add_adapter(make_base(), PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(AdapterError, match="bias='all' trains biases of the base model itself"):
        add_adapter(make_base(), LoraConfig(r=2, target_modules=["q_proj"], bias="all"))
    with pytest.raises(AdapterError, match="lora='all' is neither"):
        add_adapter(make_base(), "all")
    with pytest.raises(AdapterError, match="LlavaForConditionalGeneration .* is no DPVR"):
        add_adapter(make_llava())
    with pytest.raises(AdapterError, match="lora and whole_fusion are both given"):
        add_adapter(make_base(), "fusion", whole_fusion=True)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    with pytest.raises(AdapterError, match=r"means model.side_branch.layers.0.input_layernorm too"):
        add_adapter(make_base(), lora)


def test_an_adapter_of_the_embeddings_that_peft_saved_loads(tmp_path):
    model = add_adapter(make_base(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    expected = train(model, 0)
    model.save_pretrained(tmp_path)  # which writes the embeddings along
    assert any(".base_layer." in key for key in stored(tmp_path)[0])
    torch.testing.assert_close(logits(load_adapter(make_base(), tmp_path)), expected)


def test_full_copies_of_different_layers_are_refused_on_one_base_and_the_first_stays(tmp_path):
    for kind in ("side branch", "whole fusion"):
        model = add_adapter(make_base(), **KINDS[kind])
        train(model, 0)
        save_adapter(model, tmp_path / kind, BASE)
    for first, second in (("side branch", "whole fusion"), ("whole fusion", "side branch")):
        model = load_adapter(make_base(), tmp_path / first, "a")
        before = logits(model)
        with pytest.raises(AdapterError, match=r"'b' and 'a' cannot be on one base.*language_model.layers.5"):
            load_adapter(model, tmp_path / second, "b")
        with pytest.raises(AdapterError, match=r"'b' and 'a' cannot be on one base"):
            add_adapter(model, name="b", **KINDS[second])
        assert torch.equal(logits(model), before)


def test_a_tuner_that_peft_cannot_merge_beside_a_side_branch_says_so_and_loads_unmerged(tmp_path):
    config = IA3Config(target_modules=r".*language_model.*(k|v|down)_proj", feedforward_modules=[r".*down_proj"])
    model = add_adapter(make_base(), config)
    expected = train(model, 0)
    save_adapter(model, tmp_path, BASE)
    loaded = load_adapter(make_base(), tmp_path)
    assert torch.equal(logits(loaded.eval()), expected)
    with pytest.raises(AdapterError, match="PEFT cannot merge a IA3Config beside a side branch. Use load_adapter"):
        merge_adapter(loaded)


# ---------------------------------------------------------------------------------------------- files


def test_the_file_holds_what_was_trained_and_nothing_else(saved):
    (folder, _), _ = saved
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    weights, _ = stored(folder)
    rest = {key: weight for key, weight in weights.items() if "lora_" not in key}
    fusion = {key: rest.pop(key) for key in list(rest) if f".language_model.layers.{NUM_LAYERS - 1}." in key}
    assert all("side_branch" in key for key in rest)
    base = make_base().model
    assert sum(map(torch.numel, rest.values())) == num_weights(base.side_branch)
    assert sum(map(torch.numel, fusion.values())) in (0, num_weights(base.language_model.layers[-1]))


def test_a_gathered_state_dict_gives_the_same_file(tmp_path):
    model = add_adapter(make_base(), "fusion")
    train(model, 1)
    save_adapter(model, tmp_path / "own", BASE)
    save_adapter(model, tmp_path / "gathered", BASE, state_dict=model.state_dict())
    (own, own_metadata), (gathered, metadata) = stored(tmp_path / "own"), stored(tmp_path / "gathered")
    assert own_metadata == metadata
    assert own.keys() == gathered.keys()
    assert all(torch.equal(weight, gathered[key]) for key, weight in own.items())
    assert "multi_modal_projector" in stored(tmp_path / "own")[1]["base_sample"]


def test_a_full_disk_leaves_an_earlier_adapter_as_it_was(adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with files_of_at_most(1000), pytest.raises((OSError, SafetensorError)):
        save_adapter(add_adapter(make_base()), folder, "another/base")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_config_names_no_machine_and_no_module_of_one(saved):
    (folder, _), _ = saved
    text = (folder / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == BASE
    assert config["auto_mapping"] is None
    assert "transformers_modules" not in text
    assert "/" not in text.replace(BASE, "")


def test_a_local_base_is_named_without_its_path(tmp_path):
    (tmp_path / "my-dpvr").mkdir()
    save_adapter(add_adapter(make_base()), tmp_path / "adapter", str(tmp_path / "my-dpvr"))
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "my-dpvr"
    )
    assert stored(tmp_path / "adapter")[1]["base_model"] == "my-dpvr"


@pytest.mark.parametrize("whole_fusion", [False, True])
def test_the_file_has_the_dtype_of_the_base_though_its_layers_were_trained_in_fp32(whole_fusion, tmp_path):
    model = add_adapter(make_base().to(torch.bfloat16), whole_fusion=whole_fusion)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    save_adapter(model, tmp_path, BASE)
    weights, _ = stored(tmp_path)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert {weight.dtype for weight in merge_adapter(model).state_dict().values()} == {torch.bfloat16}


def test_every_loader_gives_the_trained_logits(saved):
    (folder, expected), _ = saved
    assert torch.equal(logits(load_adapter(make_base(), folder)), expected)
    assert torch.equal(logits(load_adapter(make_base(), folder, name="other")), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(make_base(), folder)), expected)
    base = make_base()
    base.load_adapter(str(folder))
    assert torch.equal(logits(base), expected)


def test_several_adapters_are_switched_and_disabled_on_one_base(saved):
    (first, first_logits), (second, second_logits) = saved
    base = make_base()
    plain = logits(base)
    model = load_adapter(load_adapter(base, first, name="first"), second, name="second")
    assert torch.equal(logits(model), second_logits)
    model.set_adapter("first")
    assert torch.equal(logits(model), first_logits)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), first_logits)
    model.delete_adapter("first")
    assert torch.equal(logits(model), second_logits)
    with pytest.raises(AdapterError, match="already has an adapter 'second'"):
        load_adapter(model, first, name="second")


def test_a_side_branch_adapter_is_switched_disabled_and_enabled_by_transformers_own_methods(tmp_path):
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers' own methods refuse this PEFT: {error}")
    expected = []
    for seed in (1, 2):
        model = add_adapter(make_base())
        expected.append(train(model, seed))
        save_adapter(model, tmp_path / str(seed), BASE)
    base = make_base()
    plain = logits(base)
    for name in ("1", "2"):
        base.load_adapter(str(tmp_path / name), adapter_name=name)
    base.set_adapter("1")
    assert base.active_adapters() == ["1"]
    assert torch.equal(logits(base), expected[0])
    base.set_adapter("2")
    assert torch.equal(logits(base), expected[1])
    base.disable_adapters()
    assert torch.equal(logits(base), plain)
    base.enable_adapters()
    assert torch.equal(logits(base), expected[1])


def test_merging_and_unmerging_in_place_keeps_the_logits(saved):
    (folder, expected), _ = saved
    model = load_adapter(make_base(), folder)
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_a_merged_adapter_saves_an_ordinary_checkpoint_that_loads_without_peft(saved, tmp_path):
    (first, _), (second, expected) = saved
    model = load_adapter(load_adapter(make_base(), second, name="second"), first, name="first")
    merged = merge_adapter(model, "second")
    assert type(merged).__name__ == "DPVRForConditionalGeneration"
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    loaded = DPVRForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(merged))
    assert loaded.state_dict().keys() == make_base().state_dict().keys()


def test_what_is_merged_right_after_training_computes_in_the_type_of_the_base():
    """Also the modules that a user's config keeps whole, which are trained in float32."""
    lora = LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["multi_modal_projector", "lm_head"])
    model = add_adapter(make_base().to(torch.bfloat16), lora)
    train_in_float32(model)
    assert model.get_base_model().lm_head.modules_to_save["default"].weight.dtype == torch.float32
    merged = merge_adapter(model)
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}
    assert logits(merged).isfinite().all()


def test_training_goes_on_from_a_saved_adapter(saved):
    (folder, expected), _ = saved
    model = load_adapter(make_base(), folder, is_trainable=True)
    assert torch.equal(logits(model.eval()), expected)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == {
        name for name, _ in model.named_parameters() if re.search(r"\.default\.", name)
    }
    frozen = load_adapter(make_base(), folder)
    assert not any(weight.requires_grad for weight in frozen.parameters())


def test_generation_with_an_adapter_gives_the_tokens_of_the_merged_model(saved):
    (folder, _), _ = saved
    model = load_adapter(make_base(), folder)
    tokens = model.generate(**BATCH, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, merge_adapter(model).generate(**BATCH, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("targets", [r".*language_model\.layers\.[05]\..*q_proj", ["q_proj", "down_proj"]])
def test_an_adapter_of_lora_alone_loads_as_peft_loads_it(targets, tmp_path):
    """Of the decoder, or of whatever bears the names: the vision tower and the side branch too."""
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    get_peft_model(make_dpvr(), lora).save_pretrained(tmp_path)
    expected = logits(PeftModel.from_pretrained(make_dpvr(), tmp_path))
    assert (expected - logits(make_dpvr())).abs().max() > 1e-2
    model = load_adapter(make_dpvr(), tmp_path)
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(merge_adapter(model)), expected, atol=1e-4, rtol=0)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="adapter_model.safetensors lacks base_model"):
        load_adapter(make_base(), tmp_path)


def test_a_side_branch_without_a_config_loads_too(tmp_path):
    branch = {name: weight for name, weight in make_dpvr(seed=1).state_dict().items() if "side_branch" in name}
    weights = {name: weight.half() for name, weight in branch.items()}
    save_file(weights, tmp_path / "side_branch.safetensors")
    merged = merge_adapter(load_adapter(make_base(), tmp_path)).state_dict()
    assert all(torch.equal(merged[name], weight.float()) for name, weight in weights.items())
    untrained = make_base().state_dict()
    assert not any(torch.equal(untrained[name], weight.float()) for name, weight in weights.items())


def test_the_embedded_adapter_loads_by_peft_alone_on_the_llava_it_was_trained_on():
    folder = ROOT / "examples" / "dpvr-tiny-adapter"
    base = from_llava(ROOT / "examples" / "tiny-llava", saturation_layer=4, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    weights = {branch_name(key): weight for key, weight in stored(folder)[0].items()}
    assert len(weights) == 9
    assert all(torch.equal(merged[name], weight.float()) for name, weight in weights.items())


MODULES = ["lm_head", "model.vision_tower", "model.multi_modal_projector", "model.side_branch"]
MODULES += [f"model.language_model.{part}" for part in ("embed_tokens", "norm", "rotary_emb")]
MODULES += [f"model.language_model.layers.{i}" for i in range(NUM_LAYERS)]


def load_with_a_layer_on_disk(folder):
    """A base whose layer 3, of the text-only ones, is offloaded."""
    make_base().save_pretrained(folder / "base")
    device_map = dict.fromkeys(MODULES, "cpu") | {"model.language_model.layers.3": "disk"}
    return DPVRForConditionalGeneration.from_pretrained(
        folder / "base", device_map=device_map, offload_folder=str(folder / "offload")
    ).eval()


@pytest.mark.parametrize("kind", ["side branch", "fusion"])
def test_adapters_load_on_a_base_that_is_partly_offloaded(kind, tmp_path):
    model = add_adapter(make_base(), **KINDS[kind])
    expected = train(model, 1)
    save_adapter(model, tmp_path / "adapter", BASE)
    model = load_adapter(load_with_a_layer_on_disk(tmp_path), tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_lora_on_an_offloaded_layer_is_refused_and_the_base_is_as_before(tmp_path):
    save_adapter(add_adapter(make_base(), **KINDS["user's"]), tmp_path / "adapter", BASE)
    base = load_with_a_layer_on_disk(tmp_path)
    before = logits(base)
    with pytest.raises(AdapterError, match=r"layers.3.* belongs to a layer that is offloaded"):
        load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(base), before)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(add_adapter(make_base()), folder, BASE)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"saturation_layer": 3}, "trained for saturation_layer=2, but the model has saturation_layer=3"),
        ({"num_side_layers": 2}, "trained for num_side_layers=1, but the model has num_side_layers=2"),
        ({"num_fusion_layers": 2}, "trained for num_fusion_layers=1, but the model has num_fusion_layers=2"),
        (
            {"text": text_config(intermediate_size=64)},
            "trained for text_config.intermediate_size=48, but the model has text_config.intermediate_size=64",
        ),
        ({"text": text_config(Qwen2Config)}, "text_config.model_type=llama, but the model has .*=qwen2"),
        ({"seed": 1}, r"trained on org/dpvr-tiny, but the model has other weights: value 0 of .* is .*, there it was"),
    ],
)
def test_an_adapter_of_another_model_is_refused_with_both_values(adapter, options, message):
    base = make_base(**options)
    before = logits(base)
    with pytest.raises(AdapterError, match=message):
        load_adapter(base, adapter)
    assert torch.equal(logits(base), before)
    assert "peft_config" not in vars(base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_that_was_only_rounded_is_the_same_base(adapter, dtype):
    load_adapter(make_base().to(dtype), adapter)


@pytest.mark.parametrize("factor", [0.95, 1.05, -1.0])
def test_a_base_is_another_one_where_any_value_of_its_sample_is_more_or_less(factor):
    config, sample = make_dpvr().config, make_sample(lambda name: [0.5, -0.5, 0.0])

    def mismatch(stated: dict) -> str | None:
        return find_mismatch(Path("a"), {"base_sample": json.dumps(stated)}, config, sample, "this")

    assert mismatch(sample) is None
    for name, values in sample.items():
        assert mismatch({name: values[:1]}) is None  # of what is not stated nothing is known
        for i in range(2):
            other = copy.deepcopy(sample)
            other[name][i] *= factor
            assert f"this has other weights: value {i} of {name} is" in mismatch(other)


@pytest.mark.parametrize("stated", ["[1]", "no JSON", '{"model.language_model.norm.weight": ["1"]}'])
def test_a_sample_that_is_none_is_named(stated):
    sample = make_sample(lambda name: [0.5])
    sentence = find_mismatch(Path("a"), {"base_sample": stated}, make_dpvr().config, sample, "this")
    assert sentence == f"a states a base_sample that is no sample of weights: {stated}"


def test_shapes_are_compared_where_nothing_is_stated(adapter, tmp_path):
    from safetensors.torch import save_file

    weights, _ = stored(adapter)
    name = next(key for key in weights if "q_proj" in key)
    for change, message in (
        ({name: torch.zeros(4, 4)}, r"q_proj.weight has shape \(4, 4\) there, but \(32, 32\) in the model"),
        (
            {name.replace("layers.0", "layers.1"): weights[name].clone()},
            r"layers.1.*\(32, 32\) there, but None in the model",
        ),
    ):
        save_file(weights | change, tmp_path / "side_branch.safetensors")
        with pytest.raises(AdapterError, match=message):
            load_adapter(make_base(), tmp_path)
    del weights[name]
    save_file(weights, tmp_path / "side_branch.safetensors")
    with pytest.raises(AdapterError, match=r"q_proj.weight has shape None there, but \(32, 32\) in the model"):
        load_adapter(make_base(), tmp_path)


def test_files_that_are_no_adapter_are_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"has neither adapter_model.safetensors nor side_branch.safetensors"):
        load_adapter(make_base(), tmp_path)
    with pytest.raises(AdapterError, match="neither a file, a folder nor a Hub repository that can be read"):
        load_adapter(make_base(), tmp_path / "absent")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(make_base(), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key, weight: (key.replace("layers.5", "layers.9"), weight), r"the model has no place for .*layers\.9"),
        (lambda key, weight: (None, weight), r"lacks .*lora_B"),
        (lambda key, weight: (key, weight.int()), r"lora_B.weight has dtype torch\.int32, but weights have"),
        (lambda key, weight: (key, weight / 0), r"lora_B.weight holds NaN or infinite values"),
    ],
)
def test_lora_that_does_not_fit_is_refused_and_the_base_is_as_before(tmp_path, change, message):
    from safetensors.torch import save_file

    model = add_adapter(make_base(), "fusion")
    train(model, 0)
    save_adapter(model, tmp_path, BASE)
    weights, metadata = stored(tmp_path)
    changed = dict(change(*item) if "q_proj.lora_B" in item[0] else item for item in weights.items())
    changed.pop(None, None)
    save_file(changed, tmp_path / "adapter_model.safetensors", metadata)
    base = make_base()
    before, names = logits(base), set(base.state_dict())
    with pytest.raises(AdapterError, match=message):
        load_adapter(base, tmp_path)
    assert torch.equal(logits(base), before)
    assert set(base.state_dict()) == names


@pytest.mark.parametrize(
    "fields", [{"peft_type": "FOO"}, {"target_modules": 5}, {"target_modules": "(("}, {"r": 10**12}]
)
def test_a_config_that_peft_cannot_use_is_refused_and_the_base_is_as_before(tmp_path, fields):
    save_adapter(add_adapter(make_base(), "fusion"), tmp_path, BASE)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    base = make_base()
    before, names = logits(base), set(base.state_dict())
    with pytest.raises(AdapterError, match=r"adapter_config.json (is no config that PEFT can read|to this model): "):
        load_adapter(base, tmp_path)
    assert torch.equal(logits(base), before)
    assert set(base.state_dict()) == names


# ---------------------------------------------------------------------------------------------- LLaVA as the base


@pytest.fixture(scope="module", params=["old names", "new names"])
def llava(request, tmp_path_factory):
    """A LLaVA checkpoint in several shards, with the weight names of transformers 4 or 5."""
    folder = tmp_path_factory.mktemp("llava")
    make_llava().save_pretrained(folder, max_shard_size="40KB", save_original_format=request.param == "old names")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert ("language_model.lm_head.weight" in index) == (request.param == "old names")
    return folder


def test_every_weight_of_llava_arrives_and_the_side_branch_is_the_identity(llava, monkeypatch):
    warned = []
    monkeypatch.setattr(modeling_utils.logger, "warning", warned.append)
    model = from_llava(llava, saturation_layer=NUM_LAYERS - 1)
    assert not warned  # that the side branch is not in the file is no news
    state = model.state_dict()
    for name, weight in make_llava().state_dict().items():
        assert torch.equal(state[name], weight), name
    with torch.no_grad():
        expected = make_llava()(**{k: v for k, v in BATCH.items() if k != "mm_token_type_ids"}).logits
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_what_is_no_llava_of_this_layout_is_refused_and_for_a_dpvr_how_to_load_it_is_said(tmp_path):
    make_dpvr().save_pretrained(tmp_path / "dpvr")
    for load in (from_llava, processor_from_llava):
        with pytest.raises(AdapterError, match=r"dpvr is a DPVR already: load .* trust_remote_code=True"):
            load(tmp_path / "dpvr")
        with pytest.raises(
            ConversionError, match=r"none does not exist: give the folder of a checkpoint, or a Hub id"
        ):
            load(tmp_path / "none")
    make_llava().model.language_model.save_pretrained(tmp_path / "llama")
    with pytest.raises(AdapterError, match=r"llama has model_type 'llama', but .* \('llava'\) is wanted"):
        from_llava(tmp_path / "llama")
    original = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(original))
    with pytest.raises(
        AdapterError, match=r"llama has the original layout\. Convert it with convert_llava_to_dpvr\.py"
    ):
        from_llava(tmp_path / "llama")


def test_a_llava_that_is_not_converted_has_the_converters_geometry(llava, tmp_path):
    fields = json.loads((llava / "config.json").read_text())
    del fields["image_seq_length"]
    source = shutil.copytree(llava, tmp_path / "llava")
    (source / "config.json").write_text(json.dumps(fields))
    assert from_llava(source).config.image_seq_length == TOKENS_PER_IMAGE
    for name, model_type, message in (
        ("vision_config", "pixtral", "the vision tower is Pixtral's"),
        ("text_config", "phi3", "the backbone is 'phi3', none of llama, mistral, qwen2"),
    ):
        (source / "config.json").write_text(json.dumps(fields | {name: {"model_type": model_type}}))
        for load in (from_llava, processor_from_llava):
            with pytest.raises(ConversionError, match=message):
                load(source)


def test_one_call_gives_a_llava_checkpoint_with_an_adapter(llava, tmp_path):
    from safetensors.torch import save_file

    model = add_adapter(from_llava(llava, saturation_layer=4))
    expected = train(model, 3)
    save_adapter(model, tmp_path, "llava-hf/llava-tiny")
    loaded = from_llava(llava, adapter=tmp_path)
    assert loaded.config.saturation_layer == 4
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(AdapterError, match="trained for saturation_layer=4, but 3 was asked for"):
        from_llava(llava, adapter=tmp_path, saturation_layer=3)
    weights, metadata = stored(tmp_path)
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata | {"saturation_layer": "four"})
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors states saturation_layer='four', which is no"):
        from_llava(llava, adapter=tmp_path)


def test_the_paper_proportion_is_the_default(llava):
    assert from_llava(llava).config.saturation_layer == 18 * NUM_LAYERS // 32


def test_the_converter_takes_an_adapter(llava, tmp_path):
    model = add_adapter(from_llava(llava, saturation_layer=4))
    train(model, 3)
    save_adapter(model, tmp_path / "adapter", "llava-hf/llava-tiny")
    shapes = {name: weight.shape for name, weight in base_state(model).items() if "side_branch" in name}
    converted = adapter_weights(
        adapter_file(str(tmp_path / "adapter")), [Weight(name, tuple(shape), None) for name, shape in shapes.items()]
    )
    assert adapter_saturation_layer(tmp_path / "adapter" / "adapter_model.safetensors") == 4
    merged = merge_adapter(model).state_dict()
    assert {weight.name for weight in converted} == set(shapes)
    for weight in converted:
        assert torch.equal(weight.source.load(), merged[weight.name])


def test_the_converter_refuses_lora_and_says_what_merges_it(tmp_path):
    save_adapter(add_adapter(make_base(), "fusion"), tmp_path, BASE)
    with pytest.raises(ConversionError, match=r"lora_A.* changes a layer of the base.*scripts/merge_adapter.py"):
        adapter_weights(adapter_file(str(tmp_path)), [])


def test_base_state_names_weights_as_a_checkpoint_does():
    names = set(make_base().state_dict())
    assert set(base_state(add_adapter(make_base()))) == names
    assert set(base_state(add_adapter(make_base(), "fusion"))) == names


@pytest.mark.parametrize("kind", ["side branch", "whole fusion", "fusion"])
def test_the_merging_command_writes_a_checkpoint_with_its_processor_or_nothing(kind, tmp_path, capsys):
    from scripts.merge_adapter import main

    tiny = ROOT / "examples" / "tiny-llava"
    model = add_adapter(from_llava(tiny, saturation_layer=4), **KINDS[kind])
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_(0, 0.1)
    save_adapter(model, tmp_path / "adapter", str(tiny))
    (tmp_path / "adapter" / "training.json").write_text('{"trains": "LoRA"}')  # of which a card will be made
    assert main([str(tiny), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "training.json").read_text() == '{"trains": "LoRA"}'
    expected = merge_adapter(model).state_dict()
    loaded = DPVRForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype="auto")
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=1e-3, rtol=1e-3)
    assert {"processor_config.json", "processing_dpvr.py"} <= {path.name for path in (tmp_path / "merged").iterdir()}
    (tmp_path / ".again.merging").mkdir()
    (tmp_path / ".again.merging" / "model.safetensors.index.json").touch()  # of a merge that was killed
    named = tmp_path / "again" / "new" / ".."  # which nothing is written to on the way
    assert main([str(tmp_path / "merged"), str(tmp_path / "adapter"), str(named)]) == 0
    assert {path.name for path in (tmp_path / "again").iterdir()} == {p.name for p in (tmp_path / "merged").iterdir()}
    assert main([str(tiny), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err
    before = sorted(tmp_path.iterdir())
    for size in (15_000, 1_000_000):  # too little for the code, and for the weights
        with files_of_at_most(size):
            assert main([str(tiny), str(tmp_path / "adapter"), str(tmp_path / "full")]) == 1
        assert f"error: {tmp_path / 'full'} cannot be written: " in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before
    with (tmp_path / ".full.lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="Another run writes to .*full: choose another output, or wait"):
            main([str(tiny), str(tmp_path / "adapter"), str(tmp_path / "full")])
    (tmp_path / ".full.lock").unlink()
    assert main([str(tiny), str(tmp_path / "absent"), str(tmp_path / "none")]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged", "again"}


def test_a_merged_checkpoint_is_for_everyone_that_the_umask_allows(tmp_path):
    from scripts.merge_adapter import main

    tiny = ROOT / "examples" / "tiny-llava"
    save_adapter(add_adapter(from_llava(tiny, saturation_layer=4)), tmp_path / "adapter", str(tiny))
    mask = os.umask(0o027)
    try:
        assert main([str(tiny), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    finally:
        os.umask(mask)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "merged" / name).stat().st_mode & 0o777 == 0o640


def test_the_merging_command_succeeds_where_nobody_can_be_told(tmp_path):
    base, adapter = ROOT / "examples" / "tiny-llava", ROOT / "examples" / "dpvr-tiny-adapter"
    script, outputs = ROOT / "scripts" / "merge_adapter.py", ("/dev/full", tmp_path / "errors")
    process = start_script(script, base, adapter, tmp_path / "merged", outputs=outputs)
    process.join()
    assert process.exitcode == 0
    assert "Traceback" not in (tmp_path / "errors").read_text()
    assert (tmp_path / "merged" / "config.json").is_file()


def test_the_merging_command_takes_no_adapter_that_was_not_named(tmp_path, monkeypatch, capsys):
    from scripts.merge_adapter import main

    base, adapter = str(ROOT / "examples" / "tiny-llava"), tmp_path / "adapter"
    shutil.copytree(ROOT / "examples" / "dpvr-tiny-adapter", adapter)
    (adapter / "inside").mkdir()
    monkeypatch.chdir(adapter)
    for name, options, reason in (
        ("", [], "The adapter's name is empty"),
        ("inside", ["--subfolder", ".."], "The subfolder '..' lies outside of inside."),
        ("inside", ["--subfolder", str(adapter)], "lies outside of inside."),
    ):
        assert main([base, name, str(tmp_path / "merged"), *options]) == 1
        assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([base, str(adapter), ""])
    assert "argument output: the name is empty" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_the_merging_command_refuses_a_dtype_that_cannot_hold_a_weight(tmp_path, capsys):
    from scripts.merge_adapter import main

    shutil.copytree(ROOT / "examples" / "tiny-llava", tmp_path / "base")
    adapter = str(ROOT / "examples" / "dpvr-tiny-adapter")
    weights = {name: weight.float() for name, weight in load_file(tmp_path / "base" / "model.safetensors").items()}
    weights["language_model.model.layers.6.mlp.down_proj.weight"][0, 0] = 1e6
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert main([str(tmp_path / "base"), adapter, str(tmp_path / "merged"), "--dtype", "float16"]) == 1
    assert "layers.6.mlp.down_proj.weight holds numbers beyond the range of float16" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    assert main([str(tmp_path / "base"), adapter, str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 0


@pytest.mark.parametrize("of", ["llava", "dpvr"])
def test_the_merging_command_makes_up_no_weight_that_the_base_lacks(of, tmp_path, capsys):
    from scripts.merge_adapter import main

    tiny = ROOT / "examples" / "tiny-llava"
    model = add_adapter(from_llava(tiny, saturation_layer=4))
    save_adapter(model, tmp_path / "adapter", str(tiny))
    if of == "llava":
        shutil.copytree(tiny, tmp_path / "base")
    else:
        assert main([str(tiny), str(tmp_path / "adapter"), str(tmp_path / "base")]) == 0
    for path in (tmp_path / "base").glob("*.safetensors"):
        weights = load_file(path)
        lost = [name for name in weights if name.endswith("language_model.layers.0.mlp.down_proj.weight")]
        lost += [name for name in weights if name.endswith("language_model.model.layers.0.mlp.down_proj.weight")]
        save_file({name: weight for name, weight in weights.items() if name not in lost}, path, {"format": "pt"})
    assert main([str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 1
    assert "layers.0.mlp.down_proj.weight: it is no whole checkpoint" in capsys.readouterr().err
    for path in (tmp_path / "base").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    assert main([str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 1
    assert main([str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "base" / "inside")]) == 1
    assert "lies in the source" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}
