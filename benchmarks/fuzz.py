#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Feed the processor with random requests, and the converter with damaged checkpoints.

Each request must be answered rightly or refused with a ValueError. They are calls with prompts and images, and chats.
Images are random bytes, valid PNG, JPEG, GIF, WebP, BMP and TIFF files with bytes changed, cut out or put in, arrays
of random shapes and types, and things that are no image. They come as paths, base64, and pictures that Pillow has
opened but not read, in lists nested at random. Prompts are Unicode with surrogates, special tokens and a random number
of <image>, some longer than the context.

An answer is right if its rows are the tokens of the prompts, with as many image tokens as their images take, and its
pixels are those of the original LLaVA's pipeline. After each refusal a good request must give what it gave before.

Each checkpoint, damaged as `tests/damaged_sources.py` says, must be converted or refused with a sentence; nothing is
left behind, and the source is as it was.
"""

import argparse
import base64
import hashlib
import io
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from damaged_sources import DAMAGES, converted_or_refused, read_source
from llava_checkpoints import make_llava, write_llava_hf, write_original
from tiny_processor import IMAGE, SIZE, TOKENS, make_processor, noise, original_pixels

from benchmarks.command import NOTHING, check_numbers, check_output, read_record, run_command, write_record

CONTEXT = 600  # tokens
MAX_PIXELS = 500_000  # small, so that bombs are cheap to make
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
DTYPES = ("uint8", "uint8", "uint8", "int64", "float32", "bool", "complex64", "object", "uint16")


def valid_files() -> list[bytes]:
    """A small picture in each format, in several modes, turned by EXIF and animated."""
    files = []
    for format in FORMATS:
        for mode in ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK"):
            file = io.BytesIO()
            exif = Image.Exif()
            exif[0x0112] = 6  # turn by 90 degrees
            try:
                noise(9, 5, mode).save(file, format, exif=exif)
            except (OSError, ValueError):
                continue  # the format does not know the mode
            files.append(file.getvalue())
    for format in ("GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        noise(6, 4, seed=1).save(file, format, save_all=True, append_images=[noise(6, 4, seed=2)])
        files.append(file.getvalue())
    file = io.BytesIO()
    Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7) * 1000).save(file, "PNG")
    return [*files, file.getvalue()]


FILES = valid_files()


@st.composite
def file_bytes(draw) -> bytes:
    """Random bytes, or a valid file, changed or not."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(0, 3))):
        # Half of the changes are in the header, where sizes and offsets are
        at = draw(st.integers(0, min(40, len(data)) if draw(st.booleans()) else len(data)))
        length = draw(st.integers(0, 8))
        kind = draw(st.sampled_from(["overwrite", "cut out", "insert", "end"]))
        if kind == "overwrite":
            new = draw(st.binary(min_size=length, max_size=length))
            data[at : at + length] = new
        elif kind == "cut out":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        else:
            del data[at:]
    return bytes(data)


@st.composite
def arrays(draw):
    shape = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 3, 4, 5, 9]), min_size=0, max_size=5))
    shape = draw(st.sampled_from([shape, [7, 5, 3], [3, 7, 5], [7, 5]]))
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(0, draw(st.sampled_from([2, 256, 9999])), shape)
    array = np.asarray(values).astype(draw(st.sampled_from(DTYPES)))
    if array.dtype.kind == "f" and array.size and draw(st.booleans()):
        array.flat[0] = draw(st.sampled_from([np.nan, np.inf, -1.0]))
    is_tensor = array.dtype.kind != "O" and draw(st.booleans())
    return torch.from_numpy(array.copy()) if is_tensor else array


class Source:
    """Bytes of a file, and the form in which they are given."""

    def __init__(self, data: bytes, form: str):
        self.data, self.form, self.path = data, form, None

    def __repr__(self) -> str:
        return f"Source({self.data!r}, {self.form!r})"

    def give(self, folder: Path):
        if self.form in ("base64", "data url"):
            head = "data:image/png;base64," if self.form == "data url" else ""
            return head + base64.b64encode(self.data).decode()
        if self.form == "picture":
            try:
                return Image.open(io.BytesIO(self.data))
            except Exception:  # what a caller would have seen himself
                pass
        self.path = folder / hashlib.sha256(self.data).hexdigest()
        self.path.write_bytes(self.data)
        return str(self.path)


def is_no_address(text: str) -> bool:
    return not text.startswith(("http://", "https://"))


sources = st.builds(Source, file_bytes(), st.sampled_from(["path", "base64", "data url", "picture"]))
junk = st.one_of(
    st.none(),
    st.integers(),
    st.binary(max_size=9),
    st.text(max_size=9).filter(is_no_address),
    st.just({}),
    st.just(()),
)
good = st.builds(lambda seed: noise(5, 3 + seed, seed=seed), st.integers(0, 3))
images = st.one_of(good, good, sources, sources, arrays(), junk)
nested_images = st.recursive(images, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
pieces = st.one_of(
    st.text(st.characters(), max_size=8),  # surrogates too
    st.sampled_from(
        ["<image>", "<image>", "</s>", "<s>", "<pad>", "<unk>", "< image>", "<ima", "ge>", "\0", "\u202e"]
    ),
    *[st.sampled_from(["a ", "b", " <", "image", "é", "\U0001f600"])] * 4,
)
short_prompts = st.lists(pieces, max_size=5).map("".join)
prompts = st.builds(lambda prompt, repeat: prompt * repeat, short_prompts, st.sampled_from([1] * 30 + [200]))
texts = st.one_of(prompts, st.lists(prompts, max_size=3), st.lists(st.one_of(prompts, junk), max_size=3), junk)


@st.composite
def matching_calls(draw) -> tuple:
    """Prompts with as many images as they want, some of which are broken: what gets furthest."""
    rows = draw(st.lists(short_prompts, min_size=1, max_size=3))
    fitting = [[draw(st.one_of(good, sources, arrays())) for _ in range(row.count("<image>"))] for row in rows]
    return (fitting if draw(st.booleans()) else [image for row in fitting for image in row]), rows


parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": prompts}),
    st.fixed_dictionaries({"type": st.just("image"), "image": st.one_of(good, sources)}),
    st.fixed_dictionaries({"type": st.just("image"), "path": sources}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": sources})}),
    st.fixed_dictionaries({"type": st.sampled_from(["image", "image_url", "text", "video", "audio", "", "x"])}),
    st.fixed_dictionaries({"type": st.just("image"), "image": images}),
    junk,
)
messages = st.one_of(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "user", "user", "assistant", "system", "tool", ""]),
            "content": st.one_of(prompts, st.lists(parts, max_size=4), junk),
        }
    ),
    junk,
)
plain = st.text("ab <>", max_size=8)
user_parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": plain}),
    st.fixed_dictionaries({"type": st.just("image"), "image": st.one_of(good, sources)}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": sources})}),
)
fitting_chats = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.just("user"), "content": st.lists(user_parts, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"role": st.just("assistant"), "content": plain}),
    ),
    min_size=1,
    max_size=3,
)
chats = st.one_of(
    fitting_chats,
    st.lists(fitting_chats, min_size=1, max_size=2),
    st.lists(messages, max_size=3),
    st.lists(st.lists(messages, min_size=1, max_size=2), max_size=3),
    junk,
)
requests = st.one_of(
    st.tuples(st.just("call"), st.tuples(nested_images, texts)),
    st.tuples(st.just("call"), matching_calls()),
    st.tuples(st.just("call"), matching_calls()),
    st.tuples(st.just("chat"), chats),
)


def materialize(value, folder: Path):
    """The request with each `Source` as what is given to the processor."""
    if isinstance(value, Source):
        return value.give(folder)
    if isinstance(value, dict):
        return {key: materialize(item, folder) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(materialize(item, folder) for item in value)
    return value


def flat_images(value) -> list:
    if value is None or (type(value) in (list, tuple) and not value):
        return []
    if type(value) in (list, tuple):
        return [image for item in value for image in flat_images(item)]
    return list(value) if getattr(value, "ndim", 3) == 4 else [value]


def expected_pixels(value) -> np.ndarray | None:
    """What the original's pipeline makes of an image, upright; None for arrays and 16-bit pictures."""
    if isinstance(value, Source):
        # As given: Pillow 13.0 turns an uncompressed TIFF read from memory, and not the same file opened by its path
        with Image.open(value.path or io.BytesIO(value.data)) as opened:
            if opened.mode.startswith("I"):
                return None
            return original_pixels(ImageOps.exif_transpose(opened).convert("RGB"), SIZE)
    return original_pixels(value, SIZE) if isinstance(value, Image.Image) else None


def check_answer(processor, inputs, prompts: list[str], images: list, is_chat: bool = False) -> None:
    """Raises AssertionError unless the answer is right."""
    if not prompts:
        assert set(inputs) == {"pixel_values"}
        return
    counts = [prompt.count("<image>") for prompt in prompts]
    # Of chats transformers takes a first prompt that begins with <s> for one whose template has put it there
    has_start = is_chat and prompts[0].startswith(processor.tokenizer.bos_token)
    assert len(inputs["input_ids"]) == len(prompts)
    for prompt, count, ids, mask, types in zip(
        prompts, counts, inputs["input_ids"], inputs["attention_mask"], inputs["mm_token_type_ids"], strict=True
    ):
        assert ids.count(IMAGE) == types.count(1) == TOKENS * count
        assert len(ids) == len(types) == len(mask) <= CONTEXT
        assert sum(mask) >= 1
        prompt = prompt.replace("<image>", "<image>" * TOKENS)
        assert ids == processor.tokenizer(prompt, add_special_tokens=not has_start)["input_ids"]
    assert sum(counts) == len(images)
    assert ("pixel_values" in inputs) == bool(images)
    for image, pixels in zip(images, inputs.get("pixel_values", []), strict=True):
        assert pixels.shape == (3, SIZE, SIZE)
        assert np.isfinite(pixels).all()
        expected = expected_pixels(image)
        if expected is not None:
            np.testing.assert_allclose(pixels, expected, atol=1e-5)


class ProcessorFuzz:
    """One processor that all requests go to; counts how they end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processor = make_processor(model_max_length=CONTEXT)
        self.processor.max_image_pixels = MAX_PIXELS
        self.outcomes = Counter()
        self.reference = self.good_request()

    def good_request(self) -> dict:
        text, pictures = ["a<image>b", "c", "<image><image>"], [noise(5, 3), noise(3, 7, "RGBA"), noise(4, 4, "P")]
        inputs = self.processor(images=pictures, text=text, padding=True, return_tensors="pt")
        return {name: value.numpy().tobytes() for name, value in inputs.items()}

    def answer_call(self, images, text) -> tuple[dict, list[str], list]:
        """The answer, and the prompts and images that it is to answer."""
        inputs = self.processor(images=materialize(images, self.folder), text=materialize(text, self.folder))
        return inputs, [text] if isinstance(text, str) else list(text or []), flat_images(images)

    def answer_chat(self, chat) -> tuple[dict, list[str], list]:
        given = materialize(chat, self.folder)
        inputs = self.processor.apply_chat_template(given, tokenize=True, return_dict=True)
        rendered = self.processor.apply_chat_template(given)
        images = [
            source
            for row in (chat if isinstance(chat[0], list) else [chat])
            for message in row
            for part in (message["content"] if isinstance(message["content"], list) else [])
            for source in (part.get("image"), part.get("path"), (part.get("image_url") or {}).get("url"))
            if source is not None
        ]
        return inputs, [rendered] if isinstance(rendered, str) else rendered, images

    def try_request(self, request: tuple) -> None:
        """Raises AssertionError for what is neither a right answer nor a ValueError, and for a refusal that changed
        the processor."""
        kind, content = request
        try:
            answer = self.answer_call(*content) if kind == "call" else self.answer_chat(content)
        except ValueError as error:
            reason = str(error)
        except Exception as error:
            raise AssertionError(f"The request is neither answered nor refused: {error!r}") from error
        else:
            try:
                check_answer(self.processor, *answer, is_chat=kind == "chat")
            except Exception as error:
                raise AssertionError(f"The request is answered wrongly: {error!r}") from error
            self.outcomes[f"{kind}, answered"] += 1
            return
        is_sentence = reason.endswith((".", "DPVRProcessor")) or "cannot be read" in reason
        assert is_sentence, f"The refusal is no sentence: {reason}"
        self.outcomes[f"{kind}, refused"] += 1
        assert self.good_request() == self.reference, f"A good request gives another answer after: {reason}"


def fuzz_processor(num_inputs: int, seed: int = 0, progress: bool = False, shrink: bool = True) -> dict:
    """Tries `num_inputs` requests and returns how many ended how.

    Raises:
        AssertionError: a request was neither answered rightly nor refused; with `shrink`, hypothesis' smallest.
    """
    transformers.logging.set_verbosity(logging.CRITICAL)
    limit = Image.MAX_IMAGE_PIXELS
    with tempfile.TemporaryDirectory(prefix="dpvr-fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many
        fuzz = ProcessorFuzz(Path(folder))

        def try_request(request: tuple) -> None:
            fuzz.try_request(request)
            for path in Path(folder).iterdir():
                path.unlink()

        try:
            seconds = run(requests, try_request, num_inputs, seed, progress, shrink, "processor")
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    return {"inputs": fuzz.outcomes.total(), "outcomes": dict(sorted(fuzz.outcomes.items())), **seconds}


def fuzz_converter(num_inputs: int, seed: int = 0, progress: bool = False, shrink: bool = True) -> dict:
    """Tries `num_inputs` damaged checkpoints and returns how many ended how.

    Raises:
        AssertionError: one was neither converted nor refused, or something was left behind or changed.
    """
    transformers.logging.set_verbosity(logging.CRITICAL)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="dpvr-fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layouts = [
            write_llava_hf(Path(folder, "llava-hf", "llava"), make_llava(), num_files=2),
            write_original(Path(folder, "original", "llava"), make_llava(), ".safetensors"),
        ]
        sources = [(source, read_source(source)) for source in layouts]

        def try_damage(data) -> None:
            kind = data.draw(st.sampled_from(sorted(DAMAGES)))
            source, originals = data.draw(st.sampled_from(sources))
            outcomes[f"{kind}, {converted_or_refused(source, originals, DAMAGES[kind](data, originals))}"] += 1

        seconds = run(st.data(), try_damage, num_inputs, seed, progress, shrink, "converter")
    return {"inputs": outcomes.total(), "outcomes": dict(sorted(outcomes.items())), **seconds}


def run(inputs, try_input, num_inputs: int, seed: int, progress: bool, shrink: bool, name: str) -> dict:
    """Calls `try_input` with `num_inputs` of a strategy."""
    start = time.perf_counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=num_inputs,
        database=None,
        deadline=None,
        derandomize=False,
        report_multiple_bugs=False,
        phases=[phase for phase in hypothesis.Phase if shrink or phase != hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(inputs)
    def every_input_is_taken_or_refused(each):
        try_input(each)
        bar.update()

    with tqdm(total=num_inputs, desc=name, mininterval=10, disable=not progress) as bar:
        every_input_is_taken_or_refused()
    return {"seed": seed, "seconds": round(time.perf_counter() - start, 1)}


TARGETS = {"processor": fuzz_processor, "converter": fuzz_converter}


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n  python benchmarks/fuzz.py --inputs 20000\n"
        "  python benchmarks/fuzz.py --target converter --inputs 5000\n"
        "  python benchmarks/fuzz.py --inputs 500 --seed 1 --output fuzz.json\n\n"
        "exit codes: 0 every input was answered or refused, 1 one was not (it is shown), 2 wrong arguments,\n"
        "130 interrupted, and nothing is written\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", choices=TARGETS, default="processor", help="default: %(default)s")
    parser.add_argument("--inputs", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    results = ROOT / "benchmarks" / "results"
    parser.add_argument(
        "--output",
        type=Path,
        default=results / "fuzz.json",
        help="the target's entry is replaced in it; default: the committed file",
    )
    args = parser.parse_args(arguments)
    check_numbers(parser, args, 1, "inputs")
    check_output(parser, args.output)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    torch.set_num_threads(1)
    records = read_record(args.output, {}) if args.output.exists() else {}
    record = TARGETS[args.target](args.inputs, args.seed, progress=True)
    record["command"] = f"python benchmarks/fuzz.py --target {args.target} --inputs {args.inputs} --seed {args.seed}"
    record["versions"] = {
        name: module.__version__
        for name, module in {"hypothesis": hypothesis, "pillow": Image, "transformers": transformers}.items()
    }
    write_record(args.output, {**records, args.target: record})
    print(f"{args.target}: {record['inputs']} inputs in {record['seconds']:.0f} s: {record['outcomes']}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, NOTHING))
