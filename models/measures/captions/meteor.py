"""METEOR 1.5: words of a text matched to a reference's by form, stem, synonym and paraphrase (Denkowski, Lavie 2014).

The stems, synonyms and paraphrases are the metric, so it is its authors' own program that runs: meteor-1.5.jar (LGPL,
cs.cmu.edu/~alavie/METEOR), which no package carries that may be used freely. Where it is says METEOR_JAR.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from models.hub import MissingModel

JAR = "METEOR_JAR"


def jar() -> Path:
    """Where the program is. Raises MissingModel: one sentence with the fix."""
    path = Path(os.environ.get(JAR) or "meteor-1.5.jar")
    if not path.is_file():
        raise MissingModel(
            f"METEOR: no file {str(path)!r}: fetch meteor-1.5.jar, and say in {JAR} where it is"
        )
    if shutil.which("java") is None:
        raise MissingModel("METEOR is a Java program, and there is no 'java' here: install a Java runtime")
    return path


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """METEOR of the corpus and of each candidate, 0 to 1. Raises MissingModel."""
    command = ["java", "-Xmx2G", "-jar", str(jar()), "-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as java:
        assert java.stdin is not None
        assert java.stdout is not None

        def ask(line: str) -> None:
            assert java.stdin is not None
            java.stdin.write(line + "\n")
            java.stdin.flush()

        found = []
        for candidate, its in zip(candidates, references, strict=True):
            # one line in, one out: more at a time could fill both pipes
            ask(" ||| ".join(["SCORE", *map(_plain, its), _plain(candidate)]))
            found.append(java.stdout.readline().strip())
        ask(" ||| ".join(["EVAL", *found]))
        scores = [float(java.stdout.readline()) for _ in range(len(found) + 1)]
        java.stdin.close()
    return scores[-1], scores[:-1]


def _plain(text: str) -> str:
    return " ".join(text.replace("|||", " ").split())
