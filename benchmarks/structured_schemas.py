"""Twenty JSON schemas, each of another kind and with an end: what `structured` asks outputs for.

Strings, arrays and numbers are bounded, so that every output can be finished. Half of them leave
whitespace to the engine's default, half allow none.
"""

from __future__ import annotations

from typing import Any

COMPACT = {"x-guidance": {"whitespace_flexible": False}}


def _object(**properties: Any) -> dict[str, Any]:
    """All properties required, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _text(most: int, least: int = 1) -> dict[str, Any]:
    return {"type": "string", "minLength": least, "maxLength": most}


def _word(most: int = 12) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^[A-Za-z]{{1,{most}}}$"}


def _integer(least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


def _list(items: Any, most: int, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


FLAG = {"type": "boolean"}
DATE = {"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])$"}

SCHEMAS: dict[str, dict[str, Any]] = {
    "a person": _object(name=_text(20), age=_integer(0, 120), is_member=FLAG),
    "a city": _object(city=_word(), country=_word(), population=_integer(1, 40_000_000)) | COMPACT,
    "a list of colours": _list(
        {"enum": ["red", "green", "blue", "yellow", "black", "white"]}, 6, 1
    ),
    "a book": _object(title=_text(30), author=_text(20), year=_integer(1500, 2026)) | COMPACT,
    "a weather report": _object(
        sky={"enum": ["clear", "cloudy", "rain", "snow"]},
        celsius=_integer(-40, 50),
        wind=_object(direction={"enum": ["N", "E", "S", "W"]}, knots=_integer(0, 99)),
    ),
    "a recipe": _object(
        dish=_text(20), minutes=_integer(1, 240), ingredients=_list(_text(15), 5, 1)
    )
    | COMPACT,
    "a calendar entry": _object(title=_text(20), date=DATE, hours=_integer(1, 8)),
    "an address": _object(
        street=_text(20),
        number=_integer(1, 999),
        postcode={"type": "string", "pattern": r"^\d{5}$"},
    )
    | COMPACT,
    "a yes or no": _object(answer={"enum": ["yes", "no"]}, because=_text(40)),
    "a contact": _object(
        name=_word(),
        mail={"type": "string", "pattern": r"^[a-z]{1,10}@[a-z]{1,10}\.(com|org)$"},
    )
    | COMPACT,
    "a pair of numbers": {
        "type": "array",
        "prefixItems": [_integer(0, 9), _integer(10, 99)],
        "items": False,
        "minItems": 2,
        "maxItems": 2,
    },
    "a tree": {
        "$defs": {
            "leaf": _object(value=_integer(0, 99)),
            "node": _object(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"}),
        },
        "anyOf": [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/leaf"}],
    }
    | COMPACT,
    "a tool call": _object(
        tool={"const": "search"}, arguments=_object(query=_text(30), limit=_integer(1, 10))
    ),
    "a shape": {
        "anyOf": [
            _object(kind={"const": "circle"}, radius=_integer(1, 100)),
            _object(kind={"const": "square"}, side=_integer(1, 100)),
        ]
    }
    | COMPACT,
    "a version": _object(
        version={"type": "string", "pattern": r"^[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{1,2}$"},
        is_stable=FLAG,
    ),
    "a matrix": _list(_list(_integer(-9, 9), 3, 3), 3, 3) | COMPACT,
    "a film review": _object(
        film=_text(20), stars=_integer(1, 5), tags=_list(_word(8), 3), seen=FLAG
    ),
    "an invoice": _object(
        number={"type": "string", "pattern": "^INV-[0-9]{4}$"},
        lines=_list(_object(item=_word(), cents=_integer(1, 99_999)), 3, 1),
    )
    | COMPACT,
    "a nothing or a name": {"type": ["string", "null"], "maxLength": 20},
    "a person with optional fields": {
        "type": "object",
        "properties": {"name": _word(), "nick": _word(), "born": DATE},
        "required": ["name"],
        "additionalProperties": False,
    }
    | COMPACT,
}
