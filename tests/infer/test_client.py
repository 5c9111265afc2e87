"""Requests against a real HTTP server that fails in every way: what is tried again, what is not, and what is told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from openai_server import Behaviour, Fault, body, cut, hang, serving, status

from gptoss_infer import client
from gptoss_infer.client import Address, Client, Server, ServerError, key_from
from gptoss_infer.engine import Engine
from gptoss_infer.errors import UsageError, run_command

HELLO = {"choices": [{"text": "hello"}]}


@pytest.fixture
def start(speaker_engine: Engine) -> Iterator[Callable[..., tuple[Client, Behaviour]]]:
    """Start a server with these faults, each instead of one answer; a client of it, and what the server saw."""
    with ExitStack() as stack:

        def run(*faults: Fault, **options: object) -> tuple[Client, Behaviour]:
            does = Behaviour(faults=list(faults))
            url = stack.enter_context(serving(speaker_engine, does))
            return Client(Server(Address.parse(url), **{"backoff_s": 0.01} | options)), does

        yield run


@pytest.mark.parametrize(
    "fault",
    [status(500), status(502), status(503), status(429), status(408), cut, hang(0.05), body(b"<html>busy</html>")],
    ids=["500", "502", "503", "429", "408", "cut off", "closed", "no json"],
)
def test_what_may_go_away_by_itself_is_tried_again(start: Callable, fault: Fault) -> None:
    ours, does = start(fault, fault, body(HELLO))
    assert ours.post("/completions", {"a": 1}) == HELLO
    assert [request for _, request in does.requests] == [{"a": 1}] * 3
    assert ours.num_retries == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(500), "status 500: fault 500; tried 3 times"),
        (cut, "the connection was closed before the answer was complete; tried 3 times"),
        (body(b'{"choices": [{"te'), 'the answer is no JSON: {"choices": [{"te; tried 3 times'),
        (body([1]), "the answer is no JSON object"),
    ],
)
def test_the_number_of_tries_is_limited_and_the_last_failure_is_told(
    start: Callable, fault: Fault, message: str
) -> None:
    ours, does = start(*[fault] * 9, retries=2)
    with pytest.raises(ServerError, match="/v1/completions: ") as raised:
        ours.post("/completions", {})
    assert message in str(raised.value)
    assert len(does.requests) == 3


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
def test_a_refusal_is_final_and_told_in_the_servers_words(start: Callable, code: int) -> None:
    ours, does = start(status(code))
    with pytest.raises(ServerError, match=f"status {code}: fault {code}") as raised:
        ours.post("/completions", {})
    assert raised.value.status == code
    assert len(does.requests) == 1


def test_a_server_that_says_nothing_is_given_up_after_the_timeout(start: Callable) -> None:
    ours, _ = start(hang(5), hang(5), timeout_s=0.2, retries=1)
    begin = time.monotonic()
    with pytest.raises(ServerError, match=r"no answer within 0\.2 s; tried 2 times"):
        ours.post("/completions", {})
    assert time.monotonic() - begin < 4


def test_retry_after_is_kept_to_but_not_without_end(start: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LONGEST_WAIT_S", 0.3)
    ours, _ = start(status(429, Retry_After="3600"), body(HELLO))
    begin = time.monotonic()
    assert ours.post("/completions", {}) == HELLO
    assert 0.3 <= time.monotonic() - begin < 60


def test_where_nobody_listens_the_first_request_tries_again_and_the_next_ones_do_not() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        ours = Client(Server(Address("http", "127.0.0.1", taken.getsockname()[1], "/v1"), retries=2, backoff_s=0.01))
        with pytest.raises(ServerError, match=r"cannot connect: .*is the server up\?; tried 3 times"):
            ours.get("/models")
        with pytest.raises(ServerError, match="tried once"):
            ours.get("/models")


def test_close_ends_a_request_in_another_thread_at_once(start: Callable) -> None:
    ours, does = start(hang(30))
    failures: list[ServerError] = []

    def ask() -> None:
        try:
            ours.post("/completions", {})
        except ServerError as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not does.requests:
        time.sleep(0.01)
    ours.close()
    thread.join(timeout=15)
    assert [str(error).rpartition(": ")[2] for error in failures] == ["cancelled"]
    with pytest.raises(ServerError, match="cancelled"):
        ours.post("/completions", {})
    assert len(does.requests) == 1


def test_a_redirect_is_not_followed_so_that_the_key_goes_nowhere_else(start: Callable) -> None:
    ours, does = start(status(307, Location="http://127.0.0.1:9/v1/completions"), key="sk-secret")
    with pytest.raises(ServerError, match="redirects are not followed, give that address"):
        ours.post("/completions", {})
    assert len(does.requests) == 1


def test_the_key_is_sent_and_never_told(start: Callable) -> None:
    ours, does = start(key="sk-secret")
    does.key = "sk-secret"
    with pytest.raises(ServerError, match="no such endpoint"):
        ours.post("/embeddings", {})
    does.key = "sk-other"  # the server repeats what it was sent
    with pytest.raises(ServerError, match=r"status 401: wrong key Bearer \*\*\*") as raised:
        ours.post("/completions", {})
    assert "sk-secret" not in f"{raised.value!r} {ours.server!r} {ours.server}"


def test_a_key_comes_from_the_environment_variable_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    assert key_from("MY_KEY") == "sk-secret"
    assert key_from(None) is None
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UsageError, match="MY_KEY is not set"):
        key_from("MY_KEY")
    monkeypatch.setenv("MY_KEY", "sk-secret\r\nHost: elsewhere")
    with pytest.raises(UsageError, match="no HTTP header may hold") as raised:
        key_from("MY_KEY")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("https://example.org/openai/v1/", "https://example.org/openai/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
    ],
)
def test_a_base_url_is_kept_without_its_last_slash(url: str, shown: str) -> None:
    assert str(Address.parse(url)) == shown


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://localhost/v1", "http:///v1", "http://localhost:port/v1", "http://me:pass@localhost/v1",
     "http://localhost/v1?key=pass", "http://localhost/v1#pass"],
)  # fmt: skip
def test_what_is_no_base_url_is_refused_and_no_secret_in_it_is_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="such as http://localhost:8000/v1") as raised:
        Address.parse(url)
    assert "pass" not in str(raised.value).replace("password", "")


def test_a_server_that_cannot_be_reached_ends_a_command_with_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    def command(_: object) -> int:
        raise ServerError("nobody there")

    assert run_command(command, []) == 3
    assert capsys.readouterr().err == "error: nobody there\n"
