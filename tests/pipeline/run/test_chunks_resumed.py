"""A source in chunks, killed anywhere and resumed with other settings, ends as an undisturbed run with these."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.io.store import Store
from pipeline.recipe import parse
from pipeline.record import Clip, Source, Video
from pipeline.run import commit, job
from pipeline.run.child import Worker
from pipeline.split.cut import CutStage, Piece
from pipeline.stages import Produces, Resources, divide_after

SPANS = ((0.0, 2.0), (2.0, 4.0), (4.0, 5.0), (5.0, 9.0), (9.0, 11.0))
SOURCE = Source("/long", "long", {"title": "old"}, SPANS, tuple({"caption": f"{a:g}"} for a, _ in SPANS))
CHUNK_S = 4.0

CHANGES: dict[str, tuple[Source, float]] = {
    "smaller chunks": (SOURCE, 2.0),
    "no chunks": (SOURCE, 600.0),
    "as many chunks, other borders": (SOURCE, 3.0),
    "other intervals, as many": (
        replace(SOURCE, intervals=tuple((a + 0.5, b) for a, b in SPANS)),
        CHUNK_S,
    ),
    "fewer intervals": (
        replace(SOURCE, intervals=SPANS[1:4], interval_meta=SOURCE.interval_meta[1:4]),
        CHUNK_S,
    ),
    "other metadata of the intervals": (
        replace(SOURCE, interval_meta=tuple({"caption": f"new {a:g}"} for a, _ in SPANS)),
        CHUNK_S,
    ),
}


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Callers are killed here, not the machine: without fsync."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr("os.fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def kills(tmp_path_factory, quick) -> list[Path]:
    """What runs leave that are killed before each change of the store, until the source is committed."""
    folder, states = tmp_path_factory.mktemp("kills"), []
    with pytest.MonkeyPatch.context() as m:
        while not states or not commit.done_sources(Store(str(states[-1]))):
            states.append(folder / f"{len(states)}")
            states[-1].mkdir()
            assert killed(m, states[-1], len(states) - 1)
    return states


class Given:
    """The list's intervals are the clips; the bytes' hash is that of the name."""

    name, whole_source = "given", True
    resources, produces = Resources(), Produces()

    def setup(self) -> None: ...

    def __call__(self, videos: list[Video]) -> list[Video]:
        for v in videos:
            s = v.source
            v.sha256 = hashlib.sha256(s.name.encode()).hexdigest()
            v.clips = [
                Clip(
                    hashlib.sha256(f"{s.name}{a}{b}".encode()).hexdigest()[:20],
                    int(a * 10),
                    int(b * 10),
                    a,
                    b,
                    meta=m,
                )
                for (a, b), m in zip(s.intervals or (), s.interval_meta, strict=True)
            ]
        return videos


class Packed(CutStage):
    """Clips whose bytes are their ids, in real staging tars."""

    def setup(self) -> None: ...

    def _source(self, video: Video, folder: Path) -> list[Piece]:
        folder.mkdir(exist_ok=True)
        pieces = [Piece(video, c, folder / c.clip_id) for c in video.clips]
        for p in pieces:
            p.path.write_text(p.clip.clip_id)
            p.width = p.height = 16
        return pieces


def worker(out: Path, chunk_s: float) -> Worker:
    stages = [Given(), Packed(parse({"name": "x", "cut": {"stills": False}}, [], "x").cut, str(out))]
    divide_after(stages, chunk_s)
    return Worker([*stages, commit.CommitStage(str(out), Produces())])


def curated(out: Path, source: Source, chunk_s: float) -> None:
    """What `curate` does with the record, for one source."""
    store = Store(str(out))
    commit.sweep_uncommitted(store)
    units = [] if source.uri in commit.done_sources(store) else [[Video(source, "unit")]]
    commit.take_up_chunks(store, units)
    for unit in units:
        worker(out, chunk_s).run(unit)
    commit.sweep_uncommitted(store)


def found(out: Path) -> tuple[list, list, list[str]]:
    """Rows of videos and clips, with the clips' bytes, and every file."""
    store = Store(str(out))
    videos = [r for n in store.list("videos") for r in store.read_table(n).to_pylist()]
    clips = [r for n in store.list("clips") for r in store.read_table(n).to_pylist()]
    for r in videos:
        r.pop("seconds")
    for r in clips:
        data = (out / r["media_tar"]).read_bytes()[r["media_offset"] :][: r["media_size"]]
        assert data.decode() == r["clip_id"]
    return videos, clips, store.list()


class Killed(BaseException):
    pass


def killed(monkeypatch, out: Path, step: int) -> bool:
    """A run that is killed before its `step`th change of the store; False: it ended before that."""
    left = step

    def dying(call):
        def instead(*args):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return call(*args)

        return instead

    with monkeypatch.context() as m:
        for name in ("write_table", "delete"):
            m.setattr(Store, name, dying(getattr(Store, name)))
        m.setattr(Packed, "_pack", dying(Packed._pack))
        try:
            curated(out, SOURCE, CHUNK_S)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("change", CHANGES)
def test_killed_anywhere_and_resumed_it_is_as_undisturbed_with_the_new_settings(tmp_path, kills, change):
    curated(tmp_path / "old", SOURCE, CHUNK_S)
    curated(tmp_path / "new", *CHANGES[change])
    old, new = found(tmp_path / "old"), found(tmp_path / "new")
    assert old[0][0]["chunks"] == 4
    assert len(new[1]) == len(CHANGES[change][0].intervals or ())
    assert old != new
    assert len(kills) > 4 * 3
    for step, state in enumerate(kills):
        out = tmp_path / f"{step}"
        shutil.copytree(state, out)
        curated(out, *CHANGES[change])
        assert found(out) == (old if state is kills[-1] else new), step  # a committed source stays as it was


def test_back_and_forth_between_settings_mixes_nothing(tmp_path, monkeypatch):
    curated(tmp_path / "old", SOURCE, CHUNK_S)
    for step in range(4, 11, 2):
        out = tmp_path / f"{step}"
        assert killed(monkeypatch, out, step)
        with monkeypatch.context() as m:
            m.setitem(globals(), "SOURCE", CHANGES["other intervals, as many"][0])
            assert killed(monkeypatch, out, step - 1)
        curated(out, SOURCE, CHUNK_S)
        assert found(out) == found(tmp_path / "old")


def test_finished_chunks_are_not_done_again_and_failed_ones_are_before_the_source_is_committed(
    tmp_path, monkeypatch
):
    assert killed(monkeypatch, tmp_path, 9)  # three chunks are finished
    store = Store(str(tmp_path))
    failed = next(n for n in store.list("chunks") if n.startswith("chunks/unit-001.") and ".clips." not in n)
    row = store.read_table(failed)
    at = row.schema.get_field_index("status")
    store.write_table(failed, row.set_column(at, row.schema.field(at), [["error"]]))
    unit = [Video(SOURCE, "unit")]
    commit.take_up_chunks(store, [unit])
    assert failed not in store.list("chunks")
    assert [v.chunk for (v,) in worker(tmp_path, CHUNK_S).run(unit)] == [1, 3]
    assert commit.done_sources(store) == {SOURCE.uri}


def test_more_than_a_thousand_chunks_keep_their_media(tmp_path):
    spans = tuple((float(t), t + 1.0) for t in range(1003))
    source = Source("/long", "long", {}, spans, ({},) * len(spans))
    (video,) = Given()([Video(source, "unit")])
    store = Store(str(tmp_path))
    from pipeline.run.chunks import divided

    stage = worker(tmp_path, 1.0).stages[-1]
    rows = [unit for unit in divided([video], [video], 1.0) if unit[0].chunk in (0, 999, 1000, 1002)]
    video.clips = []
    for (v,) in rows:
        Packed(parse({"name": "x", "cut": {"stills": False}}, [], "x").cut, str(tmp_path))([v])
        video.clips += v.clips
    stage([video])  # the source as it is once put together
    assert len(store.list("media")) == 4
    commit.sweep_uncommitted(store)
    assert len(store.list("media")) == 4
    assert len(found(tmp_path)[1]) == 4


def test_a_source_that_fails_after_the_cut_leaves_no_media_at_the_end_of_the_run(tmp_path, monkeypatch):
    """`curate` itself, its stages in this process."""

    class Fails:
        name, resources, produces = "fails", Resources(), Produces()

        def setup(self) -> None: ...

        def __call__(self, videos: list[Video]) -> list[Video]:
            raise ValueError("no")

    def run_local(stages, units, *_):
        runner = worker(tmp_path / "out", CHUNK_S)
        runner.stages.insert(2, Fails())
        for unit in units:
            runner.run([replace(v, source=replace(SOURCE, uri=v.source.uri)) for v in unit])

    monkeypatch.setattr(job, "run_local", run_local)
    (tmp_path / "a.mp4").write_bytes(b"a")
    recipe = parse(
        {"name": "x", "shots": {"detector": "content"}, "scores": {"text": {"enabled": False}}}, [], "x"
    )
    ended = job.curate([str(tmp_path / "a.mp4")], recipe, str(tmp_path / "out"), job.Job(runner="local"))
    assert ended.failed == 1
    store = Store(str(tmp_path / "out"))
    assert (len(store.list("videos")), store.list("clips"), store.list("chunks")) == (1, [], [])
    assert store.list("media") == []
