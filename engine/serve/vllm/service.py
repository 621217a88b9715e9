"""The calls of ``vllm.grpc.engine.VllmEngine``, over an engine that may still be loading.

A gateway sends Abort when its client goes away and leaves the stream open, so Abort ends a stream;
it also asks, at any time, how the worker is. What other tenants do is shown to operators alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import common_pb2

from engine import __version__
from engine.sampling import InvalidRequest
from engine.serve.access import Access, Caller
from engine.serve.calls import Calls
from engine.serve.errors import Refused
from engine.serve.vllm import convert, kv_events, profiler
from engine.serve.vllm.kv_events import Subscriptions
from engine.serve.vllm.loads import Load, Loads, loads_to_proto
from engine.serve.vllm.profiler import Profiler
from engine.serve.vllm.responses import Responses
from engine.serve.vllm.tokenizer_archive import Archive, make_archive
from engine.types import Domain, FinishReason

if TYPE_CHECKING:
    from engine.frontend import Engine

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name
FIELD_PATHS = {pb.GenerateRequest: convert.field_path}

MAX_ABORTS = 1024  # requests that one Abort names
LOAD_SECTIONS = frozenset(("core", "all"))  # of GetLoads; there is one, and its other name
MAX_FLUSH_SECONDS = 300.0  # that FlushCache waits for requests to end
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class VllmService:
    """Serves the calls; raises exceptions that `ErrorInterceptor` turns into statuses.

    What asks for tokens or changes something is refused if it has fields that are not in our
    schema; what only asks how the worker is answers newer gateways too.

    Args:
      calls: what it shares with the other front ends.
      access: tells callers apart.
      public_stats: whether every caller is shown figures of all callers together.
      profile_dir: where traces go; None: there are none.
    """

    def __init__(
        self,
        calls: Calls,
        access: Access,
        *,
        public_stats: bool = False,
        profile_dir: str | None = None,
    ):
        self._calls = calls
        self._access = access
        self._public_stats = public_stats
        self._profiler = Profiler(profile_dir)
        self._loads = Loads()
        self._subscriptions = Subscriptions(self._read_load, calls.taken)
        self._archive: Archive | None = None
        self._making_archive = asyncio.Lock()
        self._last_received = 0.0  # seconds since 1970

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        # Responses are written from here, not yielded: see octavo.v1's Generate.
        engine, caller = self._calls.engine(), self._access.caller(context)
        self._last_received = time.time()
        convert.refuse_unsupported(request)
        request_id = convert.request_id_from_proto(request)
        sampling = convert.sampling_from_proto(request.sampling_params)
        with (
            self._calls.call(caller),
            self._calls.stream(caller, request_id) as (request_id, name),
        ):
            max_model_len = engine.model_info().max_model_len
            ids = await self._prompt_ids(engine, caller, request, max_model_len)
            room = max_model_len - len(ids)
            convert.check_logprobs(sampling, len(ids), room, stream=request.stream)
            responses = Responses(ids, stream=request.stream)
            stream = engine.generate(
                ids,
                sampling,
                request_id=name,
                domain=caller.domain(),
                priority=caller.check_priority(None),
                timeout=context.time_remaining(),
                with_text=False,
            )
            reasons: set[FinishReason] = set()
            with self._loads.pending(len(ids)) as has_begun:
                async with contextlib.aclosing(stream):
                    async for delta in stream:
                        has_begun()
                        for response in responses.of(delta):
                            await self._calls.taken(context.write(response))
                        if delta.finish_reason is not None:
                            reasons.add(delta.finish_reason)
            self._calls.check_end(request_id, reasons)

    async def Embed(
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> pb.EmbedResponse:
        raise Refused(
            grpc.StatusCode.UNIMPLEMENTED,
            "this server's models generate text and make no embeddings; use Generate",
        )

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        caller = self._access.caller(context)
        if (count := len(request.request_ids)) > MAX_ABORTS:
            raise InvalidRequest(
                "request_ids", f"has {count} entries, but at most {MAX_ABORTS} are taken at once"
            )
        convert.refuse_unserved(request, ("request_ids",))
        for request_id in request.request_ids:
            self._calls.abort(caller, request_id)
        return pb.AbortResponse()

    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        unready = self._calls.unready
        return pb.HealthCheckResponse(healthy=unready is None, message=unready or "serving")

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        self._access.caller(context)
        engine = self._calls.engine()
        model, tokenizer = engine.model_info(), engine.tokenizer
        return pb.GetModelInfoResponse(
            model_path=model.name,
            is_generation=True,
            max_context_length=model.max_model_len,
            vocab_size=model.architecture.vocab_size,
            served_model_name=model.name,
            # No path and no name on a hub: gateways then ask for the tokenizer by GetTokenizer.
            tokenizer_path=f"octavo:{model.name}",
            model_type=model.architecture.family,
            architectures=[_CLASSES[model.architecture.family]],
            eos_token_ids=model.eos_token_ids,
            pad_token_id=tokenizer.pad_token_id or 0,
            bos_token_id=tokenizer.bos_token_id or 0,
            max_req_input_len=model.max_model_len - 1,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        caller = self._access.caller(context)
        engine = self._calls.engine(even_late=True)
        config, model, stats = engine.config, engine.model_info(), self._loads.stats(engine)
        info = pb.GetServerInfoResponse(
            is_paused=engine.life.is_paused,
            uptime_seconds=stats.uptime_seconds,
            server_type=f"octavo {__version__}",
            data_parallel_size=1,
            kv_cache_dtype=config.cache.dtype or "auto",
            block_size=stats.block_size,
            attention_backend=model.attention,
            model_dtype=model.dtype,
            max_num_seqs=config.scheduler.max_num_seqs,
            constrained_decoding_start="first_token",
        )
        if self._public_stats or caller.sees_all(engine):
            info.active_requests = stats.running + stats.waiting
            info.last_receive_timestamp = self._last_received
        return info

    async def GetLoads(
        self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadsResponse:
        caller, engine = self._access.caller(context), self._calls.engine(even_late=True)
        if not self._public_stats:
            caller.check_sees_all(engine, "GetLoads")
        if request.dp_rank:
            raise InvalidRequest("dp_rank", f"is {request.dp_rank}; there is one rank, number 0")
        for section in request.include:
            if section not in LOAD_SECTIONS:
                raise InvalidRequest(
                    "include", f"{section!r:.40} is not told here; ask for core, which is all"
                )
        return loads_to_proto(self._loads.read(engine))

    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: grpc.aio.ServicerContext
    ) -> None:
        caller, engine = self._access.caller(context), self._calls.engine()
        async with self._making_archive:
            if self._archive is None:
                max_model_len = engine.model_info().max_model_len
                self._archive = await self._calls.on_thread(
                    caller, lambda: make_archive(engine.tokenizer, max_model_len)
                )
        for chunk in self._archive.chunks():
            await self._calls.taken(context.write(chunk))

    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: grpc.aio.ServicerContext
    ) -> None:
        caller, engine = self._access.caller(context), self._calls.engine()
        if engine.kv_events is None:  # gateways that hear this route by what they sent instead
            raise Refused(
                grpc.StatusCode.UNIMPLEMENTED,
                "this server tells nobody what its cache holds; start it with --set "
                "server.kv_events=hashes, or =tokens for a gateway that routes by prefix",
            )
        caller.check_operator("SubscribeKvEvents, which tells what everybody sent,")
        convert.refuse_unserved(request, kv_events.SERVED)
        is_apart = engine.config.cache.isolation == "domain"
        await self._subscriptions.serve(
            engine.kv_events,
            request,
            context,
            engine.config.cache.block_size,
            caller.domain() if is_apart else Domain(),
        )

    async def FlushCache(
        self, request: common_pb2.FlushCacheRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.FlushCacheResponse:
        caller, engine = self._access.caller(context), self._calls.engine()
        convert.refuse_unserved(request, ("timeout_s",))
        wait = convert.seconds_from_proto("timeout_s", request.timeout_s, MAX_FLUSH_SECONDS)
        tenant = None if caller.is_operator else caller.tenant
        with self._calls.call(caller):
            if not await self._calls.without_streams(tenant, wait):
                count = self._calls.num_streams(tenant)
                return common_pb2.FlushCacheResponse(
                    success=False,
                    message=f"{count} requests are in progress after {wait:g} s, and nothing "
                    "was flushed; set timeout_s to wait longer",
                )
            domain = None if caller.is_operator else caller.domain()
            blocks = await self._calls.to_its_end(
                caller, lambda: engine.flush(domain), counted=True
            )
        return common_pb2.FlushCacheResponse(
            success=True, message=f"{blocks} cached blocks were given up"
        )

    async def StartProfile(
        self, request: common_pb2.StartProfileRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.ProfileResponse:
        caller = self._access.caller(context)
        caller.check_operator("a profile")
        convert.refuse_unserved(request, profiler.SERVED | profiler.REFUSED.keys())
        self._calls.engine()
        self._profiler.check(request)
        return await self._calls.on_thread(caller, lambda: self._profiler.start(request))

    async def StopProfile(
        self, request: common_pb2.StopProfileRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.ProfileResponse:
        caller = self._access.caller(context)
        caller.check_operator("a profile")
        convert.refuse_unserved(request, ())
        return await self._calls.on_thread(caller, self._profiler.stop)

    def _read_load(self) -> Load:
        return self._loads.read(self._calls.engine())

    async def _prompt_ids(
        self, engine: Engine, caller: Caller, request: pb.GenerateRequest, max_model_len: int
    ) -> tuple[int, ...]:
        """The prompt as token ids; a text is tokenised on a thread."""
        prompt = convert.prompt_from_proto(request, max_model_len)
        if not isinstance(prompt, str):
            return prompt
        ids = await self._calls.on_thread(
            caller, lambda: engine.tokenizer.encode(prompt), counted=True
        )
        keep = convert.kept_tokens(request.sampling_params, max_model_len)
        if not ids:
            raise InvalidRequest("text", "has no tokens; give at least one")
        return tuple(ids if keep is None else ids[-keep:])
