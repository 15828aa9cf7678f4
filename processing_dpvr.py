# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Processor of DPVR-LF: prompts and pixels as the original LLaVA-1.5 has them, and token types to route by."""

from transformers import LlavaImageProcessorPil, LlavaProcessor
from transformers.image_utils import is_pil_image, is_valid_image, load_image, make_flat_list_of_images

# The conversation that LLaVA-1.5 was trained on ("vicuna_v1" in github.com/haotian-liu/LLaVA, llava/conversation.py)
CHAT_TEMPLATE = r"""
{%- set default_system = "A chat between a curious user and an artificial intelligence assistant. "
    ~ "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{%- for message in messages -%}
    {%- set turn = namespace(images="", text="") -%}
    {%- if message.content is string -%}
        {%- set turn.text = message.content -%}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == "text" -%}
                {%- set turn.text = turn.text ~ (" " if turn.text else "") ~ part.text -%}
            {%- elif part.type in ("image", "image_url") and message.role == "user" -%}
                {%- set turn.images = turn.images ~ "<image>\n" -%}
            {%- else -%}
                {{- raise_exception("A message of role " ~ message.role ~ " cannot hold " ~ part.type ~ ".") -}}
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


def _flatten(images) -> list:
    """The single images in an image, an array of images (4 dimensions), or a list of these; none in None."""
    if _is_none(images):
        return []
    items = images if isinstance(images, (list, tuple)) else [images]
    return [image for item in items for image in (item if getattr(item, "ndim", 3) == 4 else [item])]


def _read_image(image, name: str):
    """Loads an image and makes it RGB as LLaVA does, by dropping alpha; arrays and tensors keep their values."""
    try:
        if isinstance(image, str):
            image = load_image(image)
        if is_pil_image(image):
            image = image.convert("RGB")  # decodes the file: the first moment at which a broken one shows
            image.info.pop("transparency", None)  # a colour that would be made white
    except Exception as error:  # codecs and networks fail in ways that have no common class
        raise ValueError(f"{name} cannot be read: {error}") from error
    if not is_valid_image(image):
        raise ValueError(
            f"{name} is a {type(image).__name__}; give a PIL image, an array or tensor of shape (H, W), (H, W, C) or "
            "(C, H, W), or a path, URL or base64 string."
        )
    if 0 in (image.size if is_pil_image(image) else image.shape):
        raise ValueError(f"{name} has no pixels.")
    return image if is_pil_image(image) or image.ndim != 2 else image[None]


def _read_images(images) -> list:
    """A flat list of images, or one list per prompt if `images` is given like that."""
    if not _is_nested(images):
        return [_read_image(image, f"Image {index}") for index, image in enumerate(_flatten(images))]
    return [
        [_read_image(image, f"Image {index} of prompt {row}") for index, image in enumerate(_flatten(images_of_row))]
        for row, images_of_row in enumerate(images)
    ]


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

    Raises:
        ValueError: if the tokenizer has no such `image_token`, or the strategy is neither of the two.

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
    ):
        if vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(f"Strategy {vision_feature_select_strategy!r} is unknown; use 'default' or 'full'.")
        # Without this entry the padding side would not be saved
        tokenizer.padding_side = tokenizer.init_kwargs.setdefault("padding_side", "left")
        super().__init__(
            _with_square_padding(image_processor),
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template or CHAT_TEMPLATE,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )
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
    ) -> "DPVRProcessor":
        """Builds the processor of a converted LLaVA, ready to be saved.

        Args:
            tokenizer, image_processor: as in the class, changed in place. Without the latter, CLIP's at `image_size`.
            patch_size, vision_feature_select_strategy, num_additional_image_tokens: as in the class.
            do_pad: pads images to a square (LLaVA's `image_aspect_ratio="pad"`), whatever `image_processor` does.
            model_max_length: longest prompt in tokens, saved with the tokenizer.
            chat_template: instead of LLaVA-1.5's, for a backbone that was tuned on other conversations.

        Raises:
            ValueError: if the tokenizer has no pad token, or for the reasons that the class gives.
        """
        if tokenizer.pad_token is None:
            raise ValueError("The tokenizer has no pad token. Set `tokenizer.pad_token`, then build the processor.")
        if image_processor is None:
            crop_size = {"height": image_size, "width": image_size}
            image_processor = LlavaImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop_size)
        processor = cls(image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template)
        processor.num_additional_image_tokens = num_additional_image_tokens
        processor.image_processor.do_pad = do_pad
        tokenizer.chat_template = processor.chat_template
        if model_max_length is not None:
            tokenizer.model_max_length = model_max_length
        return processor

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        r"""
        Prepares B prompts, of T tokens or fewer, and their N images.

        Args:
            images: An image, a list of images, or a list with one list (or None) per prompt. A flat list is dealt to
                the prompts in order; None and lists with nothing in them mean no image. An image is a PIL image, an
                array or tensor of shape (H, W), (H, W, C) or (C, H, W), or a path, URL or base64 string. As in LLaVA,
                a PIL image loses its alpha channel and is not rotated by EXIF; what is loaded here is turned upright.
            text (`str` or `list[str]`): Prompts, with one `<image>` per image. The processor repeats it; a prompt that
                has it repeated already is refused.
            videos, audio: None or empty.
            kwargs: Those of the tokenizer and the image processor: `return_tensors`, `padding`, `truncation`,
                `max_length`, `do_pad`, ...

        Returns:
            [`~transformers.BatchFeature`]: with `return_tensors="pt"`

            - **input_ids**, **attention_mask**, **mm_token_type_ids** (int64, (B, T)); the latter is 1 at image tokens
              and 0 elsewhere.
            - **pixel_values** (float32, (N, 3, H, W)), if there are images; H x W is the size the vision tower takes.

        Raises:
            ValueError: if a prompt and its images differ in number, an image cannot be read, truncation cuts into an
                image, or there are videos or audio.
        """
        for name, value in (("videos", videos), ("audio", audio), ("audios", kwargs.pop("audios", None))):
            if not _is_none(value):
                raise ValueError(f"`{name}` is not empty; {type(self).__name__} takes images and text only.")
        return super().__call__(images=None if _is_none(images) else images, text=text, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        images = None if images is None else _read_images(images)
        _, text, videos, audio = super().prepare_inputs_layout(text=text, **kwargs)
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, **kwargs):
        if text and all(isinstance(prompt, str) for prompt in text):
            self._check_counts(images or [], text)
        super().validate_inputs(images=images, text=text, **kwargs)

    def _check_counts(self, images: list, text: list[str]) -> None:
        wanted = [prompt.count(self.image_token) for prompt in text]
        if _is_nested(images):
            if len(images) != len(text):
                raise ValueError(f"`images` has {len(images)} lists for {len(text)} prompts; give one per prompt.")
            given = [len(row) for row in images]
        else:
            given = [max(0, min(n, len(images) - sum(wanted[:row]))) for row, n in enumerate(wanted)]
            given[-1] += len(images) - sum(given)  # nobody's images count as the last prompt's
        for row, (n_wanted, n_given) in enumerate(zip(wanted, given, strict=True)):
            if n_wanted != n_given:
                raise ValueError(
                    f"Prompt {row} has {n_wanted} {self.image_token} and {n_given} images. Write {self.image_token} "
                    "once per image; the processor repeats it. A flat list of images is dealt to the prompts in order."
                )

    def _process_images(self, images, **kwargs):
        if kwargs.get("do_pad", self.image_processor.do_pad):
            for index, image in enumerate(make_flat_list_of_images(images)):
                if "float" in str(getattr(image, "dtype", "")):
                    raise ValueError(f"Image {index} is of {image.dtype}; padding takes uint8. Or set `do_pad=False`.")
        return super()._process_images(images, **kwargs)

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

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]


DPVRProcessor.register_for_auto_class("AutoProcessor")
