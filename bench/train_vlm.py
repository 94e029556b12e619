"""Tokens a second of training a vision–language model, packed and not, against a plain loop, in one run.

    OMP_NUM_THREADS=1 .venv/bin/python -m bench.train_vlm [--rounds 40] [--out bench/results/train_vlm.md]

The same documents, model, first weights and settings (fused AdamW, clipped gradients, float32, one thread) for all:

- `plain`: the loop of small public trainers (nanoVLM's is the pattern): batches of so many documents as they come,
  padded to the longest, one forward pass with a padding mask, logits at every place, cross-entropy's mean over what is
  supervised, backward, clip, step.
- `rows`: our trainer, packing off: the same batches.
- `packed`: our trainer: best-fit into sequences of --tokens, documents that do not see each other.

Both of ours are whole steps of the trainer with all it does (counts, metrics, checks that losses are finite).
Documents are of mixed lengths: one in four is a clip of 8 frames with its caption, the others are conversations of a
length drawn log-evenly from 16 to 700 words, one in three of them with a clip. A round is a step of each side, in turn;
data are prepared before a step is timed. Tokens are those of documents, not of padding; ratios are of sums over all
rounds, with a 95 % interval by bootstrap over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jobs.training.distributed import connect, keep_freed_memory
from jobs.training.loop import Trainer
from jobs.training.recipe import load_training
from jobs.training.signals import Signals
from jobs.training.vlm.conversations import Documents
from jobs.training.vlm.task import build
from models.language.llava import Llava

WARM = 3
TOWER = (
    "{model_type: siglip_vision_model, hidden_size: 96, intermediate_size: 256, num_hidden_layers: 3,"
    " num_attention_heads: 4, image_size: 64, patch_size: 8}"
)
LANGUAGE = (
    "{model_type: qwen2, hidden_size: 256, intermediate_size: 768, num_hidden_layers: 6, num_attention_heads: 4,"
    " num_key_value_heads: 2, tie_word_embeddings: true}"
)
WORDS = [
    *("one", "two", "three", "red", "green", "blue", "circle", "square", "moves", "stands"),
    *("left", "right", "up", "down", "still", "on", "black", "white", "what", "is", "it"),
]


def made(folder: Path, talks: int) -> tuple[str, str]:
    """A run of clips with captions, and conversations."""
    from jobs import curate, toy

    with contextlib.redirect_stdout(None):
        assert toy.main(["--out", str(folder / "toy"), "--videos", "8", "--scenes", "6", "--questions"]) == 0
        command = ["--recipe", "toy", "--runner", "local", "--out", str(folder / "run")]
        assert curate.main([str(folder / "toy/videos"), *command]) == 0
    rng = np.random.default_rng(0)
    scenes = sorted((folder / "toy/questions/scenes").iterdir())
    lines = []
    for i in range(talks):
        asked, answered = (
            " ".join(rng.choice(WORDS, max(4, round(share * np.exp(rng.uniform(np.log(16), np.log(700)))))))
            for share in (0.3, 0.7)
        )
        told: dict[str, Any] = {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        }
        lines.append(json.dumps(told | ({"video": str(scenes[i % len(scenes)])} if i % 3 == 0 else {})))
    (folder / "talks.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "run"), str(folder / "talks.jsonl")


class Ours:
    """A trainer's own steps."""

    def __init__(self, run: str, talks: str, out: Path, world: Any, args: argparse.Namespace, packing: bool):
        sets = [
            "data.workers=0", "data.micro_batches=1", "data.lanes=1", f"data.tokens={args.tokens}", "data.pool=16",
            f"data.mixture=[{{data: {talks}, share: 0.75}}]", f"model={{kind: llava, tower: {TOWER}, layer: -1, "
            f"language: {LANGUAGE}, projector: {{map: mlp, pool: 2, newline: clip, whole_images: true}}}}",
            "frames.frames=8", "ema.lengths=[]", "held_out=0", "run.sample_every=0", "optimizer.lr=1e-4",
            "tokenizer=400", "train={tower: full, projector: full, language: full}",
        ]  # fmt: skip
        if not packing:
            sets += ["data.packing=false", f"data.batch={args.batch}"]
        recipe = load_training("small-vlm", sets)
        self.trainer = Trainer(recipe, run, out, world, build)
        self.signals, self.places, self.documents = Signals(), 0, 0

    def ready(self) -> None:
        self.trainer._prepare()
        self.trainer.metrics.read(self.trainer.world, {}, 1)

    def step(self) -> tuple[int, float, float]:
        """(tokens, seconds, processor seconds) of a step whose data are there."""
        found = self.trainer._fetch(self.signals)
        assert found is not None
        (batch,) = found[0]
        self.places += batch["tokens"].numel()
        self.documents += len(batch["key"])
        start, cpu = time.perf_counter(), time.process_time()
        self.trainer.take_step(*found)
        self.trainer.check()
        return self.trainer.task.tokens(batch), time.perf_counter() - start, time.process_time() - cpu


class Plain:
    """The plain loop, over the same source of documents."""

    def __init__(self, ours: Ours, model: Llava, args: argparse.Namespace):
        task: Any = ours.trainer.task
        loader: Any = ours.trainer.loader
        self.model, self.visuals, self.pad = model.train(), task.visuals, task.chat.tokenizer.pad_token_id
        self.source, self.process, self.size = loader.source, Documents(task.chat, task.visuals), args.batch
        o = ours.trainer.recipe.optimizer
        self.clip = o.clip
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            o.lr,
            o.betas,
            weight_decay=o.weight_decay,
            fused=True,
        )
        self.places = self.documents = 0
        self.batches = self._batches()

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
        number = 0
        while True:
            items = [self.process(self.source.nth(number + i)) for i in range(self.size)]
            number += self.size
            longest = max(item["length"] for item in items)
            tokens = torch.full((len(items), longest), self.pad)
            labels = torch.full((len(items), longest), -100)
            there = torch.zeros(len(items), longest, dtype=torch.long)
            seen = []
            for row, item in enumerate(items):
                n, ids = item["length"], torch.from_numpy(item["tokens"])
                tokens[row, :n], there[row, :n] = ids, 1
                labels[row, :n] = torch.where(torch.from_numpy(item["learnt"]), ids, -100)
                for what in item["visuals"]:
                    visual = self.visuals.loaded(what)
                    seen += self.visuals.tensors(visual.frames, self.visuals.counts(visual))
            yield tokens, labels, there, seen

    def step(self) -> tuple[int, float, float]:
        tokens, labels, there, seen = next(self.batches)
        self.places += tokens.numel()
        self.documents += len(tokens)
        start, cpu = time.perf_counter(), time.process_time()
        x = self.model.embed(tokens, seen)
        logits = self.model.language(inputs_embeds=x, attention_mask=there, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        float(loss.detach())
        return int(there.sum()), time.perf_counter() - start, time.process_time() - cpu


def ratio(a: np.ndarray, b: np.ndarray, column: int) -> tuple[float, float, float]:
    """Tokens a second of a ÷ those of b, with its interval; rows are rounds of (tokens, seconds, cpu seconds)."""
    rng = np.random.default_rng(0)

    def of(rows: np.ndarray) -> float:
        rate = [x[rows, 0].sum() / x[rows, column].sum() for x in (a, b)]
        return float(rate[0] / rate[1])

    n = len(a)
    drawn = [of(rng.integers(0, n, n)) for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return of(np.arange(n)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=2048, help="of a packed sequence")
    parser.add_argument("--batch", type=int, default=8, help="documents of a padded batch")
    parser.add_argument("--talks", type=int, default=400)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary, connect("cpu") as world:
        folder = Path(temporary)
        run, talks = made(folder, args.talks)
        packed = Ours(run, talks, folder / "packed", world, args, True)
        rows = Ours(run, talks, folder / "rows", world, args, False)
        model = copy.deepcopy(rows.trainer.task.phases[0].module)
        assert isinstance(model, Llava)
        plain = Plain(rows, model, args)
        for ours in (packed, rows):
            ours.ready()
        sides: dict[str, Any] = {"plain": plain, "rows": rows, "packed": packed}
        taken: dict[str, list[tuple[int, float, float]]] = {name: [] for name in sides}
        for i in range(args.rounds + WARM):
            for k in range(len(sides)):
                name = list(sides)[(i + k) % len(sides)]
                found = sides[name].step()
                if i >= WARM:
                    taken[name].append(found)
            if i % 10 == 0:
                print(f"round {i}", flush=True)
        waste = {
            name: 1 - sum(x[0] for x in taken[name]) / (side.places * args.rounds / (args.rounds + WARM))
            for name, side in sides.items()
        }
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
    told = {name: np.array(x) for name, x in taken.items()}
    lines = [
        "| | tokens a step | places that are padding | tokens a CPU second | ÷ plain | tokens a second | ÷ plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, x in told.items():
        cells = []
        for column in (2, 1):
            value, low, high = ratio(x, told["plain"], column)
            rate = x[:, 0].sum() / x[:, column].sum()
            cells.append(f"{rate:,.0f} | {value:.2f} ({low:.2f}…{high:.2f})")
        lines.append(f"| {name} | {x[:, 0].mean():,.0f} | {waste[name]:.1%} | {' | '.join(cells)} |")
    load = os.getloadavg()[0]
    text = (
        f"{args.rounds} rounds, {parameters:.1f} M parameters, sequences of {args.tokens:,} tokens, batches of "
        f"{args.batch} documents, float32, one thread, torch {torch.__version__}; load of the machine {load:.0f} on "
        f"{os.cpu_count()} cores.\n\n" + "\n".join(lines)
    )
    print(text)
    if args.out:
        about = (__doc__ or "").split("\n\n", 2)[2].strip()
        args.out.write_text(
            f"# Training vision–language models: packed, padded, and a plain loop\n\n{about}\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
