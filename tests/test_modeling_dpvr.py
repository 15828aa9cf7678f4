"""The invariants of the model. `oracle.py` says what DPVR computes; LLaVA is the reference where routing is void."""

import contextlib
import copy
import inspect
import os
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, RepoUrl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import batch_logits
from safetensors.torch import save_file
from tiny import (
    CROPPED_CACHES,
    FIRST_TEXT,
    IMAGE,
    LLAVA_FIELDS,
    NUM_LAYERS,
    TOKENS_PER_IMAGE,
    DPVRConfig,
    DPVRForConditionalGeneration,
    make_batch,
    make_dpvr,
    make_llava,
    record_reads,
    text_config,
)
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    DynamicCache,
    GenerationConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    Qwen2Config,
    Siglip2VisionConfig,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.caches import CACHE

TOLERANCE = 1e-4
RAGGED = ["ttItt", "tttt", "ItIt", "I", "ttI", "t"]
BACKBONES = [
    text_config(LlamaConfig),
    text_config(MistralConfig, sliding_window=64),
    text_config(Qwen2Config),
    text_config(LlamaConfig, tie_word_embeddings=True),
]
backbones = pytest.mark.parametrize("text", BACKBONES, ids=["llama", "mistral", "qwen2", "tied"])
rows_of_a_batch = st.lists(
    st.text(alphabet="ttI", min_size=1, max_size=7).filter(lambda row: row.count("I") < 4), min_size=1, max_size=4
)
NUM_BATCHES = int(os.environ.get("DPVR_EXAMPLES", "300"))  # for each attention backend
sides = st.sampled_from(["left", "right"])
# Saturation layer, side layers, fusion layers of a decoder of 6 layers
GEOMETRIES = [(1, 1, 1), (2, 1, 1), (3, 2, 2), (5, 1, 1), (1, 2, 5), (2, 0, 1)]


@pytest.fixture(scope="module")
def models():
    return {shape: make_dpvr(0, None, *shape) for shape in GEOMETRIES}


@pytest.fixture(scope="module")
def model(models):
    return models[2, 1, 1]


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("train" in request.node.name):
        yield


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


def real_logits(logits, batch):
    """Logits of the tokens that are not padding, per row."""
    return [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"], strict=True)]


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance


def positions(batch):
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def embed(model, batch):
    """The batch as embeddings, so that it can be cut inside an image."""
    features = model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
    embeds = model.get_input_embeddings()(batch["input_ids"])
    return embeds.masked_scatter((batch["input_ids"] == IMAGE)[..., None], torch.cat(list(features)))


# --- what routing leaves alone -------------------------------------------------------------------------------------


@backbones
def test_text_only_prompts_give_llavas_own_logits(text):
    llava = make_llava(text=copy.deepcopy(text))
    dpvr = make_dpvr(text=copy.deepcopy(text))
    dpvr.load_state_dict(llava.state_dict(), strict=False)
    batch = without(make_batch(["ttttt", "tt", "t"]), "pixel_values")
    assert torch.equal(dpvr(**batch).logits, llava(**without(batch, "mm_token_type_ids")).logits)


@backbones
@pytest.mark.parametrize("num_fusion_layers", [1, 3])
def test_identity_branch_without_text_only_layers_gives_llavas_own_logits(text, num_fusion_layers):
    llava = make_llava(text=copy.deepcopy(text))
    first_fusion = NUM_LAYERS - num_fusion_layers
    dpvr = make_dpvr(1, copy.deepcopy(text), first_fusion, 1, num_fusion_layers, random_branch=False)
    missing, unexpected = dpvr.load_state_dict(llava.state_dict(), strict=False)
    assert not unexpected
    assert all("side_branch" in name for name in missing)
    for side in ("left", "right"):
        batch = make_batch(RAGGED, side)
        expected = llava(**without(batch, "mm_token_type_ids")).logits
        for actual, reference in zip(
            real_logits(dpvr(**batch).logits, batch), real_logits(expected, batch), strict=True
        ):
            assert_close(actual, reference)


# --- against the oracle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@settings(max_examples=NUM_BATCHES)
@given(rows=rows_of_a_batch, side=sides, geometry=st.sampled_from(GEOMETRIES), seed=st.integers(0, 9))
def test_any_ragged_batch_gives_the_oracles_logits(models, attention, rows, side, geometry, seed):
    dpvr = models[geometry]
    dpvr.set_attn_implementation(attention)
    batch = make_batch(rows, side, seed)
    with torch.no_grad():
        logits = dpvr(**batch).logits
    assert torch.isfinite(logits).all()
    expected = batch_logits(dpvr, batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    for actual, reference in zip(real_logits(logits, batch), expected, strict=True):
        assert_close(actual, reference)


@backbones
def test_every_backbone_gives_the_oracles_logits(text):
    dpvr = make_dpvr(text=copy.deepcopy(text))
    batch = make_batch(RAGGED)
    expected = batch_logits(dpvr, batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    outputs = dpvr(**batch)
    for actual, reference in zip(real_logits(outputs.logits, batch), expected, strict=True):
        assert_close(actual, reference)
    token = torch.full((len(RAGGED), 1), FIRST_TEXT)
    step = dpvr(
        input_ids=token,
        attention_mask=torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1),
        past_key_values=outputs.past_key_values,
    ).logits[:, -1]
    grown = [torch.nn.functional.pad(batch["input_ids"], (0, 1), value=FIRST_TEXT)]
    grown.append(torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1))
    for actual, reference in zip(step, batch_logits(dpvr, *grown, batch["pixel_values"]), strict=True):
        assert_close(actual, reference[-1])


def test_flex_attention_gives_the_logits_of_sdpa(model):
    batch = make_batch(RAGGED)
    expected = model(**batch).logits
    flex = copy.deepcopy(model)
    flex.set_attn_implementation({"text_config": "flex_attention", "vision_config": "sdpa"})
    for actual, reference in zip(real_logits(flex(**batch).logits, batch), real_logits(expected, batch), strict=True):
        assert_close(actual, reference)


def flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, softmax_scale=None):
    """What `flash_attn_varlen_func` computes: sequences one after the other, `(tokens, heads, head_dim)`."""
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        query = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].transpose(0, 1)
        key, value = (x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].transpose(0, 1) for x in (k, v))
        shape = query.shape[1], key.shape[1]
        mask = torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0]) if causal else None
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=softmax_scale, enable_gqa=True
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


def flash_dense(q, k, v, causal=False, softmax_scale=None):
    """What `flash_attn_func` computes: `(B, T, heads, head_dim)`, no padding."""
    return torch.stack(
        [
            flash_varlen(*row, *[[0, row[0].shape[0]], [0, row[1].shape[0]]], 0, 0, causal, softmax_scale)
            for row in zip(q, k, v, strict=True)
        ]
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_of_a_batch, side=sides, seed=st.integers(0, 9))
def test_flash_attention_is_called_so_that_it_gives_the_logits_of_sdpa(monkeypatch, model, rows, side, seed):
    """Through transformers' flash interface, with slow kernels of the same meaning: unpadding, cached steps, also one
    whose mask hides an earlier token, and position gaps in a single row, which it would take for packed sequences."""
    from transformers import modeling_flash_attention_utils as flash

    monkeypatch.setattr(flash, "_loaded_implementation", None)
    kernels = (flash_dense, flash_varlen, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: kernels)
    flashing = copy.deepcopy(model)
    flashing.model.language_model.config._attn_implementation = "flash_attention_2"
    flashing.config.text_config._attn_implementation = "flash_attention_2"
    batch = make_batch(rows, side, seed)
    expected, outputs = model(**batch), flashing(**batch)
    for actual, reference in zip(real_logits(outputs.logits, batch), real_logits(expected.logits, batch), strict=True):
        assert_close(actual, reference)
    mask = batch["attention_mask"]
    for hidden in (None, seed % mask.shape[1]):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        if hidden is not None:
            mask[:, hidden] = 0
        step = {"input_ids": torch.full((len(rows), 1), FIRST_TEXT), "attention_mask": mask}
        actual = flashing(**step, past_key_values=outputs.past_key_values).logits
        assert_close(actual, model(**step, past_key_values=expected.past_key_values).logits)


@settings(max_examples=60)
@given(rows=rows_of_a_batch, side=sides, seed=st.integers(0, 9))
def test_a_row_does_not_depend_on_its_companions(model, rows, side, seed):
    batch = make_batch(rows, side, seed)
    with torch.no_grad():
        together = real_logits(model(**batch).logits, batch)
        images = iter(batch["pixel_values"] if batch["pixel_values"] is not None else [])
        for row, mask, logits in zip(batch["input_ids"], batch["attention_mask"].bool(), together, strict=True):
            ids = row[mask][None]
            pixels = [next(images) for _ in range(int((ids == IMAGE).sum()) // TOKENS_PER_IMAGE)]
            alone = model(input_ids=ids, pixel_values=torch.stack(pixels) if pixels else None)
            assert_close(logits, alone.logits[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision_follows_fp32(model, dtype, attention):
    batch = make_batch(RAGGED)
    expected = model(**batch).logits
    half = copy.deepcopy(model).to(dtype)
    half.set_attn_implementation(attention)
    logits = half(**batch).logits
    assert logits.dtype == dtype
    for actual, reference in zip(real_logits(logits, batch), real_logits(expected, batch), strict=True):
        assert torch.nn.functional.cosine_similarity(actual.float(), reference, dim=-1).min() > 0.99


# --- the routing is real -------------------------------------------------------------------------------------------


def test_text_only_layers_and_caches_hold_no_vision_token(model):
    lengths = {}

    def record(name):
        def hook(_, args, output):
            lengths[name] = args[0].shape[1]

        return hook

    layers = model.model.language_model.layers
    handles = [layer.register_forward_hook(record(i)) for i, layer in enumerate(layers)]
    handles.append(model.model.side_branch.layers[0].register_forward_hook(record("side")))
    batch = make_batch(["ttItt", "ItttI"])  # 8 and 11 tokens, of which 4 and 3 text, 4 and 8 vision
    cache = model(**batch).past_key_values
    for handle in handles:
        handle.remove()
    assert lengths == {0: 11, 1: 11, 2: 4, 3: 4, 4: 4, 5: 11, "side": 8}
    assert [cache.get_seq_length(i) for i in range(NUM_LAYERS)] == [11, 11, 4, 4, 4, 11]
    assert cache.get_seq_length(NUM_LAYERS) == 8
    # The slots name each row's own columns, in order, after as much padding as it lacks tokens
    assert cache.layers[NUM_LAYERS + 1].keys[:, 0, :, 0].tolist() == [[4, 5, 10, 11], [0, 5, 6, 7]]


def test_an_untrained_side_branch_is_the_identity_where_projections_have_biases():
    model = make_dpvr(text=text_config(attention_bias=True, mlp_bias=True), random_branch=False)
    branch, source = model.model.side_branch.layers[0], model.model.language_model.layers[2]
    for layer in (source, branch):
        for name, weight in layer.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.ones_(weight)
    for weight in branch.parameters():
        weight._is_hf_initialized = False
    model.model.initialize_side_branch()
    assert branch.self_attn.o_proj.bias.abs().max() == branch.mlp.down_proj.bias.abs().max() == 0
    assert torch.equal(branch.self_attn.q_proj.bias, source.self_attn.q_proj.bias)


def test_in_text_only_layers_an_image_alone_attends_to_nothing():
    model = make_dpvr()
    model.set_attn_implementation("eager")
    attentions = model(**make_batch(["I"]), output_attentions=True).attentions
    assert [bool(each.any()) for each in attentions] == [True, True, False, False, False, True]
    assert len({each.shape for each in attentions}) == 1


def test_nothing_of_the_side_branch_runs_without_an_image(model):
    calls = []
    handle = model.model.side_branch.register_forward_hook(lambda *_: calls.append(1))
    model(**make_batch(["tt", "t"]))
    copy.deepcopy(model).train()(**make_batch(["tt", "t"]))  # without gradients
    with torch.enable_grad():
        model(**make_batch(["tt", "t"]))
    handle.remove()
    assert not calls


# --- the cache -----------------------------------------------------------------------------------------------------


@settings(max_examples=120)
@given(data=st.data(), rows=rows_of_a_batch, geometry=st.sampled_from(GEOMETRIES), seed=st.integers(0, 9))
def test_a_prompt_cut_anywhere_gives_the_logits_of_one_call(models, data, rows, geometry, seed):
    dpvr = models[geometry]
    batch = make_batch(rows, data.draw(sides), seed)
    width = batch["input_ids"].shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, width - 1)), max_size=4))) if width > 1 else []
    with torch.no_grad():
        expected = real_logits(dpvr(**batch).logits, batch)
        embeds = (
            embed(dpvr, batch)
            if batch["pixel_values"] is not None
            else dpvr.get_input_embeddings()(batch["input_ids"])
        )
        cache, logits = DynamicCache(), []
        for start, stop in zip([0, *cuts], [*cuts, width], strict=True):
            outputs = dpvr(
                inputs_embeds=embeds[:, start:stop],
                attention_mask=batch["attention_mask"][:, :stop],
                mm_token_type_ids=batch["mm_token_type_ids"][:, start:stop],
                past_key_values=cache,
            )
            logits.append(outputs.logits)
    for actual, reference in zip(real_logits(torch.cat(logits, 1), batch), expected, strict=True):
        assert_close(actual, reference)


def test_token_by_token_gives_the_logits_of_one_call(model):
    batch = make_batch(["tItIt", "ttttttttttt"])
    embeds, cache = embed(model, batch), DynamicCache(config=model.config)
    steps = [
        model(
            inputs_embeds=embeds[:, i : i + 1],
            attention_mask=batch["attention_mask"][:, : i + 1],
            mm_token_type_ids=batch["mm_token_type_ids"][:, i : i + 1],
            past_key_values=cache,
        ).logits
        for i in range(embeds.shape[1])
    ]
    assert_close(torch.cat(steps, 1), model(**batch).logits)


def test_turns_with_an_image_in_a_later_turn_give_the_logits_of_one_call(model):
    first, second = make_batch(["tttt", "ttItt"]), make_batch(["tIttt", "ttttI"], "right", seed=1)
    joined = {name: torch.cat([first[name], second[name]], 1) for name in ("input_ids", "attention_mask")}
    images = [first["pixel_values"][0], second["pixel_values"][0], second["pixel_values"][1]]
    # Images come in the order of the rows: row 0 has one in turn 2, row 1 one in each turn
    joined["pixel_values"] = torch.stack([images[1], images[0], images[2]])
    cache = model(**first).past_key_values
    cached = model(**{**second, "attention_mask": joined["attention_mask"]}, past_key_values=cache)
    expected = model(**joined).logits[:, first["input_ids"].shape[1] :]
    for actual, reference in zip(real_logits(cached.logits, second), real_logits(expected, second), strict=True):
        assert_close(actual, reference)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_manual_loop_without_mm_token_type_ids_gives_the_right_logits(model, side):
    batch = make_batch(RAGGED, side)
    outputs = model(**without(batch, "mm_token_type_ids"), position_ids=positions(batch))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    position = positions(batch).amax(-1, keepdim=True)
    types = batch["mm_token_type_ids"]
    for _ in range(3):
        token = torch.full((len(ids), 1), FIRST_TEXT)
        ids, mask, position = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1), position + 1
        types = torch.cat([types, torch.zeros_like(token)], 1)
        outputs = model(
            input_ids=token, attention_mask=mask, position_ids=position, past_key_values=outputs.past_key_values
        )
        whole = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            mm_token_type_ids=types,
            pixel_values=batch["pixel_values"],
        )
        assert_close(outputs.logits[:, -1], whole.logits[:, -1])


def test_whether_there_is_a_cache_says_the_config_unless_the_call_does(model):
    model, batch = copy.deepcopy(model), make_batch(["ttIt"])
    assert getattr(model(**batch), CACHE) is not None
    model.config.text_config.use_cache = False
    assert getattr(model(**batch), CACHE) is None
    assert getattr(model(**batch, use_cache=True), CACHE) is not None


def test_a_second_call_and_a_second_model_change_nothing(model):
    batch = make_batch(RAGGED)
    first = model(**batch).logits
    other = make_dpvr(7, None, 4, 2, 2)
    other(**batch)
    model(**make_batch(["ttt"]))
    assert torch.equal(model(**batch).logits, first)


@pytest.mark.parametrize("kind", CROPPED_CACHES)
@settings(max_examples=60)
@given(data=st.data(), rows=rows_of_a_batch, side=sides, seed=st.integers(0, 9))
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_been(model, kind, data, rows, side, seed):
    """Also through images and padding, and again after a second crop."""
    batch = make_batch(rows, side, seed)
    width = batch["input_ids"].shape[1]
    with torch.no_grad():
        embeds = (
            embed(model, batch)
            if batch["pixel_values"] is not None
            else model.get_input_embeddings()(batch["input_ids"])
        )

        def call(start, stop, cache):
            return model(
                inputs_embeds=embeds[:, start:stop],
                attention_mask=batch["attention_mask"][:, :stop],
                mm_token_type_ids=batch["mm_token_type_ids"][:, start:stop],
                past_key_values=cache,
            ).logits

        # Room for three times as many: the padding of a ragged stream keeps its slots
        static = {"config": model.config.text_config, "max_cache_len": 3 * width}
        cache = StaticCache(**static) if kind == "static" else DynamicCache(config=model.config)
        expected = call(0, width, cache)
        for _ in range(2):
            kept = data.draw(st.integers(0, width - 1))
            cache.crop(kept - width)
            assert cache.get_seq_length() == kept
            actual, is_token = call(kept, width, cache), batch["attention_mask"][:, kept:].bool()
            if is_token.any():
                assert_close(actual[is_token], expected[:, kept:][is_token])


@pytest.mark.parametrize("kind", CROPPED_CACHES)
@pytest.mark.parametrize("num_side_layers", [0, 1])
def test_an_image_after_a_crop_sees_nothing_of_what_was_cropped(kind, num_side_layers):
    model = make_dpvr(num_side_layers=num_side_layers)

    def logits(texts):
        static = {"config": model.config.text_config, "max_cache_len": 40}
        cache = StaticCache(**static) if kind == "static" else DynamicCache()
        model(**without(make_batch(["ttIt"]), "attention_mask"), past_key_values=cache)
        for text in texts:
            model(input_ids=text, past_key_values=cache)
            cache.crop(-text.shape[1])
        image = model(**without(make_batch(["ItI"], seed=1), "attention_mask"), past_key_values=cache)
        return torch.cat([image.logits, model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits], 1)

    with torch.no_grad():
        cropped = logits([torch.tensor([[20, 21, 22, 23]]), torch.tensor([[30, 31]])])
        assert_close(cropped, logits([]))


@pytest.mark.parametrize("kind", CROPPED_CACHES)
def test_a_crop_after_which_rows_hold_unequal_numbers_of_a_kind_leaves_no_slot_to_see(model, kind):
    """Nothing but the crop tells of it: rows were of one length, and no mask comes with them."""
    static, text = {"config": model.config.text_config, "max_cache_len": 20}, torch.tensor([[9], [10]])

    def after_crop(rows: slice):
        cache = StaticCache(**static) if kind == "static" else DynamicCache()
        new = {"inputs_embeds": embeds[rows], "mm_token_type_ids": batch["mm_token_type_ids"][rows]}
        model(**new, past_key_values=cache)
        cache.crop(-4)  # leaves two text tokens and a vision token, and one of text and two of vision
        return model(input_ids=text[rows], past_key_values=cache).logits

    with torch.no_grad():
        batch = make_batch(["ttIt", "tItt"])
        embeds = embed(model, batch)
        alone = torch.cat([after_crop(slice(0, 1)), after_crop(slice(1, 2))])
        assert_close(after_crop(slice(None)), alone)


def test_a_crop_by_layers_that_know_nothing_of_streams_is_refused(model):
    class OwnLayer(DynamicLayer):
        pass

    cache = DynamicCache()
    cache.layers = [OwnLayer() for _ in range(NUM_LAYERS)]
    model(**make_batch(["ttItt"]), past_key_values=cache)
    with pytest.raises(ValueError, match="dropped 5 tokens, but text-only layers hold fewer of those"):
        cache.crop(-5)


def test_a_mask_that_hides_earlier_tokens_hides_them_in_every_layer(model):
    llava = make_llava()
    llava.load_state_dict(model.state_dict(), strict=False)
    ids, mask = torch.tensor([[7, 8, 9, 10]]), torch.tensor([[1, 0, 1, 1, 1]])
    with torch.no_grad():
        caches = [getattr(each(input_ids=ids), CACHE) for each in (llava, model)]
        step = {"input_ids": torch.tensor([[11]]), "attention_mask": mask}
        expected, actual = (
            each(**step, past_key_values=cache).logits for each, cache in zip((llava, model), caches, strict=True)
        )
        assert_close(actual, expected)
        unmasked = model(**{**step, "attention_mask": None}, past_key_values=model(input_ids=ids).past_key_values)
    assert (unmasked.logits - actual).abs().max() > 1e-2


def test_a_crop_of_generated_tokens_frees_their_slots(model):
    cache = model(**make_batch(["ttItt"])).past_key_values
    lengths = [layer.get_seq_length() for layer in cache.layers]
    more = {"input_ids": torch.tensor([[9, 10, 11]]), "attention_mask": torch.ones(1, 11, dtype=torch.long)}
    model(**more, past_key_values=cache)
    cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    cache.crop(-3)  # two text tokens and a vision token
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5, 2, 2, 2, 5, 3, 2, 3]


def test_a_crop_within_an_image_reaches_every_layer_of_the_side_branch():
    cache = make_dpvr(num_side_layers=2)(**make_batch(["ttItt"])).past_key_values
    cache.crop(-4)  # leaves two vision tokens
    assert [layer.get_seq_length() for layer in cache.layers[NUM_LAYERS:]] == [2, 2, 2, 2]


def test_a_4d_mask_is_routed_as_the_2d_mask_that_it_stands_for(model):
    batch = make_batch(RAGGED)
    width = batch["input_ids"].shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None, None]
    causal |= torch.eye(width, dtype=torch.bool)
    logits = model(**{**batch, "attention_mask": causal}).logits
    expected = model(**batch).logits
    for actual, reference in zip(real_logits(logits, batch), real_logits(expected, batch), strict=True):
        assert_close(actual, reference)


def test_a_4d_mask_may_be_one_for_all_rows_and_additive(model):
    batch = without(make_batch(["ttIt", "tItt"]), "attention_mask")
    seen = torch.ones(7, 7).tril().bool()[None, None]
    expected = model(**batch).logits
    assert_close(model(**batch, attention_mask=seen).logits, expected)
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert_close(model(**batch, attention_mask=additive).logits, expected)


def test_a_boolean_4d_mask_hides_the_same_from_eager_attention_which_would_add_it_to_the_scores(model):
    batch = make_batch(["ttIt", "tItt"])
    own = torch.eye(7, dtype=torch.bool)[None, None]  # each token sees itself alone
    expected = model(**{**batch, "attention_mask": own}).logits
    assert (expected - model(**batch).logits).abs().max() > 0.1
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    assert_close(other(**{**batch, "attention_mask": own}).logits, expected)


# --- what cannot be known is refused -------------------------------------------------------------------------------


def test_unknown_vision_tokens_are_refused_with_what_to_pass(model):
    batch = make_batch(["ttItt"])
    with pytest.raises(ValueError, match=r"by row: \[4\].*no image came with them.*pixel_values"):
        model(**without(batch, "pixel_values"))
    with pytest.raises(ValueError, match="Pass mm_token_type_ids of shape"):
        model(inputs_embeds=embed(model, batch))
    cache = model(**batch).past_key_values
    more = make_batch(["Itt"])["input_ids"]
    with pytest.raises(ValueError, match=r"by row: \[4\].*no image came with them.*pixel_values"):
        model(input_ids=more, past_key_values=cache)
    with pytest.raises(ValueError, match=r"mm_token_type_ids has shape \(1, 8\).*\(1, 1\)"):
        model(input_ids=torch.tensor([[9]]), mm_token_type_ids=batch["mm_token_type_ids"], past_key_values=cache)


def test_image_tokens_of_a_prompt_without_images_are_text_as_they_are_to_llava(model):
    """In a prompt that nobody calls vision: without pixel values and without mm_token_type_ids."""
    llava = make_llava()
    llava.load_state_dict(model.state_dict(), strict=False)
    batch = make_batch(["ttItt", "It"])
    prompt = without(batch, "pixel_values", "mm_token_type_ids")
    expected = llava(**prompt).logits
    for actual, reference in zip(
        real_logits(model(**prompt).logits, batch), real_logits(expected, batch), strict=True
    ):
        assert_close(actual, reference)


def test_tokens_and_images_that_come_in_two_ways_or_none_are_refused(model):
    batch = make_batch(["tIt"])
    for tokens in (without(batch, "input_ids"), {**batch, "inputs_embeds": embed(model, batch)}):
        with pytest.raises(ValueError, match="Pass exactly one of input_ids and inputs_embeds"):
            model(**tokens)
    features = {"image": model.get_image_features(batch["pixel_values"], return_dict=True)}
    with pytest.raises(ValueError, match="not both: they are the same images"):
        model(**batch, mm_encoder_outputs=features)


def test_embedded_image_tokens_are_found_where_images_come_with_them(model):
    """As LLaVA finds them."""
    batch = make_batch(RAGGED)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    found = model(**without(batch, "input_ids", "mm_token_type_ids"), inputs_embeds=embeds).logits
    assert torch.equal(found, model(**batch).logits)


def test_a_token_of_another_type_than_1_is_text(model):
    batch = without(make_batch(["ttt"]), "pixel_values")
    types = torch.tensor([[0, 2, 3]])
    assert torch.equal(model(**{**batch, "mm_token_type_ids": types}).logits, model(**batch).logits)


def test_a_single_token_after_a_cache_is_vision_if_an_image_comes_with_it(model):
    batch = make_batch(["tIt"])
    outputs = model.get_image_features(batch["pixel_values"], return_dict=True)
    features, expected = outputs.pooler_output[0], model(**batch).logits
    cache, logits = DynamicCache(), []
    for i, token in enumerate(batch["input_ids"][0]):
        outputs.pooler_output = [features[i - 1 : i]]
        images = {"mm_encoder_outputs": {"image": outputs}} if token == IMAGE else {}
        logits.append(model(input_ids=token[None, None], past_key_values=cache, **images).logits)
    assert_close(torch.cat(logits, 1), expected)


def test_a_wrong_number_of_images_is_refused_with_both_numbers(model):
    batch = make_batch(["tIt", "II"])
    with pytest.raises(ValueError, match=r"hold 12 image tokens \(by row: \[4, 8\]\) but the images give 8 features"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]})
    with pytest.raises(ValueError, match="hold 0 image tokens"):
        model(**{**make_batch(["tt"]), "pixel_values": batch["pixel_values"][:1]})


def test_a_cache_of_another_model_is_refused(model):
    cache = make_llava()(input_ids=torch.tensor([[7, 8]])).past_key_values
    with pytest.raises(ValueError, match="holds 2 tokens, but this model"):
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)


@pytest.mark.parametrize("make_cache", [DynamicCache, StaticCache])
def test_a_cache_of_another_geometry_is_refused(models, make_cache):
    cache = (
        make_cache(config=models[2, 1, 1].config, max_cache_len=20) if make_cache is StaticCache else DynamicCache()
    )
    models[2, 1, 1](**make_batch(["ttItt"]), past_key_values=cache)
    deeper = make_dpvr(0, text_config(num_hidden_layers=NUM_LAYERS + 1), 2, 1, 2)  # the same layers fuse first
    for other in (models[5, 1, 1], models[2, 0, 1], make_dpvr(0, None, 2, 1, 2), deeper):
        with pytest.raises(ValueError, match="holds 8 tokens, but this model"):
            other(input_ids=torch.tensor([[9]]), past_key_values=cache)


def test_an_empty_cache_that_was_made_for_another_depth_is_refused(model):
    text = {"input_ids": torch.tensor([[9]])}
    cache = DynamicCache(config=text_config(num_hidden_layers=NUM_LAYERS + 1))
    with pytest.raises(ValueError, match="has 7 layers and holds 0 tokens"):
        model(**text, past_key_values=cache)
    cache = DynamicCache()
    model(**text, past_key_values=cache)
    cache.reset()  # its layers are those of a decoder of 6 and of its streams
    deeper = make_dpvr(text=text_config(num_hidden_layers=len(cache.layers)))
    with pytest.raises(ValueError, match="has 9 layers and holds 0 tokens"):
        deeper(**text, past_key_values=cache)


def test_a_cache_filled_before_the_layer_was_changed_is_refused(model):
    model, cache = copy.deepcopy(model), DynamicCache()
    with torch.no_grad():
        model(**make_batch(["tIt"]), past_key_values=cache)
        model.config.saturation_layer += 1
        with pytest.raises(ValueError, match="did not write them"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda: StaticCache(config=text_config(), max_cache_len=30)])
def test_an_image_after_a_cache_that_expects_none_is_refused(model, make_cache):
    cache, later = make_cache(), make_batch(["It"], seed=3)
    cache.expects_images = False
    del later["attention_mask"]
    with torch.no_grad():
        model(**make_batch(["tIt"]), past_key_values=cache)
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        with pytest.raises(ValueError, match=r"as its expects_images is False, nothing of the side branch"):
            model(**later, past_key_values=cache)


def test_without_side_layers_an_image_may_follow_in_any_cache():
    """There are no keys of a side branch that it would read."""
    model, expecting, other = make_dpvr(num_side_layers=0), DynamicCache(), DynamicCache()
    other.expects_images = False
    later = without(make_batch(["It"], seed=3), "attention_mask")
    with torch.no_grad():
        for cache in (expecting, other):
            model(**make_batch(["tIt"]), past_key_values=cache)
        expected = model(**later, past_key_values=expecting).logits
        assert torch.equal(model(**later, past_key_values=other).logits, expected)


def test_text_after_a_cache_that_expects_no_image_is_text_in_training_too():
    model, cache = make_dpvr().train(), DynamicCache()
    cache.expects_images = False
    batch, token = make_batch(["ttIttt"]), torch.tensor([[8]])
    model(**batch, past_key_values=cache)
    logits = model(input_ids=token, past_key_values=cache).logits
    whole = {"input_ids": torch.cat([batch["input_ids"], token], 1), "pixel_values": batch["pixel_values"]}
    assert_close(logits, model(**whole).logits[:, -1:])
    embeds, types = model.get_input_embeddings()(token), torch.zeros_like(token)
    model(inputs_embeds=embeds, mm_token_type_ids=types, past_key_values=cache)


@pytest.mark.parametrize(
    ("make_cache", "tolerance"),
    [(DynamicCache, 0), (lambda: StaticCache(config=text_config(), max_cache_len=30), TOLERANCE)],
)
def test_a_cache_that_was_reset_is_taken_as_an_empty_one(model, make_cache, tolerance):
    cache, batch = make_cache(), make_batch(["tIt"])
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        cache.reset()
        logits = model(**batch, past_key_values=cache).logits
        assert_close(logits, model(**batch).logits, tolerance)
        cache.reset()
        text = model(input_ids=batch["input_ids"], past_key_values=cache).logits  # image tokens without an image: text
        assert_close(text, model(input_ids=batch["input_ids"]).logits, tolerance)


def test_a_mask_that_covers_too_few_tokens_is_refused_with_both_numbers(model):
    cache, batch = DynamicCache(), make_batch(["ttItt"])
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        with pytest.raises(ValueError, match="covers 8 tokens, but the cache holds 8 and this call 1 more"):
            model(input_ids=torch.tensor([[9]]), attention_mask=batch["attention_mask"], past_key_values=cache)


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda: StaticCache(config=text_config(), max_cache_len=30)])
@pytest.mark.parametrize("rows", [["tIt", "tIt"], ["ttt", "ttt"]], ids=["image", "text"])
def test_a_mask_of_other_rows_is_refused_with_both_numbers_and_leaves_the_cache_as_it_was(model, make_cache, rows):
    cache, batch = make_cache(), make_batch(rows)
    mask = torch.ones(3, batch["input_ids"].shape[1], dtype=torch.long)
    mask[:, 0] = 0
    with pytest.raises(ValueError, match="attention_mask has 3 rows, but this call holds 2"):
        model(**{**batch, "attention_mask": mask}, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert_close(model(**batch, past_key_values=cache).logits, model(**batch).logits)


@pytest.mark.parametrize("rows", [["tIt", "tIt"], ["ttt", "ttt"]], ids=["image", "text"])
def test_a_mask_of_one_row_stands_for_all(model, rows):
    batch = make_batch(rows)
    batch["attention_mask"][:, 0] = 0
    one = {**batch, "attention_mask": batch["attention_mask"][:1]}
    assert_close(model(**one).logits[:, 1:], model(**batch).logits[:, 1:], 0)


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda: StaticCache(config=text_config(), max_cache_len=30)])
def test_positions_of_other_tokens_are_refused_and_leave_the_cache_as_it_was(model, make_cache):
    def logits(wrong):
        cache = make_cache()
        model(**without(make_batch(["ttIt"]), "attention_mask"), past_key_values=cache)
        for position_ids in wrong:
            with pytest.raises(ValueError, match=r"position_ids has shape \(1, \d+\) but this call holds 2 tokens"):
                model(input_ids=text, position_ids=position_ids, past_key_values=cache)
        return model(input_ids=text, past_key_values=cache).logits

    text = torch.tensor([[8, 9]])
    assert torch.equal(logits([torch.arange(1)[None], torch.arange(9)[None]]), logits([]))


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda: StaticCache(text_config(), max_cache_len=9)])
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 8), (1, 1, 2, 10), (1, 1, 1, 9), (1, 1, 9, 9), (2, 1, 2, 9), (1, 2, 9)], ids=str
)
def test_a_mask_of_another_shape_is_refused_with_both_shapes_and_leaves_the_cache_as_it_was(model, make_cache, shape):
    def logits(masks):
        cache = make_cache()
        model(**without(make_batch(["ttIt"]), "attention_mask"), past_key_values=cache)
        for mask in masks:
            with pytest.raises(ValueError, match=re.escape(f"{shape}") + ".*2 tokens that see 9 columns"):
                model(input_ids=text, attention_mask=mask, past_key_values=cache)
        return model(input_ids=text, past_key_values=cache).logits

    text = torch.tensor([[8, 9]])
    assert torch.equal(logits([torch.ones(shape, dtype=torch.bool)]), logits([]))


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda: StaticCache(text_config(), max_cache_len=9)])
@torch.no_grad()
def test_a_4d_mask_of_integers_is_refused_and_leaves_the_cache_as_it_was(model, make_cache):
    cache, text = make_cache(), torch.tensor([[8, 9]])
    model(**without(make_batch(["ttIt"]), "attention_mask"), past_key_values=cache)
    expected = model(input_ids=text, past_key_values=copy.deepcopy(cache)).logits
    with pytest.raises(ValueError, match=r"4D attention_mask is of torch.int64.*bool"):
        model(input_ids=text, attention_mask=torch.ones(1, 1, 2, 9, dtype=torch.long), past_key_values=cache)
    assert torch.equal(model(input_ids=text, past_key_values=cache).logits, expected)


def test_a_step_with_a_static_cache_and_a_mask_that_grows_reads_nothing_from_the_device(model, monkeypatch):
    cache, batch = StaticCache(config=text_config(), max_cache_len=30), make_batch(["ttItt"])
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        reads = record_reads(monkeypatch)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        model(input_ids=torch.tensor([[9]]), attention_mask=mask, past_key_values=cache)
    assert not reads


def test_a_side_branch_in_float32_runs_in_a_model_of_bfloat16():
    model = make_dpvr().to(torch.bfloat16)
    with torch.no_grad():
        expected = model(**make_batch(["ttItt"])).logits
        model.model.side_branch.float()
        assert_close(model(**make_batch(["ttItt"])).logits, expected, tolerance=0.1)


def test_image_features_of_float32_are_taken_by_a_decoder_of_bfloat16():
    model, batch = make_dpvr().to(torch.bfloat16), make_batch(["ttItt"])
    outputs = model.get_image_features(batch.pop("pixel_values").bfloat16(), return_dict=True)
    expected = model(**batch, mm_encoder_outputs={"image": outputs}).logits
    outputs.pooler_output = [features.float() for features in outputs.pooler_output]
    assert torch.equal(model(**batch, mm_encoder_outputs={"image": outputs}).logits, expected)


def test_continuous_batching_is_refused_with_a_word(model):
    with pytest.raises(ValueError, match="Continuous batching .* Use generate, with padded batches"):
        model.generate_batch(inputs=[[7, 8, 9]], generation_config=GenerationConfig(max_new_tokens=2))


def test_what_the_vision_tower_takes_and_gives_is_passed_on_as_by_llava():
    llava = make_llava(attn_implementation="eager").eval()
    model = make_dpvr(saturation_layer=NUM_LAYERS - 1, random_branch=False, attn_implementation="eager").eval()
    model.load_state_dict(llava.state_dict(), strict=False)
    size = llava.config.vision_config.image_size
    num_tokens = (2 * size // llava.config.vision_config.patch_size) ** 2
    ids = torch.tensor([[7] + [IMAGE] * num_tokens + [8]])
    pixels = torch.randn(1, 3, 2 * size, 2 * size, generator=torch.Generator().manual_seed(0))
    options = {"interpolate_pos_encoding": True, "output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        ours = model(input_ids=ids, pixel_values=pixels, **options)
        try:
            theirs = llava(input_ids=ids, pixel_values=pixels, **options)
        except ValueError:
            pytest.skip("LLaVA passes nothing on in transformers 5.23")
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    for name in ("hidden_states", "attentions"):
        mine, other = getattr(ours.image_outputs, name), getattr(theirs.image_outputs, name)
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.skipif(CACHE == "past_key_values", reason="LLaVA gives them to its tower since transformers 5.24")
def test_a_vision_tower_that_takes_patches_gets_them_as_by_llava():
    tower = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=4, num_patches=16
    )
    fields = {**LLAVA_FIELDS, "vision_feature_select_strategy": "full"}
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text_config(), **fields)).eval()
    config = DPVRConfig(vision_config=tower, text_config=text_config(), **fields, saturation_layer=NUM_LAYERS - 1)
    dpvr = DPVRForConditionalGeneration(config).eval()
    dpvr.load_state_dict(llava.state_dict(), strict=False)
    inputs = {
        "input_ids": torch.tensor([[7, *[IMAGE] * 4, 9]]),
        "pixel_values": torch.randn(1, 4, 48),
        "pixel_attention_mask": torch.ones(1, 4).long(),
        "spatial_shapes": torch.tensor([[2, 2]]),
    }
    torch.testing.assert_close(dpvr(**inputs).logits, llava(**inputs).logits, atol=TOLERANCE, rtol=0)


def test_arguments_by_position_are_llavas(model):
    def names(of):
        known = {"past_key_values": "cache"}
        return [known.get(name, name) for name in list(inspect.signature(of.forward).parameters)[1:]]

    llava = make_llava()
    for ours, theirs in ((model, llava), (model.model, llava.model)):
        shared = [name for name in names(type(theirs)) if name != "kwargs"]
        assert names(type(ours))[: len(shared)] == shared


def test_what_makes_tokens_see_later_ones_is_refused(model):
    batch = make_batch(["ttIt", "tt"])
    with pytest.raises(ValueError, match="is_causal=False"):
        model(**batch, is_causal=False)
    changed = make_dpvr()
    changed.config.text_config.is_causal = False
    with pytest.raises(ValueError, match="is_causal=False"):
        changed(**batch)
    model(**batch, is_causal=True)
    with pytest.raises(ValueError, match="attention_mask is a str"):
        model(**{**batch, "attention_mask": "mask"})


def test_an_attention_that_makes_no_masks_is_refused_where_streams_need_one():
    model = make_dpvr()
    rows = make_batch(["ttItttt", "tttttttttt"])
    assert rows.pop("attention_mask").all()
    even = make_batch(["ttIt", "tItt"])
    expected = model(**even).logits
    AttentionInterface.register("no_masks", sdpa_attention_forward)
    try:
        model.set_attn_implementation("no_masks")
        torch.testing.assert_close(model(**even).logits, expected)
        with pytest.raises(ValueError, match="attn_implementation='no_masks' has no function that makes its masks"):
            model(**rows)
    finally:
        del AttentionInterface._global_mapping["no_masks"]


@pytest.mark.parametrize("shape", ["2D", "3D"])
@pytest.mark.parametrize("num_read", [1, 3])
def test_the_last_positions_alone_get_masks_of_any_shape(shape, num_read):
    """Of a user's own attention, whose masks may be the same for all heads, or for all rows."""

    def mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, **kwargs):
        visible = torch.arange(kv_length)[None] + kv_offset <= torch.arange(q_length)[:, None] + q_offset
        return visible if shape == "2D" else visible.expand(batch_size, -1, -1)

    def attention(module, query, key, value, mask, **kwargs):
        mask = mask[None, None] if shape == "2D" else mask[:, None]
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("own", attention)
    AttentionMaskInterface.register("own", mask)
    try:
        model, batch = make_dpvr(), make_batch(["ttItt", "ttItt"])
        for config in (model.model.language_model.config, model.config.text_config):
            config._attn_implementation = "own"
        actual = model(**batch, logits_to_keep=num_read).logits
        assert_close(actual, model(**batch).logits[:, -num_read:])
    finally:
        del AttentionInterface._global_mapping["own"], AttentionMaskInterface._global_mapping["own"]


def test_another_number_of_layers_than_the_decoder_has_is_refused():
    model = make_dpvr()
    model.config.text_config.num_hidden_layers = 4
    with pytest.raises(ValueError, match="num_hidden_layers=4, but the decoder has 6 layers"):
        model(**make_batch(["ttIt"]))


@pytest.mark.parametrize("routed", [False, True])
def test_a_hook_before_the_attention_of_the_last_layer_changes_what_it_changes_for_all_tokens(routed):
    model, batch = make_dpvr(saturation_layer=2 if routed else NUM_LAYERS - 1), make_batch(["ttIt", "tt"])

    def hook(module, args, kwargs):
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 1.5}

    plain = model(**batch).logits[:, -1:]
    handle = model.model.language_model.layers[-1].self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    expected = model(**batch).logits[:, -1:]
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, expected, atol=TOLERANCE, rtol=0)
    handle.remove()


def test_a_prefill_is_traced_with_a_mask_of_4d(model):
    batch = make_batch(["ttIt", "tItt"])
    seen = torch.ones(7, 7).tril().bool()[None, None].expand(2, -1, -1, -1)

    class Prefill(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask, kinds, pixels):
            return self.model(ids, pixels, mask, mm_token_type_ids=kinds, use_cache=False).logits

    inputs = (batch["input_ids"], seen, batch["mm_token_type_ids"], batch["pixel_values"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Prefill(), inputs, check_trace=False)
    torch.testing.assert_close(traced(*inputs), model(**batch).logits, atol=TOLERANCE, rtol=0)


def test_an_attention_mask_that_misses_the_cache_is_refused(model):
    cache = model(**make_batch(["ttItt"])).past_key_values
    with pytest.raises(ValueError, match="covers 1 tokens, but the cache holds 8 and this call 1 more"):
        model(input_ids=torch.tensor([[9]]), attention_mask=torch.ones(1, 1), past_key_values=cache)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=str)
def test_packed_sequences_are_refused(model, options):
    batch = without(make_batch(["tttttt"]), "attention_mask")
    with pytest.raises(ValueError, match="packed"):
        model(**batch, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), **options)
    with pytest.raises(ValueError, match="packed"):
        model(**batch, cu_seq_lens_q=torch.tensor([0, 3, 6]), position_ids=torch.arange(6)[None], **options)


def test_positions_that_leave_gaps_or_repeat_are_packed_sequences_only_without_a_cache(model):
    """As transformers takes them."""
    batch = without(make_batch(["tttttt"]), "attention_mask")
    for places in ([0, 1, 2, 8, 9, 10], [0, 0, 0, 1, 2, 3]):
        placed = {**batch, "position_ids": torch.tensor([places])}
        expected = model(**placed, attention_mask=torch.ones(1, 6).long()).logits
        assert_close(model(**placed).logits, expected)
        with pytest.raises(ValueError, match="packed"):
            model(**placed, use_cache=False)


def test_a_prompt_longer_than_the_sliding_window_is_refused():
    model = make_dpvr(text=text_config(MistralConfig, sliding_window=8))
    model(**make_batch(["ttItt"]))
    with pytest.raises(ValueError, match="9 tokens exceed text_config.sliding_window=8"):
        model(**make_batch(["ttIttt"]))
    cache = model(**make_batch(["ttItt"])).past_key_values
    with pytest.raises(ValueError, match="9 tokens exceed text_config.sliding_window=8"):
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)


def test_a_window_that_no_layer_has_limits_no_prompt():
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": NUM_LAYERS}
    model = make_dpvr(text=text_config(Qwen2Config, **window))
    assert set(model.config.text_config.layer_types) == {"full_attention"}
    batch = make_batch(["ttIttt"])
    expected = make_dpvr(text=text_config(Qwen2Config))(**batch).logits
    torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"saturation_layer": 0}, "saturation_layer=0 must be between 1 and 5"),
        ({"saturation_layer": 6}, "saturation_layer=6 must be between 1 and 5"),
        ({"saturation_layer": 5, "num_fusion_layers": 2}, "saturation_layer=5 must be between 1 and 4"),
        ({"num_fusion_layers": 0}, "num_fusion_layers=0 must be between 1 and 5"),
        ({"num_fusion_layers": 6}, "num_fusion_layers=6 must be between 1 and 5"),
        ({"num_side_layers": -1}, "num_side_layers=-1 must be between 0 and 6, the layers of the decoder"),
        ({"num_side_layers": 10**9}, "num_side_layers=1000000000 must be between 0 and 6"),  # would take all memory
        ({"saturation_layer": "2"}, "saturation_layer='2' must be an integer"),
        ({"saturation_layer": True}, "saturation_layer=True must be an integer"),
        ({"num_side_layers": None}, "num_side_layers=None must be an integer"),
        ({"num_fusion_layers": 1.0}, "num_fusion_layers=1.0 must be an integer"),
        ({"text_config": text_config(GraniteConfig)}, "text_config.model_type='granite' is none of llama, mistral"),
    ],
)
def test_a_config_that_cannot_be_routed_is_refused_by_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        DPVRConfig(**{"text_config": text_config(), "saturation_layer": 2, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"saturation_layer": -1}, "saturation_layer=-1 must be between 1 and"),
        ({"saturation_layer": "2"}, "saturation_layer='2' must be an integer"),
        ({"num_fusion_layers": 0}, "num_fusion_layers=0 must be between 1 and"),
        ({"saturation_layer": NUM_LAYERS - 1, "num_fusion_layers": 3}, f"saturation_layer={NUM_LAYERS - 1} must be"),
    ],
)
def test_a_routing_given_to_from_pretrained_is_checked_like_any(tmp_path, fields, message):
    make_dpvr().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        DPVRForConditionalGeneration.from_pretrained(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        DPVRConfig.from_pretrained(tmp_path, **fields)
    config = DPVRConfig.from_pretrained(tmp_path)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    model = DPVRForConditionalGeneration.from_pretrained(tmp_path, saturation_layer=2)
    assert model.config.num_text_only_layers == NUM_LAYERS - 3


def test_the_default_configuration_is_llava_7b_with_the_papers_layers():
    config = DPVRConfig()
    assert (config.saturation_layer, config.first_fusion_layer, config.num_text_only_layers) == (18, 31, 13)
    with torch.device("meta"):
        model = DPVRForConditionalGeneration(config)
    trainable = sum(weight.numel() for weight in model.model.side_branch.parameters())
    assert trainable == 202_383_360
    llava = sum(weight.numel() for weight in model.parameters()) - trainable
    assert 0.028 < trainable / llava < 0.029  # "about 3 %" (abstract)


# --- outputs -------------------------------------------------------------------------------------------------------


def test_hidden_states_and_attentions_have_full_shapes():
    model = make_dpvr()
    model.set_attn_implementation("eager")
    batch = make_batch(["ttItt", "tIIt"])
    is_vision = batch["mm_token_type_ids"].bool()
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [x.shape for x in outputs.hidden_states] == [(2, 10, 32)] * (NUM_LAYERS + 1)
    assert [x.shape for x in outputs.attentions] == [(2, 4, 10, 10)] * NUM_LAYERS
    for i in (3, 4, 5):  # after text-only layers 2, 3 and 4
        assert torch.equal(outputs.hidden_states[i][is_vision], outputs.hidden_states[2][is_vision])
        assert not torch.equal(outputs.hidden_states[i][~is_vision], outputs.hidden_states[i - 1][~is_vision])
    is_text = batch["attention_mask"].bool() & ~is_vision
    for attention in outputs.attentions[2:5]:
        attention = attention.mean(1)
        assert_close(attention.sum(-1), is_text.float())
        assert_close(attention.sum(1)[~is_text], torch.zeros(int((~is_text).sum())))
    for selected in ([3, -1, 99], 3):
        some = model(**batch, output_hidden_states=selected).hidden_states
        for i, (state, full) in enumerate(zip(some, outputs.hidden_states, strict=True)):
            assert torch.equal(state, full) if i in (3, *[NUM_LAYERS] * (selected != 3)) else state is None
    model.model.language_model.config.output_hidden_states = -1  # the config may say which, too
    some = model(**batch).hidden_states
    assert [state is None for state in some] == [True] * NUM_LAYERS + [False]
    model.model.language_model.config.output_hidden_states = False
    plain = model(**batch)
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert torch.equal(plain.logits, outputs.logits)


def test_recorded_states_of_an_image_without_text_and_of_a_cached_step_have_full_shapes():
    model = make_dpvr()
    model.set_attn_implementation("eager")
    flags = {"output_hidden_states": True, "output_attentions": True}
    outputs = model(**make_batch(["I"]), **flags)
    assert [x.shape for x in outputs.hidden_states] == [(1, 4, 32)] * (NUM_LAYERS + 1)
    assert [x.shape for x in outputs.attentions] == [(1, 4, 4, 4)] * NUM_LAYERS
    outputs = model(input_ids=torch.tensor([[9]]), past_key_values=outputs.past_key_values, **flags)
    assert [x.shape for x in outputs.attentions] == [(1, 4, 1, 5)] * NUM_LAYERS
    assert outputs.attentions[2][0, 0, 0].tolist() == [0, 0, 0, 0, 1]


def test_logits_to_keep_and_tuples_are_as_in_llava(model):
    batch = make_batch(["ttItt", "ttI"])
    logits = model(**batch).logits
    assert_close(model(**batch, logits_to_keep=2).logits, logits[:, -2:])
    assert torch.equal(model(**batch, logits_to_keep=99).logits, logits)
    assert torch.equal(model(**batch, logits_to_keep=-1).logits, logits[:, 1:])
    assert_close(model(**batch, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])
    assert torch.equal(model(**batch, return_dict=False)[0], logits)
    hidden = model.model(**batch, return_dict=False)[0]
    assert torch.equal(model.lm_head(hidden), logits)


def test_positions_of_each_row_and_masks_of_logits_are_as_in_llava(model):
    batch = make_batch(["ttItt", "ttI"])
    logits, mask = model(**batch).logits, torch.zeros_like(batch["input_ids"]).bool()
    positions = torch.tensor([[0, 3], [2, 5]])
    mask[0, 3] = mask[1, 5] = mask[1, 6] = True
    expected = torch.stack([logits[0, [0, 3]], logits[1, [2, 5]]])
    assert_close(model(**batch, logits_to_keep=positions).logits, expected)
    assert_close(model(**batch, logits_to_keep=mask).logits, logits[mask])
    assert_close(model(**batch, logits_to_keep=mask[0]).logits, logits[:, mask[0]])
    assert_close(model(**batch, logits_to_keep=slice(1, 4)).logits, logits[:, 1:4])


def test_a_cache_by_its_old_name_is_taken_with_llavas_warning(model):
    """Whether there is one depends on transformers, which renamed `past_key_values` to `cache` in 5.24."""
    heard = []
    for each in (make_llava(), model):
        for part in (each, each.model):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                cache = DynamicCache()
                part(input_ids=torch.tensor([[7, 8]]), past_key_values=cache)
            assert cache.get_seq_length() == 2
            heard.append([warning.category for warning in caught if "past_key_values" in str(warning.message)])
    assert heard[:2] == heard[2:]


# --- work that nobody reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@settings(max_examples=100)
@given(
    rows=rows_of_a_batch,
    side=sides,
    geometry=st.sampled_from(GEOMETRIES),
    num_read=st.integers(1, 6),
    cache=st.sampled_from(["none", "dynamic", "static"]),
    seed=st.integers(0, 9),
)
def test_the_last_positions_alone_get_the_logits_that_they_get_among_all(
    models, attention, rows, side, geometry, num_read, cache, seed
):
    """Also the cache that is left behind gives the next token the same logits."""
    dpvr = models[geometry]
    dpvr.set_attn_implementation(attention)
    batch = make_batch(rows, side, seed)
    step = {
        "input_ids": torch.full((len(rows), 1), FIRST_TEXT),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1),
    }
    logits = []
    for options in ({}, {"logits_to_keep": num_read}):
        if cache == "none":
            options["use_cache"] = False
        elif cache == "static":
            options["past_key_values"] = StaticCache(dpvr.config.text_config, max_cache_len=64)
        with torch.no_grad():
            outputs = dpvr(**batch, **options)
            logits.append([outputs.logits])
            if cache != "none":
                logits[-1].append(dpvr(**step, past_key_values=outputs.past_key_values).logits)
    read = batch["attention_mask"][:, -num_read:].bool()
    assert_close(logits[1][0][read], logits[0][0][:, -num_read:][read])
    if cache != "none":
        assert_close(logits[1][1], logits[0][1])


@backbones
def test_the_last_layer_computes_only_what_is_read(text):
    dpvr, batch, widths = make_dpvr(text=copy.deepcopy(text)), make_batch(["ttItt", "tI"]), {}
    for i in (0, NUM_LAYERS - 1):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"):
            dpvr.model.language_model.layers[i].get_submodule(name).register_forward_hook(
                lambda _, args, output, key=(i, name): widths.setdefault(key, []).append(args[0].shape[1])
            )
    dpvr.generate(**batch, max_new_tokens=1)
    width = batch["input_ids"].shape[1]
    assert widths.pop((NUM_LAYERS - 1, "self_attn.k_proj")) == [width - 1, 1]
    assert widths.pop((NUM_LAYERS - 1, "self_attn.q_proj")) == widths.pop((NUM_LAYERS - 1, "mlp.up_proj")) == [1]
    assert set(map(tuple, widths.values())) == {(width,)}


@pytest.mark.parametrize(
    "wrap",
    ["pre-hook", "pre-hook of a part", "replaced forward", "offloading", "quantized layer", "states", "attentions"],
)
def test_the_last_layer_runs_whole_where_its_tokens_cannot_come_in_two_parts(wrap):
    dpvr, batch, widths, options = make_dpvr(), make_batch(["ttItt", "tI"]), [], {}
    dpvr.set_attn_implementation("eager" if wrap == "attentions" else "sdpa")
    expected = dpvr(**batch).logits[:, -1:]
    layer = dpvr.model.language_model.layers[-1]
    layer.mlp.register_forward_hook(lambda _, args, output: widths.append(args[0].shape[1]))
    if wrap == "pre-hook":  # as FSDP2 gathers weights
        layer.register_forward_pre_hook(lambda _, args: None)
    elif wrap == "pre-hook of a part":  # as PEFT tells aLoRA how many of the last tokens it applies to
        layer.self_attn.k_proj.register_forward_pre_hook(lambda _, args: None)
    elif wrap == "replaced forward":  # as accelerate fetches weights
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    elif wrap in ("states", "attentions"):
        options = {"output_hidden_states" if wrap == "states" else "output_attentions": True}
    else:
        cache = options["past_key_values"] = DynamicCache(config=dpvr.config.text_config)
        if wrap == "quantized layer":
            cache.layers[-1] = type("QuantizedLayer", (DynamicLayer,), {})()
    if wrap != "offloading":
        assert_close(dpvr(**batch, logits_to_keep=1, **options).logits, expected)
        assert widths == [batch["input_ids"].shape[1]]
    else:  # there is nowhere to offload to: only the decision
        module = sys.modules[type(dpvr).__module__]
        dpvr.model.add_stream_layers(cache)
        assert module.can_read_last(layer, cache)
        cache.offloading = True
        assert not module.can_read_last(layer, cache)


def test_generate_keeps_keys_of_the_side_branch_only_where_a_later_image_may_read_them():
    dpvr, batch, kept = make_dpvr(), make_batch(["ttItt", "tI"]), []
    dpvr.generation_config.eos_token_id = None
    decode = type(dpvr.model).decode

    def recorded(self, *args, **kwargs):
        outputs = decode(self, *args, **kwargs)
        kept.append((outputs.get("cache") or outputs.get("past_key_values")).get_seq_length(NUM_LAYERS))
        return outputs

    tokens = []
    for options in (
        {},
        {"num_beams": 2},
        {"return_dict_in_generate": True},
        {"prefill_chunk_size": 6},
        {"past_key_values": DynamicCache()},
    ):
        kept.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(dpvr.model), "decode", recorded)
            outputs = dpvr.generate(**batch, max_new_tokens=3, do_sample=False, **options)
        if "num_beams" not in options:
            tokens.append(outputs["sequences"] if "return_dict_in_generate" in options else outputs)
        is_kept = not (options == {} or "num_beams" in options)
        assert (kept[-1] > 0) == is_kept, options
    assert all(torch.equal(tokens[0], other) for other in tokens)


@pytest.mark.parametrize("rows", [["ttItt", "tttItt"], ["ttItt", "ItttI"], ["ttItt"]], ids=["padded", "ragged", "one"])
def test_the_host_waits_for_the_device_no_more_often_than_in_llava(monkeypatch, rows):
    """Counted: reads of tensor values by the host. LLaVA's look for padding and compare the number of features."""
    batch, reads = make_batch(rows), record_reads(monkeypatch)
    step = {
        "input_ids": torch.full((len(rows), 1), FIRST_TEXT),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1),
    }
    counts = {}
    for model in (make_llava(), make_dpvr()):
        features = {"image": model.model.get_image_features(batch["pixel_values"], return_dict=True)}
        prompt = without(
            batch, "pixel_values", *([] if hasattr(model.model, "side_branch") else ["mm_token_type_ids"])
        )
        reads.clear()
        cache = model(**prompt, mm_encoder_outputs=features).past_key_values
        num_prefill = len(reads)
        model(**step, past_key_values=cache)
        counts[type(model).__name__] = num_prefill, len(reads) - num_prefill
    llava, dpvr = counts.values()
    assert 0 < dpvr[0] <= llava[0]
    assert dpvr[1] <= llava[1]
    model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: reads.clear())
    for num_read in (1, 2):
        model(**prompt, mm_encoder_outputs=features, logits_to_keep=num_read)
        assert not reads  # once the layers run, the host runs ahead of the device


class FakeCudaStream:
    """Does nothing, and notes in `log` who waited for whom and what was done in it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def work(self):
        self.log.append(f"work in {self.name}")
        yield
        self.log.append(f"end of work in {self.name}")


@pytest.fixture
def cuda_streams(monkeypatch, model):
    """A CPU that is taken for a GPU. What was asked of its streams."""
    routing, log = sys.modules[type(model).__module__], []
    main, side = FakeCudaStream("main", log), FakeCudaStream("side", log)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(routing, "side_cuda_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream.work())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream.name}"))
    return log


@pytest.mark.parametrize("rows", [["ttItt", "tttItt", "tt"], ["ttItt"]], ids=["ragged", "one"])
def test_both_kinds_of_tokens_at_once_give_the_logits_of_one_after_the_other(cuda_streams, model, rows):
    """In CUDA streams that do nothing; tests/test_gpu.py has real ones."""
    batch = make_batch(rows)
    with torch.enable_grad():
        expected = model(**batch, use_cache=False).logits
    assert not cuda_streams
    assert torch.equal(model(**batch, use_cache=False).logits, expected)
    joined = ["main waits for side", "kept for main"]
    assert cuda_streams == ["side waits for main", "work in side", "end of work in side", *joined]


def test_an_interrupt_while_both_kinds_are_under_way_leaves_no_stream_behind(cuda_streams, model):
    interrupted = copy.deepcopy(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    interrupted.model.language_model.layers[3].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        interrupted(**make_batch(["ttItt"]), use_cache=False)
    assert cuda_streams[-1] == "main waits for side"


@pytest.mark.parametrize(
    "order", ["text", "image", "kept keys", "gradients", "processes", "compiling", "compiled", "hook"]
)
def test_where_others_order_the_work_one_kind_follows_the_other(cuda_streams, monkeypatch, model, order):
    model, options = copy.deepcopy(model), {"use_cache": False}
    batch = make_batch([{"text": "ttt", "image": "I"}.get(order, "ttItt")])
    if order == "kept keys":
        options = {"use_cache": True}
    elif order == "processes":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    elif order == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif order == "compiled":
        model.model.side_branch.layers[0].mlp.compile(backend="eager")
    elif order == "hook":  # as accelerate brings weights
        layer = model.model.language_model.layers[3]
        layer.forward = layer.forward
    with torch.set_grad_enabled(order == "gradients"):
        model(**batch, **options)
    assert not cuda_streams


@pytest.mark.parametrize("offloading", [False, True])
def test_so_it_does_where_a_cache_comes_and_goes(cuda_streams, model, offloading):
    may_overlap = sys.modules[type(model).__module__].may_overlap
    plan, cache = SimpleNamespace(cache=None), SimpleNamespace(offloading=offloading)
    assert may_overlap([], torch.zeros(1), plan, plan, cache) != offloading


# --- generation ----------------------------------------------------------------------------------------------------

NUM_NEW = 8


@pytest.fixture(scope="module")
def generator():
    model = make_dpvr()
    model.generation_config.eos_token_id = None
    return model


def plain_loop(model, batch, num_new=NUM_NEW):
    """Greedy decoding by whole recomputation."""
    ids, mask, types = batch["input_ids"], batch["attention_mask"], batch["mm_token_type_ids"]
    for _ in range(num_new):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=types,
            pixel_values=batch["pixel_values"],
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).logits
        token = logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        types = torch.cat([types, torch.zeros_like(token)], 1)
    return ids


def generate(model, batch, **options):
    torch.manual_seed(0)
    given = {name: value for name, value in batch.items() if value is not None}
    return model.generate(**given, **{"max_new_tokens": NUM_NEW, "do_sample": False, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"prefill_chunk_size": 1},
        {"cache_implementation": "static", "prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_greedy_generation_gives_the_tokens_of_the_plain_loop(generator, options):
    batch = make_batch(RAGGED)
    expected = plain_loop(generator, batch)
    assert torch.equal(generate(generator, batch, **options), expected)
    assert torch.equal(generate(generator, without(batch, "mm_token_type_ids"), **options), expected)


@pytest.mark.parametrize("first_sliding_layer", [0, 3])
def test_a_static_cache_longer_than_the_window_of_some_layers_gives_the_tokens_of_the_plain_loop(first_sliding_layer):
    layer_types = ["sliding_attention" if i >= first_sliding_layer else "full_attention" for i in range(NUM_LAYERS)]
    if first_sliding_layer == 0:
        layer_types[-2:] = ["full_attention"] * 2
    text = text_config(Qwen2Config, use_sliding_window=True, sliding_window=32, layer_types=layer_types)
    model, batch = make_dpvr(text=text), make_batch(["ttItItt", "tt"])
    model.generation_config.eos_token_id = None
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    assert torch.equal(generate(model, batch, past_key_values=cache), plain_loop(model, batch))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "top_k": 20},
    ],
    ids=str,
)
def test_beams_and_samples_are_the_same_with_any_cache(generator, options):
    batch = make_batch(["ttItt", "ItI", "tt"])
    expected = generate(generator, batch, use_cache=False, **options)
    assert torch.equal(generate(generator, batch, **options), expected)
    assert torch.equal(generate(generator, batch, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("row", ["ttItttt", "tIttIt", "ttI", "tttt"])
def test_assisted_decoding_gives_the_tokens_of_the_plain_loop(generator, row):
    batch = make_batch([row])
    expected = plain_loop(generator, batch)
    other = make_dpvr(seed=3)
    same_backbone = make_dpvr(random_branch=False)
    for assistant in (other, same_backbone, generator):
        assert torch.equal(generate(generator, batch, assistant_model=assistant), expected)
    assert torch.equal(generate(generator, batch, prompt_lookup_num_tokens=3), expected)


def test_an_assistant_of_another_width_takes_the_image_for_text_and_the_tokens_are_those_of_the_plain_loop(generator):
    batch, wider = make_batch(["ttItttt"]), make_dpvr(3, text_config(hidden_size=64))
    assert torch.equal(generate(generator, batch, assistant_model=wider), plain_loop(generator, batch))


@pytest.mark.parametrize("assistant", [make_llava(3), LlamaForCausalLM(text_config()).eval()], ids=["llava", "text"])
def test_assistants_that_know_no_kinds_of_tokens_give_the_tokens_of_the_plain_loop(generator, assistant):
    batch = make_batch(["ttItttt"])
    assert torch.equal(generate(generator, batch, assistant_model=assistant), plain_loop(generator, batch))


@pytest.mark.parametrize("chunk", [2, 5, 100])
@pytest.mark.parametrize("given", ["all", "no types", "padding"])
def test_an_assistant_of_a_prompt_read_in_chunks_gives_the_tokens_of_the_plain_loop(generator, chunk, given):
    rows = ["ttItttt", "t" * 13] if given == "padding" else ["ttItttt"]
    batch = {name: value[:1] for name, value in make_batch(rows).items()}
    options = {"assistant_model": make_dpvr(seed=3), "prefill_chunk_size": chunk}
    tokens = generate(generator, without(batch, "mm_token_type_ids") if given == "no types" else batch, **options)
    assert torch.equal(tokens, plain_loop(generator, batch))


def test_what_a_caller_says_of_later_tokens_stands(model):
    cache, later = DynamicCache(), make_batch(["tIt"])
    with torch.no_grad():
        model(input_ids=torch.tensor([[7, 8]]), past_key_values=cache)
    ids = torch.cat([torch.tensor([[7, 8]]), later["input_ids"]], 1)
    types = torch.nn.functional.pad(later["mm_token_type_ids"], (2, 0))
    options = {"mm_token_type_ids": types, "attention_mask": torch.ones_like(ids), "next_sequence_length": 6}
    inputs = model.prepare_inputs_for_generation(ids, past_key_values=cache, cache=cache, **options)
    assert torch.equal(inputs["mm_token_type_ids"], later["mm_token_type_ids"])


def test_an_image_token_that_was_drafted_is_text(generator):
    class Wish(LogitsProcessor):
        def __call__(self, ids, scores):
            scores = scores.clone()
            scores[:, IMAGE] += 1000 * (ids.shape[1] % 3 == 0)
            return scores

    batch = {"input_ids": torch.tensor([[7, 8, 9, 10, 7, 8]])}
    wish = LogitsProcessorList([Wish()])
    expected = generate(generator, batch, logits_processor=wish)
    assert (expected[:, 6:] == IMAGE).any()
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": make_dpvr(seed=3)}):
        assert torch.equal(generate(generator, batch, logits_processor=wish, **options), expected)


def test_dpvr_assists_llava_with_the_images_that_llava_encoded():
    llava = make_llava()
    llava.generation_config.eos_token_id = None
    dpvr = make_dpvr(saturation_layer=5, random_branch=False)  # computes what LLaVA does
    dpvr.load_state_dict(llava.state_dict(), strict=False)
    prompts = []
    handle = dpvr.model.side_branch.register_forward_hook(lambda _, args, output: prompts.append(output.shape[1]))
    batch = without(make_batch(["ttItt"]), "mm_token_type_ids")
    tokens = generate(llava, batch, assistant_model=dpvr)
    handle.remove()
    assert torch.equal(tokens, generate(llava, batch))
    assert prompts == [TOKENS_PER_IMAGE]


def test_a_cache_carried_over_turns_gives_the_tokens_of_one_long_prompt(generator):
    first, new = make_batch(["ttItt", "tttt"]), make_batch(["ttI", "tIt"], "right", seed=1)
    turn = generate(generator, first, return_dict_in_generate=True)
    answered = turn.sequences[:, :-1]  # the last token is not in the cache
    images = [first["pixel_values"][0], new["pixel_values"][0], new["pixel_values"][1]]
    ids = torch.cat([answered, new["input_ids"]], 1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, NUM_NEW - 1, dtype=torch.long), new["attention_mask"]], 1)
    types = torch.cat(
        [first["mm_token_type_ids"], torch.zeros(2, NUM_NEW - 1, dtype=torch.long), new["mm_token_type_ids"]], 1
    )
    whole = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
    expected = generate(generator, {**whole, "pixel_values": torch.stack(images)})
    continued = generate(
        generator, {**whole, "pixel_values": torch.stack(images[1:])}, past_key_values=turn.past_key_values
    )
    assert torch.equal(continued, expected)


def test_generation_from_embeddings_gives_the_tokens_of_the_plain_loop(generator):
    batch = make_batch(["ttItt", "tt"])
    inputs = {
        "inputs_embeds": embed(generator, batch),
        "attention_mask": batch["attention_mask"],
        "mm_token_type_ids": batch["mm_token_type_ids"],
    }
    expected = plain_loop(generator, batch)
    assert torch.equal(generate(generator, inputs), expected[:, batch["input_ids"].shape[1] :])
    with_ids = {**without(inputs, "mm_token_type_ids"), "input_ids": batch["input_ids"]}
    assert torch.equal(generate(generator, with_ids), expected)


def test_streamed_tokens_and_stopping_criteria_are_as_in_transformers(generator):
    batch = make_batch(["ttItt"])
    expected = plain_loop(generator, batch)[0].tolist()
    streamed = []
    streamer = SimpleNamespace(put=lambda ids: streamed.extend(ids.flatten().tolist()), end=lambda: None)
    generate(generator, batch, streamer=streamer)
    assert streamed == expected
    length = batch["input_ids"].shape[1]
    stop = expected[length + 2]
    stopped = generate(generator, batch, stopping_criteria=[lambda ids, scores: ids[:, -1] == stop])[0].tolist()
    assert stopped == expected[: expected.index(stop, length) + 1]


def test_a_generated_image_token_is_text(generator):
    """Sampling may emit the image token's id; it has no image behind it."""
    model = copy.deepcopy(generator)
    batch = make_batch(["ttItt", "tt"])

    def only_image_token(input_ids, scores):
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([IMAGE]), 0.0)

    for use_cache in (True, False):
        tokens = generate(model, batch, logits_processor=[only_image_token], use_cache=use_cache)
        assert (tokens[:, -NUM_NEW:] == IMAGE).all()


def test_images_are_encoded_once(generator):
    calls = []
    handle = generator.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    generate(generator, make_batch(["ttItt", "tIt"]))
    handle.remove()
    assert len(calls) == 1


def test_an_offloaded_cache_is_prefetched_before_every_use(generator, monkeypatch):
    """Simulated, without an accelerator: which layer's cache is where is recorded instead of moved."""
    away, missed, update = set(), [], DynamicLayer.update

    def recorded_update(layer, *states, **kwargs):
        missed.extend([layer] if id(layer) in away else [])
        return update(layer, *states, **kwargs)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    manager = contextlib.nullcontext(stream)
    manager.wait_stream = stream.wait_stream
    monkeypatch.setattr(torch, "Stream", lambda: manager)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: stream)
    monkeypatch.setattr(DynamicLayer, "update", recorded_update)
    monkeypatch.setattr(DynamicLayer, "offload", lambda layer: away.add(id(layer)) if layer.is_initialized else None)
    monkeypatch.setattr(DynamicLayer, "prefetch", lambda layer: away.discard(id(layer)))
    cache = DynamicCache(config=generator.config, offloading=True)
    first = make_batch(["ttItt"])
    turn = generate(generator, first, past_key_values=cache, max_new_tokens=3)
    assert away
    new = make_batch(["ttItt" + "t" * 3 + "Itt"], seed=0)
    new["input_ids"][:, : turn.shape[1]] = turn
    generate(generator, {**new, "pixel_values": new["pixel_values"][1:]}, past_key_values=cache, max_new_tokens=3)
    assert not missed


def test_threads_that_share_a_model_get_their_own_answers(generator):
    batches = [make_batch(["ttItt"], seed=seed) for seed in range(4)]
    expected = [generate(generator, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda batch: generate(generator, batch), batches))
    for answer, reference in zip(answers, expected, strict=True):
        assert torch.equal(answer, reference)


def test_the_decode_step_compiles_into_one_graph(generator):
    batch = make_batch(["ttItt", "tt"])
    cache = StaticCache(config=generator.config, max_cache_len=24)
    outputs = generator(**batch, position_ids=positions(batch), past_key_values=cache)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 24 - batch["attention_mask"].shape[1]))
    position = positions(batch)[:, -1:]
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(generator.forward, fullgraph=True, backend=backend)
    tokens = []
    for i in range(4):
        token = outputs.logits[:, -1:].argmax(-1)
        tokens.append(token)
        position = position + 1
        mask[:, batch["input_ids"].shape[1] + i] = 1
        outputs = step(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache)
    assert len(graphs) == 1
    expected = plain_loop(generator, batch, 4)[:, -4:]
    assert torch.equal(torch.cat(tokens, 1), expected)


def test_a_compiled_prefill_is_not_compiled_again_for_each_number_of_images(generator):
    """The layers are not. What follows them is small, and reads the image outputs, which LLaVA lists by image."""
    num_graphs = 0

    def backend(graph, _):
        nonlocal num_graphs
        num_graphs += any("scaled_dot_product_attention" in str(node.target) for node in graph.graph.nodes)
        return graph.forward

    prefill = torch.compile(generator.forward, backend=backend, dynamic=True)
    seen = []
    for row in ("ttI", "tItI", "tIttIIt", "tItIttItI", "ItIttttItItItt"):
        batch = make_batch([row])
        assert_close(prefill(**batch).logits, generator(**batch).logits)
        seen.append(num_graphs)
    assert seen[0] > 0
    assert seen[1:] == [seen[1]] * 4  # 1 is a size of its own to torch


def test_generate_with_a_compiled_forward_gives_the_tokens_of_one_that_is_not(monkeypatch, generator):
    batch = make_batch(["ttItt", "tttt", "ItIt"])
    expected, graphs = generate(generator, batch), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(generator, "forward", torch.compile(generator.forward, backend=backend, dynamic=True))
    assert torch.equal(generate(generator, batch), expected)
    assert len(graphs) > 1


class DecodeStep(torch.nn.Module):
    """A step that keeps its static cache in buffers, as transformers' own exportable modules do."""

    def __init__(self, model, cache):
        super().__init__()
        self.model, self.cache = model, cache
        for i, layer in enumerate(cache.layers):
            for name in ("keys", "values", "cumulative_length"):
                self.register_buffer(f"{name}_{i}", getattr(layer, name))

    def forward(self, input_ids, attention_mask, position_ids):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self.model(**inputs, past_key_values=self.cache).logits


def test_the_decode_step_exports_and_the_program_gives_the_tokens_of_the_plain_loop(generator):
    batch = make_batch(["ttItt", "tt"])
    length = batch["input_ids"].shape[1]
    cache = StaticCache(config=generator.config, max_cache_len=24)
    token = generator(**batch, position_ids=positions(batch), past_key_values=cache).logits[:, -1:].argmax(-1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 24 - length))
    position = positions(batch)[:, -1:]
    program, tokens = None, [token]
    for i in range(4):
        position = position + 1
        mask[:, length + i] = 1
        if program is None:  # with the cache as the prefill left it
            step = DecodeStep(generator, copy.deepcopy(cache))
            program = torch.export.export(step, (token, mask, position), strict=True).module()
        token = program(token, mask, position)[:, -1:].argmax(-1)
        tokens.append(token)
    assert torch.equal(torch.cat(tokens, 1), plain_loop(generator, batch, 5)[:, -5:])


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_keeps_every_weight(tmp_path, tied):
    model = make_dpvr(text=text_config(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    loaded = DPVRForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert {"configuration_dpvr.py", "modeling_dpvr.py"} <= {path.name for path in tmp_path.iterdir()}
    config = DPVRConfig.from_pretrained(tmp_path)
    assert config.saturation_layer == 2
    assert {"AutoConfig", "AutoModel", "AutoProcessor", "AutoModelForImageTextToText"} < set(config.auto_map)


def test_push_to_hub_uploads_weights_config_and_code(monkeypatch):
    uploaded = []
    api = HfApi

    def create_commit(self, repo_id, operations, **_):
        uploaded.extend(operation.path_in_repo for operation in operations)

    monkeypatch.setattr(api, "create_repo", lambda self, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(api, "create_commit", create_commit)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: ModelCard(""))
    monkeypatch.setattr(
        transformers.modeling_utils, "create_and_tag_model_card", lambda *_, **__: ModelCard(""), raising=False
    )
    make_dpvr().push_to_hub("org/dpvr")
    assert {"config.json", "model.safetensors", "configuration_dpvr.py", "modeling_dpvr.py"} <= set(uploaded)


def test_the_model_without_its_head_is_saved_and_loaded_by_auto_model(tmp_path, model):
    model.model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "DPVRModel"
    batch = make_batch(["ttIt", "tt"])
    expected = model.model(**batch).last_hidden_state
    torch.testing.assert_close(loaded(**batch).last_hidden_state, expected)
    model.config.save_pretrained(tmp_path / "config")
    assert "modeling_dpvr.DPVRModel" not in (tmp_path / "config" / "config.json").read_text()
    model.save_pretrained(tmp_path / "whole")
    assert type(AutoModel.from_pretrained(tmp_path / "whole", trust_remote_code=True)).__name__ == type(model).__name__


def test_a_config_saved_alone_brings_its_code(tmp_path):
    DPVRConfig(text_config=text_config(), saturation_layer=2).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert (type(loaded).__name__, loaded.saturation_layer) == ("DPVRConfig", 2)


def test_a_side_branch_that_lacks_says_so_where_its_origin_is_offloaded(tmp_path):
    pytest.importorskip("accelerate")
    make_dpvr().save_pretrained(tmp_path / "one")
    inside = "model.language_model."
    parts = ["lm_head", "model.vision_tower", "model.multi_modal_projector", "model.side_branch"]
    device_map = dict.fromkeys(parts + [inside + name for name in ("embed_tokens", "norm", "rotary_emb")], "cpu")
    device_map |= {f"{inside}layers.{i}": "disk" if i == 2 else "cpu" for i in range(NUM_LAYERS)}
    options = {"device_map": device_map, "offload_folder": str(tmp_path / "disk")}
    DPVRForConditionalGeneration.from_pretrained(tmp_path / "one", **options)
    with pytest.raises(ValueError, match="lacks a layer of the side branch.* layer 2, but that one is offloaded"):
        DPVRForConditionalGeneration.from_pretrained(tmp_path / "one", num_side_layers=2, **options)


def test_a_llava_checkpoint_loads_and_its_missing_side_branch_starts_as_the_identity(tmp_path):
    llava = make_llava()
    llava.save_pretrained(tmp_path)
    dpvr = DPVRForConditionalGeneration.from_pretrained(
        tmp_path, config=make_dpvr(1, None, 5, 2, random_branch=False).config
    ).eval()
    batch = make_batch(["ttItt"])
    assert_close(dpvr(**batch).logits, llava(**without(batch, "mm_token_type_ids")).logits)
    for layer in dpvr.model.side_branch.layers:
        assert not layer.self_attn.o_proj.weight.any()
        assert torch.equal(layer.self_attn.q_proj.weight, llava.model.language_model.layers[5].self_attn.q_proj.weight)


def test_a_llava_of_too_few_layers_for_the_default_routing_loads_with_the_one_that_is_given(tmp_path):
    make_llava().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saturation_layer=18 must be between 1 and"):
        DPVRForConditionalGeneration.from_pretrained(tmp_path)
    dpvr = DPVRForConditionalGeneration.from_pretrained(tmp_path, saturation_layer=2, num_fusion_layers=3)
    assert (dpvr.config.saturation_layer, dpvr.config.first_fusion_layer) == (2, NUM_LAYERS - 3)


@pytest.mark.parametrize("with_head", [True, False])
def test_weights_under_the_names_of_transformers_4_load(tmp_path, with_head):
    """As llava-hf's checkpoints name them."""
    model = make_dpvr()
    names = {"model.language_model": "language_model.model", "lm_head": "language_model.lm_head"}
    names |= {"model.vision_tower": "vision_tower.vision_model"}
    names |= {"model.multi_modal_projector": "multi_modal_projector"}
    old = {}
    for name, weight in model.state_dict().items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        old[names.get(prefix, "") + name.removeprefix(prefix)] = weight
    model.config.save_pretrained(tmp_path)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = type(model if with_head else model.model).from_pretrained(tmp_path)
    expected = (model if with_head else model.model).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_saved_base_weights_are_those_of_a_llava_checkpoint(tmp_path):
    """A converted folder is LLaVA's weights and a side branch: LLaVA itself loads it."""
    model = make_dpvr()
    model.save_pretrained(tmp_path)
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path, config=make_llava().config)
    for name, weight in llava.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


# --- training ------------------------------------------------------------------------------------------------------


def test_train_gradients_of_the_side_branch_are_those_of_finite_differences():
    model = make_dpvr().double()
    model.requires_grad_(False)
    branch = list(model.model.side_branch.requires_grad_(True).parameters())
    batch = make_batch(["ttItt", "tttI", "t"])
    batch["pixel_values"] = batch["pixel_values"].double()
    targets = batch["input_ids"].roll(-1, 1)

    def loss():
        return torch.nn.functional.cross_entropy(model(**batch).logits.flatten(0, 1), targets.flatten())

    loss().backward()
    step = 1e-3 / sum(weight.grad.square().sum() for weight in branch).sqrt()
    losses = []
    with torch.no_grad():
        for sign in (1, -2):  # along the gradient, forth and then back
            for weight in branch:
                weight += sign * step * weight.grad
            losses.append(loss())
    numeric = (losses[0] - losses[1]) / (2 * step)
    assert numeric == pytest.approx(float(sum(weight.grad.square().sum() for weight in branch)), rel=1e-3)


def test_train_the_loss_of_a_part_of_a_step_is_divided_by_the_items_of_the_whole(model):
    """As the Trainer asks where it accumulates gradients."""
    batch = make_batch(["ttItt"])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    num_items = int((labels[:, 1:] != -100).sum())
    mean, part = (model(**batch, labels=labels, num_items_in_batch=n).loss for n in (None, 4 * num_items))
    torch.testing.assert_close(part, mean / 4)


def test_train_with_a_frozen_backbone_needs_no_graph_before_the_side_branch():
    model = make_dpvr().train()
    model.requires_grad_(False)
    model.model.side_branch.requires_grad_(True)
    needs_grad = {}

    def record(i):
        def hook(_, args, output):
            needs_grad[i] = output.requires_grad

        return hook

    for i, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_hook(record(i))
    batch = make_batch(["ttItt", "tIt"])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert needs_grad == {0: False, 1: False, 2: False, 3: False, 4: False, 5: True}
    assert all(weight.grad is not None for weight in model.model.side_branch.parameters())
    assert all(weight.grad is None for name, weight in model.named_parameters() if "side_branch" not in name)


def test_train_with_gradient_checkpointing_keeps_no_cache_and_loses_none():
    batch, model = make_batch(["ttIt", "tt"]), make_dpvr().train()
    expected = model(**batch).logits
    model.gradient_checkpointing_enable()
    cache = DynamicCache(config=model.config.text_config)
    for _ in range(2):  # what the layers drop is not half filled by the first call
        outputs = model(**batch, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(outputs.logits, expected)
        assert getattr(outputs, CACHE) is None
    torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, expected[:, -1:])
    some = copy.deepcopy(model)
    some.model.language_model.layers[0].gradient_checkpointing = False
    assert getattr(some(**batch, use_cache=True), CACHE) is None
    filled = getattr(model.eval()(**batch), CACHE)  # also with gradients
    step = {"input_ids": torch.full((2, 1), 9), "past_key_values": filled}
    with pytest.raises(ValueError, match="layers with gradient checkpointing drop caches"):
        model.train()(**step)
    foreign = getattr(make_llava()(input_ids=torch.tensor([[7, 8]])), CACHE)
    with pytest.raises(ValueError, match=r"goes on from tokens in a cache \(2 there"):
        model(input_ids=torch.tensor([[9]]), past_key_values=foreign)
    wide = torch.ones(2, batch["input_ids"].shape[1] + 1).long()
    with pytest.raises(ValueError, match="goes on from tokens in a cache"):  # that the layers have dropped
        model(input_ids=step["input_ids"], attention_mask=wide)
    static = StaticCache(config=model.config.text_config, max_cache_len=20)
    with torch.no_grad():
        model.eval()(**batch, past_key_values=static)
    static.reset()
    torch.testing.assert_close(model.train()(**batch, past_key_values=static).logits, expected)
    if CACHE == "cache":  # before, transformers' layers drop caches without gradients too
        with torch.no_grad():
            assert getattr(model(**batch), CACHE).get_seq_length() == batch["input_ids"].shape[1]
            model(**step)


def test_train_with_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    batch = make_batch(["ttItt", "tttI", "t"])
    for checkpointing in (False, True):
        model = make_dpvr().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [["ttt", "tttttt"], ["t"]])
def test_train_a_step_without_an_image_gives_the_side_branch_gradients_of_zero_and_the_same_logits(rows, attention):
    model = make_dpvr(attn_implementation=attention)
    batch = make_batch(rows)
    with torch.no_grad():
        expected = model(**batch).logits
    model.train().requires_grad_(False)
    model.model.side_branch.requires_grad_(True)
    outputs = model(**batch, labels=batch["input_ids"])
    outputs.loss.backward()
    for actual, reference in zip(real_logits(outputs.logits, batch), real_logits(expected, batch), strict=True):
        assert_close(actual, reference)
    for weight in model.model.side_branch.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()
