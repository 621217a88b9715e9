"""What clients show: keys from files and the environment, never in the clear, never in print."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import pytest
import yaml

from engine.client import AsyncClient
from engine.connect_options import ConnectOptions
from engine.credentials import Credentials, CredentialsError, find_api_key
from engine.new_key import hash_of, make_key
from engine.serve.tenants import read_rules
from tests.command_line import CommandLine

KEY = make_key()


@pytest.fixture
def octavo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def test_a_key_comes_from_a_file_or_else_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OCTAVO_API_KEY", raising=False)
    assert find_api_key(None) is None
    monkeypatch.setenv("OCTAVO_API_KEY", "of-environment")
    assert find_api_key(None) == "of-environment"
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert find_api_key(file) == KEY
    assert ConnectOptions(api_key_file=file, tls=True).credentials() == Credentials(
        api_key=KEY, tls=True
    )
    with pytest.raises(CredentialsError, match="can't read the API key"):
        find_api_key(tmp_path / "none")
    file.write_bytes(b"\xff")
    with pytest.raises(CredentialsError, match="holds no API key"):
        find_api_key(file)


def test_a_key_that_can_not_be_one_is_found_by_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("qz q")
    monkeypatch.setenv("OCTAVO_API_KEY", "qz q")
    for given, place in ((file, str(file)), (None, "OCTAVO_API_KEY")):
        with pytest.raises(CredentialsError, match="visible ASCII") as raised:
            find_api_key(given)
        assert place in str(raised.value)
        assert "qz" not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("localhost", "it has a port"),
        ("", "it has a port"),
        ("localhost:99999", "it has a port"),
        ("localhost:grpc", "it has a port"),
        ("::1:50051", "it has a port"),
        ("http://127.0.0.1:50051", "leave out http://"),
        ("https://octavo.example:50051/", "leave out https://; TLS is turned on by --tls"),
    ],
)
async def test_an_address_that_grpc_would_take_for_another_is_refused(
    address: str, hint: str
) -> None:
    with pytest.raises(ValueError, match="is not host:port") as raised:
        async with AsyncClient(address):
            pytest.fail("connected")
    assert hint in str(raised.value)


@pytest.mark.parametrize("key", ["", " ", "qz q", "qz\n", "qzä", "qz\tq"])
def test_what_can_not_be_a_key_is_refused_unquoted(key: str) -> None:
    with pytest.raises(CredentialsError, match="visible ASCII") as raised:
        Credentials(api_key=key)
    assert "qz" not in str(raised.value)


def test_a_key_is_not_shown() -> None:
    assert KEY not in repr(Credentials(api_key=KEY))


@pytest.mark.parametrize(
    ("address", "is_here"),
    [
        ("127.0.0.1:50051", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("unix:/run/octavo.sock", True),
        ("10.0.0.1:50051", False),
        ("localhost.example.org:50051", False),
        ("dns:///example.org:443", False),
    ],
)
async def test_a_key_travels_to_other_machines_encrypted_or_by_permission(
    address: str, is_here: bool
) -> None:
    Credentials(api_key=KEY, tls=True).check_address(address)
    Credentials(api_key=KEY, allow_plaintext=True).check_address(address)
    Credentials().check_address(address)
    if is_here:
        Credentials(api_key=KEY).check_address(address)
        return
    with pytest.raises(CredentialsError, match="in the clear") as raised:
        async with AsyncClient(address, Credentials(api_key=KEY)):
            pytest.fail("connected")
    assert KEY not in str(raised.value)


def test_certificates_are_for_tls_and_go_with_their_keys() -> None:
    file = Path("x.pem")
    with pytest.raises(CredentialsError, match="are for TLS"):
        Credentials(ca=file)
    with pytest.raises(CredentialsError, match="go together"):
        Credentials(tls=True, certificate=file)


def test_a_new_key_is_printed_once_with_its_line_for_the_file(
    octavo: CommandLine, tmp_path: Path
) -> None:
    today = datetime.datetime.now(datetime.UTC).date()
    first = octavo("key")
    second = octavo("key", "--name", "spare", "--expires", today)
    assert first.code == second.code == 0
    keys = [first.out.strip(), second.out.strip()]
    assert keys[0] != keys[1]
    for key, ended in zip(keys, (first, second), strict=True):
        assert re.fullmatch(r"octavo_[\w-]{43}", key)
        assert key not in ended.err
    lines = [ended.err.splitlines()[-1] for ended in (first, second)]
    path = tmp_path / "access.yaml"
    path.write_text("\n".join(["tenants:", "  a:", "    keys:", *lines]))
    rules = read_rules(path)
    now = datetime.datetime.now(datetime.UTC).timestamp()
    assert [rules.tenant_of_key(key, now) for key in keys] == ["a", "a"]
    assert [key.name for key in rules.tenants["a"].keys] == [str(today), "spare"]
    assert yaml.safe_load(lines[0])[0]["hash"] == hash_of(keys[0])
    ended = octavo("key", "--expires", today - datetime.timedelta(days=1))
    assert ended.code == 2
    assert "which is over" in ended.err
    for name in ("", "a b", "ä", "a/b", "x" * 65):
        ended = octavo("key", f"--name={name}")
        assert (ended.code, ended.out) == (2, "")
        assert "--name is" in ended.err


def test_no_command_takes_a_key_where_others_can_read_it(octavo: CommandLine) -> None:
    for command in (("chat",), ("flush",), ("bench", "serve"), ("pause",), ("reload",)):
        shown = octavo(*command, "--help").out
        assert "--api-key-file" in shown
        assert "--api-key " not in shown
        assert octavo(*command, "--api-key", KEY).code != 0
