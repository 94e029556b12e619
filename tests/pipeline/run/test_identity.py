"""Identity follows content: moved sources are known again, changes are told and acted on only when asked for."""

import hashlib
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import curate
from pipeline.record import Source
from pipeline.run import identity
from pipeline.sources.fetch import sha256_of
from tests.fixtures import videos
from tests.fixtures.videos import made

SETS = ["events.min_s=0.1", "events.embedder.kind=none", "captions=[{kind: given, column: title}]"]
SETS += ["decide.rules={}", "decide.need_caption=false", "decide.duplicates.enabled=false", "cut.height=null"]
FAST = ["--recipe", "smoke", "--runner", "local", *(a for s in SETS for a in ("--set", s))]


def rows(out: Path, folder: str) -> list[dict]:
    return [r for f in sorted((out / folder).glob("*.parquet")) for r in pq.read_table(f).to_pylist()]


def kept(out: Path) -> dict[str, dict]:
    return {d["clip_id"]: d for d in pq.read_table(out / "decisions.parquet").to_pylist() if d["keep"]}


class World:
    """Three sources of one list, curated once; `again` says what a run measured (by the units it wrote)."""

    def __init__(self, folder: Path):
        self.folder, self.out, self.list = folder, folder / "out", folder / "list.csv"
        (folder / "raw").mkdir()
        for name, frames in (("a", 50), ("b", 60), ("c", 70)):
            shutil.copyfile(made(videos.cfr, frames=frames), folder / f"raw/{name}.mp4")
        self.write({"a": "A", "b": "B", "c": "C"})
        assert self.curate() == 0

    def write(self, titles: dict[str, str]) -> None:
        lines = [f"raw/{name}.mp4,{title}\n" for name, title in titles.items()]
        self.list.write_text("path,title\n" + "".join(lines))

    def curate(self, *more: str, source: str | None = None) -> int:
        return curate.main([source or str(self.list), "--out", str(self.out), *FAST, *more])

    def measured(self) -> set[str]:
        """Staging tars: one is written for every unit that is measured."""
        return {p.name for p in (self.out / "media").iterdir()}


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("identity") / "world"
    folder.mkdir()
    World(folder)
    return folder


@pytest.fixture
def world(template, tmp_path, monkeypatch) -> World:
    """As the template, in the same place for the uris' sake."""
    aside = tmp_path / "aside"
    shutil.copytree(template, aside, copy_function=shutil.copy2)
    world = World.__new__(World)
    world.folder, world.out, world.list = template, template / "out", template / "list.csv"
    yield world
    shutil.rmtree(template)
    shutil.copytree(aside, template, copy_function=shutil.copy2)


def test_the_same_list_tells_nothing_and_hashes_nothing(world, capsys, monkeypatch):
    monkeypatch.setattr(identity, "sha256_of", None)  # any hash would raise
    assert world.curate() == 0
    assert capsys.readouterr().err == "3 of 3 sources are done already\n"


def test_a_renamed_source_is_not_measured_again_and_its_clips_keep_their_ids(world, capsys):
    before, ids = world.measured(), {c["clip_id"] for c in rows(world.out, "clips")}
    (world.folder / "raw/a.mp4").rename(world.folder / "raw/z.mp4")
    world.write({"z": "A", "b": "B", "c": "C"})
    assert world.curate() == 0
    err = capsys.readouterr().err
    assert "1 source moved or renamed, not measured again: " in err
    assert "3 of 3 sources are done already" in err
    assert "no longer in the list" not in err
    assert world.measured() == before
    uris = {str(world.folder / f"raw/{n}.mp4") for n in "zbc"}
    assert {v["source"] for v in rows(world.out, "videos")} == uris
    clips = rows(world.out, "clips")
    assert ({c["clip_id"] for c in clips}, {c["source"] for c in clips}) == (ids, uris)
    assert {d["source"] for d in kept(world.out).values()} == uris
    capsys.readouterr()
    assert world.curate() == 0
    assert capsys.readouterr().err == "3 of 3 sources are done already\n"


def test_a_moved_folder_is_known_again(world, tmp_path, capsys):
    shutil.copytree(world.folder / "raw", tmp_path / "elsewhere")
    shutil.rmtree(world.folder / "raw")
    assert world.curate(source=str(tmp_path / "elsewhere")) == 0
    assert "3 sources moved or renamed" in capsys.readouterr().err
    assert len(kept(world.out)) == len(rows(world.out, "clips")) == 3
    assert len(world.measured()) == 3


def test_a_move_that_was_killed_half_way_is_finished_by_the_next_run(world, monkeypatch):
    (world.folder / "raw/a.mp4").rename(world.folder / "raw/z.mp4")
    world.write({"z": "A", "b": "B", "c": "C"})
    from pipeline.io.store import Store

    write = Store.write_table

    def dies(self, name, table):
        if name.startswith("videos/"):
            raise KeyboardInterrupt
        write(self, name, table)

    with monkeypatch.context() as m:
        m.setattr(Store, "write_table", dies)
        assert world.curate() == 130
    assert world.curate() == 0
    assert len(kept(world.out)) == len(rows(world.out, "clips")) == len(world.measured()) == 3


def test_a_copy_that_comes_in_addition_is_measured_as_one(world):
    shutil.copyfile(world.folder / "raw/a.mp4", world.folder / "raw/copy.mp4")
    world.write({"a": "A", "b": "B", "c": "C", "copy": "D"})
    assert world.curate() == 0
    assert len(world.measured()) == 4
    assert len(rows(world.out, "clips")) == 4


def test_changed_bytes_are_told_and_measured_again_only_when_asked(world, capsys):
    shutil.copyfile(made(videos.cfr, frames=40), world.folder / "raw/a.mp4")
    old = {v["source"]: v["sha256"] for v in rows(world.out, "videos")}
    assert world.curate() == 0
    err = capsys.readouterr().err
    assert "1 source changed since measured" in err
    assert "--redo-changed" in err
    assert "raw/a.mp4" in err
    assert {v["source"]: v["sha256"] for v in rows(world.out, "videos")} == old
    assert world.curate("--redo-changed") == 0
    new = {v["source"]: v["sha256"] for v in rows(world.out, "videos")}
    assert [s for s in old if old[s] != new[s]] == [str(world.folder / "raw/a.mp4")]
    lengths = {c["source"][-5]: c["end_frame"] for c in rows(world.out, "clips")}
    assert lengths == {"a": 40, "b": 60, "c": 70}
    capsys.readouterr()
    assert world.curate() == 0
    assert capsys.readouterr().err == "3 of 3 sources are done already\n"


def test_a_file_of_the_same_size_is_told_by_its_hash_and_a_touched_one_is_hashed_once(
    world, capsys, monkeypatch
):
    path = world.folder / "raw/a.mp4"
    os.utime(path, ns=(1, 1))
    assert world.curate() == 0
    assert capsys.readouterr().err == "3 of 3 sources are done already\n"
    with monkeypatch.context() as m:
        m.setattr(identity, "sha256_of", None)
        assert world.curate() == 0
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert world.curate() == 0
    assert "1 source changed since measured" in capsys.readouterr().err


def test_edited_metadata_is_told_and_taken_over_without_measuring(world, capsys):
    world.write({"a": "another", "b": "B", "c": "C"})
    assert world.curate() == 0
    assert "1 source with other metadata in the list" in capsys.readouterr().err
    before = world.measured()
    captions = {c["clip_id"]: c["captions"] for c in rows(world.out, "clips")}
    assert world.curate("--refresh-metadata") == 0
    assert world.measured() == before
    for folder in ("videos", "clips"):
        assert sorted(dict(r["meta"])["title"] for r in rows(world.out, folder)) == ["B", "C", "another"]
    assert {c["clip_id"]: c["captions"] for c in rows(world.out, "clips")} == captions
    capsys.readouterr()
    assert world.curate() == 0
    assert capsys.readouterr().err == "3 of 3 sources are done already\n"


def test_a_source_gone_from_the_list_is_told_and_leaves_the_next_shards_when_pruned(world, capsys):
    world.write({"a": "A", "b": "B"})
    assert world.curate() == 0
    assert "1 source no longer in the list, the clips stay" in capsys.readouterr().err
    assert len(kept(world.out)) == 3
    assert world.curate("--prune") == 0
    assert "1 source no longer in the list, pruned" in capsys.readouterr().err
    assert len(rows(world.out, "videos")) == len(rows(world.out, "clips")) == len(kept(world.out)) == 2
    index = pq.read_table(world.out / "shards/index.parquet").to_pylist()
    assert {i["clip_id"] for i in index} == set(kept(world.out))
    assert len(world.measured()) == 2


def test_a_name_that_another_file_has_taken_is_new_and_the_old_content_moved(world, capsys):
    raw = world.folder / "raw"
    (raw / "a.mp4").rename(raw / "z.mp4")
    shutil.copyfile(made(videos.cfr, frames=40), raw / "a.mp4")
    world.write({"a": "A", "z": "A", "b": "B", "c": "C"})
    assert world.curate() == 0
    err = capsys.readouterr().err
    assert "1 source moved or renamed" in err
    assert "changed" not in err
    lengths = {c["source"][-5]: c["end_frame"] for c in rows(world.out, "clips")}
    assert lengths == {"a": 40, "b": 60, "c": 70, "z": 50}


def test_pruning_one_source_of_a_unit_leaves_the_others(tmp_path):
    from pipeline.io.store import Store
    from pipeline.run import commit
    from tests.fixtures.run_folder import make_run_folder

    make_run_folder(tmp_path / "run")
    store = Store(str(tmp_path / "run"))
    known = commit.known_sources(store)
    gone = sorted(known)[0]
    before = {c["clip_id"] for c in rows(tmp_path / "run", "clips") if c["source"] != gone}
    commit.drop(store, [gone], known)
    assert commit.done_sources(store) == known.keys() - {gone}
    assert {c["clip_id"] for c in rows(tmp_path / "run", "clips")} == before


def test_metadata_of_given_clips_is_compared_and_taken_over_clip_by_clip(world, tmp_path, capsys):
    def panda(second: str) -> None:
        spans = "\"[['0:00:00.400', '0:00:01.200'], ['0:00:02.000', '0:00:02.300']]\""
        (tmp_path / "panda.csv").write_text(
            "videoID,url,timestamp,caption,matching_score\n"
            f"v,{world.folder / 'raw/c.mp4'},{spans},\"['a dog', '{second}']\",\"[0.5, 0.4]\"\n"
        )

    command = [str(tmp_path / "panda.csv"), "--out", str(tmp_path / "out"), *FAST]
    panda("a cat")
    assert curate.main(command) == 0
    panda("an otter")
    assert curate.main([*command, "--refresh-metadata"]) == 0
    assert "1 source with other metadata in the list, taken over" in capsys.readouterr().err
    clips = sorted(rows(tmp_path / "out", "clips"), key=lambda c: c["start_s"])
    assert [dict(c["meta"])["caption"] for c in clips] == ["a dog", "an otter"]
    capsys.readouterr()
    assert curate.main(command) == 0
    assert capsys.readouterr().err == "1 of 1 sources are done already\n"


def test_metadata_of_given_clips_is_taken_over_where_some_are_beyond_the_video(world, tmp_path, capsys):
    spans = [
        (0.4, 1.2),
        (0.395, 1.2),
        (99, 100),
        (1.0, 2.0),
        (2.2, 50),
        (0.4, 2.0),
    ]  # the second is the first
    out, c = tmp_path / "out", world.folder / "raw/c.mp4"

    def write(word: str) -> list[str]:
        lines = [f"{c},{a},{b},{word} {i}\n" for i, (a, b) in enumerate(spans)]
        (tmp_path / "clips.csv").write_text("path,start,end,title\n" + "".join(lines))
        return [str(tmp_path / "clips.csv"), "--out", str(out), *FAST]

    def titles() -> dict[str, str]:
        return {r["clip_id"]: dict(r["meta"])["title"] for r in rows(out, "clips")}

    assert curate.main(write("old")) == 0
    old = titles()
    assert sorted(old.values()) == ["old 0", "old 3", "old 4", "old 5"]
    capsys.readouterr()
    assert curate.main([*write("new"), "--refresh-metadata"]) == 0
    assert "taken over" in capsys.readouterr().err
    assert titles() == {i: t.replace("old", "new") for i, t in old.items()}
    assert curate.main(write("new")) == 0
    assert capsys.readouterr().err == "1 of 1 sources are done already\n"


def test_given_clips_that_no_interval_became_keep_their_metadata_and_are_told_again(world, tmp_path, capsys):
    out, c = tmp_path / "out", world.folder / "raw/c.mp4"

    def write(word: str) -> list[str]:
        lines = f"{c},0.4,1.2,{word} 0\n{c},2.0,2.3,{word} 1\n"
        (tmp_path / "clips.csv").write_text("path,start,end,title\n" + lines)
        return [str(tmp_path / "clips.csv"), "--out", str(out), *FAST]

    assert curate.main(write("old")) == 0
    (path,) = (out / "clips").iterdir()
    table = pq.read_table(path)
    at = table.schema.get_field_index("start_s")
    odd = [0.1 if s < 1 else s for s in table["start_s"].to_pylist()]
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(odd)), path)
    for _ in range(2):
        capsys.readouterr()
        assert curate.main([*write("new"), "--refresh-metadata"]) == 0
        err = capsys.readouterr().err
        assert "1 source with other metadata in the list" in err
        assert "1 clip not told apart by the times of the given clips" in err
        assert sorted(dict(r["meta"])["title"] for r in rows(out, "clips")) == ["new 1", "old 0"]


def test_content_that_comes_back_under_a_name_that_it_left_gets_ids_of_its_own(world, capsys):
    raw = world.folder / "raw"
    first = {c["clip_id"] for c in rows(world.out, "clips")}
    (raw / "a.mp4").rename(raw / "z.mp4")
    world.write({"z": "A", "b": "B", "c": "C"})
    assert world.curate() == 0
    shutil.copyfile(raw / "z.mp4", raw / "a.mp4")
    world.write({"z": "A", "a": "A", "b": "B", "c": "C"})
    assert world.curate() == 0
    second = {c["clip_id"] for c in rows(world.out, "clips")}
    assert first < second
    assert len(second) == len(rows(world.out, "clips")) == len(kept(world.out)) == 4
    (raw / "a.mp4").rename(raw / "y.mp4")  # and once more
    world.write({"z": "A", "y": "A", "b": "B", "c": "C"})
    assert world.curate() == 0
    shutil.copyfile(raw / "z.mp4", raw / "a.mp4")
    world.write({"z": "A", "y": "A", "a": "A", "b": "B", "c": "C"})
    assert world.curate() == 0
    third = {c["clip_id"] for c in rows(world.out, "clips")}
    assert second < third
    assert len(third) == len(rows(world.out, "clips")) == len(kept(world.out)) == 5
    assert "left out" not in capsys.readouterr().err


def test_a_member_of_a_tar_is_hashed_in_place(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"....hello....")
    source = Source(f"{tmp_path}/x.tar#m.mp4", "m", member=(4, 5))
    assert sha256_of(source) == hashlib.sha256(b"hello").hexdigest()
    assert sha256_of(Source(f"{tmp_path}/x.tar#m.mp4", "m", member=(10, 5))) is None
    assert sha256_of(Source("http://example.com/a.mp4", "a")) is None
    assert identity.dated([source])[0].bytes == 5


def test_hashing_never_waits_for_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    assert sha256_of(Source(f"{tmp_path}/a.mp4", "a")) is None


def test_a_failed_source_of_other_bytes_is_measured_again_by_itself(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    shutil.copyfile(made(videos.cfr, frames=50), tmp_path / "raw/a.mp4")
    (tmp_path / "raw/b.mp4").write_bytes(b"no video" * 100)
    command = [str(tmp_path / "raw"), "--out", str(tmp_path / "out"), *FAST]
    assert curate.main(command) == 0
    shutil.copyfile(made(videos.cfr, frames=60), tmp_path / "raw/b.mp4")
    capsys.readouterr()
    assert curate.main(command) == 0
    said = capsys.readouterr()
    assert "1 source that failed changed since, measured again: b.mp4\n" in said.err
    assert "--redo-changed" not in said.err
    assert "sources: 2 ok, 0 errors\n" in said.out
    assert len(kept(tmp_path / "out")) == 2


def test_curate_ends_before_any_work_where_media_is_gone(world, capsys):
    shutil.rmtree(world.out / "media")
    before = {p: p.read_bytes() for p in (world.out / "videos").iterdir()}
    shutil.copyfile(made(videos.cfr, frames=80), world.folder / "raw/d.mp4")
    world.write({"a": "A", "b": "B", "c": "C", "d": "D"})
    for more in ([], ["--retry-errors"]):
        assert world.curate(*more) == 4
        assert "its shards are final" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (world.out / "videos").iterdir()} == before
    assert not (world.out / "media").exists()
