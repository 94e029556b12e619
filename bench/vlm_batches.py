"""Vision-language models on many short sources: mixed batches against one source a batch, and what a batch changes.

    python -m bench.vlm_batches [--sources 32] [--rounds 3] [--frames 8]

1. Clips a second of the same captioner with the same batch size, given the sources of a unit together (as the mill
   does) and one by one (as it did), on a Qwen2.5-VL of 17 million random weights, one thread. Rounds alternate; the
   table has medians, of the process' own CPU seconds and by the clock. The captions of both are compared.
2. What a caption owes to the rest of its batch, by family: tiny checkpoints of real classes, the clips of one unit
   captioned in batches of 8 and one by one, in float32 and in bfloat16; prompts are of several lengths, so rows are
   padded.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.caption.captioner import CaptionStage
from pipeline.recipe_captions import TransformersCaptioner
from pipeline.record import Video
from tests.fixtures import tiny_vlm, tiny_vlm_families
from tests.fixtures.clips import noise, video

FAMILIES = {
    "qwen2_5_vl": "video",
    "qwen3_vl": "video",
    "glm4v": "video",
    "internvl": "video",
    "llava_onevision": "video",
    "llava_next_video": "video",
    "video_llava": "video",
    "smolvlm": "video",
    "gemma4": "video",
    "gemma3": "images",
    "blip2": "image",
    "blip2_t5": "image",
    "florence2": "image",
}
SHAPES = [(144, 256), (256, 144), (192, 256)]  # landscape, portrait, 4:3


def sources(n: int, frames: int, seed: int = 0) -> list[Video]:
    """n sources of one to three clips, three shapes in turn, as short sources come."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        height, width = SHAPES[int(rng.choice(3, p=(0.7, 0.2, 0.1)))]
        clips = int(rng.integers(1, 4))
        pictures = [noise(1000 * i + k, height, width) for k in range(clips * frames)]
        bounds = [(k * frames, (k + 1) * frames) for k in range(clips)]
        title = {"title": "A short film " * (i % 5)}  # where context is told, prompts are of several lengths
        found.append(video(pictures, bounds, name=f"{i}.mp4", meta=title))
        for k, clip in enumerate(found[-1].clips):
            clip.clip_id = f"{i * 10 + k:020x}"
    return found


def stage_of(model: Path, **options: object) -> CaptionStage:
    section = TransformersCaptioner(kind="transformers", model=str(model), name="vlm", **options)  # type: ignore[arg-type]
    stage = CaptionStage(section)
    stage.setup()
    return stage


def captions(videos: list[Video]) -> list[str]:
    return [c.captions[0].text for v in videos for c in v.clips]


def mixed(folder: Path, n: int, frames: int, rounds: int) -> None:
    model = tiny_vlm.qwen2_5_vl(folder / "qwen", width=384, layers=8)
    stage = stage_of(model, batch=8, frames=frames, max_new_tokens=24, max_pixels=128 * 128)
    videos = sources(n, frames)
    clips = sum(len(v.clips) for v in videos)
    passes: list[int] = []
    vlm = stage.captioner.model  # type: ignore[attr-defined]
    one_batch = vlm._answers
    vlm._answers = lambda looks: passes.append(len(looks)) or one_batch(looks)

    stage(videos[:2])  # warm
    seconds: dict[str, list[tuple[float, float]]] = {"one source a batch": [], "mixed": []}
    said, counted = {}, {}
    for _ in range(rounds):
        for how, taken in seconds.items():
            passes.clear()
            start = time.process_time(), time.perf_counter()
            if how == "mixed":
                stage(videos)
            else:
                for v in videos:
                    stage([v])
            taken.append((time.process_time() - start[0], time.perf_counter() - start[1]))
            said[how], counted[how] = captions(videos), list(passes)
    medians = {
        how: [statistics.median(of) for of in zip(*taken, strict=True)] for how, taken in seconds.items()
    }
    print(
        f"\n{n} sources, {clips} clips of {frames} frames, batch 8, 24 tokens, "
        f"{tiny_vlm_families.parameters(model) / 1e6:.1f} M parameters, median of {rounds}\n"
    )
    print("| batches | forward passes | clips a pass | clips a CPU second | ratio | clips a second | ratio |")
    print("|---|---|---|---|---|---|---|")
    for how, taken in medians.items():
        by = [
            f"{clips / t:.2f} | {old / t:.2f}"
            for t, old in zip(taken, medians["one source a batch"], strict=True)
        ]
        passed = len(counted[how])
        print(f"| {how} | {passed} | {clips / passed:.1f} | {' | '.join(by)} |", flush=True)
    same = sum(a == b for a, b in zip(*said.values(), strict=True))
    print(f"\nThe same caption either way: {same} of {clips}.")


def independent(folder: Path) -> None:
    import torch

    print(
        "\n| family, input | float32: same captions | largest change of a logit | bfloat16: same captions | … |"
    )
    print("|---|---|---|---|---|")
    for name, input in FAMILIES.items():
        make = getattr(tiny_vlm, name, None) or getattr(tiny_vlm_families, name)
        model = make(folder / name)
        cells = []
        for dtype in ("float32", "bfloat16"):
            words = name != "florence2"  # which reads none
            stage = stage_of(
                model, batch=8, frames=4, max_new_tokens=16, dtype=dtype, input=input, context=words
            )
            videos = sources(24, 4, seed=1)
            stage(videos)
            together = captions(videos)
            stage.captioner.batch = 1
            stage(videos)
            alone = captions(videos)
            cells.append(f"{sum(a == b for a, b in zip(together, alone, strict=True))} of {len(alone)}")

            captioner = stage.captioner
            looks = [
                captioner._look(v, c)  # type: ignore[attr-defined]
                for v in videos
                for c in v.clips
                if captioner.shape(v, c)[1:] == (256, 144)
            ][:8]
            vlm = captioner.model  # type: ignore[attr-defined]
            batch = vlm._first_logits(vlm.inputs(looks))
            singles = torch.cat([vlm._first_logits(vlm.inputs([look])) for look in looks])
            cells.append(f"{float((batch - singles).abs().max() / singles.abs().max()):.0e}")
        print(f"| {name}, {input} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sources", type=int, default=32, help="0: the second table only")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.sources:
            mixed(Path(folder), args.sources, args.frames, args.rounds)
        independent(Path(folder))


if __name__ == "__main__":
    main()
