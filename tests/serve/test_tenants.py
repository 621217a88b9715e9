"""The access file: what it may say, whom it lets in, and that what is wrong with it is told."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from engine.config_error import ConfigError
from engine.new_key import hash_of, make_key
from engine.serve import tenants
from engine.serve.tenants import MAX_KEY_CHARS, read_rules
from tests.serve.access_file import ALICE, BOB, OPS, entry, write
from tests.serve.access_file import tenants as usual

NOON = datetime.datetime(2026, 11, 23, 12, tzinfo=datetime.UTC).timestamp()
DAY = 24 * 3600


def test_a_key_is_its_tenants_and_no_other_is_anybodys(tmp_path: Path) -> None:
    rules = read_rules(write(tmp_path / "access.yaml", usual()))
    assert [rules.tenant_of_key(key, NOON) for key in (ALICE, BOB, OPS)] == ["alice", "bob", "ops"]
    for wrong in ("", "x", ALICE[:-1], ALICE + "x", ALICE.upper(), hash_of(ALICE), "\ud800"):
        assert rules.tenant_of_key(wrong, NOON) is None


def test_a_key_is_valid_to_the_end_of_its_last_day(tmp_path: Path) -> None:
    listed = usual(alice={"keys": [entry(ALICE, expires=datetime.date(2026, 11, 23))]})
    rules = read_rules(write(tmp_path / "access.yaml", listed))
    midnight = NOON + DAY / 2
    assert rules.tenant_of_key(ALICE, midnight - 1) == "alice"
    assert rules.tenant_of_key(ALICE, midnight) is None
    assert rules.expired_keys(midnight) == ["alice/first"]
    assert rules.expired_keys(midnight - 1) == []


def test_two_keys_are_valid_while_one_replaces_the_other(tmp_path: Path) -> None:
    new = make_key()
    listed = usual(alice={"keys": [entry(ALICE, "old"), entry(new, "new")]})
    rules = read_rules(write(tmp_path / "access.yaml", listed))
    assert rules.tenant_of_key(ALICE, NOON) == rules.tenant_of_key(new, NOON) == "alice"


def test_a_certificate_is_known_by_a_name_of_its_kind(tmp_path: Path) -> None:
    listed = usual(
        alice={"certificates": ["dns:A.example", "uri:spiffe://x/a"]},
        bob={"certificates": ["cn:a.example"]},
    )
    rules = read_rules(write(tmp_path / "access.yaml", listed))
    assert rules.tenant_of_certificate(["cn:other", "dns:a.EXAMPLE"]) == "alice"
    assert rules.tenant_of_certificate(["uri:spiffe://x/a", "dns:a.example"]) == "alice"
    assert rules.tenant_of_certificate(["cn:a.example"]) == "bob"
    assert rules.tenant_of_certificate(["dns:b.example", "uri:a.example"]) is None
    assert rules.tenant_of_certificate(["uri:spiffe://x/A"]) is None  # only DNS has no case
    assert rules.tenant_of_certificate(["cn:A.example"]) is None
    assert rules.tenant_of_certificate(["cn:a.example", "dns:a.example"]) is None  # of two


def test_a_key_too_long_to_be_one_is_not_even_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = read_rules(write(tmp_path / "access.yaml", usual()))
    hashed = []
    sha256 = tenants.hashlib.sha256
    monkeypatch.setattr(tenants.hashlib, "sha256", lambda data: hashed.append(data) or sha256(data))
    assert rules.tenant_of_key("x" * (MAX_KEY_CHARS + 1), NOON) is None
    assert hashed == []
    assert rules.tenant_of_key("x" * MAX_KEY_CHARS, NOON) is None
    assert len(hashed) == 1


def test_a_tenant_may_be_written_in_full(tmp_path: Path) -> None:
    path = tmp_path / "access.yaml"
    path.write_text(
        f"""
tenants:
  clinic:
    keys:
      - {{name: "2026-11", hash: "{hash_of(ALICE)}", expires: 2027-05-31}}
    certificates: ["dns:gateway.clinic.example"]
    requests_per_minute: 600
    tokens_per_minute: 200000
    max_concurrent: 32
    best_priority: 0
  guest:
"""
    )
    rules = read_rules(path)
    assert rules.tenant_of_key(ALICE, NOON) == "clinic"
    assert tuple(rules.tenants["clinic"].rate) == (600, 200000, 32)
    assert not rules.tenants["guest"].operator


HASH = hash_of(ALICE)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({}, "at least one"),
        ({"a/b": {}}, "'a/b' can't be a tenant's name"),
        ({"": {}}, "can't be a tenant's name"),
        ({"x" * 65: {}}, "can't be a tenant's name"),
        ({"a": {"key": []}}, "tenants.a: Object contains unknown field `key`"),
        ({"a": {"keys": [{"name": "k", "hash": HASH, "rate": 1}]}}, "unknown field `rate`"),
        ({"a": {"opertor": True}}, "unknown field `opertor`; did you mean operator?"),
        ({"a": {"keys": [entry(ALICE) | {"expires": "soon"}]}}, "written YYYY-MM-DD, without"),
        ({"a": {"keys": [{"name": "k"}]}}, "missing required field `hash`"),
        ({"a": {"keys": [{"name": "k", "hash": HASH.upper()}]}}, "64 hexadecimal digits"),
        ({"a": {"keys": [{"name": "k", "hash": ALICE}]}}, "64 hexadecimal digits"),
        ({"a": {"keys": [{"name": "k/", "hash": HASH}]}}, "can't be a key's name"),
        ({"a": {"keys": [entry(ALICE), entry(BOB)]}}, "each name once"),
        ({"a": {"keys": [entry(ALICE)]}, "b": {"keys": [entry(ALICE)]}}, "also a key's of a"),
        ({"a": {"certificates": ["x.example"]}}, "must begin with dns:, uri: or cn:"),
        ({"a": {"certificates": ["dns:x"]}, "b": {"certificates": ["dns:X"]}}, "both a and b"),
        ({"a": {"requests_per_minute": 0}}, "requests_per_minute is 0"),
        ({"a": {"tokens_per_minute": -5}}, "tokens_per_minute is -5"),
        ({"a": {"max_concurrent": "many"}}, "Expected `int | null`, got `str`"),
        ({"a": {"best_priority": 2**31}}, "not an int32"),
    ],
)
def test_what_can_not_be_is_refused(tmp_path: Path, listed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_rules(write(tmp_path / "access.yaml", listed))
    assert message in str(raised.value)
    assert ALICE not in str(raised.value)  # also where it stood in its hash's place


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenants: [", "is not valid YAML"),
        ("", "must hold `tenants:`"),
        ("tenants: {a: }\nkeys: []", "must hold `tenants:` and nothing else"),
        ("tenants: {a: {}, b: {}, a: {}}", "'a' is there twice"),
        ("tenants: {1: {}}", "1 can't be a tenant's name"),
        ("tenants: {a: [1]}", "tenants.a: Expected `object`"),
    ],
)
def test_what_is_no_access_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "access.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_rules(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_file_that_is_missing_or_anybody_may_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_rules(tmp_path / "none.yaml")
    path = write(tmp_path / "access.yaml", usual())
    path.chmod(0o666)
    with pytest.raises(ConfigError, match=r"has mode 0666.*chmod o-w"):
        read_rules(path)
    path.chmod(0o664)
    assert read_rules(path).tenants.keys() == {"alice", "bob", "ops"}
