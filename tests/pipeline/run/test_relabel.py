"""Captions of a finished run: what failed is done again, from the clips alone, and nothing else is."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import curate
from tests.fixtures import videos
from tests.fixtures.videos import made

STILLS = ["sample_pts", "stills_offset", "stills_sizes", "stills_sha256"]


def rows(out: Path, folder: str) -> list[dict]:
    return [r for f in sorted((out / folder).glob("*.parquet")) for r in pq.read_table(f).to_pylist()]


def failures(out: Path) -> dict[str, set[str]]:
    """Ids of the clips on which captioners failed."""
    found: dict[str, set[str]] = {}
    for row in rows(out, "clips"):
        for caption in row["captions"]:
            if caption["outcome"] == "error":
                found.setdefault(caption["model"], set()).add(row["clip_id"])
    return found


class World:
    """A folder of raw videos, a captioner of two that can be broken, and runs of it."""

    def __init__(self, folder: Path):
        self.folder, self.broken, self.log = folder, folder / "broken", folder / "log"
        (folder / "raw").mkdir()
        shutil.copyfile(made(videos.multi_shot), folder / "raw/a.mp4")
        shutil.copyfile(made(videos.delayed_start, frames=60), folder / "raw/b.mp4")
        shutil.copyfile(made(videos.rotated, frames=30), folder / "raw/c.mp4")
        shutil.copyfile(made(videos.non_square), folder / "raw/d.mp4")
        (folder / "list.csv").write_text(
            "path,title\n" + "".join(f"raw/{n}.mp4,Title of {n}\n" for n in "abcd")
        )

    def command(self, out: str, *more: str, runner: str = "local") -> list[str]:
        sees = f"{{log: {self.log}, broken: {self.broken}, keep: {self.folder}/keep, name: sees}}"
        other = f"{{log: {self.log}, name: other}}"
        where = "captioner: 'tests.fixtures.seeing:Sees'"
        captions = (
            f"[{{kind: python, {where}, options: {other}}}, {{kind: python, {where}, options: {sees}}}]"
        )
        sets = [f"captions={captions}", "events.min_s=0.1", "events.embedder.kind=none", "decide.rules={}"]
        sets += ["decide.duplicates.enabled=false", "decode.sample_fps=4", "cut.crf=10", "cut.height=null"]
        command = [str(self.folder / "list.csv"), "--recipe", "smoke", "--runner", runner, *more]
        return [*command, "--out", str(self.folder / out), *(a for s in sets for a in ("--set", s))]

    def curate(self, out: str, *more: str) -> int:
        return curate.main(self.command(out, *more))

    def calls(self) -> Counter[str]:
        """How often each captioner was asked for each clip since the last time."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return Counter(text.splitlines())


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    world = World(tmp_path_factory.mktemp("relabel"))
    world.broken.touch()
    assert world.curate("broken_run") == 0
    world.first_calls = world.calls()
    world.broken.unlink()
    (world.folder / "keep").mkdir()
    assert world.curate("whole_run") == 0
    (world.folder / "keep").rename(world.folder / "shown")
    world.calls()
    return world


def copy_of(world: World, name: str) -> Path:
    return Path(shutil.copytree(world.folder / "broken_run", world.folder / name))


def test_retrying_asks_the_failed_captioner_of_the_failed_clips_only_and_equals_an_undisturbed_run(
    world, capsys
):
    out = copy_of(world, "retried")
    failed = {c["clip_id"] for c in rows(out, "clips") if any(k["outcome"] == "error" for k in c["captions"])}
    before = {c["clip_id"]: c for c in rows(out, "clips")}
    assert 0 < len(failed) < len(before)
    sources = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (world.folder / "raw").iterdir()}
    for p in sources:
        p.write_bytes(b"no video any more")  # no source is read
    (world.folder / "keep").mkdir()
    try:
        assert world.curate("retried", "--retry-errors") == 0
    finally:
        for p, (data, mtime_ns) in sources.items():
            p.write_bytes(data)
            os.utime(p, ns=(mtime_ns, mtime_ns))
    assert world.calls() == Counter({f"sees {clip}": 1 for clip in failed})
    whole, after = (
        {c["clip_id"]: c for c in rows(world.folder / n, "clips")} for n in ("whole_run", "retried")
    )
    assert after == whole
    a, b = (pq.read_table(world.folder / n / "decisions.parquet") for n in ("whole_run", "retried"))
    assert a.equals(b)
    for clip in set(before) - failed:
        assert after[clip] == before[clip]
    for clip in failed:  # the same pictures, but for one encoding
        a, b = (np.load(world.folder / n / f"{clip}.npy").astype(float) for n in ("shown", "keep"))
        assert a.shape == b.shape
        assert np.abs(a - b).mean() < 4
        assert np.abs(a.mean((1, 2)) - b.mean((1, 2))).max() < 1.5  # colours are not shifted
    said = capsys.readouterr()
    assert f"tried again, from the clips: caption:sees on {len(failed)} clips" in said.err
    assert "failed" not in said.out
    assert not any(w.startswith("caption:") for v in rows(out, "videos") for w in v["warnings"])


def test_nothing_left_to_retry_calls_nobody_and_rewrites_nothing(world):
    out = world.folder / "whole_run"
    before = {p: p.stat().st_mtime_ns for folder in ("clips", "videos") for p in (out / folder).iterdir()}
    assert world.curate("whole_run", "--retry-errors") == 0
    assert world.calls() == Counter()
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_clips_that_fail_again_stay_errors_and_keep_their_reason(world, capsys):
    out = copy_of(world, "again")
    world.broken.touch()
    try:
        assert world.curate("again", "--retry-errors", "--strict") == 3
    finally:
        world.broken.unlink()
    world.calls()
    assert {c["clip_id"]: c for c in rows(out, "clips")} == {
        c["clip_id"]: c for c in rows(world.folder / "broken_run", "clips")
    }
    a, b = (
        {v["source"]: sorted(v["warnings"]) for v in rows(o, "videos")}
        for o in (out, world.folder / "broken_run")
    )
    assert a == b
    assert "cannot do" in capsys.readouterr().out


def test_a_clip_whose_bytes_are_others_is_not_captioned(world):
    out = copy_of(world, "damaged")
    wanted = failures(out)
    clip = next(c for c in rows(out, "clips") if c["clip_id"] in wanted["sees"])
    with open(out / clip["media_tar"], "r+b") as f:
        f.seek(clip["stills_offset"] + sum(clip["stills_sizes"]) // 2)
        f.write(b"\0" * 64)
    assert world.curate("damaged", "--retry-errors") == 4
    assert "sees" not in {k.split()[0] for k in world.calls()}


def test_frames_shown_are_kept_with_the_clip(world):
    for clip in rows(world.folder / "whole_run", "clips"):
        inside = clip["sample_frames"]
        assert inside == sorted(set(inside))
        assert all(clip["start_frame"] <= n < clip["end_frame"] for n in inside)
        (told,) = {k["text"].split("]")[0] + "]" for k in clip["captions"]}
        assert told == str(inside)


def test_where_an_older_clipmill_did_not_note_the_frames_shown_the_recipes_are_shown(world):
    out = copy_of(world, "older")
    noted = {c["clip_id"]: c["sample_frames"] for c in rows(world.folder / "whole_run", "clips")}
    for path in (out / "clips").iterdir():
        pq.write_table(pq.read_table(path).drop_columns(["sample_frames", *STILLS]), path)
    failed = failures(out)["sees"]
    assert world.curate("older", "--retry-errors") == 0
    assert world.calls() == Counter({f"sees {clip}": 1 for clip in failed})
    assert not failures(out)
    for clip in rows(out, "clips"):
        if clip["clip_id"] in failed:
            (text,) = (k["text"] for k in clip["captions"] if k["model"] == "sees")
            shown = json.loads(text.split("]")[0] + "]")
            assert shown, "a caption of no picture"
            assert all(clip["start_frame"] <= n < clip["end_frame"] for n in shown)
            assert abs(len(shown) - len(noted[clip["clip_id"]])) <= 1
            if clip["start_frame"] == 0:
                assert shown == noted[clip["clip_id"]]


def test_a_clip_that_cannot_be_decoded_again_keeps_its_error_and_is_told(world, capsys):
    out = copy_of(world, "undecodable")
    wanted = failures(out)
    for path in (out / "clips").iterdir():
        table = pq.read_table(path).drop_columns(STILLS)
        frames = [[n + 1000 for n in f] for f in table["sample_frames"].to_pylist()]
        at = table.schema.get_field_index("sample_frames")
        pq.write_table(
            table.set_column(at, table.schema.field(at), pa.array(frames, table.schema.types[at])), path
        )
    assert world.curate("undecodable", "--retry-errors") == 0
    world.calls()
    assert failures(out) == wanted
    assert "its captions stay as they are" in capsys.readouterr().err


def test_on_ray_captions_are_tried_again_as_in_this_process(world):
    pytest.importorskip("ray")
    out = copy_of(world, "on_ray")
    command = world.command("on_ray", "--retry-errors", "--workers", "1", runner="ray")
    done = subprocess.run([sys.executable, "-m", "jobs.curate", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(world.calls().values()) == {1}
    whole = {c["clip_id"]: c for c in rows(world.folder / "whole_run", "clips")}
    assert {c["clip_id"]: c for c in rows(out, "clips")} == whole
