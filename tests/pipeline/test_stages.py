"""Running a stage on a unit: a bad video becomes an error row, its neighbours don't notice."""

import numpy as np
import pytest

from pipeline.faults import SourceFault, StoreError
from pipeline.record import Frames, Sample, Source, Video
from pipeline.stages import Produces, Resources, let_go_of_samples, produced, run_stage


class Marking:
    """Counts every video; fails on names that start with 'bad'."""

    name, resources, produces = "marking", Resources(), Produces(scores=["a"], embeddings={"e": 2})

    def setup(self): ...

    def __call__(self, videos):
        for v in videos:
            if v.source.name.startswith("bad"):
                raise SourceFault(f"{v.source.name} is bad")
            if v.source.name.startswith("bug"):
                raise KeyError("x")
            v.counts["marked"] = 1
        return videos


def unit(*names: str) -> list[Video]:
    return [Video(Source(uri=n, name=n), unit="u") for n in names]


def test_a_failing_video_leaves_its_neighbours_unharmed():
    videos = run_stage(Marking(), unit("a", "bad1", "b", "bug1", "c"))
    assert [v.error is None for v in videos] == [True, False, True, False, True]
    assert [v.counts.get("marked") for v in videos] == [1, None, 1, None, 1]
    assert videos[1].error.message == "bad1 is bad"
    assert videos[1].error.stage == "marking"
    assert videos[3].error.message.startswith("KeyError: 'x' at test_stages.py:")


def test_a_failed_video_is_not_given_to_later_stages():
    videos = run_stage(Marking(), unit("bad"))
    first = videos[0].error
    run_stage(Marking(), videos)
    assert videos[0].error is first


def test_time_is_accounted_once_per_video():
    videos = run_stage(Marking(), unit("a", "b"))
    assert all(v.seconds["marking"] > 0 for v in videos)


def test_trouble_with_the_output_ends_the_run():
    class Full(Marking):
        def __call__(self, videos):
            raise StoreError("disk full")

    with pytest.raises(StoreError):
        run_stage(Full(), unit("a", "b"))


def test_columns_are_collected_in_stage_order_without_repeats():
    columns = produced([Marking(), Marking()])
    assert columns.scores == ["a"]
    assert columns.embeddings == {"e": 2}


def test_a_stage_computes_on_a_gpu_only_with_a_share_of_one(monkeypatch):
    import torch

    threads = torch.get_num_threads()
    try:
        for there in (True, False):
            monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
            assert Resources(cpus=2.5).device() == "cpu"
            assert torch.get_num_threads() == 2
            assert Resources(cpus=0.25, gpus=0.25).device() == ("cuda" if there else "cpu")
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_samples_are_let_go_after_the_last_stage_that_looks_at_them():
    class Blind(Marking):
        sees_samples = False

    stages = [Marking(), Marking(), Blind()]
    let_go_of_samples(stages)
    (video,) = unit("a")
    held = []
    for stage in stages:
        if video.frames is None:
            none = np.zeros(0, np.int64)
            video.frames = Frames(none, 0, None, [Sample(0, b"")], None, none)
        run_stage(stage, [video])
        held.append(len(video.frames.samples))
    assert held == [1, 0, 0]


def test_what_was_downloaded_of_a_failed_video_is_let_go(monkeypatch):
    released = []
    monkeypatch.setattr("pipeline.sources.fetch.release", lambda source: released.append(source.uri))
    run_stage(Marking(), unit("a", "bad"))
    assert released == ["bad"]
