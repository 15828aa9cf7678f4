"""Transformers' own tests of LLaVA and its tester of vision-language models, run on DPVR and beside it on LLaVA.

Not part of the suite here: `scripts/run_transformers_tests.py` runs it in a checkout of transformers, from which all
tests are inherited. Classes pair by name: what `Llava...` passes, `DPVR...` must pass.
"""

import unittest
from pathlib import Path

import torch
from tests.models.llava import test_modeling_llava as llava  # of the checkout, as is the next
from tests.vlm_tester import VLMModelTest, VLMModelTester
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto as auto

ROOT = Path(__file__).resolve().parent.parent
DPVRConfig = get_class_from_dynamic_module("configuration_dpvr.DPVRConfig", str(ROOT))
DPVRModel = get_class_from_dynamic_module("modeling_dpvr.DPVRModel", str(ROOT))
DPVRForConditionalGeneration = get_class_from_dynamic_module("modeling_dpvr.DPVRForConditionalGeneration", str(ROOT))

# What the tests look up of every model that is part of transformers: which class has no head and which takes labels
AutoConfig.register("dpvr", DPVRConfig)
AutoModel.register(DPVRConfig, DPVRModel)
auto.MODEL_MAPPING_NAMES["dpvr"] = DPVRModel.__name__
auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["dpvr"] = DPVRForConditionalGeneration.__name__

NUM_LAYERS, SATURATION_LAYER = 4, 2


class DPVRTests:
    """What both pairs change for DPVR. Beside it the tests run as they are."""

    # Without a copyright year in the file they would leave this one out
    test_can_init_all_missing_weights_before_2023 = True

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        """The hook for caches of a kind of their own: a layer holds the tokens that pass it, and no others."""
        num_vision = self.model_tester.num_image_tokens
        joint, text, vision = seq_length, seq_length - num_vision, num_vision
        if past_key_values.is_compileable:  # static: all layers are allocated at one length
            text = vision = joint
        heads = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        layers = [joint, joint, text, joint, vision]  # layers 0 to 3 and the side branch's
        shapes = [(heads[0], length, heads[1]) for length in layers] + [(1, text, 1), (1, vision, 1)]
        assert config.num_hidden_layers == NUM_LAYERS
        found = [tuple(layer.keys.shape) for layer in past_key_values.layers]
        assert found == [(batch_size, *shape) for shape in shapes]

    def test_num_layers_is_small(self):
        self.skipTest("Four layers, not two: of two, one would be joint and one fusion, and none text-only.")

    def test_generate_with_quant_cache(self):
        self.skipTest(
            "It wants every layer of the cache quantized. Which token a slot holds cannot be rounded, so those layers "
            "are whole. tests/test_scaling.py compares the tokens with LLaVA's."
        )


class LlavaForConditionalGenerationModelTest(llava.LlavaForConditionalGenerationModelTest):
    pass


class DPVRModelTester(llava.LlavaVisionText2TextModelTester):
    def __init__(self, parent):
        super().__init__(parent)
        self.text_config = {**self.text_config, "num_hidden_layers": NUM_LAYERS}
        self.num_hidden_layers = NUM_LAYERS

    def get_config(self):
        return DPVRConfig(saturation_layer=SATURATION_LAYER, **super().get_config().to_diff_dict())


class DPVRForConditionalGenerationModelTest(DPVRTests, llava.LlavaForConditionalGenerationModelTest):
    all_model_classes = (DPVRModel, DPVRForConditionalGeneration)
    pipeline_model_mapping = dict.fromkeys(
        llava.LlavaForConditionalGenerationModelTest.pipeline_model_mapping, DPVRForConditionalGeneration
    )

    def setUp(self):
        super().setUp()
        self.model_tester = DPVRModelTester(self)
        self.config_tester.config_class = DPVRConfig


class LlavaVLMTester(VLMModelTester):
    base_model_class = LlavaModel
    config_class = LlavaConfig
    text_config_class = LlamaConfig
    vision_config_class = CLIPVisionConfig
    conditional_generation_class = LlavaForConditionalGeneration

    def create_attention_mask(self, input_ids):
        # The hook's default, a triangle over batch and tokens, would declare all text of the batch padding
        return torch.ones_like(input_ids)


class LlavaVLMTest(VLMModelTest, unittest.TestCase):
    model_tester_class = LlavaVLMTester


class DPVRVLMTester(LlavaVLMTester):
    base_model_class = DPVRModel
    config_class = DPVRConfig
    conditional_generation_class = DPVRForConditionalGeneration

    def __init__(self, parent):
        super().__init__(parent, num_hidden_layers=NUM_LAYERS, saturation_layer=SATURATION_LAYER)


class DPVRVLMTest(DPVRTests, VLMModelTest, unittest.TestCase):
    model_tester_class = DPVRVLMTester


del llava, VLMModelTest
