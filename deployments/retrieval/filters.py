"""OpenAI's filters on attributes, as predicates that LanceDB works off itself. Pure.

Attributes are stored as one JSON value whose keys carry the type (`s:` string, `f:` number, `b:` boolean): a key may
hold numbers in one file and text in another, and a comparison sees only values of its own type, as it should.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from deployments.errors import BadRequest
from deployments.retrieval.records import (
    MAX_ATTRIBUTE_KEY_CHARS,
    MAX_ATTRIBUTE_VALUE_CHARS,
    MAX_ATTRIBUTES,
    Attribute,
    Attributes,
)

MAX_DEPTH: Final = 8
MAX_COMPARISONS: Final = 100
MAX_LIST_VALUES: Final = 100

_COMPARISONS: Final = {"eq": "=", "ne": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_GETTERS: Final = {"s": "json_get_string", "f": "json_get_float", "b": "json_get_bool"}


def predicate(filters: Any) -> str | None:
    """Return the SQL predicate of OpenAI's filters over a table's `attributes`, or None without filters.

    A file that lacks the key does not match, except for `ne` and `nin`.

    Raises:
        BadRequest: Names the place in `filters` that is wrong.
    """
    return None if filters is None else _Compiler().compile(filters, "filters", 1)


class _Compiler:
    def __init__(self) -> None:
        self._comparisons = 0

    def compile(self, node: Any, where: str, depth: int) -> str:
        if not isinstance(node, Mapping):
            raise _bad(where, "must be an object with a `type`")
        if depth > MAX_DEPTH:
            raise _bad(where, f"is nested deeper than {MAX_DEPTH}")
        kind = node.get("type")
        if kind in ("and", "or"):
            _only(node, {"type", "filters"}, where)
            parts = node.get("filters")
            if not isinstance(parts, Sequence) or isinstance(parts, str | bytes) or not parts:
                raise _bad(f"{where}.filters", "must be a list of at least one filter")
            inner = [self.compile(part, f"{where}.filters[{i}]", depth + 1) for i, part in enumerate(parts)]
            return "(" + f" {kind.upper()} ".join(inner) + ")"
        if kind not in (*_COMPARISONS, "in", "nin"):
            raise _bad(f"{where}.type", f"must be one of {', '.join([*_COMPARISONS, 'in', 'nin', 'and', 'or'])}")
        _only(node, {"type", "key", "value"}, where)
        self._comparisons += 1
        if self._comparisons > MAX_COMPARISONS:
            raise _bad("filters", f"has more than {MAX_COMPARISONS} comparisons")
        key = node.get("key")
        if not isinstance(key, str) or not 0 < len(key) <= MAX_ATTRIBUTE_KEY_CHARS:
            raise _bad(f"{where}.key", f"must be a string of 1 to {MAX_ATTRIBUTE_KEY_CHARS} characters")
        if "value" not in node:
            raise _bad(f"{where}.value", "is missing")
        value = node["value"]
        return self._list(kind, key, value, where) if kind in ("in", "nin") else self._one(kind, key, value, where)

    def _one(self, kind: str, key: str, value: Any, where: str) -> str:
        letter, literal = _literal(value, f"{where}.value")
        if letter == "b" and kind not in ("eq", "ne"):
            raise _bad(f"{where}.value", f"cannot be a boolean with `{kind}`")
        column = _column(letter, key)
        comparison = f"{column} {_COMPARISONS[kind]} {literal}"
        return f"({column} IS NULL OR {comparison})" if kind == "ne" else f"({comparison})"

    def _list(self, kind: str, key: str, values: Any, where: str) -> str:
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise _bad(f"{where}.value", f"must be a list with `{kind}`")
        if not 0 < len(values) <= MAX_LIST_VALUES:
            raise _bad(f"{where}.value", f"must have 1 to {MAX_LIST_VALUES} values")
        by_letter: dict[str, list[str]] = {}
        for i, value in enumerate(values):
            letter, literal = _literal(value, f"{where}.value[{i}]")
            by_letter.setdefault(letter, []).append(literal)
        parts = []
        for letter, literals in by_letter.items():
            column, listed = _column(letter, key), ", ".join(literals)
            if kind == "in":
                parts.append(f"{column} IN ({listed})")
            else:
                parts.append(f"({column} IS NULL OR {column} NOT IN ({listed}))")
        return "(" + (" OR " if kind == "in" else " AND ").join(parts) + ")"


def quoted(text: str) -> str:
    """Return `text` as an SQL string literal: in DataFusion a quote is the only character with a meaning in one."""
    return "'" + text.replace("'", "''") + "'"


def encoded(attributes: Attributes) -> str:
    """Return the attributes as the JSON in which they are stored and filtered."""
    typed = {f"{_letter(value)}:{key}": value for key, value in attributes.items()}
    return json.dumps(typed, ensure_ascii=False)


def decoded(stored: str | None) -> dict[str, Attribute]:
    """Return the attributes that `encoded` stored."""
    typed: dict[str, Attribute] = json.loads(stored) if stored else {}
    return {key[2:]: float(value) if key[0] == "f" else value for key, value in typed.items()}


def checked_attributes(attributes: Any) -> dict[str, Attribute]:
    """Return a file's attributes, or {} for None.

    Raises:
        BadRequest: More, longer or other than OpenAI allows.
    """
    if attributes is None:
        return {}
    if not isinstance(attributes, Mapping):
        raise BadRequest("`attributes` must be an object.", param="attributes")
    if len(attributes) > MAX_ATTRIBUTES:
        raise BadRequest(f"`attributes` has more than {MAX_ATTRIBUTES} keys.", param="attributes")
    checked: dict[str, Attribute] = {}
    for key, value in attributes.items():
        if not isinstance(key, str) or not 0 < len(key) <= MAX_ATTRIBUTE_KEY_CHARS:
            raise BadRequest(
                f"Each key of `attributes` must have 1 to {MAX_ATTRIBUTE_KEY_CHARS} characters.", param="attributes"
            )
        if not _is_attribute(value):
            raise BadRequest(
                f"Each value of `attributes` must be a boolean, a finite number or a string of at most "
                f"{MAX_ATTRIBUTE_VALUE_CHARS} characters.",
                param="attributes",
            )
        checked[key] = value if isinstance(value, str | bool) else float(value)
    return checked


def _is_attribute(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_ATTRIBUTE_VALUE_CHARS and _is_text(value)
    return isinstance(value, bool) or _is_number(value)


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_text(value: str) -> bool:
    """Whether it is Unicode that can be stored: JSON may carry half of a surrogate pair."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


def _letter(value: Attribute) -> str:
    if isinstance(value, bool):
        return "b"
    return "s" if isinstance(value, str) else "f"


def _literal(value: Any, where: str) -> tuple[str, str]:
    if not _is_attribute(value):
        raise _bad(
            where,
            f"must be a boolean, a finite number or a string of at most {MAX_ATTRIBUTE_VALUE_CHARS} characters",
        )
    if isinstance(value, bool):
        return "b", str(value).lower()
    return ("s", quoted(value)) if isinstance(value, str) else ("f", f"CAST('{float(value)!r}' AS DOUBLE)")


def _column(letter: str, key: str) -> str:
    return f"{_GETTERS[letter]}(attributes, {quoted(f'{letter}:{key}')})"


def _only(node: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(map(str, set(node) - known)):
        raise _bad(f"{where}.{unknown[0]}", "is not known")


def _bad(where: str, problem: str) -> BadRequest:
    return BadRequest(f"`{where[:200]}` {problem}.", param="filters")
