"""Tool parameters: any JSON schema put into the subset that openai-harmony can render as TypeScript.

Here: `adapt`. Not here: the rendering itself, which stays openai-harmony's. Used by `chat`.

openai-harmony knows object, string (with enum), number, integer, boolean, array, oneOf, lists of type names,
nullable, title, description, examples and default. It drops $ref, anyOf, allOf, const and enums of anything but
strings (they come out as `any` or `number`), and of a description with several lines only the first is inside the
comment. What it knows already passes through unchanged, so that such tools get the same prompt as under any server
built on openai-harmony.

It prints the names in a list of types as they stand, joined by " | ". That is how literals are said here: {"type":
["1", "2"]} becomes `1 | 2`. Tests pin the rendered text. Limits such as minimum, pattern or additionalProperties have
no place in its TypeScript and stay unseen by the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from gptoss_infer.errors import DataError

Schema = dict[str, Any]

_SIMPLE = ("string", "number", "integer", "boolean", "null")
_TYPES = (*_SIMPLE, "object", "array")
_SHAPING = ("$ref", "allOf", "anyOf", "oneOf", "const", "enum", "type", "properties", "items")
_COMMENTS = ("title", "description", "examples", "default")
_MEANS_NULL = ("default", "const")  # elsewhere None is what a columnar store put for an absent key
_MAX_DEPTH = 64
_MAX_NODES = 10_000


def adapt(schema: Mapping[str, Any], where: str = "parameters") -> Schema:
    """`schema` without $ref, anyOf, allOf, const, non-string enums and multi-line comments; the input is not changed.

    A type that contains itself is cut where it repeats; the model reads `any` there, with the type's name as comment.
    Raises: DataError naming the place, for what is no JSON schema, points outside the document or contradicts itself.
    """
    return _Adapter(schema).convert(schema, where, ())


class _Adapter:
    """Converts one document, into which its $refs point."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self._nodes = 0

    def convert(self, schema: object, where: str, path: tuple[str, ...], *, shows_null: bool = False) -> Schema:
        """Adapt one node.

        Args:
            path: the $refs, or "", that lead to the node from the root.
            shows_null: whether openai-harmony heeds `nullable` here; it does for fields and variants.
        """
        self._nodes += 1
        if len(path) > _MAX_DEPTH or self._nodes > _MAX_NODES:
            raise DataError(f"{where}: over {_MAX_DEPTH} levels or {_MAX_NODES} types; simplify the parameters")
        if schema is True:
            return {}
        node = _node(schema, where)
        reference = node.pop("$ref", None)
        if reference is not None:
            target = self._target(reference, where)
            if reference in path:
                return _with_comments({"description": f"same type as {reference.rsplit('/', 1)[-1]}"}, node)
            return self.convert({**target, **node}, where, (*path, reference), shows_null=shows_null)
        if "allOf" in node:
            return self.convert(self._joined(node, where), where, (*path, ""), shows_null=shows_null)
        for keyword in ("anyOf", "oneOf"):
            if keyword in node:
                variants = [_node(variant, where) for variant in _list(node, keyword, where)]
                base = {key: value for key, value in node.items() if key != keyword}
                if any(key in variant for variant in variants for key in _SHAPING):
                    return self._union(base, variants, keyword, where, path, shows_null=shows_null)
                node = base  # "one of these is required" and the like, for which the rendering has no words
        return self._plain(node, where, path, shows_null)

    def _plain(self, node: Schema, where: str, path: tuple[str, ...], shows_null: bool) -> Schema:
        """A node that is no reference, conjunction or union."""
        out = _with_comments(_without(node, "const", "$defs", "definitions"), node)
        values = [node["const"]] if "const" in node else _list(node, "enum", where) if "enum" in node else []
        if values:
            if all(isinstance(value, str) for value in values):
                return {**out, "type": "string", "enum": values}
            return {**_without(out, "enum"), "type": [json.dumps(value, ensure_ascii=False) for value in values]}
        kind = node.get("type", "object" if "properties" in node else "array" if "items" in node else None)
        names = kind if isinstance(kind, list) else [] if kind is None else [kind]
        for name in names:
            if name not in _TYPES:
                raise DataError(f"{where}: {_short(name)} is no JSON schema type; expected one of {', '.join(_TYPES)}")
        if isinstance(kind, list):
            if all(name in _SIMPLE for name in kind):
                return out
            base = {key: value for key, value in node.items() if key in _COMMENTS}
            variants = [{**_without(node, *_COMMENTS), "type": name} for name in kind]
            return self._union(base, variants, "anyOf", where, path, shows_null=shows_null)
        if kind is not None:
            out["type"] = ["null"] if kind == "null" else kind
        if kind == "object" and "properties" in node:
            out["properties"] = {
                name: self.convert(value, f"{where}.{name}", (*path, ""), shows_null=True)
                for name, value in _node(node["properties"], f"{where}.properties").items()
            }
        if kind == "array" and "items" in node:
            each = node["items"]  # a list of schemas, one per position, reads as any of them
            each = {"anyOf": each} if isinstance(each, list) else each
            items = self.convert(each, f"{where}.items", (*path, ""))
            out["items"] = items if items == node["items"] else _grouped(items)
        return out

    def _union(
        self, base: Schema, variants: list[Schema], keyword: str, where: str, path: tuple[str, ...], *, shows_null: bool
    ) -> Schema:
        """`anyOf` or `oneOf`: a list of type names if that says it all, else `nullable`, else a oneOf."""
        shared = _without(base, *_COMMENTS, "nullable")
        if any(key in shared for key in _SHAPING):
            variants = [{"allOf": [shared, variant]} for variant in variants]
        converted = [self.convert(v, f"{where}[{i}]", (*path, ""), shows_null=True) for i, v in enumerate(variants)]
        out = _with_comments(base, base)
        out = {key: value for key, value in out.items() if key in (*_COMMENTS, "nullable")}
        if keyword == "anyOf" and len(converted) == 1:
            return {**converted[0], **out}
        simple = [_simple_names(variant) for variant in converted]
        if keyword == "anyOf" and all(simple):
            return {**out, "type": list(dict.fromkeys(name for names in simple for name in names))}
        others = [variant for variant, names in zip(converted, simple, strict=True) if names != ["null"]]
        # openai-harmony leaves `| null` out if the type's own text has the word somewhere.
        if keyword == "anyOf" and shows_null and len(others) == 1 < len(converted) and "null" not in json.dumps(others):
            return {**others[0], **out, "nullable": True}
        return {**out, "oneOf": converted}

    def _target(self, reference: object, where: str) -> Schema:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise DataError(
                f"{where}: $ref {_short(reference)} points outside the parameters; put the definition into $defs"
            )
        found: object = self._document
        for step in reference[1:].split("/")[1:]:
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or key not in found:
                raise DataError(f"{where}: $ref {reference!r} leads nowhere; there is no {key!r}")
            found = found[key]
        return _node(found, reference)

    def _joined(self, node: Schema, where: str, depth: int = 0) -> Schema:
        """The node with its allOf parts merged into it; its own title and description win."""
        if depth > _MAX_DEPTH:
            raise DataError(f"{where}: allOf leads back to itself; a type cannot be part of its own definition")
        out = _without(node, "allOf")
        for part in _list(node, "allOf", where):
            part = _node(part, where)
            if "$ref" in part:
                part = {"allOf": [self._target(part["$ref"], where)], **_without(part, "$ref")}
            out = _merged(out, self._joined(part, where, depth + 1) if "allOf" in part else part, where)
        return out


def _merged(first: Schema, second: Schema, where: str) -> Schema:
    """What satisfies both schemas, as far as their types and fields go; comments of the first win."""
    out = {**second, **first}
    both = [key for key in _SHAPING if key in first and key in second and first[key] != second[key]]
    for key in both:
        if key == "properties":
            mine, theirs = _node(first[key], where), _node(second[key], where)
            common = {name: {"allOf": [mine[name], theirs[name]]} for name in mine if name in theirs}
            out[key] = {**mine, **theirs, **common}
        elif key == "items":
            out[key] = {"allOf": [first[key], second[key]]}
        elif key == "enum":
            out[key] = [value for value in first[key] if value in second[key]]
        elif key == "type" and {_short(first[key]), _short(second[key])} == {"'integer'", "'number'"}:
            out[key] = "integer"
        else:
            raise DataError(
                f"{where}: allOf joins {key} {_short(first[key])} with {_short(second[key])}; merge them by hand"
            )
    out["required"] = [*_required(first, where), *_required(second, where)]
    return out


def _node(schema: object, where: str) -> Schema:
    """A copy of one schema object without absent keys."""
    if not isinstance(schema, Mapping):
        raise DataError(f"{where}: {_short(schema)} is no JSON schema; expected an object such as {{'type': 'string'}}")
    return {key: value for key, value in schema.items() if value is not None or key in _MEANS_NULL}


def _list(node: Schema, keyword: str, where: str) -> list[Any]:
    value = node[keyword]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {keyword} is {_short(value)}; expected a list with at least one entry")
    return value


def _required(node: Schema, where: str) -> list[Any]:
    return _list(node, "required", where) if node.get("required") else []


def _without(node: Schema, *keys: str) -> Schema:
    return {key: value for key, value in node.items() if key not in keys}


def _with_comments(out: Schema, source: Schema) -> Schema:
    """`out` with the comments of `source`, fit for lines that openai-harmony starts with `// `."""
    out = {**out, **{key: source[key] for key in _COMMENTS if key in source}}
    for key in ("title", "description"):
        if isinstance(out.get(key), str):
            out[key] = "\n// ".join(out[key].splitlines())
    if isinstance(out.get("default"), str):
        out["default"] = _escaped(out["default"])
    if isinstance(out.get("examples"), list):
        out["examples"] = [_escaped(value) if isinstance(value, str) else value for value in out["examples"]]
    return out


def _escaped(text: str) -> str:
    """Line breaks as the two characters that stand for them in a string literal."""
    return text.replace("\r", "\\r").replace("\n", "\\n")


def _simple_names(node: Schema) -> list[str]:
    """The type names or literals that say all about `node`; empty if it takes more."""
    if set(node) == {"type", "enum"}:
        return [json.dumps(value, ensure_ascii=False) for value in node["enum"]]
    if set(node) != {"type"}:
        return []
    if isinstance(node["type"], list):
        return node["type"]
    return [node["type"]] if node["type"] in _SIMPLE else []


def _grouped(items: Schema) -> Schema:
    """Array items whose alternatives stand in parentheses, since `[]` binds tighter than `|`."""
    names = _simple_names(items)
    if len(names) < 2:
        return items
    return {"type": [f"({' | '.join('number' if name == 'integer' else name for name in names)})"]}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
