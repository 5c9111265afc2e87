"""What is said to an OpenAI-compatible server and how its answers are read, down to token ids. Pure: no network here.

Two modes. `raw` (/completions) sends our own prompt tokens, so the server adds nothing and parses nothing. `chat`
(/chat/completions) sends messages: the server renders the prompt and takes the answer apart; where it does not also
return token ids, they are put together again from the parts. `remote` finds out which mode a server can do.

Fields beyond OpenAI's are those of vLLM (return_token_ids, skip_special_tokens, spaces_between_special_tokens,
stop_token_ids, repetition_penalty), SGLang (the same, and no_stop_trim) and llama.cpp (return_tokens and verbose, which
put the ids under `__verbose`; repeat_penalty); servers ignore those of the others, or refuse them, and then the next of
`EXTRAS` is tried.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from gptoss_infer.client import ServerError
from gptoss_infer.engine import Completion, FinishReason, SamplingParams
from gptoss_infer.errors import UsageError
from gptoss_infer.harmony import CALL, RETURN, Message, decode, parse, render_answer
from gptoss_infer.harmony.conversation import FUNCTIONS, JSON_CONTENT
from gptoss_infer.harmony.vocabulary import encoding

Mode = Literal["raw", "chat"]
MODES: tuple[Mode, ...] = ("raw", "chat")
Chat = Mapping[str, Any]  # a record as `harmony.conversation_from_chat` reads it: messages, tools, reasoning_effort

# Servers have defaults of their own for what is not said: llama.cpp keeps the likeliest 40, its Python server also
# punishes repetition. How "off" is written differs: SGLang refuses top_k 0, llama-cpp-python -1.
_OFF: Final = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
_IDS: Final = {"return_token_ids": True, "return_tokens": True, "verbose": True}
_TEXT: Final = {"skip_special_tokens": False, "spaces_between_special_tokens": False, "no_stop_trim": True}
Extras = Literal["all", "top_k 0", "both efforts", "template's effort", "none"]
EXTRAS: Final[Mapping[Extras, Mapping[str, Any]]] = {
    "all": _OFF | _IDS,
    "top_k 0": _OFF | _IDS | {"top_k": 0},
    # Without these, there is still the choice of where to say the effort.
    "both efforts": {},
    "template's effort": {},
    "none": {},
}
_NUM_SEEDS = 2**32 - 1  # llama.cpp keeps 32 bits, the largest of which stands for a random seed

_FINISH: Final[Mapping[str, FinishReason]] = {
    "stop": "stop", "eos": "stop", "tool_calls": "stop", "function_call": "stop",
    "length": "length", "max_tokens": "length", "abort": "cancelled", "cancelled": "cancelled",
}  # fmt: skip


@dataclass(frozen=True)
class Dialect:
    """How a server is asked, and what its answers hold."""

    mode: Mode
    prompt: Literal["ids", "text", "messages"]
    extras: Extras
    tokens: Literal["ids", "text", "parts"]  # the ids themselves; text with control tokens; an answer taken apart

    def __str__(self) -> str:
        sent = {"ids": "token ids", "text": "text with control tokens", "messages": "messages"}
        got = {
            "ids": "token ids",
            "text": "text with control tokens, which is encoded again",
            "parts": "the parts that the server read, of which the tokens are put together",
        }
        limits = "" if EXTRAS[self.extras] else "; takes OpenAI's own fields alone, so its own top_k and min_p apply"
        return f"{self.mode} mode: prompts go as {sent[self.prompt]}, answers come as {got[self.tokens]}{limits}"


@dataclass(frozen=True)
class RemoteCompletion(Completion):
    """A completion from a server, where its tokens come from (see `Dialect`), and what was done to them.

    The counts are the server's own, None where it gives none. `remarks` are names from REMARKS.
    """

    source: Literal["ids", "text", "parts"]
    prompt_tokens: int | None
    completion_tokens: int | None
    remarks: tuple[str, ...]


REMARKS: Final[Mapping[str, str]] = {
    "stop_added": "ended by a stop token that the server does not return; it was added as the last message demands",
    "past_stop": "went on behind a stop token; cut there",
    "past_limit": "went on behind max_tokens; cut there",
    "recoded": "has another number of tokens than the server counted: its text is the same, its token ids may differ",
}


def completion_body(
    dialect: Dialect, model: str, prompt: Sequence[int], params: SamplingParams, sample: int
) -> dict[str, Any]:
    """What asks /completions for one sample of a prompt.

    Raises: UsageError for a prompt whose text would be read as other tokens, where the server takes text alone.
    """
    body = _body(dialect, model, params, sample)
    if EXTRAS[dialect.extras]:
        body |= _TEXT | {"stop_token_ids": list(params.stop_token_ids)}
    if params.logprobs:
        body["logprobs"] = 1
    if dialect.prompt == "ids":
        return body | {"prompt": list(prompt)}
    text = decode(prompt)
    if encoding().encode(text, allowed_special="all") != list(prompt):
        raise UsageError(
            "this server takes prompts as text, and this one's text stands for other tokens than its own (such as a "
            "user's words that spell a control token); ask a server that takes token ids, or in chat mode"
        )
    return body | {"prompt": text}


def chat_body(dialect: Dialect, model: str, chat: Chat, params: SamplingParams, sample: int) -> dict[str, Any]:
    """What asks /chat/completions for one sample of a conversation."""
    body = _body(dialect, model, params, sample) | {"messages": [_message(m) for m in chat["messages"]]}
    effort = chat.get("reasoning_effort")
    if effort is not None and dialect.extras != "template's effort":
        body["reasoning_effort"] = effort
    if effort is not None and dialect.extras != "none":
        body["chat_template_kwargs"] = {"reasoning_effort": effort}
    if params.logprobs:
        body["logprobs"] = True
    if chat.get("tools"):
        body["tools"] = [_tool(tool) for tool in chat["tools"]]
    return body


def _body(dialect: Dialect, model: str, params: SamplingParams, sample: int) -> dict[str, Any]:
    if params.constraint is not None:
        raise UsageError("a constraint cannot be given to a server; leave it out, or generate with a checkpoint here")
    if params.adapter is not None:
        raise UsageError(f"adapter {params.adapter!r} cannot be given to a server; name the model that serves it")
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": (params.seed + sample) % _NUM_SEEDS,
        **EXTRAS[dialect.extras],
    }
    wanted = {name: value for name, value in (("top_k", params.top_k), ("min_p", params.min_p)) if value}
    if wanted and not EXTRAS[dialect.extras]:
        raise UsageError(f"this server takes OpenAI's own fields alone, so not {' and '.join(wanted)}")
    return body | wanted


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of a chat record as servers read it; reasoning has two names there."""
    fields = {key: value for key, value in message.items() if value is not None}
    thinking = fields.pop("thinking", None)
    if thinking:
        fields |= {"reasoning": thinking, "reasoning_content": thinking}
    calls = fields.get("tool_calls")
    if calls:
        fields["tool_calls"] = [_call(call, f"call_{number}") for number, call in enumerate(calls)]
    return {"content": None} | fields


def _call(call: Mapping[str, Any], default_id: str) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments") or "{}"
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    named = {"name": str(function["name"]).removeprefix(FUNCTIONS), "arguments": arguments}
    return {"id": call.get("id") or default_id, "type": "function", "function": named}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {key: value for key, value in tool.get("function", tool).items() if value is not None and key != "type"}
    return {"type": "function", "function": function}


def read_completion(
    answer: Mapping[str, Any], dialect: Dialect, prompt_index: int, sample: int, params: SamplingParams
) -> RemoteCompletion:
    """The completion in an answer of either endpoint.

    Raises: ServerError for an answer that lacks what the dialect says it holds, or did not come to an end.
    """
    choice = first_choice(answer)
    finish, usage = _finish(choice), answer.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    counted = _count(counts, "completion_tokens")
    logprobs = _logprobs(choice) if params.logprobs else None
    remarks: list[str] = []
    if dialect.tokens == "parts":
        ids, finish = _put_together(choice, finish), finish or "length"
        if counted is not None and counted > params.max_tokens:
            remarks.append("past_limit")
    else:
        sampled = token_ids(answer) if dialect.tokens == "ids" else _encoded(choice)
        if sampled is None:
            raise ServerError("the answer has no token ids, though the server returned them before")
        # The server may count a stop token that its text leaves out.
        if counted is not None and counted - len(sampled) not in ((0, 1) if finish == "stop" else (0,)):
            remarks.append("recoded")
        ids, finish = _end(sampled, finish, params, choice, remarks)
    if logprobs is not None and len(logprobs) < len(ids):
        raise ServerError(f"asked for log-probabilities, the server returned {len(logprobs)} for {len(ids)} tokens")
    return RemoteCompletion(
        prompt_index, sample, ids, logprobs and logprobs[: len(ids)], finish, dialect.tokens,
        _count(counts, "prompt_tokens"), counted, tuple(remarks),
    )  # fmt: skip


def first_choice(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The first choice of an answer; ServerError where it has none, as an error sent with status 200."""
    choices = answer.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    shown = json.dumps(answer.get("error") or answer, ensure_ascii=False)
    raise ServerError(f"the server answered without choices: {shown[:300]}", 200)


def token_ids(answer: Mapping[str, Any]) -> list[int] | None:
    """The ids that were sampled, where the server returns them."""
    choice, verbose = first_choice(answer), answer.get("__verbose")
    for ids in (choice.get("token_ids"), verbose.get("tokens") if isinstance(verbose, dict) else None):
        if isinstance(ids, list) and ids and all(isinstance(token, int) for token in ids):
            return ids
    return None


def prompt_ids(answer: Mapping[str, Any]) -> list[int] | None:
    """The ids of the prompt that the server read, where it returns them or, as llama.cpp does, their text."""
    choice, verbose = first_choice(answer), answer.get("__verbose")
    for ids in (choice.get("prompt_token_ids"), answer.get("prompt_token_ids")):
        if isinstance(ids, list) and ids and all(isinstance(token, int) for token in ids):
            return ids
    text = verbose.get("prompt") if isinstance(verbose, dict) else None
    return encoding().encode(_clean(text), allowed_special="all") if isinstance(text, str) else None


def prompt_count(answer: Mapping[str, Any]) -> int | None:
    """How many tokens the server says the prompt had."""
    usage = answer.get("usage")
    return _count(usage, "prompt_tokens") if isinstance(usage, dict) else None


def answer_text(choice: Mapping[str, Any]) -> str:
    """The text of a choice of /completions."""
    text = choice.get("text")
    if not isinstance(text, str):
        raise ServerError(f"the answer's text is {text!r:.60}; expected a string")
    return _clean(text)


def _encoded(choice: Mapping[str, Any]) -> list[int]:
    return encoding().encode(answer_text(choice), allowed_special="all")


def _put_together(choice: Mapping[str, Any], finish: FinishReason | None) -> list[int]:
    """The tokens of an answer that a server took apart: reasoning, text, calls."""
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ServerError(f"the answer's message is {message!r:.60}; expected an object")
    if finish is None:
        raise ServerError("the answer has no finish_reason, so it may have broken off")
    reasoning, content = (
        next((_clean(message[key]) for key in keys if isinstance(message.get(key), str) and message[key]), "")
        for keys in (("reasoning", "reasoning_content", "thinking"), ("content",))
    )
    calls = [_call_message(call) for call in message.get("tool_calls") or ()]
    messages = [Message("assistant", reasoning, channel="analysis")] if reasoning else []
    if content:
        messages.append(Message("assistant", content, channel="commentary" if calls else "final"))
    messages += calls
    if messages and finish != "stop":
        messages[-1] = replace(messages[-1], complete=False)
    return render_answer(messages)


def _call_message(call: object) -> Message:
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get(key) if isinstance(function, dict) else None for key in ("name", "arguments"))
    if not isinstance(name, str) or not name:
        raise ServerError(f"a tool call is {call!r:.100}; expected a function with a name")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    recipient = FUNCTIONS + _clean(name).removeprefix(FUNCTIONS)
    return Message("assistant", _clean(text), "commentary", recipient, JSON_CONTENT)


def _finish(choice: Mapping[str, Any]) -> FinishReason | None:
    reason = choice.get("finish_reason")
    if reason is None:
        return None
    if not isinstance(reason, str) or reason not in _FINISH:
        raise ServerError(f"the server ended the answer with finish_reason {reason!r}; expected {', '.join(_FINISH)}")
    return _FINISH[reason]


def _end(
    ids: list[int], finish: FinishReason | None, params: SamplingParams, choice: Mapping[str, Any], remarks: list[str]
) -> tuple[list[int], FinishReason]:
    """The ids as the engine would have ended them, and why they ended.

    Tokens are sampled from left to right, so those in front of a stop token or the limit are the same whether or not
    the server ended there.
    """
    stop = next((i for i, token in enumerate(ids) if token in params.stop_token_ids), None)
    if stop is not None and stop < params.max_tokens:
        if stop + 1 < len(ids):
            remarks.append("past_stop")
        return ids[: stop + 1], "stop"
    if len(ids) > params.max_tokens:
        remarks.append("past_limit")
        return ids[: params.max_tokens], "length"
    if finish is None and len(ids) < params.max_tokens:
        raise ServerError(f"the answer broke off after {len(ids)} tokens without a finish_reason")
    if finish == "stop":
        remarks.append("stop_added")
        return [*ids, _stop_token(ids, choice)], "stop"
    return ids, finish or "length"


def _stop_token(ids: list[int], choice: Mapping[str, Any]) -> int:
    """The token that ended the answer: the one the server names, or the one that its last message ends in."""
    for named in (choice.get("stop_reason"), choice.get("matched_stop")):
        if isinstance(named, int) and not isinstance(named, bool):
            return named
    messages = parse(ids).messages
    return CALL if messages and messages[-1].is_call else RETURN


def _logprobs(choice: Mapping[str, Any]) -> list[float]:
    """Log-probabilities of the sampled tokens, in OpenAI's old shape or its new one, which llama.cpp uses."""
    found = choice.get("logprobs")
    if isinstance(found, dict):
        values = found.get("token_logprobs")
        if not isinstance(values, list):
            content = found.get("content")
            values = [entry.get("logprob") for entry in content] if isinstance(content, list) else []
        if values and all(isinstance(value, (int, float)) for value in values):
            return [float(value) for value in values]
    raise ServerError("asked for log-probabilities, the server returned none")


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _clean(text: str) -> str:
    """Text that can be encoded: half of a surrogate pair, which JSON can spell, becomes U+FFFD."""
    return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
