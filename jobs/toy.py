"""clipmill toy: raw videos of a small world whose truth is known, to try trainers on."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.toy.world import Scene

EPILOG = """
One to three circles, squares or triangles of one colour move over black or white, scene after scene, with
hard cuts between. DIR/videos has the raw videos, DIR/truth.jsonl a line a scene: what is in it, its frames
and where every object is in each, DIR/held_out.txt the captions that no scene has: combinations of attributes
of which any two are shown together. The rest is the mill's own work:

  clipmill toy --out toy/
  clipmill curate toy/videos --recipe toy --out toy/run
  clipmill encode toy/run --recipe toy --copies 3 --out toy/latents
  clipmill train diffusion toy/run --recipe toy --set data.cache=toy/latents --out toy/model
  clipmill judge toy/model --held-out toy/held_out.txt

What a model has put together itself is seen on the combinations that are held out: --only-held-out shows these alone.
With --questions, DIR/questions has every scene as a video of its own (scenes/), conversations about each to learn from,
answered in a word (chat.jsonl) or by the letter of an option (letters.jsonl), and five multiple-choice questions about
each to be asked (choices.json):

  clipmill toy --out toy/ --questions
  clipmill toy --out held_out/ --only-held-out --videos 20 --questions

The same options give the same pictures.
"""

HELD_OUT = "held_out.txt"
QUESTIONS = "questions"
COMBINATIONS = 450  # of count, colour, shape, direction and background


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill toy",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--videos", type=int, default=200, metavar="N", help="how many (default: 200)")
    parser.add_argument("--scenes", type=int, default=10, metavar="N", help="of each video (default: 10)")
    parser.add_argument(
        "--size", type=int, default=64, metavar="N", help="height and width, even, pixels (default: 64)"
    )
    parser.add_argument("--fps", type=int, default=8, metavar="N", help="frames a second (default: 8)")
    parser.add_argument(
        "--pan",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the scenes in which the camera moves (default: 0)",
    )
    parser.add_argument(
        "--hold-out",
        type=float,
        default=0.15,
        metavar="X",
        help="share of the combinations of count, colour, shape, direction and background that no scene has, to judge "
        "by them what a model has put together itself (default: 0.15)",
    )
    parser.add_argument(
        "--only-held-out",
        action="store_true",
        help="show the combinations that --hold-out holds out of other worlds, and no other",
    )
    parser.add_argument(
        "--questions",
        action="store_true",
        help="every scene as a video of its own, with a conversation and multiple-choice questions about it",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    if wrong := complaint(args):
        print(f"clipmill toy: {wrong}", file=sys.stderr)
        return 2

    from pipeline.io.ffmpeg import FFmpegError

    try:
        scenes, held_out = make(args)
    except (FFmpegError, OSError) as e:
        print(f"clipmill toy: {e}", file=sys.stderr)
        return 2
    print(
        f"{args.videos} videos of {scenes} scenes in {args.out / 'videos'}, the truth in {args.out / 'truth.jsonl'}"
    )
    if args.only_held_out:
        print(f"of {held_out} combinations of attributes that are held out of other worlds, and of no other")
    elif held_out:
        print(f"{held_out} of {COMBINATIONS} combinations of attributes are in none: {args.out / HELD_OUT}")
    if args.questions:
        print(f"conversations and multiple-choice questions about every scene in {args.out / QUESTIONS}")
    print(f"next: clipmill curate {args.out / 'videos'} --recipe toy --out {args.out / 'run'}")
    return 0


def complaint(args: argparse.Namespace) -> str:
    """What is wrong with the options, in one sentence; '' if nothing."""
    from jobs.videos import taken
    from pipeline.toy.world import held_out

    for name, least in (("videos", 1), ("scenes", 1), ("fps", 1), ("seed", 0)):
        if (value := getattr(args, name)) < least:
            return f"--{name} {value}: give {least} or more"
    if args.size < 32 or args.size % 2:
        return f"--size {args.size}: give an even number of pixels, 32 or more"
    if not 0 <= args.pan <= 1:
        return f"--pan {args.pan:g}: give a share from 0 to 1"
    if not 0 <= args.hold_out <= 0.5:
        return f"--hold-out {args.hold_out:g}: give a share from 0 to 0.5"
    if args.hold_out > 0 and not held_out(args.hold_out):
        return (
            f"--hold-out {args.hold_out:g}: that is none of the {COMBINATIONS} combinations; give 1/{COMBINATIONS} or "
            "more, 0.003 say, or 0"
        )
    if args.only_held_out and not shows_both(args.hold_out):
        return f"--only-held-out: a share of {args.hold_out:g} holds out too few to show; give --hold-out 0.01 or more"
    if taken(args.out):
        return f"--out {args.out}: it is there already; give a new or empty folder"
    return ""


def shows_both(share: float) -> bool:
    """Whether what is held out has both backgrounds, which scenes of a video show in turn."""
    from pipeline.toy.world import BACKGROUNDS, held_out

    return {a.background for a in held_out(share)} == set(BACKGROUNDS)


def make(args: argparse.Namespace) -> tuple[int, int]:
    """Write the folder; returns the numbers of scenes and of combinations that are held out.

    A video depends on the seed, its own number and what is held out alone. Raises FFmpegError and OSError.
    """
    import numpy as np

    from jobs.videos import write_mp4
    from pipeline.toy import world as toy_world
    from pipeline.toy.questions import choices, conversation

    out, size = args.out, args.size
    without = toy_world.held_out(args.hold_out)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    if without:
        (out / HELD_OUT).write_text(
            "".join(f"{caption}\n" for caption in sorted(a.caption() for a in without))
        )
    if args.questions:
        (out / QUESTIONS / "scenes").mkdir(parents=True)
    lines, asked = [], []
    talks: dict[str, list[dict[str, Any]]] = {"chat": [], "letters": []}
    for number in range(args.videos):
        rng = np.random.default_rng([args.seed, number])
        if args.only_held_out:
            told = toy_world.story(rng, args.scenes, args.pan, within=without)
        else:
            told = toy_world.story(rng, args.scenes, args.pan, without)
        name = f"{number:05}.mp4"
        pictures = [toy_world.render(s, size) for s in told]
        write_mp4(out / "videos" / name, np.concatenate(pictures), args.fps, crf=12)
        for scene, (start, end) in zip(told, toy_world.cuts(told), strict=True):
            lines.append(truth(name, scene, start, end, size))
        if args.questions:
            for i, scene in enumerate(told):
                shown = f"scenes/{number:05}-{i:03}.mp4"
                write_mp4(out / QUESTIONS / shown, pictures[i], args.fps, crf=12)
                drawn = np.random.default_rng([args.seed, number, i, 1])
                for form, by_letter in (("chat", False), ("letters", True)):
                    talk = conversation(drawn, scene.attributes, by_letter)
                    talks[form].append({"messages": talk, "video": shown})
                for question in choices(drawn, scene.attributes):
                    asked.append({"id": f"{number:05}-{i:03}-{question['kind']}", "video": shown} | question)
    if args.questions:
        for form, told_of in talks.items():
            lines_of = "".join(json.dumps(talk) + "\n" for talk in told_of)
            (out / QUESTIONS / f"{form}.jsonl").write_text(lines_of)
        (out / QUESTIONS / "choices.json").write_text(json.dumps(asked, indent=0) + "\n")
    (out / "truth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return len(lines), len(without)


def truth(name: str, scene: Scene, start: int, end: int, size: int) -> dict[str, Any]:
    """A line of truth.jsonl: frames are [start, end) of the video, lengths in pixels, positions [T][objects][2].

    Pixel (0, 0) has its centre at position (0, 0), so a picture reaches from −½ to size − ½.
    """
    return {
        "video": name,
        "start_frame": start,
        "end_frame": end,
        "caption": scene.attributes.caption(),
        **vars(scene.attributes),
        "velocity": [round(v * size, 4) for v in scene.velocity],
        "pan_velocity": round(scene.pan * size, 4),
        "positions": (scene.positions() * size - 0.5).round(3).tolist(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
