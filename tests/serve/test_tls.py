"""TLS: certificates that are renewed, expired, of other keys or of nobody, on gRPC and on HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from engine.client import AsyncClient, Credentials, CredentialsError, ServiceError
from engine.config_error import ConfigError
from engine.leakcheck.addresses import resolve
from engine.leakcheck.command import open_target
from engine.leakcheck.command import tenants as leakcheck_tenants
from engine.leakcheck.options import Options
from engine.serve import files
from engine.serve.credentials import names_in_certificate, names_in_context
from engine.serve.server import Server
from engine.serve.tls import read_identity, watch_identity
from engine.server_config import TlsConfig
from tests.serve.access_file import ALICE, BOB, OPS, serving, tenants, write
from tests.serve.fake_engine import FakeEngine, until

DAY = datetime.timedelta(days=1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOOK_SECONDS", 0.01)


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


class Folder:
    """Where the PEM files are."""

    def __init__(self, path: Path, ca: trustme.CA):
        self.path = path
        self.ca = path / "ca.pem"
        self.authority = ca
        ca.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, *names: str, **given: Any) -> tuple[Path, Path]:
        """A certificate and its key."""
        now = datetime.datetime.now(datetime.UTC)
        dates: dict[str, Any] = {"not_before": now - 2 * DAY, "not_after": now + DAY}
        leaf = self.authority.issue_cert(*names, **{**dates, **given})
        chain, key = self.path / f"{name}.pem", self.path / f"{name}.key"
        key.touch(mode=0o600)
        leaf.private_key_pem.write_to_path(str(key))
        leaf.cert_chain_pems[0].write_to_path(str(chain))
        return chain, key

    def server(self, **given: Any) -> TlsConfig:
        """A server's files."""
        chain, key = self.issue("server", "localhost", "127.0.0.1", **given)
        return TlsConfig(certificate=str(chain), key=str(key))

    def credentials(self, key: str | None, *names: str, **given: Any) -> Credentials:
        """A client's, with a certificate if it has names."""
        mine: dict[str, Any] = {}
        if names or given:
            chain, private = self.issue("client", *names, **given)
            mine = {"certificate": chain, "private_key": private}
        return Credentials(api_key=key, tls=True, ca=self.ca, **mine)


@pytest.fixture
def folder(tmp_path: Path, ca: trustme.CA) -> Folder:
    return Folder(tmp_path, ca)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    listed = tenants(alice={"certificates": ["dns:gateway.example", "cn:The Gateway"]})
    return write(tmp_path / "access.yaml", listed)


@contextlib.asynccontextmanager
async def https(server: Server, **given: Any) -> AsyncIterator[tuple[Any, Any, dict[str, Any]]]:
    """A connection to the page, and the certificate that it showed."""
    assert server.page is not None
    assert server.page.startswith("https://")
    port = int(server.page.rsplit(":", 1)[1].strip("/"))
    context = ssl.create_default_context(cafile=given.pop("cafile"))
    if given:
        context.load_cert_chain(given["certificate"], given["private_key"])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        yield reader, writer, writer.get_extra_info("peercert")
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


async def status(server: Server, key: str | None = None, path: str = "/", **given: Any) -> int:
    async with https(server, **given) as (reader, writer, _):
        lines = [f"GET {path} HTTP/1.1", "Host: any.example"]
        lines += [] if key is None else [f"Authorization: Bearer {key}"]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        return int((await reader.readline()).split()[1])


async def test_keys_travel_encrypted_to_a_server_that_is_who_it_says(
    folder: Folder, path: Path, fake: FakeEngine
) -> None:
    async with serving(path, fake, http=("127.0.0.1", 0), tls=folder.server()) as server:
        async with AsyncClient(server.address, folder.credentials(ALICE)) as alice:
            assert (await alice.model_info()).name == "echo"
        async with AsyncClient(server.address, folder.credentials(None)) as nobody:
            assert await nobody.is_ready()
            with pytest.raises(ServiceError, match="an API key only"):
                await nobody.model_info()
        assert await status(server, OPS, cafile=folder.ca) == 200
        assert await status(server, ALICE, cafile=folder.ca) == 403
        assert await status(server, cafile=folder.ca) == 401


async def failure(address: str, credentials: Credentials) -> str:
    """What a client says that can't connect."""
    async with AsyncClient(address, credentials) as client:
        with pytest.raises(ServiceError) as raised:
            await client.model_info()
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    return raised.value.details


async def test_a_client_says_what_is_wrong_between_it_and_a_server_that_answers(
    folder: Folder, path: Path, fake: FakeEngine
) -> None:
    named_otherwise = folder.issue("named", "gpu.example")
    other = TlsConfig(certificate=str(named_otherwise[0]), key=str(named_otherwise[1]))
    alice = folder.credentials(ALICE)
    strangers = folder.path / "strangers"
    strangers.mkdir()
    stranger = Folder(strangers, trustme.CA(key_type=trustme.KeyType.ECDSA))
    plain, public = Credentials(api_key=ALICE), Credentials(api_key=ALICE, tls=True)
    async with serving(path, fake, tls=folder.server()) as server:
        assert "no public authority has issued" in await failure(server.address, public)
        unknown = Credentials(tls=True, ca=str(stranger.ca))
        expected = f"no authority in {stranger.ca} (--ca)"
        assert expected in await failure(server.address, unknown)
        assert "may be a server that has TLS" in await failure(server.address, plain)
    async with serving(path, fake, tls=other) as server:
        assert "for other names" in await failure(server.address, alice)
    async with serving(path, fake, http=("127.0.0.1", 0)) as server:
        assert server.page is not None
        page = server.page.split("/")[2]
        assert "has no TLS; leave out --tls" in await failure(server.address, alice)
        assert "speaks HTTP/1.1, not gRPC" in await failure(page, plain)
    tls = folder.server()
    tls = TlsConfig(certificate=tls.certificate, key=tls.key, client_ca=str(folder.ca))
    async with serving(path, fake, tls=tls) as server:
        assert "may ask for a client's certificate" in await failure(server.address, alice)
        chain, key = stranger.issue("client", "gateway.example")
        mine = Credentials(tls=True, ca=folder.ca, certificate=str(chain), private_key=str(key))
        assert f"may not take the certificate {chain}" in await failure(server.address, mine)


async def test_a_client_tries_its_files_before_it_connects(folder: Folder) -> None:
    chain, key = map(str, folder.issue("mine", "a.example"))
    _, foreign = folder.issue("other", "b.example")
    junk, locked = folder.path / "junk.pem", folder.path / "locked.key"
    junk.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    locked.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"ca": "/none.pem"}, "--ca: can't read /none.pem: No such file"),
        ({"ca": key}, "--ca: .*mine.key is not PEM with BEGIN CERTIFICATE in it"),
        ({"ca": str(junk)}, "--ca: .*junk.pem holds no certificate"),
        ({"certificate": "/none.pem", "private_key": key}, "--client-cert: can't read"),
        ({"certificate": chain, "private_key": "/none.key"}, "--client-key: can't read"),
        ({"certificate": chain, "private_key": str(locked)}, "--client-key: .* is encrypted"),
        ({"certificate": chain, "private_key": str(foreign)}, "are not a certificate and its"),
    )
    for given, message in cases:
        with pytest.raises(CredentialsError, match=message):
            async with AsyncClient("127.0.0.1:1", Credentials(tls=True, **given)):
                pytest.fail("connected")


async def test_a_renewed_certificate_is_used_for_the_next_connection(
    folder: Folder, path: Path, fake: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        serving(path, fake, http=("127.0.0.1", 0), tls=folder.server()) as server,
        AsyncClient(server.address, folder.credentials(ALICE)) as alice,
    ):
        async with https(server, cafile=folder.ca) as (_, _, before):
            pass
        stream = alice.generate("forever")
        await anext(stream)
        other = Folder(folder.path, trustme.CA(key_type=trustme.KeyType.ECDSA))
        other.server(common_name="renewed")
        await until(lambda: "TLS certificate was read again" in caplog.text)
        async with AsyncClient(server.address, other.credentials(BOB)) as bob:
            await bob.model_info()
        async with https(server, cafile=other.ca) as (_, _, after):
            assert after["serialNumber"] != before["serialNumber"]
        await anext(stream)  # an open connection keeps its own
        await stream.aclose()


async def test_a_renewal_that_went_wrong_changes_nothing(
    folder: Folder, path: Path, fake: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(path, fake, tls=folder.server()) as server:
        now = datetime.datetime.now(datetime.UTC)
        folder.server(not_before=now - 2 * DAY, not_after=now - DAY)
        await until(lambda: "certificate has expired" in caplog.text)
        (folder.path / "server.pem").unlink()
        await until(lambda: "can't read" in caplog.text)
        async with AsyncClient(server.address, folder.credentials(ALICE)) as alice:
            await alice.model_info()


async def test_a_client_is_known_by_its_certificate(
    folder: Folder, path: Path, fake: FakeEngine
) -> None:
    tls = folder.server()
    tls = TlsConfig(certificate=tls.certificate, key=tls.key, client_ca=str(folder.ca))
    known = (("gateway.example",), ("other.example", "gateway.example"))
    async with serving(path, fake, http=("127.0.0.1", 0), tls=tls) as server:
        for names in known:
            async with AsyncClient(server.address, folder.credentials(None, *names)) as alice:
                await alice.tokenize("x")
        by_name = folder.credentials(None, "x.example", common_name="The Gateway")
        async with AsyncClient(server.address, by_name) as alice:
            await anext(alice.generate("forever"))
        async with AsyncClient(server.address, folder.credentials(BOB, *known[0])) as bob:
            await anext(bob.generate("forever"))  # a key decides
        assert [call.domain.tenant for call in fake.calls if call.domain] == ["alice", "bob"]
        stranger = folder.credentials(None, "stranger.example")
        async with AsyncClient(server.address, stranger) as caller:
            with pytest.raises(ServiceError, match="certificate is of no tenant") as raised:
                await caller.model_info()
            assert raised.value.code is grpc.StatusCode.UNAUTHENTICATED
        async with AsyncClient(server.address, folder.credentials("wrong", *known[0])) as caller:
            with pytest.raises(ServiceError, match="key is not valid"):
                await caller.model_info()
        chain, key = folder.issue("client", *known[0])
        given = {"cafile": folder.ca, "certificate": chain, "private_key": key}
        assert await status(server, **given) == 403  # alice, who is no operator
        assert await status(server, OPS, **given) == 200


async def test_another_authority_of_clients_holds_for_the_next_connection(
    folder: Folder, path: Path, fake: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    tls, clients = folder.server(), folder.path / "clients.pem"
    folder.authority.cert_pem.write_to_path(str(clients))
    tls = TlsConfig(certificate=tls.certificate, key=tls.key, client_ca=str(clients))
    (folder.path / "new").mkdir()
    other = Folder(folder.path / "new", trustme.CA())
    pairs = [each.issue("client", "gateway.example") for each in (folder, other)]

    async def codes(server: Server) -> list[bool]:
        """Who gets through: clients of the one authority and of the other, on gRPC and HTTP."""
        seen = []
        for chain, key in pairs:
            mine = Credentials(tls=True, ca=folder.ca, certificate=chain, private_key=key)
            async with AsyncClient(server.address, mine) as client:
                seen.append(await client.is_ready())
            try:
                await status(server, cafile=folder.ca, certificate=chain, private_key=key)
                seen.append(True)
            except (ssl.SSLError, ConnectionError, IndexError):
                seen.append(False)
        return seen

    async with serving(path, fake, http=("127.0.0.1", 0), tls=tls) as server:
        assert await codes(server) == [True, True, False, False]
        other.authority.cert_pem.write_to_path(str(clients))
        await until(lambda: "TLS certificate was read again" in caplog.text)
        assert await codes(server) == [False, False, True, True]


async def test_leakcheck_attacks_over_tls_with_keys(
    folder: Folder, path: Path, fake: FakeEngine
) -> None:
    async with serving(path, fake, tls=folder.server()) as server:
        options = Options(
            address=server.address, victim_key=ALICE, attacker_key=BOB, tls=True, ca=folder.ca
        )
        address = resolve(options.address)
        victim, attacker, notes = leakcheck_tenants(options, address)
        async with open_target(options, address) as target:
            for tenant in (victim, attacker):
                assert "echo" in await target.describe(tenant, 32)
                await target.send(target.fresh_prompt(), tenant)
    assert notes == []
    assert [call.domain.tenant for call in fake.calls if call.domain] == ["alice", "bob"]


async def test_a_client_without_a_valid_certificate_does_not_get_through(
    folder: Folder, path: Path, fake: FakeEngine
) -> None:
    tls = folder.server()
    tls = TlsConfig(certificate=tls.certificate, key=tls.key, client_ca=str(folder.ca))
    now = datetime.datetime.now(datetime.UTC)
    old = folder.path / "old"
    old.mkdir()
    expired = Folder(old, folder.authority).credentials(
        ALICE, "gateway.example", not_before=now - 2 * DAY, not_after=now - DAY
    )
    forged = folder.path / "forged"
    forged.mkdir()
    chain, key = Folder(forged, trustme.CA()).issue("client", "gateway.example")
    of_another = Credentials(
        api_key=ALICE, tls=True, ca=folder.ca, certificate=chain, private_key=key
    )
    async with serving(path, fake, http=("127.0.0.1", 0), tls=tls) as server:
        for credentials in (folder.credentials(ALICE), expired, of_another):
            async with AsyncClient(server.address, credentials) as caller:
                with pytest.raises(ServiceError) as raised:
                    await caller.model_info()
                assert raised.value.code is grpc.StatusCode.UNAVAILABLE
        with pytest.raises((ssl.SSLError, ConnectionError, IndexError)):
            await status(server, ALICE, cafile=folder.ca)
        with pytest.raises((ssl.SSLError, ConnectionError, IndexError)):
            await status(
                server,
                ALICE,
                cafile=folder.ca,
                certificate=expired.certificate,
                private_key=expired.private_key,
            )
    assert fake.calls == []


def test_what_no_client_would_take_is_refused_at_the_start(folder: Folder, ca: trustme.CA) -> None:
    good = folder.server()
    assert read_identity(good).chain.startswith(b"-----BEGIN CERTIFICATE-----")
    now = datetime.datetime.now(datetime.UTC)
    chain, _ = folder.issue("other", "localhost")
    old, old_key = folder.issue("old", "x", not_before=now - 2 * DAY, not_after=now - DAY)
    new, new_key = folder.issue("new", "x", not_before=now + DAY, not_after=now + 2 * DAY)
    junk = folder.path / "junk"
    junk.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    locked = folder.path / "locked.key"
    locked.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n")
    locked.chmod(0o600)
    empty_ca = str(chain)  # a certificate, but of no authority
    for tls, message in (
        (TlsConfig(certificate=str(chain), key=good.key), "not a certificate and its private key"),
        (TlsConfig(certificate=str(old), key=str(old_key)), "certificate has expired"),
        (TlsConfig(certificate=str(new), key=str(new_key)), "certificate is not yet valid"),
        (TlsConfig(certificate=str(junk), key=good.key), "not a certificate and its private key"),
        (TlsConfig(certificate=good.key, key=good.key), "is not PEM with BEGIN CERTIFICATE"),
        (TlsConfig(certificate="none.pem", key=good.key), "none.pem: No such file"),
        (TlsConfig(certificate=good.certificate, key="none.key"), "none.key: No such file"),
        (TlsConfig(certificate=good.certificate, key=str(locked)), "is encrypted"),
        (
            TlsConfig(certificate=good.certificate, key=good.key, client_ca=empty_ca),
            "holds no certificate of an authority",
        ),
        (
            TlsConfig(certificate=good.certificate, key=good.key, client_ca=str(junk)),
            "is unusable",
        ),
    ):
        with pytest.raises(ConfigError) as raised:
            read_identity(tls)
        assert message in str(raised.value)


def test_the_log_says_once_a_day_that_a_certificate_ends(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    for days, lines in ((10, 3), (30, 0)):
        caplog.clear()
        at = [now.timestamp()]
        tls = folder.server(not_after=now + days * DAY)
        watched = watch_identity(tls, lambda at=at: at[0])
        for hours in (0, 1, 23, 1, 23, 1, 20):
            at[0] += 3600 * hours
            watched.look()
        assert caplog.text.count("renew it") == lines


def test_a_key_that_grpc_does_not_take_is_refused(folder: Folder) -> None:
    tls = folder.server()
    private = Ed25519PrivateKey.generate()
    key = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    Path(tls.key).write_bytes(key)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    now = datetime.datetime.now(datetime.UTC)
    built = x509.CertificateBuilder(name, name, private.public_key(), 1, now - DAY, now + DAY)
    Path(tls.certificate).write_bytes(built.sign(private, None).public_bytes(Encoding.PEM))
    with pytest.raises(ConfigError, match="Ed25519 or Ed448 key, which gRPC's TLS"):
        read_identity(tls)


def test_a_key_that_others_may_read_is_refused(folder: Folder) -> None:
    tls = folder.server()
    for mode, is_taken in ((0o600, True), (0o640, True), (0o644, False), (0o660, False)):
        Path(tls.key).chmod(mode)
        with (
            contextlib.nullcontext() if is_taken else pytest.raises(ConfigError, match="chmod 600")
        ):
            read_identity(tls)


def test_a_renewed_key_is_taken_up_once_nobody_else_may_read_it(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    tls = folder.server()
    watched = watch_identity(tls)
    chain = watched.value.chain
    folder.server()
    Path(tls.key).chmod(0o644)
    watched.look()
    assert "was not taken up" in caplog.text
    assert f"chmod 600 {tls.key}" in caplog.text
    Path(tls.key).chmod(0o600)  # as it says
    watched.look()
    assert "was read again" in caplog.text
    assert watched.value.chain != chain


def test_names_have_kinds_that_can_not_be_mistaken_for_each_other() -> None:
    certificate = {
        "subject": ((("organizationName", "dns:x"),), (("commonName", "a.example"),)),
        "subjectAltName": (("DNS", "b.example"), ("URI", "spiffe://x/c"), ("IP Address", "::1")),
    }
    expected = ("dns:b.example", "uri:spiffe://x/c", "cn:a.example")
    assert names_in_certificate(certificate) == expected
    context = {
        "x509_common_name": [b"a.example"],
        "peer_dns": [b"b.example"],
        "peer_uri": [b"spiffe://x/c"],
        "x509_subject_alternative_name": [b"b.example", b"spiffe://x/c", b"::1"],
        "peer_ip": [b"::1"],
    }
    assert set(names_in_context(context)) == set(expected)
