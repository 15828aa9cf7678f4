# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The weights of the side branch: untrained, made from the layers of the backbone, or a trained adapter."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from configuration_dpvr import ROUTING, DPVRConfig
from read_weights import ConversionError, MadeTensor, StoredTensor, Weight, check_dtype, read_safetensors

SHAPE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
# A base model is known by the first values of these: small, trained in every LLaVA, and rounded by no quantization
SAMPLED = (
    "model.multi_modal_projector.linear_1.weight",
    "model.multi_modal_projector.linear_2.weight",
    "model.multi_modal_projector.linear_1.bias",
    "model.language_model.norm.weight",
)
SAMPLE_SIZE = 8
SAMPLE_TOLERANCE = 0.01  # relative; bfloat16 and float16 round by less than 0.5 %


# ---------------------------------------------------------------------------------------------- untrained


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
            made, shape = origin.source, origin.shape
            if init == "identity" and part.startswith(("self_attn.o_proj.", "mlp.down_proj.")):
                made = MadeTensor("zeros", partial(torch.zeros, shape))  # both residual sums then add nothing
            elif init == "random" and part.endswith("norm.weight"):
                made = MadeTensor("ones", partial(torch.ones, shape))
            elif init == "random" and part.endswith(".bias"):
                made = MadeTensor("zeros", partial(torch.zeros, shape))
            elif init == "random":
                drawn = seed + len(weights)
                made = MadeTensor(f"normal of {std}, seed {drawn}", partial(_normal, shape, std, drawn))
            weights.append(Weight(f"model.side_branch.layers.{i}.{part}", shape, made))
    return weights


# ---------------------------------------------------------------------------------------------- what it belongs to


def describe(config: DPVRConfig) -> dict[str, str]:
    """Routing and decoder shape, as the metadata of trained weights state them."""
    text = config.text_config
    return {
        **{name: str(getattr(config, name)) for name in ROUTING},
        **{f"text_config.{name}": str(getattr(text, name)) for name in SHAPE if hasattr(text, name)},
    }


def make_sample(read: Callable[[str], list[float] | None]) -> dict[str, list[float]]:
    """The first values of a few weights of a base model, as metadata state them. `read` gives the values of a weight
    by its name, or None."""
    values = {name: read(name) for name in SAMPLED}
    return {name: [float(f"{value:.6g}") for value in numbers] for name, numbers in values.items() if numbers}


def differing_field(stated: dict[str, str], config: DPVRConfig) -> tuple[str, str, str] | None:
    """The first field of `describe` that metadata state otherwise, with their value and the model's."""
    for field, value in describe(config).items():
        if stated.get(field, value) != value:
            return field, stated[field], value
    return None


def find_mismatch(
    path: Path, stated: dict[str, str], config: DPVRConfig, sample: dict[str, list[float]], base: str
) -> str | None:
    """Compares what the metadata of a file of trained weights states, as far as it does, with the model called `base`.
    Returns a sentence that names the first field or weight that differs and both values, or None."""
    if differing := differing_field(stated, config):
        field, there, value = differing
        return (
            f"{path} was trained for {field}={there}, but the model has {field}={value}. Take the model that it was "
            "trained for, or train anew for this one."
        )
    try:
        there = json.loads(stated.get("base_sample", "{}"))
        for name, values in sample.items():
            for i, (ours, theirs) in enumerate(zip(values, there.get(name, []), strict=False)):
                if abs(ours - theirs) > SAMPLE_TOLERANCE * max(abs(ours), abs(theirs)) + 1e-6:
                    return (
                        f"{path} was trained on {stated.get('base_model', 'another base')}, but {base} has other "
                        f"weights: value {i} of {name} is {ours:g}, there it was {theirs:g}."
                    )
    except (AttributeError, TypeError, ValueError):
        return f"{path} states a base_sample that is no sample of weights: {stated['base_sample']:.80}"
    return None


# ---------------------------------------------------------------------------------------------- trained


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
    """The saturation layer that an adapter was trained at, if its metadata states it."""
    stated = read_safetensors(path)[1].get("saturation_layer")
    if stated is not None and not re.fullmatch(r"[0-9]{1,9}", stated):
        raise ConversionError(f"{path} states a saturation layer {stated!r}, which is no number.")
    return None if stated is None else int(stated)


def check_adapter_fits(path: Path, config: DPVRConfig, base: list[Weight], name: str) -> None:
    """Refuses an adapter of another routing, decoder or base than the one called `name`.

    Raises:
        ConversionError: naming the field or weight and both values.
    """
    sources = {weight.name: weight.source for weight in base if isinstance(weight.source, StoredTensor)}

    def read(weight: str) -> list[float] | None:
        return next(sources[weight].pieces())[:SAMPLE_SIZE].tolist() if weight in sources else None

    stated = read_safetensors(path)[1]
    field, there, value = differing_field(stated, config) or ("", "", "")
    if field in ("num_side_layers", "num_fusion_layers"):
        raise ConversionError(
            f"{path} was trained for {field}={there:.20}, but the model has {field}={value}. Convert with "
            f"--{field.replace('_', '-')} {there:.20}."
        )
    if mismatch := find_mismatch(path, stated, config, make_sample(read), name):
        raise ConversionError(mismatch)


def branch_name(key: str) -> str | None:
    """The name in a checkpoint of a side-branch weight that an adapter calls `key`; None if it is none of these."""
    match = re.search(r"(?:^|\.)(side_branch\.layers\.\d+\..+)$", key)
    # PEFT's LN tuning, which keeps a copy of each module, names its copies by the tuner
    return "model." + match[1].replace(".ln_tuning_layers.", ".") if match else None


def adapter_weights(path: Path, untrained: list[Weight]) -> list[Weight]:
    """The trained side branch of `path`, checked against the names and shapes of `untrained`."""
    expected = {weight.name: weight.shape for weight in untrained}
    stored: dict[str, StoredTensor] = {}
    for key, tensor in read_safetensors(path)[0].items():
        shape = tensor.shape
        name = branch_name(key)
        if ".lora_" in key or (not name and ".ln_tuning_layers." in key):
            raise ConversionError(
                f"{key} in {path} changes a layer of the base, beside a side branch. Merge it into a checkpoint "
                "instead: python scripts/merge_adapter.py BASE ADAPTER OUTPUT"
            )
        if name not in expected:
            layers = len({weight.name.split(".")[3] for weight in untrained})
            raise ConversionError(
                f"{key} in {path}, of shape {shape}, is no weight of a side branch of {layers} layer(s)."
            )
        if shape != expected[name]:
            raise ConversionError(f"{key} in {path} has shape {shape}, but by the config it has {expected[name]}.")
        check_dtype(tensor)
        if name in stored:
            raise ConversionError(f"Duplicate weight {name}: {stored[name].key} and {key}, both in {path}.")
        stored[name] = tensor
    for name in expected.keys() - stored.keys():
        raise ConversionError(f"Missing weight {name} of shape {expected[name]}: {path} does not have it.")
    return [Weight(name, shape, stored[name]) for name, shape in expected.items()]
