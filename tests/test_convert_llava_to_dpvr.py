# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The converter on small checkpoints with the key names and file layouts of the real ones."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from huggingface_hub.utils import filter_repo_objects
from llava_checkpoints import (
    BACKBONES,
    IMAGE,
    PAD,
    TEXT,
    TRANSFORMERS_4,
    VISION,
    VOCABULARY,
    WORDS,
    Canary,
    assert_same_weights,
    branch,
    decoder_layer,
    edit_config,
    make_llava,
    make_tokenizer,
    read_output,
    trained_branch,
    write_llava_hf,
    write_original,
    write_weights,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, processors
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import convert_llava_to_dpvr as converter
import read_llava
import write_checkpoint
from convert_llava_to_dpvr import ConversionError, convert, main

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def source(tmp_path) -> Path:
    return write_llava_hf(tmp_path / "llava", make_llava())


# ---------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("names", [TRANSFORMERS_4, []], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize(("suffix", "num_files"), [(".safetensors", 3), (".safetensors", 1), (".bin", 2), (".bin", 1)])
def test_llava_hf_weights_are_what_transformers_loads(tmp_path, names, suffix, num_files):
    source = write_llava_hf(tmp_path / "llava", make_llava().bfloat16(), names, suffix, num_files)
    convert(source, tmp_path / "dpvr")
    loaded = LlavaForConditionalGeneration.from_pretrained(source, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert_same_weights(read_output(tmp_path / "dpvr"), dict(loaded.state_dict()))


def test_pickled_tensors_may_lie_apart_in_memory(tmp_path):
    source = write_llava_hf(tmp_path / "llava", make_llava(), suffix=".bin", num_files=1)
    tensors = torch.load(source / "pytorch_model.bin")
    spread = {key: torch.stack([tensor] * 2, -1)[..., 0] for key, tensor in tensors.items()}
    torch.save(spread, source / "pytorch_model.bin")
    convert(source, tmp_path / "dpvr")
    assert_same_weights(read_output(tmp_path / "dpvr"), dict(make_llava().state_dict()))


def test_files_of_save_pretrained_are_read(tmp_path):
    model = make_llava()
    source = write_llava_hf(tmp_path / "llava", model)
    for path in source.glob("model*"):
        path.unlink()
    model.save_pretrained(source, max_shard_size="50KB")
    convert(source, tmp_path / "dpvr")
    assert_same_weights(read_output(tmp_path / "dpvr"), dict(model.state_dict()))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_and_tied_heads(tmp_path, backbone):
    source = write_llava_hf(tmp_path / "llava", make_llava(backbone))
    convert(source, tmp_path / "dpvr")
    expected = dict(LlavaForConditionalGeneration.from_pretrained(source).state_dict())
    if backbone == "qwen2":
        expected.pop("lm_head.weight")
    assert_same_weights(read_output(tmp_path / "dpvr"), expected)


def test_tied_head_stored_twice(tmp_path):
    model = make_llava("qwen2")

    def store_head(tensors):
        tensors["language_model.lm_head.weight"] = model.lm_head.weight.detach().clone()

    source = write_llava_hf(tmp_path / "llava", model, change=store_head)
    convert(source, tmp_path / "dpvr")
    assert "lm_head.weight" not in read_output(tmp_path / "dpvr")

    def store_other_head(tensors):
        tensors["language_model.lm_head.weight"] = model.lm_head.weight.detach() + 1

    source = write_llava_hf(tmp_path / "other", model, change=store_other_head)
    with pytest.raises(ConversionError, match=r"language_model\.lm_head\.weight in .* differs"):
        convert(source, tmp_path / "dpvr-other")


@pytest.mark.parametrize("tower", ["apart", "inside"])
@pytest.mark.parametrize(("suffix", "num_files"), [(".bin", 2), (".bin", 1), (".safetensors", 2)])
def test_original_layout(tmp_path, tower, suffix, num_files):
    model = make_llava().half()
    source = write_original(tmp_path / "llava", model, suffix, num_files, tower)
    (source / "generation_config.json").write_text('{"pad_token_id": 0}')  # of the tokenizer without <pad>
    convert(source, tmp_path / "dpvr")
    assert json.loads((tmp_path / "dpvr" / "generation_config.json").read_text())["pad_token_id"] == PAD
    expected = dict(model.state_dict())
    for key in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        old = expected[key][:WORDS]
        expected[key] = torch.cat([old, old.float().mean(0).half().expand(VOCABULARY - WORDS, -1)])
    assert_same_weights(read_output(tmp_path / "dpvr"), expected)
    config = json.loads((tmp_path / "dpvr" / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"]) == (IMAGE, PAD)
    assert (config["text_config"]["vocab_size"], config["image_seq_length"]) == (VOCABULARY, 4)
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 5000.0
    assert config["vision_feature_layer"] == -2
    processor = AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True)
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>", "w5"]) == [IMAGE, PAD, 5]
    assert processor.image_processor.do_pad  # image_aspect_ratio "pad"


def test_sharegpt4v_is_llava_with_a_tower_of_its_own(tmp_path):
    source = write_original(tmp_path / "llava", make_llava(), model_type="share4v")
    convert(source, tmp_path / "dpvr")
    key = "model.vision_tower.pre_layrnorm.weight"
    assert torch.equal(read_output(tmp_path / "dpvr")[key], make_llava().state_dict()[key])


def test_original_that_was_trained_on_other_states_of_its_tower_takes_those(tmp_path):
    fields = {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}
    convert(write_original(tmp_path / "llava", make_llava(), **fields), tmp_path / "dpvr")
    config = json.loads((tmp_path / "dpvr" / "config.json").read_text())
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-1, "full")
    assert config["image_seq_length"] == 5  # the class token's too


def test_original_without_padding_crops(tmp_path):
    source = write_original(tmp_path / "llava", make_llava(), image_aspect_ratio="square")
    convert(source, tmp_path / "dpvr")
    assert not AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True).image_processor.do_pad


def test_chat_template_of_the_source_is_kept(tmp_path, source):
    (source / "chat_template.jinja").write_text("{{ 'mine' }}")
    convert(source, tmp_path / "dpvr")
    processor = AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True)
    assert processor.apply_chat_template([{"role": "user", "content": "hello"}]) == "mine"


@pytest.mark.parametrize("template", [None, CHATML, "{% for m in messages %}{{ m.role }} <picture>{% endfor %}"])
def test_another_token_may_stand_for_an_image(tmp_path, source, template):
    for name in ("tokenizer.json", "processor_config.json"):
        (source / name).write_text((source / name).read_text().replace("<image>", "<picture>"))
    if template:
        (source / "chat_template.jinja").write_text(template)
    convert(source, tmp_path / "dpvr")
    processor = AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True)
    content = [{"type": "image", "image": Image.new("RGB", (28, 28))}, {"type": "text", "text": "w5 <image>"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
    assert inputs["input_ids"][0].count(IMAGE) == 4


def test_a_tokenizer_without_a_pad_token_gets_that_of_the_config(tmp_path, source):
    path = source / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    del fields["pad_token"]
    path.write_text(json.dumps(fields))
    convert(source, tmp_path / "dpvr")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True).tokenizer
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", PAD)
    for stated in (None, 120):
        edit_config(source, pad_token_id=stated)
        with pytest.raises(ConversionError, match=f"no pad token, and pad_token_id of config.json, {stated}, is none"):
            convert(source, tmp_path / "refused")


def test_the_longest_prompt_is_saved_with_the_tokenizer(tmp_path, source):
    convert(source, tmp_path / "dpvr")
    stated = write_original(tmp_path / "stated", make_llava(), tokenizer_model_max_length=77)
    convert(stated, tmp_path / "dpvr-77")
    lengths = [
        AutoProcessor.from_pretrained(tmp_path / name, trust_remote_code=True).tokenizer.model_max_length
        for name in ("dpvr", "dpvr-77")
    ]
    assert lengths == [make_llava().config.text_config.max_position_embeddings, 77]


LLAMA_3_ROPE = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4}
LLAMA_3_ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"type": "linear", "factor": 4.0}, 4 * 64),
        ({"type": "dynamic", "factor": 2.0}, 2 * 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 4 * 64),
        (LLAMA_3_ROPE, 64),
        ({"type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}, 64),
    ],
)
def test_scaled_rope_takes_prompts_as_long_as_it_is_scaled_for(tmp_path, source, rope, longest):
    text = json.loads((source / "config.json").read_text())["text_config"]
    del text["rope_parameters"]
    edit_config(source, text_config=text | {"max_position_embeddings": 64, "rope_theta": 1e4, "rope_scaling": rope})
    convert(source, tmp_path / "dpvr")
    processor = AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True)
    assert processor.tokenizer.model_max_length == longest


def test_the_template_without_llavas_system_sentence_gives_way_to_the_one_with_it(tmp_path, source):
    turns = "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}"
    parts = "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
    (source / "chat_template.jinja").write_text(turns + parts + "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
    convert(source, tmp_path / "dpvr")
    processor = AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True)
    prompt = processor.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    assert prompt.startswith("A chat between a curious user and an artificial intelligence assistant.")
    assert prompt.endswith("USER: hello ASSISTANT:")


def test_a_tower_inside_is_kept_where_the_option_gives_its_config(tmp_path):
    """As of a fine-tune that trained its tower, and names it by a path of the trainer's machine."""
    model = make_llava()
    source = write_original(tmp_path / "llava", model, tower="inside", mm_vision_tower="/home/trainer/clip")
    with pytest.raises(ConversionError, match="The vision tower of .*: .*Name its CLIP with --vision-tower"):
        convert(source, tmp_path / "dpvr")
    convert(source, tmp_path / "dpvr", vision_tower=str(tmp_path / "clip"))
    key = "model.vision_tower.pre_layrnorm.weight"
    assert torch.equal(read_output(tmp_path / "dpvr")[key], model.state_dict()[key])


def test_a_tower_that_is_not_clips_is_refused_in_the_original_layout(tmp_path):
    source = write_original(tmp_path / "llava", make_llava())
    tower = {name: value for name, value in VISION.items() if name != "model_type"}
    SiglipVisionModel(SiglipVisionConfig(**tower)).save_pretrained(tmp_path / "siglip")
    with pytest.raises(ConversionError, match="the vision tower is a siglip_vision_model; only CLIP's is supported"):
        convert(source, tmp_path / "dpvr", vision_tower=str(tmp_path / "siglip"))


@pytest.mark.parametrize("layout", ["llava-hf", "original", "chat_template.jinja", "without a tokenizer"])
def test_the_template_of_a_tokenizer_is_kept_and_takes_images(tmp_path, layout):
    write, options = write_original if layout == "original" else write_llava_hf, {}
    source = write(tmp_path / "llava", make_llava())
    path = source / "tokenizer_config.json"
    if layout in ("llava-hf", "original"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHATML}))
    else:  # where transformers 5 writes it, so that it counts as the processor's
        (source / "chat_template.jinja").write_text(CHATML)
    if layout == "without a tokenizer":
        options["tokenizer"] = str(tmp_path / "tokenizer")
        make_tokenizer(special=True).save_pretrained(tmp_path / "tokenizer")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).unlink()
    convert(source, tmp_path / "dpvr", **options)
    content = [{"type": "image"}, {"type": "text", "text": "w5"}, {"type": "image"}, {"type": "text", "text": "w6"}]
    messages = [{"role": "system", "content": "w4"}, {"role": "user", "content": content}]
    processor = AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True)
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nw4<|im_end|><|im_start|>user\n<image>\n<image>\nw5 w6<|im_end|><|im_start|>assistant\n"
    )


def test_other_templates_stay_beside_one_that_is_made_to_take_images(tmp_path):
    source = write_llava_hf(tmp_path / "llava", make_llava())
    (source / "chat_template.jinja").write_text(CHATML)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ 'rag' }}")
    convert(source, tmp_path / "dpvr")
    templates = AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True).chat_template
    assert templates["rag"] == "{{ 'rag' }}"
    assert templates["default"].endswith(CHATML)
    assert templates["default"] != CHATML


def test_of_a_hub_source_its_named_templates_are_fetched_too(tmp_path, monkeypatch):
    files = ["config.json", "additional_chat_templates/rag.jinja", "sub/config.json", "model.safetensors"]
    fetched = []

    def fetch(name, revision, **patterns):
        fetched.extend(filter_repo_objects(files, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(read_llava, "snapshot_download", fetch)
    read_llava.resolve_folder("org/llava")
    assert sorted(fetched) == ["additional_chat_templates/rag.jinja", "config.json"]


def test_bad_targets_and_adapters_are_refused_before_weights_are_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(read_llava, "snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    (tmp_path / "mine.txt").write_text("mine")
    bad_options = ({"adapter": "nosuch"}, {"dtype": "int8"})
    for output, options in ((tmp_path, {}), *((tmp_path / "dpvr", options) for options in bad_options)):
        with pytest.raises(
            ConversionError, match="not an empty folder|nor a folder with adapter_model|'int8' is none"
        ):
            convert("org/llava", output, **options)


@pytest.mark.parametrize(
    "fields",
    [
        {"do_center_crop": False, "do_pad": False},
        {"do_center_crop": False, "do_resize": False},
        {"do_center_crop": None, "size": {"height": 56, "width": 56}},
    ],
)
def test_an_image_processor_whose_images_the_tower_does_not_take_is_refused(tmp_path, source, fields):
    path = source / "processor_config.json"
    path = path if path.exists() else source / "preprocessor_config.json"
    content = json.loads(path.read_text())
    content.get("image_processor", content).update(fields)
    path.write_text(json.dumps(content))
    with pytest.raises(ConversionError, match="makes images of"):
        convert(source, tmp_path / "dpvr")


def test_the_number_of_image_tokens_that_transformers_writes_unasked_is_no_statement(tmp_path, source):
    """Into the config of a fine-tune of any tower, where the source's stated none."""
    edit_config(source, image_seq_length=LlavaConfig().image_seq_length)
    convert(source, tmp_path / "dpvr")
    assert json.loads((tmp_path / "dpvr" / "config.json").read_text())["image_seq_length"] == 4


@pytest.mark.parametrize("layer", [-4, 3])
def test_the_first_and_the_last_states_of_a_tower_of_three_layers_may_be_the_features(tmp_path, source, layer):
    edit_config(source, vision_feature_layer=layer)
    assert convert(source, tmp_path / "dpvr", dry_run=True).vision_tokens == 4


@pytest.mark.parametrize(("words", "rows", "grown"), [(96, 96, 128), (126, 126, 128), (96, 98, 98)])
def test_a_vocabulary_grows_where_tokens_are_added_behind_it_to_a_multiple_of_64(words, rows, grown):
    tokenizer, config = make_tokenizer(special=False), LlamaConfig(vocab_size=rows)
    tokenizer.add_tokens([f"more{i}" for i in range(words - WORDS)])
    tokenizer.pad_token = tokenizer.eos_token  # which is none: it must be seen by a loss
    read_llava.add_special_tokens(tokenizer, config)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [words, words + 1]
    assert (config.vocab_size, config.pad_token_id) == (grown, words + 1)


def test_the_name_of_a_weight_file_in_the_config_of_the_source_is_not_that_of_the_result(tmp_path, source):
    edit_config(source, transformers_weights="elsewhere.safetensors")
    convert(source, tmp_path / "dpvr")
    assert "transformers_weights" not in json.loads((tmp_path / "dpvr" / "config.json").read_text())


def test_options_that_would_do_nothing_are_refused(tmp_path, capsys):
    source = str(write_llava_hf(tmp_path / "llava", make_llava()))
    assert main([source, str(tmp_path / "dpvr"), "--revision", "main"]) == 1
    assert "--revision main is of a source on the Hub, but" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([source, str(tmp_path / "dpvr"), "--private"])
    assert "--private is for --push-to-hub" in capsys.readouterr().err
    for options in ([], ["--side-branch-init", "copy"]):
        with pytest.raises(SystemExit):
            main([source, str(tmp_path / "dpvr"), "--seed", "0", *options])
        assert "--seed is for --side-branch-init random" in capsys.readouterr().err
    assert main([source, str(tmp_path / "dpvr"), "--seed", "3", "--side-branch-init", "random", "--dry-run"]) == 0


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_template_that_writes_the_start_itself_gives_one_start(tmp_path, adds_bos):
    source = write_original(tmp_path / "llava", make_llava())
    path = source / "tokenizer_config.json"
    template = "{{ bos_token + ' ' }}" + CHATML
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    if adds_bos:
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save(str(source / "tokenizer.json"))
    convert(source, tmp_path / "dpvr")
    processor = AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True)
    messages = [{"role": "user", "content": [{"type": "text", "text": "w5"}]}]
    ids = processor(text=processor.apply_chat_template(messages))["input_ids"][0]
    assert ids.count(1) == 1
    assert ids[0] == 1


def test_the_original_layout_pads_as_generation_needs_it_whatever_training_did(tmp_path):
    source = write_original(tmp_path / "llava", make_llava())
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "right"}))
    convert(source, tmp_path / "dpvr")
    processor = AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True)
    inputs = processor(text=["w5", "w5 w6 w7"], padding=True, return_tensors="pt")
    assert inputs["attention_mask"].tolist()[0][0] == 0
    assert inputs["attention_mask"].tolist()[0][-1] == 1


def train_sentencepiece() -> bytes:
    """A tokenizer.model as Llama's: no words are normalised, "▁" stands before every text."""
    sentences = ["the quick brown fox jumps over the lazy dog", "what is in this picture", "USER: hello ASSISTANT:"]
    like_llamas = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "unk_id": 0, "bos_id": 1}
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 5), model_writer=file, vocab_size=96, model_type="bpe", **like_llamas
    )
    return file.getvalue()


@pytest.mark.parametrize("layout", ["original", "original mistral", "llava-hf"])
def test_prompts_have_the_originals_ids(tmp_path, layout):
    """The original's code encodes what stands before and behind an image apart. liuhaotian/llava-v1.5-7b has a
    tokenizer.model alone, llava-hf a tokenizer.json with a normalizer."""
    options = {"model_type": "llava_mistral"} if layout == "original mistral" else {}
    backbone = "mistral" if options else "llama"
    source, model = write_original(tmp_path / "llava", make_llava(backbone), **options), train_sentencepiece()
    for path in source.glob("*token*.json"):
        path.unlink()
    (source / "tokenizer.model").write_bytes(model)
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    fields = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "padding_side": "right"}
    (source / "tokenizer_config.json").write_text(json.dumps(fields | words))
    if layout == "llava-hf":
        backend = AutoTokenizer.from_pretrained(source).backend_tokenizer
        backend.add_special_tokens(["<image>", "<pad>"])
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
        source = write_llava_hf(tmp_path / "llava-hf", make_llava())
        backend.save(str(source / "tokenizer.json"))
        (source / "tokenizer_config.json").write_text(json.dumps(fields | words | {"pad_token": "<pad>"}))
    convert(source, tmp_path / "dpvr")
    processor = AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True)
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [96, 97]
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("what is the fox over", "USER: <image>what is <image> this ASSISTANT:", "<image>", "the<image>"):
        first, *others = map(original.encode, text.split("<image>"))
        images = [Image.new("RGB", (28, 28))] * len(others)
        inputs = processor(images=images or None, text=text)
        assert inputs["input_ids"][0] == [1, *first, *(i for ids in others for i in [96] * 4 + ids)], text
    assert processor.tokenizer.decode(processor.tokenizer("the quick fox").input_ids[1:]) == "the quick fox"


def test_a_tokenizer_option_serves_a_source_without_one(tmp_path):
    source = write_llava_hf(tmp_path / "llava", make_llava())
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).rename(tmp_path / "tokenizer" / name)
    with pytest.raises(ConversionError, match="The processor cannot be loaded"):
        convert(source, tmp_path / "dpvr")
    (source / "chat_template.jinja").write_text("{{ messages[0].role }} new <image>")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ 'rag' }}")
    convert(source, tmp_path / "dpvr", tokenizer=str(tmp_path / "tokenizer"))
    assert_same_weights(read_output(tmp_path / "dpvr"), make_llava().state_dict())
    assert "messages[0].role" in (tmp_path / "dpvr" / "chat_template.jinja").read_text()
    assert (tmp_path / "dpvr" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ 'rag' }}"
    shutil.rmtree(source / "additional_chat_templates")
    (source / "chat_template.json").write_text('{"chat_template": "{{ messages[0].role }} old <image>"}')
    convert(source, tmp_path / "old", tokenizer=str(tmp_path / "tokenizer"))
    assert " old " in (tmp_path / "old" / "chat_template.jinja").read_text()  # as in transformers


def test_of_a_source_without_a_tokenizer_is_said_which_files_one_would_be_read_from(tmp_path):
    source = write_original(tmp_path / "llava", make_llava())
    for path in source.glob("token*"):
        path.unlink()
    with pytest.raises(
        ConversionError, match=r"The tokenizer cannot be loaded from .* from one of: \(1\) a `tokenizers`"
    ):
        convert(source, tmp_path / "dpvr")


def test_of_two_sets_of_weights_transformers_choice_is_converted(tmp_path):
    """A model that was saved again into the folder of its shards leaves these and their index behind."""
    source = write_llava_hf(
        tmp_path / "llava", make_llava(), change=lambda tensors: tensors["language_model.lm_head.weight"].zero_()
    )
    newer = write_llava_hf(tmp_path / "newer", make_llava(), num_files=1)
    (newer / "model.safetensors").rename(source / "model.safetensors")
    (source / "pytorch_model.bin").write_bytes(b"older still")
    convert(source, tmp_path / "dpvr")
    assert_same_weights(
        read_output(tmp_path / "dpvr"), LlavaForConditionalGeneration.from_pretrained(source).state_dict()
    )


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [\n---\n",
        b"---\n- a\n- list\n---\n",
        b"---\nmodel-index:\n- name: x\n  results:\n  - task: {type: a}\n---\n",
        "caf\u00e9".encode("latin-1"),
        b"---\nlicense: other\n---\n",
    ],
)
def test_a_card_of_the_source_that_names_no_licence_costs_nothing(tmp_path, source, card):
    (source / "README.md").write_bytes(card)
    convert(source, tmp_path / "dpvr")
    assert "license: other\nlicense_name: that-of-the-source\n" in (tmp_path / "dpvr" / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"max_new_tokens": -3}', "is no generation config .*: `max_new_tokens` must be greater than 0, but is -3"),
        ('{"watermarking_config": 3}', "is no generation config that transformers can read: 'int'"),
    ],
)
def test_a_dry_run_finds_a_broken_generation_config(tmp_path, source, content, message):
    (source / "generation_config.json").write_text(content)
    with pytest.raises(ConversionError, match=f"generation_config.json {message}"):
        convert(source, tmp_path / "dpvr", dry_run=True)


def test_an_adapter_of_another_routing_or_base_is_refused_with_both_values(tmp_path, source):
    pytest.importorskip("peft")
    from training.adapters import add_adapter, save_adapter

    for name, options in (("same", {}), ("fusion", {"num_fusion_layers": 2})):
        convert(source, tmp_path / f"{name} base", **options)
        base = AutoModelForImageTextToText.from_pretrained(tmp_path / f"{name} base", trust_remote_code=True)
        save_adapter(add_adapter(base), tmp_path / name, "me/dpvr")
    convert(source, tmp_path / "dpvr", adapter=tmp_path / "same")
    with pytest.raises(ConversionError, match="num_fusion_layers=2, but the model has num_fusion_layers=1"):
        convert(source, tmp_path / "other", adapter=tmp_path / "fusion")
    negated = write_llava_hf(tmp_path / "negated", make_llava(), change=lambda all: [t.neg_() for t in all.values()])
    with pytest.raises(ConversionError, match="has other weights: value 0 of model.multi_modal_projector.linear_1"):
        convert(negated, tmp_path / "other", adapter=tmp_path / "same")
    path = tmp_path / "same" / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt", "base_sample": "[1]"})
    with pytest.raises(ConversionError, match="states a base_sample that is no sample of weights"):
        convert(source, tmp_path / "other", adapter=tmp_path / "same")


def test_what_was_read_before_is_not_taken_for_what_is_there_now(tmp_path):
    source = write_llava_hf(tmp_path / "llava", make_llava(), suffix=".bin", num_files=1)
    convert(source, tmp_path / "first", dry_run=True)
    newer = make_llava(initializer_range=0.5)
    for weight in newer.parameters():
        weight.data.mul_(2)
    (source / "pytorch_model.bin").unlink()
    write_weights(source, newer.state_dict(), ".bin", 1)
    convert(source, tmp_path / "dpvr")
    assert_same_weights(read_output(tmp_path / "dpvr"), newer.state_dict())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(tmp_path, source, dtype):
    convert(source, tmp_path / "dpvr", dtype=dtype)
    assert {tensor.dtype for tensor in read_output(tmp_path / "dpvr").values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "dpvr" / "config.json").read_text())["dtype"] == dtype


def test_overflow_of_float16_is_refused(tmp_path):
    def enlarge(tensors):
        tensors["language_model.model.norm.weight"][3] = 1e5

    source = write_llava_hf(tmp_path / "llava", make_llava(), change=enlarge)
    with pytest.raises(ConversionError, match=r"language_model\.norm\.weight .* float16"):
        convert(source, tmp_path / "dpvr", dtype="float16")


def test_large_shards_are_split(tmp_path, source, monkeypatch):
    monkeypatch.setattr(write_checkpoint, "MAX_SHARD_BYTES", 40_000)
    convert(source, tmp_path / "dpvr")
    assert_same_weights(read_output(tmp_path / "dpvr"), dict(make_llava().state_dict()))
    shards = sorted((tmp_path / "dpvr").glob("*.safetensors"))
    assert all(int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0 for path in shards)  # where numbers begin
    sizes = [path.stat().st_size for path in shards]
    assert len(sizes) > 4
    assert max(sizes) < 40_000 + 5_000  # and a header


def test_a_shard_is_as_full_as_it_may_be(monkeypatch):
    monkeypatch.setattr(write_checkpoint, "MAX_SHARD_BYTES", 4)
    weights = [write_checkpoint.Weight(str(i), (size,), None) for i, size in enumerate([2, 2, 2, 5, 1, 3])]
    shards = write_checkpoint.plan_shards(weights, [], itemsize=1)
    assert [[weight.numel for weight in shard] for shard in shards.values()] == [[2, 2], [2], [5], [1, 3]]


# ---------------------------------------------------------------------------------------------- side branch


@pytest.mark.parametrize("backbone", BACKBONES)
def test_identity_branch_adds_nothing(tmp_path, backbone):
    source = write_llava_hf(tmp_path / "llava", make_llava(backbone))
    convert(source, tmp_path / "dpvr", saturation_layer=2, num_side_layers=2)
    tensors = read_output(tmp_path / "dpvr")
    zeroed = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")
    for i in range(2):
        layer = branch(tensors, i)
        assert layer.keys() == decoder_layer(tensors, 2).keys()
        for part, tensor in decoder_layer(tensors, 2).items():
            assert torch.equal(layer[part], torch.zeros_like(tensor) if part in zeroed else tensor), part


@pytest.mark.parametrize("link", [False, True])
def test_without_side_layers_there_is_no_branch_and_the_identitys_logits(tmp_path, source, link):
    convert(source, tmp_path / "identity", saturation_layer=2)
    summary = convert(source, tmp_path / "dpvr", saturation_layer=2, num_side_layers=0, link=link)
    assert (summary.roles["side branch"], summary.num_trainable) == ("none", 0)
    assert "side_branch" not in (tmp_path / "dpvr" / "model.safetensors.index.json").read_text()
    assert "no side branch" in (tmp_path / "dpvr" / "README.md").read_text()
    ids = torch.tensor([[1, 7, *[IMAGE] * 4, 9, 11, 30]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28)}
    logits = []
    for name in ("identity", "dpvr"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name, trust_remote_code=True).eval()
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)


def test_copied_branch_is_the_layers_from_saturation_on(tmp_path, source):
    convert(source, tmp_path / "dpvr", saturation_layer=3, num_side_layers=2, side_branch_init="copy")
    tensors = read_output(tmp_path / "dpvr")
    for i in range(2):
        expected = decoder_layer(tensors, 3 + i)
        assert branch(tensors, i).keys() == expected.keys()
        assert all(torch.equal(tensor, expected[part]) for part, tensor in branch(tensors, i).items())


def test_random_branch_is_seeded_and_of_the_backbones_spread(tmp_path):
    source = write_llava_hf(tmp_path / "llava", make_llava("llama with biases"))
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        convert(source, folder, side_branch_init="random", seed=seed)
    a, b, c = (branch(read_output(folder), 0) for folder in folders)
    assert all(torch.equal(a[part], b[part]) for part in a)
    assert not torch.equal(a["mlp.up_proj.weight"], c["mlp.up_proj.weight"])
    assert not torch.equal(a["self_attn.k_proj.weight"], a["self_attn.v_proj.weight"])
    assert a["mlp.up_proj.weight"].std().item() == pytest.approx(TEXT["initializer_range"], rel=0.1)
    assert (a["input_layernorm.weight"] == 1).all()
    assert (a["self_attn.q_proj.bias"] == 0).all()


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
@pytest.mark.parametrize("as_folder", [True, False])
def test_adapter_replaces_the_initialisation(tmp_path, source, prefix, as_folder):
    (tmp_path / "adapter").mkdir()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({f"{prefix}side_branch.{key}": tensor for key, tensor in trained_branch().items()}, file)
    summary = convert(source, tmp_path / "dpvr", adapter=file.parent if as_folder else file)
    layer = branch(read_output(tmp_path / "dpvr"), 0)
    assert {f"layers.0.{part}" for part in layer} == trained_branch().keys()
    assert all(torch.equal(tensor, trained_branch()[f"layers.0.{part}"]) for part, tensor in layer.items())
    assert summary.side_branch == "trained"
    assert "untrained" not in (tmp_path / "dpvr" / "README.md").read_text()


def test_saturation_layer_of_an_adapter(tmp_path, source):
    (tmp_path / "adapter").mkdir()
    tensors = {f"model.side_branch.{key}": tensor for key, tensor in trained_branch().items()}
    save_file(tensors, tmp_path / "adapter" / "side_branch.safetensors", metadata={"saturation_layer": "4"})
    with pytest.raises(ConversionError, match="saturation layer 4, but 3 was asked for"):
        convert(source, tmp_path / "dpvr", adapter=tmp_path / "adapter", saturation_layer=3)
    assert convert(source, tmp_path / "dpvr", adapter=tmp_path / "adapter").saturation_layer == 4


def test_adapters_that_do_not_fit(tmp_path, source):
    file = tmp_path / "branch.safetensors"
    two = {f"model.side_branch.{key}": tensor for key, tensor in trained_branch(2).items()}
    one = {key: tensor for key, tensor in two.items() if "layers.0" in key}
    key = "model.side_branch.layers.0.mlp.up_proj.weight"
    cases = {
        r"layers\.1\..* is no weight of a side branch of 1 layer": two,
        r"up_proj\.weight in .* has shape \(48, 31\), .* \(48, 32\)": one | {key: one[key][:, 1:].contiguous()},
        r"Missing weight .*up_proj\.weight of shape \(48, 32\)": {k: t for k, t in one.items() if k != key},
        r"lora_A.* changes a layer of the base.*merge_adapter\.py": one | {"q_proj.lora_A.weight": torch.ones(2)},
        r"layers\.7.* changes a layer of the base": one | {"layers.7.norm.ln_tuning_layers.weight": torch.ones(2)},
    }
    for message, tensors in cases.items():
        save_file(tensors, file)
        with pytest.raises(ConversionError, match=message):
            convert(source, tmp_path / "dpvr", adapter=file)
    save_file(one, file)
    with pytest.raises(ConversionError, match=r"Missing weight .*layers\.1"):
        convert(source, tmp_path / "dpvr", adapter=file, num_side_layers=2)
    for stated in ("late", "4th"):
        save_file(one, file, metadata={"saturation_layer": stated})
        with pytest.raises(ConversionError, match=f"'{stated}', which is no number"):
            convert(source, tmp_path / "dpvr", adapter=file)
    file.write_bytes(b"no safetensors")
    with pytest.raises(ConversionError, match=r"branch\.safetensors cannot be read"):
        convert(source, tmp_path / "dpvr", adapter=file)
    with pytest.raises(ConversionError, match=r"neither a \.safetensors file nor a folder"):
        convert(source, tmp_path / "dpvr", adapter=tmp_path)
    assert not (tmp_path / "dpvr").exists()


# ---------------------------------------------------------------------------------------------- the result as a model


@pytest.mark.parametrize("backbone", BACKBONES)
def test_converted_model_without_text_only_layers_is_llava(tmp_path, backbone):
    source = write_llava_hf(tmp_path / "llava", make_llava(backbone))
    convert(source, tmp_path / "dpvr", saturation_layer=5)
    llava = LlavaForConditionalGeneration.from_pretrained(source).eval()
    dpvr = AutoModelForImageTextToText.from_pretrained(tmp_path / "dpvr", trust_remote_code=True).eval()
    ids = torch.tensor([[1, 7, *[IMAGE] * 4, 9, 11, 30]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28)}
    with torch.no_grad():
        expected = llava(**inputs).logits
        torch.testing.assert_close(dpvr(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
        assert expected.std() > 0.1


def test_nothing_is_missing_or_left_over_when_transformers_loads_the_result(tmp_path, source):
    convert(source, tmp_path / "dpvr", num_side_layers=2)
    _, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "dpvr", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_converted_folder_answers_through_its_processor(tmp_path):
    source = write_original(tmp_path / "llava", make_llava())
    convert(source, tmp_path / "dpvr")
    processor = AutoProcessor.from_pretrained(tmp_path / "dpvr", trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dpvr", trust_remote_code=True).eval()
    image = torch.randint(0, 255, (3, 40, 20), dtype=torch.uint8).numpy()
    inputs = processor(images=image, text="w5 <image> w6", return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE).sum() == 4
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_files_of_the_result(tmp_path, source):
    (source / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 97}')
    (source / "README.md").write_text("---\nlicense: llama2\n---\n# LLaVA\n")
    convert(source, tmp_path / "dpvr", saturation_layer=2, num_fusion_layers=2)
    config = json.loads((tmp_path / "dpvr" / "config.json").read_text())
    assert config["model_type"] == "dpvr"
    assert config["architectures"] == ["DPVRForConditionalGeneration"]
    assert (config["saturation_layer"], config["num_side_layers"], config["num_fusion_layers"]) == (2, 1, 2)
    assert config["auto_map"] == converter.AUTO_MAP
    generation = json.loads((tmp_path / "dpvr" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 97}
    for name in converter.CODE_FILES:
        assert (tmp_path / "dpvr" / name).read_bytes() == (converter.HERE / name).read_bytes()
    card = (tmp_path / "dpvr" / "README.md").read_text()
    assert "license: llama2\n" in card
    assert "custom_code" in card
    assert "untrained" in card
    assert "| text-only | 2..3 |" in card
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in (tmp_path / "dpvr").iterdir()} == {(tmp_path / "new").stat().st_mode}
    everything = "".join(
        path.read_text() for path in (tmp_path / "dpvr").glob("*.[jm]*") if path.suffix != ".safetensors"
    )
    assert str(tmp_path) not in everything  # no path of the machine that converted
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------------- choices and summary


@pytest.mark.parametrize(
    ("num_layers", "num_fusion_layers", "expected"),
    [(32, 1, 18), (40, 1, 22), (8, 1, 4), (2, 1, 1), (1, 0, 1), (6, 4, 2)],
)
def test_default_saturation_layer_keeps_the_papers_proportion(num_layers, num_fusion_layers, expected):
    layer, reason = converter.choose_saturation_layer(None, num_layers, num_fusion_layers, None)
    assert layer == expected
    assert f"{expected} of {num_layers}" in reason


def test_summary(tmp_path, source):
    summary = convert(source, tmp_path / "dpvr", saturation_layer=2)
    tensors = read_output(tmp_path / "dpvr")
    assert summary.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert summary.num_trainable == sum(tensor.numel() for tensor in branch(tensors, 0).values())
    assert summary.roles == {
        "joint": "0..1",
        "side branch": "1 layer, identity",
        "text-only": "2..4",
        "fusion": "5",
    }
    assert (summary.vision_tokens, summary.text_tokens) == (4, 64)
    positions = 3 * 68 + 3 * 64  # joint and fusion, text-only
    assert summary.cache_ratio == pytest.approx(positions / (6 * 68))
    assert summary.cache_mib == positions * 2 * 16 * 4 / 2**20  # a key and a value of 16 numbers in float32
    assert 0.8 < summary.flops_ratio < 1
    text = str(summary)
    for part in ("2..4", "as asked for", f"{summary.num_parameters:,}", "AutoProcessor.from_pretrained"):
        assert part in text


def test_dry_run_checks_and_writes_nothing(tmp_path, source):
    summary = convert(source, tmp_path / "dpvr", dry_run=True)
    assert summary.output is None
    assert summary.saturation_layer == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava"]
    next(source.glob("*-00002-*")).unlink()
    with pytest.raises(ConversionError, match="00002"):
        convert(source, tmp_path / "dpvr", dry_run=True)


def test_a_dry_run_finds_a_disk_that_will_refuse(tmp_path, source, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConversionError, match="cannot be written: .*file is no folder"):
        convert(source, tmp_path / "file" / "deep" / "dpvr", dry_run=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        with pytest.raises(ConversionError, match=f"cannot be written: {tmp_path} may not be written to"):
            convert(source, tmp_path / "deep" / "dpvr", dry_run=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConversionError, match="kB free, but the weights need"):
        convert(source, tmp_path / "dpvr", dry_run=True)
    (tmp_path / ".dpvr.partial").mkdir()  # what it holds is not needed again
    convert(source, tmp_path / "dpvr", dry_run=True)


# ---------------------------------------------------------------------------------------------- refusals


def test_weights_that_do_not_fit_are_named(tmp_path):
    key = "language_model.model.layers.1.mlp.up_proj.weight"

    def remove(tensors):
        del tensors[key]

    def reshape(tensors):
        tensors[key] = tensors[key][:, 1:]

    def add(tensors):
        tensors["language_model.model.layers.6.mlp.up_proj.weight"] = torch.ones(48, 32)

    def duplicate(tensors):
        tensors["model.language_model.layers.1.mlp.up_proj.weight"] = torch.ones(48, 32)

    cases = {
        remove: r"Missing weight model\.language_model\.layers\.1\.mlp\.up_proj\.weight of shape \(48, 32\)",
        reshape: rf"{key} in .*model.*\.safetensors has shape \(48, 31\), .* \(48, 32\)",
        add: r"layers\.6\.mlp\.up_proj\.weight in .*\.safetensors, of shape \(48, 32\), is no weight of this LLaVA",
        duplicate: rf"Duplicate weight model\.{key.replace('.model', '')}: .*\.safetensors and .*\.safetensors",
    }
    for i, (change, message) in enumerate(cases.items()):
        source = write_llava_hf(tmp_path / f"llava{i}", make_llava(), change=change)
        with pytest.raises(ConversionError, match=message):
            convert(source, tmp_path / "dpvr")
        assert not (tmp_path / "dpvr").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava_next"}, "model_type 'llava_next'. Models of type llava can be converted"),
        (
            {"model_type": "llava_llama"},
            "model_type 'llava_llama'.* with an mm_vision_tower those of type .*llava_llama",
        ),
        ({"model_type": "dpvr"}, "DPVR checkpoint already"),
        ({"model_type": None}, "model_type None"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantized"),
        ({"text_config": {"model_type": "no-such-model"}}, "config.json is not a config"),
        ({"image_seq_length": "many"}, "config.json is not a config"),
        ({"vision_config": {"model_type": "pixtral"}}, "the vision tower is Pixtral's, .* only .* CLIP's"),
        ({"image_token_index": 5}, "has <image> at 96, but .* has it at 5"),
        ({"projector_hidden_act": 5}, "'projector_hidden_act': .*5"),
        ({"dtype": {"": None}}, r"dtype \{'': None\} of .* is none of bfloat16"),
    ],
)
def test_configs_that_are_refused(tmp_path, source, fields, message):
    edit_config(source, **fields)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "dpvr")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; only 'pad' and 'square'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type is 'spatial_pool'; only None can be converted"),
        ({"s2": True}, "s2 is True; only False can be converted"),
        ({"vocab_size": WORDS + 2}, r"embed_tokens\.weight in .* has shape \(96, 32\), .* \(98, 32\)"),
        ({"mm_vision_tower": "no/such/tower"}, "vision tower of .*: no/such/tower does not exist: give the folder"),
        ({"mm_vision_tower": None}, "mm_vision_tower is None, not the name of a CLIP; give --vision-tower"),
        ({"model_type": []}, r"model_type \[\]"),
        ({"model_type": "bunny-phi"}, "model_type 'bunny-phi'. If it computes what LLaVA-1.5 does, .* llava_mistral"),
    ],
)
def test_original_configs_that_are_refused(tmp_path, fields, message):
    source = write_original(tmp_path / "llava", make_llava(), **fields)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "dpvr")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"saturation_layer": 6}, "saturation_layer=6 must be between 1 and 5"),
        ({"saturation_layer": 0}, "saturation_layer=0"),
        ({"num_fusion_layers": 6}, "num_fusion_layers=6"),
        ({"num_side_layers": -1}, "num_side_layers=-1"),
        ({"side_branch_init": "copy", "saturation_layer": 5, "num_side_layers": 2}, "copy of layer 6"),
        ({"vision_tower": "openai/clip"}, "original layout"),
        ({"adapter": ""}, "is neither a .safetensors file nor a folder"),
    ],
)
def test_options_that_are_refused(tmp_path, source, options, message):
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "dpvr", **options)
    assert not (tmp_path / "dpvr").exists()


def test_sources_that_are_no_checkpoint(tmp_path, source):
    with pytest.raises(ConversionError, match="nothing does not exist: give the folder of a checkpoint"):
        convert(tmp_path / "nothing", tmp_path / "dpvr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"has no config\.json"):
        convert(tmp_path / "empty", tmp_path / "dpvr")
    for path in source.glob("model*"):
        path.unlink()
    with pytest.raises(ConversionError, match="has no weights"):
        convert(source, tmp_path / "dpvr")
    (source / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ConversionError, match=r"model\.safetensors cannot be read"):
        convert(source, tmp_path / "dpvr")
    (source / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="not valid JSON"):
        convert(source, tmp_path / "dpvr")


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("adapter_config.json", {}, "has no weights: .* It is an adapter: merge it into its base"),
        ("adapter_config.json", None, r"has no config\.json\. It is an adapter: merge it into its base"),
        ("mm_projector.bin", {"tune_mm_mlp_adapter": True}, "has no weights: .* It is a projector alone: convert"),
        ("llava-q4_k.gguf", None, r"has no config\.json\. It holds GGUF files, .*: convert the checkpoint"),
    ],
)
def test_of_what_is_published_in_place_of_a_checkpoint_is_said_what_to_convert(tmp_path, file, fields, message):
    """Adapters and projectors of the original layout have its config.json, but no tokenizer."""
    whole, part = write_original(tmp_path / "whole", make_llava()), tmp_path / "part"
    part.mkdir()
    (part / file).write_text("{}")
    if fields is not None:
        shutil.copy(whole / "config.json", part / "config.json")
        edit_config(part, **fields)
    with pytest.raises(ConversionError, match=message):
        convert(part, tmp_path / "dpvr")


@pytest.mark.parametrize(("has_config", "what"), [(False, "config.json"), (True, "weights that can be converted")])
def test_of_a_hub_repository_of_gguf_alone_is_said_what_to_convert(tmp_path, source, monkeypatch, has_config, what):
    for path in source.glob("model*"):
        path.unlink()
    folder = source if has_config else tmp_path / "nothing was fetched"
    monkeypatch.setattr(read_llava, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr(read_llava.HfApi, "list_repo_files", lambda *_, **__: ["README.md", "q4/llava.gguf"])
    with pytest.raises(ConversionError, match=f"me/llava has no {what}. It holds GGUF files, .*: convert the checkp"):
        convert("me/llava", tmp_path / "dpvr")


def test_hub_names_are_resolved_to_the_files_that_are_needed(tmp_path, monkeypatch):
    write_original(tmp_path / "llava", make_llava(), num_files=1)
    (tmp_path / "llava" / "model_card.py").write_text("")
    folders = {"me/llava": tmp_path / "llava", "no/such": None}
    fetched = []

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        files = [str(path.relative_to(folders[name])) for path in folders[name].rglob("*") if path.is_file()]
        fetched.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        fetched.append(revision)
        return str(folders[name])

    (tmp_path / "llava" / "checkpoint-5").mkdir()
    (tmp_path / "llava" / "checkpoint-5" / "pytorch_model.bin").write_text("")
    monkeypatch.setattr(read_llava, "snapshot_download", snapshot_download)
    convert("me/llava", tmp_path / "dpvr", revision="v1.5")
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "pytorch_model.bin", "v1.5"}
    assert set(fetched) == names
    assert "base_model: me/llava\n" in (tmp_path / "dpvr" / "README.md").read_text()
    with pytest.raises(ConversionError, match="The output .* lies in the source"):  # in the Hub's cache
        convert("me/llava", tmp_path / "llava" / "dpvr")


@pytest.mark.parametrize("write", [write_llava_hf, write_original])
def test_a_routing_that_the_source_cannot_have_is_refused_before_its_weights_are_fetched(tmp_path, write, monkeypatch):
    write(tmp_path / "llava", make_llava())
    monkeypatch.setattr(read_llava, "snapshot_download", lambda *_, **__: str(tmp_path / "llava"))
    monkeypatch.setattr(read_llava, "fetch_weights", lambda *_: pytest.fail("fetched"))
    for options in ({"saturation_layer": 99}, {"num_fusion_layers": 99}, {"num_side_layers": -1}):
        [name] = options
        with pytest.raises(ConversionError, match=f"{name}={options[name]} must be"):
            convert("me/llava", tmp_path / "dpvr", **options)


def test_index_cannot_point_outside_the_folder(tmp_path, source):
    index = source / "model.safetensors.index.json"
    (tmp_path / "secret.safetensors").write_bytes(b"")
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    with pytest.raises(ConversionError, match="not a file of that folder"):
        convert(source, tmp_path / "dpvr")


def test_outputs_that_are_refused(tmp_path, source):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    before = sorted(path.name for path in source.iterdir())
    for output in (tmp_path / "full", source, source / "inside" / "deep", tmp_path / "full" / "mine.txt"):
        with pytest.raises(ConversionError, match=r"nothing is overwritten|lies in the source"):
            convert(source, output)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in source.iterdir()) == before
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    read_output(tmp_path / "empty")


@pytest.mark.parametrize("as_zip", [True, False])
def test_pickled_code_is_not_executed(tmp_path, as_zip):
    source = write_llava_hf(tmp_path / "llava", make_llava(), suffix=".bin", num_files=1)
    path, canary = source / "pytorch_model.bin", tmp_path / "canary"
    if as_zip:
        torch.save({"lm_head.weight": Canary(canary)}, path)
    else:
        path.write_bytes(pickle.dumps({"lm_head.weight": Canary(canary)}))
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin"):
        convert(source, tmp_path / "dpvr")
    assert not canary.exists()
    with path.open("rb") as file:
        if not as_zip:
            pickle.load(file)  # the canary does sing
            assert canary.exists()


# ---------------------------------------------------------------------------------------------- command line


def test_command_line(tmp_path, source, capsys):
    output = tmp_path / "dpvr"
    assert main([str(source), str(output), "--saturation-layer", "2", "--side-branch-init", "copy"]) == 0
    printed = capsys.readouterr().out
    assert "1 layer, copy" in printed
    assert str(output) in printed
    assert main([str(source), str(output)]) == 1
    error = capsys.readouterr().err
    assert "nothing is overwritten" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["only-a-source"],
        ["a", "b", "--side-branch-init", "magic"],
        ["a", "b", "c"],
        ["", "b"],
        ["a", "b", "--adapter", ""],
        ["a", "b", "--push-to-hub", ""],
        ["a", "b", "--adapter", "c", "--side-branch-init", "copy"],
        ["a", "b", "--num-side-layers", "0", "--side-branch-init", "copy"],
    ],
)
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert "llava-hf/llava-1.5-7b-hf" in capsys.readouterr().out
