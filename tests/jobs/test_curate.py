"""clipmill curate from end to end: every source accounted for, resumed, refused where it must be."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import curate, ending, shard
from tests.fixtures import videos
from tests.fixtures.videos import WEIRD_NAMES, made

FAST = ["--recipe", "smoke", "--runner", "local", "--set", "events.min_s=0.1", "--set", "events.max_inner=9"]
FAST += [
    "--set",
    "events.embedder.kind=none",
    "--set",
    "captions=[{kind: colour_motion}]",
    "--set",
    "decide.rules={}",
]
FAST += ["--set", "decide.duplicates.enabled=false"]


def rows(out: Path, folder: str) -> list[dict]:
    return [r for f in sorted((out / folder).glob("*.parquet")) for r in pq.read_table(f).to_pylist()]


AS_MP4 = """bframes vfr multi_shot rotated delayed_start non_square odd_size ten_bit one_frame one_pixel
zero_duration truncated corrupt failing_audio audio_only text empty"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """A folder with one of everything that real folders hold."""
    folder = tmp_path_factory.mktemp("raw")
    for name in AS_MP4.split():
        maker = getattr(videos, name)
        shutil.copyfile(made(maker), folder / f"{maker.__name__}.mp4")
    shutil.copyfile(made(videos.alpha, suffix=".mov"), folder / "alpha.mov")
    shutil.copyfile(made(videos.no_duration, suffix=".mkv"), folder / "no_duration.mkv")
    for name in WEIRD_NAMES:
        if name.endswith(".mp4"):
            shutil.copyfile(made(videos.cfr), folder / name)
    secret = folder / "secret.mp4"
    shutil.copyfile(made(videos.cfr), secret)
    videos.hls_playlist(folder / "hls.mp4", str(secret))
    videos.concat_playlist(folder / "concat.mp4", str(secret))
    return folder


@pytest.fixture(scope="module")
def run(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "run"
    assert curate.main([str(raw), "--out", str(out), *FAST]) == 0
    return out


UNUSABLE = {"audio_only.mp4", "text.mp4", "empty.mp4", "hls.mp4", "concat.mp4"}


def test_every_source_has_one_row_and_only_the_unusable_are_errors(raw, run):
    found = rows(run, "videos")
    assert sorted(r["name"] for r in found) == sorted(p.name for p in raw.iterdir())
    bad = {r["name"]: r for r in found if r["status"] == "error"}
    assert set(bad) == UNUSABLE
    for name, row in bad.items():
        assert name in row["error"]
        assert "\n" not in row["error"]
        assert (row["stage"], row["clips"]) == ("decode", 0)
    assert all("playlist" in bad[n]["error"] for n in ("hls.mp4", "concat.mp4"))


def test_every_clip_is_decided_and_every_kept_one_is_in_one_shard(run):
    clips, decisions = rows(run, "clips"), pq.read_table(run / "decisions.parquet").to_pylist()
    ids = [c["clip_id"] for c in clips]
    assert len(ids) == len(set(ids)) == sum(r["clips"] for r in rows(run, "videos"))
    assert sorted(ids) == sorted(d["clip_id"] for d in decisions)
    index = pq.read_table(run / "shards/index.parquet").to_pylist()
    assert sorted(i["clip_id"] for i in index) == sorted(d["clip_id"] for d in decisions if d["keep"])
    for d in decisions:
        with open(run / d["shard"], "rb") as f:
            f.seek(d["offset"])
            assert f.read(d["size"])[4:8] == b"ftyp"


def test_no_name_from_outside_reaches_a_path_or_a_shell(run, raw):
    written = {str(p.relative_to(run)) for p in run.rglob("*")}
    assert not any("pwned" in w or "日本" in w or "dash" in w for w in written)
    assert not (Path.cwd() / "pwned").exists()


def test_clips_have_the_frames_their_row_says(run):
    import av

    for clip in rows(run, "clips"):
        with open(run / clip["media_tar"], "rb") as f:
            f.seek(clip["media_offset"])
            data = f.read(clip["media_size"])
        with av.open(io.BytesIO(data)) as container:
            frames = list(container.decode(video=0))
        assert len(frames) == clip["end_frame"] - clip["start_frame"], clip["name"]
        assert (frames[0].width, frames[0].height) == (clip["width"], clip["height"])


def test_running_again_reads_no_source_and_changes_no_byte(raw, run, monkeypatch):
    before = {
        p: (p.stat().st_mtime_ns, p.stat().st_size)
        for p in run.rglob("*")
        if p.suffix in (".tar", ".parquet")
    }
    monkeypatch.setattr("pipeline.sources.fetch.localised", None)  # any read of a source would raise
    assert curate.main([str(raw), "--out", str(run), *FAST]) == 0
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in before}


def test_a_new_source_is_added_to_a_finished_run(raw, run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.copyfile(made(videos.cfr, frames=60), tmp_path / "new.mp4")
    assert curate.main([str(raw), str(tmp_path / "new.mp4"), "--out", str(out), *FAST]) == 0
    assert len(rows(out, "videos")) == len(rows(run, "videos")) + 1
    assert len(rows(out, "clips")) == len(rows(run, "clips")) + 1


def test_errors_are_tried_again_when_asked_for(tmp_path):
    source, target = tmp_path / "late.mp4", tmp_path / "not_yet_there"
    source.symlink_to(target)
    shutil.copyfile(made(videos.cfr), tmp_path / "good.mp4")
    out, arguments = tmp_path / "out", [str(tmp_path / "*.mp4"), "--out", str(tmp_path / "out"), *FAST]
    assert curate.main(arguments) == 0
    shutil.copyfile(made(videos.bframes), target)
    assert curate.main(arguments) == 0
    assert {r["name"]: r["status"] for r in rows(out, "videos")} == {"late.mp4": "error", "good.mp4": "ok"}
    assert curate.main([*arguments, "--retry-errors"]) == 0
    assert {r["name"]: r["status"] for r in rows(out, "videos")} == {"late.mp4": "ok", "good.mp4": "ok"}
    assert len(rows(out, "clips")) == 2


def test_a_failed_source_whose_bytes_changed_is_measured_again_unasked(tmp_path):
    source, out = tmp_path / "late.mp4", tmp_path / "out"
    source.write_bytes(b"not yet")
    arguments = [str(source), "--out", str(out), *FAST]
    assert curate.main(arguments) == 1
    shutil.copyfile(made(videos.bframes), source)
    assert curate.main(arguments) == 0
    assert [r["status"] for r in rows(out, "videos")] == ["ok"]


def test_moving_the_folder_keeps_ids_scores_and_bytes(run, raw, tmp_path):
    shutil.copytree(raw, tmp_path / "elsewhere")
    assert curate.main([str(tmp_path / "elsewhere"), "--out", str(tmp_path / "out"), *FAST]) == 0
    moved = {"source", "media_tar", "media_offset"}

    def measured(folder: Path) -> dict[str, dict]:
        return {c["clip_id"]: {k: v for k, v in c.items() if k not in moved} for c in rows(folder, "clips")}

    assert measured(run) == measured(tmp_path / "out")


def test_given_clips_are_cut_as_given_with_their_metadata(tmp_path):
    """Panda-70M's own CSV: those clips, no re-splitting."""
    video = tmp_path / "v.mp4"
    shutil.copyfile(made(videos.cfr, frames=100), video)
    spans = "\"[['0:00:00.400', '0:00:01.200'], ['0:00:02.000', '0:00:03.000']]\""
    (tmp_path / "panda.csv").write_text(
        f"videoID,url,timestamp,caption,matching_score\nv,{video},{spans},\"['a dog', 'a cat']\",\"[0.5, 0.4]\"\n"
    )
    assert curate.main([str(tmp_path / "panda.csv"), "--out", str(tmp_path / "out"), *FAST]) == 0
    clips = sorted(rows(tmp_path / "out", "clips"), key=lambda c: c["start_s"])
    assert [(c["start_frame"], c["end_frame"]) for c in clips] == [(10, 30), (50, 75)]
    assert [dict(c["meta"])["caption"] for c in clips] == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--set", "cut.crf=35"], "another recipe"),
        (["--set", "cut.crf=banana"], "cut.crf"),
        (["--recipe", "nonsense"], "nonsense"),
        (["--set", "decide.rules.x={column: score_nonsense}"], "score_nonsense"),
        (["--set", "cut.codec=nonsense"], "cut.codec nonsense"),
        (["--set", "captions=[{kind: transformers, model: ./nowhere}]"], "nowhere"),
        (["--set", "resources.nonsense.cpus=1"], "resources.nonsense"),
        (["--set", "choose.method=ordr"], "(did you mean 'order'?)"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_and_touches_nothing(raw, run, capsys, change, says):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}
    fresh = run.parent / "fresh"
    out = run if "another" in says else fresh
    assert curate.main([str(raw), "--out", str(out), *FAST, *change]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.strip().count("\n") == 0
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"} == before
    assert not (fresh / "videos").exists()


@pytest.mark.parametrize("source", ["missing.mp4", "empty_folder", "*.nothing"])
def test_a_source_argument_that_holds_no_video_is_one_sentence(tmp_path, capsys, source):
    (tmp_path / "empty_folder").mkdir()
    assert curate.main([str(tmp_path / source), "--out", str(tmp_path / "out"), *FAST]) == 2
    err = capsys.readouterr().err
    assert source in err
    assert err.strip().count("\n") == 0


def test_a_folder_that_is_no_run_is_not_written_to(raw, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert curate.main([str(raw), "--out", str(tmp_path), *FAST]) == 2
    assert "not empty" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} <= {"thesis.txt", ".lock"}


def test_on_ray_the_result_is_the_one_of_a_single_process(raw, run, tmp_path):
    """Same clips, scores, captions, decisions and shard bytes."""
    ray = [a if a != "local" else "ray" for a in FAST]
    command = [sys.executable, "-m", "jobs.curate", str(raw), "--out", str(tmp_path / "out"), *ray]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a, b = ({c["clip_id"]: c for c in rows(o, "clips")} for o in (run, tmp_path / "out"))
    assert a == b
    assert pq.read_table(run / "decisions.parquet").equals(pq.read_table(tmp_path / "out/decisions.parquet"))
    a, b = (
        {p.relative_to(o): p.read_bytes() for p in (o / "shards").rglob("*.tar")}
        for o in (run, tmp_path / "out")
    )
    assert a == b
    assert json.loads((tmp_path / "out/run.json").read_text())["finished"]


def test_deciding_again_equals_deciding_so_at_first(raw, run, tmp_path):
    rule = ["--set", "decide.rules.long={column: duration_s, min: 1.5}"]
    out, fresh = tmp_path / "again", tmp_path / "fresh"
    shutil.copytree(run, out)
    assert shard.main([str(out), *rule]) == 0
    assert curate.main([str(raw), "--out", str(fresh), *FAST, *rule]) == 0
    assert pq.read_table(out / "decisions.parquet").equals(pq.read_table(fresh / "decisions.parquet"))
    assert any(not d["keep"] for d in pq.read_table(out / "decisions.parquet").to_pylist())


# What a person and a script are told ----------------------------------------------------------------


def one_video(tmp_path, name: str = "a.mp4", maker=videos.cfr, **options) -> Path:
    (tmp_path / "raw").mkdir(exist_ok=True)
    shutil.copyfile(made(maker, **options), tmp_path / "raw" / name)
    return tmp_path / "raw"


def test_what_came_out_is_told_also_when_nothing_was_left_to_do(raw, run, capsys):
    capsys.readouterr()
    assert curate.main([str(raw), "--out", str(run), *FAST]) == 0
    said = capsys.readouterr().out
    decisions = pq.read_table(run / "decisions.parquet").to_pylist()
    assert f"kept {len(decisions)} of {len(decisions)} clips" in said
    assert f"sources: {len(list(raw.iterdir())) - len(UNUSABLE)} ok, {len(UNUSABLE)} errors" in said
    assert "2 × decode: it is a playlist" in said
    assert f"clipmill curate {raw} --out {run}" in said
    assert "--retry-errors" in said
    for place in ("shards", "report.html", "run.log"):
        assert f"{run}/{place}" in said
    outcome = json.loads((run / "run.json").read_text())["outcome"]
    assert outcome["kept"] == outcome["clips"] == len(decisions)
    assert outcome["sources"]["errors"] == {"source": len(UNUSABLE)}


def test_nothing_kept_is_exit_1_and_says_by_which_rule(tmp_path, capsys):
    raw = one_video(tmp_path)
    rule = ["--set", "decide.rules.long={column: duration_s, min: 1000}"]
    assert curate.main([str(raw), "--out", str(tmp_path / "out"), *FAST, *rule]) == 1
    said = capsys.readouterr().out
    assert "kept 0 of 1 clip " in said
    assert "dropped by, in order: long 1" in said


def test_sources_that_all_fail_are_exit_1_with_their_reason(tmp_path, capsys):
    raw = one_video(tmp_path, "a.mp4", videos.text)
    one_video(tmp_path, "b.mp4", videos.empty)
    command = [str(raw), "--out", str(tmp_path / "out"), *FAST]
    for _ in range(2):
        assert curate.main(command) == 1
        said = capsys.readouterr().out
        assert "kept nothing: no source gave a clip" in said
        assert "1 × decode: the file is empty" in said


def test_with_strict_a_failed_source_is_exit_3_and_the_rest_is_done(tmp_path):
    raw = one_video(tmp_path)
    one_video(tmp_path, "b.mp4", videos.empty)
    command = [str(raw), "--out", str(tmp_path / "out"), *FAST]
    assert curate.main([*command, "--strict"]) == 3
    assert curate.main(command) == 0
    assert len(rows(tmp_path / "out", "clips")) == 1


def test_an_output_that_cannot_be_written_is_exit_4(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert curate.main([str(one_video(tmp_path)), "--out", str(tmp_path / "file/out"), *FAST]) == 4
    assert capsys.readouterr().err.count("\n") == 1
    if Path("/proc/self").exists():
        assert curate.main([str(one_video(tmp_path)), "--out", "/proc/out", *FAST]) == 4
        assert "cannot write to /proc/out: no folder can be made there; choose" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workers", "-3"], "--workers -3: at least one"),
        (["--workers", "0"], "--workers 0: at least one"),
        (["--address", "nonsense"], "--address nonsense: no address"),
        (["--address", "http://x:80"], "--address http://x:80: no address"),
        (["--address", "x:port"], "--address x:port: no address"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_exit_2(raw, tmp_path, capsys, arguments, says):
    assert curate.main([str(raw), "--out", str(tmp_path / "out"), *FAST, *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def views(tmp_path, *numbers: str) -> str:
    """A list of one-second clips of one video, with how often each was seen."""
    one_video(tmp_path)
    rows = "".join(f"raw/a.mp4,{i * 0.4:.1f},{i * 0.4 + 0.4:.1f},{n}\n" for i, n in enumerate(numbers))
    (tmp_path / "list.csv").write_text(f"path,start,end,views\n{rows}")
    return str(tmp_path / "list.csv")


def test_a_rule_on_a_column_that_the_list_lacks_is_refused_before_work(tmp_path, capsys):
    listed, out = views(tmp_path, "10", "20"), tmp_path / "out"
    rule = ["--set", "decide.rules.popular={column: meta.vies, min: 15}"]
    assert curate.main([listed, "--out", str(out), *FAST, *rule]) == 2
    said = capsys.readouterr().err
    assert said.strip() == (
        "clipmill curate: decide.rules: no clip has the column 'meta.vies' (did you mean 'meta.views'?); "
        "the list's columns are meta.views"
    )
    assert {p.name for p in out.iterdir()} <= {".lock"}
    assert curate.main([str(tmp_path / "raw"), "--out", str(out), *FAST, *rule]) == 2  # no list at all
    assert "their list has no such columns" in capsys.readouterr().err
    right = [a.replace("vies", "views") for a in rule]
    assert curate.main([listed, "--out", str(out), *FAST, *right]) == 0
    assert "kept 1 of 2 clips" in capsys.readouterr().out
    # a later list without that column: the clips that are there have it
    one_video(tmp_path, "b.mp4", frames=60)
    assert curate.main([str(tmp_path / "raw/b.mp4"), "--out", str(out), *FAST, *right]) == 0
    assert "1 clip has no number in meta.views; it passes rule 'popular'" in capsys.readouterr().err


def test_a_bound_on_a_column_of_texts_is_refused_before_work(tmp_path, capsys):
    listed, out = views(tmp_path, "many", "few"), tmp_path / "out"
    rule = ["--set", "decide.rules.popular={column: meta.views, min: 15}"]
    assert curate.main([listed, "--out", str(out), *FAST, *rule]) == 2
    said = capsys.readouterr().err
    assert "decide.rules.popular: no value of 'meta.views' is a number (one is 'many')" in said
    assert said.count("\n") == 1
    assert {p.name for p in out.iterdir()} <= {".lock"}
    text = ["--set", "decide.rules.popular={column: meta.views, contains: many}"]
    assert curate.main([listed, "--out", str(out), *FAST, *text]) == 0


def test_values_that_are_no_numbers_are_told_at_the_end_and_by_shard(tmp_path, capsys):
    listed, out = views(tmp_path, "10", "20", "abc"), tmp_path / "out"
    rule = ["--set", "decide.rules.popular={column: meta.views, min: 15}"]
    says = "1 clip has no number in meta.views (e.g. 'abc'); it passes rule 'popular'"
    assert curate.main([listed, "--out", str(out), *FAST, *rule]) == 0
    told = capsys.readouterr()
    assert "kept 2 of 3 clips" in told.out
    assert told.err.count(says) == 1
    assert says in (out / "run.log").read_text()
    command = [sys.executable, "-m", "jobs.shard", str(out), "--dry-run"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr.strip() == says


def test_the_table_of_exit_codes_in_the_help_is_complete():
    from pipeline.run.outcome import Exit

    assert all(str(int(status)) in ending.STATUS for status in Exit)


def test_a_source_that_the_moment_failed_is_tried_again_by_the_same_command(tmp_path, monkeypatch, capsys):
    from pipeline.run import commit

    raw = one_video(tmp_path)
    command = [str(raw), "--out", str(tmp_path / "out"), *FAST]
    assert curate.main([str(raw), "--out", str(tmp_path / "out"), *FAST]) == 0
    (unit,) = (tmp_path / "out/videos").iterdir()
    table = pq.read_table(unit)
    for column, value in (
        ("status", "error"),
        ("error", "a.mp4: reset"),
        ("error_kind", "transient"),
        ("stage", "decode"),
    ):
        table = table.set_column(table.schema.get_field_index(column), table.schema.field(column), [[value]])
    pq.write_table(table, unit)
    assert commit.done_sources(commit.Store(str(tmp_path / "out")))
    assert curate.main(command) == 0
    assert "tried again: 1 source that the moment failed" in capsys.readouterr().err
    assert [r["status"] for r in rows(tmp_path / "out", "videos")] == ["ok"]


def test_thresholds_set_with_shard_survive_the_next_curate_and_are_told(tmp_path, capsys):
    raw, out = one_video(tmp_path), tmp_path / "out"
    assert curate.main([str(raw), "--out", str(out), *FAST]) == 0
    assert shard.main([str(out), "--set", "decide.rules.long={column: duration_s, min: 2.1}"]) == 0
    one_video(tmp_path, "b.mp4", frames=60)
    capsys.readouterr()
    assert curate.main([str(raw), "--out", str(out), *FAST]) == 0
    assert "decide.rules.long" in capsys.readouterr().err
    assert {d["source"][-5]: d["keep"] for d in pq.read_table(out / "decisions.parquet").to_pylist()} == {
        "a": False,
        "b": True,
    }
    assert curate.main([str(raw), "--out", str(out), *FAST, "--set", "decide.rules={}"]) == 0  # no new item
    assert not all(d["keep"] for d in pq.read_table(out / "decisions.parquet").to_pylist())
    assert (
        curate.main(
            [str(raw), "--out", str(out), *FAST, "--set", "decide.rules.long={column: duration_s, min: 1}"]
        )
        == 0
    )
    assert all(d["keep"] for d in pq.read_table(out / "decisions.parquet").to_pylist())


def test_the_log_names_every_failed_source_and_no_secret(tmp_path):
    raw = one_video(tmp_path, "a.mp4", videos.text)
    one_video(tmp_path, "b.mp4")
    out = tmp_path / "out"
    secret = "sftp://127.0.0.1/c.mp4?X-Amz-Signature=s3cr3t"  # no such kind of address: fails at once
    (tmp_path / "list.txt").write_text(f"{secret}\n")
    assert curate.main([str(raw), str(tmp_path / "list.txt"), "--out", str(out), *FAST]) == 0
    log = (out / "run.log").read_text()
    assert f"[{raw}/a.mp4] error (source) in decode: " in log
    assert "s3cr3t" not in log
    assert "s3cr3t" not in (out / "run.json").read_text()


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_sigterm_stops_like_ctrl_c_and_the_same_command_goes_on(tmp_path, runner):
    for n in range(4):
        raw = one_video(tmp_path, f"{n}.mp4", videos.cfr, frames=25 + n)
    out = tmp_path / "out"
    slow = f"captions=[{{kind: python, captioner: '{tmp_path}/slow.py:Slow'}}]"
    (tmp_path / "slow.py").write_text(
        "import os, time\nfrom pipeline.captions import Captioner\n"
        "class Slow(Captioner):\n    name = 'slow'\n"
        "    def caption(self, video, clip):\n"
        f"        if video.source.name == '3.mp4' and os.path.exists({str(tmp_path / 'slow')!r}): time.sleep(600)\n"
        "        return 'done'\n"
    )
    (tmp_path / "slow").touch()
    fast = [runner if a == "local" else a for a in FAST] + ["--set", slow, "--workers", "1"]
    command = [sys.executable, "-m", "jobs.curate", str(raw), "--out", str(out), *fast]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            if len(list((out / "videos").glob("*.parquet"))) == 3 or process.poll() is not None:
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert (out / "run.log").read_text().splitlines()[-1].endswith(" stopped by SIGTERM")
    assert "stopped by SIGTERM; run the same command again to go on" in err
    assert "Traceback" not in err
    before = {p: p.stat().st_mtime_ns for p in (out / "videos").glob("*.parquet")}
    assert len(before) == 3
    (tmp_path / "slow").unlink()
    local = ["local" if a == "ray" else a for a in fast]
    assert curate.main([str(raw), "--out", str(out), *local]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert len(rows(out, "clips")) == 4


def caught(pid: int, number: signal.Signals) -> bool:
    """Whether a process handles a signal by now."""
    status = Path(f"/proc/{pid}/status").read_text()  # a child of ours stays there until waited for
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


def has_child(pid: int, name: str) -> bool:
    try:
        return any(
            name in Path(f"/proc/{child}/cmdline").read_text()
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        )
    except (FileNotFoundError, ProcessLookupError):  # one ended while we read; the next look tells
        return False


MOMENTS = {
    "imports": lambda pid: caught(pid, signal.SIGTERM),
    "ray_begins": lambda pid: has_child(pid, "gcs_server"),
    "ray_has_its_own_handlers": lambda pid: caught(pid, signal.SIGTRAP),  # those of its C++ side
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_sigterm_while_it_starts_is_143_and_one_sentence(tmp_path, moment):
    raw = one_video(tmp_path)
    fast = ["ray" if a == "local" else a for a in FAST]
    command = [sys.executable, "-m", "jobs.curate", str(raw), "--out", str(tmp_path / "out"), *fast]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 90
        while process.poll() is None and not MOMENTS[moment](process.pid) and time.monotonic() < end:
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=90)[1]
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert err.splitlines() == ["clipmill curate: stopped by SIGTERM; run the same command again to go on"]


def test_sources_that_fail_before_they_are_read_count_as_errors_while_it_works(tmp_path, capsys):
    one_video(tmp_path, "b.mp4", videos.text)
    one_video(tmp_path)
    (tmp_path / "list.txt").write_text("raw/a.mp4\nraw/b.mp4\nraw/gone.mp4\nsftp://h/c.mp4\n")
    command = [str(tmp_path / "list.txt"), "--out", str(tmp_path / "out"), *FAST]
    assert curate.main(command) == 0
    said = capsys.readouterr()
    assert "4/4 sources, 1 clip, 3 errors" in said.err
    assert "sources: 1 ok, 3 errors\n" in said.out
    assert "try what failed again, once it is mended, and nothing else: " in said.out
    shutil.copyfile(made(videos.text), tmp_path / "raw/d.mp4")
    assert curate.main([str(tmp_path / "raw/d.mp4"), *command]) == 0
    assert "sources: 1 ok, 4 errors, 3 of them before this command\n" in capsys.readouterr().out
    assert curate.main([str(tmp_path / "raw/d.mp4"), *command]) == 0
    assert "sources: 1 ok, 4 errors, all before this command\n" in capsys.readouterr().out


def test_sources_that_give_no_clip_are_told_with_the_reason(tmp_path, capsys):
    for n in range(4):
        one_video(tmp_path, f"short {n}.mp4", frames=20 + n)
    raw = one_video(tmp_path, "long.mp4", frames=60)
    slow = ["--set", "events.min_s=2"]
    assert curate.main([str(raw), "--out", str(tmp_path / "out"), *FAST, *slow]) == 0
    said = capsys.readouterr().out
    assert "kept 1 of 1 clip" in said
    line = next(line for line in said.splitlines() if "no clip" in line)
    assert line.startswith("4 sources gave no clip (shorter than events.min_s 4): short ")
    assert (line.count("short "), line[-3:]) == (3, ", …")
    assert json.loads((tmp_path / "out/run.json").read_text())["outcome"]["without_clip"] == 4


def test_sigterm_that_is_not_heeded_in_time_ends_the_process_all_the_same():
    program = (
        "import time\nfrom jobs import curate, ending\nending.PATIENCE_S = 0.3\n"
        "def deaf(argv):\n"
        "    ending.signal.signal(ending.signal.SIGTERM, curate.ENDING.terminate)\n"
        "    print('here', flush=True)\n"
        "    while True:\n"
        "        try: time.sleep(60)\n"
        "        except BaseException: pass\n"
        "curate.curate = deaf\ncurate.main([])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    try:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert (process.returncode, err.count("stopped by SIGTERM")) == (143, 1)


def test_a_run_without_ray_says_what_it_is_at_and_how_workers_died(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.run.worker.BEAT_S", 0.2)
    monkeypatch.setattr("pipeline.run.progress.EVERY_S", 0.3)
    raw = one_video(tmp_path)
    (tmp_path / "harm.py").write_text(
        "import os, time\nfrom pipeline.captions import Captioner\n"
        "class Harm(Captioner):\n    name = 'harm'\n"
        "    def caption(self, video, clip):\n        time.sleep(1)\n        os._exit(7)\n"
    )
    harm = f"captions=[{{kind: python, captioner: '{tmp_path}/harm.py:Harm'}}]"
    curate.main([str(raw), "--out", str(tmp_path / "out"), *FAST, "--set", harm])
    err = capsys.readouterr().err
    assert "0/1 sources" in err
    assert " left" not in err.split("1/1 sources")[0]
    assert "1/1 sources, 0 clips, 1 error" in err  # that it was given up counts
    assert "still at a.mp4, caption:harm" in err
    assert "a worker died at a.mp4, caption:harm: its process ended with exit code 7" in err
    assert "a worker died at a.mp4, caption:harm (death 3 there)" in err
