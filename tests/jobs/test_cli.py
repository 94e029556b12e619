"""The clipmill command itself: version, typing mistakes, an output that goes away, completion."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import JOBS, main
from jobs.completion import commands, parser_of

ROOT = Path(__file__).parent.parent.parent
CLIPMILL = [sys.executable, "-m", "jobs.cli"]


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_the_version(capsys, flag):
    assert main([flag]) == 0
    assert capsys.readouterr().out.startswith("clipmill 0.")


def test_a_mistyped_job_names_the_nearest(capsys):
    assert main(["shrad"]) == 2
    assert "did you mean 'shard'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["recipe", "explain"], ["completion", "fish"], ["curate", "--help"], ["-h"]]
)
def test_an_output_that_nobody_reads_ends_it_without_a_word(command):
    out, end = os.pipe()
    os.close(out)
    done = subprocess.run([*CLIPMILL, *command], stdout=end, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(end)
    assert done.stderr == ""
    assert done.returncode == (0 if "--help" in command else 141)  # argparse itself looks away


# ---------------------------------------------------------------- completion


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> str:
    done = subprocess.run(
        [*CLIPMILL, "completion", "bash"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    file = tmp_path_factory.mktemp("completion") / "clipmill.bash"
    file.write_text(done.stdout)
    return str(file)


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    line = ["clipmill", *words]
    quoted = " ".join(f"'{w}'" for w in line)
    python = f'clipmill() {{ {" ".join(CLIPMILL)} "$@"; }}'
    typed = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}"
    code = f"{python}; source {script}; {typed}; _clipmill; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-uc", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sh"], ["shard"]),
        (["curate", "--ru"], ["--runner"]),
        (["curate", "videos/", "--runner", ""], ["ray", "local"]),
        (["curate", "--recipe", "pan"], ["panda70m"]),
        (["train", "d"], ["diffusion"]),
        (["train", "diffusion", "run/", "--recipe", "di"], ["dit-xl"]),
        (["recipe", "s"], ["show"]),
        (["recipe", "show", "uns"], []),
        (["recipe", "show", "emb"], ["embedded"]),
        (["recipe", "show", "embedded", "--s"], ["--set"]),
        (["curate", "--out", "r"], []),  # the shell offers file names
        (["nonsense", ""], []),
    ],
)
def test_bash_completes_jobs_options_their_values_and_recipes(script, words, expected):
    assert completed(script, *words) == expected


@pytest.mark.parametrize(
    ("words", "has", "has_not"),
    [
        (["recipe", "explain", ""], ["decode.", "cut.", "captions.", "name"], ["cut.crf"]),
        (["recipe", "explain", "cut.c"], ["cut.crf", "cut.codec"], ["cut.height"]),
        (["recipe", "explain", "decide.rules"], ["decide.rules.NAME.min"], []),
        (["curate", "--set", ""], ["decode.", "cut."], ["optimizer.", "cut.crf="]),
        (["curate", "--set", "cut.cr"], ["cut.crf="], ["cut.preset="]),
        (["curate", "--set", "decide."], ["decide.rules.", "decide.need_caption="], ["decide.rules.NAME"]),
        (["curate", "--set", "captions.0.fr"], ["captions.0.frames="], []),
        (["train", "--set", "optim"], ["optimizer.lr="], []),
    ],
)
def test_bash_completes_the_options_of_recipes(script, words, has, has_not):
    found = completed(script, *words)
    assert set(has) <= set(found)
    assert not set(has_not) & set(found)
    assert len(found) == len(set(found)) <= 40


def test_every_job_hands_over_its_parser_before_any_work():
    found = {c.name: c for c in commands()}
    assert set(JOBS) <= set(found)
    assert all("--help" in found[job].options for job in JOBS)
    assert parser_of("curate").prog == "clipmill curate"


def test_zsh_gets_the_function_of_bash_and_fish_a_line_an_option():
    shells = {
        s: subprocess.run(
            [*CLIPMILL, "completion", s], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout
        for s in ("bash", "zsh", "fish")
    }
    assert shells["zsh"].split("\n", 1)[1] == shells["bash"]
    assert "bashcompinit" in shells["zsh"].split("\n", 1)[0]
    assert "-n '__fish_seen_subcommand_from curate' -l runner -x -a 'ray local'" in shells["fish"]
    assert (
        "-n '__fish_seen_subcommand_from recipe; and __fish_seen_subcommand_from show' -l set "
        "-x -a '(clipmill recipe explain "
    ) in shells["fish"]
    assert all(line.startswith("complete -c clipmill ") for line in shells["fish"].splitlines())
