"""An hour of 30 fps video stays below 2 GB a worker: what is kept of a frame, and that it is held once."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline.io.isolate import Child
from pipeline.recipe import Decode
from pipeline.record import Source, Video
from pipeline.split.decode import DecodeStage
from pipeline.stages import run_stage
from tests.fixtures import videos as make
from tests.fixtures.videos import made

GB = 1e9
PROGRAMS = 0.75 * GB  # the two processes themselves, with torch, OpenCV and libav: 0.62 in bench/memory.py


def pss(pid: int | str) -> int:
    """Bytes of a process; what it shares is divided among those who share it."""
    found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def test_what_is_kept_of_an_hour_leaves_room_below_two_gigabytes():
    path = made(make.cfr, frames=300, fps=30, size=(640, 360), options=("-preset", "ultrafast"))
    stage = DecodeStage(Decode())
    stage.setup()
    (video,) = run_stage(stage, [Video(Source(str(path), path.name), "u")])
    assert stage.child is not None
    stage.child.close()
    frames, seconds = video.frames, video.duration_s
    assert video.error is None
    assert frames is not None
    assert seconds == 10
    arrays = {n: a for n, a in vars(frames).items() if isinstance(a, np.ndarray) and len(a)}
    every = sum(a.nbytes for a in arrays.values() if len(a) == 300) // 300  # bytes of each frame
    assert 27 * 48 * 3 < every < 27 * 48 * 3 + 200  # its thumb; PTS, packet, marks, flags
    assert arrays["grey"].nbytes == 80 * 128 * 72  # 8 a second
    rest = {"grey", "grey_frame"} | {n for n, a in arrays.items() if len(a) == 300}
    assert set(arrays) == rest  # nothing else grows
    assert len(frames.samples) == 20
    # a sample of real footage has 34 kB (mean of 15 videos of Panda-70M; the busiest of them 80)
    hour = 3600 * (30 * every + 8 * (128 * 72 + 8) + 2 * 34_000)
    assert hour + PROGRAMS < 2 * GB


def test_a_large_answer_is_held_once_by_parent_and_child_together():
    size = 300_000_000
    with Child() as child:
        pid = child.call("tests.fixtures.misbehave:pid", stall_s=60)
        before, most = pss("self") + pss(pid), 0
        done = threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.wait(0.01):
                most = max(most, pss("self") + pss(pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        rows, strings = child.call("tests.fixtures.misbehave:large", size, stall_s=60)
        done.set()
        watcher.join()
        assert rows.nbytes == sum(map(len, strings)) == size / 2
        assert 0.8 * size < most - before < 1.3 * size  # the two are not read at one moment
        assert pss(pid) < 60_000_000  # it has given it back
    assert rows[-1, -1, -1] == 7


@pytest.mark.parametrize("kept", ["thumbs", "grey", "packets", "marks", "samples"])
def test_frames_are_let_go_when_the_last_stage_that_needs_them_is_done(kept, tmp_path):
    """In the order of the graph, with the stages that come with clipmill."""
    from pipeline.graph import build
    from pipeline.recipe import parse

    last = {"thumbs": "shots", "grey": "scores", "packets": "cut", "marks": "cut", "samples": "caption:given"}
    recipe = parse(
        {
            "name": "x",
            "shots": {"detector": "content"},
            "events": {"embedder": {"kind": "none"}, "min_s": 1},
            "cut": {"preset": "ultrafast"},
            "scores": {"text": {"enabled": False}, "watermark": False},
            "captions": [{"kind": "given"}],
        },
        [],
        "x",
    )
    videos = [Video(Source(str(made(make.cfr)), "cfr.mp4"), "u")]
    seen = {}
    for stage in build(recipe, str(tmp_path)):
        stage.setup()
        run_stage(stage, videos)
        assert videos[0].error is None
        seen[stage.name] = getattr(videos[0].frames, kept)
    held = [name for name, value in seen.items() if value is not None and len(value)]
    assert list(seen)[len(held)] == last[kept]
