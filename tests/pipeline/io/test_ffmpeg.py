"""Which ffmpeg is used, and that it cannot hang, linger or read what it should not."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.io import ffmpeg


@pytest.fixture
def script(tmp_path: Path):
    """Makes an executable that stands in for ffmpeg."""

    def make(body: str) -> str:
        path = tmp_path / "ffmpeg"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def test_the_named_ffmpeg_goes_before_the_bundled_one(script, monkeypatch):
    import imageio_ffmpeg

    monkeypatch.delenv("CLIPMILL_FFMPEG", raising=False)
    assert ffmpeg.find() == imageio_ffmpeg.get_ffmpeg_exe()
    named = script("true")
    monkeypatch.setenv("CLIPMILL_FFMPEG", named)
    assert ffmpeg.find() == named


def test_a_named_ffmpeg_that_is_missing_is_an_error_with_the_fix(monkeypatch):
    monkeypatch.setenv("CLIPMILL_FFMPEG", "/no/such/ffmpeg")
    with pytest.raises(ffmpeg.FFmpegError, match=r"CLIPMILL_FFMPEG=/no/such/ffmpeg is not a program.*unset"):
        ffmpeg.find()


@pytest.mark.parametrize(
    ("said", "numbers"),
    [
        ("4.2.2-static https://johnvansickle.com/ffmpeg/", (4, 2, 2)),
        ("n9.0.2-17-g2a571b6068-20260930", (9, 0, 2)),
        ("7.1.1-1ubuntu4", (7, 1, 1)),
        ("8.0", (8, 0)),
        ("N-118000-gabcdef", (999,)),
        ("git-2024-01-01", (999,)),
    ],
)
def test_versions_are_read_from_releases_and_development_builds(script, said, numbers):
    ffmpeg.version.cache_clear()
    assert ffmpeg.version(script(f"echo 'ffmpeg version {said} Copyright (c) the developers'")) == numbers


def test_what_is_no_ffmpeg_is_said_to_be_none(script):
    ffmpeg.version.cache_clear()
    with pytest.raises(ffmpeg.FFmpegError, match="is no ffmpeg that runs"):
        ffmpeg.version(script("echo hello"))


def test_a_failure_tells_ffmpegs_last_meaningful_line_without_addresses(script):
    exe = script(
        "echo '[h264 @ 0x55d0] Invalid NAL unit size' >&2; echo 'Conversion failed!' >&2; echo >&2; exit 69"
    )
    with pytest.raises(ffmpeg.FFmpegError) as e:
        ffmpeg.run([exe], stall_s=10)
    assert str(e.value) == "ffmpeg failed: h264: Invalid NAL unit size"


def test_a_full_disk_is_no_fault_of_the_video(script):
    with pytest.raises(OSError, match="No space left") as e:
        ffmpeg.run([script("echo 'av_interleaved_write_frame(): No space left on device' >&2; exit 1")], 10)
    assert e.value.errno == errno.ENOSPC
    name = "No space left on device.mp4: Invalid data found"  # a video of that name does not stop the mill
    with pytest.raises(ffmpeg.FFmpegError):
        ffmpeg.run([script(f"echo '{name}' >&2; exit 1")], 10)


@pytest.mark.parametrize(
    "body",
    [
        "exec sleep 60",
        # one process: what its children read would count as its own reading
        f"exec {sys.executable} -c 'import time\n"
        'while True: time.sleep(0.05); print(f"frame=1\\nspeed={time.time()}", flush=True)\'',
    ],
    ids=["silent", "reports the same frame for ever"],
)
def test_a_hung_ffmpeg_is_killed(script, tmp_path, body):
    exe = script(f"echo $$ > {tmp_path}/pid; {body}")
    begin = time.monotonic()
    with pytest.raises(ffmpeg.Stalled, match=r"no progress for 0\.5 s"):
        ffmpeg.run([exe], stall_s=0.5)
    assert time.monotonic() - begin < 10
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    "step",
    ["echo frame=$i", "head -c 1000 /dev/zero > /dev/null; read line < /proc/uptime"],
    ids=["encodes", "only reads, up to the first clip"],
)
def test_a_slow_ffmpeg_is_left_alone(script, step):
    ffmpeg.run([script(f"for i in 1 2 3 4 5 6 7 8; do {step}; sleep 0.2; done")], stall_s=1.0)


def test_ffmpeg_dies_with_its_parent(script, tmp_path):
    exe = script(f"echo $$ > {tmp_path}/pid; exec sleep 60")
    parent = subprocess.Popen(
        [sys.executable, "-c", f"from pipeline.io import ffmpeg; ffmpeg.run([{exe!r}], 60)"],
        cwd=Path(__file__).parents[3],
    )
    pid = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()))
    assert alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_for(lambda: not alive(pid))


def test_ffmpeg_is_killed_when_its_caller_is_interrupted(script, tmp_path):
    exe = script(f"echo $$ > {tmp_path}/pid; exec sleep 60")
    code = (  # a process started in the background may ignore Ctrl-C
        "import signal\nfrom pipeline.io import ffmpeg\n"
        f"signal.signal(signal.SIGINT, signal.default_int_handler)\nffmpeg.run([{exe!r}], 60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], stderr=subprocess.DEVNULL
    )
    pid = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()))
    parent.send_signal(signal.SIGINT)
    parent.wait(20)
    assert wait_for(lambda: not alive(pid))


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{secret}'\n",
    ],
    ids=["hls", "concat"],
)
def test_a_playlist_called_mp4_opens_nothing(tmp_path, playlist):
    import ffmpeg as graph

    from tests.fixtures.numbered import write

    secret = write(tmp_path / "secret.mp4", [512 * n for n in range(5)])
    disguised = tmp_path / "video.mp4"
    disguised.write_text(playlist.format(secret=secret))
    command = (
        graph.input(**ffmpeg.source(str(disguised))).output("-", format="null").compile(cmd=ffmpeg.find())
    )
    with pytest.raises(ffmpeg.FFmpegError):
        ffmpeg.run(command, 30)
    command = graph.input(**ffmpeg.source(str(secret))).output("-", format="null").compile(cmd=ffmpeg.find())
    ffmpeg.run(command, 30)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("did not happen in time")


def test_a_version_probe_that_somebody_kills_is_tried_again(tmp_path):
    exe = tmp_path / "ffmpeg"
    exe.write_text(
        f"#!/bin/sh\nif [ ! -e {tmp_path}/killed ]; then touch {tmp_path}/killed; kill -9 $$; fi\n"
        "echo 'ffmpeg version 6.1 Copyright'\n"
    )
    exe.chmod(0o755)
    assert ffmpeg.version(str(exe)) == (6, 1)


def test_the_bundled_ffmpeg_is_taken_by_its_file_without_a_try(monkeypatch):
    import imageio_ffmpeg

    monkeypatch.delenv("CLIPMILL_FFMPEG", raising=False)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "another")
    assert "imageio_ffmpeg" in ffmpeg.find()
