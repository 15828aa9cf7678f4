# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Makes a DPVR checkpoint from a LLaVA checkpoint: the same weights under transformers 5's names, and a side branch.

Reads the layout of llava-hf, with the weight names of transformers 4 or 5, and the original one of
liuhaotian/llava-v1.5-7b, whose CLIP tower may lie in a repository of its own. The original layout has no `<image>` and
`<pad>` tokens: they are added behind the vocabulary, which is then padded to a multiple of 64, as for llava-hf. There
the new rows were drawn at random; here each is the mean of the old rows, so that the same source always gives the same
checkpoint.

One output shard of at most 1 GB is held in memory at a time, whatever the size of the model. Pickled weights are read
by torch's `weights_only` loader, which runs no code. The output folder appears complete or not at all.
"""

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from benchmarks.accounting import cache_bytes, dense_config, layer_flops, prefill_loads
from configuration_dpvr import AUTO_MAP, DPVRConfig
from processing_dpvr import DPVRProcessor

HERE = Path(__file__).resolve().parent
CODE_FILES = ("configuration_dpvr.py", "modeling_dpvr.py", "processing_dpvr.py")
MODEL_CLASS = "DPVRForConditionalGeneration"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_SHARD_BYTES = 10**9
EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
ORIGINAL_BACKBONES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
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
CLIP_NAMES = [
    (r"text_model\.|logit_scale$|visual_projection\.|text_projection\.|.*embeddings\.position_ids$", None),
    (r"(vision_model\.)?", "model.vision_tower."),
]


class ConversionError(ValueError):
    """A source or an option that cannot be converted; the message says what and why in one sentence."""


# ---------------------------------------------------------------------------------------------- source files


def resolve_folder(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder `name`, or a local copy of the Hub repository `name`: its configs and, if asked, its weights."""
    if Path(name).is_dir():
        return Path(name).resolve()
    texts = ["*.json", "*.model", "*.txt", "*.jinja", "README.md"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=texts, ignore_patterns="*/*"))
        for pattern in ("*.safetensors", "*.bin") if weights else ():
            snapshot_download(name, revision=revision, allow_patterns=[pattern], ignore_patterns="*/*")
            if any(folder.glob(pattern)):
                break
    except (HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(
            f"{name!r} is neither a folder nor a Hub repository that can be read: {reason}"
        ) from error
    return folder


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path.parent} has no {path.name}.") from error
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: those its index names, else a single file; safetensors before .bin."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
            for file in files:
                if not (folder / file).is_file() or Path(file).name != file:
                    raise ConversionError(f"{index} names {file!r}, which is not a file of that folder.")
            return [folder / file for file in files]
        if (folder / name).is_file():
            return [folder / name]
    raise ConversionError(
        f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor the index of either."
    )


@lru_cache(maxsize=1)
def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .bin file, mapped into memory. The last file stays open, until `cache_clear`."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{path} holds pickled objects other than tensors; they are never executed.") from error
    except RuntimeError as error:
        raise ConversionError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ConversionError(f"{path} does not hold a dictionary of tensors.")
    return tensors


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator:
    """The file open for reading one tensor after the other, each into memory of its own."""
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            yield file
    except SafetensorError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one file, without reading them."""
    if path.suffix == ".bin":
        return {key: tuple(tensor.shape) for key, tensor in _load_pickled(path).items()}
    with open_safetensors(path) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.offset_keys()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of the source lies: file, key in it, and shape."""

    path: Path
    key: str
    shape: tuple[int, ...]

    def load(self) -> torch.Tensor:
        """A copy, which nothing else refers to."""
        if self.path.suffix == ".bin":
            return _load_pickled(self.path)[self.key].clone(memory_format=torch.contiguous_format)
        with open_safetensors(self.path) as file:
            return file.get_tensor(self.key)


def rename(key: str, names: list[tuple[str, str | None]]) -> str | None:
    """The name of weight `key` in transformers 5, or None if no model has it any more."""
    for pattern, replacement in names:
        if match := re.match(pattern, key):
            return None if replacement is None else replacement + key[match.end() :]
    return key


def index_tensors(files: list[Path], names: list[tuple[str, str | None]]) -> dict[str, StoredTensor]:
    """All tensors of `files` by their new names.

    Raises:
        ConversionError: if two tensors come to the same name.
    """
    found: dict[str, StoredTensor] = {}
    for path in files:
        for key, shape in read_shapes(path).items():
            name = rename(key, names)
            if name is None:
                continue
            if name in found:
                first = found[name]
                raise ConversionError(f"Duplicate weight {name}: {first.key} in {first.path} and {key} in {path}.")
            found[name] = StoredTensor(path, key, shape)
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
        tensors: by their names in transformers 5.
        processor: image processor, tokenizer and chat template.
        old_vocab_size: rows of the embeddings in the source.
    """

    name: str
    folder: Path
    config: LlavaConfig
    fields: dict
    tensors: dict[str, StoredTensor]
    processor: DPVRProcessor
    old_vocab_size: int


def _make_config(build: Callable, path: Path, **fields):
    try:
        return build(**fields)
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{path} is not a config that transformers can read: {error}") from error


def _from_pretrained(auto_class, name: str | Path, what: str, **options):
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except (ImportError, OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(f"{what} cannot be loaded from {name}: {reason}") from error


def is_bare_template(processor) -> bool:
    """Whether a processor's chat template is the one that llava-hf published with LLaVA-1.5: the right turns, but
    without the system sentence that the model was trained with. Templates of other models are their own."""
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    try:
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except (ValueError, TypeError, TemplateError):
        return processor.chat_template is None
    return prompt == "USER: <image>\n? ASSISTANT:"


def read_llava_hf(name: str, folder: Path, fields: dict, tokenizer: str | None) -> Checkpoint:
    """A checkpoint in the layout of llava-hf, with the weight names of transformers 4 or 5."""
    config = _make_config(
        LlavaConfig, folder / "config.json", **{k: v for k, v in fields.items() if k != "model_type"}
    )
    processor = _from_pretrained(AutoProcessor, folder, "The processor")
    if tokenizer:
        processor.tokenizer = _from_pretrained(AutoTokenizer, tokenizer, "The tokenizer")
    do_pad = processor.image_processor.to_dict().get("do_pad")  # CLIP's does not say; LLaVA pads
    template = None if is_bare_template(processor) else processor.chat_template
    processor = build_processor(config, processor.image_processor, processor.tokenizer, do_pad is not False, template)
    if processor.image_token_id != config.image_token_id:
        raise ConversionError(
            f"The tokenizer has <image> at {processor.image_token_id}, but {folder / 'config.json'} has it at "
            f"{config.image_token_id}."
        )
    tensors = index_tensors(weight_files(folder), NAMES)
    return Checkpoint(name, folder, config, fields, tensors, processor, config.text_config.vocab_size)


def check_original(fields: dict, path: Path) -> None:
    """Refuses what LLaVA 1.5 does not have and `LlavaConfig` cannot say."""
    only = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_patch_merge_type": (None, "flat"),
        "mm_use_im_start_end": (None, False),
        "image_aspect_ratio": (None, "pad", "square"),
        "mm_vision_select_feature": (None, "patch", "cls_patch"),
    }
    for key, values in only.items():
        if fields.get(key) not in values:
            raise ConversionError(f"{path}: {key} is {fields.get(key)!r}; only {values[-1]!r} is supported.")


def read_original(
    name: str, folder: Path, fields: dict, tokenizer: str | None, vision_tower: str | None
) -> Checkpoint:
    """A checkpoint in the layout of liuhaotian/llava-v1.5-7b, with its CLIP tower inside or apart."""
    path = folder / "config.json"
    check_original(fields, path)
    tensors, tower = read_original_tensors(folder, vision_tower, fields["mm_vision_tower"])
    text_config = original_text_config(fields, path)
    old_vocab_size = text_config.vocab_size
    tokens = _from_pretrained(AutoTokenizer, tokenizer or folder, "The tokenizer", config=text_config)
    add_special_tokens(tokens, text_config)
    tokens.model_max_length = fields.get("tokenizer_model_max_length", tokens.model_max_length)
    vision_config = _from_pretrained(AutoConfig, tower, "The config of the vision tower")
    vision_config = getattr(vision_config, "vision_config", vision_config)
    config = _make_config(
        LlavaConfig,
        path,
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        pad_token_id=tokens.pad_token_id,
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if fields.get("mm_vision_select_feature") == "cls_patch" else "default",
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    images = _from_pretrained(AutoImageProcessor, tower, "The image processor")
    processor = build_processor(config, images, tokens, do_pad=fields.get("image_aspect_ratio") == "pad")
    return Checkpoint(name, folder, config, fields, tensors, processor, old_vocab_size)


def read_original_tensors(folder: Path, given: str | None, stated: str) -> tuple[dict[str, StoredTensor], Path]:
    """Tensors of an original checkpoint, and the folder of its CLIP tower, whose weights are taken from there unless
    the checkpoint holds them and no tower is given."""
    tensors = index_tensors(weight_files(folder), NAMES)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.vision_tower.")}
    if given is None and len(rest) < len(tensors):
        return tensors, resolve_folder(stated, weights=False)
    tower = resolve_folder(given or stated)
    return rest | index_tensors(weight_files(tower), CLIP_NAMES), tower


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


def build_processor(
    config: LlavaConfig, image_processor, tokenizer, do_pad: bool, chat_template: str | None = None
) -> DPVRProcessor:
    """The processor that travels with the checkpoint; without a chat template it takes LLaVA-1.5's. A tokenizer that
    states no longest prompt gets the backbone's."""
    longest = config.text_config.max_position_embeddings
    try:
        return DPVRProcessor.from_llava(
            tokenizer,
            image_processor,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
            do_pad=do_pad,
            model_max_length=min(tokenizer.model_max_length, longest),
            chat_template=chat_template,
        )
    except ValueError as error:
        raise ConversionError(str(error)) from error


def read_checkpoint(
    source: str, revision: str | None = None, tokenizer: str | None = None, vision_tower: str | None = None
) -> Checkpoint:
    """Reads configs, tokenizer and the names and shapes of all weights of a LLaVA checkpoint, in either layout."""
    folder = resolve_folder(source, revision)
    fields = read_json(folder / "config.json")
    model_type = fields.get("model_type")
    if fields.get("quantization_config"):
        raise ConversionError(f"{source} is quantized; convert the checkpoint that it was quantized from.")
    if "mm_vision_tower" in fields and model_type in ORIGINAL_BACKBONES:
        return read_original(source, folder, fields, tokenizer, vision_tower)
    if model_type == "dpvr":
        raise ConversionError(f"{source} is a DPVR checkpoint already.")
    if model_type != "llava":
        raise ConversionError(
            f"{source} is not a LLaVA-1.5 checkpoint: its config.json says model_type {model_type!r}."
        )
    if vision_tower is not None:
        raise ConversionError(f"--vision-tower is for the original layout; {source} brings its own vision tower.")
    return read_llava_hf(source, folder, fields, tokenizer)


# ---------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Weight:
    """One tensor of the output: its name and shape, and what makes it."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def expected_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of LLaVA's weights in transformers; a tied head is no weight of its own."""
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        del state[HEAD]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _grow(stored: StoredTensor, num_rows: int) -> torch.Tensor:
    old = stored.load()
    mean = old.mean(0, keepdim=True, dtype=torch.float32).to(old.dtype)
    return torch.cat([old, mean.expand(num_rows - len(old), -1)])


def check_tied_head(checkpoint: Checkpoint) -> None:
    head, embeddings = checkpoint.tensors.pop(HEAD, None), checkpoint.tensors.get(EMBEDDINGS)
    if head and embeddings and not torch.equal(head.load(), embeddings.load()):
        raise ConversionError(
            f"The config ties {HEAD} to the embeddings, but {head.key} in {head.path} differs from them."
        )


def base_weights(checkpoint: Checkpoint) -> list[Weight]:
    """LLaVA's own weights.

    Raises:
        ConversionError: naming key, file and shapes, if one is missing, not LLaVA's, or of another shape.
    """
    if checkpoint.config.tie_word_embeddings:
        check_tied_head(checkpoint)
    expected, stored = expected_shapes(checkpoint.config), checkpoint.tensors
    if any(name.startswith("model.vision_tower.vision_model.") for name in expected):  # towers other than CLIP's
        add = {n: n.replace("vision_tower.", "vision_tower.vision_model.", 1) for n in stored if n not in expected}
        stored = {add[n] if add.get(n) in expected else n: tensor for n, tensor in stored.items()}
    weights = []
    for name, shape in expected.items():
        if name not in stored:
            raise ConversionError(
                f"Missing weight {name} of shape {shape}: no weight file of {checkpoint.name} has it."
            )
        tensor, make = stored[name], stored[name].load
        source_shape = shape
        if name in (EMBEDDINGS, HEAD) and shape[0] != checkpoint.old_vocab_size:
            source_shape, make = (checkpoint.old_vocab_size, *shape[1:]), partial(_grow, tensor, shape[0])
        if tensor.shape != source_shape:
            raise ConversionError(
                f"{tensor.key} in {tensor.path} has shape {tensor.shape}, but by the config it has {source_shape}."
            )
        weights.append(Weight(name, shape, make))
    for name in stored.keys() - expected.keys():
        raise ConversionError(
            f"{stored[name].key} in {stored[name].path}, of shape {stored[name].shape}, is no weight of this LLaVA."
        )
    return weights


def _normal(shape: tuple[int, ...], std: float, seed: int) -> torch.Tensor:
    return torch.empty(shape).normal_(0, std, generator=torch.Generator().manual_seed(seed))


def side_branch_weights(base: list[Weight], config: DPVRConfig, init: str, seed: int) -> list[Weight]:
    """An untrained side branch: the identity, a copy of the layers that vision tokens skip, or random."""
    base_layers = {weight.name: weight for weight in base}
    prefix = "model.language_model.layers.{}."
    parts = [n.removeprefix(prefix.format(0)) for n in base_layers if n.startswith(prefix.format(0))]
    std, weights = config.text_config.initializer_range, []
    for i in range(config.num_side_layers):
        source = config.saturation_layer + (i if init == "copy" else 0)
        if source >= config.text_config.num_hidden_layers:
            raise ConversionError(
                f"--side-branch-init copy: side layer {i} would be a copy of layer {source}, but the decoder has "
                f"{config.text_config.num_hidden_layers} layers."
            )
        for part in parts:
            origin = base_layers[prefix.format(source) + part]
            make = origin.make
            if init == "identity" and part.startswith(("self_attn.o_proj.", "mlp.down_proj.")):
                make = partial(torch.zeros, origin.shape)  # both residual sums then add nothing
            elif init == "random" and part.endswith("norm.weight"):
                make = partial(torch.ones, origin.shape)
            elif init == "random" and part.endswith(".bias"):
                make = partial(torch.zeros, origin.shape)
            elif init == "random":
                make = partial(_normal, origin.shape, std, seed + len(weights))
            weights.append(Weight(f"model.side_branch.layers.{i}.{part}", origin.shape, make))
    return weights


def adapter_file(adapter: str) -> Path:
    path = Path(adapter)
    if path.is_dir():
        for name in ("adapter_model.safetensors", "side_branch.safetensors"):
            if (path / name).is_file():
                return path / name
    if not path.is_file() or path.suffix != ".safetensors":
        raise ConversionError(
            f"{adapter} is neither a .safetensors file nor a folder with adapter_model.safetensors or "
            "side_branch.safetensors."
        )
    return path


def adapter_saturation_layer(path: Path) -> int | None:
    """The saturation layer that an adapter was trained at, if its metadata or adapter_config.json states it."""
    with open_safetensors(path) as file:
        stated = (file.metadata() or {}).get("saturation_layer")
    if stated is None and (path.parent / "adapter_config.json").is_file():
        stated = read_json(path.parent / "adapter_config.json").get("saturation_layer")
    if stated is not None and not str(stated).isdecimal():
        raise ConversionError(f"{path} states a saturation layer {stated!r}, which is no number.")
    return None if stated is None else int(stated)


def adapter_weights(path: Path, untrained: list[Weight]) -> list[Weight]:
    """The trained side branch of `path`, checked against the names and shapes of `untrained`."""
    expected = {weight.name: weight.shape for weight in untrained}
    stored: dict[str, StoredTensor] = {}
    for key, shape in read_shapes(path).items():
        match = re.search(r"(?:^|\.)side_branch\.layers\.\d+\..+$", key)
        name = "model." + match[0].lstrip(".") if match else key
        if name not in expected:
            layers = len({weight.name.split(".")[3] for weight in untrained})
            raise ConversionError(
                f"{key} in {path}, of shape {shape}, is no weight of a side branch of {layers} layer(s)."
            )
        if shape != expected[name]:
            raise ConversionError(f"{key} in {path} has shape {shape}, but by the config it has {expected[name]}.")
        stored[name] = StoredTensor(path, key, shape)
    for name in expected.keys() - stored.keys():
        raise ConversionError(f"Missing weight {name} of shape {expected[name]}: {path} does not have it.")
    return [Weight(name, shape, stored[name].load) for name, shape in expected.items()]


def cast(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    tensor = weight.make()
    result = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and tensor.isfinite().all() and not result.isfinite().all():
        raise ConversionError(
            f"{weight.name} holds numbers beyond the range of float16; convert with --dtype bfloat16."
        )
    return result


def plan_shards(base: list[Weight], branch: list[Weight], itemsize: int) -> dict[str, list[Weight]]:
    """Output files by name, of at most `MAX_SHARD_BYTES` or one tensor; the side branch has the last to itself."""
    shards: list[list[Weight]] = [[]]
    for weight in base:
        if shards[-1] and sum(each.numel for each in [*shards[-1], weight]) * itemsize > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(weight)
    shards.append(branch)
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_weights(folder: Path, shards: dict[str, list[Weight]], dtype: torch.dtype, progress: bool) -> None:
    weights = [weight for shard in shards.values() for weight in shard]
    num_parameters = sum(weight.numel for weight in weights)
    total = num_parameters * dtype.itemsize
    if (free := shutil.disk_usage(folder).free) < total:
        raise ConversionError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, but the weights need {total / 1e9:.1f} GB."
        )
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights", disable=None if progress else True)
    with bar:
        for file, shard in shards.items():
            tensors = {}
            for weight in shard:
                tensors[weight.name] = cast(weight, dtype)
                bar.update(weight.numel * dtype.itemsize)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            tensors.clear()
            _load_pickled.cache_clear()  # the pages that were read stay in memory as long as the file is mapped
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": total},
        "weight_map": {weight.name: file for file, shard in shards.items() for weight in shard},
    }
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------- output folder


def check_output(output: Path, source: Path) -> None:
    """Refuses to write over anything, or into the source."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} exists and is not an empty folder; nothing is overwritten.")
    if source in (output.resolve(), *output.resolve().parents):
        raise ConversionError(f"The output {output} lies in the source {source}.")


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` at the end, and is removed if anything fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        for path in (folder, *folder.iterdir()):  # temporary folders and safetensors files are made for the owner only
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        if output.exists():
            output.rmdir()
        os.replace(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_dpvr_config(config: LlavaConfig, routing: dict[str, int], dtype: str) -> DPVRConfig:
    fields = config.to_dict()
    for part in (fields, fields["text_config"], fields["vision_config"]):
        for name in ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"):
            part.pop(name, None)
    fields |= {"dtype": dtype, "architectures": [MODEL_CLASS], "auto_map": AUTO_MAP, **routing}
    del fields["model_type"]
    return DPVRConfig(**fields)


def write_generation_config(folder: Path, checkpoint: Checkpoint) -> None:
    """The source's own, if it has one; its tokens are set where the source had no `<pad>`."""
    path, text = checkpoint.folder / "generation_config.json", checkpoint.config.text_config
    fields = read_json(path) if path.is_file() else {"bos_token_id": text.bos_token_id}
    fields.setdefault("eos_token_id", text.eos_token_id)
    if "mm_vision_tower" in checkpoint.fields or fields.get("pad_token_id") is None:
        fields["pad_token_id"] = checkpoint.processor.tokenizer.pad_token_id
    _write_json(folder / "generation_config.json", fields)


def write_folder(
    folder: Path,
    checkpoint: Checkpoint,
    config: DPVRConfig,
    shards: dict[str, list[Weight]],
    summary: "ConversionSummary",
    progress: bool,
) -> None:
    write_weights(folder, shards, DTYPES[summary.dtype], progress)
    checkpoint.processor.save_pretrained(folder)
    config.to_json_file(folder / "config.json")
    write_generation_config(folder, checkpoint)
    for name in CODE_FILES:
        shutil.copyfile(HERE / name, folder / name)
    (folder / "README.md").write_text(model_card(checkpoint, summary), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- summary and card


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion did.

    Attributes:
        source, output: as given; `output` is None after a dry run.
        saturation_layer, saturation_reason: the layer, and why it was chosen.
        roles: decoder layers by role, such as `{"joint": "0..17", "side branch": "1 layer, identity"}`.
        dtype: name of the weights' type.
        num_parameters, num_trainable: of the whole model, and of its side branch.
        side_branch: `"identity"`, `"copy"`, `"random"` or `"trained"`.
        vision_tokens, text_tokens: the prompt of the two ratios.
        flops_ratio: decoder FLOPs of reading that prompt, to the source's.
        cache_ratio, cache_mib: KV cache after that prompt, to the source's and in MiB.
    """

    source: str
    output: Path | None
    saturation_layer: int
    saturation_reason: str
    roles: dict[str, str]
    dtype: str
    num_parameters: int
    num_trainable: int
    side_branch: str
    vision_tokens: int
    text_tokens: int
    flops_ratio: float
    cache_ratio: float
    cache_mib: float

    def __str__(self) -> str:
        share = self.num_trainable / self.num_parameters
        prompt = f"{self.vision_tokens} vision + {self.text_tokens} text tokens"
        where = "nothing, this was a dry run" if self.output is None else str(self.output)
        rows = [
            ("source", self.source),
            ("saturation", f"layer {self.saturation_layer}: {self.saturation_reason}"),
            *((role, layers) for role, layers in self.roles.items()),
            ("parameters", f"{self.num_parameters:,} ({self.dtype}), {self.num_trainable:,} trainable ({share:.2%})"),
            ("decoder FLOPs", f"{self.flops_ratio:.1%} of the source's, prefill of {prompt}"),
            ("KV cache", f"{self.cache_ratio:.1%} of the source's, {self.cache_mib:,.1f} MiB after {prompt}"),
            ("written", where),
        ]
        lines = [f"{name:15}{value}" for name, value in rows]
        if self.output is not None:
            lines += ["", *load_lines(str(self.output))]
        return "\n".join(lines)


def load_lines(name: str) -> list[str]:
    return [
        f'processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)',
        f'model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True, dtype="auto")',
    ]


def _layer_range(first: int, end: int) -> str:
    return "none" if first == end else f"{first}..{end - 1}" if end - first > 1 else str(first)


def summarize(
    checkpoint: Checkpoint, config: DPVRConfig, shards: dict, output: Path | None, dtype: str, init: str, reason: str
) -> ConversionSummary:
    *base, branch = shards.values()
    num_trainable = sum(weight.numel for weight in branch)
    saturation, fusion = config.saturation_layer, config.first_fusion_layer
    prompt = (config.image_seq_length, 64)
    both = (dense_config(config), config)
    flops = [sum(layer_flops(each.text_config, load) for load in prefill_loads(each, *prompt)) for each in both]
    caches = [sum(cache_bytes(each, *prompt, itemsize=DTYPES[dtype].itemsize).values()) for each in both]
    return ConversionSummary(
        source=checkpoint.name,
        output=output,
        saturation_layer=saturation,
        saturation_reason=reason,
        roles={
            "joint": _layer_range(0, saturation),
            "side branch": f"{config.num_side_layers} layer{'s' if config.num_side_layers > 1 else ''}, {init}",
            "text-only": _layer_range(saturation, fusion),
            "fusion": _layer_range(fusion, config.text_config.num_hidden_layers),
        },
        dtype=dtype,
        num_parameters=sum(weight.numel for shard in base for weight in shard) + num_trainable,
        num_trainable=num_trainable,
        side_branch=init,
        vision_tokens=prompt[0],
        text_tokens=prompt[1],
        flops_ratio=flops[1] / flops[0],
        cache_ratio=caches[1] / caches[0],
        cache_mib=caches[1] / 2**20,
    )


CARD = """\
---
{front_matter}
---

# {title}

{source} with dual-path vision routing (DPVR-LF, arXiv 2606.09131): vision tokens leave the decoder at layer
{saturation_layer}, pass a side branch, and meet the text again in the fusion layers. {status}

| tokens that pass | decoder layers |
|---|---|
{table}

{num_parameters:,} parameters, of which the side branch has {num_trainable:,} ({share:.2%}). By count, not by
measurement: reading {vision_tokens} vision and {text_tokens} text tokens takes {flops_ratio:.1%} of the source's
decoder FLOPs and leaves {cache_ratio:.1%} of its KV cache.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "path/to/this/folder"  # or its Hub id
{load}
```

Every weight outside `model.side_branch` is that of {source}, in {dtype}. Made by `convert_llava_to_dpvr.py`; the code
in this folder runs with `trust_remote_code=True`. Use, limits and licence of the weights are those of {source}.
"""


def model_card(checkpoint: Checkpoint, summary: ConversionSummary) -> str:
    """README.md of the converted checkpoint. A folder's name stands for a source that is no Hub repository."""
    is_local = Path(checkpoint.name).is_dir()
    source = checkpoint.folder.name if is_local else checkpoint.name
    card = checkpoint.folder / "README.md"
    origin = ModelCard.load(card).data.to_dict() if card.is_file() else {}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=origin.get("license", "other"),
        license_name=origin.get("license_name"),
        license_link=origin.get("license_link"),
        base_model=None if is_local else source,
        tags=["custom_code", "dpvr", "llava"],
    )
    untrained = (
        f"**The side branch is untrained** ({summary.side_branch} initialisation): expect worse answers about images "
        f"than {source}'s until it is trained."
    )
    return CARD.format(
        front_matter=data.to_yaml().strip(),
        title=f"DPVR of {source.split('/')[-1]}",
        source=source,
        status="The side branch is trained." if summary.side_branch == "trained" else untrained,
        table="\n".join(f"| {role} | {layers} |" for role, layers in summary.roles.items()),
        share=summary.num_trainable / summary.num_parameters,
        load="\n".join(load_lines("name")).replace('"name"', "name"),
        **{name: getattr(summary, name) for name in summary.__dataclass_fields__ if name != "source"},
    )


# ---------------------------------------------------------------------------------------------- conversion


def analyzed_layer(folder: str | Path, num_layers: int) -> tuple[int, str]:
    """The saturation layer that `scripts/analyze_saturation.py` recommends in its folder of results, and why.

    Raises:
        ConversionError: there are no results, they recommend none, or are those of a decoder of another depth.
    """
    path = Path(folder) / "saturation.json"
    results = read_json(path)
    try:
        analyzed, layer = results["settings"]["num_hidden_layers"], results["recommendation"]["saturation_layer"]
        reason = results["recommendation"]["reason"]
    except (KeyError, TypeError) as error:
        raise ConversionError(f"{path} is not a result of analyze_saturation.py: it has no {error}.") from error
    if analyzed != num_layers:
        raise ConversionError(f"{path} is about a decoder of {analyzed} layers, but the source has {num_layers}.")
    if layer is None:
        raise ConversionError(f"{path} recommends no layer: {reason}")
    return layer, f"by the analysis in {folder}: {reason}"


def choose_saturation_layer(
    given: int | str | None,
    num_layers: int,
    num_fusion_layers: int,
    adapter: Path | None,
    analysis: str | Path | None = None,
) -> tuple[int, str]:
    """The saturation layer and why: the one given, for `"auto"` that of the analysis, else the adapter's, else the
    paper's proportion, 18 of 32."""
    if (given == "auto") != (analysis is not None):
        raise ConversionError(
            "--saturation-layer auto and --analysis DIR, with DIR of analyze_saturation.py, go together."
        )
    given, why = analyzed_layer(analysis, num_layers) if given == "auto" else (given, "as asked for")
    stated = adapter_saturation_layer(adapter) if adapter else None
    if given is not None and stated not in (None, given):
        raise ConversionError(f"{adapter} was trained with saturation layer {stated}, but {given} was asked for.")
    if given is not None:
        return given, why
    if stated is not None:
        return stated, "the adapter was trained there"
    layer = max(1, min(18 * num_layers // 32, num_layers - num_fusion_layers))
    return layer, f"18 of 32 layers in the paper, {layer} of {num_layers} here"


def choose_dtype(asked: str, checkpoint: Checkpoint) -> str:
    """The type asked for; for `auto` the config's, else that of the embeddings in the source."""
    fields, name = checkpoint.fields, asked
    if asked == "auto":
        text = fields.get("text_config") or {}
        stated = [part.get(key) for part in (fields, text) for key in ("dtype", "torch_dtype")]
        embeddings = checkpoint.tensors.get(EMBEDDINGS)
        stored = str(embeddings.load().dtype).removeprefix("torch.") if embeddings and not any(stated) else None
        name = next((each for each in [*stated, stored] if each), None)
    if name not in DTYPES:
        raise ConversionError(
            f"dtype {name!r} of {checkpoint.name} is none of {', '.join(DTYPES)}; choose with --dtype."
        )
    return name


def convert(
    source: str | Path,
    output: str | Path,
    *,
    saturation_layer: int | str | None = None,
    analysis: str | Path | None = None,
    num_side_layers: int = 1,
    num_fusion_layers: int = 1,
    side_branch_init: str = "identity",
    adapter: str | Path | None = None,
    vision_tower: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    seed: int = 0,
    dry_run: bool = False,
    progress: bool = False,
) -> ConversionSummary:
    """Converts the LLaVA checkpoint `source` into the DPVR checkpoint `output`.

    Args:
        source: Hub id or folder.
        output: Folder to make; it must not exist or be empty.
        saturation_layer: S; default the adapter's, else the paper's proportion, `18 * num_hidden_layers // 32`.
            `"auto"` takes what `analysis` recommends.
        analysis: Folder of results of `scripts/analyze_saturation.py`, for `saturation_layer="auto"`.
        num_side_layers: Decoder layers of the side branch.
        num_fusion_layers: Last decoder layers, which see both streams again.
        side_branch_init: `"identity"` (layer S with output projections of zero), `"copy"` (layers S, S + 1, ...) or
            `"random"` (as the backbone initialises a layer, from `seed`).
        adapter: Trained side branch, a safetensors file or a folder with one; replaces the initialisation.
        vision_tower: Hub id or folder of the CLIP tower of an original checkpoint, instead of its `mm_vision_tower`.
        tokenizer: Hub id or folder of the tokenizer, instead of the one in the source.
        dtype: `"auto"` (the source's), `"bfloat16"`, `"float16"` or `"float32"`.
        revision: Branch, tag or commit of a source on the Hub.
        seed: For `side_branch_init="random"`.
        dry_run: Check everything and write nothing.
        progress: Show a progress bar on a terminal.

    Raises:
        ConversionError: a ValueError, if source or options cannot be converted. Nothing is left behind.
    """
    output = Path(output)
    checkpoint = read_checkpoint(str(source), revision, tokenizer, vision_tower)
    check_output(output, checkpoint.folder)
    trained = adapter_file(str(adapter)) if adapter else None
    num_layers = checkpoint.config.text_config.num_hidden_layers
    layer, reason = choose_saturation_layer(saturation_layer, num_layers, num_fusion_layers, trained, analysis)
    routing = {
        "saturation_layer": layer,
        "num_side_layers": num_side_layers,
        "num_fusion_layers": num_fusion_layers,
    }
    dtype = choose_dtype(dtype, checkpoint)
    try:
        config = make_dpvr_config(checkpoint.config, routing, dtype)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    base = base_weights(checkpoint)
    branch = side_branch_weights(base, config, side_branch_init, seed)
    if trained:
        branch, side_branch_init = adapter_weights(trained, branch), "trained"
    shards = plan_shards(base, branch, DTYPES[dtype].itemsize)
    written = None if dry_run else output
    summary = summarize(checkpoint, config, shards, written, dtype, side_branch_init, reason)
    if not dry_run:
        with staged(output) as folder:
            write_folder(folder, checkpoint, config, shards, summary, progress)
    return summary


def push(folder: Path, repo: str, private: bool) -> str:
    """Uploads a converted checkpoint; the repository is made if it does not exist. Returns its address."""
    api = HfApi()
    address = api.create_repo(repo, private=private or None, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder)
    return str(address)


EXAMPLES = """\
examples:
  python convert_llava_to_dpvr.py                                            examples/tiny-llava into ./dpvr-tiny
  python convert_llava_to_dpvr.py llava-hf/llava-1.5-7b-hf dpvr-7b           from the Hub, an untrained side branch
  python convert_llava_to_dpvr.py liuhaotian/llava-v1.5-7b dpvr-7b           from the original layout
  python convert_llava_to_dpvr.py ./llava dpvr --adapter ./side-branch       with a trained side branch
  python convert_llava_to_dpvr.py ./llava dpvr --saturation-layer auto --analysis saturation
  python convert_llava_to_dpvr.py ./llava dpvr --dry-run                     only check and count
"""


def layer_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Make a DPVR checkpoint from a LLaVA-1.5 checkpoint.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", help="Hub id or folder (default: examples/tiny-llava)")
    parser.add_argument("output", nargs="?", type=Path, help="folder to make (default: dpvr-tiny, without a source)")
    parser.add_argument(
        "--saturation-layer",
        type=layer_or_auto,
        metavar="N",
        help="a layer, or auto for that of --analysis (default: the paper's proportion, 18 of 32)",
    )
    parser.add_argument("--analysis", metavar="DIR", help="results of analyze_saturation.py, for auto")
    parser.add_argument("--num-side-layers", type=int, default=1, metavar="N")
    parser.add_argument("--num-fusion-layers", type=int, default=1, metavar="N")
    parser.add_argument("--side-branch-init", choices=("identity", "copy", "random"), default="identity")
    parser.add_argument("--adapter", metavar="PATH", help="trained side branch: a .safetensors file or its folder")
    parser.add_argument("--vision-tower", metavar="NAME", help="CLIP tower of an original checkpoint, if not its own")
    parser.add_argument("--tokenizer", metavar="NAME", help="tokenizer, if not the source's")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="default: the source's")
    parser.add_argument("--revision", help="branch, tag or commit of a source on the Hub")
    parser.add_argument("--seed", type=int, default=0, help="for --side-branch-init random")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    return parser


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    repo, private = options.pop("push_to_hub"), options.pop("private")
    if options["source"] is None:
        options |= {"source": str(HERE / "examples" / "tiny-llava"), "output": Path("dpvr-tiny")}
    if options["output"] is None:
        parser.error("the following arguments are required: output")
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        summary = convert(**options, progress=True)
        print(summary)
        if repo and summary.output:
            print(f"pushed to {push(summary.output, repo, private)}")
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


if __name__ == "__main__":
    sys.exit(main())
