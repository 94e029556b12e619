"""clipmill shard: decide again, try a decision out, keep another set of shards beside the first."""

import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import report, shard
from pipeline.io.store import Store
from pipeline.shards.pack import read_run
from tests.fixtures.run_folder import make_sharded_run

STRICT = ["--set", "decide.rules.short={column: duration_s, max: 3}"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("packed") / "run"
    make_sharded_run(root)
    return root


@pytest.fixture
def run(packed, tmp_path) -> Path:
    shutil.copytree(packed, tmp_path / "run")
    return tmp_path / "run"


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in (".lock", "run.log")
    }


def decisions(folder: Path) -> list[dict]:
    return pq.read_table(folder / "decisions.parquet").to_pylist()


def test_whose_captions_are_chosen_is_told_and_how_many_would_change(run, capsys):
    before = {d["clip_id"]: d for d in decisions(run) if d["keep"]}
    rows = [r for t in (run / "clips").glob("*.parquet") for r in pq.read_table(t).to_pylist()]
    other = max(c["model"] for r in rows for c in r["captions"])
    choose = ("--set", f"choose={{method: order, order: ['{other}']}}")
    assert shard.main([str(run), "--dry-run", *choose]) == 0
    said = capsys.readouterr().out
    assert shard.main([str(run), *choose]) == 0
    after = {d["clip_id"]: d for d in decisions(run) if d["keep"]}
    whose = Counter(d["caption_model"] for d in after.values())
    changed = sum(before[c]["caption"] != after[c]["caption"] for c in before.keys() & after.keys())
    assert changed
    assert f"{changed} have another caption)" in said
    assert f"captions by: {', '.join(f'{m} {n}' for m, n in whose.most_common())}" in said


def refused(capsys, *command: str) -> str:
    assert shard.main(list(command)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_dry_run_tells_the_funnel_and_writes_nothing(run, capsys):
    before, lock = files(run), (run / ".lock").read_bytes()
    assert shard.main([str(run), "--dry-run", *STRICT]) == 0
    said = capsys.readouterr().out
    assert files(run) == before
    assert (run / ".lock").read_bytes() == lock
    now = {d["clip_id"] for d in decisions(run) if d["keep"]}
    assert shard.main([str(run), *STRICT]) == 0
    then = {d["clip_id"] for d in decisions(run) if d["keep"]}
    go, come = len(now - then), len(then - now)
    assert (
        f"{len(then)} clips would be kept ({len(now)} are now; {go} would go, {come} come, 0 have another"
        in said
    )
    assert said.splitlines()[:-1] == capsys.readouterr().out.splitlines()[:-2]


def test_another_set_of_shards_lies_beside_the_first_which_stays(run, tmp_path, capsys):
    before, out = files(run), tmp_path / "strict"
    assert shard.main([str(run), "--out", str(out), *STRICT]) == 0
    assert files(run) == before
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    assert shard.main([str(alone), *STRICT]) == 0
    assert decisions(out) == decisions(alone) != decisions(run)
    shards = {n: b for n, b in files(alone).items() if n.startswith("shards/")}
    assert {n: b for n, b in files(out).items() if n.startswith("shards/")} == shards
    assert "short" in read_run(Store(str(out)))["recipe"]["decide"]["rules"]
    again = files(out)
    assert shard.main([str(run), "--out", str(out), *STRICT]) == 0
    assert files(out) == again
    capsys.readouterr()
    assert report.main([str(out)]) == 0  # the pictures come from the run
    page = (out / "report.html").read_text()
    assert "data:image/jpeg" in page
    assert f"clipmill shard {run}" in page


def test_a_set_of_shards_is_no_run_to_be_decided_again_or_measured_into(run, tmp_path, capsys):
    out = tmp_path / "strict"
    assert shard.main([str(run), "--out", str(out)]) == 0
    capsys.readouterr()
    assert f"clipmill shard {run} --out {out}" in refused(capsys, str(out))
    assert "holds a run" in refused(capsys, str(run), "--out", str(run))
    assert "inside what the run keeps" in refused(capsys, str(run), "--out", str(run / "shards/x"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/a.txt").write_text("mine")
    assert "not empty" in refused(capsys, str(run), "--out", str(tmp_path / "thesis"))
    assert {p.name for p in (tmp_path / "thesis").iterdir()} <= {"a.txt", ".lock"}


def test_a_rule_is_switched_off_and_who_is_preferred_changed_without_a_model(run, capsys):
    off = ["--set", "decide.rules.still=null", "--set", "decide.rules.too_much_text=null"]
    order = ["--set", "choose={method: order, order: [on-screen-text-baseline]}"]
    assert shard.main([str(run), *off, *order]) == 0
    assert {"still", "too_much_text"}.isdisjoint(r for d in decisions(run) for r in d["dropped_by"])
    assert {d["caption_model"] for d in decisions(run) if d["caption"]} == {"on-screen-text-baseline"}
    saved = read_run(Store(str(run)))["recipe"]
    assert (saved["choose"]["method"], list(saved["decide"]["rules"])) == ("order", ["too_short"])
    assert shard.main([str(run)]) == 0  # what was set stays
    assert {d["caption_model"] for d in decisions(run) if d["caption"]} == {"on-screen-text-baseline"}
    assert shard.main([str(run), "--set", "choose.method=consensus"]) == 0
    assert len({d["caption_model"] for d in decisions(run) if d["caption"]}) > 1


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("cut.crf=1", "--set cut.crf: only decide.*"),
        ("choose.judges=[]", "--set choose.judges: only decide.*"),
        ("choose={method: order, order: [a], judges: []}", "only decide.*"),
        ("choose.method=clip_score", "no caption has the score 'clip_score'"),
        ("choose={method: order, order: [tags-basline]}", "did you mean 'tags-baseline'"),
        ("decide.rules.stil=null", "(did you mean 'still'?)"),
        ("decide.rules.x={column: caption, matches: '['}", "not a regular expression"),
    ],
)
def test_what_cannot_be_decided_later_is_one_sentence_and_changes_nothing(run, capsys, item, says):
    before = files(run)
    assert says in refused(capsys, str(run), "--set", item)
    assert files(run) == before


def test_where_media_is_gone_nothing_is_decided_and_nothing_half_made_is_left(run, tmp_path, capsys):
    shutil.rmtree(run / "media")
    before, out = files(run), tmp_path / "strict"
    for more in ([], ["--dry-run"], ["--out", str(out)]):
        assert shard.main([str(run), *STRICT, *more]) == 4
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{run}: media/ of it is gone: its shards are final" in said
    assert files(run) == before
    assert not out.exists()


def test_a_part_of_a_rule_that_the_run_lacks_is_told_with_the_whole_rule(run, capsys):
    item = "decide.rules.too_shrt.min=4"
    said = refused(capsys, str(run), "--set", item)
    assert "this run has no rule too_shrt (did you mean 'too_short'?) (its rules: too_short, " in said
    assert "--set 'decide.rules.too_shrt={column: duration_s, min: 4}'" in said
    whole = "decide.rules.too_shrt={column: duration_s, min: 4}"
    assert shard.main([str(run), "--dry-run", "--set", whole]) == 0


def test_the_log_says_what_was_packed_and_by_which_command(run, tmp_path, capsys):
    command = [str(run), "--set", "decide.rules.one={column: name, contains: 'video 0'}"]
    assert shard.main(command) == 0
    packed = f"{sum(d['keep'] for d in decisions(run))} clips in {len(list(run.glob('shards/*/*.tar')))} tars"
    assert f"{packed}: {run}/shards" in capsys.readouterr().out
    first, line = (run / "run.log").read_text().splitlines()  # the fixture's own, and this
    assert f"clipmill shard {run} " not in first
    assert line.endswith(f": {packed} of 16 measured")
    assert f"clipmill shard {run} --set 'decide.rules.one=" in line
    only = f"decide.rules.one={{column: clip_id, matches: {next(d for d in decisions(run) if d['keep'])['clip_id']}}}"
    assert shard.main([str(run), "--out", str(tmp_path / "one"), "--set", only]) == 0
    assert f"1 clip in 1 tar: {tmp_path}/one/shards" in capsys.readouterr().out
    assert (tmp_path / "one/run.log").read_text().endswith(": 1 clip in 1 tar of 16 measured\n")
    assert shard.main([str(run), "--dry-run"]) == 0
    assert len((run / "run.log").read_text().splitlines()) == 2


def test_a_wrong_setting_is_blamed_and_no_file(run, capsys):
    said = refused(capsys, f"{run}/", "--set", "shards.max_clips=few")
    assert said.startswith("clipmill shard: --set shards.max_clips=few: input should be a valid integer")
