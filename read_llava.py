# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
LLaVA checkpoints as they are found: two layouts and the names of two versions of transformers, read as one.

The layout of llava-hf has the weight names of transformers 4 or 5; the original one of liuhaotian/llava-v1.5-7b may
have its CLIP tower in a repository of its own. The original has no `<image>` and `<pad>` tokens: they are added
behind the vocabulary, which is then padded to a multiple of 64, as for llava-hf. There the new rows were drawn at
random; here each is the mean of the old rows, so that the same source always gives the same checkpoint.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from tokenizers import decoders, normalizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from configuration_dpvr import BACKBONES
from processing_dpvr import DPVRProcessor
from read_weights import (
    ConversionError,
    MadeTensor,
    StoredTensor,
    Weight,
    advice,
    check_dtype,
    load_pickled,
    read_json,
    reason,
    tensors_of_folder,
    weight_files,
)
from training.card import is_hub_id

EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
ORIGINAL_BACKBONES = {  # by the model types of the original layout; ShareGPT4V is LLaVA-1.5 with a tower of its own
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "share4v": "llama",
}
NAMES = [  # the first pattern that matches a weight's name says what becomes of it; None drops it
    (r".*rotary_emb\.inv_freq$|.*embeddings\.position_ids$", None),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"(model\.)?language_model\.(model\.)?", "model.language_model."),
    (r"model\.(?=layers\.|embed_tokens\.|norm\.)", "model.language_model."),
    (r"(model\.)?(vision_tower\.){1,2}(vision_model\.)?", "model.vision_tower."),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
]
# Put before a template whose `<s>` the tokenizer writes too
NO_START = '{%- set bos_token = "" -%}'
# Put before a template that takes text alone: the images of a message before its text, as LLaVA has them
IMAGES_FIRST = r"""
{%- set turns = namespace(all=[]) -%}
{%- for message in messages -%}
    {%- set turn = namespace(images="", text="") -%}
    {%- for part in ([] if message.content is string or not message.content else message.content) -%}
        {%- if part.type == "text" -%}
            {%- set turn.text = turn.text ~ (" " if turn.text else "") ~ part.text -%}
        {%- elif part.type in ("image", "image_url") -%}
            {%- set turn.images = turn.images ~ "<image>\n" -%}
        {%- else -%}
            {{- raise_exception("A message cannot hold " ~ part.type ~ ".") -}}
        {%- endif -%}
    {%- endfor -%}
    {%- set content = message.content if message.content is string else turn.images ~ turn.text -%}
    {%- set turns.all = turns.all + [dict(message, content=content)] -%}
{%- endfor -%}
{%- set messages = turns.all -%}
"""
CLIP_NAMES = [
    (r"text_model\.|logit_scale$|visual_projection\.|text_projection\.|.*embeddings\.position_ids$", None),
    (r"(vision_model\.)?", "model.vision_tower."),
]


@contextlib.contextmanager
def refusing(what: str):
    """Files of any content, read by many hands, fail in every way there is: a sentence that begins with `what`."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        raise ConversionError(f"{what}: {reason(error)}") from error


def check_name(name: str | Path) -> None:
    """Refuses a checkpoint that is neither a folder nor named as a Hub repository: transformers would ask the Hub.

    Raises:
        ConversionError
    """
    if not Path(name).is_dir() and not is_hub_id(str(name)):
        what = "is a file" if Path(name).exists() else "does not exist"
        raise ConversionError(f"{name} {what}: give the folder of a checkpoint, or a Hub id, owner/name.")


def resolve_folder(name: str, revision: str | None = None) -> Path:
    """The folder `name`, or a local copy of the Hub repository `name` without its weights."""
    if Path(name).is_dir():
        if revision is not None:
            raise ConversionError(f"--revision {revision} is of a source on the Hub, but {name} is a folder.")
        return Path(name).resolve()
    check_name(name)
    texts = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"]
    _download(name, revision, ["additional_chat_templates/*.jinja"], ignored=None)
    return _download(name, revision, texts)


def file_names(name: str, revision: str | None) -> list[str]:
    """Of a folder or a Hub repository, fetched or not; none where the Hub cannot be asked."""
    if Path(name).is_dir():
        return os.listdir(name)
    with contextlib.suppress(Exception):  # a message goes without advice then
        return HfApi().list_repo_files(name, revision=revision)
    return []


def fetch_weights(name: str, revision: str | None, folder: Path) -> None:
    """Downloads the weights of the Hub repository `name` beside its other files in `folder`."""
    if Path(name).is_dir():
        return
    for pattern in ("*.safetensors", "*.bin"):
        _download(name, revision, [pattern])
        with contextlib.suppress(ConversionError):  # of this kind there may be an adapter alone
            if weight_files(folder)[0][0].match(pattern):
                return
    if what := advice(file_names(name, revision)):
        raise ConversionError(f"{name} has no weights that can be converted.{what}")


def _download(name: str, revision: str | None, patterns: list[str], ignored: str | None = "*/*") -> Path:
    what = f"{name!r}{f' at revision {revision!r}' if revision else ''} is neither a folder nor a Hub repository"
    with refusing(f"{what} that can be read (a private or gated one takes `hf auth login`)"):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))


def rename(key: str, names: list[tuple[str, str | None]]) -> str | None:
    """The name of weight `key` in transformers 5, or None if no model has it any more."""
    for pattern, replacement in names:
        if match := re.match(pattern, key):
            return None if replacement is None else replacement + key[match.end() :]
    return key


def index_tensors(folder: Path, names: list[tuple[str, str | None]]) -> dict[str, StoredTensor]:
    """All tensors of a folder by their new names.

    Raises:
        ConversionError: if two tensors come to the same name, or one has a type that weights have not.
    """
    found: dict[str, StoredTensor] = {}
    for tensor in tensors_of_folder(folder):
        name = rename(tensor.key, names)
        if name is None:
            continue
        check_dtype(tensor)
        if name in found:
            first = found[name]
            raise ConversionError(
                f"Duplicate weight {name}: {first.key} in {first.path} and {tensor.key} in {tensor.path}."
            )
        found[name] = tensor
    return found


# ---------------------------------------------------------------------------------------------- the two layouts


@dataclass
class Checkpoint:
    """A LLaVA checkpoint, read as far as its shapes.

    Attributes:
        name: Hub id or folder, as given.
        folder: where its files lie.
        config: its config in the terms of transformers 5, the vocabulary grown if it has to be.
        fields: config.json as stored.
        processor: image processor, tokenizer and chat template.
        old_vocab_size: rows of the embeddings in the source.
        revision: of a source on the Hub.
        tower: Hub id or folder of a vision tower that lies by itself, and where its files lie.
        tensors: by their names in transformers 5; None until `find_tensors` has found them.
    """

    name: str
    folder: Path
    config: LlavaConfig
    fields: dict
    processor: DPVRProcessor
    old_vocab_size: int
    revision: str | None = None
    tower: tuple[str, Path] | None = None
    tensors: dict[str, StoredTensor] | None = None


def _make_config(build: Callable, path: Path, **fields):
    with refusing(f"{path} is not a config that transformers can read"):
        return build(**fields)


def _from_pretrained(auto_class, name: str | Path, what: str, **options):
    with refusing(f"{what} cannot be loaded from {name}"):
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)


def image_token_of(processor) -> str:
    """What stands for an image in prompts; not every processor has a name for it."""
    return getattr(processor, "image_token", "<image>")


def own_template(processor) -> str | dict[str, str] | None:
    """The chat template of a checkpoint, or that of its tokenizer, made to take images where it takes text alone.

    None where there is none, or it is the one that llava-hf published with LLaVA-1.5: the right turns, but without
    the system sentence that the model was trained with. Templates of other models are their own.
    """
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    tokenizer, messages = processor.tokenizer, [{"role": "user", "content": content}]
    image_token = image_token_of(processor)
    template = processor.chat_template or tokenizer.chat_template
    text = template.get("default") if isinstance(template, dict) else template
    start = NO_START if tokenizer("?").input_ids[0] == tokenizer.bos_token_id else ""
    images_first = start + IMAGES_FIRST.replace("<image>", image_token)
    for prefix in ("" if processor.chat_template else start, images_first) if text else ():
        with contextlib.suppress(Exception):  # a template may be any code
            candidate = prefix + text
            prompt = processor.apply_chat_template(messages, chat_template=candidate, add_generation_prompt=True)
            if prompt == f"USER: {image_token}\n? ASSISTANT:":
                return None
            if image_token in prompt:
                return {**template, "default": candidate} if isinstance(template, dict) else candidate
    return processor.chat_template


def load_processor(folder: Path, tokenizer: str | None):
    """Processor of a checkpoint in the layout of llava-hf, with the tokenizer of another place if one is given."""
    if tokenizer is None:
        processor = _from_pretrained(AutoProcessor, folder, "The processor")
    else:
        tokens = _from_pretrained(AutoTokenizer, tokenizer, "The tokenizer")
        try:
            processor = _from_pretrained(AutoProcessor, folder, "The processor")
            processor.tokenizer = tokens
        except ConversionError:  # the checkpoint may have no tokenizer
            images = _from_pretrained(AutoImageProcessor, folder, "The image processor")
            with refusing(f"The tokenizer of {tokenizer} cannot be used with the processor of {folder}"):
                fields, _ = LlavaProcessor.get_processor_dict(folder)
                own = {name: fields[name] for name in ("chat_template", "image_token") if name in fields}
                processor = LlavaProcessor(images, tokens, **own)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ConversionError(
            f"{folder} has a {type(processor).__name__}, not a processor of images and text, such as LlavaProcessor."
        )
    return processor


def read_llava_hf(name: str, revision: str | None, folder: Path, fields: dict, tokenizer: str | None) -> Checkpoint:
    """A checkpoint in the layout of llava-hf, with the weight names of transformers 4 or 5."""
    path = folder / "config.json"
    config = _make_config(LlavaConfig, path, **{k: v for k, v in fields.items() if k != "model_type"})
    check_backbone(config, path)
    check_geometry(config, path)
    processor = load_processor(folder, tokenizer)
    check_vocabulary(processor.tokenizer, config, path, image_token_of(processor))
    check_image_size(processor.image_processor, config, folder)
    with refusing(f"The processor of {folder} cannot be used"):
        processor = convert_processor(config, processor)
    return Checkpoint(name, folder, config, fields, processor, config.text_config.vocab_size, revision)


def check_backbone(config: LlavaConfig, path: Path) -> None:
    """Refuses decoders that DPVR does not route, and dimensions that no model has."""
    if (backbone := config.text_config.model_type) not in BACKBONES:
        raise ConversionError(
            f"{path}: the backbone is {backbone!r}, none of {', '.join(BACKBONES)}, whose layers DPVR can call one by "
            "one."
        )
    for part in ("text_config", "vision_config"):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            value = getattr(getattr(config, part), name, None)
            if type(value) is not int or not 1 <= value < 2**24:
                raise ConversionError(f"{path}: {part}.{name} is {value!r:.80}, not a number from 1 to {2**24 - 1}.")


def check_geometry(config: LlavaConfig, path: Path) -> None:
    """Refuses a vision tower that gives other than `image_seq_length` tokens, another number for each image, or has no
    `vision_feature_layer`.

    A config that states no `image_seq_length`, as old ones do not, gets what the tower gives. Nor is its default a
    statement: transformers writes it, whatever the tower, and reads the field nowhere.
    """
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    if vision.model_type == "pixtral":  # its processor writes more into a prompt than one token for each patch
        raise ConversionError(
            f"{path}: the vision tower is Pixtral's, which makes as many tokens as an image of any shape has patches; "
            "only towers that make the same number of each image, as CLIP's and SigLIP's, can be converted."
        )
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not all(type(value) is int and 0 < value < 2**16 for value in (size, patch)):
        raise ConversionError(f"{path}: vision_config has image_size {size!r:.80} and patch_size {patch!r:.80}.")
    has_class_token = vision.model_type == "clip_vision_model"
    num_tokens = (size // patch) ** 2 + has_class_token - (strategy == "default")
    if config.image_seq_length == LlavaConfig.image_seq_length:
        config.image_seq_length = num_tokens
    if config.image_seq_length != num_tokens:
        raise ConversionError(
            f"{path}: image_seq_length is {config.image_seq_length}, but images of {size} in patches of {patch} give "
            f"{num_tokens} tokens (vision_feature_select_strategy {strategy!r})."
        )
    layers = config.vision_feature_layer
    for layer in layers if isinstance(layers, list | tuple) else [layers]:
        if not -vision.num_hidden_layers - 1 <= layer <= vision.num_hidden_layers:
            raise ConversionError(
                f"{path}: vision_feature_layer is {layer}, but the vision tower has {vision.num_hidden_layers} layers."
            )


def check_vocabulary(tokenizer, config: LlavaConfig, path: Path, image_token: str = "<image>") -> None:
    """Refuses a tokenizer whose ids, that of `image_token` above all, are not those of the embeddings."""
    vocabulary, vocab_size, image_id = tokenizer.get_vocab(), config.text_config.vocab_size, config.image_token_id
    found = vocabulary.get(image_token)
    if found is None:
        raise ConversionError(
            f"The tokenizer of {path.parent} has no {image_token} among its {len(vocabulary)} tokens, but {path} has "
            f"it at {image_id}."
        )
    if found != image_id:
        raise ConversionError(f"The tokenizer has {image_token} at {found}, but {path} has it at {image_id}.")
    token, last = max(vocabulary.items(), key=lambda item: item[1])
    if last >= vocab_size:
        raise ConversionError(f"The tokenizer has {token!r} at {last}, but {path} has a vocabulary of {vocab_size}.")


def check_image_size(image_processor, config: LlavaConfig, folder: Path) -> None:
    """Refuses an image processor that makes images of another size than the vision tower takes."""
    fields, size = image_processor.to_dict(), config.vision_config.image_size
    is_cropped = bool(fields.get("do_center_crop") and fields.get("crop_size"))
    made = fields.get("crop_size") if is_cropped else fields.get("size")
    sides = made.values() if isinstance(made, dict) else [made]
    if any(side not in (None, size) for side in sides):
        raise ConversionError(
            f"The image processor of {folder} makes images of {made}, but vision_config.image_size is {size}."
        )
    is_stretched = not isinstance(made, dict) or {"height", "width"} <= made.keys()  # or else padded to a square
    is_one_shape = fields.get("do_resize") is not False and (is_stretched or fields.get("do_pad") is not False)
    if not is_cropped and not is_one_shape:
        raise ConversionError(
            f"The image processor of {folder} makes images of many shapes (do_resize={fields.get('do_resize')}, "
            f"do_center_crop={fields.get('do_center_crop')}, do_pad={fields.get('do_pad')}, size={made}), but the "
            f"vision tower takes those of {size} x {size}."
        )


def check_original(fields: dict, path: Path) -> None:
    """Refuses what LLaVA 1.5 does not have and `LlavaConfig` cannot say."""
    only = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_patch_merge_type": (None, "flat"),
        "mm_use_im_start_end": (None, False),
        "mm_resampler_type": (None,),
        "s2": (None, False),
        "image_aspect_ratio": (None, "pad", "square"),
        "mm_vision_select_feature": (None, "patch", "cls_patch"),
    }
    for key, values in only.items():
        if fields.get(key) not in values:
            allowed = " and ".join(repr(value) for value in values if value is not None) or None
            raise ConversionError(f"{path}: {key} is {fields.get(key)!r}; only {allowed} can be converted.")


def read_original(
    name: str, revision: str | None, folder: Path, fields: dict, tokenizer: str | None, vision_tower: str | None
) -> Checkpoint:
    """A checkpoint in the layout of liuhaotian/llava-v1.5-7b."""
    path = folder / "config.json"
    check_original(fields, path)
    text_config = original_text_config(fields, path)
    old_vocab_size = text_config.vocab_size
    options = {"config": text_config, "padding_side": "left"}  # of generation; the sources state that of training
    tokens = _from_pretrained(AutoTokenizer, tokenizer or folder, "The tokenizer", **options)
    with refusing(f"The tokenizer of {folder} cannot be used"):
        add_special_tokens(tokens, text_config)
        tokens = as_original_tokenizer(tokens)
    if type(longest := fields.get("tokenizer_model_max_length")) is int:
        tokens.model_max_length = longest
    vision_tower = vision_tower or fields["mm_vision_tower"]
    tower = resolve_tower(vision_tower, path)
    vision_config = _from_pretrained(AutoConfig, tower, "The config of the vision tower")
    vision_config = getattr(vision_config, "vision_config", vision_config)
    if vision_config.model_type != "clip_vision_model":  # LLaVA's code reads these in other ways
        raise ConversionError(f"{path}: the vision tower is a {vision_config.model_type}; only CLIP's is supported.")
    config = _make_config(
        LlavaConfig,
        path,
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        pad_token_id=tokens.pad_token_id,
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if fields.get("mm_vision_select_feature") == "cls_patch" else "default",
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    check_backbone(config, path)
    check_geometry(config, path)
    check_vocabulary(tokens, config, path)
    images = _from_pretrained(AutoImageProcessor, tower, "The image processor")
    check_image_size(images, config, tower)
    with refusing(f"The processor of {folder} cannot be used"):
        processor = convert_processor(
            config, LlavaProcessor(images, tokens), fields.get("image_aspect_ratio") == "pad"
        )
    return Checkpoint(name, folder, config, fields, processor, old_vocab_size, revision, (vision_tower, tower))


def resolve_tower(name, path: Path) -> Path:
    """The folder of the vision tower that an original config.json or an option names."""
    if not isinstance(name, str):
        raise ConversionError(f"{path}: mm_vision_tower is {name!r:.80}, not the name of a CLIP; give --vision-tower.")
    try:
        return resolve_folder(name)
    except ConversionError as error:
        raise ConversionError(f"The vision tower of {path}: {error} Name its CLIP with --vision-tower.") from error


def original_text_config(fields: dict, path: Path):
    """The backbone's part of an original config.json, which mixes it with LLaVA's."""
    config_class = CONFIG_MAPPING[ORIGINAL_BACKBONES[fields["model_type"]]]
    known = {*config_class().to_dict(), "rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "dtype", "transformers_version"}
    return _make_config(config_class, path, **{key: value for key, value in fields.items() if key in known})


def add_special_tokens(tokenizer, text_config) -> None:
    """Adds `<image>` and `<pad>` where they lack, and grows `text_config.vocab_size` to hold them, padded to 64."""
    if "<image>" not in tokenizer.get_vocab():
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.unk_token, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if len(tokenizer) > text_config.vocab_size:
        text_config.vocab_size = -(-len(tokenizer) // 64) * 64
    text_config.pad_token_id = tokenizer.pad_token_id


def as_original_tokenizer(tokenizer):
    """The tokenizer of a SentencePiece model, so that "▁" stands before any text behind `<image>`, as in the original,
    which encodes what stands before and behind an image apart, and by llava-hf's tokenizer.json. Transformers' class
    for Llama puts none there, also when it loads a tokenizer.json that says otherwise. Behind `</s>`, between turns,
    it then stands too, as by llava-hf's, where the original has none if its tokenizer says `"legacy": false`."""
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    first, normalizer = state["pre_tokenizer"] or {}, state["normalizer"] or {}
    parts = first.get("pretokenizers", [first])
    is_first = len(parts) == 1 and parts[0].get("prepend_scheme") == "first"
    # What transformers 5.23 makes of Mistral's, with no "▁" at all
    is_bare = not first and [part.get("type") for part in normalizer.get("normalizers", [])] == ["Replace"]
    if not is_first and not is_bare:
        return tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    backend.decoder = decoders.Sequence(steps)
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "extra_special_tokens", "chat_template")
    names += ("padding_side", "truncation_side", "model_max_length")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{name: getattr(tokenizer, name) for name in names})


def longest_prompt(text_config) -> int:
    """How many tokens a backbone's positions are made for: more than `max_position_embeddings` where scaled RoPE is
    what stretches them, as Vicuna's of 16k tokens are."""
    limit, rope = text_config.max_position_embeddings, text_config.rope_parameters
    trained = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(trained * (rope.get("factor") or 1)))


def set_pad_token(tokenizer, config: LlavaConfig) -> None:
    """Gives a tokenizer that names no pad token that of the config."""
    if tokenizer.pad_token is not None:
        return
    stated = getattr(config, "pad_token_id", None)
    token = next((token for token, index in tokenizer.get_vocab().items() if index == stated), None)
    if token is None:
        raise ValueError(
            f"its tokenizer has no pad token, and pad_token_id of config.json, {stated!r:.80}, is none of its tokens. "
            "Name one as pad_token in tokenizer_config.json; the one that ends a text will do."
        )
    tokenizer.pad_token = token


def convert_processor(config: LlavaConfig, processor, do_pad: bool | None = None) -> DPVRProcessor:
    """The processor that travels with the checkpoint; without a chat template of its own it takes LLaVA-1.5's. A
    tokenizer that states no longest prompt gets the backbone's."""
    set_pad_token(processor.tokenizer, config)
    if do_pad is None:
        do_pad = processor.image_processor.to_dict().get("do_pad") is not False  # CLIP's does not say; LLaVA pads
    return DPVRProcessor.from_llava(
        processor.tokenizer,
        processor.image_processor,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
        do_pad=do_pad,
        model_max_length=min(processor.tokenizer.model_max_length, longest_prompt(config.text_config)),
        chat_template=own_template(processor),
        image_token=image_token_of(processor),
    )


def read_checkpoint(
    source: str, revision: str | None = None, tokenizer: str | None = None, vision_tower: str | None = None
) -> Checkpoint:
    """Reads configs, tokenizer and image processor of a LLaVA checkpoint, in either layout. Its weights, which may be
    14 GB to fetch, can wait for `find_tensors` until nothing else speaks against it."""
    load_pickled.cache_clear()  # what an earlier call has read may have changed
    folder = resolve_folder(source, revision)
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{source} has no config.json.{advice(file_names(source, revision))}")
    fields = read_json(folder / "config.json")
    if (folder / "adapter_config.json").is_file() or fields.get("tune_mm_mlp_adapter"):
        # Before all else that an adapter or a projector lacks, such as a tokenizer; either is small to fetch
        fetch_weights(source, revision, folder)
        weight_files(folder)
    model_type = fields.get("model_type")
    if fields.get("quantization_config"):
        raise ConversionError(f"{source} is quantized; convert the checkpoint that it was quantized from.")
    if "mm_vision_tower" in fields and model_type in list(ORIGINAL_BACKBONES):
        return read_original(source, revision, folder, fields, tokenizer, vision_tower)
    if model_type == "dpvr":
        raise ConversionError(f"{source} is a DPVR checkpoint already.")
    if model_type != "llava":
        known = ", ".join(ORIGINAL_BACKBONES)
        if "mm_vision_tower" in fields:
            hint = f"If it computes what LLaVA-1.5 does, under a name of its own, write that of its backbone: {known}."
        else:
            hint = f"Models of type llava can be converted, and with an mm_vision_tower those of type {known}."
        raise ConversionError(
            f"{source} is not a LLaVA-1.5 checkpoint: its config.json says model_type {model_type!r}. {hint}"
        )
    if vision_tower is not None:
        raise ConversionError(f"--vision-tower is for the original layout; {source} brings its own vision tower.")
    return read_llava_hf(source, revision, folder, fields, tokenizer)


# ---------------------------------------------------------------------------------------------- weights


def find_tensors(checkpoint: Checkpoint) -> None:
    """Fetches the weights if they are on the Hub, and reads the names and shapes of all. Those of a CLIP tower are the
    checkpoint's own where it has any, as a fine-tune of the tower does."""
    fetch_weights(checkpoint.name, checkpoint.revision, checkpoint.folder)
    checkpoint.tensors = index_tensors(checkpoint.folder, NAMES)
    if checkpoint.tower and not any(key.startswith("model.vision_tower.") for key in checkpoint.tensors):
        name, folder = checkpoint.tower
        fetch_weights(name, None, folder)
        checkpoint.tensors |= index_tensors(folder, CLIP_NAMES)


def meta_llava(config: LlavaConfig, path: Path) -> LlavaForConditionalGeneration:
    """The model of a config, without memory for its weights."""
    with refusing(f"{path} is no config that transformers can make a model of"), torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def expected_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes of LLaVA's weights in transformers; a tied head is no weight of its own."""
    check_depth(checkpoint)
    state = meta_llava(checkpoint.config, checkpoint.folder / "config.json").state_dict()
    if checkpoint.config.tie_word_embeddings:
        state.pop(HEAD, None)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_depth(checkpoint: Checkpoint) -> None:
    """Refuses a config with more layers than the weights have, before so deep a model is made."""
    config = checkpoint.config
    for part, pattern in (("text_config", r"model\.language_model\."), ("vision_config", r"model\.vision_tower\..*")):
        stated = getattr(config, part).num_hidden_layers
        found = [re.match(pattern + r"layers\.(\d+)\.", name) for name in checkpoint.tensors]
        num_layers = len({match[1] for match in found if match})
        if stated > num_layers:
            raise ConversionError(
                f"{checkpoint.folder / 'config.json'}: {part}.num_hidden_layers is {stated}, but the weights have "
                f"{num_layers} such layers."
            )


def _grow(stored: StoredTensor, num_rows: int) -> torch.Tensor:
    old = stored.load()
    mean = old.mean(0, keepdim=True, dtype=torch.float32).to(old.dtype)
    return torch.cat([old, mean.expand(num_rows - len(old), -1)])


def check_tied_head(checkpoint: Checkpoint) -> None:
    head, embeddings = checkpoint.tensors.pop(HEAD, None), checkpoint.tensors.get(EMBEDDINGS)
    if not head or not embeddings:
        return
    is_same = (head.shape, head.dtype) == (embeddings.shape, embeddings.dtype)
    if not is_same or not all(map(torch.equal, head.pieces(), embeddings.pieces())):
        raise ConversionError(
            f"The config ties {HEAD} to the embeddings, but {head.key} in {head.path} differs from {embeddings.key} "
            f"in {embeddings.path}. If the head is one of its own, set tie_word_embeddings to false in config.json."
        )


def base_weights(checkpoint: Checkpoint) -> list[Weight]:
    """LLaVA's own weights.

    Raises:
        ConversionError: naming key, file and shapes, if one is missing, not LLaVA's, or of another shape.
    """
    expected, stored = expected_shapes(checkpoint), checkpoint.tensors
    if checkpoint.config.tie_word_embeddings:
        check_tied_head(checkpoint)
    if any(name.startswith("model.vision_tower.vision_model.") for name in expected):  # towers other than CLIP's
        add = {n: n.replace("vision_tower.", "vision_tower.vision_model.", 1) for n in stored if n not in expected}
        stored = {add[n] if add.get(n) in expected else n: tensor for n, tensor in stored.items()}
    weights = []
    for name, shape in expected.items():
        if name not in stored:
            raise ConversionError(
                f"Missing weight {name} of shape {shape}: no weight file of {checkpoint.name} has it."
            )
        tensor, source_shape = stored[name], shape
        weight = Weight(name, shape, tensor)
        if name in (EMBEDDINGS, HEAD) and shape[0] != checkpoint.old_vocab_size:
            source_shape = (checkpoint.old_vocab_size, *shape[1:])
            origin = f"{weight.origin}, and its mean in rows {source_shape[0]} to {shape[0]}"
            weight = Weight(name, shape, MadeTensor(origin, partial(_grow, tensor, shape[0]), tensor))
        if tensor.shape != source_shape:
            raise ConversionError(
                f"{tensor.key} in {tensor.path} has shape {tensor.shape}, but by the config it has {source_shape}."
            )
        weights.append(weight)
    for name in stored.keys() - expected.keys():
        raise ConversionError(
            f"{stored[name].key} in {stored[name].path}, of shape {stored[name].shape}, is no weight of this LLaVA."
        )
    return weights


def check_names(checkpoint: Checkpoint, weights: list[Weight]) -> None:
    """Refuses weights whose stored names transformers itself would not take for those of this model."""
    model = meta_llava(checkpoint.config, checkpoint.folder / "config.json")
    expected, renamings = model.state_dict(), get_model_conversion_mapping(model)
    for weight in weights:
        name, _ = rename_source_key(weight.source.key, renamings, [], model.base_model_prefix, expected)
        if name != weight.name:
            raise ConversionError(
                f"--link: {weight.source.key} in {weight.source.path} is {weight.name} here, but transformers would "
                f"load it as {name}; convert without --link."
            )
