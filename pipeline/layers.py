"""Layers over a finished run: captions, scores and embeddings that were added later, each in a folder of its own.

    DIR/layers/<name>/layer.json       what made it, and when
    DIR/layers/<name>/<unit>.parquet   a row for each clip of the unit that it says something of

`clips/` is never touched. `read` gives a unit's clips with all layers over them, as if `curate` had measured it all;
whoever wants clips reads them here. A layer's rows hold `clip_id` and one or more of

- `seconds`: how long it took;
- `caption`: one more candidate; in place of that of the same model, where the clip has one;
- `judged`: scores and support of captions, by model, over what they have;
- `text`, `score_*` and `emb_*`: columns of the clip.

To remove a layer is to delete its folder.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.faults import StoreError
from pipeline.io.store import Store, below, folder_name
from pipeline.recipe_schema import RecipeError, nearest
from pipeline.tables import CAPTION, CLIP_SCHEMA

JUDGED = pa.list_(
    pa.struct(
        [("model", pa.string()), *((f.name, f.type) for f in CAPTION if f.name in ("scores", "support"))]
    )
)
NOT_COLUMNS = ("clip_id", "seconds", "caption", "judged")  # of a layer: no columns of the clip
CONSENSUS = "consensus"  # the layer of how far captions agree, once others were added
CAPTIONS = CLIP_SCHEMA.field("captions")


@dataclass(frozen=True)
class Layer:
    """What is known of a layer without its rows."""

    name: str  # of the stage that made it: 'caption:Qwen/Qwen2.5-VL-7B-Instruct', 'judge:visual_fit', 'text'
    number: int = 0  # layers lie over each other in this order
    section: dict[str, Any] = field(default_factory=dict)  # of the recipe
    scores: tuple[str, ...] = ()  # score_* columns
    embeddings: dict[str, int] = field(default_factory=dict)  # emb_* columns and their lengths
    made: str = ""  # UTC, ISO 8601
    versions: dict[str, str] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)  # of files that `section` names: option → sha256

    @property
    def folder(self) -> str:
        return f"layers/{folder_name(self.name)}"

    @property
    def captions(self) -> bool:
        """It adds candidates."""
        return self.name.startswith("caption:")

    @property
    def judges(self) -> bool:
        """It scores candidates."""
        return self.name == CONSENSUS or self.name.startswith("judge:")

    def schema(self) -> pa.Schema:
        """The columns that its rows may have."""
        fields = [pa.field("clip_id", pa.string()), pa.field("seconds", pa.float32())]
        fields += [pa.field("caption", CAPTION)] if self.captions else []
        fields += [pa.field("judged", JUDGED)] if self.judges else []
        fields += [CLIP_SCHEMA.field("text")] if self.name == "text" else []
        fields += [pa.field(f"score_{s}", pa.float64()) for s in self.scores]
        return pa.schema(
            [*fields, *(pa.field(f"emb_{n}", pa.list_(pa.float32(), d)) for n, d in self.embeddings.items())]
        )


def no_run(store: Store) -> StoreError:
    """What is said of a folder that holds no run: where there is one below it, or how to make one."""
    there = store.list()
    runs = [below(store.uri, name.rpartition("/")[0]) for name in there if name.endswith("/run.json")]
    if runs:
        return StoreError(f"{store.uri} holds no clipmill run itself; there is one in {runs[0]}")
    if not there:
        return StoreError(
            f"{store.uri} holds no clipmill run; make one with: clipmill curate SOURCE --out {store.uri}"
        )
    return StoreError(
        f"{store.uri} holds no clipmill run but other files: give the --out folder of a run, or make one beside it: "
        f"clipmill curate SOURCE --out {store.uri.rstrip('/')}-run"
    )


def layers(store: Store) -> list[Layer]:
    """Those of a run, the lowest first."""
    found = []
    for name in store.list("layers", "/layer.json"):
        said = _json(store, name)
        found.append(Layer(**(said | {"scores": tuple(said["scores"])})))
    return sorted(found, key=lambda layer: (layer.number, layer.name))


def _json(store: Store, name: str) -> dict[str, Any]:
    """What a file says. Raises StoreError where it is damaged."""
    try:
        said: dict[str, Any] = json.loads(store.read_bytes(name))
    except ValueError as e:
        raise StoreError(f"cannot read {below(store.uri, name)}: {e}; it is damaged") from e
    return said


def create(store: Store, layer: Layer) -> None:
    """Note a layer, before its rows come. Rows of a removed one of that name, which a kill left there, go."""
    store.delete_folder(layer.folder)
    store.write_bytes(f"{layer.folder}/layer.json", json.dumps(asdict(layer), indent=1).encode())


def remove(store: Store, name: str) -> None:
    """Delete a layer: without its layer.json it is gone. Raises RecipeError where the run has none of that name."""
    there = layers(store)
    for layer in there:
        if layer.name == name:
            store.delete(f"{layer.folder}/layer.json")
            store.delete_folder(layer.folder)
            return
    known = ", ".join(layer.name for layer in there) or "none"
    why = (
        "what curate itself wrote stays"
        if name in own(store)
        else nearest(name, [layer.name for layer in there])
    )
    raise RecipeError(
        f"{store.uri} has no layer {name!r} ({why.strip(' ()') or 'see --list'}); its layers: {known}"
    )


def own(store: Store) -> list[str]:
    """The captioners of the run itself, as layers would be called."""
    found: dict[str, None] = {}
    for name in clip_files(store)[:1]:
        for captions in store.read_table(name, ["captions"])["captions"].to_pylist():
            found |= dict.fromkeys(f"caption:{c['model']}" for c in captions or [])
    return list(found)


def write(store: Store, layer: Layer, unit: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put rows of a unit's clips into a layer, over those of the same clips."""
    name, schema = f"{layer.folder}/{unit}.parquet", layer.schema()
    new = pa.Table.from_pylist(list(rows), schema=schema)
    if store.exists(name):
        old = store.read_table(name)
        stays = pc.invert(pc.is_in(old["clip_id"], value_set=new["clip_id"].combine_chunks()))
        new = pa.concat_tables([_cast(old.filter(stays), schema), new])
    store.write_table(name, new)


def forget(store: Store, unit: str, clips: pa.Table) -> None:
    """Take the rows of clips that are no longer in a unit out of its layers."""
    for layer in layers(store):
        name = f"{layer.folder}/{unit}.parquet"
        if store.exists(name):
            old = store.read_table(name)
            kept = old.filter(pc.is_in(old["clip_id"], value_set=clips["clip_id"].combine_chunks()))
            if not kept.num_rows:
                store.delete(name)
            elif kept.num_rows < old.num_rows:
                store.write_table(name, kept)


def unjudge(store: Store, model: str) -> None:
    """Take the scores of a captioner out of the layers of judges: its text is another now, or it is gone."""
    for layer in layers(store):
        for name in store.list(layer.folder, ".parquet") if layer.judges else ():
            table = store.read_table(name)
            judged = [rows or [] for rows in table["judged"].to_pylist()]
            left = [[j for j in rows if j["model"] != model] for rows in judged]
            if left != judged:
                store.write_table(name, _put(table, "judged", pa.array(left, JUDGED)))


def clip_files(store: Store) -> list[str]:
    """The clips/*.parquet of committed units, sorted: a unit counts once its videos/*.parquet is there."""
    committed = {name.removeprefix("videos/") for name in store.list("videos", ".parquet")}
    return [n for n in store.list("clips", ".parquet") if n.removeprefix("clips/") in committed]


READERS = 16  # parquet files read at a time: on an object store each waits for the network
AHEAD = 256


def read_ahead(
    read: Callable[[str], pa.Table], names: Sequence[str], ahead: int = AHEAD, readers: int = READERS
) -> Iterator[tuple[str, pa.Table]]:
    """Many files one after the other, so many of them read ahead of use."""
    with ThreadPoolExecutor(readers) as pool:
        for at in range(0, len(names), ahead):
            some = names[at : at + ahead]
            yield from zip(some, pool.map(read, some), strict=True)


def unit_of(name: str) -> str:
    """Of a file of clips/ or videos/."""
    return name.rpartition("/")[2].removesuffix(".parquet")


def open_run(store: Store) -> tuple[dict[str, Any], Store]:
    """What run.json says, {} without one, and where the clips were measured: elsewhere of another set of shards.

    Raises StoreError where there is no run, or run.json is none.
    """
    if not store.exists("run.json"):
        if not store.list("videos", ".parquet"):
            raise no_run(store)
        return {}, store
    info = _json(store, "run.json")
    return info, Store(info["of"]) if "of" in info else store


class Layered:
    """The clips of a run with its layers over them, as they were when this was made.

    Args:
        over: the layers; none: all that there are.
    """

    def __init__(self, store: Store, over: Sequence[Layer] | None = None):
        self.store = store
        self.layers = layers(store) if over is None else list(over)
        self.files = clip_files(store)
        there = set(store.list("layers", ".parquet")) if self.layers else set()
        order = sorted(
            self.layers, key=lambda layer: layer.judges
        )  # scores find captions that came after them, too
        self.over = {
            name: [layer for layer in order if f"{layer.folder}/{unit_of(name)}.parquet" in there]
            for name in self.files
        }

    def schema(self) -> pa.Schema:
        """Columns of the clips; CLIP_SCHEMA's alone where there are none."""
        return self._schema

    @functools.cached_property
    def _schema(self) -> pa.Schema:
        schema = self.store.read_schema(self.files[0]) if self.files else CLIP_SCHEMA
        if "captions" in schema.names:
            schema = schema.set(schema.get_field_index("captions"), CAPTIONS)
        for layer in self.layers:
            for column in layer.schema():
                if column.name not in NOT_COLUMNS and column.name not in schema.names:
                    schema = schema.append(column)
        return schema

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, pa.Table]]:
        """Name and contents of every file, see `read`."""
        return read_ahead(lambda name: self.read(name, columns), self.files)

    def meta_keys(self) -> set[str]:
        """Columns of the list that any clip has."""
        metas = (meta for _, table in self.tables(["meta"]) for meta in table["meta"].to_pylist())
        return {key for meta in metas for key, _ in meta or []}

    def behind(self) -> dict[str, int]:
        """Layers of captions and measures that say nothing of clips, as these came later: name → number of clips."""
        found: dict[str, int] = {}
        mine = [layer for layer in self.layers if layer.section and not layer.judges]
        for name in self.files if mine else ():
            ids = pc.unique(self.store.read_table(name, ["clip_id"])["clip_id"])
            for layer in mine:
                lacks = len(ids)
                if layer in self.over[name]:
                    path = f"{layer.folder}/{unit_of(name)}.parquet"
                    there = self.store.read_table(path, ["clip_id"])["clip_id"].combine_chunks()
                    lacks -= pc.sum(pc.is_in(ids, value_set=there)).as_py()
                if lacks:
                    found[layer.name] = found.get(layer.name, 0) + lacks
        return found

    def read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A file of clips/ with its layers.

        Args:
            columns: those that are wanted, in order; none: all there are. What neither file nor layer has is null.
        """
        schema = self.schema()
        wanted = schema.names if columns is None else list(columns)
        over = [(layer, _asked(layer, wanted)) for layer in self.over.get(name, [])]
        over = [(layer, some) for layer, some in over if some]
        table = self.store.read_some(name, {*wanted, *(["clip_id"] if over else [])})
        if "captions" in table.column_names:
            table = _put(table, "captions", table["captions"].cast(CAPTIONS.type))
        for layer, some in over:
            path = f"{layer.folder}/{unit_of(name)}.parquet"
            try:
                rows = self.store.read_table(path, ["clip_id", *some])
            except StoreError as e:
                if self.store.exists(f"{layer.folder}/layer.json"):
                    raise
                raise StoreError(f"layer {layer.name!r} was removed meanwhile; run it again") from e
            table = _joined(table, rows, some)
        for column in wanted:
            if column not in table.column_names:
                kind = schema.field(column).type if column in schema.names else pa.null()
                table = table.append_column(column, pa.nulls(len(table), kind))
        return table.select(wanted)


def _asked(layer: Layer, wanted: Sequence[str]) -> list[str]:
    """The columns of a layer that change one of those wanted."""
    names = [n for n in layer.schema().names if n not in ("clip_id", "seconds")]
    return [n for n in names if (n in wanted or (n in ("caption", "judged") and "captions" in wanted))]


def _joined(table: pa.Table, layer: pa.Table, columns: Sequence[str]) -> pa.Table:
    """A file's clips with some columns of a layer over them."""
    row = pc.index_in(table["clip_id"], value_set=layer["clip_id"].combine_chunks())
    for column in columns:
        new = layer[column].take(row)
        if column in ("caption", "judged"):
            merge = _with_caption if column == "caption" else _with_scores
            both = zip(table["captions"].to_pylist(), new.to_pylist(), strict=True)
            merged = [old if said is None else merge(list(old or []), said) for old, said in both]
            table = _put(table, "captions", pa.array(merged, CAPTIONS.type))
        elif column in table.column_names:
            table = _put(table, column, pc.coalesce(new, table[column]))
        else:
            table = table.append_column(column, new)
    return table


def _with_caption(captions: list[dict[str, Any]], said: dict[str, Any]) -> list[dict[str, Any]]:
    models = [c["model"] for c in captions]
    if said["model"] not in models:
        return [*captions, said]
    captions[models.index(said["model"])] = said
    return captions


def _with_scores(captions: list[dict[str, Any]], judged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_model = {j["model"]: j for j in judged}
    for i, caption in enumerate(captions):
        if (j := by_model.get(caption["model"])) is not None:
            scores, support = (dict(caption[k] or []) | dict(j[k] or []) for k in ("scores", "support"))
            first = {CONSENSUS: scores[CONSENSUS]} if CONSENSUS in scores else {}  # as `curate` puts it
            captions[i] = caption | {
                "scores": list((first | scores).items()),
                "support": list(support.items()),
            }
    return captions


def _put(table: pa.Table, name: str, column: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """With just the columns of a schema; those it lacks are null."""
    columns = [
        table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(len(table), f.type)
        for f in schema
    ]
    return pa.table(columns, schema=schema)
