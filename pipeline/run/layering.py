"""What `clipmill caption` does: captioners, judges and measures that a recipe names and a run lacks, as layers over it.

`missing` says which clips lack what, `units` gathers them, and `stages` are those of `curate` between a `ReopenStage`
and a `LayerStage`, which writes each layer's rows a unit at a time. So a clip gets the caption it would have got in
the first run, nothing that is there is touched, and what was interrupted goes on. No source is read: a measure that
needs more of a clip than the frames models are shown is refused with a sentence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter

from pipeline.caption.choose import DIGITS, consensus
from pipeline.caption.judge import JudgeStage, judge_stages
from pipeline.graph import build
from pipeline.io.store import Store
from pipeline.layers import CONSENSUS, Layer, Layered, create, layers, remove, unit_of, write
from pipeline.recipe import Recipe, RecipeError
from pipeline.recipe_captions import Judge
from pipeline.record import Clip, Source, Video
from pipeline.run.relabel import Only
from pipeline.run.reopen import ReopenStage
from pipeline.stages import Produces, Resources, Stage
from pipeline.tables import caption_row

TOGETHER = 64  # clips that go through the stages together at least, of as many units as it takes
Wanted = dict[str, set[str]]  # stage → ids of the clips that it is to do


section_of = TypeAdapter(Judge).validate_python  # of a judge's section as plain data


def additional(recipe: Recipe, store: Store) -> list[Stage]:
    """The stages of a recipe that can be run from the frames models are shown, in the order the data flows."""
    return [s for s in build(recipe, store) if _adds(s) or s.name == "choose"]


def _adds(stage: Stage) -> bool:
    """It has something of its own to say of a clip, and looks at no more than its samples and its rows."""
    return stage.name.startswith(("caption:", "judge:")) or stage.name in ("text", "aesthetic")


def missing(clips: Layered, stages: Sequence[Stage], errors: bool) -> Wanted:
    """The clips that each stage has not done yet.

    Args:
        errors: clips on which a captioner failed count as not done.
    """
    wanted: Wanted = {s.name: set() for s in stages if s.name != "choose"}
    here = set(clips.schema().names)
    columns = {s.name: [f"score_{n}" for n in s.produces.scores if f"score_{n}" in here] for s in stages}
    asked = ["clip_id", "captions", *{c for some in columns.values() for c in some}]
    for _, table in clips.tables(asked):
        for row in table.to_pylist():
            captions = row["captions"] or []
            done = {f"caption:{c['model']}" for c in captions if not errors or c["outcome"] != "error"}
            done |= {f"judge:{name}" for name in _judged(captions)}
            if not any(c["text"] for c in captions):  # there is nothing to judge
                done |= {name for name in wanted if name.startswith("judge:")}
            done |= {name for name, some in columns.items() if some and all(row[c] is not None for c in some)}
            for name in wanted.keys() - done:
                wanted[name].add(row["clip_id"])
    new = set().union(*(ids for name, ids in wanted.items() if name.startswith("caption:")))
    return {
        name: ids
        for name, some in wanted.items()
        if (ids := some | new if name.startswith("judge:") else some)
    }


def _judged(captions: list[dict[str, Any]]) -> set[str]:
    """Scores that every caption of a clip has that says something."""
    scores = [{name for name, _ in c["scores"] or []} for c in captions if c["text"]]
    return set.intersection(*scores) if scores else set()


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
    """The layers that the wanted stages write, each noted in the run; those that are there go on."""
    there = {layer.name: layer for layer in clips.layers}
    number = max((layer.number for layer in clips.layers), default=0)
    found = []
    for stage in stages:
        if stage.name not in wanted and stage.name != "choose":
            continue
        name = CONSENSUS if stage.name == "choose" else stage.name
        layer = there.get(name)
        if layer is None:
            number += 1
            section = getattr(stage, "section", getattr(stage, "options", None))
            layer = Layer(
                name,
                number,
                section.model_dump(mode="json") if section is not None else {},
                tuple(stage.produces.scores),
                stage.produces.embeddings,
                datetime.now(UTC).isoformat(timespec="seconds"),
                versions,
            )
            create(store, layer)
        found.append(layer)
    return found


def stages(store: Store, recipe: Recipe, wanted: Wanted, layers: Sequence[Layer]) -> list[Stage]:
    """Reopen, what has something to do, the choice, and the layers that take it all."""
    again: list[Stage] = [ReopenStage(store, recipe.decode, recipe.events.clip_samples)]
    for stage in additional(recipe, store):
        if stage.name in wanted:
            again.append(Only(stage, wanted[stage.name]))
        elif stage.name == "choose":
            again.append(stage)
    return [*again, LayerStage(store, layers, wanted)]


def agree(store: Store) -> None:
    """Bring the layer of consensus in line with the captions that there are; it goes where no others were added."""
    there = {layer.name: layer for layer in layers(store)}
    mine = there.pop(CONSENSUS, None)
    if mine is None:
        return
    remove(store, CONSENSUS)
    if not any(layer.captions for layer in there.values()):
        return
    create(store, mine)
    clips = Layered(store)
    for name, table in clips.tables(["clip_id", "captions"]):
        rows = []
        for row in table.to_pylist():
            captions = row["captions"] or []
            scores = consensus([c["text"] for c in captions])
            judged = [
                {
                    "model": c["model"],
                    "scores": [] if s is None else [(CONSENSUS, round(s, DIGITS))],
                    "support": [],
                }
                for c, s in zip(captions, scores, strict=True)
            ]
            rows.append({"clip_id": row["clip_id"], "judged": judged})
        write(store, mine, unit_of(name), rows)


def with_judges(recipe: Recipe, run: Recipe, clips: Layered) -> Recipe:
    """A recipe with the judges of the run too, and of its layers: what is added is judged as the others were."""
    mine = {j.name: j for j in judge_stages(recipe.choose.judges)}
    there = list(judge_stages(run.choose.judges))
    there += [
        JudgeStage(section_of(layer.section)) for layer in clips.layers if layer.name.startswith("judge:")
    ]
    judges = mine | {j.name: j for j in there if j.name not in mine}
    sections = tuple(j.section for j in judges.values())
    return recipe.model_copy(update={"choose": recipe.choose.model_copy(update={"judges": sections})})


def check(recipe: Recipe, clips: Layered) -> None:
    """Raise RecipeError where the recipe measures what clips alone cannot tell, and the run has not measured it."""
    have = set(clips.schema().names)
    for stage in build(recipe, clips.store):
        lacks = [n for n in stage.produces.scores if f"score_{n}" not in have]
        lacks += [n for n in stage.produces.embeddings if f"emb_{n}" not in have]
        if lacks and not _adds(stage):
            raise RecipeError(
                f"{', '.join(lacks)} of stage {stage.name!r} cannot be measured on finished clips, as it looks at the "
                "source: curate into a new folder, or leave it out of the recipe"
            )


class LayerStage:
    """Writes what the stages before it have added, a unit's rows of one layer in one step."""

    name = "layer"
    whole_unit = True
    sees_samples = False

    def __init__(self, out: Store | str, layers: Sequence[Layer], wanted: Wanted):
        self.out, self.layers, self.wanted = out, list(layers), wanted
        self.resources, self.produces = Resources(cpus=1.0), Produces()

    def setup(self) -> None:
        self.store = Store.of(self.out)

    def __call__(self, videos: list[Video]) -> list[Video]:
        for unit in dict.fromkeys(v.unit for v in videos):
            its = [v for v in videos if v.unit == unit and v.error is None]
            for layer in self.layers:
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
