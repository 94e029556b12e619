"""clipmill curate: raw videos in, captioned WebDataset shards out."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys

from jobs.ending import STATUS, Ending

ADDRESS = re.compile(r"auto|local|(ray://)?(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d{1,5}")

EPILOG = """
SOURCE is any mix of
  a video, a folder, a glob ('clips/**/*.mp4'), s3://bucket/prefix, gs://bucket/prefix,
  a .csv .tsv .jsonl .parquet list with a 'path' or 'url' column ('start' and 'end' make a row a clip,
  'caption' is a caption, other columns become metadata), a .txt with one a line,
  Panda-70M's own CSV (its clips, no re-splitting), a WebDataset .tar of videos.

examples
  clipmill curate my_videos/ --recipe embedded --out run/
  clipmill curate list.parquet --recipe panda70m --out s3://bucket/run --address auto
  clipmill curate my_videos/ --out run/ --set shots.detector=content --set cut.crf=23

Run the same command again after any interruption: finished work is kept and skipped.
Afterwards: change thresholds with 'clipmill shard run/', look at run/report.html.

A source is known by its content: moved or renamed, it is not measured again. What has changed, or left the list,
since the last run is told at the start; --redo-changed, --refresh-metadata and --prune act on it.
"""

ENDING = Ending("clipmill curate")


def renamed(text: str) -> dict[str, str]:
    """'path=my_col,caption=text' as {'my_col': 'path', 'text': 'caption'}."""
    pairs = [item.split("=", 1) for item in text.split(",")]
    if not all(len(pair) == 2 and all(part.strip() for part in pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as path=my_col,caption=text")
    from pipeline.sources.columns import mistyped

    for ours, _ in pairs:
        if meant := mistyped(ours.strip()):
            raise argparse.ArgumentTypeError(f"{ours.strip()}: did you mean {meant}?")
    return {theirs.strip(): ours.strip() for ours, theirs in pairs}


def misplaced(args: argparse.Namespace) -> str | None:
    """What is wrong with where the work is to be done."""
    if args.workers is not None and args.workers < 1:
        return f"--workers {args.workers}: at least one worker is needed"
    if args.address is not None and not ADDRESS.fullmatch(args.address):
        return (
            f"--address {args.address}: no address of a Ray cluster; write auto, host:port or ray://host:port"
        )
    return None


def main(argv: list[str] | None = None) -> int:
    return ENDING.of(lambda: curate(argv))


def curate(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill curate",
        description=__doc__,
        epilog=EPILOG + STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", nargs="+", metavar="SOURCE", help="videos, folders, globs, lists, tars (see below)"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="output folder, s3:// or gs://; the place to resume from"
    )
    parser.add_argument(
        "--recipe",
        default="embedded",
        metavar="NAME|FILE",
        help="bundled recipe or a .yaml (default: embedded)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one recipe key, e.g. decode.sample_fps=4",
    )
    parser.add_argument(
        "--address",
        metavar="ADDR",
        help="Ray cluster to run on: auto, host:port or ray://host:port (default: this machine)",
    )
    parser.add_argument(
        "--runner", choices=["ray", "local"], default="ray", help="local: one process, no Ray"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="at most N worker processes a pool")
    parser.add_argument(
        "--retry-errors",
        action="store_true",
        help="try again what failed: sources, and captioners on the clips they failed on (from the clips)",
    )
    parser.add_argument(
        "--redo-changed", action="store_true", help="measure sources again whose bytes have changed"
    )
    parser.add_argument(
        "--refresh-metadata", action="store_true", help="take over metadata that changed in the list"
    )
    parser.add_argument(
        "--prune", action="store_true", help="take sources out that are no longer among SOURCE"
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 3 where a source or a captioner failed"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show what goes into the log file (DIR/run.log)"
    )
    parser.add_argument(
        "--columns",
        type=renamed,
        default={},
        metavar="NAME=THEIRS,…",
        help="what a list calls its columns, e.g. path=my_col,caption=text (also url, start, end, timestamp); any "
        "other NAME renames a column of metadata, e.g. views=view_count",
    )
    parser.add_argument(
        "--whole", action="store_true", help="take each video as one clip (--set shots.detector=whole)"
    )
    parser.add_argument(
        "--allow-private", action="store_true", help="let lists name addresses in private networks"
    )
    typed = sys.argv[1:] if argv is None else argv
    # a file may be called '-dash.mp4'
    args = parser.parse_args(
        [f"./{a}" if a[:1] == "-" and "." in a and os.path.lexists(a) else a for a in typed]
    )
    if args.allow_private:
        os.environ["CLIPMILL_ALLOW_PRIVATE"] = "1"
    if args.whole:
        args.set.append("shots.detector=whole")

    from pipeline import recipe
    from pipeline.run import job as run
    from pipeline.run import needs
    from pipeline.run.outcome import Exit
    from pipeline.sources.signed import clean

    if problem := misplaced(args):
        return ENDING.sorry(problem, Exit.BAD_INPUT)

    def work() -> int:
        chosen = recipe.load(args.recipe, args.set)
        needs.check(chosen, args.out)
        found = run.curate(
            args.source,
            chosen,
            args.out,
            run.Job(
                runner=args.runner,
                address=args.address,
                workers=args.workers,
                retry_errors=args.retry_errors,
                redo_changed=args.redo_changed,
                refresh_metadata=args.refresh_metadata,
                prune=args.prune,
                asked=args.set,
                command="clipmill curate " + shlex.join(map(clean, typed)),
                verbose=args.verbose,
                columns=args.columns,
            ),
        )
        return found.exit(args.strict)

    return ENDING.of_work(work)


if __name__ == "__main__":
    from jobs.cli import leave

    leave(main)
