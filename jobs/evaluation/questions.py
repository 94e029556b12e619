"""Questions about videos, multiple choice and open.

How an option is chosen (`by`):

    letter      the model is shown the options with letters, and says one
    likelihood  it is shown them likewise; the letter that is likeliest to it, so that there is always one
    words       it is shown the question alone; the option whose words are likeliest, a token

An open answer is scored by exact match (it is a reference, but for spaces around it) and by normalised accuracy (its
words are a reference's, but for case, punctuation and articles). NExT-QA's own measure of open answers, WUPS, needs
WordNet, a tagger and a list of stop words that no installed package has; it is not given.

With subtitles, those that are on screen at the frames that are looked at stand before the question, as Video-MME asks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from jobs.benchmarks.items import Item
from jobs.benchmarks.srt import read, shown_at
from jobs.evaluation.answers import Answers
from jobs.evaluation.looking import Tell, seen
from jobs.evaluation.numbers import Number, number, share
from models.measures.captions.rouge_l import rouge_l
from models.measures.multiple_choice import LETTERS, chosen, lettered, plain

if TYPE_CHECKING:
    from jobs.speaking import Speaking
    from jobs.training.data.media import Visual

SUBTITLES = "This video's subtitles are listed below:"  # Video-MME's words
By = Literal["letter", "likelihood", "words"]


def ask(
    speaker: Speaking,
    items: Sequence[Item],
    answers: Answers,
    *,
    by: By,
    blind: bool,
    most: int,
    batch: int,
    tell: Tell,
    subtitles: bool = False,
) -> None:
    """An answer of each item that has none yet: {'id', 'said' or 'log_p', 'chosen'}.

    Args:
        blind: nothing is shown: what can be guessed from the question, and subtitles.
        subtitles: what is on screen at the frames is told, where an item has it.
    """
    left = set(answers.missing(item.id for item in items))
    todo = [item for item in items if item.id in left]
    for found, broken in seen(speaker, todo, batch):
        rows: list[dict[str, Any]] = [{"id": id, "broken": why} for id, why in broken.items()]
        if subtitles:
            found = [(replace(i, question=subtitled(i, v.seconds)), v) for i, v in found]
        rows += _answered(speaker, [(item, [] if blind else [visual]) for item, visual in found], by, most)
        answers.add(rows)
        tell(len(answers.told), len(items))


def subtitled(item: Item, seconds: Sequence[float]) -> str:
    """The question, after the subtitles at these times of the stretch that is looked at. Raises BenchmarkError."""
    if item.subtitles is None:
        return item.question
    begin = item.span[0] if item.span else 0.0
    said = shown_at(_cues(item.subtitles), [begin + t for t in seconds])
    return "\n".join([SUBTITLES, *said, item.question]) if said else item.question


_cues = lru_cache(maxsize=8)(read)  # questions of one video follow each other


def _answered(
    speaker: Speaking, asked: Sequence[tuple[Item, list[Visual]]], by: By, most: int
) -> list[dict[str, Any]]:
    rows = []
    told = [(item, shown) for item, shown in asked if not item.options or by == "letter"]
    if told:
        texts = [lettered(i.question, i.options) if i.options else i.question for i, _ in told]
        conversations = [[{"role": "user", "content": text}] for text in texts]
        said = speaker.answer(conversations, [shown for _, shown in told], most=most)
        for (item, _), text in zip(told, said, strict=True):
            row: dict[str, Any] = {"id": item.id, "said": text}
            rows.append(row | ({"chosen": chosen(text, item.options)} if item.options else {}))
    for item, shown in asked:
        if item.options and by != "letter":
            words = by == "words"
            question = item.question if words else lettered(item.question, item.options)
            each = list(item.options) if words else list(LETTERS[: len(item.options)])
            known = speaker.log_likelihood([{"role": "user", "content": question}], shown, each)
            weighed = [p / n if words else p for p, n in known]
            likeliest = max(range(len(weighed)), key=weighed.__getitem__)
            rows.append({"id": item.id, "log_p": weighed, "chosen": likeliest})
    return rows


def figures(items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> list[Number]:
    """Accuracy, by kind too; of open questions exact match and ROUGE-L beside. Kinds have both sorts together.

    Questions of one video are one trial of the interval.
    """
    right: dict[str, list[bool]] = {CHOICES: [], EXACT: [], OPEN: []}
    videos: dict[str, set[Any]] = defaultdict(set)
    chance: dict[str, list[float]] = defaultdict(list)
    alike, silent = [], 0
    for item, row in zip(items, rows, strict=True):
        if item.options:
            good = row["chosen"] == item.answer
            silent += row["chosen"] is None
            names = {CHOICES: good}
        else:
            good = plain(row["said"]) in [plain(answer) for answer in item.answers]
            names = {EXACT: row["said"].strip() in [answer.strip() for answer in item.answers], OPEN: good}
            alike.append(rouge_l(row["said"], item.answers))
        for name, value in (names | dict.fromkeys(item.group, good)).items():
            right.setdefault(name, []).append(value)
            videos[name].add(str(item.video))
            chance[name].append(1 / len(item.options) if item.options else 0.0)
    found = []
    for name, values in right.items():
        if values:
            by_chance = {"chance": math.fsum(chance[name]) / len(values)} if any(chance[name]) else {}
            found.append(share(name, values, len(videos[name]), **by_chance))
    if alike:
        found.append(number("ROUGE-L of open answers", math.fsum(alike) / len(alike), len(alike)))
    if silent:
        found.append(number("no option chosen", silent, len(rows)))
    return found


CHOICES, EXACT, OPEN = "accuracy", "exact match, open", "normalised accuracy, open"
