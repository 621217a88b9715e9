"""Messages of ``octavo.v1`` to the engine's vocabulary, and back.

Sampling parameters are converted by field name, so a field that one side lacks is an error
and never dropped; what a server doesn't know (a newer client's field) is refused as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.unknown_fields import UnknownFieldSet

from engine.observe.calls import checked_request_id
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.sampling import MAX_CHOICES, Constraint, InvalidRequest, SamplingParams
from engine.serve.bounds import (
    MAX_ENTRIES,
    MAX_LOGPROB_POSITIONS,
    check_entries,
    check_messages,
    check_prompt,
)
from engine.serve.errors import Refused
from engine.types import BeamScore, FinishReason, TokenLogprobs

if TYPE_CHECKING:
    from engine.domain_usage import DomainUsage
    from engine.frontend import Delta, EngineStats, ModelInfo, Prompt

MAX_CACHE_SALT_CHARS = 256

_FINISH_TO_PROTO = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_FINISH_FROM_PROTO = {number: reason for reason, number in _FINISH_TO_PROTO.items()}


def refuse_unknown_fields(message: ProtoMessage) -> None:
    """Refuse a message that has, or one inside it, fields not in our schema.

    Protobuf keeps such fields aside in silence; serving the rest would be doing something
    other than what was asked. The usual path costs one pass in C and no Python loop.

    Raises:
      InvalidRequest: naming the message inside it.
      Refused: INVALID_ARGUMENT; it is the message itself, of which there is no field to name.
    """
    trimmed = type(message)()
    trimmed.CopyFrom(message)
    trimmed.DiscardUnknownFields()
    if trimmed.ByteSize() != message.ByteSize():
        path, number = next(_unknown_fields(message, ""))
        problem = f"has field number {number}, which this server does not know; the client may be "
        problem += "newer than the server"
        if path:
            raise InvalidRequest(path, problem)
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"{message.DESCRIPTOR.name}: {problem}")


def _unknown_fields(message: ProtoMessage, path: str) -> Iterator[tuple[str, int]]:
    for unknown in UnknownFieldSet(message):
        yield path, unknown.field_number
    for field, value in message.ListFields():
        if (kind := field.message_type) is None:
            continue
        children = value if field.is_repeated else (value,)
        if kind.GetOptions().map_entry:
            children = value.values() if kind.fields_by_name["value"].message_type else ()
        for child in children:
            yield from _unknown_fields(child, f"{path}.{field.name}".lstrip("."))


def field_path(request: pb.GenerateRequest, field: str) -> str:
    """Where a request has what the engine calls `field`: a path of its message's fields, or of what
    is missing."""
    name = re.split(r"\W", field, maxsplit=1)[0]
    if name in ("prompt", "prompt_ids"):
        return request.WhichOneof("prompt") or "prompt"
    if name == "constraint":
        kind = request.sampling.constraint.WhichOneof("kind")
        return f"sampling.constraint.{kind}" if kind else "sampling.constraint"
    return f"sampling.{field}" if name in pb.SamplingParams.DESCRIPTOR.fields_by_name else field


def request_id_from_proto(request: pb.GenerateRequest) -> str | None:
    """The client's name for its request, or None. Raises InvalidRequest."""
    if not request.HasField("request_id"):
        return None
    return checked_request_id(request.request_id, "request_id")


def cache_salt_from_proto(
    request: pb.GenerateRequest | pb.GetUsageRequest | pb.FlushCacheRequest,
) -> str:
    """The client's part of the isolation domain. Raises InvalidRequest."""
    if len(request.cache_salt) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequest(
            "cache_salt",
            f"has {len(request.cache_salt)} characters, but at most {MAX_CACHE_SALT_CHARS} "
            "are taken; send a hash of it",
        )
    return request.cache_salt


def prompt_from_proto(request: pb.GenerateRequest, max_model_len: int) -> Prompt:
    """The prompt, as text, token ids or messages.

    Args:
      request: what the client sent.
      max_model_len: tokens of prompt and output that the model takes.

    Raises:
      InvalidRequest: there is none, or it has more token ids or messages than the model takes.
    """
    match request.WhichOneof("prompt"):
        case "text":
            if not request.text:
                raise InvalidRequest("text", "is empty; give at least one character")
            return request.text
        case "token_ids":
            if not request.token_ids.ids:
                raise InvalidRequest("token_ids", "is empty; give at least one token id")
            check_prompt(len(request.token_ids.ids), max_model_len)
            return tuple(request.token_ids.ids)
        case "messages":
            check_messages(len(request.messages.messages), max_model_len)
            return messages_from_proto(request.messages)
        case _:
            raise InvalidRequest("prompt", "is missing; give text, token_ids or messages")


def messages_from_proto(chat: pb.ChatMessages) -> tuple[Any, ...]:
    """A conversation as `engine.text.Message` tuples. Raises InvalidRequest."""
    from engine.text import Message  # the client imports this file, and not the tokenizer

    if not chat.messages:
        raise InvalidRequest("messages", "is empty; give at least one message")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidRequest(
                f"messages.messages[{index}].role",
                "is empty; most models take system, user or assistant",
            )
    return tuple(Message(message.role, message.content) for message in chat.messages)


def constraint_from_proto(message: pb.Constraint) -> Constraint:
    """What the output must match. Raises InvalidRequest."""
    match message.WhichOneof("kind"):
        case None:
            raise InvalidRequest("constraint", "is empty; give json_schema, regex or another")
        case "json_object":
            return Constraint("json_object")
        case "choice":
            check_entries("constraint.choices", len(message.choice.choices), MAX_CHOICES)
            return Constraint("choice", choices=tuple(message.choice.choices))
        case kind:
            return Constraint(kind, getattr(message, kind))


def constraint_to_proto(constraint: Constraint) -> pb.Constraint:
    """The message that says the same."""
    match constraint.kind:
        case "json_object":
            return pb.Constraint(json_object=pb.JsonObject())
        case "choice":
            return pb.Constraint(choice=pb.Choices(choices=constraint.choices))
        case kind:
            fields: dict[str, Any] = {kind: constraint.text}
            return pb.Constraint(**fields)


# Fields whose proto value is not already what SamplingParams holds.
_READ: dict[str, Callable[[Any], Any]] = {
    "logit_bias": lambda biases: tuple((each.token_id, each.bias) for each in biases),
    "allowed_token_ids": lambda tokens: tuple(tokens.ids),
    "constraint": constraint_from_proto,
}


def sampling_from_proto(message: pb.SamplingParams, vocab_size: int) -> SamplingParams:
    """The sampling parameters; unset fields take the engine's defaults.

    Raises:
      InvalidRequest: a value is out of its range, or a list is too long.
    """
    count = len(message.allowed_token_ids.ids)
    if count > vocab_size:
        raise InvalidRequest(
            "allowed_token_ids",
            f"has {count} entries, but the model has {vocab_size} tokens; give each once",
        )
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.is_repeated:
            check_entries(field.name, len(value), MAX_ENTRIES[field.name])
        read = _READ.get(field.name, tuple if field.is_repeated else None)
        values[field.name] = read(value) if read else value
    return SamplingParams(**values)


def sampling_to_proto(sampling: SamplingParams) -> pb.SamplingParams:
    """The message that says the same; what equals the default is left unset."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(sampling):
        value = getattr(sampling, field.name)
        if value != field.default:
            values[field.name] = value
    if "logit_bias" in values:
        pairs = values["logit_bias"]
        values["logit_bias"] = [pb.LogitBias(token_id=token, bias=bias) for token, bias in pairs]
    if "allowed_token_ids" in values:
        values["allowed_token_ids"] = pb.TokenIds(ids=values["allowed_token_ids"])
    if "constraint" in values:
        values["constraint"] = constraint_to_proto(values["constraint"])
    return pb.SamplingParams(**values)


def request_to_proto(
    prompt: str | Sequence[int] | Sequence[Mapping[str, str]],
    sampling: SamplingParams,
    **fields: Any,
) -> pb.GenerateRequest:
    """A request for a prompt given as text, token ids, or ``{"role", "content"}`` messages.

    Args:
      prompt: what to continue.
      sampling: how tokens are chosen.
      fields: other fields of GenerateRequest.

    Raises:
      InvalidRequest: a value can't be written down in the message.
    """
    with unsendable_as_invalid():
        request = pb.GenerateRequest(sampling=sampling_to_proto(sampling), **fields)
        if isinstance(prompt, str):
            request.text = prompt
        elif len(prompt) and isinstance(prompt[0], Mapping):
            request.messages.CopyFrom(messages_to_proto(cast("Sequence[Any]", prompt)))
        elif isinstance(prompt, (bytes, bytearray)):
            raise TypeError("the prompt is bytes; decode it")
        else:
            request.token_ids.CopyFrom(pb.TokenIds(ids=cast("Sequence[int]", prompt)))
    return request


def messages_to_proto(messages: Sequence[Mapping[str, str]]) -> pb.ChatMessages:
    """A chat as a message. Raises ValueError for keys other than `role` and `content`."""
    return pb.ChatMessages(messages=[pb.ChatMessage(**message) for message in messages])


@contextlib.contextmanager
def unsendable_as_invalid() -> Iterator[None]:
    """Turn protobuf's complaints about values it can't hold into InvalidRequest."""
    try:
        yield
    except InvalidRequest:
        raise
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            "request",
            f"character {error.start} of a text is a lone surrogate, which UTF-8 can't express; "
            "decode the text with errors='replace'",
        ) from None
    except (ValueError, TypeError) as error:
        raise InvalidRequest(
            "request",
            f"{error}; a prompt is a text, a list of token ids (whole numbers from 0 on), or a "
            'list of {"role": …, "content": …}',
        ) from None


def responses_from_delta(request_id: str, delta: Delta) -> Iterator[pb.GenerateResponse]:
    """One response, or several if the log-probabilities of one would make it too large.

    Only positions are spread over the responses; the text and the reason for the end are in
    the last, the one that a client may stop at.
    """
    size = MAX_LOGPROB_POSITIONS
    counts = delta.usage  # field by field: asdict takes as long as all the rest
    usage = pb.Usage(
        prompt_tokens=counts.prompt_tokens,
        cached_tokens=counts.cached_tokens,
        completion_tokens=counts.completion_tokens,
    )
    prompt_logprobs, token_ids, logprobs = delta.prompt_logprobs, delta.token_ids, delta.logprobs
    while len(prompt_logprobs) > size:
        yield pb.GenerateResponse(
            request_id=request_id,
            index=delta.index,
            prompt_logprobs=map(_logprobs_to_proto, prompt_logprobs[:size]),
            usage=usage,
        )
        prompt_logprobs = prompt_logprobs[size:]
    while len(logprobs) > size:
        yield pb.GenerateResponse(
            request_id=request_id,
            index=delta.index,
            token_ids=token_ids[:size],
            logprobs=map(_logprobs_to_proto, logprobs[:size]),
            prompt_logprobs=map(_logprobs_to_proto, prompt_logprobs),
            usage=usage,
        )
        token_ids, logprobs, prompt_logprobs = token_ids[size:], logprobs[size:], ()
    last = pb.GenerateResponse(
        request_id=request_id,
        index=delta.index,
        text=delta.text,
        token_ids=token_ids,
        usage=usage,
    )
    if logprobs:
        last.logprobs.extend(map(_logprobs_to_proto, logprobs))
    if prompt_logprobs:
        last.prompt_logprobs.extend(map(_logprobs_to_proto, prompt_logprobs))
    if delta.beam is not None:
        last.beam.CopyFrom(pb.BeamScore(**delta.beam._asdict()))
    if delta.finish_reason is not None:
        last.finish_reason = _FINISH_TO_PROTO[delta.finish_reason]
        if delta.waited is not None:
            # What a client can tell from the time anyway; how many steps other requests took, it
            # can't.
            last.waited_seconds = round(delta.waited.seconds, 3)
            last.waited_for.extend(delta.waited.held)
    if isinstance(delta.stop_reason, str):
        last.stop_text = delta.stop_reason
    elif delta.stop_reason is not None:
        last.stop_token_id = delta.stop_reason
    yield last


def _logprobs_to_proto(entry: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top_token_ids=[token for token, _ in entry.top],
        top_logprobs=[logprob for _, logprob in entry.top],
    )


def logprobs_from_proto(message: pb.TokenLogprobs) -> TokenLogprobs:
    """A token's log-probabilities, as the engine's vocabulary has them."""
    top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=True))
    return TokenLogprobs(message.token_id, message.logprob, top)


def beam_from_proto(response: pb.GenerateResponse) -> BeamScore | None:
    """How likely an output of beam search is; None for any other."""
    if not response.HasField("beam"):
        return None
    return BeamScore(response.beam.logprob, response.beam.score)


def finish_reason_from_proto(response: pb.GenerateResponse) -> FinishReason | None:
    """Why the answer ended, or None if it goes on.

    Raises:
      ValueError: the server gave a reason that this client doesn't know.
    """
    if not response.finish_reason:
        return None
    if response.finish_reason not in _FINISH_FROM_PROTO:
        raise ValueError(
            f"finish reason {response.finish_reason} is not known to this client; "
            "the server may be newer than the client"
        )
    return _FINISH_FROM_PROTO[response.finish_reason]


def model_info_to_proto(info: ModelInfo, server_version: str) -> pb.GetModelInfoResponse:
    """What is served. Raises AttributeError if the engine lacks what the message has."""
    fields = [field.name for field in pb.Architecture.DESCRIPTOR.fields]
    return pb.GetModelInfoResponse(
        name=info.name,
        architecture=pb.Architecture(**{name: getattr(info.architecture, name) for name in fields}),
        dtype=info.dtype,
        max_model_len=info.max_model_len,
        eos_token_ids=info.eos_token_ids,
        weights_fingerprint=info.weights_fingerprint,
        server_version=server_version,
    )


def usage_to_proto(usage: DomainUsage) -> pb.GetUsageResponse:
    """Equal names on both sides; a field that one side lacks is an error."""
    return pb.GetUsageResponse(**dataclasses.asdict(usage))


def stats_to_proto(stats: EngineStats) -> pb.GetStatsResponse:
    """Equal names on both sides; a field that one side lacks is an error."""
    return pb.GetStatsResponse(**dataclasses.asdict(stats))
