"""clipmill curate: raw videos in, captioned WebDataset shards out."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

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
"""


def renamed(text: str) -> dict[str, str]:
    """'path=my_col,caption=text' as {'my_col': 'path', 'text': 'caption'}."""
    pairs = [item.split("=", 1) for item in text.split(",")]
    if not all(len(pair) == 2 and all(part.strip() for part in pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as path=my_col,caption=text")
    return {theirs.strip(): ours.strip() for ours, theirs in pairs}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill curate",
        description=__doc__,
        epilog=EPILOG,
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
        "--retry-errors", action="store_true", help="try sources again that ended in an error"
    )
    parser.add_argument(
        "--columns",
        type=renamed,
        default={},
        metavar="NAME=THEIRS,…",
        help="what a list calls its columns, e.g. path=my_col,caption=text (also start, end, url)",
    )
    parser.add_argument(
        "--whole", action="store_true", help="take each video as one clip (--set shots.detector=whole)"
    )
    parser.add_argument(
        "--allow-private", action="store_true", help="let lists name addresses in private networks"
    )
    said = sys.argv[1:] if argv is None else argv
    # a file may be called '-dash.mp4'
    args = parser.parse_args(
        [f"./{a}" if a[:1] == "-" and "." in a and os.path.lexists(a) else a for a in said]
    )
    if args.allow_private:
        os.environ["CLIPMILL_ALLOW_PRIVATE"] = "1"
    if args.whole:
        args.set.append("shots.detector=whole")

    from pipeline import recipe
    from pipeline.faults import StoreError
    from pipeline.run import job as run
    from pipeline.run import needs
    from pipeline.run.worker import RunError
    from pipeline.sources.names import SourceError
    from pipeline.sources.signed import clean

    try:
        chosen = recipe.load(args.recipe, args.set)
        needs.check(chosen, args.out)
        run.curate(
            args.source,
            chosen,
            args.out,
            runner=args.runner,
            address=args.address,
            workers=args.workers,
            retry_errors=args.retry_errors,
            command="clipmill curate " + shlex.join(map(clean, said)),
            columns=args.columns,
        )
    except (recipe.RecipeError, RunError, SourceError, StoreError) as e:
        print(f"clipmill curate: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nclipmill curate: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
