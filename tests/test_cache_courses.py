"""One cache over any course of prompts, steps, crops, reorderings and copies, held against the oracle at each call."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import row_logits
from tiny import CROPPED_CACHES, IMAGE, make_batch, make_dpvr, text_config
from transformers import DynamicCache, MistralConfig, StaticCache

ROWS = 3
COLUMNS = ("input_ids", "attention_mask", "mm_token_type_ids")
GEOMETRIES = [(2, 1, 1), (3, 2, 2), (5, 1, 1), (2, 0, 1)]  # of 6 layers: joint, side, fusion
parts = st.lists(st.text(alphabet="ttI", max_size=3), min_size=ROWS, max_size=ROWS).filter(any)
calls = st.tuples(st.just("call"), parts, st.sampled_from(["left", "right"]), st.integers(0, 9))
steps = st.tuples(st.just("call"), st.just(["t"] * ROWS), st.just("left"), st.integers(0, 9))
crops = st.tuples(st.just("crop"), st.floats(0, 1))
orders = st.tuples(st.just("reorder"), st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
# Through an image, and where the one row that filled the last slots is gone
CROPS = [
    ("call", ["ttI", "ttt", "t"], "left", 0),
    ("call", ["tttt", "I", "I"], "left", 1),
    ("reorder", [1, 1, 2]),
    ("crop", 0.9),
    ("call", ["tt", "t", "tt"], "left", 2),
    ("crop", 0.4),
    ("call", ["tI", "t", "I"], "left", 3),
]
courses = st.lists(st.one_of(calls, steps, crops, orders, st.tuples(st.just("copy"))), min_size=2, max_size=6)


@pytest.fixture(scope="module")
def models():
    backbones = {False: text_config(), True: text_config(MistralConfig, sliding_window=200)}
    return {(slides, *shape): make_dpvr(0, text, *shape) for slides, text in backbones.items() for shape in GEOMETRIES}


class Conversation:
    """A cache, and the whole of what it holds: columns `(ROWS, T)`, and the image features of each, zero at text."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.columns = {name: torch.zeros(ROWS, 0, dtype=torch.long) for name in COLUMNS}
        self.features = torch.zeros(ROWS, 0, model.config.text_config.hidden_size)

    def call(self, rows: list[str], side: str, seed: int) -> None:
        batch = make_batch(rows, side, seed)
        is_vision = (batch["input_ids"] == IMAGE)[..., None]
        features = torch.zeros(*batch["input_ids"].shape, self.features.shape[-1])
        if batch["pixel_values"] is not None:
            images = self.model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
            features = features.masked_scatter(is_vision, torch.cat(list(images)))
        self.features = torch.cat([self.features, features], 1)
        self.columns = {name: torch.cat([column, batch[name]], 1) for name, column in self.columns.items()}
        positions = (self.columns["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, -features.shape[1] :]
        whole = {"attention_mask": self.columns["attention_mask"], "position_ids": positions}
        self.check(self.model(**batch | whole, past_key_values=self.cache).logits)

    def check(self, logits: torch.Tensor) -> None:
        """Logits `(ROWS, T, vocabulary)` of the last T columns."""
        first = self.features.shape[1] - logits.shape[1]
        for ids, mask, types, features, row in zip(*self.columns.values(), self.features, logits, strict=True):
            is_token = mask.bool()
            is_vision = types[is_token].bool()
            if is_token[first:].any():
                expected = row_logits(self.model, ids[is_token], is_vision, features[is_token][is_vision])
                actual = row[is_token[first:]]
                assert (actual - expected[-len(actual) :]).abs().max() <= 1e-4

    def crop(self, share: float) -> None:
        kept = int(share * self.features.shape[1])
        if kept < self.features.shape[1]:
            self.cache.crop(kept - self.features.shape[1])
        assert self.cache.get_seq_length() == kept
        self.choose(slice(None), slice(kept))

    def reorder(self, order: list[int]) -> None:
        if self.features.shape[1]:
            self.cache.reorder_cache(torch.tensor(order))
            self.choose(torch.tensor(order), slice(None))

    def copy(self) -> None:
        self.cache = copy.deepcopy(self.cache)

    def choose(self, rows, columns) -> None:
        self.columns = {name: column[rows, columns] for name, column in self.columns.items()}
        self.features = self.features[rows, columns]


@pytest.mark.parametrize("kind", [*CROPPED_CACHES, "sliding"])
@settings(max_examples=30)
@example(course=CROPS, geometry=(2, 1, 1))
@given(course=courses, geometry=st.sampled_from(GEOMETRIES))
def test_any_course_of_calls_crops_reorderings_and_copies_gives_the_oracles_logits(models, kind, course, geometry):
    model = models[kind == "sliding", *geometry]
    text = model.config.text_config
    cache = StaticCache(text, max_cache_len=150) if kind == "static" else DynamicCache(config=text)
    conversation = Conversation(model, cache)
    with torch.no_grad():
        for act, *arguments in course:
            getattr(conversation, act)(*arguments)
