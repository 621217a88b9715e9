"""The life of the gRPC server: bind, load, serve, drain.

The event loop has a thread of its own, so health checks are answered while the main thread
loads the model, and the main thread stays free for signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.config import Config, ConfigError, ServerConfig
from engine.rpc.octavo.v1 import generation_pb2_grpc
from engine.serve.errors import ErrorInterceptor
from engine.serve.service import SERVICE_NAME, TENANT, GenerationService

if TYPE_CHECKING:
    from engine.frontend import Engine, ModelInfo
    from engine.serve.http import HttpServer, Watching

log = logging.getLogger("octavo.serve")

GRACE_SECONDS = 5.0  # for streams to end by themselves when the server stops
ABORT_SECONDS = 2.0  # for aborted streams to say goodbye after that
_WATCH_SECONDS = 1.0  # between looks at whether the engine still runs

_DEFAULT = ServerConfig()


class AddressUnavailable(RuntimeError):
    """The server can't listen where it was told to."""


class Server:
    """A gRPC server that first answers health checks, and calls once it has an engine.

    Args:
      config: where to listen, and the limits.
      grace: seconds that streams have to end by themselves when the server stops.
      http: host and port of the page that shows the pool; None: there is none.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        grace: float = GRACE_SECONDS,
        http: tuple[str, int] | None = None,
    ):
        self._config = config
        self._grace = grace
        self._port = config.port
        self._service = GenerationService(config.max_concurrent, public_stats=config.public_stats)
        self._health = health.aio.HealthServicer()  # type: ignore[missing-attribute]
        self._server: grpc.aio.Server | None = None
        self._http: HttpServer | None = None
        self._watching: Watching | None = None
        if http is not None:
            from engine.serve.http import HttpServer, Watching, make_app

            self._watching = Watching()
            self._http = HttpServer(make_app(self._watching.routes, http[0]), *http)

    @property
    def address(self) -> str:
        """`host:port` where clients on this machine reach the server."""
        host = self._config.host
        with contextlib.suppress(ValueError):
            if (ip := ipaddress.ip_address(host)).is_unspecified:
                host = "127.0.0.1" if ip.version == 4 else "::1"
        return _join(host, self._port)

    @property
    def page(self) -> str | None:
        """Where the page is, if there is one."""
        return None if self._http is None else self._http.url

    async def start(self) -> None:
        """Listen. Health is NOT_SERVING, and calls are UNAVAILABLE, until `set_engine`.

        Raises:
          AddressUnavailable: the port is busy, or the host is not one of this machine.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        config = self._config
        if reason := _why_unavailable(config.host, config.port):
            raise AddressUnavailable(reason)
        address = _join(config.host, config.port)
        self._server = self._make_server()
        try:
            self._port = self._server.add_insecure_port(address)
        except RuntimeError as error:  # taken since we looked
            raise AddressUnavailable(f"can't listen on {address}: {error}") from None
        await self._server.start()
        if self._http is not None:
            try:
                await self._http.start()
            except OSError as error:
                raise AddressUnavailable(
                    f"can't show a page on {self._http.url}: {error.strerror}; choose another "
                    "port with --http (0 takes a free one)"
                ) from None
        if not _is_loopback(config.host):
            also = ", and watch what others do (server.public_stats)" if config.public_stats else ""
            log.warning("%s has no authentication: whoever reaches it may use it%s", address, also)

    async def set_engine(self, engine: Engine) -> None:
        """Begin to serve: health is SERVING from here on."""
        self._service.set_engine(engine)
        if self._watching is not None:
            self._watching.engine = engine
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """Refuse new calls, let streams end for a while, abort the rest, stop listening."""
        if self._http is not None and self._watching is not None:
            self._watching.close()
            await self._http.stop()
        self._service.shut_down()
        await self._health.enter_graceful_shutdown()
        if not await self._service.wait_idle(self._grace):
            self._service.abort_streams()
            await self._service.wait_idle(ABORT_SECONDS)
        if self._server is not None:
            await self._server.stop(grace=0.5)

    def _make_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[ErrorInterceptor(frozenset([SERVICE_NAME]))],
            options=_options(self._config),
        )
        generation_pb2_grpc.add_GenerationServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        services = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, server)
        return server

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", SERVICE_NAME):
            await self._health.set(service, status)


def page_address(text: str, *, public: bool) -> tuple[str, int]:
    """Host and port of `[host:]port`, where the page shall be; the host is this machine alone
    unless it may be `public`. An IPv6 address stands in brackets.

    Raises:
      ValueError: it is not such an address, or one that others reach.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"--http is {text!r:.80}; put an IPv6 address in brackets: [::1]:8080")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535 or (colon and not host):
        raise ValueError(f"--http is {text!r:.80}; it must be a port, or host:port")
    host = host or "127.0.0.1"
    if not (public or _is_loopback(host)):
        raise ValueError(
            f"--http is {text!r:.80}, which other machines reach; the page shows the requests of "
            "all tenants and has no authentication. Use 127.0.0.1, or allow it with --http-public"
        )
    return host, int(port)


def run_server(
    config: Config,
    record: str | None = None,
    progress: Callable[..., None] | None = None,
    *,
    record_tokens: bool = False,
    http: tuple[str, int] | None = None,
) -> int:
    """Serve a config until SIGINT or SIGTERM. The implementation of `octavo serve`.

    Args:
      config: the whole config.
      record: a file to which the engine writes its event log.
      progress: passed to `Engine.from_config`.
      record_tokens: the log holds requests and token ids in full.
      http: host and port of the page that shows the pool; None: there is none.

    Returns:
      The exit code: 0 after a signal, 1 if the address is not available or the engine stopped
      by itself.

    Raises:
      ConfigError: callers would share one cache, and the server would not be on loopback; or
        something is said of tenants that nobody can be.
    """
    _check_isolation(config)
    _check_tenants(config)

    def load() -> Engine:
        from engine.frontend import Engine

        return Engine.from_config(
            config, record=record, record_tokens=record_tokens, progress=progress
        )

    return serve(config.server, load, http=http)


def serve(
    config: ServerConfig,
    load: Callable[[], Engine],
    grace: float = GRACE_SECONDS,
    http: tuple[str, int] | None = None,
) -> int:
    """Listen, load the engine, serve until a signal or the engine's end, close the engine.

    The address is taken before the engine is loaded: a busy port shows at once, not after a
    minute of loading. A server whose engine stopped by itself ends, rather than refuse every
    call as a healthy one: what supervises it can start it again. Exceptions of `load` pass
    through. Returns the exit code.
    """
    server = Server(config, grace=grace, http=http)
    with background_loop() as run:
        try:
            run(server.start())
        except AddressUnavailable as error:
            run(server.stop())  # it may listen on one of two addresses
            print(f"octavo: {error}", file=sys.stderr)
            return 1
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(lambda: run(server.stop()))  # if loading fails
            engine = load()
            cleanup.callback(engine.close)
            cleanup.callback(lambda: run(server.stop()))  # before the engine closes
            run(server.set_engine(engine))
            print(_ready_line(engine.model_info(), server.address), flush=True)
            if server.page is not None:
                print(f"Its cache is shown on {server.page}", flush=True)
            if _wait_for_signal(lambda: engine.is_alive):
                return 0
            log.error(
                "the engine stopped by itself; the error it logged before this says why. The "
                "server ends: start it again"
            )
            return 1


@contextlib.contextmanager
def background_loop() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Run an event loop in a thread; gives a function that runs a coroutine there."""
    loop = _new_event_loop()
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


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop where it exists, which is everywhere but on Windows."""
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()


def _wait_for_signal(is_alive: Callable[[], bool]) -> bool:
    """Wait for SIGINT or SIGTERM; a second one has its usual effect again.

    Returns:
      True after a signal, False if `is_alive` doesn't hold any more.
    """
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in signals}
    try:
        while not stop.wait(_WATCH_SECONDS):
            if not is_alive():
                return False
        return True
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        # Two servers on one port would share its connections in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.max_message),
        # A client whose machine vanished sends no goodbye: without pings, its stream would
        # hold cache blocks until TCP gives up, which takes a quarter of an hour.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),  # no limit
        # How often clients may ping us.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


def _why_unavailable(host: str, port: int) -> str | None:
    """Try to listen with a plain socket, for gRPC doesn't say why it can't."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        return f"server.host {host!r} can't be resolved ({error}); use 127.0.0.1 or 0.0.0.0"
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            return (
                f"can't listen on {_join(host, port)}: {error.strerror}; stop what listens "
                "there, or choose another with --set server.port=PORT (0 takes a free one)"
            )
    return None


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _ready_line(model: ModelInfo, address: str) -> str:
    """One line, with a command that works as it stands."""
    where = "" if address == _join(_DEFAULT.host, _DEFAULT.port) else f"--address {address} "
    command = f'{_octavo_command()} chat {where}-m "Hello"'
    what = f"{model.name} (attention: {model.attention})"
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
    if not _is_loopback(config.server.host):
        raise ConfigError(
            f"cache.isolation is none, and server.host is {config.server.host}: whoever reaches "
            "the server could find out what others have sent; set server.host to 127.0.0.1, or "
            "leave cache.isolation out"
        )
    log.warning(
        "ISOLATION IS OFF (cache.isolation: none): all callers share one cache, and each can find "
        "out what others have sent. This is for `octavo leakcheck`, and never for real prompts"
    )


def _check_tenants(config: Config) -> None:
    """Refuse what can't have an effect: who calls a server is always the same tenant, so far."""
    if others := sorted(config.cache.tenant_time_to_live.keys() - {TENANT}):
        raise ConfigError(
            f"cache.tenant_time_to_live names {others[0]!r}, but a server has no authentication "
            f"yet: all its callers are the tenant {TENANT!r}. Set cache.time_to_live, or "
            "call the engine in process"
        )


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
