"""What a trainer, a conversation and an evaluation ask of a vision–language model, whatever it is made of.

    models/language/llava.py     tower → projector → any language model; pictures are squares of one size
    models/language/qwen_vl.py   a Qwen-VL of `transformers`; pictures at their own size, three positions a token

B: sequences; L: tokens of one; V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.language.loss import Goal, Lengths

Parts = dict[str, list[nn.Module]]


class Seeing(nn.Module):
    """Next-token logits of sequences with pictures in them.

    Its parameters' names begin with `tower`, `projector` and `language`, by which a recipe gives parts rates, freezes
    or adapts them. `language` has what reads, with its head.
    """

    tower: Any
    projector: Any
    language: Any

    def parts(self) -> Parts:
        """The modules of each part."""
        return {"tower": [self.tower], "projector": [self.projector], "language": [self.language]}

    def blocks(self) -> Iterator[nn.Module]:
        """The repeated blocks of what sees and what reads."""
        parts = self.parts()
        for part in (*parts["tower"], *parts["language"]):
            yield from blocks_of(part)

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
        """tokens [L] or [B, L] → logits [L, V] or [B, L, V]; with a goal its loss; with `answer` its answers.

        Args:
            visuals: images [3, H, W] and videos [T, 3, H, W], scaled for the tower, in the order of their placeholders.
            lengths: of the documents that lie end to end in a sequence, which do not see each other; of [B, L] a list
                each. What is left is padding. None: a sequence is one document.
            positions: of the tokens, int64, as the model counts them; None: as it counts them itself.
            keep: int64 [n], places whose logits are wanted, the same in all sequences: [n, V] or [B, n, V].
            goal: gives `loss.summed` at its places, a scalar, without ever holding the logits of all.
            kept: of each picture which of its tokens are there, bool [t, h, w]; None: all; see `budget.moving`.
            texts: int64 [m] of each picture, what is written about it; None: nothing.
            answer: options of `generate`, which is called in place of all else: a sharded model's weights are there
                inside of its forward pass alone.

        Raises ValueError where there are not as many placeholders as visual tokens, or documents cannot be kept apart.
        """
        raise NotImplementedError

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Visual tokens of a clip, or of an image (1 frame), of such a size."""
        raise NotImplementedError

    def generate(self, tokens: Tensor, visuals: Sequence[Tensor] = (), **options: Any) -> Tensor:
        """Answers to prompts [B, L], filled up at the left, int64 [B, new tokens]; options: `there`, bool [B, L], where
        a prompt is, what `forward` takes, what the model takes beside it, and those of transformers' `generate`."""
        raise NotImplementedError

    # Logits [n, m, V] at each token of answers [n, m] to one prompt [1, L], whose visuals are looked at once: called
    # with (asked, answers, visuals), and what else the model takes of them by name.
    following: Callable[..., Tensor]


def blocks_of(part: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a tower or language model."""
    lists = [list(m) for m in part.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def put(x: Tensor, there: Tensor, seen: Tensor) -> Tensor:
    """Embeddings x [B, L, D] with visual tokens [n, D] where bool [B, L] says; on an accelerator nobody waits for the
    answer whether they are as many. Raises ValueError: they are not."""
    if there.device.type != "cpu":
        torch._assert_async(there.sum() == len(seen))
    elif (n := int(there.sum())) != len(seen):
        raise ValueError(f"{n} placeholders, but {len(seen)} visual tokens: give each picture its `tokens`")
    return x.masked_scatter(there[..., None], seen.to(x.dtype))
