"""What a gateway asks of a worker besides tokens, and who may."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import io
import json
import math
import zipfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from engine import __version__
from engine.frontend import Delta
from engine.runtime.kv_events import KvEvents
from engine.serve.access import Access, Caller
from engine.serve.calls import Calls
from engine.serve.errors import Refused
from engine.serve.server import Server
from engine.serve.tenants import TenantRules
from engine.serve.vllm import loads
from engine.serve.vllm.loads import Loads
from engine.serve.vllm.profiler import Profiler
from engine.serve.vllm.service import VllmService
from engine.serve.vllm.tokenizer_archive import CHUNK_BYTES, Archive, make_archive
from engine.server_config import ServerConfig
from engine.text import Tokenizer
from engine.types import Domain
from engine.weights.gguf_file import read_index
from tests.runtime import tiny
from tests.serve.fake_engine import BOS, EOS, FakeEngine, collect, until


async def test_a_model_is_told_of(worker: Any) -> None:
    info = await worker.GetModelInfo(pb.GetModelInfoRequest())
    assert info == pb.GetModelInfoResponse(
        model_path="echo",
        is_generation=True,
        max_context_length=256,
        vocab_size=258,
        served_model_name="echo",
        tokenizer_path="octavo:echo",
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        eos_token_ids=[EOS],
        bos_token_id=BOS,
        max_req_input_len=255,
    )


async def test_a_server_is_told_of(worker: Any, fake: FakeEngine) -> None:
    info = await worker.GetServerInfo(pb.GetServerInfoRequest())
    stats = fake.stats()
    assert info.server_type == f"octavo {__version__}"
    assert info.block_size == stats.block_size
    assert info.max_num_seqs == fake.config.scheduler.max_num_seqs
    assert info.active_requests == stats.running + stats.waiting
    assert info.uptime_seconds == stats.uptime_seconds
    assert (info.model_dtype, info.kv_cache_dtype) == ("float32", "auto")
    assert info.data_parallel_size == 1
    assert info.constrained_decoding_start == "first_token"
    assert info.last_receive_timestamp == 0
    assert not info.is_paused
    await fake.life.pause()
    assert (await worker.GetServerInfo(pb.GetServerInfoRequest())).is_paused
    await collect(worker.Generate(pb.GenerateRequest(text="hi")))
    info = await worker.GetServerInfo(pb.GetServerInfoRequest())
    assert info.last_receive_timestamp > 1.7e9


async def test_loads_are_those_of_the_engine(worker: Any, fake: FakeEngine) -> None:
    stats = fake.stats()
    told = await worker.GetLoads(pb.GetLoadsRequest(dp_rank=0, include=["core"]))
    assert (told.dp_rank_count, told.version) == (1, __version__)
    (load,) = told.loads
    assert (load.num_running_reqs, load.num_waiting_reqs) == (stats.running, stats.waiting)
    assert load.num_total_reqs == stats.running + stats.waiting
    assert load.num_used_tokens == stats.owned_blocks * stats.block_size
    assert load.max_total_num_tokens == stats.total_blocks * stats.block_size
    assert load.token_usage == stats.owned_blocks / stats.total_blocks
    assert load.cache_hit_rate == stats.prefix_cache_hits / stats.prefix_cache_queries
    most = fake.config.scheduler.max_num_seqs
    assert (load.max_running_requests, load.utilization) == (most, stats.running / most)
    with pytest.raises(grpc.aio.AioRpcError, match="dp_rank: is 1; there is one rank"):
        await worker.GetLoads(pb.GetLoadsRequest(dp_rank=1))
    with pytest.raises(grpc.aio.AioRpcError, match="include: 'memory' is not told here"):
        await worker.GetLoads(pb.GetLoadsRequest(include=["core", "memory"]))


async def test_prompts_that_wait_are_told_of_by_their_tokens(
    worker: Any, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, may_begin, generate = asyncio.Event(), asyncio.Event(), fake.generate

    async def waits(*args: Any, **kwargs: Any) -> AsyncGenerator[Delta]:
        arrived.set()
        await may_begin.wait()
        async for delta in generate(*args, **kwargs):
            yield delta

    async def told() -> int:
        (load,) = (await worker.GetLoads(pb.GetLoadsRequest())).loads
        return load.num_waiting_uncached_tokens

    monkeypatch.setattr(fake, "generate", waits)
    assert await told() == 0
    ids = pb.TokenizedInput(input_ids=b"forever")
    call = worker.Generate(pb.GenerateRequest(tokenized=ids, stream=True))
    await arrived.wait()
    assert await told() == 7
    may_begin.set()
    await call.read()
    assert await told() == 0
    call.cancel()


def test_prompts_are_counted_until_they_begin_or_end(fake: FakeEngine) -> None:
    of = Loads()
    with of.pending(3) as has_begun:
        with of.pending(5):
            assert of.read(fake).waiting_tokens == 8
            assert loads.load_record(of.read(fake), 1, is_full=False).waiting_uncached_tokens == 8
        has_begun()
        assert of.read(fake).waiting_tokens == 0
    assert of.read(fake).waiting_tokens == 0
    stats = dataclasses.replace(fake.stats(), waiting=0)
    with of.pending(3):
        of._stats = stats
        of._read_at = math.inf
        assert of.read(fake).waiting_tokens == 0  # it is being computed, and nothing waits


def test_figures_are_read_no_more_often_than_it_matters(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats, times = fake.stats, []
    monkeypatch.setattr(fake, "stats", lambda: (times.append(0), stats())[1])
    monkeypatch.setattr(loads, "_FRESH_SECONDS", 3600.0)
    reader = Loads()
    for _ in range(5):
        reader.read(fake)
    assert len(times) == 1
    monkeypatch.setattr(loads, "_FRESH_SECONDS", 0.0)
    reader.read(fake)
    assert len(times) == 2


def test_throughput_is_that_of_the_last_seconds() -> None:
    reader = Loads()
    assert reader._throughput(100.0, 5000) == 0.0
    assert reader._throughput(102.0, 5100) == 50.0
    assert reader._throughput(111.0, 5190) == 10.0  # since 102
    assert reader._throughput(140.0, 9000) == 0.0  # nothing is known of the last ten seconds


async def test_the_tokenizer_comes_as_a_zip_with_its_digest(worker: Any) -> None:
    chunks = await collect(worker.GetTokenizer(common_pb2.GetTokenizerRequest()))
    data = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks] == [hashlib.sha256(data).hexdigest()]
    files = zipfile.ZipFile(io.BytesIO(data))
    assert sorted(files.namelist()) == ["tokenizer.json", "tokenizer_config.json"]
    config = json.loads(files.read("tokenizer_config.json"))
    assert (config["bos_token"], config["eos_token"]) == ("<bos>", "<eos>")
    assert config["chat_template"] == "{{ messages }}"
    assert config["model_max_length"] == 256
    assert "pad_token" not in config


def test_a_large_archive_comes_in_chunks_of_which_the_last_has_the_digest() -> None:
    archive = Archive(bytes(2 * CHUNK_BYTES), "digest")
    chunks = list(archive.chunks())
    assert [(len(chunk.data), chunk.sha256) for chunk in chunks] == [
        (CHUNK_BYTES, ""),
        (CHUNK_BYTES, "digest"),
    ]


def unpack(archive: Archive, folder: Path) -> Path:
    zipfile.ZipFile(io.BytesIO(archive.data)).extractall(folder)
    return folder


def test_an_archive_makes_the_tokenizer_that_it_was_made_of(
    tmp_path: Path, smollm2_gguf: Path
) -> None:
    """From a folder as from a GGUF file, which has no tokenizer.json."""
    folder = tiny.write_model(tmp_path / "model")
    gguf = Tokenizer.from_gguf(read_index(smollm2_gguf).metadata)
    for number, original in enumerate((Tokenizer.from_folder(folder), gguf)):
        archive = make_archive(original, 512)
        assert archive == make_archive(original, 512)  # two workers give one digest
        copy = Tokenizer.from_folder(unpack(archive, tmp_path / str(number)))
        text = "Hello, wörld!\n  def f(x): return x ** 2 <|im_end|></turn> 1234"
        assert copy.encode(text) == original.encode(text)
        chat = [("user", "What is 2 + 2?"), ("assistant", "4."), ("user", "And 3 + 3?")]
        assert copy.apply_chat_template(chat) == original.apply_chat_template(chat)
        assert copy.eos_token_id == original.eos_token_id
        assert copy.special_tokens == original.special_tokens
        tokenizers.Tokenizer.from_str(original.to_json())  # others read it too


async def test_an_operator_flushes_everything(worker: Any, fake: FakeEngine) -> None:
    told = await worker.FlushCache(common_pb2.FlushCacheRequest())
    assert told.success
    assert told.message == "7 cached blocks were given up"
    assert fake.flushed == [None]


async def test_a_flush_waits_for_requests_to_end_or_says_that_they_have_not(
    worker: Any, fake: FakeEngine, server: Server
) -> None:
    request = pb.GenerateRequest(
        request_id="a", tokenized=pb.TokenizedInput(input_ids=b"forever"), stream=True
    )
    read = asyncio.create_task(collect(worker.Generate(request)))
    await until(lambda: fake.running)
    for seconds in (0.0, 0.05):
        told = await worker.FlushCache(common_pb2.FlushCacheRequest(timeout_s=seconds))
        assert not told.success
        assert told.message.startswith("1 requests are in progress after")
    assert fake.flushed == []
    waiting = asyncio.ensure_future(worker.FlushCache(common_pb2.FlushCacheRequest(timeout_s=60)))
    await until(lambda: server._calls.num_in_progress == 2)
    assert not waiting.done()
    await worker.Abort(pb.AbortRequest(request_ids=["a"]))
    assert (await waiting).success
    await read


async def test_a_flush_that_waits_does_not_hold_up_a_server_that_is_to_end(
    fake: FakeEngine,
) -> None:
    calls = Calls(8)
    calls.set_engine(fake)
    service = VllmService(calls, _As(Caller()))
    nowhere: Any = None
    with calls.stream(Caller(), "mine"):
        request = common_pb2.FlushCacheRequest(timeout_s=300)
        waiting = asyncio.ensure_future(service.FlushCache(request, nowhere))
        await until(lambda: calls.num_in_progress)
        assert not waiting.done()
        calls.shut_down()
        with pytest.raises(Refused, match="shutting down"):
            await waiting
        assert calls.num_in_progress == 0


async def test_an_abort_names_so_many_requests_and_no_more(worker: Any) -> None:
    await worker.Abort(pb.AbortRequest(request_ids=["a"] * 1024))
    with pytest.raises(grpc.aio.AioRpcError, match="request_ids: has 1025 entries") as raised:
        await worker.Abort(pb.AbortRequest(request_ids=["a"] * 1025))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), 301.0])
async def test_a_flush_waits_no_impossible_time(seconds: float, worker: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="timeout_s: is") as raised:
        await worker.FlushCache(common_pb2.FlushCacheRequest(timeout_s=seconds))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_without_a_folder_there_are_no_profiles(worker: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="has no folder for traces") as raised:
        await worker.StartProfile(common_pb2.StartProfileRequest())
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert not (await worker.StopProfile(common_pb2.StopProfileRequest())).success


async def test_a_profile_is_written_to_the_operator_s_folder(
    tmp_path: Path, fake: FakeEngine
) -> None:
    server = Server(ServerConfig(port=0, profile_dir=str(tmp_path), grace=0.05))
    await server.start()
    await server.set_engine(fake)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            worker: Any = vllm_engine_pb2_grpc.VllmEngineStub(channel)
            request = common_pb2.StartProfileRequest(with_stack=False, activities=["GPU", "CPU"])
            assert (await worker.StartProfile(request)).success
            again = await worker.StartProfile(request)
            assert (again.success, again.message) == (False, "a trace is running")
            assert (await worker.StopProfile(common_pb2.StopProfileRequest())).success
            assert list(tmp_path.rglob("*.xplane.pb"))
            again = await worker.StopProfile(common_pb2.StopProfileRequest())
            assert (again.success, again.message) == (False, "no trace is running")
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"output_dir": "/tmp/elsewhere"}, "output_dir"),
        ({"start_step": 0}, "start_step"),
        ({"num_steps": 5}, "num_steps"),
        ({"activities": ["CPU"]}, "activities"),
        ({"record_shapes": True}, "record_shapes"),
        ({"profile_by_stage": True}, "profile_by_stage"),
    ],
)
def test_a_profile_that_is_not_served_is_refused(fields: dict[str, Any], field: str) -> None:
    profiler = Profiler("/tmp/here")
    with pytest.raises(ValueError, match=f"^{field}: "):
        profiler.check(common_pb2.StartProfileRequest(**fields))
    profiler.check(common_pb2.StartProfileRequest(output_dir="/tmp/here", record_shapes=False))


async def test_who_sees_figures_of_all(fake: FakeEngine) -> None:
    """On loopback every user of the machine is an operator, so that is not enough by itself."""
    calls = Calls(8)
    calls.set_engine(fake)
    anybody, local = Caller(), Caller(is_operator=True)
    keyed = Caller("ops", is_operator=True, rules=TenantRules(operator=True))
    tenant = Caller("alice", rules=TenantRules())

    async def sees(caller: Caller, *, public_stats: bool = False) -> bool:
        service = VllmService(calls, _As(caller), public_stats=public_stats)
        nowhere: Any = None
        info = await service.GetServerInfo(pb.GetServerInfoRequest(), nowhere)
        if info.active_requests == 0:
            with pytest.raises(Refused, match=r"server\.public_stats=true"):
                await service.GetLoads(pb.GetLoadsRequest(), nowhere)
            return False
        await service.GetLoads(pb.GetLoadsRequest(), nowhere)
        return True

    assert [await sees(who) for who in (anybody, local, tenant, keyed)] == [False] * 3 + [True]
    assert await sees(anybody, public_stats=True)
    fake.kv_events = KvEvents()  # those tell operators more
    assert [await sees(who) for who in (anybody, local, tenant, keyed)] == [
        *(False, True),
        *(False, True),
    ]


class _As(Access):
    """Everybody is one caller."""

    def __init__(self, caller: Caller):
        self._caller = caller

    def caller(self, context: Any) -> Caller:
        return self._caller


async def test_who_is_no_operator_sees_and_changes_nothing_of_others(fake: FakeEngine) -> None:
    calls = Calls(8)
    calls.set_engine(fake)
    service = VllmService(calls, _As(Caller(tenant="alice")), profile_dir="/tmp")
    fake.kv_events = KvEvents()
    nowhere: Any = None
    refused = (
        service.GetLoads(pb.GetLoadsRequest(), nowhere),
        service.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), nowhere),
        service.StartProfile(common_pb2.StartProfileRequest(), nowhere),
        service.StopProfile(common_pb2.StopProfileRequest(), nowhere),
    )
    for call in refused:
        with pytest.raises(Refused) as raised:
            await call
        assert raised.value.code is grpc.StatusCode.PERMISSION_DENIED
    info = await service.GetServerInfo(pb.GetServerInfoRequest(), nowhere)
    assert info.active_requests == 0
    bob = Caller(tenant="bob")
    with calls.stream(bob, "theirs") as (_, name):
        fake.running[name] = asyncio.Event()
        await service.Abort(pb.AbortRequest(request_ids=["theirs", "bob/theirs"]), nowhere)
        assert not fake.running[name].is_set()
        # Nor does another's request hold back a flush of one's own.
        told = await service.FlushCache(common_pb2.FlushCacheRequest(), nowhere)
        assert told.success
    assert fake.flushed == [Domain("alice")]
