"""Keeps outputs to their constraints: grammars are compiled here, and followed token by token.

llguidance does the parsing. What is ours: which text its grammars are made from, what a stranger's
grammar may take of the server, and the model's vocabulary, in bytes.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from engine.sampling import Constraint, ConstraintBroken, InvalidRequest
from engine.text.grammar_trials import NoAnswer, Trial, Trials
from engine.types import Domain, QueueFull

if TYPE_CHECKING:
    import llguidance
    import numpy as np

    from engine.text.tokenizer import Tokenizer

MAX_CACHED = 32  # grammars of a tenant, as texts that have passed their trial
# Bytes of compiled grammars: of one, of those of a tenant's requests, running and waiting, and of
# all. Usual are 100 KB, and 7 MB for a schema of 2,000 patterns.
MAX_BYTES = 64 * 2**20
MAX_TENANT_BYTES = 512 * 2**20
MAX_TOTAL_BYTES = 2**30
# Processor time that a request's masks may take: so much at once, and so much more for each token.
# Usual are 2 to 100 microseconds, and a millisecond for the first mask of a large grammar.
BURST_SECONDS = 0.1
SECONDS_PER_TOKEN = 0.002

_Key = tuple[str, Constraint]  # the domain's salt, and what is asked


class Grammars:
    """Compiles constraints for one model. Any thread may call it; nothing is done until then.

    Args:
      tokenizer: of the model.
      vocab_size: of the model, which may have fewer or more ids than the tokenizer.
      eos_token_ids: what ends an output.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._lock = threading.Lock()
        self._cache: dict[str, OrderedDict[_Key, Trial | InvalidRequest]] = {}  # by tenant
        self._taken: Counter[str] = Counter()  # bytes of what requests hold, by tenant;
        self._released: deque[tuple[str, int]] = deque()  # those that are to be taken off
        self._tools: _Tools | None = None

    def knows(self, constraint: Constraint, domain: Domain) -> bool:
        """Whether `matchers` needs no trial, so that it takes milliseconds, as a rule."""
        with self._lock:
            return (domain.salt, constraint) in self._cache.get(domain.tenant, ())

    def try_out(self, constraint: Constraint, domain: Domain) -> None:
        """Have a trial, if there was none, for `matchers` to find what came of it.

        Raises:
          InvalidRequest: the trial had no answer; another may have one.
          RuntimeError: it can't be tried out now.
        """
        self._found(constraint, domain)

    def matchers(self, constraint: Constraint, domain: Domain, count: int) -> tuple[Follower, ...]:
        """Matchers at the beginning of an output, for a request's sequences.

        A new grammar takes milliseconds, and a second or two at most. That it passed its trial is
        remembered for its domain's next requests; whether others use it, nobody can tell from the
        time. Each request has a compiled grammar of its own: what a lexer finds out has a limit,
        which another request's output must not reach for it.

        Args:
          constraint: what the outputs must match.
          domain: whose request it is.
          count: how many are needed.

        Raises:
          InvalidRequest: the constraint can't be used; with the parser's message.
          QueueFull: compiled grammars take as much memory as they may.
          RuntimeError: it can't be compiled now.
        """
        found = self._found(constraint, domain)
        if isinstance(found, InvalidRequest):
            raise InvalidRequest(found.field, found.message)
        compiled = self._reserve(domain.tenant, found.num_bytes)
        matcher = self._compile(constraint, found.lark)
        return tuple(Follower(matcher.deep_copy(), compiled) for _ in range(count))

    def close(self) -> None:
        """End the processes that grammars are tried out in. The next grammar starts another."""
        if self._tools is not None:
            self._tools.trials.close()

    def _found(self, constraint: Constraint, domain: Domain) -> Trial | InvalidRequest:
        """What came of a constraint's trial: now, or before. Raises what `try_out` does."""
        key = (domain.salt, constraint)
        with self._lock:
            cache = self._cache.setdefault(domain.tenant, OrderedDict())
            found = cache.get(key)
            if found is not None:
                cache.move_to_end(key)
        if found is None:
            try:
                found = self._tried(constraint)
            except NoAnswer:  # it may have one later
                raise
            except InvalidRequest as error:
                found = InvalidRequest(error.field, error.message)  # without its traceback
            with self._lock:
                cache[key] = found
                if len(cache) > MAX_CACHED:
                    cache.popitem(last=False)
        return found

    def _tried(self, constraint: Constraint) -> Trial:
        """The grammar that a constraint means, once it passed its trial. Raises InvalidRequest."""
        if not self._eos:
            raise InvalidRequest(
                "constraint",
                "needs a model with an end-of-sequence token, and this one's files name none",
            )
        trial = self._ready_tools().trials.try_out(constraint)
        if trial.num_bytes > MAX_BYTES:
            raise InvalidRequest(
                "constraint",
                f"{constraint.kind}: takes {trial.num_bytes} bytes when compiled, but at most "
                f"{MAX_BYTES} are given; make it simpler",
            )
        return trial

    def _reserve(self, tenant: str, num_bytes: int) -> _Compiled:
        """Make room for a request's grammar, or raise QueueFull. It counts as long as somebody has
        what this returns."""
        with self._lock:
            while self._released:
                owner, released = self._released.popleft()
                self._taken[owner] -= released
            self._taken += Counter()  # leaves out those who have nothing
            own, total = self._taken[tenant], self._taken.total()
            if own + num_bytes > MAX_TENANT_BYTES or total + num_bytes > MAX_TOTAL_BYTES:
                raise QueueFull(
                    "the grammars of requests that run or wait take all the memory that is given "
                    "to them; try again later"
                )
            self._taken[tenant] += num_bytes
        compiled = _Compiled()
        # In whatever thread it goes; that may have the lock.
        weakref.finalize(compiled, self._released.append, (tenant, num_bytes))
        return compiled

    def _compile(self, constraint: Constraint, lark: str) -> llguidance.LLMatcher:
        from engine.text.grammar_trial import Refused, compile_grammar

        try:
            return compile_grammar(self._ready_tools().vocabulary, lark)
        except Refused as refusal:  # not without having passed its trial
            raise InvalidRequest("constraint", f"{constraint.kind}: {refusal}") from None

    def _ready_tools(self) -> _Tools:
        with self._lock:
            self._tools = self._tools or self._make_tools()
            return self._tools

    def _make_tools(self) -> _Tools:
        from engine.text.grammar_trial import make_tokenizer

        known = min(self._vocab_size, self._tokenizer.vocab_size)
        tokens = [self._tokenizer.token_bytes[token] for token in range(known)]
        tokens += [b""] * (self._vocab_size - known)  # the model's padding: never allowed
        special = sorted(token for token in self._tokenizer.special_ids if token < known)
        trials = Trials(tokens, special, self._eos)
        return _Tools(make_tokenizer(tokens, special, self._eos), trials)


class _Tools(NamedTuple):
    """What takes some tenths of a second to make, when the first grammar comes."""

    vocabulary: llguidance.LLTokenizer
    trials: Trials


class _Compiled:
    """What the followers of a request share: its budget, and that they have a compiled grammar.

    Attributes:
      left: seconds of processor time that its outputs may take at once.
    """

    def __init__(self) -> None:
        self.left = BURST_SECONDS


class Follower:
    """A `Matcher`: llguidance's, and the time that it took of its request's."""

    __slots__ = ("_compiled", "_matcher")

    def __init__(self, matcher: llguidance.LLMatcher, compiled: _Compiled):
        self._matcher = matcher
        self._compiled = compiled

    def fill(self, mask: np.ndarray) -> None:
        """See `Matcher.fill`."""
        start = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check(start)

    def advance(self, token_id: int) -> None:
        """See `Matcher.advance`."""
        start = time.thread_time()
        self._compiled.left += SECONDS_PER_TOKEN
        self._matcher.consume_token(token_id)
        self._check(start)

    def _check(self, start: float) -> None:
        left = self._compiled.left - (time.thread_time() - start)
        self._compiled.left = min(BURST_SECONDS, left)
        if left < 0:
            raise ConstraintBroken(
                f"takes more than {1000 * SECONDS_PER_TOKEN:g} milliseconds a token to follow; "
                "make it less ambiguous",
                is_spent=True,
            )
        if self._matcher.is_error():
            from engine.text.grammar_trial import error_of

            # In the middle of an output, all but this is one of llguidance's limits.
            is_spent = self._matcher.stop_reason() != "NoExtensionBias"
            raise ConstraintBroken(error_of(self._matcher), is_spent=is_spent)
