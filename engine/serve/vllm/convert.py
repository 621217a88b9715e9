"""Requests of ``vllm.grpc.engine`` to the engine's vocabulary.

Every field is in one of the tables here: it is converted, it says nothing that could change token
ids, or it is refused with a reason. A field of newer stubs that is in none is refused as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import grpc
from google.protobuf.message import Message
from smg_grpc_proto import vllm_engine_pb2 as pb

from engine.observe.calls import checked_request_id
from engine.sampling import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    Constraint,
    InvalidRequest,
    SamplingParams,
    grammar_kind,
)
from engine.serve.bounds import MAX_ENTRIES, check_entries, check_prompt
from engine.serve.convert import refuse_unknown_fields
from engine.serve.errors import Refused

# Of equal meaning in SamplingParams. Those without presence are unset when they are zero.
SAME = frozenset(
    (
        *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty"),
        *("repetition_penalty", "max_tokens", "min_tokens", "stop", "stop_token_ids"),
        *("skip_special_tokens", "ignore_eos", "n", "logprobs", "prompt_logprobs"),
    )
)
CONVERTED = frozenset(("seed", "logit_bias", "truncate_prompt_tokens"))
CONSTRAINTS = frozenset(
    ("json_schema", "regex", "grammar", "structural_tag", "json_object", "choice")
)
# They are about text, and no text is on this wire: token ids are the same whatever they say. The
# ids of a stop string are always given, and whoever makes text of them leaves it out or does not.
# `grammar_from_first_token` is what always happens here: no reasoning parser comes first.
ABOUT_TEXT = frozenset(
    ("spaces_between_special_tokens", "include_stop_str_in_output", "grammar_from_first_token")
)

SERVED = frozenset(
    ("request_id", "tokenized", "text", "sampling_params", "stream", "data_parallel_rank")
)
UNIMPLEMENTED = {
    "kv_transfer_params": "this server computes prefill and decode itself, and moves no KV cache "
    "to or from others",
    "kv_transfer_params_json": "this server computes prefill and decode itself, and moves no KV "
    "cache to or from others",
    "mm_inputs": "this server's models take text alone",
    "extra_mm_inputs": "this server's models take text alone",
    "media_refs": "this server's models take text alone",
}

# gRPC clients take messages of 4 MiB unless told otherwise, and log-probabilities of a whole prompt
# or answer come in one: so many numbers, with their token ids, fit in three of those.
MAX_LOGPROBS_PER_MESSAGE = 3 * 2**20 // 8


def refuse_unserved(message: Message, served: Collection[str]) -> None:
    """Raise if a message asks for something that is not known here: a field that our stubs lack, or
    one that newer stubs have and that is not `served`."""
    refuse_unknown_fields(message)
    for field, _ in message.ListFields():
        if field.name not in served:
            raise _newer(field.name)


def refuse_unsupported(request: pb.GenerateRequest) -> None:
    """Raise Refused or InvalidRequest for what this server can't do, and say why."""
    refuse_unserved(request, SERVED | UNIMPLEMENTED.keys())
    for field, value in request.ListFields():
        if (reason := UNIMPLEMENTED.get(field.name)) is not None:
            raise Refused(grpc.StatusCode.UNIMPLEMENTED, f"{field.name}: {reason}")
        if field.name == "data_parallel_rank" and value != 0:
            raise Refused(
                grpc.StatusCode.UNIMPLEMENTED,
                f"data_parallel_rank: {value} is not served; there is one rank, number 0",
            )


def request_id_from_proto(request: pb.GenerateRequest) -> str | None:
    """The gateway's name for its request, or None. Raises InvalidRequest."""
    return checked_request_id(request.request_id, "request_id") if request.request_id else None


def prompt_from_proto(request: pb.GenerateRequest, max_model_len: int) -> str | tuple[int, ...]:
    """The prompt: token ids, cut to their end if the request asks for it, or a text.

    Args:
      request: what the gateway sent.
      max_model_len: tokens of prompt and output that the model takes.

    Raises:
      InvalidRequest: there is none, or it has more tokens than the model takes.
    """
    match request.WhichOneof("input"):
        case "tokenized":
            ids = request.tokenized.input_ids
            keep = kept_tokens(request.sampling_params, max_model_len)
            if not ids:
                raise InvalidRequest("prompt", "is empty; give at least one token id")
            if keep is None:
                check_prompt(len(ids), max_model_len)
            return tuple(ids if keep is None else ids[-keep:])
        case "text":
            if not request.text:
                raise InvalidRequest("text", "is empty; give at least one character")
            return request.text
        case _:
            raise InvalidRequest("input", "is missing; give tokenized or text")


def kept_tokens(message: pb.SamplingParams, max_model_len: int) -> int | None:
    """How many of the prompt's last tokens are used; None: it must fit as it is.

    Raises:
      InvalidRequest: `truncate_prompt_tokens` is neither -1, as many as the model takes with one
        token of output, nor a number of tokens.
    """
    if not message.HasField("truncate_prompt_tokens"):
        return None
    count = message.truncate_prompt_tokens
    if count == -1:
        return max_model_len - 1
    if count < 1:
        raise InvalidRequest(
            "truncate_prompt_tokens",
            f"is {count}; give the number of tokens to keep, or -1 for as many as the model takes",
        )
    return count


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    """The sampling parameters. Unset ones are the engine's defaults, which are vLLM's, but for
    `skip_special_tokens`.

    Raises:
      InvalidRequest: a value is out of its range, a list is too long, or a field is not known.
    """
    # Unset is false on the wire, where the engine's default, and vLLM's, is true. It decides what
    # text stop strings are looked for in.
    values: dict[str, Any] = {"skip_special_tokens": message.skip_special_tokens}
    for field, value in message.ListFields():
        name = field.name
        if name in MAX_ENTRIES:
            check_entries(name, len(value), MAX_ENTRIES[name])
        if name in SAME:
            values[name] = tuple(value) if field.is_repeated else value
        elif name == "logit_bias":
            values[name] = tuple(sorted(value.items()))
        elif name == "seed":
            # vLLM takes -1 for no seed. Any other number names a draw, and ours are unsigned.
            values[name] = None if value == -1 else value % 2**64
        elif name in CONSTRAINTS:
            values["constraint"] = _constraint(message, name)
        elif name not in CONVERTED | ABOUT_TEXT:
            raise _newer(name)
    for name in ("logprobs", "prompt_logprobs"):
        if values.get(name) == -1:
            raise InvalidRequest(
                name,
                f"is -1, the whole vocabulary; at most {MAX_LOGPROBS} are given for each token",
            )
    return SamplingParams(**values)


def check_logprobs(sampling: SamplingParams, num_prompt: int, room: int, *, stream: bool) -> None:
    """Refuse log-probabilities that one message could not hold. Those of all outputs are counted
    together: they are kept until each ends.

    Args:
      sampling: as the request has it.
      num_prompt: tokens of the prompt.
      room: tokens that the answer can have at most.
      stream: whether the answer's come with its tokens, in as many messages as it takes.

    Raises:
      InvalidRequest: there would be more than MAX_LOGPROBS_PER_MESSAGE.
    """
    counts = {"prompt_logprobs": num_prompt} if sampling.prompt_logprobs is not None else {}
    if sampling.logprobs is not None and not stream:
        counts["logprobs"] = sampling.n * min(room, sampling.max_tokens or room)
    for name, count in counts.items():
        each = getattr(sampling, name) + 2
        if count * each > MAX_LOGPROBS_PER_MESSAGE:
            raise InvalidRequest(
                name,
                f"{each - 2} for each of up to {count} tokens don't fit into one message, which "
                f"holds {MAX_LOGPROBS_PER_MESSAGE // each}; ask for fewer, or of fewer tokens"
                + (" and outputs, or set stream" if name == "logprobs" else ""),
            )


def field_path(request: pb.GenerateRequest, field: str) -> str:
    """Where a request has what the engine calls `field`: a path of its message's fields, or of what
    is missing."""
    name = re.split(r"\W", field, maxsplit=1)[0]
    if name in ("prompt", "prompt_ids"):
        given = request.WhichOneof("input")
        return "tokenized.input_ids" if given == "tokenized" else given or "input"
    if name == "constraint":
        return f"sampling_params.{request.sampling_params.WhichOneof('constraint')}"
    is_sampling = name in pb.SamplingParams.DESCRIPTOR.fields_by_name
    return f"sampling_params.{field}" if is_sampling else field


def seconds_from_proto(field: str, value: float, most: float) -> float:
    """A time in seconds, from 0 on and `most` at most. Raises InvalidRequest."""
    if not math.isfinite(value) or value < 0:
        raise InvalidRequest(field, f"is {value}; give a number of seconds, 0 or more")
    if value > most:
        raise InvalidRequest(field, f"is {value:g}, but at most {most:g} seconds are waited")
    return value


def _constraint(message: pb.SamplingParams, name: str) -> Constraint:
    match name:
        case "json_object":
            if not message.json_object:
                raise InvalidRequest("json_object", "is false; set it to true, or leave it out")
            return Constraint("json_object")
        case "choice":
            check_entries("choice", len(message.choice.choices), MAX_CHOICES)
            return Constraint("choice", choices=tuple(message.choice.choices))
        case "grammar":
            return Constraint(grammar_kind(message.grammar), message.grammar)
        case "json_schema":
            return Constraint("json_schema", message.json_schema)
        case "structural_tag":
            return Constraint("structural_tag", message.structural_tag)
        case _:
            return Constraint("regex", message.regex)


def _newer(field: str) -> InvalidRequest:
    return InvalidRequest(
        field, "is not known to this server; the client may be newer than the server"
    )
