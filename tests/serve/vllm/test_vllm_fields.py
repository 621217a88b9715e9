"""No field of the gateways' contract may be parsed and dropped, and none may be new unnoticed."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import common_pb2

from engine.sampling import (
    MAX_CONSTRAINT_CHARS,
    Constraint,
    InvalidRequest,
    SamplingParams,
    grammar_kind,
)
from engine.serve.openai.parameters import completion_sampling
from engine.serve.openai.schemas import CompletionRequest, StructuredOutputs
from engine.serve.server import Server
from engine.serve.vllm import convert, kv_events, profiler
from tests.serve.fake_engine import FakeEngine, collect

PROMPT = pb.TokenizedInput(input_ids=b"hello", original_text="hello")
DEFAULTS = SamplingParams(skip_special_tokens=False)  # what an empty message says

# Each field of SamplingParams that is served: what is sent, and what the engine is then given.
SAMPLING: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (0.5, {"temperature": 0.5}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (7, {"top_k": 7}),
    "min_p": (0.25, {"min_p": 0.25}),
    "frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
    "presence_penalty": (-0.5, {"presence_penalty": -0.5}),
    "repetition_penalty": (1.5, {"repetition_penalty": 1.5}),
    "max_tokens": (3, {"max_tokens": 3}),
    "min_tokens": (2, {"min_tokens": 2}),
    "stop": (["x", "yz"], {"stop": ("x", "yz")}),
    "stop_token_ids": ([3, 4], {"stop_token_ids": (3, 4)}),
    "skip_special_tokens": (True, {"skip_special_tokens": True}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "n": (3, {"n": 3}),
    "logprobs": (2, {"logprobs": 2}),
    "prompt_logprobs": (0, {"prompt_logprobs": 0}),
    "seed": (-3, {"seed": 2**64 - 3}),
    "logit_bias": ({9: 1.5, 5: -100.0}, {"logit_bias": ((5, -100.0), (9, 1.5))}),
    "json_schema": ('{"type": "integer"}', {"constraint": ("json_schema", '{"type": "integer"}')}),
    "regex": ("[a-z]+", {"constraint": ("regex", "[a-z]+")}),
    "grammar": ('root ::= "a"', {"constraint": ("ebnf", 'root ::= "a"')}),
    "structural_tag": ("{}", {"constraint": ("structural_tag", "{}")}),
    "json_object": (True, {"constraint": ("json_object",)}),
    "choice": (pb.ChoiceConstraint(choices=["a", "b"]), {"constraint": ("choice", "", ("a", "b"))}),
}


def sampled(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(tokenized=PROMPT, sampling_params=pb.SamplingParams(**fields))


async def refusal(worker: Any, request: pb.GenerateRequest) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await collect(worker.Generate(request))
    return raised.value.code(), str(raised.value.details())


def test_each_sampling_field_is_served_or_means_nothing_here_or_is_refused() -> None:
    tables = [
        convert.SAME,
        convert.CONVERTED,
        convert.CONSTRAINTS,
        convert.ABOUT_TEXT,
    ]
    names = [name for table in tables for name in table]
    assert sorted(names) == sorted(pb.SamplingParams.DESCRIPTOR.fields_by_name)
    served = convert.SAME | convert.CONVERTED | convert.CONSTRAINTS
    assert SAMPLING.keys() == served - {"truncate_prompt_tokens"}


@pytest.mark.parametrize("name", SAMPLING)
async def test_each_sampling_field_reaches_the_engine(
    name: str, worker: Any, fake: FakeEngine
) -> None:
    sent, expected = SAMPLING[name]
    await collect(worker.Generate(sampled(**{name: sent})))
    if "constraint" in expected:
        expected = {"constraint": Constraint(*expected["constraint"])}
    sampling = fake.calls[-1].sampling
    values: dict[str, Any] = {"skip_special_tokens": False, **expected}
    assert sampling == SamplingParams(**values)
    assert sampling != DEFAULTS


async def test_what_is_not_sent_is_the_default_and_zero_is_not_sent(
    worker: Any, fake: FakeEngine
) -> None:
    zeros = {"top_p": 0.0, "top_k": 0, "repetition_penalty": 0.0, "n": 0, "min_p": 0.0}
    for request in (pb.GenerateRequest(tokenized=PROMPT), sampled(), sampled(**zeros)):
        await collect(worker.Generate(request))
        assert fake.calls[-1].sampling == DEFAULTS
        assert fake.calls[-1].sampling.temperature == 1.0
    await collect(worker.Generate(sampled(temperature=0.0)))
    assert fake.calls[-1].sampling.temperature == 0.0
    await collect(worker.Generate(sampled(seed=-1)))  # vLLM's way to say: none
    assert fake.calls[-1].sampling.seed is None


@pytest.mark.parametrize("name", sorted(convert.ABOUT_TEXT))
async def test_what_is_about_text_changes_no_token(
    name: str, worker: Any, fake: FakeEngine
) -> None:
    """Both settings are right, as token ids are all that is given: `hello` and its stop string."""
    answers = [
        await collect(worker.Generate(sampled(stop=["lo"], **{name: value})))
        for value in (False, True)
    ]
    assert answers[0] == answers[1]
    assert fake.calls[0].sampling == fake.calls[1].sampling


def test_each_field_of_a_request_is_served_or_refused() -> None:
    names = [*convert.SERVED, *convert.UNIMPLEMENTED]
    assert sorted(names) == sorted(pb.GenerateRequest.DESCRIPTOR.fields_by_name)


UNSERVED: dict[str, Any] = {
    "kv_transfer_params": pb.KvTransferParams(remote_host="there"),
    "kv_transfer_params_json": "{}",
    "mm_inputs": pb.MultimodalInputs(im_token_id=1),
    "extra_mm_inputs": [pb.MultimodalInputs(im_token_id=1)],
    "media_refs": pb.MediaRefs(items=[pb.MediaRef(url="http://there")]),
    "data_parallel_rank": 1,
}


@pytest.mark.parametrize("name", UNSERVED)
async def test_what_this_server_can_not_do_is_unimplemented(name: str, worker: Any) -> None:
    request = pb.GenerateRequest(tokenized=PROMPT, **{name: UNSERVED[name]})
    code, message = await refusal(worker, request)
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert message.startswith(f"{name}: ")


def test_each_way_to_be_unserved_is_tried() -> None:
    assert UNSERVED.keys() == {*convert.UNIMPLEMENTED, "data_parallel_rank"}


async def test_each_field_of_a_request_reaches_the_engine(worker: Any, fake: FakeEngine) -> None:
    request = pb.GenerateRequest(request_id="mine", text="hi", stream=False, data_parallel_rank=0)
    (only,) = await collect(worker.Generate(request))
    assert only.HasField("complete")
    assert fake.calls[-1].request_id == "mine"
    assert fake.calls[-1].prompt == (256, 104, 105)  # with the model's beginning, as vLLM does
    assert fake.calls[-1].with_text is False
    request = pb.GenerateRequest(tokenized=PROMPT, stream=True)
    first, *_ = await collect(worker.Generate(request))
    assert first.HasField("chunk")
    assert fake.calls[-1].prompt == tuple(b"hello")
    assert fake.calls[-1].request_id


@pytest.mark.parametrize(
    ("keep", "prompt"), [(3, b"llo"), (9, b"hello"), (-1, b"hello")], ids=["some", "all", "-1"]
)
async def test_a_prompt_is_cut_to_its_end(
    keep: int, prompt: bytes, worker: Any, fake: FakeEngine
) -> None:
    await collect(worker.Generate(sampled(truncate_prompt_tokens=keep)))
    assert fake.calls[-1].prompt == tuple(prompt)
    text = pb.GenerateRequest(
        text="hello", sampling_params=pb.SamplingParams(truncate_prompt_tokens=keep)
    )
    await collect(worker.Generate(text))
    assert fake.calls[-1].prompt == tuple([256, *b"hello"][-keep if keep > 0 else 0 :])


async def test_a_prompt_that_is_too_long_can_be_cut_to_what_the_model_takes(
    worker: Any, fake: FakeEngine
) -> None:
    ids = [*range(200), *range(200)]
    long = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=ids))
    code, message = await refusal(worker, long)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith("tokenized.input_ids: has 400 tokens, but with one token of output")
    long.sampling_params.truncate_prompt_tokens = -1
    await collect(worker.Generate(long))
    assert fake.calls[-1].prompt == tuple(ids[-255:])


UNKNOWN = b"\xc0\x3e\x01"  # field 1000, a varint: what a newer gateway might send


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Generate", pb.GenerateRequest(tokenized=PROMPT)),
        ("Abort", pb.AbortRequest(request_ids=["mine"])),
        ("FlushCache", common_pb2.FlushCacheRequest()),
        ("StartProfile", common_pb2.StartProfileRequest()),
        ("StopProfile", common_pb2.StopProfileRequest()),
    ],
)
async def test_what_asks_for_something_unknown_is_refused(
    method: str, request_: Any, server: Server
) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        path = f"/vllm.grpc.engine.VllmEngine/{method}"
        call: Any = channel.unary_stream(path)(request_.SerializeToString() + UNKNOWN)
        with pytest.raises(grpc.aio.AioRpcError, match="has field number 1000") as raised:
            await call.read()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "method", ["HealthCheck", "GetModelInfo", "GetServerInfo", "GetLoads", "GetTokenizer"]
)
async def test_what_only_asks_how_a_worker_is_may_come_from_a_newer_gateway(
    method: str, server: Server
) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        call: Any = channel.unary_stream(f"/vllm.grpc.engine.VllmEngine/{method}")(UNKNOWN)
        assert await call.read()


@pytest.mark.parametrize(
    ("message", "served"),
    [
        (pb.AbortRequest(request_ids=["a"]), ("request_ids",)),
        (common_pb2.FlushCacheRequest(timeout_s=1), ("timeout_s",)),
        (
            common_pb2.StartProfileRequest(with_stack=True, num_steps=3),
            profiler.SERVED | profiler.REFUSED.keys(),
        ),
        (common_pb2.SubscribeKvEventsRequest(start_sequence_number=1), kv_events.SERVED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_newer_stubs_ask_is_refused(message: Any, served: Any) -> None:
    """A field that is known to the stubs, and not to this server."""
    convert.refuse_unserved(message, served)
    [*_, (newest, _)] = message.ListFields()
    with pytest.raises(InvalidRequest, match=f"{newest.name}: is not known to this server"):
        convert.refuse_unserved(message, set(served) - {newest.name})


def test_an_unknown_field_is_found_beside_a_map() -> None:
    request = sampled(logit_bias={3: 1.0})
    unknown = pb.GenerateRequest.FromString(request.SerializeToString())
    unknown.kv_transfer_params.MergeFromString(UNKNOWN)
    with pytest.raises(InvalidRequest, match="kv_transfer_params: has field number 1000"):
        convert.refuse_unsupported(unknown)


def test_the_fields_of_the_smaller_requests_are_those_that_are_read() -> None:
    """A field of newer stubs must be looked at here before it passes."""
    fields = {
        pb.AbortRequest: {"request_ids"},
        pb.TokenizedInput: {"original_text", "input_ids"},  # the text is for debugging alone
        pb.ChoiceConstraint: {"choices"},
        pb.HealthCheckRequest: set(),
        pb.GetModelInfoRequest: set(),
        pb.GetServerInfoRequest: set(),
        pb.GetLoadsRequest: {"dp_rank", "include"},
        common_pb2.GetTokenizerRequest: set(),
        common_pb2.SubscribeKvEventsRequest: {
            "start_sequence_number",
            "load_records_before_first_batch",
        },
        common_pb2.FlushCacheRequest: {"timeout_s"},
        common_pb2.StartProfileRequest: profiler.SERVED | profiler.REFUSED.keys(),
        common_pb2.StopProfileRequest: set(),
    }
    for message, names in fields.items():
        assert set(message.DESCRIPTOR.fields_by_name) == names, message.DESCRIPTOR.name


@pytest.mark.parametrize(
    ("grammar", "is_ebnf"),
    [
        ('root ::= "yes" | "no"', True),
        ('# a comment\nroot::="a"', True),
        ('start: "yes" | "no"', False),
        ('// root ::= "no"\nstart: "a"', False),
        ('start: "a" # not ::= this', False),
    ],
    ids=["ebnf", "ebnf without spaces", "lark", "lark's comment", "a comment at the end"],
)
def test_a_grammar_is_taken_for_what_it_is(grammar: str, is_ebnf: bool) -> None:
    sampling = convert.sampling_from_proto(pb.SamplingParams(grammar=grammar))
    expected = Constraint("ebnf" if is_ebnf else "lark", grammar)
    assert sampling.constraint == expected
    outputs = CompletionRequest(prompt="a", structured_outputs=StructuredOutputs(grammar=grammar))
    assert completion_sampling(outputs).constraint == expected


def test_a_grammar_is_counted_before_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    class Text(str):
        def splitlines(self, keepends: bool = False) -> list[str]:
            raise AssertionError("was looked at")

    assert grammar_kind(Text("a" * (MAX_CONSTRAINT_CHARS + 1))) == "lark"
    with pytest.raises(ValueError, match=r"constraint: has 131073 characters, but at most 131072"):
        convert.sampling_from_proto(pb.SamplingParams(grammar="a" * (MAX_CONSTRAINT_CHARS + 1)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 1.5}, "sampling_params.top_p: 1.5 is not a number in (0, 1]"),
        ({"temperature": -1.0}, "sampling_params.temperature: -1.0 is not"),
        ({"max_tokens": 0}, "sampling_params.max_tokens: 0 is not"),
        ({"logprobs": -1}, "sampling_params.logprobs: is -1, the whole vocabulary; at most 20"),
        ({"prompt_logprobs": -1}, "sampling_params.prompt_logprobs: is -1, the whole vocabulary"),
        ({"logprobs": 21}, "sampling_params.logprobs: 21 is not a whole number in [0, 20]"),
        ({"stop": ["x"] * 17}, "sampling_params.stop: has 17 entries, but at most 16 are taken"),
        ({"stop_token_ids": [1] * 17}, "sampling_params.stop_token_ids: has 17 entries"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "sampling_params.logit_bias: has 1025"),
        ({"logit_bias": {3: 101.0}}, "sampling_params.logit_bias: 101.0 for token 3 is not a"),
        ({"n": 129}, "sampling_params.n: 129 is not a whole number in [1, 128]"),
        ({"truncate_prompt_tokens": 0}, "sampling_params.truncate_prompt_tokens: is 0; give"),
        ({"truncate_prompt_tokens": -2}, "sampling_params.truncate_prompt_tokens: is -2; give"),
        ({"json_object": False}, "sampling_params.json_object: is false"),
        ({"choice": pb.ChoiceConstraint()}, "sampling_params.choice: is empty"),
        ({"regex": ""}, "sampling_params.regex: is empty, but regex takes one"),
        ({"regex": "a", "ignore_eos": True}, "sampling_params.ignore_eos: does not go with"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_value_is_named_as_on_the_wire(
    fields: dict[str, Any], message: str, worker: Any, fake: FakeEngine
) -> None:
    code, told = await refusal(worker, sampled(**fields))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert told.startswith(message)
    assert not fake.calls


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.GenerateRequest(), "input: is missing; give tokenized or text"),
        (pb.GenerateRequest(tokenized=pb.TokenizedInput()), "tokenized.input_ids: is empty"),
        (pb.GenerateRequest(text=""), "text: is empty"),
        (pb.GenerateRequest(request_id="a\nb", tokenized=PROMPT), r"request_id: 'a\nb' must be"),
    ],
    ids=["nothing", "no ids", "no text", "a line break"],
)
async def test_a_request_without_a_prompt_is_refused(
    request_: pb.GenerateRequest, message: str, worker: Any
) -> None:
    code, told = await refusal(worker, request_)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert told.startswith(message)


def test_log_probabilities_that_no_message_holds_are_refused() -> None:
    sampling = SamplingParams(logprobs=20, prompt_logprobs=20)
    convert.check_logprobs(sampling, 8192, 8192, stream=False)
    with pytest.raises(ValueError, match=r"^prompt_logprobs: 20 for each of up to"):
        convert.check_logprobs(sampling, 32768, 1, stream=True)
    with pytest.raises(ValueError, match=r"^logprobs: .* or set stream"):
        convert.check_logprobs(sampling, 1, 32768, stream=False)
    convert.check_logprobs(sampling, 1, 32768, stream=True)
    several = SamplingParams(logprobs=20, n=64)
    convert.check_logprobs(several, 1, 256, stream=False)
    with pytest.raises(ValueError, match=r"20 for each of up to 32768 tokens .* and outputs"):
        convert.check_logprobs(several, 1, 512, stream=False)  # they are kept together
