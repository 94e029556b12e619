"""A served model that is asked everything once: its answers are kept in the run's output before they are used.

    DIR/answers/<model>/ab/<key>.json

The key is the SHA-256 of the clip's id and the whole request: frames or mp4, prompt, model, parameters, and not where
the server is. Killed and resumed, retried, or captioned once more, a run reads what it has paid for. What was damaged
is asked again.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.caption.client import Client, Json
from pipeline.faults import ClipFault
from pipeline.io.store import Store, folder_name
from pipeline.recipe_captions import ServedModel
from pipeline.watch import progress

T = TypeVar("T")
FOLDER = "answers"
READERS = 16  # answers read at a time for the account


@dataclass(frozen=True)
class Answer:
    """What a served model said."""

    text: str  # without white space around it
    finish: str  # 'stop', 'length', 'content_filter', …
    refusal: str  # what it says in place of a text
    logprobs: list[Json]  # of each token: token, logprob, top_logprobs; [] where the server gives none
    cost: dict[str, float]  # requests, prompt_tokens, completion_tokens, usd


def key(clip_id: str, body: Json) -> str:
    """Names a request: 64 hex digits."""
    said = json.dumps({"clip": clip_id, "request": body}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


class Server:
    """Asks a served model from many threads, and no question twice.

    Args:
        store: of the run; none: nothing is kept.
    """

    def __init__(self, options: ServedModel, store: Store | None, client: Client | None = None):
        self.options, self.store = options, store
        self.client = client or Client(options)
        self.folder = f"{FOLDER}/{folder_name(options.model)}"
        self._pool = ThreadPoolExecutor(options.concurrency)

    def body(self, content: list[Json] | str, **more: Any) -> Json:
        """A request of one message; `more` fields stand back behind the recipe's."""
        messages = [{"role": "user", "content": content}]
        return {"model": self.options.model, "messages": messages, **more, **self.options.parameters}

    def ask(self, clip_id: str, body: Json, stop: threading.Event | None = None) -> Answer:
        """The answer to a request; from the store where it is there. Raises as `Client.ask`, and StoreError."""
        name = key(clip_id, body)
        path = f"{self.folder}/{name[:2]}/{name}.json"
        said = self._read(path)
        if said is None:
            said = self.client.ask(body, stop)
            if self.store is not None:
                cost = cost_of(said, self.options)
                kept = {"clip_id": clip_id, "request": _without_media(body), "cost": cost, "answer": said}
                self.store.write_bytes(path, _sealed(kept))
        return read(said, self.options)

    def each(self, calls: Sequence[Callable[[threading.Event], T]]) -> list[T | ClipFault]:
        """What each call returns, or the ClipFault it raises, in their order; many at once. Raises any other fault."""
        stop = threading.Event()
        futures: list[Future[T]] = [self._pool.submit(call, stop) for call in calls]
        waiting: set[Future[T]] = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                progress()  # each request is bounded in time
                for future in done:
                    if (e := future.exception()) is not None and not isinstance(e, ClipFault):
                        raise e
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
        return [e if isinstance(e := f.exception(), ClipFault) else f.result() for f in futures]

    def _read(self, path: str) -> Json | None:
        if self.store is None or not self.store.exists(path):
            return None
        return unsealed(self.store.read_bytes(path), "answer")


def read(said: Json, options: ServedModel) -> Answer:
    """What a response of a server says, which `Client.ask` gave."""
    choice = said["choices"][0]
    message = choice["message"]
    content = message.get("content") or ""
    if isinstance(content, list):  # parts, as some servers give them
        parts = (part.get("text") if isinstance(part, dict) else part for part in content)
        content = "".join(part for part in parts if isinstance(part, str))
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    return Answer(
        _sound(content).strip(),
        str(choice.get("finish_reason") or "stop"),
        _sound(message.get("refusal") or ""),
        [t for t in tokens if isinstance(t, dict)] if isinstance(tokens, list) else [],
        cost_of(said, options),
    )


def _sound(text: object) -> str:
    """Without halves of characters, which JSON may hold and no file does."""
    return str(text).encode("utf-8", "replace").decode()


def cost_of(said: Json, options: ServedModel) -> dict[str, float]:
    """What a response cost: `requests` 1, the tokens that the server counted, and `usd` at the recipe's prices."""
    usage = said.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    found = {"requests": 1.0}
    for name in ("prompt_tokens", "completion_tokens"):
        count = counts.get(name)
        found[name] = float(count) if isinstance(count, int | float) and 0 <= count < math.inf else 0.0
    usd = (found["prompt_tokens"] * options.usd_in + found["completion_tokens"] * options.usd_out) / 1e6
    return found | {"usd": round(usd, 9)}


def total(costs: Iterable[dict[str, float]]) -> dict[str, float]:
    """Several answers' cost as one."""
    found: dict[str, float] = {}
    for cost in costs:
        for name, value in cost.items():
            found[name] = round(found.get(name, 0.0) + value, 9)
    return found


# ---------------------------------------------------------------- the account


def stored(store: Store) -> set[str]:
    """Names of the answers that a run keeps."""
    return set(store.list(FOLDER, ".json"))


def account(store: Store, before: set[str]) -> dict[str, float]:
    """What the answers cost that were not there before: `requests`, tokens, `usd`; with `before`, how many there were.

    {} where the run has none.
    """
    names = stored(store)
    if not names:
        return {}
    with ThreadPoolExecutor(READERS) as pool:
        costs = pool.map(lambda name: unsealed(store.read_bytes(name), "cost") or {}, sorted(names - before))
        zero = {"requests": 0.0, "prompt_tokens": 0.0, "completion_tokens": 0.0, "usd": 0.0}
        return total([zero, *costs]) | {"before": float(len(names & before))}


# ---------------------------------------------------------------- one answer as a file


def _sealed(kept: Json) -> bytes:
    """As JSON, with a digest by which damage shows."""
    text = json.dumps(kept, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "kept": kept}).encode()


def unsealed(data: bytes, part: str) -> Json | None:
    """A part of what `_sealed` made; None where it is damaged."""
    try:
        said = json.loads(data)
        text = json.dumps(said["kept"], sort_keys=True)
        found: Json | None = said["kept"][part]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if hashlib.sha256(text.encode()).hexdigest() == said.get("sha256") else None


def _without_media(value: Any) -> Any:
    """A request with data URLs replaced by what names them: the answer's file is small."""
    if isinstance(value, dict):
        return {k: _without_media(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_media(v) for v in value]
    if isinstance(value, str) and value.startswith("data:") and ";base64," in value[:64]:
        return f"{value.partition(',')[0]}, sha256 {hashlib.sha256(value.encode()).hexdigest()}"
    return value
