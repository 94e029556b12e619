"""Conversations as tokens: which of them a model is asked, which are the answers that it learns.

A conversation is a list of {'role', 'content'}; its pictures come beside it, in order. They stand where a content says
<image> or <video>; where it does not, all are shown at the beginning of the first thing that the user says. What is
asked is what the tokenizer's template makes of the messages, as `transformers`' processors have it, so that a model
that is served sees what it was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.language.exported import CHAT, IMAGE, VIDEO

Message = Mapping[str, Any]
MARKS = re.compile(rf"({re.escape(IMAGE)}|{re.escape(VIDEO)})\n?")


@dataclass(frozen=True)
class Seen:
    """A picture or clip, by the places it takes.

    places: tokens of each mark that stands for it: one, or one a frame where a clip is shown as several images.
    video: whether its mark is <video>.
    told: what is said before each of its marks, where the template writes one for all of them.
    """

    places: tuple[int, ...]
    video: bool = False
    told: tuple[str, ...] = ()

    @property
    def marks(self) -> list[dict[str, str]]:
        return [{"type": "video" if self.video else "image"}] * (1 if self.told else len(self.places))


@dataclass(frozen=True)
class Document:
    """tokens: int64 [L]. learnt: bool [L], those of the assistant's answers and their ends, but for empty ones."""

    tokens: np.ndarray
    learnt: np.ndarray


class Chat:
    """Args:
    tokenizer: see `models.language.tokenizer`. template: jinja, as `apply_chat_template` takes it.
    marks: the tokens that the template writes for a picture and for a video.
    around: what stands around each mark of a clip of which something is `told`.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str = CHAT,
        marks: tuple[str, str] = (IMAGE, VIDEO),
        around: tuple[str, str] = ("", ""),
    ):
        self.tokenizer, self.template = tokenizer, template
        self.video, self.around = marks[1], around
        self.marks = [tokenizer.convert_tokens_to_ids(name) for name in marks]
        self.end: str = tokenizer.eos_token
        started = tokenizer("a").input_ids[:1]
        self.start = started if started and started[0] == tokenizer.bos_token_id else []
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.control = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)

    def asked(self, messages: Sequence[Message], seen: Sequence[Seen] = ()) -> list[int]:
        """Tokens up to where the assistant answers."""
        return self._expanded(self._ids(self._text(self._placed(messages, seen), True, seen), True), seen)

    def answered(self, text: str) -> list[int]:
        """Tokens of an answer and of its end."""
        return [*self._ids(self.clean(text)), self.tokenizer.eos_token_id]

    def document(self, messages: Sequence[Message], seen: Sequence[Seen] = ()) -> Document:
        """What is asked and answered, up to the last answer.

        Raises ValueError where nothing is answered, or a template does not write one message after the other.
        """
        placed = self._placed(messages, seen)
        done, tokens, learnt = "", [], []
        for i, message in enumerate(placed):
            if message["role"] != "assistant":
                continue
            asked, whole = self._text(placed[:i], True, seen), self._text(placed[: i + 1], False, seen)
            if not asked.startswith(done) or not whole.startswith(asked):
                raise ValueError(
                    "the template of conversations does not write message after message: use another"
                )
            before = self._ids(asked.removeprefix(done), not done)
            answer = self.answered(message["content"])
            end = whole.find(self.end, len(asked))
            done = whole[: end + len(self.end)] if end >= 0 else whole
            tokens += before + answer
            learnt += [False] * len(before) + [bool(message["content"].strip())] * len(answer)
        if not tokens:
            raise ValueError("no message is the assistant's, so there is nothing to learn")
        return self._document(tokens, learnt, seen)

    def plain(self, text: str, most: int) -> list[int]:
        """Tokens of a text that is no message, the first `most` of them."""
        return self._ids(self.clean(text))[:most] if text else []

    def clean(self, text: str) -> str:
        """A text in which nothing can act as a mark."""
        for token in self.control:
            text = text.replace(token, " ")
        return text

    def said(self, ids: Sequence[int]) -> str:
        """The text of an answer, up to its end; runs of white space are single spaces."""
        rows = list(ids)
        end = self.tokenizer.eos_token_id
        return " ".join(
            self.tokenizer.decode(
                rows[: rows.index(end)] if end in rows else rows, skip_special_tokens=True
            ).split()
        )

    # ------------------------------------------------------------ parts

    def _placed(self, messages: Sequence[Message], seen: Sequence[Seen]) -> list[dict[str, Any]]:
        """Messages in whose content the pictures stand."""
        given = sum(len(MARKS.findall(m["content"])) for m in messages if m["role"] == "user")
        where = given == len(seen)
        left = list(seen)
        placed: list[dict[str, Any]] = []
        for m in messages:
            if m["role"] != "user":
                placed.append({"role": m["role"], "content": self.clean(m["content"])})
                continue
            parts: list[dict[str, str]] = []
            pieces = MARKS.split(m["content"])
            if not where and left:
                parts += [mark for picture in left for mark in picture.marks]
                left = []
            for i, piece in enumerate(pieces):
                if i % 2:
                    parts += left.pop(0).marks if where else []
                elif piece:
                    parts.append({"type": "text", "text": self.clean(piece)})
            placed.append({"role": "user", "content": parts})
        if left:
            raise ValueError("a conversation with pictures has no message of the user's to show them in")
        return placed

    def _text(self, messages: Sequence[Message], ask: bool, seen: Sequence[Seen]) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=ask,
            enable_thinking=False,
        )
        if not any(picture.told for picture in seen):
            return text
        clips = iter([picture for picture in seen if picture.video])
        before, *pieces = text.split(self.video)
        parts, mark = [before], self.video.join(self.around)
        for piece in pieces:
            clip = next(clips, Seen(()))
            parts += [said + mark for said in clip.told] or [self.video]
            parts.append(piece)
        return "".join(parts)

    def _ids(self, text: str, first: bool = False) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found if not first or found[:1] == self.start else self.start + found

    def _expanded(self, tokens: Sequence[int], seen: Sequence[Seen]) -> list[int]:
        return self._document(tokens, [False] * len(tokens), seen).tokens.tolist()

    def _document(self, tokens: Sequence[int], learnt: Sequence[bool], seen: Sequence[Seen]) -> Document:
        """With as many marks of a picture as it has tokens."""
        x = np.asarray(tokens, np.int64)
        places = np.isin(x, self.marks)
        counts = [n for picture in seen for n in picture.places]
        if int(places.sum()) != len(counts):
            raise ValueError(f"{int(places.sum())} marks of pictures, but {len(counts)} are to be shown")
        times = np.ones(len(x), np.int64)
        times[places] = counts
        return Document(np.repeat(x, times), np.repeat(np.asarray(learnt, bool), times))
