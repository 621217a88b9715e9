"""Reads a config: a YAML file and `key=value` overrides into the frozen values of `config`.

Unknown keys are errors, and sizes such as ``16GiB`` and ``32K`` are read.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from engine.config import Config, ConfigError


class _SizeError(ConfigError):
    """A text that is no number or size; the caller knows which key it belongs to."""


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a config file.

    Args:
      path: a YAML file.
      overrides: `dotted.key=value` strings that replace what the file says.

    Raises:
      ConfigError: the file is missing, is not YAML, has an unknown key or a wrong value.
    """
    path = Path(path)
    try:
        tree = msgspec.yaml.decode(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}; see configs/ for examples") from None
    except OSError as error:
        raise ConfigError(f"can't read config file {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping with the keys of a config")
    for override in overrides:
        _override(tree, override)
    return from_tree(tree, path=str(path))


def from_tree(tree: dict[str, Any], path: str = "") -> Config:
    """Build a config from nested mappings, as YAML gives them. Raises ConfigError."""
    try:
        config = msgspec.convert(_prepared(tree, Config, ""), Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path or 'config'}: {_as_dotted(str(error))}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None
    return dataclasses.replace(config, path=path)


_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([KMGT]i?B?|B?)")
_POWER = {"K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str | int) -> int:
    """`16GiB`, `32K` or `1500MB` as a number. `K` and `KiB` are 1024, `KB` is 1000."""
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if not match:
        raise _SizeError(f"{text!r:.80} is not a number; write it like 4096, 512MiB or 32K")
    number, unit = match.groups()
    base = 1000 if len(unit) == 2 and unit[1] == "B" else 1024
    size = Fraction(number) * base ** _POWER.get(unit[:1], 0)
    if size.denominator != 1:
        raise _SizeError(f"{text!r:.80} is not a whole number of units")
    return int(size)


def _prepared(tree: dict[str, Any], cls: type, prefix: str) -> dict[str, Any]:
    """The mapping with sizes read where a number belongs; names unknown keys and choices."""
    kinds = {name: kind for name, kind in get_type_hints(cls).items() if name != "path"}
    prepared = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in kinds:
            raise _unknown(str(key), kinds, prefix)
        alternatives = get_args(kinds[key]) or (kinds[key],)
        section = _section(kinds[key])
        choices = _choices(kinds[key])
        try:
            if section is not None and isinstance(value, dict):
                value = _prepared(value, section, f"{name}.")
            elif choices and value is not None and value not in choices:
                raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
            elif int in alternatives and isinstance(value, str):
                value = parse_size(value)
            elif int in alternatives and isinstance(value, list):
                value = [parse_size(item) if isinstance(item, str) else item for item in value]
        except _SizeError as error:
            raise ConfigError(f"{name}: {error}") from None
        prepared[key] = value
    return prepared


def _unknown(key: str, known: Iterable[str], prefix: str) -> ConfigError:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
    return ConfigError(f"unknown key {prefix}{key}; {hint}")


def _section(kind: Any) -> type | None:
    """The config class among a field's types, if there is one."""
    kinds = get_args(kind) or (kind,)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)  # type: ignore


def _choices(kind: Any) -> tuple[str, ...]:
    """The values that a field of a Literal type can have; empty for other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(text for part in get_args(kind) for text in _choices(part))


def _override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set takes key=value, such as model.dtype=float32, not {override!r}")
    *parents, leaf = key.split(".")
    section: type | None = Config
    prefix = ""

    def kind_of(name: str) -> Any:
        kinds = get_type_hints(section) if section else {}
        if section and (name == "path" or name not in kinds):  # no fault of the file's
            known = [kind for kind in kinds if kind != "path"]
            raise ConfigError(f"--set {override}: {_unknown(name, known, prefix)}")
        return kinds.get(name)

    for parent in parents:
        section, prefix = _section(kind_of(parent)), f"{prefix}{parent}."
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a section")
        tree = child
    if kind_of(leaf) is str:
        tree[leaf] = text  # also where YAML would read a number, or nothing
        return
    try:
        tree[leaf] = msgspec.yaml.decode(text.encode())
    except msgspec.DecodeError:
        tree[leaf] = text


def _as_dotted(message: str) -> str:
    """msgspec's ``… - at `$.model.dtype` `` as ``model.dtype: …``."""
    text, _, where = message.partition(" - at `$.")
    return f"{where.rstrip('`')}: {text}" if where else message
