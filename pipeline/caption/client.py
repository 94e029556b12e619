"""Requests to a chat server: many at once, patient where the moment is at fault, final where it is not.

What 408, 425, 429, a 5xx, a broken connection or half an answer spoil is tried again, after the `Retry-After` that
the server asks for or a wait that grows, with jitter. Any other refusal is final, with the server's words. A server
that says it is asked too much holds up every thread, and is asked for half as much at once; each answer lets that grow
again.

The API key goes into one header, from an environment variable; it is in no message, log or pickle, and taken out of
what the server says.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pipeline.caption import connection
from pipeline.faults import ClipFault, WorkerFault, one_line
from pipeline.recipe_captions import ServedModel
from pipeline.recipe_schema import RecipeError

LATER = {408, 425, 429}  # answers that a later try may better, besides those from 500 on …
NEVER = {501, 505}  # … but for these
CROWDED = {429, 503}  # … and of them those that say it is asked too much
BACKOFF_S, LONGEST_S = 0.5, 30.0  # wait before the second try, doubled for each after it, and its bound
JITTER = 0.25  # of a wait, so that threads do not come back together
CONNECT_S = 10.0
IN_A_ROW = 16  # requests that fail one after the other, before it is the server's fault
LARGEST = 64 << 20  # bytes of an answer
WORDS = 300  # characters of what a server says
SECRET = 8  # characters from which a key is kept secret in what a server says

Json = dict[str, Any]
Sleep = Callable[[float, threading.Event], object]


class Refused(ClipFault):
    """The server's answer to this request is final."""


class NoAnswer(ClipFault):
    """Every try of a request failed."""


class Stopped(ClipFault):
    """Nobody waits for the answer any more."""


class _Again(Exception):
    """A try failed in a way that the next may not."""

    def __init__(self, why: str, wait: float | None = None, crowded: bool = False, cure: str = ""):
        super().__init__(why)
        self.wait = wait  # seconds that the server asks for
        self.crowded = crowded  # it is asked too much
        self.cure = cure  # nobody is there; what to do about it


class Client:
    """One served model; threads may call `ask` at once.

    Args:
        clock, sleep: seconds that only grow, and a wait that an event ends early; for tests.
    """

    def __init__(
        self,
        options: ServedModel,
        clock: Callable[[], float] = time.monotonic,
        sleep: Sleep = lambda seconds, stop: stop.wait(seconds),
    ):
        self.options, self.clock, self.sleep = options, clock, sleep
        self.gate = Gate(options.concurrency, options.per_minute, clock, sleep)
        self.base, self.place = _base(options.url), urlsplit(options.url).netloc
        self._key = key(options) or ""
        self._lock = threading.Lock()
        self._answered = self._failed = 0  # requests in all, and in a row
        self._pool = connection.pool(self.base, options.concurrency, options.timeout_s)

    def ask(self, body: Json, stop: threading.Event | None = None) -> Json:
        """The server's answer to a chat request, parsed: the first of its `choices` has a `message`.

        Raises Refused, NoAnswer, Stopped (after `stop` is set), and WorkerFault where no request would be answered.
        """
        stop = stop or threading.Event()
        data = json.dumps(body).encode()
        end: float | None = None
        for attempt in range(1, self.options.tries + 1):
            try:
                with self.gate.place(stop) as waited:
                    # standing in line is the rate limit's doing, and no part of the request's time
                    end = self.clock() + self.options.overall_s if end is None else end + waited
                    answer = self._try(data, end)
                self._count(None)
                return answer
            except _Again as e:
                wait = _longer(attempt)
                if e.wait is not None and e.wait >= BACKOFF_S:  # 0 is not an invitation to ask without end
                    wait = e.wait * (1 + JITTER * random.random())
                assert end is not None
                if attempt == self.options.tries:
                    raise self._given_up(
                        f"{e}, {attempt} times in a row" if attempt > 1 else str(e), e
                    ) from e
                if self.clock() + wait > end:
                    over = f"{self.options.overall_s:g} s are over (overall_s)"
                    raise self._given_up(f"{e}; with a wait of {wait:.0f} s {over}", e) from e
                if e.crowded:
                    self.gate.hold(wait)
                else:
                    self.sleep(wait, stop)
            except Refused as e:
                self._count(e)
                raise
        raise AssertionError

    def hello(self) -> None:
        """See that the server is there and takes the key. Raises RecipeError."""
        import urllib3

        for attempt in (1, 2, 3):
            try:
                url = self.base + "/models"
                got = self._request("GET", url, None, CONNECT_S)
                status, data = got.status, got.data
                break
            except urllib3.exceptions.HTTPError as e:
                if attempt == 3 or isinstance(e, urllib3.exceptions.SSLError):
                    raise RecipeError(
                        f"nobody answers at {self.options.url} ({self._said(e)}): start the server of "
                        f"{self.options.model!r} first, or correct the url"
                    ) from e
                self.sleep(_longer(attempt), threading.Event())
        if status == 401:
            raise RecipeError(self._unauthorised(_words(data)))

    # ------------------------------------------------------------ one try

    def _try(self, data: bytes, end: float) -> Json:
        """One POST. Raises _Again, Refused, WorkerFault."""
        import urllib3

        seconds = min(self.options.timeout_s, max(0.01, end - self.clock()))
        try:
            status, headers, got = self._post(data, seconds)
        except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError) as e:
            why = f"nobody answers at {self.place} ({self._said(e)})"
            raise _Again(why, cure="start the server again") from e
        except urllib3.exceptions.ProxyError as e:
            why = f"the environment's proxy lets nobody through to {self.place} ({self._said(e)})"
            raise _Again(why, cure="correct http_proxy or https_proxy") from e
        except urllib3.exceptions.SSLError as e:
            raise WorkerFault(f"{self.place}: {self._said(e)}; correct the url or the certificates") from e
        except (urllib3.exceptions.TimeoutError, TimeoutError) as e:
            raise _Again(f"no answer within {seconds:g} s (timeout_s)") from e
        except (urllib3.exceptions.HTTPError, OSError) as e:
            raise _Again(f"the connection broke ({self._said(e)})") from e
        if status != 200:
            self._refused(status, headers, _words(got))
        shown = repr(self._clean(_words(got))[:60])
        if headers.get("content-type", "").startswith("text/event-stream"):
            raise Refused(f"{self.place}: it answers in a stream, which nobody asked for: {shown}")
        try:
            answer = json.loads(got)
        except (ValueError, RecursionError) as e:
            raise _Again(f"the answer is no JSON, it may be cut off: {shown}") from e
        choices = answer.get("choices") if isinstance(answer, dict) else None
        choice = choices[0] if choices and isinstance(choices, list) else None
        for part in (choice, answer):  # some gateways say 200 to everything
            error = part.get("error") if isinstance(part, dict) else None
            if isinstance(error, dict) and isinstance(error.get("code"), int):
                self._refused(error["code"], headers, _words(json.dumps({"error": error}).encode()))
            if error and part is choice:
                raise _Again(f"it broke off: {self._clean(_words(json.dumps(error).encode()))}")
        if not choices:
            raise _Again(f"the answer has no choices: {shown}")
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            raise Refused(f"{self.place}: the answer is no chat completion: {shown}")
        found: Json = json.loads(self._clean(json.dumps(answer)))
        return found

    def _post(self, data: bytes, seconds: float) -> tuple[int, Any, bytes]:
        """Status, headers and body; in time, or TimeoutError, even from a server that sends a byte a second."""
        late = self.clock() + seconds
        got = self._request("POST", self.base + "/chat/completions", data, seconds, preload_content=False)
        try:
            parts, size = [], 0
            while part := got.read1(1 << 16):
                parts.append(part)
                size += len(part)
                if self.clock() > late:
                    raise TimeoutError
                if size > LARGEST:
                    raise Refused(f"{self.place}: an answer of more than {LARGEST >> 20} MiB")
            got.release_conn()
            return got.status, got.headers, b"".join(parts)
        except BaseException:
            got.close()  # what is left in the line is no other request's answer
            raise

    def _request(self, method: str, url: str, data: bytes | None, seconds: float, **more: Any) -> Any:
        import urllib3

        timeout = urllib3.Timeout(connect=min(CONNECT_S, seconds), read=seconds)
        headers = {"Accept": "application/json", "User-Agent": "clipmill"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            bearer = self.options.key_header.lower() == "authorization"
            headers[self.options.key_header] = f"Bearer {self._key}" if bearer else self._key
        query = urlsplit(self.options.url).query
        return self._pool.request(
            method,
            f"{url}?{query}" if query else url,
            body=data,
            headers=headers,
            timeout=timeout,
            retries=False,  # ours are below the server's wishes, and redirects would take the key elsewhere
            redirect=False,
            **more,
        )

    # ------------------------------------------------------------ what it means

    def _refused(self, status: int, headers: Any, words: str) -> None:
        """Raise what a status other than 200 means."""
        words = self._clean(words)
        said = f"HTTP {status}" + (f": {words}" if words else "")
        if status == 401:
            raise WorkerFault(self._unauthorised(words))
        if status == 407:
            raise WorkerFault(
                f"the environment's proxy wants a name and password ({said}): http_proxy=http://NAME:PASSWORD@HOST:PORT"
            )
        if status == 402 or "insufficient_quota" in words:
            raise WorkerFault(
                f"{self.place} wants to be paid ({said}); see to it and run the same command again"
            )
        if 300 <= status < 400:
            raise WorkerFault(
                f"{self.place} sends requests elsewhere ({said}, {headers.get('location', '')}); correct "
                "the url"
            )
        if status in LATER or (status >= 500 and status not in NEVER):
            raise _Again(said, retry_after(headers), crowded=status in CROWDED)
        if status in (403, 404) and not self._answered:
            v1 = "" if urlsplit(self.base).path else f" (is its API at {self.base}/v1?)"
            raise WorkerFault(
                f"{self.place} has no {self.options.model!r} for us ({said}); correct url{v1}, model or key_env"
            )
        raise Refused(f"{self.place}: {said}")

    def _unauthorised(self, words: str) -> str:
        var = self.options.key_env
        what = (
            f"does not take the key in ${var}"
            if var
            else "wants a key: name the variable that holds it in key_env"
        )
        return f"{self.place} {what}" + (f" ({self._clean(words)})" if words else "")

    def _given_up(self, why: str, e: _Again) -> NoAnswer | WorkerFault:
        if e.cure:
            return WorkerFault(f"{why}; {e.cure}")
        fault = NoAnswer(f"{self.place}: {why}", tried=True)
        self._count(fault)
        return fault

    def _count(self, fault: ClipFault | None) -> None:
        """Raises WorkerFault where so many requests have failed that the next would too."""
        with self._lock:
            if fault is None:
                self._answered, self._failed = self._answered + 1, 0
                return
            self._failed += 1
            hopeless = self._failed >= IN_A_ROW and (isinstance(fault, NoAnswer) or not self._answered)
        if hopeless:
            raise WorkerFault(
                f"{self._failed} requests failed one after the other, the last: {fault}"
            ) from fault

    def _said(self, e: BaseException) -> str:
        """An error of the network in a few words: without objects and their addresses."""
        reason = getattr(e, "reason", None)
        text = one_line(reason if isinstance(reason, BaseException) else e)
        return self._clean(text.rpartition("object at 0x")[2].partition(": ")[2] or text)[:WORDS]

    def _clean(self, text: str) -> str:
        """Without the key; one of a few letters (EMPTY, for servers that need none) is no secret, but may be a word."""
        return text.replace(self._key, "…") if len(self._key) >= SECRET else text


def key(options: ServedModel) -> str | None:
    """The API key; None where the recipe names none. Raises RecipeError."""
    if options.key_env is None:
        return None
    found = os.environ.get(options.key_env, "").strip()
    if not found:
        raise RecipeError(
            f"key_env: the environment variable {options.key_env} is not set; put the API key into it"
        )
    if not found.isascii() or not found.isprintable():
        raise RecipeError(f"key_env: what is in the environment variable {options.key_env} is no API key")
    return found


def retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait, by `retry-after-ms` or `Retry-After` (seconds or a date); None where not."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            return max(0.0, float(headers.get(name, "")) / unit)
    with contextlib.suppress(ValueError, TypeError):
        at = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, (at - datetime.now(UTC)).total_seconds())
    return None


def _longer(attempt: int) -> float:
    """Seconds to wait after the attempt of that number (from 1)."""
    return min(LONGEST_S, BACKOFF_S * 2 ** (attempt - 1)) * random.uniform(1 - JITTER, 1 + JITTER)


def _base(url: str) -> str:
    parts = urlsplit(url)
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _words(data: bytes) -> str:
    """What a server says of an error: OpenAI's `error.message`, FastAPI's `detail`, or what there is."""
    text = data.decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(text)
        for name in ("error", "detail", "message"):
            if isinstance(said, dict) and said.get(name):
                said = said[name]
                code = said.get("code") if isinstance(said, dict) else None
                if isinstance(code, str) and "message" in said:
                    said = f"{said['message']} ({code})"
        text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    return one_line(text)[:WORDS]


class Gate:
    """Who may start a request when: bounded at once and a minute, and held up when the server asks for it.

    The bound at once is halved when the server is asked too much and grows by one for as many answers as it allows
    (additive increase, multiplicative decrease: Chiu and Jain, 1989).
    """

    def __init__(self, concurrency: int, per_minute: float | None, clock: Callable[[], float], sleep: Sleep):
        self.concurrency, self.clock, self.sleep = concurrency, clock, sleep
        self.spacing = 60.0 / per_minute if per_minute else 0.0  # seconds between two starts
        self.allowed = float(concurrency)
        self._running = 0
        self._next = self._held = self._cut = -float("inf")
        self._free = threading.Condition()

    @contextlib.contextmanager
    def place(self, stop: threading.Event) -> Iterator[float]:
        """A place in the line; gives the seconds waited for it. Raises Stopped."""
        arrived = self.clock()
        with self._free:
            while self._running >= int(self.allowed) and not stop.is_set():
                self._free.wait(0.2)
            self._running += 1
        try:
            self._wait(stop)
            began = self.clock()
            try:
                yield began - arrived
            except _Again as e:
                if e.crowded:
                    self._less(began)
                raise
            with self._free:
                self.allowed = min(self.concurrency, self.allowed + 1 / self.allowed)
        finally:
            with self._free:
                self._running -= 1
                self._free.notify_all()

    def hold(self, seconds: float) -> None:
        """Nobody starts for so long."""
        with self._free:
            self._held = max(self._held, self.clock() + seconds)

    def _wait(self, stop: threading.Event) -> None:
        while True:
            if stop.is_set():
                raise Stopped("stopped")
            with self._free:
                now = self.clock()
                at = max(self._next, self._held)
                if at <= now:
                    self._next = now + self.spacing
                    return
            self.sleep(at - now, stop)

    def _less(self, began: float) -> None:
        """Half as much; once for all that were under way when it was first too much."""
        with self._free:
            if began > self._cut:
                self.allowed = max(1.0, min(self.allowed, self._running) / 2)
                self._cut = self.clock()
