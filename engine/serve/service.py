"""The calls of ``octavo.v1.Generation``, over an engine that may still be loading.

A stream holds its request: however the call ends (read to the end, cancelled, deadline,
lost connection), the engine's stream is closed, and with that every cache block returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from engine import __version__
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.sampling import InvalidRequest
from engine.serve import convert
from engine.serve.errors import Refused
from engine.types import Domain, FinishReason

if TYPE_CHECKING:
    from engine.frontend import Delta, Engine

log = logging.getLogger("octavo.serve")

TENANT = Domain().tenant  # of all callers, until there is authentication
SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Generation"].full_name


def domain_of(
    context: grpc.aio.ServicerContext,
    request: pb.GenerateRequest | pb.GetUsageRequest | pb.FlushCacheRequest,
) -> Domain:
    """Who may share cached blocks with this request, and whose figures a caller may see.

    The tenant is to come from who is authenticated; the client's salt can only narrow the sharing.
    """
    del context  # authentication will read it
    return Domain(TENANT, convert.cache_salt_from_proto(request))


class GenerationService:
    """Serves the calls; raises exceptions that `ErrorInterceptor` turns into statuses.

    Not a subclass of the generated servicer: its defaults answer UNIMPLEMENTED, while a call
    that is missing here fails when the server starts.

    Args:
      max_concurrent: calls of Generate, Tokenize, Detokenize and FlushCache in progress at once,
        those included whose client left while work for them goes on.
      public_stats: whether every caller is shown GetStats.
    """

    def __init__(self, max_concurrent: int, *, public_stats: bool = False):
        self._public_stats = public_stats
        self._max_concurrent = max_concurrent
        self._engine: Engine | None = None
        self._shutting_down = False
        self._num_calls = 0
        self._streams: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def set_engine(self, engine: Engine) -> None:
        """Begin to serve."""
        self._engine = engine

    def shut_down(self) -> None:
        """Refuse new calls; those in progress go on."""
        self._shutting_down = True

    def abort_streams(self) -> None:
        """Abort every request in progress."""
        if self._engine is not None:
            for request_id in tuple(self._streams):
                self._engine.abort(request_id)

    async def wait_idle(self, timeout: float) -> bool:
        """Whether all calls ended within `timeout` seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        # Responses are written from here, not yielded: a cancelled call then always raises
        # inside this frame, and never leaves the engine's stream to the garbage collector.
        engine = self._ready_engine()
        convert.refuse_unknown_fields(request)
        with self._call(), self._stream(convert.request_id_from_proto(request)) as request_id:
            model = engine.model_info()
            stream = engine.generate(
                convert.prompt_from_proto(request, model.max_model_len),
                convert.sampling_from_proto(request.sampling, model.architecture.vocab_size),
                request_id=request_id,
                domain=domain_of(context, request),
                share_prefix=not request.HasField("share_prefix") or request.share_prefix,
                priority=request.priority,
                timeout=context.time_remaining(),
            )
            reasons: set[FinishReason] = set()
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    await _write(context, request_id, delta)
                    if delta.finish_reason is not None:
                        reasons.add(delta.finish_reason)
            self._check_end(request_id, reasons)

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        engine = self._ready_engine()
        convert.refuse_unknown_fields(request)
        tokenizer = engine.tokenizer

        def encode() -> list[int]:
            match request.WhichOneof("input"):
                case "text":
                    is_set = request.HasField("add_special_tokens")
                    return tokenizer.encode(request.text, not is_set or request.add_special_tokens)
                case "messages":
                    if request.HasField("add_special_tokens"):
                        raise InvalidRequest(
                            "add_special_tokens",
                            "is for text only, as a chat template writes its own; leave it out",
                        )
                    messages = convert.messages_from_proto(request.messages)
                    return tokenizer.apply_chat_template(messages)
                case _:
                    raise InvalidRequest("input", "is missing; give text or messages")

        return pb.TokenizeResponse(token_ids=await self._on_thread(encode))

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        engine = self._ready_engine()
        convert.refuse_unknown_fields(request)
        vocab_size = engine.model_info().architecture.vocab_size
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens

        def decode() -> str:
            token_ids = list(request.token_ids)
            if token_ids and (largest := max(token_ids)) >= vocab_size:
                raise InvalidRequest(
                    f"token_ids[{token_ids.index(largest)}]",
                    f"{largest} is not in the vocabulary; token ids are from 0 to {vocab_size - 1}",
                )
            return engine.tokenizer.decode(token_ids, skip_special_tokens=skip)

        return pb.DetokenizeResponse(text=await self._on_thread(decode))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        convert.refuse_unknown_fields(request)
        return convert.model_info_to_proto(self._ready_engine().model_info(), __version__)

    async def GetUsage(
        self, request: pb.GetUsageRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetUsageResponse:
        convert.refuse_unknown_fields(request)
        engine = self._ready_engine(even_late=True)
        return convert.usage_to_proto(engine.usage(domain_of(context, request)))

    async def GetStats(
        self, request: pb.GetStatsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetStatsResponse:
        convert.refuse_unknown_fields(request)
        if not self._public_stats:  # until there is authentication, nobody is the operator
            raise Refused(
                grpc.StatusCode.PERMISSION_DENIED,
                "GetStats counts the requests of all callers together, so this server shows it to "
                "none; GetUsage has your own figures. To show it to all who reach the server, "
                "start that with --set server.public_stats=true",
            )
        return convert.stats_to_proto(self._ready_engine(even_late=True).stats())

    async def FlushCache(
        self, request: pb.FlushCacheRequest, context: grpc.aio.ServicerContext
    ) -> pb.FlushCacheResponse:
        convert.refuse_unknown_fields(request)
        domain, engine = domain_of(context, request), self._ready_engine()
        return pb.FlushCacheResponse(blocks=await self._to_its_end(lambda: engine.flush(domain)))

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        convert.refuse_unknown_fields(request)
        if not request.request_id:
            raise InvalidRequest("request_id", "is empty; name the request to end")
        engine = self._ready_engine(even_late=True)
        return pb.AbortResponse(aborted=engine.abort(request.request_id))

    def _ready_engine(self, *, even_late: bool = False) -> Engine:
        """The engine, or UNAVAILABLE. `even_late`: also while the server shuts down."""
        if self._shutting_down and not even_late:
            raise Refused(
                grpc.StatusCode.UNAVAILABLE, "the server is shutting down; try another one"
            )
        if self._engine is None:
            raise Refused(
                grpc.StatusCode.UNAVAILABLE,
                "the server is still loading its model; try again when its health is SERVING",
                retry_after=1.0,
            )
        return self._engine

    async def _on_thread[T](self, work: Callable[[], T]) -> T:
        """Do the text work of a call on a thread: megabytes take a second, and streams go on."""
        loop = asyncio.get_running_loop()
        return await self._to_its_end(lambda: loop.run_in_executor(None, work))

    async def _to_its_end[T](self, begin: Callable[[], Awaitable[T]]) -> T:
        """Do work that can't be stopped half-way.

        The call is in progress until the work ends, not until its client leaves: clients that
        call and cancel could pile up work without end.
        """

        def end(work: asyncio.Future[T]) -> None:
            self._end_call()
            _ = work.cancelled() or work.exception()  # its client may not be there to hear of it

        self._begin_call()
        work = asyncio.ensure_future(begin())
        work.add_done_callback(end)
        return await asyncio.shield(work)

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """Count a call while it is in progress."""
        self._begin_call()
        try:
            yield
        finally:
            self._end_call()

    def _begin_call(self) -> None:
        """Count a call, or refuse it above the limit; `_end_call` must follow."""
        if self._num_calls >= self._max_concurrent:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._num_calls} calls are in progress, and this server takes no more at once "
                "(server.max_concurrent); try again later",
                retry_after=1.0,
            )
        self._num_calls += 1
        self._idle.clear()

    def _end_call(self) -> None:
        self._num_calls -= 1
        if not self._num_calls:
            self._idle.set()

    @contextlib.contextmanager
    def _stream(self, request_id: str | None) -> Iterator[str]:
        """Reserve the name of a request, or choose one, while its stream is open."""
        if request_id is None:
            request_id = uuid.uuid4().hex
        elif request_id in self._streams:
            raise Refused(
                grpc.StatusCode.ALREADY_EXISTS,
                f"a request named {request_id} is running; choose another request_id, or leave "
                "it out to let the server choose",
            )
        self._streams.add(request_id)
        try:
            yield request_id
        finally:
            self._streams.remove(request_id)

    def _check_end(self, request_id: str, reasons: set[FinishReason]) -> None:
        """Raise the status of a request of which an answer did not end well."""
        if FinishReason.ERROR in reasons or not reasons:
            log.error("request %s ended with %s", request_id, ", ".join(reasons) or "nothing")
            raise Refused(
                grpc.StatusCode.INTERNAL,
                f"the step that carried request {request_id} failed; the server's log says "
                "why, and the server goes on: try again",
            )
        if FinishReason.DEADLINE in reasons:
            raise Refused(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "the deadline of the call passed; allow more time or ask for fewer tokens",
            )
        if FinishReason.ABORT in reasons and self._shutting_down:
            raise Refused(
                grpc.StatusCode.UNAVAILABLE,
                "the server shut down before the answer was complete; try another one",
            )


async def _write(context: Any, request_id: str, delta: Delta) -> None:
    for response in convert.responses_from_delta(request_id, delta):
        await context.write(response)
