"""clipmill caption: add captioners and judges to a finished run, from its own clips."""

from __future__ import annotations

import argparse
import shlex
import sys

from jobs.curate import misplaced
from jobs.ending import STATUS, Ending

EPILOG = """
DIR is the output of 'clipmill curate'. Captioners and judges that the recipe names and the run lacks see the frames
that the first ones saw, kept beside each clip; no source is read, and what is there is not touched. What they say
lies in DIR/layers, one folder each, and counts wherever clips are looked at: shards, report, inspector. Interrupted,
the same command goes on. Without --recipe and --set captions=… it is what the run and its layers have already: for
clips that came later, and with --retry-errors for what failed.

examples
  clipmill caption run/ --set 'captions=[{kind: transformers, model: Qwen/Qwen2.5-VL-7B-Instruct}]'
  clipmill caption run/ --recipe teachers.yaml --set choose.method=clip_score
  clipmill caption run/ --recipe teachers.yaml --retry-errors
  clipmill caption run/
  clipmill caption run/ --list
  clipmill caption run/ --remove caption:Qwen/Qwen2.5-VL-7B-Instruct

--set choose.*, decide.* and shards.* take effect as with 'clipmill shard'.
"""

ENDING = Ending("clipmill caption")


def main(argv: list[str] | None = None) -> int:
    return ENDING.of(lambda: caption(argv))


def caption(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill caption",
        description=__doc__,
        epilog=EPILOG + STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", metavar="DIR", help="a finished run: a folder, s3:// or gs://")
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="what to add (default: what the run and its layers have, with --set)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one recipe key"
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="also the clips on which a captioner failed"
    )
    parser.add_argument("--list", action="store_true", help="say which layers there are")
    parser.add_argument("--remove", metavar="LAYER", help="delete a layer")
    parser.add_argument("--address", metavar="ADDR", help="Ray cluster to run on, as for curate")
    parser.add_argument(
        "--runner", choices=["ray", "local"], default="ray", help="local: one process, no Ray"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="at most N worker processes a pool")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what goes into the log file")
    typed = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(typed)

    from pipeline import layers, recipe
    from pipeline.faults import StoreError, counted
    from pipeline.io.store import Store
    from pipeline.run import job as run
    from pipeline.run import layering
    from pipeline.run.outcome import Exit
    from pipeline.shards.pack import read_run
    from pipeline.sources.signed import clean

    if problem := misplaced(args):
        return ENDING.sorry(problem, Exit.BAD_INPUT)

    def work() -> int:
        store = Store(args.dir)
        try:
            read_run(store)
        except StoreError as e:
            return ENDING.sorry(e, Exit.BAD_INPUT)
        if args.list:
            lacks = layers.Layered(store).behind()
            for layer in layers.layers(store):
                what = f"lacks {counted(lacks[layer.name], 'clip')}" if layer.name in lacks else ""
                if layer.name == layers.CONSENSUS:
                    what = "how far all captions agree; kept in line with them"
                print(f"{layer.name:40} {layer.made}  {what}".rstrip())
            print(f"of the run itself: {', '.join(layers.own(store)) or 'no captioner'}")
            return Exit.OK
        if args.remove:
            with store.lock():
                layers.remove(store, args.remove)
                layering.agree(store)
            print(f"removed {args.remove}; new shards without it: clipmill shard {shlex.quote(args.dir)}")
            return Exit.OK
        found = run.caption(
            args.dir,
            recipe.load(args.recipe, args.set) if args.recipe else None,
            run.Job(
                runner=args.runner,
                address=args.address,
                workers=args.workers,
                retry_errors=args.retry_errors,
                asked=args.set,
                command="clipmill caption " + shlex.join(map(clean, typed)),
                verbose=args.verbose,
            ),
        )
        return found.exit(False)

    return ENDING.of_work(work)


if __name__ == "__main__":
    from jobs.cli import leave

    leave(main)
