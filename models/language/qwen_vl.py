"""A published Qwen2-VL, Qwen2.5-VL or Qwen3-VL of `transformers`, or one begun from nothing, as a model that trains.

Wang et al. 2024 (Qwen2-VL), Bai et al. 2025 (Qwen2.5-VL): pictures at their own size (dynamic resolution), frames
merged in pairs, and three positions a token (M-RoPE): of time, row and column.

The published class is kept whole, and so are its weights' values, layout and `generate`. What trains is called by the
names that any vision–language model here has:

    tower       model.visual, without its merger
    projector   model.visual.merger, which makes a token of 2×2 patches; and Qwen3-VL's of deeper features, which are
                added to the hidden states of the first layers (DeepStack)
    language    model.language_model and lm_head

B: sequences; L: tokens of one; V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.hub import MissingModel, silent, transformers_weights, whole
from models.language.by_document import apart, register
from models.language.loss import Goal, Lengths, restarted, rows_of, summed_in_chunks, with_padding
from models.language.pixels import OwnSize
from models.language.positions import Grid, packed
from models.language.qwen_files import KINDS, bounded, filled, looks
from models.language.seeing import Seeing, put
from models.language.towers import configuration, on_meta

PRESETS: dict[str, dict[str, Any]] = {
    # begun from nothing, small enough for a CPU
    "tiny": {
        "config": {
            "model_type": "qwen2_5_vl",
            "text_config": {
                "hidden_size": 64,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "depth": 2,
                "num_heads": 2,
                "out_hidden_size": 64,
                "patch_size": 8,
                "window_size": 32,
                "fullatt_block_indexes": [1],
            },
            "tie_word_embeddings": True,
        },
        "min_pixels": 32 * 32,
        "max_pixels": 64 * 64,
    },
    "2-2B": {"weights": "Qwen/Qwen2-VL-2B-Instruct"},
    "2.5-3B": {"weights": "Qwen/Qwen2.5-VL-3B-Instruct"},
    "2.5-7B": {"weights": "Qwen/Qwen2.5-VL-7B-Instruct"},
    "3-4B": {"weights": "Qwen/Qwen3-VL-4B-Instruct"},
}


MERGERS = ("merger", "deepstack_merger_list")


class Reading(nn.Module):
    """The language model, as it lies in a published one, with its head; both are shared with it."""

    def __init__(self, model: Any, lm_head: nn.Module):
        super().__init__()
        self.model, self.lm_head = model, lm_head


class Seen(NamedTuple):
    """Visual tokens [n, D] of all pictures, and what deeper layers add to them, [n, D] each."""

    tokens: Tensor
    deep: list[Tensor]

    def none(self) -> Seen:
        return Seen(self.tokens[:0], [x[:0] for x in self.deep])


class Merging(nn.Module):
    """What makes tokens of patches, where it is several modules of a tower."""

    def __init__(self, merger: nn.Module, deepstack_merger_list: nn.Module):
        super().__init__()
        self.merger, self.deepstack_merger_list = merger, deepstack_merger_list


class QwenVL(Seeing):
    """Args:
    published: a Qwen…VLForConditionalGeneration of KINDS, whose modules it shares.
    looks: how pictures become its pixels.
    """

    published: Any  # holds the same modules, and is none of this one's

    def __init__(self, published: Any, looks: OwnSize):
        super().__init__()
        self.looks = looks
        visual = published.model.visual
        # A part is registered once, here, by its name in recipes; the published model finds it as a plain attribute.
        joins = {n: visual._modules.pop(n) for n in MERGERS if n in visual._modules}
        for name, module in joins.items():
            object.__setattr__(visual, name, module)
        object.__setattr__(self, "published", published)
        self.tower, self.projector = visual, joins["merger"] if len(joins) == 1 else Merging(**joins)
        self.language = Reading(published.model.language_model, published.lm_head)
        for block in visual.blocks:  # they part at each picture, which no compiler knows beforehand
            block.one_graph = False
        for module in self.modules():  # made on the meta device, it has of a checkpoint what no one computes
            module._non_persistent_buffers_set.clear()

    @property
    def config(self) -> Any:
        return self.published.config

    def forward(
        self,
        tokens: Tensor,
        visuals: Sequence[Tensor] = (),
        lengths: Lengths | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
        goal: Goal | None = None,
        kept: Sequence[Tensor | None] | None = None,
        texts: Sequence[Tensor] | None = None,
        answer: dict[str, Any] | None = None,
    ) -> Tensor:
        """See `Seeing.forward`.

        positions: int64 [3, L] or [3, B, L], see `positions`; None: a step of a clip's time lasts a second. kept,
        texts: None, as all of a picture is seen, and nothing is read beside it.
        """
        rows = tokens if tokens.ndim > 1 else tokens[None]
        if answer is not None:
            return self.generate(rows, visuals, **answer)
        told = self.positions(rows, visuals, lengths) if positions is None else positions
        each = with_padding([[rows.shape[1]]] * len(rows) if lengths is None else lengths, rows.shape[1])
        x, seen = self.embed(rows, visuals)
        hidden = self._hidden(x, told.view(3, *rows.shape), each, lengths, self._there(rows), seen.deep)
        if goal is not None:
            return summed_in_chunks(self.language.lm_head, hidden, goal)
        logits: Tensor = self.language.lm_head(hidden if keep is None else hidden[:, keep])
        return logits if tokens.ndim > 1 else logits[0]

    def _hidden(
        self,
        x: Tensor,
        positions: Tensor,
        each: list[list[int]],
        lengths: Lengths | None,
        there: Tensor,
        deep: list[Tensor],
    ) -> Tensor:
        """Last hidden states [B, L, D] of embeddings; each: documents of rows, with padding; there: visual tokens."""
        reads = self.language.model
        # flash attention tells documents by positions of text that begin anew, which go before the three
        flash = reads.config._attn_implementation.startswith("flash")
        if flash:
            positions = torch.cat([restarted(each, x.device)[None], positions])
        single = lengths is None or all(len(row) <= 1 for row in rows_of(lengths))
        given = apart(reads.config, reads.dtype, each, x.device, placed=not flash, single=single)
        if deep:
            given |= {"visual_pos_masks": there, "deepstack_visual_embeds": deep}
        found: Tensor = reads(
            inputs_embeds=x, position_ids=positions, use_cache=False, **given
        ).last_hidden_state
        return found

    def embed(self, tokens: Tensor, visuals: Sequence[Tensor] = ()) -> tuple[Tensor, Seen]:
        """tokens [B, L] → what goes into the language model, [B, L, dim], and what is seen."""
        x = self.language.model.embed_tokens(tokens)
        if visuals:
            seen = self.see(visuals)
        elif self.training and torch.is_grad_enabled():
            # each part takes part in each step, as DDP and FSDP expect, of which some ranks have no pictures
            side = self.looks.patch * self.looks.merge
            seen = self.see([x.new_zeros(3, side, side, dtype=torch.float32)]).none()
        else:
            seen = Seen(x[0, :0], [])
        return put(x, self._there(tokens), seen.tokens), seen

    def see(self, visuals: Sequence[Tensor]) -> Seen:
        """Images [3, H, W] and videos [T, 3, H, W], scaled and of sides that `looks` gives, one after the other."""
        from transformers.vision_utils import get_vision_position_ids

        patches = torch.cat([self.looks.patches(v) for v in visuals])
        grids = self._grids(visuals)  # on the host, where it is read number by number
        flash = self.tower.config._attn_implementation.startswith("flash")
        if flash or hasattr(self.tower, "pos_embed"):
            grids = grids.to(patches.device)
        places = get_vision_position_ids(grids, self.looks.merge).to(patches.device)
        found = self.tower(patches.to(self.tower.dtype), grid_thw=grids, position_ids=places)
        return Seen(found.pooler_output, list(getattr(found, "deepstack_features", None) or []))

    def positions(
        self,
        tokens: Tensor,
        visuals: Sequence[Tensor] = (),
        lengths: Lengths | None = None,
        seconds: Sequence[float] = (),
    ) -> Tensor:
        """int64 [3, B, L] of tokens [B, L], on their device.

        Args:
            seconds: that a step of each clip's time lasts (`OwnSize.times`); none: one.
        """
        there = self._there(tokens).cpu()
        shapes = [(0, *v.shape[1:]) if v.ndim == 3 else (len(v), *v.shape[2:]) for v in visuals]
        lasts = iter(seconds or [1.0] * len(shapes))
        steps = [next(lasts) if n else 1.0 for n, _, _ in shapes]
        found = [
            grid
            for (n, h, w), step in zip(shapes, steps, strict=True)
            for grid in self.looks.grids(n, (h, w), step)
        ]
        rows = rows_of(lengths) if lengths is not None else [[tokens.shape[1]]] * len(tokens)
        told = []
        for row, mark in zip(rows, there, strict=True):
            grids, found = standing(mark, found)
            told.append(packed(row, grids, len(mark)))
        return torch.stack(told, 1).to(tokens.device)

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Visual tokens of a clip, or of an image (1 frame), of any size."""
        return sum(g.tokens for g in self.looks.grids(frames, self.looks.sides(frames, height, width)))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        visuals: Sequence[Tensor] = (),
        there: Tensor | None = None,
        seconds: Sequence[float] = (),
        **options: Any,
    ) -> Tensor:
        """Answers to prompts [B, L], int64 [B, new tokens]: the published model's own.

        Args:
            there: bool [B, L], False in padding, at the left.
            seconds: as of `positions`.
            options: of transformers' `generate`.
        """
        clips = [v for v in visuals if v.ndim == 4]
        pictures = [v for v in visuals if v.ndim == 3]
        image, video = (tokens == self.config.image_token_id), (tokens == self.config.video_token_id)
        given: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens) if there is None else there.long(),
            "mm_token_type_ids": image.int() + 2 * video.int(),
        }
        if pictures:
            given["pixel_values"] = torch.cat([self.looks.patches(v) for v in pictures])
            given["image_grid_thw"] = self._grids(pictures).to(tokens.device)
        if clips:
            given["pixel_values_videos"] = torch.cat([self.looks.patches(v) for v in clips])
            given["video_grid_thw"] = self._grids(clips).to(tokens.device)
            if self.looks.per_second is not None:
                given["second_per_grid_ts"] = torch.tensor(seconds or [1.0] * len(clips))
        said: Tensor = self.published.generate(**given, **options)
        return said[:, tokens.shape[1] :]

    def following(
        self,
        asked: Tensor,
        answers: Tensor,
        visuals: Sequence[Tensor] = (),
        seconds: Sequence[float] = (),
    ) -> Tensor:
        """Logits [n, m, V] at each token of answers [n, m] to one prompt [1, L]. Args: seconds: as of `positions`."""
        (before, seen), places = self.embed(asked, visuals), self.positions(asked, visuals, seconds=seconds)
        said = self.language.model.embed_tokens(answers[:, :-1]).to(before.dtype)
        n, more = said.shape[:2]
        x = torch.cat([before.expand(n, -1, -1), said], 1)
        # a prompt ends in text, after which text counts on
        behind = places[:, :, -1:] + 1 + torch.arange(more, device=x.device)
        told = torch.cat([places, behind], 2).expand(-1, n, -1)
        there = torch.cat([self._there(asked), torch.zeros_like(behind[0], dtype=torch.bool)], 1)
        deep = [x.repeat(n, 1) for x in seen.deep]
        hidden = self._hidden(x, told, [[x.shape[1]]] * n, None, there.expand(n, -1), deep)
        logits: Tensor = self.language.lm_head(hidden[:, asked.shape[1] - 1 :])
        return logits

    def _there(self, tokens: Tensor) -> Tensor:
        return (tokens == self.config.image_token_id) | (tokens == self.config.video_token_id)

    def _grids(self, visuals: Sequence[Tensor]) -> Tensor:
        """(t, h, w) of the patches of each, int64 [N, 3]."""
        shapes = [(0, *v.shape[1:]) if v.ndim == 3 else (len(v), *v.shape[2:]) for v in visuals]
        found = [self.looks.grid(*shape) for shape in shapes]
        return torch.tensor([[t, h * self.looks.merge, w * self.looks.merge] for t, h, w in found])


def standing(there: Tensor, grids: Sequence[Grid]) -> tuple[list[Grid], list[Grid]]:
    """The grids whose tokens stand in a row, each with where it begins, and those that are left for rows after it.

    Args:
        there: bool [L], the row's visual tokens. grids: in their order, whose `start` is not known yet.

    Raises ValueError where the row's visual tokens are not those of whole grids.
    """
    places = there.nonzero()[:, 0].tolist()
    found: list[Grid] = []
    at = 0
    for grid in grids:
        if at >= len(places):
            break
        found.append(Grid(places[at], grid.t, grid.h, grid.w, grid.step))
        at += grid.tokens
    if at != len(places):
        raise ValueError(
            f"{len(places)} placeholders, but {at} visual tokens: give each picture its `tokens`"
        )
    return found, list(grids[len(found) :])


def build(
    processor: Any,
    *,
    weights: str | None = None,
    config: dict[str, Any] | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    attention: str = "sdpa",
) -> QwenVL:
    """As a recipe asks for it.

    Args:
        processor: its own, see `qwen_files`.
        weights: hub id or folder of a published one; or
        config: of one begun from nothing: {'model_type': 'qwen2_5_vl', 'text_config': {…}, 'vision_config': {…}}.
        min_pixels, max_pixels: of a picture and of a frame of a video; none: as the processor has them.
        attention: how the language model attends, by transformers' names: sdpa, eager, flex_attention, …; or
            `by_document.DOCUMENTS`.

    Raises MissingModel or ValueError, one sentence with the fix.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    check(weights, config)
    if attention == "flex_attention":
        raise ValueError(
            "compute.attention: flex: transformers' Qwen-VL has no such kernel: use auto or sdpa"
        )
    register()
    # the tower attends to whole frames and windows of them, for which there is no mask
    sees = attention if attention == "eager" or attention.startswith("flash") else "sdpa"
    told: dict[str, Any] = {
        "attn_implementation": {"": sees, "text_config": attention, "vision_config": sees},
        "dtype": torch.float32,
    }
    name = weights or (config or {}).get("model_type")
    try:
        if config is not None:
            made = AutoModelForImageTextToText.from_config(
                configuration(filled(config, processor.tokenizer)), **told
            )
        elif on_meta():
            made = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(str(weights)), **told)
        else:
            transformers_weights(str(weights))
            made = whole(AutoModelForImageTextToText.from_pretrained, str(weights), **told)
    except MissingModel:
        raise
    except (OSError, KeyError, ValueError, TypeError, ImportError, RuntimeError) as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise MissingModel(
            f"model {name!r} cannot be made ({first}): name a Qwen2-VL, Qwen2.5-VL or Qwen3-VL"
        ) from e
    return of(made, bounded(processor, min_pixels, max_pixels))


def of(published: Any, processor: Any) -> QwenVL:
    """A published model of these classes, whose weights it shares, which looks as its processor does.

    Raises MissingModel for another class.
    """
    kind = published.config.model_type
    if kind not in KINDS:
        raise MissingModel(f"a {kind} is no model of Qwen-VL's kind that trains: name a {' or '.join(KINDS)}")
    return QwenVL(published, looks(processor, published.config))


def check(weights: str | None, config: dict[str, Any] | None) -> None:
    """Raises ValueError where not one of both is given, or of another model."""
    if (weights is None) == (config is None):
        raise ValueError(
            "model: give weights, a hub id or folder of a Qwen-VL, or config, to begin from nothing"
        )
    if config is not None and config.get("model_type") not in KINDS:
        raise ValueError(
            f"model.config: model_type {config.get('model_type')!r} is none of {', '.join(KINDS)}"
        )


def save(model: QwenVL, folder: Any, processor: Any) -> None:
    """Weights, configuration and processor in the published layout, as `transformers` loads them."""
    with torch.device("meta"):
        written: Any = type(model.published)(model.config)
    weights = published_weights(model)
    written.load_state_dict({name: weights[name] for name in written.state_dict()}, assign=True)
    written.tie_weights()
    written.generation_config = model.published.generation_config
    with silent():
        written.save_pretrained(folder)
    processor.save_pretrained(folder)


def published_weights(model: QwenVL) -> dict[str, Tensor]:
    """By the names that they have in the published class."""
    several = isinstance(model.projector, Merging)
    names = {
        "tower.": "model.visual.",
        "projector.": "model.visual." if several else "model.visual.merger.",
        "language.model.": "model.language_model.",
        "language.lm_head.": "lm_head.",
    }
    weights = {}
    for name, value in model.state_dict().items():
        ours, theirs = next((a, b) for a, b in names.items() if name.startswith(a))
        weights[theirs + name.removeprefix(ours)] = value
    return weights
