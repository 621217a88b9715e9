"""No field of a request may be parsed and dropped: walk the message descriptors to prove it."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor

from engine.client import AsyncClient, ServiceError
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.rpc.octavo.v1 import generation_pb2_grpc
from engine.sampling import Constraint, ConstraintKind, InvalidRequest, SamplingParams
from engine.serve import convert
from engine.serve.server import Server
from engine.text import Message
from engine.types import Domain
from tests.serve.fake_engine import BOS, VOCAB_SIZE, FakeEngine

SAMPLING_FIELDS = list(pb.SamplingParams.DESCRIPTOR.fields)
# Fields that are refused without another, and that one.
NEEDS: dict[str, dict[str, Any]] = {
    "length_penalty": {"beam_width": 4},
    "early_stopping": {"beam_width": 4},
}
_BY_TYPE: dict[int, Any] = {
    FieldDescriptor.CPPTYPE_DOUBLE: 0.5,
    FieldDescriptor.CPPTYPE_FLOAT: 0.5,
    FieldDescriptor.CPPTYPE_INT32: 3,
    FieldDescriptor.CPPTYPE_INT64: 3,
    FieldDescriptor.CPPTYPE_UINT32: 3,
    FieldDescriptor.CPPTYPE_UINT64: 3,
    FieldDescriptor.CPPTYPE_STRING: "text",
}


def set_field(message: Any, field: FieldDescriptor) -> Any:
    """Set a field, and all fields below it, to what is not the default; gives plain values."""
    if field.name == "constraint":  # one of several, see test_each_constraint_…
        message.constraint.regex = "[a-z]+"
        return Constraint("regex", "[a-z]+")
    if field.message_type is not None:
        child = getattr(message, field.name)
        child = child.add() if field.is_repeated else child
        value = tuple(set_field(child, each) for each in field.message_type.fields)
        return (value,) if field.is_repeated else value[0] if len(value) == 1 else value
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        value = not next(
            each.default for each in dataclasses.fields(SamplingParams) if each.name == field.name
        )
    else:
        value = _BY_TYPE[field.cpp_type]
    if field.is_repeated:
        getattr(message, field.name).append(value)
        return (value,)
    setattr(message, field.name, value)
    return value


async def call(server: Server, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = generation_pb2_grpc.GenerationStub(channel)
        return [response async for response in stub.Generate(request)]


@pytest.mark.parametrize("field", SAMPLING_FIELDS, ids=lambda field: field.name)
async def test_each_sampling_field_reaches_the_engine(
    field: FieldDescriptor, server: Server, fake: FakeEngine
) -> None:
    others = NEEDS.get(field.name, {})
    request = pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(**others))
    value = set_field(request.sampling, field)
    await call(server, request)
    sampling = fake.calls[-1].sampling
    assert getattr(sampling, field.name) == value
    assert sampling == SamplingParams(**{**others, field.name: value})
    assert sampling != SamplingParams()


def test_the_message_has_the_fields_of_sampling_params() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert {field.name for field in SAMPLING_FIELDS} == names


@pytest.mark.parametrize("field", SAMPLING_FIELDS, ids=lambda field: field.name)
def test_sampling_params_survive_the_way_there_and_back(field: FieldDescriptor) -> None:
    message = pb.SamplingParams(**NEEDS.get(field.name, {}))
    set_field(message, field)
    sampling = convert.sampling_from_proto(message, VOCAB_SIZE)
    assert convert.sampling_to_proto(sampling) == message


@pytest.mark.parametrize(
    "field",
    [field for field in SAMPLING_FIELDS if field.has_presence and field.message_type is None],
    ids=lambda field: field.name,
)
def test_zero_is_not_the_same_as_unset(field: FieldDescriptor) -> None:
    """A field set to zero is taken as zero or refused; it never becomes the default."""
    zero = type(getattr(pb.SamplingParams(), field.name))()
    message = pb.SamplingParams(**{**NEEDS.get(field.name, {}), field.name: zero})
    if field.name in ("max_tokens", "top_p", "repetition_penalty", "n", "beam_width"):
        with pytest.raises(InvalidRequest, match=field.name):
            convert.sampling_from_proto(message, VOCAB_SIZE)
    else:
        value = getattr(convert.sampling_from_proto(message, VOCAB_SIZE), field.name)
        assert value is not None
        assert value == 0


EACH_CONSTRAINT = [
    Constraint("json_schema", '{"type": "integer"}'),
    Constraint("json_object"),
    Constraint("regex", "[a-z]+"),
    Constraint("lark", 'start: "a"'),
    Constraint("ebnf", 'root ::= "a"'),
    Constraint("structural_tag", "{}"),
    Constraint("choice", choices=("yes", "no")),
]


@pytest.mark.parametrize("constraint", EACH_CONSTRAINT, ids=lambda each: each.kind)
def test_each_constraint_survives_the_way_there_and_back(constraint: Constraint) -> None:
    message = convert.sampling_to_proto(SamplingParams(constraint=constraint))
    assert message.constraint.WhichOneof("kind") == constraint.kind
    assert convert.sampling_from_proto(message, VOCAB_SIZE).constraint == constraint


def test_the_message_has_each_kind_of_constraint() -> None:
    kinds = {field.name for field in pb.Constraint.DESCRIPTOR.fields}
    assert kinds == {constraint.kind for constraint in EACH_CONSTRAINT}
    assert kinds == set(get_args(ConstraintKind))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.Constraint(), "constraint"),
        (pb.Constraint(regex=""), "constraint.text"),
        (pb.Constraint(regex="a" * 131_073), "constraint"),
        (pb.Constraint(choice=pb.Choices()), "constraint.choices"),
        (pb.Constraint(choice=pb.Choices(choices=[""])), "constraint.choices"),
        (pb.Constraint(choice=pb.Choices(choices=["a"] * 1025)), "constraint.choices"),
    ],
    ids=["none", "empty", "long", "no choice", "empty choice", "many choices"],
)
def test_a_constraint_that_says_nothing_or_too_much_is_refused(
    message: pb.Constraint, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        convert.sampling_from_proto(pb.SamplingParams(constraint=message), VOCAB_SIZE)
    assert caught.value.field == field


async def test_unset_sampling_fields_take_the_engines_defaults(
    server: Server, fake: FakeEngine
) -> None:
    await call(server, pb.GenerateRequest(text="hello"))
    assert fake.calls[-1].sampling == SamplingParams()


# Each field of GenerateRequest: a value, and what the engine must then be given.
REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": ({"text": "hello"}, {"prompt": "hello"}),
    "token_ids": ({"token_ids": pb.TokenIds(ids=[7, 8])}, {"prompt": (7, 8)}),
    "messages": (
        {"messages": pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hello")])},
        {"prompt": (Message("user", "hello"),)},
    ),
    "sampling": (
        {"text": "hello", "sampling": pb.SamplingParams(top_k=7)},
        {"sampling": SamplingParams(top_k=7)},
    ),
    "request_id": ({"text": "hello", "request_id": "mine"}, {"request_id": "mine"}),
    "priority": ({"text": "hello", "priority": -2}, {"priority": -2}),
    "cache_salt": (
        {"text": "hello", "cache_salt": "pepper"},
        {"domain": Domain("default", "pepper")},
    ),
    "share_prefix": ({"text": "hello", "share_prefix": False}, {"share_prefix": False}),
}


@pytest.mark.parametrize("name", [f.name for f in pb.GenerateRequest.DESCRIPTOR.fields])
async def test_each_field_of_a_request_reaches_the_engine(
    name: str, server: Server, fake: FakeEngine
) -> None:
    fields, expected = REQUESTS[name]
    assert name in fields
    await call(server, pb.GenerateRequest(**fields))
    given = {key: getattr(fake.calls[-1], key) for key in expected}
    assert given == expected


UNKNOWN = b"\xc0\x3e\x01"  # field 1000, a varint: what a newer client might send


@pytest.mark.parametrize(
    ("path", "request_bytes"),
    [
        ("GenerateRequest", pb.GenerateRequest(text="hello").SerializeToString() + UNKNOWN),
        (
            "sampling",
            pb.GenerateRequest(text="hello").SerializeToString() + b"\x22\x03" + UNKNOWN,
        ),
        ("messages.messages", b"\x1a\x05\x0a\x03" + UNKNOWN),
    ],
    ids=["request", "sampling", "message"],
)
async def test_a_field_that_the_server_does_not_know_is_refused(
    path: str, request_bytes: bytes, server: Server, fake: FakeEngine
) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stream = channel.unary_stream("/octavo.v1.Generation/Generate")(request_bytes)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            _ = [response async for response in stream]
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{path}: has field number 1000" in str(raised.value.details())
    assert not fake.calls


async def test_each_field_of_tokenize_changes_the_answer(client: AsyncClient) -> None:
    assert await client.tokenize("hi") == (BOS, 104, 105)
    assert await client.tokenize("hi", add_special_tokens=True) == (BOS, 104, 105)
    assert await client.tokenize("hi", add_special_tokens=False) == (104, 105)
    chat = await client.tokenize([{"role": "user", "content": "hi"}])
    assert bytes(chat[1:]) == b"user:hi\n"
    fields = {field.name for field in pb.TokenizeRequest.DESCRIPTOR.fields}
    assert fields == {"text", "messages", "add_special_tokens"}


async def test_special_tokens_are_a_matter_of_text_and_refused_with_messages(
    client: AsyncClient,
) -> None:
    with pytest.raises(ServiceError, match="add_special_tokens: is for text only") as raised:
        await client.tokenize([{"role": "user", "content": "hi"}], add_special_tokens=False)
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_each_field_of_detokenize_changes_the_answer(client: AsyncClient) -> None:
    assert await client.detokenize([BOS, 104, 105]) == "hi"
    assert await client.detokenize([BOS, 104, 105], skip_special_tokens=False) == "<bos>hi"
    fields = {field.name for field in pb.DetokenizeRequest.DESCRIPTOR.fields}
    assert fields == {"token_ids", "skip_special_tokens"}
