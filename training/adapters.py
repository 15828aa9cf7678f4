# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Adapters of DPVR: standard PEFT files, `adapter_config.json` and `adapter_model.safetensors`, that hold the side
branch, the fusion layers or LoRA weights where these were trained too, and nothing else.

PEFT has no method that is called "train these modules whole". Its LN tuning is one by another name: the tuner keeps a
trainable copy of every module that it targets, whatever its kind. Aimed at the leaves of the side branch (projections
and norms), and at those of the fusion layers where they are trained whole, it does all that an adapter must:
`PeftModel.from_pretrained` and transformers' `model.load_adapter` take the file, several are switched, disabled,
merged and unmerged, no weight is cast. The alternatives fail (PEFT 0.21, transformers 5.23):

- LN tuning of `side_branch` as one module saves the adapter's name into its keys, so that it loads under no other
  name, without a word, and cannot be merged and unloaded.
- LoRA without targets is refused. LoRA aimed at PEFT's internal name of no module, with `modules_to_save`, works in
  `PeftModel`; in transformers a second adapter gives wrong outputs, adapters that were disabled stay so, and
  `save_pretrained` fails.

An adapter with LoRA is a LoRA adapter whose `modules_to_save` is the side branch, which PEFT documents. Load it with
`PeftModel` or `load_adapter` below: transformers' own `enable_adapters`, and its loading of a second one, leave the
side branch of such an adapter behind.

What an adapter was trained for (saturation layer, side and fusion layers, the decoder's shape, the base model's name
and a few of its weights) is metadata of the safetensors file: PEFT warns of fields that it does not know in
`adapter_config.json`. `load_adapter` below refuses an adapter that does not fit. PEFT's own loaders do not read it:
they refuse wrong shapes, but not another saturation layer.

Keep adapters in a repository, or a subfolder, of their own: `from_pretrained` of a repository with an
`adapter_config.json` at its root loads the base model that this names, by the base's config and code.
"""

import copy
import json
import re
import warnings
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import (
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from configuration_dpvr import ROUTING, proportional_layer
from convert_llava_to_dpvr import make_dpvr_config
from processing_dpvr import DPVRProcessor
from read_llava import check_backbone, check_geometry, check_name, convert_processor
from read_weights import FLOATS, is_finite
from scripts.output import written_whole
from side_branch_weights import SAMPLE_SIZE, branch_name, describe, find_mismatch, make_sample
from training.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterError, read_header
from training.card import RUN_FILE

ROOT = Path(__file__).resolve().parents[1]
PLAIN_FILE = "side_branch.safetensors"
# Regular expressions, because names that are listed match by their end and would hit the decoder's layers too
BRANCH_LEAVES = r"(.*\.)?side_branch\.layers\.\d+\.(.+\.)?\w*(proj|norm)"
FUSION_PROJECTIONS = r"(.*\.)?language_model\.layers\.({layers})\.(.+\.)?\w+_proj"
FUSION_LEAVES = r"(.*\.)?language_model\.layers\.({layers})\.(.+\.)?\w*(proj|norm)"
BRANCH = r"(.*\.)?side_branch(\..*)?"
WHOLE = re.compile(BRANCH_LEAVES + r"\.(weight|bias)")


# ---------------------------------------------------------------------------------------------- what is trained


def fusion_lora_config(config, r: int = 16, lora_alpha: int = 32, lora_dropout: float = 0.0) -> LoraConfig:
    """LoRA on every projection of the fusion layers of a DPVR of this config."""
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=FUSION_PROJECTIONS.format(layers=_fusion_layers(config)),
    )


def _fusion_layers(config) -> str:
    """Their numbers, as a regular expression."""
    return "|".join(map(str, range(config.first_fusion_layer, config.text_config.num_hidden_layers)))


def _whole_layers_config(config, whole_fusion: bool) -> LNTuningConfig:
    """Full copies of the side branch and, if wanted, of the fusion layers."""
    leaves = [BRANCH_LEAVES] if config.num_side_layers else []
    if whole_fusion:
        leaves.append(FUSION_LEAVES.format(layers=_fusion_layers(config)))
    return LNTuningConfig(target_modules="|".join(leaves))


def _with_side_branch(config: PeftConfig, base: PreTrainedModel) -> PeftConfig:
    """A copy of a user's config that trains the side branch, if there is one, whole and puts nothing else into it."""
    if not {"modules_to_save", "exclude_modules"} <= set(config.to_dict()):
        raise AdapterError(f"{type(config).__name__} cannot save the side branch: it takes no modules_to_save.")
    if (bias := getattr(config, "bias", "none")) != "none":
        raise AdapterError(f"bias={bias!r} trains biases of the base model itself, which must stay as it is.")
    config = copy.deepcopy(config)
    config.inference_mode = False  # as one that was read from a folder says
    if base.config.num_side_layers == 0:
        return config
    inside = [name for name, _ in base.named_modules() if ".side_branch." in name]
    for name in config.modules_to_save or []:
        if part := next((part for part in inside if part.endswith(name)), None):  # as PEFT matches
            raise AdapterError(
                f"modules_to_save={name!r} means {part} too, which is saved with the side branch. Give more of the "
                "name, such as language_model.norm."
            )
    config.modules_to_save = sorted({*(config.modules_to_save or []), "side_branch"})
    excluded = config.exclude_modules or []
    patterns = [excluded] if isinstance(excluded, str) else [rf"(.*\.)?{re.escape(name)}" for name in sorted(excluded)]
    config.exclude_modules = "|".join(f"({pattern})" for pattern in [*patterns, BRANCH])
    return config


def add_adapter(
    model: PreTrainedModel | PeftModel,
    lora: str | PeftConfig | None = None,
    name: str = "default",
    *,
    whole_fusion: bool = False,
) -> PeftModel:
    """Makes the side branch of a DPVR trainable as a new adapter, which is active, and freezes all else.

    Args:
        model: a `DPVRForConditionalGeneration`, wrapped in place, or a `PeftModel` that gets one more adapter. The
            new side branch starts as a copy of the model's own.
        lora: None for the side branch alone, `"fusion"` for LoRA of rank 16 on the fusion layers as well, or any
            config of PEFT that takes `modules_to_save`; the side branch is added to it.
        name: of the adapter.
        whole_fusion: train every weight of the fusion layers as well, instead of `lora`.

    Raises:
        AdapterError: the model is no DPVR, the name is taken, the config cannot hold a side branch, `lora` and
            `whole_fusion` are both given, or there is nothing to train.
    """
    base = _check_is_dpvr(model)
    config = base.config
    if lora is not None and whole_fusion:
        raise AdapterError("lora and whole_fusion are both given: an adapter trains either.")
    if lora is None and not whole_fusion and config.num_side_layers == 0:
        raise AdapterError(
            "The model has no side branch (num_side_layers=0), so nothing would train. Give "
            'whole_fusion=True (--whole-fusion), lora="fusion" (--lora fusion) or a config of PEFT.'
        )
    if lora is None:
        peft_config = _whole_layers_config(config, whole_fusion)
    elif lora == "fusion":
        peft_config = _with_side_branch(fusion_lora_config(config), base)
    elif isinstance(lora, PeftConfig):
        peft_config = _with_side_branch(lora, base)
    else:
        raise AdapterError(f'lora={lora!r} is neither None, "fusion" nor a config of PEFT.')
    _check_name_is_free(model, name)
    model = _inject(model, peft_config, name)
    model.set_adapter(name)
    return model


def train_in_float32(model: torch.nn.Module) -> None:
    """Casts what trains to float32: in half precision an optimizer's small steps are lost, or its epsilon, and with it
    the weights."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def _inject(model: PreTrainedModel | PeftModel, config: PeftConfig, name: str) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # LN tuning asks for a width, and uses it nowhere
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=name)
        _check_same_layers(model, config, name)
        model.add_adapter(name, config)
        return model


def _check_same_layers(model: PeftModel, config: PeftConfig, name: str) -> None:
    """Refuses full copies of other layers than those of the adapters beside them: PEFT's LN tuning, when it switches,
    wants a copy of each in each layer."""

    def layers_of(config: PeftConfig) -> set[str]:
        return {layer for layer in layers if check_target_module_exists(config, layer)}

    layers = [layer for layer, _ in model.get_base_model().named_modules()]
    for other, beside in model.peft_config.items():
        are_copies = isinstance(config, LNTuningConfig) and isinstance(beside, LNTuningConfig)
        if are_copies and (differing := layers_of(config) ^ layers_of(beside)):
            raise AdapterError(
                f"Adapters {name!r} and {other!r} cannot be on one base, for PEFT could not switch between them: of "
                f"{len(differing)} layers, such as {min(differing)}, only one of them holds a copy. Load each on a "
                "base of its own, or merge one."
            )


def _check_is_dpvr(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The DPVR in `model`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type != "dpvr":
        raise AdapterError(
            f"{type(base).__name__} (model_type {model_type!r}) is no DPVR and has no side branch. Convert LLaVA with "
            "convert_llava_to_dpvr.py, or load it with training.adapters.from_llava."
        )
    return base


def _check_name_is_free(model: PreTrainedModel | PeftModel, name: str) -> None:
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise AdapterError(
            f"The model already has an adapter {name!r} (it has: {', '.join(model.peft_config)}). Choose another "
            f"name, or remove it with model.delete_adapter({name!r})."
        )


# ---------------------------------------------------------------------------------------------- what it belongs to


def base_state(
    model: PreTrainedModel | PeftModel, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The base model's own weights by the names that they have in a checkpoint, whatever adapters surround them. They
    are those of `state_dict`, if one of `model` is given."""
    return {
        re.sub(r"\.(base_layer|original_module)(?=\.)", "", name.removeprefix("base_model.model.")): weight
        for name, weight in (state_dict or model.state_dict()).items()
        if not re.search(r"\.(ln_tuning_layers|modules_to_save|lora_\w+)\.", name)
    }


def sample_base(
    model: PreTrainedModel | PeftModel, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, list[float]]:
    """The first values of a few weights of the base model, without those that are quantized or not in memory."""
    state = base_state(model, state_dict)

    def read(name: str) -> list[float] | None:
        weight = state.get(name)
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        is_plain = type(weight) is torch.Tensor and weight.is_floating_point() and not weight.is_meta
        return weight.flatten()[:SAMPLE_SIZE].tolist() if is_plain else None

    return make_sample(read)


def check_adapter(path: Path, model: PreTrainedModel | PeftModel) -> None:
    """Compares what the file of an adapter states, and the shapes in it, with the model.

    Raises:
        AdapterError: naming the field or weight and both values.
    """
    stated, shapes = read_header(path)
    base = _check_is_dpvr(model)
    check_trained_for(path, stated, base)
    expected = {name: tuple(weight.shape) for name, weight in base_state(base).items() if ".side_branch." in name}
    stored = {name: shape for key, shape in shapes.items() if (name := branch_name(key)) and WHOLE.fullmatch(name)}
    if has_config(path) and not stored:  # of LoRA alone: what PEFT makes of it is compared with what it holds
        return
    for name in sorted(expected.keys() | stored.keys()):
        if stored.get(name) != expected.get(name):
            raise AdapterError(
                f"{path}: {name} has shape {stored.get(name)} there, but {expected.get(name)} in the model (None: it "
                "has no such weight)."
            )


def describe_training(base: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, str]:
    """What weights that were trained for `base` belong to, as metadata of their file."""
    return {**describe(base.config), "base_sample": json.dumps(sample_base(base, state_dict))}


def check_trained_for(path: Path, stated: dict[str, str], base: PreTrainedModel) -> None:
    """Compares what the metadata of a file of trained weights states, as far as it does, with the model.

    Raises:
        AdapterError: naming the field or weight and both values.
    """
    name = base.name_or_path or "the model"
    if mismatch := find_mismatch(path, stated, base.config, sample_base(base), name):
        raise AdapterError(mismatch)


# ---------------------------------------------------------------------------------------------- files


def save_adapter(
    model: PeftModel,
    folder: str | Path,
    base: str,
    name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    revision: str | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into `folder`, over those of an earlier save.

    Args:
        model: as `add_adapter` or `load_adapter` returns it. For one that is sharded over processes, pass its gathered
            `state_dict` and save in one process only.
        folder: is made if it does not exist; other files in it stay.
        base: Hub id of the base model, a DPVR or the LLaVA that `from_llava` takes; of a local folder its last name is
            kept, not its path.
        name: of the adapter in `model`. It is not saved.
        dtype: of the layers that the file holds whole; by default that of the frozen model around it.
        state_dict: of `model`.
        revision: commit of `base`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = base_name(base)
    dtype = dtype or _backbone_dtype(model)
    given = model.state_dict() if state_dict is None else state_dict
    # PEFT looks for some by the names that a state dict has, for others by those with wrappers in them
    wrapped = {plain_name(key): key for key, _ in model.named_parameters()}
    given = {**given, **{wrapped[key]: weight for key, weight in given.items() if key in wrapped}}
    weights = get_peft_model_state_dict(model, given, adapter_name=name, save_embedding_layers=False)
    if not weights:
        raise AdapterError(f"The adapter {name!r} holds no weights to save.")
    weights = {
        plain_name(key): (weight.to(dtype) if branch_name(key) or ".ln_tuning_layers." in key else weight)
        .detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for key, weight in weights.items()
    }
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode, config.auto_mapping = True, None
    config.base_model_name_or_path, config.revision = base, revision
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    metadata = {
        "format": "pt",
        **describe_training(model.get_base_model(), state_dict),
        "base_model": base,
        "base_type": getattr(model.get_base_model(), "base_type", "dpvr"),
    }
    with written_whole(folder / WEIGHTS_FILE) as weights_file, written_whole(folder / CONFIG_FILE) as config_file:
        save_file(weights, weights_file, metadata)
        config_file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        weights_file.chmod(config_file.stat().st_mode)  # safetensors makes files for the owner only


def plain_name(name: str) -> str:
    """The name of a weight without what activation checkpointing of FSDP puts into it."""
    return name.replace("_checkpoint_wrapped_module.", "")


def base_name(base: str) -> str:
    """A Hub id as it is; of a local folder the last name, not its path."""
    return Path(base).resolve().name if Path(base).is_dir() else base


def _backbone_dtype(model: PeftModel) -> torch.dtype:
    return model.get_base_model().model.language_model.norm.weight.dtype


def adapter_path(adapter: str | Path, subfolder: str | None = None, **download) -> Path:
    """The weights of an adapter: a file, the file in a folder, or a local copy of that in a Hub repository.

    Raises:
        AdapterError: there is none, or `subfolder` lies outside of the folder.
    """
    if not str(adapter):
        raise AdapterError("The adapter's name is empty; give a file, a folder or a Hub id.")  # not the current folder
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise AdapterError(f"The subfolder {subfolder!r} lies outside of {adapter}.")
    folder = Path(adapter)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        inside = f"{subfolder}/" if subfolder else ""
        patterns = [inside + file for file in (CONFIG_FILE, WEIGHTS_FILE, PLAIN_FILE, RUN_FILE)]
        try:
            folder = Path(snapshot_download(str(adapter), allow_patterns=patterns, **download))
        except (HFValidationError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise AdapterError(
                f"{adapter} is neither a file, a folder nor a Hub repository that can be read: {reason}"
            ) from error
    folder = folder / (subfolder or "")
    for file in (WEIGHTS_FILE, PLAIN_FILE):
        if (folder / file).is_file():
            return folder / file
    raise AdapterError(f"{folder} has neither {WEIGHTS_FILE} nor {PLAIN_FILE}.")


def load_adapter(
    model: PreTrainedModel | PeftModel,
    adapter: str | Path,
    name: str = "default",
    *,
    is_trainable: bool = False,
    subfolder: str | None = None,
    **download,
) -> PeftModel:
    """Adds a saved adapter to a DPVR and activates it. `set_adapter(name)` of the result switches between several.

    Args:
        model: a `DPVRForConditionalGeneration`, wrapped in place, or a `PeftModel` that gets one more adapter.
        adapter: folder, Hub id, or a safetensors file with a side branch alone, such as `side_branch.safetensors`.
        name: that the adapter gets in `model`.
        is_trainable: to train it on.
        subfolder: of folder or repository.
        download: `revision`, `token`, `cache_dir`, `local_files_only` of `huggingface_hub.snapshot_download`.

    Raises:
        AdapterError: it is not there, not an adapter, or made for another base, shape or saturation layer. The model
            is as before.
    """
    path = adapter_path(adapter, subfolder, **download)
    check_adapter(path, model)
    _check_name_is_free(model, name)
    weights = load_file(path)
    if has_config(path):
        config = read_config(path.parent)
    else:
        config = LNTuningConfig(target_modules=BRANCH_LEAVES)
        weights = {_tuned(branch_name(key)): weight for key, weight in weights.items()}
    config.inference_mode = not is_trainable
    was_adapted = isinstance(model, PeftModel)
    try:
        model = _inject(model, config, name)
    except AdapterError:
        raise
    except (re.error, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # fields of any type
        raise AdapterError(f"PEFT cannot apply {path.parent / CONFIG_FILE} to this model: {error}") from error
    try:
        _set_weights(model, weights, name, path)
    except BaseException:
        model.delete_adapter(name) if was_adapted else model.unload()
        raise
    model.set_adapter(name, inference_mode=not is_trainable)
    return model if is_trainable else model.eval()


def has_config(path: Path) -> bool:
    """Whether PEFT says how the weights `path` apply, else they are a side branch alone."""
    return path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).is_file()


def read_config(folder: Path) -> PeftConfig:
    """
    Raises:
        AdapterError: there is none, or it is broken.
    """
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # fields of any type
        what = f"{type(error).__name__}: {error}"
        raise AdapterError(f"{folder / CONFIG_FILE} is no config that PEFT can read: {what}") from error


def _set_weights(model: PeftModel, weights: dict[str, torch.Tensor], name: str, path: Path) -> None:
    """Not by `PeftModel.from_pretrained`, which takes a base apart that is partly offloaded to disk, and writes its
    weights to disk once more."""
    offloaded = [key for key, weight in model.named_parameters() if weight.is_meta and f".{name}." in key]
    if offloaded:
        raise AdapterError(
            f"{path}: {offloaded[0]} belongs to a layer that is offloaded. Load the base with that layer on a device."
        )
    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights = {key: weight for key, weight in weights.items() if ".base_layer." not in key}  # PEFT saves embeddings so
    # Before any is set: PEFT, as it takes an adapter off, leaves the full copies that it kept
    if unknown := weights.keys() - wanted.keys():
        raise AdapterError(f"{path}: the model has no place for {', '.join(sorted(unknown))}.")
    if missing := wanted.keys() - weights.keys():
        raise AdapterError(f"{path} lacks {', '.join(sorted(missing))}.")
    for key, weight in weights.items():
        if weight.shape != wanted[key].shape:
            shapes = f"shape {tuple(weight.shape)} there, but {tuple(wanted[key].shape)} in the model"
            raise AdapterError(f"{path} does not fit the model: {key} has {shapes}.")
        if weight.dtype not in FLOATS.values():  # torch would cast it, without a word
            raise AdapterError(f"{path}: {key} has dtype {weight.dtype}, but weights have one of {', '.join(FLOATS)}.")
        if not is_finite(weight):
            raise AdapterError(f"{path}: {key} holds NaN or infinite values: its training has diverged. Train anew.")
    set_peft_model_state_dict(model, weights, adapter_name=name)


def _tuned(name: str) -> str:
    """What an adapter of the side branch alone calls the weight `name` of a checkpoint."""
    module, _, weight = name.rpartition(".")
    return f"base_model.model.{module}.ln_tuning_layers.{weight}"


def merge_adapter(model: PeftModel, name: str | None = None) -> PreTrainedModel:
    """The DPVR with an adapter merged in, the active one by default. `save_pretrained` of it writes an ordinary
    checkpoint that loads without PEFT. `model` is taken apart; its other adapters are gone."""
    dtype = _backbone_dtype(model)
    if name is not None:
        model.set_adapter(name, inference_mode=True)
    config = model.peft_config[model.active_adapter]
    kind, replaced = type(config).__name__, tuple(getattr(config, "modules_to_save", None) or ())
    try:
        merged = model.merge_and_unload()
    except AttributeError as error:  # of tuners whose merging forgets modules_to_save
        raise AdapterError(
            f"PEFT cannot merge a {kind} beside a side branch. Use load_adapter, without merging."
        ) from error
    merged.model.side_branch.to(dtype)
    parts = list(merged.model.language_model.layers[merged.config.first_fusion_layer :])
    parts += [part for key, part in merged.named_modules() if key.endswith(replaced)]
    for part in parts:
        for weight in part.parameters():
            if weight.dtype == torch.float32:  # in which an adapter is trained; quantized weights stay as they are
                weight.data = weight.data.to(dtype)
    return merged


# ---------------------------------------------------------------------------------------------- LLaVA as the base


def from_llava(
    llava: str | Path,
    adapter: str | Path | None = None,
    saturation_layer: int | None = None,
    *,
    adapter_kwargs: dict | None = None,
    **kwargs,
) -> PreTrainedModel:
    """A DPVR whose frozen weights are read from a LLaVA checkpoint as they are: no conversion, no copy on disk.

    Args:
        llava: Hub id or folder of a checkpoint in the layout of llava-hf, with weights named by transformers 4 or 5.
        adapter: Hub id or folder of an adapter, merged into the model. Without, the side branch is the identity; use
            `load_adapter` on the result to switch between several.
        saturation_layer: S; by default the adapter's, without one the paper's proportion, 18 of 32.
        adapter_kwargs: `subfolder`, `revision`, `token`, ... of the adapter.
        kwargs: of `from_pretrained`: `dtype` (default `"auto"`), `device_map`, `revision`, `token`, ...

    Raises:
        AdapterError: the checkpoint is not of this layout or lacks weights, or the adapter does not fit it.
        ConversionError: DPVR takes no such backbone or vision tower.

    Example:

    ```python
    >>> model = from_llava("llava-hf/llava-1.5-7b-hf", adapter="user/dpvr-adapter", device_map="auto")
    >>> processor = processor_from_llava("llava-hf/llava-1.5-7b-hf")
    ```
    """
    config = _llava_config(llava, **kwargs)
    path = None if adapter is None else adapter_path(adapter, **(adapter_kwargs or {}))
    routing = _choose_routing(path, saturation_layer, config.text_config.num_hidden_layers)
    dpvr_class = get_class_from_dynamic_module("modeling_dpvr.DPVRForConditionalGeneration", str(ROOT))
    config = dpvr_class.config_class(**make_dpvr_config(config, routing).to_dict())
    reported = dpvr_class._keys_to_ignore_on_load_missing
    dpvr_class._keys_to_ignore_on_load_missing = [r"\.side_branch\."]  # no fault of the checkpoint, and no news
    try:
        kwargs = {"dtype": "auto", **kwargs, "output_loading_info": True}
        model, loaded = dpvr_class.from_pretrained(llava, config=config, **kwargs)
    finally:
        dpvr_class._keys_to_ignore_on_load_missing = reported
    refuse_missing(loaded, llava)
    model.eval()
    model.base_type = "llava"  # of which an adapter's card says how to load it
    return model if path is None else merge_adapter(load_adapter(model, path))


def refuse_missing(loaded: dict, name: str | Path) -> None:
    """Refuses a model of which some weights were not in the checkpoint `name`, from what `from_pretrained` tells of
    its loading: transformers makes them up."""
    if missing := sorted(loaded["missing_keys"]):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise AdapterError(f"{name} lacks {missing[0]}{others}: it is no whole checkpoint.")


def _choose_routing(adapter: Path | None, saturation_layer: int | None, num_layers: int) -> dict[str, int]:
    """The routing that an adapter was trained for; what it does not state, or no adapter does, as the converter has
    it."""
    stated = read_header(adapter)[0] if adapter else {}
    for name in ROUTING:
        if not stated.get(name, "1").isdecimal():
            raise AdapterError(f"{adapter} states {name}={stated[name]!r:.80}, which is no number of layers.")
    routing = {name: int(stated.get(name, 1)) for name in ROUTING}
    trained = stated.get("saturation_layer")
    if None not in (trained, saturation_layer) and int(trained) != saturation_layer:
        raise AdapterError(
            f"{adapter} was trained for saturation_layer={trained}, but {saturation_layer} was asked for."
        )
    if trained is None and saturation_layer is None:
        saturation_layer = proportional_layer(num_layers, routing["num_fusion_layers"])
    return routing | {"saturation_layer": saturation_layer if trained is None else int(trained)}


def processor_from_llava(llava: str | Path, **kwargs) -> DPVRProcessor:
    """The processor for `from_llava`, as the converter makes it: LLaVA-1.5's own padding and conversation, or the chat
    template of a checkpoint that has one of its own. `kwargs` are those of `from_pretrained`: `revision`, ..."""
    config = _llava_config(llava, **kwargs)
    processor = AutoProcessor.from_pretrained(llava, **kwargs)
    return convert_processor(config, processor)


def _llava_config(llava: str | Path, **kwargs) -> LlavaConfig:
    check_name(llava)
    download = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    # Not by AutoConfig, which asks whether to trust the code that a checkpoint brings
    fields = LlavaConfig.get_config_dict(llava, **download)[0]
    model_type = fields.get("model_type")
    if model_type == "dpvr":
        raise AdapterError(
            f"{llava} is a DPVR already: load model and processor with AutoModel and AutoProcessor.from_pretrained"
            "(..., trust_remote_code=True), and an adapter with training.adapters.load_adapter."
        )
    if "mm_vision_tower" in fields:  # of liuhaotian/llava-v1.5-7b, whose model_type is llava-hf's
        raise AdapterError(f"{llava} has the original layout. Convert it with convert_llava_to_dpvr.py.")
    if model_type != "llava":
        raise AdapterError(
            f"{llava} has model_type {model_type!r}, but a checkpoint in the layout of llava-hf ('llava') is wanted. "
            "Convert the original layout with convert_llava_to_dpvr.py."
        )
    config = LlavaConfig.from_pretrained(llava, **download)
    check_backbone(config, Path(llava) / "config.json")
    check_geometry(config, Path(llava) / "config.json")
    return config
