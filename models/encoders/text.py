"""Captions to features a token, for denoisers that attend to text: a pretrained encoder, frozen, or words.

Both are called as

    features, mask = encoder(texts)      list[str] of B → [B, L, width], bool [B, L]

L is fixed, so that a caption's features depend on no other caption of the batch and shapes never change.
mask is True where there is a token; an empty text has a row of all False: 'no text', as `Condition` means it.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import AttentionLayer, Mask, join_heads, split_heads
from models.hub import MissingModel, transformers_weights

TOWERS = {"clip": "CLIPTextModel", "siglip": "SiglipTextModel"}  # of two-tower checkpoints only the text one


class WordText(nn.Module):
    """A small transformer over words, trained along with the denoiser: no vocabulary file, no weights to fetch.

    A word is the sum of two rows of a table, drawn by its hash (Svenstrup et al. 2017): words that share one
    row still differ by the other. Letters would have to be put together to words first, which takes a small
    model longer than everything else that it learns.

    Args:
        length: L, words and signs; longer captions are cut.
        depth: transformer blocks; 0 leaves embeddings of words and positions.
        rows: of the table; as many as there are words is plenty.
    """

    def __init__(self, length: int = 64, width: int = 192, depth: int = 2, rows: int = 8192, heads: int = 4):
        super().__init__()
        if width % heads:
            raise ValueError(f"text width {width} is no multiple of {heads} heads; give one that is")
        self.length, self.width = length, width
        self.embed = nn.EmbeddingBag(rows, width, mode="sum")
        nn.init.normal_(self.embed.weight, std=0.5**0.5)  # of a word: 1
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        found = [words(text)[: self.length] for text in texts]
        device, rows = self.position.device, self.embed.num_embeddings
        mask = torch.tensor([[i < len(row) for i in range(self.length)] for row in found], device=device)
        places = [
            [h % rows for h in hashes(row[i])] if i < len(row) else [0, 0]
            for row in found
            for i in range(self.length)
        ]
        # no shape depends on the words, and the table takes part where there are none
        word = self.embed(torch.tensor(places, device=device)).unflatten(0, mask.shape)  # B L D
        x = torch.where(mask[..., None], self.position + word, self.position)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x), mask


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words in lower case, signs, and each Chinese or Japanese letter, in order."""
    return _WORD.findall(text.lower())


@lru_cache(maxsize=1 << 16)
def hashes(word: str) -> tuple[int, int]:
    """Two independent numbers of 64 bits, the same on every machine."""
    digest = hashlib.blake2b(word.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class _Block(AttentionLayer):
    """Self-attention, then an MLP, each after a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        x = x + self.out(join_heads(self.attend(q, k, v, Mask.padding(mask))))
        return x + self.mlp(self.norms[1](x))


class PretrainedText(nn.Module):
    """Any text encoder of `transformers`, frozen: CLIP's text tower, T5's encoder, a language model's states.

    It stays in eval mode and without gradients whatever is asked of a module around it.

    Args:
        model: hub id or folder with weights and tokenizer.
        length: L, most tokens; longer captions are cut. At most what the model has positions for.
        layer: which of its hidden states, counted as `transformers` does: 0 the embeddings, −1 the last,
            −2 the one before (as many image models take of CLIP). None: the output after the last norm.
        dtype: of its weights; features come in it too.

    Raises MissingModel: one sentence with the fix.
    """

    def __init__(
        self, model: str, length: int = 77, layer: int | None = None, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        transformers_weights(model)
        self.model: Any = _load(model, dtype).requires_grad_(False).eval()
        self.tokenizer = _tokenizer(model)
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or length
        layers = config.num_hidden_layers
        if layer is not None and not -layers - 1 <= layer <= layers:
            raise ValueError(
                f"layer {layer} of {model}: it has hidden states 0 to {layers}, or −1 to {-layers - 1}"
            )
        self.width: int = config.hidden_size
        self.length, self.layer = min(length, positions), layer

    @torch.no_grad()
    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        ids, mask = (tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        out = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=self.layer is not None)
        features = out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]
        return features, mask.bool() & _said(texts, mask.device)

    def train(self, mode: bool = True) -> PretrainedText:
        return super().train(False)


def _load(model: str, dtype: torch.dtype) -> Any:
    """The text part of a checkpoint: of an encoder-decoder the encoder, of CLIP the text tower."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as ENCODERS

    try:
        kind = transformers.AutoConfig.from_pretrained(model).model_type
        auto = "AutoModelForTextEncoding" if kind in ENCODERS else "AutoModel"
        loader = getattr(transformers, TOWERS.get(kind, auto))
        return loader.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError, KeyError) as e:
        raise MissingModel(
            f"text model {model!r} is none that transformers loads ({_first_line(e)}): name a text encoder"
        ) from e


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="right")
    except (OSError, ValueError, KeyError) as e:
        raise MissingModel(
            f"text model {model!r} has no tokenizer ({_first_line(e)}): save one beside the weights"
        ) from e
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def _said(texts: list[str], device: torch.device) -> Tensor:
    """bool [B, 1], False where a text is empty."""
    return torch.tensor([bool(t.strip()) for t in texts], device=device)[:, None]
