"""The calls of ``octavo.v1.Generation``, over an engine that may still be loading.

A stream holds its request: however the call ends (read to the end, cancelled, deadline,
lost connection), the engine's stream is closed, and with that every cache block returns.
"""

from __future__ import annotations

import contextlib

import grpc
import grpc.aio

from engine import __version__
from engine.observe.calls import answered_as
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.sampling import InvalidRequest
from engine.serve import convert
from engine.serve.access import Access
from engine.serve.calls import Calls
from engine.types import FinishReason

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Generation"].full_name
FIELD_PATHS = {pb.GenerateRequest: convert.field_path}


class GenerationService:
    """Serves the calls; raises exceptions that `ErrorInterceptor` turns into statuses.

    Not a subclass of the generated servicer: its defaults answer UNIMPLEMENTED, while a call
    that is missing here fails when the server starts.

    Args:
      calls: what it shares with the other front ends. Generate, Tokenize, Detokenize and FlushCache
        count as calls.
      access: tells callers apart.
      public_stats: whether every caller is shown GetStats.
    """

    def __init__(self, calls: Calls, access: Access, *, public_stats: bool = False):
        self._calls = calls
        self._access = access
        self._public_stats = public_stats

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        # Responses are written from here, not yielded: a cancelled call then always raises
        # inside this frame, and never leaves the engine's stream to the garbage collector.
        engine, caller = self._calls.engine(), self._access.caller(context)
        convert.refuse_unknown_fields(request)
        request_id = convert.request_id_from_proto(request)
        priority = request.priority if request.HasField("priority") else None
        priority = caller.check_priority(priority)
        if request.HasField("messages"):
            answered_as("chat")
        with (
            self._calls.call(caller),
            self._calls.stream(caller, request_id) as (request_id, name),
        ):
            model = engine.model_info()
            stream = engine.generate(
                convert.prompt_from_proto(request, model.max_model_len),
                convert.sampling_from_proto(request.sampling, model.architecture.vocab_size),
                request_id=name,
                domain=caller.domain(convert.cache_salt_from_proto(request)),
                share_prefix=not request.HasField("share_prefix") or request.share_prefix,
                priority=priority,
                timeout=context.time_remaining(),
            )
            reasons: set[FinishReason] = set()
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    for response in convert.responses_from_delta(request_id, delta):
                        await self._calls.taken(context.write(response))
                    if delta.finish_reason is not None:
                        reasons.add(delta.finish_reason)
            self._calls.check_end(request_id, reasons)

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        engine, caller = self._calls.engine(), self._access.caller(context)
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

        return pb.TokenizeResponse(token_ids=await self._calls.on_thread(caller, encode))

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        engine, caller = self._calls.engine(), self._access.caller(context)
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

        return pb.DetokenizeResponse(text=await self._calls.on_thread(caller, decode))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        convert.refuse_unknown_fields(request)
        return convert.model_info_to_proto(self._calls.engine().model_info(), __version__)

    async def GetUsage(
        self, request: pb.GetUsageRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetUsageResponse:
        convert.refuse_unknown_fields(request)
        engine = self._calls.engine(even_late=True)
        domain = self._access.caller(context).domain(convert.cache_salt_from_proto(request))
        return convert.usage_to_proto(engine.usage(domain))

    async def GetStats(
        self, request: pb.GetStatsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetStatsResponse:
        convert.refuse_unknown_fields(request)
        caller = self._access.caller(context)
        engine = self._calls.engine(even_late=True)
        if not self._public_stats:
            caller.check_sees_all(engine, "GetStats")
        return convert.stats_to_proto(engine.stats())

    async def FlushCache(
        self, request: pb.FlushCacheRequest, context: grpc.aio.ServicerContext
    ) -> pb.FlushCacheResponse:
        convert.refuse_unknown_fields(request)
        engine, caller = self._calls.engine(), self._access.caller(context)
        domain = caller.domain(convert.cache_salt_from_proto(request))
        blocks = await self._calls.to_its_end(caller, lambda: engine.flush(domain))
        return pb.FlushCacheResponse(blocks=blocks)

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        convert.refuse_unknown_fields(request)
        if not request.request_id:
            raise InvalidRequest("request_id", "is empty; name the request to end")
        caller = self._access.caller(context)
        return pb.AbortResponse(aborted=self._calls.abort(caller, request.request_id))
