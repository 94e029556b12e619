"""Tokenizers of vision–language models: a published one, or one trained on the captions at hand.

Whichever it is, it knows <image> and <video>, which stand for pictures, and ChatML's ends of messages. What a model was
trained with is kept as text (`files`), so that it is used without the place it came from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models.hub import MissingModel, transformers_weights
from models.language.exported import IMAGE, VIDEO

BEGIN, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL = (PAD, BEGIN, END, IMAGE, VIDEO)
LEAST = 256 + len(SPECIAL)  # tokens: every byte is one


def trained(texts: Iterable[str], size: int) -> Any:
    """A byte-level BPE of at most `size` tokens (Sennrich et al. 2016), the same for the same texts.

    Raises ValueError for a size below `LEAST`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if size < LEAST:
        raise ValueError(f"a tokenizer of {size} tokens: bytes and marks alone are {LEAST}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(texts), trainer)
    marks = [BEGIN, IMAGE, VIDEO]
    return ready(
        PreTrainedTokenizerFast(
            tokenizer_object=bpe, pad_token=PAD, eos_token=END, additional_special_tokens=marks
        )
    )


def published(model: str) -> Any:
    """That of a model, by hub id or folder. Raises MissingModel, one sentence with the fix."""
    from transformers import AutoTokenizer

    if model.count("/") == 1 and not Path(model).exists():
        transformers_weights(
            model
        )  # says within seconds that it cannot be had, where transformers tries for a minute
    try:
        return ready(AutoTokenizer.from_pretrained(model))
    except (OSError, ValueError, KeyError, ImportError) as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise MissingModel(f"tokenizer of {model!r} cannot be loaded ({first}): name a model with one") from e


def ready(tokenizer: Any) -> Any:
    """The same, with the tokens that it lacks of pictures and of ChatML, and an end of answers."""
    known = tokenizer.get_vocab()
    if missing := [token for token in (BEGIN, END, IMAGE, VIDEO) if token not in known]:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": missing}, replace_extra_special_tokens=False
        )
    tokenizer.eos_token = END
    if tokenizer.pad_token is None or tokenizer.pad_token == END:
        if PAD in tokenizer.get_vocab():
            tokenizer.pad_token = PAD
        else:
            tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def files(tokenizer: Any) -> dict[str, str]:
    """What `save_pretrained` writes, name → text."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text() for path in sorted(Path(folder).iterdir())}


def of_files(kept: Mapping[str, str]) -> Any:
    """The tokenizer that `files` was told of."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, text in kept.items():
            (Path(folder) / name).write_text(text)
        return AutoTokenizer.from_pretrained(folder)
