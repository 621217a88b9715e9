"""`octavo serve`: what a config may not ask for, and the life of the process.

The event loop has a thread of its own, so health checks are answered while the main thread
loads the model, and the main thread stays free for signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Set
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import Config, ConfigError, resolve_server
from engine.event_loop import new_event_loop
from engine.serve.server import AddressUnavailable, Server, is_loopback, join
from engine.serve.signals import Signals, StoppedEarly, end_now
from engine.server_config import ServerConfig
from engine.start_up import process_age
from engine.trimming import trimming

if TYPE_CHECKING:
    from engine.frontend import Engine, ModelInfo

log = logging.getLogger("octavo.serve")

SWITCH_SECONDS = 0.0005  # after which a thread lets another one have the interpreter
_CLOSE_SECONDS = 30.0  # for an engine to write its disk tier, besides a step that is on its way

_DEFAULT = ServerConfig()


def run_server(
    config: Config,
    record: str | None = None,
    progress: Callable[..., None] | None = None,
    *,
    record_tokens: bool = False,
) -> int:
    """Serve a config until SIGINT or SIGTERM. The implementation of `octavo serve`.

    Args:
      config: the whole config.
      record: a file to which the engine writes its event log.
      progress: passed to `Engine.from_config`.
      record_tokens: the log holds requests and token ids in full.

    Returns:
      The exit code: 0 after a signal, 1 if the address is not available or the engine stopped
      by itself.

    Raises:
      ConfigError: callers would share one cache, and the server would not be on loopback; others
        could reach it who shall not; or something is said of tenants that nobody can be.
    """
    server = resolve_server(config)
    _check_isolation(config)
    with contextlib.ExitStack() as cleanup:
        tracing = None
        if config.server.tracing:
            from engine.observe.tracing import open_tracing

            tracing = open_tracing()
            cleanup.callback(tracing.close)

        def load() -> Engine:
            from engine.frontend import Engine

            engine = Engine.from_config(
                config, record=record, record_tokens=record_tokens, progress=progress
            )
            log.info(engine.start_up.describe(process_age()))
            if tracing is not None:
                tracing.model = engine.model_info().name
                engine.requests.listeners.append(tracing)
            return engine

        return serve(server, load, config.cache.tenant_time_to_live.keys())


def serve(
    config: ServerConfig,
    load: Callable[[], Engine],
    tenants: Set[str] = frozenset(),
) -> int:
    """Listen, load the engine, serve until a signal or the engine's end, close the engine.

    The address is taken before the engine is loaded: a busy port shows at once, not after a
    minute of loading. A server whose engine stopped by itself ends, rather than refuse every
    call as a healthy one: what supervises it can start it again. If it is stuck in the device, so
    that it can't even be closed, this does not return: the process ends with exit code 1.
    Exceptions of `load` pass through. Returns the exit code.

    Args:
      config: of the server.
      load: makes the engine.
      tenants: see `Server`.
    """
    server = Server(config, tenants)
    with (
        Signals() as signals,
        _rereading_on_hangup(server),
        trimming(),
        background_loop() as run,
    ):
        try:
            run(server.start())
        except AddressUnavailable as error:
            run(server.stop())  # it may listen on one of two addresses
            print(f"octavo: {error}", file=sys.stderr)
            return 1
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(lambda: run(server.stop()))  # if loading fails
            try:
                with signals.interrupting():
                    engine = load()
            except StoppedEarly:
                return 0
            cleanup.callback(lambda: _close(engine, config.step_timeout + _CLOSE_SECONDS))
            cleanup.callback(lambda: run(server.stop()))  # before the engine closes
            run(server.set_engine(engine))
            print(_ready_line(engine.model_info(), server.address, config), flush=True)
            if server.page is not None:
                print(f"OpenAI API: {server.page}v1", flush=True)
                who = " to operators, whose key is the password" if config.access else ""
                print(f"Its cache is shown on {server.page}{who}", flush=True)
            if signals.wait(lambda: engine.is_alive and not engine.life.is_lost):
                if farewell := server.farewell:
                    log.warning(
                        "ending; %s, and a second signal ends the process at once", farewell
                    )
                return 0
            if engine.is_alive:
                run(server.stop(grace=0.0))
                log.critical("the device does not recover; the server ends: start it again")
                end_now(1)
            log.error(
                "the engine stopped by itself; the error it logged before this says why. The "
                "server ends: start it again"
            )
            return 1


def _close(engine: Engine, seconds: float) -> None:
    """Close an engine, or end the process if that takes longer."""
    done: Future[None] = Future()

    def close() -> None:
        try:
            engine.close()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=close, name="octavo-close", daemon=True).start()
    try:
        done.result(seconds)
    except TimeoutError:
        log.critical("the engine could not be closed within %.0f s; the process ends", seconds)
        end_now(1)


@contextlib.contextmanager
def _rereading_on_hangup(server: Server) -> Iterator[None]:
    """Have SIGHUP mean that files have changed, where there are files; else it ends the process."""
    if not server.has_files or sys.platform == "win32":
        yield
        return
    previous = signal.signal(signal.SIGHUP, lambda *_: server.reread_files())
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, previous)


@contextlib.contextmanager
def background_loop() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Run an event loop in a thread; gives a function that runs a coroutine there.

    Meanwhile, threads take turns more often than Python has them (every 5 ms): with many streams
    the event loop is always busy, and the step loop, which lets go of the interpreter several times
    a step, would wait that long for it each time.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    loop = new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="octavo-serve")
    thread.start()

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    try:
        yield run
    finally:
        run(loop.shutdown_asyncgens())
        run(loop.shutdown_default_executor())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        sys.setswitchinterval(interval)


def _ready_line(model: ModelInfo, address: str, config: ServerConfig) -> str:
    """One line, with a command that works as it stands, given a key where it takes one."""
    where = "" if address == join(_DEFAULT.host, _DEFAULT.port) else f"--address {address} "
    if config.tls is not None:
        where += "--tls --ca FILE "  # of its authority, unless the system trusts that
        where += "--client-cert FILE --client-key FILE " if config.tls.client_ca else ""
    key = "OCTAVO_API_KEY=KEY " if config.access else ""
    command = f'{key}{_octavo_command()} chat {where}-m "Hello"'
    what = f"{model.name} (attention: {model.attention}; products: {model.products})"
    return f"Octavo is ready: {what} on {address}. Talk to it: {command}"


def _octavo_command() -> str:
    """How to call the `octavo` of this environment from here, activated or not."""
    if shutil.which("octavo"):
        return "octavo"
    script = Path(sys.executable).with_name("octavo")
    if not script.exists():
        return f"{sys.executable} -m engine"
    with contextlib.suppress(ValueError):
        return str(script.relative_to(Path.cwd()))
    return str(script)


def _check_isolation(config: Config) -> None:
    """Refuse a server without isolation that others can reach, and warn of any other."""
    if config.cache.isolation == "domain":
        return
    if not is_loopback(config.server.host):
        raise ConfigError(
            f"cache.isolation is none, and server.host is {config.server.host}: whoever reaches "
            "the server could find out what others have sent; set server.host to 127.0.0.1, or "
            "leave cache.isolation out"
        )
    log.warning(
        "ISOLATION IS OFF (cache.isolation: none): all callers share one cache, and each can find "
        "out what others have sent. This is for `octavo leakcheck`, and never for real prompts"
    )
