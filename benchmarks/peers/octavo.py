"""The runner of Octavo: an engine in this process, or a server in it that is read over gRPC.

Deltas carry text as users get it. Each round has a cache salt of its own, so that it finds no
blocks but those that it made itself, and what it left is flushed when it is over: as the peers'
caches are, so that memory counts what a round needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection

from benchmarks.peers.protocol import Answer, Request, Round, channel, parser

Streams = Callable[[Request, str], AsyncIterator[tuple[Collection[int], str, int, int]]]
Flush = Callable[[str], Awaitable[object]]

_LAST = Request([0], 1)  # its step comes after what a flush erases


def main() -> None:
    """Load the engine and run rounds."""
    options = parser(__doc__)
    options.add_argument("--config", required=True)
    options.add_argument("--set", action="append", default=[], help="as `octavo bench` takes it")
    options.add_argument("--grpc", action="store_true", help="read it through a server")
    options.add_argument("--no-prefix-caching", action="store_true")
    asked = options.parse_args()
    with channel(asked.cores) as line:
        from engine import __version__, config_file
        from engine.aot.topologies import quiet_libtpu
        from engine.event_loop import new_event_loop
        from engine.frontend import Engine

        quiet_libtpu()
        engine = Engine.from_config(config_file.load(asked.config, asked.set))
        share = not asked.no_prefix_caching
        with contextlib.ExitStack() as stack:
            stack.callback(engine.close)
            address = stack.enter_context(_served(engine)) if asked.grpc else None

            def run(requests: list[Request]) -> Round:
                with asyncio.Runner(loop_factory=new_event_loop) as runner:
                    if address is None:
                        return runner.run(_run(requests, *_in_process(engine, share)))
                    return runner.run(_over_grpc(address, requests, share))

            line.serve(f"Octavo {__version__}", run)


@contextlib.contextmanager
def _served(engine):
    """The address of a server on the engine."""
    from engine.serve.run import background_loop
    from engine.serve.server import Server
    from engine.server_config import ServerConfig

    with background_loop() as on_loop:
        server = Server(ServerConfig(port=0, max_concurrent=engine.config.scheduler.max_waiting))
        on_loop(server.start())
        try:
            on_loop(server.set_engine(engine))
            yield server.address
        finally:
            on_loop(server.stop())


def _in_process(engine, share: bool) -> tuple[Streams, Flush]:
    from engine.types import Domain

    async def streams(request: Request, salt: str):
        domain = Domain(salt=salt)
        prompt, sampling = tuple(request.prompt_ids), _sampling(request)
        async for delta in engine.generate(prompt, sampling, domain=domain, share_prefix=share):
            usage = delta.usage
            yield delta.token_ids, delta.text, usage.prompt_tokens, usage.cached_tokens

    return streams, lambda salt: engine.flush(Domain(salt=salt))


async def _over_grpc(address: str, requests: list[Request], share: bool) -> Round:
    from engine.client import AsyncClient

    async with AsyncClient(address) as client:

        async def streams(request: Request, salt: str):
            prompt, sampling = request.prompt_ids, _sampling(request)
            async for delta in client.generate(
                prompt, sampling, cache_salt=salt, share_prefix=share
            ):
                yield delta.token_ids, delta.text, delta.prompt_tokens, delta.cached_tokens

        return await _run(requests, streams, client.flush)


def _sampling(request: Request):
    from engine.sampling import SamplingParams

    return SamplingParams(max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True)


async def _run(requests: list[Request], streams: Streams, flush: Flush) -> Round:
    salt = f"compare-{secrets.token_hex(8)}"
    begin = time.perf_counter()

    async def one(request: Request) -> Answer:
        answer = Answer()
        try:
            async for tokens, text, num_prompt, num_cached in streams(request, salt):
                if tokens:
                    answer.arrived.append((time.perf_counter() - begin, len(tokens)))
                    answer.token_ids += tokens
                answer.text += text
                answer.prompt_tokens, answer.cached_tokens = num_prompt, num_cached
        except Exception as error:
            answer.failure = f"{type(error).__name__}: {error}"
        answer.end = time.perf_counter() - begin
        return answer

    answers = await asyncio.gather(*map(one, requests))
    seconds = time.perf_counter() - begin
    await flush(salt)
    await one(_LAST)
    await flush(salt)
    return Round(seconds, list(answers))


if __name__ == "__main__":
    main()
