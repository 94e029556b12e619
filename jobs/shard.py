"""clipmill shard: decide again on a finished run and re-pack its clips, without any model."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.io.store import Store

CHOICE = ("method", "order", "weights", "avoid")  # keys of choose that need nothing measured

EPILOG = """
DIR is the output of 'clipmill curate'. What it measured stays; thresholds are applied anew and the kept
clips are copied into new shards. Only the recipe's 'decide' and 'shards' sections are used, and which
caption is chosen ('choose.method', 'choose.order', 'choose.weights', 'choose.avoid').

examples
  clipmill shard run/ --set decide.rules.too_short.min=3
  clipmill shard run/ --set 'decide.rules.still={column: score_motion, min: 0.05}' --dry-run
  clipmill shard run/ --set 'decide.rules.sea={column: caption, contains: [sea, wave], excludes: cartoon}'
  clipmill shard run/ --set 'decide.rules.seen={column: meta.views, min: 1000}'
  clipmill shard run/ --set decide.rules.blurred=null
  clipmill shard run/ --set 'choose={method: order, order: [Qwen/Qwen2.5-VL-7B-Instruct, tags-baseline]}'
  clipmill shard run/ --set decide.duplicates.across=0.9 --set shards.max_clips=500
  clipmill shard run/ --recipe my_thresholds.yaml --out run-strict/

A rule keeps a clip while min ≤ column ≤ max, or while a text contains, excludes, matches or does not match what
is asked; see 'clipmill recipe explain decide.rules'. What is used is remembered in DIR/run.json, or with --out
there: the run and its own shards stay as they are.

exit status: 0 done; 2 the command, the recipe or DIR is wrong; 4 the clips to copy (DIR/media) are gone
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
        help="override one key of decide, shards or choose",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be kept, write nothing")
    parser.add_argument(
        "--out", metavar="OUT", help="put this set of shards into a folder of its own, beside those of DIR"
    )
    typed = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(typed)

    from pipeline.decide.rules import decide
    from pipeline.faults import StoreError, counted
    from pipeline.io.store import Store, below
    from pipeline.recipe import RecipeError, load, parse
    from pipeline.run.log import TOLD, log, logging_to
    from pipeline.shards import media
    from pipeline.shards.pack import read_run, shard

    try:
        for item in args.set:
            check_later(item)
        store = Store(args.dir)
        saved = read_run(store)["recipe"]
        measured = parse(saved, [], below(args.dir, "run.json"))
        recipe = parse(saved, [] if args.recipe else args.set, below(args.dir, "run.json"))
        if args.recipe:
            other = load(args.recipe, args.set)
            recipe = recipe.model_copy(
                update={name: getattr(other, name) for name in ("decide", "shards", "choose")}
            )
        ours = {name: getattr(recipe.choose, name) for name in CHOICE}
        recipe = recipe.model_copy(update={"choose": measured.choose.model_copy(update=ours)})
        media.check(store)
        if args.dry_run:
            decisions = decide(store, recipe).decisions
            kept = tell(decisions)
            print(f"{counted(kept, 'clip')} would be kept{compared(store, decisions)}; nothing was written")
            return 0
        out = Store(args.out) if args.out else store
        with out.lock():
            decisions = shard(store, recipe, out if args.out else None)
            tars = len(set(decisions["shard"].drop_null().to_pylist()))
            packed = f"{counted(sum(decisions['keep'].to_pylist()), 'clip')} in {counted(tars, 'tar')}"
            with logging_to(out):
                done = f"clipmill shard {shlex.join(typed)}: {packed} of {len(decisions):,} measured"
                log.info("%s", done, extra=TOLD)
    except (RecipeError, StoreError) as e:
        print(f"clipmill shard: {e}", file=sys.stderr)
        return 4 if isinstance(e, media.MediaGone) else 2

    tell(decisions)
    print(f"{packed}: {out.path('shards')}")
    print(f"look at them: clipmill report {shlex.quote(args.out or args.dir)}")
    return 0


def check_later(item: str) -> None:
    """Raises RecipeError for a setting that is about more than what was measured."""
    from pipeline.recipe import RecipeError
    from pipeline.recipe_file import dotted, split_setting

    keys, value = split_setting(item)
    if keys[0] in ("decide", "shards") or (keys[0] == "choose" and keys[1:2] in ([k] for k in CHOICE)):
        return
    if keys == ["choose"] and not any(
        word in value for word in ("judges:", "model:", "pretrained:", "frames:", "clip_score:")
    ):
        return
    raise RecipeError(
        f"--set {dotted(keys)}: only decide.*, shards.* and choose.{'|'.join(CHOICE)} can be changed on a "
        "finished run; captioners and judges are added by clipmill caption, for the rest curate into a new folder"
    )


def tell(decisions: pa.Table) -> int:
    """Print the funnel, and whose captions the kept clips have; returns how many are kept."""
    from collections import Counter

    from pipeline.decide.rules import funnel

    print(f"{'rule':24} {'fail it':>9} {'dropped':>9} {'left':>9}")
    print(f"{'(measured)':24} {'':>9} {'':>9} {len(decisions):>9,}")
    for line in funnel(decisions):
        print(f"{line.rule:24} {line.alone:>9,} {line.in_order:>9,} {line.left:>9,}")
    kept = decisions.filter(decisions["keep"])
    if whose := Counter(kept["caption_model"].drop_null().to_pylist()).most_common():
        print(f"captions by: {', '.join(f'{model} {n:,}' for model, n in whose)}")
    return len(kept)


def compared(store: Store, decisions: pa.Table) -> str:
    """What would change beside the decisions that are there."""
    if not store.exists("decisions.parquet"):
        return ""
    before = store.read_table("decisions.parquet", ["clip_id", "keep", "caption"])
    kept = [
        {
            c: text
            for c, k, text in zip(*(t[n].to_pylist() for n in ("clip_id", "keep", "caption")), strict=True)
            if k
        }
        for t in (before, decisions)
    ]
    stay = kept[0].keys() & kept[1].keys()
    other = sum(kept[0][c] != kept[1][c] for c in stay)
    return (
        f" ({len(kept[0]):,} are now; {len(kept[0]) - len(stay):,} would go, {len(kept[1]) - len(stay):,} come, "
        f"{other:,} have another caption)"
    )


if __name__ == "__main__":
    raise SystemExit(main())
