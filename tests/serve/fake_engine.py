"""An engine without a model: it echoes the prompt, and remembers what it was asked.

A token is a byte. Prompts that say `forever` repeat until they are stopped, so that
tests decide when a stream ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from engine.config import Architecture, CacheConfig, Config, ModelConfig
from engine.domain_usage import DomainUsage
from engine.frontend import Delta, Engine, EngineStats, ModelInfo, Prompt, Usage
from engine.life import Life
from engine.observe.histogram import Buckets
from engine.observe.requests import RequestFigures
from engine.runtime.kv_events import KvEvents
from engine.sampling import SamplingParams
from engine.types import Domain, FinishReason, TokenLogprobs

VOCAB_SIZE = 258
BOS, EOS = 256, 257


class FakeTokenBytes:
    strips_leading_space = False

    def __getitem__(self, token: int) -> bytes:
        return {BOS: b"<bos>", EOS: b"<eos>"}.get(token) or bytes([token])


class FakeTokenizer:
    token_bytes = FakeTokenBytes()
    special_ids = frozenset((BOS, EOS))
    special_tokens = {"bos": "<bos>", "eos": "<eos>"}  # noqa: RUF012
    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, None
    chat_template = "{{ messages }}"

    def id_to_token(self, token: int) -> str:
        return self.token_bytes[token].decode()

    def to_json(self) -> str:
        return '{"model": "bytes"}'

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        special = {BOS: "<bos>", EOS: "<eos>"}
        kept = [i for i in ids if not (skip_special_tokens and i in special)]
        return "".join(special.get(i) or chr(i) for i in kept)

    def apply_chat_template(self, messages: Any) -> list[int]:
        return [BOS, *"".join(f"{m.role}:{m.content}\n" for m in messages).encode()]


@dataclasses.dataclass(frozen=True)
class Call:
    """What `generate` was given."""

    prompt: Any
    sampling: SamplingParams
    request_id: str | None
    domain: Domain | None
    share_prefix: bool
    priority: int
    timeout: float | None
    with_text: bool = True


class FakeLife(Life):
    """A life as tests want it.

    Attributes:
      is_lost: as `Life.is_lost`.
      trouble: as `Life.trouble`.
      limits: what `watch` was told.
    """

    is_lost = False
    trouble: str | None = None
    is_paused = False

    def __init__(self) -> None:
        self.limits: dict[str, float] = {}

    def watch(self, **limits: float) -> None:
        self.limits = limits

    async def pause(self) -> None:
        self.is_paused = True

    async def resume(self) -> None:
        self.is_paused = False


class FakeEngine(Engine):
    """Overrides what the service uses of an engine, so that types are checked against it.

    Attributes:
      calls: every call of `generate`.
      running: ids of the streams that are open (those that would hold blocks).
      finished: how streams ended; `closed` counts those whose consumer went away.
      error: raised by `generate`, if set.
      ending, stop_reason: how every answer ends, if set.
      padding: added to the text of every delta.
      yielded: deltas given so far.
      life: pauses, and whether it is well.
      reloading: what `reload` raises or returns, once `exchanging` is set.
      flushed: whose flushes began; they end only while `flushing` is set.
      kv_events: what its cache holds, which tests say.
    """

    def __init__(self) -> None:
        self.tokenizer: Any = FakeTokenizer()
        self.config = Config(model=ModelConfig(source="none"), cache=CacheConfig(num_blocks=8))
        self.kv_events: KvEvents | None = None
        self.calls: list[Call] = []
        self.running: dict[str, asyncio.Event] = {}
        self.finished: Counter[str] = Counter()
        self.error: Exception | None = None
        self.ending: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.padding = ""
        self.yielded = 0
        self.is_closed = False
        self.life = FakeLife()
        self.reloading: Exception | bool = True
        self.exchanging = asyncio.Event()
        self.exchanging.set()
        self.flushed: list[Domain | None] = []
        self.flushing = asyncio.Event()
        self.flushing.set()
        self.requests = RequestFigures()

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        domain: Domain | None = None,
        share_prefix: bool = True,
        priority: int = 0,
        timeout: float | None = None,
        with_text: bool = True,
    ) -> AsyncGenerator[Delta]:
        assert request_id is not None
        assert sampling is not None
        self.calls.append(
            Call(prompt, sampling, request_id, domain, share_prefix, priority, timeout, with_text)
        )
        if self.error is not None:
            raise self.error
        ids = self._encode(prompt)
        self._count(domain, len(ids))
        forever = "forever" in self.tokenizer.decode(ids)
        limit = sampling.max_tokens or (2**31 if forever else len(ids))
        aborted = self.running[request_id] = asyncio.Event()
        try:
            for number in range(limit * sampling.n):
                count, index = number // sampling.n + 1, number % sampling.n
                if index == 0:
                    await asyncio.sleep(0.001)
                token = ids[(count - 1) % len(ids)]
                reason = None
                if aborted.is_set():
                    reason = FinishReason.ABORT
                elif count == limit:
                    reason = self.ending or FinishReason.LENGTH
                self.yielded += 1
                self._count(domain, 1)
                wants = sampling.prompt_logprobs is not None and number == 0
                yield Delta(
                    index=index,
                    text=self.tokenizer.decode([token]) + self.padding,
                    token_ids=(token,),
                    logprobs=(_logprobs(token),) if sampling.logprobs is not None else (),
                    prompt_logprobs=tuple(map(_logprobs, ids[1:])) if wants else (),
                    finish_reason=reason,
                    stop_reason=self.stop_reason if reason else None,
                    usage=Usage(len(ids), len(ids) // 2, count),
                )
                if reason is not None:
                    self.finished[str(reason)] += 1
                    if index == sampling.n - 1:
                        return
        except (GeneratorExit, asyncio.CancelledError):
            self.finished["closed"] += 1
            raise
        finally:
            del self.running[request_id]

    def _count(self, domain: Domain | None, tokens: int) -> None:
        assert domain is not None
        self.requests.on_tokens(domain.tenant, tokens)

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=False)
        if isinstance(prompt[0], int):
            return list(prompt)
        return self.tokenizer.apply_chat_template(prompt)[1:]

    def abort(self, request_id: str) -> bool:
        if request_id not in self.running:
            return False
        self.running[request_id].set()
        return True

    def model_info(self) -> ModelInfo:
        architecture = Architecture(
            family="llama",
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=160,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            max_position=512,
            rope_theta=1e4,
        )
        return ModelInfo(
            name="echo",
            architecture=architecture,
            attention="xla",
            products="xla",
            dtype="float32",
            max_model_len=256,
            eos_token_ids=(EOS,),
            weights_fingerprint="00ff",
        )

    @property
    def is_alive(self) -> bool:
        return not self.is_closed

    def usage(self, domain: Domain) -> DomainUsage:
        """A number for each salt, so that the wrong domain shows."""
        number = len(domain.salt) if domain.tenant == "default" else 999
        return DomainUsage(0, number, number + 1, number + 2, {"stop": number + 3})

    def stats(self) -> EngineStats:
        """Every field differs, so that a swapped pair shows."""
        fields = dataclasses.fields(EngineStats)
        values: dict[str, Any] = {field.name: number for number, field in enumerate(fields, 1)}
        values |= {"finished": dict(self.finished), "held_steps": {"blocks": 3, "slots": 5}}
        for number, field in enumerate(fields, 1):
            if field.type == "Buckets":
                values[field.name] = Buckets((0.5, 1.0), (number, number + 1, 0), number / 2)
        return EngineStats(**values)

    async def flush(self, domain: Domain | None) -> int:
        self.flushed.append(domain)
        if self.error is not None:
            raise self.error
        await self.flushing.wait()
        return 7

    async def reload(self) -> bool:
        await self.exchanging.wait()
        if isinstance(self.reloading, Exception):
            raise self.reloading
        return self.reloading

    def abandon(self) -> None:
        """Streams of this engine end by themselves when they are aborted."""

    def close(self) -> None:
        self.is_closed = True


def _logprobs(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, ((token, -0.5), ((token + 1) % VOCAB_SIZE, -1.5)))


async def until(condition: Any) -> None:
    """Wait for a condition; pytest's own time limit ends a test that waits in vain."""
    while not condition():
        await asyncio.sleep(0.005)


async def collect(stream: AsyncIterator[Any], into: list[Any] | None = None) -> list[Any]:
    """Read a stream to its end; `into` keeps what came before an error."""
    into = [] if into is None else into
    async for part in stream:
        into.append(part)
    return into


def until_true(condition: Any) -> None:
    """The same, for tests without an event loop."""
    while not condition():
        time.sleep(0.005)
