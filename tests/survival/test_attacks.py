"""What a server meets, and survives: each attack leaves it as it was, and it answers as before.

`make survival` runs each as often as an attacker would.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from engine.client import AsyncClient, ServiceError
from engine.rpc.octavo.v1 import generation_pb2 as pb
from engine.sampling import Constraint
from engine.serve.server import OTHER_CALLS
from engine.server_config import ServerConfig
from engine.types import FinishReason
from tests.survival import h2
from tests.survival.fuzz import Call, messages, registered
from tests.survival.process import FULL, ServerProcess

GENERATE = "/octavo.v1.Generation/Generate"
ANSWERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.OUT_OF_RANGE,
}
CUT_SHORT = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
LONG = list(range(32, 127)) * 5
SLOTS = 8
MAX_CALLS = ServerConfig().max_concurrent + OTHER_CALLS


def often(count: int, in_ci: int) -> int:
    """How many times: all of them in `make survival`, fewer in CI."""
    return count if FULL else in_ci


async def started(client: AsyncClient, num_running: int, num_waiting: int = 0) -> None:
    """Wait until the server has so many sequences running and waiting."""
    while True:
        stats = await client.stats()
        if stats.running >= num_running and stats.waiting >= num_waiting:
            return
        await asyncio.sleep(0.002)


async def read(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        pass


async def ended(stream: AsyncIterator[Any]) -> grpc.StatusCode:
    """The status with which a call ends."""
    try:
        await read(stream)
    except ServiceError as error:
        return error.code
    return grpc.StatusCode.OK


def begin(client: AsyncClient, prompt: Any = "Once", **given: Any) -> asyncio.Task[None]:
    """A call that goes on for as long as the model can."""
    fields: dict[str, Any]
    fields = {"ignore_eos": True, "temperature": 0.0, **given}
    return asyncio.create_task(read(client.generate(prompt, **fields)))


async def cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def queued(client: AsyncClient, count: int, **given: Any) -> list[asyncio.Task[None]]:
    """Calls that wait, and do so until `client.resume`, so that none can have ended."""
    await client.pause()
    tasks = [begin(client, f"Once {number}", **given) for number in range(count)]
    await started(client, 0, count)
    return tasks


async def test_cancelled_while_queued(client: AsyncClient) -> None:
    tasks = await queued(client, SLOTS + 6)
    await cancel(*tasks[:2])
    await client.resume()  # the first begin to run, and others still wait
    await cancel(*reversed(tasks))


async def test_cancelled_while_tokenised(client: AsyncClient) -> None:
    for number in range(often(50, 5)):
        task = begin(client, "a b " * 25_000)
        await asyncio.sleep(0.001 * number)
        await cancel(task)


@pytest.mark.parametrize("prompt", ["Once", LONG], ids=["short", "long"])
async def test_cancelled_at_any_time(client: AsyncClient, prompt: Any) -> None:
    """From before it arrives, through its prompt, into its output."""
    for number in range(often(200, 15)):
        task = begin(client, prompt, request_id=f"cancelled {number}".replace(" ", "-"))
        await asyncio.sleep(0.0007 * (number % 40))
        await cancel(task)


@pytest.mark.parametrize(
    "fields",
    [{"n": 5, "temperature": 1.0}, {"beam_width": 4, "ignore_eos": False}],
    ids=["samples", "beams"],
)
async def test_cancelled_with_several_sequences(client: AsyncClient, fields: Any) -> None:
    if "beam_width" in fields:
        fields = {**fields, "stop_token_ids": ()}
    for number in range(often(50, 4)):
        task = begin(client, [*LONG, number], **fields)
        moment = started(client, 2) if number % 2 else asyncio.sleep(0.002 * number)
        both = (task, asyncio.ensure_future(moment))
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)  # it may end by itself
        await cancel(*both)


async def test_cancelled_while_blocks_are_read_from_disk(client: AsyncClient) -> None:
    """The pool and the host tier are small, so that what the first prompts left is on disk."""
    prompts = [[number + 32, *LONG[number:400]] for number in range(often(60, 16))]
    for prompt in prompts:
        await read(client.generate(prompt, max_tokens=1))
    for number, prompt in enumerate(prompts):
        task = begin(client, prompt)
        await asyncio.sleep(0.0005 * (number % 8))
        await cancel(task)


async def test_connects_and_disconnects(client: AsyncClient, server: ServerProcess) -> None:
    host, port = server.address.rsplit(":", 1)
    for number in range(often(1000, 100)):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            if number % 2:
                connection.sendall(h2.PREFACE[: number % 25])
    for _ in range(often(1000, 8)):
        async with AsyncClient(server.address) as other:
            await other.model_info()


async def test_clients_that_vanish_with_calls_open(
    server: ServerProcess, client: AsyncClient
) -> None:
    request = pb.GenerateRequest(text="Once", sampling=pb.SamplingParams(ignore_eos=True))
    for _ in range(often(100, 10)):
        with h2.Connection(server.address) as connection:
            connection.send(
                b"".join(
                    h2.call(GENERATE, request.SerializeToString(), stream=stream)
                    for stream in (1, 3, 5)
                )
            )
            list(connection.frames(0.02))


@pytest.mark.parametrize("num_connections", [4, 30, 100] if FULL else [4])
async def test_messages_that_never_end(
    num_connections: int, server: ServerProcess, client: AsyncClient
) -> None:
    paths = (GENERATE, "/octavo.v1.Generation/Tokenize", "/grpc.health.v1.Health/Check")
    with contextlib.ExitStack() as stack:
        for _ in range(num_connections):
            connection = stack.enter_context(h2.Connection(server.address))
            for number in range(60):
                half = h2.half_a_call(paths[number % 3], stream=2 * number + 1)
                assert connection.send(half)
        code = await ended(client.generate("Once", max_tokens=1))  # while they are open
    if num_connections * 60 < MAX_CALLS:
        assert code is grpc.StatusCode.OK
    else:
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED)


async def test_readers_that_take_nothing_are_let_go(
    client: AsyncClient, server: ServerProcess
) -> None:
    """Their windows are closed, so not a byte of an answer can be sent."""
    request = pb.GenerateRequest(text="Once", sampling=pb.SamplingParams(ignore_eos=True))
    with contextlib.ExitStack() as stack:
        for _ in range(often(50, 6)):
            connection = stack.enter_context(h2.Connection(server.address, window=0))
            assert connection.send(h2.call(GENERATE, request.SerializeToString()))
        await started(client, 1)
        while (await client.stats()).owned_blocks:  # while they are still connected
            await asyncio.sleep(0.05)


async def test_ping_floods_end_with_goodbye(client: AsyncClient, server: ServerProcess) -> None:
    for _ in range(often(50, 3)):
        with h2.Connection(server.address) as connection:
            for _ in range(200):
                if not connection.send(h2.frame(h2.PING, b"12345678")):
                    break
            frames = await asyncio.to_thread(lambda c=connection: list(c.frames(5.0)))
        goodbyes = [frame.payload for frame in frames if frame.kind == h2.GOAWAY]
        assert goodbyes, "a flood of pings went on without an end"
        assert int.from_bytes(goodbyes[0][4:8]) == h2.ENHANCE_YOUR_CALM


async def test_messages_that_are_too_large(client: AsyncClient) -> None:
    for _ in range(often(50, 3)):
        with pytest.raises(ServiceError) as refused:
            await read(client.generate("a" * (2**20 + 1), max_tokens=1))
        assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_that_is_too_large(client: AsyncClient, server: ServerProcess) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/octavo.v1.Generation/GetModelInfo")
        for _ in range(often(50, 3)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(b"", metadata=(("x-large", "a" * 40_000),))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await call(b"", metadata=(("x-small", "a" * 4000),))


async def test_garbage_on_the_socket(client: AsyncClient, server: ServerProcess) -> None:
    rng = random.Random(5)
    http = server.http.split("//")[1].rstrip("/")
    for number in range(often(1000, 60)):
        host, port = (server.address if number % 3 else http).rsplit(":", 1)
        garbage = rng.randbytes(rng.choice((1, 9, 100, 5000)))
        start = rng.choice((b"", h2.PREFACE, h2.PREFACE + h2.settings(), b"GET / HTTP/1.1\r\n"))
        connection = socket.create_connection((host, int(port)), timeout=10)
        with connection, contextlib.suppress(OSError):
            connection.sendall(start + garbage)
            if number % 4 == 0:
                connection.settimeout(0.05)
                connection.recv(4096)


async def test_what_is_registered_is_fuzzed(client: AsyncClient, server: ServerProcess) -> None:
    """Whatever is sent to whichever call, the answer is one that is meant."""
    count = often(10_000, 120)
    async with grpc.aio.insecure_channel(server.address) as channel:
        calls = await registered(channel)
        assert {"/octavo.v1.Generation/Generate", "/octavo.v1.Operations/Pause"} <= {
            call.path for call in calls
        }
        for call in calls:
            outcomes = await _fuzz(channel, call, count)
            # A stream is read for a moment only; but whoever asks for one message is answered.
            meant = ANSWERS | CUT_SHORT if call.method.server_streaming else ANSWERS
            wrong = {code.name for code in outcomes - meant}
            assert not wrong, f"{call.path} ended with {wrong}"
            await client.resume()  # it may have been a pause


async def _fuzz(channel: grpc.aio.Channel, call: Call, count: int) -> set[grpc.StatusCode]:
    outcomes: set[grpc.StatusCode] = set()
    raws = messages(call, seed=1, count=count)
    method = call.method

    async def work() -> None:
        for raw in raws:
            try:
                if method.server_streaming and method.client_streaming:
                    stream = channel.stream_stream(call.path)(iter([raw]), timeout=0.3)
                elif method.server_streaming:
                    stream = channel.unary_stream(call.path)(raw, timeout=0.3)
                else:
                    await channel.unary_unary(call.path)(raw, timeout=20)
                    outcomes.add(grpc.StatusCode.OK)
                    continue
                async for _ in stream:
                    pass
                outcomes.add(await stream.code())
            except grpc.aio.AioRpcError as error:
                outcomes.add(error.code())

    await asyncio.gather(*(work() for _ in range(32)))
    return outcomes


async def test_http_paths_are_fuzzed(client: AsyncClient, server: ServerProcess) -> None:
    rng = random.Random(3)
    posts = ("/v1/completions", "/v1/chat/completions")
    gets = ("/", "/v1/models", "/health", "/nothing")
    bodies = (b"", b"{", b"[]", b'{"prompt": 3}', b'{"messages": {}}', b"\xff" * 100, b"[" * 5000)

    def make(number: int) -> urllib.request.Request:
        path = rng.choice(posts if number % 4 else (*posts, *gets))
        body = json.dumps(random_json(rng)).encode() if number % 3 else rng.choice(bodies)
        kind = rng.choice(("application/json", "application/json", "text/plain"))
        url = server.http.rstrip("/") + path
        return urllib.request.Request(url, None if path in gets else body, {"content-type": kind})

    def ask(request: urllib.request.Request) -> int:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read(100)
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    requests = map(make, range(often(10_000, 64)))
    for some in itertools.batched(requests, 8):
        codes = await asyncio.gather(*(asyncio.to_thread(ask, request) for request in some))
        assert max(codes) < 500 or set(codes) <= {200, *range(400, 500), 504}  # a short `timeout`


def random_json(rng: random.Random) -> dict[str, Any]:
    """A request as clients of OpenAI's API write them, with anything in any field."""
    message = {"role": "user", "content": "hello"}
    likely: dict[str, Any] = {"model": "model", "prompt": "hello", "messages": [message]}
    values: tuple[Any, ...] = (None, 0, 1, 3, -1, 1e30, 2**70, True, "", "a", [], ["a"], {}, [[]])
    names = ("max_tokens", "n", "stream", "logprobs", "top_logprobs", "stop", "temperature", "echo")
    names += ("top_p", "seed", "logit_bias", "response_format", "tools", "user", "model", "prompt")
    names += ("messages", "max_completion_tokens", "best_of", "suffix", "stream_options", "timeout")
    return {
        **{name: value for name, value in likely.items() if rng.random() < 0.8},
        "max_tokens": 2,
        **{name: rng.choice(values) for name in rng.sample(names, rng.randrange(4))},
    }


async def test_names_that_are_in_use(client: AsyncClient) -> None:
    [first] = await queued(client, 1, request_id="mine")
    for _ in range(often(1000, 20)):
        with pytest.raises(ServiceError) as refused:
            await read(client.generate("Once", request_id="mine"))
        assert refused.value.code is grpc.StatusCode.ALREADY_EXISTS
    await client.resume()
    await cancel(first)


async def test_aborts_again_and_again(client: AsyncClient) -> None:
    for number in range(often(200, 10)):
        name = f"aborted-{number}"
        stream = client.generate("Once", request_id=name, ignore_eos=True)
        await anext(stream)
        assert await client.abort(name)
        aborts = await asyncio.gather(*(client.abort(name) for _ in range(5)))
        assert {type(aborted) for aborted in aborts} == {bool}
        parts = [part async for part in stream]
        assert parts[-1].finish_reason is FinishReason.ABORT
        assert not await client.abort(name)


async def test_a_full_queue_says_when_to_come_again(client: AsyncClient) -> None:
    await client.pause()  # so that it stays full
    tasks = [begin(client, f"Once {number}") for number in range(SLOTS + 64 + 64)]
    ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in ended:
        refused = task.exception()
        assert isinstance(refused, ServiceError)
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.retry_after is not None
        assert 0.1 <= refused.retry_after <= 60
    await client.resume()
    await cancel(*tasks)


async def test_steps_that_fail(client: AsyncClient, server: ServerProcess) -> None:
    for _ in range(often(20, 2)):
        # A good step, so that they don't fail one after another.
        await read(client.generate("Once", max_tokens=1))
        [task] = await queued(client, 1)
        server.fail_a_step()
        await client.resume()
        with pytest.raises(ServiceError) as failed:
            await task
        assert failed.value.code is grpc.StatusCode.INTERNAL
        while not await client.is_ready():  # it notices with a delay that the pause is over
            await asyncio.sleep(0.02)


async def test_a_step_that_hangs(client: AsyncClient, server: ServerProcess) -> None:
    for _ in range(often(5, 1)):
        tasks = await queued(client, 3)
        server.hang_or_go_on()
        await client.resume()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        codes = {error.code for error in ended if isinstance(error, ServiceError)}
        assert codes == {grpc.StatusCode.UNAVAILABLE}
        while await client.is_ready():
            await asyncio.sleep(0.02)
        with pytest.raises(ServiceError, match="hangs") as refused:
            await read(client.generate("Once", max_tokens=1))
        assert refused.value.code is grpc.StatusCode.UNAVAILABLE
        server.hang_or_go_on()
        while not await client.is_ready():
            await asyncio.sleep(0.02)


async def test_regular_expressions_that_explode(client: AsyncClient) -> None:
    bombs = (
        "(a+)+$",
        "(a|a)*" * 50,
        "(.{1,1000}){1,1000}",
        "((a{1,100}){1,100}){1,100}",
        "(" * 500,
    )
    for bomb in bombs * often(20, 1):
        with contextlib.suppress(ServiceError):
            await read(
                client.generate(
                    "Once", max_tokens=4, constraint=Constraint("regex", bomb), timeout=20
                )
            )
        assert await client.is_ready()
