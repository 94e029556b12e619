"""Recipes: every mistake is one sentence that names the key, before any work."""

import pytest

from pipeline import recipe


@pytest.mark.parametrize("name", recipe.bundled())
def test_every_bundled_recipe_is_valid(name: str):
    assert recipe.load(name).name == name


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("decode.foo=1", ["decode.foo", "unknown key", "sample_fps"]),
        ("nope=1", ["nope", "unknown key", "decode"]),
        ("decode.sample_fps=fast", ["decode.sample_fps", "number", "'fast'"]),
        ("decode.sample_fps=-1", ["decode.sample_fps", "greater than 0"]),
        ("shots.detector=magic", ["shots.detector", "transnetv2"]),
        ("captions.0.kind=magic", ["captions.0", "magic", "tags"]),
        ("captions.9.kind=tags", ["captions.9", "not an item"]),
        ("decode", ["key=value"]),
        ("decode.sample_fps.x=1", ["decode.sample_fps", "number"]),
        ("cut.crf=[", ["not valid YAML"]),
    ],
)
def test_a_wrong_override_names_the_key_and_the_fault(override: str, says: list[str]):
    with pytest.raises(recipe.RecipeError) as e:
        recipe.load("embedded", [override])
    for text in says:
        assert text in str(e.value)
    assert "\n" not in str(e.value)


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(recipe.RecipeError, match="embedded"):
        recipe.load("pandas70m")


def test_a_broken_file_is_one_sentence(tmp_path):
    (tmp_path / "r.yaml").write_text("a: [1\nb: }")
    with pytest.raises(recipe.RecipeError, match="not valid YAML") as e:
        recipe.load(str(tmp_path / "r.yaml"))
    assert "\n" not in str(e.value)
    (tmp_path / "r.yaml").write_text("- a\n- b\n")
    with pytest.raises(recipe.RecipeError, match="mapping"):
        recipe.load(str(tmp_path / "r.yaml"))


def test_overrides_reach_lists_maps_and_sections_that_were_left_out():
    r = recipe.load(
        "embedded", ["decide.rules.new={column: duration_s, max: 9}", "resources.shots.gpus=0.25"]
    )
    assert r.decide.rules["new"].max == 9
    assert r.resources["shots"].gpus == 0.25


def test_the_measure_key_changes_with_what_is_measured_and_not_with_what_is_decided():
    base = recipe.load("embedded").measure_key()
    assert recipe.load("embedded", ["cut.crf=30"]).measure_key() != base
    assert recipe.load("embedded", ["decide.duplicates.enabled=false", "shards.seed=7"]).measure_key() == base
    assert recipe.load("embedded", ["resources.shots.cpus=2", "name=other"]).measure_key() == base


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["cut.crf=abc"], "--set cut.crf=abc: input should be a valid integer"),
        (["cut={crf: abc}"], "--set 'cut={crf: abc}': cut.crf: input should be"),
        (["cut.crff=1"], "--set cut.crff=1: unknown key (did you mean 'crf'?); known here: "),
        (["decide.rules.gone=null"], "--set decide.rules.gone=null: null takes nothing away"),
        (
            ["captions.0.kind=transformers"],
            "--set captions.0.kind=transformers: captions.0.model: field required",
        ),
        (["choose.method=order"], "--set choose.method=order: choose: method order needs choose.order"),
        (["captions={kind: plain}"], "should be a list: write it in [ ] (got {'kind': 'plain'})"),
        (
            ["captions=[{kind: tags},{kind: given, column: yes}]"],
            "should be a text: put it in quotes (got True)",
        ),
        (["choose.weights=[a]"], "should be a mapping: write it in { } (got ['a'])"),
        (["cut.preset=fast", "cut.crf=abc", "seed=3"], "--set cut.crf=abc: input"),
        (["cut={crf: 1"], "the value is not valid YAML: line 1, column 8: expected ',' or '}'"),
    ],
)
def test_a_mistake_of_set_names_the_setting_and_not_the_file(overrides, says):
    with pytest.raises(recipe.RecipeError) as e:
        recipe.load("embedded", overrides)
    assert says in str(e.value)
    assert "embedded.yaml" not in str(e.value)


def test_a_mistake_of_a_section_as_a_whole_does_not_say_all_of_it_again():
    with pytest.raises(recipe.RecipeError, match=r"the preferred first$"):
        recipe.load("embedded", ["choose.method=order"])


def test_mistakes_of_a_file_are_its_own_beside_those_of_set(tmp_path):
    (tmp_path / "r.yaml").write_text("cut: {crf: many}\nshots: {detecter: x}\n")
    with pytest.raises(recipe.RecipeError) as e:
        recipe.load(str(tmp_path / "r.yaml"), ["cut.height=tall"])
    own, other, mine = sorted(e.value.mistakes, key=lambda m: (m.startswith("--set"), m))
    assert own.startswith("cut.crf: ")
    assert other.startswith("shots.detecter: unknown key")
    assert mine.startswith("--set cut.height=tall: ")
    assert e.value.where.endswith("r.yaml")


def test_where_a_file_is_no_yaml_is_said_by_line_and_column(tmp_path):
    (tmp_path / "r.yaml").write_text("cut:\n  crf: [1\n  b: }\n")
    with pytest.raises(
        recipe.RecipeError, match=r"r\.yaml: not valid YAML: line 3, column 4: expected ',' or ']'"
    ):
        recipe.load(str(tmp_path / "r.yaml"))
    for data in (b"cut: \xff", b"cut: \x00", b"cut: `x`"):
        (tmp_path / "r.yaml").write_bytes(data)
        with pytest.raises(recipe.RecipeError, match="not valid YAML") as e:
            recipe.load(str(tmp_path / "r.yaml"))
        assert "<unicode string>" not in str(e.value)


def test_another_choice_keeps_the_judges_unless_it_names_others():
    judges = recipe.load("embedded", []).choose.judges
    assert judges
    assert recipe.load("embedded", ["choose={method: consensus}"]).choose.judges == judges
    assert recipe.load("embedded", ["choose={method: consensus}"]).choose.method == "consensus"
    assert not recipe.load("embedded", ["choose.judges=[]", "choose={method: consensus}"]).choose.judges
    assert not recipe.load("embedded", ["choose={judges: [], method: consensus}"]).choose.judges
    assert recipe.load("embedded", ["choose={method: order, order: [a]}"]).choose.weights == {}
