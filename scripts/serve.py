#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`transformers serve`, except that what the processor refuses (a broken image, a wrong prompt) and requests that lack
something, or hold a value of a wrong type, are answered with status 400 and the reason, not 500. Roles and parts of
messages that LLaVA's templates do not know get 400 too, where they are taken or left out there without a word.
`stop` works, which gets 500 there with any model that has a processor, and `temperature` and `top_p` sample, which
change nothing there unless the model's generation_config says so.
Refused with 400, too: fields of OpenAI's that are left out there without a word, such as `n` and `response_format`,
another model than the one named here, whose code would run, and images that are no data:image/ URLs, which would be
read from this machine's files or from what it can reach.

Takes the arguments of `transformers serve` (`pip install transformers[serving]`). For example:

    python scripts/serve.py dpvr-7b --trust-remote-code --port 8000

One more option, --allow-image-urls, lets clients have the server open http:// and https:// addresses, of its own
network as well, and wait for them: a slow one holds up all requests. Local files stay refused.
"""

import inspect
import json
import re
import sys
from pathlib import Path

from PIL import UnidentifiedImageError
from transformers.cli import transformers as command_line
from transformers.cli.serving import model_manager, server, utils
from transformers.generation import utils as generation
from transformers.processing_utils import (
    AudioKwargs,
    ImagesKwargs,
    ProcessingKwargs,
    ProcessorMixin,
    TextKwargs,
    VideosKwargs,
)
from transformers.utils.chat_template_utils import render_jinja_template

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from read_llava import check_name

ALLOW_URLS = "--allow-image-urls"
image_sources = ["data:image/"]  # what the address of an image may begin with

NUMBER = (int, float)
NAMES = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    NUMBER: "a number",
    list: "a list",
    dict: "an object",
    (str, list): "a string or a list",
}
FIELDS = {  # of a request, and what they may be
    "model": str,
    "messages": list,
    "input": (str, list),
    "instructions": str,
    "stream": bool,
    "stop": (str, list),
    "seed": int,
    "max_tokens": int,
    "max_completion_tokens": int,
    "max_output_tokens": int,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "frequency_penalty": NUMBER,
    "logit_bias": dict,
    "tools": list,
    "generation_config": str,
    "chat_template_kwargs": dict,
}
UNSUPPORTED = {  # fields that `transformers serve` leaves out, each with the value that asks for nothing
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "top_logprobs": 0,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "text": {"format": {"type": "text"}},
    "previous_response_id": None,
    "background": False,
}
ROLES = ("system", "user", "assistant", "tool")
PARTS = ("text", "input_text", "output_text", "image_url", "input_image")
# What among chat_template_kwargs is no variable of the template: code for the server to run, images that pass their
# check, lengths to pad a prompt to
OPTIONS = {
    "messages",
    *(
        name
        for function in (ProcessorMixin.apply_chat_template, ProcessorMixin.__call__, render_jinja_template)
        for name in inspect.signature(function).parameters
    ),
    *(
        name
        for options in (ProcessingKwargs, TextKwargs, ImagesKwargs, VideosKwargs, AudioKwargs)
        for name in options.__annotations__
    ),
}


class ModelManager(model_manager.ModelManager):
    """Ends the command with the reason, and no traceback, where the model to serve cannot be loaded."""

    def __init__(self, *args, force_model: str | None = None, **kwargs):
        try:
            if force_model is not None and not Path(force_model).exists():
                check_name(re.split("[@:]", force_model)[0])  # a revision, or a file of GGUF, may follow a Hub id
            super().__init__(*args, force_model=force_model, **kwargs)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")


class StopStringCriteria(generation.StopStringCriteria):
    """Takes the processor that the server gives it where a tokenizer is wanted."""

    def __init__(self, tokenizer, stop_strings: str | list[str]):
        super().__init__(getattr(tokenizer, "tokenizer", tokenizer), stop_strings)


def pin_model(model_manager) -> None:
    """Lets no client name another model than the server's: `/load_model` and transcriptions do not compare them."""
    name_of, served = model_manager.process_model_name, model_manager.force_model

    def process_model_name(model: str) -> str:
        if name_of(model) != name_of(served):
            raise ValueError(f"This server has {served!a} only; {model!a} is another model, and is not loaded.")
        return name_of(model)

    if served is not None:
        model_manager.process_model_name = process_model_name


def split_model_id(model) -> tuple[str, str | None]:
    """As in `transformers serve`, which asks at `/load_model` for no type."""
    check_fields({"model": model})
    return split_plain_model_id(model)


def check_source(url) -> None:
    """Refuses what would be read from a file or fetched, and so says nothing of whether it is there."""
    if not isinstance(url, str) or not url.startswith(tuple(image_sources)):
        given = f"{url[:40]!a}{'...' * (len(url) > 40)}" if isinstance(url, str) else f"a {type(url).__name__}"
        raise ValueError(
            f"An image is given as {given}; this server takes addresses that begin with "
            f"{' or '.join(image_sources)}. Send the picture itself as a data: URL, data:image/png;base64,..."
        )


def is_json_object(text) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError):
        return False


def check_fields(body: dict) -> None:
    """Refuses a value of a wrong type. JSON's null is as if its field were left out."""
    for name in [name for name, value in body.items() if value is None]:
        del body[name]
    for name, kind in FIELDS.items():
        value = body.get(name)
        is_kind = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)  # a bool is an int to Python
        if name in body and not is_kind:
            raise ValueError(f"{name} is {value!r:.40}; give {NAMES[kind]}.")
    stop = body.get("stop", "x")
    if not stop or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop is {stop!r:.40}; give a string, or a list of strings, of which none is empty.")
    for name in ("messages", "input"):
        for index, item in enumerate(body.get(name, ())):
            if isinstance(body[name], list) and not isinstance(item, dict):
                raise ValueError(f"Item {index} of {name} is {item!r:.40}; give an object.")
            if isinstance(item, dict) and item.get("role") == "developer":  # OpenAI's newer name
                item["role"] = "system"
    if not is_json_object(body.get("generation_config", "{}")):
        raise ValueError("generation_config is no JSON object written as a string.")
    for token, bias in body.get("logit_bias", {}).items():
        if not token.isdecimal() or not isinstance(bias, NUMBER) or isinstance(bias, bool):
            raise ValueError(f"logit_bias has {bias!r:.40} for token {token!r:.40}; give ids of tokens with numbers.")
        body["logit_bias"][token] = float(bias)  # `generate` takes no whole number
    if body.get("logit_bias") == {}:
        del body["logit_bias"]


def check_message(message: dict, index: int) -> None:
    """Refuses a role or a part that LLaVA's templates do not know: the server leaves such a part out."""
    if message.get("role") not in ROLES:
        raise ValueError(f"Message {index} is of role {message.get('role')!r:.40}; roles are {', '.join(ROLES)}.")
    content = message.get("content") or ""
    if not isinstance(content, (str, list)):
        raise ValueError(f"Message {index} has {content!r:.40} for content; give a string or a list of parts.")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else part
        if not isinstance(part, dict) or kind not in PARTS:
            raise ValueError(f"Part {number} of message {index} is a {kind!r:.40}; parts are {', '.join(PARTS)}.")
    calls = message.get("tool_calls") or []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not is_json_object(function.get("arguments")):
            raise ValueError(
                f"Call {number} in tool_calls of message {index} is {call!r:.80}; give an object with a function "
                "whose arguments are a JSON object written as a string."
            )


def read_messages(messages: list[dict], *args, **kwargs) -> list[dict]:
    """The messages of a request, as in `transformers serve`."""
    for index, message in enumerate(messages):
        check_message(message, index)
    messages = read_plain_messages(messages, *args, **kwargs)
    for part in (part for message in messages for part in message["content"]):
        if "url" in part:
            check_source(part["url"])
    return messages


def check_body(body: dict) -> None:
    """Refuses what `transformers serve` leaves out without a word, and images that come beside the messages: assets of
    `/v1/systemone` become data: URLs, for their base64 might be a path or an address. Options of a chat reach the
    processor: only variables of the template may be among them."""
    check_fields(body)
    for name, nothing in UNSUPPORTED.items():
        if body.get(name, nothing) != nothing:
            raise ValueError(f"{name} is {body[name]!r:.80}, which this server does not do. Leave {name} out.")
    for asset in body.get("assets", {}).values():
        data = asset["data_base64"]
        if isinstance(data, str) and not data.startswith("data:"):
            asset["data_base64"] = f"data:image/png;base64,{data}"
        check_source(asset["data_base64"])
    for name in body.get("chat_template_kwargs", ()):
        if name in OPTIONS:
            raise ValueError(
                f"This server takes no {name} in chat_template_kwargs, only variables of the chat template. Send "
                "images and text as parts of messages."
            )


def build_generation_config(handler, body: dict, *args, **kwargs):
    """As in `transformers serve`, where `temperature` changes nothing for a model that does not sample by itself."""
    config = build_plain_generation_config(handler, body, *args, **kwargs)
    if "generation_config" not in body and body.get("temperature", body.get("top_p")):
        config.do_sample = True
    return config


def check_requests(handler) -> None:
    """Has `check_body` follow a handler's own check of a request, which then reads what that has left."""
    validate = handler._validate_request

    def validate_and_check(body: dict):
        validate(body)
        check_body(body)
        return validate(body)

    handler._validate_request = validate_and_check


def build_server(model_manager, chat_handler, *, completion_handler, response_handler, systemone_handler, **kwargs):
    """The application of `transformers serve`. What the processor says of broken images and wrong prompts is for the
    client to know."""
    from fastapi import Request
    from fastapi.responses import JSONResponse

    pin_model(model_manager)
    handlers = {
        "completion_handler": completion_handler,
        "response_handler": response_handler,
        "systemone_handler": systemone_handler,
    }
    for handler in (chat_handler, *handlers.values()):
        check_requests(handler)
    app = build_plain_server(model_manager, chat_handler, **handlers, **kwargs)

    async def bad_request(_: Request, error: Exception) -> JSONResponse:
        message = f"the request lacks {error}" if isinstance(error, KeyError) else str(error)
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)

    for error in (ValueError, UnidentifiedImageError, KeyError, OverflowError, NotImplementedError):
        app.add_exception_handler(error, bad_request)
    return app


build_plain_server = server.build_server
split_plain_model_id = server.split_model_id
build_plain_generation_config = utils.BaseHandler._build_generation_config
read_plain_messages = utils.BaseHandler.get_processor_inputs_from_messages

if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    if ALLOW_URLS in sys.argv:
        sys.argv.remove(ALLOW_URLS)
        image_sources += ["http://", "https://"]
    model_manager.ModelManager = ModelManager
    generation.StopStringCriteria = StopStringCriteria
    server.build_server = build_server
    server.split_model_id = split_model_id
    utils.BaseHandler._build_generation_config = build_generation_config
    utils.BaseHandler.get_processor_inputs_from_messages = staticmethod(read_messages)
    sys.argv.insert(1, "serve")
    command_line.main()
