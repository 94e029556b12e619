"""Recipe files: what they inherit, where their paths lead, which keys `--set` reaches, and what mistakes say."""

import shlex
from pathlib import Path

import pytest

from pipeline import recipe
from pipeline.recipe import Recipe, RecipeError
from pipeline.recipe_file import dotted, setting, split_setting
from pipeline.recipe_schema import options


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def refused(name: str, *overrides: str) -> str:
    """The one sentence that refuses it."""
    with pytest.raises(RecipeError) as e:
        recipe.load(name, list(overrides))
    assert "\n" not in str(e.value)
    return str(e.value)


# ---------------------------------------------------------------- base


def test_a_base_gives_what_the_file_does_not_say(tmp_path):
    mine = recipe.load(write(tmp_path / "mine.yaml", "base: embedded\ncut: {crf: 33}\n"))
    base = recipe.load("embedded")
    assert mine.name == "mine"
    assert mine.cut.crf == 33
    assert mine.model_copy(update={"name": "embedded", "cut": base.cut}) == base


def test_mappings_are_merged_lists_replaced_and_a_section_of_another_kind_starts_anew(tmp_path):
    write(
        tmp_path / "low.yaml",
        "events: {embedder: {kind: open_clip, model: ViT-L-14}, max_s: 9}\n"
        "captions: [{kind: tags}, {kind: colour_motion}]\nresources: {shots: {cpus: 2}, cut: {cpus: 3}}\n",
    )
    text = "base: low.yaml\nevents: {embedder: {kind: none}}\ncaptions: [{kind: given}]\nresources: {cut: {gpus: 1}}\n"
    r = recipe.load(write(tmp_path / "high.yaml", text))
    assert (r.events.max_s, r.events.embedder.kind, r.events.embedder.model) == (9, "none", "ViT-B-32")
    assert [c.kind for c in r.captions] == ["given"]
    assert (r.resources["shots"].cpus, r.resources["cut"].cpus, r.resources["cut"].gpus) == (2, 3, 1)


def test_a_null_takes_away_and_is_a_value_where_one_may_be_null(tmp_path):
    write(tmp_path / "low.yaml", "base: embedded\ncut: {height: 240, crf: 40}\nscores: {watermark: false}\n")
    text = "base: low.yaml\ncut: {height: null, crf: null}\nscores: null\ndecide: {rules: {blurred: null}}\n"
    r = recipe.load(write(tmp_path / "high.yaml", text))
    assert (r.cut.height, r.cut.crf, r.scores.watermark) == (None, 18, True)
    assert set(r.decide.rules) == set(recipe.load("embedded").decide.rules) - {"blurred"}


def test_a_null_for_a_rule_that_is_not_there_names_the_nearest(tmp_path):
    file = write(tmp_path / "r.yaml", "base: embedded\ndecide: {rules: {blured: null}}\n")
    for said in (refused(file), refused("embedded", "decide.rules.blured=null")):
        assert "decide.rules.blured" in said
        assert "did you mean 'blurred'?" in said


def test_bases_chain_beside_their_own_file_and_keep_the_last_name(tmp_path):
    write(
        tmp_path / "a/one.yaml", "name: first\ncut: {crf: 1}\ndecode: {sample_fps: 1}\nevents: {min_s: 1}\n"
    )
    write(tmp_path / "a/two.yaml", "base: one.yaml\ncut: {crf: 2}\ndecode: {sample_fps: 2}\n")
    r = recipe.load(write(tmp_path / "three.yaml", "base: a/two.yaml\ncut: {crf: 3}\n"))
    assert (r.name, r.cut.crf, r.decode.sample_fps, r.events.min_s) == ("three", 3, 2, 1)


def test_a_circle_is_one_sentence_with_its_files(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: c.yaml\n")
    file = write(tmp_path / "c.yaml", "base: ./b.yaml\n")
    assert "b.yaml → c.yaml → b.yaml" in refused(str(tmp_path / "a.yaml"))
    assert "c.yaml → b.yaml → c.yaml" in refused(file)
    assert "me.yaml → me.yaml" in refused(write(tmp_path / "me.yaml", "base: me.yaml\n"))


def test_a_base_that_is_none_says_so(tmp_path):
    assert "did you mean 'embedded'?" in refused(write(tmp_path / "x.yaml", "base: embeded\n"))
    assert "base: name one recipe" in refused(write(tmp_path / "x.yaml", "base: [a, b]\n"))
    assert "base stands in a recipe's file alone" in refused("embedded", "base=smoke")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cut: {crf: 1}\nshots: {}\ncut: {crf: 2}\n", ["line 3", "'cut'", "line 1"]),
        (
            "decide:\n  rules:\n    a: {column: fps, min: 1}\n    a: {column: fps, max: 9}\n",
            ["line 4", "'a'"],
        ),
        ("cut: {crf: 1,\n  preset: fast,\n  crf: 2}\n", ["line 3", "'crf'"]),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(tmp_path, text, says):
    said = refused(write(tmp_path / "r.yaml", text))
    assert all(s in said for s in [*says, "r.yaml"])


def test_yamls_own_merging_of_an_anchor_is_no_repetition(tmp_path):
    text = "captions:\n  - &one {kind: tags, frames: 2}\n  - {<<: *one, kind: tags, frames: 3}\n"
    assert [c.frames for c in recipe.load(write(tmp_path / "r.yaml", text)).captions] == [2, 3]


def test_paths_lead_from_their_own_file_and_those_of_set_from_the_current_folder(tmp_path, monkeypatch):
    for folder in ("low/model", "high", "cwd/here"):
        (tmp_path / folder).mkdir(parents=True)
    write(
        tmp_path / "low/low.yaml",
        "scores: {aesthetic: {weights: ../head.pth}}\n"
        "captions: [{kind: transformers, model: model}, {kind: python, captioner: 'own.py:Own'}]\n"
        "stages: [{stage: 'bright.py:Bright'}, {stage: 'package.module:Stage'}]\n"
        "choose: {judges: [{kind: clip_score, pretrained: laion2b_s34b_b79k}]}\n",
    )
    file = write(tmp_path / "high/high.yaml", "base: ../low/low.yaml\n")
    monkeypatch.chdir(tmp_path / "cwd")
    r = recipe.load(file)
    assert r.scores.aesthetic.weights == str(tmp_path / "head.pth")
    assert r.captions[0].model == str(tmp_path / "low/model")
    assert r.captions[1].captioner == f"{tmp_path}/low/own.py:Own"
    assert [s.stage for s in r.stages] == [f"{tmp_path}/low/bright.py:Bright", "package.module:Stage"]
    assert r.choose.judges[0].pretrained == "laion2b_s34b_b79k"
    r = recipe.load(file, ["scores.aesthetic.weights=h.pth", "captions.0.model=here"])
    assert r.scores.aesthetic.weights == str(tmp_path / "cwd/h.pth")
    assert r.captions[0].model == str(tmp_path / "cwd/here")
    assert recipe.load(file, ["captions.0.model=owner/name"]).captions[0].model == "owner/name"
    assert (
        recipe.load(file, ["scores.aesthetic.weights=s3://b/h.pth"]).scores.aesthetic.weights
        == "s3://b/h.pth"
    )


# ---------------------------------------------------------------- --set

QWEN = "caption:Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.mark.parametrize(
    "override",
    [
        f'resources."{QWEN}".gpus=0',
        f"resources.'{QWEN}'.gpus=0",
        f"resources.{QWEN}.gpus=0",  # what a shell leaves of the first
        f'resources."{QWEN}"={{gpus: 0}}',
        f"resources.{QWEN}={{gpus: 0}}",
    ],
)
@pytest.mark.parametrize("name", ["panda70m", "embedded"])
def test_a_key_with_dots_can_be_set(name, override):
    assert recipe.load(name, [override]).resources[QWEN].gpus == 0


def test_what_is_advised_comes_back_when_pasted():
    advice = setting(["resources", QWEN, "gpus"], 0)
    option, item = shlex.split(advice)
    assert option == "--set"
    assert split_setting(item) == (["resources", QWEN, "gpus"], "0")
    assert dotted(["decode", "sample_fps"]) == "decode.sample_fps"
    assert setting(["decode", "sample_fps"], 4) == "--set decode.sample_fps=4"


@pytest.mark.parametrize("item", ["a", "a.=1", '"a=1', "=1", "a..b=1", "", '"a"b=1'])
def test_what_is_no_setting_says_how_to_write_one(item):
    assert "key=value" in refused("embedded", item)


def test_a_rule_is_switched_off_and_a_bound_of_one_taken_away():
    assert "blurred" not in recipe.load("embedded", ["decide.rules.blurred=null"]).decide.rules
    r = recipe.load("embedded", ["decide.rules.blurred.max=9e9", "decide.rules.blurred.min=null"])
    assert (r.decide.rules["blurred"].min, r.decide.rules["blurred"].max) == (None, 9e9)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("decode.sample_fsp=4", "--set decode.sample_fsp=4: unknown key (did you mean 'sample_fps'?"),
        ("sample_fps=4", "--set sample_fps=4: unknown key (it belongs to decode.sample_fps)"),
        ("cut.max_clips=4", "it belongs to shards.max_clips"),
        ("captions.1.framez=4", "--set captions.1.framez=4: unknown key (did you mean 'frames'?"),
        ("sampel_fps=4", "did you mean decode.sample_fps?"),
        ("resources.shots.gpu=1", "--set resources.shots.gpu=1: unknown key (did you mean 'gpus'?"),
        ("cut={crf: 1, crf: 2}", "--set 'cut={crf: 1, crf: 2}': line 1: the key 'crf' is there already"),
        (
            "decide.rules.too_short.mix=1",
            "--set decide.rules.too_short.mix=1: unknown key (did you mean 'min'?",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_and_where_it_belongs(override, says):
    assert says in refused("embedded", override)


def test_every_option_says_what_it_means():
    told = list(options(Recipe))
    assert {"decode.sample_fps", "captions.N.beams", "decide.rules.NAME.min", "resources.NAME.gpus"} <= {
        o.key for o in told
    }
    assert [o.key for o in told if not o.meaning] == []
    fps = next(o for o in told if o.key == "decode.sample_fps")
    assert (fps.type, fps.default) == ("number, > 0", "2.0")
