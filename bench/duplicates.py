"""Near-duplicates: what is wrongly called one, what is found, and how long the search takes.

    python -m bench.duplicates FOLDER [--clips 100000]

FOLDER holds clips of different videos (the shared Panda-70M clips). Each is seen through the mill's own
decoding, event embedding and signature; every sixth is also copied in several ways. A pair counts by the
recipe's default limits. The search is timed on vectors spread like the embeddings of FOLDER.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import tempfile
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from pipeline.decide.duplicates import near_duplicates
from pipeline.recipe import Decode, Duplicates
from pipeline.record import Source, Video
from pipeline.score.signature import grey, moments, signature
from pipeline.split.decode import DecodeStage
from pipeline.split.events import end_samples

EDITS = {
    "re-encoded, CRF 34": "-crf 34",
    "half the size": "-vf scale=trunc(iw/4)*2:trunc(ih/4)*2",
    "cropped 5 %": "-vf crop=trunc(iw*0.475)*2:trunc(ih*0.475)*2",
    "brighter": "-vf eq=brightness=0.08:contrast=1.1",
    "with a logo": "-vf drawbox=x=iw*0.8:y=ih*0.05:w=iw*0.15:h=ih*0.12:color=white:t=fill",
    "begun 0.5 s later": "-ss 0.5",
    "begun 1 s later": "-ss 1",
    "black bars of 10 %": "-vf pad=iw:trunc(ih*0.6)*2:0:trunc(ih*0.05)*2",
}


class Eye:
    """(embedding, signature) of stretches of a video, as the stages make them."""

    def __init__(self) -> None:
        import torch

        from models.curation.embed import EfficientNetLite0

        torch.set_num_threads(1)
        self.decode, self.embedder = DecodeStage(Decode()), EfficientNetLite0()
        self.decode.setup()

    def look(self, path: str, *stretches: tuple[float, float]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each (begin, end), as fractions of the frames."""
        import cv2

        video = Video(Source(path, Path(path).name), "bench")
        self.decode([video])
        if video.error or video.frames is None:
            raise SystemExit(f"{path}: {video.error}")
        found = []
        for begin, end in stretches:
            n = len(video.frames.pts)
            clip = video.clip(int(begin * n), int(end * n))
            ends = end_samples(video.frames, clip.start_frame, clip.end_frame, 0.05)
            assert ends is not None, f"{path} is too short"
            jpegs = [np.frombuffer(video.frames.samples[i].jpeg, np.uint8) for i in ends]
            images = [cv2.cvtColor(cv2.imdecode(j, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) for j in jpegs]
            mean = self.embedder.embed(images).sum(0)
            layout = signature([grey(s) for s in moments(video, clip)])
            found.append((mean / np.linalg.norm(mean), layout))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--clips", type=int, default=100_000, help="clips of the timed search (default: 100000)"
    )
    args = parser.parse_args()
    files, limits, eye = sorted(args.folder.glob("*.mp4")), Duplicates(), Eye()

    def copies(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> bool:
        return bool(a[0] @ b[0] >= limits.across and a[1] @ b[1] >= limits.signature)

    whole, halves = [], []
    for path in files:
        seen = eye.look(str(path), (0, 1), (0, 0.5), (0.5, 1))
        whole.append(seen[0])
        halves.append((seen[1], seen[2]))
    pairs = list(itertools.combinations(whole, 2))
    print(f"{len(whole)} clips of different videos; largest cosine {max(a[0] @ b[0] for a, b in pairs):.3f}")
    print(f"  called copies: {sum(copies(a, b) for a, b in pairs)} of {len(pairs)} pairs")
    alone = sum(a[0] @ b[0] >= limits.across for a, b in halves)
    both, within = sum(copies(a, b) for a, b in halves), sum(a[0] @ b[0] >= limits.within for a, b in halves)
    print(f"two halves of one clip: the embedding alone would call {alone} of {len(halves)} copies, "
          f"with the signature {both}; redundant within a source {within}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, options in EDITS.items():
            found, of = 0, range(0, len(files), 6)
            for i in of:
                copy = f"{folder}/copy.mp4"
                ffmpeg = [
                    imageio_ffmpeg.get_ffmpeg_exe(),
                    "-v",
                    "error",
                    "-y",
                    "-threads",
                    "1",
                    "-i",
                    str(files[i]),
                ]
                encode = ["-an", *options.split(), "-c:v", "libx264", "-preset", "veryfast", "-threads", "1"]
                subprocess.run([*ffmpeg, *encode, copy], check=True)
                found += copies(whole[i], eye.look(copy, (0, 1))[0])
            print(f"  {name:22} {found:3} of {len(of)} found")

    rng = np.random.default_rng(0)
    base = np.stack([w[0] for w in whole])
    centred = base - base.mean(0)
    mix = rng.normal(size=(args.clips, len(base))).astype(np.float32) / len(base) ** 0.5
    x = base.mean(0) + mix @ centred + 0.25 * centred.std() * rng.normal(size=(args.clips, base.shape[1]))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    start, cpu = time.perf_counter(), time.process_time()
    near_duplicates([x], np.arange(args.clips) // 3, [limits.within], [limits.across])
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"search of {args.clips:,} clips, {x.shape[1]} numbers each: {wall:.0f} s, {cpu:.0f} CPU-s")


if __name__ == "__main__":
    main()
