"""What is refused: with which status, under which name, and before what is read."""

from __future__ import annotations

from typing import Any

import grpc
import httpx2
import pytest

from engine import __version__
from engine.sampling import InvalidRequest
from engine.serve.access import Access, Caller
from engine.serve.errors import Refused
from engine.serve.openai import generation
from engine.serve.server import Server
from engine.server_config import ServerConfig
from engine.types import QueueFull
from tests.serve.fake_engine import FakeEngine
from tests.serve.openai.calls import complete, error_of

PATH = "/v1/completions"
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"", None, "is empty; send a JSON object"),
        (b" \n", None, "is empty; send a JSON object"),
        (b"{", None, "is not JSON"),
        (b'{"prompt": "\xff"}', None, "is not JSON in UTF-8"),
        (b'{"prompt": "\\ud800"}', None, "is not JSON"),
        (b'{"prompt": NaN}', None, "is not JSON"),
        (b"[]", None, "is an array; it must be an object"),
        (b"{}", "prompt", "is missing"),
        (b'{"prompt": 1}', "prompt", "is an integer; it must be a string or an array"),
        (b'{"prompt": ["a", 1]}', "prompt", "mixes kinds"),
        (b'{"prompt": [1, "a"]}', "prompt", "mixes kinds"),
        (b'{"prompt": [[1], []]}', "prompt", "is empty"),
        (b'{"prompt": [1%s, "a"]}' % (b",1" * 255), "prompt", "has 257 tokens"),
        (b'{"prompt": [true]}', "prompt[0]", "is a boolean; it must be"),
        (b'{"prompt": [[[1]]]}', "prompt[0][0]", "is an array; it must be an integer"),
        (b'{"prompt": []}', "prompt", "is empty"),
        (b'{"prompt": ["a", ""]}', "prompt", "is empty"),
        (b'{"prompt": "a", "n": "2"}', "n", "is a string; it must be an integer"),
        (b'{"prompt": "a", "n": 129}', "n", "[1, 128]"),
        (b'{"prompt": ["a", "b", "c"], "n": 100}', "prompt", "300 outputs"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature", "out of range"),
        (b'{"prompt": "a", "temperature": -1}', "temperature", "[0, 100]"),
        (b'{"prompt": "a", "logprobs": 21}', "logprobs", "[0, 20]"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias", "'x' is not a token id"),
        (b'{"prompt": "a", "stream_options": {}}', "stream_options", "set stream to true"),
        (b'{"prompt": "a", "best_of": 2}', "best_of", "2 is not n (1)"),
        (b'{"prompt": "a", "suffix": "b"}', "suffix", "doesn't fill gaps"),
        (b'{"prompt": "a", "store": true}', "store", "is not supported"),
        (b'{"prompt": "a", "store": 0}', "store", "is not supported"),
        (b'{"prompt": "a", "priority": 99999999999}', "priority", "32 bits"),
        (b'{"prompt": "a", "user": "u", "cache_salt": "s"}', "user", "the two differ"),
        (b'{"prompt": "a", "temperatur": 0}', "temperatur", "(did you mean temperature?)"),
        (b'{"messages": []}', "messages", "which is for /v1/chat/completions; here it is prompt"),
        (
            b'{"prompt": "a", "guided_json": {}}',
            "guided_json",
            "did you mean structured_outputs.json?",
        ),
        (
            b'{"prompt": "a", "response_format": {"type": "json_schema"}}',
            "response_format.json_schema",
            "is missing; the type is json_schema",
        ),
        (
            b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {}}}',
            "response_format.json_schema.schema",
            "is missing",
        ),
        (
            b'{"prompt": "a", "response_format": {"type": "text", "json_schema": {"schema": {}}}}',
            "response_format.json_schema",
            "the type is text",
        ),
        (b'{"prompt": "a", "tools": [], "use_beam_search": 1}', "tools", "tools, use_beam_search"),
        (b'{"prompt": "a", "stream": true, "stream_options": {"x": 1}}', "stream_options.x", "x"),
    ],
)
async def test_a_body_that_doesn_t_fit_is_refused_by_the_field(
    body: bytes, param: str | None, message: str, http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    reply = await http.post(PATH, content=body, headers=JSON)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert error["message"].startswith(f"{param or 'body'}: ")
    assert not fake.calls


@pytest.mark.parametrize("field", ["prompt", "response_format", "metadata", "unknown"])
@pytest.mark.parametrize("bomb", [b"[" * 100_000, b'{"a":' * 100_000])
async def test_a_bomb_of_brackets_is_refused(
    field: str, bomb: bytes, http: httpx2.AsyncClient
) -> None:
    body = b'{"prompt": "a", "%s": %s' % (field.encode(), bomb)
    reply = await http.post(PATH, content=body, headers=JSON)
    assert reply.status_code == 400
    assert await complete(http, prompt="a")


async def test_other_models_are_not_served(http: httpx2.AsyncClient) -> None:
    error = await error_of(http, status=404, prompt="a", model="gpt-4")
    assert error["code"] == "model_not_found"
    assert "'echo'" in error["message"]


async def test_what_is_not_json_is_not_read(http: httpx2.AsyncClient, fake: FakeEngine) -> None:
    """A browser sends a form to any site without asking; JSON it asks for first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"content-type": kind} if kind else {}
        reply = await http.post(PATH, content=b'{"prompt": "a"}', headers=headers)
        assert reply.status_code == 415
        assert "application/json" in reply.json()["error"]["message"]
    kind = "application/json; charset=utf-8"
    reply = await http.post(PATH, content=b'{"prompt": "a"}', headers={"content-type": kind})
    assert reply.status_code == 200
    assert len(fake.calls) == 1
    preflight = await http.options(PATH, headers={"origin": "http://evil.example"})
    assert preflight.status_code == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]


async def test_paths_and_methods_that_are_not_there(http: httpx2.AsyncClient) -> None:
    reply = await http.get(PATH)
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert "use POST" in reply.json()["error"]["message"]
    for path in ("/v1/embeddings", "/v1/", "/v1/models/gpt-4"):
        reply = await http.get(path)
        assert reply.status_code == 404
        assert reply.json()["error"]["type"] == "not_found_error"


async def test_models_health_and_version_are_told(http: httpx2.AsyncClient) -> None:
    [model] = (await http.get("/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("echo", "model", 256)
    assert (await http.get("/v1/models/echo")).json() == model
    assert (await http.get("/health")).json() == {"status": "ok"}
    assert (await http.head("/health")).status_code == 200
    assert (await http.get("/version")).json() == {"version": __version__}


async def test_a_server_is_healthy_only_while_it_serves(fake: FakeEngine) -> None:
    server = Server(ServerConfig(port=0, grace=0.05, http="127.0.0.1:0"))
    await server.start()
    assert server.page is not None
    async with httpx2.AsyncClient(base_url=server.page) as http:
        reply = await http.get("/health")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert "still loading" in reply.json()["error"]["message"]
        error = await error_of(http, status=503, prompt="a")
        assert error["type"] == "server_error"
        await server.set_engine(fake)
        assert (await http.get("/health")).status_code == 200
        fake.close()
        assert (await http.get("/health")).status_code == 503
        server._calls.shut_down()
        assert "shutting down" in (await http.get("/health")).text
        assert "shutting down" in (await error_of(http, status=503, prompt="a"))["message"]
    await server.stop()


@pytest.mark.parametrize(
    ("error", "status", "param", "retry_after"),
    [
        (InvalidRequest("prompt_ids", "is wrong"), 400, "prompt", None),
        (InvalidRequest("constraint", "is wrong"), 400, "response_format", None),
        (QueueFull("full", 2.5), 429, None, "3"),
        (Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "slowly", 0.1), 429, None, "1"),
        (Refused(grpc.StatusCode.PERMISSION_DENIED, "no"), 403, None, None),
        (Refused(grpc.StatusCode.ALREADY_EXISTS, "again"), 409, None, None),
        (Refused(grpc.StatusCode.UNIMPLEMENTED, "never"), 501, None, None),
        (Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "late"), 504, None, None),
        (RuntimeError("a secret"), 500, None, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_error_of_the_engine_has_its_status(
    stream: bool,
    error: Exception,
    status: int,
    param: str | None,
    retry_after: str | None,
    http: httpx2.AsyncClient,
    fake: FakeEngine,
) -> None:
    fake.error = error
    reply = await http.post(PATH, json={"prompt": "a", "stream": stream})
    assert reply.status_code == status
    assert reply.headers.get("retry-after") == retry_after
    told = reply.json()["error"]
    assert told["param"] == param
    assert "secret" not in reply.text
    assert told["type"] == {
        400: "invalid_request_error",
        403: "permission_error",
        409: "invalid_request_error",
        429: "rate_limit_error",
    }.get(status, "server_error")


async def test_who_is_not_known_gets_nothing_and_nothing_is_read_from_them(
    http: httpx2.AsyncClient, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(self: Access, request: Any) -> Caller:
        raise Refused(grpc.StatusCode.UNAUTHENTICATED, "no key")

    monkeypatch.setattr(Access, "http_caller", unknown)
    for path in (PATH, "/v1/chat/completions", "/tokenize", "/detokenize"):
        reply = await http.post(path, content=b"[" * 2**20, headers=JSON)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"].startswith("Bearer")
        assert reply.json()["error"]["code"] == "invalid_api_key"
    for path in ("/v1/models", "/v1/models/echo", "/tokenizer_info"):
        assert (await http.get(path)).status_code == 401
    assert (await http.get("/health")).status_code == 200
    assert not fake.calls


async def test_a_name_for_the_request_comes_back(
    http: httpx2.AsyncClient, fake: FakeEngine
) -> None:
    headers = {"x-request-id": "mine"}
    reply = await http.post(PATH, json={"prompt": "a"}, headers=headers)
    assert reply.headers["x-request-id"] == "mine"
    assert reply.json()["id"] == "cmpl-mine"
    reply = await http.post(PATH, json={"prompt": ["a", "b"]}, headers=headers)
    assert reply.headers["x-request-id"] == "mine"
    names = [str(call.request_id) for call in fake.calls]
    assert names[:2] == ["mine", "mine"]
    assert names[2].startswith("mine-")
    names = {(await http.post(PATH, json={"prompt": "a"})).headers["x-request-id"] for _ in "ab"}
    assert len(names) == 2
    for bad in ("a b", "x" * 129):
        reply = await http.post(PATH, json={"prompt": "a"}, headers={"x-request-id": bad})
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["message"].startswith("x-request-id: ")
        assert error["type"] == "invalid_request_error"


async def test_a_base_url_without_its_folder_is_told_so(http: httpx2.AsyncClient) -> None:
    for path in ("/completions", "/chat/completions", "/models"):
        reply = await http.post(path, json={})
        assert reply.status_code == 404
        assert f"the API is under /v1: end the base URL with it (/v1{path})" in reply.text
        assert reply.json()["error"]["code"] == "not_found"


async def test_another_name_of_the_server_is_refused_in_openai_s_shape(
    http: httpx2.AsyncClient,
) -> None:
    reply = await http.post(PATH, json={}, headers={"host": "evil.example"})
    assert reply.status_code == 421
    assert "the Host header names another server" in reply.json()["error"]["message"]


async def test_tokens_can_be_looked_at_as_lm_eval_does(http: httpx2.AsyncClient) -> None:
    body = {"prompt": "hi", "add_special_tokens": False}
    reply = (await http.post("/tokenize", json=body)).json()
    assert reply == {"tokens": list(b"hi"), "count": 2, "max_model_len": 256}
    reply = (await http.post("/detokenize", json={"tokens": [256, *b"hi"]})).json()
    assert reply == {"prompt": "<bos>hi"}
    error = await error_of(http, "/detokenize", tokens=[258])
    assert error["param"] == "tokens"
    info = (await http.get("/tokenizer_info")).json()
    assert info == {"bos_token": "<bos>", "eos_token": "<eos>"}


async def test_scores_that_would_fill_the_memory_are_refused(
    http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MAX_ANSWER_ENTRIES", 2 * 2 * 21)
    body: dict[str, Any] = {"prompt": [[1], [2]], "max_tokens": 1, "echo": True, "logprobs": 20}
    assert await complete(http, **body)
    error = await error_of(http, **(body | {"max_tokens": 2}))
    assert error["param"] == "logprobs"
    assert "up to 126 tokens" in error["message"]
    stream: dict[str, Any] = {"max_tokens": 99, "stream": True}
    assert (await http.post(PATH, json=body | stream)).status_code == 200
    error = await error_of(http, **(body | stream | {"prompt": [[1] * 5]}))
    assert "up to 105 tokens" in error["message"]


async def test_the_log_has_no_message_of_an_unexpected_error(
    http: httpx2.AsyncClient, fake: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    fake.error = RuntimeError("my secret prompt")
    reply = await http.post(PATH, json={"prompt": "a"})
    assert reply.status_code == 500
    assert "RuntimeError" in caplog.text
    assert "my secret prompt" not in caplog.text + reply.text
