"""Sampling from a world model, any to any: text to pictures and videos, videos to text, both in turn.

    text → picture, video   `frames`: <s> text <vision> …; codes only within a frame, marks only after it
    video → text            `write`:  <s> … <vision> … </vision> text …
    whatever comes          `go_on`:  the model says itself when it shows something, and when a video ends

A VQ autoencoder (`models.autoencoders.vq`) makes codes of what is given, and pictures of codes that are drawn. Guidance
as in Large World Model (Liu et al. 2024, sec. 4.3): logits u + s (c − u), u after the prompt `<s><vision>` alone.

Random numbers are a row's own, from its seed: what is drawn does not depend on its company in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.language.layout import Laid, Layout, Part
from models.language.world import Places, Said, World

Parts = Sequence[Part | str | Tensor]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    scale: of guidance; 1: none. temperature: 0: the likeliest. top_k: among so many; None: among all.
    """

    scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None


PICTURE = Sampling(scale=5.0, top_k=8192)  # these two: of Large World Model's release
VIDEO = Sampling(top_k=1000)
TEXT = Sampling(temperature=0.0)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """u + s (c − u): exactly c at s = 1, exactly u at s = 0."""
    return torch.lerp(unconditional, conditional, scale)


def draw(logits: Tensor, how: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One of V for each row, int64 [B]. logits [B, V], guided already; a generator a row."""
    if how.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / how.temperature
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        least = logits.topk(how.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    rows = zip(logits.softmax(-1), generators, strict=True)
    return torch.cat([torch.multinomial(p, 1, generator=generator) for p, generator in rows])


class Session:
    """Sequences that grow together, a batch row each, and what the model says of what comes next.

    Shorter prompts are filled up in front, which nobody sees.

    Args:
        most: tokens that may be added to each.
    """

    def __init__(self, model: World, prompts: Sequence[Laid], most: int):
        self.model, self.device = model, model.embed.weight.device
        longest = max(p.length for p in prompts)
        self.ahead = [longest - p.length for p in prompts]
        self.capacity, self.cache = longest + most, model.cache(longest + most)
        tokens, vision = torch.zeros(2, len(prompts), longest, dtype=torch.long)
        for i, (ahead, prompt) in enumerate(zip(self.ahead, prompts, strict=True)):
            tokens[i, ahead:], vision[i, ahead:] = prompt.tokens, prompt.vision
        self._lay()
        self._say(tokens.to(self.device), vision.bool().to(self.device))

    def _lay(self) -> None:
        rows = [[n, self.capacity - n] for n in self.ahead]
        self.places = Places.packed(rows, self.capacity, self.device)

    def _say(self, tokens: Tensor, vision: Tensor) -> None:
        start = self.cache.length
        places = self.places.part(start, start + tokens.shape[1])
        self.said: Said = self.model(tokens, vision, places, cache=self.cache, last=True)

    def add(self, tokens: Tensor, vision: bool) -> None:
        """One more in each row, int64 [B], all visual or none."""
        self._say(tokens[:, None], torch.full_like(tokens[:, None], vision, dtype=torch.bool))

    def keep(self, rows: int) -> None:
        """Only the first so many rows go on."""
        self.ahead = self.ahead[:rows]
        self.cache.keep(slice(rows))
        self.said = Said(*(None if x is None else x[:rows] for x in self.said))  # type: ignore[arg-type]
        self._lay()

    @property
    def text(self) -> Tensor:
        """Logits [B, words]."""
        return self.said.text[:, -1]

    @property
    def vision(self) -> Tensor:
        """Logits [B, codes], marks included."""
        assert self.said.vision is not None
        return self.said.vision[:, -1]


@torch.no_grad()
def frames(
    model: World,
    layout: Layout,
    prompts: Sequence[Parts],
    count: int,
    seeds: Sequence[int],
    *,
    given: Tensor | None = None,
    first: Sampling = PICTURE,
    rest: Sampling = VIDEO,
) -> Tensor:
    """Codes int64 [B, count, frame] of a picture or a video after each prompt (text, or anything).

    Args:
        seeds: one a prompt.
        given: codes [B, n, frame] of frames that it begins with; they are among the `count`.
        first, rest: how the codes of the first frame and of those after it are drawn.
    """
    known = torch.empty(len(prompts), 0, layout.frame, dtype=torch.long) if given is None else given.cpu()
    if known.shape[1] >= count:
        raise ValueError(f"{known.shape[1]} frames are given: ask for more than those")
    hows = [first if i == 0 else rest for i in range(known.shape[1], count)]
    rows, generators = len(prompts), _generators(seeds, len(prompts), model)
    guide = any(how.scale != 1 for how in hows)
    started = [_started(layout, parts, codes) for parts, codes in zip(prompts, known, strict=True)]
    if guide:
        started += [_started(layout, [], codes) for codes in known]
    session = Session(model, started, len(hows) * (layout.frame + 1))
    found = []
    for i, how in enumerate(hows):
        if guide and all(x.scale == 1 for x in hows[i:]):
            session.keep(rows)
            guide = False
        for _ in range(layout.frame):
            logits = session.vision[:, : layout.codes]  # no mark within a frame
            if guide:
                conditional, unconditional = logits.chunk(2)
                logits = guided(conditional, unconditional, how.scale)
            codes = draw(logits, how, generators)
            found.append(codes)
            session.add(torch.cat([codes, codes]) if guide else codes, vision=True)
        if i + 1 < len(hows):
            session.add(torch.full((len(session.ahead),), layout.eof, device=session.device), vision=True)
    drawn = torch.stack(found, dim=1).unflatten(1, (len(hows), layout.frame))
    return torch.cat([known.to(drawn.device), drawn], dim=1)


@torch.no_grad()
def write(
    model: World,
    layout: Layout,
    prompts: Sequence[Parts],
    most: int,
    seeds: Sequence[int],
    how: Sampling = TEXT,
) -> list[str]:
    """Text after each prompt, up to </s> or `most` tokens. Guidance is for pictures; `how` must have none."""
    generators = _generators(seeds, len(prompts), model)
    session = Session(model, [layout.lay_out(parts, end=False) for parts in prompts], most)
    rows: list[list[int]] = [[] for _ in prompts]
    done = torch.zeros(len(rows), dtype=torch.bool, device=session.device)
    for i in range(most):
        tokens = draw(session.text[:, : layout.words], how, generators).masked_fill(done, layout.end)
        done |= tokens == layout.end
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        if bool(done.all()) or i + 1 == most:
            break
        session.add(tokens, vision=False)
    return [layout.decode(row[: row.index(layout.end)] if layout.end in row else row) for row in rows]


@torch.no_grad()
def go_on(
    model: World,
    layout: Layout,
    parts: Parts,
    most: int,
    frames: int,
    seed: int,
    *,
    text: Sampling = TEXT,
    vision: Sampling = VIDEO,
) -> list[str | Tensor]:
    """Texts and codes [N, frame] that the model puts after a prompt, up to </s>, `most` tokens of text or <vision> when
    there were `frames` of codes.

    Where it writes <vision>, frames follow; after each, it chooses between <eof> and <eov>. There is no guidance.
    """
    generators = _generators([seed], 1, model)
    longest = most + frames * (layout.frame + 1 + len(layout.closing))
    session = Session(model, [layout.lay_out(parts, end=False)], longest)
    written = 0  # tokens that it chose of its text
    tokens: list[int] = []
    visual: list[bool] = []

    def add(token: int, seen: bool = False) -> None:
        tokens.append(token)
        visual.append(seen)
        session.add(torch.tensor([token], device=session.device), seen)

    opening, closing = layout.opening, layout.closing
    while written < most:
        token = int(draw(session.text[:, : layout.words], text, generators))
        if token == layout.end:
            break
        add(token)
        written += 1
        if tuple(tokens[-len(opening) :]) != opening or any(visual[-len(opening) :]):
            continue
        if not frames:
            del tokens[-len(opening) :], visual[-len(opening) :]
            break
        while frames:
            frames -= 1
            for _ in range(layout.frame):
                add(int(draw(session.vision[:, : layout.codes], vision, generators)), True)
            marks = session.vision[:, layout.eof : layout.eov + 1]
            add(layout.eof + int(draw(marks, vision, generators)) if frames else layout.eov, True)
            if tokens[-1] == layout.eov:
                break
        for token in closing:
            add(token)
    return layout.read(torch.tensor(tokens, dtype=torch.long), torch.tensor(visual, dtype=torch.bool))


def _started(layout: Layout, parts: Parts, known: Tensor) -> Laid:
    """A prompt for a video that begins with `known`, [n, frame]."""
    laid = layout.lay_out(parts, end=False, opened=True)
    marked = torch.cat([known, known.new_full((len(known), 1), layout.eof)], dim=1).flatten()
    there = torch.ones(len(marked), dtype=torch.bool)
    return Laid(*(torch.cat(pair) for pair in zip(laid, (marked, there, there), strict=True)))


def _generators(seeds: Sequence[int], rows: int, model: World) -> list[torch.Generator]:
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} prompts: give one for each")
    return [torch.Generator(model.embed.weight.device).manual_seed(seed) for seed in seeds]
