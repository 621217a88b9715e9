"""The server's section of a config: access and TLS, where their files are, what excludes what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError, resolve_server
from engine.config_file import from_tree, load
from engine.serve import access
from engine.serve.run import run_server
from engine.server_config import ServerConfig, TlsConfig
from tests.serve.access_file import tenants, write

TLS = {"certificate": "server.pem", "key": "/etc/octavo/server.key"}


def _tree(**server: Any) -> dict[str, Any]:
    return {"model": {"source": "m.gguf"}, "cache": {"num_blocks": 8}, "server": server}


def test_the_files_of_access_and_tls_are_beside_the_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("{model: {source: m.gguf}, cache: {num_blocks: 8}}")
    config = load(
        path,
        [
            "server.access=access.yaml",
            "server.tls.certificate=tls/server.pem",
            "server.tls.key=/etc/octavo/server.key",
        ],
    )
    server = resolve_server(config)
    assert server.access == str(tmp_path / "access.yaml")
    assert server.tls == TlsConfig(
        certificate=str(tmp_path / "tls" / "server.pem"), key="/etc/octavo/server.key"
    )
    assert resolve_server(from_tree(_tree())) == ServerConfig()


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"access": "a", "allow_anonymous": True}, "server.allow_anonymous lets anybody in"),
        ({"tls": TLS, "allow_plaintext": True}, "is for a server without server.tls"),
        ({"tls": {**TLS, "client_ca": "ca.pem"}}, "server.tls.client_ca asks clients who they are"),
        ({"tls": {"certificate": "c"}}, "server.tls: Object missing required field `key`"),
        ({"tls": {**TLS, "keys": "k"}}, "unknown key server.tls.keys; did you mean server.tls.key"),
        ({"access": ["a"]}, "server.access: Expected `str`"),
    ],
)
def test_what_does_not_go_together_is_refused(server: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        from_tree(_tree(**server))
    assert message in str(raised.value)


def test_times_to_live_are_those_of_tenants_in_the_access_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = _tree(access=str(write(tmp_path / "access.yaml", tenants())))
    tree["cache"]["tenant_time_to_live"] = {"alice": 5, "clinic": 60}
    with pytest.raises(ConfigError, match=r"names 'clinic', but .*access\.yaml names no such"):
        run_server(from_tree(tree))
    tree["cache"]["tenant_time_to_live"] = {"default": 5}
    with pytest.raises(ConfigError, match="names 'default', but"):
        run_server(from_tree(tree))
    reads: list[Path] = []
    read = access.read_rules
    monkeypatch.setattr(access, "read_rules", lambda path: (reads.append(path), read(path))[1])
    tree["cache"]["tenant_time_to_live"] = {"alice": 5, "bob": 60}
    with pytest.raises(Exception, match=r"m\.gguf"):  # so far it got
        run_server(from_tree(tree | {"server": tree["server"] | {"port": 0}}))
    assert len(reads) == 1  # what was checked is what is used


def test_a_tenant_with_a_time_to_live_may_go_while_the_server_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "access.yaml", tenants())
    rules = access.watch_rules(path, {"alice", "bob"})
    assert not caplog.text
    write(path, {name: of for name, of in tenants().items() if name != "bob"})
    rules.look()
    assert "bob" not in rules.value.tenants  # its keys must not stay good
    assert f"cache.tenant_time_to_live names bob, and {path} doesn't" in caplog.text
