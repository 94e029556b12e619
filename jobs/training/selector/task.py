"""Training a selector: which of a clip's captions is its own, from features of frozen encoders.

A step's loss is over all of its clips at once, on whichever ranks and in whichever micro-batches they are: features are
gathered over ranks with their gradients, and made in two passes (Gao et al. 2021), so that a step may have more clips
than a device holds. Its parts, each a mean over the clips (`models.language.contrastive`):

- rivals: the chosen caption against the clip's own other candidates (weight 1) and those of other clips (.01), as
  Panda-70M's selector is trained;
- contrastive: clips and chosen captions, both ways;
- matching: a head that sees both together, on the pair, on one of its hardest wrong captions (its own rejected ones
  among them) and on one of its hardest wrong clips, drawn by similarity.

Clips of some sources are held out. On them it is measured, calibrated, and then written as the one file that the judge
`selector` reads: OUT/selector.pt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.training.data.held_out import held_out
from jobs.training.data.loader import sources_of
from jobs.training.parallelize import local_gradients, make
from jobs.training.recipe_core import TrainRecipe
from jobs.training.selector.candidates import NONE, CandidateLoader, Candidates
from jobs.training.selector.candidates import gathered as candidates_of
from jobs.training.selector.recipe import SelectorRecipe
from jobs.training.task import COUNTS, Batch, Draws, Evaluation, Losses, Phase, Start, Step, Task, Told
from models.choosing.chooser import logits
from models.choosing.file import Saved, Spec
from models.choosing.frozen import TextFeatures, VideoFeatures
from models.hub import MissingModel
from models.language import selector
from models.language.contrastive import (
    Group,
    among_rivals,
    contrastive,
    feature_gradients,
    gathered,
    hard_negatives,
    matched,
    surrogate,
    triples,
)
from models.language.selector import Selector
from models.measures.retrieval import auc, recall
from pipeline.io.store import below
from pipeline.shards.index import rows_where

BATCH = 64  # clips of a micro-batch where data.batch says nothing
FILE = "selector.pt"
SHOWN = 8  # held-out clips, beside what it would choose of them
AT_ONCE = 256  # clips that are looked at together when it is measured


def _held(shards: str, share: float) -> np.ndarray:
    """Rows of the shards' index whose clips are held out."""
    return rows_where(shards, held_out(shards, share))


def build(
    recipe: TrainRecipe, start: Start, held: Callable[[str, float], np.ndarray] = _held
) -> tuple[Selection, CandidateLoader]:
    """Raises ValueError or StoreError, in one sentence, where recipe and data do not fit."""
    assert isinstance(recipe, SelectorRecipe)
    if recipe.model.kind != "selector":
        raise ValueError(f"trains: selector needs model.kind selector, not {recipe.model.kind}")
    size = recipe.data.batch or BATCH
    if size * recipe.data.micro_batches < 2:
        raise ValueError(
            "data.batch 1: clips of a step are told from one another, so a step needs two or more"
        )
    spec = Spec(recipe.features.video, recipe.features.text, recipe.features.frames)
    device = str(start.world.device)
    try:
        encoders = start.world.agree(
            lambda: (VideoFeatures(spec.video, device), TextFeatures(spec.text, device))
        )
    except MissingModel as e:
        raise ValueError(f"features: {e}") from e
    sets = []
    for _, data in sources_of(recipe, start.data):
        shards = below(data, "shards")
        rows = start.world.agree(partial(held, shards, recipe.held_out))
        sets.append(
            candidates_of(
                data,
                spec,
                encoders,
                rows,
                start.out / "features",
                start.world,
                votes=recipe.votes,
                workers=recipe.data.workers,
            )
        )
    for s, (_, data) in zip(sets, sources_of(recipe, start.data), strict=True):
        chosen = set(s.which[~s.held, 0].tolist())
        if len(chosen) < 2:
            raise ValueError(
                f"{data}: the clips that are trained on have {len(chosen)} different chosen captions; it takes two"
            )
    loader = CandidateLoader(
        sets,
        recipe.data.shares(),
        batch=size,
        seed=recipe.seed,
        rank=start.world.data_rank,
        world=start.world.data_size,
    )
    return Selection(recipe, start, spec, encoders, sets), loader


class Asked(nn.Module):
    """A selector as DDP and FSDP wrap it, who act around `forward` alone: everything is asked through it."""

    def __init__(self, selector: Selector):
        super().__init__()
        self.selector = selector

    def forward(self, method: Any, *args: Any) -> Any:
        return method(self.selector, *args)


def both(model: Selector, video: Tensor, text: Tensor, *pairs: Tensor) -> tuple[Tensor, ...]:
    """Features and scale, and where pairs are given the head's logits of them."""
    found = model(video, text)
    return (*found, model.match(*pairs)) if pairs else found


class Joined(NamedTuple):
    """What the losses must know of a rank's pairs of a step, beside their features.

    keys; there: bool [B, K]; same: int64 [B, K]; place: int64 [B]; uniform: [B, 2] in 0 … 1.
    """

    keys: list[str]
    there: Tensor
    same: Tensor
    place: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, batches: list[Batch], draws: list[Draws]) -> Joined:
        uniform = [
            torch.stack([d.uniform(len(b["key"]), stream) for stream in (1, 2)], dim=1)
            for b, d in zip(batches, draws, strict=True)
        ]
        keys = [key for b in batches for key in b["key"]]
        there, same, place = (torch.cat([b[name] for b in batches]) for name in ("there", "same", "place"))
        return cls(keys, there, same, place, torch.cat(uniform))


class Selection(Task):
    """Args: sets: of each run that is trained on, the first one's held-out clips are measured."""

    weights: ClassVar = {"rivals": 1.0, "contrastive": 1.0, "matching": 1.0}  # the recipe's are in the sums

    def __init__(
        self,
        recipe: SelectorRecipe,
        start: Start,
        spec: Spec,
        encoders: tuple[VideoFeatures, TextFeatures],
        sets: list[Candidates],
    ):
        self.recipe, self.world, self.out, self.spec = recipe, start.world, start.out, spec
        self.device, self.head = start.world.device, recipe.loss.matching > 0
        self.sizes = sets[0].video.shape[1], sets[0].texts.shape[1]
        self.options = recipe.model.options()
        self.hashes = {**encoders[0].hashes, spec.text: encoders[1].hash}
        self.networks = encoders[0].given
        self.measured = sets[0].held.nonzero()[:, 0].numpy()
        self.measured = self.measured[:: -(-len(self.measured) // recipe.measured) or 1]
        self.set = sets[0]
        torch.manual_seed(recipe.seed)
        module = make(partial(_made, self.sizes, self.options, self.head), start.device)
        self.phases = [Phase.of("selector", module, recipe.optimizer)]

    # ------------------------------------------------------------ training

    def counts(self, batch: Batch) -> dict[str, int]:
        return dict.fromkeys(self.weights, len(batch["key"]))

    def loss(self, phase: str, model: nn.Module, batch: Batch, draws: Draws) -> Losses:
        """Of a micro-batch by itself, as if it were the step."""
        features = model(both, batch["video"], batch["texts"])
        return Losses(self._sums(model, features, Joined.of([batch], [draws]), None)[0])

    def backward(self, step: Step) -> None:
        group = self.world.mesh.get_group("data") if self.world.mesh is not None else None
        features, seen, draws = [], [], []
        with torch.no_grad():
            for batch, its in step.micro_batches():
                with step.autocast():
                    features.append(step.model(both, batch["video"], batch["texts"]))
                seen.append(batch)
                draws.append(its)
        joined = Joined.of(seen, draws)
        told: dict[str, Any] = {
            "key": joined.keys,
            COUNTS: {kind: sum(b[COUNTS][kind] for b in seen) for kind in self.weights},
        }
        pairs: tuple[Tensor, ...] = ()

        def loss(*joint: Tensor) -> Tensor:
            nonlocal pairs
            with step.autocast():
                sums, pairs = self._sums(step.model, joint, joined, group)
            return step.total(told, Losses(sums))

        with local_gradients(step.model, True):
            _, gradients = feature_gradients(features, loss)
        parts = list(zip(*(x.detach().split([len(b["key"]) for b in seen] * 3) for x in pairs), strict=True))
        for i, (batch, _) in enumerate(step.micro_batches()):
            # of the triples of `matching` those of this micro-batch's pairs
            own = [torch.cat(x) for x in zip(*parts[i :: len(seen)], strict=True)] if pairs else []
            with step.autocast():
                found = step.model(both, batch["video"], batch["texts"], *own)
            total = surrogate(found[:3], gradients[i])
            if own:
                total = total + matched(found[3]) * (self.recipe.loss.matching * step.factor("matching"))
            total.backward()

    def _sums(
        self, model: nn.Module, features: tuple[Tensor, ...], of: Joined, group: Group
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """The losses' sums over this rank's pairs, and the pairs that matching was asked of.

        Args:
            features: [B, D] of clips, [B, K, D] of texts, and the scale.
        """
        video, texts, scale = features
        loss = self.recipe.loss
        sums: dict[str, Tensor] = {}
        pairs: tuple[Tensor, ...] = ()
        own, chosen = of.same[:, 0].contiguous(), texts[:, 0]
        if loss.rivals:
            first = torch.zeros_like(own)
            weights = {"own": loss.own, "others": loss.others}
            sums["rivals"] = loss.rivals * among_rivals(
                video, texts, first, scale, group, of.there, **weights
            )
        if loss.contrastive:
            sums["contrastive"] = loss.contrastive * contrastive(video, chosen, scale, group, own)
        if loss.matching:
            wrong_text, wrong_video = self._negatives(video, texts, scale, of, group)
            videos, every = gathered(video, group), gathered(texts, group).flatten(0, 1)
            pairs = triples(video, chosen, videos[wrong_video], every[wrong_text])
            sums["matching"] = loss.matching * matched(model(Selector.match, *pairs))
        return sums, pairs

    @torch.no_grad()
    def _negatives(
        self, video: Tensor, texts: Tensor, scale: Tensor, of: Joined, group: Group
    ) -> tuple[Tensor, Tensor]:
        """Of each pair a wrong text among the N · K and a wrong clip among the N, drawn by similarity.

        As the places of pairs have them, whatever rank they are on.
        """
        v, t = F.normalize(video.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        videos, every, same, there = (gathered(x, group) for x in (v, t, of.same, of.there))
        order = gathered(of.place, group).argsort()
        wide = (order[:, None] * texts.shape[1] + torch.arange(texts.shape[1], device=order.device)).flatten()
        own = of.same[:, :1]
        right = (own == same.flatten()[wide]) | ~there.flatten()[wide]
        text = hard_negatives(scale * v @ every.flatten(0, 1)[wide].T, right, uniform=of.uniform[:, 0])
        right = own == same[order, 0]
        clip = hard_negatives(scale * t[:, 0] @ videos[order].T, right, uniform=of.uniform[:, 1])
        return wide[text], order[clip]

    def blocks(self, module: nn.Module) -> Iterator[nn.Module]:
        assert isinstance(module, Asked)
        yield from (module.selector.video, module.selector.text)

    def tokens(self, batch: Batch) -> int:
        return int(batch["there"].numel()) + len(batch["key"])

    # ------------------------------------------------------------ measuring

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> Evaluation:
        """Of held-out clips: choosing, retrieval, AUC; then it is calibrated and written."""
        most = self.set.which.shape[1]
        found = []
        for at in range(0, len(self.measured), AT_ONCE):
            b = self.set.batch(self.measured[at : at + AT_ONCE], most)
            found.append(model(both, b["video"].to(self.device), b["texts"].to(self.device)))
        video, texts = (torch.cat([x[i].float() for x in found]) for i in (0, 1))
        judge = partial(model, _judged, self.head)
        which = self.set.which[self.measured]
        own = judge(video, texts, found[0][2]).cpu()  # n K
        across = torch.cat([judge(v[None], texts[None, :, 0], found[0][2]) for v in video]).cpu()  # n n
        scalars = measured(own, across, which)
        scalars |= {
            f"chosen/{n}": x for n, s in self.set.scores.items() if (x := first(s[self.measured], which))
        }
        weights = {name: _whole(x) for name, x in model.state_dict().items()}
        if self.world.rank == 0:
            self._write(weights, own, across, which, scalars)
        return Evaluation(scalars=scalars, texts=self._texts(own))

    def _write(
        self,
        weights: dict[str, Tensor],
        own: Tensor,
        across: Tensor,
        which: Tensor,
        figures: dict[str, float],
    ) -> None:
        """Calibrated on the held-out clips: a chosen caption is right; its clip's others, and as often the captions of
        other clips, are not."""
        weights = {name.removeprefix("selector."): x for name, x in weights.items()}
        saved = Saved(
            self.spec, self.sizes, self.options, weights, self.head, self.networks, self.hashes, figures
        )
        calibrated = saved.selector()
        wrong = own[:, 1:][which[:, 1:] != NONE]
        others = across[which[:, :1] != which[:, 0]]
        draw = np.random.default_rng(0).permutation(len(others))[: max(len(own), len(wrong))]
        judged = torch.cat([own[:, 0], wrong, others[torch.from_numpy(draw)]])
        if len(judged) > len(own):
            calibrated.calibrate(judged, torch.arange(len(judged)) < len(own))
        saved.weights = calibrated.state_dict()
        saved.write(self.out / FILE)

    def _texts(self, own: Tensor) -> list[Told]:
        """Of some clips with several candidates the chosen one, and beside it what the selector would choose."""
        found: list[Told] = []
        for row, judged in zip(self.measured, own, strict=True):
            which = self.set.which[row]
            if len(found) == SHOWN or int((which != NONE).sum()) < 2:
                continue
            best = int(judged.masked_fill(which == NONE, -torch.inf).argmax())
            found.append(Told(self.set.words[int(which[0])], self.set.words[int(which[best])]))
        return found

    def state(self) -> dict[str, Any]:
        return {"selector": {"sizes": list(self.sizes), "options": self.options}, "hashes": self.hashes}


def _made(sizes: tuple[int, int], options: dict[str, Any], head: bool) -> Asked:
    model = selector.build(sizes, **options)
    model.head.requires_grad_(head)
    return Asked(model)


def _judged(model: Selector, head: bool, video: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    return logits(model, video, texts, scale, head)


def _whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().cpu().clone()


def measured(own: Tensor, across: Tensor, which: Tensor) -> dict[str, float]:
    """Figures of n clips.

    Args:
        own: of their candidates, the chosen one first, [n, K]. across: of all clips and chosen captions [n, n].
        which: int64 [n, K], the texts.
    """
    found = {}
    if (chosen := first(own, which)) is not None:
        found["chosen/selector"] = chosen
        found["chosen/chance"] = float((1 / (which != NONE).sum(1)[which[:, 1:].ne(NONE).any(1)]).mean())
    same = which[:, :1] == which[:, 0]
    if bool((~same).any()):
        found["auc"] = auc(across[torch.eye(len(same), dtype=torch.bool)], across[~same])
        for k in (1, 5, 10):
            found[f"text_of_clip/R@{k}"] = recall(across, same, k)
            found[f"clip_of_text/R@{k}"] = recall(across.T, same, k)
    return found


def first(scores: Tensor, which: Tensor) -> float | None:
    """How often the chosen caption has the best score of a clip's, of clips that have several; None: there are none.

    Args:
        scores: [n, K], the chosen one's first; NaN is the worst. which: [n, K].
    """
    there = which != NONE
    several = there.sum(1) > 1
    if not bool(several.any()) or bool(scores[several].isnan().all()):
        return None
    ranked = scores.nan_to_num(-torch.inf).masked_fill(~there, -torch.inf)[several]
    return float((ranked[:, 0] > ranked[:, 1:].amax(1)).float().mean())
