"""What `clipmill caption` does: captioners, judges and measures that a recipe names and a run lacks, as layers over it.

`missing` says which clips lack what, `units` gathers them, and `stages` are those of `curate` between a `ReopenStage`
and a `LayerStage`, which writes each layer's rows a unit at a time. So a clip gets the caption it would have got in
the first run, nothing that is there is touched, and what was interrupted goes on. No source is read: a measure that
needs more of a clip than the frames models are shown is refused with a sentence.

`--retry-errors`, there and of `curate`, does what failed again where it lies, by the same stages: first what `curate`
itself wrote, as if there were no layers, into `clips/` (`RewriteStage`), then the layers. What was fused of it, judges
and consensus follow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.caption.captioner import CaptionStage, caption_stages
from pipeline.caption.choose import DIGITS, consensus
from pipeline.caption.fuse import sources
from pipeline.caption.judge import JudgeStage, judge_stages
from pipeline.io.store import Store, below
from pipeline.layers import CONSENSUS, Layer, Layered, create, layers, remove, unit_of, write
from pipeline.recipe import Aesthetic, Recipe, RecipeError, Text, parse, what
from pipeline.recipe_captions import Captioner, FuseCaptioner
from pipeline.recipe_choose import Judge
from pipeline.recipe_file import dotted, split_setting
from pipeline.recipe_schema import Section
from pipeline.record import Clip, Source, Video
from pipeline.run import weights
from pipeline.run.relabel import Only
from pipeline.run.reopen import ReopenStage
from pipeline.run.resume import brief, differences
from pipeline.stages import Produces, Resources, Stage
from pipeline.tables import caption_of, caption_row

TOGETHER = 64  # clips that go through the stages together at least, of as many units as it takes
CUT = ("shots", "events", "cut", "signature")  # sections of a recipe by which clips were made
Wanted = dict[str, set[str]]  # stage → ids of the clips that it is to do


# ---------------------------------------------------------------- which stages

SECTIONS: dict[str, TypeAdapter[Any]] = {
    "caption": TypeAdapter(Captioner),
    "judge": TypeAdapter(Judge),
    "text": TypeAdapter(Text),
    "aesthetic": TypeAdapter(Aesthetic),
}


def section_of(layer: Layer) -> Any:
    """Of the recipe. None: people made the layer, or it is consensus. Raises RecipeError for an older clipmill's."""
    adapter = SECTIONS.get(layer.name.partition(":")[0])
    if adapter is None or not layer.section:
        return None
    try:
        return adapter.validate_python(layer.section)
    except ValidationError as e:
        raise RecipeError(
            f"layer {layer.name!r} was made with options that this clipmill does not know; take it away with --remove "
            "and add it anew"
        ) from e


def additional(built: Sequence[Stage]) -> list[Stage]:
    """Of a recipe's stages those that can be run from the frames models are shown, in the order the data flows."""
    return [s for s in built if _adds(s) or s.name == "choose"]


def _adds(stage: Stage) -> bool:
    """It has something of its own to say of a clip, and looks at no more than its samples and its rows."""
    return stage.name.startswith(("caption:", "judge:")) or stage.name in ("text", "aesthetic")


def of_run(some: Sequence[Stage], run: Recipe, over: Collection[str]) -> list[Stage]:
    """Of `additional` stages those of `curate` itself: captioners that no layer is of, the choice, the run's judges."""
    judges = {s.name for s in judge_stages(run.choose.judges)}
    own = {s.name for s in caption_stages(run.captions)} - {*over}
    return [s for s in some if s.name in own | judges | {"choose"}]


def all_of(run: Mapping[str, Any], asked: Sequence[str], over: Sequence[Layer], where: str) -> Recipe:
    """The recipe of a run with `--set` items, and where these name no captioners, with what layers have added.

    Args:
        run: its run.json.

    Raises RecipeError, also for a setting that would change nothing of clips that there are.
    """
    for item in asked:
        keys = split_setting(item)[0]
        if keys[0] in CUT:
            raise RecipeError(
                f"--set {dotted(keys)}: clips stay as they were cut; captioners and judges are added to them, for "
                "other clips curate into a new folder"
            )
    recipe = parse(run["recipe"], list(asked), below(where, "run.json"))
    return (
        recipe if any(split_setting(item)[0] == ["captions"] for item in asked) else with_layers(recipe, over)
    )


def retried(clips: Layered, also: Collection[str]) -> list[Layer]:
    """The layers that are to be looked at again: captioners that failed, what was fused, and if so the judges.

    Args:
        also: clips that have new captions.
    """
    failed: set[str] = set()
    mine = [layer for layer in clips.layers if layer.captions and layer.section]
    for _, table in clips.tables(["captions"]) if mine else ():
        for captions in table["captions"].to_pylist():
            failed |= {f"caption:{c['model']}" for c in captions or [] if c["outcome"] == "error"}
    found = [layer for layer in mine if layer.name in failed or layer.section["kind"] == "fuse"]
    return (
        found + [layer for layer in clips.layers if layer.judges and layer.section] if found or also else []
    )


def with_judges(recipe: Recipe, run: Recipe, over: Iterable[Layer]) -> Recipe:
    """A recipe with the judges of the run too, and of its layers: what is added is judged as the others were."""
    judges = {
        j.name: j.section for j in [*judge_stages(run.choose.judges), *judge_stages(recipe.choose.judges)]
    }
    for layer in over:
        if layer.name.startswith("judge:") and layer.name not in judges and (section := section_of(layer)):
            judges[layer.name] = section
    mine = [j.name for j in judge_stages(recipe.choose.judges)]
    order = dict.fromkeys([*mine, *judges])
    choose = recipe.choose.model_copy(update={"judges": tuple(judges[name] for name in order)})
    return recipe.model_copy(update={"choose": choose})


def with_layers(recipe: Recipe, over: Iterable[Layer]) -> Recipe:
    """A recipe with what made the captions and measures of layers, where it names none of these names."""
    captions = list(recipe.captions)
    there = {s.name for s in caption_stages(captions)}
    scores = {}
    for layer in over:
        section = section_of(layer)
        if layer.captions and section and layer.name not in there:
            captions.append(section)
        elif layer.name in ("text", "aesthetic") and section:
            scores[layer.name] = section
    update = {"captions": tuple(captions), "scores": recipe.scores.model_copy(update=scores)}
    return recipe.model_copy(update=update)


def with_fused(recipe: Recipe, run: Recipe, over: Sequence[Layer]) -> Recipe:
    """A recipe with what the run fuses of captions, so that it can be done again; captioners in the run's order."""
    own = caption_stages(run.captions)
    its = {s.name: s.section for s in own if s.section.kind == "fuse"}
    its |= {layer.name: section_of(layer) for layer in over if layer.section.get("kind") == "fuse"}
    mine = {s.name: s.section for s in caption_stages(recipe.captions)}
    known = [*(s.name for s in own), *(layer.name for layer in over)]
    all_ = its | mine
    order = sorted(all_, key=lambda name: known.index(name) if name in known else len(known))
    return recipe.model_copy(update={"captions": tuple(all_[name] for name in order)})


def check(stages: Sequence[Stage], run: Recipe, clips: Layered) -> None:
    """Raise RecipeError where a recipe measures what clips alone cannot tell, and the run has not measured it.

    And where a captioner or judge of the run has the name of one of the recipe's, but other options.
    """
    have = set(clips.schema().names)
    for stage in stages:
        lacks = [n for n in stage.produces.scores if f"score_{n}" not in have]
        lacks += [n for n in stage.produces.embeddings if f"emb_{n}" not in have]
        if lacks and not _adds(stage):
            raise RecipeError(
                f"{', '.join(lacks)} of stage {stage.name!r} cannot be measured on finished clips, as it looks at the "
                "source: curate into a new folder, or leave it out of the recipe"
            )
    there: dict[str, Section] = {s.name: s.section for s in caption_stages(run.captions)}
    there |= {s.name: s.section for s in judge_stages(run.choose.judges)}
    begun = {
        layer.name for some in clips.over.values() for layer in some
    }  # one that holds nothing is in nobody's way
    over = {layer.name: section_of(layer) for layer in clips.layers if layer.name in begun}
    there |= {name: section for name, section in over.items() if section is not None}
    for stage in stages:
        if isinstance(stage, CaptionStage | JudgeStage) and stage.name in there:
            differ = list(differences(what(there[stage.name]), what(stage.section)))
            if differ:
                said = "; ".join(f"{k} is {brief(a)} there and {brief(b)} here" for k, a, b in differ[:3])
                first = f", or --remove {stage.name} first" if stage.name in over else ""
                raise RecipeError(
                    f"the run has a {stage.name} made with other options ({said}): give this one a name of its "
                    f"own, or the options that it has there{first}"
                )


# ---------------------------------------------------------------- which clips


def missing(
    clips: Layered,
    stages: Sequence[Stage],
    errors: Collection[str] = (),
    lacking: bool = True,
    also: Collection[str] = (),
) -> Wanted:
    """The clips that each stage is to do.

    Args:
        errors: captioners ('caption:…'); the clips on which these failed, and those of which they fused other
            captions than they would now.
        lacking: and those that a stage has not done yet.
        also: clips that have new captions, which the judges among the layers are to see.

    What a captioner is to do judges are to do after it.
    """
    wanted: Wanted = {s.name: set() for s in stages if s.name != "choose"}
    here = set(clips.schema().names)
    columns = {s.name: [f"score_{n}" for n in s.produces.scores if f"score_{n}" in here] for s in stages}
    fused = [
        s for s in stages if isinstance(s, CaptionStage) and s.name in errors and s.section.kind == "fuse"
    ]
    asked = ["clip_id", "captions", *{c for some in columns.values() for c in some if lacking}]
    for _, table in clips.tables(asked):
        for row in table.to_pylist():
            captions = row["captions"] or []
            again = {f"caption:{c['model']}" for c in captions if c["outcome"] == "error"} & {*errors}
            again |= {s.name for s in fused if _stale(s, captions, again)}
            for name in wanted.keys() & (again | (_lacking(row, wanted, columns) if lacking else set())):
                wanted[name].add(row["clip_id"])
    new = set().union(*(ids for name, ids in wanted.items() if name.startswith("caption:")))
    over = {layer.name for layer in clips.layers}
    judged = {
        name: some | new | ({*also} if name in over else set()) if name.startswith("judge:") else some
        for name, some in wanted.items()
    }
    return {name: ids for name, ids in judged.items() if ids}


def _lacking(row: Mapping[str, Any], stages: Collection[str], columns: Mapping[str, list[str]]) -> set[str]:
    """The stages that have not done a clip."""
    captions = row["captions"] or []
    done = {f"caption:{c['model']}" for c in captions} | {f"judge:{name}" for name in _judged(captions)}
    if not any(c["text"] for c in captions):  # there is nothing to judge
        done |= {name for name in stages if name.startswith("judge:")}
    done |= {name for name, some in columns.items() if some and all(row[c] is not None for c in some)}
    return {*stages} - done


def _judged(captions: list[dict[str, Any]]) -> set[str]:
    """Scores that every caption of a clip has that says something."""
    scores = [{name for name, _ in c["scores"] or []} for c in captions if c["text"]]
    return set.intersection(*scores) if scores else set()


def _stale(stage: CaptionStage, rows: Sequence[Mapping[str, Any]], again: Collection[str]) -> bool:
    """Whether a clip's caption is fused of others than it would be now, or one of its sources is to be done again."""
    assert isinstance(stage.section, FuseCaptioner)
    mine = next((c for c in rows if c["model"] == stage.model), None)
    if mine is None:
        return False
    asked = stage.section.of or [c["model"] for c in rows[: rows.index(mine)]]
    if any(f"caption:{model}" in again for model in asked):
        return True
    now = [c.model for c in sources(stage.section, stage.model, [caption_of(c) for c in rows])]
    return now != list(mine["made_from"] or [])


def units(clips: Layered, wanted: Wanted, listed: Mapping[str, Source]) -> list[list[Video]]:
    """The wanted clips by unit of work, their ids alone: `ReopenStage` reads the rest.

    Small committed units go through the stages together, so that models get full batches.
    """
    ids = set().union(*wanted.values())
    found: list[list[Video]] = [[]]
    for name, table in clips.tables(["clip_id", "source"]):
        mine: dict[str, list[Clip]] = defaultdict(list)
        for row in table.to_pylist():
            if row["clip_id"] in ids:
                mine[row["source"]].append(Clip(row["clip_id"], 0, 0, 0.0, 0.0))
        if sum(len(v.clips) for v in found[-1]) >= TOGETHER:
            found.append([])
        found[-1] += [
            Video(listed.get(u, Source(u, u)), unit_of(name), clips=some) for u, some in mine.items()
        ]
    return [unit for unit in found if unit]


def noted(
    store: Store, clips: Layered, stages: Sequence[Stage], wanted: Wanted, versions: dict[str, str]
) -> list[Layer]:
    """The layers that the wanted stages write, each noted in the run; those that hold something go on."""
    begun = {layer.name for some in clips.over.values() for layer in some}
    there = {layer.name: layer for layer in clips.layers if layer.name in begun}
    number = max((layer.number for layer in clips.layers), default=0)
    found = []
    for stage in stages:
        if stage.name not in wanted and stage.name != "choose":
            continue
        name = CONSENSUS if stage.name == "choose" else stage.name
        layer = there.get(name)
        if layer is None:
            number += 1
            section = weights.section_of(stage)
            layer = Layer(
                name,
                number,
                section.model_dump(mode="json") if section is not None else {},
                tuple(stage.produces.scores),
                stage.produces.embeddings,
                datetime.now(UTC).isoformat(timespec="seconds"),
                versions,
                weights.contents(section),
            )
            create(store, layer)
        found.append(layer)
    return found


def drop_empty(store: Store, some: Sequence[Layer]) -> None:
    """Take away those of some layers that hold nothing: what was to make them ended before it said anything."""
    for layer in some:
        if not store.list(layer.folder, ".parquet"):
            remove(store, layer.name)


def stages(
    store: Store, recipe: Recipe, some: Sequence[Stage], wanted: Wanted, last: Stage, layered: bool = True
) -> list[Stage]:
    """Reopen, what has something to do, the choice, and what writes it.

    Args:
        some: `additional` ones.
        layered: see ReopenStage.
    """
    again: list[Stage] = [ReopenStage(store, recipe.decode, recipe.events.clip_samples, layered)]
    for stage in some:
        if stage.name in wanted:
            again.append(Only(stage, wanted[stage.name]))
        elif stage.name == "choose":
            again.append(stage)
    return [*again, last]


def agree(store: Store) -> None:
    """Bring the layer of consensus in line with the captions that there are; it goes where no others were added.

    What agrees already is not written.
    """
    there = {layer.name: layer for layer in layers(store)}
    mine = there.get(CONSENSUS)
    if mine is None:
        return
    if not any(layer.captions for layer in there.values()):
        remove(store, CONSENSUS)
        return
    clips = Layered(store)
    for name, table in clips.tables(["clip_id", "captions"]):
        rows = []
        for row in table.to_pylist():
            captions = row["captions"] or []
            scores = consensus([c["text"] for c in captions])
            new = [None if s is None else round(s, DIGITS) for s in scores]
            if new == [dict(c["scores"] or []).get(CONSENSUS) for c in captions]:
                continue
            judged = [
                {"model": c["model"], "scores": [] if s is None else [(CONSENSUS, s)], "support": []}
                for c, s in zip(captions, new, strict=True)
            ]
            rows.append({"clip_id": row["clip_id"], "judged": judged})
        if rows:
            write(store, mine, unit_of(name), rows)


class LayerStage:
    """Writes what the stages before it have added, a unit's rows of one layer in one step."""

    name = "layer"
    whole_unit = True
    sees_samples = False

    def __init__(self, out: Store | str, layers: Sequence[Layer], wanted: Wanted):
        """Args: layers: in the order of the stages."""
        self.out, self.layers, self.wanted = out, list(layers), wanted
        self.resources, self.produces = Resources(cpus=1.0), Produces()

    def setup(self) -> None:
        self.store = Store.of(self.out)

    def __call__(self, videos: list[Video]) -> list[Video]:
        for unit in dict.fromkeys(v.unit for v in videos):
            its = [v for v in videos if v.unit == unit and v.error is None]
            for layer in reversed(
                self.layers
            ):  # captions last: while one is missing, its scores count as missing too
                rows = []
                for v in its:
                    seconds = v.seconds.get(layer.name, 0.0) / len(v.clips)
                    rows += [row | {"seconds": seconds} for c in v.clips if (row := self._row(layer, c))]
                if rows:
                    write(self.store, layer, unit, rows)
        for v in videos:
            v.frames = None
        return videos

    def _row(self, layer: Layer, clip: Clip) -> dict[str, Any] | None:
        """What a layer says of a clip; None where that is nothing."""
        row: dict[str, Any] = {"clip_id": clip.clip_id}
        judge = layer.name.removeprefix("judge:")
        if layer.judges:
            judged = []
            for c in clip.captions:
                scores, support = (
                    [(k, v) for k, v in m.items() if k == judge] for m in (c.scores, c.support)
                )
                judged.append({"model": c.model, "scores": scores, "support": support})
            row["judged"] = judged
        elif clip.clip_id not in self.wanted.get(layer.name, ()):
            return None
        if layer.captions:
            model = layer.name.removeprefix("caption:")
            said = next((c for c in clip.captions if c.model == model), None)
            return None if said is None else row | {"caption": caption_row(said)}
        row |= {f"score_{name}": clip.scores.get(name) for name in layer.scores}
        row |= {f"emb_{name}": clip.embeddings.get(name) for name in layer.embeddings}
        return row | ({"text": clip.text} if layer.name == "text" else {})
