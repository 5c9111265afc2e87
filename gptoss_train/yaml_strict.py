"""YAML for recipes: the 1.2 core scalars, with a place for every value and every problem of a file in one go.

Here: `parse` (text to plain data plus the line of each value), `parse_scalar` (one value of a command line), `dump`
(the inverse of `parse`). Not here: what the keys mean (`gptoss_train.recipe`, the only user).

Stock PyYAML reads YAML 1.1: `1e-4` is text, `no` is false, `012` is ten and the last of two equal keys wins in silence.
Here `1e-4` is a number, `no`, `on` and `off` are text, `012` is twelve, only `true` and `false` are booleans, and a
duplicate key, an alias or a tag is a problem that names its line. Source: YAML 1.2.2, section 10.3 (core schema);
booleans and nulls are narrowed to their lower-case spellings.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from gptoss_infer.errors import UsageError

Value: TypeAlias = bool | int | float | str | tuple["Value", ...] | dict[str, "Value"] | None
KeyPath: TypeAlias = tuple[str | int, ...]

MAX_BYTES = 1 << 20  # a recipe is a few kB; PyYAML needs seconds for more than this
MAX_DEPTH = 16  # a recipe needs 4; PyYAML recurses per level
_REFUSED = "refused"  # stands in the node for an alias or a tagged value

_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str"))
_SCALARS = (
    (_NULL, re.compile(r"(?:~|null|)$"), ["~", "n", ""]),
    (_BOOL, re.compile(r"(?:true|false)$"), ["t", "f"]),
    # 40 digits: more than any count; Python refuses to read thousands of them.
    (_INT, re.compile(r"(?:[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40})$"), list("-+0123456789")),
    (_FLOAT, re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"), list("-+.0123456789")),
    (_FLOAT, re.compile(r"(?:[-+]?\.inf|\.nan)$"), list("-+.")),
)


class Location(NamedTuple):
    """Where a value was written: `label` for people, `order` to sort by."""

    order: int
    label: str


class Problem(NamedTuple):
    """One thing that is wrong with the value or key at `path`."""

    location: Location
    path: KeyPath
    text: str


class Document(NamedTuple):
    """What `parse` found: data, the location of each key and item, and what is wrong. `unread` values are None."""

    data: Value
    locations: dict[KeyPath, Location]
    problems: list[Problem]
    unread: set[KeyPath]


class _Loader(yaml.SafeLoader):
    """Composes nodes; aliases and tags become `_REFUSED` nodes, so that one pass finds all of them."""

    depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self.get_event()
            return _refused(event, f"alias *{event.anchor}")
        if self.depth == MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels of nesting", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if event.tag is not None:
            return _refused(event, f"tag {event.tag}")
        return _joined(node, event) if isinstance(node, ScalarNode) else node


def _refused(event: Any, what: str) -> ScalarNode:  # Any: the stubs mix the marks of the C and the Python parser
    return ScalarNode(_REFUSED, what, event.start_mark, event.end_mark)


def _joined(node: ScalarNode, event: Any) -> ScalarNode:
    r"""Make one character of each surrogate pair; JSON escapes emoji as two (`\ud83d\ude00`), and PyYAML keeps two."""
    try:
        node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return _refused(event, "half a surrogate pair")
    return node


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` would not read as text; never writes an alias."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, data: str) -> ScalarNode:
        # PyYAML writes the line breaks of YAML 1.1 raw, and then reads them as spaces.
        style = '"' if set(data) & set("\x85\u2028\u2029") else None
        return self.represent_scalar(_STR, data, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(_tag, _pattern, _first)


def parse(raw: bytes, source: str) -> Document:
    """Read one YAML document.

    Args:
        raw: UTF-8, at most 1 MiB.
        source: name of the file, for messages.
    Raises: UsageError if it is no YAML at all; whatever is wrong with single values is in `Document.problems`.
    """
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{source}: larger than {MAX_BYTES} bytes; a recipe is a few kB of YAML")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{source}:{line}: byte {raw[error.start]:#04x} is not UTF-8; save it as UTF-8 text") from None
    try:
        node = _compose(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        context = f" {error.context}" if error.context else ""
        raise UsageError(f"{source}{at}: not valid YAML{context}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: not valid YAML: {error}") from None
    if node is None:
        raise UsageError(f"{source}: empty; expected `version: 1` and the sections of a recipe")
    reader = _Reader(source)
    return Document(reader.read(node, ()), reader.locations, reader.problems, reader.unread)


def parse_scalar(text: str) -> Value:
    """Read a command line's value by the same rules: a flow list, mapping or quoted text, else one plain scalar.

    Raises: UsageError, without a place (the caller knows it).
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        document = parse(text.encode("utf-8", "surrogateescape"), "value")
        if document.problems:
            raise UsageError(document.problems[0].text)
        return document.data
    tag = _Loader("").resolve(ScalarNode, text, (True, False))
    return _scalar(tag, text)


def dump(data: object) -> str:
    """Write plain data as YAML that `parse` reads back equal; keys keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1 << 20)


def _compose(text: str) -> Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _scalar(tag: str, text: str) -> bool | int | float | str | None:
    if tag == _NULL:
        return None
    if tag == _BOOL:
        return text == "true"
    if tag == _INT:
        return int(text, 0 if text[:2] in ("0x", "0o") else 10)
    if tag == _FLOAT:
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text


class _Reader:
    """Turns nodes into plain data and notes where each value stands and what is wrong with it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.locations: dict[KeyPath, Location] = {}
        self.problems: list[Problem] = []
        self.unread: set[KeyPath] = set()

    def read(self, node: Node, path: KeyPath) -> Value:
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.locations[(*path, index)] = self._location(item)
                items.append(self.read(item, (*path, index)))
            return tuple(items)
        if node.tag == _REFUSED:
            self._problem(node, path, f"{node.value} is not supported in a recipe; write the value out")
            self.unread.add(path)
            return None
        return _scalar(node.tag, node.value)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for key_node, value_node in node.value:
            if not _is_text(key_node):
                shown = key_node.value if isinstance(key_node, ScalarNode) else f"a {key_node.id}"
                self._problem(key_node, path, f"key {shown} is not text; quote it if it is meant to be a name")
                continue
            key, here = key_node.value, (*path, key_node.value)
            if key in found:
                first = self.locations[here].label
                self._problem(key_node, here, f"duplicate key; first given at {first}. Keep one of them")
                continue
            self.locations[here] = self._location(key_node)
            found[key] = self.read(value_node, here)
        return found

    def _location(self, node: Node) -> Location:
        line = node.start_mark.line + 1
        return Location(line, f"{self.source}:{line}")

    def _problem(self, node: Node, path: KeyPath, text: str) -> None:
        self.problems.append(Problem(self._location(node), path, text))


def _is_text(node: Node) -> TypeGuard[ScalarNode]:
    return isinstance(node, ScalarNode) and node.tag == _STR
