"""The servers under test, as an attacker sees them: prompts in, times and counts out.

A target sends what any client may send and reports what any client may see. What a server says
is not trusted: it is bounded in size and in time, and nothing of it is followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, Self

import grpc
import grpc.aio
from google.protobuf.message import Message

from engine.leakcheck.addresses import Address, LeakcheckError
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.rpc.octavo.v1 import generation_pb2_grpc

type Clock = Callable[[], float]
type Prompt = str | tuple[int, ...]

MAX_MESSAGE = 4 * 2**20  # bytes that a server may send at once, or in an answer
MAX_KEYS = 100  # of a map that are looked at
MAX_QUOTED = 300  # characters of a server's own words in a message
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_IDLE_POLLS = 200
_IDLE_SECONDS = 0.005

_CLOCKS = {"uptime_seconds"}  # figures that only say how late it is
_REFUSALS = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Tenant:
    """Who sends a request.

    Attributes:
      salt: the request's `cache_salt`; None leaves it out.
      key: sent as a bearer token (RFC 6750); None sends no authorization. Never shown.
    """

    salt: str | None = None
    key: str | None = dataclasses.field(default=None, repr=False)


class Reply(NamedTuple):
    """What the sender of a prompt sees of the answer's first token.

    Attributes:
      seconds: from the request to the first token.
      cached_tokens: tokens of the prompt that the usage says were cached; None if it doesn't say.
      prompt_tokens: the prompt's length by the usage; None if it doesn't say.
    """

    seconds: float
    cached_tokens: int | None
    prompt_tokens: int | None


class Target(Protocol):
    """A server under test; use it as an async context manager. Calls raise LeakcheckError."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def describe(self, tenant: Tenant, prompt_tokens: int) -> str:
        """Which server and model answer; raises if they don't, or don't take such prompts."""
        ...

    def fresh_prompt(self) -> Prompt:
        """A prompt that nobody has ever sent, nor any other prompt with its beginning.

        It is drawn from the system's randomness and not from the seed: a second run with the
        same seed would find the prompts of the first one in the cache.
        """
        ...

    async def send(self, prompt: Prompt, tenant: Tenant) -> Reply:
        """Ask for one token."""
        ...

    async def metrics(self, tenant: Tenant) -> Mapping[str, float] | None:
        """All figures that this tenant can read, or None if there are none."""
        ...


def quoted(words: object) -> str:
    """A server's own words, as they may stand in a message: in part, and unable to steer a
    terminal."""
    text = words.decode("utf-8", "replace") if isinstance(words, bytes) else str(words)
    return " ".join(_CONTROLS.sub(" ", text[: 2 * MAX_QUOTED]).split())[:MAX_QUOTED]


def numbers_in(message: Message) -> dict[str, float]:
    """Every number of a message but clocks, by its field's name, and by its key in a map, or by its
    place in a list.

    They are read from the message's description, so that a figure which is new is watched too.
    """
    numbers: dict[str, float] = {}
    for field in message.DESCRIPTOR.fields:
        value: Any = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            keys = sorted(value)[:MAX_KEYS]
            numbers |= {f"{field.name}[{quoted(key)}]": float(value[key]) for key in keys}
        elif field.message_type is not None and not field.is_repeated:
            inner = numbers_in(value)
            numbers |= {f"{field.name}.{name}": number for name, number in inner.items()}
        elif field.is_repeated and field.message_type is None:
            listed = [number for number in value[:MAX_KEYS] if isinstance(number, int | float)]
            numbers |= {f"{field.name}[{i}]": float(number) for i, number in enumerate(listed)}
        elif isinstance(value, int | float) and field.name not in _CLOCKS:
            numbers[field.name] = float(value)
    return numbers


class GrpcTarget:
    """A server of ours. Prompts are random token ids.

    It speaks the protocol itself instead of through `engine.client`: an attacker is not bound to
    a client's manners, and credentials and times are to be exact.

    Args:
      address: of kind `grpc`.
      timeout: seconds for a call.
      clock: seconds; what the first token is timed with.
      secure: for TLS; None: without.
    """

    def __init__(
        self,
        address: Address,
        timeout: float,
        clock: Clock = time.perf_counter,
        *,
        secure: grpc.ChannelCredentials | None = None,
    ):
        self._secure = secure
        self._address = address
        self._timeout = timeout
        self._clock = clock
        self._channel: grpc.aio.Channel | None = None
        self._num_tokens = 0
        self._vocab_size = 0

    async def __aenter__(self) -> Self:
        options: list[tuple[str, Any]] = [
            ("grpc.enable_http_proxy", 0),  # through a proxy, loopback would be another machine
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.default_authority", self._address.netloc),
        ]
        if self._secure is None:
            self._channel = grpc.aio.insecure_channel(self._address.endpoint, options=options)
        else:  # the certificate is checked against the host's name
            options.append(("grpc.ssl_target_name_override", self._address.host))
            self._channel = grpc.aio.secure_channel(
                self._address.endpoint, self._secure, options=options
            )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def describe(self, tenant: Tenant, prompt_tokens: int) -> str:
        """Read the model's limits; prompts are as long as asked from here on."""
        with self._errors():
            info = await self._call("GetModelInfo", pb.GetModelInfoRequest(), tenant)
        if prompt_tokens >= info.max_model_len:
            raise LeakcheckError(
                f"--prompt-tokens is {prompt_tokens}, but {quoted(info.name)} takes prompts "
                f"of at most {info.max_model_len - 1} tokens; ask for fewer"
            )
        if info.architecture.vocab_size < 2:
            raise LeakcheckError(f"{self._address} names a model without a vocabulary")
        self._num_tokens, self._vocab_size = prompt_tokens, info.architecture.vocab_size
        return f"{quoted(info.name)} on Octavo {quoted(info.server_version)}"

    def fresh_prompt(self) -> Prompt:
        return tuple(secrets.randbelow(self._vocab_size) for _ in range(self._num_tokens))

    async def send(self, prompt: Prompt, tenant: Tenant) -> Reply:
        assert not isinstance(prompt, str)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(max_tokens=1, temperature=0),
        )
        if tenant.salt is not None:
            request.cache_salt = tenant.salt
        seconds, usage = None, pb.Usage()
        with self._errors():
            start = self._clock()
            async for response in self._call("Generate", request, tenant):
                if response.token_ids and seconds is None:
                    seconds = self._clock() - start
                usage = response.usage
        if seconds is None:
            raise LeakcheckError(f"{self._address} ended an answer without a token; see its log")
        return Reply(seconds, usage.cached_tokens, usage.prompt_tokens)

    async def metrics(self, tenant: Tenant) -> Mapping[str, float] | None:
        """GetUsage and GetStats, as far as they are shown, once nothing runs: counts follow a
        request's last token within a step."""
        usage = pb.GetUsageRequest()
        if tenant.salt is not None:
            usage.cache_salt = tenant.salt
        calls = {"GetUsage": usage, "GetStats": pb.GetStatsRequest()}
        figures: dict[str, float] = {}
        for method, request in calls.items():
            for _ in range(_IDLE_POLLS):
                found = await self._figures(method, request, tenant)
                if not any(found.get(name) for name in ("in_progress", "running", "waiting")):
                    break
                await asyncio.sleep(_IDLE_SECONDS)
            figures |= {f"{method}.{name}": figure for name, figure in found.items()}
        return figures or None

    async def _figures(self, method: str, request: Any, tenant: Tenant) -> dict[str, float]:
        """Every number in an answer, by name; none if the server doesn't answer this tenant."""
        try:
            return numbers_in(await self._call(method, request, tenant))
        except grpc.aio.AioRpcError as error:
            if error.code() in _REFUSALS:
                return {}
            raise self._failure(error) from None

    def _call(self, method: str, request: Any, tenant: Tenant) -> Any:
        assert self._channel is not None
        stub: Any = generation_pb2_grpc.GenerationStub(self._channel)
        metadata = [] if tenant.key is None else [("authorization", f"Bearer {tenant.key}")]
        return getattr(stub, method)(request, timeout=self._timeout, metadata=metadata)

    @contextlib.contextmanager
    def _errors(self) -> Any:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from None

    def _failure(self, error: grpc.aio.AioRpcError) -> LeakcheckError:
        words = quoted(error.details() or "")
        match error.code():
            case grpc.StatusCode.UNAVAILABLE:
                why = f"no server is ready at {self._address} ({words}); start it, or wait for it"
            case grpc.StatusCode.UNIMPLEMENTED:
                why = (
                    f"{self._address} is not an Octavo server ({words}); write an "
                    "OpenAI-compatible one as http://host:port/v1"
                )
            case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
                why = (
                    f"{self._address} refused the credentials ({words}); give those of two tenants "
                    "with --victim-key and --attacker-key"
                )
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                why = (
                    f"{self._address} took over {self._timeout:g} s for a call; allow more with "
                    "--timeout, or ask for less with --prompt-tokens and --burst"
                )
            case code:
                why = f"{self._address} failed a call: {words} ({code.name})"
        return LeakcheckError(why)
