"""Whether a tool call is one of the expected ones: names, types and values of arguments. Pure; used by `bfcl_simple`.

An expected call is `{"name", "also", "parameters", "arguments"}`: the function, other spellings of its name to accept,
its parameter schema in the benchmark's type names, and for every parameter the list of values it may have, in which ""
says that it may be left out. Inside an object the values of each key are such a list again; inside an array they are
not.

The rules are those of the Berkeley Function-Calling Leaderboard: every required parameter is there, no unknown one is,
the type is the declared one (a whole number will do for a float; no number is a boolean), and the value is a possible
one, where texts are compared without case, blanks and the punctuation ,./-_*^ and with ' equal to ". Where the possible
values are of another type than the declared one, they are compared as they stand. One rule is wider than there: a whole
number will also do for a float inside arrays and objects.
"""

from __future__ import annotations

import re

from evals.task import Call, Json

_IGNORED = re.compile(r"[ ,./\-_*^]")
_NUMBER_TYPES = {"integer": (int,), "float": (int, float)}


def mismatch(call: Call, expected: dict[str, Json]) -> str | None:
    """Why the call is not an expected one, or None if it is."""
    names = [expected["name"], *_as_list(expected["also"])]
    if call.name not in names:
        return f"called {call.name!r}, expected {expected['name']!r}"
    given = call.arguments or {}
    schema, possible = _as_dict(expected["parameters"]), _as_dict(expected["arguments"])
    properties = _as_dict(schema.get("properties"))
    for name in _as_list(schema.get("required")):
        if name not in given:
            return f"the required parameter {name!r} is missing"
    for name, value in given.items():
        if name not in properties or name not in possible:
            return f"unexpected parameter {name!r}"
        if not _is_possible(value, _as_list(possible[name]), _as_dict(properties[name])):
            return f"parameter {name!r} is {value!r}, expected one of {possible[name]!r}"
    for name, values in possible.items():
        if name not in given and "" not in _as_list(values):
            return f"the parameter {name!r} is missing, expected one of {values!r}"
    return None


def normalise(text: str) -> str:
    """The text without what the comparison ignores."""
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _is_possible(value: Json, possible: list[Json], schema: dict[str, Json]) -> bool:
    # The "" that marks a value as optional is itself a value only where texts are.
    is_text = schema.get("type", "string") in ("string", "any")
    return any(_equals(value, candidate, schema) for candidate in possible if is_text or candidate != "")


def _equals(value: Json, expected: Json, schema: dict[str, Json]) -> bool:
    """Whether one value is the expected one; types compare exactly but for whole numbers given for a float."""
    if isinstance(expected, dict):
        return isinstance(value, dict) and _same_object(value, expected, _as_dict(schema.get("properties")))
    if isinstance(expected, list):
        items = _as_dict(schema.get("items"))
        return (
            isinstance(value, list)
            and len(value) == len(expected)
            and all(_equals(one, other, items) for one, other in zip(value, expected, strict=True))
        )
    if isinstance(expected, str):
        return isinstance(value, str) and normalise(value) == normalise(expected)
    if isinstance(value, bool) or isinstance(expected, bool) or expected is None:
        return value is expected
    # JSON's 5.0 is not accepted for an integer, and 5 is for a float; without a declared number type both must agree.
    allowed = _NUMBER_TYPES.get(str(schema.get("type")), (type(expected),))
    return isinstance(value, allowed) and value == expected


def _same_object(value: dict[str, Json], expected: dict[str, Json], properties: dict[str, Json]) -> bool:
    for key, item in value.items():
        if key not in expected or not _is_possible(item, _as_list(expected[key]), _as_dict(properties.get(key))):
            return False
    return all(key in value or "" in _as_list(values) for key, values in expected.items())


def _as_dict(value: Json) -> dict[str, Json]:
    """The object itself; an empty one where the data has none."""
    return value if isinstance(value, dict) else {}


def _as_list(value: Json) -> list[Json]:
    """The list itself; an empty one where the data has none."""
    return value if isinstance(value, list) else []
