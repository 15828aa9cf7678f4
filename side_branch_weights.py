# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The weights of the side branch: untrained, made from the layers of the backbone, or a trained adapter."""

import re
from functools import partial
from pathlib import Path

import torch

from configuration_dpvr import DPVRConfig
from read_weights import ConversionError, MadeTensor, StoredTensor, Weight, check_dtype, read_json, read_safetensors


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
    stated = read_safetensors(path)[1].get("saturation_layer")
    if stated is None and (path.parent / "adapter_config.json").is_file():
        stated = read_json(path.parent / "adapter_config.json").get("saturation_layer")
    if stated is not None and not re.fullmatch(r"[0-9]{1,9}", str(stated)):
        raise ConversionError(f"{path} states a saturation layer {stated!r}, which is no number.")
    return None if stated is None else int(stated)


def adapter_weights(path: Path, untrained: list[Weight]) -> list[Weight]:
    """The trained side branch of `path`, checked against the names and shapes of `untrained`."""
    expected = {weight.name: weight.shape for weight in untrained}
    stored: dict[str, StoredTensor] = {}
    for key, tensor in read_safetensors(path)[0].items():
        shape = tensor.shape
        match = re.search(r"(?:^|\.)side_branch\.layers\.\d+\..+$", key)
        # PEFT's LN tuning, which keeps a copy of each module, names its copies by the tuner
        name = "model." + match[0].lstrip(".").replace(".ln_tuning_layers.", ".") if match else key
        if ".lora_" in key or (not match and ".ln_tuning_layers." in key):
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
