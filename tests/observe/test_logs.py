"""Log lines: one a record whatever a client sent, with its request, and never with what it said."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from engine.client import AsyncClient, ServiceError
from engine.frontend import Engine
from engine.observe import logs
from engine.observe.calls import Call, in_call
from engine.observe.logs import JsonFormatter, LogFormat, TextFormatter
from tests.observe.served import Letters

FORGED = "hello\nERROR octavo: forged\r\x1b[2J\u2028end"


def record(message: str, *args: object, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error is not None else None
    return logging.LogRecord("octavo.test", logging.ERROR, __file__, 1, message, args, info)


def failure(message: str) -> Exception:
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


def test_a_client_s_text_can_not_start_a_line_of_its_own() -> None:
    for written in (record("got %s", FORGED), record("failed", error=failure(FORGED))):
        lines = TextFormatter().format(written).splitlines()
        assert lines[0].startswith("ERROR octavo.test: ")
        assert all(line.startswith("  | ") for line in lines[1:])
        assert "\x1b" not in "".join(lines)
        (line,) = JsonFormatter().format(written).splitlines()
        assert "\x1b" not in line
        assert "forged" in json.dumps(json.loads(line))


def test_a_line_says_whose_request_it_is_about() -> None:
    plain = record("something happened")
    assert "request_id" not in json.loads(JsonFormatter().format(plain))
    with in_call(Call("mine", "acme")):
        line = json.loads(JsonFormatter().format(plain))
        assert (line["request_id"], line["tenant"]) == ("mine", "acme")
        text = TextFormatter().format(plain)
        assert text == "ERROR octavo.test: something happened (request mine)"
        named = record("request %s failed", "mine")
        assert TextFormatter().format(named) == "ERROR octavo.test: request mine failed"
    assert "x_request_id" not in line
    with in_call(Call("mine", "acme", given="a-proxy-s")):
        assert json.loads(JsonFormatter().format(plain))["x_request_id"] == "a-proxy-s"
    assert line["message"] == "something happened"
    assert (line["level"], line["logger"]) == ("ERROR", "octavo.test")
    assert line["time"].endswith("Z")


@pytest.fixture(params=["text", "json"])
def written(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[io.StringIO]:
    """Everything that is logged, at the most talkative level."""
    form: LogFormat = request.param
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr("sys.stderr", stream)
    root.handlers = []
    logs.configure("debug", form)
    yield stream
    root.handlers = handlers
    root.setLevel(level)


async def test_a_finished_request_is_one_line(
    engine: Engine, client: AsyncClient, written: io.StringIO
) -> None:
    prompt = "a prompt of some length"
    async for _ in client.generate(prompt, max_tokens=3, request_id="mine"):
        pass
    (line,) = (line for line in written.getvalue().splitlines() if "octavo.requests" in line)
    if not line.startswith("{"):
        assert line.startswith("INFO octavo.requests: request mine of default: length; 23 prompt")
        return
    fields = json.loads(line)
    assert (fields["request_id"], fields["tenant"], fields["outcome"]) == (
        "mine",
        "default",
        "length",
    )
    assert (fields["prompt_tokens"], fields["completion_tokens"], fields["answers"]) == (23, 3, 1)
    assert 0 <= fields["queue_seconds"] <= fields["first_token_seconds"] <= fields["seconds"]


async def test_logs_hold_nothing_of_what_clients_say(
    engine: Engine,
    runner: Letters,
    client: AsyncClient,
    written: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    canary = "canary-5f2c"
    metadata: dict[str, Any] = {"cache_salt": canary, "stop": (canary,)}

    async def ask(prompt: Any, **fields: Any) -> None:
        async for _ in client.generate(prompt, max_tokens=2, **metadata, **fields):
            pass

    await ask(canary)
    await ask([{"role": "user", "content": canary}])
    for bad in ([{"role": canary, "content": canary}] * 200, [10**7]):
        with pytest.raises(ServiceError):
            await ask(bad)
    runner.fail_waits.add(len(runner.plans))  # a step fails
    with pytest.raises(ServiceError):
        await ask(canary)
    logging.getLogger().setLevel(logging.INFO)

    def fail(text: str, *_: object) -> None:
        raise RuntimeError(f"can't tokenise {text!r}")  # quotes the prompt

    monkeypatch.setattr(engine.tokenizer, "encode", fail)
    with pytest.raises(ServiceError, match="its log says why"):
        await ask(canary)
    said = written.getvalue()
    assert "a call failed" in said
    assert "RuntimeError" in said
    assert canary not in said
