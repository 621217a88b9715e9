"""Random messages for every call that a server has registered, made from its own descriptors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

Field = FieldDescriptor
_INTEGERS = {
    Field.TYPE_INT32: (-(2**31), 2**31 - 1),
    Field.TYPE_SINT32: (-(2**31), 2**31 - 1),
    Field.TYPE_SFIXED32: (-(2**31), 2**31 - 1),
    Field.TYPE_INT64: (-(2**63), 2**63 - 1),
    Field.TYPE_SINT64: (-(2**63), 2**63 - 1),
    Field.TYPE_SFIXED64: (-(2**63), 2**63 - 1),
    Field.TYPE_UINT32: (0, 2**32 - 1),
    Field.TYPE_FIXED32: (0, 2**32 - 1),
    Field.TYPE_UINT64: (0, 2**64 - 1),
    Field.TYPE_FIXED64: (0, 2**64 - 1),
}
_FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    *("", "a", "hello", "user", "assistant", "\x00", "\x7f" * 3, "é", "日本", "\U0001f600", "</s>"),
    *(
        "{{ 7*7 }}",
        "%s%n",
        "../../etc/passwd",
        "a" * 300,
        "(a+)+$",
        "[" * 200,
        '{"type": "object"}',
    ),
)
_MAX_DEPTH = 5


class Call(NamedTuple):
    """A method that the server has."""

    path: str
    method: MethodDescriptor

    @property
    def request(self) -> type[Message]:
        """The class of its requests."""
        return message_factory.GetMessageClass(self.method.input_type)


async def registered(channel: grpc.aio.Channel) -> list[Call]:
    """Every method of every service that a server's reflection names, but for reflection's own."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[bad-argument-type]
    request = reflection_pb2.ServerReflectionRequest
    pool = descriptor_pool.DescriptorPool()
    added: set[str] = set()

    async def ask(*requests: Any) -> list[Any]:
        return [answer async for answer in stub.ServerReflectionInfo(iter(requests))]

    async def add(raw: bytes) -> None:
        file = descriptor_pb2.FileDescriptorProto.FromString(raw)
        if file.name in added:
            return
        added.add(file.name)
        for name in file.dependency:
            if name not in added:
                [answer] = await ask(request(file_by_filename=name))
                for other in answer.file_descriptor_response.file_descriptor_proto:
                    await add(other)
        pool.Add(file)

    [listed] = await ask(request(list_services=""))
    calls: list[Call] = []
    for service in sorted(each.name for each in listed.list_services_response.service):
        if service.startswith("grpc.reflection."):
            continue
        [answer] = await ask(request(file_containing_symbol=service))
        for raw in answer.file_descriptor_response.file_descriptor_proto:
            await add(raw)
        for method in pool.FindServiceByName(service).methods:
            calls.append(Call(f"/{service}/{method.name}", method))
    return calls


def messages(call: Call, seed: int, count: int) -> Iterator[bytes]:
    """So many requests of a call, as bytes: mostly well-formed, some torn, some mere noise."""
    rng = random.Random(f"{call.path} {seed}")
    for _ in range(count):
        raw = random_message(rng, call.request).SerializeToString()
        kind = rng.random()
        if kind < 0.05:
            raw = rng.randbytes(rng.randrange(64))
        elif kind < 0.1 and raw:
            raw = raw[: rng.randrange(len(raw))]
        elif kind < 0.15 and raw:
            place = rng.randrange(len(raw))
            raw = raw[:place] + rng.randbytes(1) + raw[place + 1 :]
        elif kind < 0.18:
            raw += b"\xfa\x3f\x02hi"  # a field of a number that nobody has
        yield raw


def random_message(rng: random.Random, kind: type[Message], depth: int = 0) -> Message:
    """A message of a type, in which any field may be anything that the wire can say."""
    message = kind()
    # Those of one field are how `optional` is written down.
    oneofs = [oneof for oneof in kind.DESCRIPTOR.oneofs if len(oneof.fields) > 1]
    chosen = {rng.choice(oneof.fields).name for oneof in oneofs}
    left_out = {field.name for oneof in oneofs for field in oneof.fields} - chosen
    for field in kind.DESCRIPTOR.fields:
        if field.name in left_out or (field.name not in chosen and rng.random() < 0.7):
            continue
        if field.message_type is not None and depth >= _MAX_DEPTH:
            continue
        _set(rng, message, field, depth)
    return message


def _set(rng: random.Random, message: Message, field: FieldDescriptor, depth: int) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        entries = getattr(message, field.name)
        for _ in range(rng.choice((0, 1, 2, 5, 40))):
            if value.message_type is None:
                entries[_scalar(rng, key)] = _scalar(rng, value)
            else:
                kind = message_factory.GetMessageClass(value.message_type)
                entries[_scalar(rng, key)].CopyFrom(random_message(rng, kind, depth + 1))
    elif field.is_repeated:
        values = getattr(message, field.name)
        for _ in range(rng.choice((0, 1, 2, 5, 40))):
            if field.message_type is not None:
                kind = message_factory.GetMessageClass(field.message_type)
                values.append(random_message(rng, kind, depth + 1))
            else:
                values.append(_scalar(rng, field))
    elif field.message_type is not None:
        kind = message_factory.GetMessageClass(field.message_type)
        getattr(message, field.name).CopyFrom(random_message(rng, kind, depth + 1))
    else:
        setattr(message, field.name, _scalar(rng, field))


def _scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    if field.type in _INTEGERS:
        low, high = _INTEGERS[field.type]
        return rng.choice((max(low, 0), 1, 2, 3, 7, 100, low, high, rng.randint(low, high)))
    if field.type in (Field.TYPE_DOUBLE, Field.TYPE_FLOAT):
        return rng.choice((*_FLOATS, rng.random(), rng.uniform(-200, 200)))
    if field.type == Field.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == Field.TYPE_BYTES:
        return rng.randbytes(rng.choice((0, 1, 16, 100)))
    if field.type == Field.TYPE_ENUM:
        assert field.enum_type is not None
        return rng.choice([value.number for value in field.enum_type.values])
    return rng.choice((*_TEXTS, "".join(chr(rng.randrange(1, 0xD800)) for _ in range(20))))
