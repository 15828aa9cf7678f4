# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Processor of DPVR-LF: prompts and pixels as the original LLaVA-1.5 has them, and token types to route by."""

from dataclasses import fields, is_dataclass

import torch
from transformers import LlavaImageProcessorPil, LlavaProcessor
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import get_image_size, is_pil_image, is_valid_image, load_image

MAX_IMAGE_PIXELS = 89_478_485  # as many as Pillow opens without a warning (it opens none of more than twice as many)
DOWNLOAD_SECONDS = 60  # without a byte, after which an image's URL is given up

# The conversation that LLaVA-1.5 was trained on ("vicuna_v1" in github.com/haotian-liu/LLaVA, llava/conversation.py)
CHAT_TEMPLATE = r"""
{%- set default_system = "A chat between a curious user and an artificial intelligence assistant. "
    ~ "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- for message in messages -%}
    {%- set turn = namespace(images="", text="", index=loop.index0) -%}
    {%- if message.content is string -%}
        {%- set turn.text = message.content -%}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == "text" -%}
                {%- set turn.text = turn.text ~ (" " if turn.text else "") ~ part.text -%}
            {%- elif part.type in ("image", "image_url") and message.role == "user" -%}
                {%- set turn.images = turn.images ~ "<image>\n" -%}
            {%- else -%}
                {{- raise_exception("Message " ~ turn.index ~ " is of role " ~ message.role ~ " and cannot hold "
                    ~ part.type ~ ".") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if loop.first and message.role != "system" -%}
        {{- default_system ~ " " -}}
    {%- endif -%}
    {%- if message.role == "system" and loop.first -%}
        {{- turn.text ~ " " if turn.text else "" -}}
    {%- elif message.role == "user" -%}
        {{- "USER: " ~ turn.images ~ turn.text ~ " " -}}
    {%- elif message.role == "assistant" -%}
        {{- "ASSISTANT: " -}}
        {%- generation -%}{{- turn.text ~ (eos_token or "</s>") -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception("Roles are user, assistant, and system for the first message only; message "
            ~ loop.index0 ~ " is of role " ~ message.role ~ ".") -}}
    {%- endif -%}
{%- endfor -%}
{{- "ASSISTANT:" if add_generation_prompt else "" -}}
"""


def _is_none(value) -> bool:
    """Whether `value` holds nothing at all: None, or a list that is empty at every level."""
    return value is None or (isinstance(value, (list, tuple)) and all(_is_none(item) for item in value))


def _is_nested(images) -> bool:
    """Whether `images` has one entry per prompt."""
    return isinstance(images, (list, tuple)) and any(
        item is None or isinstance(item, (list, tuple)) for item in images
    )


def _as_list(images, depth: int = 2):
    """`images`, where something else than a list lists them, such as a column of `datasets` or pandas, as a list; and
    so its rows."""
    is_column = hasattr(images, "to_list") or (str(getattr(images, "dtype", "")) == "object" and images.ndim > 0)
    is_one = isinstance(images, (str, bytes, dict)) or hasattr(images, "read")
    if not depth or is_one or (hasattr(images, "ndim") and not is_column) or not hasattr(images, "__iter__"):
        return images
    return [_as_list(item, depth - 1) for item in images]


def _flatten(images) -> list:
    """The single images in an image, an array of images (4 dimensions), or a list of these; none in None."""
    if _is_none(images):
        return []
    items = images if isinstance(images, (list, tuple)) else [images]
    return [image for item in items for image in (item if getattr(item, "ndim", 3) == 4 else [item])]


def _deal(images: list, counts: list[int]) -> list[list]:
    """Deals a flat list of images to prompts that want `counts` of them; the last takes what nobody wants."""
    starts = [sum(counts[:row]) for row in range(len(counts))]
    return [images[start:end] for start, end in zip(starts, [*starts[1:], len(images)], strict=True)]


def _shorten(text: str, length: int = 300) -> str:
    """`text` without its middle if it is longer, as a message is that quotes an image in base64, and with half a
    surrogate pair written out, so that the message can be encoded."""
    text = text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"
    return text.encode("utf-8", "backslashreplace").decode()


def decode_picture(image, name: str, max_pixels: int = MAX_IMAGE_PIXELS):
    """A picture or its source as an upright RGB picture of 8 bits a channel, made so as the original LLaVA does, by
    dropping alpha. Raises a ValueError that begins with `name` where it cannot be."""
    if is_pil_image(image):
        if image.mode[0] in "IF" and not image.mode.startswith("I;16"):
            raise ValueError(f"{name} is of mode {image.mode}, whose range is not known here. Convert it to RGB.")
        if image.width * image.height > max_pixels:
            raise ValueError(f"{name} is {image.width} x {image.height} pixels, more than {max_pixels:,}.")
    try:
        if is_pil_image(image) and image.mode.startswith("I;16"):
            image = image if image.mode == "I;16" else image.convert("I")  # of another order of bytes
            image = image.point(lambda value: value / 257).convert("L")  # Pillow would cut what is above 255
        image = load_image(image, timeout=DOWNLOAD_SECONDS)  # decodes: the first moment at which a broken one shows
    except Exception as error:  # codecs and networks fail in ways that have no common class
        raise ValueError(f"{name} cannot be read: {_shorten(f'{type(error).__name__}: {error}')}") from error
    image.info.pop("transparency", None)  # a colour that would be made white
    return image


def _read_array(image, name: str, input_data_format=None):
    """An array or tensor as an array of shape (1 or 3, H, W), its values unchanged; alpha is dropped. With an
    `input_data_format` the shape is left alone."""
    if isinstance(image, torch.Tensor):
        try:
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise ValueError(f"{name} is a tensor without plain values: {_shorten(str(error))}") from error
    if image.dtype.kind not in "uif":
        raise ValueError(f"{name} is of {image.dtype}; give uint8, or floats with `do_pad=False`.")
    if 0 in image.shape:
        raise ValueError(f"{name} has no pixels.")
    low, high = image.min(), image.max()
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError(f"{name} holds values that are NaN or infinite.")
    if image.dtype.kind in "ui" and (low < 0 or high > 255):
        raise ValueError(f"{name} holds values from {low} to {high}; give whole numbers from 0 to 255.")
    if image.ndim == 2:
        return image[..., None] if input_data_format == "channels_last" else image[None]
    if input_data_format is not None:
        return image
    ends = (image.shape[0], image.shape[-1]) if image.ndim == 3 else ()
    if not {1, 3, 4} & set(ends):
        raise ValueError(
            f"{name} is of shape {tuple(image.shape)}; give (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels C."
        )
    # Three channels are likelier than a picture of 1 or 4 pixels; where either end could hold them, the first does
    is_last = (ends[1] == 3 and ends[0] != 3) or not {ends[0]} & {1, 3, 4}
    return (image.transpose(2, 0, 1) if is_last else image)[:3]


def _read_image(image, name: str, max_pixels: int, input_data_format=None):
    """Any image as what LLaVA's image processor takes, with a ValueError that begins with `name` if it is none."""
    if hasattr(image, "__fspath__"):
        image = image.__fspath__()
    if isinstance(image, str) or is_pil_image(image):
        image = decode_picture(image, name, max_pixels)
    elif is_valid_image(image):
        image = _read_array(image, name, input_data_format)
    else:
        raise ValueError(
            f"{name} is a {type(image).__name__}; give a PIL image, an array or tensor of shape (H, W), (H, W, C) or "
            "(C, H, W), or a path, URL or base64 string."
        )
    if is_pil_image(image) and 0 in image.size:
        raise ValueError(f"{name} has no pixels.")
    return image


def _width_and_height(size) -> tuple[int, int]:
    """Of a size as image processors are given it; zeros where it is none, or says neither."""
    size = get_size_dict(size) if size else {}
    return size.get("width", 0), size.get("height", 0)


def _resized(width: int, height: int, size) -> tuple[int, int]:
    """The size that LLaVA's image processor gives an image; none where `size` is none that it knows."""
    size = get_size_dict(size, default_to_square=False)
    if scale := size.get("shortest_edge"):
        unit, longest = min(width, height), size.get("longest_edge")
        if longest and longest * unit < scale * max(width, height):
            scale, unit = longest, max(width, height)
    elif size.get("max_height") and size.get("max_width"):
        scales = (size["max_width"], width), (size["max_height"], height)
        scale, unit = scales[size["max_height"] * width < size["max_width"] * height]
    else:
        return _width_and_height(size)
    return width * scale // unit, height * scale // unit


def _named(images: list) -> list[tuple[str, object]]:
    """Each image with what messages call it."""
    if not _is_nested(images):
        return [(f"Image {index}", image) for index, image in enumerate(images)]
    return [
        (f"Image {index} of prompt {row}", image)
        for row, images_of_row in enumerate(images)
        for index, image in enumerate(images_of_row)
    ]


def _check_prompts(text: list) -> None:
    """Refuses what no tokenizer takes, with the row that holds it."""
    if not text:
        raise ValueError("`text` is an empty list; give at least one prompt.")
    for row, prompt in enumerate(text):
        if not isinstance(prompt, str):
            parts = prompt if isinstance(prompt, list) else [prompt]
            is_chat = any(isinstance(part, dict) for part in parts)
            hint = " `apply_chat_template` makes a prompt of chat messages." if is_chat else ""
            raise ValueError(f"Prompt {row} is a {type(prompt).__name__}, not a string.{hint}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Prompt {row} holds {prompt[error.start]!a} at position {error.start}: half of a surrogate pair, "
                "which is no character."
            ) from error


def _as_dicts(value):
    """Conversations, messages and their parts, where they are dataclasses or models of pydantic, as lists and dicts
    without the fields that are None. Images are left alone."""
    if isinstance(value, (list, tuple)):
        return [_as_dicts(item) for item in value]
    if hasattr(value, "messages"):
        return _as_dicts(value.messages)
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(value, "model_dump"):
        value = value.model_dump()
    if not hasattr(value, "items"):
        return value
    return {key: _as_dicts(item) for key, item in value.items() if item is not None}


def _check_content(message, name: str, typed: str | None) -> None:
    """Refuses a message that is no message, and the string `typed` in a text part. `name` is as in "message 0"."""
    if not hasattr(message, "items") or not isinstance(message.get("role"), str):
        raise ValueError(f"The {name} is not a dict with a `role` and `content`, but {_shorten(repr(message))}.")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"The {name} has a {type(content).__name__} for `content`; give a string or a list of parts.")
    for index, part in enumerate(content):
        if not hasattr(part, "items") or not isinstance(part.get("type"), str):
            raise ValueError(f"Part {index} of {name} is not a dict with a `type`, but {_shorten(repr(part))}.")
        if part["type"] in ("audio", "video"):
            raise ValueError(f"Part {index} of {name} is of type {part['type']}; give text and images only.")
        if part["type"] != "text":
            continue
        if not isinstance(part.get("text"), str):
            raise ValueError(f"Part {index} of {name} is of type text, but its `text` is no string.")
        if typed and typed in part["text"]:
            raise ValueError(
                f"Part {index} of {name} is text that holds {typed}, which would stand for an image. Give images as "
                f'parts ({{"type": "image", "image": ...}}) and take {typed} out of the text.'
            )


def _check_conversations(conversation, typed: str | None) -> None:
    """`_check_content` for each message of one conversation, or of a list of them."""
    if not isinstance(conversation, list):
        raise ValueError(f"The conversation is a {type(conversation).__name__}; give a list of messages.")
    if not conversation:
        raise ValueError("The conversation is empty; give at least one message.")
    for row, messages in enumerate(conversation if isinstance(conversation[0], list) else [conversation]):
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"Conversation {row} is {_shorten(repr(messages))}; give a list of at least one message.")
        for index, message in enumerate(messages):
            _check_content(message, f"message {index} of conversation {row}", typed)


def _is_of_template(error: Exception) -> bool:
    """Whether an error is one of jinja's, which may not be installed."""
    return type(error).__module__ == "jinja2.exceptions"


def _with_square_padding(image_processor) -> LlavaImageProcessorPil:
    """LLaVA's image processor with the settings of any other; pads to a square unless `do_pad` is set to False.

    Always the PIL backend: its pixels are bit-equal to those of the original pipeline. The torchvision backend resizes
    with other rounding, which moves some pixels by one or two of 255 levels.
    """
    if isinstance(image_processor, LlavaImageProcessorPil):
        return image_processor
    known = LlavaImageProcessorPil.valid_kwargs.__annotations__
    fields = {key: value for key, value in image_processor.to_dict().items() if key in known}
    fields.setdefault("crop_size", fields["size"])  # what knows no crop must not get LlavaImageProcessorPil's
    return LlavaImageProcessorPil(**{"do_pad": True, **fields})


class DPVRProcessor(LlavaProcessor):
    r"""
    Turns prompts and images into the inputs of [`DPVRForConditionalGeneration`].

    [`~transformers.LlavaProcessor`] that does what the original LLaVA-1.5 does: pads an image to a square with the
    mean colour before it is resized (`do_pad=False`, in `from_pretrained` or a call, crops instead), and holds the
    conversation it was trained on. Also loads llava-hf's checkpoints; a chat template found there is kept.

    Args:
        image_processor: The vision tower's. Becomes a `LlavaImageProcessorPil` with its settings, and `do_pad=True` if
            it has none.
        tokenizer: Has `image_token` as one token. Pads left unless made or saved with a `padding_side`.
        patch_size: Of the vision tower.
        vision_feature_select_strategy: As in the model's config: `"default"` drops the class token, `"full"` keeps it.
        chat_template: Defaults to `CHAT_TEMPLATE`, which puts the images of a message before its text, each on a line
            of its own, joins text parts by a space, and lets a system message at the start replace LLaVA's. There is
            no `<s>` in it: the tokenizer puts that in front.
        image_token: Stands for one image in a prompt.
        num_additional_image_tokens: Tokens of the vision tower beside the patches; 1 for CLIP's class token.
        max_image_pixels: An image may have no more, nor may it grow to more where it is padded or resized.

    Raises:
        ValueError: if the tokenizer has no such `image_token`, the strategy is neither of the two, or
            `max_image_pixels` is no whole number of at least 1.

    Example:

    ```python
    >>> messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    >>> prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    >>> inputs = processor(images=image, text=prompt, return_tensors="pt")
    ```
    """

    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor,
        tokenizer,
        patch_size: int = 14,
        vision_feature_select_strategy: str = "default",
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 1,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ):
        if vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(f"Strategy {vision_feature_select_strategy!r} is unknown; use 'default' or 'full'.")
        if type(max_image_pixels) is not int or max_image_pixels < 1:
            raise ValueError(f"max_image_pixels is {max_image_pixels!r}; give a whole number of at least 1.")
        # Without this entry the padding side would not be saved
        tokenizer.padding_side = tokenizer.init_kwargs.setdefault("padding_side", "left")
        super().__init__(
            _with_square_padding(image_processor),
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template
            or CHAT_TEMPLATE.replace("<image>", getattr(tokenizer, "image_token", image_token)),
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )
        self.max_image_pixels = max_image_pixels
        ids = tokenizer.encode(self.image_token, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer encodes {self.image_token!r} as {ids}, not as one token of its own. Add it with "
                f"`tokenizer.add_tokens([{self.image_token!r}], special_tokens=True)` and give the model a row for it."
            )

    @classmethod
    def from_llava(
        cls,
        tokenizer,
        image_processor=None,
        *,
        image_size: int = 336,
        patch_size: int = 14,
        vision_feature_select_strategy: str = "default",
        num_additional_image_tokens: int = 1,
        do_pad: bool = True,
        model_max_length: int | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
    ) -> "DPVRProcessor":
        """Builds the processor of a converted LLaVA, ready to be saved.

        Args:
            tokenizer, image_processor: as in the class, changed in place. Without the latter, CLIP's at `image_size`.
            patch_size, vision_feature_select_strategy, num_additional_image_tokens: as in the class.
            do_pad: pads images to a square (LLaVA's `image_aspect_ratio="pad"`), whatever `image_processor` does.
            model_max_length: longest prompt in tokens, saved with the tokenizer.
            chat_template: instead of LLaVA-1.5's, for a backbone that was tuned on other conversations.
            image_token: as in the class.

        Raises:
            ValueError: if the tokenizer has no pad token, or for the reasons that the class gives.
        """
        if tokenizer.pad_token is None:
            raise ValueError("The tokenizer has no pad token. Set `tokenizer.pad_token`, then build the processor.")
        if image_processor is None:
            crop_size = {"height": image_size, "width": image_size}
            image_processor = LlavaImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop_size)
        processor = cls(
            image_processor,
            tokenizer,
            patch_size,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            num_additional_image_tokens,
        )
        processor.image_processor.do_pad = do_pad
        tokenizer.chat_template = processor.chat_template
        if model_max_length is not None:
            tokenizer.model_max_length = model_max_length
        return processor

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        r"""
        Prepares B prompts, of T tokens or fewer, and their N images.

        Args:
            images: An image, a list of images, or a list with one list (or None) per prompt; a column of `datasets` or
                pandas is a list too. A flat list is dealt to the prompts in order; None and lists with nothing in them
                mean no image. An image is a PIL image, an array or tensor of shape (H, W), (H, W, C) or (C, H, W) with
                1, 3 or 4 channels, or a path, URL or base64 string. Alpha is dropped, as in LLaVA; of an animation the
                frame shown is taken, which is the first of a file. Unlike in LLaVA, a picture that EXIF says to turn
                is turned upright, whether it is opened here or not, as transformers' pipelines do. A PIL image of 16
                bits is scaled to 8 (a file that is opened here is clipped to white, by Pillow). Arrays and tensors
                hold whole numbers from 0 to 255, or, with `do_pad=False`, floats.
            text (`str` or `list[str]`): Prompts, with one `<image>` per image. The processor repeats it; a prompt that
                has it repeated already is refused, as is one of more tokens than `tokenizer.model_max_length`.
            videos, audio: None or empty.
            kwargs: Those of the tokenizer and the image processor: `return_tensors`, `padding`, `truncation`,
                `max_length`, `do_pad`, ...

        Returns:
            [`~transformers.BatchFeature`]: with `return_tensors="pt"`

            - **input_ids**, **attention_mask**, **mm_token_type_ids** (int64, (B, T)); the latter is 1 at image tokens
              and 0 elsewhere.
            - **pixel_values** (float32, (N, 3, H, W)), if there are images; H x W is the size the vision tower takes.

        Raises:
            ValueError: names the prompt, counted from 0, and both numbers if it and its images differ in number, if
                truncation cuts into an image, or if it is longer than the context; names the image, and its prompt,
                if it cannot be read or has too many pixels. Also for prompts that hold no text or no characters, and
                for videos and audio.
        """
        for name, value in (("videos", videos), ("audio", audio), ("audios", kwargs.pop("audios", None))):
            if not _is_none(value):
                raise ValueError(f"`{name}` is not empty; {type(self).__name__} takes images and text only.")
        return super().__call__(images=None if _is_none(images) else images, text=text, **kwargs)

    def apply_chat_template(self, conversation, *args, **kwargs):
        r"""
        As in transformers, for one conversation or a list of them.

        A text part must not hold `image_token`: its images are parts too, and one that a user typed would be taken for
        another image, or take its place. A message whose content is one string may write it, as LLaVA's data do; its
        images are then given to the processor. `sanitize_control_tokens=True` makes it plain text instead, with a
        chat template that writes all special tokens.

        Raises:
            ValueError: names the message and the conversation, counted from 0, if there is an image token in a text
                part, or if it is none that the template takes; and as in `__call__`.
        """
        typed = None if kwargs.get("sanitize_control_tokens") else self.image_token
        conversation = _as_dicts(conversation)
        _check_conversations(conversation, typed)
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)
        except Exception as error:
            if not _is_of_template(error):
                raise
            name = self._find_refused(conversation, *args, **kwargs)
            raise ValueError(f"The chat template does not take {name}: {_shorten(str(error))}") from error

    def _find_refused(self, conversation: list, *args, **kwargs) -> str:
        """Which of several conversations the chat template does not take."""
        kwargs |= {"tokenize": False, "return_dict": False, "sanitize_control_tokens": False}
        for row, messages in enumerate(conversation if isinstance(conversation[0], list) else []):
            try:
                super().apply_chat_template(messages, *args, **kwargs)
            except Exception as error:
                if _is_of_template(error):
                    return f"conversation {row}"
        return "the conversation"

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        if text is not None:
            if isinstance(text, dict) or not hasattr(text, "__iter__"):
                raise ValueError(f"`text` is a {type(text).__name__}; give a string or a list of strings.")
            text = [text] if isinstance(text, str) else list(text)
            _check_prompts(text)
        _, text, videos, audio = super().prepare_inputs_layout(text=text, **kwargs)
        images = _as_list(images)
        if images is not None:
            images = [_flatten(row) for row in images] if _is_nested(images) else _flatten(images)
            # Of a chat whose typed tokens are marked, images come by conversation; `validate_inputs` gets it unmarked
            if text is not None and not kwargs.get("sanitize_control_tokens"):
                if not _is_nested(images):
                    images = _deal(images, [prompt.count(self.image_token) for prompt in text])
                self._check_counts(images, text)
            options = {**kwargs, **kwargs.get("images_kwargs", {})}
            read = [
                _read_image(image, name, self.max_image_pixels, options.get("input_data_format"))
                for name, image in _named(images)
            ]
            images = _deal(read, list(map(len, images))) if _is_nested(images) else read
            images = images if read else None  # a list or an array of none
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, **kwargs):
        if text:
            self._check_counts([[] for _ in text] if images is None else images, text)
        super().validate_inputs(images=images, text=text, **kwargs)

    def _check_counts(self, images: list, text: list[str]) -> None:
        if not _is_nested(images):
            return
        if len(images) != len(text):
            raise ValueError(f"`images` has {len(images)} lists for {len(text)} prompts; give one per prompt.")
        for row, (prompt, images_of_row) in enumerate(zip(text, images, strict=True)):
            n_wanted, n_given = prompt.count(self.image_token), len(images_of_row)
            if n_wanted != n_given:
                raise ValueError(
                    f"Prompt {row} has {n_wanted} {self.image_token} and {n_given} images. Write {self.image_token} "
                    "once per image; the processor repeats it. A flat list of images is dealt to the prompts in order."
                )

    def _process_images(self, images, **kwargs):
        do_pad = kwargs.get("do_pad", self.image_processor.do_pad)
        for name, image in _named(images):
            if do_pad and "float" in str(getattr(image, "dtype", "")):
                raise ValueError(f"{name} is of {image.dtype}; padding takes uint8. Or set `do_pad=False`.")
            self._check_pixels(name, image, kwargs)
        try:
            return super()._process_images(images, **kwargs)
        except (TypeError, ValueError) as error:
            for name, image in _named(images):
                try:
                    super()._process_images([image], **kwargs)
                except (TypeError, ValueError) as reason:
                    options = _shorten(", ".join(f"{key}={value!r}" for key, value in kwargs.items()))
                    raise ValueError(
                        f"{name} cannot be processed with the options {options or 'that are saved'}: "
                        f"{_shorten(str(reason))}"
                    ) from error
            raise

    def _check_pixels(self, name: str, image, options: dict) -> None:
        """Refuses an image that would fill the memory as it is, padded to a square, resized or cropped."""
        channels = options.get("input_data_format") or "channels_first"
        given = image.size if is_pil_image(image) else get_image_size(image, channels)[::-1]
        for step, (width, height), remedy in self._steps(given, options):
            if width * height > self.max_image_pixels:
                raise ValueError(
                    f"{name} is {given[0]} x {given[1]} pixels; {step} {width * height:,}, more than "
                    f"`max_image_pixels` of the processor, {self.max_image_pixels:,}. {remedy}"
                )

    def _steps(self, size: tuple[int, int], options: dict):
        """What becomes of an image of a (width, height) in the image processor: step, new size, and what to do about
        one that is too large, which the size that the vision tower takes never is."""
        keys = ("do_pad", "do_resize", "size", "do_center_crop", "crop_size")
        used = {key: getattr(self.image_processor, key) for key in keys}
        tower = _width_and_height(used["crop_size"])
        used |= {key: options[key] for key in keys if options.get(key) is not None}
        yield "that makes", size, "Cut it."
        if used["do_pad"]:
            size = (max(size), max(size))
            yield "padded to a square it would have", size, "Cut it."
        if used["do_resize"] and (size := _resized(*size, used["size"])) != tower:
            yield "resized it would have", size, "Cut it, or give a smaller `size`."
        if used["do_center_crop"] and (size := _width_and_height(used["crop_size"])) != tower:  # pads what is smaller
            yield "cropped it would have", size, "Give a smaller `crop_size`."

    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        try:
            super()._check_special_mm_tokens(text, text_inputs, modalities)
        except ValueError as error:
            for row, (prompt, ids) in enumerate(zip(text, text_inputs["input_ids"], strict=False)):
                wanted, kept = prompt.count(self.image_token), list(ids).count(self.image_token_id)
                if kept != wanted:
                    raise ValueError(
                        f"Prompt {row} has {wanted} image tokens, of which truncation keeps {kept}. Raise "
                        "`max_length` or give fewer images."
                    ) from error
            raise
        self._check_lengths(text_inputs)

    def _check_lengths(self, text_inputs) -> None:
        rows = text_inputs.get("attention_mask", text_inputs["input_ids"])
        for row, values in enumerate(rows.tolist() if hasattr(rows, "tolist") else rows):
            length = sum(values) if "attention_mask" in text_inputs else len(values)
            if length == 0:
                raise ValueError(f"Prompt {row} is empty: it has no token to go on from.")
            if length > self.tokenizer.model_max_length:
                raise ValueError(
                    f"Prompt {row} has {length} tokens, more than the {self.tokenizer.model_max_length} of the "
                    "context (`tokenizer.model_max_length`). Shorten it, give fewer images, or pass `truncation=True` "
                    "with no larger `max_length`."
                )

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]


DPVRProcessor.register_for_auto_class("AutoProcessor")
