"""The server: what listens, which front ends it has, how they begin and end together.

It listens before there is an engine, so that health checks are answered while that is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto import vllm_engine_pb2_grpc

from engine.config_error import ConfigError
from engine.rpc.octavo.v1 import generation_pb2_grpc, operations_pb2_grpc
from engine.serve import health, operations, service
from engine.serve.access import ANYBODY, Access, check_tenants, watch_rules
from engine.serve.authentication import AccessInterceptor
from engine.serve.calls import Calls
from engine.serve.errors import ErrorInterceptor
from engine.serve.files import Watcher
from engine.serve.health import HealthService
from engine.serve.operations import OperationsService
from engine.serve.service import GenerationService
from engine.serve.tls import grpc_credentials, watch_identity
from engine.serve.vllm.service import FIELD_PATHS as VLLM_FIELD_PATHS
from engine.serve.vllm.service import SERVICE_NAME as VLLM_SERVICE_NAME
from engine.serve.vllm.service import VllmService
from engine.server_config import ServerConfig, http_address

if TYPE_CHECKING:
    from engine.frontend import Engine
    from engine.serve.http import HttpServer
    from engine.serve.watching import Watching

log = logging.getLogger("octavo.serve")

SERVICES = (service.SERVICE_NAME, operations.SERVICE_NAME, VLLM_SERVICE_NAME)
HEALTH_SECONDS = 0.2  # between looks at whether the engine is well
ABORT_SECONDS = 2.0  # for aborted streams to say goodbye after that
OTHER_CALLS = 1024  # gRPC calls at once beside server.max_concurrent: health, Abort, subscribers


class AddressUnavailable(RuntimeError):
    """The server can't listen where it was told to."""


class Server:
    """A gRPC server that first answers health checks, and calls once it has an engine.

    Args:
      config: where to listen, and the limits.
      tenants: those that something is said of elsewhere, which must be there.

    Raises:
      ConfigError: others could reach it who shall not, or the files of access or TLS are unusable.
    """

    def __init__(
        self,
        config: ServerConfig,
        tenants: Set[str] = frozenset(),
    ):
        http = http_address(config.http) if config.http else None
        check_reach(config, http)
        rules = watch_rules(Path(config.access), tenants) if config.access else None
        if rules is None:
            whose = f"without server.access all callers are the tenant {ANYBODY!r}; give that"
            check_tenants(tenants, (ANYBODY,), whose)
        self._identity = watch_identity(config.tls) if config.tls is not None else None
        self._watcher = Watcher([each for each in (rules, self._identity) if each is not None])
        self._config = config
        self._port = config.port
        self._calls = Calls(config.max_concurrent, config.reader_timeout)
        failures = self._calls.failures
        self._errors = ErrorInterceptor(
            frozenset((*SERVICES, health.SERVICE_NAME)),
            service.FIELD_PATHS | VLLM_FIELD_PATHS,
            failures,
        )
        self._access = Access(
            rules,
            is_local=is_loopback(config.host),
            is_http_local=http is None or is_loopback(http[0]),
        )
        self._guard = AccessInterceptor(self._access, failures)
        self._service = GenerationService(
            self._calls, self._access, public_stats=config.public_stats
        )
        self._operations = OperationsService(self._calls, self._access)
        self._vllm = VllmService(
            self._calls,
            self._access,
            public_stats=config.public_stats,
            profile_dir=config.profile_dir,
        )
        self._following: asyncio.Task[None] | None = None  # the engine's health
        self._health = HealthService(SERVICES, self._calls.taken)
        self._server: grpc.aio.Server | None = None
        self._credentials: grpc.ServerCredentials | None = None  # gRPC calls back into them
        self._http: HttpServer | None = None
        self._watching: Watching | None = None
        if http is not None:
            from engine.serve.http import HttpServer, make_app
            from engine.serve.metrics import CountFailures, Metrics
            from engine.serve.openai.routes import Api
            from engine.serve.watching import Watching

            self._watching = Watching()
            api = Api(self._calls, self._access, config.max_message)
            metrics = Metrics(self._calls)
            routes = [*api.routes, *metrics.routes, *self._watching.routes]
            app = make_app(routes, http[0], self._access, is_public=config.http_public)
            self._http = HttpServer(
                CountFailures(app, routes, failures),
                *http,
                max_connections=config.max_connections,
                identity=self._identity,
            )

    @property
    def address(self) -> str:
        """`host:port` where clients on this machine reach the server."""
        host = self._config.host
        with contextlib.suppress(ValueError):
            if (ip := ipaddress.ip_address(host)).is_unspecified:
                host = "127.0.0.1" if ip.version == 4 else "::1"
        return join(host, self._port)

    @property
    def page(self) -> str | None:
        """Where HTTP is, if there is any: the page, and the API below it."""
        return None if self._http is None else self._http.url

    async def start(self) -> None:
        """Listen. Health is NOT_SERVING, and calls are UNAVAILABLE, until `set_engine`.

        Raises:
          AddressUnavailable: the port is busy, or the host is not one of this machine.
        """
        config = self._config
        if reason := _why_unavailable(config.host, config.port):
            raise AddressUnavailable(reason)
        address = join(config.host, config.port)
        self._server = self._make_server()
        try:
            if self._identity is None:
                self._port = self._server.add_insecure_port(address)
            else:
                self._credentials = grpc_credentials(self._identity)
                self._port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:  # taken since we looked
            raise AddressUnavailable(f"can't listen on {address}: {error}") from None
        await self._server.start()
        if self._http is not None:
            try:
                await self._http.start()
            except OSError as error:
                raise AddressUnavailable(
                    f"can't serve HTTP on {self._http.url}: {error.strerror}; choose another port "
                    "with --http (0 takes a free one)"
                ) from None
        self._watcher.start()
        if config.allow_anonymous and not is_loopback(config.host):
            also = ", and watch what others do (server.public_stats)" if config.public_stats else ""
            log.warning("%s has no authentication: whoever reaches it may use it%s", address, also)
        if config.allow_plaintext and not is_loopback(config.host):
            log.warning("%s has no TLS: API keys and prompts can be read on their way", address)

    def reread_files(self) -> None:
        """Read the files of access and TLS again soon, changed or not. Thread-safe."""
        self._watcher.look_now()

    @property
    def has_files(self) -> bool:
        """Whether there are such files."""
        return self._access.is_required or self._identity is not None

    async def set_engine(self, engine: Engine) -> None:
        """Begin to serve: health is SERVING from here on, while the engine is well."""
        engine.requests.on_tokens = self._access.spend
        self._access.on_tenants = engine.requests.keep_tenants
        self._calls.set_engine(engine)
        config = self._config
        engine.life.watch(
            step_timeout=config.step_timeout,
            recovery_timeout=config.recovery_timeout,
            max_failed_steps=config.max_failed_steps,
        )
        if self._watching is not None:
            self._watching.engine = engine
        self._health.set(is_serving=True)
        self._following = asyncio.create_task(self._follow())

    @property
    def farewell(self) -> str | None:
        """What is in progress, and how long `stop` would let it end by itself; None if nothing."""
        count = self._calls.num_streams(None)
        if not count:
            return None
        who = "1 request has" if count == 1 else f"{count} requests have"
        return f"{who} {0.0 if self._calls.is_paused else self._config.grace:g} s to end"

    async def stop(self, grace: float | None = None) -> None:
        """Refuse new calls, let streams end for a while, abort the rest, stop listening.

        Args:
          grace: seconds for streams to end by themselves, instead of the config's.
        """
        self._calls.shut_down()
        if self._following is not None:
            self._following.cancel()
        if self._watching is not None:
            self._watching.close()
        self._health.end()
        if self._calls.is_paused:
            grace = 0.0  # nothing would end by itself
        if not await self._calls.wait_idle(self._config.grace if grace is None else grace):
            self._calls.abort_streams()
            if not await self._calls.wait_idle(ABORT_SECONDS):
                self._calls.abandon_streams()
                await self._calls.wait_idle(ABORT_SECONDS)
        if self._http is not None:
            await self._http.stop()
        if self._server is not None:
            await self._server.stop(grace=0.5)
        await asyncio.to_thread(self._watcher.stop)

    def _make_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[self._guard, self._errors],
            options=_options(self._config),
            # Counts a call from its headers on: its message, too, is kept while it arrives.
            maximum_concurrent_rpcs=self._config.max_concurrent + OTHER_CALLS,
        )
        generation_pb2_grpc.add_GenerationServicer_to_server(self._service, server)
        operations_pb2_grpc.add_OperationsServicer_to_server(self._operations, server)
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(self._vllm, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        services = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, server)
        return server

    async def _follow(self) -> None:
        """Keep health what the engine's is."""
        told = None
        while True:
            try:
                unready = self._calls.unready
            except Exception as error:  # whatever it is, health must not stay what it was
                unready = f"the engine can't be asked how it is ({type(error).__name__})"
            if unready != told:
                told = unready
                log.warning("health: %s", unready or "serving again")
                self._health.set(is_serving=unready is None)
            await asyncio.sleep(HEALTH_SECONDS)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    # A client's certificate is verified when it connects: who stays shows it again in an hour.
    is_mutual = config.tls is not None and config.tls.client_ca
    aged = [("grpc.max_connection_age_ms", 3_600_000)] if is_mutual else []
    return [
        *aged,
        # Two servers on one port would share its connections in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.max_message),
        # Up to the first, a call is refused with RESOURCE_EXHAUSTED; beyond, its stream is reset.
        ("grpc.max_metadata_size", config.max_metadata),
        ("grpc.absolute_max_metadata_size", config.max_metadata),
        ("grpc.max_concurrent_streams", config.max_connection_streams),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        # For who connects and says nothing, or what is no HTTP/2.
        ("grpc.server_handshake_timeout_ms", 10_000),
        # A client whose machine vanished sends no goodbye: without pings, its stream would
        # hold cache blocks until TCP gives up, which takes a quarter of an hour.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),  # no limit
        # How often clients may ping us: who does it three times too soon is told to go away.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
    ]


def check_reach(config: ServerConfig, http: tuple[str, int] | None) -> None:
    """Refuse a server that others can reach without a key, or with one that can be read on its
    way, unless the config says so. Raises ConfigError."""
    if config.http_public and config.access:
        raise ConfigError(
            "--http-public shows the page without authentication, and with server.access it takes "
            "an operator's key; leave one of the two out"
        )
    hosts = {"server.host": config.host} | ({} if http is None else {"--http": http[0]})
    for key, host in hosts.items():
        if is_loopback(host):
            continue
        if not (config.access or config.allow_anonymous):
            raise ConfigError(
                f"{key} is {host}, which other machines reach, and there is no authentication; "
                "give tenants keys with server.access (docs/access.md), use 127.0.0.1, or let "
                "anybody in with server.allow_anonymous: true"
            )
        if config.access and config.tls is None and not config.allow_plaintext:
            raise ConfigError(
                f"{key} is {host}, which other machines reach, and without TLS the API keys can be "
                "read on their way; give server.tls, or say that the network is safe with "
                "server.allow_plaintext: true"
            )


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
                f"can't listen on {join(host, port)}: {error.strerror}; stop what listens "
                "there, or choose another with --set server.port=PORT (0 takes a free one)"
            )
    return None


def join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
