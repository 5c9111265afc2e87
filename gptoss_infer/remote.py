"""Generation by an OpenAI-compatible server (vLLM, SGLang, llama.cpp, Ollama, LM Studio), as `engine` does it here.

    engine = RemoteEngine.connect("http://localhost:8000/v1", "openai/gpt-oss-20b")
    for completion in engine.generate(prompts, params): ...

Token ids in, completions out, in prompt order, n each. `connect` asks the server for a few tokens, finds the most
faithful way that it can do (see `dialect`) and prints it. A request that fails is tried again as `client` says; one
that fails for good raises ServerError, or is the result of its sample where `attempts` is used. Used by the command
line and the evaluations. What a server does otherwise than the engine, `probe` finds out.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from gptoss_infer import harmony
from gptoss_infer.client import Address, Client, Server, ServerError, key_from
from gptoss_infer.dialect import (
    EXTRAS,
    MODES,
    REMARKS,
    Chat,
    Dialect,
    Extras,
    Mode,
    RemoteCompletion,
    answer_text,
    chat_body,
    completion_body,
    first_choice,
    prompt_count,
    read_completion,
    token_ids,
)
from gptoss_infer.engine import SamplingParams
from gptoss_infer.errors import UsageError
from gptoss_infer.harmony.vocabulary import CHANNEL, FIRST_SPECIAL, encoding

CONCURRENCY = 32
# A server that cannot be asked so refuses a field or its type (400, 422), lacks the endpoint (404, 405, 501), trips
# over a type (500), or sends an error as if it were none (200).
_REFUSALS = (200, 400, 404, 405, 422, 500, 501)
_FORMS: tuple[Literal["ids", "text"], ...] = ("ids", "text")
_RAW_EXTRAS: tuple[Extras, ...] = ("all", "top_k 0", "none")
_GREETING: Chat = {"messages": [{"role": "user", "content": "Say yes."}], "reasoning_effort": "low"}


class Attempt(NamedTuple):
    """What became of one sample."""

    prompt_index: int
    sample_index: int
    result: RemoteCompletion | ServerError | UsageError


class Found(NamedTuple):
    """How a server can be asked in one mode; where the dialect is None, why it cannot."""

    dialect: Dialect | None
    reason: str


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


class RemoteEngine:
    """Generates by a server. One call of `generate` at a time has several requests under way."""

    def __init__(
        self,
        server: Server,
        model: str,
        dialect: Dialect,
        *,
        concurrency: int = CONCURRENCY,
        notify: Callable[[str], None] = _tell,
    ) -> None:
        """Of `connect`'s making, as a rule; `concurrency` requests are under way, `notify` gets lines to print."""
        if concurrency < 1:
            raise UsageError(f"concurrency is {concurrency}, expected at least 1")
        self.server, self.model, self.dialect = server, model, dialect
        self.concurrency, self.notify = concurrency, notify

    @classmethod
    def connect(
        cls,
        base_url: str,
        model: str,
        *,
        mode: Mode | None = None,
        key_variable: str | None = None,
        timeout_s: float = 3600.0,
        concurrency: int = CONCURRENCY,
        notify: Callable[[str], None] = _tell,
    ) -> RemoteEngine:
        """Find out how the server is asked, and say so.

        Args:
            base_url: such as http://localhost:8000/v1.
            mode: None takes raw where the server can do it, else chat.
            key_variable: name of the environment variable that holds the server's key, if it wants one.
            timeout_s: of one request; it covers a whole generation.
        Raises: UsageError for a URL that is none; ServerError if the server cannot be reached or asked.
        """
        server = Server(Address.parse(base_url), key_from(key_variable), timeout_s=timeout_s)
        reasons = []
        for candidate in MODES if mode is None else (mode,):
            dialect, reason = discover(server, model, candidate)
            if dialect is not None:
                notify(f"{model} at {server.address}, {dialect}")
                return cls(server, model, dialect, concurrency=concurrency, notify=notify)
            reasons.append(f"{candidate} mode: {reason}")
        raise ServerError(f"the server cannot be asked; {'; '.join(reasons)}")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        chats: Sequence[Chat] | None = None,
    ) -> Iterator[RemoteCompletion]:
        """Yield the completions of all prompts, in prompt order, n each.

        Args:
            chats: the records that the prompts were rendered from; what chat mode sends instead of the prompts.
        Raises: ServerError when it is the turn of a sample whose request failed for good. UsageError as
            `engine.Engine.generate` does, and for parameters that the server cannot be given.
        """
        done: dict[tuple[int, int], Attempt] = {}
        order = _order(prompts, _each(prompts, params))
        expected = next(order, None)
        with closing(self.attempts(prompts, params, chats)) as attempts:
            for attempt in attempts:
                done[attempt.prompt_index, attempt.sample_index] = attempt
                while expected in done:
                    result = done.pop(expected).result
                    if not isinstance(result, RemoteCompletion):
                        raise result
                    yield result
                    expected = next(order, None)

    def attempts(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        chats: Sequence[Chat] | None = None,
    ) -> Generator[Attempt]:
        """Yield what became of every sample as it ends, failures too; arguments as for `generate`.

        Closing the iterator ends the requests that are under way.
        """
        each = _each(prompts, params)
        self._check(prompts, each, chats)
        client = Client(self.server)
        pool = ThreadPoolExecutor(self.concurrency, "remote")
        remarks: Counter[str] = Counter()
        futures: list[Future[Attempt]] = []
        try:
            futures += [
                pool.submit(
                    self._attempt, client, prompts[index], each[index], chats[index] if chats else None, index, sample
                )
                for index, sample in _order(prompts, each)
            ]
            for future in as_completed(futures):
                attempt = future.result()
                if isinstance(attempt.result, RemoteCompletion):
                    remarks.update(attempt.result.remarks)
                yield attempt
        finally:
            client.close()
            pool.shutdown(cancel_futures=True)
            for remark, count in sorted(remarks.items()):
                self.notify(f"{count} of {len(futures)} answers: {REMARKS[remark]}")
            if client.num_retries:
                self.notify(f"{client.num_retries} requests were sent again after a failure")

    def request(
        self, client: Client, prompt: Sequence[int], params: SamplingParams, chat: Chat | None, sample: int = 0,
        **fields: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """The server's whole answer to one sample's request, with `fields` added to it. Raises: as `generate`."""
        if self.dialect.mode == "raw":
            body = completion_body(self.dialect, self.model, prompt, params, sample)
            return client.post("/completions", body | fields)
        assert chat is not None, "chat mode without a conversation"
        return client.post("/chat/completions", chat_body(self.dialect, self.model, chat, params, sample) | fields)

    def _attempt(
        self, client: Client, prompt: Sequence[int], params: SamplingParams, chat: Chat | None, index: int, sample: int
    ) -> Attempt:
        try:
            answer = self.request(client, prompt, params, chat, sample)
            completion = read_completion(answer, self.dialect, index, sample, params)
            if self.dialect.mode == "raw" and completion.prompt_tokens not in (None, len(prompt)):
                raise ServerError(
                    f"the server read {completion.prompt_tokens} tokens where the prompt has {len(prompt)}, so it was "
                    "asked something else"
                )
            return Attempt(index, sample, completion)
        except (ServerError, UsageError) as error:
            return Attempt(index, sample, error)

    def _check(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], chats: Sequence[Chat] | None
    ) -> None:
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise UsageError(f"prompt {index} is empty; a harmony prompt has at least a header")
        if self.dialect.mode == "chat" and (chats is None or len(chats) != len(prompts)):
            raise UsageError(
                f"{len(prompts)} prompts, but {0 if chats is None else len(chats)} conversations; in chat mode the "
                "server renders them itself and needs one for each"
            )
        if self.dialect.tokens == "parts" and any(one.logprobs for one in params):
            raise UsageError("log-probabilities belong to tokens, which this server does not return in chat mode")


def _each(prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]) -> list[SamplingParams]:
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise UsageError(f"{len(prompts)} prompts but {len(each)} sampling parameters; give one, or one for each")
    return each


def _order(prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Iterator[tuple[int, int]]:
    return ((index, sample) for index in range(len(prompts)) for sample in range(params[index].n))


def discover(server: Server, model: str, mode: Mode) -> Found:
    """Find out by asking how a server can be asked in a mode: at most eight requests of a few tokens each.

    Raises: ServerError if it cannot be reached, is overloaded or wants a key.
    """
    client = Client(replace(server, retries=min(server.retries, 1)))
    return _discover_raw(client, model) if mode == "raw" else _discover_chat(client, model)


def _discover_raw(client: Client, model: str) -> Found:
    conversation = harmony.conversation_from_chat(_GREETING, date=None)
    prompt = harmony.render(conversation, completion=True).token_ids
    params = SamplingParams(max_tokens=8)
    reason = ""
    for form in _FORMS:
        for extras in _RAW_EXTRAS:
            dialect = Dialect("raw", form, extras, "ids")
            answer, reason = _try(client, "/completions", completion_body(dialect, model, prompt, params, 0))
            if answer is None:
                continue
            count = prompt_count(answer)
            # Ids are what they are; text may be read in other ways, so it takes the server's word for it.
            if count == len(prompt) or (count is None and form == "ids"):
                return _with_tokens(client, model, dialect, prompt, answer)
            reason = f"the server reads {count} tokens for a prompt of {len(prompt)}: it adds some, or a template"
            break
    return Found(None, reason)


def _with_tokens(client: Client, model: str, dialect: Dialect, prompt: Sequence[int], answer: dict[str, Any]) -> Found:
    """The dialect with where its tokens come from; None where control tokens are lost on the way."""
    if token_ids(answer) is not None:
        return Found(dialect, "")
    # A bias of 100 makes this the first token, whatever the model; servers that ignore it show what they write anyway.
    body = completion_body(dialect, model, prompt, SamplingParams(max_tokens=1), 0)
    forced, _ = _try(client, "/completions", body | {"logit_bias": {str(CHANNEL): 100}})
    texts = [answer_text(first_choice(one)) for one in (forced, answer) if one is not None]
    for text in texts:
        if any(token >= FIRST_SPECIAL for token in encoding().encode(text, allowed_special="all")):
            return Found(replace(dialect, tokens="text"), "")
    return Found(None, f"its answers are text without control tokens ({texts[-1]!r:.60}), so no message can be read")


def _discover_chat(client: Client, model: str) -> Found:
    params = SamplingParams(max_tokens=8)
    reason = ""
    for extras in EXTRAS:
        dialect = Dialect("chat", "messages", extras, "parts")
        answer, reason = _try(client, "/chat/completions", chat_body(dialect, model, _GREETING, params, 0))
        if answer is None:
            continue
        if token_ids(answer) is not None:
            return Found(replace(dialect, tokens="ids"), "")
        try:
            read_completion(answer, dialect, 0, 0, params)
        except ServerError as error:
            return Found(None, str(error))
        return Found(dialect, "")
    return Found(None, reason)


def _try(client: Client, path: str, body: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The answer, or None and why the server cannot be asked so."""
    try:
        answer = client.post(path, body)
        first_choice(answer)
        return answer, ""
    except ServerError as error:
        if error.status in _REFUSALS:
            return None, str(error)
        raise
