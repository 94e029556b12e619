"""What is told of a recipe before any work: choices and rules by what nobody will measure, all at once."""

import json

import pytest

from pipeline.graph import check
from pipeline.io.store import Store
from pipeline.layers import Layer, create
from pipeline.recipe import RecipeError, load
from tests.fixtures.run_folder import make_run_folder


def wrong(*settings: str, out: object = "") -> list[str]:
    """The mistakes of `smoke` with these settings; [] for none."""
    try:
        check(load("smoke", list(settings)), out)
    except RecipeError as e:
        return e.mistakes
    return []


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("choose={method: ordr, order: [x]}", "choose.method: no caption has the score 'ordr' (did you mean 'order'?)"),
        ("choose.method=consensos", "(did you mean 'consensus'?)"),
        ("choose.method=visual_fit", "no caption has the score 'visual_fit'; they have consensus"),
        (
            "choose={method: weights, weights: {consensus: 1, visual_fitt: 1}, judges: [{kind: visual_fit}]}",
            "choose.weights: no caption has the score 'visual_fitt' (did you mean 'visual_fit'?)",
        ),
        ("choose={method: order, order: [tag-baseline]}", "no captioner 'tag-baseline'"),
        ("decide.rules.sure={column: caption.consenus, min: 1}", "did you mean 'caption.consensus'?"),
    ],
)  # fmt: skip
def test_a_choice_or_a_rule_by_a_score_that_nobody_will_give_is_told_before_work(setting, says):
    (told,) = wrong("captions=[{kind: tags}, {kind: colour_motion}]", setting)
    assert says in told
    assert "\n" not in told


@pytest.mark.parametrize(
    "setting",
    [
        "choose.method=consensus",
        "choose={method: order, order: [colour-motion-baseline]}",
        "choose={method: visual_fit, judges: [{kind: visual_fit}]}",
        "choose={method: weights, weights: {consensus: 1, visual_fit: 2}, judges: [{kind: visual_fit}]}",
    ],
)
def test_a_choice_by_what_will_be_there_holds(setting):
    assert wrong("captions=[{kind: tags}, {kind: colour_motion}]", setting) == []


FUSE = "{{kind: fuse, name: fused, of: [{of}], model: m, url: 'http://localhost:1/v1'}}"


@pytest.mark.parametrize(
    ("captions", "says"),
    [
        (f"{{kind: tags}}, {FUSE.format(of='tag-baseline')}", "did you mean 'tags-baseline'?); there is tags-baseline"),
        (f"{FUSE.format(of='tags-baseline')}, {{kind: tags}}", "no captioner 'tags-baseline' before it; there is none"),
        (f"{{kind: tags}}, {FUSE.format(of='fused')}", "no captioner 'fused' before it"),
        (f"{{kind: tags}}, {FUSE.format(of='tags-baseline')}", ""),
        (f"{{kind: tags}}, {FUSE.format(of='')}", ""),
    ],
)  # fmt: skip
def test_what_is_to_be_fused_of_nobody_is_told_before_work(captions, says):
    told = wrong(f"captions=[{captions}]")
    assert len(told) == bool(says)
    assert says in "".join(told)


def test_captions_of_a_run_and_its_layers_may_be_fused(tmp_path):
    recipe = make_run_folder(tmp_path / "run", sources=1, units=1, errors=0)
    store = Store(str(tmp_path / "run"))
    (tmp_path / "run/run.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    asked = f"captions=[{FUSE.format(of='added')}]"
    assert "no captioner 'added'" in wrong(asked, out=store)[0]
    create(store, Layer("caption:added", 1))
    assert wrong(asked, out=store) == []


def test_all_mistakes_are_told_at_once():
    told = wrong(
        "captions=[{kind: tags}]", "choose.method=consensos", "resources.decod.cpus=1",
        "decide.rules.x={column: score_motoin, min: 1}", "decide.rules.y={column: caption.x, min: 1}",
    )  # fmt: skip
    assert [said.split(":")[0] for said in told] == [
        "decide.rules.x", "resources.decod", "choose.method", "decide.rules"
    ]  # fmt: skip


def test_what_layers_have_added_to_a_run_may_be_chosen_by(tmp_path):
    recipe = make_run_folder(tmp_path / "run", sources=1, units=1, errors=0)
    store = Store(str(tmp_path / "run"))
    (tmp_path / "run/run.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    asked = ["captions=[{kind: tags}]", "choose={method: weights, weights: {brief: 1}}"]
    asked += [
        "decide.rules.x={column: score_beauty, min: 1}",
        "decide.rules.y={column: caption.brief, min: 1}",
    ]
    assert len(wrong(*asked, out=store)) == 3
    create(store, Layer("judge:brief"))
    create(store, Layer("beauty", scores=("beauty",)))
    assert wrong(*asked, out=store) == []
    order = "choose={method: order, order: [teacher, on-screen-text-baseline]}"
    assert len(wrong(asked[0], order, out=store)) == 1
    create(store, Layer("caption:teacher"))
    assert wrong(asked[0], order, out=store) == []
