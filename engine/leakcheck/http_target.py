"""An OpenAI-compatible server under test: streamed chat completions, and Prometheus metrics.

`http.client` on threads is all that it takes: it follows no redirects and knows no proxies, so
requests reach the address that was checked and no other, and times are taken on the thread itself.
"""

from __future__ import annotations

import asyncio
import http.client
import math
import re
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import msgspec

from engine.leakcheck.addresses import Address, LeakcheckError
from engine.leakcheck.targets import (
    MAX_MESSAGE,
    MAX_QUOTED,
    Clock,
    Prompt,
    Reply,
    Tenant,
    quoted,
)

MAX_METRICS = 2_000  # figures taken from a page of metrics
MAX_METRIC_NAME = 200  # characters of a figure's name and labels

_MAX_LINE = 64 * 2**10
# Common words are a token each for most vocabularies. Sixteen of them, a block or less, are
# 96 bits: no prompt begins like another.
_COMMON = """
able air and any area arm art baby back ball bank base bed bill bird body book box boy car care
case city coat cold cup dark day deep desk dog door dry ear east egg end eye face fact farm fish
food foot free game gift gold good hair hand hat head hill home hope ice idea iron job key
king lake lamp
"""
_WORDS = tuple(_COMMON.split())
_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*(?:\{.*\})?)\s+([^\s]+)(?:\s+-?\d+)?\s*")


class HttpTarget:
    """An OpenAI-compatible server. Prompts are chats of random words, a token each or so.

    Args:
      address: of kind `http` or `https`.
      timeout: seconds for a request.
      model: by its name; None takes the first that the server lists.
      max_threads: requests at once.
      clock: seconds; what the first token is timed with.
      settle: seconds that the metrics are given to follow the last request.
      ca: PEM file of the authorities to trust; None: the system's.
    """

    def __init__(
        self,
        address: Address,
        timeout: float,
        *,
        model: str | None = None,
        max_threads: int = 16,
        clock: Clock = time.perf_counter,
        settle: float = 0.02,
        ca: Path | None = None,
    ):
        self._ca = ca
        self._address = address
        self._timeout = timeout
        self._model = model
        self._clock = clock
        self._settle = settle
        self._num_words = 0
        self._threads = ThreadPoolExecutor(max_threads, thread_name_prefix="leakcheck")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    async def describe(self, tenant: Tenant, prompt_tokens: int) -> str:
        """Find the model; prompts have as many words as tokens were asked for from here on."""
        self._num_words = prompt_tokens
        if self._model is None:
            self._model = await self._run(self._first_model, tenant)
        return f"{quoted(self._model)} at {self._address}"

    def fresh_prompt(self) -> Prompt:
        return " ".join(secrets.choice(_WORDS) for _ in range(self._num_words))

    async def send(self, prompt: Prompt, tenant: Tenant) -> Reply:
        return await self._run(self._complete, prompt, tenant)

    async def metrics(self, tenant: Tenant) -> Mapping[str, float] | None:
        """The samples of `/metrics`, or None if there are none for this tenant."""
        await asyncio.sleep(self._settle)
        return await self._run(self._read_metrics, tenant)

    async def _run[**P, T](self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))

    def _first_model(self, tenant: Tenant) -> str:
        with _Exchange(self._address, self._timeout, self._ca) as exchange:
            response = exchange.ask("GET", f"{self._address.path}/models", tenant)
            listed = _decode(exchange.body(response), self._address)
        match listed:
            case {"data": [{"id": str(name)}, *_]} if name:
                return name
        raise LeakcheckError(f"{self._address}/models lists no model; name one with --model")

    def _complete(self, prompt: Prompt, tenant: Tenant) -> Reply:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 1,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if tenant.salt is not None:
            body["cache_salt"] = tenant.salt  # vLLM's name for it
        seconds, usage = None, {}
        with _Exchange(self._address, self._timeout, self._ca) as exchange:
            exchange.connect()  # a handshake says nothing about the cache
            start = self._clock()
            path = f"{self._address.path}/chat/completions"
            response = exchange.ask("POST", path, tenant, msgspec.json.encode(body))
            for data in exchange.events(response):
                event = _decode(data, self._address)
                if not isinstance(event, dict):
                    continue
                if event.get("error"):
                    raise LeakcheckError(f"{self._address} failed a request: {quoted(data)}")
                if seconds is None and _has_token(event):
                    seconds = self._clock() - start
                if isinstance(event.get("usage"), dict):
                    usage = event["usage"]
        if seconds is None:
            raise LeakcheckError(f"{self._address} ended an answer without a token; see its log")
        details = usage.get("prompt_tokens_details")
        cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
        return Reply(seconds, cached, _count(usage.get("prompt_tokens")))

    def _read_metrics(self, tenant: Tenant) -> Mapping[str, float] | None:
        with _Exchange(self._address, self._timeout, self._ca) as exchange:
            response = exchange.ask("GET", "/metrics", tenant, must_succeed=False)
            if response.status != http.client.OK:
                return None
            text = exchange.body(response).decode("utf-8", "replace")
        return parse_metrics(text) or None


def parse_metrics(text: str) -> dict[str, float]:
    """Samples of Prometheus' text format, by name with labels; only finite ones are kept.

    See https://prometheus.io/docs/instrumenting/exposition_formats/. Lines that are none, and
    samples beyond MAX_METRICS, are left out.
    """
    samples: dict[str, float] = {}
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line)
        if not match or len(match[1]) > MAX_METRIC_NAME:
            continue
        try:
            value = float(match[2])
        except ValueError:
            continue
        if math.isfinite(value):
            samples[match[1]] = value
        if len(samples) == MAX_METRICS:
            break
    return samples


class _Exchange:
    """One request on a connection of its own, with an end to its time and to its size."""

    def __init__(self, address: Address, timeout: float, ca: Path | None):
        self._address = address
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._bytes_left = MAX_MESSAGE
        self._connection = _connection(address, timeout, ca)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._connection.close()
        if isinstance(error, TimeoutError):
            raise LeakcheckError(
                f"{self._address} took over {self._timeout:g} s for a request; allow more with "
                "--timeout, or ask for less with --prompt-tokens and --burst"
            ) from None
        if isinstance(error, OSError | http.client.HTTPException):
            raise LeakcheckError(
                f"{self._address} can't be reached or broke off ({quoted(error)}); is a server "
                "running there?"
            ) from None

    def connect(self) -> None:
        self._connection.connect()

    def ask(
        self,
        method: str,
        path: str,
        tenant: Tenant,
        body: bytes | None = None,
        *,
        must_succeed: bool = True,
    ) -> http.client.HTTPResponse:
        headers = {"Host": self._address.netloc, "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if tenant.key is not None:
            headers["Authorization"] = f"Bearer {tenant.key}"
        self._connection.request(method, path, body, headers)
        response = self._connection.getresponse()
        if must_succeed and response.status != http.client.OK:
            way_out = ""
            if response.status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
                way_out = "; give the keys of two tenants with --victim-key and --attacker-key"
            raise LeakcheckError(
                f"{method} {path} of {self._address.netloc} answers {response.status} "
                f"({quoted(response.read(MAX_QUOTED))}){way_out}"
            )
        return response

    def body(self, response: http.client.HTTPResponse) -> bytes:
        return b"".join(self._lines(response))

    def events(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """The data of server-sent events, up to `[DONE]`; each is one line, as OpenAI sends it."""
        for line in self._lines(response):
            if line.startswith(b"data:"):
                data = line[len(b"data:") :].strip()
                if data == b"[DONE]":
                    return
                yield data

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        while line := response.readline(_MAX_LINE):
            self._bytes_left -= len(line)
            if self._bytes_left < 0:
                raise LeakcheckError(
                    f"{self._address} sent more than {MAX_MESSAGE} bytes for one request, which "
                    "no answer of one token needs"
                )
            if time.monotonic() > self._deadline:
                raise TimeoutError
            yield line


def _connection(address: Address, timeout: float, ca: Path | None) -> http.client.HTTPConnection:
    """A connection to the address that was checked, whatever its name says by now."""
    if address.kind == "http":
        return http.client.HTTPConnection(address.ip, address.port, timeout=timeout)
    context = ssl.create_default_context(cafile=ca)
    connection = http.client.HTTPSConnection(
        address.host, address.port, timeout=timeout, context=context
    )

    def connect(_: Any, *args: Any, **kwargs: Any) -> socket.socket:
        return socket.create_connection((address.ip, address.port), *args, **kwargs)

    # The certificate is checked against the host's name; the connection goes to its address.
    connection._create_connection = connect  # type: ignore[attr-defined]
    return connection


def _decode(data: bytes, address: Address) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        raise LeakcheckError(
            f"{address} does not answer as an OpenAI-compatible server does ({quoted(data)}); "
            "write an Octavo gRPC server as host:port, without http://"
        ) from None


def _has_token(event: dict[str, Any]) -> bool:
    """Whether a chunk ends the wait for the first token: it has text, or says why it has none."""
    match event.get("choices"):
        case [{"delta": {"content": str(text)}}, *_] if text:
            return True
        case [{"finish_reason": str()}, *_]:
            return True
    return False


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
