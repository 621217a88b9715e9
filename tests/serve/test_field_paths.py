"""Every field that an error names is one of the request's: its path resolves in the contract."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import grpc.aio
import msgspec
import pytest
from google.protobuf.descriptor import Descriptor
from google.rpc import error_details_pb2, status_pb2
from smg_grpc_proto import vllm_engine_pb2 as vllm_pb

from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.sampling import SamplingParams
from engine.serve import convert
from engine.serve.errors import DETAILS_KEY
from engine.serve.openai import parameters, schemas
from engine.serve.server import Server
from engine.serve.vllm import convert as vllm_convert

ENGINE = Path(__file__).resolve().parents[2] / "engine"
SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)}
# What the engine's modules call fields of a client's request, beside those of SamplingParams.
OTHERS = {
    *("prompt", "prompt_ids", "messages", "request_id"),
    *("constraint.kind", "constraint.text", "constraint.choices"),
}
# What no message and no body can have wrong: a deadline is a number, the configuration's prefixes
# are the operator's, and tenants are the server's to tell.
NOBODYS = {"timeout", "is_public"}


def engine_fields() -> set[str]:
    """The fields that the engine's modules refuse, by their sources."""
    files = [ENGINE / "sampling.py", ENGINE / "resolve.py", ENGINE / "frontend.py"]
    for folder in ("core", "runtime", "text"):
        files += (ENGINE / folder).glob("*.py")
    return {
        str(argument.value)
        for file in files
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "InvalidRequest"
        for argument in call.args[:1]
        if isinstance(argument, ast.Constant)
    }


def test_the_engine_s_names_of_fields_are_all_here() -> None:
    assert engine_fields() - SAMPLING - NOBODYS - {"priority"} <= OTHERS


def is_in(descriptor: Descriptor | None, path: str) -> bool:
    """Whether a path leads to a field, or to a choice of fields of which none was made."""
    for part in path.split("."):
        name, index = part.partition("[")[:2]
        if descriptor is None:
            return False
        if path.endswith(part) and name in descriptor.oneofs_by_name:
            return not index
        field = descriptor.fields_by_name.get(name)
        if field is None or (index and not field.is_repeated):
            return False
        descriptor = field.message_type
    return True


def test_paths_that_lead_nowhere_are_told_from_those_that_lead_somewhere() -> None:
    of = pb.GenerateRequest.DESCRIPTOR
    for path in ("text", "prompt", "messages.messages[3].role", "sampling.constraint.choice"):
        assert is_in(of, path)
    for path in ("constraint.text", "messages[0].role", "token_ids[4]", "sampling.constraint.text"):
        assert not is_in(of, path)


@pytest.mark.parametrize("field", sorted(SAMPLING | OTHERS | {"priority"}))
@pytest.mark.parametrize(
    "given",
    [
        {"text": "a", "sampling": pb.SamplingParams(constraint=pb.Constraint(regex="a"))},
        {"token_ids": pb.TokenIds(ids=[1])},
        {"messages": pb.ChatMessages()},
        {},
    ],
    ids=lambda given: next(iter(given), "nothing"),
)
def test_each_leads_somewhere_in_octavo_s_message(field: str, given: dict[str, Any]) -> None:
    path = convert.field_path(pb.GenerateRequest(**given), field)
    assert is_in(pb.GenerateRequest.DESCRIPTOR, path)
    assert convert.field_path(pb.GenerateRequest(**given), path) == path


@pytest.mark.parametrize(
    "field",
    sorted(vllm_convert.SAME | vllm_convert.CONVERTED | OTHERS - {"messages"}),
)
@pytest.mark.parametrize(
    "given",
    [
        {"text": "a", "sampling_params": vllm_pb.SamplingParams(regex="a")},
        {"tokenized": vllm_pb.TokenizedInput(input_ids=[1])},
    ],
    ids=lambda given: next(iter(given)),
)
def test_each_leads_somewhere_in_the_gateways_message(field: str, given: dict[str, Any]) -> None:
    request = vllm_pb.GenerateRequest(**given)
    if field.startswith("constraint") and not request.HasField("sampling_params"):
        request.sampling_params.choice.SetInParent()
    path = vllm_convert.field_path(request, field)
    assert is_in(vllm_pb.GenerateRequest.DESCRIPTOR, path)
    assert vllm_convert.field_path(request, path) == path


REGEX = schemas.StructuredOutputs(regex="a")
BEAMS = {"beam_width", "length_penalty", "early_stopping"}  # not to be asked for by HTTP


@pytest.mark.parametrize("field", sorted((SAMPLING | OTHERS | {"priority"}) - BEAMS))
@pytest.mark.parametrize(
    "request_",
    [
        schemas.CompletionRequest(prompt="a", structured_outputs=REGEX),
        schemas.ChatRequest(messages=[schemas.ChatMessage(role="user", content="a")]),
    ],
    ids=lambda request: type(request).__name__,
)
def test_each_is_a_field_of_openai_s_body(field: str, request_: msgspec.Struct) -> None:
    path = parameters.field_path(request_, field)
    if isinstance(request_, schemas.CompletionRequest) and field == "messages":
        return  # there are none
    if field == "request_id":
        return  # the header's, which is checked before the body is read
    assert re.split(r"\W", path)[0] in request_.__struct_fields__
    again = parameters.field_path(request_, path)
    assert re.split(r"\W", again)[0] in request_.__struct_fields__


@pytest.mark.parametrize(
    ("method", "request_", "path"),
    [
        (
            "octavo.v1.Generation/Generate",
            pb.GenerateRequest(
                text="a", sampling=pb.SamplingParams(constraint=pb.Constraint(regex=""))
            ),
            "sampling.constraint.regex",
        ),
        (
            "octavo.v1.Generation/Generate",
            pb.GenerateRequest(
                text="a",
                sampling=pb.SamplingParams(
                    constraint=pb.Constraint(choice=pb.Choices(choices=["a"] * 1025))
                ),
            ),
            "sampling.constraint.choice",
        ),
        (
            "octavo.v1.Generation/Tokenize",
            pb.TokenizeRequest(messages=pb.ChatMessages(messages=[pb.ChatMessage()])),
            "messages.messages[0].role",
        ),
        (
            "vllm.grpc.engine.VllmEngine/Generate",
            vllm_pb.GenerateRequest(
                text="a",
                sampling_params=vllm_pb.SamplingParams(
                    choice=vllm_pb.ChoiceConstraint(choices=["a"] * 1025)
                ),
            ),
            "sampling_params.choice",
        ),
        (
            "vllm.grpc.engine.VllmEngine/Generate",
            vllm_pb.GenerateRequest(
                tokenized=vllm_pb.TokenizedInput(input_ids=[1] * 256),
            ),
            "tokenized.input_ids",
        ),
        ("vllm.grpc.engine.VllmEngine/Generate", vllm_pb.GenerateRequest(), "input"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_the_details_of_a_refusal_name_the_field(
    method: str, request_: Any, path: str, server: Server
) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=re.escape(path)) as raised:
            await channel.unary_stream(f"/{method}")(request_.SerializeToString()).read()
    trailing: Any = dict(raised.value.trailing_metadata())
    [detail] = status_pb2.Status.FromString(trailing[DETAILS_KEY]).details
    told = error_details_pb2.BadRequest.FromString(detail.value)
    assert [each.field for each in told.field_violations] == [path]
    assert is_in(request_.DESCRIPTOR, path)
