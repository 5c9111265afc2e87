"""What is wrong with a recipe, in words; and the table of its keys, which uses the same words.

Here: pydantic's errors turned into problems that name the place, the key, the value, what was expected and the nearest
known name. Not here: the keys themselves and the loader (`gptoss_train.recipe`, the only user).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import BaseMetadata
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from gptoss_train.yaml_strict import KeyPath, Location, Problem, Value


def explain(
    error: ValidationError,
    model: type[BaseModel],
    data: dict[str, Value],
    locations: dict[KeyPath, Location],
    source: str,
) -> Iterator[Problem]:
    """Turn the errors of validating `data` against `model` into one problem per value.

    A union reports each of its branches, with the branch in the location; what remains of a location after dropping
    those is a path of `data`. Of several paths into one value, the deepest says most.
    """
    details: dict[KeyPath, ErrorDetails] = {}
    for detail in error.errors(include_url=False):
        path = _data_path(detail, data)
        if path not in details or detail["type"] == "value_error":
            details[path] = detail
    for path, detail in details.items():
        inner = any(len(other) > len(path) and other[: len(path)] == path for other in details)
        if inner and detail["type"] != "value_error":
            continue
        where = next((locations[path[:n]] for n in range(len(path), 0, -1) if path[:n] in locations), None)
        where = where or Location(0, source)
        yield Problem(where, path, line(where, path, _complaint(detail, model, path, _value_at(data, path))))


def key_table(model: type[BaseModel]) -> str:
    """One line per key of `model`: name, type, default and meaning."""
    rows = [
        (
            ".".join(path),
            _type_text(field),
            "required" if field.is_required() else shown(field.default),
            field.description or "",
        )
        for path, field in _leaves(model)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)


def _data_path(error: ErrorDetails, data: Value) -> KeyPath:
    path: list[str | int] = []
    for key in error["loc"]:
        if isinstance(data, dict) and key in data:
            data = data[str(key)]
        elif isinstance(data, tuple) and isinstance(key, int) and key < len(data):
            data = data[key]
        elif error["type"] != "missing" or not isinstance(data, dict):
            continue  # the name of a union's branch, or an item that a list is short of
        path.append(key)
    return tuple(path)


def _value_at(data: Value, path: KeyPath) -> Value:
    for key in path:
        if isinstance(data, tuple) and isinstance(key, int):
            data = data[key]
        else:
            data = data.get(str(key)) if isinstance(data, dict) else None
    return data


def _complaint(error: ErrorDetails, model: type[BaseModel], path: KeyPath, value: Value) -> str:
    section, field = _schema(model, path)
    if error["type"] == "extra_forbidden":
        return f"unknown key (value {shown(value)}). {_nearest(str(path[-1]), path[:-1], section, model)}"
    if error["type"] == "value_error":
        reason = str(error["ctx"]["error"])
        return reason if isinstance(value, dict) else f"got {shown(value)}: {reason}"
    if field is None:
        expected = f"a section with the keys {', '.join(section.model_fields)}"
    else:
        inside = section.model_fields.get(str(path[-1])) is not field
        expected = _annotation_text(_item_type(field.annotation)) if inside else _type_text(field)
    meaning = f" ({field.description})" if field and field.description else ""
    missing = error["type"] == "missing" and error["loc"] == path
    return f"{'missing' if missing else f'got {shown(value)}'}; expected {expected}{meaning}"


def _schema(model: type[BaseModel], path: KeyPath) -> tuple[type[BaseModel], FieldInfo | None]:
    """The innermost section that `path` leads into, and the field of it, None for the section itself."""
    section = model
    for key in path:
        field = section.model_fields.get(str(key))
        inner = _section(field)
        if inner is None:
            return section, field
        section = inner
    return section, None


def _nearest(key: str, parents: KeyPath, section: type[BaseModel], model: type[BaseModel]) -> str:
    elsewhere = {path[-1]: ".".join(path) for path, _ in _leaves(model)}
    near = difflib.get_close_matches(key, section.model_fields, n=1)
    if near and key not in elsewhere:
        return f"Did you mean {'.'.join(map(str, (*parents, near[0])))}?"
    far = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.8)
    if far:
        return f"Did you mean {elsewhere[far[0]]}?"
    return f"Known here: {', '.join(section.model_fields)}"


def _leaves(section: type[BaseModel], parents: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, field in section.model_fields.items():
        inner = _section(field)
        if inner is None:
            yield (*parents, name), field
        else:
            yield from _leaves(inner, (*parents, name))


def _section(field: FieldInfo | None) -> type[BaseModel] | None:
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _type_text(field: FieldInfo) -> str:
    return _annotation_text(field.annotation, field.metadata)


def _item_type(annotation: Any) -> Any:
    """The type of the items of a list, of the values of a mapping, or of either in a union."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        return arguments[0]
    if origin is dict:
        return arguments[1]
    return next((item for item in map(_item_type, arguments) if item is not None), None)


def _annotation_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _annotation_text(arguments[0], annotation.__metadata__)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return f"a list{count}, each {_annotation_text(arguments[0])}"
    if origin is dict:
        return "a mapping of text to text"
    if arguments:  # a union
        return " or ".join(_annotation_text(argument, metadata) for argument in arguments)
    name = {int: "an integer", float: "a number", str: "text", bool: "true | false", type(None): "null"}[annotation]
    bounds = "" if annotation is type(None) else " and ".join(_bounds(metadata))
    return f"{name} {bounds}".rstrip()


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
        for kind, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if isinstance(item, BaseMetadata) and hasattr(item, kind):
                yield f"{sign} {getattr(item, kind)}"


def line(location: Location, path: KeyPath, text: str) -> str:
    """One problem as it is printed."""
    return f"{location.label}: {'.'.join(map(str, path))}: {text}" if path else f"{location.label}: {text}"


def shown(value: object) -> str:
    """A value as a recipe spells it, cut to a line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
