"""What a selector learns from: of each clip of a run its features, its candidate captions, and which was chosen.

Everything is in the shards (each key.json keeps all candidates, their scores and the chosen one) and in the votes
beside them. Clips are decoded and seen by the frozen encoders once, shared by the ranks; what they gave is kept in
OUT/features as it comes, and used again of clips whose bytes are the same, whatever was captioned or voted since.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.training.data.numbered import Numbered
from jobs.training.data.workers import prepared
from jobs.training.distributed import World
from jobs.training.task import Batch
from models.choosing.file import Spec
from models.choosing.frozen import TextFeatures, VideoFeatures
from pipeline.faults import StoreError
from pipeline.inspector.blind import CHOSEN
from pipeline.inspector.votes import Votes
from pipeline.io.store import Store, below
from pipeline.shards.captions import json_of
from pipeline.shards.mixture import Mixture
from pipeline.shards.order import Order, whole
from pipeline.shards.pixels import BrokenSample, decode
from pipeline.shards.reader import ShardReader

NONE = -1  # no caption
KEEP_S = 15.0  # what was looked at is kept, and told, so often


# ---------------------------------------------------------------- what people said


@dataclass(frozen=True)
class Vote:
    """What stands of a clip: whose caption is the best, another text (`edit`), or that none will do."""

    model: str | None = None
    text: str | None = None
    bad: bool = False


def votes_of(data: str) -> dict[str, Vote]:
    """Of each clip of the run in folder `data` that people agree on, what they said: the most votes, without a tie.

    'best', 'bad' and 'edit' count first; where nobody said any of these, blind comparisons: the caption that won the
    most of them. Raises StoreError.
    """
    store = Store(data)
    if store.exists("run.json") and (of := json.loads(store.read_bytes("run.json")).get("of")):
        store = Store(of)  # another set of shards of that run
    votes = Votes(store)
    found: dict[str, Vote] = {}
    for clip in votes.clips():
        tally = votes.tally(clip)
        counts = Counter({("best", m): n for m, n in tally["best"].items()})
        counts += Counter({(kind, ""): tally[kind] for kind in ("bad", "edit")})
        if (most := _most(counts)) is None:
            continue
        kind, model = most
        text = [v["text"].strip() for v in votes.of(clip) if v["kind"] == "edit"]
        if kind == "edit" and text[-1]:
            found[clip] = Vote(text=text[-1])
        elif kind != "edit":
            found[clip] = Vote(model=model or None, bad=kind == "bad")
    wins: dict[str, Counter[Any]] = {}
    for vote in votes.all():
        if vote["kind"] == "ab" and vote["answer"] in ("left", "right"):
            wins.setdefault(vote["clip"], Counter())[vote[vote["answer"]]] += 1
    for clip, counts in wins.items():
        if clip not in found and (winner := _most(counts)) is not None:
            found[clip] = Vote(model=winner)
    return found


def _most(counts: Counter[Any]) -> Any:
    """What was counted most often; None where that is nothing, or two are equal."""
    first = counts.most_common(2)
    return first[0][0] if first and (len(first) == 1 or first[0][1] > first[1][1]) else None


def told_apart(meta: dict[str, Any], vote: Vote | None) -> tuple[list[str], list[dict[str, float]]] | None:
    """Candidates of a clip, the chosen one first, and their scores; None where none is right, or nothing was said.

    Candidates that say what the chosen one says are left out: they are not wrong.

    Args:
        meta: its key.json.
    """
    said = [c for c in meta.get("captions") or [] if c["text"].strip()]
    texts = [c["text"].strip() for c in said]
    scores = [json_of(c.get("scores") or {}) for c in said]
    right = (meta.get("caption") or "").strip()
    if vote is not None:
        if vote.bad:
            return None
        model = meta.get("caption_model") if vote.model == CHOSEN else vote.model
        right = vote.text or next((t for t, c in zip(texts, said, strict=True) if c["model"] == model), right)
    if not right:
        return None
    scored = next((s for t, s in zip(texts, scores, strict=True) if t == right), {})
    others = dict(zip(texts, scores, strict=True))  # each text once
    others = {t: s for t, s in others.items() if t.split() != right.split()}
    return [right, *others], [scored, *others.values()]


# ---------------------------------------------------------------- clips as arrays


@dataclass
class Candidates:
    """n clips and m texts.

    video: float32 [n, width]. texts: float32 [m, width]; words: the same in words. which: int64 [n, K], the texts of
    each clip, the chosen one first, NONE behind the last. scores: of judges and consensus, float32 [n, K], NaN where
    there is none. held: bool [n], whether a clip is held out. identity: a hash of all of it.
    """

    keys: list[str]
    video: torch.Tensor
    texts: torch.Tensor
    words: list[str]
    which: torch.Tensor
    scores: dict[str, torch.Tensor]
    held: torch.Tensor
    identity: str

    def batch(self, rows: np.ndarray, most: int) -> Batch:
        """Those clips with `most` candidates each.

        {'key', 'video' [B, width], 'texts' [B, K, width], 'there': bool [B, K], 'same': int64 [B, K], which text it is}
        """
        at = torch.as_tensor(rows)
        which = torch.full((len(rows), most), NONE)
        which[:, : self.which.shape[1]] = self.which[at]
        return {
            "key": [self.keys[int(r)] for r in rows],
            "video": self.video[at],
            "texts": self.texts[which.clamp(min=0)],
            "there": which != NONE,
            "same": which,
            "skipped": [],
        }


Row = tuple[int, str, str, np.ndarray, list[str], list[dict[str, float]]]
"""Row of the index, key, hash of the mp4, features, texts, scores."""


def gathered(
    data: str,
    spec: Spec,
    encoders: tuple[VideoFeatures, TextFeatures],
    held: np.ndarray,
    out: Path,
    world: World,
    *,
    votes: bool,
    workers: int,
) -> Candidates:
    """Of the run in folder `data`, kept in the folder `out`. Every rank calls it; clips are shared by them.

    Args:
        held: rows of the shards' index that are held out.

    Raises ValueError, StoreError: on all ranks where one fails.
    """
    kept = out / f"{_hash(data)[:8]}.pt"
    look = _hash([encoders[0].hashes, spec.video, spec.frames])

    def part() -> str:
        said = votes_of(data) if votes else {}
        reader = ShardReader(below(data, "shards"), captions="sample", shuffle=False, decode=False)
        told = [reader.identity(), sorted((k, vars(v)) for k, v in said.items()), vars(spec)]
        told += [encoders[0].hashes, encoders[1].hash]
        identity = _hash(told)
        before: dict[str, Any] = torch.load(kept, weights_only=True, mmap=True) if kept.is_file() else {}
        if before.get("identity") == identity:
            return ""
        out.mkdir(parents=True, exist_ok=True)
        own = kept.with_suffix(f".{world.rank}")
        begun: dict[str, Any] = torch.load(own, weights_only=True) if own.is_file() else {}
        known: dict[str, np.ndarray] = {}
        for those in (before, begun):
            if those.get("look") == look:
                known |= dict(zip(those["media"], those["video"].numpy(), strict=True))
        mine = range(world.rank, len(reader.keys), world.size)
        rows: list[Row] = []
        since = time.monotonic()
        for row in _looked_at(reader, mine, said, encoders[0], spec.frames, known, workers):
            rows.append(row)
            if time.monotonic() - since > KEEP_S:
                since = time.monotonic()
                _save(_joined(rows) | {"look": look}, own)
                if world.rank == 0:
                    told_so_far = f"looked at {len(rows):,} of {len(mine):,} clips"
                    print(f"features of {data}: {told_so_far}", file=sys.stderr, flush=True)
        _save(_joined(rows) | {"look": look}, own)
        return identity

    identity = world.agree(part)
    identity = next(filter(None, world.gather(identity)), "")

    def join() -> None:
        if world.rank or not identity:
            return
        parts = [kept.with_suffix(f".{rank}") for rank in range(world.size)]
        rows = sorted(row for p in parts for row in _apart(torch.load(p, weights_only=True)))
        if not rows:
            raise StoreError(
                f"{data}: no clip has a caption that was chosen: caption the run, or vote in the inspector"
            )
        words = list(dict.fromkeys(text for *_, texts, _ in rows for text in texts))
        whole = _joined(rows) | {
            "identity": identity,
            "look": look,
            "words": words,
            "embedded": torch.from_numpy(encoders[1](words)),
        }
        _save(whole, kept)
        for p in parts:
            p.unlink()

    world.agree(join)
    return world.agree(lambda: _read(torch.load(kept, weights_only=True, mmap=True), held))


def _save(told: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    aside = path.with_name(f"{path.name}.partial")
    torch.save(told, aside)
    aside.replace(path)


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def _looked_at(
    reader: ShardReader,
    rows: Sequence[int],
    said: dict[str, Vote],
    look: VideoFeatures,
    frames: int,
    known: dict[str, np.ndarray],
    workers: int,
) -> Iterator[Row]:
    """Clips of which something was chosen and that can be decoded; known: features by the hash of the mp4."""

    def read(worker: int, of: int) -> Iterator[tuple[int, str, str, Any, Any]]:
        for row in rows[worker::of]:
            try:
                sample = reader.read(row)
                found = told_apart(sample["meta"], said.get(sample["meta"].get("clip_id", sample["key"])))
                if found is None:
                    continue
                media = hashlib.sha256(sample["video"]).hexdigest()
                video = None if media in known else decode(sample["video"], frames, None, None, 0.5)
            except BrokenSample:
                continue
            yield row, sample["key"], media, video, found

    for row, key, media, video, (texts, scores) in prepared(read, workers):
        features = known[media] if video is None else look(np.asarray(video))
        yield row, key, media, features, texts, scores


def _joined(rows: Sequence[Row]) -> dict[str, Any]:
    """As plain tensors and lists."""
    video = np.stack([v for *_, v, _, _ in rows]) if rows else np.zeros((0, 0), np.float32)
    return {
        "rows": [r for r, *_ in rows],
        "keys": [k for _, k, *_ in rows],
        "media": [m for _, _, m, *_ in rows],
        "video": torch.from_numpy(video),
        "said": json.dumps([[texts, scores] for *_, texts, scores in rows]),
    }


def _apart(told: dict[str, Any]) -> Iterator[Row]:
    each = (told["rows"], told["keys"], told["media"], told["video"].numpy(), json.loads(told["said"]))
    for row, key, media, video, (texts, scores) in zip(*each, strict=True):
        yield row, key, media, video, texts, scores


def _read(told: dict[str, Any], held: np.ndarray) -> Candidates:
    said = json.loads(told["said"])
    number = {text: i for i, text in enumerate(told["words"])}
    most = max(len(texts) for texts, _ in said)
    which = torch.full((len(said), most), NONE)
    names = sorted({name for _, scores in said for one in scores for name in one})
    judged = {name: torch.full(which.shape, torch.nan) for name in names}
    for i, (texts, scores) in enumerate(said):
        which[i, : len(texts)] = torch.tensor([number[text] for text in texts])
        for k, one in enumerate(scores):
            for name, value in one.items():
                judged[name][i, k] = torch.nan if value is None else value
    out = torch.from_numpy(np.isin(told["rows"], held))
    identity = hashlib.sha256(told["identity"].encode() + out.numpy().tobytes()).hexdigest()
    return Candidates(
        told["keys"], told["video"], told["embedded"], told["words"], which, judged, out, identity
    )


# ---------------------------------------------------------------- micro-batches


class CandidateLoader(Numbered):
    """A `jobs.training.task.Loader` of clips that are in memory.

    An epoch deals the clips of a run to micro-batches, by (seed, epoch); of several runs each gives its share of them.

    A batch is what `Candidates.batch` gives, the texts of several runs numbered through, with 'place': int64 [B], of
    each pair in the run of training.
    """

    def __init__(
        self,
        sets: Sequence[Candidates],
        shares: Sequence[float],
        *,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        super().__init__(rank, world)
        self.sets, self.size, self.seed = list(sets), batch, seed
        self.mixture, self.identity = Mixture(shares), " ".join(s.identity for s in self.sets)
        self.trained = [np.flatnonzero(~s.held.numpy()) for s in self.sets]
        self.orders = [
            Order(np.zeros(len(t), np.int16), whole([len(t)], [batch]), seed) for t in self.trained
        ]
        self.most = max(s.which.shape[1] for s in self.sets)
        self.before = np.cumsum([0, *(len(s.words) for s in self.sets)])

    def batch(self, number: int) -> Batch:
        source, own = self.mixture.at(number)
        epoch, place = divmod(own, len(self.orders[source]))
        rows = self.trained[source][self.orders[source].batch(epoch, place)]
        found = self.sets[source].batch(rows, self.most)
        found["same"] = torch.where(found["there"], found["same"] + int(self.before[source]), NONE)
        return found | {"place": number * self.size + torch.arange(self.size)}

    def examples(self) -> Iterable[Batch]:
        yield self.batch(0)

    def table(self) -> str:
        lines = []
        for s, trained in zip(self.sets, self.trained, strict=True):
            texts = int((s.which[trained] != NONE).sum())
            lines.append(
                f"clips        {len(trained):,} trained on, with {texts / max(len(trained), 1):.2g} captions each; "
                f"{int(s.held.sum()):,} held out"
            )
        return "\n".join(lines)

    def changed(self, name: str, there: Any, mine: Any) -> str:
        return (
            f"the saved state has {name} {there}, this loader {mine}: clips, captions, votes or features have changed "
            "since training began; use the same, or another --out"
        )

    def made_of(self) -> dict[str, Any]:
        return {"seed": self.seed, "batch": self.size, "clips": self.identity, "shares": self.mixture.parts}
