"""The engine as its users see it: text or tokens in, a stream of deltas out.

Resolves requests (tokenise, defaults, limits), hands them to the step loop, and turns its
tokens into text on the caller's event loop: detokenising and stop strings cost the step loop
nothing. ``LLM`` and the gRPC service are both built on this.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

from engine.config import Architecture, Config
from engine.runtime.loop import EngineLoop, News, Rejected, StepRecord
from engine.text import (
    Detokenizer,
    Message,
    StopChecker,
    Tokenizer,
    bad_word_ids,
)
from engine.types import (
    Domain,
    FinishReason,
    InvalidRequest,
    Request,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from engine.loading import LoadedEngine

Prompt = str | tuple[int, ...] | tuple[Message, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request so far; `cached_tokens` of the prompt came from the cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one generation. The last has a finish reason; texts add up to the output.

    Attributes:
      text: new text; it may lag behind the tokens while a character or a possible stop string
        is incomplete.
      token_ids: new tokens, the stop token included.
      logprobs: one a token, if asked for.
      prompt_logprobs: with the first delta, if asked for: one a prompt token after the first.
      finish_reason: None while it goes on.
      stop_reason: the stop string or stop token that ended it, else None.
      usage: counts so far.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    usage: Usage


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model an engine serves."""

    name: str
    architecture: Architecture
    dtype: str
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    weights_fingerprint: str


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """Where an engine stands. Counts since the start unless they are of the present."""

    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    owned_blocks: int
    total_blocks: int
    block_size: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    cached_prompt_tokens: int
    preemptions: int
    padded_tokens: int
    computed_tokens: int
    compiles_after_warmup: int
    finished: dict[str, int]
    failed_steps: int
    uptime_seconds: float


class _Stream:
    """One request's news, between the step loop and the task that reads it.

    News pile up in `pending` only as far as the request's own tokens go, so a slow reader
    costs one tuple a token and gets them all in one delta.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer):
        sampling = request.sampling
        self.request = request
        self.pending: list[StepOutput | Rejected] = []
        self.arrived = asyncio.Event()
        self.event_loop = asyncio.get_running_loop()
        self.num_tokens = 0
        self._detokenizer = Detokenizer(tokenizer, request.prompt_ids, sampling.skip_special_tokens)
        self._stop_checker = StopChecker(sampling.stop)

    def take(self) -> Delta:
        """Everything that is pending as one delta. Raises the error of a rejection."""
        outputs, self.pending = self.pending, []
        self.arrived.clear()
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        text = ""
        finish_reason: FinishReason | None = None
        stop_reason: str | int | None = None
        for output in outputs:
            if isinstance(output, Rejected):
                raise output.error
            last = output
            token_ids.extend(output.token_ids)
            logprobs.extend(output.logprobs)
            prompt_logprobs = prompt_logprobs or output.prompt_logprobs
            finish_reason = output.finish_reason
            shown = output.token_ids
            if finish_reason is FinishReason.STOP and shown:
                stop_reason, shown = shown[-1], shown[:-1]
            released, matched = self._stop_checker.push(self._detokenizer.push(shown))
            text += released
            if matched is None and finish_reason is not None:
                released, matched = self._stop_checker.push(self._detokenizer.flush())
                text += released
            if matched is not None:
                finish_reason, stop_reason = FinishReason.STOP, matched
                break
        if finish_reason is not None and not isinstance(stop_reason, str):
            text += self._stop_checker.flush()
        self.num_tokens += len(token_ids)
        return Delta(
            text,
            tuple(token_ids),
            tuple(logprobs),
            prompt_logprobs,
            finish_reason,
            stop_reason,
            Usage(last.num_prompt_tokens, last.num_cached_tokens, self.num_tokens),
        )


class Engine:
    """A loaded model that generates. Make one with `from_config`; close it when done."""

    def __init__(self, loaded: LoadedEngine, record: str | None = None):
        self.tokenizer = loaded.tokenizer
        self.config = loaded.config
        self._loaded = loaded
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._started = time.monotonic()
        self._loop = EngineLoop(loaded.runner, loaded.limits, self._deliver, record)

    @classmethod
    def from_config(
        cls,
        config: Config,
        *,
        record: str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Engine:
        """Load the model, compile every bucket, and start the step loop. Takes a while.

        Args:
          config: from `engine.config.load`.
          record: file to write the event log to.
          progress: called with (what is being done, done, in all).

        Raises:
          ConfigError, WeightsError: the config or the model's files can't be used.
        """
        from engine.loading import load_engine

        return cls(load_engine(config, progress), record)

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        domain: Domain | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[Delta]:
        """Generate, and yield what there is whenever there is something new.

        Closing the iterator, or cancelling the task that reads it, aborts the request and
        returns its blocks.

        Args:
          prompt: text, token ids, or chat messages for the model's template.
          sampling: by default `SamplingParams()`.
          request_id: unique among running requests; made up if None.
          domain: who may share cached blocks.
          priority: lower goes first.
          timeout: seconds after which it ends with DEADLINE.

        Raises:
          InvalidRequest: it can't be served as given.
          QueueFull: too many requests wait.
        """
        if request_id is None:
            request_id = f"octavo-{next(self._numbers)}-{secrets.token_hex(4)}"
        request = self._resolve(
            prompt, sampling or SamplingParams(), request_id, domain or Domain(), priority, timeout
        )
        stream = _Stream(request, self.tokenizer)
        with self._lock:
            if request_id in self._streams:
                raise InvalidRequest("request_id", f"{request_id!r} is already running")
            self._streams[request_id] = stream
        finished = False
        try:
            self._loop.submit(request)
            while not finished:
                await stream.arrived.wait()
                try:
                    delta = stream.take()
                except Exception:
                    finished = True  # it was never admitted
                    raise
                if delta.finish_reason is not None:
                    # A stop string ends it here first; the step loop learns it now.
                    finished = not isinstance(delta.stop_reason, str)
                    if not finished:
                        self._loop.abort(request_id, FinishReason.STOP)
                        finished = True
                yield delta
        finally:
            with self._lock:
                self._streams.pop(request_id, None)
            if not finished:
                self._loop.abort(request_id)

    def abort(self, request_id: str) -> bool:
        """End a request with ABORT. Returns whether it was running; thread-safe."""
        with self._lock:
            known = request_id in self._streams
        if known:
            self._loop.abort(request_id)
        return known

    def model_info(self) -> ModelInfo:
        """Which model this is."""
        loaded = self._loaded
        return ModelInfo(
            name=loaded.name,
            architecture=loaded.architecture,
            dtype=self.config.model.dtype,
            max_model_len=loaded.limits.max_model_len,
            eos_token_ids=loaded.eos_token_ids,
            weights_fingerprint=loaded.limits.fingerprint,
        )

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        totals = self._loop.totals
        running, waiting, (free, cached, owned) = self._loop.gauges
        return EngineStats(
            running=running,
            waiting=waiting,
            free_blocks=free,
            cached_blocks=cached,
            owned_blocks=owned,
            total_blocks=free + cached + owned,
            block_size=self._loop.limits.block_size,
            steps=totals.steps,
            prompt_tokens=totals.prompt_tokens,
            generated_tokens=totals.generated_tokens,
            cached_prompt_tokens=totals.cached_prompt_tokens,
            preemptions=totals.preemptions,
            padded_tokens=totals.padded_tokens,
            computed_tokens=totals.computed_tokens,
            compiles_after_warmup=self._loaded.compiles_after_warmup(),
            finished=dict(totals.finished),
            failed_steps=totals.failed_steps,
            uptime_seconds=time.monotonic() - self._started,
        )

    def watch_steps(self, on_step: Callable[[StepRecord], None] | None) -> None:
        """Have each step's figures passed to a function, on the step loop's thread."""
        self._loop.on_step = on_step

    def close(self) -> None:
        """Abort what is running and stop the step loop."""
        self._loop.close()

    def _resolve(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        request_id: str,
        domain: Domain,
        priority: int,
        timeout: float | None,
    ) -> Request:
        """Turn what the client gave into what the scheduler takes."""
        prompt_ids = self._prompt_ids(prompt)
        limits, vocab_size = self._loaded.limits, self._loaded.architecture.vocab_size
        _check_ids("prompt_ids", prompt_ids, vocab_size)
        _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
        _check_ids("allowed_token_ids", sampling.allowed_token_ids or (), vocab_size)
        _check_ids("logit_bias", [token for token, _ in sampling.logit_bias], vocab_size)
        stop_ids = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop_ids.update(self._loaded.eos_token_ids)
        room = limits.max_model_len - len(prompt_ids)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        return Request(
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampling=sampling,
            max_tokens=max(1, min(room, sampling.max_tokens or room)),
            seed=seed,
            stop_ids=frozenset(stop_ids),
            bad_word_ids=bad_word_ids(self.tokenizer, sampling.bad_words),
            domain=domain,
            priority=priority,
            deadline=None if timeout is None else time.monotonic() + timeout,
        )

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        messages = [item for item in prompt if isinstance(item, Message)]
        if messages:
            return tuple(self.tokenizer.apply_chat_template(messages))
        return tuple(item for item in prompt if not isinstance(item, Message))

    def _deliver(self, news: News) -> None:
        """Called on the step loop's thread: pass each event loop its news in one go."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, StepOutput | Rejected]]] = {}
        with self._lock:
            for item in news:
                stream = self._streams.get(item.request_id)
                if stream is not None:
                    by_loop.setdefault(stream.event_loop, []).append((stream, item))
        for event_loop, items in by_loop.items():
            try:
                event_loop.call_soon_threadsafe(_distribute, items)
            except RuntimeError:  # the event loop is closed: its readers are gone
                for stream, _ in items:
                    self._loop.abort(stream.request.request_id)


def _distribute(items: list[tuple[_Stream, StepOutput | Rejected]]) -> None:
    for stream, item in items:
        stream.pending.append(item)
        stream.arrived.set()


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InvalidRequest(
                field, f"{token!r} is not a token id; the model has ids 0 to {vocab_size - 1}"
            )
