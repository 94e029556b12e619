"""clipmill encode: a run's clips through the frozen autoencoder and text encoder, once, kept as shards."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.training.diffusion.recipe import DiffusionRecipe
    from jobs.training.diffusion.system import System
    from pipeline.io.store import Store
    from pipeline.shards.latents import Encoded, Part
    from pipeline.shards.reader import Sample, ShardReader

EPILOG = """
examples
  clipmill encode run/ --recipe dit-xl --out run/latents
  clipmill encode run/ --recipe dit-xl --set autoencoder.path=sdxl-vae/ --out run/latents
  torchrun --nproc-per-node 8 -m jobs.cli encode run/ --recipe dit-xl --out run/latents
  clipmill train diffusion run/ --recipe dit-xl --set data.cache=run/latents --out model/

Training from the cache runs neither decoder nor encoders. It gives up variety: a clip keeps one window of
time and one caption a copy, those of the first epochs. Run the same command again after a kill and it goes on;
the bytes are those of an undisturbed run, on any number of ranks. A text encoder that is trained along
(text.kind: words) is not cached.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill encode",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run with shards, as 'clipmill curate' leaves it")
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE", help="what will be trained")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder, s3:// or gs:// of the cache")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument(
        "--copies", type=int, default=1, metavar="N", help="of each clip, each another window (default: 1)"
    )
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="clips encoded at a time (default: 8)"
    )
    parser.add_argument("--clips", type=int, default=256, metavar="N", help="most clips a tar (default: 256)")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that decode (default: 1)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: this rank's GPU, where there is one)")
    args = parser.parse_args(argv)

    from models.hub import MissingModel
    from pipeline.faults import StoreError

    try:
        from jobs.training.diffusion.recipe import DiffusionRecipe
        from jobs.training.recipe import load_training

        if min(args.copies, args.batch, args.clips) < 1 or args.workers < 0:
            raise ValueError("--copies, --batch and --clips must be at least 1, --workers at least 0")
        recipe = load_training(args.recipe, args.set)
        if not isinstance(recipe, DiffusionRecipe):
            raise ValueError(
                f"recipe {args.recipe} trains {recipe.trains}, from pixels: name one that trains diffusion"
            )
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        sizes = {"batch": args.batch, "clips": args.clips, "copies": args.copies, "workers": args.workers}
        encode(args.run, recipe, args.out, rank, world, **sizes, device=args.device)
    except (ValueError, StoreError, MissingModel) as e:  # RecipeError is a ValueError
        print(f"clipmill encode: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


def encode(
    run: str,
    recipe: DiffusionRecipe,
    out: str,
    rank: int = 0,
    world: int = 1,
    batch: int = 8,
    clips: int = 256,
    copies: int = 1,
    workers: int = 0,
    device: str | None = None,
) -> None:
    """This rank's share of the cache; whichever rank is last writes the index.

    Raises ValueError, StoreError or MissingModel: one sentence with the fix.
    """
    import itertools

    import numpy as np
    from torch.utils.data import DataLoader

    from jobs.training.data.loader import clips_of, made_with
    from jobs.training.diffusion.build import build_system
    from jobs.training.distributed import device_of
    from models.autoencoders.latents import latent_shape
    from pipeline.faults import counted
    from pipeline.io.store import Store
    from pipeline.shards import latents

    reader = clips_of(recipe, run)
    system = build_system(recipe, device_of(device), fresh=False)
    assert reader.shapes is not None
    positions = [int(np.prod(latent_shape(system.autoencoder, *shape))) for shape in reader.shapes]
    parts = latents.plan(reader, [4 * system.autoencoder.channels * n for n in positions], clips, copies)
    store = Store(out)
    counts = {"clips": reader.identity(), "clips_a_tar": clips, "copies": copies}
    if rank == 0:
        print(reader.table, flush=True)
    if latents.begin(store, made_with(recipe, system.weights) | counts):
        print("the run's clips have changed since: what differs is encoded again", flush=True)

    todo = [part for part in parts[rank::world] if _to_do(store, part, reader)]
    work = [(part.copy, rows) for part in todo for rows in _batches(part, batch)]
    batches: Any = _Clips(reader, work)
    stream = iter(DataLoader(batches, batch_size=None, num_workers=workers))
    for part in todo:
        broken: list[str] = []
        start, count = time.monotonic(), -(-len(part.rows) // batch)
        latents.write(store, part, _encoded(system, itertools.islice(stream, count), broken), broken)
        rate = len(part.rows) / (time.monotonic() - start)
        skipped = f", {len(broken)} broken" if broken else ""
        print(f"{part.name}: {len(part.rows)} clips{skipped}, {rate:.1f} a second", flush=True)
    index = latents.finish(store, parts)
    if index is None:
        print(f"rank {rank} is done; {store.uri} will be whole when the other ranks are")
        return
    left_out = copies * len(reader.keys) - len(index)
    print(
        f"{counted(len(index), 'clip')} in {counted(len(parts), 'tar')}, {left_out:,} broken left out: {store.uri}"
    )


def _to_do(store: Store, part: Part, reader: ShardReader) -> bool:
    """It is not there, of other clips, or can have clips now that were broken."""
    from pipeline.shards import latents
    from pipeline.shards.reader import BrokenSample

    if not latents.is_done(store, part):
        return True
    broken = set(latents.broken_in(store, part))
    for row in part.rows.tolist() if broken else ():
        if reader.keys[row] in broken:
            with contextlib.suppress(BrokenSample):
                reader.read(row)
                return True
    return False


def _batches(part: Part, size: int) -> list[Any]:
    return [part.rows[i : i + size] for i in range(0, len(part.rows), size)]


class _Clips:
    """Batches of decoded clips of one bucket and the keys of the broken ones, for a DataLoader."""

    def __init__(self, reader: ShardReader, work: list[tuple[int, Any]]):
        self.reader, self.work = reader, work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, i: int) -> tuple[list[Sample], list[str]]:
        from pipeline.shards.reader import BrokenSample

        found, broken = [], []
        self.reader.epoch, rows = self.work[i]
        for row in rows.tolist():
            try:
                found.append(self.reader.read(row))
            except BrokenSample as e:
                print(f"left out: {e}", file=sys.stderr, flush=True)
                broken.append(self.reader.keys[row])
        return found, broken


def _encoded(
    system: System, batches: Iterator[tuple[list[Sample], list[str]]], broken: list[str]
) -> Iterator[Encoded]:
    """Clips through the encoders; adds to `broken` as it goes."""
    import numpy as np
    import torch

    from jobs.training.data.pixels import to_unit
    from pipeline.shards.latents import Encoded

    for samples, unread in batches:
        broken += unread
        if not samples:
            continue
        video = torch.from_numpy(np.stack([s["video"] for s in samples])).to(system.device)
        posterior = system.encode(to_unit(video))
        mean = posterior.mean.cpu().numpy()
        logvar = None if posterior.logvar is None else posterior.logvar.cpu().numpy()
        texts: list[Any] = [None] * len(samples)
        if system.text is not None:
            features, mask = system.text([s["caption"] for s in samples])
            texts = [f[m].float().cpu().numpy() for f, m in zip(features, mask, strict=True)]
        for i, sample in enumerate(samples):
            variance = None if logvar is None else logvar[i]
            yield Encoded(sample["key"], sample["caption"], mean[i], variance, texts[i])


if __name__ == "__main__":
    raise SystemExit(main())
