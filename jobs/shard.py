"""clipmill shard: decide again on a finished run and re-pack its clips, without any model."""

from __future__ import annotations

import argparse
import shlex
import sys

EPILOG = """
DIR is the output of 'clipmill curate'. What it measured stays; thresholds are applied anew and the kept
clips are copied into new shards. Only the recipe's 'decide' and 'shards' sections are used.

examples
  clipmill shard run/ --set decide.rules.too_short.min=3
  clipmill shard run/ --set 'decide.rules.still={column: score_motion, min: 0.05}'
  clipmill shard run/ --set decide.duplicates.across=0.9 --set shards.max_clips=500
  clipmill shard run/ --recipe my_thresholds.yaml

A rule keeps a clip while min ≤ column ≤ max; any number column of DIR/clips/ can be used, and
caption.consensus or another score of the chosen caption. What is used is remembered in DIR/run.json.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill shard",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", metavar="DIR", help="a finished run: a folder, s3:// or gs://")
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="take the thresholds from here (default: those DIR was last packed with)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of decide or shards",
    )
    args = parser.parse_args(argv)

    from pipeline.decide.rules import funnel
    from pipeline.faults import StoreError
    from pipeline.io.store import Store
    from pipeline.recipe import RecipeError, load, parse
    from pipeline.shards.pack import read_run, shard

    try:
        for item in args.set:
            if not item.startswith(("decide.", "shards.")):
                raise RecipeError(
                    f"--set {item}: only decide.* and shards.* can be changed on a finished run; "
                    f"for the rest run clipmill curate into a new folder"
                )
        store = Store(args.dir)
        saved = read_run(store)["recipe"]
        recipe = parse(saved, [] if args.recipe else args.set, f"{args.dir}/run.json")
        if args.recipe:
            other = load(args.recipe, args.set)
            recipe = recipe.model_copy(update={"decide": other.decide, "shards": other.shards})
        with store.lock():
            decisions = shard(store, recipe)
    except (RecipeError, StoreError) as e:
        print(f"clipmill shard: {e}", file=sys.stderr)
        return 2

    kept = sum(decisions["keep"].to_pylist())
    print(f"{'rule':24} {'fail it':>9} {'dropped':>9} {'left':>9}")
    print(f"{'(measured)':24} {'':>9} {'':>9} {len(decisions):>9,}")
    for line in funnel(decisions):
        print(f"{line.rule:24} {line.alone:>9,} {line.in_order:>9,} {line.left:>9,}")
    tars = len(set(decisions["shard"].drop_null().to_pylist()))
    print(f"{kept:,} clips in {tars:,} tars: {store.path('shards')}")
    print(f"look at them: clipmill report {shlex.quote(args.dir)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
