"""From a request's prompts to its answer: one stream of the engine for each prompt, all at once.

The first news come before the answer begins, so what can't be served has an HTTP status of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from engine.observe.calls import answered_as, in_request
from engine.resolve import QUICK_CHARS
from engine.sampling import InvalidRequest, SamplingParams
from engine.serve.access import Caller
from engine.serve.calls import Calls
from engine.serve.openai.answers import Answer, Outputs, Piece, Prompt, usage_json
from engine.serve.openai.exchange import Exchange
from engine.serve.openai.memory import MAX_ANSWER_ENTRIES, Memory
from engine.serve.openai.parameters import (
    cache_salt_of,
    priority_of,
    prompts_of,
    wants_usage,
)
from engine.serve.openai.schemas import CompletionRequest, GenerationRequest
from engine.text import Tokenizer
from engine.types import FinishReason

if TYPE_CHECKING:
    from engine.frontend import Delta, Engine

QUICK_LOGPROB_ENTRIES = 2**14  # written out where they arrive; more go to a thread


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one HTTP request asks to be generated.

    Attributes:
      calls: counts each prompt as a call, and knows the streams' names.
      engine: generates.
      caller: whose cache it uses.
      request: what the client sent.
      sampling: made of it.
      form: of the answer.
      memory: for the log-probabilities of all answers.
    """

    calls: Calls
    engine: Engine
    caller: Caller
    request: GenerationRequest
    sampling: SamplingParams
    form: type[Answer]
    memory: Memory

    async def run(self, exchange: Exchange, prompts: Sequence[Prompt]) -> None:
        """Generate and answer, whole or as a stream of events.

        Raises:
          Refused: there are too many calls or log-probabilities, or one did not end well.
          InvalidRequest, QueueFull: it can't be served.
        """
        with self.memory.answer(self.caller.tenant) as keep:
            await self._answer(exchange, prompts, keep)

    async def _answer(
        self, exchange: Exchange, prompts: Sequence[Prompt], keep: Callable[[int], None]
    ) -> None:
        with_usage = wants_usage(self.request)
        keep(self._check_size(prompts))
        model, tokenizer = self.engine.model_info().name, self.engine.tokenizer
        has_logprobs, skip = self.sampling.logprobs is not None, self.sampling.skip_special_tokens
        outputs = [Outputs(each, tokenizer, has_logprobs, skip) for each in prompts]
        with contextlib.ExitStack() as held:
            held.enter_context(self.calls.call(self.caller, len(prompts)))
            streams, names = [], []
            for prompt in prompts:
                name, engine_name = held.enter_context(self.calls.stream(self.caller, None))
                names.append(name)
                streams.append(self._deltas(name, engine_name, prompt))
            answer = self.form(names[0], model, tokenizer, has_logprobs)
            answered_as(answer.operation, answer.id)
            async with contextlib.aclosing(_merged(streams)) as deltas:
                if self.request.stream:
                    await self._stream(exchange, answer, outputs, deltas, with_usage)
                else:
                    await self._reply(exchange, answer, outputs, deltas, keep)

    @property
    def _num_likeliest(self) -> int:
        """Log-probabilities of a token of the answer."""
        return 0 if self.sampling.logprobs is None else 1 + self.sampling.logprobs

    def _check_size(self, prompts: Sequence[Prompt]) -> int:
        """Refuse an answer whose log-probabilities would fill the memory: all of a whole one, and
        those of the prompts, which come at once, of a stream. Returns how many the prompts' are."""
        longest = self.engine.model_info().max_model_len
        echoed = sum(len(each.given) for each in prompts if each.echo) * self._num_likeliest
        count = echoed
        if not self.request.stream:
            echoed *= self.sampling.n
            positions = len(prompts) * min(longest, self.sampling.max_tokens or longest)
            count = echoed + positions * self.sampling.n * self._num_likeliest
        if count > MAX_ANSWER_ENTRIES:
            raise InvalidRequest(
                "logprobs",
                f"of up to {count} tokens may be in the answer, but at most {MAX_ANSWER_ENTRIES} "
                "are; lower logprobs, max_tokens or n, send prompts in several requests, or stream",
            )
        return echoed

    async def _reply(
        self,
        exchange: Exchange,
        answer: Answer,
        outputs: list[Outputs],
        deltas: AsyncGenerator[tuple[int, Delta]],
        keep: Callable[[int], None],
    ) -> None:
        choices: list[list[Piece]] = [[] for _ in range(len(outputs) * self.sampling.n)]
        num_entries = 0
        async for number, delta in deltas:
            keep(len(delta.logprobs) * self._num_likeliest)
            for index, piece in outputs[number].pieces(delta):
                choices[index].append(piece)
                num_entries += len(piece.entries)
        usage = usage_json(outputs)
        await exchange.reply(await self._written(num_entries, lambda: answer.whole(choices, usage)))

    async def _stream(
        self,
        exchange: Exchange,
        answer: Answer,
        outputs: list[Outputs],
        deltas: AsyncGenerator[tuple[int, Delta]],
        with_usage: bool,
    ) -> None:
        fields: dict[str, Any] = {"usage": None} if with_usage else {}

        has_begun = False
        async for number, delta in deltas:
            if not has_begun:
                has_begun = True
                await exchange.begin_events()
                for choice in answer.openings(len(outputs) * self.sampling.n):
                    await exchange.event(msgspec.json.encode(answer.chunk([choice], **fields)))
            for index, piece in outputs[number].pieces(delta):
                write = functools.partial(answer.piece, index, piece, **fields)
                await exchange.event(await self._written(len(piece.entries), write))
        if with_usage:
            last = answer.chunk([], usage=usage_json(outputs))
            await exchange.event(msgspec.json.encode(last))
        await exchange.event(b"[DONE]")
        await exchange.end_events()

    async def _written(self, num_entries: int, write: Callable[[], dict[str, Any]]) -> bytes:
        """JSON with that many tokens in it; on a thread where it takes long, as streams go on."""
        if num_entries * self._num_likeliest <= QUICK_LOGPROB_ENTRIES:
            return msgspec.json.encode(write())
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, lambda: msgspec.json.encode(write()))

    async def _deltas(self, name: str, engine_name: str, prompt: Prompt) -> AsyncGenerator[Delta]:
        """What the engine makes of one prompt."""
        request = self.request
        reasons: set[FinishReason] = set()
        stream = self.engine.generate(
            prompt.given,
            self.sampling,
            request_id=engine_name,
            domain=self.caller.domain(cache_salt_of(request)),
            share_prefix=request.share_prefix is not False,
            priority=self.caller.check_priority(priority_of(request)),
            timeout=request.timeout,
        )
        with in_request(name, self.caller.tenant):
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    if delta.finish_reason is not None:
                        reasons.add(delta.finish_reason)
                        if delta.finish_reason in (FinishReason.ERROR, FinishReason.DEADLINE):
                            break  # told as an error
                    yield delta
            self.calls.check_end(name, reasons)


async def make_prompts(
    calls: Calls,
    caller: Caller,
    engine: Engine,
    request: CompletionRequest,
    sampling: SamplingParams,
) -> list[Prompt]:
    """The prompts of a completion; as token ids if their tokens are to be shown.

    Raises:
      InvalidRequest: there is none.
    """
    given = prompts_of(request, engine.model_info().max_model_len)
    if not request.echo and request.logprobs is None:
        return [Prompt(index * sampling.n, each) for index, each in enumerate(given)]
    work = functools.partial(_shown_prompts, engine.tokenizer, request, given, sampling)
    quick = sum(len(each) for each in given) <= QUICK_CHARS
    return work() if quick else await calls.on_thread(caller, work)


def _shown_prompts(
    tokenizer: Tokenizer,
    request: CompletionRequest,
    given: list[str | tuple[int, ...]],
    sampling: SamplingParams,
) -> list[Prompt]:
    """Prompts whose tokens are known if they are shown, with their text if that is echoed."""
    prompts = []
    for index, each in enumerate(given):
        ids = each
        if isinstance(each, str) and request.logprobs is not None:
            ids = tuple(tokenizer.encode(each))
        text = ids if isinstance(ids, str) else tokenizer.decode(ids, skip_special_tokens=False)
        echo = each if isinstance(each, str) else text
        prompt = Prompt(index * sampling.n, ids)
        if request.echo:
            start, only = len(echo) - len(text), request.max_tokens == 0
            prompt = dataclasses.replace(prompt, echo=echo, echo_start=start, echo_only=only)
        prompts.append(prompt)
    return prompts


async def _merged[T](streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """What several streams yield, as it comes, with the number of the stream.

    A stream goes on when what it gave was taken, so nothing piles up here. The first error ends all
    of them; so does closing this one.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]):
            async for item in streams[0]:
                yield 0, item
        return
    news: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(1)

    async def pump(number: int, stream: AsyncGenerator[T]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    await news.put((number, item))
        except Exception as error:
            await news.put(error)
        else:
            await news.put(None)

    tasks = [asyncio.create_task(pump(*each)) for each in enumerate(streams)]
    num_running = len(tasks)
    try:
        while num_running:
            match await news.get():
                case None:
                    num_running -= 1
                case Exception() as error:
                    raise error
                case item:
                    yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
