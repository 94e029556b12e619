"""Text, pictures and videos in one sequence of tokens, as Large World Model lays them out (Liu et al. 2024, sec. 3.1).

    <s> words … <vision> f₁[256] 8192 f₂[256] 8192 … f_N[256] 8193 </vision> words … </s>

A frame is 256 codes of a VQ autoencoder, row by row, then <eof> (8192), after the last frame, or a single picture,
<eov> (8193). Codes and these two marks are visual tokens: a mask says which places are, they have an embedding and a
head of their own, and the same number may be a word elsewhere. <vision> and </vision> are text, so several tokens where
the tokenizer has no word for them. <s> is given, never learnt; </s> is learnt always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

OPENING, CLOSING = "<vision>", "</vision>"


class Part(NamedTuple):
    """Text, or a video as its codes int64 [N, 256] (a picture: N = 1); whether its tokens are to be learnt."""

    content: str | Tensor
    learnt: bool = True


class Laid(NamedTuple):
    """A document of L tokens, each [L]."""

    tokens: Tensor  # int64
    vision: Tensor  # bool, visual tokens
    learnt: Tensor  # bool

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Layout:
    """How documents become tokens, and back.

    Args:
        encode, decode: text → tokens without marks around them, and back.
        begin, end: <s> and </s>.
        words: how many text tokens there are, marks included.
        codes: of the VQ autoencoder; the two tokens after them are <eof> and <eov>.
        frame: codes of a frame.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    begin: int
    end: int
    words: int
    codes: int = 8192
    frame: int = 256

    @classmethod
    def of(cls, tokenizer: Any, codes: int = 8192, frame: int = 256) -> Layout:
        """Of a tokenizer of `transformers`. Raises ValueError where it has no <s> or </s>."""
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if begin is None or end is None:
            raise ValueError("the tokenizer has no token for the begin or the end of a text: choose another")

        def encode(text: str) -> list[int]:
            # a </s> that somebody wrote is words, and ends nothing
            return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

        return cls(encode, tokenizer.decode, begin, end, len(tokenizer), codes, frame)

    @classmethod
    def of_bytes(cls, codes: int = 8192, frame: int = 256) -> Layout:
        """Text as UTF-8, which needs no vocabulary: 256 bytes, then <s> and </s>."""

        def decode(tokens: list[int]) -> str:
            return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")

        return cls(lambda text: list(text.encode()), decode, 256, 257, 258, codes, frame)

    @property
    def eof(self) -> int:
        return self.codes

    @property
    def eov(self) -> int:
        return self.codes + 1

    @cached_property
    def opening(self) -> tuple[int, ...]:
        return tuple(self.encode(OPENING))

    @cached_property
    def closing(self) -> tuple[int, ...]:
        return tuple(self.encode(CLOSING))

    def cost(self, frames: int) -> int:
        """Tokens that a video of so many frames takes."""
        return len(self.opening) + frames * (self.frame + 1) + len(self.closing)

    def lay_out(
        self, parts: Sequence[Part | str | Tensor], *, end: bool = True, opened: bool = False
    ) -> Laid:
        """One document.

        Args:
            parts: what is given without a `Part` is to be learnt.
            end: with </s>. opened: with <vision> at its end, a prompt for a picture; `parts` may then be empty: the
                unconditional prompt of classifier-free guidance.

        Raises ValueError for codes of another shape or range.
        """
        runs = [([self.begin], False, False)]  # tokens, visual, learnt
        for part in parts:
            content, learnt = part if isinstance(part, Part) else (part, True)
            if isinstance(content, str):
                runs.append((self.encode(content), False, learnt))
            else:
                runs.append((list(self.opening), False, learnt))
                runs.append((self.visual(content).tolist(), True, learnt))
                runs.append((list(self.closing), False, learnt))
        if opened:
            runs.append((list(self.opening), False, True))
        if end:
            runs.append(([self.end], False, True))
        tokens = torch.tensor([t for run, _, _ in runs for t in run])
        masks = (torch.tensor([run[i] for run in runs for _ in run[0]]) for i in (1, 2))
        return Laid(tokens, *masks)

    def visual(self, codes: Tensor) -> Tensor:
        """Codes [N, 256] with their marks, int64 [N · 257]."""
        if codes.ndim != 2 or codes.shape[1] != self.frame or not len(codes):
            raise ValueError(f"codes of shape {tuple(codes.shape)}: give [frames, {self.frame}]")
        if codes.min() < 0 or codes.max() >= self.codes:
            raise ValueError(
                f"codes from {int(codes.min())} to {int(codes.max())}: give codes from 0 to {self.codes - 1}"
            )
        marks = codes.new_full((len(codes), 1), self.eof)
        marks[-1] = self.eov
        return torch.cat([codes, marks], dim=1).flatten().long()

    def frames(self, tokens: Tensor) -> Tensor:
        """Inverse of `visual`. Raises ValueError where marks are not where they belong."""
        size = self.frame + 1
        if not len(tokens) or len(tokens) % size:
            raise ValueError(f"{len(tokens)} visual tokens: give whole frames of {size}")
        rows = tokens.view(-1, size)
        expected = [self.eof] * (len(rows) - 1) + [self.eov]
        if rows[:, -1].tolist() != expected or rows[:, :-1].max() >= self.codes:
            raise ValueError(
                f"visual tokens: each {self.frame} codes below {self.codes} must be followed by {self.eof}, the last "
                f"by {self.eov}"
            )
        return rows[:, :-1]

    def read(self, tokens: Tensor, vision: Tensor) -> list[str | Tensor]:
        """Inverse of `lay_out`: texts and codes [N, 256] of the document up to </s>; empty texts are left out.

        Raises ValueError for visual tokens that are no video between <vision> and </vision>.
        """
        parts: list[str | Tensor] = []
        start, before = 0, False  # of the run; whether a video came before it
        for visual, places in groupby(vision.tolist()):
            stop = start + len(list(places))
            run = tokens[start:stop]
            start = stop
            if visual:
                parts.append(self.frames(run))
                before = True
                continue
            text = run.tolist()
            text = text[1:] if stop == len(run) and text[0] == self.begin else text
            closed = before and tuple(text[: len(self.closing)]) == self.closing
            if before and not closed and stop < len(tokens):
                raise ValueError(f"{CLOSING} does not follow the visual tokens that end at {stop - len(run)}")
            text = text[len(self.closing) :] if closed else text
            done = self.end in text
            text = text[: text.index(self.end)] if done else text
            if stop < len(tokens) and not done:
                if tuple(text[-len(self.opening) :]) != self.opening:
                    raise ValueError(f"no {OPENING} before the visual tokens that begin at {stop}")
                text = text[: -len(self.opening)]
            if text:
                parts.append(self.decode(text))
            if done:
                break
        return parts
