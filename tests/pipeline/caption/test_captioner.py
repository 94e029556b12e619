from __future__ import annotations

import copy
import inspect
import logging
import re
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest

from pipeline import own_code, recipe
from pipeline.caption import baselines as baseline
from pipeline.caption import captioner as captions
from pipeline.caption.captioner import Captioner, CaptionStage
from pipeline.caption.text import sentences
from pipeline.faults import TooLong, WorkerFault
from pipeline.record import Caption
from pipeline.samples import pictures, samples, spread
from tests.fixtures.clips import noise, plain, video


def section(**values):
    return recipe.parse({"name": "test", "captions": [values]}, [], "test").captions[0]


def run(stage, videos):
    stage.setup()
    return [c.captions for v in stage(videos) for c in v.clips]


# ---------------------------------------------------------------- the stage


class Loud(Captioner):
    """Says what it is told, and fails on blue pictures."""

    name = "loud"
    batch = 3

    def caption_batch(self, clips):
        seen = [pictures(video, clip, 1)[0] for video, clip in clips]
        if any(s[..., 2].mean() > 200 for s in seen):
            raise RuntimeError("blue\nis too much")
        return [f"{s[..., 0].mean():.0f}" for s in seen]


BLUE = inspect.getsourcelines(Loud)[1] + 9  # the line that raises


@pytest.fixture
def loud(tmp_path):
    (tmp_path / "loud.py").write_text("from tests.pipeline.caption.test_captioner import Loud\n")
    return CaptionStage(section(kind="python", captioner=f"{tmp_path}/loud.py:Loud"))


def test_calling_again_gives_what_one_call_gives_and_keeps_the_order(loud):
    v = video([plain("800000")] * 4, [(0, 2), (2, 4)])
    v.clips[0].captions = [Caption("first", "x"), Caption("loud", "old"), Caption("last", "y")]
    once = copy.deepcopy(run(loud, [v]))
    assert [c.model for c in once[0]] == ["first", "loud", "last"]
    assert once[0][1].text == "128"
    assert run(loud, [v]) == once


def test_a_failing_clip_is_an_error_with_its_reason_and_its_batch_is_not(loud):
    v = video(
        [plain("800000"), plain("0000ff"), plain("900000"), plain("a00000")], [(i, i + 1) for i in range(4)]
    )
    for _ in range(2):  # the second time says it once, too
        said = [c[0] for c in run(loud, [v])]
        assert [(c.text, c.outcome) for c in said] == [
            ("128", "ok"), ("", "error"), ("144", "ok"), ("160", "ok"),
        ]  # fmt: skip
        why = f"RuntimeError: blue is too much at test_captioner.py:{BLUE}"
        assert v.warnings == [f"caption:loud: clip {v.clips[1].clip_id}: {why}"]
        assert [c.reason for c in said] == ["", why, "", ""]
        assert v.error is None


def test_nothing_to_say_is_empty_and_white_space_is_single():
    class Spaces(Captioner):
        name = "spaces"

        def caption(self, video, clip):
            return " \n" if clip.start_frame else " a\n\t b "

    stage = CaptionStage(section(kind="tags"))
    stage.model, stage.captioner = "spaces", Spaces()
    v = video([plain("000000")] * 2, [(0, 1), (1, 2)])
    assert [(c.captions[0].text, c.captions[0].outcome) for c in stage([v])[0].clips] == [
        ("a b", "ok"),
        ("", "empty"),
    ]


def test_only_frames_inside_the_clip_are_looked_at():
    v = video([plain(f"{10 * i:02x}0000") for i in range(10)], [(9, 21), (21, 24)], every=3)
    assert [s.frame for s in samples(v, v.clips[0])] == [9, 12, 15, 18]
    assert [s.frame for s in samples(v, v.clips[1])] == [21]
    assert pictures(v, v.clips[1], 4)[0].shape == (48, 64, 3)


@pytest.mark.parametrize(("m", "n"), [(m, n) for m in (0, 1, 2, 3, 7, 8, 30) for n in (1, 2, 4, 8)])
def test_spread_takes_distinct_items_in_order_the_ends_as_far_as_the_middle(m, n):
    got = spread(range(m), n)
    assert len(got) == min(m, n)
    assert got == sorted(set(got))
    if got:
        assert abs(got[0] - (m - 1 - got[-1])) <= 1


def test_two_captioners_of_one_name_are_refused():
    twice = {"kind": "transformers", "model": "a/b"}
    r = recipe.parse({"name": "x", "captions": [twice, twice | {"name": "other"}, twice]}, [], "x")
    assert [s.name for s in captions.caption_stages(r.captions[:2])] == ["caption:a/b", "caption:other"]
    with pytest.raises(recipe.RecipeError, match=r"captions\.2: 'a/b' is there already"):
        captions.caption_stages(r.captions)


def test_embedded_captioners_need_no_download_and_no_heavy_import():
    code = (
        "import sys, pipeline.caption.captioner as c, pipeline.recipe as r\n"
        "stages = c.caption_stages(r.load('embedded').captions)\n"
        "said = [c.build(s.section).check() for s in stages]\n"
        "print([s.model for s in stages])\n"
        "print([m for m in ('torch', 'cv2', 'transformers', 'ray') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = ["plain-baseline", "colour-motion-baseline", "tags-baseline", "on-screen-text-baseline"]
    assert out.splitlines() == [str(names), "[]"]


# ---------------------------------------------------------------- a captioner of one's own


def test_the_example_in_the_docstring_works(tmp_path):
    example = re.search(r"# shape\.py\n(.*?)\n\n    # recipe\.yaml\n(.*?)\n\n", captions.__doc__, re.DOTALL)
    code, line = (textwrap.dedent(f"    {g.strip()}") for g in example.groups())
    assert len(code.splitlines()) <= 10
    (tmp_path / "shape.py").write_text(code)
    (tmp_path / "r.yaml").write_text(line.replace("shape.py", f"{tmp_path}/shape.py"))
    stages = captions.caption_stages(recipe.load(str(tmp_path / "r.yaml")).captions)
    v = video([plain("000000", 48, 64)])
    assert run(stages[0], [v]) == [[Caption("shape-baseline", "A wide picture.")]]


@pytest.mark.parametrize(
    ("captioner", "message"),
    [
        ("nowhere.py:A", "cannot be imported"),
        ("no.such.module:A", "cannot be imported"),
        ("NoColon", "cannot be imported"),
        ("pipeline.caption.captioner:NoClass", "has no class 'NoClass'"),
        ("pipeline.record:Clip", "Clip is not made from Captioner: write class Clip"),
        ("pipeline.caption.captioner:Captioner", "has no name"),
    ],
)
def test_a_captioner_that_cannot_be_had_is_one_clear_sentence(captioner, message):
    with pytest.raises(recipe.RecipeError, match=message):
        captions.caption_stages([section(kind="python", captioner=captioner)])


OWN = """
import logging
from pipeline.captions import Captioner
from pipeline.faults import ClipFault, TransientFault, WorkerFault
from pipeline.record import Caption

class Own(Captioner):
    name = "own"
    calls = 0

    def caption(self, video, clip):
        i = video.clips.index(clip)
        {body}

class Batch(Captioner):
    name, batch = "batch", 2

    def caption_batch(self, clips):
        {body}
"""


def own(folder, body, of="Own", clips=3, **options):
    """What a captioner of this body says of clips of one frame each: the captions and the video."""
    (folder / "mine.py").write_text(OWN.format(body=body))
    stage = CaptionStage(section(kind="python", captioner=f"{folder}/mine.py:{of}", options=options))
    v = video([plain("808080")] * clips, [(i, i + 1) for i in range(clips)])
    return [c[0] for c in run(stage, [v])], v


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return None", ("", "empty", "")),
        ("return ''", ("", "empty", "")),
        ("return 'a dog'", ("a dog", "ok", "")),
        ("return Caption('', 'a dog', 'truncated')", ("a dog", "truncated", "")),
        (
            "return 7",
            ("", "error", "the caption is an int (7); give a text, None, or a pipeline.record.Caption"),
        ),
        ("return ['a dog']", ("", "error", "the caption is a list (['a dog']); give a text, None, or")),
        ("return Caption('', 'a', 'great')", ("", "error", "outcome 'great'")),
        ("return {}['x']", ("", "error", "KeyError: 'x' at mine.py:13")),
        ("raise SystemExit(3)", ("", "error", "SystemExit: 3 at mine.py:13")),
        ("raise ClipFault('too dark')", ("", "error", "too dark")),
    ],
)
def test_whatever_a_captioner_gives_becomes_its_outcome_with_a_reason(tmp_path, body, expected):
    (said,), _ = own(tmp_path, body, clips=1)
    assert (said.text, said.outcome) == expected[:2]
    assert expected[2] in said.reason
    assert bool(said.reason) == (said.outcome == "error")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return ['a'] * 3", "caption_batch gave 3 captions for 2 clips; they were captioned one by one"),
        ("return []", "caption_batch gave 0 captions for 2 clips; they were captioned one by one"),
        ("return 'ab'", "caption_batch gave a str ('ab'), not a list with a text for each clip"),
        ("return None", "caption_batch gave None, not a list with a text for each clip"),
    ],
)
def test_a_batch_of_the_wrong_size_is_said_so(tmp_path, body, why):
    said, v = own(tmp_path, body, "Batch", clips=2)
    assert {c.outcome for c in said} == {"error"}
    assert any(why in w for w in v.warnings)


def test_a_batch_that_gives_too_few_is_done_one_by_one_and_said_so(tmp_path):
    said, v = own(tmp_path, "return (str(c.start_frame) for _, c in clips[:1])", "Batch", clips=2)
    assert [c.text for c in said] == ["0", "1"]
    assert len(v.warnings) == 1


def test_a_moments_fault_is_tried_again_and_a_workers_goes_up(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.stages.BACKOFF_S", 0.0)
    body = "Own.calls += 1\n        if Own.calls < 3: raise {}('busy')\n        return 'a dog'"
    for fault in ("TransientFault", "ConnectionResetError"):
        (said,), _ = own(tmp_path, body.format(fault), clips=1)
        assert (said.text, said.outcome) == ("a dog", "ok")
    (said,), _ = own(tmp_path, "raise TransientFault('busy')", clips=1)
    assert (said.outcome, said.reason) == ("error", "busy")
    for fault in ("WorkerFault('GPU lost')", "RuntimeError('CUDA error: unspecified launch failure')"):
        with pytest.raises(Exception, match=r"GPU lost|CUDA error"):
            own(tmp_path, f"raise {fault}", clips=1)


def test_what_it_prints_and_logs_is_logged_with_its_clip_and_a_failure_with_its_line(
    tmp_path, caplog, capsys
):
    caplog.set_level(logging.INFO, "clipmill")
    body = "print('looking', i); logging.getLogger('mine').info('at %d', i); print('half', end='')\n"
    said, v = own(tmp_path, body + "        return 1 / (i - 1)", clips=3)
    assert [c.outcome for c in said] == ["error"] * 3
    assert capsys.readouterr().out == ""
    mine = [r for r in caplog.records if r.name != "mine"]
    heard = [(r.name, r.getMessage()) for r in mine if "failed" not in r.getMessage()]
    about = [f"caption:own clip {c.clip_id}: " for c in v.clips]
    assert heard == [
        ("clipmill", a + t) for i, a in enumerate(about) for t in (f"looking {i}", f"at {i}", "half")
    ]
    trace = next(r.getMessage() for r in caplog.records if "ZeroDivisionError" in r.getMessage())
    assert trace.startswith(f"caption:own clip {v.clips[1].clip_id} of ")
    assert f'File "{tmp_path}/mine.py", line 14, in caption' in trace
    assert "captioner.py" not in trace.replace(str(tmp_path), "")
    assert logging.getLogger().level == logging.WARNING


def test_a_file_of_ones_own_may_have_dataclasses_and_import_the_file_beside_it(tmp_path):
    (tmp_path / "beside_it.py").write_text("WORD = 'cat'\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport beside_it\n"
        "from pipeline.captions import Captioner\n@dataclass\nclass Note:\n    word: str\n"
        "class Own(Captioner):\n    name = 'own'\n    def caption(self, video, clip):\n"
        "        return Note(beside_it.WORD).word\n"
    )
    stage = CaptionStage(section(kind="python", captioner=f"{tmp_path}/mine.py:Own"))
    assert run(stage, [video([plain("000000")])])[0][0].text == "cat"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("class Own(Captioner):\n    name = 'x", r"SyntaxError: unterminated string literal .* at mine\.py:3"),
        ("raise ValueError('no')", r"ValueError: no at mine\.py:2"),
        ("class Owl(Captioner): name = 'x'", r"has no class 'Own' \(did you mean 'Owl'\?"),
        ("class Own(Captioner):\n    name = 3", "has no name"),
        ("class Own(Captioner):\n    name, batch = 'x', 0", "batch is to be a whole number from 1 on, not 0"),
        ("class Own(Captioner):\n    name, resources = 'x', {'gpus': 1}", "pipeline.stages.Resources"),
        ("class Own(Captioner):\n    def __init__(self, o): o['size']", r"cannot be made.*'size' at mine\.py:3"),
    ],
)  # fmt: skip
def test_a_file_of_ones_own_that_is_wrong_is_one_sentence_with_its_line(tmp_path, text, says):
    (tmp_path / "mine.py").write_text("from pipeline.captions import Captioner\n" + text + "\n")
    with pytest.raises(recipe.RecipeError, match=says) as e:
        CaptionStage(section(kind="python", captioner=f"{tmp_path}/mine.py:Own"))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise ValueError('no size')", r"ValueError: no size at mine\.py"),
        ("return [1, 2]", r"unhashable type: 'list'"),
    ],
)
def test_a_shape_that_cannot_be_had_is_that_clips_error(tmp_path, body, why):
    own_shape = f"def shape(self, video, clip):\n        if clip.start_frame == 1:\n            {body}\n"
    (tmp_path / "mine.py").write_text(OWN.format(body="return ['x'] * len(clips)") + f"\n    {own_shape}")
    v = video([plain("808080")] * 3, [(i, i + 1) for i in range(3)])
    said = run(CaptionStage(section(kind="python", captioner=f"{tmp_path}/mine.py:Batch")), [v])
    assert [c[0].outcome for c in said] == ["ok", "error", "ok"]
    assert re.search(why, said[1][0].reason)
    assert len(v.warnings) == 1


@pytest.mark.parametrize(
    ("field", "why"),
    [
        ("prompt=None", "prompt is None"), ("raw=5", "raw is an int"), ("scores={'a': 'b'}", "scores is a dict"),
        ("cost={'usd': float('nan')}", "cost is a dict"), ("flags='loop'", "flags is a str"),
        ("support={'a': 1.0}", "support is a dict"), ("made_from=[1]", "made_from is a list"),
    ],
)  # fmt: skip
def test_a_caption_that_no_file_can_hold_is_an_error_that_names_the_field(tmp_path, field, why):
    (c, *_), _ = own(tmp_path, f"return Caption('', 'a car', {field})")
    assert (c.text, c.outcome) == ("", "error")
    assert c.reason.startswith(f"a Caption's {why}")


def test_half_a_character_is_a_question_mark(tmp_path):
    (c, *_), _ = own(tmp_path, "return Caption('', 'a \\ud83d car', prompt='\\udc80', raw='\\ud83d')")
    assert (c.text, c.prompt, c.raw, c.outcome) == ("a ? car", "?", "?", "ok")


def test_a_setup_that_fails_is_the_workers_fault_with_its_line(tmp_path):
    text = "from pipeline.captions import Captioner\nclass Own(Captioner):\n    name = 'x'\n"
    (tmp_path / "mine.py").write_text(text + "    def setup(self): 1 / 0\n")
    stage = CaptionStage(section(kind="python", captioner=f"{tmp_path}/mine.py:Own"))
    with pytest.raises(
        WorkerFault, match=r"cannot be set up: ZeroDivisionError: division by zero at mine\.py:4"
    ):
        stage.setup()


# ---------------------------------------------------------------- tags


class Net:
    """Stands for EfficientNet: one list of tags a frame."""

    def __init__(self, *frames):
        self.frames = frames

    def tags(self, images, top):
        return [list(frame.items()) for frame in self.frames]


@pytest.mark.parametrize(
    ("frames", "caption"),
    [
        ([{"tabby": 0.9, "tiger cat": 0.05}], "The video shows a tabby."),
        ([{"tabby": 0.9}, {"tabby": 0.1, "hourglass": 0.9}], "The video shows a tabby and an hourglass."),
        ([{"tabby": 0.9}, {"ox": 0.33}, {"unicycle": 0.36}], "The video may show a tabby, a unicycle or an ox."),
        ([{"sunglasses": 0.99}], "The video shows sunglasses."),
        ([{"tabby": 0.09}], ""),
        ([], ""),
    ],
)  # fmt: skip
def test_tags_state_what_is_sure_and_hedge_what_is_not(frames, caption):
    captioner = baseline.Tags(section(kind="tags", sure=0.4, unsure=0.1))
    captioner.net = Net(*frames)
    v = video([plain("000000")] * 4)
    assert captioner.caption(v, v.clips[0]) == caption


def test_real_tags_do_not_depend_on_the_other_clips():
    stage = CaptionStage(section(kind="tags", unsure=0.01))
    pictures = [noise(i) for i in range(4)]
    together = run(stage, [video(pictures, [(0, 2), (2, 4)])])
    alone = [run(stage, [video(pictures, [clip])])[0] for clip in ((0, 2), (2, 4))]
    assert together == alone
    assert all(re.fullmatch(r"The video (may show|shows) an? .*\.", c[0].text) for c in together)


def test_every_imagenet_label_gets_the_article_its_sound_asks_for():
    from torchvision.models import EfficientNet_B0_Weights

    labels = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    said = {label: baseline.with_article(label).removesuffix(label).strip() for label in labels}
    an = ("ant", "hourglass", "iPod", "umbrella", "Old English sheepdog", "ox", "espresso maker")
    assert {"an"} == {said[x] for x in an}
    assert {"a"} == {said[x] for x in ("unicycle", "European gallinule", "horse cart", "yurt", "zebra")}
    assert {""} == {said[x] for x in ("sunglasses", "parallel bars", "binoculars", "espresso", "hay")}


# ---------------------------------------------------------------- colours and camera


@pytest.mark.parametrize(
    ("hex_", "name"),
    [
        ("000000", "black"), ("ffffff", "white"), ("708090", "grey"), ("c0c0c0", "grey"), ("dc143c", "red"),
        ("800000", "red"), ("ffa500", "orange"), ("a0522d", "brown"), ("d2b48c", "beige"), ("ffd700", "yellow"),
        ("f0e68c", "yellow"), ("228b22", "green"), ("808000", "green"), ("adff2f", "green"),
        ("008080", "turquoise"), ("00ffff", "turquoise"), ("000080", "blue"), ("87ceeb", "blue"),
        ("4682b4", "blue"), ("800080", "purple"), ("4b0082", "purple"), ("ff69b4", "pink"), ("fa8072", "pink"),
    ],
)  # fmt: skip
def test_css_colours_are_called_by_the_basic_term_of_their_family(hex_, name):
    shares, _ = baseline.colours([plain(hex_)])
    assert shares == {name: 1.0}


def test_lab_is_cielab():
    rgb = np.random.default_rng(0).integers(0, 256, (200, 3), dtype=np.uint8)
    v = rgb / 255
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    m = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.072175],
        [0.0193339, 0.119192, 0.9503041],
    ]
    t = linear @ np.array(m).T / [0.95047, 1.0, 1.08883]
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    expected = np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1
    )  # CIE 15:2004, eq. 8.3–8.6
    assert np.abs(baseline._lab(rgb) - expected).max() < 1.0  # OpenCV interpolates its tables


def test_shares_and_light_are_those_of_the_pixels():
    half = np.concatenate([plain("000000", 48, 36), plain("ffffff", 48, 12)], 1)
    shares, light = baseline.colours([half, half])
    assert shares == {"black": 0.75, "white": 0.25}
    assert light == pytest.approx(25, abs=0.1)


MOTION = {"pan_x": 0.0, "pan_y": 0.0, "zoom": 0.0, "motion": 0.01, "motion_object": 0.01}
NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ({}, "the camera holds still"),
        ({"motion_object": 0.0, "motion": 0.001}, "the camera holds still and nothing moves"),
        ({"motion_object": 0.2, "motion": 0.2}, "the camera holds still while much moves"),
        ({"motion": 0.05}, ""),  # it shakes
        ({"motion_object": 0.2, "motion": 0.25}, "there is much movement"),
        ({"pan_x": 0.006}, ""),  # neither a pan nor a still camera for sure
        ({"pan_x": 0.1}, "the camera pans to the right"),
        ({"pan_x": -0.03, "pan_y": 0.005}, "the camera pans slowly to the left"),
        ({"pan_x": 0.9, "zoom": -0.1}, "the camera pans quickly to the right while the view widens"),
        ({"pan_y": -0.1}, "the camera tilts up"),
        ({"pan_y": 0.1, "pan_x": 0.01}, "the camera tilts down"),
        ({"pan_x": 0.1, "pan_y": 0.1}, "the camera moves to the right and down"),
        ({"zoom": 0.1}, "the view closes in"),
        ({"pan_x": NAN, "pan_y": NAN, "zoom": NAN, "motion": NAN, "motion_object": NAN}, ""),
    ],
)
def test_camera_motion_is_told_as_measured(scores, sentence):
    assert baseline.camera(MOTION | scores) == sentence


def test_unmeasured_motion_is_not_told():
    v = video([plain("16264f")] * 4)
    stage = CaptionStage(section(kind="colour_motion"))
    assert run(stage, [v])[0][0].text == "A dark picture mostly in blue."
    v.clips[0].scores = MOTION | {"pan_x": 0.1}
    assert run(stage, [v])[0][0].text == "A dark picture mostly in blue; the camera pans to the right."


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"blue": 0.9, "red": 0.1}, "mostly in blue"),
        ({"blue": 0.6, "red": 0.3, "grey": 0.1}, "mostly in blue with some red"),
        ({"blue": 0.4, "red": 0.3, "grey": 0.2, "pink": 0.1}, "in blue, red and grey"),
        ({"blue": 0.12, "red": 0.11}, "in blue"),
    ],
)
def test_palette_names_what_takes_room(shares, words):
    assert baseline.palette(shares) == words


# ---------------------------------------------------------------- text on screen


def test_text_is_quoted_most_prominent_first_and_cut():
    v = video([plain("000000")])
    stage = CaptionStage(section(kind="on_screen_text", lines=3))
    assert [(c[0].text, c[0].outcome) for c in run(stage, [v])] == [("", "empty")]
    v.clips[0].text = ["SALE", " ", "50 %\n off", "SALE", "x" * 100, "fourth"]
    said = run(stage, [v])[0][0].text
    assert said == f"The text on screen reads “SALE”, “50 % off” and “{'x' * 79}…”."


# ---------------------------------------------------------------- captions that were there


def test_a_given_caption_is_the_clips_own_or_that_of_a_source_that_was_not_split():
    one, two = video([plain("000000")] * 4), video([plain("000000")] * 4, [(0, 2), (2, 4)])
    for v in (one, two):
        v.source = replace(v.source, meta={"caption": " A dog\nruns. ", "title": "Dogs"})
    two.clips[1].meta = {"caption": "It stops."}

    def said(**options):
        stage = CaptionStage(section(kind="given", **options))
        return [c[0].text for v in (one, two) for c in run(stage, [copy.deepcopy(v)])]

    assert said() == ["A dog runs.", "", "It stops."]
    assert said(pieces=True) == ["A dog runs.", "A dog runs.", "It stops."]
    assert said(column="title") == ["Dogs", "", ""]


# ---------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("One", ["One"]),
        ("One. Two!  Three?", ["One.", "Two!", "Three?"]),
        ('He says "go." Then Dr. Who runs.', ['He says "go."', "Then Dr. Who runs."]),
        ("J. Smith ran 2.5 km. He won.", ["J. Smith ran 2.5 km.", "He won."]),
        ("Wait… what? Yes, e.g. this.", ["Wait…", "what?", "Yes, e.g. this."]),
        ("一只狗。它跑了！", ["一只狗。", "它跑了！"]),
    ],
)  # fmt: skip
def test_sentences(text, parts):
    assert sentences(text) == parts


@pytest.mark.parametrize(
    ("e", "shown"), [(TooLong("no caption after 1 s"), False), (SystemExit(3), False), (KeyError("x"), True)]
)
def test_only_a_bug_shows_its_traceback_on_the_terminal(e, shown, caplog):
    with caplog.at_level(logging.DEBUG, logger="clipmill"):
        try:
            raise e
        except BaseException as raised:
            own_code.log_failed("caption:x clip 1", raised, __file__)
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert ("Traceback" in warned[0]) is shown
    assert "Traceback" in caplog.text


def test_the_article_fits_the_noun():
    assert (own_code.a("int"), own_code.a("list")) == ("an int", "a list")
