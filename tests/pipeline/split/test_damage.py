"""Damage is counted where it is: frame by frame, so clip by clip."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.io.ffmpeg import OPEN
from pipeline.recipe import Events, load
from pipeline.record import Shot, Video
from pipeline.split.damage import SPREAD, missing, repeated, spread
from pipeline.split.events import EventStage
from pipeline.split.opening import DecodeError
from tests.fixtures import videos as make
from tests.fixtures.numbered import write
from tests.pipeline.split.test_cut import analysed, tool

NONE = np.empty(0, np.int64)


def flags(text: str) -> list[np.ndarray]:
    """'k' key, 'p' and 'b' other frames, capital where damaged."""
    lower = np.array(list(text.lower()))
    return [np.array([c.isupper() for c in text]), lower == "k", lower != "b"]


def test_damage_lasts_until_the_next_key_frame_and_that_of_b_frames_does_not_last():
    assert spread(*flags("kbpbPbpkpBpkpp")).astype(int).tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert spread(*flags("Kppkp")).astype(int).tolist() == [1, 1, 1, 0, 0]
    without_keys = spread(*flags("P" + "p" * 400))
    assert without_keys.sum() == SPREAD


def test_holes_of_a_steady_rate_are_missing_frames_and_of_a_variable_one_are_not():
    steady = np.delete(np.arange(100) * 40, [20, 21, 22, 50])
    assert missing(steady, NONE, NONE).sum() == 4
    assert missing(steady, NONE, NONE)[[19, 46]].tolist() == [3, 1]
    rounded = np.rint(np.arange(100) * 1000 / 30).astype(np.int64)  # milliseconds
    assert not missing(rounded, NONE, NONE).any()
    rng = np.random.default_rng(0)
    assert not missing(np.cumsum(rng.integers(10, 200, 100)), NONE, NONE).any()
    jumped = np.concatenate([np.arange(50), 1000 + np.arange(50)]) * 40
    assert not missing(jumped, np.array([50]), NONE).any()


def test_refused_packets_are_missing_where_they_would_have_been_shown():
    rng = np.random.default_rng(0)
    pts = np.cumsum(rng.integers(10, 200, 100))
    lost = missing(pts, NONE, np.array([pts[3] + 1, pts[3] + 2, pts[70] + 1]))
    assert np.flatnonzero(lost).tolist() == [3, 70]
    assert lost[3] == 2
    steady = np.delete(np.arange(100) * 40, [20, 21])
    assert missing(steady, NONE, np.array([800, 840]))[19] == 2  # a hole and its packets are one loss


def test_repeated_frames_are_those_equal_to_the_one_before():
    thumbs = np.random.default_rng(0).integers(0, 255, (2500, 27, 48, 3), np.uint8)
    thumbs[5] = thumbs[4]
    thumbs[1024] = thumbs[1023]
    thumbs[1026] = thumbs[1025]
    assert np.flatnonzero(repeated(thumbs)).tolist() == [5, 1024, 1026]


def scored(video: Video, *spans: tuple[int, int]) -> list[dict[str, float]]:
    """Scores of those clips."""
    video.shots = [Shot(a, b) for a, b in spans]
    stage = EventStage(Events(embedder={"kind": "none"}, min_s=0))
    stage.setup()
    [video] = stage([video])
    assert [(c.start_frame, c.end_frame) for c in video.clips] == list(spans)
    assert set(stage.produces.scores) == {"damaged", "repeated"}
    return [c.scores for c in video.clips]


def noisy(path: Path, out: Path, first: int, last: int) -> Path:
    """A copy in which packets `first` … `last` − 1 have noise over their second half."""
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for pos, size in packets[first:last]:
        data[pos + size // 2 : pos + size - 8] = rng.bytes(size - 8 - size // 2)
    out.write_bytes(data)
    return out


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path), options=OPEN) as container:
        return [f.to_ndarray(format="gray") for f in container.decode(video=0)]


@pytest.mark.parametrize(
    ("codec", "suffix"), [("libx264", ".mp4"), ("mpeg4", ".avi"), ("mpeg2video", ".mkv")]
)
def test_the_damaged_frames_are_those_that_look_damaged_and_only_their_clip_has_them(codec, suffix, tmp_path):
    options = ("-g", "20", "-bf", "0", "-sc_threshold", "0" if codec == "libx264" else "1000000000")
    whole = make.cfr(tmp_path / f"whole{suffix}", 60, (320, 180), codec=codec, options=options)
    broken = noisy(whole, tmp_path / f"broken{suffix}", 25, 29)
    good, bad = decoded(whole), decoded(broken)
    video = analysed(broken)
    assert len(good) == len(bad) == len(video.frames.pts)
    looks = np.array([np.abs(a.astype(int) - b).max() > 30 for a, b in zip(good, bad, strict=True)])
    assert looks.any()
    first = int(video.frames.damaged.argmax())  # noise may read as a valid picture: nobody knows of that
    assert first < 30
    assert not (looks & ~video.frames.damaged)[first:].any()  # none is missed
    assert not video.frames.damaged[:20].any()
    assert not video.frames.damaged[40:].any()
    before, within, after = scored(video, (0, 20), (20, 40), (40, 60))
    assert before["damaged"] == after["damaged"] == 0
    assert within["damaged"] == video.frames.damaged[20:40].mean() > 0.3


def test_a_transport_stream_with_lost_packets_has_them_in_the_clip_that_they_hit(tmp_path):
    path = make.cfr(
        tmp_path / "a.ts", 60, (320, 180), codec="libx265", options=("-x265-params", "keyint=20:log-level=0")
    )
    data = path.read_bytes()
    half = len(data) // 188 // 2
    path.write_bytes(data[: half * 188] + data[(half + 3) * 188 :])
    first, second, third = scored(analysed(path), (0, 20), (20, 40), (40, 60))
    assert first["damaged"] == third["damaged"] == 0  # the decoder itself finds nothing wrong with HEVC
    assert second["damaged"] > 0


def test_missing_frames_count_as_damaged(tmp_path):
    whole = write(tmp_path / "whole.mkv", list(range(60)), Fraction(1, 25), options={"bf": "0", "g": "1"})
    tool("-i", whole, "-c", "copy", "-bsf:v", "noise=drop='between(n,25,29)'", tmp_path / "holed.mkv")
    first, second, third = scored(analysed(tmp_path / "holed.mkv"), (0, 20), (20, 35), (35, 55))
    assert first["damaged"] == third["damaged"] == 0
    assert second["damaged"] == 0.25  # 5 of 20


def test_frames_that_are_refused_count_as_damaged(tmp_path):
    path = make.cfr(tmp_path / "a.avi", 60, codec="mjpeg", pix_fmt="yuvj420p")
    assert scored(analysed(path), (0, 60))[0]["damaged"] == 0
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for pos, size in packets[25:30]:
        data[pos + 8 : pos + size] = bytes(size - 8)
    path.write_bytes(data)
    video = analysed(path)
    lost = 60 - len(video.frames.pts)
    assert lost == 5
    assert [s["damaged"] for s in scored(video, (0, 20), (20, 35), (35, 55))] == [0, 0.25, 0]


def test_a_still_picture_repeats_itself(tmp_path):
    path = make.cfr(tmp_path / "still.mp4", 50, filters="loop=-1:1:0")
    assert scored(analysed(path), (0, 50))[0]["repeated"] > 0.7
    assert scored(analysed(make.cfr(tmp_path / "moving.mp4", 50)), (0, 50))[0]["repeated"] == 0


@pytest.mark.parametrize("name", ["embedded", "panda70m"])
def test_shipped_recipes_drop_what_is_mostly_damaged(name):
    rule = load(name).decide.rules["damaged"]
    assert (rule.column, rule.min) == ("score_damaged", None)
    assert 0 < rule.max <= 0.5


def test_encrypted_media_are_named_as_such(tmp_path):
    key = (
        "-encryption_key",
        "76a6c65c5ea762046bd749a2e632ccbb",
        "-encryption_kid",
        "a7e61c373e219033c21091fa607bf3b8",
    )
    cenc = make.cfr(tmp_path / "cenc.mp4", options=("-encryption_scheme", "cenc-aes-ctr", *key))
    scrambled = make.cfr(tmp_path / "scrambled.ts", 100)
    data = bytearray(scrambled.read_bytes())
    for i in range(0, len(data), 188):
        if (data[i + 1] & 31) << 8 | data[i + 2] == 256:  # the pictures' packets
            head = 4 + (1 + data[i + 4] if data[i + 3] & 0x20 else 0)
            data[i + 3] |= 0x80
            data[i + head : i + 188] = np.random.default_rng(i).bytes(188 - head)
    scrambled.write_bytes(data)
    for path in (cenc, scrambled):
        with pytest.raises(
            DecodeError, match=r"its pictures are encrypted \(DRM\); give a copy without encryption"
        ):
            analysed(path)
