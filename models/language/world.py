"""A causal transformer over words and visual tokens in one sequence: LLaMA with a second vocabulary.

The trunk is LLaMA's (Touvron et al. 2023): RMS norms, rotary positions, SwiGLU, keys and values shared by groups of
query heads (Ainslie et al. 2023); visual tokens have an embedding and a head of their own, chosen by a mask (Large
World Model, Liu et al. 2024, sec. 3.1). Documents lie end to end in a sequence, each with positions from 0 on and
seeing itself only. θ, the base of the rotary rates, is no weight: a longer context is trained with a larger one.

B: batch rows, L: places, D: dim, H: heads, G: heads of keys and values, W: width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import (
    AttentionLayer,
    Kernel,
    Mask,
    RMSNorm,
    Rotary,
    Tokens,
    join_heads,
    owners,
    rotary_rates,
    split_heads,
)
from models.language import llama, lwm
from models.language.loss import Goal, Lengths, restarted, summed_in_chunks, with_padding

PRESETS: dict[str, dict[str, Any]] = {
    "XS": {"dim": 192, "ffn": 512, "heads": 6, "depth": 6},  # small enough for a CPU
    "S": {"dim": 384, "ffn": 1024, "heads": 6, "depth": 12},
    "B": {"dim": 768, "ffn": 2048, "heads": 12, "depth": 12},
    "1B": {"dim": 2048, "ffn": 5632, "heads": 32, "groups": 4, "depth": 22},
    "7B": {"dim": 4096, "ffn": 11008, "heads": 32, "depth": 32},  # of LLaMA 2 and Large World Model
}
THETA = {32_768: 1e6, 131_072: 1e7, 262_144: 1e7, 524_288: 2.5e7, 1_048_576: 5e7}
"""θ by context, in tokens, of Large World Model's stages (Liu et al. 2024, tab. 1)."""


class Places(NamedTuple):
    """Where the tokens of a batch stand, and what each may look at. Make it once a batch, for all layers."""

    positions: Tensor  # int64 [L] or [B, L], in the token's document
    mask: Mask

    @classmethod
    def packed(cls, lengths: Lengths, length: int, device: torch.device | None = None) -> Places:
        """Of sequences of `length` places, see `models.language.loss`; padding is as one more document."""
        rows = with_padding(lengths, length)
        positions = restarted(rows, device)
        if len(rows) == 1:
            return cls(positions[0], Mask.documents(rows[0], device=device).in_order(length, device=device))
        side = Tokens(torch.stack([owners(row, device) for row in rows]))
        return cls(positions, Mask(side, side).in_order(length, device=device))

    def part(self, start: int, stop: int) -> Places:
        """Of the queries from start to stop, which see the keys up to stop, as a cache holds them."""
        return Places(self.positions[..., start:stop], self.mask.part((start, stop), (0, stop)))


class Goals(NamedTuple):
    """What a batch is to learn, by kind."""

    text: Goal
    vision: Goal | None = None


class Said(NamedTuple):
    """Of text and of visual tokens: logits [B, L, words] and [B, L, codes] of what comes next; or, where goals were
    given, Σ w · cross-entropy."""

    text: Tensor
    vision: Tensor | None = None


class World(nn.Module):
    """Next-token logits over `words` text tokens and `codes` visual ones.

    Args:
        codes: <eof> and <eov> included; None: text alone.
        ffn: width of the MLPs' hidden layer.
        groups: heads of keys and values, of which `heads` is a multiple; None: as many.
        head: width of a head; None: dim / heads.
        theta: base of the rotary rates. eps: of the norms.
        tied: the head over text is the text's embedding.
        std: of the first weights; 1/√dim suits any size, and a small model learns much sooner by it than by LLaMA's.

    Raises ValueError for sizes that do not fit each other.
    """

    def __init__(
        self,
        words: int,
        codes: int | None = 8448,
        *,
        dim: int = 384,
        ffn: int = 1024,
        heads: int = 6,
        groups: int | None = None,
        head: int | None = None,
        depth: int = 12,
        theta: float = 10_000.0,
        eps: float = 1e-5,
        tied: bool = False,
        std: float = 0.02,
    ):
        super().__init__()
        groups = groups or heads
        if head is None and dim % heads:
            raise ValueError(f"heads={heads} does not divide dim={dim}: choose a divisor")
        self.heads, self.groups, self.head_width = heads, groups, head or dim // heads
        if heads % groups or self.head_width % 2:
            raise ValueError(
                f"heads={heads}, groups={groups}, of width {self.head_width}: groups must divide heads, and rotary "
                "positions need an even width"
            )
        self.theta, self.eps, self.tied, self.ffn = theta, eps, tied, ffn
        self.embed = nn.Embedding(words, dim)
        self.vision_embed = nn.Embedding(codes, dim) if codes else None
        self.blocks = nn.ModuleList(
            Block(dim, ffn, heads, groups, self.head_width, eps) for _ in range(depth)
        )
        self.norm = RMSNorm(dim, eps)
        self.head = nn.Linear(dim, words, bias=False)
        self.vision_head = nn.Linear(dim, codes, bias=False) if codes else None
        self._initialise(std)
        if tied:
            self.head.weight = self.embed.weight

    def _initialise(self, std: float) -> None:
        """N(0, std²); what is added to the residual stream less, so that it does not grow with depth (GPT-2)."""
        for name, p in self.named_parameters():
            if p.ndim > 1:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=std / (2 * len(self.blocks)) ** 0.5 if last else std)

    def forward(
        self,
        tokens: Tensor,
        vision: Tensor | None = None,
        places: Places | None = None,
        *,
        goals: Goals | None = None,
        cache: Cache | None = None,
        last: bool = False,
    ) -> Said:
        """tokens int64 [B, L], of which `vision` (bool [B, L]; None: none) are visual.

        Args:
            places: None: each row is one document, which in a cache goes on.
            goals: the losses are wanted, not the logits.
            cache: of the places before; these are added to it.
            last: the logits of the last place only, [B, 1, …].
        """
        before = cache.length if cache is not None else 0
        length = before + tokens.shape[1]
        if places is None:
            places = Places.packed([length], length, tokens.device).part(before, length)
        x = self._embedded(tokens, vision)
        turn = rotary(places.positions, self.head_width, self.theta)
        mask = places.mask.prepared(self.kernel, tokens.shape[1], length, tokens.device)
        for i, block in enumerate(self.blocks):
            x = block(x, turn, mask, cache.layers[i] if cache is not None else None)
        x = self.norm(x[:, -1:] if last else x)
        if goals is None:
            return Said(self.head(x), None if self.vision_head is None else self.vision_head(x))
        seen = None
        if self.vision_head is not None and goals.vision is not None:
            seen = summed_in_chunks(self.vision_head, x, goals.vision)
        return Said(summed_in_chunks(self.head, x, goals.text), seen)

    def _embedded(self, tokens: Tensor, vision: Tensor | None) -> Tensor:
        if self.vision_embed is None:
            if vision is not None and bool(vision.any()):
                raise ValueError("visual tokens, but the model was built for text alone: give it codes")
            return self.embed(tokens)
        seen = torch.zeros_like(tokens, dtype=torch.bool) if vision is None else vision
        words, codes = tokens.masked_fill(seen, 0), tokens.masked_fill(~seen, 0)
        return torch.where(seen[..., None], self.vision_embed(codes), self.embed(words))

    @property
    def kernel(self) -> Kernel:
        """That `choose_kernel` chose."""
        first: Any = self.blocks[0]
        return first.attention.kernel

    def cache(self, capacity: int) -> Cache:
        """An empty one, for sequences of at most `capacity` places."""
        return Cache([Held(capacity) for _ in self.blocks])


class Block(nn.Module):
    """Attention and SwiGLU, each after a norm and added to x [B, L, D]."""

    def __init__(self, dim: int, ffn: int, heads: int, groups: int, head: int, eps: float):
        super().__init__()
        self.attention_norm = RMSNorm(dim, eps)
        self.attention = GroupedAttention(dim, heads, groups, head)
        self.mlp_norm = RMSNorm(dim, eps)
        self.mlp = SwiGLU(dim, ffn)

    def forward(self, x: Tensor, turn: Rotary, mask: Mask | None, held: Held | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, mask, held)
        return x + self.mlp(self.mlp_norm(x))


class GroupedAttention(AttentionLayer):
    """Self-attention whose H query heads share G heads of keys and values, [B, L, D] → [B, L, D]."""

    def __init__(self, dim: int, heads: int, groups: int, head: int):
        super().__init__()
        self.heads, self.groups = heads, groups
        self.q, self.k, self.v = (nn.Linear(dim, n * head, bias=False) for n in (heads, groups, groups))
        self.out = nn.Linear(heads * head, dim, bias=False)

    def forward(self, x: Tensor, turn: Rotary, mask: Mask | None, held: Held | None = None) -> Tensor:
        q = turn.turn(split_heads(self.q(x), self.heads))  # B H L W
        k = turn.turn(split_heads(self.k(x), self.groups))  # B G L W
        v = split_heads(self.v(x), self.groups)
        if held is not None:
            k, v = held.add(k, v)
        return self.out(join_heads(self.attend(q, k, v, mask)))


class SwiGLU(nn.Module):
    """down(SiLU(gate x) · up x) (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotary(positions: Tensor, size: int, theta: float) -> Rotary:
    """Angles of positions [L] or [B, L], float32."""
    angle = positions[..., None] * rotary_rates(size // 2, theta, positions.device)
    angle = angle[:, None] if positions.ndim == 2 else angle  # for all heads
    return Rotary(angle.cos().float(), angle.sin().float())


class Held:
    """Keys and values of a layer, [B, G, capacity, W] of which the first `length` places are filled."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.keys = self.values = torch.empty(0)

    def add(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All so far, these included. Raises ValueError where they do not fit."""
        start, stop = self.length, self.length + k.shape[2]
        if stop > self.capacity:
            raise ValueError(f"{stop} places, but the cache was made for {self.capacity}")
        if not start:
            self.keys, self.values = (x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (k, v))
        self.keys[:, :, start:stop], self.values[:, :, start:stop] = k, v
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class Cache:
    """What a sequence that grows need not compute again. For inference: it knows no gradients."""

    def __init__(self, layers: Sequence[Held]):
        self.layers = list(layers)

    @property
    def length(self) -> int:
        return self.layers[0].length

    def copies(self, rows: int) -> Cache:
        """Another, of so many rows that go on from the one that is here."""
        found = []
        for held in self.layers:
            copy = Held(held.capacity)
            copy.length = held.length
            copy.keys, copy.values = (x.repeat(rows, 1, 1, 1) for x in (held.keys, held.values))
            found.append(copy)
        return Cache(found)

    def keep(self, rows: slice) -> None:
        """Only these rows of the batch go on."""
        for held in self.layers:
            held.keys, held.values = held.keys[rows], held.values[rows]


def build(
    words: int,
    codes: int | None = 8448,
    *,
    weights: str | None = None,
    dim: int | None = None,
    ffn: int | None = None,
    heads: int | None = None,
    groups: int | None = None,
    head: int | None = None,
    depth: int | None = None,
    theta: float | None = None,
    eps: float | None = None,
    tied: bool | None = None,
    std: float | None = None,
) -> World:
    """A `World` of a preset or sizes, or, with `weights`, a published one.

    Args:
        words: text tokens; a published model may have more.
        weights: a folder in the layout of `transformers`' LLaMA, or a file of Large World Model's own. It has the
            sizes; only `theta` may be given beside it. What it has no weights of (the visual embedding and head, of a
            model of text) begins at random.
        dim … std: of `World`; None: as it has them, or as the weights do.

    Raises ValueError for weights that cannot be taken.
    """
    sizes = {"dim": dim, "ffn": ffn, "heads": heads, "groups": groups, "head": head, "depth": depth}
    given: dict[str, Any] = sizes | {"theta": theta, "eps": eps, "tied": tied, "std": std}
    options = {name: value for name, value in given.items() if value is not None}
    if weights is None:
        return World(words, codes, **options)
    stream = lwm.read(weights) if Path(weights).is_file() else None
    found = llama.options(weights) if stream is None else lwm.options(stream, options.get("heads"))
    if found["words"] < words:
        raise ValueError(f"weights={weights} knows {found['words']} text tokens, the tokenizer has {words}")
    if differs := sorted(k for k, v in options.items() if k not in ("theta", "std") and found.get(k) != v):
        raise ValueError(
            f"weights={weights} has {differs[0]} {found.get(differs[0])}: leave {differs[0]} out"
        )
    if found["codes"] not in (None, codes):
        raise ValueError(
            f"weights={weights} knows {found['codes']} visual tokens: give codes={found['codes']}"
        )
    model = World(**found | {"codes": codes} | options)
    if stream is None:
        llama.load(model, weights)
    elif lacking := model.state_dict().keys() - stream.keys() - set(() if found["codes"] else llama.VISION):
        raise ValueError(f"weights={weights} lacks {min(lacking)}: give a whole model's")
    else:
        model.load_state_dict(stream, strict=False)
    return model
