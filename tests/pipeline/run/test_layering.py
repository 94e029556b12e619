"""`clipmill caption`: what is added to a finished run is what a first run would have given, and touches nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from jobs import caption, curate, shard
from pipeline.faults import StoreError
from pipeline.io.store import Store
from pipeline.layers import Layer, Layered, clip_files, create, layers, unit_of, unjudge, write
from pipeline.recipe_choose import YesJudge
from pipeline.record import Caption
from pipeline.run import weights
from pipeline.tables import caption_row
from tests.fixtures import tiny_selector, videos
from tests.fixtures.videos import made

BRIEF = """
from pipeline.captions import Judge

class Brief(Judge):
    name = "brevity"

    def score(self, video, clip, texts):
        return [1 / len(text) for text in texts]
"""


class World:
    """A folder of raw videos, two captioners that log what they are asked, and a judge."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log"
        (folder / "raw").mkdir()
        shutil.copyfile(made(videos.multi_shot), folder / "raw/a.mp4")
        shutil.copyfile(made(videos.delayed_start, frames=60), folder / "raw/b.mp4")
        shutil.copyfile(made(videos.rotated, frames=30), folder / "raw/c.mp4")
        (folder / "brief.py").write_text(BRIEF)

    def captioners(self, *names: str) -> str:
        options = "{{log: {log}, broken: {folder}/broken, keep: {folder}/keep, name: {name}}}"
        made_of = (options.format(log=self.log, folder=self.folder, name=n) for n in names)
        where = "captioner: 'tests.fixtures.seeing:Sees'"
        return f"captions=[{', '.join(f'{{kind: python, {where}, options: {o}}}' for o in made_of)}]"

    def sets(self, *names: str, judge: bool = False) -> list[str]:
        judges = f"choose.judges=[{{kind: python, judge: {self.folder}/brief.py:Brief}}]"
        sets = [self.captioners(*names), "events.min_s=0.1", "events.embedder.kind=none", "decide.rules={}"]
        sets += ["decide.duplicates.enabled=false", "cut.height=null", *([judges] if judge else [])]
        return [a for s in sets for a in ("--set", s)]

    def curate(self, out: str, *names: str, judge: bool = False) -> int:
        where = ["--out", out if "://" in out else str(self.folder / out)]
        local = ["--recipe", "smoke", "--runner", "local", *self.sets(*names, judge=judge)]
        return curate.main([str(self.folder / "raw"), *where, *local])

    def caption(self, out: str, *names: str, judge: bool = False, more: tuple[str, ...] = ()) -> list[str]:
        command = [out if "://" in out else str(self.folder / out), "--runner", "local", "--recipe", "smoke"]
        return [*command, *self.sets(*names, judge=judge), *more]

    def calls(self) -> Counter[str]:
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return Counter(text.splitlines())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run by one captioner and one by two and a judge, in a world and a copy of it."""
    folder = tmp_path_factory.mktemp("layers")
    (folder / "w").mkdir()
    world = World(folder / "w")
    assert world.curate("one", "old") == 0
    assert world.curate("both", "old", "new", judge=True) == 0
    world.calls()
    shutil.copytree(folder / "w", folder / "copy")
    return world


@pytest.fixture
def world(first):
    """As `first` left it, in the same place: recipes name it."""
    shutil.rmtree(first.folder)
    shutil.copytree(first.folder.with_name("copy"), first.folder)
    return first


def measured(out: Path) -> dict[str, dict]:
    """Rows of all clips with their layers, by id."""
    clips = Layered(Store(str(out)))
    return {r["clip_id"]: r for name in clips.files for r in clips.read(name).to_pylist()}


def files(out: Path, *folders: str) -> dict[str, bytes]:
    return {
        str(p.relative_to(out)): p.read_bytes() for f in folders for p in (out / f).rglob("*") if p.is_file()
    }


def decisions(out: Path) -> list[dict]:
    return pq.read_table(out / "decisions.parquet").to_pylist()


def test_what_is_added_later_is_what_a_first_run_gives_and_nothing_there_is_touched_or_decoded(world, capsys):
    out = world.folder / "one"
    before = files(out, "clips", "videos", "media")
    shutil.rmtree(world.folder / "raw")
    assert caption.main(world.caption("one", "old", "new", judge=True)) == 0
    assert files(out, "clips", "videos", "media") == before
    assert measured(out) == measured(world.folder / "both")
    assert decisions(out) == decisions(world.folder / "both")
    assert {k.split()[0] for k in world.calls()} == {"new"}
    assert "no longer in the list" not in capsys.readouterr().out
    assert [layer.name for layer in layers(Store(str(out)))] == ["caption:new", "consensus", "judge:brevity"]


def test_the_added_caption_can_be_chosen_and_a_removed_layer_is_gone_from_all(world):
    out = world.folder / "one"
    assert (
        caption.main(world.caption("one", "new", more=("--set", "choose={method: order, order: [new]}"))) == 0
    )
    assert {d["caption_model"] for d in decisions(out)} == {"new"}
    assert caption.main([str(out), "--remove", "caption:new"]) == 0
    assert {c["model"] for r in measured(out).values() for c in r["captions"]} == {"old"}
    assert shard.main([str(out), "--set", "choose.method=consensus"]) == 0
    assert {d["caption_model"] for d in decisions(out)} == {"old"}


def test_where_all_is_there_nothing_is_asked_again(world, capsys):
    assert caption.main(world.caption("one", "new")) == 0
    world.calls()
    assert caption.main(world.caption("one", "new")) == 0
    assert not world.calls()
    assert "nothing to add" in capsys.readouterr().err


def test_a_clip_of_which_nobody_said_anything_is_not_judged_again_and_again(tmp_path, capsys):
    world = World(tmp_path)
    (tmp_path / "mute.py").write_text(
        "from pipeline.captions import Captioner\n\nclass Mute(Captioner):\n    name = 'mute'\n\n"
        "    def caption(self, video, clip):\n        return ''\n"
    )
    mute = f"captions=[{{kind: python, captioner: {tmp_path}/mute.py:Mute}}]"
    sets = [*world.sets("old", judge=True), "--set", mute]
    local = ["--recipe", "smoke", "--runner", "local"]
    curate.main([str(tmp_path / "raw"), "--out", str(tmp_path / "out"), *local, *sets])
    capsys.readouterr()
    caption.main([str(tmp_path / "out"), *local, *sets])
    assert "nothing to add" in capsys.readouterr().err


def test_a_removal_of_what_is_not_there_names_what_is(world, capsys):
    assert caption.main([str(world.folder / "one"), "--remove", "caption:x"]) != 0
    assert "has no layer 'caption:x' (see --list); its layers: none" in capsys.readouterr().err


def test_what_needs_the_source_is_refused_with_a_sentence(world, capsys):
    out = world.folder / "one"
    more = ("--set", "scores.picture=true", "--set", "scores.motion=true")
    before = files(out, "clips", "videos")
    status = caption.main(world.caption("one", "new", more=more))
    if "score_motion" not in next(iter(measured(out).values())):
        assert status == 2
        assert "cannot be measured on finished clips" in capsys.readouterr().err
    assert files(out, "clips", "videos") == before


def test_a_setting_by_which_clips_were_made_is_refused(world, capsys):
    out = str(world.folder / "one")
    assert caption.main([out, "--runner", "local", "--set", "cut.crf=3"]) == 2
    assert "--set cut.crf: clips stay as they were cut" in capsys.readouterr().err


def test_captions_that_failed_are_done_again_when_asked(world):
    out = world.folder / "one"
    (world.folder / "broken").touch()
    assert caption.main(world.caption("one", "new")) in (0, 4)
    failed = [r for r in measured(out).values() if any(c["outcome"] == "error" for c in r["captions"])]
    assert failed
    (world.folder / "broken").unlink()
    world.calls()
    assert caption.main(world.caption("one", "new")) == 0
    assert not world.calls()
    assert caption.main(world.caption("one", "new", more=("--retry-errors",))) == 0
    assert set(world.calls()) == {f"new {r['clip_id']}" for r in failed}
    assert all(c["outcome"] == "ok" for r in measured(out).values() for c in r["captions"])


@pytest.mark.parametrize("after", [1, 2])
def test_killed_and_resumed_it_ends_like_one_that_was_left_alone(world, after):
    out = world.folder / "one"
    command = [sys.executable, "-m", "jobs.caption", *world.caption("one", "old", "new", judge=True)]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, start_new_session=True)
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if world.log.exists() and len(world.log.read_text().splitlines()) >= after:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.002)
    process.communicate()
    assert caption.main(world.caption("one", "old", "new", judge=True)) == 0
    assert measured(out) == measured(world.folder / "both")
    assert decisions(out) == decisions(world.folder / "both")


def test_a_layer_says_what_made_it(world):
    assert caption.main(world.caption("one", "new")) == 0
    said = json.loads((world.folder / "one/layers/caption%3Anew/layer.json").read_text())
    assert said["section"]["captioner"] == "tests.fixtures.seeing:Sees"
    assert "clipmill" in said["versions"]


def test_what_is_added_is_judged_as_the_others_were_though_the_recipe_names_no_judge(world):
    out = world.folder / "both"
    assert caption.main(world.caption("both", "third")) == 0
    scored = [{n for n, _ in c["scores"]} for r in measured(out).values() for c in r["captions"] if c["text"]]
    assert scored
    assert all(names == {"consensus", "brevity"} for names in scored)


def agreed(out: Path) -> dict[tuple[str, str], float]:
    return {
        (i, c["model"]): dict(c["scores"])["consensus"]
        for i, r in measured(out).items()
        for c in r["captions"]
    }


def test_a_removed_captioner_leaves_no_trace_in_what_the_others_agree_on(world):
    assert caption.main(world.caption("both", "third")) == 0
    assert caption.main(world.caption("both", "fourth")) == 0
    assert caption.main([str(world.folder / "both"), "--remove", "caption:fourth"]) == 0
    assert caption.main(world.caption("one", "old", "new", "third")) == 0
    assert agreed(world.folder / "both") == agreed(world.folder / "one")
    assert caption.main([str(world.folder / "both"), "--remove", "caption:third"]) == 0
    assert [layer.name for layer in layers(Store(str(world.folder / "both")))] == ["judge:brevity"]


def test_what_the_run_itself_wrote_is_no_layer(world, capsys):
    assert caption.main([str(world.folder / "one"), "--remove", "caption:old"]) == 2
    assert "has no layer 'caption:old' (what curate itself wrote stays)" in capsys.readouterr().err
    assert caption.main([str(world.folder / "one"), "--list"]) == 0
    assert "of the run itself: caption:old" in capsys.readouterr().out


def test_a_judge_that_fails_is_said_so_by_clip_and_in_sum(world, capsys):
    (world.folder / "brief.py").write_text(BRIEF.replace("[1 / len(text) for text in texts]", "7"))
    assert caption.main(world.caption("one", "old", judge=True)) == 0
    err = capsys.readouterr().err
    assert "judge:brevity said nothing of 5 clips: see run.log; the same command tries again" in err
    assert "Traceback" not in err
    assert (
        "score gave 7, not a list with a number for each text" in (world.folder / "one/run.log").read_text()
    )
    (world.folder / "brief.py").write_text(BRIEF)
    assert caption.main(world.caption("one", "old", judge=True)) == 0
    scores = [dict(c["scores"]) for r in measured(world.folder / "one").values() for c in r["captions"]]
    assert all("brevity" in s for s in scores)


def broken_run(world: World, out: str, *names: str, judge: bool = False) -> None:
    """As `curate` by the names, but all of them fail on clips that begin after the first second."""
    (world.folder / "broken").touch()
    world.curate(out, *names, judge=judge)
    (world.folder / "broken").unlink()
    world.calls()


def curate_again(world: World, out: str, *names: str, judge: bool = False) -> int:
    local = ["--recipe", "smoke", "--runner", "local", "--retry-errors", *world.sets(*names, judge=judge)]
    return curate.main([str(world.folder / "raw"), "--out", str(world.folder / out), *local])


def test_curate_tries_again_what_failed_where_it_lies_and_scores_follow(world, capsys):
    out = world.folder / "broken_one"
    broken_run(world, "broken_one", "old", judge=True)
    (world.folder / "broken").touch()
    assert caption.main(world.caption("broken_one", "new", judge=True)) == 0
    (world.folder / "broken").unlink()
    failed = [i for i, r in measured(out).items() if any(c["outcome"] == "error" for c in r["captions"])]
    world.calls()
    capsys.readouterr()
    shutil.copytree(out, world.folder / "bare")
    shutil.rmtree(world.folder / "bare/layers")
    assert curate_again(world, "broken_one", "old", judge=True) == 0
    assert set(world.calls()) == {f"{n} {i}" for n in ("old", "new") for i in failed}
    said = capsys.readouterr()
    assert "failed" not in said.out
    assert measured(out) == measured(world.folder / "both")
    assert decisions(out) == decisions(world.folder / "both")
    # what curate wrote is as if there were no layers
    assert curate_again(world, "bare", "old", judge=True) == 0
    assert files(out, "clips") == files(world.folder / "bare", "clips")
    # and then nothing is left
    world.calls()
    before = files(out, "clips", "videos", "layers")
    assert curate_again(world, "broken_one", "old", judge=True) == 0
    assert not world.calls()
    assert files(out, "clips", "videos", "layers") == before


def test_caption_tries_again_what_curate_itself_wrote_and_says_what_it_was_not_asked_for(world, capsys):
    out = world.folder / "broken_one"
    broken_run(world, "broken_one", "old", judge=True)
    assert caption.main(world.caption("broken_one", "new", judge=True)) == 0
    assert f"and nothing else: clipmill caption {out} --retry-errors" in capsys.readouterr().out
    world.calls()
    assert caption.main([str(out), "--runner", "local", "--retry-errors"]) == 0
    assert {k.split()[0] for k in world.calls()} == {"old"}
    assert measured(out) == measured(world.folder / "both")
    assert [layer.name for layer in layers(Store(str(out)))] == ["caption:new", "consensus", "judge:brevity"]


def test_a_name_that_is_there_with_other_options_is_refused_and_says_which(world, capsys):
    assert caption.main(world.caption("one", "new")) == 0
    for name in ("old", "new"):
        capsys.readouterr()
        options = f"{{log: x, name: {name}}}"
        other = f"captions=[{{kind: python, captioner: 'tests.fixtures.seeing:Sees', options: {options}}}]"
        assert caption.main(world.caption("one", name, more=("--set", other))) == 2
        err = capsys.readouterr().err
        assert f"the run has a caption:{name} made with other options" in err
        assert 'options.log is "' in err
        assert ("--remove caption:new first" in err) == (name == "new")


def selected(world, *more: str) -> list[str]:
    judged = f"choose={{judges: [{{kind: selector, model: {world.folder}/selector.pt}}], method: selector}}"
    return world.caption("one", "old", more=("--set", judged, *more))


def scores(out: Path) -> dict[str, float]:
    return {id: dict(c["scores"])["selector"] for id, r in measured(out).items() for c in r["captions"]}


def test_weights_that_were_trained_anew_are_noticed_and_removed_the_layer_is_made_by_them(world, capsys):
    out = world.folder / "one"
    file = tiny_selector.write(world.folder / "selector.pt", seed=1)
    assert caption.main(selected(world)) == 0
    before = scores(out)
    os.utime(file, (1, 1))  # the same bytes at another time are the same
    assert caption.main(selected(world)) == 0
    tiny_selector.write(file, seed=2)
    for command in (selected(world), [str(out), "--runner", "local"]):  # by recipe, or what is there
        capsys.readouterr()
        assert caption.main(command) == 2
        err = capsys.readouterr().err
        assert f"judge:selector: model {file} holds other weights than those that the run's clips were" in err
        assert scores(out) == before
    assert f"clipmill caption {out} --remove judge:selector and give this command again" in err
    assert caption.main([str(out), "--remove", "judge:selector"]) == 0
    assert caption.main(selected(world)) == 0
    assert scores(out).keys() == before.keys()
    assert scores(out) != before


def test_a_run_does_not_go_on_with_other_weights_than_it_began_with(world, capsys):
    file = tiny_selector.write(world.folder / "selector.pt", seed=1)
    judged = ["--set", f"choose.judges=[{{kind: selector, model: {file}}}]"]
    local = ["--recipe", "smoke", "--runner", "local", *world.sets("old"), *judged]
    command = [str(world.folder / "raw"), "--out", str(world.folder / "run"), *local]
    assert curate.main(command) == 0
    tiny_selector.write(file, seed=2)
    assert curate.main(command) == 0  # nothing is left to be looked at
    shutil.copyfile(made(videos.multi_shot), world.folder / "raw/d.mp4")
    capsys.readouterr()
    assert curate.main(command) == 2
    assert "put back those of then, or give a captioner or judge by these a name of its own" in (
        capsys.readouterr().err
    )
    assert caption.main([str(world.folder / "run"), "--runner", "local"]) == 2
    tiny_selector.write(file, seed=1)
    assert curate.main(command) == 0


def test_of_a_folder_its_model_counts_and_not_what_lies_beside_it(tmp_path):
    section = YesJudge(kind="p_yes", model=str(tmp_path / "student"))
    assert weights.contents(section) == {}  # a hub knows the name
    assert weights.of_stages([SimpleNamespace(name="own", section="of somebody's own", recipe=3)]) == {}
    for name in ("config.json", "model.safetensors", "eval-captions/answers.jsonl", "page.html"):
        (tmp_path / "student" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "student" / name).write_text("1")
    first = weights.contents(section)
    assert first.keys() == {"model"}
    for name in ("eval-captions/answers.jsonl", "page.html"):
        (tmp_path / "student" / name).write_text("2")
        assert weights.contents(section) == first
    for name in ("config.json", "model.safetensors"):
        before = weights.contents(section)
        (tmp_path / "student" / name).write_text("2")
        assert weights.contents(section) != before


def test_of_large_files_blocks_are_compared_that_no_part_which_is_trained_fits_between(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    section = YesJudge(kind="p_yes", model=str(file))
    file.write_bytes(bytes(100_000))

    def noticed(at: int, size: int) -> bool:
        before = weights.contents(section)
        with file.open("r+b") as f:
            f.seek(at)
            f.write(b"x" * size)
        return weights.contents(section) != before

    assert noticed(70_001, 1)  # a small one is read whole
    monkeypatch.setattr(weights, "BLOCK", 100)
    monkeypatch.setattr(weights, "BLOCKS", 100)
    assert all(noticed(at, 1000) for at in (0, 5_050, 63_333, 98_990))


def test_a_server_that_is_not_there_leaves_no_layer_in_the_way(world, capsys):
    out = world.folder / "one"
    served = "captions=[{kind: served, name: new, model: m, url: 'http://127.0.0.1:9/v1'}]"
    assert caption.main([str(out), "--runner", "local", "--set", served]) != 0
    assert "nobody answers" in capsys.readouterr().err
    assert layers(Store(str(out))) == []
    assert caption.main([str(out), "--runner", "local"]) == 0
    assert "lacks" not in capsys.readouterr().out


def test_a_layer_that_a_kill_left_empty_may_be_made_otherwise(world):
    out = world.folder / "one"
    store = Store(str(out))
    served = {"kind": "served", "name": "new", "model": "m", "url": "http://127.0.0.1:9/v1"}
    create(store, Layer("caption:new", 1, served))  # killed here
    assert caption.main(world.caption("one", "new")) == 0
    made = {layer.name: layer.section["kind"] for layer in layers(store) if layer.captions}
    assert made == {"caption:new": "python"}
    assert all({c["model"] for c in r["captions"]} == {"old", "new"} for r in measured(out).values())


def test_judges_see_what_people_wrote_and_that_is_the_end_of_it(world, capsys):
    out = world.folder / "one"
    assert caption.main(world.caption("one", "new", judge=True)) == 0
    store = Store(str(out))
    number = max(layer.number for layer in layers(store)) + 1
    edited, (clip, row) = Layer("caption:edited", number), next(iter(measured(out).items()))
    create(store, edited)
    said = {"clip_id": clip, "caption": caption_row(Caption("edited", "A tram."))}
    write(store, edited, unit_of(next(f for f in clip_files(store) if clip in ids(store, f))), [said])

    def scores() -> dict[str, float]:
        return next(dict(c["scores"]) for c in measured(out)[clip]["captions"] if c["model"] == "edited")

    for _ in range(2):
        capsys.readouterr()
        assert caption.main([str(out), "--runner", "local"]) == 0
        assert scores()["brevity"] == pytest.approx(1 / len("A tram."))
        assert "said nothing" not in capsys.readouterr().err
    before = {m["model"]: dict(m["scores"]) for m in measured(out)[clip]["captions"]}
    unjudge(store, "edited")
    assert not scores()
    after = {m["model"]: dict(m["scores"]) for m in measured(out)[clip]["captions"]}
    assert {**after, "edited": None} == {**before, "edited": None}
    assert row["captions"][0]["text"]


def ids(store: Store, name: str) -> list[str]:
    return store.read_table(name, ["clip_id"])["clip_id"].to_pylist()


def test_layers_that_people_made_are_nothing_to_run(world):
    out = world.folder / "one"
    store = Store(str(out))
    create(store, Layer("caption:edited", 1))
    create(store, Layer("judge:human", 2))
    assert caption.main(world.caption("one", "new")) == 0
    assert caption.main([str(out), "--runner", "local"]) == 0
    assert curate_again(world, "one", "old") == 0


def test_clips_that_came_later_are_said_to_lack_a_layer_and_get_it_by_caption_alone(world, capsys):
    out = world.folder / "one"
    assert caption.main(world.caption("one", "new", judge=True)) == 0
    shutil.copyfile(made(videos.rotated, frames=36), world.folder / "raw/d.mp4")
    before = set(measured(out))
    capsys.readouterr()
    world.curate("one", "old")
    came = set(measured(out)) - before
    assert came
    said = capsys.readouterr().out
    assert f"layer caption:new lacks {len(came)} clip" in said
    assert f"add them: clipmill caption {out}" in said
    assert caption.main([str(out), "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed if f"lacks {len(came)} clip" in line] == ["caption:new"]
    world.calls()
    assert caption.main([str(out), "--runner", "local"]) == 0
    assert set(world.calls()) == {f"new {i}" for i in came}
    assert "lacks" not in capsys.readouterr().out
    world.curate("both", "old", "new", judge=True)
    assert measured(out) == measured(world.folder / "both")


def test_rows_of_clips_that_are_gone_leave_the_layers(world):
    out = world.folder / "one"
    assert caption.main(world.caption("one", "new")) == 0
    (world.folder / "raw/a.mp4").unlink()
    shutil.copyfile(made(videos.rotated, frames=36), world.folder / "raw/c.mp4")
    sets = world.sets("old")
    more = ["--recipe", "smoke", "--runner", "local", "--prune", "--redo-changed"]
    assert curate.main([str(world.folder / "raw"), "--out", str(out), *more, *sets]) == 0
    there = set(measured(out))
    for path in (out / "layers").rglob("*.parquet"):
        assert set(pq.read_table(path, columns=["clip_id"])["clip_id"].to_pylist()) <= there


def test_a_layer_removed_halfway_is_gone_and_what_it_left_is_not_taken_for_new(world):
    out = world.folder / "one"
    assert caption.main(world.caption("one", "new")) == 0
    (out / "layers/caption%3Anew/layer.json").unlink()  # killed here
    assert all(len(r["captions"]) == 1 for r in measured(out).values())
    world.calls()
    assert caption.main(world.caption("one", "new")) == 0
    assert {k.split()[0] for k in world.calls()} == {"new"}
    assert len(list((out / "layers/caption%3Anew").glob("*.parquet"))) > 0


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_sigterm_stops_it_with_a_sentence_and_the_same_command_goes_on(world, runner):
    if runner == "ray":
        pytest.importorskip("ray")
    out = world.folder / "one"
    command = world.caption("one", "old", "new", judge=True)
    command[command.index("local")] = runner
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.caption", *command],
        stdout=-1,
        stderr=-1,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while process.poll() is None and not world.log.exists() and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143, err
    assert err.rstrip().endswith("clipmill caption: stopped by SIGTERM; run the same command again to go on")
    assert "Traceback" not in err
    assert (out / "run.log").read_text().splitlines()[-1].endswith(" stopped by SIGTERM")
    assert caption.main(world.caption("one", "old", "new", judge=True)) == 0
    assert measured(out) == measured(world.folder / "both")


ODD = ["a/b c/d", "模型" * 40, "..", "x" * 300]


def test_on_an_object_store_and_under_odd_names_layers_are_as_on_disk(
    world, object_store, monkeypatch, capsys
):
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    far = object_store.bucket() + "/run"
    names = [f"'{name}'" for name in ODD]
    assert world.curate(far, "old") == 0
    for out in (far, "one"):
        assert caption.main(world.caption(out, *names, judge=True)) == 0
        assert caption.main([world.caption(out)[0], "--remove", f"caption:{ODD[0]}"]) == 0
    found = [Layered(Store(out)) for out in (far, str(world.folder / "one"))]
    assert [layer.name for layer in found[0].layers] == [layer.name for layer in found[1].layers]
    assert {layer.name for layer in found[0].layers} >= {f"caption:{name}" for name in ODD[1:]}
    captions = [
        {r["clip_id"]: r["captions"] for name in view.files for r in view.read(name).to_pylist()}
        for view in found
    ]
    assert captions[0] == captions[1]
    # what is left of the removed one is not taken for new
    assert caption.main(world.caption(far, *names[:1], judge=True)) == 0
    assert {layer.name for layer in layers(Store(far))} >= {f"caption:{name}" for name in ODD}


def test_two_commands_at_once_on_one_run_are_told_apart(world, capsys):
    with Store(str(world.folder / "one")).lock():
        assert caption.main(world.caption("one", "new")) == 4
        assert caption.main([str(world.folder / "one"), "--remove", "caption:new"]) == 4
        assert caption.main([str(world.folder / "one"), "--list"]) == 0
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("clipmill caption: ") == 2


def test_who_reads_while_a_layer_is_removed_gets_a_sentence(world, capsys):
    out = world.folder / "one"
    assert caption.main(world.caption("one", "new")) == 0
    clips = Layered(Store(str(out)))
    assert caption.main([str(out), "--remove", "caption:new"]) == 0
    with pytest.raises(StoreError, match="layer 'caption:new' was removed meanwhile; run it again"):
        list(clips.tables(["captions"]))
