"""What a request's deltas become on the wire of ``vllm.grpc.engine``: token ids, never text.

A stream is chunks of new tokens and, for each output, a last message that has all its ids again.
Without streaming there is that last message alone, with log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from smg_grpc_proto import vllm_engine_pb2 as pb

from engine.serve.bounds import MAX_LOGPROB_POSITIONS
from engine.types import FinishReason, TokenLogprobs

if TYPE_CHECKING:
    from engine.frontend import Delta


class Responses:
    """Makes the messages of one request.

    Args:
      prompt_ids: what the model was given.
      stream: whether tokens are sent as they come.
    """

    def __init__(self, prompt_ids: Sequence[int], *, stream: bool):
        self._first_id = prompt_ids[0]
        self._stream = stream
        self._prompt_logprobs: pb.InputLogProbs | None = None
        self._outputs: dict[int, _Output] = {}

    def of(self, delta: Delta) -> Iterator[pb.GenerateResponse]:
        """The messages that a delta makes; none, if nothing is sent before the end."""
        if delta.prompt_logprobs:  # once, with the first output's first tokens
            self._prompt_logprobs = _input_logprobs(self._first_id, delta.prompt_logprobs)
        output = self._outputs.setdefault(delta.index, _Output())
        output.token_ids.extend(delta.token_ids)
        if self._stream:
            yield from self._chunks(delta, is_first=not output.is_sent)
            output.is_sent = True
        else:
            output.logprobs.extend(delta.logprobs)
        if delta.finish_reason in _ENDS:
            yield pb.GenerateResponse(complete=self._complete(delta, output))
            del self._outputs[delta.index]  # the others may go on for long

    def _chunks(self, delta: Delta, *, is_first: bool) -> Iterator[pb.GenerateResponse]:
        usage = delta.usage
        before = usage.completion_tokens - len(delta.token_ids)
        size = MAX_LOGPROB_POSITIONS if delta.logprobs else max(1, len(delta.token_ids))
        for start in range(0, len(delta.token_ids), size):
            token_ids = delta.token_ids[start : start + size]
            chunk = pb.GenerateStreamChunk(
                token_ids=token_ids,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=before + start + len(token_ids),
                cached_tokens=usage.cached_tokens,
                index=delta.index,
            )
            if delta.logprobs:
                chunk.output_logprobs.CopyFrom(
                    _output_logprobs(delta.logprobs[start : start + size])
                )
            if is_first and start == 0 and self._prompt_logprobs is not None:
                chunk.input_logprobs.CopyFrom(self._prompt_logprobs)
            yield pb.GenerateResponse(chunk=chunk)

    def _complete(self, delta: Delta, output: _Output) -> pb.GenerateComplete:
        assert delta.finish_reason is not None
        complete = pb.GenerateComplete(
            output_ids=output.token_ids,
            finish_reason=_ENDS[delta.finish_reason],
            prompt_tokens=delta.usage.prompt_tokens,
            completion_tokens=delta.usage.completion_tokens,
            cached_tokens=delta.usage.cached_tokens,
            index=delta.index,
        )
        if output.logprobs:
            complete.output_logprobs.CopyFrom(_output_logprobs(output.logprobs))
        if not self._stream and self._prompt_logprobs is not None:
            complete.input_logprobs.CopyFrom(self._prompt_logprobs)
        if isinstance(delta.stop_reason, str):
            complete.matched_stop_str = delta.stop_reason
        elif delta.stop_reason is not None:
            complete.matched_token_id = delta.stop_reason
        return complete


class _Output:
    """One output so far."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []  # if they are sent at the end
        self.is_sent = False


# What ends with another reason is told by the call's status.
_ENDS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORT: "abort"}


def _output_logprobs(entries: Sequence[TokenLogprobs]) -> pb.OutputLogProbs:
    return pb.OutputLogProbs(
        token_logprobs=[entry.logprob for entry in entries],
        token_ids=[entry.token_id for entry in entries],
        top_logprobs=map(_top, entries),
    )


def _input_logprobs(first_id: int, entries: Sequence[TokenLogprobs]) -> pb.InputLogProbs:
    """Of a whole prompt: its first token, before which there is nothing, has no value."""
    return pb.InputLogProbs(
        token_logprobs=[
            pb.InputTokenLogProb(),
            *(pb.InputTokenLogProb(value=entry.logprob) for entry in entries),
        ],
        token_ids=[first_id, *(entry.token_id for entry in entries)],
        top_logprobs=[pb.TopLogProbs(), *map(_top, entries)],
    )


def _top(entry: TokenLogprobs) -> pb.TopLogProbs:
    return pb.TopLogProbs(
        values=[logprob for _, logprob in entry.top], token_ids=[token for token, _ in entry.top]
    )
