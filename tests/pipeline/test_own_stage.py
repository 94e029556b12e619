"""Stages of one's own: placed where the recipe says, their columns kept, their faults named by file and line."""

import logging
import pickle
import re
import textwrap

import numpy as np
import pytest

from pipeline import own_stage, recipe
from pipeline.graph import build
from pipeline.recipe import RecipeError
from pipeline.stages import produced, run_stage
from tests.fixtures.clips import plain, video

GOOD = """
from pipeline.stages import Produces, Resources

class Bright:
    name, produces = "bright", Produces(scores=["bright"], embeddings={"mean": 2})

    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, videos):
        for video in videos:
            for clip in video.clips:
                clip.scores["bright"] = self.scale * clip.start_frame
                clip.embeddings["mean"] = [1, 2]
"""


def with_stages(*stages: dict, name: str = "smoke") -> recipe.Recipe:
    return recipe.parse(recipe.load(name).model_dump(mode="json") | {"stages": list(stages)}, [], "test")


@pytest.fixture
def file(tmp_path):
    def write(text: str = GOOD) -> str:
        (tmp_path / "bright.py").write_text(textwrap.dedent(text))
        return f"{tmp_path}/bright.py:Bright"

    return write


def test_the_example_in_the_docstring_works(tmp_path):
    code, text = re.search(
        r"# brightness\.py\n(.*?)\n\n    # recipe\.yaml\n(.*?)\n\n", own_stage.__doc__, re.DOTALL
    ).groups()
    (tmp_path / "brightness.py").write_text(textwrap.dedent("    " + code.strip()))
    (tmp_path / "recipe.yaml").write_text(textwrap.dedent("    " + text.strip()))
    r = recipe.load(str(tmp_path / "recipe.yaml"))
    stages = build(r, str(tmp_path))
    assert [s.name for s in stages][3:5] == ["scores", "brightness"]
    assert "brightness" in produced(stages).scores
    stage = pickle.loads(pickle.dumps(stages[4]))  # as it goes to a worker
    stage.setup()
    v = video([plain("808080")])
    run_stage(stage, [v])
    assert v.error is None
    assert v.clips[0].scores["brightness"] == pytest.approx(128 / 255, abs=0.01)
    assert r.decide.rules["dark"].min == 0.1


def test_options_are_keyword_arguments_and_what_is_written_is_plain_numbers(file):
    (stage,) = (
        s for s in build(with_stages({"stage": file(), "options": {"scale": 3}}), "") if s.name == "bright"
    )
    stage.setup()
    v = video([plain("808080")] * 4, [(0, 2), (2, 4)])
    run_stage(stage, [v])
    assert [c.scores["bright"] for c in v.clips] == [0.0, 6.0]
    assert all(type(c.scores["bright"]) is float for c in v.clips)
    assert v.clips[0].embeddings["mean"].dtype == np.float32
    assert stage.produces.embeddings == {"mean": 2}


def test_stages_of_ones_own_stand_after_the_one_they_name_in_their_order(file, tmp_path):
    def other(name):
        text = GOOD.replace('"bright"', f'"{name}"').replace('"mean"', f'"{name}"')
        (tmp_path / f"{name}.py").write_text(text)
        return {"stage": f"{tmp_path}/{name}.py:Bright"}

    one, two = other("one") | {"after": "cut"}, other("two") | {"after": "cut"}
    three, last = other("three") | {"after": "one"}, other("last") | {"after": "choose"}
    names = [s.name for s in build(with_stages(one, two, three, last), "")]
    at = names.index("cut")
    assert names[at : at + 5] == ["cut", "one", "three", "two", "signature"]
    assert names[-1] == "last"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"after": "score"}, r"stages\.0\.after: this recipe has no stage 'score' \(did you mean 'scores'\?"),
        ({"options": {"scael": 1}}, r"cannot be made with options .*unexpected keyword argument 'scael'"),
    ],
)
def test_a_line_that_does_not_fit_is_one_sentence(file, line, says):
    with pytest.raises(RecipeError, match=says) as e:
        build(with_stages({"stage": file()} | line), "")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("name, produces =", "_, produces ="), "has no name: give its class one"),
        (("name, produces =", "name, _ ="), "does not say what it produces"),
        (("__call__", "run"), "cannot be called: give its class a __call__"),
        (("class Bright", "class Brihgt"), "has no class 'Bright' (did you mean 'Brihgt'"),
        (('scores=["bright"]', 'scores=["motion"]'), "stage 'scores' makes the score 'motion' already"),
        (('= "bright", Pro', '= "cut", Pro'), "the name 'cut' is taken by another stage"),
    ],
)
def test_a_class_that_is_no_stage_is_one_sentence(file, change, says):
    with pytest.raises(RecipeError, match=re.escape(says)) as e:
        build(with_stages({"stage": file(GOOD.replace(*change))}), "")
    assert "\n" not in str(e.value)


def failing(file, body: str):
    text = GOOD.replace('clip.scores["bright"] = self.scale * clip.start_frame', body)
    stage = next(s for s in build(with_stages({"stage": file(text)}), "") if s.name == "bright")
    stage.setup()
    v, w = video([plain("808080")]), video([plain("808080")], [(0, 1)])
    v.source, w.source = (type(x.source)(n, n) for x, n in ((v, "bad.mp4"), (w, "good.mp4")))
    run_stage(stage, [v, w])
    return v, w


def test_an_exception_is_that_videos_error_with_file_and_line_and_logged_with_its_traceback(file, caplog):
    caplog.set_level(logging.INFO, "clipmill")
    v, w = failing(file, 'print("here"); 1 / (video.source.name != "bad.mp4")')
    assert w.error is None
    assert (v.error.stage, v.error.kind) == ("bright", "source")
    assert v.error.message == "ZeroDivisionError: division by zero at bright.py:13"
    said = [r.getMessage() for r in caplog.records]
    assert said.count("bright bad.mp4: here") == said.count("bright good.mp4: here") == 1
    assert any('bright.py", line 13, in __call__' in text for text in said)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('clip.scores["bright"] = "high"', "the score 'bright' is to be a number, not 'high'"),
        ('clip.embeddings["mean"] = [1.0]; continue', "is to have 2 numbers, not the shape (1,)"),
    ],
)
def test_what_cannot_be_stored_is_the_stages_error_not_the_units(file, body, says):
    v, _ = failing(file, body)
    assert says in v.error.message


def test_a_score_that_the_class_does_not_name_is_said_not_lost_in_silence(file):
    v, _ = failing(file, 'clip.scores["extra"] = clip.scores["bright"] = 1')
    assert v.error is None
    assert v.warnings == ["bright: the score 'extra' is not kept, its class's produces does not name it"]


def test_a_run_without_stages_of_its_own_keeps_its_measure_key_and_one_with_them_has_another(file):
    assert with_stages().measure_key() == recipe.load("smoke").measure_key()
    assert with_stages({"stage": file()}).measure_key() != recipe.load("smoke").measure_key()
