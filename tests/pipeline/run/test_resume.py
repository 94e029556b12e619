"""Which recipe goes on: thresholds of the folder hold, the command's changes win, another way to measure is refused."""

import json

import pytest

from pipeline.recipe import BEFORE, load
from pipeline.run import resume
from pipeline.run.worker import RunError

RULE = "decide.rules.long={column: duration_s, min: 2.2}"


def run_json(*sets: str, tuned: tuple[str, ...] = (), name: str = "smoke") -> dict:
    """What `curate --set …` leaves, and then `shard --set …`."""
    asked, recipe = load(name, list(sets)), load(name, [*sets, *tuned])
    return {
        "recipe": recipe.model_dump(mode="json"),
        "measure_key": asked.measure_key(),
        "asked": {"recipe": asked.model_dump(mode="json", include=set(resume.LATER)), "set": list(sets)},
    }


def goes_on(run: dict, *sets: str, name: str = "smoke"):
    return resume.in_force(run, load(name, list(sets)), sets, "run")


def test_the_same_command_keeps_what_shard_has_set():
    recipe = goes_on(run_json(tuned=(RULE, "shards.seed=7")))
    assert recipe.decide.rules["long"].min == 2.2
    assert recipe.shards.seed == 7


def test_what_the_command_asks_for_anew_wins_and_the_rest_stays():
    run = run_json(tuned=(RULE, "shards.seed=7", "shards.max_clips=5"))
    recipe = goes_on(run, "decide.rules.long.min=1", "decide.rules.long.column=duration_s", "shards.seed=0")
    assert recipe.decide.rules["long"].min == 1
    assert recipe.shards.seed == 0  # the recipe's own value, but asked for by name
    assert recipe.shards.max_clips == 5


def test_a_changed_recipe_wins_only_where_it_changed():
    run = run_json(tuned=("shards.seed=7", "shards.max_clips=5"))
    run["asked"]["recipe"]["shards"]["max_clips"] = 900  # the recipe's file said so then
    recipe = goes_on(run)
    assert (recipe.shards.seed, recipe.shards.max_clips) == (7, 1000)


def test_a_rule_that_shard_took_away_stays_away_and_one_that_the_command_drops_goes():
    run = run_json(RULE)
    del run["recipe"]["decide"]["rules"]["long"]
    assert goes_on(run, RULE).decide.rules == {}
    assert goes_on(run_json(RULE)).decide.rules == {}


def test_what_is_in_force_is_told_with_both_values_and_the_way_back():
    asked = load("smoke")
    (line,) = resume.told(load("smoke", [RULE, "shards.seed=7"]), asked, "my run")
    for word in (
        "decide.rules.long",
        "2.2",
        "shards.seed=7 (recipe: 0)",
        "clipmill shard 'my run' --recipe smoke",
    ):
        assert word in line
    assert resume.told(asked, asked, "run") == []


def test_another_way_to_measure_is_refused_with_keys_and_both_values():
    with pytest.raises(RunError) as e:
        goes_on(run_json(), "cut.crf=35", "captions.0.frames=3")
    for word in (
        "another recipe",
        "cut.crf is 30 there and 35 here",
        "captions.0.frames is 1 there and 3 here",
    ):
        assert word in str(e.value)
    assert "\n" not in str(e.value)


def test_an_option_that_came_since_is_no_difference():
    run = run_json()
    del run["recipe"]["cut"]["keyframe_s"]
    run["measure_key"] = "of an older version"
    assert goes_on(run).cut.keyframe_s == load("smoke").cut.keyframe_s


def of_older(*missing: str, **stored: str) -> dict:
    """run.json of a clipmill that did not have those options."""
    run = run_json(*(f"{k}={v}" for k, v in stored.items()))
    for key in missing:
        section, name = key.split(".")
        del run["recipe"][section][name]
    return run | {"measure_key": "of an older version"}


def test_an_option_whose_default_measures_otherwise_than_before_there_was_any_is_a_difference():
    run = of_older("decode.deinterlace")
    with pytest.raises(RunError, match=r"before there was decode\.deinterlace=true") as e:
        goes_on(run)
    assert "--set decode.deinterlace=false" in str(e.value)
    assert "\n" not in str(e.value)
    assert goes_on(run, "decode.deinterlace=false").decode.deinterlace is False  # the advice holds


def test_what_no_value_gives_again_needs_another_folder():
    run = of_older("decode.hdr", "decode.deinterlace", "shots.transitions")
    for sets in ((), ("decode.hdr=keep", "decode.deinterlace=false", "shots.transitions=keep")):
        with pytest.raises(
            RunError, match=r"no value of decode\.hdr measures as it did, so give another --out"
        ):
            goes_on(run, *sets)


def test_an_older_folder_and_a_changed_setting_are_both_told():
    with pytest.raises(RunError) as e:
        goes_on(of_older("decode.deinterlace"), "cut.crf=35")
    for word in ("cut.crf is 30 there and 35 here", "decode.deinterlace is false there and true here"):
        assert word in str(e.value)


def test_transitions_count_as_kept_before_they_could_be_trimmed():
    run = of_older("shots.transitions")
    assert goes_on(run, "shots.transitions=keep").shots.transitions == "keep"
    with pytest.raises(RunError, match=r"--set shots\.transitions="):
        goes_on(run, "shots.transitions=trim")


# What the recipe could say before any of `BEFORE` came: those were measured by their defaults then, too.
FIRST = {
    "decode": "sample_fps sample_size jpeg_quality grey_fps grey_size stall_s max_pixels max_duration_s max_memory_gb",
    "shots": "detector threshold candidate_threshold content_threshold min_shot_frames",
    "events": "embedder piece_s piece_slack_s position max_inner max_outer min_s max_s longer trim clip_samples",
    "cut": "mode codec preset crf height keyframe_s audio stall_s",
    "scores": "motion picture watermark text aesthetic",
}


def test_every_option_that_came_later_says_what_was_measured_before():
    measured = load("smoke").measured()
    now = {f"{section}.{name}" for section in FIRST for name in measured[section]}
    first = {f"{section}.{name}" for section, names in FIRST.items() for name in names.split()}
    assert now - first == set(BEFORE)
    assert first <= now


def test_what_two_changes_make_together_is_checked():
    run = run_json("decide.rules.a={column: duration_s, max: 5}", tuned=("decide.rules.a.max=2",))
    changed = "decide.rules.a={column: duration_s, max: 5, min: 4}"
    run["asked"]["set"] = [changed]  # as if the recipe's file had changed, not the command
    with pytest.raises(RunError, match=r"min 4 is above max 2.*clipmill shard"):
        goes_on(run, changed)


@pytest.mark.parametrize(
    ("base", "ours", "theirs", "merged"),
    [
        ({"a": 1}, {"a": 2}, {"a": 1}, {"a": 2}),
        ({"a": 1}, {"a": 1}, {"a": 2}, {"a": 2}),
        ({"a": 1}, {"a": 3}, {"a": 2}, {"a": 2}),
        ({"a": 1}, {}, {"a": 1}, {}),
        ({"a": 1}, {"a": 1}, {}, {}),
        ({}, {"a": 1}, {}, {"a": 1}),
        ({}, {}, {"a": 1}, {"a": 1}),
        ({"a": [1]}, {"a": [1, 2]}, {"a": [1]}, {"a": [1, 2]}),
        (None, {"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
    ],
)
def test_merging(base, ours, theirs, merged):
    before = json.dumps([base, ours, theirs])
    assert resume.merge(base, ours, theirs) == merged
    assert json.dumps([base, ours, theirs]) == before


def test_a_rule_that_the_command_switches_off_by_name_goes_although_shard_has_tuned_it():
    run = run_json(tuned=("decide.rules.blurred.min=5", "decide.rules.frozen.max=0.5"), name="embedded")
    rules = goes_on(run, "decide.rules.blurred=null", name="embedded").decide.rules
    assert "blurred" not in rules
    assert rules["frozen"].max == 0.5
    assert goes_on(run, "decide.rules={}", name="embedded").decide.rules == {}


def test_who_is_chosen_is_changed_on_a_run_that_measured_more_and_it_goes_on_measuring():
    judged = "choose={method: open_clip, pretrained: x}"
    recipe = goes_on(run_json(judged, tuned=("choose.method=consensus", "choose.clip_score=true")), judged)
    assert (recipe.choose.method, [j.kind for j in recipe.choose.judges]) == ("consensus", ["clip_score"])
    recipe = goes_on(run_json(), "choose={method: order, order: [tags-baseline]}")
    assert (recipe.choose.method, recipe.choose.judges) == ("order", ())
    with pytest.raises(RunError, match="holds a run of another recipe"):
        goes_on(run_json(), judged)


def test_a_set_of_shards_is_not_measured_into():
    with pytest.raises(RunError, match="is a set of shards of /the/run: give another --out"):
        goes_on(run_json() | {"of": "/the/run"})
