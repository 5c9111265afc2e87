"""A minimal OpenAI-compatible server around our engine, which can be told to do what real ones do wrong.

For tests of clients alone: it answers one request at a time and knows the fields that they send.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from gptoss_infer import harmony
from gptoss_infer.engine import Completion, Engine, SamplingParams
from gptoss_infer.harmony.vocabulary import FIRST_SPECIAL, encoding

Fault = Callable[["Handler"], object]  # returns something true if the answer is still to be given


# What an engine said before, which it would say again: tests ask the same things of many servers.
_ANSWERS: dict[tuple[int, tuple[int, ...], SamplingParams], Completion] = {}


@dataclass
class Behaviour:
    """What the server does; the defaults are a good server's."""

    prompts: Literal["ids", "text", "template"] = "ids"  # what /completions takes; a template is put around text
    answers: Literal["token_ids", "verbose", "text", "stripped"] = "token_ids"
    chat_answers: Literal["token_ids", "parts"] = "parts"
    completions: bool = True
    chat: bool = True
    returns_stop: bool = True  # in text
    stops: bool = True  # at stop tokens
    usage: bool = True
    seeds: bool = True
    limits: bool = True  # max_tokens
    effort: bool = True
    biases: bool = True
    top_k: int = 0  # that it applies whatever is asked
    date: str | None = None  # that its template adds
    refuses: tuple[tuple[str, Any], ...] = ()  # (field, value) that ends in 422; value None for any
    key: str | None = None
    faults: list[Fault] = field(default_factory=list)  # each takes the place of one answer
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": "tests"}]})

    def do_POST(self) -> None:
        does = self.server.does
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            does.requests.append((self.path, body))
            does.under_way += 1
            does.most_under_way = max(does.most_under_way, does.under_way)
            fault = does.faults.pop(0) if does.faults else None
        try:
            if fault is None or fault(self):
                self.respond(body)
        finally:
            with self.server.lock:
                does.under_way -= 1

    def respond(self, body: dict[str, Any]) -> None:
        does = self.server.does
        if does.key is not None and self.headers["Authorization"] != f"Bearer {does.key}":
            self.reply(401, {"error": {"message": f"wrong key {self.headers['Authorization']}"}})
        elif any(name in body and value in (None, body[name]) for name, value in does.refuses):
            self.reply(422, {"detail": [{"msg": "extra fields not permitted"}]})
        elif self.path == "/v1/completions" and does.completions:
            self.complete(body)
        elif self.path == "/v1/chat/completions" and does.chat:
            self.chat(body)
        else:
            self.reply(404, {"error": {"message": "no such endpoint"}})

    def reply(self, status: int, value: object, **headers: str) -> None:
        payload = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def complete(self, body: dict[str, Any]) -> None:
        does, prompt = self.server.does, body["prompt"]
        if isinstance(prompt, list) and does.prompts != "ids":
            self.reply(400, {"error": {"message": "prompt must be a string"}})
            return
        if does.prompts == "template":
            prompt = f"<|start|>user<|message|>{prompt}<|end|><|start|>assistant"
        ids = prompt if isinstance(prompt, list) else encoding().encode(prompt, allowed_special="all")
        completion = self.generate(ids, body)
        out = completion.token_ids
        choice: dict[str, Any] = {"index": 0, "finish_reason": completion.finish_reason}
        shown = out if does.returns_stop or completion.finish_reason != "stop" else out[:-1]
        if does.answers == "stripped":
            shown = [token for token in shown if token < FIRST_SPECIAL]
        choice["text"] = harmony.decode(shown)
        if does.answers == "token_ids":
            choice["token_ids"] = out
        if completion.logprobs is not None:
            choice["logprobs"] = {"token_logprobs": completion.logprobs}
        self.answer(choice, ids, out, verbose=does.answers == "verbose")

    def chat(self, body: dict[str, Any]) -> None:
        does = self.server.does
        effort = (body.get("chat_template_kwargs") or body).get("reasoning_effort", "medium")
        kept = ("role", "content", "tool_calls", "tool_call_id", "name")
        record = {
            "messages": [{key: message[key] for key in kept if message.get(key)} for message in body["messages"]],
            "tools": body.get("tools"),
            "reasoning_effort": effort if does.effort else "medium",
        }
        ids = harmony.render(harmony.conversation_from_chat(record, date=does.date), completion=True).token_ids
        completion = self.generate(ids, body)
        parsed = harmony.parse(completion.token_ids)
        message: dict[str, Any] = {"role": "assistant", "content": parsed.final, "tool_calls": []}
        for number, call in enumerate(parsed.tool_calls):
            function = {"name": call.name, "arguments": call.arguments_text}
            message["tool_calls"].append({"id": f"c{number}", "type": "function", "function": function})
        thoughts = [one.content for one in parsed.messages if one.channel == "analysis"]
        message["reasoning_content"] = "".join(thoughts) or None
        reason = "tool_calls" if message["tool_calls"] else completion.finish_reason
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "message": message}
        if does.chat_answers == "token_ids":
            choice |= {"token_ids": completion.token_ids, "prompt_token_ids": ids}
        self.answer(choice, ids, completion.token_ids)

    def generate(self, ids: list[int], body: dict[str, Any]) -> Completion:
        does = self.server.does
        max_tokens = body["max_tokens"] if does.limits else body["max_tokens"] + 5
        forced = [int(token) for token, bias in (body.get("logit_bias") or {}).items() if bias >= 100]
        stops = harmony.STOP_TOKENS if does.stops else ()
        if forced and does.biases:
            out = forced[:1] if forced[0] in stops else forced[:1] * max_tokens
            return Completion(0, 0, out, None, "stop" if forced[0] in stops else "length")
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=does.top_k or max(body.get("top_k", 0), 0),
            min_p=body.get("min_p", 0.0),
            seed=body["seed"] if does.seeds else 0,
            logprobs="logprobs" in body,
            stop_token_ids=stops,
        )
        key = (id(self.server.engine), tuple(ids), params)
        with self.server.lock:
            if key not in _ANSWERS:
                _ANSWERS[key] = next(iter(self.server.engine.generate([ids], params)))
            return _ANSWERS[key]

    def answer(self, choice: dict[str, Any], prompt: list[int], out: list[int], *, verbose: bool = False) -> None:
        value: dict[str, Any] = {"object": "answer", "model": "tiny", "choices": [choice]}
        if self.server.does.usage:
            value["usage"] = {"prompt_tokens": len(prompt), "completion_tokens": len(out)}
        if verbose:
            value["__verbose"] = {"tokens": out, "prompt": harmony.decode(prompt)}
        self.reply(200, value)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, engine: Engine, does: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine, self.does, self.lock = engine, does, threading.RLock()


@contextmanager
def serving(engine: Engine, does: Behaviour) -> Iterator[str]:
    """The base URL of a server that runs as long as the context."""
    server = _Server(engine, does)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def status(code: int, **headers: str) -> Fault:
    """Answer with an error."""
    return lambda handler: handler.reply(code, {"error": {"message": f"fault {code}"}}, **headers)


def body(value: object) -> Fault:
    """Answer with this, as if all were well."""
    return lambda handler: handler.reply(200, value)


def hang(seconds: float) -> Fault:
    """Say nothing for a while, then close the connection."""

    def fault(handler: Handler) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return fault


def slow(seconds: float) -> Fault:
    """Answer late."""
    return lambda _: time.sleep(seconds) or True


def cut(handler: Handler) -> None:
    """Close the connection in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"text": "so fa')
    handler.close_connection = True
