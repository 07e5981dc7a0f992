"""Answers from OpenAI-compatible servers, spread over any number of addresses.

A server that fails pauses, each time for longer, while the others go on; one that keeps failing is dropped.
"""

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx2

from dspark.config import is_unicode

RETRIES = 6  # before a server is dropped, or a request that fails where others are answered
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds after a failure: doubled each time, up to the longest
LONGEST_RETRY_AFTER = 600.0
CONNECT_SECONDS = 10.0
POLL_SECONDS = 0.02  # while no server is free


class RefusedError(Exception):
    """The request cannot be answered, whatever the server."""


class BusyError(Exception):
    """The server asks to come back later; its argument is the Retry-After header."""


class FailedError(Exception):
    """The server did not answer this time."""


@dataclass
class Server:
    url: str
    model: str = ""  # as the server calls it, known after the first request
    in_flight: int = 0
    answered: int = 0
    failures: int = 0  # in a row; requests under way together count once
    refusals: int = 0  # "come back later" in a row
    ready_at: float = 0.0


class ServerPool:
    """Sends each request to the server that has the fewest in flight, at most `streams` each.

    urls: as `base_url` gives them. model: preferred where a server has several. note: told in a sentence what the user
    should know. Close `client` in the end.
    """

    def __init__(self, urls: tuple[str, ...], model: str, streams: int, timeout: float, note: Callable[[str], None]):
        self.servers = [Server(url) for url in urls]
        self.model, self.streams, self.note = model, streams, note
        key = os.environ.get("OPENAI_API_KEY")
        self.client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            limits=httpx2.Limits(max_connections=None),
        )

    async def chat(self, body: dict) -> tuple[str, str, dict]:
        """(text, finish reason, usage) of a chat completion, tried again until a server gives it.

        Raises RefusedError if it cannot be had, ValueError if no server is left or one cannot be used at all.
        """
        failures, answered = 0, Counter[str]()
        while True:
            server = await self.free_server()
            started = time.monotonic()
            server.in_flight += 1
            try:
                reply = await self.send(server, body)
                server.failures = server.refusals = 0
                server.answered += 1
                return reply
            except BusyError as busy:
                if started >= server.ready_at:  # otherwise it pauses already, for what went wrong together
                    server.refusals += 1
                    if server.refusals == RETRIES:
                        self.note(f"'{server.url}' asks again and again to come back later; still waiting")
                    seconds = retry_after(str(busy))
                    server.ready_at = time.monotonic() + (back_off(server.refusals) if seconds is None else seconds)
            except (FailedError, httpx2.RequestError) as error:
                if started >= server.ready_at:
                    self.failed(server, f"{type(error).__name__} {error}".strip())
                failures += server.answered > answered[server.url]  # a server that answers nothing is to blame itself
                answered[server.url] = server.answered
                if failures > RETRIES:
                    raise RefusedError(f"gave up after {failures} failures: {error}") from None
            finally:
                server.in_flight -= 1

    async def free_server(self) -> Server:
        """Wait for a server that may be asked. Raises ValueError if all were dropped."""
        while self.servers:
            free = [s for s in self.servers if s.in_flight < self.streams and s.ready_at <= time.monotonic()]
            if free:
                return min(free, key=lambda s: s.in_flight)
            await asyncio.sleep(POLL_SECONDS)
        raise ValueError("no server is left; the same command goes on when one is up again")

    def failed(self, server: Server, problem: str) -> None:
        """Pause a server, or drop it."""
        server.failures += 1
        server.ready_at = time.monotonic() + back_off(server.failures)
        if server.failures > RETRIES:
            self.servers.remove(server)
            self.note(f"'{server.url}' is dropped after {RETRIES} retries ({problem}); {len(self.servers)} left")

    async def send(self, server: Server, body: dict) -> tuple[str, str, dict]:
        try:
            if not server.model:
                server.model = await self.find_model(server)
            reply = await self.request(server, "POST", "chat/completions", {"model": server.model, **body})
            message, finish = reply["choices"][0]["message"], reply["choices"][0]["finish_reason"]
            text, reasoning = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
            usage = reply.get("usage") or {}
            if not isinstance(text, str) or not is_unicode(text) or not isinstance(usage, dict):
                raise TypeError("no text, or no usage")
        except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError, RecursionError):
            raise FailedError("the reply is none of the OpenAI interface") from None
        if reasoning:
            raise ValueError(f"'{server.url}' splits reasoning off the answers; start it without a reasoning parser")
        return text, finish, usage

    async def find_model(self, server: Server) -> str:
        """Raises ValueError if the server has several models and none of the preferred name."""
        names = [model["id"] for model in (await self.request(server, "GET", "models"))["data"]]
        if self.model in names:
            return self.model
        if len(names) != 1:
            raise ValueError(f"'{server.url}' serves {', '.join(names) or 'no model'}: name one of them with --model")
        return names[0]

    async def request(self, server: Server, method: str, path: str, body: dict | None = None) -> dict:
        """The JSON of a reply; its status as an exception otherwise."""
        response = await self.client.request(method, f"{server.url}/{path}", json=body)
        status = response.status_code
        problem = f"HTTP {status}: {response.text[:200]}"
        if status == 429 or (status == 503 and "retry-after" in response.headers):
            raise BusyError(response.headers.get("retry-after", ""))
        if status in (400, 413, 422):
            raise RefusedError(problem)
        if status in (408, 409, 425) or status >= 500:
            raise FailedError(problem)
        if status != 200:
            raise ValueError(f"'{server.url}' cannot be used, {problem}")
        return response.json()


def base_url(text: str) -> str:
    """`http://host:8000` -> `http://host:8000/v1`; one with a path stays. Raises ValueError for no address."""
    try:
        url = httpx2.URL(text)
        if urlsplit(text).port == 0:  # it looks at brackets and ranges, which httpx does not
            raise ValueError("no server listens there")
    except (httpx2.InvalidURL, ValueError):
        url = httpx2.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"--server must be an address such as http://localhost:8000, not '{text}'")
    return text.rstrip("/") + ("/v1" if url.path == "/" else "")


def back_off(times: int) -> float:
    """Seconds to pause after so many failures in a row."""
    return min(FIRST_PAUSE * 2 ** (times - 1), LONGEST_PAUSE)


def retry_after(header: str) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date; None if it does not."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # TypeError: a date without a time zone
            return None
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER)  # in this order NaN is 0
