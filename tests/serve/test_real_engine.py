"""The service over the real engine and SmolLM2, in a process of its own, as users run it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.client import AsyncClient, Delta, ServiceError
from engine.types import FinishReason
from tests.conftest import ROOT
from tests.serve.fake_engine import collect

SERVE = """
import sys
from engine.config_file import load
from engine.serve.run import run_server
sys.exit(run_server(load(sys.argv[1], sys.argv[2:])))
"""
# Few and small shapes: this is about the service, and compiling takes most of the time.
OVERRIDES = (
    "server.port=0",
    "server.public_stats=true",
    "server.grace=2",
    "model.max_model_len=512",
    "cache.memory=null",
    "cache.num_blocks=128",
    "scheduler.max_num_seqs=4",
    "scheduler.max_step_tokens=64",
    "buckets.decode_seqs=[4]",
    "buckets.prefill_tokens=[64]",
    "buckets.prefill_seqs=[4]",
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Serving:
    """A server that is started when it is asked for, and again when a test has ended it."""

    def __init__(self, *overrides: str):
        config = ROOT / "configs" / "smollm2-135m-cpu.yaml"
        self._command = [sys.executable, "-c", SERVE, str(config), *overrides]
        self._process: subprocess.Popen[str] | None = None
        self._address = ""

    def process(self) -> tuple[subprocess.Popen[str], str]:
        """It, ready, and its address."""
        if self._process is None or self._process.poll() is not None:
            self.end()
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=pipe, text=True)
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            assert line.startswith("Octavo is ready: ")
            self._address = line.split(" on ")[1].split(". ")[0]
        return self._process, self._address

    def end(self) -> None:
        """Kill it, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture(scope="module")
def serving(smollm2_gguf: Path) -> Iterator[Serving]:
    serving = Serving(f"model.source={smollm2_gguf}", *OVERRIDES)
    yield serving
    serving.end()


@pytest.fixture
def process(serving: Serving) -> subprocess.Popen[str]:
    return serving.process()[0]


@pytest.fixture
def address(serving: Serving) -> str:
    return serving.process()[1]


async def test_a_question_is_answered_over_the_wire(address: str) -> None:
    async with AsyncClient(address) as client:
        deltas = await collect(client.generate(QUESTION, temperature=0.0, max_tokens=32))
        text = "".join(delta.text for delta in deltas)
        assert "Paris" in text
        tokens = tuple(token for delta in deltas for token in delta.token_ids)
        assert await client.detokenize(tokens) == text
        assert deltas[-1].prompt_tokens == len(await client.tokenize(QUESTION))
        assert deltas[-1].completion_tokens == len(tokens)


async def owned_blocks(client: AsyncClient) -> int:
    stats = await client.stats()
    assert stats.free_blocks + stats.cached_blocks + stats.owned_blocks == stats.total_blocks
    return stats.owned_blocks + stats.running + stats.waiting


async def until_idle(client: AsyncClient) -> None:
    while await owned_blocks(client):
        await asyncio.sleep(0.02)


async def test_every_way_to_end_a_stream_returns_every_block(address: str) -> None:
    async with AsyncClient(address) as client:

        async def long(**fields: Any) -> list[Delta]:
            return await collect(client.generate("Once", ignore_eos=True, **fields))

        # left early
        async with contextlib.aclosing(client.generate("Once", ignore_eos=True)) as stream:
            await anext(stream)
            assert await owned_blocks(client)
        await until_idle(client)
        # cancelled, two of them while they wait for their turn
        tasks = [asyncio.create_task(long()) for _ in range(6)]
        while (await client.stats()).running < 4:
            await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until_idle(client)
        # deadline
        with pytest.raises(ServiceError) as raised:
            await long(timeout=0.2)
        assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until_idle(client)
        # aborted
        task = asyncio.create_task(long(request_id="mine"))
        while not await client.abort("mine"):
            await asyncio.sleep(0.02)
        assert (await task)[-1].finish_reason is FinishReason.ABORT
        await until_idle(client)
        # and it still answers
        assert await collect(client.generate(QUESTION, max_tokens=1))


async def test_what_can_not_be_served_is_refused_and_the_server_goes_on(address: str) -> None:
    async with AsyncClient(address) as client:
        info = await client.model_info()
        vocab_size = info.architecture.vocab_size
        cases: tuple[tuple[Any, dict[str, Any], str, str], ...] = (
            ([5] * 600, {}, "token_ids", f"has 600 tokens.* at most {info.max_model_len - 1}"),
            ([vocab_size], {}, "token_ids", f"{vocab_size} is not a token id"),
            ("hi", {"stop_token_ids": (vocab_size,)}, "sampling.stop_token_ids", "is not a token"),
            ([{"role": "nobody", "content": "hi"}], {}, "messages", "role is 'nobody'"),
        )
        for prompt, fields, path, message in cases:
            with pytest.raises(ServiceError, match=message) as raised:
                await collect(client.generate(prompt, **fields))
            assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
            assert [field for field, _ in raised.value.violations] == [path]
        assert await collect(client.generate(QUESTION, max_tokens=1))


async def test_a_signal_ends_the_server_with_code_zero_and_its_stream_with_unavailable(
    process: subprocess.Popen[str], address: str
) -> None:
    async with AsyncClient(address) as client:
        stream = client.generate("Once", ignore_eos=True)
        await anext(stream)
        process.send_signal(signal.SIGTERM)
        parts: list[object] = []
        with contextlib.suppress(ServiceError):  # it may end by itself within the grace
            await collect(stream, parts)
        assert parts
    assert process.wait() == 0
