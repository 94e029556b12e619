"""The ffmpeg program: which one, how it is fed safely, and how it is watched while it runs."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.faults import TransientFault
from pipeline.io import sandbox
from pipeline.watch import progress

# Demuxers that read exactly the file they are given. Playlists and scripts (hls, concat, dash, ffconcat,
# image2, lavfi, …), which open other files or the network, are not among them. Used by PyAV and ffmpeg alike.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,ivf,nut,mxf,"
    "h264,hevc,av1,obu,wtv,rm,dv,swf,m4v,y4m,yuv4mpegpipe,live_flv,apng"
)
PROTOCOLS = "file"

# Options for PyAV's `av.open`. PyAV asks libavformat to invent missing PTS, which goes wrong for packed
# B-frames (mpeg4 in AVI); ffmpeg does not ask for it, and both must agree on a frame's PTS.
LISTED = {"protocol_whitelist": PROTOCOLS, "format_whitelist": FORMATS}
OPEN = LISTED | {"fflags": "-genpts"}

# Messages in English; and no character set modules: statically linked builds crash when MPEG-TS names load them.
ENVIRONMENT = {"LC_ALL": "C", "GCONV_PATH": "/nonexistent"}

TAIL = 1 << 16  # bytes of ffmpeg's messages to keep


class FFmpegError(Exception):
    """ffmpeg is missing, or could not do what it was asked; the message is one sentence."""


class Stalled(FFmpegError):
    """ffmpeg made no progress and was killed."""


def find() -> str:
    """The ffmpeg to use: $CLIPMILL_FFMPEG, else the one imageio-ffmpeg brings (or finds on PATH).

    A bundled ffmpeg goes before the system's, so that two machines write the same bytes.
    Raises FFmpegError when there is none.
    """
    named = os.environ.get("CLIPMILL_FFMPEG")
    if named:
        exe = shutil.which(named)
        if exe is None:
            raise FFmpegError(f"CLIPMILL_FFMPEG={named} is not a program; correct it, or unset it")
        return exe
    import imageio_ffmpeg

    # by its file: imageio-ffmpeg tries it first, and takes another ffmpeg should that try be killed
    for bundled in sorted((Path(imageio_ffmpeg.__file__).parent / "binaries").glob("ffmpeg-*")):
        if os.access(bundled, os.X_OK):
            return str(bundled)
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as e:
        raise FFmpegError(
            "no ffmpeg found; pip install imageio-ffmpeg, or name one in CLIPMILL_FFMPEG"
        ) from e


@functools.cache
def version(exe: str) -> tuple[int, ...]:
    """(major, minor, …) of a release; (999,) of a development build, which is taken for the newest.

    Raises FFmpegError when the program does not run.
    """
    for _ in range(3):
        try:
            done = subprocess.run([exe, "-version"], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as e:
            raise FFmpegError(f"{exe} does not run ({e}); name another ffmpeg in CLIPMILL_FFMPEG") from e
        if done.returncode >= 0:  # else somebody killed it: that says nothing of the program
            break
    said = re.match(r"ffmpeg version (\S+)", done.stdout)
    if done.returncode or said is None:
        raise FFmpegError(f"{exe} is no ffmpeg that runs; name another in CLIPMILL_FFMPEG")
    numbers = re.match(r"n?(\d+(?:\.\d+)*)", said[1])
    return tuple(int(n) for n in numbers[1].split(".")) if numbers else (999,)


def source(path: str) -> dict[str, Any]:
    """Keyword arguments of `ffmpeg.input` that open a file nobody vouches for.

    The 'file:' prefix keeps a name from being taken for an option or an address; the white lists keep its
    content from opening anything else.
    """
    return {
        "filename": f"file:{path}",
        "protocol_whitelist": PROTOCOLS,
        "format_whitelist": FORMATS,
        "threads": 1,
    }


def picture_stream(container: Any) -> Any:
    """The first video stream of a PyAV container that is no cover art (ffmpeg's 'V:0'); None if there is none."""
    from av.stream import Disposition

    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def run(cmd: list[str], stall_s: float) -> str:
    """Run an ffmpeg command to its end; returns its messages (last 64 KiB).

    It has no network and no secrets in its environment, see `pipeline.io.sandbox`.

    It reads no terminal, has its own process group, and dies with this process, however that dies. It may
    be slow, but when for `stall_s` seconds it neither reads anything nor reports a frame, it is killed.

    Raises Stalled, FFmpegError, TransientFault where somebody kills it, and OSError (ENOSPC) when the disk it
    writes to is full.
    """
    sandbox.prepare()
    child = subprocess.Popen(
        [cmd[0], "-nostdin", "-hide_banner", "-nostats", "-v", "error", "-progress", "pipe:1", *cmd[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=sandbox.environment() | ENVIRONMENT,
        process_group=0,
        preexec_fn=functools.partial(_child, os.getpid()),
    )
    try:
        said = _watch(child, stall_s)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for pipe in (child.stdout, child.stderr):
            assert pipe is not None
            pipe.close()
    if re.search(r": (No space left on device|Disk quota exceeded)\s*$", said, re.M):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), tempfile.gettempdir())
    if child.returncode == -signal.SIGKILL:  # by nobody here
        raise TransientFault("ffmpeg was killed by SIGKILL, perhaps for want of memory")
    if child.returncode < 0:
        raise FFmpegError(f"ffmpeg was ended by {signal.Signals(-child.returncode).name}")
    if child.returncode:
        raise FFmpegError(f"ffmpeg failed: {last_line(said) or f'exit status {child.returncode}'}")
    return said


def _watch(child: subprocess.Popen[bytes], stall_s: float) -> str:
    """Read a child's pipes until it closes them. Raises Stalled."""
    assert child.stdout is not None
    assert child.stderr is not None
    said = b""
    report: dict[bytes, bytes] = {}
    before: object = None
    since = time.monotonic()
    with selectors.DefaultSelector() as pipes:
        pipes.register(child.stdout, selectors.EVENT_READ)
        pipes.register(child.stderr, selectors.EVENT_READ)
        while pipes.get_map():
            for ready, _ in pipes.select(timeout=min(1.0, stall_s / 4)):
                data = os.read(ready.fd, TAIL)
                if not data:
                    pipes.unregister(ready.fileobj)
                elif ready.fileobj is child.stderr:
                    said = (said + data)[-TAIL:]
                else:
                    report |= dict(re.findall(rb"^(frame|out_time_us|total_size)=(.*)$", data, re.M))
            # no frame is reported while it decodes up to the first clip, but then it reads; and a slow encoder
            # may read nothing for long, but then it reports frames: a hung one does neither
            now = (dict(report), _bytes_read(child.pid))
            if now != before:
                before, since = now, time.monotonic()
                progress()
            elif time.monotonic() - since > stall_s:
                raise Stalled(f"ffmpeg made no progress for {stall_s:g} s and was stopped")
    try:
        child.wait(timeout=stall_s)
    except subprocess.TimeoutExpired as e:
        raise Stalled(f"ffmpeg did not end within {stall_s:g} s and was stopped") from e
    return said.decode(errors="replace")


def _bytes_read(pid: int) -> int | None:
    """All that a process has read so far; None where that cannot be known (not Linux, or it is over)."""
    try:
        found = re.search(r"^rchar: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) if found else None


def last_line(said: str) -> str:
    """The last message that tells something, without the addresses that differ from run to run."""
    idle = re.compile(
        r"Conversion failed|Error (opening|sending|while (opening|processing))|Task finished|Terminating thread|"
        r"Nothing was written|Could not open encoder|Error initializing|Failed to inject"
    )
    lines = [re.sub(r"\[([^\]@]+) @ 0x[0-9a-f]+\] ?", r"\1: ", s.strip()) for s in said.splitlines()]
    lines = [s for s in lines if s]
    telling = [s for s in lines if not idle.search(s)]
    return (telling or lines or [""])[-1]


# Looked up before the fork: a child that shares its memory with other threads must not load anything.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _child(parent: int) -> None:
    """In the child, before ffmpeg starts: be killed when the parent is, and be confined."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed in between
            os._exit(1)
    sandbox.confine_program()


def encode_rgb(
    pictures: bytes, width: int, height: int, fps: float, output: list[str], stall_s: float
) -> None:
    """Raw RGB pictures, 3 bytes a pixel, one after another, to a file: `output` is options and its name.

    Raises FFmpegError.
    """
    with tempfile.NamedTemporaryFile(prefix="clipmill-", suffix=".rgb") as raw:
        raw.write(pictures)
        raw.flush()
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}"]
        run([find(), *source, "-i", raw.name, *output], stall_s=stall_s)
