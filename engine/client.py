"""An asynchronous client for ``octavo.v1.Generation``: prompts in, a stream of deltas out.

It imports neither jax nor the engine, so it starts fast and runs anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any, Self

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.credentials import Credentials, CredentialsError
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.rpc.octavo.v1 import generation_pb2_grpc, operations_pb2, operations_pb2_grpc
from engine.sampling import InvalidRequest, SamplingParams
from engine.serve import convert
from engine.types import BeamScore, FinishReason, TokenLogprobs
from engine.unreachable import check_address, why_unavailable

DEFAULT_ADDRESS = "127.0.0.1:50051"
_DETAILS_KEY = "grpc-status-details-bin"

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class ServiceError(RuntimeError):
    """A call failed.

    Attributes:
      code: the gRPC status.
      details: the server's message: what was given, the limit and the way out.
      violations: (field, what is wrong with it) pairs of an INVALID_ARGUMENT.
      retry_after: seconds after which it may be tried again, if the server said so.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        details: str,
        violations: tuple[tuple[str, str], ...] = (),
        retry_after: float | None = None,
    ):
        super().__init__(f"{details} ({code.name})")
        self.code = code
        self.details = details
        self.violations = violations
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
    """Part of an answer; the parts of a stream with the same index, joined, are the whole.

    Attributes:
      request_id: the request's name, as `AsyncClient.abort` takes it.
      index: which of sampling.n answers it belongs to, from 0.
      text: text since the last delta, in whole characters.
      token_ids: tokens since the last delta; text may lag behind them.
      logprobs: one a token, if asked for.
      prompt_logprobs: one a prompt token after the first, if asked for, in the first deltas.
      finish_reason: why the answer ended; on its last delta only.
      stop_reason: the stop string or stop token id that ended it, else None.
      prompt_tokens, cached_tokens, completion_tokens: tokens so far.
      waited_seconds: on its last delta, how long it was in the queue.
      waited_for: on its last delta, what held the head of the queue back meanwhile, the longest
        first; see `GenerateResponse.waited_for` in the proto.
      beam: how likely the answer is, if beam search found it; index 0 is the best.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    waited_seconds: float | None = None
    waited_for: tuple[str, ...] = ()
    beam: BeamScore | None = None


class AsyncClient:
    """A connection to a server; use it as an async context manager.

    ```python
    import asyncio
    from engine.client import AsyncClient

    async def main():
        async with AsyncClient("127.0.0.1:50051") as client:
            async for delta in client.generate("The capital of France is", max_tokens=16):
                print(delta.text, end="", flush=True)

    asyncio.run(main())
    ```

    A chat is a list of messages: `client.generate([{"role": "user", "content": "Hello"}])`.
    One client serves any number of streams at once. Leaving a stream early cancels it.

    Args:
      address: `host:port` of the server.
      credentials: an API key, TLS; by default neither.

    Every method raises ServiceError when the call fails, and `engine.sampling.InvalidRequest`
    when it can't even be sent. Entering it raises CredentialsError if a key would travel in the
    clear or a file of the credentials can't be used, and ValueError if the address can't be one.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, credentials: Credentials | None = None):
        self._address = address
        self._credentials = credentials or Credentials()
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        # The server is trusted with the size of its answers: log-probabilities may be large.
        options = [("grpc.max_receive_message_length", -1)]
        check_address(self._address)
        self._credentials.check_address(self._address)
        secure = self._credentials.for_grpc()
        if secure is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(self._address, secure, options=options)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int | None = None,
        cache_salt: str | None = None,
        share_prefix: bool | None = None,
        timeout: float | None = None,
        **sampling_fields: Any,
    ) -> AsyncGenerator[Delta]:
        """Stream the continuation of a prompt.

        Args:
          prompt: text, token ids, or a chat as a list of {"role": …, "content": …}.
          sampling: how tokens are chosen; or give its fields as keyword arguments.
          request_id: names the request for `abort`; the server chooses one if left out.
          priority: lower runs first.
          cache_salt: share cached prefixes only with requests of the same salt.
          share_prefix: False uses no other request's prefix, and leaves none to others.
          timeout: seconds for the whole answer; then the call fails (DEADLINE_EXCEEDED).
        """
        if sampling is not None and sampling_fields:
            raise TypeError("give sampling, or its fields as keyword arguments, but not both")
        request = convert.request_to_proto(
            prompt,
            sampling or SamplingParams(**sampling_fields),
            **_given(
                request_id=request_id,
                priority=priority,
                cache_salt=cache_salt,
                share_prefix=share_prefix,
            ),
        )
        metadata = self._credentials.metadata
        call = self._stub().Generate(request, timeout=timeout, metadata=metadata)
        try:
            with self._errors():
                async for response in call:
                    yield _delta(response)
        finally:
            call.cancel()  # no effect on a call that has ended

    async def tokenize(
        self, prompt: str | Sequence[Mapping[str, str]], *, add_special_tokens: bool | None = None
    ) -> tuple[int, ...]:
        """The token ids of a text, or of a chat after the model's template."""
        with convert.unsendable_as_invalid():
            request = pb.TokenizeRequest(**_given(add_special_tokens=add_special_tokens))
            if isinstance(prompt, str):
                request.text = prompt
            else:
                request.messages.CopyFrom(convert.messages_to_proto(prompt))
        return tuple((await self._call("Tokenize", request)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None
    ) -> str:
        """The text of token ids."""
        with convert.unsendable_as_invalid():
            request = pb.DetokenizeRequest(
                token_ids=token_ids, **_given(skip_special_tokens=skip_special_tokens)
            )
        return (await self._call("Detokenize", request)).text

    async def model_info(self) -> pb.GetModelInfoResponse:
        """Which model is served, and its limits; the proto file documents the fields."""
        return await self._call("GetModelInfo", pb.GetModelInfoRequest())

    async def usage(self, *, cache_salt: str | None = None) -> pb.GetUsageResponse:
        """What one's own requests with this salt came to; see the proto file."""
        request = pb.GetUsageRequest(**_given(cache_salt=cache_salt))
        return await self._call("GetUsage", request)

    async def stats(self) -> pb.GetStatsResponse:
        """What the engine is doing, and counts since it started, for all callers together.

        See the proto file. The server shows it to operators, and with `server.public_stats` to all.
        """
        return await self._call("GetStats", pb.GetStatsRequest())

    async def flush(self, cache_salt: str | None = None) -> int:
        """Forget what requests of that salt left in the server's cache.

        Returns how many blocks were given up; what running requests hold goes when they end.
        """
        with convert.unsendable_as_invalid():
            request = pb.FlushCacheRequest(**_given(cache_salt=cache_salt))
        return (await self._call("FlushCache", request)).blocks

    async def abort(self, request_id: str) -> bool:
        """End a request, from whichever client. Returns whether it was running."""
        request = pb.AbortRequest(request_id=request_id)
        return (await self._call("Abort", request)).aborted

    async def pause(self) -> None:
        """Have the server begin no step any more. For operators.

        Requests wait where they are, and new ones queue. Returns when the device is at rest.
        """
        await self._call("Pause", operations_pb2.PauseRequest(), self._operations())

    async def resume(self) -> None:
        """Have the server go on where a pause came in. For operators."""
        await self._call("Resume", operations_pb2.ResumeRequest(), self._operations())

    async def reload(self) -> operations_pb2.ReloadResponse:
        """Have the server read its weights again, and go on with them; see the proto file. For
        operators."""
        return await self._call("Reload", operations_pb2.ReloadRequest(), self._operations())

    async def is_ready(self) -> bool:
        """Whether a server is there and serves."""
        stub: Any = health_pb2_grpc.HealthStub(self._open_channel())
        try:
            response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
        except grpc.aio.AioRpcError:
            return False
        return response.status == health_pb2.HealthCheckResponse.SERVING

    def _open_channel(self) -> grpc.aio.Channel:
        if self._channel is None:
            raise RuntimeError("the client is not connected; use `async with AsyncClient(…)`")
        return self._channel

    def _stub(self) -> Any:
        return generation_pb2_grpc.GenerationStub(self._open_channel())

    def _operations(self) -> Any:
        return operations_pb2_grpc.OperationsStub(self._open_channel())

    async def _call(self, method: str, request: Any, stub: Any = None) -> Any:
        with self._errors():
            call = getattr(stub or self._stub(), method)
            return await call(request, metadata=self._credentials.metadata)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise _service_error(error, self._address, self._credentials) from None


def _given(**fields: Any) -> dict[str, Any]:
    """The fields that are not None: an unset field takes the server's default."""
    return {name: value for name, value in fields.items() if value is not None}


def _delta(response: pb.GenerateResponse) -> Delta:
    match response.WhichOneof("stop_reason"):
        case "stop_text":
            stop_reason: str | int | None = response.stop_text
        case "stop_token_id":
            stop_reason = response.stop_token_id
        case _:
            stop_reason = None
    try:
        finish_reason = convert.finish_reason_from_proto(response)
    except ValueError as error:
        raise ServiceError(grpc.StatusCode.INTERNAL, str(error)) from None
    return Delta(
        request_id=response.request_id,
        index=response.index,
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=tuple(map(convert.logprobs_from_proto, response.logprobs)),
        prompt_logprobs=tuple(map(convert.logprobs_from_proto, response.prompt_logprobs)),
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        prompt_tokens=response.usage.prompt_tokens,
        cached_tokens=response.usage.cached_tokens,
        completion_tokens=response.usage.completion_tokens,
        waited_seconds=response.waited_seconds if response.HasField("waited_seconds") else None,
        waited_for=tuple(response.waited_for),
        beam=convert.beam_from_proto(response),
    )


def _service_error(
    error: grpc.aio.AioRpcError, address: str, credentials: Credentials
) -> ServiceError:
    """What went wrong, with the details that the server attached."""
    code, message = error.code(), error.details() or error.code().name
    packed = dict(error.trailing_metadata() or ()).get(_DETAILS_KEY)
    if not isinstance(packed, bytes):
        # gRPC's own words, not the server's.
        if code is grpc.StatusCode.UNAVAILABLE:
            message = why_unavailable(message, address, credentials)
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = "the time for the call passed; allow more of it or ask for fewer tokens"
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            message = f"the server at {address} is not an Octavo server: {message}"
        return ServiceError(code, message)
    violations: list[tuple[str, str]] = []
    retry_after = None
    for detail in status_pb2.Status.FromString(packed).details:
        bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad_request):
            violations += [(each.field, each.description) for each in bad_request.field_violations]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    return ServiceError(code, message, tuple(violations), retry_after)


__all__ = [
    "AsyncClient",
    "Credentials",
    "CredentialsError",
    "Delta",
    "InvalidRequest",
    "SamplingParams",
    "ServiceError",
]
