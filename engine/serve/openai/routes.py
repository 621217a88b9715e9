"""The routes of the OpenAI API, and vLLM's of the tokenizer, over an engine that may still load.

An answer holds its requests: however it ends (read to the end, client gone, deadline), the engine's
streams are closed, and with that every cache block returns.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from engine import __version__
from engine.sampling import InvalidRequest
from engine.serve.access import Access, Caller
from engine.serve.calls import Calls
from engine.serve.doorkeeper import MISPLACED_PATHS
from engine.serve.errors import Refused
from engine.serve.openai.answers import Answer, ChatAnswer, Prompt
from engine.serve.openai.errors import HttpRefused
from engine.serve.openai.exchange import Exchange
from engine.serve.openai.generation import Generation, make_prompts
from engine.serve.openai.memory import Memory
from engine.serve.openai.parameters import (
    chat_sampling,
    completion_sampling,
    field_path,
    messages_of,
)
from engine.serve.openai.parts import json_array
from engine.serve.openai.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    decode,
)

if TYPE_CHECKING:
    from engine.frontend import Engine

_Handler = Callable[[Exchange], Awaitable[None]]
_Body = CompletionRequest | ChatRequest | TokenizeRequest | DetokenizeRequest


class Api:
    """The routes.

    Args:
      calls: what it shares with the other front ends. Each prompt of a request counts as a call,
        and so does a tokenisation.
      access: tells callers apart.
      max_body: bytes of a request that are taken.
    """

    def __init__(self, calls: Calls, access: Access, max_body: int):
        self._calls = calls
        self._access = access
        self._max_body = max_body
        self._memory = Memory()
        self._started = int(time.time())

    @property
    def routes(self) -> list[BaseRoute]:
        """All of them; whatever else begins with /v1 is answered in OpenAI's shape too."""
        handlers: dict[str, tuple[str, _Handler]] = {
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/models": ("GET", self._models),
            "/v1/models/{name:path}": ("GET", self._model),
            "/v1/{path:path}": ("", _nothing),
            "/health": ("GET", self._health),
            "/version": ("GET", _version),
            "/tokenize": ("POST", self._tokenize),
            "/detokenize": ("POST", self._detokenize),
            "/tokenizer_info": ("GET", self._tokenizer_info),
            **dict.fromkeys(MISPLACED_PATHS, ("", _misplaced)),
        }
        return [Route(path, _Endpoint(self._calls, *each)) for path, each in handlers.items()]

    async def _completions(self, exchange: Exchange) -> None:
        caller, engine, request = await self._read(exchange, CompletionRequest)
        sampling = completion_sampling(request)
        generation = Generation(
            self._calls, engine, caller, request, sampling, Answer, self._memory
        )

        async def work() -> None:
            prompts = await make_prompts(self._calls, caller, engine, request, sampling)
            await generation.run(exchange, prompts)

        await exchange.unless_gone(work())

    async def _chat(self, exchange: Exchange) -> None:
        caller, engine, request = await self._read(exchange, ChatRequest)
        prompt = Prompt(0, messages_of(request, engine.model_info().max_model_len))
        sampling = chat_sampling(request)
        generation = Generation(
            self._calls, engine, caller, request, sampling, ChatAnswer, self._memory
        )
        await exchange.unless_gone(generation.run(exchange, [prompt]))

    async def _tokenize(self, exchange: Exchange) -> None:
        caller, engine, request = await self._read(exchange, TokenizeRequest)

        def answer() -> dict[str, Any]:
            tokens = engine.tokenizer.encode(request.prompt, request.add_special_tokens)
            most = engine.model_info().max_model_len
            return {"tokens": json_array(tokens), "count": len(tokens), "max_model_len": most}

        await self._reply_from_thread(exchange, caller, answer)

    async def _detokenize(self, exchange: Exchange) -> None:
        caller, engine, request = await self._read(exchange, DetokenizeRequest)
        most = engine.model_info().architecture.vocab_size - 1

        def answer() -> dict[str, Any]:
            for token in request.tokens:
                if not 0 <= token <= most:
                    raise InvalidRequest(
                        "tokens", f"{str(token)[:40]} is no token id; those are from 0 to {most}"
                    )
            return {"prompt": engine.tokenizer.decode(request.tokens, skip_special_tokens=False)}

        await self._reply_from_thread(exchange, caller, answer)

    async def _reply_from_thread(
        self, exchange: Exchange, caller: Caller, answer: Callable[[], dict[str, Any]]
    ) -> None:
        """Make an answer on a thread and send it, as one call."""

        async def work() -> None:
            loop = asyncio.get_running_loop()
            body = await loop.run_in_executor(None, lambda: msgspec.json.encode(answer()))
            await exchange.reply(body)

        await exchange.unless_gone(self._calls.to_its_end(caller, work))

    async def _tokenizer_info(self, exchange: Exchange) -> None:
        tokenizer = self._enter(exchange)[1].tokenizer
        ids = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
        names = {k: None if i is None else tokenizer.id_to_token(i) for k, i in ids.items()}
        await _reply(exchange, names)

    async def _models(self, exchange: Exchange) -> None:
        _, engine = self._enter(exchange)
        await _reply(exchange, {"object": "list", "data": [self._describe(engine)]})

    async def _model(self, exchange: Exchange) -> None:
        _, engine = self._enter(exchange)
        _check_model(engine, exchange.request.path_params["name"])
        await _reply(exchange, self._describe(engine))

    async def _health(self, exchange: Exchange) -> None:
        if reason := self._calls.unready:
            raise Refused(grpc.StatusCode.UNAVAILABLE, reason, retry_after=1.0)
        if not self._calls.engine().is_alive:
            raise Refused(
                grpc.StatusCode.UNAVAILABLE,
                "the engine of this server has stopped; its log says why. Try another server",
            )
        await _reply(exchange, {"status": "ok"})

    def _enter(self, exchange: Exchange) -> tuple[Caller, Engine]:
        """Who calls, and the engine. Raises Refused."""
        return self._access.http_caller(exchange.request), self._calls.engine()

    async def _read[T: _Body](self, exchange: Exchange, kind: type[T]) -> tuple[Caller, Engine, T]:
        """The same, and what they ask; nothing is read from who may not call."""
        caller, _ = self._enter(exchange)
        request = decode(await exchange.read_json(self._max_body), kind)
        exchange.path_of = functools.partial(field_path, request)
        engine = self._calls.engine()  # once more: the server may shut down by now
        if request.model is not None:
            _check_model(engine, request.model)
        return caller, engine, request

    def _describe(self, engine: Engine) -> dict[str, Any]:
        model = engine.model_info()
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "octavo",
            "max_model_len": model.max_model_len,
        }


class _Endpoint:
    """A route as an application of its own, for it has to notice that its client leaves."""

    def __init__(self, calls: Calls, method: str, handle: _Handler):
        self._calls = calls
        self._method = method  # empty: any
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_allowed = scope["method"] in (self._method or scope["method"], "HEAD")
        is_allowed &= scope["method"] != "HEAD" or self._method != "POST"
        exchange = Exchange(self._calls, scope, receive, send)
        await exchange.run(self._handle if is_allowed else self._refuse)

    async def _refuse(self, exchange: Exchange) -> None:
        request = exchange.request
        raise HttpRefused(
            405,
            f"{request.url.path} is not for {request.method}; use {self._method}",
            headers={"allow": self._method},
        )


async def _version(exchange: Exchange) -> None:
    await _reply(exchange, {"version": __version__})


async def _nothing(exchange: Exchange) -> None:
    raise HttpRefused(
        404,
        f"there is no {exchange.request.url.path:.200}; this server has /v1/completions, "
        "/v1/chat/completions and /v1/models",
    )


async def _misplaced(exchange: Exchange) -> None:
    path = exchange.request.url.path
    raise HttpRefused(
        404, f"there is no {path}; the API is under /v1: end the base URL with it (/v1{path})"
    )


async def _reply(exchange: Exchange, answer: dict[str, Any]) -> None:
    await exchange.reply(msgspec.json.encode(answer))


def _check_model(engine: Engine, name: str) -> None:
    served = engine.model_info().name
    if name != served:
        raise HttpRefused(
            404,
            f"the model {name!r:.80} is not served here; this server has {served!r}",
            code="model_not_found",
        )
