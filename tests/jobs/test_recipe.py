"""clipmill recipe: what it prints can be used, every option is explained, every mistake is one sentence."""

from pathlib import Path

import pytest

from jobs import recipe as job
from jobs.training.recipe import TRAINING, load_training
from pipeline import recipe

BOTH = [*((n, "") for n in recipe.bundled()), *((n, "--training") for n in recipe.bundled(TRAINING))]


def said(capsys, *command: str) -> str:
    assert job.main(list(command)) == 0
    return capsys.readouterr().out


def refused(capsys, *command: str) -> str:
    assert job.main(list(command)) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.count("\n") == 1
    return out.err


@pytest.mark.parametrize(("name", "flag"), BOTH)
def test_what_is_shown_can_be_saved_and_is_the_same_recipe(tmp_path, capsys, name, flag):
    file = tmp_path / "mine.yaml"
    file.write_text(said(capsys, "show", name, *filter(None, [flag])))
    load = load_training if flag else recipe.load
    assert load(str(file)) == load(name)


def test_set_reaches_what_is_shown_and_a_base_is_resolved(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("base: embedded\ncut: {height: 240}\n")
    text = said(capsys, "show", str(file), "--set", "cut.crf=33")
    assert "base" not in text
    assert "crf: 33\n  height: 240" in text
    assert "detector: transnetv2" in text


@pytest.mark.parametrize(
    ("key", "has", "has_not"),
    [
        (
            None,
            ["decode: One pass", "decode.sample_fps = 2.0", "(number, > 0)", "captions.N.beams"],
            ["optimizer"],
        ),
        ("decode", ["decode.sample_fps = 2.0"], ["shots."]),
        ("sample_fps", ["decode.sample_fps = 2.0"], ["sample_size"]),
        ("decide.rules", ["decide.rules.NAME.matches = null"], ["duplicates"]),
        ("decide.rules.too_short.min", ["decide.rules.NAME.min"], ["rules.NAME.max"]),
        ("captions.0.frames", ["captions.N.frames = 4", "captions.N.frames = 8"], ["captions.N.beams"]),
        ('resources."caption:Qwen/Qwen2.5-VL-7B-Instruct".gpus', ["resources.NAME.gpus"], ["cpus"]),
        ("optimizer.lr", ["optimizer.lr = 0.0001"], ["warmup"]),
    ],
)
def test_explain_tells_meaning_type_and_default_of_what_is_asked(capsys, key, has, has_not):
    text = said(capsys, "explain", *filter(None, [key]))
    assert all(h in text for h in has)
    assert not any(h in text for h in has_not)


def test_explain_knows_training_recipes_and_names_the_nearest(capsys):
    assert "optimizer.lr = 0.0001" in said(capsys, "explain", "--training")
    assert "  shards." not in said(capsys, "explain", "--training")
    assert "(did you mean 'sample_fps'?)" in refused(capsys, "explain", "sampel_fps")


@pytest.mark.parametrize(("name", "flag"), BOTH)
def test_every_bundled_recipe_holds(capsys, name, flag):
    assert f"{name} holds: " in said(capsys, "check", name, *filter(None, [flag]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cut: {crf: 1}\ncut: {crf: 2}\n", "line 2: the key 'cut' is there already"),
        ("decide: {rules: {x: {column: score_motoin, min: 1}}}\n", "did you mean 'score_motion'"),
        ("resources: {shot: {cpus: 1}}\n", "resources.shot: no such stage (did you mean 'shots'?)"),
        ("stages: [{stage: 'gone.py:Gone'}]\n", "gone.py:Gone' cannot be imported"),
        ("optimizer: {lr: 1}\nmodel: {kind: magic}\n", "there is no models/*/magic.py"),
    ],
)
def test_check_finds_what_only_a_run_would_have_found(tmp_path: Path, capsys, text, says):
    (tmp_path / "r.yaml").write_text(text)
    assert says in refused(capsys, "check", str(tmp_path / "r.yaml"))


def test_check_tells_every_mistake_on_a_line_of_its_own(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(
        "base: embedded\ncut: {crff: 20}\ncaptions: [{kind: tag}]\ndecide: {rules: {too_shrt: null}}\n"
    )
    assert job.main(["check", str(tmp_path / "r.yaml")]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.endswith("r.yaml: 3 mistakes")
    assert len(lines) == 3
    for part in (
        "cut.crff: unknown key",
        "'tag' (did you mean 'tags'?)",
        "decide.rules.too_shrt: null takes nothing",
    ):
        assert sum(part in line for line in lines) == 1


def test_check_remarks_that_an_empty_recipe_captions_nothing(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("")
    assert job.main(["check", str(tmp_path / "r.yaml")]) == 0
    assert "no captioner, so nothing would be captioned" in capsys.readouterr().out


def test_check_tells_mistakes_of_keys_and_of_what_they_name_together(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(
        "base: embedded\ncut: {crf: many, heigth: 2}\nchoose: {method: ordr}\n"
        "decide: {rules: {still: {column: score_motoin, min: 1}, blank: {column: score_brightnes, min: 1}}}\n"
    )
    assert job.main(["check", str(tmp_path / "r.yaml")]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.endswith("r.yaml: 5 mistakes")
    for part in ("cut.crf", "cut.heigth", "did you mean 'order'", "rules.still", "rules.blank"):
        assert sum(part in line for line in lines) == 1


def test_a_mistake_does_not_bring_others_that_are_none(tmp_path, capsys):
    """Where captioners cannot be told, nothing is said of who is preferred."""
    (tmp_path / "r.yaml").write_text(
        "base: embedded\ncaptions: [{kind: tags, framse: 2}]\nchoose: {method: order, order: [tags-baseline]}\n"
    )
    assert "captions.0.framse: unknown key" in refused(capsys, "check", str(tmp_path / "r.yaml"))


def test_explain_says_that_what_has_no_number_passes(capsys):
    assert "what was not measured, or is no number, passes" in said(capsys, "explain", "decide.rules")
