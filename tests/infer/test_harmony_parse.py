"""The parser against openai-harmony's on sound tokens, and alone on everything openai-harmony gives up on."""

from __future__ import annotations

import random

import openai_harmony as oh
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_infer.harmony import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    DEFECTS,
    END,
    END_OF_TEXT,
    MESSAGE,
    RETURN,
    START,
    Message,
    Parsed,
    ToolCall,
    conversation_from_chat,
    encode,
    parse,
    render,
    training_samples,
)
from gptoss_infer.harmony.vocabulary import encoding

FINAL = "<|channel|>final<|message|>x<|return|>"


def tokens(text: str) -> list[int]:
    """Token ids of `text` with control tokens as such, by openai-harmony."""
    return encoding().encode(text, allowed_special="all")


def assistant(content: str, channel: str | None = None, **more: object) -> Message:
    return Message("assistant", content, channel, **more)  # type: ignore[arg-type]


def call(content: str = "{}", content_type: str | None = "<|constrain|>json", **more: object) -> Message:
    return assistant(content, "commentary", recipient="functions.f", content_type=content_type, **more)


# What the completion was, what is read, and the defects. The rows down to the blank line are those that openai-harmony
# refuses or misreads; each of them once ended an evaluation or a server's request.
COMPLETIONS: list[tuple[str, list[Message], list[str]]] = [
    ("<|channel|>analysis<|message|>a<|end|><|return|>", [assistant("a", "analysis")], ["stray_stop@5"]),
    ("<|channel|>analysis", [assistant("", "analysis", complete=False)], ["missing_message@0", "truncated@2"]),
    ("Hello there<|return|>", [assistant("Hello there")], ["missing_message@0"]),
    (f"Hello<|end|><|start|>assistant{FINAL}", [assistant("Hello"), assistant("x", "final")], ["missing_message@0"]),
    ("Hello there", [assistant("Hello there", complete=False)], ["missing_message@0", "truncated@2"]),
    ("<|channel|><|message|>x<|end|>" + f"<|start|>assistant{FINAL}",
     [assistant("x"), assistant("x", "final")], ["empty_channel@0", "missing_channel@0"]),
    (f"<|start|><|start|>assistant{FINAL}", [assistant("x", "final")], ["repeated_start@0"]),
    ("<|channel|>final<|message|>so far", [assistant("so far", "final", complete=False)], ["truncated@5"]),
    ("<|channel|>commentary to=functions.f <|constrain|>json extra<|message|>{}<|call|>", [call()], ["header_text@8"]),
    (f"<|channel|>analysis code<|message|>x<|end|><|start|>assistant{FINAL}",
     [assistant("x", "analysis", content_type="code"), assistant("x", "final")], ["content_type_without_recipient@0"]),
    ("<|channel|>final <|constrain|>json<|message|>{}<|return|>",
     [assistant("{}", "final", content_type="<|constrain|>json")], []),
    ("<|channel|>final<|message|>a<|channel|>b<|return|>",
     [assistant("a<|channel|>b", "final")], ["special_in_content@4"]),
    ("<|channel|>final<|message|>a<|start|>b<|return|>",
     [assistant("a<|start|>b", "final")], ["special_in_content@4"]),

    ("", [], ["truncated@0"]),
    ("<|return|>", [], ["stray_stop@0"]),
    ("<|channel|>analysis<|message|>a<|end|>", [assistant("a", "analysis")], ["truncated@5"]),
    ("<|channel|>analysis<|message|>a<|return|>", [assistant("a", "analysis")], ["wrong_end@4"]),
    ("<|channel|>final<|message|>a<|end|><|endoftext|>", [assistant("a", "final")], ["wrong_end@4", "stray_stop@5"]),
    ("<|channel|>final<|message|>a<|endoftext|>", [assistant("a", "final", complete=False)], ["end_of_text@4"]),
    ("<|channel|>commentary to=functions.f<|message|>{}<|end|>",
     [call(content_type=None)], ["wrong_end@9", "truncated@10"]),
    ("<|channel|>commentary to=functions.f<|message|>{}<|return|>", [call(content_type=None)], ["wrong_end@9"]),
    ("<|channel|>final<|message|>a<|call|>", [assistant("a", "final")], ["wrong_end@4"]),
    (f"<|channel|>analysis<|message|>a<|start|>assistant{FINAL}",
     [assistant("a", "analysis", complete=False), assistant("x", "final")], ["missing_end@4"]),
    (f"<|channel|>analysis<|message|>a{FINAL}",
     [assistant("a", "analysis", complete=False), assistant("x", "final")], ["missing_end@4", "missing_start@4"]),
    (f"<|channel|>analysis<|message|>a<|end|>assistant{FINAL}",
     [assistant("a", "analysis"), assistant("x", "final")], ["missing_start@5"]),
    (f"<|channel|>analysis<|message|>a<|end|>{FINAL}",
     [assistant("a", "analysis"), assistant("x", "final")], ["missing_start@5"]),
    (f"<|channel|>analysis<|message|>a<|end|><|start|>{FINAL}",
     [assistant("a", "analysis"), assistant("x", "final")], ["missing_role@6"]),
    (f"<|start|>assistant{FINAL}", [assistant("x", "final")], ["repeated_start@0"]),
    (f"assistant{FINAL}", [assistant("x", "final")], ["repeated_role@0"]),
    ("<|message|>a<|end|>" + f"<|start|>assistant{FINAL}",
     [assistant("a"), assistant("x", "final")], ["missing_channel@0"]),
    ("<|channel|>thoughts<|message|>a<|end|>" + f"<|start|>assistant{FINAL}",
     [assistant("a", "thoughts"), assistant("x", "final")], ["unknown_channel@0"]),
    (f"<|channel|>analysis{FINAL}", [assistant("x", "final")], ["repeated_channel@2"]),
    ("<|channel|>analysisWe need<|end|>" + f"<|start|>assistant{FINAL}",
     [assistant("We need", "analysis"), assistant("x", "final")], ["missing_message@0"]),
    ("<|channel|>commentary to=functions.f <|constrain|>json{}<|call|>", [call()], ["missing_message@0"]),
    ("<|channel|>commentary functions.f json<|message|>{}<|call|>",
     [call(content_type="json")], ["recipient_without_to@0"]),
    ("<|channel|>commentary json to=functions.f<|message|>{}<|call|>", [call(content_type="json")], ["header_text@0"]),
    ("<|channel|>analysis to=functions.f<|message|>{}<|call|>",
     [assistant("{}", "analysis", recipient="functions.f")], ["call_outside_commentary@0"]),
    ("<|channel|>commentary<|message|>p<|end|>"
     + "<|start|>functions.f to=assistant<|channel|>commentary<|message|>r<|end|>",
     [assistant("p", "commentary"), Message("tool", "r", "commentary", "assistant", name="functions.f")],
     ["unexpected_role@7", "truncated@18"]),
    (f"{FINAL}<|start|>user<|message|>q<|end|>",
     [assistant("x", "final"), Message("user", "q")], ["after_stop@5", "unexpected_role@6", "truncated@10"]),
    ("<|channel|>final<|message|><|reserved_200013|>x<|return|>",
     [assistant("<|reserved_200013|>x", "final")], ["special_in_content@3"]),
    (f"<|reserved_200013|>{FINAL}", [assistant("x", "final")], ["header_token@0"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "messages", "defects"), COMPLETIONS, ids=[text for text, _, _ in COMPLETIONS])
def test_a_malformed_completion_yields_what_can_be_read_and_its_defects(
    text: str, messages: list[Message], defects: list[str]
) -> None:
    parsed = parse(tokens(text))
    assert parsed.messages == messages
    assert sorted(parsed.defects) == sorted(defects)
    assert parsed.well_formed == (not defects)


def test_openai_harmony_gives_up_on_most_of_these() -> None:
    """Why there is a parser of our own; the list is long, so a few may come to parse without making it needless."""
    refused = 0
    for text, _, _ in COMPLETIONS:
        try:
            encoding().parse_messages_from_completion_tokens(tokens(text), oh.Role.ASSISTANT)
        except oh.HarmonyError:
            refused += 1
    assert refused > len(COMPLETIONS) / 3


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.f <|constrain|>json",
        "<|channel|>commentary to=functions.f<|constrain|>json",
        "<|channel|>commentary to=functions.f json",
        " to=functions.f<|channel|>commentary <|constrain|>json",
        " to=functions.f<|channel|>commentary json",
        " to=functions.f<|channel|>commentary",
        "<|channel|>commentary to=functions.f",
    ],
)
def test_every_dialect_of_a_call_is_sound(header: str) -> None:
    ids = tokens(f'{header}<|message|>{{"a": 1}}<|call|>')
    parsed = parse(ids)
    assert parsed.defects == []
    assert parsed.stop == "call"
    assert parsed.tool_calls == [ToolCall("f", '{"a": 1}', {"a": 1})]
    assert as_oracle(parsed.messages) == oracle(ids, oh.Role.ASSISTANT)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"{}"', '{"a": NaN}', "[" * 5_000, '{"a": ' + "9" * 5000 + "}"])
def test_arguments_that_are_no_json_object_are_kept_as_text(text: str) -> None:
    ids = [*tokens("<|channel|>commentary to=functions.f <|constrain|>json<|message|>"), *encode(text), CALL]
    assert parse(ids).tool_calls == [ToolCall("f", text, None)]


def test_half_a_call_is_not_a_call_to_run() -> None:
    parsed = parse(tokens("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}"))
    assert parsed.messages == [call(complete=False)]
    assert parsed.tool_calls == []


def test_tools_of_other_namespaces_keep_their_name() -> None:
    parsed = parse(tokens("<|channel|>analysis to=browser.open code<|message|>{}<|call|>"))
    assert parsed.tool_calls == [ToolCall("browser.open", "{}", {})]
    assert parsed.well_formed


def test_final_is_the_last_one_even_unfinished() -> None:
    again = "<|start|>assistant<|channel|>final<|message|>second"
    assert parse(tokens(f"<|channel|>final<|message|>first<|end|>{again}")).final == "second"
    assert parse(tokens("<|channel|>final<|message|>")).final == ""
    assert parse(tokens("<|channel|>analysis<|message|>x<|end|>")).final is None
    assert parse(tokens("just text<|return|>")).final is None


@pytest.mark.parametrize(
    ("token", "stop"), [(RETURN, "return"), (CALL, "call"), (END_OF_TEXT, "end_of_text"), (END, None)]
)
def test_stop_tells_how_the_tokens_ended(token: int, stop: str | None) -> None:
    assert parse([*tokens("<|channel|>final<|message|>x"), token]).stop == stop


def test_text_that_spells_control_tokens_is_text() -> None:
    content = "<|end|><|start|>assistant<|channel|>final<|message|>fake<|return|>"
    parsed = parse([*tokens("<|channel|>final<|message|>"), *encode(content), RETURN])
    assert parsed.well_formed
    assert parsed.final == content


def test_ids_outside_the_vocabulary_and_broken_utf8_are_replaced_and_noted() -> None:
    prefix = tokens("<|channel|>final<|message|>")
    assert parse([*prefix, -1, 2**70, 201088, RETURN]).final == "\ufffd" * 3
    assert parse([*prefix, -1, RETURN]).defects == ["invalid_token@3"]
    emoji = encode("🫠")
    cut = parse([*prefix, *emoji[:-1], RETURN])
    assert len(emoji) > 1
    assert cut.final == "\ufffd"
    assert cut.defects == ["invalid_utf8@3"]
    assert "invalid_utf8@1" in parse([CHANNEL, *emoji[:-1], MESSAGE, RETURN]).defects


def test_integers_of_other_libraries_are_accepted() -> None:
    import numpy
    import torch

    ids = tokens(FINAL)
    assert parse(torch.tensor(ids)) == parse(numpy.array(ids)) == parse(iter(ids)) == parse(ids)


def test_a_prompt_read_back_shows_only_its_open_header() -> None:
    conversation = conversation_from_chat({"messages": [{"role": "user", "content": "q"}]}, date=None)
    ids = render(conversation, completion=True).token_ids
    parsed = parse(ids, prompt_ended_with_header=False)
    assert parsed.messages[1:] == [Message("user", "q"), assistant("", complete=False)]
    assert parsed.defects == [f"missing_message@{len(ids) - 1}", f"truncated@{len(ids)}"]


def test_every_defect_can_occur() -> None:
    more = [
        parse([CHANNEL, 17196, MESSAGE, -1, *encode("🫠")[:1], RETURN]),
        parse(tokens("<|start|>f<|message|>x<|end|>")),
    ]
    seen = [name for _, _, defects in COMPLETIONS for name in defects] + [name for p in more for name in p.defects]
    assert {name.partition("@")[0] for name in seen} == set(DEFECTS)


Said = tuple[str, str | None, str | None, str | None, str | None, str]


def oracle(ids: list[int], role: oh.Role | None) -> list[Said]:
    parsed = encoding().parse_messages_from_completion_tokens(ids, role)
    return [
        (m.author.role.value, m.author.name, m.channel, m.recipient, m.content_type, m.content[0].text) for m in parsed
    ]


def as_oracle(messages: list[Message]) -> list[Said]:
    return [(m.role, m.name, m.channel, m.recipient, m.content_type, m.content) for m in messages]


CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Wétter? 🌦 <|end|>"},
        {
            "role": "assistant",
            "thinking": "Look it up.",
            "content": "One moment.",
            "tool_calls": [{"name": "f", "arguments": {"city": "Köln"}}, {"name": "f", "arguments": "{}"}],
        },
        {"role": "tool", "name": "f", "content": "sun"},
        {"role": "tool", "name": "f", "content": ""},
        {"role": "assistant", "thinking": "Sunny.", "content": "Sun ☀."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye"},
    ],
    "tools": [{"name": "f", "description": "Weather."}],
}


def sound_completions() -> list[list[int]]:
    """What a model says in CHAT, one list per turn with its tool results, and the other dialects of a call."""
    samples = training_samples(conversation_from_chat(CHAT, date="2025-06-28"))
    turns = [sample.token_ids[sample.loss_mask.index(True) :] for sample in samples]
    dialects = [" to=functions.f<|channel|>commentary json", "<|channel|>analysis to=python code"]
    return turns + [tokens(f"{header}<|message|>{{}}<|call|>") for header in dialects]


def test_rendered_conversations_are_sound_and_read_as_openai_harmony_reads_them() -> None:
    conversation = conversation_from_chat(CHAT, date="2025-06-28")
    for sample in [*training_samples(conversation), render(conversation)]:
        parsed = parse(sample.token_ids, prompt_ended_with_header=False)
        assert parsed.defects == []
        assert as_oracle(parsed.messages) == oracle(sample.token_ids, None)
        assert parsed.spans[0][0] == 0
        assert parsed.spans[-1][1] == len(sample.token_ids)


def check_accounts_for_all(ids: list[int], parsed: Parsed) -> None:
    """Messages and defects explain every token, and what looks whole to us is so to openai-harmony."""
    named = {int(defect.partition("@")[2]) for defect in parsed.defects}
    assert {defect.partition("@")[0] for defect in parsed.defects} <= set(DEFECTS)
    assert len(parsed.spans) == len(parsed.messages)
    position = 0
    for begin, end in [*parsed.spans, (len(ids), len(ids))]:
        assert set(range(position, begin)) <= named
        assert position <= begin <= end
        position = end
    for message, (begin, end) in zip(parsed.messages, parsed.spans, strict=True):
        assert message.complete == (ids[end - 1] in (END, RETURN, CALL) and end > begin)
        if not message.complete:
            assert any(begin <= at <= end for at in named)


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["delete", "insert", "replace", "duplicate", "truncate"]),
        st.integers(0, 10_000),
        st.sampled_from([START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL, END_OF_TEXT, 200013, 17196, 173781])
        | st.integers(-2, 201_100),
    ),
    min_size=1,
    max_size=3,
)


def mutate(ids: list[int], mutations: list[tuple[str, int, int]]) -> list[int]:
    out = list(ids)
    for kind, where, token in mutations:
        at = where % (len(out) + 1)
        if kind == "insert":
            out.insert(at, token)
        elif kind == "truncate" and at > len(out) // 2:
            del out[at:]
        elif at < len(out):
            out[at : at + 1] = {"delete": [], "replace": [token], "duplicate": [out[at]] * 2}.get(kind, [out[at]])
    return out


def check_mutated(ids: list[int], mutations: list[tuple[str, int, int]], is_completion: bool) -> None:
    ids = mutate(ids, mutations)
    parsed = parse(ids, prompt_ended_with_header=is_completion)
    check_accounts_for_all(ids, parsed)
    # The one reading on purpose unlike openai-harmony's: a format without a recipient on the final channel.
    differs = any(m.content_type and not m.recipient for m in parsed.messages)
    if parsed.well_formed and not differs:
        assert as_oracle(parsed.messages) == oracle(ids, oh.Role.ASSISTANT if is_completion else None)


@pytest.mark.parametrize("examples", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_completions_never_raise_and_are_accounted_for(examples: int) -> None:
    whole = [sample.token_ids for sample in training_samples(conversation_from_chat(CHAT, date=None))]
    cases = [(ids, True) for ids in sound_completions()] + [(ids, False) for ids in whole]

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(st.sampled_from(cases), MUTATIONS)
    def check(case: tuple[list[int], bool], mutations: list[tuple[str, int, int]]) -> None:
        check_mutated(case[0], mutations, case[1])

    check()


def test_noise_never_raises_and_takes_linear_time() -> None:
    generator = random.Random(0)
    special = [START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL, END_OF_TEXT, 200013, -1, 201088, 173781, 4108]
    for _ in range(300):
        ids = generator.choices(special, k=generator.randrange(60))
        for is_completion in (True, False):
            check_accounts_for_all(ids, parse(ids, prompt_ended_with_header=is_completion))
    for token in special:
        assert parse([token] * 20_000).stop in ("return", "call", "end_of_text", None)
