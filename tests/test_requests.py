"""Bad, odd and many requests: each is answered rightly or refused with a sentence, and the next is as ever."""

import base64
import gc
import io
import json
import os
import re
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from conftest import is_sweep
from PIL import Image, ImageFile
from tiny import make_batch, make_dpvr, text_config
from tiny_processor import BOS, EOS, IMAGE, PAD, SIZE, make_processor, make_tokenizer, noise, original_pixels
from transformers import LlavaImageProcessorPil, pipeline
from transformers.utils import logging

from benchmarks import fuzz, soak

CONTEXT = 300  # tokens
NUM_FUZZED = int(os.environ.get("DPVR_EXAMPLES", "150"))
PROCESSOR = make_processor(model_max_length=CONTEXT)
GOOD = noise(9, 4, seed=1)


@pytest.fixture(scope="module")
def model():
    """A random DPVR of the small processor's vocabulary that never stops by itself."""
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    model = make_dpvr(text=text_config(vocab_size=len(PROCESSOR.tokenizer), **ids), image_token_id=IMAGE)
    model.generation_config.eos_token_id = None
    return model


def answer(model, images=None, text=("a", "<image>b", "<image><image>c")):
    """Three greedy tokens for each prompt, by default for good ones."""
    images = images or [None, [GOOD], [GOOD, noise(5, 6)]]
    inputs = PROCESSOR(images=images, text=list(text), padding=True, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def usual(model):
    return answer(model)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is that large and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------- bad images

BROKEN_FILES = {
    "an empty file": b"",
    "half a PNG": encoded(noise(64, 64))[:4000],
    "half a JPEG": encoded(noise(64, 64), "JPEG")[:900],
    "a PNG with a broken middle": encoded(noise(64, 64))[:2000] + b"\0" * 500 + encoded(noise(64, 64))[2500:],
    "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='4' height='4'><script>alert(1)</script></svg>",
    "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "random bytes": np.random.default_rng(0).bytes(500),
    "a bomb": png_header(60_000, 60_000),
}


@pytest.mark.parametrize("form", ["path", "base64", "data URL"])
@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_refused_with_its_prompt_and_the_next_request_is_answered(name, form, tmp_path, model, usual):
    data = BROKEN_FILES[name]
    source = base64.b64encode(data).decode()
    if form == "path":
        (tmp_path / "image.png").write_bytes(data)
        source = str(tmp_path / "image.png")
    elif form == "data URL":
        source = f"data:image/png;base64,{source}"
    for images in ([None, [GOOD, source]], [GOOD, source]):  # by prompt, and dealt in order
        with pytest.raises(ValueError, match="Image 1 of prompt 1 cannot be read") as error:
            answer(model, images, ["a", "<image><image>"])
        assert len(str(error.value)) < 400
    assert torch.equal(answer(model), usual)


BAD_IMAGES = {
    "20,000 x 1": (Image.new("RGB", (20_000, 1)), "20000 x 1 pixels; padded to a square it would have 400,000,000"),
    "1 x 20,000": (Image.new("1", (1, 20_000)), "1 x 20000 pixels; padded"),
    "32 bits": (Image.new("I", (4, 4)), "is of mode I, whose range is not known"),
    "floats": (Image.new("F", (4, 4)), "is of mode F, whose range is not known"),
    "an array of NaN": (np.full((4, 4, 3), np.nan), "NaN or infinite"),
    "a tensor with one infinite value": (torch.tensor([[[0.0, float("inf")]]]), "NaN or infinite"),
    "a tensor with one infinite value below": (torch.tensor([[[0.0, -float("inf")]]]), "NaN or infinite"),
    "floats that are padded": (np.zeros((4, 4, 3)), r"is of float64; padding takes uint8. Or set `do_pad=False`"),
    "booleans": (np.zeros((4, 4, 3), bool), "is of bool; give uint8"),
    "complex numbers": (np.zeros((4, 4, 3), complex), "is of complex128"),
    "strings": (np.zeros((4, 4, 3), "U1"), "is of <U1"),
    "two channels": (np.zeros((6, 5, 2), np.uint8), r"is of shape \(6, 5, 2\)"),
    "five channels": (torch.zeros(5, 7, 6, dtype=torch.uint8), r"is of shape \(5, 7, 6\)"),
    "one dimension": (np.zeros(3, np.uint8), r"is of shape \(3,\)"),
    "five dimensions": (np.zeros((1, 4, 4, 3, 1), np.uint8), r"is of shape \(1, 4, 4, 3, 1\)"),
    "values of 16 bits": (np.full((4, 4, 3), 256, np.uint16), "values from 256 to 256; give whole numbers from 0 to"),
    "negative values": (np.full((4, 4, 3), -1), "values from -1 to -1"),
    "no pixels": (np.zeros((4, 0, 3), np.uint8), "has no pixels"),
    "a picture without pixels": (Image.new("RGB", (0, 4)), "has no pixels"),
    "a tensor without storage": (torch.zeros(3, 4, 4, device="meta"), "a tensor without plain values"),
    "a number": (3, "is a int; give a PIL image"),
    "bytes": (b"\x89PNG", "is a bytes; give a PIL image"),
    "a list in a list": ([GOOD], "is a list; give a PIL image"),
    "a file that is not there": ("missing.png", "cannot be read"),
    "a closed file": ("closed", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_what_is_no_image_is_refused_with_its_prompt_and_the_next_request_is_answered(name, model, usual, tmp_path):
    image, message = BAD_IMAGES[name]
    if name == "a closed file":
        noise(4, 4).save(tmp_path / "image.png")
        image = Image.open(tmp_path / "image.png")
        image.close()
    with pytest.raises(ValueError, match=f"^Image 0 of prompt 1 .*{message}"):
        answer(model, [None, [image]], ["a", "<image>"])
    assert torch.equal(answer(model), usual)


def test_a_bomb_is_refused_before_it_is_decoded_or_padded(monkeypatch, tmp_path):
    def fail(*_):
        raise AssertionError("decoded")

    compressed = encoded(Image.new("1", (9500, 9500)))
    assert len(compressed) < 20_000
    bomb = Image.open(io.BytesIO(compressed))
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match="Image 0 of prompt 0 is 9500 x 9500 pixels, more than 89,478,485"):
        PROCESSOR(images=bomb, text="<image>")
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    with pytest.raises(ValueError, match="cannot be read: DecompressionBombError: .*3600000000 pixels"):
        PROCESSOR(images=str(tmp_path / "bomb.png"), text="<image>")
    monkeypatch.undo()
    monkeypatch.setattr(LlavaImageProcessorPil, "pad_to_square", fail)
    monkeypatch.setattr(LlavaImageProcessorPil, "resize", fail)
    with pytest.raises(ValueError, match="padded to a square it would have 400,000,000"):
        PROCESSOR(images=Image.new("L", (20_000, 1)), text="<image>")
    with pytest.raises(ValueError, match="resized it would have 102,400,000"):
        PROCESSOR(images=Image.new("L", (400_000, 1)), text="<image>", do_pad=False)


TOO_LARGE = {
    "a square": ({"size": {"shortest_edge": 10_000}}, "resized it would have 100,000,000.* smaller `size`"),
    "a long side": (
        {"size": {"shortest_edge": 100_000}, "do_pad": False, "do_center_crop": False},
        "resized it would have 20,000,000,000, .* 89,478,485",
    ),
    "both sides": ({"size": {"height": 60_000, "width": 50_000}}, "resized it would have 3,000,000,000"),
    "the longest side": (
        {"size": {"shortest_edge": 10**5, "longest_edge": 15_000}, "do_pad": False},
        "resized it would have 112,500,000",
    ),
    "a box": ({"size": {"max_height": 20_000, "max_width": 15_000}}, "resized it would have 225,000,000"),
    "a side of no float": ({"size": {"shortest_edge": 10**400}}, "resized it would have 100(,000)+"),
    "a crop": ({"crop_size": {"height": 10_000, "width": 9_000}}, "cropped it would have 90,000,000"),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_size_that_no_memory_holds_is_refused_before_anything_is_resized(name, monkeypatch, model, usual):
    options, message = TOO_LARGE[name]
    with monkeypatch.context() as patch:
        patch.setattr(LlavaImageProcessorPil, "resize", lambda *_, **__: pytest.fail("resized"))
        with pytest.raises(ValueError, match=f"^Image 0 of prompt 1 is 8 x 4 pixels; {message}"):
            PROCESSOR(images=[None, [noise(8, 4)]], text=["a", "<image>"], **options)
    assert torch.equal(answer(model), usual)


def test_sizes_are_foreseen_as_they_come():
    """The limit is set to what the image processor makes, and to one pixel less."""
    box = {"max_height": 40, "max_width": 50}
    for size in ({"shortest_edge": 9}, {"shortest_edge": 90, "longest_edge": 50}, {"height": 20, "width": 30}, box):
        options = {"size": size, "do_pad": False, "do_center_crop": False, "return_tensors": "pt"}
        processor = make_processor()
        pixels = processor(images=noise(8, 4), text="<image>", **options)["pixel_values"].shape[-2:].numel()
        processor.max_image_pixels = pixels
        processor(images=noise(8, 4), text="<image>", **options)
        processor.max_image_pixels = pixels - 1
        with pytest.raises(ValueError, match=f"resized it would have {pixels:,}, more than"):
            processor(images=noise(8, 4), text="<image>", **options)


def test_an_image_processor_that_crops_nothing_needs_no_size_of_a_crop():
    processor = make_processor()
    processor.image_processor.do_center_crop, processor.image_processor.crop_size = False, None
    assert processor(images=GOOD, text="<image>", return_tensors="pt").pixel_values.shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize("options", [{"return_tensors": "zz"}, {"size": {"shortest_edge": 0}}])
def test_options_that_no_image_can_be_processed_with_are_named(options):
    (name, value), *_ = options.items()
    message = f"Image 0 of prompt 0 cannot be processed with the options .*{name}={value!r}"
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        PROCESSOR(images=[GOOD], text="<image>", **options)


@pytest.mark.parametrize("source", ["\ud800", "a\udc00.png", "http://\ud800/x.png"])
def test_a_source_with_half_of_a_surrogate_pair_is_refused_with_words_that_can_be_sent(source):
    with pytest.raises(ValueError, match="Image 0 of prompt 0 cannot be read") as error:
        PROCESSOR(images=source, text="<image>")
    assert r"\ud" in str(error.value).encode().decode()


def test_the_limit_of_pixels_can_be_raised():
    processor = make_processor()
    processor.max_image_pixels = 50
    with pytest.raises(ValueError, match="8 x 4 pixels; padded to a square it would have 64, more than .* 50"):
        processor(images=noise(8, 4), text="<image>")
    processor.max_image_pixels = 64
    for size in ((8, 4), (8, 8)):
        inputs = processor(images=noise(*size), text="<image>", return_tensors="pt")
        assert inputs.pixel_values.shape == (1, 3, SIZE, SIZE)


def test_a_size_that_is_not_used_costs_nothing():
    expected = PROCESSOR(images=GOOD, text="<image>", return_tensors="pt").pixel_values
    options = {"do_center_crop": False, "crop_size": {"height": 10_000, "width": 10_000}}
    pixels = PROCESSOR(images=GOOD, text="<image>", return_tensors="pt", **options).pixel_values
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0)
    options = {"do_resize": False, "size": {"shortest_edge": 10_000}}
    pixels = PROCESSOR(images=GOOD, text="<image>", return_tensors="pt", **options).pixel_values
    assert pixels.shape == expected.shape


def test_a_download_that_gives_no_byte_is_given_up(monkeypatch):
    def load_image(source, timeout=None):
        assert (source, timeout) == ("https://example.org/a.png", 60)
        raise TimeoutError("timed out")

    monkeypatch.setattr("processing_dpvr.load_image", load_image)
    with pytest.raises(ValueError, match="Image 0 of prompt 0 cannot be read: TimeoutError: timed out"):
        PROCESSOR(images="https://example.org/a.png", text="<image>")


def test_pixels_that_the_vision_tower_cannot_take_are_refused_by_the_model_itself(model, usual):
    inputs = PROCESSOR(images=[GOOD], text="<image>", return_tensors="pt")
    for shape in ((1, 1, SIZE, SIZE), (1, 4, SIZE, SIZE), (3, SIZE, SIZE), (0, 3, SIZE, SIZE)):
        with pytest.raises(ValueError, match=re.escape(f"pixel_values has shape {shape}; the vision tower takes")):
            model(**{**inputs, "pixel_values": torch.zeros(shape)})
    with pytest.raises(ValueError, match="Input image size"):
        model(**{**inputs, "pixel_values": torch.zeros(1, 3, 9, 9)})
    assert torch.equal(answer(model), usual)


def test_images_without_their_tokens_are_refused_also_by_beams_and_samples(model, usual):
    one = PROCESSOR(images=[[GOOD], None], text=["<image>", "a"], padding=True, return_tensors="pt")
    none = PROCESSOR(text=["a", "b"], return_tensors="pt")
    pixels = torch.zeros(2, 3, SIZE, SIZE)  # one more than the prompts want, or two
    for inputs in (one, none):
        for options in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            with pytest.raises(ValueError, match="Image features and image tokens do not match"):
                model.generate(**{**inputs, "pixel_values": pixels}, max_new_tokens=1, **options)
    assert torch.equal(answer(model), usual)


def test_image_tokens_without_images_are_warned_of_once_whatever_their_number(model):
    before = logging.warning_once.cache_info()
    for num_tokens in (1, 2, 3):
        model(torch.full((1, num_tokens), IMAGE))
    after = logging.warning_once.cache_info()
    assert after.hits + after.misses == before.hits + before.misses + 3
    assert after.currsize <= before.currsize + 1  # all that it was ever called with stays in memory


# ------------------------------------------------------------------------------------------- odd images that are right


def with_transparent_colour(mode: str) -> Image.Image:
    image = noise(7, 4).convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = 0
    return image if mode == "P" else image.convert(mode)


def animation(format: str) -> bytes:
    return encoded(
        noise(7, 4, seed=1), format, save_all=True, append_images=[noise(7, 4, seed=2)], **({"lossless": True})
    )


ODD_FILES = {
    "one pixel": encoded(noise(1, 1)),
    "CMYK": encoded(noise(7, 4, "CMYK"), "JPEG"),
    "grey with alpha": encoded(noise(7, 4, "LA")),
    "alpha": encoded(noise(7, 4, "RGBA")),
    "a palette with a transparent colour": encoded(with_transparent_colour("P")),
    "a palette with alpha": encoded(with_transparent_colour("P"), transparency=bytes(range(0, 256))),
    "one bit": encoded(noise(7, 4, "1")),
    "an animated GIF": animation("GIF"),
    "an animated WebP": animation("WEBP"),
    "an animated PNG": animation("PNG"),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_an_odd_picture_has_the_pixels_that_llava_gives_it_however_it_comes(name, tmp_path, model):
    data = ODD_FILES[name]
    path = tmp_path / "image"
    path.write_bytes(data)
    with Image.open(io.BytesIO(data)) as opened:
        expected = original_pixels(opened, SIZE)  # the first frame, without alpha
    for image in (str(path), base64.b64encode(data).decode(), Image.open(io.BytesIO(data))):
        pixels = PROCESSOR(images=image, text="<image>", return_tensors="pt").pixel_values
        np.testing.assert_allclose(pixels[0].numpy(), expected, atol=1e-5)
    assert answer(model, [str(path)], ["<image>"]).shape == (1, 3)


def test_an_array_with_alpha_loses_it_as_a_picture_does():
    image = noise(7, 5, "RGBA")
    expected = PROCESSOR(images=image, text="<image>", return_tensors="pt").pixel_values
    array = np.asarray(image)
    for same in (array, array.transpose(2, 0, 1), torch.tensor(array), array.astype(np.int64)):
        pixels = PROCESSOR(images=same, text="<image>", return_tensors="pt").pixel_values
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0)


@pytest.mark.parametrize("height", [1, 4])
def test_a_coloured_array_of_one_or_four_rows_is_not_taken_for_channels(height):
    image = noise(9, height)
    expected = PROCESSOR(images=image, text="<image>", return_tensors="pt").pixel_values
    pixels = PROCESSOR(images=np.asarray(image), text="<image>", return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_a_picture_of_16_bits_is_scaled_and_not_clipped(mode):
    words = np.random.default_rng(0).integers(0, 65536, (5, 7))
    words[0, :3] = 0, 512, 65535
    values, words = words // 257, words.astype("<u2" if mode == "I;16" else ">u2")
    image = Image.frombytes(mode, values.shape[::-1], words.tobytes())
    expected = original_pixels(Image.fromarray(values.astype(np.uint8)), SIZE)
    pixels = PROCESSOR(images=image, text="<image>", return_tensors="pt").pixel_values
    np.testing.assert_allclose(pixels[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_however_it_comes(orientation, tmp_path, model):
    upright = noise(9, 4)
    turns = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # what a camera held that way stores
    stored = upright
    for turn in turns.get(orientation, []):
        stored = stored.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image.png", exif=exif)
    data = (tmp_path / "image.png").read_bytes()
    expected = original_pixels(upright, SIZE)
    sources = [str(tmp_path / "image.png"), base64.b64encode(data).decode(), Image.open(io.BytesIO(data))]
    for image in sources:
        pixels = PROCESSOR(images=image, text="<image>", return_tensors="pt").pixel_values
        np.testing.assert_allclose(pixels[0].numpy(), expected, atol=1e-5)
    if orientation == 6:
        pipe = pipeline("image-text-to-text", model=model, processor=PROCESSOR)
        given = [pipe.preprocess({"images": image, "text": "<image>"})["pixel_values"] for image in sources[::2]]
        np.testing.assert_allclose(torch.cat(given).numpy(), np.stack([expected] * 2), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ prompts

BAD_CALLS = {
    "too few images": ([None, [GOOD]], ["a", "<image><image>"], "Prompt 1 has 2 <image> and 1 images"),
    "too many images": ([None, [GOOD, GOOD]], ["a", "<image>"], "Prompt 1 has 1 <image> and 2 images"),
    "an image that nobody wants": ([GOOD, GOOD], ["<image>", "a"], "Prompt 1 has 0 <image> and 1 images"),
    "a flat list too short": ([GOOD], ["<image>", "<image>"], "Prompt 1 has 1 <image> and 0 images"),
    "no images": (None, ["a", "<image>"], "Prompt 1 has 1 <image> and 0 images"),
    "an image token repeated": ([[GOOD]], ["<image>" * 4], "Prompt 0 has 4 <image> and 1 images"),
    "rows of another batch": ([[GOOD], [GOOD]], ["<image>"], "2 lists for 1 prompts"),
    "no prompt": (None, [], "empty list"),
    "no text": (None, ["a", None], "Prompt 1 is a NoneType"),
    "a number": (None, 3, "`text` is a int"),
    "a dict": (None, {"a": "b"}, "`text` is a dict"),
    "lists": (None, ["a", ["b"]], "Prompt 1 is a list"),
    "a batch of chats": (None, [[{"role": "user"}]], "Prompt 0 is a list, .* `apply_chat_template` makes a prompt"),
    "chat messages": (None, ["a", {"role": "user"}], "Prompt 1 is a dict, .* `apply_chat_template` makes a prompt"),
    "a surrogate": (None, ["a", "b\ud83d"], r"Prompt 1 holds '\\ud83d' at position 1"),
    "too long": (None, ["a", "b" * 300], "Prompt 1 has 301 tokens, more than the 300 of the context"),
    "images too many for the context": ([None, [GOOD] * 75], ["a", "<image>" * 75], "Prompt 1 has 301 tokens"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_prompt_is_refused_with_its_row_and_the_next_request_is_answered(name, model, usual):
    images, text, message = BAD_CALLS[name]
    for padding in (False, True):
        with pytest.raises(ValueError, match=message):
            PROCESSOR(images=images, text=text, padding=padding)
    assert torch.equal(answer(model), usual)


def test_a_prompt_as_long_as_the_context_and_an_empty_one_are_answered(model):
    assert answer(model, [None, None], ["", "b" * (CONTEXT - 1)]).shape == (2, 3)
    inputs = PROCESSOR(text="b" * 999, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, CONTEXT)


def test_an_empty_prompt_without_a_first_token_is_refused():
    for options in ({}, {"padding": True}, {"return_attention_mask": False}):
        with pytest.raises(ValueError, match="Prompt 1 is empty"):
            PROCESSOR(text=["a", ""], add_special_tokens=False, **options)
    assert len(PROCESSOR(text="b" * (CONTEXT - 1), return_attention_mask=False)["input_ids"][0]) == CONTEXT


def chat(*content, **message):
    return [{"role": "user", "content": list(content), **message}]


def test_an_image_token_that_a_user_typed_is_refused_with_message_and_conversation(model, usual):
    typed, image = {"type": "text", "text": "what is <image>?"}, {"type": "image", "image": GOOD}
    good = chat(image, {"type": "text", "text": "what is it?"})
    for content in ([typed], [image, typed], [{"type": "image"}, typed]):
        conversation = [{"role": "user", "content": "Hi"}, {"role": "user", "content": content}]
        for tokenize in (False, True):
            with pytest.raises(ValueError, match=r"Part \d of message 1 of conversation 1 is text that holds <image>"):
                PROCESSOR.apply_chat_template([good, conversation], tokenize=tokenize)
    assert torch.equal(answer(model), usual)


def test_an_image_token_in_a_message_that_is_a_string_is_counted():
    messages = [{"role": "user", "content": "<image>\nWhat is it?"}]
    assert PROCESSOR.apply_chat_template(messages).count("<image>") == 1  # as LLaVA's data write it
    with pytest.raises(ValueError, match="Prompt 0 has 1 <image> and 0 images"):
        PROCESSOR.apply_chat_template(messages, tokenize=True)
    messages += chat({"type": "image", "image": GOOD})  # must not become the first message's
    with pytest.raises(ValueError, match="Prompt 0 has 2 <image> and 1 images"):
        PROCESSOR.apply_chat_template(messages, tokenize=True)


def test_control_tokens_can_be_made_text_where_the_template_writes_the_first_token():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    template = "{{ bos_token }}{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}"
    template += "{% endfor %}"
    processor = type(PROCESSOR).from_llava(tokenizer, image_size=SIZE, patch_size=8, chat_template=template)
    messages = chat({"type": "image", "image": GOOD}, {"type": "text", "text": "what is <image>?"})
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, sanitize_control_tokens=True)
    ids = inputs["input_ids"][0]
    assert ids == [BOS, *[IMAGE] * 4, *tokenizer("what is <image>?", split_special_tokens=True)["input_ids"]]
    assert len(inputs["pixel_values"]) == 1


BAD_CHATS = {
    "nothing": (None, "The conversation is a NoneType"),
    "a string": ("Hi", "The conversation is a str"),
    "no message": ([], "The conversation is empty"),
    "one of two empty": ([chat({"type": "text", "text": "a"}), []], r"Conversation 1 is \[\]"),
    "a message that is a string": (["Hi"], "message 0 of conversation 0 is not a dict"),
    "a message without a role": ([{"content": "Hi"}], "message 0 of conversation 0 is not a dict with a `role`"),
    "a role that is a number": (
        [{"role": 3, "content": "Hi"}],
        "message 0 of conversation 0 is not a dict with a `role`",
    ),
    "content that is a number": ([{"role": "user", "content": 3}], "message 0 of conversation 0 has a int"),
    "a part that is a string": (chat("Hi"), "Part 0 of message 0 of conversation 0 is not a dict with a `type`"),
    "a part without a type": (chat({"text": "Hi"}), "Part 0 of message 0 of conversation 0 is not a dict"),
    "a type that is a number": (
        chat({"type": 3}),
        "Part 0 of message 0 of conversation 0 is not a dict with a `type`",
    ),
    "text that is a number": (chat({"type": "text", "text": 3}), "`text` is no string"),
    "a video": (chat({"type": "video", "video": "a.mp4"}), "is of type video; give text and images only"),
    "audio": (chat({"type": "audio", "audio": "a.wav"}), "is of type audio; give text and images only"),
    "an unknown role": ([{"role": "tool", "content": "Hi"}], "message 0 is of role tool"),
    "an image that is none": (chat({"type": "image", "image": 3}), "^Image 0 of prompt 0 is a int"),
    "an image without a source": (chat({"type": "image"}), "Prompt 0 has 1 <image> and 0 images"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_a_bad_conversation_is_refused_and_the_pipeline_answers_the_next(name, model):
    conversation, message = BAD_CHATS[name]
    with pytest.raises(ValueError, match=message):
        PROCESSOR.apply_chat_template(conversation, tokenize=True)
    pipe = pipeline("image-text-to-text", model=model, processor=PROCESSOR)
    good = chat({"type": "image", "image": GOOD}, {"type": "text", "text": "a"})
    options = {"max_new_tokens": 3, "return_full_text": False, "do_sample": False}
    expected = pipe(text=good, **options)
    is_chat = isinstance(conversation, list) and conversation and isinstance(conversation[0], dict)
    if is_chat and "role" in conversation[0]:  # what the pipeline takes for a chat at all
        with pytest.raises(ValueError, match=message):
            pipe(text=conversation, **options)
    assert pipe(text=good, **options) == expected


@pytest.mark.parametrize("options", [{}, {"tokenize": True}, {"tokenize": True, "sanitize_control_tokens": True}])
def test_of_several_conversations_the_one_that_the_template_does_not_take_is_named(options):
    good = chat({"type": "text", "text": "a"})
    for bad, message in (
        ([*good, {"role": "assistant", "content": [{"type": "image"}]}], "Message 1 is of role assistant and cannot"),
        ([{"role": "\ud800", "content": "a"}], r"message 0 is of role \\ud800"),
    ):
        with pytest.raises(ValueError, match=f"does not take conversation 2: .*{message}") as error:
            PROCESSOR.apply_chat_template([good, good, bad, good], **options)
        assert str(error.value).encode()


# --------------------------------------------------------------------------------------------------------------- fuzz


def test_random_requests_are_answered_rightly_or_refused(tmp_path):
    path = tmp_path / "fuzz.json"
    path.write_text('{"converter": {"inputs": 1}}')
    seed = int.from_bytes(os.urandom(4)) if is_sweep else 0
    assert fuzz.main(["--inputs", str(NUM_FUZZED), "--seed", str(seed), "--output", str(path)]) == 0
    records = json.loads(path.read_text())
    assert records["converter"] == {"inputs": 1}
    assert records["processor"]["inputs"] == sum(records["processor"]["outcomes"].values()) >= NUM_FUZZED
    assert min(records["processor"]["outcomes"].values()) > 0
    assert len(records["processor"]["outcomes"]) == 4


FAULTS = {
    "another error": "neither answered nor refused|refusal is no sentence",
    "a wrong answer": "answered wrongly",
    "a changed processor": "gives another answer after",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fuzzer_finds_a_processor_that_is_wrong(fault, monkeypatch):
    cls = type(PROCESSOR)
    if fault == "another error":
        monkeypatch.setattr("processing_dpvr._check_prompts", lambda text: None)
    elif fault == "a wrong answer":
        monkeypatch.setattr("processing_dpvr._read_image", lambda image, *_: noise(5, 5))
    else:
        check = cls._check_counts

        def check_and_change(self, *args):
            try:
                check(self, *args)
            except ValueError:
                self.image_processor.do_pad = False
                raise

        monkeypatch.setattr(cls, "_check_counts", check_and_change)
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        fuzz.fuzz_processor(300, shrink=False)


# ------------------------------------------------------------------------------------------- long runs, many at a time


def soak_arguments(folder, every: int) -> list[str]:
    """The figure lies beside the output."""
    return [
        *("--calls", str(2 * every), "--every", str(every), "--max-bytes-per-call", "1e9"),
        *("--max-objects-per-call", "1e9", "--output", str(folder / "soak.json")),
    ]


def test_the_soak_writes_what_it_saw(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "make_requests", partial(soak.make_requests, variants=1))
    assert soak.main(soak_arguments(tmp_path, 11)) == 0
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["calls"] == [0, 11, 22]
    assert len(record["rss_bytes"]) == len(record["held_bytes"]) == len(record["objects"]) == 3
    assert len(record["hashes"]) == 11
    assert "Prompt 0 has 2 <image> and 1 images" in record["hashes"]["refused, variant 0"]
    assert record["different"] == record["faults"] == []
    assert Image.open(tmp_path / "soak.png").width > 500


def test_the_soak_fails_where_an_answer_changes(tmp_path, monkeypatch, capsys):
    answers = iter("a" * 40 + "b" + "a" * 99)
    monkeypatch.setattr(soak, "load_embedded", lambda folder: (None, None))
    monkeypatch.setattr(soak, "answer", lambda *_: next(answers))
    assert soak.main(soak_arguments(tmp_path, 33)) == 1
    assert json.loads((tmp_path / "soak.json").read_text())["different"] == [
        {"call": 40, "request": "prefill in chunks, variant 0", "got": "b"}
    ]
    assert "1 answers differ from the first of their request" in capsys.readouterr().err


def test_growth_is_found_and_what_only_the_warm_up_took_is_none():
    calls = list(range(0, 10_001, 100))
    jitter = np.random.default_rng(0).integers(0, 50_000, len(calls))
    flat = [500_000_000 - 30_000_000 * (call < 1500) + int(extra) for call, extra in zip(calls, jitter, strict=True)]
    leak = [value + 500 * call for call, value in zip(calls, flat, strict=True)]
    noisy = [500_000_000 + int(extra) for extra in np.random.default_rng(5).integers(0, 10_000_000, len(calls))]
    same = [1000] * len(calls)

    def faults(memory, objects):
        return soak.judge(soak.Soak(calls=calls, held_bytes=memory, objects=objects), 200, 0.01)[1]

    assert faults(flat, same) == []
    (fault,) = faults(leak, same)
    assert float(re.match("A call adds ([0-9.]+) bytes of memory", fault)[1]) == pytest.approx(500, abs=10)
    (fault,) = faults(noisy, same)  # flat, but none could tell
    assert re.match("A call adds -?[0-9.]+ bytes of memory .95 %: -[0-9.]+ to [0-9.]+.; 200 are allowed", fault)
    (fault,) = faults(flat, calls)
    assert fault.startswith("A call adds 1.000 Python objects")


def test_memory_that_is_held_is_seen_and_memory_that_is_free_is_not():
    soak.resident_bytes_held()
    before = soak.resident_bytes_held()
    held = [b"x" * 100_000 for _ in range(100)]
    assert 9_000_000 < soak.resident_bytes_held() - before < 12_000_000
    del held
    assert abs(soak.resident_bytes_held() - before) < 1_000_000


@pytest.mark.parametrize("num_threads", [2, 4])
def test_threads_that_generate_on_one_model_get_the_answers_of_one_thread(num_threads):
    model = make_dpvr()
    batches = [make_batch(["ttItt", "t"]), make_batch(["I", "tIIt", "tt"], "right", seed=1), make_batch(["ttt"])]
    options = [{}, {"num_beams": 2}, {"prefill_chunk_size": 3}, {"use_cache": False}]
    work = [(batch, option) for batch in batches for option in options]

    def run(item):
        batch, option = item
        given = {name: value for name, value in batch.items() if value is not None}
        return model.generate(**given, max_new_tokens=4, do_sample=False, **option)

    expected = [run(item) for item in work]
    with ThreadPoolExecutor(num_threads) as pool:
        answers = list(pool.map(run, work))
    for given, reference in zip(answers, expected, strict=True):
        assert torch.equal(given, reference)


def test_threads_that_share_a_processor_get_their_own_inputs_also_beside_refusals():
    sizes = [(3 + i % 5, 2 + i % 7) for i in range(40)]

    def run(i):
        if i % 4 == 3:
            with pytest.raises(ValueError, match="Prompt 0 has 2 <image> and 1 images"):
                PROCESSOR(images=[noise(*sizes[i])], text="<image><image>")
            return None
        return PROCESSOR(images=[noise(*sizes[i], seed=i)], text="<image>" + "a" * i, return_tensors="pt")

    expected = [run(i) for i in range(len(sizes))]
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(run, range(len(sizes))))
    for one, other in zip(given, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}, {"prefill_chunk_size": 3}])
def test_a_call_leaves_no_tensor_in_a_reference_cycle(options, model):
    """What only the collector frees stays in memory until it runs: of a 7B model's cache, hundreds of megabytes."""
    inputs = PROCESSOR(images=[[GOOD], None], text=["<image>a", "b"], padding=True, return_tensors="pt")
    call = {"max_new_tokens": 3, "do_sample": False, **options}
    model.generate(**inputs, **call)
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        model.generate(**inputs, **call)
        gc.collect()
        tensors = [tuple(item.shape) for item in gc.garbage if isinstance(item, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert tensors == []


def test_hub_files_hold_no_state_that_requests_fill():
    """Module-level lists, dicts and sets of the three files are the same after requests as before."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[-1] in ("processing_dpvr",)]
    assert modules

    def state():
        return {
            (module.__name__, name): len(value)
            for module in modules
            for name, value in vars(module).items()
            if isinstance(value, (dict, list, set)) and not name.startswith("__")
        }

    before = state()
    for i in range(5):
        PROCESSOR(images=[noise(3, 3 + i)], text=f"<image>{i}")
    assert state() == before
