"""The engine as its users see it: text or tokens in, a stream of deltas out.

Resolves requests (tokenise, defaults, limits), hands them to the step loop, and turns its
tokens into text on the caller's event loop: detokenising and stop strings cost the step loop
nothing. ``LLM`` and the gRPC service are both built on this.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import queue
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

from engine.config import Config, ConfigError
from engine.core.picture import Frame, take_picture
from engine.core.scheduler import SchedulerState
from engine.domain_usage import DomainUsage
from engine.life import Life
from engine.observe.logs import log_request
from engine.observe.requests import RequestFigures
from engine.preparing import Readers
from engine.public_prefixes import compute_public_prefixes
from engine.resolve import Prompt, Resolver, deadline_after, is_quick
from engine.runtime.figures import StepRecord
from engine.runtime.inbox import EngineStopped
from engine.runtime.kv_events import follow_cache
from engine.runtime.loop import EngineLoop
from engine.runtime.news import News, Rejected
from engine.sampling import InvalidRequest, SamplingParams
from engine.start_up import StartUp
from engine.stats import EngineStats, ModelInfo, read_stats
from engine.streams import Delta, ReaderTooSlow, Stream, Usage
from engine.types import Domain, FinishReason, QueueFull, Request, StepOutput

if TYPE_CHECKING:
    from engine.loading import LoadedEngine

__all__ = [
    "Delta",
    "Engine",
    "EngineStats",
    "EngineStopped",
    "ModelInfo",
    "Prompt",
    "ReaderTooSlow",
    "Usage",
]


class Engine:
    """A loaded model that generates. Make one with `from_config`; close it when done.

    Attributes:
      requests: the figures of all requests, and who hears of tokens and of each one's end.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        record: str | None = None,
        record_tokens: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
    ):
        self.tokenizer = loaded.tokenizer
        self.config = loaded.config
        self._loaded = loaded
        self._resolver = Resolver(
            loaded.tokenizer,
            loaded.limits,
            loaded.architecture.vocab_size,
            loaded.eos_token_ids,
            loaded.config.cache,
            loaded.grammars,
        )
        self._streams: dict[str, Stream] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._started = time.monotonic()
        self._readers = Readers(loaded.grammars, loaded.limits.max_waiting)
        self._reloading = threading.Lock()
        self.requests = RequestFigures()
        self.requests.listeners.append(log_request)
        self._public: queue.SimpleQueue[StepOutput | Rejected] = queue.SimpleQueue()
        self._is_starting = True
        self._max_unread = loaded.config.server.max_unread_tokens
        self._loop = EngineLoop(
            loaded.runner,
            loaded.limits,
            self._deliver,
            record,
            record_tokens,
            disk=loaded.disk,
        )
        self.life = Life(self._loop, self._deliver)
        self.kv_events = follow_cache(self._loop, loaded.config.server.kv_events)
        try:
            compute_public_prefixes(
                loaded.config, loaded.tokenizer, self._loop.submit, self._public.get, progress
            )
        except BaseException:
            self.close()
            raise
        self._is_starting = False

    @classmethod
    def from_config(
        cls,
        config: Config,
        *,
        record: str | None = None,
        record_tokens: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Engine:
        """Load the model, compile every bucket, and start the step loop. Takes a while.

        Args:
          config: from `engine.config_file.load`.
          record: file to write the event log to.
          record_tokens: with requests and token ids in full; without, it holds neither text nor
            ids nor names that clients chose.
          progress: called with (what is being done, done, in all).

        Raises:
          ConfigError, WeightsError: the config or the model's files can't be used.
          OSError: the event log can't be written.
        """
        from engine.loading import load_engine

        if record_tokens and record is None:
            raise ValueError("record_tokens says what a log holds; name its file with record")
        if record is not None:  # find out early whether it can be written: loading takes long
            os.close(os.open(record, os.O_WRONLY | os.O_CREAT, 0o600))
        return cls(load_engine(config, progress), record, record_tokens, progress)

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
        """Generate, and yield what there is whenever there is something new.

        Closing the iterator, or cancelling the task that reads it, aborts the request and
        returns its blocks.

        Args:
          prompt: text, token ids, or chat messages for the model's template.
          sampling: by default `SamplingParams()`.
          request_id: unique among running requests; made up if None.
          domain: who may share cached blocks.
          share_prefix: use blocks that earlier requests left, and leave blocks for later ones.
            Without, nothing of it is kept: its blocks are erased when it ends or is preempted.
          priority: lower goes first.
          timeout: seconds after which it ends with DEADLINE.
          with_text: without, deltas have token ids alone. Stop strings work all the same.

        Raises:
          InvalidRequest: it can't be served as given.
          QueueFull: too many requests wait, or there is no room for its constraint.
          ReaderTooSlow: whoever iterates let more than `server.max_unread_tokens` pile up.
        """
        received = time.monotonic()
        sampling = sampling or SamplingParams()
        asker = domain or Domain()
        domain = self._shared_domain(asker)
        number = next(self._numbers)
        if request_id is None:
            request_id = f"octavo-{number}-{secrets.token_hex(4)}"
        stream = Stream(request_id, number, self._max_unread)
        with self._lock:
            if request_id in self._streams:
                raise InvalidRequest("request_id", f"{request_id!r} is already running")
            self._streams[request_id] = stream
        timer = self.requests.start(request_id, asker, received)
        try:
            deadline = deadline_after(timeout, since=received)
            resolve = functools.partial(
                self._resolver.resolve,
                stream.key,
                prompt,
                sampling,
                domain=domain,
                is_private=not share_prefix,
                priority=priority,
                deadline=deadline,
            )
            if is_quick(prompt, sampling):
                request = resolve()
            else:
                self._loop.check_room(max(sampling.n, sampling.beam_width))
                request = await self._readers.read(
                    stream, resolve, sampling.constraint, domain, deadline
                )
            if isinstance(request, FinishReason):
                for index in range(sampling.n):
                    delta = Delta.unbegun(index, request)
                    timer.add(delta, time.monotonic())
                    yield delta
                return
            stream.start(request, self.tokenizer, with_text=with_text)
            timer.submitted(len(request.prompt_ids))
            self._submit(stream, request)
            while stream.live:
                await stream.arrived.wait()
                now = time.monotonic()
                for delta in stream.take():
                    timer.add(delta, now)
                    if isinstance(delta.stop_reason, str):
                        # A stop string ends it here first; the step loop learns it now.
                        self._loop.abort(stream.key_of(delta.index), FinishReason.STOP)
                    yield delta
        except Exception as error:
            timer.refused(error)
            raise
        finally:
            timer.close(stream.live)
            with self._lock:
                if self._streams.get(request_id) is stream:
                    del self._streams[request_id]
            for index in stream.live:
                self._loop.abort(stream.key_of(index))

    def abort(self, request_id: str) -> bool:
        """End a request with ABORT. Returns whether it was running; thread-safe."""
        with self._lock:
            stream = self._streams.get(request_id)
            if stream is not None and not stream.is_aborted:
                stream.is_aborted = True
                stream.stop_reading()
                for index in tuple(stream.live):
                    self._loop.abort(stream.key_of(index))
        return stream is not None

    async def flush(self, domain: Domain | None) -> int:
        """Forget what a domain's requests left in the cache, or with None all but what is public.

        It is erased, in the tiers below too; what running requests hold of it, when they end. No
        restart brings it back from disk. If its files can't be removed, or not be looked for, that
        is an OSError: nobody finds them, but until another flush succeeds, a restart may.

        Returns:
          How many blocks that nobody held were given up.

        Raises:
          QueueFull: too many flushes are in progress.
        """
        if domain is not None:
            domain = self._shared_domain(domain)
        return await asyncio.wrap_future(self._loop.flush(domain))

    async def reload(self) -> bool:
        """Read the weights again, beside those that are served, and go on with them.

        Requests that have begun end with the old weights first; the others wait, and begin with the
        new ones. Nothing that is cached outlives the exchange. After any failure, the old weights
        are served as before.

        Returns:
          Whether there were others to read.

        Raises:
          ConfigError, WeightsError: they don't fit this engine, or can't be read; or it is paused.
          QueueFull: another reload is in progress.
          EngineStopped: the engine was closed before it was done.
        """
        from engine.reload import exchange

        if self.life.is_paused:  # it would wait with both weights in memory
            raise ConfigError("the engine is paused; resume it first")
        if not self._reloading.acquire(blocking=False):
            raise QueueFull("the weights are being reloaded already; try again later")

        async def work() -> bool:
            try:
                old, self._loaded = self._loaded, await exchange(self._loaded, self._loop)
                return self._loaded is not old
            finally:
                self._reloading.release()

        return await asyncio.shield(
            asyncio.ensure_future(work())
        )  # half of it is no state to be in

    def _shared_domain(self, asker: Domain) -> Domain:
        """Where isolation is off, all are one domain; see `CacheConfig.isolation`."""
        return asker if self.config.cache.isolation == "domain" else Domain()

    @property
    def is_alive(self) -> bool:
        """Whether the step loop runs; if it failed, the log says why."""
        return self._loop.is_alive

    def model_info(self) -> ModelInfo:
        """Which model this is."""
        loaded = self._loaded
        return ModelInfo(
            name=loaded.name,
            architecture=loaded.architecture,
            attention=loaded.attention,
            products=loaded.products,
            dtype=self.config.model.dtype,
            max_model_len=loaded.limits.max_model_len,
            eos_token_ids=loaded.eos_token_ids,
            weights_fingerprint=loaded.weights_fingerprint,
        )

    @property
    def start_up(self) -> StartUp:
        """What loading spent its time on."""
        return self._loaded.start_up

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        uptime = time.monotonic() - self._started
        return read_stats(self._loop, self._loaded, self.requests, uptime)

    def usage(self, domain: Domain) -> DomainUsage:
        """What the requests of one domain came to."""
        return self.requests.usage(domain)

    async def picture(self) -> Frame:
        """Who holds which block between two steps, and what was done by then.

        Raises:
          EngineStopped: the step loop has ended.
        """

        def look(state: SchedulerState) -> Frame:
            totals = self._loop.totals
            return Frame(
                take_picture(state),
                time.monotonic() - self._started,
                totals.generated_tokens,
                totals.preemptions,
            )

        return await asyncio.wrap_future(self._loop.look(look))

    def watch_steps(self, on_step: Callable[[StepRecord], None] | None) -> None:
        """Have each step's figures passed to a function, on the step loop's thread."""
        self._loop.on_step = on_step

    def close(self) -> None:
        """Abort what is running, stop the step loop, and write what the disk tier still gets.

        It waits for the step that is on the device, so it hangs if that does.
        """
        self._loop.close()
        self.life.close()
        if self._loaded.disk is not None:
            self._loaded.disk.close()
        self._readers.close()
        self._loaded.grammars.close()

    def _submit(self, stream: Stream, request: Request) -> None:
        """Hand a request to the step loop, unless it was aborted in the meantime."""
        with self._lock:
            if not stream.is_aborted:
                try:
                    self._loop.submit(request)
                except Exception:
                    stream.live.clear()
                    raise
                return
        num_prompt = len(request.prompt_ids)
        for index, name in enumerate(request.replies):
            stream.put(index, StepOutput(name, (), FinishReason.ABORT, num_prompt, 0))

    def _deliver(self, news: News) -> None:
        """Called on the step loop's thread: pass each event loop its news in one go."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Item]] = {}
        with self._lock:
            for item in news:
                if "#" not in item.request_id:  # a public prefix's; those of streams have one
                    if self._is_starting:
                        self._public.put(item)
                    continue
                stream = self._streams.get(Stream.name_of(item.request_id))
                if stream is None or (index := stream.index_of(item.request_id)) is None:
                    continue
                by_loop.setdefault(stream.event_loop, []).append((stream, index, item))
        for event_loop, items in by_loop.items():
            try:
                event_loop.call_soon_threadsafe(self._distribute, items)
            except RuntimeError:  # the event loop is closed: its readers are gone
                for stream, _, _ in items:
                    self._forget(stream)

    def _distribute(self, items: list[_Item]) -> None:
        for stream, index, item in items:
            if not stream.put(index, item):
                self._forget(stream)

    def abandon(self) -> None:
        """End every stream with ABORT without the step loop, which is stuck."""
        with self._lock:
            streams = list(self._streams.values())
            for stream in streams:
                stream.is_aborted = True
                stream.stop_reading()
        names = [stream.key_of(index) for stream in streams for index in tuple(stream.live)]
        self._deliver([StepOutput(name, (), FinishReason.ABORT, 0, 0) for name in names])

    def _forget(self, stream: Stream) -> None:
        """End a request that nobody will ever read."""
        with self._lock:
            if self._streams.get(stream.name) is stream:
                del self._streams[stream.name]
        for index in tuple(stream.live):
            self._loop.abort(stream.key_of(index))


_Item = tuple[Stream, int, StepOutput | Rejected]
