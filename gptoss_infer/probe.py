"""What an OpenAI-compatible server does otherwise than the engine: rendering, stops, limits, seeds, effort, tokens.

Asks a few dozen short questions, in the way that `remote.RemoteEngine` would, and compares the answers with what the
engine would do; with a checkpoint at hand also token by token. Used by `gptoss-infer probe`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from gptoss_infer import harmony
from gptoss_infer.client import Client, Server, ServerError
from gptoss_infer.dialect import (
    EXTRAS,
    Chat,
    Dialect,
    Mode,
    RemoteCompletion,
    prompt_count,
    prompt_ids,
    read_completion,
)
from gptoss_infer.engine import Engine, SamplingParams
from gptoss_infer.errors import UsageError
from gptoss_infer.harmony import CALL, CHANNEL, MESSAGE, RETURN
from gptoss_infer.remote import Found, RemoteEngine, discover

Status = Literal["ok", "differs", "unknown"]
CONCURRENCY = 4
GREEDY_TOKENS = 48
NUM_SEEDS, SEED_TOKENS = 6, 24
NATURAL_TOKENS = 512  # in which a model at low effort answers a question, or calls a tool
# Logits between 16 and 32 are 0.125 apart in bf16, and llama.cpp rounds activations to 8 bits on a CPU, which parted at
# 0.28 where its unrounded weights did not part: a token that wins by less may lose elsewhere.
ROUNDING_NATS = 0.5
FILTER_TOKENS = 40  # llama.cpp's and Ollama's top_k where none is asked for
FILTER_DRAWS = 24

QUESTION: Chat = {
    "messages": [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    "reasoning_effort": "low",
}
TOOL_QUESTION: Chat = {
    "messages": [{"role": "user", "content": "What is the weather in Paris? Use the tool."}],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather in a city.",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            },
        }
    ],
    "reasoning_effort": "low",
}
LONG_QUESTION: Chat = {  # longer than the window of 128 tokens
    "messages": [{"role": "user", "content": f"How many words are in this list? {'one two three four five ' * 40}"}],
    "reasoning_effort": "medium",
}


@dataclass(frozen=True)
class Check:
    """One finding. `meaning` says what follows from it; `required` whether evaluations rely on its being ok."""

    name: str
    status: Status
    finding: str
    meaning: str = ""
    required: bool = False

    @property
    def failed(self) -> bool:
        """Whether evaluations by this server would be wrong."""
        return self.required and self.status == "differs"


class _Result(NamedTuple):
    status: Status
    finding: str
    meaning: str = ""
    required: bool = True


def probe(server: Server, model: str, *, mode: Mode | None = None, ours: Engine | None = None) -> Iterator[Check]:
    """Yield the findings, one after the other.

    Args:
        mode: the one to ask in; None for what `RemoteEngine.connect` would choose.
        ours: an engine with the checkpoint that the server is said to run, to compare tokens with.
    Raises: ServerError if the server cannot be reached, is overloaded or wants a key.
    """
    found: dict[Mode, Found] = {"raw": discover(server, model, "raw"), "chat": discover(server, model, "chat")}
    wanted: Sequence[Mode] = ("raw", "chat") if mode is None else (mode,)
    dialect = next((found[one].dialect for one in wanted if found[one].dialect is not None), None)
    yield _mode_check("raw", found["raw"], required="raw" in wanted and dialect is None)
    yield _mode_check("chat", found["chat"], required="chat" in wanted and dialect is None)
    if dialect is None:
        return
    asker = _Asker(server, model, dialect)
    if found["chat"].dialect is not None:
        chat = _Asker(server, model, found["chat"].dialect)
        yield _run("chat: rendering", lambda: _rendering(chat, QUESTION), relied_on=False)
        yield _run("chat: rendering of tools", lambda: _rendering(chat, TOOL_QUESTION), relied_on=False)
        yield _run("chat: reasoning effort", lambda: _effort(chat), relied_on=dialect.mode == "chat")
    yield _run(f"{dialect.mode}: stops at <|return|>", lambda: _stops(asker, RETURN, QUESTION))
    yield _run(f"{dialect.mode}: stops at <|call|>", lambda: _stops(asker, CALL, TOOL_QUESTION))
    yield _run(f"{dialect.mode}: max_tokens", lambda: _limit(asker))
    yield _run(f"{dialect.mode}: temperature 0 repeats", lambda: _greedy(asker), relied_on=False)
    yield _run(f"{dialect.mode}: a seed repeats", lambda: _same_seed(asker), relied_on=False)
    yield _run(f"{dialect.mode}: seeds differ", lambda: _other_seeds(asker))
    yield _run(f"{dialect.mode}: log-probabilities", lambda: _logprobs(asker), relied_on=False)
    if ours is not None:
        yield _run("our greedy tokens", lambda: _our_tokens(asker, ours))
        yield _run("our distribution", lambda: _our_distribution(asker, ours))


def lines(check: Check) -> Iterator[str]:
    """Yield a finding as text."""
    yield f"{check.status:<8} {check.name:<28} {check.finding}"
    if check.meaning:
        yield f"{'':<37} {'evaluations rely on it: ' if check.failed else ''}{check.meaning}"


class _Asker:
    """Asks chat records in one dialect."""

    def __init__(self, server: Server, model: str, dialect: Dialect) -> None:
        self.engine = RemoteEngine(server, model, dialect, concurrency=CONCURRENCY, notify=lambda _: None)
        self.mode = dialect.mode

    def completions(self, chat: Chat, params: SamplingParams) -> list[RemoteCompletion]:
        """The n samples of a record."""
        return list(self.engine.generate([rendered(chat)], params, [chat]))

    def ids(self, chat: Chat, params: SamplingParams) -> list[int]:
        """The tokens of one sample."""
        return self.completions(chat, params)[0].token_ids

    def answer(self, chat: Chat, params: SamplingParams, **fields: Any) -> dict[str, Any]:
        """The server's whole answer."""
        return self.engine.request(Client(self.engine.server), rendered(chat), params, chat, **fields)


def rendered(chat: Chat, date: str | None = None) -> list[int]:
    """Our prompt of a chat record."""
    return harmony.render(harmony.conversation_from_chat(chat, date=date), completion=True).token_ids


def _mode_check(mode: Mode, found: Found, *, required: bool) -> Check:
    if found.dialect is not None:
        return Check(f"{mode} mode", "ok", str(found.dialect).removeprefix(f"{mode} mode: "))
    meanings = {
        "raw": "the server's own template and parser are in every result, and dates and forced headers cannot be sent",
        "chat": "only our own prompts can be asked",
    }
    return Check(f"{mode} mode", "differs", found.reason, meanings[mode], required)


def _run(name: str, check: Callable[[], _Result], *, relied_on: bool = True) -> Check:
    try:
        status, finding, meaning, required = check()
    except (ServerError, UsageError) as error:
        status, finding, meaning, required = "differs", str(error), "such requests fail", True
    return Check(name, status, finding, meaning, required and relied_on)


def _rendering(chat: _Asker, record: Chat) -> _Result:
    """Compare the prompt that the server renders with ours, by its tokens or at least by their number."""
    answer = chat.answer(record, SamplingParams(max_tokens=1))
    ids, count = prompt_ids(answer), prompt_count(answer)
    line = f"with the line Current date: {datetime.date.today().isoformat()}"
    daily = "the prompt changes every day, and with it the answers"
    ours, dated = rendered(record), rendered(record, datetime.date.today().isoformat())
    if ids is not None:
        if ids == ours:
            return _Result("ok", f"our {len(ours)} tokens")
        if ids == dated:
            return _Result("differs", f"ours {line}", daily)
        has_date = _common(dated, ids) > _common(ours, ids)
        finding = _first_difference(dated if has_date else ours, ids)
        return _Result("differs", f"{finding}{f', {line}' if has_date else ''}", "scores are those of another prompt")
    if count is None:
        return _Result("unknown", "the server tells neither its prompt nor the number of its tokens")
    if count == len(ours):
        return _Result("ok", f"as many tokens as ours ({count}); which ones is not told")
    if count == len(dated):
        return _Result("differs", f"{count} tokens, as many as ours {line}", daily)
    return _Result("differs", f"{count} tokens, ours has {len(ours)}", "scores are those of another prompt")


def _first_difference(ours: Sequence[int], theirs: Sequence[int], name: str = "ours") -> str:
    """Where two token sequences part, with some text around; `name` is what the first one is called."""
    at = _common(ours, theirs)
    mine, other = (harmony.decode(ids[max(0, at - 2) : at + 6]) for ids in (ours, theirs))
    return f"{len(theirs)} tokens, {name} has {len(ours)}; they part at token {at}: {other!r}, {name} {mine!r}"


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def _effort(chat: _Asker) -> _Result:
    """Look for the effort in the server's prompt; where that is not shown, for its effect on greedy answers."""
    efforts = ("low", "high")
    records = [{**QUESTION, "reasoning_effort": effort} for effort in efforts]
    shown = [prompt_ids(chat.answer(record, SamplingParams(max_tokens=1))) for record in records]
    meaning = "all efforts are asked alike"
    if all(ids is not None for ids in shown):
        wrong = [e for e, ids in zip(efforts, shown, strict=True) if f"Reasoning: {e}" not in harmony.decode(ids or [])]
        return _Result("differs", f"not in the prompt: {', '.join(wrong)}", meaning) if wrong else _Result(
            "ok", "in the prompt that the server shows"
        )  # fmt: skip
    params = SamplingParams(max_tokens=32)
    low, again, high = (chat.ids(record, params) for record in (records[0], records[0], records[1]))
    if low != again:
        return _Result("unknown", "greedy answers do not repeat, so their difference tells nothing")
    if low == high:
        return _Result("differs", "greedy answers to low and high are the same", meaning)
    return _Result("ok", "greedy answers change with it; the prompt is not shown")


def _stops(asker: _Asker, token: int, record: Chat) -> _Result:
    """Whether the server ends an answer at a token: forced by a bias on it, or where the model writes it by itself."""
    if asker.mode == "raw":
        params = SamplingParams(max_tokens=4)
        answer = asker.answer(record, params, logit_bias={str(token): 100})
        forced = read_completion(answer, asker.engine.dialect, 0, 0, params)
        if "stop_added" in forced.remarks and len(forced.token_ids) == 1:
            return _Result("ok", "when forced to write it, which is not returned, but added here")
        if forced.token_ids == [token] and "past_stop" not in forced.remarks:
            return _Result("ok", "when forced to write it, which is returned")
        if forced.token_ids == [token]:
            return _Result("differs", "when forced to write it, the server goes on", "answers run on to max_tokens")
    (natural,) = asker.completions(record, SamplingParams(max_tokens=NATURAL_TOKENS))
    if natural.finish_reason != "stop" or natural.token_ids[-1] != token:
        end = harmony.decode(natural.token_ids[-1:])
        return _Result(
            "unknown", f"the answer ended by {natural.finish_reason}, in {end!r}", "the model did not write it"
        )
    if "past_stop" in natural.remarks:
        return _Result("differs", "the server goes on behind it", "answers run on to max_tokens")
    return _Result("ok", "where the model writes it by itself")


def _limit(asker: _Asker) -> _Result:
    (one,) = asker.completions(QUESTION, SamplingParams(max_tokens=3))
    count = one.completion_tokens if one.source == "parts" else len(one.token_ids)
    if "past_limit" in one.remarks:
        return _Result("differs", "more than 3 tokens where 3 were asked for", "truncation cannot be measured")
    if one.finish_reason != "length":
        return _Result("unknown", f"the answer ended by {one.finish_reason} before it")
    return _Result("ok", f"{count} tokens where 3 were asked for, finish_reason length")


def _greedy(asker: _Asker) -> _Result:
    params = SamplingParams(max_tokens=GREEDY_TOKENS)
    first, second = asker.ids(QUESTION, params), asker.ids(QUESTION, params)
    if first == second:
        return _Result("ok", f"{len(first)} tokens, twice the same")
    return _Result("differs", _first_difference(first, second, "the first"), "roundings depend on the server's batch")


def _same_seed(asker: _Asker) -> _Result:
    params = SamplingParams(max_tokens=GREEDY_TOKENS, temperature=1.0, seed=7)
    first, second = asker.ids(QUESTION, params), asker.ids(QUESTION, params)
    if first == second:
        return _Result("ok", f"{len(first)} tokens, twice the same")
    return _Result("differs", _first_difference(first, second, "the first"), "a run cannot be repeated exactly")


def _other_seeds(asker: _Asker) -> _Result:
    params = SamplingParams(max_tokens=SEED_TOKENS, temperature=1.5, n=NUM_SEEDS)
    answers = {tuple(one.token_ids) for one in asker.completions(QUESTION, params)}
    finding = f"{len(answers)} different answers to {NUM_SEEDS} seeds at temperature 1.5"
    if len(answers) > 1:
        return _Result("ok", finding)
    return _Result("differs", finding, "samples and epochs of a question would be copies of one")


def _logprobs(asker: _Asker) -> _Result:
    if asker.engine.dialect.tokens == "parts":
        return _Result("unknown", "not asked for in chat mode", "they belong to tokens, which it does not return")
    params = SamplingParams(max_tokens=8, logprobs=True)
    (cold,) = asker.completions(QUESTION, params)
    if any(value > 1e-3 for value in cold.logprobs or ()):  # above 0 but for the rounding of a softmax
        return _Result("differs", f"some are above 0: {max(cold.logprobs or ()):.3f}", "they are no probabilities")
    if not EXTRAS[asker.engine.dialect.extras]:
        return _Result(
            "ok", f"one for each of {len(cold.token_ids)} tokens; whether of the raw distribution is unknown"
        )
    (hot,) = asker.completions(QUESTION, replace(params, temperature=2.0, top_k=1))
    if hot.token_ids[0] != cold.token_ids[0]:
        return _Result("unknown", "one for each token; with top_k 1 the first token is another than at temperature 0")
    difference = abs((hot.logprobs or [0.0])[0] - (cold.logprobs or [0.0])[0])
    if difference > 0.05:  # a temperature of 2 halves what lies between two logits; roundings are ten times smaller
        return _Result("differs", "they change with temperature", "ours are of the raw distribution")
    return _Result("ok", f"one for each of {len(cold.token_ids)} tokens, of the raw distribution")


def _our_tokens(asker: _Asker, ours: Engine) -> _Result:
    """Compare greedy tokens with our engine's; where they part, say by how much ours preferred its own."""
    if asker.mode == "chat":
        return _Result("unknown", "tokens can be compared in raw mode alone")
    prompts = [rendered(record) for record in (QUESTION, TOOL_QUESTION, LONG_QUESTION)]
    params = SamplingParams(max_tokens=GREEDY_TOKENS)
    mine, others = list(ours.generate(prompts, params)), list(asker.engine.generate(prompts, params))
    partings = []
    for number, (prompt, one, other) in enumerate(zip(prompts, mine, others, strict=True)):
        at = _common(one.token_ids, other.token_ids)
        if one.token_ids == other.token_ids:
            continue
        pair = [completion.token_ids[at : at + 1] for completion in (one, other)]
        margin = torch.inf if [] in pair else _margin(ours, prompt + one.token_ids[:at], pair[0][0], pair[1][0])
        shown = [harmony.decode(token) for token in pair]
        partings.append(
            (margin, f"prompt {number} parts at token {at}: {shown[1]!r}, ours {shown[0]!r} by {margin:.2f} nats")
        )
    total = sum(len(one.token_ids) for one in mine)
    if not partings:
        return _Result("ok", f"all {total} tokens of {len(prompts)} prompts")
    margin, finding = max(partings)
    if margin <= ROUNDING_NATS:
        return _Result("differs", finding, "a near tie, which roundings decide", required=False)
    return _Result("differs", finding, "more than roundings: other weights, another prompt, or an error in a kernel")


def _margin(ours: Engine, ids: list[int], mine: int, other: int) -> float:
    """By how many nats our model prefers one next token to another."""
    with torch.inference_mode():
        logits = ours.model(torch.tensor([ids], device=ours.model.device))[0, -1].float()
    return float(logits[mine] - logits[other])


def _our_distribution(asker: _Asker, ours: Engine) -> _Result:
    """Whether samples also come from behind the likeliest tokens, as often as our model says."""
    if asker.mode == "chat":
        return _Result("unknown", "tokens can be compared in raw mode alone")
    prompt = [*rendered(QUESTION), CHANNEL, *harmony.encode("analysis"), MESSAGE]
    with torch.inference_mode():
        logits = ours.model(torch.tensor([prompt], device=ours.model.device))[0, -1].float()
    likeliest = set(logits.topk(FILTER_TOKENS).indices.tolist())
    behind = 1 - (logits / 2).softmax(-1)[list(likeliest)].sum().item()
    if (1 - behind) ** FILTER_DRAWS > 0.001:
        return _Result("unknown", f"only {behind:.0%} of the samples should lie behind the likeliest {FILTER_TOKENS}")
    params = SamplingParams(max_tokens=1, temperature=2.0, n=FILTER_DRAWS, stop_token_ids=())
    drawn = [one.token_ids[0] for one in asker.engine.generate([prompt], params)]
    outside = sum(token not in likeliest for token in drawn)
    finding = f"{outside} of {FILTER_DRAWS} samples at temperature 2 lie behind the likeliest {FILTER_TOKENS} tokens"
    if outside:
        return _Result("ok", f"{finding}; {behind:.0%} should")
    return _Result("differs", f"{finding}; {behind:.0%} should", "the server keeps only the likeliest tokens (top_k)")
