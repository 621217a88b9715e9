"""From the step loop's tokens to what a caller reads: text, stop strings and counts, by sample.

News arrive in the order of the steps; everything here runs on the caller's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

from engine.runtime.news import Rejected
from engine.text import Detokenizer, StopChecker, Tokenizer
from engine.types import BeamScore, FinishReason, Request, StepOutput, TokenLogprobs, Waited


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one sample so far; `cached_tokens` of the prompt came from the cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one generation. The last has a finish reason; texts add up to the output.

    Attributes:
      index: which of the request's samples it belongs to, from 0.
      text: new text; it may lag behind the tokens while a character or a possible stop string
        is incomplete.
      token_ids: new tokens, the stop token included.
      logprobs: one a token, if asked for.
      prompt_logprobs: with the first delta of sample 0, if asked for: one a prompt token after
        the first.
      finish_reason: None while it goes on.
      stop_reason: the stop string or stop token that ended it, else None.
      usage: counts so far.
      waited: its time in the queue so far, from the first token on; None if the request never
        reached the queue.
      beam: of an output of beam search, which comes whole, in one delta.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    usage: Usage
    waited: Waited | None = None
    beam: BeamScore | None = None

    @classmethod
    def unbegun(cls, index: int, reason: FinishReason) -> Delta:
        """The end of a sample whose request ended before it was read."""
        return cls(index, "", (), (), (), reason, None, Usage(0, 0, 0))


class ReaderTooSlow(RuntimeError):
    """A stream ended because its reader left too much of it unread."""


class Stream:
    """One request's news, between the step loop and the task that reads it.

    What a slow reader has not taken yet comes in one delta. It piles up as far as `max_unread` and
    no further: then the stream ends with ReaderTooSlow.

    Attributes:
      name: of the request, as its caller knows it.
      key: its id in the step loop. It is never used twice, so that news of a request can't
        reach a later one of the same name.
      live: the samples that have not ended, by index.
      reading: what makes a request of what the client gave, while that goes on.
    """

    def __init__(self, name: str, number: int, max_unread: int):
        """
        Args:
          name: see above.
          number: the stream's own.
          max_unread: most tokens of all samples, and of log-probabilities, that wait to be read.
        """
        self.name = name
        self.key = f"{name}#{number}"
        self.is_aborted = False
        self.arrived = asyncio.Event()
        self.event_loop = asyncio.get_running_loop()
        self.live: dict[int, _Sample] = {}
        self.reading: asyncio.Task[Request] | None = None
        self.rejection: Exception | None = None
        self._max_unread = max_unread
        self._num_unread = 0

    @staticmethod
    def name_of(request_id: str) -> str:
        """The name in an id of the step loop's."""
        return request_id.rpartition("#")[0]

    def index_of(self, request_id: str) -> int | None:
        """Which sample of this stream an id of the step loop's means, if any."""
        if request_id == self.key:
            return 0
        rest = request_id.removeprefix(f"{self.key}.")
        return None if rest == request_id else int(rest)

    def key_of(self, index: int) -> str:
        """The id in the step loop of one sample."""
        return f"{self.key}.{index}" if index else self.key

    def stop_reading(self) -> None:
        """End a request that is not read yet. Any thread may call it."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self.event_loop.call_soon_threadsafe(self._cancel_reading)

    def _cancel_reading(self) -> None:
        if self.reading is not None:
            self.reading.cancel()

    def start(self, request: Request, tokenizer: Tokenizer, *, with_text: bool = True) -> None:
        """Get ready for the request's tokens, which are made text of only if anybody reads it."""
        reads = with_text or bool(request.sampling.stop)
        self.live = {
            index: _Sample(index, request, tokenizer if reads else None)
            for index in range(len(request.replies))
        }

    def put(self, index: int, item: StepOutput | Rejected) -> bool:
        """Take in news of one sample. Returns False when the reader has just fallen too far behind:
        whoever reads on gets ReaderTooSlow, and the request is to be ended."""
        self.arrived.set()
        if isinstance(item, Rejected):
            self.rejection = item.error
        elif self.rejection is None and index in self.live:
            self.live[index].pending.append(item)
            self._num_unread += len(item.token_ids) + sum(len(e.top) for e in item.logprobs)
            if self._num_unread > self._max_unread and item.beam is None:
                self.rejection = ReaderTooSlow(
                    f"{self._num_unread} tokens of the answer were not read, and no more than "
                    f"{self._max_unread} are kept (server.max_unread_tokens); read faster, or ask "
                    "for fewer tokens, samples or log-probabilities"
                )
                return False
        return True

    def take(self) -> list[Delta]:
        """Everything that is pending, as one delta a sample. Raises the error of a rejection, or
        ReaderTooSlow."""
        self.arrived.clear()
        self._num_unread = 0
        if self.rejection is not None:
            if not isinstance(self.rejection, ReaderTooSlow):
                self.live.clear()  # the step loop has none of it
            raise self.rejection
        deltas = [sample.take() for sample in self.live.values() if sample.pending]
        for delta in deltas:
            if delta.finish_reason is not None:
                del self.live[delta.index]
        return deltas


class _Sample:
    """One sequence's text, or its tokens alone if there is no tokenizer."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None):
        sampling = request.sampling
        self.pending: list[StepOutput] = []
        self._index = index
        self._num_tokens = 0
        self._waited: Waited | None = None
        self._detokenizer = (
            Detokenizer(tokenizer, request.prompt_ids, sampling.skip_special_tokens)
            if tokenizer is not None
            else None
        )
        self._stop_checker = StopChecker(sampling.stop)

    def take(self) -> Delta:
        """All that is pending, of which there is some."""
        outputs, self.pending = self.pending, []
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        text = ""
        finish_reason: FinishReason | None = None
        stop_reason: str | int | None = None
        last = outputs[-1]
        for output in outputs:
            last = output
            self._waited = output.waited or self._waited
            token_ids.extend(output.token_ids)
            logprobs.extend(output.logprobs)
            prompt_logprobs = prompt_logprobs or output.prompt_logprobs
            finish_reason = output.finish_reason
            shown = output.token_ids
            if finish_reason is FinishReason.STOP and shown:
                stop_reason, shown = shown[-1], shown[:-1]
            if self._detokenizer is None:
                continue
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
        self._num_tokens += len(token_ids)
        return Delta(
            self._index,
            text,
            tuple(token_ids),
            tuple(logprobs),
            prompt_logprobs,
            finish_reason,
            stop_reason,
            Usage(last.num_prompt_tokens, last.num_cached_tokens, self._num_tokens),
            self._waited,
            last.beam,
        )
