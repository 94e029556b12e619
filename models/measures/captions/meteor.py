"""METEOR 1.5: words of a text matched to a reference's by form, stem, synonym and paraphrase (Denkowski, Lavie 2014).

The stems, synonyms and paraphrases are the metric, so it is its authors' own program that runs: meteor-1.5.jar of the
package `pycocoevalcap`, with Java.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from models.hub import MissingModel


def jar() -> Path:
    """Where the program is. Raises MissingModel: one sentence with the fix."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise MissingModel("METEOR comes in the package pycocoevalcap: pip install pycocoevalcap")
    if shutil.which("java") is None:
        raise MissingModel("METEOR is a Java program, and there is no 'java' here: install a Java runtime")
    return Path(spec.submodule_search_locations[0]) / "meteor" / "meteor-1.5.jar"


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
