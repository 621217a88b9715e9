"""The service over a real engine: what a gateway gets is what the engine makes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from engine.config_file import from_tree
from engine.frontend import Delta, Engine
from engine.sampling import SamplingParams
from engine.serve.server import Server
from engine.server_config import ServerConfig
from tests.runtime import tiny
from tests.runtime.tiny import random_ids
from tests.serve.fake_engine import collect, until

PROMPT = random_ids(40, seed=3)
LETTERS = tuple(range(ord("a"), ord("z") + 1))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    tree = tiny.config_tree(folder, **{"server.kv_events": "tokens"})
    engine = Engine.from_config(from_tree(tree))
    yield engine
    engine.close()


@pytest.fixture
async def worker(engine: Engine) -> AsyncIterator[Any]:
    server = Server(ServerConfig(port=0, grace=0.05))
    await server.start()
    await server.set_engine(engine)
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield vllm_engine_pb2_grpc.VllmEngineStub(channel)
    await server.stop()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.owned_blocks) == (0, 0, 0)


async def direct(engine: Engine, **fields: Any) -> list[Delta]:
    """What the engine says by itself."""
    return [delta async for delta in engine.generate(PROMPT, SamplingParams(**fields))]


def ids_of(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token for delta in deltas if delta.index == index for token in delta.token_ids]


async def complete(worker: Any, **fields: Any) -> list[pb.GenerateComplete]:
    request = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=PROMPT), sampling_params=pb.SamplingParams(**fields)
    )
    return [response.complete for response in await collect(worker.Generate(request))]


async def test_several_outputs_are_the_engine_s_own(worker: Any, engine: Engine) -> None:
    fields = {"n": 3, "seed": 11, "max_tokens": 8}
    expected = await direct(engine, **fields)
    told = sorted(await complete(worker, **fields), key=lambda each: each.index)
    assert [list(each.output_ids) for each in told] == [ids_of(expected, i) for i in range(3)]
    assert len({tuple(each.output_ids) for each in told}) == 3
    assert {each.cached_tokens for each in told} == {32}


async def test_log_probabilities_are_the_engine_s_own(worker: Any, engine: Engine) -> None:
    fields = {"temperature": 0.0, "max_tokens": 6, "logprobs": 3, "prompt_logprobs": 2}
    expected = await direct(engine, **fields)
    (told,) = await complete(worker, **fields)
    entries = [entry for delta in expected for entry in delta.logprobs]
    scores = told.output_logprobs
    assert list(scores.token_ids) == [entry.token_id for entry in entries] == list(told.output_ids)
    assert list(scores.token_logprobs) == pytest.approx([entry.logprob for entry in entries])
    assert [list(top.token_ids) for top in scores.top_logprobs] == [
        [token for token, _ in entry.top] for entry in entries
    ]
    (of_prompt,) = [delta.prompt_logprobs for delta in expected if delta.prompt_logprobs]
    values = [each.value for each in told.input_logprobs.token_logprobs[1:]]
    assert values == pytest.approx([entry.logprob for entry in of_prompt])
    assert tuple(told.input_logprobs.token_ids) == PROMPT


async def test_stop_strings_work_although_no_text_is_made(worker: Any, engine: Engine) -> None:
    fields = {"temperature": 0.0, "max_tokens": 40, "logit_bias": dict.fromkeys(LETTERS, 100.0)}
    (free,) = await complete(worker, **fields)
    text = bytes(free.output_ids).decode()
    stop = text[5:7]
    (told,) = await complete(worker, **fields, stop=[stop])
    end = text.index(stop) + len(stop)
    assert bytes(told.output_ids).decode() == text[:end]  # its ids are there
    assert (told.finish_reason, told.matched_stop_str) == ("stop", stop)


async def test_a_stop_token_is_told(worker: Any, engine: Engine) -> None:
    (free,) = await complete(worker, temperature=0.0, max_tokens=8, ignore_eos=True)
    token = free.output_ids[4]
    first = list(free.output_ids).index(token)
    (told,) = await complete(worker, temperature=0.0, max_tokens=8, stop_token_ids=[token])
    assert (told.finish_reason, told.matched_token_id) == ("stop", token)
    assert list(told.output_ids) == list(free.output_ids)[: first + 1]


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("regex", "[ab]{3}!", "[ab]{3}!"),
        ("choice", pb.ChoiceConstraint(choices=["yes", "no"]), "yes|no"),
        ("grammar", 'root ::= "x" | "yy"', "x|yy"),
        ("grammar", 'start: "x" | "yy"', "x|yy"),
        ("json_schema", '{"enum": ["a", 7]}', '"a"|7'),
    ],
    ids=["regex", "choice", "ebnf", "lark", "json_schema"],
)
async def test_an_answer_keeps_to_its_constraint(
    field: str, value: Any, pattern: str, worker: Any
) -> None:
    fields: dict[str, Any] = {field: value, "seed": 5, "max_tokens": 30, "n": 3}
    for told in await complete(worker, **fields):
        text = bytes(token for token in told.output_ids if token < 256).decode()
        assert re.fullmatch(pattern, text)
        assert told.finish_reason == "stop"


async def test_a_grammar_that_can_not_be_read_is_named_as_on_the_wire(worker: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=r"sampling_params\.grammar") as raised:
        await complete(worker, grammar="start: (")
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_no_text_is_made_unless_a_stop_string_is_looked_for(engine: Engine) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with_text = [delta async for delta in engine.generate(PROMPT, sampling)]
    without = [delta async for delta in engine.generate(PROMPT, sampling, with_text=False)]
    assert "".join(delta.text for delta in with_text)
    assert not any(delta.text for delta in without)
    assert ids_of(without) == ids_of(with_text)
    assert without[-1].finish_reason is with_text[-1].finish_reason


async def test_an_abort_returns_every_block(worker: Any, engine: Engine) -> None:
    request = pb.GenerateRequest(
        request_id="mine",
        tokenized=pb.TokenizedInput(input_ids=PROMPT),
        sampling_params=pb.SamplingParams(n=3, ignore_eos=True),
        stream=True,
    )
    read = asyncio.create_task(collect(worker.Generate(request)))
    await until(lambda: engine.stats().owned_blocks)
    await worker.Abort(pb.AbortRequest(request_ids=["mine"]))
    ends = [each.complete for each in await read if each.HasField("complete")]
    assert [each.finish_reason for each in ends] == ["abort"] * 3
    await until(lambda: not engine.stats().owned_blocks)


async def test_a_mirror_of_the_cache_finds_what_is_cached(worker: Any, engine: Engine) -> None:
    """A gateway's index, made of events alone, says how much of a prompt a worker has."""
    await worker.FlushCache(common_pb2.FlushCacheRequest(timeout_s=10))
    stream = worker.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest())
    mirror: dict[int, tuple[int, ...]] = {}  # whole prefixes by the block that ends them

    async def follow() -> None:
        async for batch in stream:
            for event in batch.events:
                match event.WhichOneof("data"):
                    case "cleared":
                        mirror.clear()
                    case "removed":
                        for name in event.removed.block_hashes:
                            del mirror[name]
                    case "stored":
                        prefix: tuple[int, ...] = ()
                        if event.stored.HasField("parent_block_hash"):
                            prefix = mirror[event.stored.parent_block_hash]
                        for block in event.stored.blocks:
                            prefix += tuple(block.token_ids)
                            mirror[block.block_hash] = prefix

    reading = asyncio.create_task(follow())
    prompts = [random_ids(100, seed=seed) for seed in range(20)]  # more than fit
    for prompt in prompts:
        request = pb.GenerateRequest(
            tokenized=pb.TokenizedInput(input_ids=prompt),
            sampling_params=pb.SamplingParams(max_tokens=1),
        )
        await collect(worker.Generate(request))
    stats = engine.stats()
    await until(lambda: len(mirror) == stats.cached_blocks)
    found = {prefix: len(prefix) for prefix in mirror.values()}
    expected = [
        max((length for prefix, length in found.items() if prompt[:length] == prefix), default=0)
        for prompt in prompts
    ]
    assert 0 < sum(length == 96 for length in expected) < 20
    for prompt, length in reversed(list(zip(prompts, expected, strict=True))):
        if length < 96:
            break  # what is computed now pushes out others
        request = pb.GenerateRequest(
            tokenized=pb.TokenizedInput(input_ids=prompt),
            sampling_params=pb.SamplingParams(max_tokens=1),
        )
        (only,) = await collect(worker.Generate(request))
        assert only.complete.cached_tokens == length
    stream.cancel()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
