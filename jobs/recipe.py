"""clipmill recipe: show a recipe whole, explain its options, check a file of your own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.recipe_schema import Option

EPILOG = """
A recipe is a YAML file that says what differs from a base:

  # mine.yaml
  base: embedded                                   # a bundled recipe, or another file
  cut: {crf: 20}                                   # sections are merged, key by key
  captions: [{kind: tags}, {kind: colour_motion}]  # a list takes the place of the base's
  decide:
    rules:
      blurred: null                                # null takes away
      waves: {column: caption, contains: [sea, wave]}

Paths in it are seen from its own folder. Then: clipmill curate my_videos/ --recipe mine.yaml --out run/

examples
  clipmill recipe explain                          # every option: meaning, type, default
  clipmill recipe explain decide.rules
  clipmill recipe explain optimizer                # of training recipes, too
  clipmill recipe show embedded > mine.yaml        # with nothing left to a base or a default
  clipmill recipe show mine.yaml --set cut.crf=23
  clipmill recipe check mine.yaml

bundled for curation: {curation}
bundled for training: {training}
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill recipe",
        description=__doc__,
        epilog=EPILOG.replace("{curation}", names("recipes")).replace(
            "{training}", names("recipes/training")
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="show|explain|check")
    show = tasks.add_parser("show", help="print it resolved: every option, ready to be saved and used")
    explain = tasks.add_parser("explain", help="print every option with its meaning, type and default")
    check = tasks.add_parser("check", help="say what is wrong with a file, without running anything")
    explain.add_argument(
        "key", nargs="?", metavar="KEY", help="a section or option, e.g. decode or sample_fps"
    )
    for task in (show, check):
        task.add_argument("recipe", metavar="NAME|FILE", help="bundled recipe or a .yaml")
        task.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe"
        )
    for task in (show, explain, check):
        task.add_argument(
            "--training",
            action="store_true",
            help="recipes of clipmill train, where a name or key could be either's (toy)",
        )
    args = parser.parse_args(argv)

    from pipeline.faults import Fault
    from pipeline.recipe import RecipeError

    try:
        if args.task == "explain":
            print("\n".join(explained(args.key, args.training)))
        elif args.task == "show":
            print(shown(args.recipe, args.set, args.training), end="")
        else:
            print("\n".join(checked(args.recipe, args.set, args.training)))
    except (RecipeError, Fault) as e:
        if args.task == "check" and isinstance(e, RecipeError) and len(e.mistakes) > 1:
            said = [f"clipmill recipe: {e.where}: {len(e.mistakes)} mistakes", *e.mistakes]
            print("\n  ".join(said), file=sys.stderr)
        else:
            print(f"clipmill recipe: {e}", file=sys.stderr)
        return 2
    return 0


def names(folder: str) -> str:
    """The bundled recipes of a folder, without importing what reads them."""
    from pathlib import Path

    return ", ".join(sorted(p.stem for p in (Path(__file__).parent.parent / folder).glob("*.yaml")))


def shown(recipe: str, overrides: list[str], training: bool) -> str:
    """The resolved recipe as YAML."""
    import yaml

    from jobs.training.recipe import load_either

    data = load_either(recipe, overrides, training).model_dump(mode="json")
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def checked(recipe: str, overrides: list[str], training: bool) -> Iterator[str]:
    """What a recipe that holds is made of. Raises RecipeError for one that does not."""
    from jobs.training.diffusion.recipe import DiffusionRecipe
    from jobs.training.recipe import load_either
    from jobs.training.recipe_core import TrainRecipe
    from pipeline.graph import check
    from pipeline.recipe import Recipe, RecipeError

    try:
        found = load_either(recipe, overrides, training)
    except RecipeError as e:
        if isinstance(e.rest, Recipe):
            try:
                check(e.rest)
            except RecipeError as more:
                raise RecipeError(
                    where=e.where, mistakes=[*e.mistakes, *(more.mistakes or [str(more)])]
                ) from e
        raise
    if isinstance(found, TrainRecipe):
        latents = f" with {found.autoencoder.kind} latents" if isinstance(found, DiffusionRecipe) else ""
        yield f"{recipe} holds: it trains {found.trains}, {found.model.kind}{latents}"
    else:
        stages = check(found)
        yield f"{recipe} holds: {', '.join(s.name for s in stages)}"
        yield f"rules: {', '.join(found.decide.rules) or 'none'}"
        if not found.captions:
            yield "look: it has no captioner, so nothing would be captioned; give captions, or a base: embedded"
    flag = " --training" if training else ""
    yield f"whether its models are there: clipmill doctor --recipe {recipe}{flag}"


# ---------------------------------------------------------------- explain


def explained(key: str | None, training: bool) -> Iterator[str]:
    """Lines about every option, or those at or below a key. Raises RecipeError for a key that is none."""
    from jobs.training.recipe import KINDS
    from pipeline.recipe import Recipe, RecipeError
    from pipeline.recipe_schema import nearest, options

    curation = list(options(Recipe))
    trainers = list({o.key: o for kind in KINDS.values() for o in options(kind)}.values())
    groups = [trainers] if training else [curation, trainers]
    for every in groups[:1] if key is None else groups:
        if found := every if key is None else about(key, every):
            yield from lines(found)
            return
    known = [o for every in groups for o in every]
    words = {w for o in known for w in (o.key, o.name)} - {"N", "NAME"}
    raise RecipeError(f"no option {key!r}{nearest(str(key), words)}; list them with: clipmill recipe explain")


def about(key: str, every: list[Option]) -> list[Option]:
    """The options at or below a key; a bare name finds them wherever they are."""
    from pipeline.recipe_file import split_setting

    asked = split_setting(f"{key}=")[0]
    for named in (False, True):
        if found := [o for o in every if fits(o.key.split("."), asked, named)]:
            return found
    return [o for o in every if [o.name] == asked]


def fits(parts: list[str], asked: list[str], named: bool) -> bool:
    """Whether a key is that or lies below it; N and NAME are left out of what is asked, or `named` there."""
    if not asked or not parts:
        return not asked
    if parts[0] in ("N", "NAME"):
        return fits(parts[1:], asked[1:] if named else asked, named)
    return parts[0] == asked[0] and fits(parts[1:], asked[1:], named)


def lines(found: list[Option]) -> Iterator[str]:
    """A line a section, and two an option: what it is by default, what it means."""
    for i, option in enumerate(found):
        if not option.type:
            yield ("\n" if i else "") + f"{option.key}: {option.meaning}"
        else:
            yield f"  {option.key} = {option.default}"
            yield f"      {option.meaning} ({option.type})"


if __name__ == "__main__":
    raise SystemExit(main())
