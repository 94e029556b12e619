"""A vision–language model in LLaVA's form: tower → projector → tokens of any causal language model of `transformers`.

Liu et al. 2023 (LLaVA). A placeholder token stands for each visual token; what the tower sees is scattered into their
places, images, several images and videos alike, in the order in which they appear. Parts are called `tower`,
`projector` and `language`, by which a recipe gives them rates or freezes them.

B: sequences; L: tokens of one; V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.encoders import vivit_file
from models.hub import MissingModel, open_clip_weights, silent, transformers_weights, whole
from models.language.by_document import apart, register
from models.language.loss import Goal, Lengths, restarted, rows_of, summed, summed_in_chunks, with_padding
from models.language.projectors import Projector, QFormer, projector
from models.language.reading import TextBranch
from models.language.seeing import Parts, Seeing, put
from models.language.towers import VIVIT, Tower, configuration, on_meta, tower

ONEVISION = {"map": "mlp", "pool": 2, "newline": "clip", "whole_images": True}

PRESETS: dict[str, dict[str, Any]] = {
    # begun from nothing, small enough for a CPU
    "tiny": {
        "tower": {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
        },
        "language": {
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        "layer": -1,
    },
    # nanoVLM's: 64 tokens a tile of 512²
    "nano": {
        "tower": "google/siglip2-base-patch16-512",
        "language": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "projector": {"map": "linear", "shuffle": 4},
        "layer": -1,
    },
    "onevision-0.5B": {
        "tower": "google/siglip-so400m-patch14-384",
        "language": "Qwen/Qwen2.5-0.5B-Instruct",
        "projector": ONEVISION,
        "layer": -1,
    },
    "onevision-7B": {
        "tower": "google/siglip-so400m-patch14-384",
        "language": "Qwen/Qwen2.5-7B-Instruct",
        "projector": ONEVISION,
        "layer": -1,
    },
    "llava-1.5-7B": {"tower": "openai/clip-vit-large-patch14-336", "language": "lmsys/vicuna-7b-v1.5"},
}


@dataclass(frozen=True)
class Placeholders:
    """Ids of the tokens in whose places images and videos are put."""

    image: int
    video: int


class Llava(Seeing):
    """Next-token logits of sequences with pictures in them.

    Args:
        tower, projector, language: see `models.language.towers`, `projectors`; a causal language model.
        placeholders: of its vocabulary.
        video_tower: for clips of more than one frame (Video-LLaVA); as wide as `tower`, before the same projector.
        reader: of what is written about a picture or clip; then each takes twice as many tokens.

    Raises ValueError for parts that do not fit each other.
    """

    def __init__(
        self,
        tower: Tower,
        projector: Projector | QFormer,
        language: Any,
        placeholders: Placeholders,
        video_tower: Tower | None = None,
        reader: TextBranch | None = None,
    ):
        super().__init__()
        dim = language.get_input_embeddings().embedding_dim
        if projector.width != tower.width or projector.dim != dim:
            raise ValueError(
                f"the projector goes from {projector.width} to {projector.dim}, the tower has {tower.width}, the "
                f"language model {dim}"
            )
        if video_tower is not None and video_tower.width != tower.width:
            raise ValueError(
                f"video_tower is {video_tower.width} wide, tower {tower.width}: one projector serves both"
            )
        self.tower, self.projector, self.language, self.video_tower = tower, projector, language, video_tower
        self.placeholders, self.reader = placeholders, reader
        for module in (
            self.modules()
        ):  # a model that is made on the meta device has of a checkpoint what no one computes
            module._non_persistent_buffers_set.clear()

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
        """See `Seeing.forward`. positions: int [L] or [B, L]; texts: for the `reader`; kept: of `grid`."""
        rows = tokens if tokens.ndim > 1 else tokens[None]
        if answer is not None:
            return self.generate(rows, visuals, kept=kept, texts=texts, **answer)
        each = with_padding([[rows.shape[1]]] * len(rows) if lengths is None else lengths, rows.shape[1])
        given = {
            "inputs_embeds": self.embed(rows, visuals, kept, texts),
            "position_ids": restarted(each, rows.device) if positions is None else positions.view_as(rows),
            "use_cache": False,
            **apart(
                self.language.config,
                self.language.dtype,
                each,
                rows.device,
                placed=positions is not None,
                single=lengths is None or all(len(row) <= 1 for row in rows_of(lengths)),
            ),
        }
        if goal is not None and not scales_logits(self.language.config):
            hidden = self.language.base_model(**given).last_hidden_state
            return summed_in_chunks(self.language.get_output_embeddings(), hidden, goal)
        logits = self.language(**given, **({} if keep is None else {"logits_to_keep": keep})).logits
        if goal is not None:
            return summed(logits.flatten(0, 1)[goal.at], goal.targets, goal.weights)
        return logits if tokens.ndim > 1 else logits[0]

    def embed(
        self,
        tokens: Tensor,
        visuals: Sequence[Tensor] = (),
        kept: Sequence[Tensor | None] | None = None,
        texts: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """tokens [B, L] → what goes into the language model, [B, L, dim]."""
        x = self.language.get_input_embeddings()(tokens)
        there = (tokens == self.placeholders.image) | (tokens == self.placeholders.video)
        parts = [*self.see(visuals, kept, texts), *self._glances(visuals)]
        return put(x, there, torch.cat(parts) if parts else x[0, :0])

    def see(
        self,
        visuals: Sequence[Tensor],
        kept: Sequence[Tensor | None] | None = None,
        texts: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Images [3, H, W] and videos [T, 3, H, W] → tokens [n, dim] each. Args: kept, texts: see `forward`."""
        clips = [v if v.ndim == 4 else v[None] for v in visuals]
        moving = [i for i, clip in enumerate(clips) if self.video_tower is not None and len(clip) > 1]
        still = sorted(set(range(len(clips))) - set(moving))
        features: dict[int, Tensor] = {}
        for chosen, eye in ((still, self.tower), (moving, self.video_tower)):
            if eye is not None and chosen:
                features |= zip(chosen, eye.each([clips[i] for i in chosen]), strict=True)
        tokens = (self.projector(features[i][None])[0] for i in range(len(clips)))
        chosen_tokens = zip(tokens, [None] * len(clips) if kept is None else kept, strict=True)
        seen = [x if there is None else x[there.flatten()] for x, there in chosen_tokens]
        if self.reader is None or not seen:
            return seen
        table = self.language.get_input_embeddings()
        none = torch.zeros(0, dtype=torch.long, device=seen[0].device)
        written = [table(x) for x in (texts or [none] * len(seen))]
        return [torch.cat(both) for both in zip(seen, self.reader(seen, written), strict=True)]

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Visual tokens of a clip, or of an image (1 frame), and as many of what is written about it."""
        seen = self.projector.tokens(*self._eye(frames).grid(frames, height, width))
        return seen if self.reader is None else 2 * seen

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of those tokens. Raises ValueError where newlines stand between them, or they have no places."""
        if self.reader is not None:
            raise ValueError("tokens of what is written about a clip have no places: leave `reader` out")
        return self.projector.grid(*self._eye(frames).grid(frames, height, width))

    def _eye(self, frames: int) -> Tower:
        return self.tower if frames == 1 or self.video_tower is None else self.video_tower

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        visuals: Sequence[Tensor] = (),
        there: Tensor | None = None,
        kept: Sequence[Tensor | None] | None = None,
        texts: Sequence[Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """Answers to prompts [B, L], int64 [B, new tokens].

        Args:
            there: bool [B, L], False in padding, at the left.
            kept, texts: see `forward`.
            options: of transformers' `generate`.
        """
        mask = torch.ones_like(tokens) if there is None else there.long()
        embedded = self.embed(tokens, visuals, kept, texts)
        return self.language.generate(inputs_embeds=embedded, attention_mask=mask, **options)

    def following(
        self,
        asked: Tensor,
        answers: Tensor,
        visuals: Sequence[Tensor] = (),
        kept: Sequence[Tensor | None] | None = None,
        texts: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Logits [n, m, V] at each token of answers [n, m] to one prompt [1, L]. Args: kept, texts: see `forward`."""
        before = self.embed(asked, visuals, kept, texts)  # 1 L D
        said = self.language.get_input_embeddings()(answers[:, :-1]).to(before.dtype)
        x = torch.cat([before.expand(len(answers), -1, -1), said], 1)
        places = torch.arange(asked.shape[1] - 1, x.shape[1], device=x.device)
        logits: Tensor = self.language(inputs_embeds=x, use_cache=False, logits_to_keep=places).logits
        return logits

    def parts(self) -> Parts:
        towers = [self.tower, self.video_tower]
        joining = [self.projector, self.reader]
        return {
            "tower": [x for x in towers if x is not None],
            "projector": [x for x in joining if x is not None],
            "language": [self.language],
        }

    def _glances(self, visuals: Sequence[Tensor]) -> list[Tensor]:
        """In training no tokens, [0, dim], of a look at a blank picture through each tower that saw nothing.

        So that each part takes part in each step, as DDP and FSDP expect, of which some ranks have no pictures.
        """
        if not (self.training and torch.is_grad_enabled()):
            return []
        moving = [v.ndim == 4 and len(v) > 1 for v in visuals]
        frame = next(self.projector.parameters()).new_zeros(1, 3, self.tower.size, self.tower.size)
        blank = []
        if not visuals or (all(moving) and self.video_tower is not None):
            blank.append(frame)
        if not any(moving) and self.video_tower is not None:
            blank.append(frame.expand(2, -1, -1, -1))
        return [tokens[:0] for tokens in self.see(blank)]


def scales_logits(config: Any) -> bool:
    """Whether a language model does more than its head with hidden states, as Gemma, Cohere and Granite do."""
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "mup_width_multiplier")
    return any(getattr(config, name, None) not in (None, 1.0) for name in names)


def build(
    placeholders: Placeholders,
    *,
    tower: str | dict[str, Any],
    language: str | dict[str, Any],
    projector: dict[str, Any] | None = None,
    layer: int = -2,
    video_tower: str | dict[str, Any] | None = None,
    reader: dict[str, Any] | None = None,
    vocabulary: int | None = None,
    attention: str = "sdpa",
) -> Llava:
    """As a recipe asks for it.

    Args:
        tower: see `towers.tower`; layer: of its hidden states.
        language: hub id or folder, or a configuration to begin from nothing: {'model_type': 'qwen2', …}.
        projector: options of `Projector` or `QFormer`.
        video_tower: for clips of more than one frame.
        reader: options of `TextBranch`, which reads what is written about a clip; none: there is none.
        vocabulary: tokens that the tokenizer knows, placeholders and all; the table grows to it, and never shrinks.
        attention: how the language model attends, by transformers' names: sdpa, eager, flex_attention, …; or
            `by_document.DOCUMENTS`.

    Raises MissingModel or ValueError, one sentence with the fix.
    """
    seeing = _tower(tower, layer)
    speaking = _language(language, attention, vocabulary)
    rows = speaking.get_input_embeddings().num_embeddings
    if vocabulary is not None and rows < vocabulary:
        with silent():  # it tells how new rows begin
            speaking.resize_token_embeddings(vocabulary, mean_resizing=not on_meta())
    if max(placeholders.image, placeholders.video) >= max(rows, vocabulary or 0):
        raise ValueError(f"placeholders {placeholders}: the language model knows {rows} tokens only")
    dim = speaking.get_input_embeddings().embedding_dim
    moving = None if video_tower is None else _tower(video_tower, layer)
    reading = None if reader is None else TextBranch(dim, **reader)
    return Llava(seeing, _projector(seeing.width, dim, projector), speaking, placeholders, moving, reading)


def check(tower: str | dict[str, Any], language: str | dict[str, Any]) -> list[str]:
    """Where the parts come from, made sure of in seconds, a line each; no weights are loaded or fetched.

    Raises MissingModel: one sentence with the fix.
    """
    return [f"{name}: {source(what)}" for name, what in (("tower", tower), ("language", language))]


def source(what: str | dict[str, Any]) -> str:
    """Where a tower or language model comes from. Raises MissingModel: one sentence with the fix."""
    if isinstance(what, dict):
        return f"a {what.get('model_type')} begun from nothing"
    if what.startswith(VIVIT):
        try:
            vivit_file.options(what.removeprefix(VIVIT))
        except ValueError as e:
            raise MissingModel(f"tower {what!r}: {e}") from e
        return f"{what} in that folder"
    if what.startswith("open_clip:"):
        model, _, weights = what.removeprefix("open_clip:").partition(":")
        return f"{what} {open_clip_weights(model, weights)}" if weights else f"{what} begun from nothing"
    return f"{what} {transformers_weights(what)}"


_tower, _projector = tower, projector  # which `build` has as names of its arguments


def _language(what: str | dict[str, Any], attention: str, vocabulary: int | None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    try:
        if isinstance(what, dict):
            options = {"vocab_size": vocabulary, **what} if vocabulary else dict(what)
            config = configuration(options)
            heads, shared = (getattr(config, f"num_{x}_heads", None) for x in ("attention", "key_value"))
            if heads and shared and heads % shared:
                raise ValueError(f"{heads} heads are no multiple of num_key_value_heads {shared}")
            return AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32
            )
        told: dict[str, Any] = {"attn_implementation": attention, "dtype": torch.float32}
        if on_meta():
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(what), **told)
        transformers_weights(what)
        return whole(AutoModelForCausalLM.from_pretrained, what, **told)
    except (OSError, KeyError, ValueError, TypeError, ImportError) as e:
        name = what.get("model_type") if isinstance(what, dict) else what
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise MissingModel(
            f"language model {name!r} is none that transformers loads ({first}): name a causal one"
        ) from e
