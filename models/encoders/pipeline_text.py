"""The text encoders of an image model's pipeline, as its network was trained with them: Stable Diffusion 1.x, 2.x, XL.

Every place of a text is attended to, its padding too. 'No text' is the encoding of an empty one, or zeros where the
pipeline says so (XL: `force_zeros_for_empty_prompt`). XL reads the last layer but one of two encoders, side by side,
and the second one's pooled text.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.hub import MissingModel

TOWERS = ("", "_2")  # folders text_encoder, tokenizer and text_encoder_2, tokenizer_2


class PipelineText(nn.Module):
    """Texts → features [B, L, D], all of which are attended to; frozen.

    pooled_width: features of the pooled text; 0 where the image model takes none.

    Args:
        folder: of a pipeline in diffusers' format.

    Raises MissingModel: one sentence with the fix.
    """

    def __init__(self, folder: str, dtype: torch.dtype = torch.float32):
        super().__init__()
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

        here = Path(folder)
        self.tokenizers: list[Any] = []
        self.towers = nn.ModuleList()
        for tower in (t for t in TOWERS if (here / f"text_encoder{t}").is_dir()):
            kind: Any = CLIPTextModelWithProjection if tower else CLIPTextModel
            try:
                model = kind.from_pretrained(here / f"text_encoder{tower}", dtype=dtype)
                tokenizer = AutoTokenizer.from_pretrained(here / f"tokenizer{tower}", padding_side="right")
            except (OSError, ValueError, KeyError) as e:
                said = (str(e).strip() or type(e).__name__).splitlines()[0]
                raise MissingModel(
                    f"{folder} holds no CLIP text encoder{tower} with its tokenizer ({said}): copy the whole pipeline"
                ) from e
            self.towers.append(model.requires_grad_(False).eval())
            self.tokenizers.append(tokenizer)
        if not self.towers:
            raise MissingModel(
                f"{folder} has no text_encoder: name the folder of a whole pipeline in diffusers' format"
            )
        configs: list[Any] = [tower.config for tower in self.towers]
        self.width: int = sum(config.hidden_size for config in configs)
        self.length: int = min(config.max_position_embeddings for config in configs)
        self.pooled_width: int = configs[-1].projection_dim if len(configs) > 1 else 0
        index = here / "model_index.json"
        said = json.loads(index.read_text()) if index.is_file() else {}
        self.zeros = bool(said.get("force_zeros_for_empty_prompt", len(configs) > 1))

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Features [B, L, D] and bool [B, L], all True."""
        features, _ = self.encode(texts)
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor | None]:
        """Features [B, L, D] and pooled text [B, P], or None; of empty texts those of 'no text'."""
        features, pooled = self._encode(texts)
        empty = torch.tensor([not t.strip() for t in texts], device=features.device)
        no_text, no_pooled = self.nothing
        features = torch.where(empty[:, None, None], no_text, features)
        if pooled is None or no_pooled is None:
            return features, None
        return features, torch.where(empty[:, None], no_pooled, pooled)

    @cached_property
    def nothing(self) -> tuple[Tensor, Tensor | None]:
        """What stands for 'no text': [1, L, D] and [1, P] or None."""
        features, pooled = self._encode([""])
        if self.zeros:
            return features * 0, None if pooled is None else pooled * 0
        return features, pooled

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor | None]:
        found, pooled = [], None
        for tower, tokenizer in zip(self.towers, self.tokenizers, strict=True):
            ids = tokenizer(
                texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            ).input_ids.to(next(tower.parameters()).device)
            out = tower(ids, output_hidden_states=self.pooled_width > 0)
            if self.pooled_width:
                found.append(out.hidden_states[-2])
                pooled = out[0]  # of the second, what its projection made of the last token
            else:
                found.append(out.last_hidden_state)
        return torch.cat(found, dim=-1), pooled

    def train(self, mode: bool = True) -> PipelineText:
        return super().train(False)
