"""From the step loop's tokens to what a caller reads: text, stop strings and counts, by sample.

News arrive in the order of the steps; everything here runs on the caller's event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses

from engine.runtime.loop import Rejected
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


class Stream:
    """One request's news, between the step loop and the task that reads it.

    News pile up only as far as the request's own tokens go, so a slow reader costs one tuple a
    token and gets them all in one delta.

    Attributes:
      name: of the request, as its caller knows it.
      key: its id in the step loop. It is never used twice, so that news of a request can't
        reach a later one of the same name.
      live: the samples that have not ended, by index.
    """

    def __init__(self, name: str, number: int):
        """`number` is the stream's own."""
        self.name = name
        self.key = f"{name}#{number}"
        self.is_aborted = False
        self.arrived = asyncio.Event()
        self.event_loop = asyncio.get_running_loop()
        self.live: dict[int, _Sample] = {}
        self.rejection: Exception | None = None

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

    def start(self, request: Request, tokenizer: Tokenizer) -> None:
        """Get ready for the request's tokens."""
        self.live = {
            index: _Sample(index, request, tokenizer) for index in range(len(request.replies))
        }

    def put(self, index: int, item: StepOutput | Rejected) -> None:
        """Take in news of one sample."""
        if isinstance(item, Rejected):
            self.rejection = item.error
        elif index in self.live:
            self.live[index].pending.append(item)
        self.arrived.set()

    def take(self) -> list[Delta]:
        """Everything that is pending, as one delta a sample. Raises the error of a rejection."""
        self.arrived.clear()
        if self.rejection is not None:
            self.live.clear()  # the step loop has none of it
            raise self.rejection
        deltas = [sample.take() for sample in self.live.values() if sample.pending]
        for delta in deltas:
            if delta.finish_reason is not None:
                del self.live[delta.index]
        return deltas


class _Sample:
    """One sequence's text."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer):
        sampling = request.sampling
        self.pending: list[StepOutput] = []
        self._index = index
        self._num_tokens = 0
        self._waited: Waited | None = None
        self._detokenizer = Detokenizer(tokenizer, request.prompt_ids, sampling.skip_special_tokens)
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
