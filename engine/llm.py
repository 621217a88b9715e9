"""Generation in one's own process, without a server: ``LLM.from_config(...).generate(...)``."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from engine import config_file
from engine.config import Config
from engine.frontend import Engine, ModelInfo, Prompt
from engine.runtime.news import BudgetSpent
from engine.sampling import InvalidRequest, SamplingParams
from engine.streams import Delta, Usage
from engine.text import Message
from engine.types import BeamScore, FinishReason, QueueFull, TokenLogprobs, Waited

AnyPrompt = str | Sequence[int] | Sequence[dict[str, str]] | Sequence[Message]


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One finished generation; the fields are those of `engine.streams.Delta`, put together.

    `others` are the further samples of the prompt, in order, if `sampling.n` is above 1. Of beam
    search, that is best first.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    waited: Waited | None = None
    others: tuple[Completion, ...] = ()
    beam: BeamScore | None = None


class LLM:
    """A model that generates in this process.

    >>> llm = LLM.from_config("configs/smollm2-135m-cpu.yaml")
    >>> [answer] = llm.generate(["The capital of France is"], SamplingParams(temperature=0))
    >>> print(answer.text)
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._event_loop = asyncio.new_event_loop()
        # A thread of its own, so that it also works where an event loop runs already.
        self._thread = threading.Thread(target=self._event_loop.run_forever, daemon=True)
        self._thread.start()

    @classmethod
    def from_config(
        cls,
        config: str | os.PathLike[str] | Config,
        *,
        overrides: Iterable[str] = (),
        record: str | None = None,
        record_tokens: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> LLM:
        """Load a model as a config describes it.

        Args:
          config: a YAML file, or a config.
          overrides: `dotted.key=value` strings, for a file.
          record: file to write the scheduler's event log to.
          record_tokens: with requests and token ids in full; without, it holds neither.
          progress: called with (what is being done, done, in all).

        Raises:
          ConfigError, WeightsError: the config or the model's files can't be used.
        """
        if not isinstance(config, Config):
            config = config_file.load(os.fspath(config), overrides)
        engine = Engine.from_config(
            config, record=record, record_tokens=record_tokens, progress=progress
        )
        return cls(engine)

    def generate(
        self,
        prompts: Sequence[AnyPrompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Generate for every prompt at once, and return when all are done.

        Args:
          prompts: each a text, token ids, or chat messages ({"role": …, "content": …}).
          sampling: one for all, or one for each; by default `SamplingParams()`.

        Returns:
          Completions in the order of the prompts.

        Raises:
          InvalidRequest: one of them can't be served as given. The others are aborted; see
            `generate_each` to have them all the same.
          RuntimeError: the step that carried one of them failed, or the engine was closed.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is one text; give a list of prompts")
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(prompts)
        if len(sampling) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(sampling)} sampling parameters")
        done: dict[int, Completion] = {}
        with contextlib.closing(self.generate_each(zip(prompts, sampling, strict=True))) as results:
            for index, result in results:
                if isinstance(result, Exception):
                    raise result
                done[index] = result
        return [done[index] for index in range(len(prompts))]

    def generate_each(
        self, requests: Iterable[tuple[AnyPrompt, SamplingParams]], *, max_pending: int = 512
    ) -> Generator[tuple[int, Completion | Exception]]:
        """Generate for a stream of requests, and yield each as it finishes.

        Args:
          requests: prompts and how to sample; read as room comes, never all at once.
          max_pending: requests that are in the engine at the same time.

        Yields:
          (index, completion), or (index, error) where a request failed.
        """
        results: queue.SimpleQueue[tuple[int, Completion | Exception]] = queue.SimpleQueue()
        pending: dict[int, Future[None]] = {}
        source = enumerate(requests)

        async def run(index: int, prompt: AnyPrompt, params: SamplingParams) -> None:
            try:
                results.put((index, await self._complete(prompt, params)))
            except Exception as error:
                results.put((index, error))

        try:
            exhausted = False
            while pending or not exhausted:
                while not exhausted and len(pending) < max_pending:
                    if (item := next(source, None)) is None:
                        exhausted = True
                        break
                    index, (prompt, params) = item
                    pending[index] = asyncio.run_coroutine_threadsafe(
                        run(index, prompt, params), self._event_loop
                    )
                if pending:
                    index, result = results.get()
                    del pending[index]
                    yield index, result
        finally:
            for future in pending.values():
                future.cancel()

    def model_info(self) -> ModelInfo:
        """Which model this is."""
        return self.engine.model_info()

    def close(self) -> None:
        """Abort what is running and stop the engine. Safe to call twice."""
        if self._event_loop.is_closed():
            return
        self.engine.close()
        asyncio.run_coroutine_threadsafe(self._drain(), self._event_loop).result()
        self._event_loop.call_soon_threadsafe(self._event_loop.stop)
        self._thread.join()
        self._event_loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _drain(self) -> None:
        """Let every task come to its end: the engine is closed, so all do."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await self._event_loop.shutdown_asyncgens()
        await self._event_loop.shutdown_default_executor()

    async def _complete(self, prompt: AnyPrompt, params: SamplingParams) -> Completion:
        while True:
            try:
                deltas = [d async for d in self.engine.generate(as_prompt(prompt), params)]
                break
            except BudgetSpent:
                raise
            except QueueFull as error:  # there is always a later
                await asyncio.sleep(error.retry_after)
        first, *others = (
            _completion([delta for delta in deltas if delta.index == index])
            for index in range(params.n)
        )
        return dataclasses.replace(first, others=tuple(others))


def _completion(deltas: list[Delta]) -> Completion:
    """All of one sample, put together."""
    last = deltas[-1]
    assert last.finish_reason is not None
    if last.finish_reason is FinishReason.ERROR:
        raise RuntimeError("the step that carried this request failed; see the log")
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        usage=last.usage,
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
        waited=last.waited,
        beam=last.beam,
    )


def as_prompt(prompt: AnyPrompt) -> Prompt:
    """A prompt in the form that the engine takes."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if any(isinstance(item, (dict, Message)) for item in prompt[:1]):
        return tuple(map(_message, prompt))
    return tuple(prompt)  # type: ignore[arg-type]


def _message(message: Any) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        raise InvalidRequest("messages", "each must have a role and a content, and nothing else")
    return Message(message["role"], message["content"])
