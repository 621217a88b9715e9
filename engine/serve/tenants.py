"""The access file: which tenants there are, by which keys and certificates they are known, and
what each may do. It holds no secret: keys stand in it as their SHA-256.

```yaml
tenants:
  clinic:
    keys:
      - {name: "2026-11", hash: "sha256:…", expires: 2027-05-31}   # `octavo key` prints the line
    certificates: ["dns:gateway.clinic.example"]
    requests_per_minute: 600
    tokens_per_minute: 200000
    max_concurrent: 32
    best_priority: 0
  ops:
    keys: [{name: "ops", hash: "sha256:…"}]
    operator: true
```
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from engine.config_error import ConfigError
from engine.serve.files import refuse_open_to_others
from engine.serve.rates import Rate

MAX_KEY_CHARS = 512
"""Longer ones are refused unread: `octavo key` makes keys of 50 characters."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_CERTIFICATE_NAME = re.compile(r"(dns|uri|cn):[^\x00-\x20\x7f]+(?: [^\x00-\x20\x7f]+)*")
_MAX_INT32 = 2**31 - 1


class KeyRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An API key.

    Attributes:
      name: for the operator, to know which to remove.
      hash: `sha256:` and 64 hexadecimal digits.
      expires: the last day, in UTC, on which it is valid; None: it stays valid.
    """

    name: str
    hash: str
    expires: datetime.date | None = None


class TenantRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is known of a tenant.

    Attributes:
      keys: its API keys; several, so that a new one can be in use before the old one goes.
      certificates: names that certificates of its clients have: `dns:` or `uri:` and a subject
        alternative name, or `cn:` and a common name.
      requests_per_minute, tokens_per_minute, max_concurrent: see `Rate`.
      best_priority: the lowest number that its requests may have as priority; lower runs first.
      operator: whether it may do what concerns all tenants.
    """

    keys: tuple[KeyRule, ...] = ()
    certificates: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    best_priority: int | None = None
    operator: bool = False

    @property
    def rate(self) -> Rate:
        """Its limits."""
        return Rate(self.requests_per_minute, self.tokens_per_minute, self.max_concurrent)


class _Entry(NamedTuple):
    tenant: str
    ends: float  # seconds since 1970


class Rules:
    """Who is who.

    Args:
      tenants: by name.

    Raises:
      ConfigError: a value can't be, or a key or certificate would be of two tenants.
    """

    def __init__(self, tenants: Mapping[str, TenantRules]):
        self.tenants = dict(tenants)
        self._keys: dict[bytes, _Entry] = {}
        self._certificates: dict[str, str] = {}
        for name, tenant in self.tenants.items():
            _check(name, tenant)
            for key in tenant.keys:
                self._add_key(name, key)
            for certificate in map(canonical, tenant.certificates):
                if other := self._certificates.get(certificate):
                    raise ConfigError(f"{certificate} is of both {other} and {name}; leave one out")
                self._certificates[certificate] = name

    def tenant_of_key(self, key: str, now: float) -> str | None:
        """Whose key this is, at `now`, in seconds since 1970; None if it is nobody's.

        It costs one SHA-256 of at most `MAX_KEY_CHARS` characters. Which keys there are can't be
        found by timing: what is looked up is a digest, of which nobody can choose a part.
        """
        if len(key) > MAX_KEY_CHARS:
            return None
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        entry = self._keys.get(digest)
        if entry is None or now >= entry.ends:
            return None
        return entry.tenant

    def tenant_of_certificate(self, names: Iterable[str]) -> str | None:
        """Whose client a certificate with these names is; None if of nobody, or of two."""
        known = self._certificates
        found = {known[name] for name in map(canonical, names) if name in known}
        return found.pop() if len(found) == 1 else None

    def expired_keys(self, now: float) -> list[str]:
        """Keys that are not valid any more, as `tenant/key`."""
        digests = {digest for digest, entry in self._keys.items() if now >= entry.ends}
        return [
            f"{name}/{key.name}"
            for name, tenant in self.tenants.items()
            for key in tenant.keys
            if _digest(key) in digests
        ]

    def _add_key(self, tenant: str, key: KeyRule) -> None:
        digest = _digest(key)
        if digest is None:
            raise ConfigError(
                f"tenants.{tenant}.keys: the hash of {key.name!r:.80} must be sha256: and 64 "
                "hexadecimal digits in lower case; `octavo key` makes one"
            )
        if other := self._keys.get(digest):
            raise ConfigError(
                f"tenants.{tenant}.keys: the hash of {key.name!r:.80} is also a key's of "
                f"{other.tenant}; each key is of one tenant, and there once"
            )
        self._keys[digest] = _Entry(tenant, _end(key))


def canonical(name: str) -> str:
    """A certificate's name as it is compared: DNS names have no case."""
    return name.lower() if name.startswith("dns:") else name


def read_rules(path: Path) -> Rules:
    """Read an access file.

    Raises:
      ConfigError: it can't be read, anybody may write to it, or what it says can't be.
    """
    refuse_open_to_others(path, "the access file", stat.S_IWOTH, f"do: chmod o-w {path}")
    try:
        tree = yaml.load(path.read_bytes(), Loader=_UniqueKeys)
    except OSError as error:
        raise ConfigError(f"can't read the access file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())  # YAML's own are drawn over several lines
        raise ConfigError(f"{path} is not valid YAML: {reason}") from None
    try:
        return _rules(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _rules(tree: Any) -> Rules:
    if not isinstance(tree, dict) or tree.keys() != {"tenants"}:
        raise ConfigError("it must hold `tenants:` and nothing else beside it")
    listed = tree["tenants"]
    if not isinstance(listed, dict) or not listed:
        raise ConfigError("tenants must be a mapping with a name for each tenant, at least one")
    tenants = {}
    for name, fields in listed.items():
        try:
            tenants[name] = msgspec.convert(
                {} if fields is None else fields, TenantRules, builtin_types=(datetime.date,)
            )
        except msgspec.ValidationError as error:
            raise ConfigError(f"tenants.{name!s:.80}: {error}{_hint(str(error))}") from None
    return Rules(tenants)


def _hint(message: str) -> str:
    """What to add to msgspec's complaint."""
    if "`date" in message:
        return "; a day is written YYYY-MM-DD, without quotes"
    unknown = re.search("unknown field `(.*)`", message)
    known = (*TenantRules.__struct_fields__, *KeyRule.__struct_fields__)
    near = difflib.get_close_matches(unknown[1], known, n=1) if unknown else ()
    return f"; did you mean {near[0]}?" if near else ""


def _check(name: str, tenant: TenantRules) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r:.80} can't be a tenant's name; use 1 to 64 letters, digits, dots, dashes and "
            "underscores (and quotes around a number)"
        )
    for field in ("requests_per_minute", "tokens_per_minute", "max_concurrent"):
        value = getattr(tenant, field)
        if value is not None and not 1 <= value <= 10**12:
            raise ConfigError(
                f"tenants.{name}.{field} is {value}; it must be from 1 to 10^12, or be left out"
            )
    priority = tenant.best_priority
    if priority is not None and not -_MAX_INT32 - 1 <= priority <= _MAX_INT32:
        raise ConfigError(f"tenants.{name}.best_priority is {priority}, which is not an int32")
    names = [key.name for key in tenant.keys]
    for key in names:
        if not _NAME.fullmatch(key) or names.count(key) > 1:
            raise ConfigError(
                f"tenants.{name}.keys: {key!r:.80} can't be a key's name; use 1 to 64 letters, "
                "digits, dots, dashes and underscores, and each name once"
            )
    for certificate in tenant.certificates:
        if not _CERTIFICATE_NAME.fullmatch(certificate):
            raise ConfigError(
                f"tenants.{name}.certificates: {certificate!r:.80} must begin with dns:, uri: or "
                "cn:, which says what of a certificate it is compared with"
            )


def _digest(key: KeyRule) -> bytes | None:
    match = _HASH.fullmatch(key.hash)
    return bytes.fromhex(match[1]) if match else None


def _end(key: KeyRule) -> float:
    """The end of a key's last day, in seconds since 1970."""
    if key.expires is None or key.expires == datetime.date.max:
        return float("inf")
    after = key.expires + datetime.timedelta(days=1)
    return datetime.datetime.combine(after, datetime.time(), datetime.UTC).timestamp()


class _UniqueKeys(yaml.CSafeLoader):
    """YAML in which nothing is said twice: of two tenants of one name, the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r:.80} is there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)
