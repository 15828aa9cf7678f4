# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The saturation analysis: its metrics against slow direct computations, its rule, its command, and who reads it."""

import dataclasses
import fcntl
import itertools
import json
import math
import re
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from conftest import ROOT, files_of_at_most
from PIL import Image
from processes import start_script
from tiny import IMAGE, NUM_LAYERS, TOKENS_PER_IMAGE, make_batch, make_dpvr, make_llava, text_config, vision_config
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig, Qwen2Config

sys.path.insert(0, str(ROOT / "examples"))

from convert_llava_to_dpvr import ConversionError, convert
from convert_llava_to_dpvr import main as convert_main
from scripts import analyze_saturation as analysis
from scripts import saturation_metrics as metrics
from scripts import saturation_report as report
from scripts import saturation_rule as rule

FUSION = NUM_LAYERS - 1
BACKBONES = {"llama": text_config, "mistral": MistralConfig, "qwen2": Qwen2Config}


def make_prompt(row="ttItttt", seed=0, answer=0):
    """A random prompt; its last `answer` tokens are the answer."""
    batch = make_batch([row], seed=seed)
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
    ids = batch["input_ids"][0]
    return metrics.Prompt(inputs, ids == IMAGE, len(ids) - answer)


def backbone(name):
    return text_config() if name == "llama" else text_config(BACKBONES[name], sliding_window=None)


# ------------------------------------------------------------------------------------- the slow, direct computations


class Slow:
    """All metrics of a LLaVA from the definitions, with the oracle's layers: every token in every layer, masks for
    what is not seen, no cache, no hook, float64 where it is not a layer."""

    @torch.no_grad()
    def __init__(self, model, prompt):
        self.config, self.text = model.config, model.config.text_config
        self.weights = {name: weight.detach().float() for name, weight in model.state_dict().items()}
        self.vision, self.prompt = prompt.is_vision, prompt
        x = self.weights["model.language_model.embed_tokens.weight"][prompt.inputs["input_ids"][0]].clone()
        features = model.model.get_image_features(prompt.inputs["pixel_values"], return_dict=True).pooler_output
        x[self.vision] = torch.cat(list(features))
        self.causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        self.blind = self.causal & ~self.vision  # no one sees vision
        self.states = [x]
        for layer in range(NUM_LAYERS):
            self.states.append(self.layers(self.states[-1], layer, layer + 1, self.causal))
        self.reference = self.distributions(self.states[-1])

    def layers(self, x, first, end, visible):
        for layer in range(first, end):
            prefix = f"model.language_model.layers.{layer}."
            x = oracle.decoder_layer(x, self.weights, prefix, self.text, visible)
        return x

    def distributions(self, x):
        x = oracle.rms_norm(x, self.weights["model.language_model.norm.weight"], self.text.rms_norm_eps)
        logits = (x @ self.weights["lm_head.weight"].T).double()
        first, end = self.prompt.length - 1, max(self.prompt.length, len(x) - 1)
        return logits[first:end].softmax(-1)

    def kl(self, x):
        total = 0.0
        for p, q in zip(self.distributions(x), self.reference, strict=True):
            total += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
        return total / len(self.reference)

    def contribution(self, layer):
        x = torch.where(self.vision[:, None], self.states[layer], self.states[layer + 1])
        return self.kl(self.layers(x, layer + 1, NUM_LAYERS, self.causal))

    def withdrawal(self, layer):
        return self.kl(self.layers(self.states[layer], layer, NUM_LAYERS, self.blind))

    def routing(self, layer):
        if not 1 <= layer <= FUSION:
            return None
        x = self.layers(self.states[layer], layer, FUSION, self.blind)
        x = torch.where(self.vision[:, None], self.states[layer], x)
        return self.kl(self.layers(x, FUSION, NUM_LAYERS, self.causal))

    def mean(self, value, tokens, *layers):
        """Mean of `value` over tokens, of numpy vectors in float64."""
        rows = [self.states[layer][tokens].double().numpy() for layer in layers]
        return np.mean([value(*vectors) for vectors in zip(*rows, strict=True)])

    def hidden(self):
        def cosine(a, b):
            return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

        curves = {}
        for name, tokens in (("vision", self.vision), ("text", self.prompt.queries)):
            layers = range(NUM_LAYERS)
            curves[f"cosine_next_{name}"] = [self.mean(cosine, tokens, i, i + 1) for i in layers]
            curves[f"cosine_last_{name}"] = [self.mean(cosine, tokens, i, NUM_LAYERS) for i in layers]
            curves[f"curvature_{name}"] = [None] + [
                self.mean(lambda a, b, c: math.acos(cosine(c - b, b - a)), tokens, i - 1, i, i + 1) for i in layers[1:]
            ]
        return curves

    def attention(self, model):
        """From eager attention of the whole model, all of it kept, in plain loops."""
        model.set_attn_implementation("eager")
        with torch.no_grad():
            kept = model(**self.prompt.inputs, output_attentions=True).attentions
        return attention_by_loops(kept, self.vision.tolist(), self.prompt.length)


def attention_by_loops(attentions, is_vision, length):
    """Attention metrics from maps `(1, H, T, T)` of every layer; `length` tokens are the prompt."""
    last_image = max(i for i, vision in enumerate(is_vision) if vision)
    kinds = [
        "image" if vision else "system" if i < last_image else "instruction" for i, vision in enumerate(is_vision)
    ]
    curves = {"attention": [], **{f"efficiency_{kind}": [] for kind in metrics.KINDS}}
    for attention in attentions:
        heads, queries = range(attention.shape[1]), range(last_image + 1, length)
        masses = np.zeros((len(heads), len(queries)))
        shares = {kind: [] for kind in metrics.KINDS}
        for h in heads:
            for i, q in enumerate(queries):
                received = {kind: [] for kind in metrics.KINDS}
                for k in range(q + 1):
                    received[kinds[k]].append(float(attention[0, h, q, k]))
                masses[h, i] = sum(received["image"])
                for kind in metrics.KINDS:
                    shares[kind].append(sum(received[kind]) / len(received[kind]))
        curves["attention"].append(masses.mean())
        for kind in metrics.KINDS:
            curves[f"efficiency_{kind}"].append(np.mean(shares[kind]))
    return curves


def assert_close(found, expected, tolerance=1e-5):
    assert [x is None for x in found] == [x is None for x in expected]
    for layer, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one is None or abs(one - other) < tolerance * max(1, abs(other)), (layer, one, other)


# ---------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_metric_is_that_of_a_slow_direct_computation(name, implementation):
    model, prompt = make_llava(text=backbone(name)), make_prompt()
    model.set_attn_implementation(implementation)
    row, maps = metrics.measure(model, prompt)
    slow = Slow(model, prompt)
    layers = range(NUM_LAYERS)
    expected = slow.attention(model) | slow.hidden()
    expected |= {kl: [getattr(slow, kl)(i) for i in layers] for kl in ("contribution", "withdrawal", "routing")}
    assert row.keys() == expected.keys() | {"uniform_attention"}
    for metric, values in expected.items():
        assert_close(row[metric], values)
    assert max(row["withdrawal"]) > 0.1  # the image matters to this random model, else this test would show little
    assert row["contribution"][-1] == 0
    assert row["routing"][FUSION] == 0
    assert maps.shape == (NUM_LAYERS, TOKENS_PER_IMAGE)


@pytest.mark.parametrize("row", ["Itt", "ttIItt", "ttIttItttt"])
def test_an_image_first_and_several_images_are_measured_as_directly(row):
    model, prompt = make_llava(seed=3), make_prompt(row, seed=3)
    found, _ = metrics.measure(model, prompt)
    slow = Slow(model, prompt)
    for kl in ("contribution", "withdrawal", "routing"):
        assert_close(found[kl], [getattr(slow, kl)(i) for i in range(NUM_LAYERS)])
    if row != "Itt":  # the loops divide by the number of system tokens
        for metric, values in slow.attention(model).items():
            assert_close(found[metric], values)


def test_with_an_answer_kl_is_the_mean_over_its_tokens_and_attention_that_of_the_prompt():
    model, prompt = make_llava(), make_prompt("ttItttttt", answer=3)
    assert prompt.read.tolist() == [prompt.length - 1 + i for i in range(3)]
    found, _ = metrics.measure(model, prompt)
    slow = Slow(model, prompt)
    for kl in ("contribution", "withdrawal", "routing"):
        assert_close(found[kl], [getattr(slow, kl)(i) for i in range(NUM_LAYERS)])
    assert_close(found["attention"], slow.attention(model)["attention"])


def test_the_map_is_the_attention_of_the_prompts_last_token():
    model, prompt = make_llava(), make_prompt("ttIttttt", answer=2)
    _, maps = metrics.measure(model, prompt, ["attention"])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**prompt.inputs, output_attentions=True).attentions
    expected = torch.stack([x[0, :, prompt.length - 1, prompt.is_vision].mean(0) for x in attentions])
    torch.testing.assert_close(maps, expected, atol=1e-6, rtol=0)


def set_attention(model, scores):
    """Makes each token pay e^score times the attention of a text token to a vision token, in every head, and states
    stay as they are: the query is constant, the key holds the score of its layer where the token is an image."""
    text = model.config.text_config
    head, pair = text.head_dim, text.head_dim // 2 - 1  # the pair of dimensions that rotates least
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 0
        projector = model.model.multi_modal_projector.linear_2
        projector.weight.zero_()
        projector.bias.zero_()
        projector.bias[0] = 1
        normed = 1 / math.sqrt(1 / text.hidden_size + text.rms_norm_eps)  # of the feature (1, 0, ..., 0)
        for layer, score in zip(model.model.language_model.layers, scores, strict=True):
            attention = layer.self_attn
            for linear in (attention.q_proj, attention.k_proj, attention.o_proj):
                linear.weight.zero_()
                linear.bias.zero_()
            layer.mlp.down_proj.weight.zero_()
            attention.q_proj.bias[pair::head] = 1
            attention.k_proj.weight[pair::head, 0] = score * math.sqrt(head) / normed
    return model


@pytest.mark.parametrize("scores", [[0.0] * NUM_LAYERS, [3.0, 2.0, 0.0, -1.0, -4.0, -9.0]], ids=["uniform", "falling"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_known_in_closed_form_is_measured_exactly(scores, implementation):
    config = text_config(attention_bias=True, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e12})
    model, prompt = set_attention(make_llava(text=config), scores), make_prompt("ttttItttttt")
    model.set_attn_implementation(implementation)
    row, maps = metrics.measure(model, prompt)
    n = TOKENS_PER_IMAGE
    for layer, score in enumerate(scores):
        masses = [n * math.exp(score) / (n * math.exp(score) + int(q) + 1 - n) for q in prompt.queries]
        assert row["attention"][layer] == pytest.approx(np.mean(masses), abs=1e-6)
        assert maps[layer].tolist() == pytest.approx([masses[-1] / n] * n, abs=1e-6)
    assert row["cosine_next_vision"] == pytest.approx([1] * NUM_LAYERS)
    if not any(scores):
        assert row["attention"] == pytest.approx([row["uniform_attention"]] * NUM_LAYERS, abs=1e-6)
    # No attention reaches any state, so the answer loses nothing
    assert row["withdrawal"] == [0] * NUM_LAYERS


def test_sdpa_and_eager_give_the_same_results():
    model, prompt = make_llava(), make_prompt()
    rows = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        rows.append(metrics.measure(model, prompt)[0])
    for name, values in rows[0].items():
        if isinstance(values, list):
            assert_close(values, rows[1][name])


def test_attention_is_reduced_in_chunks_of_queries_and_measuring_leaves_the_model_as_it_was(monkeypatch):
    model, prompt = make_llava(), make_prompt("ttItttttttttt")
    whole, whole_maps = metrics.measure(model, prompt)
    shapes, rows = [], metrics.attention_rows

    def watched(*arguments):
        weights = rows(*arguments)
        shapes.append(tuple(weights.shape))
        return weights

    monkeypatch.setattr(metrics, "attention_rows", watched)
    monkeypatch.setattr(metrics.AttentionRecorder.__init__, "__defaults__", (3,))
    chunked, maps = metrics.measure(model, prompt)
    length, num_queries = len(prompt.is_vision), len(prompt.queries)
    assert shapes == [(4, n, length) for _ in range(NUM_LAYERS) for n in [3] * (num_queries // 3) + [num_queries % 3]]
    for name, values in whole.items():
        if isinstance(values, list):
            assert_close(chunked[name], values, 1e-6)
    torch.testing.assert_close(maps, whole_maps)

    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(metrics, "attention_rows", broken)
    with pytest.raises(RuntimeError, match="broken"):
        metrics.measure(model, prompt)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert "measured_sdpa" not in metrics.ALL_ATTENTION_FUNCTIONS  # which would keep the model in memory
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.language_model.layers)


def test_half_precision_is_measured_in_float32():
    model, prompt = make_llava(), make_prompt()
    exact, _ = metrics.measure(model, prompt, ["attention", "hidden"])
    prompt.inputs["pixel_values"] = prompt.inputs["pixel_values"].bfloat16()
    half, _ = metrics.measure(model.bfloat16(), prompt, ["attention", "hidden"])
    for name in ("attention", "cosine_next_vision", "curvature_text"):
        assert_close(half[name], exact[name], 0.05)


def test_only_the_layers_asked_for_cost_a_pass():
    model, prompt, calls = make_llava(), make_prompt(), []
    row, _ = metrics.measure(model, prompt, ["withdrawal", "routing"], [2, 5], progress=lambda: calls.append(1))
    assert len(calls) == metrics.num_passes(["withdrawal", "routing"], [2, 5]) == 5
    assert [i for i, value in enumerate(row["withdrawal"]) if value is not None] == [2, 5]
    assert "attention" not in row
    assert "cosine_next_text" not in row


def test_a_prompt_without_image_or_text_behind_it_is_refused():
    batch = make_batch(["tt"])
    with pytest.raises(ValueError, match="none of its 2 tokens"):
        metrics.Prompt({}, batch["input_ids"][0] == IMAGE, 2)
    with pytest.raises(ValueError, match="no text follows the image within the 6 tokens"):
        make_prompt("ttI")


def test_an_attention_backend_that_shows_no_queries_is_refused():
    model = make_llava()
    model.set_attn_implementation({"text_config": "flex_attention"})
    with pytest.raises(ValueError, match="'flex_attention' cannot be measured"):
        metrics.measure(model, make_prompt())


# ------------------------------------------------------------------------------------------------------------- DPVR


def dense_of(dpvr):
    """The LLaVA whose weights a DPVR holds."""
    llava = make_llava()
    llava.load_state_dict({name: value for name, value in dpvr.state_dict().items() if "side_branch" not in name})
    return llava


def dpvr_kl(dpvr, llava, prompt):
    with torch.no_grad():
        one, other = (model(**prompt.inputs).logits[0, -1].double().log_softmax(-1) for model in (dpvr, llava))
    return (one.exp() * (one - other)).sum().item()


def test_routing_kl_is_that_of_a_real_dpvr_with_that_saturation_layer():
    llava, prompt = make_llava(), make_prompt()
    row, _ = metrics.measure(llava, prompt, ["routing"])
    for layer in range(1, FUSION + 1):
        dpvr = make_dpvr(saturation_layer=layer, random_branch=False)
        dpvr.load_state_dict(llava.state_dict(), strict=False)
        assert row["routing"][layer] == pytest.approx(dpvr_kl(dpvr, llava, prompt), abs=1e-5)


@pytest.mark.parametrize("num_fusion_layers", [1, 2])
def test_a_dpvr_is_measured_in_its_own_pass_and_against_the_llava_that_it_holds(num_fusion_layers):
    dpvr = make_dpvr(saturation_layer=2, num_fusion_layers=num_fusion_layers)
    llava, prompt = dense_of(dpvr), make_prompt()
    row, maps = metrics.measure(dpvr, prompt)
    dense, _ = metrics.measure(llava, prompt, num_fusion_layers=num_fusion_layers)
    for name in ("contribution", "withdrawal", "routing"):
        assert_close(row[name], dense[name], 1e-6)
    own = [i for i, value in enumerate(row["routing_own"]) if value is not None]
    assert own == [2]
    assert row["routing_own"][2] == pytest.approx(dpvr_kl(dpvr, llava, prompt), abs=1e-5)
    assert abs(row["routing_own"][2] - row["routing"][2]) > 1e-3  # a random side branch is not the identity

    dpvr.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = dpvr(**prompt.inputs, output_attentions=True, output_hidden_states=True)
    expected = attention_by_loops(outputs.attentions, prompt.is_vision.tolist(), prompt.length)
    assert_close(row["attention"], expected["attention"])
    text_only = range(2, NUM_LAYERS - num_fusion_layers)
    assert all(row["attention"][i] == 0 and row["efficiency_image"][i] is None for i in text_only)
    assert all(maps[i].sum() == (0 if i in text_only else pytest.approx(maps[i].sum())) for i in range(NUM_LAYERS))
    states = outputs.hidden_states  # after the text-only layers a vision token still has the state that was routed out
    for i in range(2, NUM_LAYERS - num_fusion_layers - 1):
        assert row["cosine_next_vision"][i] == pytest.approx(1)
        cosine = torch.cosine_similarity(states[i][0, prompt.queries], states[i + 1][0, prompt.queries]).mean()
        assert row["cosine_next_text"][i] == pytest.approx(cosine.item(), abs=1e-5)
    assert row["curvature_vision"][3] is None  # no angle where a token does not move


def test_llava_next_is_measured_as_directly():
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=vision_config(),
        text_config=text_config(),
        image_grid_pinpoints=[[16, 16]],
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    pixels, sizes = torch.randn(1, 2, 3, 16, 16), torch.tensor([[16, 16]])
    with torch.no_grad():
        num_tokens = len(torch.cat(list(model.model.get_image_features(pixels, sizes).pooler_output)))
    ids = torch.tensor([[7, 8, *[IMAGE] * num_tokens, 9, 10, 11]])
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}
    row, _ = metrics.measure(model, metrics.Prompt(inputs, ids[0] == IMAGE, ids.shape[1]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    for name, values in attention_by_loops(attentions, (ids[0] == IMAGE).tolist(), ids.shape[1]).items():
        assert_close(row[name], values)
    assert row["withdrawal"][0] > 1e-3


# ------------------------------------------------------------------------------------------------------------- rule


def test_the_plateau_of_the_abstracts_curve_begins_at_layer_4_and_one_that_does_not_fall_has_none():
    abstract = np.concatenate([np.linspace(0.68, 0.07, 5), np.linspace(0.07, 0.04, 15)[1:], [0.04] * 12, [0.2]])[:32]
    assert rule.plateau_layer(abstract, 31) == 4
    abstract[31] = 0.3  # what the fusion layer sees does not count
    assert rule.plateau_layer(abstract, 31) == 4
    abstract[20] = 0.3
    assert rule.plateau_layer(abstract, 31) == 21
    abstract[23:] = np.linspace(0.3, 0.02, 9)
    assert rule.plateau_layer(abstract, 31) is None  # fewer than 8 of 32 layers are none
    assert rule.plateau_layer(np.array([0.6] * 7 + [0.1] * 3), 9) is None  # nor are 2 of 10 a quarter
    assert rule.plateau_layer(np.full(8, 0.5), 7) is None
    assert rule.plateau_layer(np.linspace(0.68, 0.02, 32), 31) is None


def test_a_curve_without_a_plateau_leaves_the_choice_to_the_kl():
    kl, falls = np.where(np.arange(32) < 10, 1.0, 1e-4), np.linspace(0.68, 0.02, 32)
    choice = rule.choose_layer({"attention": falls, "withdrawal": kl}, 31, 0.003)
    assert (choice.layer, choice.by_attention) == (10, None)
    rng = np.random.default_rng(0)
    noisy = [np.concatenate([[0.68], rng.uniform(0.02, 0.3, 31)]) for _ in range(200)]
    assert all(rule.plateau_layer(curve, 31) is None for curve in noisy)


def test_the_kl_layer_is_the_first_from_which_on_no_later_layer_exceeds_the_threshold():
    curve = np.array([9, 1, 0.001, 0.5, 0.002, 0.001, 0.003, 0])
    assert rule.kl_layer(curve, 7, 0.003) == 4
    assert rule.kl_layer(curve, 7, 0.6) == 2
    assert rule.kl_layer(curve, 7, 0.0029) == 7
    curve[7] = 0.1
    assert rule.kl_layer(curve, 7, 0.003) is None
    curve[[2, 4, 7]] = np.nan, np.nan, 0
    assert rule.kl_layer(curve, 7, 0.003) == 5  # a layer that was not measured is not chosen
    curve[7] = np.nan
    assert rule.kl_layer(curve, 7, 0.003) is None


def curves(attention=None, samples=4, **kls):
    made = {name: np.tile(np.array(values, dtype=float), (samples, 1)) for name, values in kls.items()}
    return made | ({} if attention is None else {"attention": np.tile(attention, (samples, 1))})


def test_the_later_of_plateau_and_kl_layer_is_recommended():
    late_kl = [9, 5, 1, 0.1, 0.001, 0, 0, 0]
    falls = [0.6, 0.5, 0.02, 0.01, 0.01, 0.01, 0.01, 0.1]
    found = rule.recommend(curves(falls, withdrawal=late_kl), 7, 0.003)
    assert (found["saturation_layer"], found["by_kl"], found["by_attention"]) == (4, 4, 2)
    assert "from layer 4 on removing vision" in found["reason"]
    assert "plateau of 0.01 from layer 2" in found["reason"]
    falls_later = [0.6, 0.5, 0.5, 0.5, 0.5, 0.02, 0.02, 0.1]
    assert rule.recommend(curves(falls_later, withdrawal=late_kl), 7, 0.003)["saturation_layer"] == 5
    flat = rule.recommend(curves([0.5] * 8, withdrawal=late_kl), 7, 0.003)
    assert flat["saturation_layer"] == 4
    assert "does not fall to a plateau" in flat["reason"]
    routed = rule.recommend(curves(falls_later, withdrawal=late_kl), 7, 0.003, is_routed=True)
    assert routed["saturation_layer"] == 4  # a DPVR's attention says what it was built to do


def test_where_the_fusion_layer_still_reads_vision_the_routing_kl_decides():
    withdrawal, routing = [9, 9, 9, 9, 9, 2, 2, 2], [np.nan, 5, 1, 0.002, 0.001, 0, 0, 0]
    found = rule.recommend(curves(withdrawal=withdrawal, routing=routing), 7, 0.003)
    assert (found["saturation_layer"], found["criterion"]) == (3, "routing")
    assert "fusion layer still reads vision" in found["reason"]
    useless = rule.recommend(curves(routing=[np.nan, *[5] * 6, 0]), 7, 0.003)
    assert useless["saturation_layer"] == 7
    assert "no layer to skip" in useless["reason"]
    assert "fusion layer" not in useless["reason"]  # of which the withdrawal KL would tell


@pytest.mark.parametrize(
    ("kls", "layers", "reason"),
    [
        ({"attention": [0.5] * 8}, None, "needs the withdrawal or routing KL at layer 7, which was not measured"),
        ({"withdrawal": [np.nan, 9, 0, *[np.nan] * 5]}, [1, 2], "at layer 7, which was not measured.*7 in --layers"),
        ({"withdrawal": [9] * 8}, None, "withdrawal KL at layer 7 exceeds.*Add routing to --metrics"),
        ({"withdrawal": [9] * 8, "routing": [9] * 8}, None, "withdrawal and routing KL at layer 7 exceeds .* nats.$"),
        ({"withdrawal": [9] * 7 + [np.nan]}, None, "mean withdrawal KL at layer 7 is not finite.*--dtype"),
        ({"withdrawal": [9, 9, 0, 0, np.nan, 0, 0, 0]}, [2, 4, 7], "mean withdrawal KL at layer 4 is not finite"),
    ],
)
def test_why_no_layer_is_recommended_is_told(kls, layers, reason):
    found = rule.recommend(curves(**kls), 7, 0.003, layers=layers)
    assert found["saturation_layer"] is None
    assert re.search(reason, found["reason"])


def test_a_kl_that_decides_nothing_need_not_be_finite():
    decides, beside = [9, 9, 0, 0, 0, 0, 0, 0], [9, 9, 9, np.nan, 9, 9, 9, 9]
    assert rule.recommend(curves(withdrawal=decides, routing=beside), 7, 0.003)["saturation_layer"] == 2


def test_the_interval_covers_what_resamples_choose_and_one_sample_has_none():
    early, late = [9, 9, 0, 0, 0, 0, 0, 0], [9, 9, 9, 9, 9, 0, 0, 0]
    mixed = {"withdrawal": np.array([early] * 9 + [late], dtype=float)}
    found = rule.recommend(mixed, 7, 0.003)
    assert found["saturation_layer"] == 5
    assert found["interval_95"] == [2, 5]
    assert found["share_of_resamples"] == pytest.approx(1 - 0.9**10, abs=0.05)  # those that drew the late one
    assert rule.recommend(mixed, 7, 0.003) == found
    thirds = {"withdrawal": np.array([early, late, late], dtype=float)}  # 1 of 27 resamples is of the early one alone
    assert rule.recommend(thirds, 7, 0.003)["interval_95"] == [2, 5]
    low, high = rule.interval(np.array([[0, 0], [1, 0], [1, 1]]))
    assert (low.tolist(), high.tolist()) == ([0, 0], [1, 1])
    drawn = np.random.default_rng(0).random((9, 8))
    assert np.array_equal(rule.interval(drawn), rule.interval(drawn))
    still_read = [9, 9, *[0.02] * 6]  # drawn twice it is more than the threshold at the fusion layer too
    rarely = {"withdrawal": np.array([early] * 9 + [still_read])}
    assert rule.recommend(rarely, 7, 0.003)["interval_95"] == [2, 7]
    alone = rule.recommend(curves(withdrawal=late, samples=1), 7, 0.003)
    assert (alone["saturation_layer"], alone["interval_95"]) == (5, None)


def one_row(**changes):
    """A row of results of an 8-layer model, and its settings."""
    text = text_config(num_hidden_layers=8).to_diff_dict()
    settings = {"text_config": text, "num_hidden_layers": 8, "first_fusion_layer": 7, "num_side_layers": 1}
    row = {"vision_tokens": 36, "text_tokens": 20, "uniform_attention": 0.5, "withdrawal": [9.0, 9, 1, 0, 0, 0, 0, 0]}
    return {**settings, "saturation_layer": None, "layers": None}, row | changes


def test_one_sample_is_not_resampled(monkeypatch):
    monkeypatch.setattr(rule, "interval", lambda values: pytest.fail("it was"))
    settings, row = one_row()
    summary = rule.summarize(settings, [row], 0.003, "")
    assert summary["curves"]["withdrawal"] == {"mean": row["withdrawal"], "low_95": None, "high_95": None}


def test_the_cost_table_of_llava_1_5_7b_has_the_numbers_of_the_accounting():
    from transformers import LlavaConfig

    text = LlavaConfig().text_config.to_diff_dict()
    settings = {"text_config": text, "num_hidden_layers": 32, "first_fusion_layer": 31, "num_side_layers": 1}
    table = rule.cost_table(settings, 576, 64)
    assert [entry["saturation_layer"] for entry in table] == list(range(1, 32))
    chosen = table[17]
    assert (round(chosen["flops_ratio"], 3), round(chosen["cache_ratio"], 3)) == (0.635, 0.634)  # the README's
    assert round(chosen["flops"] / 1e12, 2) == 5.4
    assert chosen["cache_bytes"] / 2**20 == 203
    assert all(one["flops"] < other["flops"] for one, other in itertools.pairwise(table))
    one_side, two_sides = (
        rule.cost_table(settings | {"first_fusion_layer": 30, "num_side_layers": n}, 576, 64)[17] for n in (1, 2)
    )
    assert one_side["cache_bytes"] / 2**20 == 212  # two fusion layers hold all tokens
    assert two_sides["flops"] > one_side["flops"] > chosen["flops"]


# ------------------------------------------------------------------------------------------------- command and files


def run(folder, *arguments):
    return analysis.main(["--output", str(folder), "--device", "cpu", *map(str, arguments)])


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The embedded model on two questions of each kind."""
    folder = tmp_path_factory.mktemp("analysis") / "run"
    assert run(folder, "--questions", 2, "--maps", 2) == 0
    return folder


@pytest.fixture(scope="module")
def dpvr_folder(tmp_path_factory):
    """The embedded model as a DPVR with its trained side branch."""
    folder = tmp_path_factory.mktemp("dpvr") / "dpvr"
    convert(ROOT / "examples" / "tiny-llava", folder, adapter=ROOT / "examples" / "dpvr-tiny-adapter")
    return folder


def results(folder):
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    summary = report.read_summary(folder)
    summary.pop("command")
    return sorted(rows, key=lambda row: row["sample"]), summary


def test_the_command_writes_rows_summary_plots_and_a_page(digits_run):
    rows, summary = results(digits_run)
    assert len(rows) == 8
    assert rows[0]["vision_tokens"] == 36
    assert summary["curves"]["attention"]["mean"] == pytest.approx(
        np.mean([row["attention"] for row in rows], axis=0), rel=1e-3
    )
    assert summary["curves"]["routing"]["mean"][0] is None
    assert all(curve.keys() == {"mean", "low_95", "high_95"} for curve in summary["curves"].values())
    assert summary["recommendation"]["kl_threshold"] == rule.KL_THRESHOLD
    for name in report.PLOTS:
        assert (digits_run / f"{name}.svg").read_text().startswith("<?xml")
        with Image.open(digits_run / f"{name}.png") as picture:
            assert min(picture.size) > 400
    assert sorted(path.name for path in (digits_run / "maps").iterdir()) == ["0000.npz", "0001.npz"]
    assert (digits_run / "overview.png").is_file()
    assert (digits_run / "maps.png").is_file()


def test_the_page_needs_no_other_file_and_follows_light_and_dark(digits_run):
    page = (digits_run / "report.html").read_text()
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in sources)
    assert "<script" not in page
    assert "<link" not in page
    assert "prefers-color-scheme: dark" in page
    drawn = page[page.index("<body") :]
    assert drawn.count("<svg") == len(report.PLOTS)
    assert all(colour not in drawn.lower() for colour in (*report.SERIES.values(), report.INK))
    assert re.search(r"recommended: S = \d", drawn)
    assert drawn.count("<figure>") == 2 * len(report.layers_to_draw(report.read_summary(digits_run), None))
    for finding in report.FINDINGS.values():
        assert finding(report.read_summary(digits_run)).replace("'", "&#x27;") in drawn


def made_summary(layers=None, threshold=0.003, **curves):
    """A summary of one sample of an 8-layer model."""
    settings, row = one_row(**curves)
    return rule.summarize(settings | {"layers": layers}, [row], threshold, "")


@pytest.mark.parametrize(
    ("last", "layers", "said"),
    [
        (0.0, None, "Removing vision stays within 0.003 nats from layer 2 on."),
        (9.0, None, "Removing vision stays within 0.003 nats at no layer."),
        (None, [2, 6], "The KL of removing vision was not measured at layer 7."),
        (math.nan, None, "The KL of removing vision is not finite at layer 7."),
    ],
)
def test_what_is_said_of_the_kl_is_what_was_measured_at_the_fusion_layer(last, layers, said):
    assert report.find_kl(made_summary(layers, withdrawal=[9.0, 9, 0, 0, 0, 0, 0, last])) == said


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_where_no_token_moved_there_is_no_mean_angle():
    moved = [None, *[0.5] * 7]
    summary = made_summary(curvature_vision=[*moved[:4], *[None] * 4], curvature_text=moved)
    said = report.FINDINGS["curvature"](summary)
    assert said.endswith(
        "0.50 for vision and 0.50 for text on average over the first 4 layers, none and 0.50 over the rest."
    )


def test_a_run_that_was_killed_goes_on_and_gives_the_same_results(digits_run, tmp_path):
    process = start_script(ROOT / "scripts" / "analyze_saturation.py", "--output", tmp_path, "--questions", 2)
    deadline, path = time.monotonic() + 120, tmp_path / "samples.jsonl"
    while time.monotonic() < deadline and not (path.is_file() and path.read_text().count("\n") >= 2):
        time.sleep(0.005)
    process.kill()
    process.join()
    measured = path.read_text().count("\n")
    assert 2 <= measured < 8
    with path.open("a") as file:
        file.write('{"sample": "7", "question": "cut o')  # as a write that the kill cut off
    assert run(tmp_path, "--questions", 2, "--maps", 2) == 0
    assert results(tmp_path) == results(digits_run)


def test_an_interrupt_keeps_what_was_measured_and_more_questions_add_to_it(tmp_path, monkeypatch, capsys):
    measure, calls = analysis.measure, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return measure(*arguments)

    monkeypatch.setattr(analysis, "measure", interrupted)
    assert run(tmp_path, "--questions", 1, "--metrics", "attention") == 130
    assert "the same command goes on from" in capsys.readouterr().err
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2
    assert run(tmp_path, "--questions", 1, "--metrics", "attention") == 0
    assert len(calls) == 5
    assert run(tmp_path, "--questions", 2, "--metrics", "attention") == 0
    assert len(calls) == 9
    assert report.read_summary(tmp_path)["recommendation"]["saturation_layer"] is None


@pytest.mark.parametrize("line", [b"cut off", b"[]", b'{"sample": 1}', b"\xff"])
def test_results_that_are_damaged_are_named_with_their_line(line, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"sample": "a", "question": "", "digest": ""}\n' + line + b"\n")
    place = (
        r"samples\.jsonl is no text\." if line == b"\xff" else r"samples\.jsonl, line 2: .* is no result of a sample\."
    )
    with pytest.raises(analysis.AnalysisError, match=place):
        analysis.read_rows(path)
    path.write_text(path.read_text(encoding="latin-1").splitlines(keepends=True)[0])
    assert [row["sample"] for row in analysis.read_rows(path)] == ["a"]


def test_a_full_disk_takes_nothing_that_was_measured_and_is_named(tmp_path):
    path, rows = tmp_path / "samples.jsonl", ['{"sample": "ä", "question": "", "digest": ""}\n'] * 2
    path.write_text("".join(rows) + '{"sample": "ö', encoding="utf-8")  # cut off by a kill
    with files_of_at_most(60):
        assert len(analysis.read_rows(path)) == 2
        with pytest.raises(OSError, match=r"samples\.jsonl"):
            analysis.append_row(path, {"sample": "b"})
    assert path.read_text(encoding="utf-8") == "".join(rows)
    settings = tmp_path / "settings.json"
    with files_of_at_most(60), pytest.raises(OSError, match=r"settings\.json"):
        analysis.check_settings(settings, {"model": "m" * 100})
    assert [each.name for each in tmp_path.iterdir()] == ["samples.jsonl"]


def test_an_interrupted_restart_is_not_told_to_restart_again(tmp_path, monkeypatch, capsys):
    def kill(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(analysis, "check_settings", kill)  # which comes once results are discarded
    assert run(tmp_path, "--questions", 1, "--restart") == 130
    assert "the same command without --restart goes on from" in capsys.readouterr().err
    monkeypatch.setattr(analysis, "load_model", kill)
    assert run(tmp_path, "--restart") == 130
    assert "the same command starts anew: nothing was discarded yet" in capsys.readouterr().err


def test_maps_asked_for_later_are_those_of_the_first_run(tmp_path):
    options = ("--questions", 1, "--metrics", "attention")
    assert run(tmp_path / "once", *options, "--maps", 2) == 0
    assert run(tmp_path / "later", *options, "--maps", 0) == 0
    rows = (tmp_path / "later" / "samples.jsonl").read_text()
    assert run(tmp_path / "later", *options, "--maps", 2) == 0
    assert (tmp_path / "later" / "samples.jsonl").read_text() == rows
    once, later = (report.read_maps(tmp_path / folder / "maps") for folder in ("once", "later"))
    assert len(later) == 2
    for one, other in zip(once, later, strict=True):
        assert one[0] == other[0]
        np.testing.assert_allclose(one[1], other[1], atol=1e-6)
        assert np.array_equal(one[2], other[2])
    assert (tmp_path / "later" / "maps.png").is_file()


def test_a_restart_discards_results_and_plots_once_all_is_checked(tmp_path):
    options = ("--questions", 1, "--samples", 1, "--metrics", "withdrawal", "--layers", "7")
    assert run(tmp_path, *options) == 0
    (tmp_path / "mine.png").write_bytes(b"")
    kept = {path.name for path in tmp_path.iterdir()}
    assert run(tmp_path, ROOT / "no-model", "--restart", *options) == 1
    assert run(tmp_path, "--restart", *options[:-1], "8") == 1
    assert run(tmp_path, "--restart", "--data", tmp_path / "no.json") == 1
    assert {path.name for path in tmp_path.iterdir()} == kept
    (tmp_path / "curvature.svg").write_bytes(b"")  # of a run with other metrics
    assert run(tmp_path, "--restart", *options, "--seed", 1) == 0
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1


def test_a_restart_beside_a_run_that_still_measures_is_refused_and_discards_nothing(digits_run):
    rows, lock = (digits_run / "samples.jsonl").read_bytes(), digits_run / ".samples.jsonl.lock"
    with lock.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match=r"Another run writes to .*samples\.jsonl: choose another output"):
            run(digits_run, "--restart", "--questions", 2, "--seed", 1)
    assert (digits_run / "samples.jsonl").read_bytes() == rows
    lock.unlink()


def test_results_measured_otherwise_are_not_mixed(digits_run, capsys):
    assert run(digits_run, "--questions", 2, "--metrics", "attention") == 1
    error = capsys.readouterr().err
    assert "metrics=" in error
    assert "--restart" in error
    assert run(digits_run, "--questions", 2, "--seed", 1) == 1
    assert "seed=0, but this run has 1" in capsys.readouterr().err
    sample = analysis.Sample("0", (), "another question")
    with pytest.raises(rule.AnalysisError, match="'a question', but the data now ask 'another question'"):
        analysis.check_row({"sample": "0", "question": "a question"}, sample, digits_run)
    settings = json.loads((digits_run / "settings.json").read_text())
    del settings["format"]
    (digits_run / "settings.json").write_text(json.dumps(settings))  # as an older version of the script left it
    try:
        assert run(digits_run, "--questions", 2) == 1
        assert "format=None, but this run has 3" in capsys.readouterr().err
    finally:
        (digits_run / "settings.json").write_text(json.dumps({**settings, "format": 3}))


@pytest.mark.parametrize("content", ['{"format": 3,', "[]"])
def test_settings_are_whole_or_not_there_and_broken_ones_are_refused(content, tmp_path, monkeypatch):
    path = tmp_path / "settings.json"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            analysis.check_settings(path, {"format": 3})
    assert not path.exists()
    analysis.check_settings(path, {"format": 3})
    assert json.loads(path.read_text()) == {"format": 3}
    path.write_text(content)
    with pytest.raises(rule.AnalysisError, match=r"settings\.json holds no settings\. Choose another --output"):
        analysis.check_settings(path, {"format": 3})


def test_other_images_or_answers_under_the_same_names_are_not_mixed(tmp_path, capsys):
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (40, 30), colour).save(tmp_path / name / f"{i}.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "seven"}]
    entries = [{"id": str(i), "image": f"{i}.png", "conversations": turns} for i in range(2)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(entries))
    options = ("--data", data, "--metrics", "withdrawal", "--layers", "7", "--answers")
    assert run(tmp_path / "run", *options, "--image-folder", tmp_path / "a", "--samples", 1) == 0
    assert run(tmp_path / "run", *options, "--image-folder", tmp_path / "b") == 1
    assert "image_folder=" in capsys.readouterr().err
    for i in range(2):
        (tmp_path / "b" / f"{i}.png").replace(tmp_path / "a" / f"{i}.png")
    assert run(tmp_path / "run", *options, "--image-folder", tmp_path / "a") == 1
    assert "with other images or another answer" in capsys.readouterr().err


def test_samples_that_cannot_be_measured_are_told_and_left_out(tmp_path, capsys):
    Image.new("RGB", (40, 30)).save(tmp_path / "good.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    names = ["good.png", "bomb.png", "broken.png", "missing.png", "good.png"]
    turns = [{"from": "human", "value": "<image>\nWhat\u2028?"}, {"from": "gpt", "value": "seven"}]
    entries = [{"image": name, "conversations": turns} for name in names]
    later = [*turns, {"from": "human", "value": "<image>\nAnd?"}]
    entries[-1] = {"image": ["good.png", "bomb.png"], "conversations": later}  # the second is in a later turn
    plain = {"from": "human", "value": "What?"}
    entries.append({"image": "good.png", "conversations": [plain, turns[1]]})  # and this nowhere
    entries.append({"image": "good.png", "conversations": [plain, turns[1], *turns]})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    assert run(tmp_path / "run", "--data", data, "--metrics", "withdrawal", "--layers", "7") == 0
    error = capsys.readouterr().err
    assert "1 entries of " in error
    assert f"name images that are no files in {tmp_path} and are left out" in error
    assert "have no image in their first turn and are left out" in error
    assert f"1 entries of {data}, first entry 6, have no image in" in error
    assert "left out: Sample 1:1: Image size (400000000 pixels) exceeds limit" in error
    assert "left out: Sample 2:2: cannot identify image file" in error
    rows, summary = results(tmp_path / "run")
    assert sorted(row["sample"] for row in rows) == ["0:0", "4:4", "5:5"]
    assert [row["vision_tokens"] for row in rows] == [36, 36, 36]
    assert summary["samples"] == 3
    options = ("--metrics", "withdrawal", "--layers", "7", "--samples", 2)
    data.write_text("".join(json.dumps(entry) + "\n" for entry in entries[1:3] + entries[:1] * 4))
    assert run(tmp_path / "two", "--data", data, *options) == 0
    assert results(tmp_path / "two")[1]["samples"] == 2  # others stand in
    data.write_text(json.dumps({"id": "another", **entries[2]}))
    assert run(tmp_path / "run", "--data", data, "--metrics", "withdrawal", "--layers", "7") == 1
    assert "None of 1 samples can be measured" in capsys.readouterr().err
    assert run(tmp_path / "other", "--data", data) == 1
    assert "None of 1 samples can be measured" in capsys.readouterr().err


def test_dense_and_dpvr_are_compared_in_the_same_plots(digits_run, dpvr_folder, tmp_path, capsys):
    assert run(tmp_path / "no", dpvr_folder) == 1
    assert "--trust-remote-code" in capsys.readouterr().err
    assert run(tmp_path / "no", dpvr_folder, "--trust-remote-code", "--num-fusion-layers", 2) == 1
    assert "--num-fusion-layers 2, but " in capsys.readouterr().err
    options = ("--questions", 2, "--trust-remote-code", "--compare", digits_run, "--label", "DPVR")
    assert run(tmp_path / "run", dpvr_folder, *options) == 0
    summary, dense = report.read_summary(tmp_path / "run"), report.read_summary(digits_run)
    assert summary["curves"]["attention"]["mean"][4:7] == [0, 0, 0]
    assert summary["curves"]["withdrawal"]["mean"] == pytest.approx(dense["curves"]["withdrawal"]["mean"], rel=1e-2)
    assert summary["recommendation"]["by_attention"] is None
    own = summary["curves"]["routing_own"]["mean"]
    assert [i for i, value in enumerate(own) if value is not None] == [4]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Dashed: tiny-llava" in page
    for name in report.PLOTS:
        svg = (tmp_path / "run" / f"{name}.svg").read_text()
        assert "tiny-llava" in svg
        assert "DPVR" in svg
        assert "stroke-dasharray" in svg
    assert run(tmp_path / "run", "--questions", 2, "--compare", tmp_path) == 1
    assert "saturation.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[]", '{"settings": {}, "curves": {}}'])
def test_a_file_of_another_kind_is_not_compared_with(content, tmp_path, capsys):
    (tmp_path / "saturation.json").write_text(content)
    assert run(tmp_path / "run", "--compare", tmp_path) == 1
    assert "is not a result of analyze_saturation.py: it has no cost, " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def write_pictures(folder, number):
    for i in range(number):
        Image.new("RGB", (40 + i, 30), (40 * i, 90, 10)).save(folder / f"{i}.png")


def test_llavas_data_format_is_measured_with_its_answers(tmp_path, capsys):
    write_pictures(tmp_path, 3)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "seven"}]
    entries = [{"id": f"e{i}", "image": f"{i}.png", "conversations": turns} for i in range(2)]
    two = [{"from": "human", "value": "<image>\n<image>\nWhat is it?"}, turns[1]]
    entries += [{"id": "two", "image": ["1.png", "2.png"], "conversations": two}, {"conversations": turns}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(entries))
    options = ("--data", data, "--metrics", "attention,withdrawal", "--layers", "0,7", "--answers")
    assert run(tmp_path / "run", *options) == 0
    assert "1 entries" in capsys.readouterr().err
    rows, summary = results(tmp_path / "run")
    assert sorted(row["vision_tokens"] for row in rows) == [36, 36, 72]
    assert all(row["question"] == "What is it?" for row in rows)
    assert run(tmp_path / "prompts", *[option for option in options if option != "--answers"]) == 0
    prompts, costs = results(tmp_path / "prompts")
    assert [row["text_tokens"] for row in rows] == [row["text_tokens"] for row in prompts]  # the answers' apart
    assert summary["cost"] == costs["cost"]
    assert summary["settings"]["answers"] is True
    assert summary["recommendation"]["saturation_layer"] is not None
    entries[0]["conversations"] = turns[:1]
    data.write_text(json.dumps(entries))
    assert run(tmp_path / "run2", *options) == 1
    assert "has no answer" in capsys.readouterr().err


def test_pictures_are_upright_of_8_bits_and_of_no_transparent_colour(tmp_path):
    colours = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(colours).save(tmp_path / "turned.png", exif=exif)
    levels = np.array([[0, 257, 1000, 40_000, 65_535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    Image.fromarray(levels.astype(">u2")).save(tmp_path / "swapped.tif")
    assert np.array_equal(analysis.read_picture(tmp_path / "turned.png"), np.rot90(colours, -1))
    for name in ("deep.png", "swapped.tif"):
        assert np.asarray(analysis.read_picture(tmp_path / name))[0, :, 0].tolist() == [0, 1, 3, 155, 255]
    indexed = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    indexed.save(tmp_path / "clear.png", transparency=0)
    assert "transparency" not in analysis.read_picture(tmp_path / "clear.png").info
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="mode F, whose range is not known"):
        analysis.read_picture(tmp_path / "float.tif")


def test_question_files_and_folders_of_pictures_are_read(tmp_path):
    write_pictures(tmp_path, 2)
    (tmp_path / "1.txt").write_text("How many?\n")
    found = {sample.id: sample.question for sample in analysis.folder_samples(tmp_path, "What?")}
    assert found == {"0.png": "What?", "1.png": "How many?"}
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 5, "image": "0.png", "text": "Which?"}\n')
    samples, left_out = analysis.llava_samples(questions, tmp_path)
    assert [(s.id, s.question, s.answer) for s in samples] == [("0:5", "Which?", None)]
    assert left_out == []
    args = analysis.make_parser().parse_args(["--data", str(tmp_path), "--samples", "1"])
    every = analysis.make_parser().parse_args(["--data", str(tmp_path)])
    assert analysis.choose_samples(args) == analysis.choose_samples(every)
    (tmp_path / "1.txt").write_bytes("Wieviel Stück?".encode("latin-1"))
    with pytest.raises(rule.AnalysisError, match=r"1\.txt is not UTF-8: .*Save it as UTF-8"):
        analysis.folder_samples(tmp_path, "What?")


def test_the_first_question_is_the_first_of_the_human_and_its_answer_the_next_turn():
    human, gpt = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "seven"}
    system, later = {"from": "system", "value": "Be kind."}, {"from": "human", "value": "<image>And?"}
    for turns in ([human, gpt], [system, human, gpt], [gpt, human, gpt, later, gpt]):
        names = ["0.png", "1.png"][: sum("<image>" in turn["value"] for turn in turns)]
        entry = {"image": names, "conversations": turns}
        assert analysis.read_entry(entry) == (["0.png"], "What?", "seven")
    assert analysis.read_entry({"image": "0.png", "conversations": [human, later, gpt]})[1:] == ("What?", None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversations": [{"from": "human", "value": None}]}, "turn 0 has no role or no text"),
        ({"conversations": ["What?"]}, "turn 0 has no role or no text"),
        ({"conversations": {"human": "What?"}}, "its conversations are no list"),
        ({"conversations": [{"from": "gpt", "value": "seven"}]}, "no turn is the human's"),
        ({"text": None}, "turn 0 has no role or no text"),
        ({"image": [3]}, "an image is no path"),
        ({"image": {"path": "0.png"}}, "an image is no path"),
    ],
)
def test_malformed_entries_are_left_out_with_the_reason(change, reason, tmp_path):
    write_pictures(tmp_path, 1)
    good = {"image": "0.png", "text": "What?"}
    (tmp_path / "data.json").write_text(json.dumps([good, good | change]))
    samples, left_out = analysis.llava_samples(tmp_path / "data.json", tmp_path)
    assert [sample.id for sample in samples] == ["0:0"]
    assert left_out == [
        f"1 entries of {tmp_path / 'data.json'}, first entry 1, are malformed ({reason}) and are left out."
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"a": 1}', "holds a dict, not a list"),
        ("[3]", "entry 0 is a int"),
        ('[{"image": "0.png"}]', "entry 0 has neither conversations nor text"),
        ('[{"image": "no.png", "text": "?"}]', "name images that are no files in"),
        ("[]", "is empty: it holds no rows"),
    ],
)
def test_data_that_cannot_be_read_are_refused_by_name(content, message, tmp_path, capsys):
    write_pictures(tmp_path, 1)
    (tmp_path / "data.json").write_text(content)
    assert run(tmp_path / "run", "--data", tmp_path / "data.json") == 1
    error = capsys.readouterr().err
    assert "data.json" in error
    assert message in error


def test_models_and_options_that_cannot_be_used_are_refused(tmp_path, capsys, monkeypatch):
    assert run(tmp_path / "run", tmp_path) == 1
    assert "cannot be loaded" in capsys.readouterr().err
    assert run(tmp_path / "run", "--questions", 1, "--layers", "3-9") == 1
    assert "layer 9, but the decoder has 8" in capsys.readouterr().err
    assert run(tmp_path / "run", "--questions", 1, "--map-layers", "1,40") == 1
    assert "--map-layers names layer 40, but the decoder has 8" in capsys.readouterr().err
    assert run(tmp_path / "run", "--questions", 1, "--num-fusion-layers", 8) == 1
    assert "--num-fusion-layers 8 leaves no other of 8 layers" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # the corrected command is not refused for what was refused
    sample = analysis.choose_samples(SimpleNamespace(data=None, questions=1, seed=0, samples=1, answers=False))[0]
    args = analysis.make_parser().parse_args(["--device", "cpu"])
    model, processor = analysis.load_model(args)
    prompt = analysis.make_prompt(model, processor, sample, with_answer=False)
    analysis.check_backbone(model, prompt)
    monkeypatch.setattr(metrics.Decoder, "run", lambda self, states, *_: states)
    with pytest.raises(rule.AnalysisError, match="cannot be measured layer by layer"):
        analysis.check_backbone(model, prompt)
    model.config.text_config.sliding_window = 50
    with pytest.raises(rule.AnalysisError, match=r"Sample 0: \d+ tokens exceed text_config.sliding_window=50"):
        analysis.make_prompt(model, processor, sample, with_answer=False)
    for answer in (None, ""):
        with pytest.raises(rule.AnalysisError, match="Sample 0: it has no answer, which --answers needs"):
            analysis.make_prompt(model, processor, dataclasses.replace(sample, answer=answer), with_answer=True)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--layers", "x", "not a list of layers"),
        ("--layers", "5-3", "not a list of layers"),
        ("--layers", "0-9999999", "not a list of layers"),
        ("--metrics", "colour", "'colour' is none of"),
        ("--samples", "0", "must be at least 1"),
        ("--device", "gpu", "'gpu' cannot be used: "),
        ("--device", "cuda:99", "'cuda:99' cannot be used: "),
        ("--kl-threshold", "-1", "-1.0 must be at least 0"),
        ("--kl-threshold", "nan", "nan must be at least 0"),
        ("--seed", "-1", "--seed -1 must be at least 0"),
        ("--maps", "-1", "--maps -1 must be at least 0"),
        ("--output", "", "argument --output: the name is empty"),
        ("--data", "", "argument --data: the name is empty"),
    ],
)
def test_values_of_options_that_cannot_be_are_refused(option, value, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, option, value)
    assert message in capsys.readouterr().err


def test_the_command_of_the_results_is_one_that_a_shell_takes(monkeypatch):
    monkeypatch.chdir(ROOT / "docs")
    given = ["org/model", "--question", "What's this?", "--data", "my photos", "--layers", "0,7", "--answers"]
    assert analysis.command_of(analysis.make_parser().parse_args(given)) == (
        "python scripts/analyze_saturation.py org/model --data 'my photos' "
        """--question 'What'"'"'s this?' --answers --layers 0,7"""
    )
    assert analysis.shown("../examples/tiny-llava") == "examples/tiny-llava"


def test_the_picture_under_the_map_is_what_the_vision_tower_sees():
    args = analysis.make_parser().parse_args(["--device", "cpu", "--questions", "1"])
    model, processor = analysis.load_model(args)
    sample = analysis.choose_samples(args)[0]
    picture = analysis.picture_of(analysis.make_prompt(model, processor, sample, False), processor)
    assert np.abs(picture.astype(int) - np.asarray(sample.images[0]).astype(int)).max() <= 1


# -------------------------------------------------------------------------------------------------------- converter


def test_the_converter_takes_the_recommended_layer_and_its_reason(digits_run, tmp_path, capsys):
    recommended = report.read_summary(digits_run)["recommendation"]
    tiny = str(ROOT / "examples" / "tiny-llava")
    options = ["--saturation-layer", "auto", "--analysis", str(digits_run)]
    assert convert_main([tiny, str(tmp_path / "dpvr"), *options]) == 0
    assert recommended["reason"] in capsys.readouterr().out
    config = json.loads((tmp_path / "dpvr" / "config.json").read_text())
    assert config["saturation_layer"] == recommended["saturation_layer"]


def write_analysis(folder, num_layers=8, layer=3, reason="because"):
    results = {
        "settings": {"num_hidden_layers": num_layers, "first_fusion_layer": num_layers - 1},
        "recommendation": {"saturation_layer": layer, "reason": reason},
        "samples": 3,
    }
    (folder / "saturation.json").write_text(json.dumps(results))


def test_the_converter_refuses_an_analysis_that_it_cannot_follow(tmp_path):
    tiny, output = ROOT / "examples" / "tiny-llava", tmp_path / "dpvr"

    def refusal(layer="auto", analysis=tmp_path, **options):
        with pytest.raises(ConversionError) as error:
            convert(tiny, output, saturation_layer=layer, analysis=analysis, dry_run=True, **options)
        return str(error.value)

    assert "go together" in refusal(analysis=None)
    assert "go together" in refusal(layer=3)
    assert "has no saturation.json" in refusal()
    (tmp_path / "saturation.json").write_text("{}")
    assert "it has no 'settings'" in refusal()
    write_analysis(tmp_path, num_layers=32)
    assert "a decoder of 32 layers, but the source has 8" in refusal()
    write_analysis(tmp_path)
    assert "fusion from layer 7 on, but with num_fusion_layers=2 it is from layer 6 on" in refusal(num_fusion_layers=2)
    write_analysis(tmp_path, layer=None)
    assert "recommends no layer: because" in refusal()
    for layer in ("3", True, 0, 8):
        write_analysis(tmp_path, layer=layer)
        assert f"saturation.json recommends {layer!r}, which is no layer from 1 to 7." in refusal()
    write_analysis(tmp_path, layer=3)
    adapter = ROOT / "examples" / "dpvr-tiny-adapter"
    assert "trained with saturation layer 4, but 3 was asked for" in refusal(adapter=adapter)
    summary = convert(tiny, output, saturation_layer="auto", analysis=tmp_path, dry_run=True)
    assert summary.saturation_layer == 3
    assert summary.saturation_reason == f"by the analysis of 3 samples in {tmp_path}: because"
