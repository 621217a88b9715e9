"""Writes the event log of a running engine; see `event_log` for what is in it, and what is not.

It costs the step loop well under a millisecond a step.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engine.core.limits import MAX_INT32, Limits
from engine.runtime.event_log import (
    FORMAT,
    MARKED,
    STOPS,
    Abort,
    Admit,
    AdmitRequest,
    Beams,
    Commit,
    CommitTokens,
    Drain,
    Event,
    Fail,
    Flush,
    Header,
    Reload,
    Restore,
    Schedule,
    Tick,
    Top,
    encode,
    marked_positions,
    plan_digest,
)
from engine.sampling import SamplingParams
from engine.types import Domain, FinishReason, Request, StepPlan, StepTokens

log = logging.getLogger(__name__)

Tops = tuple[tuple[int, Top], ...]  # by row


class Recorder:
    """Appends events to a file. Not thread-safe: the engine loop owns it.

    Args:
      path: of the log, which is made anew, readable for its owner only.
      limits: of the scheduler.
      tokens: write requests and token ids in full. Such a log is as private as the conversations.
    """

    def __init__(self, path: str | Path, limits: Limits, *, tokens: bool = False):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.fchmod(descriptor, 0o600)  # also if it was there before
        self._file = open(descriptor, "w", encoding="utf-8")  # noqa: SIM115 - kept open on purpose
        self._pseudonyms = None if tokens else Pseudonyms(limits)
        self._write(Header(FORMAT, limits, tokens))

    def admit(self, request: Request) -> None:
        """A request came in."""
        pseudonyms = self._pseudonyms
        self._write(pseudonyms.admit(request) if pseudonyms else AdmitRequest(request))

    def abort(self, request_id: str, reason: FinishReason) -> None:
        """A sequence was ended from outside."""
        self._write(Abort(self._name(request_id), reason))
        if self._pseudonyms:
            self._pseudonyms.forget(request_id)

    def schedule(self, plan: StepPlan) -> None:
        """A step was planned."""
        digest = plan_digest(plan, self._name)
        self._write(Schedule(plan.step, digest, len(plan.rows), plan.num_tokens))
        self._file.flush()  # once a step: a crash then leaves the step that led to it
        if self._pseudonyms:
            self._pseudonyms.next_step = plan.step + 1

    def commit(self, plan: StepPlan, tokens: StepTokens) -> None:
        """A step's tokens are about to be taken in."""
        token_ids = tokens.token_ids[: len(plan.rows)]
        pseudonyms = self._pseudonyms
        self._write(
            pseudonyms.commit(plan, token_ids, _tops(plan, tokens, hide=True))
            if pseudonyms
            else CommitTokens(plan.step, token_ids, _tops(plan, tokens, hide=False))
        )

    def forget(self, request: Request) -> None:
        """A beam search ended, which only the scheduler knows; of others, nothing."""
        if self._pseudonyms and request.sampling.beam_width > 1:
            for request_id in request.names:
                self._pseudonyms.forget(request_id)

    def fail(self, plans: tuple[StepPlan, ...]) -> None:
        """These steps failed on the device."""
        self._write(Fail(tuple(plan.step for plan in plans)))
        self._file.flush()
        if self._pseudonyms:
            self._pseudonyms.fail(plans)

    def restore(self, request_id: str, first: int, count: int) -> None:
        """So many blocks of a request's prompt, from number `first` on, came from below the host
        tier: their keys follow from the request."""
        self._write(Restore(self._name(request_id), first, count))

    def tick(self, now: int) -> None:
        """Time passed, in milliseconds."""
        self._write(Tick(now))

    def flush(self, domain: Domain | None) -> None:
        """What a domain left was forgotten, or with None everything."""
        if domain is None:
            self._write(Flush(None))
        else:
            pseudonyms = self._pseudonyms
            self._write(
                Flush(pseudonyms.domain(domain) if pseudonyms else (domain.tenant, domain.salt))
            )

    def drain(self) -> None:
        """Nobody begins any more, until the weights are exchanged."""
        self._write(Drain(True))

    def reload(self, fingerprint: str) -> None:
        """The weights were exchanged, and all that was cached is forgotten."""
        self._write(Reload(fingerprint))

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def _name(self, request_id: str) -> str:
        return self._pseudonyms.name(request_id) if self._pseudonyms else request_id

    def _write(self, event: Event) -> None:
        self._file.write(encode(event))


class EventLog:
    """A recorder that may be missing, and that a full disk ends, while the engine goes on.

    Args:
      path: None for no log at all.
      limits, tokens: see `Recorder`.
    """

    def __init__(self, path: str | Path | None, limits: Limits, *, tokens: bool = False):
        self._recorder = Recorder(path, limits, tokens=tokens) if path else None

    def __call__(self, write: Callable[[Recorder], None]) -> None:
        """Log an event."""
        if self._recorder is None:
            return
        try:
            write(self._recorder)
        except OSError as error:
            log.error(
                "the event log can't be written (%s) and ends here; it replays up to its last "
                "whole line",
                error.strerror,
            )
            recorder, self._recorder = self._recorder, None
            with contextlib.suppress(OSError):
                recorder.close()


class Pseudonyms:
    """What stands in the log for requests and tokens, for each sequence that has not ended.

    It follows the scheduler: a sequence is forgotten with the event that ends it.

    Attributes:
      next_step: the number of the next plan.
    """

    def __init__(self, limits: Limits):
        self.next_step = 0
        self._limits = limits
        self._key = secrets.token_bytes(32)  # never written
        self._sequences: dict[str, _Pseudonym] = {}
        self._num_requests = 0
        self._public: list[tuple[int, ...]] = []

    def name(self, request_id: str) -> str:
        """A sequence's name in the log; of one that has ended, a name that nobody has."""
        sequence = self._sequences.get(request_id)
        return "none" if sequence is None else sequence.name

    def admit(self, request: Request) -> Admit:
        """Make names for a request and its forks."""
        domain = self.domain(request.domain)
        if request.is_public:
            self._public.append(request.prompt_ids)
        root = "/".join(domain).encode()
        chain = _Chain(self._key, self._limits.block_size, root, self._public)
        marks = chain.extend(request.prompt_ids)
        name = f"r{self._num_requests}"
        self._num_requests += 1
        for number, request_id in enumerate(request.names):
            self._sequences[request_id] = _Pseudonym(
                request.is_public,
                f"{name}.{number}" if number else name,
                self.next_step,
                request.stop_ids,
                min(len(request.prompt_ids) + request.max_tokens, self._limits.max_model_len),
                chain.copy() if number else chain,
            )
        return Admit(
            admit=len(request.prompt_ids),
            marks=marks,
            max_tokens=request.max_tokens,
            domain=domain,
            priority=request.priority,
            forks=len(request.forks),
            beams=_beams(request.sampling),
            prompt_logprobs=request.sampling.prompt_logprobs is not None,
            cache_ttl=request.cache_ttl,
            is_private=request.is_private,
            is_public=request.is_public,
        )

    def domain(self, domain: Domain) -> tuple[str, str]:
        """What stands for a domain."""
        tenant = self._hash(domain.tenant, b"tenant")
        return tenant, self._hash(domain.salt, b"salt") if domain.salt else ""

    def commit(self, plan: StepPlan, token_ids: Sequence[int], tops: Tops) -> Commit:
        """Follow the sequences by a token each, as `scheduler.commit` does."""
        marks, stops = [], []
        sequences, step = self._sequences, plan.step
        for index, (row, token) in enumerate(zip(plan.rows, token_ids, strict=True)):
            if not row.samples or row.request.sampling.beam_width > 1:
                continue
            sequence = sequences.get(row.request.request_id)
            if sequence is None or step < sequence.first_step:
                continue
            chain = sequence.chain
            if mark := chain.append(token):
                marks.append((index, mark))
            if token in sequence.stop_ids:
                stops.append(index)
            elif chain.length != sequence.max_total:
                continue
            if not sequence.is_public:  # or a failure may make it run again, for its prompt
                self.forget(row.request.request_id)
        return Commit(step, len(plan.rows), tuple(marks), tuple(stops), tops)

    def fail(self, plans: tuple[StepPlan, ...]) -> None:
        """The sequences in these plans end."""
        for plan in plans:
            for row in plan.rows:
                sequence = self._sequences.get(row.request.request_id)
                if sequence is None or plan.step < sequence.first_step:
                    continue
                if not sequence.is_public:  # which may be tried again
                    self.forget(row.request.request_id)

    def forget(self, request_id: str) -> None:
        """A sequence ended."""
        self._sequences.pop(request_id, None)

    def _hash(self, text: str, purpose: bytes) -> str:
        encoded = text.encode("utf-8", "surrogatepass")  # any text must do: it is a client's
        return hashlib.blake2b(encoded, digest_size=8, key=self._key, person=purpose).hexdigest()


def _beams(sampling: SamplingParams) -> Beams | None:
    if sampling.beam_width == 1:
        return None
    return Beams(sampling.beam_width, sampling.n, sampling.length_penalty, sampling.early_stopping)


def _tops(plan: StepPlan, tokens: StepTokens, *, hide: bool) -> Tops:
    """The likeliest tokens of the rows of beams; hidden, only whether they are stop tokens."""
    tops = []
    for index, logprobs in tokens.logprobs.items():
        request = plan.rows[index].request
        if request.sampling.beam_width > 1:
            top = logprobs.top
            if hide:
                top = tuple((STOPS * (token in request.stop_ids), value) for token, value in top)
            tops.append((index, top))
    return tuple(tops)


class _Pseudonym:
    """One sequence: its name in the log, and what `Pseudonyms.commit` has to know of it."""

    __slots__ = ("chain", "first_step", "is_public", "max_total", "name", "stop_ids")

    def __init__(
        self,
        is_public: bool,
        name: str,
        first_step: int,
        stop_ids: frozenset[int],
        max_total: int,
        chain: _Chain,
    ):
        self.is_public = is_public
        self.name = name
        self.first_step = first_step  # an earlier plan with its id means another's
        self.stop_ids = stop_ids
        self.max_total = max_total
        self.chain = chain


class _Chain:
    """The pseudo ids of a sequence of tokens: each link hashes the one before it and the tokens
    since, under a key.

    Attributes:
      length: tokens so far.
    """

    __slots__ = ("_block_size", "_key", "_link", "_public", "_root", "_since", "length")

    def __init__(self, key: bytes, block_size: int, root: bytes, public: Sequence[tuple[int, ...]]):
        self.length = 0
        self._key = key
        self._block_size = block_size
        self._root = root  # names the domain
        self._public = list(public)  # the texts that it may still be the beginning of
        self._link = b"" if public else root
        self._since: list[int] = []  # tokens after the last marked position

    def extend(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Take in a prompt. Returns the pseudo ids of its marked positions."""
        packed = np.array(token_ids, "<i4").tobytes()
        marks, since = [], 0
        num_public = max((_num_equal(token_ids, text) for text in self._public), default=0)
        for position in marked_positions(len(token_ids), self._block_size):
            if position >= num_public:
                self._leave_public()
            marks.append(self._mark(packed[4 * since : 4 * position + 4]))
            since = position + 1
        self._since = list(token_ids[since:])
        self.length = len(token_ids)
        self._public = [text for text in self._public if _num_equal(token_ids, text) == self.length]
        return tuple(marks)

    def append(self, token: int) -> int:
        """Take in the next token. Returns its pseudo id."""
        self._since.append(token)
        place = self.length % self._block_size
        self.length += 1
        if self._public:
            since = self._since
            start = self.length - len(since)
            kept = [text for text in self._public if list(text[start : self.length]) == since]
            if kept:
                self._public = kept
            elif place >= self._block_size - MARKED:
                self._leave_public()
        if place < self._block_size - MARKED:
            return 0
        packed = struct.pack(f"<{len(self._since)}i", *self._since)
        self._since.clear()
        return self._mark(packed)

    def copy(self) -> _Chain:
        """An independent chain in the same state."""
        other = _Chain(self._key, self._block_size, self._root, self._public)
        other._link = self._link
        other.length = self.length
        other._since = self._since.copy()
        return other

    def _leave_public(self) -> None:
        """From here on, what it says is its domain's."""
        if self._public:
            self._public = []
            self._link += self._root

    def _mark(self, packed: bytes) -> int:
        self._link = hashlib.blake2b(self._link + packed, digest_size=16, key=self._key).digest()
        return int.from_bytes(self._link[:4], "little") & MAX_INT32


def _num_equal(token_ids: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    length = min(len(token_ids), len(text))
    return next((n for n in range(length) if token_ids[n] != text[n]), length)
