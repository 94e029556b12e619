"""The README's code runs and its commands and files exist."""

import re
from pathlib import Path

import pytest

from jobs.cli import JOBS
from jobs.training.recipe import TRAINING
from pipeline import recipe
from pipeline.caption.captioner import caption_stages
from pipeline.stages import run_stage
from tests.fixtures.clips import plain, video

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = {m[1]: m[0] for m in re.finditer(r"# (\S+\.py)\n(?:.+\n|\n)*?(?=```)", README)}


def test_the_captioner_of_ten_lines_captions(tmp_path):
    (tmp_path / "shape.py").write_text(CODE["shape.py"])
    sections = recipe.parse(
        {"name": "x", "captions": [{"kind": "python", "captioner": f"{tmp_path}/shape.py:Shape"}]}, [], "x"
    ).captions
    (stage,) = caption_stages(sections)
    stage.setup()
    v = video([plain("808080", 48, 64)])
    run_stage(stage, [v])
    assert [c.text for c in v.clips[0].captions] == ["A wide picture."]


def test_the_stage_of_ten_lines_scores():
    space: dict = {}
    exec(CODE["pipeline/score/brightness.py"], space)
    stage = space["BrightnessStage"]()
    stage.setup()
    v = video([plain("808080", 48, 64)])
    run_stage(stage, [v])
    assert v.error is None
    assert v.clips[0].scores["brightness"] == pytest.approx(128 / 255, abs=0.01)
    assert stage.produces.scores == ["brightness"]


def test_examples_have_at_most_about_ten_lines_of_code():
    for code in CODE.values():
        assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 12


def test_every_file_and_command_it_names_exists():
    for link in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`((?:bench|pipeline|models|jobs)/[\w/]+\.py)`", README):
        assert (ROOT / path).exists() or path == "pipeline/score/brightness.py", path
    for job in re.findall(r"clipmill (\w+) ", "\n".join(re.findall(r"```\n(.*?)```", README, re.S))):
        assert job in JOBS, job
    known = {*recipe.bundled(), *recipe.bundled(TRAINING)}
    assert set(re.findall(r"--recipe ([\w-]+)", README)) <= known
