"""From a request's fields to the engine's: sampling parameters, prompts, messages, constraints.

Fields of one name mean the same on both sides; what differs is written out here.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from engine.sampling import (
    Constraint,
    ConstraintKind,
    InvalidRequest,
    SamplingParams,
    grammar_kind,
)
from engine.serve.bounds import check_messages, check_prompt
from engine.serve.convert import MAX_CACHE_SALT_CHARS
from engine.serve.openai.schemas import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    StructuredOutputs,
    refuse_what_has_no_effect,
)
from engine.text import Message

MAX_CHOICES = 256  # outputs of one HTTP request: prompts times n
MAX_TEXT_PARTS = 1024  # of one message's content
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

_EQUAL = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "ignore_eos", "seed", "skip_special_tokens", "n"),
)
_LISTS = ("stop_token_ids", "allowed_token_ids", "bad_words")

TokenIds = tuple[int, ...]


def completion_sampling(request: CompletionRequest) -> SamplingParams:
    """How the tokens of a completion are chosen. A request for none (`max_tokens: 0` with echo)
    has one computed all the same.

    Raises:
      InvalidRequest: a field is out of its range, or doesn't go with another.
    """
    if request.best_of not in (None, request.n or 1):
        raise InvalidRequest(
            "best_of", f"{request.best_of} is not n ({request.n or 1}); every output is returned"
        )
    values = _common(request)
    values["max_tokens"] = DEFAULT_COMPLETION_TOKENS
    if request.max_tokens is not None:
        values["max_tokens"] = request.max_tokens
    if request.max_tokens == 0:
        if not request.echo:
            raise InvalidRequest(
                "max_tokens", "is 0, which is for scores: set echo and logprobs, or ask for tokens"
            )
        values["max_tokens"] = 1
    values["logprobs"] = request.logprobs
    if request.echo:
        values["prompt_logprobs"] = request.logprobs
    return SamplingParams(**values)


def chat_sampling(request: ChatRequest) -> SamplingParams:
    """How the tokens of an answer in a chat are chosen.

    Raises:
      InvalidRequest: a field is out of its range, or doesn't go with another.
    """
    values = _common(request)
    if request.max_completion_tokens is not None:
        if request.max_tokens not in (None, request.max_completion_tokens):
            raise InvalidRequest(
                "max_tokens",
                f"{request.max_tokens} is not max_completion_tokens "
                f"({request.max_completion_tokens}), its newer name; give one of them",
            )
        values["max_tokens"] = request.max_completion_tokens
    if request.logprobs:
        values["logprobs"] = request.top_logprobs or 0
    elif request.top_logprobs:
        raise InvalidRequest("top_logprobs", "is set, but logprobs is not; set it to true")
    return SamplingParams(**values)


def prompts_of(request: CompletionRequest, max_model_len: int) -> list[str | TokenIds]:
    """The prompts of a completion: texts or token ids.

    Args:
      request: what the client sent.
      max_model_len: tokens of prompt and output that the model takes.

    Raises:
      InvalidRequest: there is none, one is empty or too long, or they are of both kinds.
    """
    given: Any = request.prompt
    if isinstance(given, str) or isinstance(next(iter(given), None), int):
        given = [given]
    if (count := len(given) * (request.n or 1)) > MAX_CHOICES:
        raise InvalidRequest(
            "prompt",
            f"asks for {count} outputs (prompts times n), but one request has at most "
            f"{MAX_CHOICES}; send several",
        )
    for each in given:  # counted before each id is looked at: a body may have two million
        if isinstance(each, list):
            check_prompt(len(each), max_model_len)
    are_texts = all(isinstance(each, str) for each in given)
    if not (are_texts or all(_are_ids(each) for each in given)):
        raise InvalidRequest(
            "prompt",
            "mixes kinds; give a text, a list of texts, a list of token ids or a list of such "
            "lists",
        )
    if not given or not all(given):
        raise InvalidRequest("prompt", "is empty; give at least one token")
    return given if are_texts else [tuple(each) for each in given]


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(item, int) for item in given)


def messages_of(request: ChatRequest, max_model_len: int) -> tuple[Message, ...]:
    """The conversation.

    Args:
      request: what the client sent.
      max_model_len: tokens of prompt and output that the model takes; a message is one at least.

    Raises:
      InvalidRequest: there are no messages, too many, or one has something other than text.
    """
    if not request.messages:
        raise InvalidRequest("messages", "is empty; give at least one message")
    check_messages(len(request.messages), max_model_len)
    return tuple(_message(i, message) for i, message in enumerate(request.messages))


def cache_salt_of(request: GenerationRequest) -> str:
    """What narrows the sharing of cached blocks, within the caller's tenant: `cache_salt`, or the
    end user that the request is for."""
    salt, user = request.cache_salt or "", request.user or ""
    if salt and user and salt != user:
        raise InvalidRequest(
            "user", "is another name of cache_salt here, and the two differ; give one of them"
        )
    if len(salt or user) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequest(
            "cache_salt" if salt else "user",
            f"has more than {MAX_CACHE_SALT_CHARS} characters; send a hash of it",
        )
    return salt or user


def priority_of(request: GenerationRequest) -> int | None:
    """Lower goes first; as wide as in `octavo.v1`. None if the client didn't say."""
    priority = request.priority
    if priority is not None and not -(2**31) <= priority < 2**31:
        raise InvalidRequest("priority", f"{str(priority)[:40]} is not a whole number of 32 bits")
    return priority


def wants_usage(request: GenerationRequest) -> bool:
    """Whether a stream ends with the counts of tokens."""
    if (options := request.stream_options) is None:
        return False
    if not request.stream:
        raise InvalidRequest("stream_options", "is for streams; set stream to true")
    refuse_what_has_no_effect(options, "stream_options.")
    return bool(options.include_usage)


def field_path(request: msgspec.Struct, field: str) -> str:
    """What a client calls a field of its request that the engine calls `field`."""
    if not isinstance(request, GenerationRequest):
        return field
    match re.split(r"\W", field, maxsplit=1)[0]:
        case "prompt" | "prompt_ids":
            return "messages" if isinstance(request, ChatRequest) else "prompt"
        case "constraint":
            return _constraint_path(request.structured_outputs)
        case "prompt_logprobs":
            return "logprobs"
        case "logprobs" if isinstance(request, ChatRequest):
            return "top_logprobs"
        case "max_tokens" if isinstance(request, ChatRequest) and request.max_tokens is None:
            return "max_completion_tokens"
    return field


def _constraint_path(outputs: StructuredOutputs | None) -> str:
    """What a client calls the constraint: by the one field of `outputs` that is set."""
    if outputs is None:
        return "response_format"
    empty = StructuredOutputs()
    names = outputs.__struct_fields__
    return "structured_outputs." + next(
        name for name in names if getattr(outputs, name) not in (getattr(empty, name), False)
    )


def _common(request: GenerationRequest) -> dict[str, Any]:
    """The fields of both endpoints that are set, as SamplingParams takes them."""
    values: dict[str, Any] = {
        name: value for name in _EQUAL if (value := getattr(request, name)) is not None
    }
    for name in _LISTS:
        if (items := getattr(request, name)) is not None:
            values[name] = tuple(items)
    if request.stop is not None:
        values["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.top_k is not None:
        values["top_k"] = 0 if request.top_k == -1 else request.top_k  # vLLM's older "all"
    if request.logit_bias:
        values["logit_bias"] = tuple(
            (_token_id(text), bias) for text, bias in request.logit_bias.items()
        )
    if (constraint := _constraint(request)) is not None:
        values["constraint"] = constraint
    return values


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise InvalidRequest("logit_bias", f"{text!r:.40} is not a token id; its keys are")
    return int(text)


def _message(index: int, message: ChatMessage) -> Message:
    path = f"messages[{index}]"
    refuse_what_has_no_effect(message, f"{path}.")
    if not message.role:
        raise InvalidRequest(f"{path}.role", "is empty; most models take system, user, assistant")
    content = message.content
    if content is None:
        raise InvalidRequest(f"{path}.content", "is missing; give a text")
    if isinstance(content, str):
        return Message(message.role, content)
    if len(content) > MAX_TEXT_PARTS:
        raise InvalidRequest(
            f"{path}.content", f"has {len(content)} parts, but at most {MAX_TEXT_PARTS} are taken"
        )
    for number, part in enumerate(content):
        others = (part.image_url, part.input_audio, part.file)
        if part.type != "text" or part.text is None or others != (None, None, None):
            raise InvalidRequest(
                f"{path}.content[{number}]",
                f"is of type {part.type!r:.40}, but this server takes text only",
            )
    return Message(message.role, "\n".join(part.text or "" for part in content))


def _constraint(request: GenerationRequest) -> Constraint | None:
    """What the output must match. `response_format` and `structured_outputs` are two ways to say
    it; one of them at a time."""
    form, outputs = request.response_format, request.structured_outputs
    if outputs is not None:
        if form is not None and form.type != "text":
            raise InvalidRequest(
                "structured_outputs", "says the same as response_format; give one of them"
            )
        return _structured(outputs)
    if form is None:
        return None
    if form.type == "json_schema" and form.json_schema is None:
        raise InvalidRequest(
            "response_format.json_schema",
            'is missing; the type is json_schema, so give it: {"schema": …}',
        )
    if form.type in ("text", "json_object") and form.json_schema is not None:
        raise InvalidRequest(
            "response_format.json_schema",
            f"goes with the type json_schema only, and the type is {form.type}; leave out one",
        )
    match form.type:
        case "text":
            return None
        case "json_object":
            return Constraint("json_object")
        case "json_schema":
            assert form.json_schema is not None
            return Constraint("json_schema", _text(form.json_schema.schema))
    raise InvalidRequest(
        "response_format.type", f"{form.type!r:.40} is not one of text, json_object, json_schema"
    )


def _structured(outputs: StructuredOutputs) -> Constraint:
    """What the one field that is set means."""
    found: list[tuple[ConstraintKind, str, tuple[str, ...]]] = []
    if (text := _text(outputs.json)) != "null":
        if text.startswith('"'):  # vLLM takes a schema as a text too
            text = msgspec.json.decode(text, type=str)
        found.append(("json_schema", text, ()))
    if outputs.json_object:
        found.append(("json_object", "", ()))
    if outputs.regex is not None:
        found.append(("regex", outputs.regex, ()))
    if outputs.choice is not None:
        found.append(("choice", "", tuple(outputs.choice)))
    if outputs.grammar is not None:
        found.append((grammar_kind(outputs.grammar), outputs.grammar, ()))
    if outputs.structural_tag is not None:
        found.append(("structural_tag", outputs.structural_tag, ()))
    if len(found) != 1:
        raise InvalidRequest(
            "structured_outputs",
            f"sets {len(found)} of json, json_object, regex, choice, grammar and "
            "structural_tag; set one",
        )
    return Constraint(*found[0])


def _text(raw: msgspec.Raw) -> str:
    return bytes(raw).decode().strip()
