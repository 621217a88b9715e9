"""The format of the event log: the scheduler's inputs and decisions, as lines of JSON.

`recorder` writes such a log and `replay` rebuilds every plan from it.

By default it holds no text, no token ids and no name that a client chose. Plans depend on how many
tokens there are, on which blocks hold equal ones, and on which tokens ended a sequence. So a token
is written as a *pseudo id*: 0, but at the last `MARKED` positions of each block 31 bits of a keyed
hash of the domain and everything up to there (without the domain, as long as that is the text of
a public prefix). The key is drawn for each log and not kept, so that
nobody can try guesses of a prompt on the log; it shows which prompts of a domain begin alike, to
about a block. Blocks that differ get equal pseudo ids once in 2^62 (in 2^31 if they differ in the
last token alone): the replay then takes them for equal, and says that a plan differs from the
recorded one. Requests are r0, r1, … in the order of their admission, their forks r0.1, r0.2, …; a
tenant or a salt is a keyed hash.

A new kind of event takes a struct here, listed in `EVENTS`; a method in `Recorder` that writes it;
and a case in `Replay.apply`. Its first field has no default and a name that no other kind has: it
tells the kinds apart. What it says of requests must use the log's names, and of blocks none of
their keys, which differ in a replay: name a request and a position in its prompt.

Reading a log is safe whatever it holds: it is parsed strictly, no number in it sizes memory before
it is checked, and it is only ever fed to the scheduler.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from engine.core.limits import MAX_INT32, Limits
from engine.types import FinishReason, Request, StepPlan

FORMAT = 2
STOPS = 1  # what stands for a token that ends a beam
MARKED = 2  # positions of a block, at its end, whose pseudo ids say what it holds

# Far beyond what one scheduler runs, and small enough for any machine that replays.
MAX_BLOCKS = 2**22
MAX_SEQS = 2**16
MAX_PROMPT_TOKENS = 2**26  # of all requests that have not ended
MAX_LINE = 2**26  # characters; a prompt of a million tokens takes a tenth

PseudoId = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT32)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT32)]


class LogError(ValueError):
    """A log that can't be read or doesn't replay: says which line, and why."""


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line. Its first field, which names the kind, is what tells the kinds apart."""


Top = tuple[tuple[int, float], ...]  # (token or what stands for it, log-probability)


class Header(Event, frozen=True):
    """The first line."""

    octavo_event_log: int
    limits: Limits
    holds_tokens: bool = False


class Beams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a search goes by, of which `n` outputs were asked for."""

    width: Count
    n: Count
    length_penalty: float
    early_stopping: bool


class Admit(Event, frozen=True):
    """A request came in, with so many tokens; `marks` are those that `marked_positions` names."""

    admit: Count
    marks: tuple[PseudoId, ...]
    max_tokens: int
    domain: tuple[str, str]  # tenant and salt
    priority: int = 0
    forks: Count = 0
    beams: Beams | None = None
    prompt_logprobs: bool = False  # then no position may come from the cache
    cache_ttl: Count = 0
    is_private: bool = False
    is_public: bool = False


class AdmitRequest(Event, frozen=True):
    """A request came in, in a log that holds tokens."""

    admit_request: Request


class Abort(Event, frozen=True):
    """A sequence was ended from outside."""

    abort: str
    reason: FinishReason


class Schedule(Event, frozen=True):
    """A step was planned; a replay comes to a plan with the same digest."""

    schedule: Count
    digest: str
    rows: Count
    tokens: Count


class Commit(Event, frozen=True):
    """A step's tokens were taken in: those that are not 0, and the rows that met a stop token."""

    commit: Count
    rows: Count
    marks: tuple[tuple[Count, PseudoId], ...] = ()  # (row, pseudo id)
    stops: tuple[Count, ...] = ()
    beams: tuple[tuple[Count, Top], ...] = ()  # by row; a token is STOPS if it ends a beam, else 0


class CommitTokens(Event, frozen=True):
    """A step's tokens were taken in, in a log that holds tokens."""

    commit_tokens: Count
    tokens: tuple[Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)], ...]
    beams: tuple[tuple[Count, Top], ...] = ()  # by row


class Fail(Event, frozen=True):
    """These steps failed on the device."""

    fail: tuple[Count, ...]


class Restore(Event, frozen=True):
    """Blocks of a waiting request's prompt came into the host tier from below it."""

    restore: str
    first: Count
    count: Count


class Tick(Event, frozen=True):
    """Time passed, in milliseconds."""

    tick: Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class Flush(Event, frozen=True):
    """What a domain left was forgotten, or with None everything."""

    flush: tuple[str, str] | None  # tenant and salt


class Drain(Event, frozen=True):
    """The weights are to be exchanged: until then, only what has begun runs."""

    drain: Literal[True]


class Reload(Event, frozen=True):
    """The weights were exchanged for those of that fingerprint, and nothing cached was kept."""

    reload: str


EVENTS = (Admit, AdmitRequest, Abort, Schedule, Commit, CommitTokens, Fail, Restore, Tick, Flush)
EVENTS += (Drain, Reload)
_KINDS: dict[str, type[Event]] = {kind.__struct_fields__[0]: kind for kind in EVENTS}


def kind_of(event: Event) -> str:
    """What a line says of its kind, such as `admit`."""
    return event.__struct_fields__[0]


def marked_positions(length: int, block_size: int) -> Iterator[int]:
    """Which of the first positions have a pseudo id of their own, in order."""
    for block in range(0, length, block_size):
        end = block + block_size
        yield from range(max(block, end - MARKED), min(end, length))


def plan_digest(plan: StepPlan, name: Callable[[str], str] = str) -> str:
    """A hash over everything that a plan decides, as hex; no token id goes into it.

    Args:
      plan: any.
      name: gives a request's name in the log.
    """
    moves = (
        plan.block_copies,
        [swap[:2] for swap in plan.swap_outs],
        plan.swap_ins,
        [plan.erased_blocks, plan.erased_slots],
    )
    numbers = [plan.step, len(plan.preempted), len(plan.rows), *map(len, moves)]
    for pairs in moves:
        numbers += itertools.chain.from_iterable(pairs)
    names = [name(request_id) for request_id in plan.preempted]
    blocks: tuple[np.ndarray, ...] = ()
    if plan.rows:  # by column; a field more or less in a row ends here
        (
            requests,
            slots,
            starts,
            counts,
            token_ids,
            blocks,
            samples,
            positions,
            histories,
            sources,
        ) = zip(*plan.rows, strict=True)
        names += [name(request.request_id) for request in requests]
        for column in (slots, starts, counts, samples, positions, map(len, blocks)):
            numbers += column
        numbers += map(len, token_ids)
        numbers += [-1 if history is None else len(history) for history in histories]
        numbers += [-1 if source is None else source for source in sources]
    digest = hashlib.blake2b(json.dumps(names).encode(), digest_size=16)
    digest.update(np.array(array("q", numbers)).astype("<i8", copy=False))
    if blocks:
        digest.update(np.concatenate(blocks).astype("<i4", copy=False))
    return digest.hexdigest()


def encode(event: Event) -> str:
    """An event as a line."""
    tree = msgspec.to_builtins(event)
    if isinstance(event, AdmitRequest):
        del tree["admit_request"]["sampler_row"]  # follows from the rest
    return json.dumps(tree, separators=(",", ":")) + "\n"


def read(path: str | Path) -> tuple[Header, Iterator[tuple[int, Event]]]:
    """The first line of a log, and an iterator over the others with their numbers.

    A torn last line is left out. Both may raise `LogError`.
    """
    lines = _lines(path)
    number, tree = next(lines, (0, {}))
    if (found := tree.get("octavo_event_log")) != FORMAT:
        if isinstance(found, int):
            raise LogError(
                f"{path} is an Octavo event log of format {found}, but this version replays "
                f"format {FORMAT}; use the version that wrote it"
            )
        raise LogError(f"{path} is not an Octavo event log")
    return _header(tree, f"{path}:{number}"), _events(path, lines)


def _events(
    path: str | Path, lines: Iterator[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[int, Event]]:
    for number, tree in lines:
        where = f"{path}:{number}"
        kind = next((kind for name, kind in _KINDS.items() if name in tree), None)
        if kind is None:
            raise LogError(f"{where}: unknown event {sorted(tree)[:3]!r:.80}")
        yield number, _decode(tree, kind, where)


def _lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered objects, one a line, up to a line that the writer didn't get to finish."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number in itertools.count(1):
                line = file.readline(MAX_LINE)
                if not line.endswith("\n"):
                    if len(line) == MAX_LINE:
                        raise LogError(f"{path}:{number}: longer than {MAX_LINE} characters")
                    return
                try:
                    tree = json.loads(line)
                except (ValueError, RecursionError):
                    raise LogError(f"{path}:{number}: not JSON") from None
                if not isinstance(tree, dict):
                    raise LogError(f"{path}:{number}: not an event")
                yield number, tree
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"can't read {path}: {error}") from None


def _header(tree: dict[str, Any], where: str) -> Header:
    """The header, if a scheduler with its limits can be made anywhere."""
    header = _decode(tree, Header, where)
    for name, value, largest in (
        ("num_blocks", header.limits.num_blocks, MAX_BLOCKS),
        ("host_blocks", header.limits.host_blocks, MAX_BLOCKS),
        ("max_num_seqs", header.limits.max_num_seqs, MAX_SEQS),
    ):
        if value > largest:
            raise LogError(f"{where}: {name} is {value}, but a log may say at most {largest}")
    return header


def _decode[T](tree: dict[str, Any], kind: type[T], where: str) -> T:
    try:
        value = msgspec.convert(tree, kind)
        for name, part in tree.items():
            _refuse_unknown(part, getattr(value, name))
    except (ValueError, RecursionError) as error:  # msgspec's and InvalidRequest are ValueErrors
        raise LogError(f"{where}: {error}") from None
    return value


def _refuse_unknown(tree: Any, value: Any) -> None:
    """A field that this version doesn't know may matter to the plans."""
    if dataclasses.is_dataclass(value):
        fields = {field.name for field in dataclasses.fields(value) if field.init}
        if unknown := sorted(tree.keys() - fields):
            raise ValueError(f"unknown fields {unknown[:3]!r:.80} in {type(value).__name__}")
        for name, part in tree.items():
            _refuse_unknown(part, getattr(value, name))
