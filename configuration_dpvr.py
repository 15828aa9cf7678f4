# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Configuration of DPVR-LF: LLaVA's fields and three numbers that say where vision tokens leave and come back."""

from transformers import LlavaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

_MODEL = "modeling_dpvr.DPVRForConditionalGeneration"
# What each auto class loads from a checkpoint's folder, as its config.json says
AUTO_MAP = {
    "AutoConfig": "configuration_dpvr.DPVRConfig",
    "AutoProcessor": "processing_dpvr.DPVRProcessor",
    "AutoModel": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
}

# `transformers serve` looks here for the kind of a model, and finds no remote code otherwise. Nothing but the name of
# this model type is added.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["dpvr"] = "DPVRForConditionalGeneration"


# Decoders that are layers one after the other and a norm, and nothing else
BACKBONES = ("llama", "mistral", "qwen2")
ROUTING = ("saturation_layer", "num_side_layers", "num_fusion_layers")


def attention_window(text_config) -> int | None:
    """How many tokens the sliding layers of a decoder attend to; None if none slides."""
    window, kinds = getattr(text_config, "sliding_window", None), getattr(text_config, "layer_types", None)
    return window if not kinds or "sliding_attention" in kinds else None


def proportional_layer(num_layers: int, num_fusion_layers: int = 1) -> int:
    """The saturation layer at the paper's share of the depth, 18 of 32, or the last that leaves the fusion its own."""
    return max(1, min(18 * num_layers // 32, num_layers - num_fusion_layers))


class DPVRConfig(LlavaConfig):
    r"""
    Configuration of [`DPVRForConditionalGeneration`], a LLaVA whose vision tokens leave the decoder half way.

    Takes every argument of [`~transformers.LlavaConfig`] (`vision_config`, `text_config`, `image_token_id`,
    `vision_feature_layer`, ...) and:

    Args:
        saturation_layer (`int`, defaults to 18):
            S. Layers `0..S-1` of the decoder see vision and text tokens; at layer S vision tokens leave for the side
            branch. 18 of 32 is the choice of arXiv 2606.09131 (abstract) for LLaVA-1.5-7B.
        num_side_layers (`int`, defaults to 1):
            Decoder layers of the side branch; in the paper only these are trained. 0 for none: vision tokens then
            wait for the fusion layers as layer S-1 left them, which is cheaper, and what trains is the fusion layers.
        num_fusion_layers (`int`, defaults to 1):
            Last decoder layers, which see vision and text tokens again. With L decoder layers, layers
            `S..L-num_fusion_layers-1` are text-only.

    Raises:
        ValueError: unless `1 <= saturation_layer <= num_hidden_layers - num_fusion_layers <= num_hidden_layers - 1`,
            `0 <= num_side_layers <= num_hidden_layers` and the text backbone is Llama, Mistral or Qwen2. The message
            names the field, its value and the range.

    Example:

    ```python
    >>> config = DPVRConfig()  # the geometry of LLaVA-1.5-7B
    >>> config.saturation_layer, config.first_fusion_layer, config.num_text_only_layers
    (18, 31, 13)
    ```
    """

    model_type = "dpvr"

    saturation_layer: int = 18
    num_side_layers: int = 1
    num_fusion_layers: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_routing()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers, which sets keywords once a config has been made: here a routing among them is what the
        config is made with, so that a LLaVA of too few layers for the default loads with its own."""
        return super().from_dict(config_dict | {name: kwargs[name] for name in ROUTING if name in kwargs}, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """As in transformers, after a check that what is saved can be loaded."""
        self.check_routing()
        return super().save_pretrained(*args, **kwargs)

    def check_routing(self) -> None:
        """Raises ValueError as the class says. Models call it too: a config may be changed once it has been made."""
        for name in ROUTING:
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name}={getattr(self, name)!r} must be an integer.")
        if self.text_config.model_type not in BACKBONES:
            raise ValueError(
                f"text_config.model_type={self.text_config.model_type!r} is none of {', '.join(BACKBONES)}: DPVR "
                "calls the layers of a decoder one by one, and what others do between them would be left out."
            )
        num_layers = self.text_config.num_hidden_layers
        if not 1 <= self.num_fusion_layers <= num_layers - 1:
            raise ValueError(
                f"num_fusion_layers={self.num_fusion_layers} must be between 1 and {num_layers - 1} for a decoder of "
                f"{num_layers} layers (text_config.num_hidden_layers): at least one layer must come before the fusion."
            )
        if not 1 <= self.saturation_layer <= self.first_fusion_layer:
            raise ValueError(
                f"saturation_layer={self.saturation_layer} must be between 1 and {self.first_fusion_layer}, the first "
                f"fusion layer (text_config.num_hidden_layers={num_layers} less "
                f"num_fusion_layers={self.num_fusion_layers})."
            )
        if not 0 <= self.num_side_layers <= num_layers:
            raise ValueError(
                f"num_side_layers={self.num_side_layers} must be between 0 and {num_layers}, the layers of the "
                "decoder (text_config.num_hidden_layers)."
            )

    @property
    def first_fusion_layer(self) -> int:
        """F, the first layer that sees both streams again."""
        return self.text_config.num_hidden_layers - self.num_fusion_layers

    @property
    def num_text_only_layers(self) -> int:
        """F - S, the number of layers that vision tokens skip."""
        return self.first_fusion_layer - self.saturation_layer


DPVRConfig.register_for_auto_class()

__all__ = ["DPVRConfig"]
