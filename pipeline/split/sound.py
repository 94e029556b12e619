"""The sound of clips, in step with their pictures whatever the sound track's time stamps do.

`extract` runs in a child process, as the decoding of the pictures does. It decodes the first sound track once, puts
every sample where its time stamp says, leaves silence where there is none, and encodes each clip's stretch as AAC.
A stamp that differs by less than SLACK_S from where the sound before it ended is taken for rounding. Where two
sounds claim one time, the first keeps it. Sound is decoded from the beginning, as some decoders carry state, so a
clip's sound does not depend on which others are cut.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np

from pipeline.io.ffmpeg import OPEN
from pipeline.split.clock import timeline

SLACK_S = 0.005
RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)  # AAC's
LAYOUTS = ("mono", "stereo", "3.0", "4.0", "5.0", "5.1", "7.1")
BIT_RATE = 128_000


@dataclass
class Stretch:
    """The sound of one clip as it fills up."""

    start: Fraction  # seconds on the pictures' clock
    samples: np.ndarray  # float32 [channels, n]
    heard: int = 0  # samples that the track had

    def put(self, at: int, sound: np.ndarray) -> None:
        """Sound float32 [channels, m] whose first sample is the stretch's sample `at`; what lies outside is cut."""
        a, b = max(at, 0), min(at + sound.shape[1], self.samples.shape[1])
        if a < b:
            self.samples[:, a:b] = sound[:, a - at : b - at]
            self.heard += b - a


@dataclass
class Heard:
    """What `extract` answers."""

    clips: list[bytes | None]  # an mp4 with one AAC track that begins with the clip
    warnings: list[str]  # trouble that was survived


def extract(
    path: str,
    spans: Sequence[tuple[Fraction, Fraction]],
    shifts: Sequence[Fraction],
    beat: Callable[[], None] = lambda: None,
) -> Heard:
    """The sound of each span.

    Args:
        path: a local file; nothing else is opened.
        spans: start and end of each clip, in seconds on the pictures' clock.
        shifts: seconds added to the pictures' stamps from each restart of their clock on, in order; those of
            the sound must start again just as often to be matched with them.
        beat: called at every packet.

    Nothing is raised for sound that cannot be read or decoded: it is silent, and a warning says so; a span
    without any is None.
    """
    import av

    try:
        with av.open("file:" + path, options=OPEN, metadata_errors="replace") as container:
            if not container.streams.audio:
                return Heard([None] * len(spans), [])
            track = _Track(container.streams.audio[0], shifts)
            for packet in _packets(container, track):
                beat()
                track.stamps.append(packet.dts if packet.pts is None else packet.pts)
                track.step = track.step or packet.duration or 0
        if not track.stamps:
            return Heard([None] * len(spans), ["no sound: the sound track is empty"])
        track.settle()
        with av.open("file:" + path, options=OPEN, metadata_errors="replace") as container:
            return _filled(container, track, spans, beat)
    except av.error.FFmpegError as e:
        return Heard([None] * len(spans), [f"no sound: {str(e.strerror).lower()}"])


class _Track:
    """A sound track's packets on the pictures' clock."""

    def __init__(self, stream: Any, shifts: Sequence[Fraction]):
        self.index, self.time_base, self.shifts = stream.index, stream.time_base, list(shifts)
        self.stamps: list[int | None] = []
        self.step = 0
        self.warnings: list[str] = []

    def settle(self) -> None:
        """From the packets' stamps to their times, in ticks on the pictures' clock; `until`: those that have one."""
        line = timeline(self.stamps, self.step or 1, max(1, round(1 / self.time_base)))
        self.times, self.until = line.pts.copy(), len(line.pts)
        moved = [0, *line.restarts[:, 1].tolist()]
        falls = [int(r[0]) for r, before in zip(line.restarts, moved, strict=False) if r[1] != before]
        if line.repaired:
            n = len(self.stamps)
            self.warnings.append(f"{line.repaired} of {n} timestamps of the sound were made up")
        for start, shift, _ in line.restarts.tolist():  # back to the track's own clock
            end = next((s for s, *_ in line.restarts.tolist() if s > start), len(self.times))
            self.times[start:end] -= shift
        if falls and len(falls) == len(self.shifts):
            for k, shift in enumerate(self.shifts):
                end = falls[k + 1] if k + 1 < len(falls) else len(self.times)
                self.times[falls[k] : end] += round(shift / self.time_base)
        elif self.shifts:
            self.until = falls[0] if falls else self.until
            self.warnings.append("the sound's clock does not start again where the pictures' does")
        elif falls:
            more = f" and {len(falls) - 1} more times" if len(falls) > 1 else ""
            self.warnings.append(
                f"the sound's clock falls back at {float(self.times[falls[0]] * self.time_base):.3f} s{more}"
            )


def _packets(container: Any, track: _Track) -> Iterator[Any]:
    """The track's packets that hold something, as far as the file can be read."""
    from av.error import FFmpegError

    packets = container.demux(container.streams[track.index])
    while True:
        try:
            packet = next(packets, None)
        except FFmpegError as e:
            track.warnings.append(f"the sound ends early: {str(e.strerror).lower()}")
            return
        if packet is None:
            return
        if packet.size:
            yield packet


def _filled(
    container: Any, track: _Track, spans: Sequence[tuple[Fraction, Fraction]], beat: Callable[[], None]
) -> Heard:
    """Decode the track once, from its beginning to the last span's end, and encode each span when it is over."""
    found: list[bytes | None] = [None] * len(spans)
    waiting = sorted(range(len(spans)), key=lambda i: spans[i])
    last = max(end for _, end in spans)
    open_: dict[int, Stretch] = {}
    decoder = _Decoder(container.streams[track.index], track)
    heard_to: Fraction | None = None
    for time, sound in decoder.sounds(container, beat):
        rate = decoder.rate
        if heard_to is not None and abs(time - heard_to) <= SLACK_S:
            time = heard_to
        if heard_to is not None and time < heard_to:  # the first keeps its time
            late = round((heard_to - time) * rate)
            sound, time = sound[:, late:], heard_to
        heard_to = time + Fraction(sound.shape[1], rate)
        while waiting and spans[waiting[0]][0] < heard_to:
            start, end = spans[waiting[0]]
            silence = np.zeros((decoder.channels, max(1, round((end - start) * rate))), np.float32)
            open_[waiting.pop(0)] = Stretch(start, silence)
        for i, stretch in list(open_.items()):
            stretch.put(round((time - stretch.start) * rate), sound)
            if spans[i][1] <= time:
                found[i] = decoder.encoded(open_.pop(i))
        if time > last:
            break
    for i, stretch in open_.items():
        found[i] = decoder.encoded(stretch)
    return Heard(found, track.warnings + decoder.warnings())


class _Decoder:
    """Sound of one rate and layout, with its time on the pictures' clock."""

    def __init__(self, stream: Any, track: _Track):
        self.stream, self.track = stream, track
        self.rate = self.channels = 0
        self.layout = ""
        self.refused: list[str] = []

    def sounds(self, container: Any, beat: Callable[[], None]) -> Iterator[tuple[Fraction, np.ndarray]]:
        """Time in seconds and samples float32 [channels, n], in the decoder's order."""
        from av import AudioResampler
        from av.error import EOFError, FFmpegError

        decoder, resampler, shape = self.stream.codec_context, AudioResampler(), None
        if decoder is None:
            self.track.warnings.append("no sound: no decoder for it")
            return
        heard_to = Fraction(0)
        for n, packet in enumerate(chain(_packets(container, self.track), [None])):
            beat()
            if n >= self.track.until:
                packet = None
            if packet is not None:
                packet.pts = int(self.track.times[n])
            try:
                frames = decoder.decode(packet)
            except EOFError:
                return
            except FFmpegError as e:
                self.refused.append(str(e.strerror).lower())
                continue
            for frame in frames:
                if not self.rate:
                    self.rate = frame.sample_rate if frame.sample_rate in RATES else 48000
                    self.layout = frame.layout.name if frame.layout.name in LAYOUTS else "stereo"
                time = heard_to if frame.pts is None else frame.pts * self.track.time_base
                if shape != (frame.format.name, frame.layout.name, frame.sample_rate):
                    shape = (frame.format.name, frame.layout.name, frame.sample_rate)
                    resampler = AudioResampler("fltp", self.layout, self.rate)
                frame.pts = None
                for done in resampler.resample(frame):
                    sound = done.to_ndarray()
                    self.channels = len(sound)
                    heard_to = time + Fraction(sound.shape[1], self.rate)
                    yield time, sound
                    time = heard_to
            if packet is None:
                return

    def encoded(self, stretch: Stretch) -> bytes | None:
        """An mp4 with an AAC track; None where the source has no sound in that stretch."""
        import av

        if not stretch.heard:
            return None
        out = io.BytesIO()
        with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as mp4:
            stream: Any = mp4.add_stream(
                "aac", rate=self.rate, layout=self.layout, options={"flags": "+bitexact"}
            )
            stream.bit_rate = BIT_RATE
            for at in range(0, stretch.samples.shape[1], 1024):
                samples = np.ascontiguousarray(stretch.samples[:, at : at + 1024])
                frame = av.AudioFrame.from_ndarray(samples, "fltp", self.layout)
                frame.sample_rate, frame.pts, frame.time_base = self.rate, at, Fraction(1, self.rate)
                mp4.mux(stream.encode(frame))
            mp4.mux(stream.encode())
        return out.getvalue()

    def warnings(self) -> list[str]:
        if not self.refused:
            return []
        n = len(self.refused)
        return [f"{n} packets of the sound could not be decoded and are silent ({self.refused[0]})"]
