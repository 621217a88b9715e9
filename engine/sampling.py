"""What a client may ask of the choice of tokens, and the limits of it, checked on construction."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal, Protocol, get_args

if TYPE_CHECKING:
    import numpy as np


class InvalidRequest(ValueError):
    """A request that can't be served as given.

    Args:
      field: the name of the offending field, as a client would write it.
      message: what was given, the limit, and the way out.
    """

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class PromptTooLong(InvalidRequest):
    """A prompt that has no room in the model's context.

    Args:
      field: as above.
      count: tokens that it has.
      most: that the model takes.
    """

    def __init__(self, field: str, count: int, most: int):
        super().__init__(
            field,
            f"has {count} tokens, but with one token of output the model takes at most {most}; "
            "shorten it or raise model.max_model_len",
        )


# Limits of what one request may ask for. The sampler's device state is sized by them.
MAX_SAMPLES = 128  # sequences of one prompt
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 16
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_BAD_WORDS = 64  # token sequences, after tokenisation
MAX_BAD_WORD_TOKENS = 8
MAX_LOGIT_BIAS = 1024
MAX_CONSTRAINT_CHARS = 131_072  # of a schema, a regex or a grammar, or of all choices together
MAX_CHOICES = 1024

ConstraintKind = Literal[
    "json_schema", "json_object", "regex", "lark", "ebnf", "structural_tag", "choice"
]

_NOT_WITH_BEAMS = frozenset(
    (
        *("min_tokens", "top_k", "top_p", "min_p", "seed", "stop", "bad_words", "logit_bias"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "allowed_token_ids"),
        *("logprobs", "prompt_logprobs", "constraint"),
    )
)
# What could leave a constrained row without a token to choose, or without an end.
_NOT_WITH_CONSTRAINTS = ("min_tokens", "allowed_token_ids", "bad_words", "ignore_eos")


@dataclasses.dataclass(frozen=True, slots=True)
class Constraint:
    """What the whole output must match. Checked on construction, but for the text's grammar.

    Attributes:
      kind: what `text` is: a JSON schema, a regular expression, a grammar in Lark's form, or one
        in EBNF as llama.cpp writes it (GBNF); or a structural tag in vLLM's JSON or xgrammar's,
        free text in which certain beginnings go on by a schema. Or "json_object", any JSON object,
        and "choice", one of `choices`, which have no text.
      text: at most MAX_CONSTRAINT_CHARS characters.
      choices: texts, at most MAX_CHOICES.
    """

    kind: ConstraintKind
    text: str = ""
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(ConstraintKind):
            kinds = ", ".join(get_args(ConstraintKind))
            raise InvalidRequest("constraint.kind", f"{self.kind!r:.40} is not one of {kinds}")
        if not isinstance(self.text, str):
            raise InvalidRequest("constraint.text", "is not a text")
        _check_count("constraint.choices", self.choices, MAX_CHOICES)
        for choice in self.choices:
            if not isinstance(choice, str) or not choice:
                raise InvalidRequest("constraint.choices", "each must be a text that is not empty")
        has_text = self.kind not in ("json_object", "choice")
        if bool(self.text) is not has_text:
            problem = "is empty, but {} takes one" if has_text else "is given, but {} takes none"
            raise InvalidRequest("constraint.text", problem.format(self.kind))
        if bool(self.choices) is not (self.kind == "choice"):
            problem = "are given, but {} takes none" if self.choices else "is empty; give some"
            raise InvalidRequest("constraint.choices", problem.format(self.kind))
        if (num_chars := len(self.text) + sum(map(len, self.choices))) > MAX_CONSTRAINT_CHARS:
            raise InvalidRequest(
                "constraint",
                f"has {num_chars} characters, but at most {MAX_CONSTRAINT_CHARS} are taken; "
                "make it shorter",
            )


def grammar_kind(grammar: str) -> ConstraintKind:
    """Which form a grammar has: EBNF (GBNF) writes its rules as `name ::= …`, Lark as `name: …`.
    vLLM tells them apart in the same way."""
    if len(grammar) > MAX_CONSTRAINT_CHARS:
        return "lark"  # whichever: `Constraint` refuses it, and a longer one takes long to look at
    is_ebnf = any(
        "::=" in line.partition("#")[0] and not line.lstrip().startswith("//")
        for line in grammar.splitlines()
    )
    return "ebnf" if is_ebnf else "lark"


class Matcher(Protocol):
    """Follows one output under a constraint. One thread at a time may use it."""

    def fill(self, mask: np.ndarray) -> None:
        """Say what may come next, in int32[ceil(V / 32)]: token i is bit i % 32 of word i // 32.

        Where the output can't go on, only the model's end-of-sequence tokens may come.

        Raises:
          ConstraintBroken: it can't be told, within the limits of time and memory.
        """
        ...

    def advance(self, token_id: int) -> None:
        """Take in the token that came. Raises ConstraintBroken, too if it may not have come."""
        ...


class ConstraintBroken(RuntimeError):
    """An output can't be kept to its constraint any longer.

    Args:
      message: why.
      is_spent: it has used up the time or memory that it may; nothing is wrong with it otherwise.
    """

    def __init__(self, message: str, *, is_spent: bool = False):
        super().__init__(message)
        self.is_spent = is_spent


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Every field is validated on construction.

    Attributes:
      max_tokens: most tokens to generate; None means up to the model's context.
      min_tokens: stop tokens are suppressed until this many tokens were generated.
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_k: keep the k most likely tokens (and ties with the k-th); 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches top_p.
      min_p: keep tokens at least min_p times as likely as the most likely one.
      repetition_penalty: divides positive and multiplies negative logits of tokens in the
        prompt or the output (Keskar et al., 2019); 1 is off.
      presence_penalty: subtracted from logits of tokens already generated.
      frequency_penalty: subtracted once for each time a token was generated.
      logit_bias: (token id, bias) pairs added to the logits; at most MAX_LOGIT_BIAS.
      allowed_token_ids: if given, only these tokens can be chosen.
      bad_words: texts that must not be generated.
      stop: texts that end the generation; they are not part of the output.
      stop_token_ids: token ids that end the generation, besides the model's own.
      ignore_eos: the model's own end-of-sequence tokens don't end the generation.
      seed: names the draw; None lets the engine choose one.
      logprobs: None for none; otherwise the chosen token's log-probability and that many of
        the most likely tokens (0 to MAX_LOGPROBS), before penalties and temperature.
      prompt_logprobs: the same for each prompt token.
      skip_special_tokens: leave tokens such as <|im_end|> out of the text.
      n: independent sequences from the prompt, which share its cache (1 to MAX_SAMPLES). The
        i-th draws with seed + i. With beams: how many of them are returned, best first.
      beam_width: continuations that are followed at once, to find likely whole outputs; 1 is off.
        No more than MAX_LOGPROBS together with the tokens that end the generation.
      length_penalty: an output's score is its log-probability over its length to this power.
      early_stopping: the search ends with the first beam_width outputs. Without, it goes on while
        the best beam's score, were it to end now, is above the worst of those.
      constraint: what the whole output must match; it then ends as soon as it can't go on. Stop
        strings and tokens still end it early, and max_tokens cuts it off.

    Beam search takes the same choices as transformers' (`num_beams`), and no field that changes
    probabilities, draws, or reads the text.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    n: int = 1
    beam_width: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_range("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _check_int("n", self.n, 1, MAX_SAMPLES)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequest(
                    "min_tokens", f"{self.min_tokens} is above max_tokens ({self.max_tokens})"
                )
        for field in ("ignore_eos", "skip_special_tokens", "early_stopping"):
            if not isinstance(value := getattr(self, field), bool):
                raise InvalidRequest(field, f"{value!r:.80} is neither true nor false")
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**64 - 1)
        for field in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, field)) is not None:
                _check_int(field, value, 0, MAX_LOGPROBS)
        _check_count("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidRequest(
                    "stop",
                    f"{text!r:.80} must be a text of 1 to {MAX_STOP_STRING_CHARS} characters",
                )
        _check_count("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, 2**31 - 1)
        _check_count("bad_words", self.bad_words, MAX_BAD_WORDS)
        for text in self.bad_words:
            if not isinstance(text, str) or not text:
                raise InvalidRequest("bad_words", "each must be a text that is not empty")
        _check_count("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for entry in self.logit_bias:
            if not isinstance(entry, tuple) or len(entry) != 2:
                raise InvalidRequest("logit_bias", f"{entry!r:.80} is not a (token id, bias) pair")
            _check_int("logit_bias", entry[0], 0, 2**31 - 1)
            _check_range("logit_bias", entry[1], -100.0, 100.0, whose=f" for token {entry[0]}")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise InvalidRequest("logit_bias", "names a token twice; give each token once")
        if self.allowed_token_ids is not None and not isinstance(self.allowed_token_ids, tuple):
            raise InvalidRequest("allowed_token_ids", "must be a tuple of token ids")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest(
                "allowed_token_ids", "is empty, so no token could be chosen; leave it out"
            )
        _check_int("beam_width", self.beam_width, 1, MAX_LOGPROBS)
        _check_range("length_penalty", self.length_penalty, -10.0, 10.0)
        if self.beam_width > 1:
            self._check_beams()
        elif self.length_penalty != 1.0 or self.early_stopping:
            field = "early_stopping" if self.early_stopping else "length_penalty"
            raise InvalidRequest(field, "is for beam search; set beam_width above 1")
        if self.constraint is not None:
            self._check_constraint()

    def _check_constraint(self) -> None:
        """Refuse what could contradict the constraint, so that no token would be left."""
        if not isinstance(self.constraint, Constraint):
            raise InvalidRequest("constraint", "is not a Constraint")
        for field in dataclasses.fields(self):
            if field.name in _NOT_WITH_CONSTRAINTS and getattr(self, field.name) != field.default:
                raise InvalidRequest(
                    field.name,
                    "does not go with a constraint, which it could contradict; leave one of the "
                    "two out",
                )

    def _check_beams(self) -> None:
        """Refuse what has no meaning for a search, or none that is agreed on."""
        if self.n > self.beam_width:
            raise InvalidRequest(
                "n",
                f"{self.n} is above beam_width ({self.beam_width}); that many outputs are found",
            )
        if self.temperature not in (0.0, 1.0):
            raise InvalidRequest(
                "temperature",
                f"{self.temperature!r} would change the probabilities that beam search goes by; "
                "leave it out, or set beam_width to 1",
            )
        for field in dataclasses.fields(self):
            if field.name in _NOT_WITH_BEAMS and getattr(self, field.name) != field.default:
                raise InvalidRequest(
                    field.name, "does not go with beam search; leave it out, or set beam_width to 1"
                )

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn (temperature 0, or beam search)."""
        return self.temperature == 0.0 or self.beam_width > 1

    @property
    def edits_logits(self) -> bool:
        """Whether logits change before the choice, so that even a greedy row needs a pass."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.min_tokens > 0
            or bool(self.logit_bias or self.bad_words)
            or self.allowed_token_ids is not None
        )


def _check_range(
    field: str, value: float, low: float, high: float, *, low_open: bool = False, whose: str = ""
) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not (low < value if low_open else low <= value) or value > high:
        brackets = f"{'(' if low_open else '['}{low:g}, {high:g}]"
        raise InvalidRequest(field, f"{value!r}{whose} is not a number in {brackets}")


def _check_int(field: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(field, f"{value!r} is not a whole number in [{low}, {high}]")


def _check_count(field: str, values: tuple, limit: int) -> None:
    if not isinstance(values, tuple):
        raise InvalidRequest(field, f"must be a tuple, but is a {type(values).__name__}")
    if len(values) > limit:
        raise InvalidRequest(field, f"has {len(values)} entries, but at most {limit} are taken")
