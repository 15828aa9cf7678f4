"""The server of transformers, with a converted folder behind it, as its HTTP clients see it."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT
from processes import free_port, run_script

from convert_llava_to_dpvr import convert

sys.path.insert(0, str(ROOT / "examples"))
pytest.importorskip("fastapi", reason="pip install transformers[serving]")
pytest.importorskip("openai", reason="pip install transformers[serving]")

PLAIN = [
    "-c",
    "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()",
    "serve",
]
OURS = [str(ROOT / "scripts" / "serve.py")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("serving")
    convert(ROOT / "examples" / "tiny-llava", path / "dpvr", adapter=ROOT / "examples" / "dpvr-tiny-adapter")
    return path


@pytest.fixture(scope="module", params=[PLAIN, OURS], ids=["transformers serve", "scripts/serve.py"])
def server(request, folder):
    """Address of a server in a process of its own, on loopback, and whether it is ours."""
    port = free_port()
    command = [sys.executable, *request.param, str(folder / "dpvr"), "--trust-remote-code", "--host", "127.0.0.1"]
    log = folder / f"server-{port}.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"], env=environment, stdout=output, stderr=output
        )
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1/chat/completions", request.param is OURS
        finally:
            process.terminate()
            process.wait(30)


def ask(server, image: str, text: str, **options):
    """Status and body of a request with one image, given as a URL."""
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": image}}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0.0, **options}
    return post(server[0], body)


def post(url: str, body: dict):
    """Status and body of the answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def picture():
    """A picture and what is in its row 2, column 3."""
    import digits
    import numpy as np

    grid = digits.make_grid(np.random.default_rng(0), "train")
    file = io.BytesIO()
    grid.image.save(file, "PNG")
    return file.getvalue(), digits.WORDS[grid.digits[1, 2]]


QUESTION = "What is in row 2, column 3?"


def test_a_request_with_an_image_is_answered(server, picture):
    status, body = ask(server, data_url(picture[0]), QUESTION)
    assert status == 200, body
    assert json.loads(body)["choices"][0]["message"]["content"].strip() == picture[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer(server, picture, stream):
    whole = json.loads(ask(server, data_url(picture[0]), "Read row 2.")[1])["choices"][0]["message"]["content"]
    stop = whole.split()[1].strip(",.")
    for value in (stop, ["no such word", stop]):
        status, body = ask(server, data_url(picture[0]), "Read row 2.", stop=value, stream=stream)
        if not server[1]:  # with any model that has a processor
            assert status == 500 or "no attribute 'get_vocab'" in body, body
        elif stream:
            chunks = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
            text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
            assert text.split()[-1].strip(",.") == stop
        else:
            assert status == 200, body
            assert json.loads(body)["choices"][0]["message"]["content"].split()[-1].strip(",.") == stop


def test_an_answer_is_streamed(server, picture):
    status, body = ask(server, data_url(picture[0]), QUESTION, stream=True)
    assert status == 200, body
    chunks = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text.strip() == picture[1]


def test_transformers_chat_talks_to_the_server(server, folder):
    program = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "chat",
        str(folder / "dpvr"),
        server[0].removesuffix("/chat/completions"),
    ]
    result = subprocess.run(
        [*command, "max_new_tokens=2", "do_sample=False"],  # chat samples unless told not to, and may end early
        input="Read row 2.\nN\n!exit\n",  # N: do not go on where the limit of tokens was reached
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server[0].split("/v1")[0]},  # loopback only
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "tok/s" in result.stdout, result.stdout[-2000:]


@pytest.mark.parametrize("broken", ["truncated", "not an image", "not base64"])
def test_a_broken_image_gets_a_client_error_and_the_next_request_is_answered(server, picture, broken):
    image = {
        "truncated": data_url(picture[0][: len(picture[0]) // 2]),
        "not an image": data_url(b"not an image"),
        "not base64": "data:image/png;base64,%%%",
    }[broken]
    status, body = ask(server, image, QUESTION)
    if server[1]:
        assert 400 <= status < 500, (status, body)
        assert "message" in json.loads(body)["error"]
    else:
        assert status >= 400  # transformers' own: 500, as with any model
    assert ask(server, data_url(picture[0]), QUESTION)[0] == 200


def test_no_model_is_loaded_but_the_one_that_is_served(server, folder):
    """Loading another would run its code. transformers serve does."""
    root = server[0].removesuffix("/v1/chat/completions")
    status, body = post(f"{root}/load_model", {"model": str(ROOT / "examples" / "tiny-llava")})
    assert status == (400 if server[1] else 200), body
    if server[1]:
        assert "is another model, and is not loaded" in json.loads(body)["error"]["message"]
        assert post(f"{root}/load_model", {"model": str(folder / "dpvr")})[0] == 200


@pytest.mark.parametrize(
    "form", ["a file", "no file", "a port", "a private address", "base64", "a number", "a surrogate"]
)
def test_an_image_that_is_no_data_url_is_refused_and_nothing_is_read_or_fetched(server, picture, folder, form):
    if not server[1]:
        pytest.skip("transformers serve reads and fetches whatever a client names")
    (folder / "picture.png").write_bytes(picture[0])
    with socket.create_server(("127.0.0.1", 0)) as listener:  # answers nobody
        image = {
            "a file": str(folder / "picture.png"),
            "no file": str(folder / "none.png"),
            "a port": f"http://127.0.0.1:{listener.getsockname()[1]}/x.png",
            "a private address": "http://10.0.0.1/x.png",
            "base64": base64.b64encode(picture[0]).decode(),
            "a number": 3,
            "a surrogate": "\ud800",
        }[form]
        status, body = ask(server, image, QUESTION)
        decision = {"state": "x", "questions": {"q": {"type": "noul", "instructions": "x"}}}
        assets = {"x": {"type": "image", "format": "png", "data_base64": image}}
        decided, answer = post(server[0].replace("chat/completions", "systemone"), {**decision, "assets": assets})
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    message = json.loads(body)["error"]["message"]
    assert status == 400
    assert "this server takes addresses that begin with data:image/. Send the picture itself as a data: URL" in message
    if form != "a number":  # there base64 alone, and nothing else, is an image
        assert decided == 400
        assert ("needs a template" in answer) == (form == "base64"), answer


def test_an_image_among_the_options_of_a_chat_is_refused(server, picture, folder):
    if not server[1]:
        pytest.skip("transformers serve gives these to the processor, which opens files")
    (folder / "picture.png").write_bytes(picture[0])
    images = {"images": [str(folder / "picture.png")]}
    for options in (images, {"processor_kwargs": images}):
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        status, answer = post(server[0], {**body, "chat_template_kwargs": options})
        assert status == 400, answer
        assert "takes no " in json.loads(answer)["error"]["message"]
    assert ask(server, data_url(picture[0]), QUESTION, chat_template_kwargs={"unused": 1})[0] == 200


def test_a_model_that_is_not_there_ends_the_command_in_a_sentence():
    result = run_script(*OURS, "nowhere", check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: nowhere does not exist: give the folder of a checkpoint")
    assert "Traceback" not in result.stderr


def test_addresses_of_images_are_let_through_where_that_is_asked_for_and_files_never(monkeypatch):
    from scripts import serve

    monkeypatch.setattr(serve, "image_sources", [*serve.image_sources, "http://", "https://"])
    serve.check_source("https://example.com/x.png")
    for url in ("/x.png", "file:///x.png", "x.png"):
        with pytest.raises(ValueError, match="begin with data:image/ or http:// or https://"):
            serve.check_source(url)


@pytest.mark.parametrize(
    "messages", [None, [{"content": "hi"}], [{"role": "user", "content": [{"type": "image_url"}]}]]
)
def test_a_request_that_lacks_something_gets_a_client_error_that_says_so(server, messages):
    url, is_ours = server
    status, body = post(url, {"max_tokens": 2} if messages is None else {"messages": messages, "max_tokens": 2})
    assert status == 400 if is_ours else status >= 400, (status, body)
    assert not is_ours or "message" in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("name", "value", "nothing"),
    [
        ("n", 2, 1),
        ("logprobs", True, False),
        ("presence_penalty", 0.5, 0.0),
        ("response_format", {"type": "json_object"}, {"type": "text"}),
    ],
)
def test_what_would_be_left_out_without_a_word_is_refused_by_name(server, name, value, nothing):
    if not server[1]:
        pytest.skip("transformers serve leaves it out")
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    status, answer = post(server[0], {**body, name: value})
    assert status == 400
    assert f"{name} is {value!r}, which this server does not do. Leave" in json.loads(answer)["error"]["message"]
    assert post(server[0], {**body, name: nothing})[0] == 200


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"messages": "hi"}, "messages is 'hi'; give a list"),
        ({"messages": ["hi"]}, "Item 0 of messages is 'hi'; give an object"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "Message 0 is of role 'robot'; roles are system, user"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "Message 0 is of role ['user']"),
        ({"messages": [{"role": "user", "content": 3}]}, "Message 0 has 3 for content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "Part 0 of message 0 is a 'hi'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "Part 0 of message 0 is a 'image'; parts"),
        *(
            ({"messages": [{"role": "assistant", "tool_calls": calls}]}, "Call 0 in tool_calls of message 0 is ")
            for calls in ("f", [1], [{"function": 3}], [{"function": {"name": "f", "arguments": "[]"}}])
        ),
        ({"max_tokens": "8"}, "max_tokens is '8'; give a whole number"),
        ({"max_tokens": True}, "max_tokens is True; give a whole number"),
        ({"temperature": [0]}, "temperature is [0]; give a number"),
        ({"stream": "false"}, "stream is 'false'; give true or false"),
        ({"stop": ["a", None]}, "stop is ['a', None]; give a string, or a list of strings"),
        ({"stop": ""}, "of which none is empty"),
        ({"logit_bias": [1]}, "logit_bias is [1]; give an object"),
        ({"logit_bias": {"a": 1}}, "logit_bias has 1 for token 'a'; give ids of tokens with numbers"),
        ({"logit_bias": {"5": "1"}}, "logit_bias has '1' for token '5'; give ids of tokens with numbers"),
        ({"logit_bias": {"9999": 1}}, "the following tokens were being biased: [9999]"),
        ({"temperature": 10**400}, "int too large to convert to float"),
        ({"generation_config": "[1]"}, "generation_config is no JSON object"),
        *(
            ({"chat_template_kwargs": {name: value}}, f"This server takes no {name} in chat_template_kwargs, only")
            for name, value in {
                "tokenize": False,
                "chat_template": "{% for i in range(9) %}{% endfor %}",  # keeps the server from all other clients
                "max_length": 10**12,  # with "padding": "max_length"
                "text_kwargs": 3,
                "text": "hi",
                "messages": [],
            }.items()
        ),
    ],
)
def test_a_value_of_a_wrong_type_gets_a_client_error_that_names_it(server, wrong, reason):
    url, is_ours = server
    if not is_ours:
        pytest.skip("transformers serve answers some with 500, and takes the others")
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    status, answer = post(url, {**body, **wrong})
    assert status == 400, answer
    assert reason in json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("v1/responses", {"input": [3]}, "Item 0 of input is 3; give an object"),
        ("v1/responses", {"input": "hi", "instructions": 3}, "instructions is 3; give a string"),
        ("v1/completions", {"prompt": "hi", "temperature": []}, "temperature is []; give a number"),
        ("v1/completions", {"prompt": "hi", "n": 2}, "n is 2, which this server does not do"),
        ("v1/responses", {"input": "hi", "previous_response_id": "resp_1"}, "previous_response_id is 'resp_1', which"),
        (
            "v1/systemone",
            {"state": "x", "questions": {"q": {"type": "noul", "instructions": "x"}}},
            "needs a template",
        ),
        ("load_model", {"model": 3}, "model is 3; give a string"),
    ],
)
def test_the_other_ways_to_ask_name_a_wrong_value_too(server, path, body, reason):
    if not server[1]:
        pytest.skip("transformers serve answers some with 500, and takes the others")
    status, answer = post(server[0].replace("v1/chat/completions", path), body)
    assert status == 400, answer
    assert reason in json.loads(answer)["error"]["message"]


def test_a_bias_that_is_a_whole_number_works(server):
    url, is_ours = server
    for bias in ({"5": 100}, {}):
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "logit_bias": bias}
        status, answer = post(url, body)
        assert status == 200 if is_ours else status == 500, answer
        assert not is_ours or ("!!" in answer) == bool(bias)  # token 5


def test_a_temperature_or_a_top_p_samples(server):
    url, is_ours = server
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    greedy = post(url, body)[1].split('"message"')[1].split("}")[0]
    for options in ({"temperature": 50.0}, {"temperature": 50, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.5}):
        status, answer = post(url, {**body, **options, "seed": 1})
        assert status == 200, answer
        assert (greedy not in answer) == (is_ours and options["temperature"] > 0)
    status, answer = post(url, {**body, "temperature": -1.0})
    assert not is_ours or (status == 400 and "`temperature` (=-1.0)" in answer), answer


def test_a_developers_message_is_a_systems(server):
    if not server[1]:
        pytest.skip("transformers serve leaves the role to the template, and LLaVA's knows no developer")
    user, used = {"role": "user", "content": "hi"}, []
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "Read row 2."}, user]
        status, answer = post(server[0], {"messages": messages, "max_tokens": 2})
        assert status == 200, answer
        used.append(json.loads(answer)["usage"]["prompt_tokens"])
    assert used[0] == used[1]


def test_null_is_as_if_a_field_were_left_out(server):
    options = dict.fromkeys(["model", "stop", "seed", "stream", *(["chat_template_kwargs"] if server[1] else [])])
    status, answer = post(server[0], {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **options})
    assert status == 200, answer
