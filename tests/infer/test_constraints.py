"""Constrained samples of a random model, which by itself would write neither JSON nor harmony, against other judges.

These are jsonschema for schemas, Python's `re` for regular expressions, and the bytes of all tokens for masks.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_tiny

import gptoss_infer as gi
from gptoss_infer import harmony
from gptoss_infer.__main__ import main
from gptoss_infer.constraints import (
    Call,
    Constraint,
    Follower,
    Grammar,
    allowed_tokens,
    follow,
    json_schema,
    lark,
    prepare,
    regex,
)
from gptoss_infer.engine import Completion, Engine, SamplingParams
from gptoss_infer.errors import MachineError, UsageError, run_command
from gptoss_infer.harmony.vocabulary import FIRST_SPECIAL, VOCABULARY_SIZE, byte_sequences, encoding
from gptoss_infer.model import GptOss

pytest.importorskip("llguidance", reason="constraints need llguidance; pip install 'gptoss[structured]'")
jsonschema = pytest.importorskip("jsonschema", reason="the judge of answers; pip install jsonschema")


def tokens(text: str) -> list[int]:
    """Token ids of a text in which control tokens are meant as such."""
    return encoding().encode(text, allowed_special="all")


HEADER = tokens("<|start|>assistant")
FINAL = tokens("<|start|>assistant<|channel|>final<|message|>")
ANALYSIS = tokens("<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>analysis<|message|>")
TO_F = tokens("<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>")
ADDRESS = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "maxLength": 8},
        "number": {"type": "integer", "minimum": 1, "maximum": 999},
        "kind": {"enum": ["home", "büro", None, 7]},
    },
    "required": ["street", "kind"],
    "additionalProperties": False,
}
SCHEMAS = {
    "object": ADDRESS,
    "numbers": {
        "type": "array", "minItems": 3, "maxItems": 3,
        "items": {"type": "number", "exclusiveMinimum": -2.5, "maximum": 40, "multipleOf": 0.25},
    },
    "nested arrays": {
        "type": "array", "maxItems": 3,
        "items": {"type": "array", "minItems": 1, "maxItems": 2, "items": {"type": ["boolean", "null"]}},
    },
    "unicode": {
        "type": "array", "minItems": 3, "maxItems": 3, "items": {"type": "string", "minLength": 2, "maxLength": 9}
    },
    "words": {
        "type": "array", "minItems": 4, "maxItems": 4,
        "items": {"enum": ["größer", "κόσμος", "日本語", "🙂🙃", 'a "quoted" \\ word', "<|return|>"]},
    },
    "union": {"anyOf": [{"const": {"x": [1, {}]}}, {"type": "string", "pattern": "^[a-f]{3}-[0-9]{2}$"}]},
    "reference": {
        "$defs": {
            "node": {
                "type": "object", "additionalProperties": False, "required": ["next"],
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            },
        },
        "$ref": "#/$defs/node",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(num_hidden_layers=1, hidden_size=32, vocab_size=VOCABULARY_SIZE)
    return write_tiny(tmp_path_factory.mktemp("constraints") / "base", config)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GptOss:
    return gi.load(checkpoint, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def words() -> list[bytes]:
    return byte_sequences()


def params(constraint: Constraint | Grammar | None, **changes: Any) -> SamplingParams:
    constraint = Constraint(constraint) if isinstance(constraint, Grammar) else constraint
    return replace(SamplingParams(max_tokens=300, temperature=1.0, constraint=constraint), **changes)


def content(completion: Completion, words: list[bytes]) -> str:
    """The text of a final message whose header was in the prompt; it ended as it must, and nothing in it is control."""
    assert completion.finish_reason == "stop"
    *ids, last = completion.token_ids
    assert last == harmony.RETURN
    assert max(ids) < FIRST_SPECIAL
    return b"".join(words[i] for i in ids).decode()  # strictly


def is_allowed(follower: Follower, token: int) -> bool:
    masks = allowed_tokens([follower])
    assert masks is not None
    return bool(masks[0, token // 32] >> token % 32 & 1)


def mask_of(follower: Follower) -> set[int]:
    masks = allowed_tokens([follower])
    assert masks is not None
    return set(np.flatnonzero(np.unpackbits(masks.numpy().view(np.uint8), bitorder="little")).tolist())


def go(follower: Follower, text: str) -> None:
    """Feed a text, all of whose tokens must be allowed when they come."""
    for token in tokens(text):
        assert is_allowed(follower, token), harmony.decode([token])
        assert follower.accept(token)


@pytest.fixture(scope="module")
def answers(model: GptOss) -> dict[str, list[Completion]]:
    """One greedy sample and five of temperature 1 for each schema, all in one batch."""
    requests = [
        params(json_schema(schema), **changes)
        for schema in SCHEMAS.values()
        for changes in ({"temperature": 0.0}, {"n": 5, "seed": 2})
    ]
    found: dict[str, list[Completion]] = {name: [] for name in SCHEMAS}
    for completion in Engine(model, max_batch=64).generate([FINAL] * len(requests), requests):
        found[list(SCHEMAS)[completion.prompt_index // 2]].append(completion)
    return found


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_of_a_random_model_are_json_that_the_schema_accepts(
    answers: dict[str, list[Completion]], words: list[bytes], name: str
) -> None:
    assert len(answers[name]) == 6
    for completion in answers[name]:
        answer = json.loads(content(completion, words))
        jsonschema.validate(answer, SCHEMAS[name], cls=jsonschema.Draft202012Validator)


def test_the_same_model_writes_no_json_without_a_constraint(model: GptOss) -> None:
    for completion in Engine(model).generate([FINAL], params(None, max_tokens=20, n=4)):
        with pytest.raises(json.JSONDecodeError):
            json.loads(harmony.decode(completion.token_ids))


def test_required_properties_are_always_there_and_optional_ones_sometimes(
    answers: dict[str, list[Completion]], words: list[bytes]
) -> None:
    objects = [json.loads(content(completion, words)) for completion in answers["object"]]
    assert all({"street", "kind"} <= answer.keys() <= {"street", "number", "kind"} for answer in objects)
    assert {"number" in answer for answer in objects} == {True, False}


def test_blanks_between_the_parts_of_json_are_one_space_or_one_indented_line(
    answers: dict[str, list[Completion]], words: list[bytes]
) -> None:
    texts = [content(completion, words) for completion in answers["numbers"] + answers["nested arrays"]]
    blanks = [blank for text in texts for blank in re.findall(r"\s+", text)]
    assert blanks
    assert all(re.fullmatch(r" |\n[ \t]{0,64}", blank) for blank in blanks)


def test_any_indentation_that_json_dumps_writes_is_allowed() -> None:
    value = {"street": "a", "number": 7, "kind": "home"}
    deep = {"type": "object", "properties": {"a": {"type": "array", "items": ADDRESS}}}
    for options in ({}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}, {"separators": (",", ":")}):
        follower = follow(Constraint(json_schema(deep)), FINAL)
        go(follower, json.dumps({"a": [value, value]}, **options) + "<|return|>")
        assert follower.ended


PATTERNS = (r"[ab]{1,3}c", r"(?:ja|nein|vielleicht), (?:[0-9]{2}|ü{1,3})x", "[^a-z]{4}", r"a/b|c\\d|\n\n")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_regular_expression_matches_the_whole_answer(model: GptOss, words: list[bytes], pattern: str) -> None:
    for temperature in (0.0, 1.0):
        (completion,) = Engine(model).generate([FINAL], params(regex(pattern), temperature=temperature))
        assert re.fullmatch(pattern, content(completion, words))


def test_a_grammar_can_nest_what_no_regular_expression_can(model: GptOss, words: list[bytes]) -> None:
    nested = params(lark('start: "(" (start | "x") ")"'), n=8, max_tokens=40)
    ended = [one for one in Engine(model).generate([FINAL], nested) if one.finish_reason == "stop"]
    assert ended, "none of the random walks came to an end"
    for completion in ended:
        opened, closed = content(completion, words).split("x")
        assert (set(opened), closed) == ({"("}, ")" * len(opened))


def test_masks_hold_exactly_the_tokens_that_keep_an_answer_possible(words: list[bytes]) -> None:
    possible = [b"yes", b"yesterday", "nö".encode(), "日本".encode(), b"<|end|>"]
    grammar = regex("|".join(re.escape(answer.decode()) for answer in possible))
    starts = {answer[:n] for answer in possible for n in range(len(answer) + 1)}
    rng = np.random.default_rng(1)
    for _ in range(4):
        follower, said = follow(Constraint(grammar), FINAL), b""
        while not follower.ended:
            expected = {i for i, word in enumerate(words[:FIRST_SPECIAL]) if said + word in starts}
            expected |= {harmony.RETURN} if said in possible else set()
            mask = mask_of(follower)
            if len({start[len(said)] for start in starts if len(start) > len(said) and start.startswith(said)}) == 1:
                assert set() < mask <= expected  # a byte that must come is written as the vocabulary writes it
            else:
                assert mask == expected
            token = int(rng.choice(sorted(mask)))
            assert follower.accept(token)
            said += b"" if follower.ended else words[token]


def test_control_tokens_cannot_be_drawn_inside_text() -> None:
    follower = follow(Constraint(json_schema({"type": "object"})), FINAL)
    for piece in ('{"', "a<|", '|>":', ' "b"', ", ", '"c": [1', "]"):
        assert max(mask_of(follower)) < FIRST_SPECIAL
        for token in harmony.encode(piece):
            assert follower.accept(token)
    go(follower, "}")
    assert mask_of(follower) == {harmony.RETURN}


def test_constrained_and_free_samples_of_one_batch_are_those_of_each_alone(model: GptOss) -> None:
    call = Constraint("never", (Call("functions.f", json_schema(ADDRESS)),))
    requests = [
        (FINAL, params(json_schema(ADDRESS), seed=1)),
        (ANALYSIS, params(None, max_tokens=12, seed=2, temperature=0.7, top_k=50)),
        (FINAL, params(regex("[a-z]{5,9}"), seed=3, top_p=0.9)),
        (TO_F, params(call, temperature=0.0)),
        (ANALYSIS, params(None, max_tokens=12, temperature=0.0)),
        (ANALYSIS, params(json_schema(ADDRESS), max_tokens=12)),
    ]
    alone = [next(Engine(model).generate([prompt], one)).token_ids for prompt, one in requests]
    for max_batch in (2, 8):
        prompts, each = zip(*requests, strict=True)
        together = Engine(model, max_batch=max_batch).generate(prompts, each)
        assert [completion.token_ids for completion in together] == alone


def test_each_of_n_samples_has_a_place_of_its_own_in_the_grammar(model: GptOss, words: list[bytes]) -> None:
    constrained = params(json_schema(SCHEMAS["unicode"]), seed=5)
    many = list(Engine(model).generate([FINAL], replace(constrained, n=3)))
    assert len({content(completion, words) for completion in many}) == 3
    for i, completion in enumerate(many):
        (single,) = Engine(model).generate([FINAL], replace(constrained, seed=5 + i))
        assert single.token_ids == completion.token_ids


def test_preempted_samples_go_on_in_their_grammar_where_they_were(model: GptOss) -> None:
    constrained = params(json_schema(SCHEMAS["unicode"]), n=6, max_tokens=90)
    expected = [completion.token_ids for completion in Engine(model).generate([FINAL], constrained)]
    engine = Engine(model, page_tokens=16, step_tokens=64, max_batch=8, cache_tokens=112)
    assert [completion.token_ids for completion in engine.generate([FINAL], constrained)] == expected
    assert engine.scheduler.num_preempted > 0


def test_a_cancelled_sample_leaves_the_others_in_place(model: GptOss) -> None:
    constrained = params(json_schema(ADDRESS), n=2, seed=4)
    expected = [completion.token_ids for completion in Engine(model).generate([FINAL], constrained)]
    engine = Engine(model)
    first, second = engine.add([FINAL], constrained)
    for _ in range(4):
        engine.step()
    engine.cancel([first])
    while second.finish_reason is None:
        engine.step()
    assert (first.completion().finish_reason, first.token_ids) == ("cancelled", expected[0][:4])
    assert second.token_ids == expected[1]


def test_an_answer_that_reaches_max_tokens_is_cut_off_by_length(model: GptOss) -> None:
    long = json_schema({"type": "string", "minLength": 90})
    (completion,) = Engine(model).generate([FINAL], params(long, max_tokens=5))
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 5)


def test_analysis_before_the_answer_is_what_it_is_without_a_constraint(model: GptOss) -> None:
    for temperature in (0.0, 1.0):
        free = params(None, max_tokens=24, temperature=temperature)
        (expected,) = Engine(model).generate([ANALYSIS], free)
        assert max(expected.token_ids) < FIRST_SPECIAL  # else it would be no analysis any more
        (got,) = Engine(model).generate([ANALYSIS], replace(free, constraint=Constraint(json_schema(ADDRESS))))
        assert got.token_ids == expected.token_ids
    ordinary = set(range(FIRST_SPECIAL))
    assert mask_of(follow(Constraint(json_schema(ADDRESS)), ANALYSIS)) == ordinary | {harmony.END}


def test_a_whole_turn_is_followed_from_analysis_to_the_answer() -> None:
    follower = follow(Constraint(json_schema(ADDRESS)), ANALYSIS)
    go(follower, "Well, {<|end|><|start|>assistant<|channel|>analysis<|message|>again 日本<|end|>")
    assert mask_of(follower) == {harmony.START}
    go(follower, "<|start|>assistant<|channel|>final <|constrain|>json<|message|>")
    assert all(word.startswith("{") for word in map(harmony.decode, ([i] for i in mask_of(follower))))
    go(follower, '{"street": "a", "kind": null}<|return|>')
    assert follower.ended


CALLS = (
    Call("functions.f", json_schema(ADDRESS)),
    Call("functions.f_2", json_schema({"type": "object"})),
    Call("python"),
)


@pytest.mark.parametrize(
    ("turn", "recipient"),
    [
        ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{ARGUMENTS}<|call|>", "functions.f"),
        ("<|channel|>commentary to=functions.f<|constrain|>json<|message|>{ARGUMENTS}<|call|>", "functions.f"),
        ("<|channel|>commentary to=functions.f<|message|>{ARGUMENTS}<|call|>", "functions.f"),
        (" to=functions.f<|channel|>commentary <|constrain|>json<|message|>{ARGUMENTS}<|call|>", "functions.f"),
        (" to=functions.f<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>", "functions.f"),
        ("<|channel|>commentary to=functions.f_2 <|constrain|>json<|message|>{}<|call|>", "functions.f_2"),
        ("<|channel|>analysis to=python code<|message|>print({1: 2})<|call|>", "python"),
        ("<|channel|>commentary to=python<|message|>1 + 1<|call|>", "python"),
        ("<|channel|>final<|message|>Just text.<|return|>", None),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", None),
        ("<|channel|>commentary<|message|>Look:<|end|><|start|>assistant<|channel|>final<|message|>x<|return|>", None),
    ],
)  # fmt: skip
def test_every_form_of_a_message_is_allowed_that_reads_as_well_formed(turn: str, recipient: str | None) -> None:
    turn = turn.replace("{ARGUMENTS}", '{"street":"a","kind":7}')
    follower = follow(Constraint(calls=CALLS), HEADER)
    go(follower, turn)
    assert follower.ended
    parsed = harmony.parse(tokens(turn))
    assert parsed.well_formed, parsed.defects
    assert parsed.messages[-1].recipient == recipient


@pytest.mark.parametrize(
    ("constraint", "turn", "refused"),
    [
        (Constraint(calls=CALLS), "<|channel|>commentary to=functions.g", ".g"),
        (Constraint(calls=CALLS), "<|channel|>commentary to=functions.f <|constrain|>json<|message|>[", "["),
        (Constraint(calls=CALLS), "<|channel|>analysis to=functions.f", "functions"),
        (Constraint(calls=CALLS), "<|channel|>analysis to=browser.search", "browser"),
        (Constraint(calls=CALLS), "<|channel|>final<|message|>Text<|end|>", "<|end|>"),
        (Constraint(calls=CALLS), "<|channel|>final<|message|>Text<|call|>", "<|call|>"),
        (Constraint(calls=CALLS), "<|channel|>analysis<|message|>Hm<|return|>", "<|return|>"),
        (Constraint(calls=CALLS), "<|channel|>analysis<|message|>Hm<|endoftext|>", "<|endoftext|>"),
        (Constraint(calls=CALLS), "<|channel|>analysis<|message|>Hm<|channel|>", "<|channel|>"),
        (Constraint(calls=CALLS), "<|channel|>analysis<|message|>Hm<|end|><|return|>", "<|return|>"),
        (Constraint(calls=CALLS), "<|channel|>analysis<|message|>Hm<|end|><|start|>user", "user"),
        (Constraint(calls=CALLS), "<|message|>", "<|message|>"),
        (Constraint(calls=CALLS), "<|channel|>thoughts", "thought"),
        (Constraint("never", CALLS), "<|channel|>final", "final"),
        (Constraint(), "<|channel|>commentary", "comment"),
        (Constraint(regex("[a-z]+")), "<|channel|>final <|constrain|>json", " "),
        (Constraint(regex("[a-z]+")), "<|channel|>final<|message|><|return|>", "<|return|>"),
    ],
)
def test_what_a_turn_may_not_hold_is_refused_at_its_first_token(
    constraint: Constraint, turn: str, refused: str
) -> None:
    follower = follow(constraint, HEADER)
    for token in tokens(turn):
        if not is_allowed(follower, token):
            assert harmony.decode([token]) == refused
            assert not follower.accept(token)
            return
        assert follower.accept(token)
    pytest.fail("all of it was allowed")


def test_a_call_that_must_be_made_has_arguments_that_its_schema_accepts(model: GptOss) -> None:
    constraint = Constraint("never", (Call("functions.f", json_schema(ADDRESS)), Call("functions.g", regex("[01]{4}"))))
    made = []
    for completion in Engine(model).generate([HEADER], params(constraint, n=16, max_tokens=60)):
        parsed = harmony.parse(completion.token_ids)
        if completion.finish_reason == "length":  # a random model seldom ends its analysis
            assert parsed.messages[0].channel in ("analysis", "commentary")
            continue
        assert (parsed.defects, parsed.stop) == ([], "call")
        made += parsed.tool_calls
    assert {call.name for call in made} == {"f", "g"}
    for call in made:
        if call.name == "f":
            jsonschema.validate(call.arguments, ADDRESS)
        else:
            assert re.fullmatch("[01]{4}", call.arguments_text)


def test_a_prompt_may_end_inside_the_answer_which_then_goes_on(model: GptOss) -> None:
    begun = tokens('<|start|>assistant<|channel|>final<|message|>{"street": "Hauptstr')
    for completion in Engine(model).generate([begun], params(json_schema(ADDRESS), n=3)):
        text = harmony.decode([*begun, *completion.token_ids])
        jsonschema.validate(json.loads(text.split("<|message|>")[1].removesuffix("<|return|>")), ADDRESS)


def test_a_grammar_that_leads_into_a_dead_end_cancels_its_sample_alone(
    model: GptOss, caplog: pytest.LogCaptureFixture
) -> None:
    dead = params(lark('start: "a" B\nB: /b+/ & /c+/'))
    with caplog.at_level(logging.WARNING):
        stuck, free = Engine(model).generate([FINAL, FINAL], [dead, params(regex("[ab]{3}"))])
    assert (stuck.finish_reason, harmony.decode(stuck.token_ids)) == ("cancelled", "a<|endoftext|>")
    assert free.finish_reason == "stop"
    assert "given up" in caplog.text


@pytest.mark.parametrize(
    ("schema", "part", "reason"),
    [
        ({"type": "strin"}, "at #: ", "strin"),
        (False, "at #: ", "false"),
        ({"minimum": "5"}, "at #: ", "minimum"),
        ({"properties": {"a": {"items": {"uniqueItems": True}}}}, "at #/properties/a/items: ", "uniqueItems"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "at #/properties/a: ", "look-ahead"),
        ({"anyOf": [{"type": "null"}, {"properties": {"b": {"not": {}}}}]}, "at #/anyOf/1/properties/b: ", "not"),
        ({"$defs": {"n": {"if": {}}}, "items": {"$ref": "#/$defs/n"}}, "at #/$defs/n: ", '"if"'),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "at #/properties/a: ", "does not exist"),
        (
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}}, "required": ["a"]},
            "at #/properties/a: ", "greater than maximum",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_part_that_is_why(
    model: GptOss, schema: Any, part: str, reason: str
) -> None:
    engine = Engine(model)
    with pytest.raises(UsageError, match=re.escape(part)) as refused:
        engine.add([FINAL], params(json_schema(schema)))
    assert reason in str(refused.value)
    assert not engine.scheduler.waiting


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (regex("(a"), "unclosed group"),
        (regex(r"[^\s\S]"), "no text satisfies it"),
        (lark("start: nothing"), "unknown name"),
        (lark('start: "a" <|end|>'), "names the token <|end|>"),
        (lark("start: <[200002]>"), r"names the token <\[200002\]>"),
        (json_schema(json.loads('{"items":' * 300 + "{}" + "}" * 300)), "recursion limit"),
    ],
    ids=["regex", "empty", "lark", "token", "token id", "deep"],
)
def test_other_grammars_that_cannot_be_enforced_are_refused(grammar: Grammar, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(Constraint(grammar))


def test_angle_brackets_in_a_grammars_texts_are_no_tokens() -> None:
    follower = follow(Constraint(lark('start: "a<b>" /<c>/ // <d>\n')), FINAL)
    go(follower, "a<b><c><|return|>")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Why?", "prompt 0 holds no <|start|>"),
        ("<|start|>user<|message|>Why?<|end|>", "prompt 0 ends in a message that the constraint does not allow"),
        ("<|start|>assistant<|channel|>final<|message|>Text", "from token 5 on: .*Text"),
        ('<|start|>assistant<|channel|>final<|message|>{"street":"","kind":7}<|return|>', "does not allow"),
    ],
)
def test_a_prompt_that_a_constraint_cannot_follow_is_refused(model: GptOss, prompt: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(Engine(model).generate([tokens(prompt)], params(json_schema(ADDRESS))))


def test_constraints_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="final='never' needs a call"):
        Constraint("never")
    for calls in ((Call("a b"),), (Call("f"), Call("f"))):
        with pytest.raises(UsageError, match="calls name"):
            Constraint(calls=calls)
    with pytest.raises(UsageError, match="schema cannot be written as JSON"):
        json_schema({"const": {1, 2}})
    with pytest.raises(UsageError, match="stop_token_ids"):
        SamplingParams(constraint=Constraint(), stop_token_ids=(harmony.RETURN,))
    other = gi.load(write_tiny(tmp_path / "other", tiny_config()), device="cpu", dtype=torch.float32)
    with pytest.raises(UsageError, match="vocabulary of 201088 tokens; this checkpoint has 512"):
        Engine(other).add([[1]], SamplingParams(constraint=Constraint()))


def test_without_llguidance_the_cure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MachineError, match=r"pip install 'gptoss\[structured\]'"):
        prepare(Constraint(regex("not compiled before")))


def run(*argv: object) -> int:
    return run_command(main, [str(argument) for argument in argv])


def test_the_command_line_holds_the_final_message_to_a_schema_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "address.json"
    file.write_text(json.dumps(ADDRESS))
    options = ("--n", 8, "--max-tokens", 60, "--device", "cpu", "--dtype", "float32", "--json")
    assert run("generate", checkpoint, "Where?", "--json-schema", file, *options) == 0
    samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    finals = [json.loads(sample["final"]) for sample in samples if sample["finish_reason"] == "stop"]
    assert finals, "no sample came to its final message"
    for answer in finals:
        jsonschema.validate(answer, ADDRESS)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ('{"properties": {"a": {"not": {}}}}', "cannot be enforced at #/properties/a")],
)
def test_a_bad_schema_file_is_a_usage_error_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "bad.json").write_text(text)
    assert run("generate", "/nowhere", "Where?", "--json-schema", tmp_path / "bad.json") == 2
    assert message in capsys.readouterr().err
    assert run("generate", "/nowhere", "Where?", "--json-schema", tmp_path / "none.json") == 2
