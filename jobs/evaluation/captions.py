"""Captions of videos against those that people, or the run, gave them; and how probable these are to the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.items import Item
from jobs.evaluation.answers import Answers
from jobs.evaluation.looking import Tell, seen
from jobs.evaluation.numbers import Number, number, share
from models.hub import MissingModel

if TYPE_CHECKING:
    from jobs.speaking import Speaking


def say(
    speaker: Speaking,
    items: Sequence[Item],
    answers: Answers,
    *,
    prompt: str,
    most: int,
    temperature: float,
    seed: int,
    batch: int,
    tell: Tell,
) -> None:
    """A caption of each item that has none yet: {'id', 'said', 'captions'}, or {'id', 'broken'}."""
    left = set(answers.missing(item.id for item in items))
    todo = [item for item in items if item.id in left]
    asked = [{"role": "user", "content": prompt}]
    for found, broken in seen(speaker, todo, batch):
        rows: list[dict[str, Any]] = [{"id": id, "broken": why} for id, why in broken.items()]
        if found:
            visuals = [[visual] for _, visual in found]
            said = speaker.answer(
                [asked] * len(found), visuals, most=most, temperature=temperature, seed=seed
            )
            rows += [
                {"id": item.id, "said": text, "captions": list(item.captions)}
                for (item, _), text in zip(found, said, strict=True)
            ]
        answers.add(rows)
        tell(len(answers.told), len(items))


def figures(rows: Sequence[dict[str, Any]], notes: list[str]) -> list[Number]:
    """CIDEr-D, BLEU, ROUGE-L, METEOR where its program is, and the share that is a reference word for word."""
    from models.measures.captions.bleu import bleu
    from models.measures.captions.cider import cider_d
    from models.measures.captions.meteor import meteor
    from models.measures.captions.rouge_l import rouge_l
    from models.measures.captions.tokens import tokens

    said, references = [row["said"] for row in rows], [row["captions"] for row in rows]
    n = len(rows)
    found = [number("CIDEr-D", math.fsum(cider_d(said, references)) / n, n, unit="0 to 10")]
    found += [number(f"BLEU-{i}", x, n, unit="0 to 1") for i, x in enumerate(bleu(said, references), 1)]
    rouge = math.fsum(rouge_l(s, r) for s, r in zip(said, references, strict=True)) / n
    found.append(number("ROUGE-L", rouge, n, unit="0 to 1"))
    try:
        found.append(number("METEOR", meteor(said, references)[0], n, unit="0 to 1"))
    except MissingModel as e:
        notes.append(f"No METEOR ({e}).")
    same = [tokens(s) in [tokens(x) for x in r] for s, r in zip(said, references, strict=True)]
    found.append(share("word for word", same))
    return found + attributes(rows)


def attributes(rows: Sequence[dict[str, Any]]) -> list[Number]:
    """Of captions of the small world of `clipmill toy`: each attribute, their mean, and all at once; [] of others."""
    from dataclasses import fields

    from pipeline.toy.world import Attributes, stated

    wanted = [stated(" ".join(row["captions"][0].split())) for row in rows]
    if not all(a.known() for a in wanted):
        return []
    said = [stated(" ".join(row["said"].split())) for row in rows]
    names = [f.name for f in fields(Attributes) if f.name != "pan"]
    right = {
        name: [getattr(a, name) == getattr(b, name) for a, b in zip(wanted, said, strict=True)]
        for name in names
    }
    found = [share(name, values) for name, values in right.items()]
    each = list(zip(*right.values(), strict=True))
    found.append(share("attributes", [sum(values) / len(values) for values in each]))
    found.append(share("all attributes", [all(values) for values in each]))
    return found


def weigh(
    speaker: Speaking, items: Sequence[Item], answers: Answers, *, prompt: str, batch: int, tell: Tell
) -> None:
    """How probable each caption is: {'id', 'log_p', 'tokens': of each, 'other': log p of another video's caption}.

    The other is the first caption of the next item that has other captions.
    """
    left = set(answers.missing(item.id for item in items))
    other = {item.id: _other(items, i) for i, item in enumerate(items) if item.id in left}
    todo = [item for item in items if item.id in left]
    asked = [{"role": "user", "content": prompt}]
    for found, broken in seen(speaker, todo, batch):
        rows: list[dict[str, Any]] = [{"id": id, "broken": why} for id, why in broken.items()]
        for item, visual in found:
            texts = [*item.captions, *filter(None, [other[item.id]])]
            known = speaker.log_likelihood(asked, [visual], texts)
            own = known[: len(item.captions)]
            row = {"id": item.id, "log_p": [p for p, _ in own], "tokens": [n for _, n in own]}
            rows.append(row | ({"other": list(known[-1])} if other[item.id] else {}))
        answers.add(rows)
        tell(len(answers.told), len(items))


def _other(items: Sequence[Item], i: int) -> str:
    later = (items[(i + step) % len(items)] for step in range(1, len(items)))
    return next((x.captions[0] for x in later if x.captions[0] not in items[i].captions), "")


def probability(rows: Sequence[dict[str, Any]]) -> list[Number]:
    """Of captions: nats each, bits a token, perplexity; how often a video's own is likelier a token than another's."""
    log_p = [p for row in rows for p in row["log_p"]]
    tokens = sum(n for row in rows for n in row["tokens"])
    nats = -math.fsum(log_p)
    found = [
        number("nats a caption", nats / len(log_p), len(log_p)),
        number("bits a token", nats / tokens / math.log(2), tokens),
        number("perplexity", math.exp(nats / tokens), tokens),
    ]
    compared = [row for row in rows if "other" in row]
    if compared:
        likelier = [
            row["log_p"][0] / row["tokens"][0] > row["other"][0] / row["other"][1] for row in compared
        ]
        found.append(share("own likelier than another's", likelier, chance=0.5))
    return found
