"""A needle in a long video: one clip among many others, and which of several captions is one of the video's.

A video of L clips of a run end to end; one of them, at a depth from the first to the last, is the needle. Of K captions
one is the needle's, K − 1 are of clips that are not in the video, and no two are the same. Each clip gives as many
frames however long the video is, so L is how much else there is to look at. Chance is 1 ÷ K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.benchmarks.items import Item
from jobs.evaluation.answers import Answers
from jobs.evaluation.looking import Tell, media_of
from jobs.evaluation.numbers import Number, number, share
from jobs.evaluation.questions import By
from models.measures.multiple_choice import LETTERS, chosen, lettered
from pipeline.shards.pixels import BrokenSample

if TYPE_CHECKING:
    from jobs.speaking import Speaking
    from jobs.training.data.media import Visual

QUESTION = "Which of these does the video show?"


@dataclass(frozen=True)
class Trial:
    """clips: numbers of items, in order. at: which of them is the needle. options: captions. answer: the needle's."""

    id: str
    clips: tuple[int, ...]
    at: int
    options: tuple[str, ...]
    answer: int


def trials(
    items: Sequence[Item], lengths: Sequence[int], depths: int, each: int, options: int, seed: int
) -> list[Trial]:
    """`each` trials of every length at every one of `depths` depths, from the first clip to the last.

    Raises ValueError where there are too few clips of unlike captions.
    """
    captions = [item.captions[0] for item in items]
    found = []
    for length in lengths:
        for place in range(min(depths, length)):
            at = round(place * (length - 1) / max(1, min(depths, length) - 1))
            for nth in range(each):
                rng = np.random.default_rng([seed, length, at, nth])
                order = rng.permutation(len(items)).tolist()
                needle, rest = order[0], order[1:]
                others = [i for i in rest if captions[i] != captions[needle]][: length - 1]
                shown = {captions[i] for i in [needle, *others]}
                wrong = [c for c in dict.fromkeys(captions[i] for i in rest) if c not in shown]
                if len(others) < length - 1 or len(wrong) < options - 1:
                    raise ValueError(
                        f"{len(items)} clips of {len(set(captions))} unlike captions are too few for videos of "
                        f"{length} clips and {options} options: give shorter --lengths, fewer --options, or more clips"
                    )
                clips = (*others[:at], needle, *others[at:])
                told = [captions[needle], *wrong[: options - 1]]
                mixed = rng.permutation(options).tolist()
                chosen_options = tuple(told[i] for i in mixed)
                name = f"{length} clips, needle {at + 1}, {nth + 1}"
                found.append(Trial(name, clips, at, chosen_options, mixed.index(0)))
    return found


def ask(
    speaker: Speaking,
    items: Sequence[Item],
    made: Sequence[Trial],
    answers: Answers,
    *,
    by: By,
    frames: int,
    prompt: str,
    most: int,
    tell: Tell,
) -> None:
    """Args: frames: of each clip. prompt: by words, what is asked instead of a question with options."""
    left = set(answers.missing(trial.id for trial in made))
    for trial in made:
        if trial.id not in left:
            continue
        try:
            shown = [speaker.end_to_end([media_of(items[i]) for i in trial.clips], frames)]
        except (BrokenSample, OSError) as e:
            answers.add([{"id": trial.id, "broken": " ".join(str(e).split())}])
        else:
            answers.add([{"id": trial.id, **_answer(speaker, trial, shown, by, prompt, most)}])
        tell(len(answers.told), len(made))


def _answer(
    speaker: Speaking, trial: Trial, shown: list[Visual], by: By, prompt: str, most: int
) -> dict[str, Any]:
    if by == "words":
        known = speaker.log_likelihood([{"role": "user", "content": prompt}], shown, list(trial.options))
        weighed = [p / n for p, n in known]
        return {"log_p": weighed, "chosen": int(np.argmax(weighed))}
    asked = [{"role": "user", "content": lettered(QUESTION, trial.options)}]
    if by == "likelihood":
        known = speaker.log_likelihood(asked, shown, list(LETTERS[: len(trial.options)]))
        return {"log_p": [p for p, _ in known], "chosen": int(np.argmax([p for p, _ in known]))}
    (said,) = speaker.answer([asked], [shown], most=most)
    return {"said": said, "chosen": chosen(said, trial.options)}


def figures(made: Sequence[Trial], rows: Sequence[dict[str, Any]], of: int, options: int) -> list[Number]:
    """Share that is right, by length, and by length and place of the needle.

    Args:
        made: trials that could be asked, and their answers. of: how many there were to be.
    """
    right = [(trial, row["chosen"] == trial.answer) for trial, row in zip(made, rows, strict=True)]
    found = []
    for length in dict.fromkeys(len(trial.clips) for trial in made):
        own = [(trial, good) for trial, good in right if len(trial.clips) == length]
        name = f"{length} clip{'s' if length > 1 else ''}"
        found.append(share(name, [good for _, good in own], chance=1 / options))
        for at in dict.fromkeys(trial.at for trial, _ in own):
            here = [good for trial, good in own if trial.at == at]
            found.append(share(f"  needle is clip {at + 1}", here))
    if of > len(made):
        found.append(number("trials that cannot be read", of - len(made), of))
    return found
