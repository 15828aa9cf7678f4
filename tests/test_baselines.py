# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""FastV, VTW and PyramidDrop against a slow direct computation, their cost against torch's counter and real caches."""

from collections import Counter

import hypothesis
import pytest
import torch
from hypothesis import strategies
from test_accounting import NUM_PATCHES, SHAPES, build, count, llava_config, prompt
from tiny import IMAGE, NUM_LAYERS, TOKENS_PER_IMAGE, make_batch, make_llava, record_reads
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlavaConfig, LlavaForConditionalGeneration

from benchmarks import accounting
from benchmarks.baselines import (
    PrunedLlava,
    Stage,
    cache_bytes,
    decode_flops,
    fastv,
    prefill_flops,
    prefill_loads,
    pyramid_drop,
    vision_tokens_by_layer,
    vtw,
)
from benchmarks.caches import stored_bytes

METHODS = {
    "vtw": vtw(3),
    "fastv": fastv(2, 0.5),
    "fastv, most": fastv(1, 0.75),
    "fastv, all ask": fastv(2, 0.5, all_ask=True),
    "pyramid": pyramid_drop((1, 3, 5), 0.5),
}
ROWS = ["tItt", "ttIItt", "ttt", "ItIt", "tI"]


@pytest.fixture(scope="module")
def llava():
    return make_llava()


@pytest.fixture(scope="module")
def pruned(llava):
    model = PrunedLlava(llava.config).eval()
    model.load_state_dict(llava.state_dict())
    return model


def inputs_of(rows, padding_side="left", seed=0):
    batch = make_batch(rows, padding_side, seed)
    del batch["mm_token_type_ids"]
    return batch


def slow_row(llava, ids, features, stages, last):
    """The plain meaning of the methods: all tokens of one row (T,) pass all layers, masks hide what was dropped.

    Returns the logits (T, vocabulary) and, for each layer, which tokens (T,) it sees.
    """
    decoder, stages = llava.model.language_model, {stage.layer: stage for stage in stages}
    is_vision = ids == IMAGE
    states = decoder.embed_tokens(ids).masked_scatter(is_vision[:, None], features)[None]
    rotary = decoder.rotary_emb(states, torch.arange(len(ids))[None])
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    remains, seen_by, before = torch.ones_like(is_vision), [], None

    def attend(layer, states, remains):
        mask = torch.where(causal & remains, 0.0, torch.finfo(torch.float32).min)[None, None]
        return layer(states, attention_mask=mask, position_embeddings=rotary), layer.self_attn(
            layer.input_layernorm(states), attention_mask=mask, position_embeddings=rotary
        )[1]

    for i, layer in enumerate(decoder.layers):
        if i in stages:
            weights = before if stages[i].ranking_layer == i - 1 else attend(layer, states, remains)[1]
            asking = torch.where(remains[: last + 1])[0] if stages[i].all_ask else torch.tensor([last])
            attention = weights[0].mean(0)[asking].sum(0)
            left = sorted(torch.where(is_vision & remains)[0].tolist(), key=lambda j: -attention[j].item())
            kept = int(is_vision.sum() * stages[i].share)
            remains = remains.clone()
            remains[left[kept:]] = False
        seen_by.append(remains)
        states, before = attend(layer, states, remains)
    return llava.lm_head(decoder.norm(states))[0], seen_by


@torch.no_grad()
def slow_logits(llava, batch, stages, prompt_lengths=None):
    """`slow_row` of each row of a padded batch: a list of logits and of the tokens that each layer sees."""
    llava.set_attn_implementation("eager")  # which returns its weights
    features, start, results = None, 0, []
    if batch["pixel_values"] is not None:
        features = torch.cat(list(llava.get_image_features(batch["pixel_values"], return_dict=True).pooler_output))
    for i, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        ids = ids[mask]
        stop = start + int((ids == IMAGE).sum())
        last = (prompt_lengths[i] if prompt_lengths else len(ids)) - 1
        results.append(
            slow_row(llava, ids, torch.zeros(0) if features is None else features[start:stop], stages, last)
        )
        start = stop
    llava.set_attn_implementation("sdpa")
    return results


@torch.no_grad()
def run(pruned, stages, batch, **kwargs):
    pruned.stages = stages
    return pruned(**batch, **kwargs)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_a_padded_batch_gives_what_the_slow_direct_computation_gives_it_alone(
    llava, pruned, method, padding_side
):
    batch = inputs_of(ROWS, padding_side)
    logits = run(pruned, METHODS[method], batch).logits
    for row, mask, (expected, seen_by) in zip(
        logits, batch["attention_mask"].bool(), slow_logits(llava, batch, METHODS[method]), strict=True
    ):
        stays = seen_by[-1]  # a dropped token has no output
        torch.testing.assert_close(row[mask][stays], expected[stays], rtol=1e-4, atol=1e-4)


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    rows=strategies.lists(
        strategies.text("tI", min_size=1, max_size=5).map(lambda row: row + "t"), min_size=1, max_size=3
    ),
    layers=strategies.lists(strategies.integers(1, NUM_LAYERS), min_size=1, max_size=3, unique=True).map(sorted),
    share=strategies.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    looks_ahead=strategies.booleans(),
    all_ask=strategies.booleans(),
)
def test_any_stages_on_any_ragged_batch_match_the_slow_direct_computation(
    llava, pruned, rows, layers, share, looks_ahead, all_ask
):
    stages = tuple(Stage(layer, share ** (i + 1), layer - 1 + looks_ahead, all_ask) for i, layer in enumerate(layers))
    stages = tuple(stage for stage in stages if stage.layer < NUM_LAYERS)
    batch = inputs_of(rows)
    logits = run(pruned, stages, batch, logits_to_keep=1).logits[:, 0]
    expected = torch.stack([row[-1] for row, _ in slow_logits(llava, batch, stages)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_layers_see_and_cache_the_tokens_that_remain_and_no_others(llava, pruned, method):
    batch = inputs_of(["ttIItt"])
    cache = run(pruned, METHODS[method], batch).past_key_values
    [(_, seen_by)] = slow_logits(llava, batch, METHODS[method])
    assert [layer.keys.shape[2] for layer in cache.layers[:NUM_LAYERS]] == [int(seen.sum()) for seen in seen_by]
    counts = vision_tokens_by_layer(llava.config, METHODS[method], 2 * TOKENS_PER_IMAGE)
    assert [int(seen.sum()) - 4 for seen in seen_by] == counts


@pytest.mark.parametrize("method", METHODS)
def test_what_becomes_of_a_dropped_token_changes_nothing(llava, pruned, method):
    batch, stage = inputs_of(["ttItt"]), METHODS[method][0]
    clean = run(pruned, METHODS[method], batch).logits[0, -1]
    [(_, seen_by)] = slow_logits(llava, batch, METHODS[method])
    is_vision = batch["input_ids"][0] == IMAGE

    def poisoned(tokens):
        def add_noise(module, args, output):
            return (
                output + 10.0 * torch.randn(output.shape, generator=torch.Generator().manual_seed(1)) * tokens[:, None]
            )

        # FastV has ranked by then. PyramidDrop has not, but noise on one side of its ranking would move it: see below
        with torch.no_grad():
            hook = pruned.model.language_model.layers[stage.layer - 1].register_forward_hook(add_noise)
            logits = run(pruned, METHODS[method], batch).logits[0, -1]
            hook.remove()
        return logits

    if stage.ranking_layer < stage.layer:
        torch.testing.assert_close(poisoned(is_vision & ~seen_by[stage.layer]), clean, rtol=0, atol=0)
    kept = seen_by[stage.layer] & is_vision if stage.share else ~is_vision
    assert (poisoned(kept) - clean).abs().max() > 0.1


def test_pyramid_drop_forgets_what_it_dropped(llava, pruned):
    """Noise far below all attention keeps a dropped token dropped; what the next layers see of it is nothing."""
    batch, stages = inputs_of(["ttItt"]), METHODS["pyramid"]
    run(pruned, stages, batch)
    widths = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
        for layer in pruned.model.language_model.layers
    ]
    run(pruned, stages, batch)
    for hook in hooks:
        hook.remove()
    assert widths == [8, 6, 6, 5, 5, 4]


@pytest.mark.parametrize("stages", [vtw(NUM_LAYERS), fastv(2, 0.0), pyramid_drop((1, 3, 5), 1.0), ()])
def test_where_nothing_is_dropped_the_logits_are_llavas(llava, pruned, stages):
    batch = inputs_of(ROWS)
    with torch.no_grad():
        expected = llava(**batch).logits
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(run(pruned, stages, batch).logits[mask], expected[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_decoding_from_the_cache_gives_what_reading_prompt_and_answer_at_once_gives(llava, pruned, method):
    """The prompt alone decides what remains: `last_column` says where it ends."""
    answer = torch.tensor([[20, 21, 22]]).expand(len(ROWS), -1)
    batch = inputs_of(ROWS)
    cache = DynamicCache(config=pruned.config.text_config)
    steps, mask = [], batch["attention_mask"]
    run(pruned, METHODS[method], batch, past_key_values=cache)
    for token in answer.split(1, dim=1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = {"input_ids": token, "attention_mask": mask}
        steps.append(run(pruned, METHODS[method], step, past_key_values=cache).logits[:, -1])
    whole = {
        "input_ids": torch.cat([batch["input_ids"], answer], 1),
        "attention_mask": mask,
        "pixel_values": batch["pixel_values"],
    }
    last_column = torch.full((len(ROWS),), batch["input_ids"].shape[1] - 1)
    at_once = run(pruned, METHODS[method], whole, last_column=last_column, logits_to_keep=3).logits
    torch.testing.assert_close(torch.stack(steps, 1), at_once, rtol=1e-4, atol=1e-4)
    lengths = batch["attention_mask"].sum(1).tolist()
    slow = slow_logits(llava, whole, METHODS[method], lengths)
    torch.testing.assert_close(at_once, torch.stack([row[-3:] for row, _ in slow]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_generate_gives_each_row_of_a_batch_what_it_gives_it_alone(pruned, method):
    pruned.stages = METHODS[method]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    batch = inputs_of(ROWS)
    for beams in (1, 2):
        together = pruned.generate(**batch, **settings, num_beams=beams)[:, -4:]
        start = 0
        for i, row in enumerate(ROWS):
            mask = batch["attention_mask"][i].bool()
            stop = start + row.count("I")
            images = {"pixel_values": batch["pixel_values"][start:stop]} if stop > start else {}
            alone = pruned.generate(batch["input_ids"][i, mask][None], **images, **settings, num_beams=beams)
            assert alone[0, -4:].tolist() == together[i].tolist()
            start = stop


@pytest.mark.parametrize("method", METHODS)
def test_the_host_waits_for_nothing_once_the_layers_read_a_prompt(monkeypatch, pruned, method):
    """As in LLaVA and DPVR, which they are timed beside."""
    batch, reads = inputs_of(["tItt", "ttIt"]), record_reads(monkeypatch)
    features = {"image": pruned.model.get_image_features(batch.pop("pixel_values"), return_dict=True)}
    pruned.stages = METHODS[method]
    handle = pruned.model.language_model.layers[0].register_forward_pre_hook(lambda *_: reads.clear())
    with torch.no_grad():
        pruned(**batch, mm_encoder_outputs=features)
    handle.remove()
    assert not reads


class Operators(TorchDispatchMode):
    """Counts torch's operators by name, those without a result apart."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or result.numel():
            self.counts[function.name().split(".")[0].removeprefix("aten::")] += 1
        return result


@pytest.mark.parametrize("method", METHODS)
def test_a_drop_sorts_to_rank_and_to_pack_and_turns_no_key_twice(pruned, method):
    """As DPVR's routing, which it is timed beside: on a GPU that waits for its host every kernel counts."""
    with Operators() as dense:
        run(pruned, (), inputs_of(["tItt"]))
    with Operators() as dropping:
        run(pruned, METHODS[method], inputs_of(["tItt"]))
    more = dropping.counts - dense.counts
    ranking = [stage for stage in METHODS[method] if stage.ranks and stage.num_kept(TOKENS_PER_IMAGE)]
    assert more["sort"] == len(METHODS[method]) + len(ranking)
    looks_ahead = sum(stage.ranking_layer == stage.layer for stage in ranking)
    assert more["neg"] == len(ranking) + looks_ahead  # the queries' rotation, and that of keys which are not there yet
    assert more["scatter"] == len(ranking) + 1  # the states are put in their places once


@pytest.mark.parametrize("rows", [["tItt", "ttIt"], ["tItt", "tt"]])
@pytest.mark.parametrize("method", METHODS)
def test_at_a_generated_token_the_host_waits_for_no_more_than_in_llava(monkeypatch, llava, pruned, method, rows):
    def reads_of(model):
        mask, cache = batch["attention_mask"], DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            model(**batch, past_key_values=cache)
            reads.clear()
            step = {
                "input_ids": torch.tensor([[20]] * len(rows)),
                "attention_mask": torch.cat([mask, mask[:, -1:]], 1),
            }
            model(**step, past_key_values=cache)
        return list(reads)

    batch, reads = inputs_of(rows), record_reads(monkeypatch)
    pruned.stages = METHODS[method]
    assert reads_of(pruned) == reads_of(llava)


def test_images_after_the_first_call_are_refused(pruned):
    cache = run(pruned, vtw(2), inputs_of(["tIt"])).past_key_values
    with pytest.raises(ValueError, match="Image tokens in a later call"):
        run(pruned, vtw(2), {**inputs_of(["tIt"]), "attention_mask": None}, past_key_values=cache)


def test_embeddings_need_to_say_which_tokens_are_vision(pruned):
    with pytest.raises(ValueError, match="pass mm_token_type_ids"):
        run(pruned, vtw(2), {"inputs_embeds": torch.zeros(1, 3, 32)})


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (vtw(0), r"before layers \[0\]"),
        (pyramid_drop((3, 2), 0.5), r"before layers \[3, 2\]"),
        (fastv(2, 1.5), r"Shares \[-0.5\]"),
        ((Stage(1, 0.2, 1), Stage(2, 0.4, 2)), r"Shares \[0.2, 0.4\]"),
    ],
)
def test_stages_that_mean_nothing_are_refused(pruned, stages, message):
    with pytest.raises(ValueError, match=message):
        pruned.stages = stages


COSTS = {
    "vtw": vtw(3),
    "fastv": fastv(2, 0.5),
    "fastv, all ask": fastv(2, 0.5, all_ask=True),
    "pyramid": pyramid_drop((1, 2, 4), 0.5),
    "never": fastv(5, 0.5),
    "none left to rank": pyramid_drop((1, 2, 3), 0.2),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", COSTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cost_is_what_torch_counts_and_the_cache_holds(shape, method, attention):
    config, stages = llava_config(shape), COSTS[method]
    model = build(PrunedLlava, config, attention)
    model.stages = stages
    inputs = prompt(num_images=2, num_text=11)
    cache = DynamicCache(config=config.text_config)
    counted = count(model, **inputs, logits_to_keep=1, past_key_values=cache)
    assert prefill_flops(config, stages, 2 * NUM_PATCHES, 11).total == counted
    assert all(layer.is_initialized for layer in cache.layers[:5])
    assert cache_bytes(config, stages, 2 * NUM_PATCHES, 11, itemsize=4) == stored_bytes(cache, config)
    step = count(model, input_ids=torch.tensor([[9]]), past_key_values=cache)
    assert decode_flops(config, stages, 2 * NUM_PATCHES, 11).total == step


@pytest.mark.parametrize("stages", [(), vtw(5), fastv(2, 0.0)])
def test_without_a_drop_the_cost_is_llavas(stages):
    config = llava_config("grouped")
    assert prefill_flops(config, stages, 9, 4) == accounting.prefill_flops(config, 9, 4)
    assert decode_flops(config, stages, 9, 4) == accounting.decode_flops(config, 9, 4)
    assert cache_bytes(config, stages, 9, 4) == accounting.cache_bytes(config, 9, 4)["joint"]


def test_loads_by_hand():
    loads = prefill_loads(llava_config("llama"), pyramid_drop((1, 2, 4), 0.5), 9, 4)
    assert [load.new for load in loads] == [13, 8, 6, 6, 5]


def test_a_pruned_llava_loads_a_llava_checkpoint(llava, pruned, tmp_path):
    llava.save_pretrained(tmp_path)
    loaded = PrunedLlava.from_pretrained(tmp_path).eval()
    batch = inputs_of(["tIt"])
    assert isinstance(loaded, LlavaForConditionalGeneration)
    torch.testing.assert_close(run(loaded, vtw(2), batch).logits, run(pruned, vtw(2), batch).logits)


def test_backbones_that_rank_in_other_ways_and_prompts_beyond_a_window_are_refused():
    fields = llava_config("mistral").to_dict()
    with pytest.raises(ValueError, match="model_type='qwen3' is none of llama, mistral, qwen2"):
        PrunedLlava(LlavaConfig(**{**fields, "text_config": {"model_type": "qwen3", "num_hidden_layers": 2}}))
    text = {**fields["text_config"], "sliding_window": 6}
    model = PrunedLlava(LlavaConfig(**{**fields, "text_config": text})).eval()
    model.stages = vtw(1)
    with pytest.raises(ValueError, match=r"tokens exceed text_config.sliding_window=6; keep within the window"):
        model(**prompt(1, 4))
