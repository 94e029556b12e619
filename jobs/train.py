"""clipmill train: the latent video diffusion model or the VLM, from a run's shards."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EPILOG = """
examples
  clipmill train diffusion run/ --steps 100 --out model/
  clipmill train vlm run/ --steps 100 --frames 4 --size 64 --out model/

Both read the run's shards by byte range: shuffled, the same number of steps on every rank, resumable to
the sample. Run the same command with more --steps and it goes on from OUT/checkpoint.pt, giving what an
uninterrupted run would have given.
"""


@dataclass(frozen=True)
class Settings:
    """What a checkpoint was trained with; a resumed run must say the same."""

    model: str
    batch: int
    frames: int
    size: int
    lr: float
    seed: int


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill train",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=["diffusion", "vlm"])
    parser.add_argument("run", metavar="DIR", help="a run with shards, as 'clipmill curate' leaves it")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder for the checkpoint")
    parser.add_argument(
        "--steps", type=int, default=100, metavar="N", help="train until step N (default: 100)"
    )
    parser.add_argument("--batch", type=int, default=4, help="clips a step (default: 4)")
    parser.add_argument("--frames", type=int, default=8, help="frames a clip (default: 8)")
    parser.add_argument("--size", type=int, default=64, help="height and width, pixels, of 16 (default: 64)")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's learning rate (default: 0.001)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that decode (default: 1)")
    args = parser.parse_args(argv)

    from pipeline.store import StoreError

    if args.size % 16 or args.size < 16:
        print(f"clipmill train: --size {args.size}: give a multiple of 16", file=sys.stderr)
        return 2
    settings = Settings(args.model, args.batch, args.frames, args.size, args.lr, args.seed)
    try:
        train(args.run, args.out, settings, args.steps, args.workers)
    except (StoreError, TrainError) as e:
        print(f"clipmill train: {e}", file=sys.stderr)
        return 2
    return 0


class TrainError(Exception):
    """Training cannot start; one sentence with the fix."""


def train(run: str, out: Path, settings: Settings, steps: int, workers: int = 1) -> list[float]:
    """Train until step `steps`, from OUT/checkpoint.pt where there is one; returns the losses of this call."""
    import torch

    from pipeline.reader import ShardLoader, ShardReader

    torch.manual_seed(settings.seed)
    reader = ShardReader(
        f"{run.rstrip('/')}/shards",
        frames=settings.frames,
        size=(settings.size, settings.size),
        batch_size=settings.batch,
        seed=settings.seed,
    )
    loader = ShardLoader(reader, workers=workers)
    task = Diffusion(settings) if settings.model == "diffusion" else Captioning(settings)
    optimizer = torch.optim.AdamW(task.model.parameters(), settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    checkpoint, step = out / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["settings"] != vars(settings):
            raise TrainError(
                f"{checkpoint} was trained with {saved['settings']}: give the same, or another --out"
            )
        task.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        loader.load_state_dict(saved["data"])
        step = saved["step"]
    size = sum(p.numel() for p in task.model.parameters())
    print(
        f"{settings.model}: {size / 1e6:.1f} M parameters, {len(reader.keys)} clips, from step {step} to {steps}"
    )
    losses = []
    while step < steps:
        for batch in loader:
            loss = task.loss(batch, generator)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
            optimizer.step()
            step += 1
            losses.append(loss.item())
            print(f"step {step:4}  loss {losses[-1]:.4f}  gradient norm {norm:.3f}", flush=True)
            if step >= steps:
                break
    save(checkpoint, settings, task.model, optimizer, generator, loader, step)
    print(f"saved {checkpoint}")
    return losses


def save(
    path: Path,
    settings: Settings,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    loader: Any,
    step: int,
) -> None:
    """Write the checkpoint aside and rename it: a killed run keeps the one before."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    state = {
        "settings": vars(settings),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "data": loader.state_dict(),
        "step": step,
    }
    torch.save(state, aside)
    aside.replace(path)


class Diffusion:
    """Text → video: rectified flow on block-DCT latents (`models.video_dit`, `models.latents`)."""

    def __init__(self, settings: Settings):
        from models.latents import BlockDCT
        from models.video_dit import VideoDiT

        self.latents = BlockDCT(patch=8, keep=8)
        side = settings.size // 8
        self.model = VideoDiT(self.latents.channels, (settings.frames, side, side))

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        from models import text
        from models.video_dit import flow_loss

        latents = self.latents.encode(pixels(batch["video"]))
        return flow_loss(self.model, latents, text.encode(batch["caption"], 128), generator)


class Captioning:
    """Video → caption: next-token prediction (`models.small_vlm`)."""

    def __init__(self, settings: Settings):
        from models.small_vlm import SmallVLM

        self.model = SmallVLM(settings.frames, settings.size)

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        from models import text
        from models.small_vlm import caption_loss

        return caption_loss(self.model, pixels(batch["video"]), text.encode(batch["caption"], 128))


def pixels(video: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] → float32 [B, T, 3, H, W] in −1…1."""
    return video.permute(0, 1, 4, 2, 3).float() / 127.5 - 1


if __name__ == "__main__":
    raise SystemExit(main())
