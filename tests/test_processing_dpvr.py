"""The processor: LLaVA-1.5's pixels and prompts, token types, and refusals that name the row."""

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import make_dpvr, text_config
from tiny_processor import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    PATCH,
    PROCESSOR,
    SIZE,
    TOKENS,
    make_processor,
    make_tokenizer,
    noise,
    original_pixels,
)
from tokenizers import Tokenizer, models
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    pipeline,
)

from processing_dpvr import CHAT_TEMPLATE, DPVRProcessor

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The template of llava-hf/llava-1.5-7b-hf, shortened: roles in capitals, no system sentence
LLAVA_HF_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}"
    "{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)


def clip(size=SIZE, **options):
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **options)


IMAGE_1, IMAGE_2 = noise(9, 4, seed=1), noise(5, 11, seed=2)


def save_llava_hf(folder, image_processor=None, **tokenizer_options) -> str:
    """A folder as llava-hf's are: saved by `LlavaProcessor`, with an image processor that crops."""
    LlavaProcessor(
        image_processor or clip(),
        make_tokenizer(**tokenizer_options),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_HF_TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------------------------ pixels


def assert_same_pixels(processor, image, size) -> None:
    pixels = processor(images=image, text="<image>", return_tensors="pt").pixel_values
    assert pixels.dtype == torch.float32
    assert pixels.shape == (1, 3, size, size)
    # One of 255 levels is at least 0.014 here
    np.testing.assert_allclose(pixels[0].numpy(), original_pixels(image, size), atol=1e-5)


@settings(max_examples=60)
@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"]),
    seed=st.integers(0, 9),
)
def test_pixels_are_those_of_the_original_pipeline(width, height, mode, seed):
    assert_same_pixels(PROCESSOR, noise(width, height, mode, seed), SIZE)


@pytest.mark.parametrize("size", [(1, 1), (336, 335), (335, 336), (337, 336), (640, 479), (41, 500), (2, 333)])
def test_pixels_at_llavas_size_are_those_of_the_original_pipeline(size):
    processor = DPVRProcessor.from_llava(make_tokenizer())
    assert_same_pixels(processor, noise(*size), 336)
    assert processor(images=noise(*size), text="<image>")["mm_token_type_ids"][0].count(1) == 576


def test_palette_with_transparency_keeps_the_colours_under_it():
    image = noise(7, 4).convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = 0
    assert_same_pixels(PROCESSOR, image, SIZE)


@pytest.mark.parametrize("size", [(9, 4), (5, 11), (16, 17)])
def test_do_pad_false_crops_as_clip_does(size, tmp_path):
    image = noise(*size)
    expected = clip()(image, return_tensors="pt").pixel_values
    loaded = DPVRProcessor.from_pretrained(save_llava_hf(tmp_path), do_pad=False)
    assert loaded.image_processor.do_pad is False
    ways = [
        PROCESSOR(images=image, text="<image>", do_pad=False, return_tensors="pt"),
        PROCESSOR(images=image, text="<image>", images_kwargs={"do_pad": False}, return_tensors="pt"),
        make_processor(do_pad=False)(images=image, text="<image>", return_tensors="pt"),
        make_processor(image_processor=clip(), do_pad=False)(images=image, text="<image>", return_tensors="pt"),
        loaded(images=image, text="<image>", return_tensors="pt"),
    ]
    for inputs in ways:
        torch.testing.assert_close(inputs.pixel_values, expected, rtol=0, atol=0)
        assert not torch.allclose(inputs.pixel_values[0], torch.tensor(original_pixels(image, SIZE)).float())


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_grey_array_may_come_with_any_order_of_channels(layout):
    grey = np.asarray(IMAGE_1.convert("L"))
    processor = make_processor()
    expected = processor(images=grey, text="<image>", return_tensors="pt").pixel_values
    pixels = processor(images=grey, text="<image>", return_tensors="pt", input_data_format=layout).pixel_values
    torch.testing.assert_close(pixels, expected)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("height", [3, 4])
def test_a_stated_order_of_channels_is_followed(layout, height):
    image = noise(5, height)
    array = np.asarray(image)  # of (3, 5, 3) either end could hold the channels
    array = array.transpose(2, 0, 1) if layout == "channels_first" else array
    expected = PROCESSOR(images=image, text="<image>", return_tensors="pt").pixel_values
    for options in ({"input_data_format": layout}, {"images_kwargs": {"input_data_format": layout}}):
        pixels = PROCESSOR(images=array, text="<image>", return_tensors="pt", **options).pixel_values
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0)
    processor = make_processor()
    processor.max_image_pixels = 24
    with pytest.raises(ValueError, match=f"5 x {height} pixels; padded to a square it would have 25"):
        processor(images=array, text="<image>", input_data_format=layout)


def test_arrays_and_tensors_give_the_pixels_of_the_image_they_hold():
    image = noise(12, 7)
    array = np.asarray(image)
    expected = PROCESSOR(images=image, text="<image>", return_tensors="pt").pixel_values
    for same in (array, array.transpose(2, 0, 1), torch.tensor(array)):
        pixels = PROCESSOR(images=same, text="<image>", return_tensors="pt").pixel_values
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0)
    pair = PROCESSOR(images=np.stack([array, array]), text="<image><image>", return_tensors="pt").pixel_values
    torch.testing.assert_close(pair, torch.cat([expected, expected]), rtol=0, atol=0)
    grey = np.asarray(image.convert("L"))
    for same in (grey, grey[None], grey[..., None]):
        pixels = PROCESSOR(images=same, text="<image>", return_tensors="pt").pixel_values
        np.testing.assert_allclose(pixels[0].numpy(), original_pixels(image.convert("L"), SIZE), atol=1e-5)
    narrow = noise(3, 7)  # its last axis could hold channels too
    expected = PROCESSOR(images=narrow, text="<image>", return_tensors="pt").pixel_values
    pixels = PROCESSOR(images=np.asarray(narrow).transpose(2, 0, 1), text="<image>", return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0)


def test_a_tensor_of_bfloat16_with_a_graph_gives_the_pixels_of_its_values():
    image = torch.rand(3, 4, 9).bfloat16()
    options = {"text": "<image>", "do_pad": False, "do_rescale": False, "return_tensors": "pt"}
    expected = PROCESSOR(images=image.float(), **options).pixel_values
    pixels = PROCESSOR(images=image.requires_grad_(), **options).pixel_values
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0)


def test_paths_columns_generators_and_object_arrays_list_images_as_a_list_does(tmp_path):
    pandas = pytest.importorskip("pandas")
    IMAGE_1.save(tmp_path / "1.png")
    IMAGE_2.save(tmp_path / "2.png")
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    objects = np.empty(2, dtype=object)
    objects[:] = [IMAGE_1, IMAGE_2]
    text, options = ["<image>a", "<image>b"], {"padding": True, "return_tensors": "pt"}
    expected = PROCESSOR(images=[IMAGE_1, IMAGE_2], text=text, **options)
    assert expected["pixel_values"].shape[0] == 2

    class Column:  # as of the datasets library
        def __iter__(self):
            return iter([IMAGE_1, IMAGE_2])

        def __len__(self):
            return 2

    series = pandas.Series(list(map(str, paths)))
    for images in (
        Column(),
        series,
        objects,
        iter([IMAGE_1, IMAGE_2]),
        map(str, paths),
        paths,
        iter([[IMAGE_1], [paths[1]]]),
    ):
        inputs = PROCESSOR(images=images, text=text, **options)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "size", [SIZE, [SIZE, SIZE], (SIZE, SIZE), {"shortest_edge": SIZE}, {"height": 9, "width": 9}]
)
def test_a_size_may_have_any_form_that_image_processors_take(size):
    options = {"text": "<image>", "return_tensors": "pt", "do_center_crop": False}
    expected = LlavaImageProcessorPil(do_pad=True, crop_size=SIZE, size=size, do_center_crop=False)(IMAGE_1)
    shape = np.stack(expected.pixel_values).shape
    for form in ({"size": size}, {"images_kwargs": {"size": size}}):
        assert PROCESSOR(images=IMAGE_1, **form, **options).pixel_values.shape == shape


@dataclass
class Part:
    type: str
    text: str | None = None
    image: object = None
    url: str | None = None


@dataclass
class Message:
    role: str
    content: object


@dataclass
class Conversation:
    messages: list


class Model:
    """As a message of pydantic, which OpenAI's client returns."""

    def __init__(self, **fields):
        self.fields = fields

    def model_dump(self):
        return {"refusal": None, **self.fields}


def test_message_objects_are_taken_as_dicts_are():
    plain = [
        {"role": "user", "content": [{"type": "image", "image": IMAGE_1}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    parts = [Part("image", image=IMAGE_1), Part("text", "a")]
    objects = [Message("user", parts), Model(role="assistant", content="b"), plain[2]]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    mixed = [{"role": "user", "content": parts}, *plain[1:]]
    conversations = [(objects, plain), (mixed, plain), ([objects, mixed], [plain, plain])]
    conversations += [(Conversation(objects), plain), ([Conversation(plain)] * 2, [plain, plain])]
    for conversation, expected in conversations:
        inputs, wanted = (PROCESSOR.apply_chat_template(each, **options) for each in (conversation, expected))
        assert all(torch.equal(inputs[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="Part 0 of message 0 of conversation 0 is text that holds <image>"):
        PROCESSOR.apply_chat_template([Message("user", [Part("text", "<image>")])])
    with pytest.raises(ValueError, match="message 0 of conversation 0 is not a dict"):
        PROCESSOR.apply_chat_template([Message])  # a class, which has the fields of none


def test_float_images_are_refused_where_the_padding_colour_would_be_wrong():
    image = torch.rand(3, 4, 9)
    with pytest.raises(ValueError, match=r"Image 1 of prompt 0 is of float32.*uint8.*do_pad=False"):
        PROCESSOR(images=[IMAGE_1, image], text="<image><image>")
    inputs = PROCESSOR(images=image, text="<image>", do_pad=False, do_rescale=False, return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, SIZE, SIZE)


def test_image_processor_that_does_not_crop_keeps_its_settings():
    siglip = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    options = {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    processor = make_processor(image_processor=siglip, do_pad=False, **options)
    inputs = processor(images=IMAGE_1, text="<image>", return_tensors="pt")
    torch.testing.assert_close(inputs.pixel_values, siglip(IMAGE_1, return_tensors="pt").pixel_values)
    assert inputs.mm_token_type_ids.sum() == TOKENS
    assert processor._get_num_multimodal_tokens([(4, 9)])["num_image_tokens"] == [TOKENS]


# ------------------------------------------------------------------------------------------------------------ prompts


def original_prompt(*turns: tuple[str, str | None], system: str = VICUNA) -> str:
    """The original's prompt: after a question a space, after an answer `</s>`, and nothing after an open turn."""
    prompt = system + " "
    for question, answer in turns:
        prompt += f"USER: {question} ASSISTANT:"
        prompt += "" if answer is None else f" {answer}</s>"
    return prompt


def as_messages(*turns: tuple[str, str | None], parts: bool) -> list[dict]:
    """The turns as messages, their content as strings or as lists of parts with the text before its image."""
    messages = []
    for role, text in [pair for turn in turns for pair in zip(("user", "assistant"), turn, strict=True) if pair[1]]:
        content = text
        if parts:
            content = [{"type": "text", "text": text.removeprefix("<image>\n")}]
            content += [{"type": "image"}] * text.count("<image>")
        messages.append({"role": role, "content": content})
    return messages


TURNS = [("<image>\nWhat is this?", "A cat."), ("Is it  big?\n", "No, it's\nsmall."), ("<image>\nAnd this?", None)]


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("is_open", [False, True])
def test_prompt_is_the_originals_byte_for_byte(count, is_open, parts):
    last = TURNS[count - 1]
    turns = [*TURNS[: count - 1], (last[0], None if is_open else "Yes.")]
    prompt = PROCESSOR.apply_chat_template(as_messages(*turns, parts=parts), add_generation_prompt=is_open)
    assert prompt == original_prompt(*turns)


def test_images_of_a_message_come_first_each_on_its_line():
    content = [{"type": "text", "text": "One"}, {"type": "image"}, {"type": "text", "text": "two?"}, {"type": "image"}]
    prompt = PROCESSOR.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == original_prompt(("<image>\n<image>\nOne two?", None))


@pytest.mark.parametrize("system", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_system_message_replaces_the_default_sentence(system):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
    prompt = PROCESSOR.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == original_prompt(("Hi", None), system="Be brief.")
    messages[0]["content"] = ""
    assert PROCESSOR.apply_chat_template(messages, add_generation_prompt=True) == "USER: Hi ASSISTANT:"


def test_a_message_may_have_no_content():
    messages = [{"role": "user", "content": None}, {"role": "assistant"}]
    assert PROCESSOR.apply_chat_template(messages) == f"{VICUNA} USER:  ASSISTANT: </s>"


def test_an_image_of_openais_form_is_an_image():
    content = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Hi"}]
    prompt = PROCESSOR.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == original_prompt(("<image>\nHi", None))


@pytest.mark.parametrize(("eos_token", "end"), [("<unk>", "<unk>"), (None, "</s>")])
def test_an_answer_ends_with_the_tokenizers_token_or_llavas(eos_token, end):
    processor = DPVRProcessor.from_llava(make_tokenizer(eos_token=eos_token), image_size=SIZE, patch_size=PATCH)
    prompt = processor.apply_chat_template(as_messages(("Hi", "Yes."), parts=False))
    assert prompt == original_prompt(("Hi", "Yes.")).replace("</s>", end)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([{"role": "tool", "content": "x"}], "message 0 is of role tool"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "message 1 is of role system"),
        ([{"role": "user", "content": [{"type": "video"}]}], "Part 0 of message 0 of conversation 0 is of type video"),
        (
            [{"role": "assistant", "content": [{"type": "image"}]}],
            "Message 0 is of role assistant and cannot hold",
        ),
    ],
)
def test_template_refuses_what_llava_has_no_form_for(messages, error):
    with pytest.raises(ValueError, match=error):
        PROCESSOR.apply_chat_template(messages)


def test_assistant_mask_covers_the_answers_and_their_end():
    turns = [("<image>\nWhat?", "A cat."), ("Sure?", "Yes.")]
    messages = as_messages(*turns, parts=True)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = PROCESSOR.tokenizer.apply_chat_template(messages, **options)
    assert PROCESSOR.decode([i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]) == (
        "A cat.</s>Yes.</s>"
    )
    messages[0]["content"][1]["image"] = IMAGE_1
    out = PROCESSOR.apply_chat_template(messages, return_tensors="pt", **options)
    assert PROCESSOR.decode(out["input_ids"][torch.as_tensor(out["assistant_masks"]) == 1]) == "A cat.</s>Yes.</s>"


def test_answer_can_be_continued():
    messages = as_messages(("Hi", "Hello the"), parts=True)
    prompt = PROCESSOR.apply_chat_template(messages, continue_final_message=True)
    assert prompt == original_prompt(("Hi", "Hello the")).removesuffix("</s>")


# ------------------------------------------------------------------------------------------------------------ batches


@st.composite
def ragged_batches(draw):
    """Prompts with zero to three images at the start, the end or within, and the images of each."""
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    prompts = []
    for count in counts:
        pieces = draw(st.lists(st.text("ab ", max_size=5), min_size=count + 1, max_size=count + 1))
        prompts.append("<image>".join(pieces))
    return prompts, [[noise(3, 2, seed=10 * row + i) for i in range(n)] for row, n in enumerate(counts)]


@settings(max_examples=40)
@given(batch=ragged_batches(), nested=st.booleans())
def test_each_row_of_a_ragged_batch_is_what_the_prompt_alone_gives(batch, nested):
    prompts, images = batch
    flat = [image for row in images for image in row]
    inputs = PROCESSOR(images=images if nested else flat, text=prompts, padding=True, return_tensors="pt")
    assert inputs.input_ids.dtype == inputs.mm_token_type_ids.dtype == torch.int64
    torch.testing.assert_close(inputs.mm_token_type_ids, (inputs.input_ids == IMAGE).long())
    pixels = []
    for row, (prompt, images_of_row) in enumerate(zip(prompts, images, strict=True)):
        alone = PROCESSOR(images=images_of_row, text=prompt, return_tensors="pt")
        length = alone.input_ids.shape[1]
        assert alone.mm_token_type_ids.sum() == TOKENS * len(images_of_row)
        assert not inputs.attention_mask[row, :-length].any()
        assert (inputs.input_ids[row, :-length] == PAD).all()
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            torch.testing.assert_close(inputs[name][row, -length:], alone[name][0])
        pixels += [alone.pixel_values] if images_of_row else []
    assert ("pixel_values" in inputs) == bool(flat)
    if flat:
        torch.testing.assert_close(inputs.pixel_values, torch.cat(pixels))


def test_image_becomes_a_run_of_its_tokens_in_place():
    ids = PROCESSOR(images=IMAGE_1, text="a<image>b")["input_ids"][0]
    a, b = PROCESSOR.tokenizer.convert_tokens_to_ids(["a", "b"])
    assert ids == [BOS, a, *[IMAGE] * TOKENS, b]


def test_the_template_writes_whatever_token_stands_for_an_image():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    processor = DPVRProcessor(clip(), tokenizer, patch_size=PATCH, image_token="<picture>")
    content = [{"type": "image", "image": IMAGE_1}, {"type": "text", "text": "w5"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
    number = inputs["input_ids"][0].count(processor.image_token_id)
    assert number == processor._get_num_multimodal_tokens([[9, 4]])["num_image_tokens"][0]


def test_none_in_a_list_of_images_is_a_prompt_without_one():
    inputs = PROCESSOR(images=[None, IMAGE_1, (IMAGE_2,)], text=["a", "<image>", "<image>"])
    assert [row.count(1) for row in inputs["mm_token_type_ids"]] == [0, TOKENS, TOKENS]
    assert len(inputs["pixel_values"]) == 2
    assert PROCESSOR(images=[IMAGE_1, None], text=["<image>", "a"])["mm_token_type_ids"][1] == [0, 0]


@pytest.mark.parametrize("empty", [None, [], (), [[]], [[], []], [None, None], [[], None]])
def test_empty_images_videos_and_audio_mean_none(empty):
    prompts = ["ab", "c"]
    expected = PROCESSOR(text=prompts)
    assert set(expected) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert PROCESSOR(images=empty, text=prompts).data == expected.data
    assert PROCESSOR(images=np.empty((0, 4, 4, 3), np.uint8), text=prompts).data == expected.data
    assert PROCESSOR(text=prompts, videos=empty, audio=empty).data == expected.data
    assert PROCESSOR(text=prompts, videos=empty, audios=empty).data == expected.data


@pytest.mark.parametrize("name", ["videos", "audio", "audios"])
def test_videos_and_audio_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` is not empty"):
        PROCESSOR(text="ab", **{name: [np.zeros((2, 4, 4, 3))]})


@pytest.mark.parametrize(
    ("text", "images", "error"),
    [
        ("a", IMAGE_1, "Prompt 0 has 0 <image> and 1 images"),
        ("<image>", None, "Prompt 0 has 1 <image> and 0 images"),
        ("<image>", [[]], "Prompt 0 has 1 <image> and 0 images"),
        ("<image><image>", [IMAGE_1], "Prompt 0 has 2 <image> and 1 images"),
        ("<image>" * TOKENS, [IMAGE_1], f"Prompt 0 has {TOKENS} <image> and 1 images. Write <image> once per image"),
        (["<image>", "<image><image>"], [IMAGE_1, IMAGE_2], "Prompt 1 has 2 <image> and 1 images"),
        (["<image>", "<image>", "a"], [IMAGE_1] * 4, "Prompt 2 has 0 <image> and 2 images"),
        (["<image>", "<image>"], [[IMAGE_1, IMAGE_2], []], "Prompt 0 has 1 <image> and 2 images"),
        (["<image>", "a", "<image>"], [[IMAGE_1], [IMAGE_2], None], "Prompt 1 has 0 <image> and 1 images"),
        (["<image>", "<image>"], [[IMAGE_1, IMAGE_2]], "`images` has 1 lists for 2 prompts"),
        ("<image><image>", [[IMAGE_1], [IMAGE_2]], "`images` has 2 lists for 1 prompts"),
    ],
)
def test_wrong_number_of_images_names_the_row_and_both_numbers(text, images, error):
    with pytest.raises(ValueError, match=error):
        PROCESSOR(images=images, text=text)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kept", [0, 1, TOKENS - 1])
def test_truncation_into_an_image_is_refused_with_row_and_numbers(kept, side):
    processor = make_processor()
    processor.tokenizer.truncation_side = side
    options = {"truncation": True, "padding": True, "return_tensors": "pt"}
    text = ["ab", "<image>abcdefgh" if side == "left" else "abcdefg<image>"]
    with pytest.raises(ValueError, match=f"Prompt 1 has {TOKENS} image tokens, of which truncation keeps {kept}"):
        processor(images=[[], [IMAGE_1]], text=text, max_length=8 + kept + (side == "left"), **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_that_spares_the_images_is_allowed(side):
    processor = make_processor()
    processor.tokenizer.truncation_side = side
    text = "<image>abcdefg" if side == "right" else "abcdefg<image>"
    inputs = processor(images=IMAGE_1, text=text, truncation=True, max_length=TOKENS + 3, return_tensors="pt")
    assert inputs.input_ids.shape == (1, TOKENS + 3)
    assert inputs.mm_token_type_ids.sum() == TOKENS


def broken_image_files(folder) -> dict[str, str]:
    noise(64, 64).save(folder / "whole.png")
    data = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_bytes(b"not an image")
    return {name: str(folder / name) for name in ("cut.png", "text.png", "missing.png")}


@pytest.mark.parametrize("name", ["cut.png", "text.png", "missing.png"])
def test_unreadable_image_file_is_named(name, tmp_path):
    path = broken_image_files(tmp_path)[name]
    with pytest.raises(ValueError, match="Image 1 of prompt 0 cannot be read"):
        PROCESSOR(images=[IMAGE_1, path], text="<image><image>")
    with pytest.raises(ValueError, match="Image 0 of prompt 1 cannot be read"):
        PROCESSOR(images=[[IMAGE_1], [path]], text=["<image>", "<image>"])


def test_image_that_breaks_while_it_is_decoded_is_named(tmp_path):
    path = broken_image_files(tmp_path)["cut.png"]
    with Image.open(path) as image, pytest.raises(ValueError, match="Image 1 of prompt 0 cannot be read"):
        PROCESSOR(images=[IMAGE_1, image], text="<image><image>")


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (b"x", "Image 1 of prompt 0 is a bytes"),
        (3, "Image 1 of prompt 0 is a int"),
        ({"bytes": b"x", "path": None}, "Image 1 of prompt 0 is a dict"),
        (io.BytesIO(b"two\nlines"), "Image 1 of prompt 0 is a BytesIO"),
        (np.zeros((0, 4, 3), np.uint8), "Image 1 of prompt 0 has no pixels"),
    ],
)
def test_what_is_no_image_is_named(image, error):
    with pytest.raises(ValueError, match=error):
        PROCESSOR(images=[IMAGE_1, image], text="<image><image>")


def test_images_without_text_give_pixels_only():
    assert set(PROCESSOR(images=[IMAGE_1, IMAGE_2], return_tensors="pt")) == {"pixel_values"}


def test_token_counts_and_input_names_are_those_of_a_call():
    inputs = PROCESSOR(images=[IMAGE_1, IMAGE_2], text="<image> <image>")
    counts = PROCESSOR._get_num_multimodal_tokens([(4, 9), (11, 5)])
    assert counts["num_image_tokens"] == [TOKENS, TOKENS]
    assert inputs["mm_token_type_ids"][0].count(1) == 2 * TOKENS
    assert set(inputs) <= set(PROCESSOR.model_input_names)
    assert len(PROCESSOR.model_input_names) == len(set(PROCESSOR.model_input_names))
    assert PROCESSOR.batch_decode([inputs["input_ids"][0]], skip_special_tokens=True) == [" "]


# --------------------------------------------------------------------------------------------- making, saving, loading


def test_tokenizer_without_the_image_token_is_refused():
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1}, unk_token="<unk>")),
        unk_token="<unk>",
        pad_token="<pad>",
    )
    with pytest.raises(ValueError, match=r"encodes '<image>' as \[0\].*add_tokens"):
        DPVRProcessor.from_llava(bare, image_size=SIZE)


def test_from_llava_refuses_a_tokenizer_that_cannot_pad_and_an_unknown_strategy():
    with pytest.raises(ValueError, match="no pad token"):
        DPVRProcessor.from_llava(make_tokenizer(pad_token=None))
    with pytest.raises(ValueError, match="'patch' is unknown; use 'default' or 'full'"):
        make_processor(vision_feature_select_strategy="patch")


def test_from_llava_counts_the_tokens_of_its_settings():
    for strategy, extra, expected in [("default", 1, 4), ("full", 1, 5), ("full", 0, 4)]:
        options = {"vision_feature_select_strategy": strategy, "num_additional_image_tokens": extra}
        ids = make_processor(**options)(images=IMAGE_1, text="<image>")["mm_token_type_ids"]
        assert ids[0].count(1) == expected
    ids = DPVRProcessor(clip(28), make_tokenizer())(images=IMAGE_1, text="<image>")["mm_token_type_ids"]
    assert ids[0].count(1) == 4  # patches of 14, without the class token


FRESH = """
import json, sys
from PIL import Image
from transformers import AutoProcessor

folder, image, resaved = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
processor.save_pretrained(resaved)
content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "Hi"}]
messages = [{"role": "user", "content": content}]
options = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
inputs = processor.apply_chat_template([messages, messages[:1]], **options)
lists = {name: value.tolist() for name, value in inputs.items()}
tokenizer = processor.tokenizer
facts = [type(processor).__name__, tokenizer.padding_side, tokenizer.pad_token, tokenizer.model_max_length]
print(json.dumps([facts, lists, tokenizer.chat_template == processor.chat_template, processor.image_processor.do_pad]))
"""


def run_fresh(folder, image, resaved):
    """What a process that has never seen this repository makes of a saved folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(resaved) + "-modules"}
    command = [sys.executable, "-c", FRESH, str(folder), str(image), str(resaved)]
    done = subprocess.run(command, env=environment, cwd=image.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_saved_folder_serves_a_fresh_process_and_can_be_saved_again(tmp_path):
    image = tmp_path / "image.png"
    IMAGE_1.save(image)
    make_processor(model_max_length=2048).save_pretrained(tmp_path / "a")
    auto_map = json.loads((tmp_path / "a" / "processor_config.json").read_text())["auto_map"]
    assert auto_map == {"AutoProcessor": "processing_dpvr.DPVRProcessor"}
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == CHAT_TEMPLATE

    prompt = original_prompt(("<image>\nHi", None))
    expected = PROCESSOR(images=[IMAGE_1, IMAGE_1], text=[prompt, prompt], return_tensors="pt")
    facts, inputs, same_template, do_pad = run_fresh(tmp_path / "a", image, tmp_path / "b")
    assert facts == ["DPVRProcessor", "left", "<pad>", 2048]
    assert same_template
    assert do_pad is True
    assert inputs == {name: value.tolist() for name, value in expected.items()}

    again = AutoProcessor.from_pretrained(tmp_path / "b", trust_remote_code=True)
    inputs = again(images=[IMAGE_1, IMAGE_1], text=[prompt, prompt], return_tensors="pt")
    assert {name: value.tolist() for name, value in inputs.items()} == {n: v.tolist() for n, v in expected.items()}


@pytest.mark.parametrize("value", [None, "abc", 0, -1, True, 1e6])
def test_a_limit_of_pixels_that_is_none_is_refused_when_the_processor_is_made(value):
    with pytest.raises(ValueError, match=f"^max_image_pixels is {value!r}; give a whole number of at least 1"):
        DPVRProcessor(PROCESSOR.image_processor, PROCESSOR.tokenizer, max_image_pixels=value)


def test_settings_survive_saving(tmp_path):
    options = {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    processor = make_processor(do_pad=False, chat_template="{{ messages }}", **options)
    processor.max_image_pixels = options["max_image_pixels"] = 100
    processor.tokenizer.padding_side = "right"
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.tokenizer.padding_side == "right"
    assert loaded.chat_template == "{{ messages }}"
    assert loaded.image_processor.do_pad is False
    assert isinstance(loaded.image_processor, LlavaImageProcessorPil)
    assert {name: getattr(loaded, name) for name in options} == options
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True, max_image_pixels=99)
    assert loaded.max_image_pixels == 99


def test_llava_hf_folder_loads_with_square_padding_left_padding_and_its_own_template(tmp_path):
    processor = DPVRProcessor.from_pretrained(save_llava_hf(tmp_path))
    assert processor.chat_template == LLAVA_HF_TEMPLATE
    assert_same_pixels(processor, IMAGE_1, SIZE)
    inputs = processor(images=[IMAGE_1], text=["<image>", "a"], padding=True, return_tensors="pt")
    assert inputs.attention_mask.tolist() == [[1] * 5, [0, 0, 0, 1, 1]]


def test_llava_hf_folder_that_states_its_sides_keeps_them(tmp_path):
    cropping = LlavaImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_pad=False
    )
    folder = save_llava_hf(tmp_path, cropping, padding_side="right")
    processor = DPVRProcessor.from_pretrained(folder)
    assert processor.tokenizer.padding_side == "right"
    assert processor.image_processor.do_pad is False


# ------------------------------------------------------------------------------------------------- with the rest


@pytest.fixture(scope="module")
def answer():
    model = make_dpvr(
        text=text_config(vocab_size=len(PROCESSOR.tokenizer), pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS),
        image_token_id=IMAGE,
    )
    return pipeline("image-text-to-text", model=model, processor=PROCESSOR)


def test_pipeline_answers_messages_with_images_in_them(answer):
    content = [{"type": "image", "image": IMAGE_1}, {"type": "text", "text": "Hi"}]
    messages = [{"role": "user", "content": content}]
    by_messages = answer(text=messages, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    prompt = original_prompt(("<image>\nHi", None))
    by_prompt = answer(images=IMAGE_1, text=prompt, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    inputs = PROCESSOR(images=IMAGE_1, text=prompt, return_tensors="pt")
    tokens = answer.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    generated = PROCESSOR.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert by_messages == by_prompt == generated != ""


def test_pipeline_takes_a_batch_of_prompts_of_different_lengths(answer):
    text = ["<image> a longer prompt", "<image>"]
    records = answer(images=[IMAGE_1, IMAGE_2], text=text, max_new_tokens=3)
    assert len(records) == 2
