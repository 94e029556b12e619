"""A caption as a record of fields: one JSON schema, one way to write it as text, for captions, training and sampling.

A model is asked for the JSON object of `schema`; `parse` checks what it says; `measured` puts what was measured of the
camera where it says what it believes (general models name the camera's motion right in 45 to 61 % of clips, says
SkyReels-V2, arXiv 2504.13074). `text` writes a record in words. Training that is to know captions of many lengths draws
some fields in some order with `sampled` (as HunyuanVideo does, arXiv 2412.03603); a prompt written as a record and
given to `text` is, byte for byte, what a model was trained on.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.caption.baselines import camera

KEEP = 0.7  # of the fields, on average, in `sampled`


class Broken(ValueError):
    """No JSON of the schema; the message is a clause that says why."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Subject(_Part):
    """Someone or something that the clip is about."""

    appearance: str = Field(description="who or what it is and how it looks: 'a woman in a red coat'")
    action: str = Field(description="what it does, in order: 'walking towards the viewer'; '' for nothing")
    position: str = Field(description="where in the picture: 'on the left'")


class Record(_Part):
    """What a structured caption holds; '' and [] stand for nothing to say."""

    subjects: list[Subject] = Field(description="the main ones, the most important first")
    action: str = Field(description="one sentence: who does what")
    scene: str = Field(description="where it takes place and what is around")
    style: str = Field(description="live action, animation, …, and its look")
    shot: str = Field(description="shot size and angle: 'a close-up at eye level'")
    lighting: str = Field(description="light and colours")
    camera: str = Field(description="how the camera moves; '' where that is not measured")


FIELDS = ("action", "subjects", "scene", "style", "shot", "lighting", "camera")  # in the order of the text


@functools.cache
def schema_text() -> str:
    """The schema as a prompt holds it."""
    return json.dumps(_plain(Record.model_json_schema()), ensure_ascii=False)


def schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of `Record`: every field required and no other allowed, as strict servers want it."""
    found: dict[str, Any] = json.loads(schema_text())
    return found


def _plain(value: Any) -> Any:
    """Without pydantic's titles, which say nothing."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k != "title" or not isinstance(v, str)}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def response_format() -> dict[str, Any]:
    """The field of a chat request that has a server hold its model to the schema."""
    return {"type": "json_schema", "json_schema": {"name": "caption", "strict": True, "schema": schema()}}


def parse(said: str) -> Record:
    """The record in an answer; words and a code fence around it do no harm. Raises Broken."""
    begins = re.search(r"\{\s*[\"}]", said) or re.search(r"\{", said)
    if begins is None:
        raise Broken("it holds no JSON object")
    if "}" not in said[begins.start() :]:
        raise Broken("its JSON object breaks off")
    try:
        found, _ = json.JSONDecoder(strict=False).raw_decode(said, begins.start())
        return Record.model_validate(found, strict=True)
    except ValidationError as e:
        wrong = "; ".join(
            f"{'.'.join(map(str, x['loc'])) or 'the object'}: {x['msg'].lower()}" for x in e.errors()[:4]
        )
        raise Broken(wrong) from e
    except (ValueError, RecursionError) as e:
        raise Broken(f"its JSON is not valid ({e})") from e


def measured(record: Record, scores: dict[str, float]) -> Record:
    """The record with the camera in the words of a clip's motion scores; '' where they say nothing for sure."""
    return record.model_copy(update={"camera": camera(scores)})


def record_of(raw: str, scores: dict[str, float]) -> Record | None:
    """The record of a clip's caption, from what the captioner said (`Caption.raw`); None where that is no record."""
    try:
        return measured(parse(raw), scores)
    except Broken:
        return None


def told(prompt: str) -> str:
    """A prompt for a video as a model is given it: a JSON record in words, any other text as it is. Raises Broken."""
    if not prompt.lstrip().startswith("{"):
        return prompt
    try:
        return text(parse(prompt))
    except Broken as e:
        raise Broken(f"the prompt begins as a JSON object and is no structured caption: {e}") from e


def text(record: Record, fields: Sequence[str] = FIELDS) -> str:
    """A record in words: a sentence or more for each of the fields, in their order; '' for a record of nothing."""
    return " ".join(said for name in fields if (said := _said(record, name)))


def sampled(record: Record, seed: str, keep: float = KEEP) -> str:
    """Some of the fields in some order, the same for a seed everywhere: a clip's id and the epoch, for one.

    Args:
        keep: probability with which a field stays; what the clip is about (action or subjects) is never all left out.
    """
    draw = random.Random(seed)
    told = [name for name in FIELDS if _said(record, name)]
    about = [name for name in told if name in ("action", "subjects")]
    kept = [name for name in told if draw.random() < keep]
    if about and not set(about) & set(kept):
        kept.append(draw.choice(about))
    draw.shuffle(kept)
    return text(record, kept)


def _said(record: Record, name: str) -> str:
    if name != "subjects":
        return _sentence(getattr(record, name))
    return " ".join(
        _sentence(", ".join(filter(None, map(_line, _parts(s))))) for s in record.subjects
    ).strip()


def _parts(subject: Subject) -> tuple[str, str, str]:
    return subject.appearance, subject.action, subject.position


def _line(words: str) -> str:
    """One line, without the full stop that the sentence will have."""
    return " ".join(words.split()).rstrip(".")


def _sentence(words: str) -> str:
    words = " ".join(words.split())
    if not words:
        return ""
    return words[0].upper() + words[1:] + ("" if words[-1] in '.!?…"”。！？」』' else ".")
