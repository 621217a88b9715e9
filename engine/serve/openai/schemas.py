"""What a client may send, as types: JSON that doesn't fit them is refused, with the field's name.

Field names and meanings are OpenAI's (https://platform.openai.com/docs/api-reference); those that
vLLM's server adds have its names and meanings, and three are our own: `share_prefix`, `timeout` and
`bad_words`. A field that would have no effect is not taken.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from typing import Any

import msgspec

from engine.sampling import InvalidRequest

_AT = re.compile(r" - at `\$\.?(?P<path>.*)`$")
_UNKNOWN = re.compile(r"unknown field `(?P<name>.*)`$")
_MISSING = re.compile(r"missing required field `(?P<name>.*)`$")
_MISTYPED = re.compile(r"Expected `(?P<expected>[a-z |]+)`, got `(?P<got>[a-z]+)`$")
_JSON_NAMES = {  # of msgspec's types
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How a stream is sent: `include_usage` adds a last event with the counts of tokens."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A schema. It is always enforced, whether `strict` is set or not; its name and description are
    documentation."""

    schema: msgspec.Raw
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What the whole output must be: text, any JSON object, or JSON of a schema."""

    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """vLLM's way to say what the output must match; exactly one is set."""

    json: msgspec.Raw = msgspec.Raw(b"null")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: str | None = None


class GenerationRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What both kinds of requests have. None stands for a default."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = None
    priority: int | None = None
    # our own
    bad_words: list[str] | None = None
    share_prefix: bool | None = None
    timeout: float | None = None
    # OpenAI's that are refused, unless they ask for nothing; see NEUTRAL
    metadata: Any = None
    service_tier: Any = None
    store: Any = None


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Any = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A piece of a message's content; what isn't text is known, to be refused by its name."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One turn of a chat. An answer of ours can be sent back as it is."""

    role: str
    content: str | list[TextPart] | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    name: Any = None
    refusal: Any = None
    tool_call_id: Any = None
    tool_calls: Any = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """POST /tokenize, as vLLM has it."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """POST /detokenize, as vLLM has it."""

    tokens: list[int]
    model: str | None = None


_NO_TOOLS = "this server calls no tools; describe them in a message, or fix the output's form with "
_NO_TOOLS += "response_format"
_TEXT_ONLY = "this server takes and makes text only"

# Fields that nothing is done with: the values that ask for nothing, and why any other is refused.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "annotations": ((None, []), "has no effect here; leave it out"),
    "audio": ((None,), _TEXT_ONLY),
    "function_call": ((None, "none", "auto"), _NO_TOOLS),
    "functions": ((None, []), _NO_TOOLS),
    "include_obfuscation": ((None, False), "this server doesn't pad its events; leave it out"),
    "metadata": ((None, {}), "nothing is stored here; leave it out"),
    "modalities": ((None, ["text"]), _TEXT_ONLY),
    "name": ((None,), "chat templates have no place for it; write it into the content"),
    "parallel_tool_calls": ((None, True, False), _NO_TOOLS),
    "prediction": ((None,), "this server doesn't speculate; leave it out"),
    "reasoning_effort": ((None, "none"), "no model here has it as a setting; leave it out"),
    "refusal": ((None,), "has no place in a chat template; write it into the content"),
    "service_tier": ((None, "auto", "default"), "there is one; order requests with priority"),
    "store": ((None, False), "nothing is stored here; leave it out"),
    "suffix": ((None, ""), "this server continues texts and doesn't fill gaps; leave it out"),
    "tool_call_id": ((None,), _NO_TOOLS),
    "tool_calls": ((None, []), _NO_TOOLS),
    "tool_choice": ((None, "none", "auto"), _NO_TOOLS),
    "tools": ((None, []), _NO_TOOLS),
    "verbosity": ((None,), "no model here has it as a setting; leave it out"),
    "web_search_options": ((None,), _NO_TOOLS),
}


# Fields that are known by another name, or elsewhere: what clients of other servers may send.
_ELSEWHERE = {
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
}
_OF_THE_OTHER: dict[tuple[type[msgspec.Struct], str], str] = {
    (CompletionRequest, "messages"): "which is for /v1/chat/completions; here it is prompt",
    (ChatRequest, "prompt"): "which is for /v1/completions; here it is messages",
}


def decode[T: msgspec.Struct](body: bytes, kind: type[T]) -> T:
    """A request's body.

    Raises:
      InvalidRequest: it is not JSON, has a field that is not known, or one of another type.
    """
    if not body.strip():
        raise InvalidRequest("body", "is empty; send a JSON object")
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), body, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest("body", f"is not JSON in UTF-8: {error}") from None
    except RecursionError:
        raise InvalidRequest("body", "is nested too deeply; no field needs that") from None
    refuse_what_has_no_effect(request)
    return request


def refuse_what_has_no_effect(struct: msgspec.Struct, path: str = "") -> None:
    """Raise InvalidRequest if a field of NEUTRAL asks for something."""
    for name in struct.__struct_fields__:
        if name in NEUTRAL:
            value, (neutral, why) = getattr(struct, name), NEUTRAL[name]
            # By type as well: to Python, 0 is False.
            if not any(value == each and type(value) is type(each) for each in neutral):
                raise InvalidRequest(f"{path}{name}", f"is not supported: {why}")


def _invalid(message: str, body: bytes, kind: type[msgspec.Struct]) -> InvalidRequest:
    """msgspec's complaint, with the field that it is about."""
    match = _AT.search(message)
    path = match["path"] if match else ""
    message = message[: match.start()] if match else message
    prefix = f"{path}." if path else ""
    if missing := _MISSING.search(message):
        return InvalidRequest(f"{prefix}{missing['name']}", "is missing; it has no default")
    if mistyped := _MISTYPED.fullmatch(message):
        kinds = [_JSON_NAMES[name] for name in mistyped["expected"].split(" | ") if name != "null"]
        got = _JSON_NAMES[mistyped["got"]]
        return InvalidRequest(path or "body", f"is {got}; it must be {' or '.join(kinds)}")
    if not (unknown := _UNKNOWN.search(message)):
        return InvalidRequest(path or "body", message)
    names = [unknown["name"]]
    if not path:  # all of them at once, if what follows is JSON too
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            keys = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
            names = [name for name in keys if name not in kind.__struct_fields__]
    shown = ", ".join(
        f"{prefix}{name}"[:80] + ("" if path else _hint(name, kind)) for name in names[:10]
    )
    return InvalidRequest(
        f"{prefix}{names[0]}"[:80],
        f"this server does not know {shown}; correct or leave out what is listed here, as it would "
        "have no effect",
    )


def _hint(name: str, kind: type[msgspec.Struct]) -> str:
    """What may have been meant by a field that is not known, in parentheses."""
    if (where := _OF_THE_OTHER.get((kind, name))) is not None:
        return f" ({where})"
    near = difflib.get_close_matches(name[:80], kind.__struct_fields__, n=1, cutoff=0.8)
    meant = _ELSEWHERE.get(name) or (near[0] if near else None)
    return "" if meant is None else f" (did you mean {meant}?)"
