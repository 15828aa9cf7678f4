"""A small processor whose tokenizer has one token per byte, pictures for it, and what LLaVA-1.5 makes of a picture."""

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from processing_dpvr import DPVRProcessor

SIZE, PATCH = 16, 8
TOKENS = (SIZE // PATCH) ** 2  # of one image
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PAD, BOS, EOS, UNK, IMAGE = range(5)
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


def make_tokenizer(**options) -> PreTrainedTokenizerFast:
    """One token per byte, `<s>` in front, and five special tokens: decoding gives back every prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **options})
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def make_processor(**options) -> DPVRProcessor:
    return DPVRProcessor.from_llava(make_tokenizer(), image_size=SIZE, patch_size=PATCH, **options)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def original_pixels(image: Image.Image, size: int) -> np.ndarray:
    """The original's pipeline, stated again: RGB, mean-coloured square, image in its middle, bicubic, normalised."""
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [122, 116, 104]  # 255 times CLIP's mean, cut to whole numbers
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    resized = np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))
    return ((resized / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)


PROCESSOR = make_processor()
