"""What a model said, a line an item, kept as it is said: an evaluation that was stopped goes on where it was.

OUT/answers.jsonl   the protocol on the first line, then {"id": …, …} for each item
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME = "answers.jsonl"


class Answers:
    """By the item's id.

    Args:
        protocol: what decides the answers. Raises ValueError where `out` holds answers that others decided.
    """

    def __init__(self, out: Path, protocol: dict[str, Any]):
        self.path, self.protocol = out / NAME, json.loads(json.dumps(protocol))
        self.told: dict[str, dict[str, Any]] = {}
        out.mkdir(parents=True, exist_ok=True)
        whole = b""
        if self.path.exists():
            whole = self.path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]  # a line that was cut off is said again
        first, *rest = whole.splitlines() or [b""]
        if first:
            self._check(first)
            self.told = {row["id"]: row for row in map(json.loads, rest)}
        else:
            whole = self._line({"protocol": self.protocol})
        self.path.write_bytes(whole)

    def _check(self, first: bytes) -> None:
        try:
            was = json.loads(first)["protocol"]
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{self.path} is not of 'clipmill eval vlm': give another --out") from e
        names = [*self.protocol, *(name for name in was if name not in self.protocol)]
        for name in names:
            if was.get(name) != self.protocol.get(name):
                raise ValueError(
                    f"{self.path} holds answers with {name} {was.get(name)!r}, not {self.protocol.get(name)!r}: "
                    "give another --out, or delete it to begin anew"
                )

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those that are not answered yet, in order, and those whose video could not be read when they were asked."""
        return [id for id in ids if "broken" in self.told.get(id, {"broken": ""})]

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Keep rows with an 'id'; written at once."""
        rows = list(rows)
        with self.path.open("ab") as f:
            f.write(b"".join(map(self._line, rows)))
        self.told |= {row["id"]: row for row in rows}

    def of(self, ids: Iterable[str]) -> list[dict[str, Any]]:
        return [self.told[id] for id in ids]

    @staticmethod
    def _line(row: dict[str, Any]) -> bytes:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
