"""clipmill captions: what a run's captioners did, how good and how dear they are, and which of them to keep."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

EPILOG = """
DIR is the output of 'clipmill curate'; layers of 'clipmill caption' count. Nothing is loaded but the captions.

  picked      clips whose caption the recipe's 'choose' takes from it
  scores      mean over its captions and a 95 % interval that takes the clips of one source together
  same        captions of the sample that repeat another word for word
  keep        greedy set cover, Panda-70M's own method: a captioner covers a clip where its caption reaches a score
              (--cover visual_fit:0.2; without a number the median of the clips' best), or where somebody in
              'clipmill inspect' called it the best (--cover votes); the next kept is that which adds most clips

examples
  clipmill captions run/
  clipmill captions run/ --set choose.method=visual_fit
  clipmill captions run/ --reference meta.caption --json captions.json
  clipmill captions run/ --cover votes --keep 8
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill captions",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", metavar="DIR", help="a run: a folder, s3:// or gs://")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="choose.* of the recipe"
    )
    parser.add_argument(
        "--reference",
        metavar="WHAT",
        help="score against a captioner ('given') or a column of the list (meta.KEY)",
    )
    parser.add_argument("--cover", metavar="SCORE[:MIN]|votes", help="when a captioner covers a clip")
    parser.add_argument("--keep", type=whole, metavar="K", help="show the first K of the set cover")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all of it as JSON; -: to the terminal")
    args = parser.parse_args(argv)

    from pipeline import recipe
    from pipeline.faults import StoreError
    from pipeline.io.store import Store, below
    from pipeline.layers import Layered
    from pipeline.report.captioners import VOTES, Captioners
    from pipeline.shards.pack import read_run

    try:
        store = Store(args.dir)
        chosen = recipe.parse(read_run(store)["recipe"], args.set, below(args.dir, "run.json"))
        cover, least = covered_by(args.cover)
        votes = voted(store) if cover == VOTES else None
        found = Captioners(Layered(store), chosen.choose, args.reference, cover, least, votes).told()
        if args.json:
            text = json.dumps(found, indent=1, ensure_ascii=False)
            if str(args.json) == "-":
                print(text)
                return 0
            args.json.write_text(text + "\n", encoding="utf-8")
    except (recipe.RecipeError, StoreError, ValueError, OSError) as e:
        print(f"clipmill captions: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    print("\n\n".join(tables(found, args.keep)))
    return 0


def whole(text: str) -> int:
    """A number from 1 on. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def covered_by(text: str | None) -> tuple[str | None, float | None]:
    """'visual_fit:0.2' → ('visual_fit', 0.2). Raises ValueError."""
    score, colon, least = (text or "").rpartition(":")
    if not colon:
        return text, None
    try:
        return score, float(least)
    except ValueError:
        raise ValueError(f"--cover {text}: {least!r} is no number; give SCORE or SCORE:MIN") from None


def voted(store: Any) -> dict[str, list[str]]:
    """Of each clip that people voted on, the models they called best. Raises ValueError where nobody did."""
    from pipeline.inspector.votes import Votes

    votes = Votes(store)
    found = {}
    for clip in votes.clips():
        tally = votes.tally(clip)
        if tally["best"] or tally["bad"] or tally["edit"]:
            found[clip] = list(tally["best"])
    if not found:
        raise ValueError(
            f"--cover votes: nobody has voted on captions yet; do it with: clipmill inspect {store.uri}"
        )
    return found


def tables(found: dict[str, Any], keep: int | None = None) -> list[str]:
    """What is printed: a table each for captioners, their words, flags, references, agreement and the set cover."""
    models, n = found["models"], found["clips"]
    names = [m["model"] for m in models]
    scores = sorted({s for m in models for s in m["scores"]})
    blocks = [f"{n} clips, chosen by {found['chosen_by']}"]
    rows = []
    for m in models:
        row = [
            m["model"],
            share(m["pick_rate"]),
            share(m["words"]["clips"] / n),
            share(m["outcomes"].get("error", 0) / n),
        ]
        row += [interval(m["scores"].get(s)) for s in scores]
        rows.append([*row, number(m["seconds_a_clip"], 3), tokens(m["cost"], n)])
    blocks.append(aligned(["captioner", "picked", "says", "errors", *scores, "s/clip", "cost"], rows))
    rows = []
    for m in models:
        various = [str(m["vocabulary"]), number(m["distinct_2"]), number(m["self_bleu"]), share(m["same"])]
        rows.append([m["model"], interval(m["words"], 1), *various])
    blocks.append(aligned(["words", "length", "vocabulary", "distinct-2", "self-BLEU", "same"], rows))
    flags = sorted({f for m in models for f in m["flags"]})
    if flags:
        rows = [[m["model"], *(share(m["flags"].get(f, 0)) for f in flags)] for m in models]
        blocks.append(aligned(["flags", *flags], rows))
    if found["reference"]:
        its = [m for m in models if "against" in m]
        rows = [
            [m["model"], *(number(m["against"][k]) for k in ("cider_d", "bleu_4", "rouge_l"))] for m in its
        ]
        clips = its[0]["against"]["clips"] if its else 0
        blocks.append(
            aligned([f"against {found['reference']}, {clips} clips", "CIDEr-D", "BLEU-4", "ROUGE-L"], rows)
        )
    if len(names) > 1:
        matrix = found["agreement"]["mean_similarity"]
        rows = [[f"{i + 1} {name}", *map(number, matrix[i])] for i, name in enumerate(names)]
        blocks.append(aligned(["agreement", *(str(i + 1) for i in range(len(names)))], rows))
    if found["judges"]:
        blocks.append(aligned(["judge", "s/clip"], [[k, number(s, 3)] for k, s in found["judges"].items()]))
    cover = found["cover"]
    good = "called best" if cover["least"] is None else f"{cover['by']} from {cover['least']:.3f} on"
    rows = [
        [f"{i} {s['model']}", share(s["alone"]), share(s["adds"]), share(s["covered"])]
        for i, s in enumerate(cover["steps"][:keep], 1)
    ]
    blocks.append(aligned([f"keep ({good})", "alone", "adds", "covered"], rows))
    return blocks


def aligned(header: list[str], rows: list[list[str]]) -> str:
    """A table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    )


def share(x: float | None) -> str:
    return "–" if x is None else f"{x:.1%}"


def number(x: float | None, digits: int = 2) -> str:
    return "–" if x is None else f"{x:.{digits}f}"


def interval(told: dict[str, Any] | None, digits: int = 3) -> str:
    """'0.213 ±0.012'."""
    if told is None or told["mean"] is None:
        return "–"
    half = "" if told["high"] is None else f" ±{told['high'] - told['mean']:.{digits}f}"
    return f"{told['mean']:.{digits}f}{half}"


def tokens(cost: dict[str, float], clips: int) -> str:
    """'1.2k tokens, $0.40 a 1000 clips'."""
    used = sum(cost.get(k, 0) for k in ("prompt_tokens", "completion_tokens"))
    said = [f"{used / clips:.0f} tokens/clip"] if used else []
    said += [f"${1000 * cost['usd'] / clips:.2f}/1000 clips"] if cost.get("usd") else []
    return ", ".join(said) or "–"


if __name__ == "__main__":
    from jobs.cli import leave

    leave(main)
