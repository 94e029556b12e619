"""Long sources in chunks: the same clips, scores, captions and bytes, committed one by one, one source in the end."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest

from pipeline.faults import SourceFault
from pipeline.graph import build
from pipeline.io.store import Store
from pipeline.recipe import parse
from pipeline.record import Clip, Frames, Sample, Source, Video
from pipeline.run import chunks, commit
from pipeline.run.child import Worker
from pipeline.run.chunks import divided, parted
from pipeline.run.progress import Ledger
from pipeline.run.worker import StageProcess
from pipeline.run.worker import Worker as Outside
from pipeline.stages import produced
from tests.fixtures import videos as make

SHOTS = (60, 75, 50, 90, 55, 65, 80, 70, 60, 75)  # frames at 25 a second, of ten scenes: 27 s


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("footage")
    return {
        "long": make.multi_shot(folder / "long.mp4", SHOTS),
        "short": make.multi_shot(folder / "short.mp4", (60, 55)),
        "broken": make.text(folder / "broken.mp4"),
    }


def unit(footage, *names: str) -> list[Video]:
    return [Video(Source(str(footage[n]), f"{n}.mp4", {"caption": "given"}), "unit") for n in names]


def stages_of(out: Path, chunk_s: float) -> list:
    recipe = parse(
        {
            "name": "test",
            "shots": {"detector": "content", "content_threshold": 20},
            "events": {"min_s": 1, "max_outer": 0.1},
            "cut": {"preset": "ultrafast"},
            "scores": {"text": {"enabled": False}},
            "captions": [{"kind": "colour_motion"}, {"kind": "given"}],
            "limits": {"chunk_s": chunk_s},
        },
        [],
        "test",
    )
    stages = build(recipe, str(out))
    return [*stages, commit.CommitStage(str(out), produced(stages))]


def measured(out: Path) -> tuple[dict, dict]:
    """Rows of videos by name and of clips by id, the clips with their bytes; without what may differ."""
    store = Store(str(out))
    videos = {r["name"]: r for n in store.list("videos") for r in store.read_table(n).to_pylist()}
    clips = {r["clip_id"]: r for n in store.list("clips") for r in store.read_table(n).to_pylist()}
    for r in videos.values():
        assert set(dict(r.pop("seconds"))) >= {"decode"}
        for name in ("unit", "error_at", "chunks"):
            r.pop(name)
    for r in clips.values():
        offset = r.pop("media_offset")
        data = (out / r.pop("media_tar")).read_bytes()
        r["bytes"] = data[offset : offset + r["media_size"]]
        stills = r.pop("stills_offset")
        r["stills"] = None if stills is None else data[stills : stills + sum(r["stills_sizes"])]
    return videos, clips


@pytest.mark.parametrize("names", [("long",), ("short", "broken", "long", "short2")])
def test_chunks_change_nothing(tmp_path, footage, names, monkeypatch):
    footage = footage | {"short2": tmp_path / "short2.mp4"}
    footage["short2"].write_bytes(footage["short"].read_bytes())
    Worker(stages_of(tmp_path / "whole", 600)).run(unit(footage, *names))
    monkeypatch.setattr(chunks, "UNIT_S", 10.0)  # and units in smaller ones
    monkeypatch.setattr("pipeline.run.child.UNIT_S", 10.0)
    parts = Worker(stages_of(tmp_path / "parts", 6)).run(unit(footage, *names))
    long = [v for (v, *_) in parts if v.chunks > 1]
    assert [v.chunk for v in long] == list(range(len(long)))
    assert len(long) >= 4
    assert all(v.clips[-1].end_s - v.clips[0].start_s <= 6 for v in long)
    videos, clips = measured(tmp_path / "whole")
    assert measured(tmp_path / "parts") == (videos, clips)
    assert len(videos) == len(names)
    assert len(clips) >= 8
    assert any(
        c["score_watermark"] is not None for c in clips.values()
    )  # which compares the clips of a source
    assert not Store(str(tmp_path / "parts")).list("chunks")
    commit.sweep_uncommitted(Store(str(tmp_path / "parts")))
    assert measured(tmp_path / "parts") == (videos, clips)


def test_an_interrupted_source_goes_on_with_the_chunks_that_are_missing(tmp_path, footage, monkeypatch):
    Worker(stages_of(tmp_path / "whole", 6)).run(unit(footage, "long"))
    store = Store(str(tmp_path / "out"))
    worker, written = Worker(stages_of(tmp_path / "out", 6)), []
    before = commit.CommitStage.__call__

    def dies(self, videos):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(videos[0].chunk)
        return before(self, videos)

    monkeypatch.setattr(commit.CommitStage, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        worker.run(unit(footage, "long"))
    monkeypatch.setattr(commit.CommitStage, "__call__", before)
    assert commit.done_sources(store) == set()
    commit.sweep_uncommitted(store)
    again = [unit(footage, "long")]
    commit.take_up_chunks(store, again)
    done = [v.chunk for (v,) in worker.run(again[0])]
    assert done == list(range(2, max(done) + 1))
    assert measured(tmp_path / "out") == measured(tmp_path / "whole")
    assert commit.done_sources(store) == {str(footage["long"])}


def test_chunks_of_another_division_or_of_no_source_are_not_taken_up(tmp_path, footage):
    store = Store(str(tmp_path))
    worker = Worker(stages_of(tmp_path, 6))
    whole = worker.run(unit(footage, "long"))
    for name in store.list("videos") + store.list("clips"):
        store.delete(name)
    stale = unit(footage, "long")
    stale[0].committed = {(k, "0" * 16) for k in range(len(whole))}
    assert len(worker.run(stale)) == len(whole)
    store.write_bytes("chunks/gone-000.parquet", b"x")  # as older runs name them
    store.write_bytes(f"chunks/gone-000.{'0' * 16}.parquet", b"x")
    commit.take_up_chunks(store, [unit(footage, "short")])
    assert not store.list("chunks")


def test_a_fault_of_one_chunk_is_the_sources(tmp_path, footage, monkeypatch):
    from pipeline.split.cut import CutStage

    cut = CutStage._source

    def failing(self, video, folder):
        if video.chunk == 1:
            raise SourceFault("this part cannot be cut")
        return cut(self, video, folder)

    monkeypatch.setattr(CutStage, "_source", failing)
    Worker(stages_of(tmp_path, 6)).run(unit(footage, "long"))
    videos, clips = measured(tmp_path)
    assert videos["long.mp4"]["error"] == "this part cannot be cut"
    assert videos["long.mp4"]["clips"] == 0
    assert clips == {}


def test_a_source_counts_once_and_what_comes_back_are_the_units_it_became(tmp_path, footage):
    process = StageProcess(pickle.dumps(stages_of(tmp_path, 6)[:-1]), parse({"name": "x"}, [], "x").limits)
    ledger = Ledger()
    try:
        units = Outside(process, ledger, last=False).run("unit", pickle.dumps(unit(footage, "long", "short")))
    finally:
        process.close()
    found = {name: pickle.loads(blob) for name, blob in units}
    assert "unit_01" in found
    assert {n.rpartition("-")[0] for n in found if "-" in n} == {"unit_00"}
    assert all(v.unit == name for name, videos in found.items() for v in videos)
    assert {name: count.sources for name, count in ledger.stages.items()} == dict.fromkeys(ledger.stages, 2)
    assert ledger.stages["decode"].video_s == pytest.approx(ledger.stages["cut"].video_s)


def test_a_chunk_has_its_own_part_of_the_frames():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(10, 300))
        edges = np.sort(rng.choice(n * 10, 2 * int(rng.integers(1, 20)), replace=False))
        clips = [Clip(f"{a}", a, b, a / 10, b / 10) for a, b in edges.reshape(-1, 2).tolist()]
        samples = [Sample(f, b"") for f in range(0, n * 10, 5)]
        frames = Frames(np.arange(n * 10), n * 10, None, samples, None, np.zeros(0, np.int64))
        video = Video(Source("/a", "a"), "u", clips=clips, frames=frames, duration_s=float(n))
        units = list(divided([video], [video], 6.0))
        assert [c for (v,) in units for c in v.clips] == clips
        for (v,) in units:
            assert len(v.clips) == 1 or v.clips[-1].end_s - v.clips[0].start_s <= 6
            for c in v.clips:
                inside = [s.frame for s in v.frames.samples if c.start_frame <= s.frame < c.end_frame]
                assert inside == [s.frame for s in samples if c.start_frame <= s.frame < c.end_frame]
        for (a,), (b,) in itertools.pairwise(units):
            assert b.clips[0].end_s - a.clips[0].start_s > 6  # no smaller than it must be
        assert len({v.unit for (v,) in units}) == len(units)


def test_clips_that_lie_over_one_another_are_parted_by_their_starts():
    clips = [Clip(str(i), a, b, a, b) for i, (a, b) in enumerate([(0, 4), (1, 9), (2, 3), (8, 9)])]
    assert [[c.clip_id for c in part] for part in parted(clips, 5)] == [["0"], ["1"], ["2"], ["3"]]
    assert [[c.clip_id for c in part] for part in parted(clips, 9)] == [["0", "1", "2", "3"]]
