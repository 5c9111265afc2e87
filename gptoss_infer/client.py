"""JSON over HTTP to a server that may be busy, slow, broken or gone: limits, retries, and errors that say what to do.

Here: `Address` (a base URL), `Client` (requests to it, from several threads, that `close` ends at once), `ServerError`.
What is asked is `remote`'s and `probe`'s to know. Proxies of the environment are not used, redirects not followed, so a
request, and the key with it, goes to the named host and nowhere else.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import ssl
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gptoss_infer.errors import MachineError, UsageError

CONNECT_TIMEOUT_S = 10.0
LONGEST_WAIT_S = 60.0  # between two tries, also where the server asks for more
RETRIED = (408, 425, 429, 500, 502, 503, 504)  # what may go away by itself; other statuses come back the same


class ServerError(MachineError):
    """A server did not do what it was asked for; `status` is that of HTTP, None where no answer came."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Address:
    """The base URL of an OpenAI-compatible server, such as http://localhost:8000/v1."""

    scheme: str
    host: str
    port: int | None
    path: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises: UsageError for what is no base URL, and for one with a key or a password in it."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"not a URL ({error}); expected a base such as http://localhost:8000/v1") from None
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            # Without the URL in the message: it may hold a secret.
            raise UsageError("the URL holds a name, password, query or fragment; give a key through an environment "
                             "variable, and the base alone, such as http://localhost:8000/v1")  # fmt: skip
        if parts.scheme not in ("http", "https") or not host:
            raise UsageError(f"{url}: not a base URL; expected one such as http://localhost:8000/v1")
        return cls(parts.scheme, host, port, parts.path.rstrip("/"))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{'' if self.port is None else f':{self.port}'}{self.path}"


@dataclass(frozen=True)
class Server:
    """Where requests go, how long each may take and how often it is sent again."""

    address: Address
    key: str | None = None  # sent as a bearer token
    timeout_s: float = 3600.0  # without a byte; an answer comes in one piece, so it covers the whole generation
    retries: int = 4
    backoff_s: float = 1.0  # before the first retry; doubled for each further one

    def __post_init__(self) -> None:
        """Refuse limits that mean nothing."""
        if self.timeout_s <= 0 or self.retries < 0 or self.backoff_s < 0:
            raise UsageError(f"timeout {self.timeout_s} must be above 0, retries {self.retries} at least 0")

    def __repr__(self) -> str:
        return f"Server({self.address})"  # the key stays out of logs and tracebacks


def key_from(variable: str | None) -> str | None:
    """The key in the environment variable of this name; None for None."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise UsageError(f"the environment variable {variable} is not set; expected the server's key in it")
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"the key in {variable} has characters that no HTTP header may hold")
    return key


class _Answer(NamedTuple):
    status: int
    retry_after: str | None
    location: str | None
    body: bytes


class Client:
    """Requests to one server; for several threads at once."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()
        self._closed = threading.Event()
        self._unreachable = False
        self.num_retries = 0

    def close(self) -> None:
        """End what is under way, in whatever thread: each of those requests raises ServerError."""
        with self._lock:
            self._closed.set()
            for connection in self._open:
                if connection.sock is not None:
                    try:
                        connection.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
                    except OSError:  # it ended by itself
                        continue

    def get(self, path: str) -> dict[str, Any]:
        """The object that GET answers with. Raises: ServerError."""
        return self._request("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The object that POST answers with. Raises: ServerError."""
        return self._request("POST", path, json.dumps(body).encode())

    def _request(self, method: str, path: str, payload: bytes | None) -> dict[str, Any]:
        where = f"{method} {self.server.address}{path}"
        tries = 0
        while True:
            tries, nobody = tries + 1, False
            wait_s = min(self.server.backoff_s * 2 ** (tries - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            try:
                answer = self._send(method, path, payload)
                self._unreachable = False
                if answer.status == 200:
                    return _object(answer.body)
                if answer.status not in RETRIED:
                    raise ServerError(self._hidden(f"{where}: {_refusal(answer)}"), answer.status)
                problem, status = _refusal(answer), answer.status
                if (answer.retry_after or "").isdecimal():
                    wait_s = min(max(wait_s, float(answer.retry_after or 0)), LONGEST_WAIT_S)
            except ssl.SSLError as error:
                raise ServerError(f"{where}: {error}; is this the right scheme and certificate?") from None
            except (OSError, http.client.HTTPException, _NoObject) as error:
                if self._closed.is_set():
                    raise ServerError(f"{where}: cancelled") from None
                problem, status = _failure(error, self.server), None
                nobody = isinstance(error, _NoConnection)
            # Where one request found nobody over all its tries, the others need not wait as long to find the same.
            if tries > self.server.retries or (nobody and self._unreachable):
                self._unreachable = nobody
                times = "once" if tries == 1 else f"{tries} times"
                raise ServerError(self._hidden(f"{where}: {problem}; tried {times}"), status)
            with self._lock:
                self.num_retries += 1
            if self._closed.wait(wait_s):
                raise ServerError(f"{where}: cancelled")

    def _send(self, method: str, path: str, payload: bytes | None) -> _Answer:
        """One request on a connection of its own."""
        address = self.server.address
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(address.host, address.port, timeout=CONNECT_TIMEOUT_S)
        headers = {"Accept": "application/json", "Connection": "close"}
        if payload is not None:
            headers["Content-Type"] = "application/json"
        if self.server.key is not None:
            headers["Authorization"] = f"Bearer {self.server.key}"
        with self._lock:
            self._open.add(connection)
        try:
            try:
                connection.connect()
            except ssl.SSLError:
                raise
            except OSError as error:
                raise _NoConnection(_reason(error)) from None
            connection.sock.settimeout(self.server.timeout_s)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # silence may last for many minutes
            if self._closed.is_set():  # in the time it took to connect
                raise ConnectionAbortedError
            connection.request(method, f"{address.path}{path}", payload, headers)
            response = connection.getresponse()
            headers_back = response.headers
            return _Answer(response.status, headers_back["Retry-After"], headers_back["Location"], response.read())
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _hidden(self, message: str) -> str:
        """The message without the key, which some servers repeat when they refuse it."""
        return message.replace(self.server.key, "***") if self.server.key else message


class _NoConnection(OSError):
    """Nobody answers at the address."""


class _NoObject(ValueError):
    """An answer with status 200 that is no JSON object: cut off on the way, or from something in between."""


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        raise _NoObject(f"the answer is no JSON: {_short(body)}") from None
    if not isinstance(value, dict):
        raise _NoObject(f"the answer is no JSON object: {_short(body)}")
    return value


def _refusal(answer: _Answer) -> str:
    """What the server said when it refused."""
    if 300 <= answer.status < 400:
        return f"status {answer.status}, elsewhere: {answer.location}; redirects are not followed, give that address"
    hints = {
        401: "; name the environment variable that holds the key",
        404: "; does the base URL end in /v1, and is the model's name right?",
    }
    return f"status {answer.status}: {_message(answer.body)}{hints.get(answer.status, '')}"


def _message(body: bytes) -> str:
    """The message in an error's body: OpenAI's shape, FastAPI's, or whatever is there."""
    try:
        value = json.loads(body)
    except ValueError:
        return _short(body)
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return _short(value if isinstance(value, str) else json.dumps(value))


def _failure(error: Exception, server: Server) -> str:
    """What went wrong without an answer."""
    if isinstance(error, TimeoutError):
        return f"no answer within {server.timeout_s:g} s"
    if isinstance(error, (http.client.IncompleteRead, http.client.RemoteDisconnected, ConnectionResetError)):
        return "the connection was closed before the answer was complete"
    return str(error) or type(error).__name__


def _reason(error: OSError) -> str:
    """Why no connection came about."""
    if isinstance(error, TimeoutError):
        return f"cannot connect within {CONNECT_TIMEOUT_S:g} s; is the server up?"
    return f"cannot connect: {error.strerror or error}; is the server up?"


def _short(text: str | bytes) -> str:
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."
