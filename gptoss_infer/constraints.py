"""What a sample may say: harmony's form is kept, and users and tools get only texts of a given JSON schema or grammar.

    answer = json_schema({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
    SamplingParams(constraint=Constraint(final=answer))

A constraint follows a sample's tokens and says at each step which token may be next. It holds for the whole turn:
- Headers are those of harmony's three channels, in each of the dialects that `harmony.header` reads.
- Analysis is free, as long as the model likes: any text, in as many messages, each ended by <|end|>. A constraint on
  thoughts costs accuracy, and a limit on them is `max_tokens`. So are comments to the user before calls, if there are
  any calls.
- The final message follows `Constraint.final` from its first token, and then only <|return|> may come; a call goes to
  one of `Constraint.calls`, its arguments follow that one's grammar, and then only <|call|> may come.
A sample that ended by "stop" is therefore well-formed harmony and its text satisfies the grammar. One that ended by
"length" was cut off. Where a grammar leads into a dead end or outgrows llguidance's limits, which only odd ones do, the
sample is "cancelled" and a warning says why. Control tokens are never text: in content only the one that ends the
message can be drawn.

How the options of OpenAI-compatible APIs translate, where tools are Call("functions.NAME", json_schema(parameters)):
    response_format json_schema         final=json_schema(schema); json_object: final=json_schema({"type": "object"})
    tools, strict                       calls=(...); not strict: json_schema({"type": "object"}) for the parameters
    tool_choice required, or one tool   final="never", with the calls that may be made
    tool_choice none                    calls=()

Grammars are llguidance's (optional; extra `structured`). Of JSON schema it enforces what it accepts and refuses the
rest. Objects have their properties in the schema's order. Between the parts of JSON at most one space, or one line
break with indentation, so that a model that likes blanks cannot fill its budget with them.

Tell the model what it is to write (`Conversation.response_format`): a grammar alone makes valid text, not good text.
Used by `engine`, which needs `follow` and `allowed_tokens`. Source of harmony's rules: openai/harmony, docs/format.md.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptoss_infer.errors import MachineError, UsageError
from gptoss_infer.harmony.conversation import FUNCTIONS
from gptoss_infer.harmony.header import read_header
from gptoss_infer.harmony.vocabulary import (
    CALL,
    END,
    END_OF_TEXT,
    FIRST_SPECIAL,
    MESSAGE,
    RETURN,
    START,
    VOCABULARY_SIZE,
    byte_sequences,
    decode,
    encode,
)

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_LOG = logging.getLogger(__name__)
_WORDS: Final = -(-VOCABULARY_SIZE // 32)  # of 32 bits, in a row of a mask
_WHITESPACE = r"[ ]|\n[ \t]{0,64}"
_JSON = '" "? <|constrain|> "json"'  # as a content type in a header
_RECIPIENT = re.compile(r"[A-Za-z0-9_.:/+-]+")
# What may hold a "<" in Lark's syntax without naming a token: comments, strings, regular expressions.
_LARK_TEXT = re.compile(r'//[^\n]*|\#[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/')


@dataclass(frozen=True)
class Grammar:
    """Which texts are allowed; made by `json_schema`, `regex` or `lark`, checked when it is first used."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


def json_schema(schema: Mapping[str, Any] | bool) -> Grammar:
    """JSON that a schema (draft 2020-12) accepts. Raises: UsageError if the schema itself is no JSON."""
    try:
        return Grammar("json_schema", json.dumps(schema, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the JSON schema cannot be written as JSON: {error}") from error


def regex(pattern: str) -> Grammar:
    """Texts that a regular expression matches as a whole; Rust's syntax, so without look-around."""
    return Grammar("regex", pattern)


def lark(grammar: str) -> Grammar:
    """Texts that a context-free grammar derives from `start`; in llguidance's variant of Lark's syntax."""
    return Grammar("lark", grammar)


class Call(NamedTuple):
    """A call that may be made: to "functions.NAME", or to a built-in tool such as "python" or "browser.search"."""

    recipient: str
    arguments: Grammar | None = None  # None is any text, such as code


@dataclass(frozen=True)
class Constraint:
    """What a turn may hold; see the module docstring."""

    final: Grammar | Literal["free", "never"] = "free"
    calls: tuple[Call, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no turn can satisfy."""
        if self.final == "never" and not self.calls:
            raise UsageError("a constraint with final='never' needs a call that may be made instead; add one to calls")
        names = [call.recipient for call in self.calls]
        for name in names:
            if not _RECIPIENT.fullmatch(name) or names.count(name) > 1:
                raise UsageError(f"calls name {name!r}; expected each once, of letters, digits and any of _.:/+-")


class Follower:
    """Where one sample is in its turn."""

    def __init__(self, matchers: _Matchers) -> None:
        self._matchers = matchers
        self._header: list[int] = []  # behind its <|start|>
        self._closer: int | None = None  # what ends the content; None in a header
        self._matcher: LLMatcher | None = matchers.header.deep_copy()  # None for free content
        self.ended = False

    def accept(self, token: int) -> bool:
        """Go on by one token; return whether it was allowed. After one that was not, nothing is."""
        assert not self.ended, "a token behind the end of the turn"
        if self._closer is None:
            allowed = self._in_header(token)
        elif token == self._closer:
            allowed = self._matcher is None or self._matcher.is_accepting()
            self.ended = token != END
            self._closer, self._matcher, self._header = None, self._matchers.header.deep_copy(), []
        else:
            allowed = token < FIRST_SPECIAL and (self._matcher is None or self._matcher.consume_token(token))
        return allowed

    def _in_header(self, token: int) -> bool:
        assert self._matcher is not None, "a header without its grammar"
        allowed = self._matcher.consume_token(token)
        if allowed and token == MESSAGE:
            header = read_header(self._header, 0, "start")
            content = None
            if header.recipient is not None:
                self._closer, content = CALL, self._matchers.contents[header.recipient]
            elif header.channel == "final":
                self._closer, content = RETURN, self._matchers.contents[None]
            else:
                self._closer = END
            self._matcher = None if content is None else content.deep_copy()
        elif token != START:
            self._header.append(token)
        return allowed

    def fill(self, row: np.ndarray) -> None:
        """Complete uint32 (words,), which holds what the matcher allows, if there is one."""
        if self._matcher is not None and self._matcher.is_error():
            self._fail(row, f"llguidance gave up: {_short(self._matcher.get_error())}")
        elif self._closer is not None:
            if self._matcher is None:
                row[:] = 0xFFFFFFFF
            _forbid_special(row)
            if self._matcher is None or self._matcher.is_accepting():
                _allow(row, self._closer)
            elif not row.any():
                self._fail(row, "the grammar leads nowhere from here")

    def _fail(self, row: np.ndarray, why: str) -> None:
        _LOG.warning("a constrained sample is given up, ended by <|endoftext|>: %s", why)
        row[:] = 0
        _allow(row, END_OF_TEXT)


def follow(constraint: Constraint, prompt: Sequence[int], where: str = "the prompt") -> Follower:
    """Return the follower of one sample of a prompt, which may end anywhere in an assistant message.

    Raises: UsageError if the constraint cannot be enforced, or if the prompt ends in what it does not allow;
        MachineError without llguidance or the vocabulary.
    """
    follower = Follower(prepare(constraint))
    if START not in prompt:
        raise UsageError(f"{where} holds no <|start|>, so there is no message to constrain; end it with a header")
    begin = len(prompt) - 1 - list(reversed(prompt)).index(START)
    for position in range(begin, len(prompt)):
        if not follower.accept(prompt[position]) or follower.ended:
            text = decode(prompt[begin : position + 1])
            raise UsageError(
                f"{where} ends in a message that the constraint does not allow, from token {position} on: "
                f"...{text[-60:]!r}; end it with <|start|>assistant, or with the beginning of an allowed message"
            )
    return follower


def allowed_tokens(followers: Sequence[Follower | None]) -> Tensor | None:
    """Return which tokens may be next, int32 (B, words) on the CPU in the layout of `sampling.sample`.

    A row without a follower allows all; None is returned if none has one.
    """
    if not any(followers):
        return None
    masks = torch.full((len(followers), _WORDS), -1, dtype=torch.int32)
    matchers = [(one._matcher, row) for row, one in enumerate(followers) if one is not None and one._matcher]
    if matchers:
        _executor().unsafe_compute_mask_ptr(matchers, masks.data_ptr(), _WORDS * 4, len(followers))
    rows = masks.numpy().view(np.uint32)
    for one, row in zip(followers, rows, strict=True):
        if one is not None:
            one.fill(row)
    return masks


def _allow(row: np.ndarray, token: int) -> None:
    row[token // 32] |= np.uint32(1 << token % 32)


def _forbid_special(row: np.ndarray) -> None:
    word, bit = divmod(FIRST_SPECIAL, 32)
    row[word] &= np.uint32((1 << bit) - 1)
    row[word + 1 :] = 0


class _Matchers(NamedTuple):
    """What the samples of a constraint share: matchers at their beginning, to be copied."""

    header: LLMatcher  # of <|start|> to <|message|>
    contents: dict[str | None, LLMatcher | None]  # by recipient, the final message's under None; None if free


@functools.lru_cache(maxsize=256)
def prepare(constraint: Constraint) -> _Matchers:
    """Build what a constraint's samples share. Raises as `follow` does; commands call it before they load a model."""
    final = constraint.final if isinstance(constraint.final, Grammar) else None
    contents: dict[str | None, LLMatcher | None] = {None: _content(final, "the final message")}
    for call in constraint.calls:
        contents[call.recipient] = _content(call.arguments, f"arguments of {call.recipient}")
    return _Matchers(_header(constraint), contents)


def _header(constraint: Constraint) -> LLMatcher:
    """Match a header of the assistant, in each of the dialects that `harmony.header` lists."""
    forms = ['<|channel|> "analysis"']
    if constraint.final != "never":
        forms.append('<|channel|> "final"')
        if constraint.final == "free" or constraint.final.kind == "json_schema":
            forms.append(f'<|channel|> "final" {_JSON}')
    if constraint.calls:
        forms.append('<|channel|> "commentary"')
    for call in constraint.calls:
        to = json.dumps(f" to={call.recipient}")
        if call.recipient.startswith(FUNCTIONS):
            channel, content_type = '"commentary"', f'({_JSON} | " json")?'
        else:  # the model calls built-in tools amid its thoughts
            channel, content_type = '("analysis" | "commentary")', f'({_JSON} | " json" | " code")?'
        forms += [f"<|channel|> {channel} {to} {content_type}", f"{to} <|channel|> {channel} {content_type}"]
    grammar = f'start: <|start|> "assistant" header <|message|>\nheader: {" | ".join(forms)}'
    matcher = _llguidance().LLMatcher(_tokenizer(), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def _content(grammar: Grammar | None, where: str) -> LLMatcher | None:
    """Return the matcher of a grammar. Raises: UsageError for what cannot be enforced, or names control tokens."""
    if grammar is None:
        return None
    matcher_class = _llguidance().LLMatcher
    if grammar.kind == "json_schema":
        source = _json_grammar(grammar.text)
    elif grammar.kind == "regex":
        source = matcher_class.grammar_from_regex(grammar.text)
    else:
        source = matcher_class.grammar_from_lark(grammar.text)
        token = re.search(r"<[^>\n]*>?", _LARK_TEXT.sub("", grammar.text))
        if token is not None:
            raise UsageError(f"the grammar for {where} names the token {token[0]}; content is text without any")
    found = _refusal(source)
    if found is not None and grammar.kind == "json_schema":
        schema = json.loads(grammar.text)
        part, found = _refused_part(schema, _definitions(schema), "#", found)
        raise UsageError(
            f"the JSON schema for {where} cannot be enforced at {part}: {found}; change or remove that part "
            "(llguidance's docs/json_schema.md lists what is supported)"
        )
    if found is not None:
        raise UsageError(f"the {grammar.kind} grammar for {where} cannot be enforced: {found}")
    return matcher_class(_tokenizer(), source, log_level=0)


def _json_grammar(schema: str) -> str:
    schema = "{}" if schema == "true" else schema
    overrides = {"whitespace_pattern": _WHITESPACE} if schema.startswith("{") else None  # only an object takes them
    try:
        return _llguidance().LLMatcher.grammar_from_json_schema(schema, overrides=overrides)
    except ValueError as error:
        raise UsageError(f"the JSON schema cannot be enforced: {error}") from error


def _refusal(source: str) -> str | None:
    """Say why llguidance cannot match a grammar; None if it can."""
    matcher = _llguidance().LLMatcher(_tokenizer(), source, log_level=0)
    if matcher.is_error():
        return _short(matcher.get_error())
    first = np.frombuffer(bytearray(matcher.compute_bitmask()), dtype=np.uint32)
    _forbid_special(first)  # the end of the text is in there even where no text leads to it
    if matcher.is_error() or not (first.any() or matcher.is_accepting()):
        return "no text satisfies it"
    return None


def _refused_part(schema: Any, definitions: dict[str, Any], where: str, found: str) -> tuple[str, str]:
    """Return the innermost part of a schema that is refused for the same reason, and the reason as it is told there."""
    for name, part in _parts(schema):
        alone = part | definitions if isinstance(part, dict) else part
        inner = _refusal(_json_grammar(json.dumps(alone))) if isinstance(part, (dict, bool)) else None
        if inner is not None and (inner == found or ("nsatisfiable" in inner and "nsatisfiable" in found)):
            return _refused_part(part, definitions, f"{where}/{name}", inner)
    return where, found


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield the schemas inside a schema, with their JSON pointers; definitions last, as others may point there."""
    if not isinstance(schema, dict):
        return
    for keyword in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(schema.get(keyword), dict):
            yield from ((f"{keyword}/{name}", part) for name, part in schema[keyword].items())
    for keyword in ("items", "additionalProperties"):
        yield keyword, schema.get(keyword)
    for keyword in ("prefixItems", "anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(keyword), list):
            yield from ((f"{keyword}/{i}", part) for i, part in enumerate(schema[keyword]))


def _definitions(schema: Any) -> dict[str, Any]:
    keywords = ("$defs", "definitions")
    return {keyword: schema[keyword] for keyword in keywords if isinstance(schema, dict) and keyword in schema}


def _short(message: str) -> str:
    """Return what llguidance says, without the dump of its state, on one line."""
    text = " ".join(message.split("<state>")[0].split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _llguidance() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise MachineError(
            f"constraints need the package llguidance, which cannot be imported ({error}); "
            "pip install 'gptoss[structured]'"
        ) from error
    return llguidance


class _Words:
    """The vocabulary as llguidance's TokenizerWrapper reads it."""

    def __init__(self) -> None:
        self.eos_token_id = RETURN  # what a mask holds where the text may end; `Follower.fill` takes it out
        self.bos_token_id = None
        self.special_token_ids = range(FIRST_SPECIAL, VOCABULARY_SIZE)
        self.tokens = [*byte_sequences(), *(decode([token]).encode() for token in self.special_token_ids)]

    def __call__(self, text: str | bytes) -> list[int]:
        return encode(text if isinstance(text, str) else text.decode())


@functools.cache
def _tokenizer() -> LLTokenizer:
    """Build llguidance's index of the vocabulary: once in a process, about 1 s and 95 MB."""
    llguidance = _llguidance()
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Words()), n_vocab=VOCABULARY_SIZE)


@functools.cache
def _executor() -> LLExecutor:
    """The threads that compute masks, fewer than cores and up to 32."""
    return _llguidance().LLExecutor()
