"""The README's code runs and its commands and files exist."""

import re
from pathlib import Path

import pytest

from jobs.cli import JOBS
from jobs.training.recipe import TRAINING
from pipeline import recipe
from pipeline.caption.captioner import caption_stages
from pipeline.caption.judge import judge_stages
from pipeline.graph import build
from pipeline.io.store import Store
from pipeline.record import Caption
from pipeline.shards.pack import shard
from pipeline.stages import run_stage
from tests.fixtures.clips import plain, video
from tests.fixtures.run_folder import make_run_folder

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


def test_the_judge_of_ten_lines_judges(tmp_path):
    (tmp_path / "brief.py").write_text(CODE["brief.py"])
    judges = [{"kind": "python", "judge": f"{tmp_path}/brief.py:Brief"}]
    sections = recipe.parse({"name": "x", "choose": {"judges": judges}}, [], "x").choose.judges
    (stage,) = judge_stages(sections)
    stage.setup()
    v = video([plain("808080", 48, 64)])
    v.clips[0].captions = [Caption("a", "two words"), Caption("b", "")]
    run_stage(stage, [v])
    assert [c.scores for c in v.clips[0].captions] == [{"brevity": 0.5}, {}]


def test_the_stage_of_ten_lines_scores():
    space: dict = {}
    exec(CODE["brightness.py"], space)
    stage = space["Brightness"]()
    v = video([plain("808080", 48, 64)])
    run_stage(stage, [v])
    assert v.error is None
    assert v.clips[0].scores["brightness"] == pytest.approx(128 / 255, abs=0.01)
    assert stage.produces.scores == ["brightness"]


def test_the_recipe_of_ten_lines_builds_a_graph(tmp_path):
    (text,) = re.findall(r"```yaml\n(base: .*?)```", README, re.S)
    (tmp_path / "mine.yaml").write_text(text)
    mine = recipe.load(str(tmp_path / "mine.yaml"))
    assert "blurred" in recipe.load("embedded").decide.rules
    assert "blurred" not in mine.decide.rules
    assert mine.decide.rules["no_ads"].excludes == ("subscribe", "50 %")
    assert "choose" in [stage.name for stage in build(mine, str(tmp_path / "run"))]


def test_the_lines_of_captioners_and_judges_are_a_recipe(tmp_path):
    (text,) = re.findall(r"```yaml\n(captions:.*?)```", README, re.S)
    (tmp_path / "teachers.yaml").write_text(f"base: smoke\n{text}")
    teachers = recipe.load(str(tmp_path / "teachers.yaml"))
    names = [stage.name for stage in build(teachers, str(tmp_path / "run"))]
    assert names[-4:] == ["caption:fused", "choose", "judge:visual_fit", "judge:p_yes"]


def test_the_reader_of_ten_lines_reads(tmp_path, capsys):
    recipe_of_run = make_run_folder(tmp_path / "run")
    shard(Store(str(tmp_path / "run")), recipe_of_run)
    exec(CODE["read.py"].replace("run/shards", f"{tmp_path}/run/shards"), {})
    assert "[2, 8, 128, 128, 3]" in capsys.readouterr().out


def test_examples_have_at_most_about_ten_lines_of_code():
    for code in CODE.values():
        assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 12


def test_every_file_and_command_it_names_exists():
    for link in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`((?:bench|pipeline|models|jobs)/[\w/]+\.py)`", README):
        assert (ROOT / path).exists(), path
    for job in re.findall(r"clipmill (\w+) ", "\n".join(re.findall(r"```\n(.*?)```", README, re.S))):
        assert job in JOBS, job
    known = {*recipe.bundled(), *recipe.bundled(TRAINING)}
    assert set(re.findall(r"--recipe ([\w-]+)(?!\S)", README)) <= known
